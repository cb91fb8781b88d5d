"""SAM on a GPU against other implementations: `python -m benchmarks.gpu`, on a machine that may have no network.

It builds the package if that is missing, runs the tests of kernels and operations, and then, per model and peer, checks
a result against the official code in float32 before it times it. Rows are appended to --output as they come.

Sections:
    encoder  normalised images to embeddings
    click    `predict`: one point, image set, to three boolean masks in numpy
    decode   many points to low-resolution logits
    post     those logits to boxes and stability scores at full size (ours also packs the masks)
    amg      automatic masks, encoding included, thresholds such that half of the masks pass the IoU filter
    batch    the same of eight images, one by one and by `generate_batch`; ours only
    cold     start of a process to the first mask
Weights are seeded (`sam_fast.modeling.seeded`), so masks are arbitrary blobs.

Peers: segment_anything in float32 (the reference) and bf16, transformers with SDPA (its encoder), and with --compile
the official code and segment-anything-fast, both with an encoder under torch.compile(mode="max-autotune"); those that
cannot be imported are left out. By PyTorch's defaults float32 products are free of TF32, and cuDNN's convolutions (an
encoder has three) are not.

The exit code is 0, 1 if a result was refused or a test failed, or 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("encoder", "click", "decode", "post", "amg", "batch", "cold")
PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8")
_TEST_SECONDS = 150  # after which tests are stopped
_TESTS_NEED = ("segment_anything", "hypothesis", "cv2", "pytest")
_COMPILER_SETTINGS = "TORCHINDUCTOR_MAX_AUTOTUNE"  # environment variables that change what peers are compiled to
_BUILT = "SAM_FAST_BENCHMARK_BUILT"  # set while the program runs a second time, after a build


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=sections, default=",".join(SECTIONS), help="comma-separated")
    parser.add_argument("--models", nargs="+", default=["vit_b", "vit_l", "vit_h"])
    parser.add_argument(
        "--precisions", nargs="+", default=["bf16", "fp16", "fp8"], choices=PRECISIONS, help="of sam_fast"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="of the encoder")
    parser.add_argument("--prompts", nargs="+", type=int, default=[64, 1024], help="of decode; post takes the first")
    parser.add_argument(
        "--sizes", nargs="+", type=size, default=[(1080, 1920), (480, 640), (1500, 2250)], help="click: the first"
    )
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--peers", help="a folder with more packages, put on sys.path: segment_anything, ...")
    parser.add_argument("--compile", action="store_true", help="time compiled encoders of peers, too (minutes)")
    parser.add_argument("--quick", action="store_true", help="vit_b, batch 1, one size, no tests: 90 seconds")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.6, help="that a series of repetitions takes, about")
    parser.add_argument("--budget", type=float, default=470, help="seconds after which nothing new begins")
    parser.add_argument("--device", default="cuda", help="cpu tries this program out")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.csv")
    parser.add_argument("--commit", help="of the sources, where git does not know it")
    given = parser.parse_args(arguments)
    if given.quick:
        given.models, given.batches, given.no_tests = given.models[:1], given.batches[:1], True
        given.sizes, given.budget = given.sizes[:1], min(given.budget, 80)
    return given


def sections(text: str) -> list[str]:
    """Names of sections, separated by commas.

    Raises:
        argparse.ArgumentTypeError: there is no such section.
    """
    names = text.split(",")
    unknown = sorted(set(names) - set(SECTIONS))
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return names


def size(text: str) -> tuple[int, int]:
    """(H, W) of an image, from a text such as 1080x1920.

    Raises:
        argparse.ArgumentTypeError: the text is no such thing.
    """
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"a size is height x width in pixels, such as 1080x1920, got {text!r}")
    return int(sides[0]), int(sides[1])


def ensure_built() -> None:
    """Install the package in place where it, or its compiled module, is missing, and begin again with it.

    Raises:
        RuntimeError: the build failed, or did not help.
    """
    probe = "import sam_fast.kernels, sam_fast.native as n; raise SystemExit(n.unavailable_reason)"
    found = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode == 0:
        return
    if os.environ.get(_BUILT):
        raise RuntimeError(f"sam_fast was built, and still: {found.stderr.strip().splitlines()[-1]}")
    print("building sam_fast in place", flush=True)
    options = ["--no-build-isolation", "--no-deps", "--quiet", "--disable-pip-version-check"]
    if sys.prefix == sys.base_prefix:
        options.append("--break-system-packages")
    build = subprocess.run([sys.executable, "-m", "pip", "install", *options, "-e", str(ROOT)], check=False)
    if build.returncode:
        raise RuntimeError("pip could not build sam_fast; it needs scikit-build-core, pybind11, cmake and ninja")
    # A new process: an editable install takes effect when Python starts.
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
    os.chdir(ROOT)
    os.execve(sys.executable, command, {**os.environ, _BUILT: "1"})


def run_tests(peers: str | None) -> bool:
    """Run the tests of kernels and operations; whether they passed in time."""
    environment = dict(os.environ)
    missing = [name for name in _TESTS_NEED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"tests are left out: they need {', '.join(missing)} (see --peers)", flush=True)
        return True
    if peers:
        environment["PYTHONPATH"] = os.pathsep.join([peers, environment.get("PYTHONPATH", "")])
    # Compiling for other GPUs needs none, and takes minutes.
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=10", "tests/kernels", "tests/ops"]
    command += ["--ignore=tests/kernels/test_ahead.py", "-p", "no:cacheprovider"]
    print("$", shlex.join(command), flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=_TEST_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"tests were stopped after {_TEST_SECONDS} s", flush=True)
        return False


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)
    start = time.monotonic()
    import torch

    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks.gpu needs a GPU that PyTorch can use; --device cpu tries the program out", file=sys.stderr)
        return 2
    ensure_built()
    if given.peers:
        given.peers = str(Path(given.peers).resolve())  # tests begin in another folder
        sys.path.insert(0, given.peers)

    from benchmarks.device_timing import print_rows, provenance
    from benchmarks.gpu_sections import Run, known_models, run_cold, run_model

    unknown = sorted(set(given.models) - set(known_models()))
    if unknown:
        raise SystemExit(f"unknown model {', '.join(unknown)}; there are {', '.join(known_models())}")
    passed = given.no_tests or run_tests(given.peers)
    torch.set_grad_enabled(False)
    device = torch.device(given.device)
    settings = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(_COMPILER_SETTINGS)]
    words = ["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]
    command = shlex.join([*settings, *words])
    run = Run(
        device=device,
        output=given.output,
        origin=provenance(device, command, given.commit),
        seconds=min(given.seconds, 0.2) if given.quick else given.seconds,
        deadline=start + given.budget,
        sections=given.sections,
        precisions=given.precisions,
        batches=given.batches,
        prompts=given.prompts,
        sizes=given.sizes,
        points_per_side=given.points_per_side,
        compiled=given.compile,
    )
    if set(given.sections) != {"cold"}:
        for name in given.models:
            run_model(run, name)
    if "cold" in given.sections:
        run_cold(run, given.models[0], given.peers)
    print_rows(run.rows)
    for title, lines in (("left out", run.left_out), ("REFUSED", run.refused)):
        for line in lines:
            print(f"{title}: {line}")
    if not passed:
        print("tests of kernels or operations FAILED, or were not done in time")
    return 0 if passed and not run.refused else 1


if __name__ == "__main__":
    sys.exit(main())
