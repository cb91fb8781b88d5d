"""Compiles csrc/*.cu for the emulated GPU and loads them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_CSRC = _ROOT / "csrc"
_NAME = "_cuda_emulated"
# Products and sums are fused only where that is written, as on the GPU (--fmad=false). A fortified longjmp refuses to
# go to another fiber.
_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
_FLAGS += [
    "-DSAM_FAST_CUDA_DEVICE_TYPE=1",
    "-DSAM_FAST_MOST_BLOCKS=5",
    "-DSAM_FAST_TALLY_WARPS=6",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]


@cache
def emulated_module() -> ModuleType:
    """The module whose `*_cuda` functions run on CPU tensors; compiled once per state of the sources."""
    sources = [*sorted(_CSRC.glob("*.cu")), _CSRC / "bindings_cuda.cpp", _HERE / "module.cpp"]
    headers = sorted([*_CSRC.glob("*.h"), *_CSRC.glob("*.cuh"), _HERE / "cuda_runtime.h"])
    state = hashlib.sha256(repr(_FLAGS).encode())
    for path in (*sources, *headers):
        state.update(path.read_bytes())
    directory = _ROOT / "build" / "cuda_emulation" / state.hexdigest()[:16]
    library = directory / f"{_NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        directory.mkdir(parents=True, exist_ok=True)
        _compile(sources, library)
    spec = importlib.util.spec_from_file_location(_NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(sources: list[Path], library: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    includes = [f"-I{path}" for path in (_HERE, _CSRC, pybind11.get_include(), sysconfig.get_path("include"))]

    def compile_one(source: Path) -> Path:
        target = library.with_name(f"{source.name}.{os.getpid()}.o")
        subprocess.run([compiler, *_FLAGS, *includes, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    unfinished = library.with_suffix(f".{os.getpid()}")
    subprocess.run([compiler, "-shared", *objects, "-o", unfinished], check=True)
    unfinished.rename(library)
    for path in objects:
        path.unlink()
