"""The sdist and the wheel: what is in them, what they need, and that they work in an environment of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pybind11
import pytest

from sam_fast.ops.backend import OPERATIONS

ROOT = Path(__file__).resolve().parent.parent
# What any Linux with g++'s runtime libraries has; nothing of torch, CUDA or OpenCV.
SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libgomp.so.1"}
SYSTEM_LIBRARIES |= {"libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
# Modules that `import sam_fast` must leave alone: command line, kernels' compiler, optional extras.
NOT_ON_IMPORT = {"triton", "typer", "rich", "onnx", "onnxscript", "onnxruntime", "transformers", "cv2", "torchvision"}
NOT_ON_IMPORT |= {"pycocotools", "segment_anything"}


def run(*command: str | os.PathLike[str], **options: object) -> str:
    """Run a command outside any editable set-up and return its standard output; show both outputs if it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    # Build tools that live beside the interpreter (cmake, ninja) are found there.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    done = subprocess.run(command, capture_output=True, text=True, env=environment, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git knows or would add, as a fresh clone has them."""
    copy = tmp_path_factory.mktemp("source") / "sam_fast"
    listed = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    script = "import sys, scikit_build_core.build as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", script, folder, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that the sdist is shown to hold all that a build needs."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, sdist, cwd=folder)
    (archive,) = folder.glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel; it borrows the dependencies of this one, but not its sam_fast."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # Folders named in a .pth file do not have their own .pth files read: the editable sam_fast stays behind.
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet", "--no-warn-script-location")
    run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", *options, wheel, cwd=folder)
    return folder


def python(environment: Path, script: str) -> str:
    return run(environment / "bin" / "python", "-c", script, cwd=environment)


def test_sdist_holds_the_sources_and_nothing_else(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "pyproject.toml",
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
        "csrc/bindings.cpp",
        "kernels/__init__.py",
    ):
        assert name in names
    assert {name.split("/")[0] for name in names}.isdisjoint({"build", "dist", "outputs", ".venv", ".ci", ".git"})
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", ".pth"))]


def test_wheel_holds_the_package_and_no_sources(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "sam_fast/kernels/__init__.py" in names
    for name in ("photos/astronaut.jpg", "photos/objects.json", "textures/grass.jpg", "nano/model.safetensors"):
        assert f"sam_fast/assets/{name}" in names
    assert [name for name in names if re.fullmatch(r"sam_fast/_C\.[\w-]+\.so", name)]
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sam_fast"}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".txt.in", ".pyc"))]


def test_wheel_requires_no_vision_library(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    packages = {re.split(r"[^\w.-]", line)[0].lower() for line in always}
    assert packages == {"torch", "numpy", "pillow", "safetensors", "typer", "rich"}


def test_native_module_needs_system_libraries_only(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        module = archive.extract(name, tmp_path)
    dynamic = run("readelf", "--dynamic", "--wide", module)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert needed, dynamic
    assert needed <= SYSTEM_LIBRARIES
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    undefined = [line for line in run("readelf", "--dyn-syms", "--wide", module).splitlines() if " UND " in line]
    assert undefined
    assert not [line for line in undefined if re.search(r"_ZN\w*(2at|3c10|5torch|2cv)|cuda|THP", line)]


def test_installed_package_works_outside_the_tree(environment: Path) -> None:
    script = """
import json, sys, torch, sam_fast, sam_fast.kernels
from importlib import resources
from PIL import Image
from sam_fast import native
from sam_fast.ops.nms import nms
photos = resources.files("sam_fast") / "assets" / "photos"
sizes = {f.name: Image.open(f).size for f in photos.iterdir() if f.name.endswith(".jpg")}
boxes = torch.tensor([[0., 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40]])
print(json.dumps({
    "files": [sam_fast.__file__, native.module().__file__, sam_fast.kernels.__file__],
    "level": native.cpu_level(),
    "photos": sizes,
    "nano": sum(p.numel() for p in sam_fast.sam_model_registry["nano"]().parameters()),
    "kept": nms(boxes, torch.tensor([0.5, 0.9, 0.7]), 0.5, backend="native").tolist(),
}))
"""
    report = json.loads(python(environment, script))
    for file in report["files"]:
        assert Path(file).is_relative_to(environment)
    assert report["level"] in ("base", "avx2", "avx512", "avx512bf16")
    assert report["photos"]["astronaut.jpg"] == [512, 512]
    assert report["nano"] > 9e6
    assert report["kept"] == [1, 2]


def test_installed_command_reports_a_sound_installation(environment: Path) -> None:
    report = json.loads(run(environment / "bin" / "sam-fast", "doctor", "--json", cwd=environment))
    assert report["problems"] == []
    assert report["native"]["available"]
    preferred = {operation: row["cpu"][0] for operation, row in OPERATIONS.items()}
    assert {operation: row["cpu"]["backend"] for operation, row in report["operations"].items()} == preferred


def test_import_loads_nothing_it_does_not_need(environment: Path) -> None:
    script = """
import json, sys, torch
before = set(sys.modules)
import sam_fast
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    loaded = set(json.loads(python(environment, script)))
    assert "sam_fast" in loaded
    assert not loaded & NOT_ON_IMPORT


def test_import_is_quick(environment: Path) -> None:
    """At most 0.3 s beyond `import torch`, the best of five processes: a promise that the documentation makes."""
    script = "import time, torch; t = time.perf_counter(); import sam_fast; print(time.perf_counter() - t)"
    seconds = min(float(python(environment, script)) for _ in range(5))
    print(f"import sam_fast: {seconds:.3f} s beyond import torch")
    assert seconds <= 0.3


@pytest.mark.parametrize("setting", ["ON", "AUTO"])
def test_build_without_a_cuda_compiler(source: Path, tmp_path: Path, setting: str) -> None:
    """ON stops with a message that says what to do; AUTO builds for the CPU."""
    tools = {name: shutil.which(name, path=_build_path()) for name in ("cmake", "ninja", "c++")}
    assert all(tools.values()), tools
    path = os.pathsep.join(d for d in _build_path().split(os.pathsep) if not (Path(d) / "nvcc").exists())
    hidden = ("CUDACXX", "CUDA_PATH", "CUDA_HOME", "CUDA_BIN_PATH", "CUDAToolkit_ROOT")
    command = [tools["cmake"], "-G", "Ninja", "-S", source, "-B", tmp_path, f"-DSAM_FAST_CUDA={setting}"]
    command += [f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}", f"-DCMAKE_CXX_COMPILER={tools['c++']}"]
    command += [
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DPYBIND11_FINDPYTHON=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    environment = {**{k: v for k, v in os.environ.items() if k not in hidden}, "PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)  # type: ignore[arg-type]
    if setting == "AUTO":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert "SAM_FAST_CUDA=ON, but no CUDA compiler was found" in done.stderr
        assert "CUDACXX" in done.stderr


def _build_path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
