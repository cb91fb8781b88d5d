"""What `sam-fast train` and `sam-fast pretrain` share: options, the model to begin with, and running to the end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam_fast.cli.console import escaped, item_progress, out

if TYPE_CHECKING:
    from sam_fast.modeling import Sam
    from sam_fast.training.run import TrainingRun


class TrainPrecision(str, Enum):
    """Number formats of training."""

    fp32 = "fp32"
    bf16 = "bf16"


Output = Annotated[Path, typer.Option("--output", help="Folder of checkpoints and logs; a run in it goes on.")]
Start = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="Weights to start from (a SAM, or an MAE's encoder); random without it."),
]
Steps = Annotated[int, typer.Option("--steps", help="Optimiser steps.")]
Minutes = Annotated[
    float, typer.Option("--minutes", help="End the run and its schedule after so long, if not after --steps.")
]
MaxMinutes = Annotated[
    float | None, typer.Option("--max-minutes", help="Save and stop after so long; the same command goes on.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images per process and backward pass.")]
Accumulate = Annotated[int, typer.Option("--accumulate", help="Backward passes per step.")]
WeightDecay = Annotated[float, typer.Option("--weight-decay")]
Clip = Annotated[float, typer.Option("--clip", help="Limit of the gradient's norm; 0 for none.")]
Ema = Annotated[float, typer.Option("--ema", help="Decay of the average of the weights; 0 for none.")]
TrainPrecisionOption = Annotated[TrainPrecision, typer.Option("--precision")]
Flip = Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror images at random.")]
Seed = Annotated[int, typer.Option("--seed", min=0)]
SaveEvery = Annotated[int, typer.Option("--save-every", help="Steps between checkpoints.")]
LogEvery = Annotated[int, typer.Option("--log-every", help="Steps between rows of metrics.csv.")]
PictureEvery = Annotated[int, typer.Option("--picture-every", help="Steps between pictures; 0: none.")]
Workers = Annotated[int, typer.Option("--workers", help="Processes that prepare batches.")]

Describe = Callable[[Mapping[str, float]], str]


def run_to_the_end(run: TrainingRun[Any, Any], max_minutes: float | None, weights: Path, describe: Describe) -> None:
    """Run, save and stop on SIGINT or SIGTERM, and say on the main process how far it came.

    Args:
        run: the run.
        max_minutes: stop after so long.
        weights: the file that holds the result.
        describe: turns a row of the log into a short line.
    """
    with ExitStack() as stack:
        if run.world.is_main:
            run.report = stack.enter_context(_Progress(run, describe))
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: run.stop()))
        done = run.run(max_minutes)
    if run.world.is_main:
        minutes = f" of {run.config.minutes:g}" if run.config.minutes else ""
        out().print(f"{done} of {run.config.steps} steps, {run.seconds / 60:.1f}{minutes} minutes; {escaped(weights)}")
        if not run.finished:
            out().print("the same command goes on")


class _Progress:
    """A bar over steps, or seconds, with the last row of the log; where there is no terminal, a line per row."""

    def __init__(self, run: TrainingRun[Any, Any], describe: Describe) -> None:
        self._run = run
        self._bar = item_progress()
        total = 60 * run.config.minutes or run.config.steps
        self._task = self._bar.add_task("training", total=total, completed=self._done())
        self._describe = describe

    def _done(self) -> int:
        return int(self._run.seconds) if self._run.config.minutes else self._run.step

    def __enter__(self) -> Callable[[int, Mapping[str, float] | None], None]:
        self._bar.__enter__()
        return self._show

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _show(self, step: int, row: Mapping[str, float] | None) -> None:
        self._bar.update(self._task, completed=self._done())
        if row is None:
            return
        line = self._describe(row)
        if self._bar.disable:
            out().print(f"step {step}  {line}")
        else:
            self._bar.update(self._task, description=line)


def build_model(model_type: str, image_size: int | None, checkpoint: Path | None, seed: int) -> Sam:
    """A model to train: random weights drawn from `seed`, with those of `checkpoint` in their place.

    Raises:
        ValueError: there is no such model, or the checkpoint is of another.
    """
    import torch

    from sam_fast.build_sam import build_sam_from_config, model_configs
    from sam_fast.checkpoints import load_checkpoint
    from sam_fast.training.initialise import initialise_weights
    from sam_fast.training.mae import initialise_from_mae, is_mae_checkpoint

    if model_type not in model_configs:
        raise ValueError(f"--model-type must be one of {', '.join(model_configs)}, got {model_type!r}")
    architecture = model_configs[model_type]
    if image_size is not None:
        architecture = replace(architecture, image_size=image_size)
    torch.manual_seed(seed)
    model = build_sam_from_config(architecture)
    initialise_weights(model)
    if checkpoint is not None:
        load = initialise_from_mae if is_mae_checkpoint(checkpoint) else load_checkpoint
        load(model, checkpoint)
    return model
