"""What GPU kernels could do, and other ways to launch them: `python -m benchmarks.trials --output FOLDER`.

Sections:
    ceilings   what memory and the largest products reach
    products   those of a transformer block, as the encoder has them and in other ways
    attention  the encoder's, by launch parameters, and PyTorch's
    rows       LayerNorm and rounding to 8 bits, by launch parameters
    decoder    the image side of the decoder by launch parameters, and the whole of it by prompts at a time
    profiles   the cases of benchmarks/gpu.py, and which kernels they are made of
    gradients  layers of training, forwards and backwards, by launch parameters, and PyTorch's
    training   steps of training, whole and in parts, and which kernels they are made of
Kernels run on random numbers, and each result is compared with PyTorch's in float32 before it is timed (that of
attention's terms in the attention that takes them). PyTorch's own operations and products are timed as they are.

Lines go to FOLDER/trials.txt as they are printed, rows to FOLDER/trials.csv; both say where they come from. The package
must be built (`python -m benchmarks.gpu` does that).

Trials are made by a child process. Where one breaks the CUDA context, hangs, or takes the process with it, another
child goes on with the next. The exit code is 0, 1 if a trial failed, or 2 without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import ROOT, size

SECTIONS = ("ceilings", "products", "attention", "rows", "decoder", "profiles", "gradients", "training")
FINISHED = (0, 1, 2)  # exit codes of a child that needs no other after it
_BROKEN = 77  # that of one whose CUDA context is broken
_GRACE = 30  # seconds for the last trial, after time is over


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated, in the order wanted")
    parser.add_argument("--models", nargs="+", default=["vit_b", "vit_h"], help="the first one's decoder is tried")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"], help="of profiles")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images of an encoder")
    parser.add_argument("--prompts", nargs="+", type=int, default=[64, 1024], help="kernels: the first, decoder: last")
    parser.add_argument(
        "--size", type=size, default=(1080, 1920), help="of the image, in profiles and the whole decoder"
    )
    parser.add_argument("--points-per-side", type=int, default=32, help="of automatic masks in profiles")
    parser.add_argument("--seconds", type=float, default=200, help="after which no new trial begins")
    parser.add_argument("--patience", type=float, default=120, help="seconds after which a trial counts as hung")
    parser.add_argument("--threads", type=int, default=12, help="that compile kernels at the same time; 0: none")
    parser.add_argument("--device", default="cuda", help="cpu tries this program out, with --models tiny")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "trials", help="a folder")
    parser.add_argument("--commit", help="of the sources, where git does not know it")
    parser.add_argument("--begun", type=Path, help=argparse.SUPPRESS)  # of a child: where it writes what it begins
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.sections = given.sections.split(",")
    unknown = sorted(set(given.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return given


def supervise(
    command: list[str],
    begun: Path,
    log: Path,
    deadline: float,
    patience: float,
    environment: dict[str, str] | None = None,
) -> int:
    """Run a child, and another one after each that does not come to its end; returns the exit code of all.

    Args:
        command: of a child.
        begun: the file that a child adds a line to whenever it begins a trial.
        log: where it is said that a child has been replaced.
        deadline: by time.time().
        patience: seconds that a trial may take.
        environment: of children.
    """
    code, trials = 0, -1
    while True:
        begun.touch()
        child = subprocess.Popen(command, cwd=ROOT, env=environment)
        while child.poll() is None:
            time.sleep(0.1)
            if time.time() > min(begun.stat().st_mtime + patience, deadline + _GRACE):
                child.kill()
        if child.returncode in FINISHED:
            return max(code, child.returncode)
        code, before = 1, trials
        names = begun.read_text().splitlines()
        trials = len(names)
        line = f"!! the process ended with {child.returncode} in: {names[-1] if names else 'its start'}"
        print(line, flush=True)
        with log.open("a") as file:
            file.write(line + "\n")
        if trials <= max(before, 0) or time.time() > deadline:  # another one would come no further
            return code


def work(given: argparse.Namespace, command: str) -> int:
    """Make all trials that have not begun yet, in this process."""
    import torch

    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks.trials needs a GPU that PyTorch can use; --device cpu tries it out", file=sys.stderr)
        return 2
    from benchmarks.device_timing import provenance
    from benchmarks.gpu_sections import known_models
    from benchmarks.trials import decoder, encoder, gradients, products, profiles, training
    from benchmarks.trials.run import BrokenContext, Run

    unknown = sorted(set(given.models) - set(known_models()))
    if unknown:
        raise SystemExit(f"unknown model {', '.join(unknown)}; there are {', '.join(known_models())}")
    torch.set_grad_enabled(False)
    gc.freeze()  # the recording of each graph collects garbage first, and shall not look at all modules
    device = torch.device(given.device)
    run = Run(
        device=device,
        folder=given.output,
        origin=provenance(device, command, given.commit),
        deadline=given.deadline,
        begun=given.begun,
        models=given.models,
        precisions=given.precisions,
        batches=given.batches,
        prompts=given.prompts,
        size=given.size,
        points_per_side=given.points_per_side,
        threads=given.threads,
    )
    make = {
        "ceilings": products.try_ceilings,
        "products": products.try_products,
        "attention": encoder.try_attention,
        "rows": encoder.try_rows,
        "decoder": decoder.try_decoder,
        "profiles": profiles.try_profiles,
        "gradients": gradients.try_gradients,
        "training": training.try_training,
    }
    for section in given.sections:
        try:
            make[section](run)
        except BrokenContext:
            sys.stdout.flush()
            os._exit(_BROKEN)  # at once: what is freed on the way out would fail, too
        except Exception as error:  # of inputs, which a section makes before its trials
            run.fail(section, error)
    if run.left_out:
        run.say(f"left out, time was over: {', '.join(run.left_out)}")
    return 1 if run.failed else 0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parse_arguments(arguments)
    if given.begun:
        own = arguments[: arguments.index("--begun")]
        return work(given, shlex.join(["python", "-m", "benchmarks.trials", *own]))
    given.output = given.output.resolve()  # a child begins in another folder
    given.output.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + given.seconds
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder) / "begun.txt"
        command = [sys.executable, "-m", "benchmarks.trials", *arguments]
        command += ["--begun", str(begun), "--deadline", str(deadline), "--output", str(given.output)]
        environment = {**os.environ, "TRITON_INTERPRET": "1"} if given.device == "cpu" else None
        return supervise(command, begun, given.output / "trials.txt", deadline, given.patience, environment)


if __name__ == "__main__":
    sys.exit(main())
