"""Run the tests of the CUDA operations under NVIDIA's compute-sanitizer, on a machine that has it and a GPU.

python tests/run_compute_sanitizer.py [pytest arguments; default: tests/ops -k "gpu and cuda"]

memcheck finds accesses outside of memory, racecheck finds threads of a block that meet in shared memory, and synccheck
finds barriers that some threads miss. The exit code is 0 only if all of them, and the tests, find nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from sam_fast import native

_ROOT = Path(__file__).resolve().parent.parent
_TOOLS = ("memcheck", "racecheck", "synccheck")
_FOUND_SOMETHING = 86


def find_sanitizer() -> str | None:
    """The program, on PATH or in the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    return shutil.which("compute-sanitizer", path=path)


def main() -> int:
    sanitizer = find_sanitizer()
    if sanitizer is None:
        raise SystemExit("compute-sanitizer was not found; it comes with the CUDA toolkit")
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU can be used here")
    if (reason := native.unavailable_reason or native.cuda_unavailable_reason()) is not None:
        raise SystemExit(reason)
    arguments = sys.argv[1:] or ["tests/ops", "-k", "gpu and cuda"]
    failed = []
    for tool in _TOOLS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND_SOMETHING), "--target-processes", "all"]
        # Memory of their own for all tensors, so that an access behind one of them is not one to another.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
        print(f"---- {tool}", flush=True)
        if subprocess.run([*command, *pytest], env=environment, cwd=_ROOT).returncode != 0:
            failed.append(tool)
    print(f"failed: {', '.join(failed)}" if failed else "nothing found")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
