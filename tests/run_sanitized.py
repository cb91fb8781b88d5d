"""Run the tests of the native operations against a module built with AddressSanitizer and UndefinedBehaviorSanitizer.

python tests/run_sanitized.py [pytest arguments; default: tests/ops]

The module is built in build/asan, apart from the installed one, and laid beside links to the Python sources in
build/asan/stage. Every Python process of the run, those that tests start included, takes sam_fast from there.
The exit code is pytest's; a sanitizer that finds something ends the process, which is not 0 either.
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

# Python runs this at its start. It outdoes an editable install, which answers `import sam_fast` before any path is
# looked at, and the sam_fast of the working directory, which lacks the module.
_SITECUSTOMIZE = """
import sys
from importlib.machinery import PathFinder


class StageFinder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{stage!r}]) if name == "sam_fast" else None


sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable_")]
sys.meta_path.insert(0, StageFinder)
"""


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
        "-DCMAKE_BUILD_TYPE=Release",
        # Instrumented intrinsics look uninitialised to g++ 12, and are too long for it to follow their variables.
        "-DCMAKE_CXX_FLAGS=-Wno-maybe-uninitialized -fno-var-tracking",
        "-DSAM_FAST_SANITIZE=ON",
        "-DSAM_FAST_CUDA=OFF",
    ]
    subprocess.run([cmake, "-S", _ROOT, "-B", _BUILD, *configure], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", _BUILD, "--parallel", str(os.cpu_count() or 1)], check=True)
    shutil.rmtree(_STAGE, ignore_errors=True)
    subprocess.run([cmake, "--install", _BUILD, "--prefix", _STAGE], check=True, stdout=subprocess.DEVNULL)
    for entry in (_ROOT / "sam_fast").iterdir():
        if not entry.name.startswith(("_C", "__pycache__")):
            (_STAGE / "sam_fast" / entry.name).symlink_to(entry)
    (_STAGE / "sam_fast" / "kernels").symlink_to(_ROOT / "kernels")
    (_STAGE / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(stage=str(_STAGE)))


def sanitized_environment() -> dict[str, str]:
    """The environment in which an unsanitized python loads the module.

    The sanitizer's library has to come first in the process; libstdc++ comes with it, as its functions are
    looked up when it starts. Leaks are not looked for: the interpreter keeps much memory until it ends.
    """
    compiler = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libstdc++.so")
    found = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    return {
        **os.environ,
        "PYTHONPATH": str(_STAGE),
        "LD_PRELOAD": " ".join(str(Path(path).resolve()) for path in found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def main() -> int:
    """Build, make sure that the sanitized module is the one that is imported, and run pytest."""
    build()
    environment = sanitized_environment()
    probe = [sys.executable, "-c", "from sam_fast import native; print(native.module().__file__)"]
    loaded = subprocess.check_output(probe, env=environment, cwd=_ROOT, text=True).strip()
    if not loaded.startswith(str(_STAGE)):
        raise SystemExit(f"expected the sanitized module below {_STAGE}, got {loaded}")
    # A sanitizer writes its report to the file descriptor and ends the process: pytest must not hold that back.
    pytest = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider"]
    return subprocess.run([*pytest, *(sys.argv[1:] or ["tests/ops"])], env=environment, cwd=_ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
