"""The training loop, its checkpoints, and how it goes on after an interruption."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch.utils.data import DataLoader

from sam_fast.data.sample import SampleSource
from sam_fast.modeling import Sam
from sam_fast.training.batches import Augmentation, TrainingBatch, TrainingBatches
from sam_fast.training.config import TrainConfig
from sam_fast.training.distributed import World
from sam_fast.training.logs import TrainingLog, draw_predictions
from sam_fast.training.optim import MovingAverage, clip_gradients, learning_rate, parameter_groups, set_drop_path
from sam_fast.training.step import InteractiveStep, StepSettings, StepStatistics

CHECKPOINT, WEIGHTS = "last.pt", "model.safetensors"

# What a resumed run may change without becoming another run.
_NOT_PART_OF_A_RUN = ("save_every", "log_every", "picture_every", "workers")

_STEP_SEEDS = 2  # keeps the random numbers of steps apart from those of batches (0 and 1, see `TrainingBatches`)


class Trainer:
    """Trains a Sam on a source of samples.

    Step n draws everything random from (seed, n, rank), so that a run resumed from its checkpoint repeats bit for bit
    what an uninterrupted one does (on the same machine with the same number of threads and processes).

    Attributes:
        step: how many steps are done.
    """

    def __init__(
        self,
        model: Sam,
        source: SampleSource,
        config: TrainConfig,
        output: str | os.PathLike[str],
        world: World | None = None,
        report: Callable[[int, Mapping[str, float] | None], None] | None = None,
    ) -> None:
        """
        Args:
            model: the weights to start from, on the device of `world`; trained in place.
            source: what to train on.
            config: how.
            output: folder of checkpoints and logs; a checkpoint in it is continued.
            world: the processes that train together; this one alone by default.
            report: called after each step with the number of steps done, and with the row of the log if there is one.

        Raises:
            ValueError: the folder holds the checkpoint of a run with other settings.
        """
        self.world = world or World()
        self.model = model
        self.config = config
        self.output = Path(output)
        self.step = 0
        self.seconds = 0.0  # spent training, earlier sessions of the run included
        self.report = report
        self._stopping = False
        model.image_encoder.requires_grad_(not config.freeze_encoder)
        set_drop_path(model.image_encoder, config.drop_path)
        self.world.broadcast_(model)
        groups = parameter_groups(
            model, model.image_encoder, weight_decay=config.weight_decay, layer_decay=config.layer_decay
        )
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.average = MovingAverage(model, config.ema)
        if (self.output / CHECKPOINT).exists():
            self._load(self.output / CHECKPOINT)
        autocast = torch.autocast(self.world.device.type, torch.bfloat16, enabled=config.precision == "bf16")
        self._interactive = InteractiveStep(model, train_encoder=not config.freeze_encoder, autocast=autocast)
        self._source = source

    def stop(self) -> None:
        """Make `run` save and return after the step at hand; may be called from a signal handler."""
        self._stopping = True

    def run(self, max_minutes: float | None = None) -> int:
        """Train until the last step, `stop()`, or for `max_minutes`; save; return the number of steps done."""
        started, before = time.perf_counter(), self.seconds
        log = TrainingLog(self.output, self.step + 1) if self.world.is_main else None
        meter = _Meter(self.config, self.world)
        self.model.train()
        batches = iter(self._loader())
        while self.step < self.config.steps:
            meter.start()
            first, statistics, norm = self._train_step(batches, meter)
            self.step += 1
            self.seconds = before + time.perf_counter() - started
            row = meter.finish(self.step, statistics, norm, self._learning_rate(self.step - 1), self.seconds)
            if log is not None:
                if row is not None:
                    log.row(row)
                if self.config.picture_every and self.step % self.config.picture_every == 0:
                    log.picture(draw_predictions(self.model, first), self.step)
                if self.report is not None:
                    self.report(self.step, row)
            late = max_minutes is not None and time.perf_counter() - started > 60 * max_minutes
            stop = self.world.any(self._stopping or late)
            if stop or self.step % self.config.save_every == 0 or self.step == self.config.steps:
                self.save()
            if stop:
                break
        if log is not None:
            log.close()
        return self.step

    def _train_step(
        self, batches: Iterator[TrainingBatch], meter: _Meter
    ) -> tuple[TrainingBatch, StepStatistics, torch.Tensor]:
        """Gradients of all accumulated batches, and the update. Returns the first batch, statistics, gradient norm."""
        config, step = self.config, self.step
        rate = self._learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        blend = min(1.0, step / config.loss_blend) if config.loss_blend else 1.0
        settings = StepSettings(config.clicks, config.refined, config.box_share, blend, config.grouping)
        gathered: list[StepStatistics] = []
        first = None
        for part in range(config.accumulate):
            batch = meter.wait_for(batches).to(self.world.device)
            first = first or batch
            rng = np.random.default_rng((config.seed, _STEP_SEEDS, step, self.world.rank, part))
            torch.manual_seed(int(rng.integers(2**62)))  # drop path
            gathered.append(self._interactive(batch, settings, rng, 1 / config.accumulate))
        self.world.average_gradients(self.parameters)
        norm = clip_gradients(self.parameters, config.clip)
        self.optimizer.step()
        self.average.update(self.model, step)
        assert first is not None
        means = torch.stack([torch.stack(_values(s)) for s in gathered]).mean(0)
        return first, StepStatistics(*means), norm

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate(step, base=config.lr, warmup=config.warmup, steps=config.steps, schedule=config.schedule)

    def _loader(self) -> DataLoader[TrainingBatch]:
        """The batches from the current step on."""
        config = self.config
        batches = TrainingBatches(
            self._source,
            side=self.model.image_encoder.img_size,
            batch_size=config.batch_size,
            prompts=config.prompts,
            scale=self.model.image_encoder.patch_size // 4,
            smallest=config.smallest,
            seed=config.seed,
            length=config.steps * config.accumulate,
            rank=self.world.rank,
            world_size=self.world.size,
            augmentation=Augmentation(config.flip, config.jitter),
        )
        return DataLoader(
            batches,
            batch_size=None,
            sampler=range(self.step * config.accumulate, len(batches)),
            num_workers=config.workers,
            pin_memory=self.world.device.type == "cuda",
        )

    # -- checkpoints

    def save(self) -> None:
        """Write the checkpoint and the averaged weights; a kill at any time leaves the old or the new one whole."""
        if self.world.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            state = {
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "config": asdict(self.config),
                "world_size": self.world.size,
            }
            _replace(self.output / CHECKPOINT, lambda path: torch.save(state, path))
            weights = self.average.state_dict() if self.config.ema > 0 else self.model.state_dict()
            weights = {name: tensor.detach().float().contiguous().cpu() for name, tensor in weights.items()}
            _replace(self.output / WEIGHTS, lambda path: safetensors.torch.save_file(weights, path))
        self.world.barrier()

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.world.device, weights_only=True)
        self._check_settings(path, state)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def _check_settings(self, path: Path, state: Mapping[str, Any]) -> None:
        """Raise ValueError if the checkpoint belongs to a run with other settings."""
        ours = TrainConfig(**state["config"])
        different = [
            f"{field.name} {getattr(ours, field.name)} there, {getattr(self.config, field.name)} now"
            for field in fields(TrainConfig)
            if field.name not in _NOT_PART_OF_A_RUN and getattr(ours, field.name) != getattr(self.config, field.name)
        ]
        if state["world_size"] != self.world.size:
            different.append(f"{state['world_size']} processes there, {self.world.size} now")
        if different:
            raise ValueError(
                f"{path} is of a run with other settings ({'; '.join(different)}); continue it with the same ones, "
                "or begin another output folder from its weights"
            )


class _Meter:
    """Averages what is logged over `log_every` steps, without a synchronisation in between."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self._clear()

    def _clear(self) -> None:
        self.values: list[torch.Tensor] = []
        self.seconds = self.waited = 0.0

    def start(self) -> None:
        self.started = time.perf_counter()

    def wait_for(self, batches: Iterator[TrainingBatch]) -> TrainingBatch:
        started = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - started
        return batch

    def finish(
        self, step: int, statistics: StepStatistics, norm: torch.Tensor, lr: float, seconds: float
    ) -> dict[str, float] | None:
        """End a step; returns a row every `log_every` steps."""
        self.values.append(torch.stack([*_values(statistics), norm]))
        self.seconds += time.perf_counter() - self.started
        if step % self.config.log_every and step != self.config.steps:
            return None
        count = len(self.values)
        means = self.world.mean(torch.stack(self.values).mean(0)).tolist()
        names = [*(field.name for field in fields(StepStatistics)), "gradient_norm"]
        images = count * self.config.batch_size * self.config.accumulate * self.world.size
        row = {
            "step": step,
            **dict(zip(names, means, strict=True)),
            "learning_rate": lr,
            "step_seconds": self.seconds / count,
            "data_seconds": self.waited / count,
            "images_per_second": images / self.seconds,
            "seconds": seconds,
        }
        self._clear()
        return row


def _values(statistics: StepStatistics) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(statistics, field.name) for field in fields(statistics))


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under another name first, so that the old one stays until the new one is whole."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)
