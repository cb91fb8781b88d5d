"""Compiles kernels for GPUs that are not here, and reads from the machine code what they need.

As a program, in a process of its own, because TRITON_INTERPRET must not be set there:
`python tests/ahead.py [file ...]` prints a table, with `--json` one object per variant.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from sam_fast.kernels.launch import Variant
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90)
FILES = sorted(
    path.stem for path in (Path(__file__).parents[1] / "kernels").glob("*.py") if "def variants(" in path.read_text()
)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_ahead(variant: Variant, architecture: int) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory (bytes) and counts of instructions of a variant."""
    signature, attributes = {}, {}
    for index, name in enumerate(variant.kernel.arg_names):
        kind = variant.signature.get(name, "constexpr")
        signature[name], _, multiple = kind.partition(":")
        if multiple:
            attributes[(index,)] = [["tt.divisibility", int(multiple)]]
    source = ASTSource(variant.kernel, signature, variant.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=variant.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _dump("-res-usage", file.name)
        code = _dump("-sass", file.name)
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    return {
        "variant": variant.name,
        "architecture": architecture,
        "registers": registers,
        "stack": stack,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall(r"\bHGMMA\b|\bQGMMA\b", code)),
        "mma": len(re.findall(r"\bHMMA\b", code)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4}\*/", code, re.M)),
        "expects_wgmma": variant.wgmma,
    }


def _dump(option: str, path: str) -> str:
    return subprocess.run([_CUOBJDUMP, option, path], check=True, capture_output=True, text=True).stdout


def compile_file(file: str, architecture: int) -> list[dict[str, Any]]:
    """Rows of all variants in a file of kernels."""
    module = importlib.import_module(f"sam_fast.kernels.{file}")
    return [{"file": file, **compile_ahead(variant, architecture)} for variant in module.variants(architecture)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--architecture", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    tasks = [(file, architecture) for file in arguments.files for architecture in arguments.architecture]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for rows in pool.map(compile_file, *zip(*tasks, strict=True)):
            for row in rows:
                line = json.dumps(row) if arguments.json else " ".join(f"{key}={value}" for key, value in row.items())
                print(line, flush=True)


if __name__ == "__main__":
    main()
