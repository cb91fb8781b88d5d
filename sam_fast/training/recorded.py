"""Training steps on a GPU as CUDA graphs: thousands of small launches become one."""

from __future__ import annotations

from collections.abc import Hashable
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

    A recording has its own memory, as much as a step takes, besides what PyTorch keeps for other work; all recordings
    share it. While settings change from step to step (`TrainConfig.loss_blend`) nothing is recorded. Clicks and anchors
    are drawn from PyTorch's own generator. On a CPU nothing is recorded.
    """

    def __init__(self, step: InteractiveStep, graphs: Graphs | None = None) -> None:
        """
        Args:
            step: the step.
            graphs: records and replays.
        """
        self._step = step
        self._parameters = [p for p in step.model.parameters() if p.requires_grad]
        self._graphs = graphs or Graphs(most=_GRAPHS)
        self._used: dict[Hashable, list[int]] = {}  # parameters with gradients

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
            add_gradients([self._parameters[index] for index in self._used[key]], gradients)
            return (statistics.clone(),)

        inputs = (getattr(batch, field.name) for field in fields(TrainingBatch))
        (statistics,) = self._graphs(key, follow, plan.boxed, plan.refined, *inputs, finish=add)
        return StepStatistics(*statistics.unbind())

    def _gradients(
        self, plan: StepPlan, batch: TrainingBatch, settings: StepSettings, scale: float
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The statistics of a step, [number of fields], and the gradient of each parameter it uses, by its index."""
        before = [p.grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        try:
            found = self._step.follow(plan, batch, settings, generator=None, scale=scale)
            gradients = {index: p.grad for index, p in enumerate(self._parameters) if p.grad is not None}
        finally:
            for p, grad in zip(self._parameters, before, strict=True):
                p.grad = grad
        return torch.stack([getattr(found, field.name) for field in fields(StepStatistics)]), gradients
