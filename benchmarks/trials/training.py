"""A step of training and its parts, and which kernels they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.peers import CONFIGS
from benchmarks.trials.profiles import profile
from benchmarks.trials.run import Run
from sam_fast.build_sam import build_sam_from_config
from sam_fast.data.scenes import SceneSource
from sam_fast.modeling import Sam
from sam_fast.training.batches import TrainingBatch, TrainingBatches
from sam_fast.training.initialise import initialise_weights
from sam_fast.training.optim import MovingAverage, clip_gradients, parameter_groups
from sam_fast.training.recorded import RecordedStep
from sam_fast.training.step import InteractiveStep, StepSettings

_SEED = 0


class Case(NamedTuple):
    """A kind of step."""

    model: str
    side: int  # of the images
    images: int
    prompts: int  # per image
    clicks: int
    refined: int  # objects per image that are corrected


# As nano was trained on a GPU, see sam_fast/assets/nano/README.md.
CASES = (Case("nano", 256, 64, 16, 2, 6), Case("nano", 512, 32, 12, 4, 4))


def try_training(run: Run) -> None:
    """Profile steps, in bfloat16 on a GPU, whole and in parts; of random weights, on which no time depends."""
    for case in CASES:
        name = f"{case.model} {case.side} px, {case.images} images of {case.prompts} prompts"
        if run.is_late(f"training of {name}"):
            return
        torch.manual_seed(_SEED)
        model = build_sam_from_config(replace(CONFIGS[case.model], image_size=case.side))
        initialise_weights(model)
        model.to(run.device)
        batch = _batch(case, model).to(run.device)
        for part, call in _parts(case, model, batch, run.device).items():
            run.trial(f"training: {name}: {part}", partial(_with_gradients, run, f"{name}, {part}", call))


def _with_gradients(run: Run, case: str, call: Callable[[int], object]) -> None:
    with torch.enable_grad():
        profile(run, "training", case, call)


def _batch(case: Case, model: Sam) -> TrainingBatch:
    scale = model.image_encoder.patch_size // 4
    source = SceneSource(seed=_SEED, size=case.side)
    batches = TrainingBatches(
        source, side=case.side, batch_size=case.images, prompts=case.prompts, seed=_SEED, length=1, scale=scale
    )
    return batches[0]


def _parts(case: Case, model: Sam, batch: TrainingBatch, device: torch.device) -> dict[str, Callable[[int], object]]:
    half = torch.bfloat16 if device.type == "cuda" else None
    step = InteractiveStep(model.train(), train_encoder=True, half=half)
    groups = parameter_groups(model, model.image_encoder, weight_decay=0.05, layer_decay=1.0)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    average = MovingAverage(model, 0.99)
    parameters = list(model.parameters())

    def learn(settings: StepSettings, i: int) -> object:
        optimizer.zero_grad(set_to_none=True)
        return step(batch, settings, np.random.default_rng(i)).loss

    def encode(i: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=half is not None):
            embeddings = model.image_encoder(model.preprocess(batch.images.float()))
        embeddings.backward(torch.ones_like(embeddings))

    def update(i: int) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        clip_gradients(parameters, 1.0)
        optimizer.step()
        average.update(model, i)

    def whole(i: int) -> None:
        learn(StepSettings(clicks=case.clicks, refined=case.refined, grouping=0.7), i)
        update(i)

    recorded = RecordedStep(step)

    def replay(i: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(i)
        settings = StepSettings(clicks=case.clicks, refined=case.refined, grouping=0.7)
        recorded(batch, settings, np.random.default_rng(0))  # one place of the pass without a click, so one recording
        update(i)

    return {
        "the whole step": whole,
        "the whole step, recorded": replay,
        "the encoder": encode,
        "the encoder and first prompts": partial(learn, StepSettings(clicks=0)),
        "the encoder and grouping": partial(learn, StepSettings(clicks=0, prompted=False, grouping=0.7)),
        "the update": update,
    }
