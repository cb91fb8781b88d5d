"""Run the tests of the native operations against a module built with AddressSanitizer and UndefinedBehaviorSanitizer.

python tests/run_sanitized.py [pytest arguments; default: tests/ops]

The module is built in build/asan, apart from the installed one, and laid beside links to the Python sources in
build/asan/stage. The exit code is pytest's; a sanitizer that finds something ends the process, which is not 0 either.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_BUILD = _ROOT / "build" / "asan"
_STAGE = _BUILD / "stage"
_INSIDE = "SAM_FAST_SANITIZED_STAGE"


def build() -> None:
    """Compile the sanitized module and lay out the package around it."""
    import pybind11

    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if cmake is None:
        raise SystemExit("cmake is needed to build the sanitized module")
    configure = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DPYBIND11_FINDPYTHON=ON",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        "-DSAM_FAST_SANITIZE=ON",
        "-DSAM_FAST_CUDA=OFF",
    ]
    subprocess.run([cmake, "-S", _ROOT, "-B", _BUILD, *configure], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", _BUILD, "--parallel"], check=True)
    shutil.rmtree(_STAGE, ignore_errors=True)
    subprocess.run([cmake, "--install", _BUILD, "--prefix", _STAGE], check=True, stdout=subprocess.DEVNULL)
    for entry in (_ROOT / "sam_fast").iterdir():
        if not entry.name.startswith(("_C", "__pycache__")):
            (_STAGE / "sam_fast" / entry.name).symlink_to(entry)
    (_STAGE / "sam_fast" / "kernels").symlink_to(_ROOT / "kernels")


def sanitizer_environment() -> dict[str, str]:
    """The environment in which an unsanitized python can load the module.

    The sanitizer's library has to come first in the process; libstdc++ comes with it, as its functions are
    looked up when it starts. Leaks are not looked for: the interpreter keeps much memory until it ends.
    """
    compiler = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libstdc++.so")
    find = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    return {
        **os.environ,
        _INSIDE: str(_STAGE),
        "LD_PRELOAD": " ".join(str(Path(path).resolve()) for path in find),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def run_inside(stage: str, arguments: list[str]) -> int:
    """Run pytest on the staged package, in the process that has the sanitizer."""
    # An editable install answers `import sam_fast` before sys.path is looked at.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable_")]
    sys.path.insert(0, stage)
    import pytest

    from sam_fast import native

    loaded = native.module().__file__
    if not str(loaded).startswith(stage):
        raise SystemExit(f"expected the sanitized module below {stage}, got {loaded}")
    # A sanitizer writes its report to the file descriptor and ends the process: pytest must not hold that back.
    return int(
        pytest.main(["-q", "--capture=sys", "-p", "no:cacheprovider", *(arguments or [str(_ROOT / "tests" / "ops")])])
    )


def main() -> int:
    """Build, then start the tests in a process of their own."""
    stage = os.environ.get(_INSIDE)
    if stage is not None:
        return run_inside(stage, sys.argv[1:])
    build()
    command = [sys.executable, __file__, *sys.argv[1:]]
    return subprocess.run(command, env=sanitizer_environment(), cwd=_ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
