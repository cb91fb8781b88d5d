"""A training step of nano on a CPU, with the package's attention and with PyTorch's: `python -m benchmarks.training`.

The packaged weights, forwards and backwards without the update, for images of procedural scenes in the way nano was
trained: two corrections of some objects at 256 px, three at 512 px. The parts of the step:

    whole         encoder, prompts, corrections and grouping
    encoder       the image encoder alone

Errors are those of all gradients together in the Euclidean norm, relative, against PyTorch's attention in the same
precision. In bfloat16 that is what roundings do: some decide which of an object's three masks is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib import resources
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Peer, WrongResult, compare, positive, print_rows, rows, write_rows
from sam_fast.build_sam import NANO, build_sam_from_config
from sam_fast.data.scenes import SceneSource
from sam_fast.modeling import Sam
from sam_fast.training import step as step_module
from sam_fast.training.batches import TrainingBatches
from sam_fast.training.step import InteractiveStep, StepSettings

_SEED = 0
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
_TOLERANCES = {("whole", "fp32"): 1e-4, ("encoder", "fp32"): 1e-5, ("whole", "bf16"): 0.2, ("encoder", "bf16"): 0.03}


class Case(NamedTuple):
    """A kind of step; `images` of them have `prompts` each, of which `refined` are corrected."""

    side: int
    images: int
    prompts: int
    settings: StepSettings


CASES = {
    256: Case(256, 4, 8, StepSettings(clicks=2, refined=3, box_share=0.4, correction_weight=0.3, grouping=0.7)),
    512: Case(512, 2, 8, StepSettings(clicks=3, refined=2, box_share=0.45, correction_weight=0.25, grouping=0.5)),
}


def calls_of(case: Case, precision: str) -> dict[str, Callable[[], Tensor]]:
    """Part of a step -> the call that makes its gradients."""
    model = _model(case.side)
    half = _PRECISIONS[precision]
    step = InteractiveStep(model, train_encoder=True, half=half)
    scale = model.image_encoder.patch_size // 4
    source = SceneSource(seed=_SEED, size=case.side)
    batch = TrainingBatches(
        source, side=case.side, batch_size=case.images, prompts=case.prompts, seed=_SEED, length=1, scale=scale
    )[0]

    def whole() -> Tensor:
        model.zero_grad(set_to_none=True)
        step(batch, case.settings, np.random.default_rng(_SEED))
        return _gradients(model)

    def encoder() -> Tensor:
        model.zero_grad(set_to_none=True)
        with step_module.fast_layers(batch.images.device):
            with torch.autocast("cpu", torch.bfloat16, enabled=half is not None):
                embeddings = model.image_encoder(model.preprocess(batch.images.float()))
            draw = torch.Generator().manual_seed(_SEED)  # a constant gradient would vanish in the last LayerNorm
            embeddings.backward(torch.randn(embeddings.shape, generator=draw).to(embeddings.dtype))
        return _gradients(model)

    return {"whole": whole, "encoder": encoder}


def _model(side: int) -> Sam:
    """nano for images of `side`, in training mode."""
    with resources.as_file(resources.files("sam_fast") / "assets" / "nano" / "model.safetensors") as weights:
        return build_sam_from_config(replace(NANO, image_size=side), weights).train()


def _gradients(model: Sam) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _with_pytorchs(call: Callable[[], Tensor]) -> Tensor:
    with mock.patch.object(step_module, "fast_layers", lambda device: nullcontext()):
        return call()


def measure(case: Case, part: str, precision: str, repetitions: int, write: bool) -> None:
    """Gate, times and rows of one part of one kind of step."""
    call = calls_of(case, precision)[part]

    def gate(expected: Tensor, got: Tensor) -> float:
        error = float((got - expected).norm() / expected.norm())
        if not error <= _TOLERANCES[part, precision]:
            raise WrongResult(f"gradients differ by {error:.1e}")
        return error

    peers = [Peer("PyTorch's attention", lambda: _with_pytorchs(call)), Peer("sam_fast", call)]
    timings = compare(peers, gate, repetitions=repetitions)
    shape = f"nano, {case.images} images of {case.side} px, {case.prompts} prompts"
    table = rows("training", part, shape, precision, timings)
    print_rows(table)
    if write:
        write_rows("training", table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", type=int, default=list(CASES), choices=CASES)
    parser.add_argument("--parts", nargs="+", default=["whole", "encoder"], choices=["whole", "encoder"])
    parser.add_argument("--precisions", nargs="+", default=list(_PRECISIONS), choices=_PRECISIONS)
    parser.add_argument("--threads", type=positive, default=1, help="of one process; `torchrun` trains with one each")
    parser.add_argument("--repetitions", type=positive, default=7)
    parser.add_argument("--no-write", action="store_true", help="print only, leave benchmarks/results alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for side in arguments.sides:
        for part in arguments.parts:
            for precision in arguments.precisions:
                measure(CASES[side], part, precision, arguments.repetitions, not arguments.no_write)


if __name__ == "__main__":
    main()
