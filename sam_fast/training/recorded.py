"""Training steps on a GPU as CUDA graphs: thousands of small launches become one."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from sam_fast.runtime.graphs import Graphs
from sam_fast.training.batches import TrainingBatch
from sam_fast.training.optim import add_gradients
from sam_fast.training.step import InteractiveStep, StepPlan, StepSettings, StepStatistics, draw_plan

_GRAPHS = 16  # one for each place of the pass without a click: 9 with the paper's 8 clicks


class RecordedStep:
    """Does what an `InteractiveStep` does, by a recording where it has met the settings and shapes before.

    Recordings have their own memory, all of them together as much as a step takes and the gradients once, besides what
    PyTorch keeps for other work. After one that failed, or found no memory, steps are plain ones. So they are while the
    loss is blended, which changes the settings from step to step (`TrainConfig.loss_blend`). On a CPU nothing is
    recorded.

    Clicks and anchors are drawn from PyTorch's own generator, which is where it was after a plain step: it is seeded
    before each.
    """

    def __init__(self, step: InteractiveStep, graphs: Graphs | None = None) -> None:
        """
        Args:
            step: the step.
            graphs: records and replays.
        """
        self._step = step
        self._parameters = [p for p in step.model.parameters() if p.requires_grad]
        self._graphs: Graphs | None = graphs or Graphs(most=_GRAPHS)
        self._used: dict[Hashable, list[int]] = {}  # parameters with gradients
        self._kept: dict[int, Tensor] = {}  # where recordings leave those: else each would hold on to its own
        self._unfinished = False  # whether a step was done outside of a recording, and its gradients not added

    def __call__(
        self, batch: TrainingBatch, settings: StepSettings, rng: np.random.Generator, scale: float = 1.0
    ) -> StepStatistics:
        """See `InteractiveStep.__call__`; PyTorch's own generator is seeded by the caller."""
        plan = draw_plan(batch, settings, rng)
        key = settings, plan.passes, scale

        def follow(boxed: Tensor, refined: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            own = StepPlan(boxed, refined, plan.passes), TrainingBatch(*tensors)
            statistics, gradients = self._gradients(*own, settings, scale)
            self._used[key] = list(gradients)
            return statistics, *gradients.values()

        def add(statistics: Tensor, *gradients: Tensor) -> tuple[Tensor]:
            self._unfinished = False
            add_gradients([self._parameters[index] for index in self._used[key]], gradients)
            return (statistics.clone(),)

        inputs = plan.boxed, plan.refined, *(getattr(batch, field.name) for field in fields(TrainingBatch))
        found: tuple[Tensor, ...] | None = None
        if self._graphs is not None and settings.blend == 1:
            try:
                found = self._graphs(key, follow, *inputs, finish=add)
            except torch.OutOfMemoryError as error:
                warnings.warn(f"steps are no longer recorded: {error}", stacklevel=2)
                self._unfinished = True
        if found is None:  # here, where the error no longer holds on to memory
            if self._unfinished:
                self._give_up(batch.images.device)
            found = add(*follow(*inputs))
        return StepStatistics(*found[0].unbind())

    def _gradients(
        self, plan: StepPlan, batch: TrainingBatch, settings: StepSettings, scale: float
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The statistics of a step, [number of fields], and the gradient of each parameter it uses, by its index."""
        recording = _is_recording(batch.images.device)
        if not recording:
            if self._unfinished:  # the step before a recording: that failed
                self._give_up(batch.images.device)
            self._unfinished = True
        before = [p.grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        try:
            with nullcontext() if recording else _same_numbers_again(batch.images.device):
                found = self._step.follow(plan, batch, settings, generator=None, scale=scale)
            gradients = {index: p.grad for index, p in enumerate(self._parameters) if p.grad is not None}
        finally:
            for p, grad in zip(self._parameters, before, strict=True):
                p.grad = grad
        if recording:
            gradients = self._keep(gradients)
        return torch.stack([getattr(found, field.name) for field in fields(StepStatistics)]), gradients

    @torch.no_grad()
    def _keep(self, gradients: dict[int, Tensor]) -> dict[int, Tensor]:
        """Gradients of a recording, moved to where those of all recordings are."""
        for index in gradients.keys() - self._kept.keys():
            self._kept[index] = torch.empty_like(self._parameters[index])
        kept = {index: self._kept[index] for index in gradients}
        if kept:
            torch._foreach_copy_(list(kept.values()), list(gradients.values()))
        return kept

    def _give_up(self, device: torch.device) -> None:
        """After a recording that failed: no more of them, and nothing of those before."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # nothing is read any more of what is dropped here
        self._graphs, self._unfinished = None, False
        self._kept.clear()
        if device.type == "cuda":
            # Before 2.13 PyTorch's generator takes the recording as still going on, and draws nothing outside of it.
            generator = torch.cuda.default_generators[device.index]
            generator.graphsafe_set_state(generator.clone_state())


def _is_recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _same_numbers_again(device: torch.device) -> AbstractContextManager[None]:
    """Leaves generators as they were: the step before a recording must not change what that one's replay draws."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
