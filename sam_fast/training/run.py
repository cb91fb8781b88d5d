"""A run of training: its loop, its checkpoints, and how it goes on after an interruption.

What a step learns from is said by `trainer.Trainer` (masks) and `pretraining.Pretrainer` (pictures alone).
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sam_fast.modeling.image_encoder import ImageEncoderViT
from sam_fast.training.distributed import World
from sam_fast.training.logs import TrainingLog
from sam_fast.training.optim import MovingAverage, clip_gradients, learning_rate, parameter_groups
from sam_fast.utils.files import replace_file

CHECKPOINT = "last.pt"

# What a resumed run may change without becoming another run.
_NOT_PART_OF_A_RUN = ("save_every", "log_every", "picture_every", "workers")
_STEP_SEEDS = 2  # keeps the random numbers of steps apart from those of batches (0 and 1)


class RunConfig(Protocol):
    """The settings that every kind of run has, see `config.TrainConfig`; a frozen dataclass of plain values."""

    @property
    def steps(self) -> int: ...
    @property
    def minutes(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup(self) -> int: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def layer_decay(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def ema(self) -> float: ...
    @property
    def precision(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def save_every(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def picture_every(self) -> int: ...
    @property
    def workers(self) -> int: ...


class Transferable(Protocol):
    """A batch: a tensor, or something of tensors, that goes to a device."""

    def to(self, device: torch.device) -> Any: ...


Config = TypeVar("Config", bound=RunConfig)
Batch = TypeVar("Batch", bound=Transferable)
Item = TypeVar("Item")


class TrainingRun(ABC, Generic[Config, Batch]):
    """Moves the weights of a model step by step.

    Step n draws everything random from (seed, n, rank), so that a run resumed from its checkpoint repeats bit for bit
    what an uninterrupted one does (on the same machine with the same number of threads and processes, and unless the
    run ends by the clock).

    Attributes:
        model: what is trained.
        step: how many steps are done.
        seconds: how long that took, earlier sessions of the run included.
        report: called after each step with the number of steps done, and with the row of the log if there is one.
    """

    statistics: ClassVar[tuple[str, ...]]  # names of what `learn` returns

    def __init__(
        self,
        model: nn.Module,
        encoder: ImageEncoderViT,
        config: Config,
        output: str | os.PathLike[str],
        world: World | None,
    ) -> None:
        """
        Args:
            model: on the device of `world`; parameters that do not require gradients stay as they are.
            encoder: the image encoder in it.
            config: the settings.
            output: folder of checkpoints and logs; a checkpoint in it is continued.
            world: the processes that train together; this one alone by default.

        Raises:
            ValueError: the folder holds the checkpoint of a run with other settings, or of another model, or it is not
                one folder for all processes.
        """
        self.model = model
        self.config = config
        self.output = Path(output)
        self.world = world or World()
        self.step = 0
        self.seconds = 0.0
        self.report: Callable[[int, Mapping[str, float] | None], None] = lambda step, row: None
        self._stopping = False
        self.world.broadcast_(model)
        groups = parameter_groups(model, encoder, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.average = MovingAverage(model, config.ema) if config.ema > 0 else None
        self._resume()

    # -- what a kind of run says

    @abstractmethod
    def batches(self, length: int) -> Dataset[Batch]:
        """`length` batches, of which each is a function of its index alone."""

    def stream(self, start: int, length: int) -> Iterator[Batch]:
        """Of `length` batches those from `start` on."""
        return iter(self.load_ahead(self.batches(length), range(start, length)))

    @abstractmethod
    def learn(self, batch: Batch, rng: np.random.Generator, scale: float) -> Tensor:
        """Add the gradients of `scale` times the loss of a batch; return its statistics, one number per name."""

    @abstractmethod
    def draw(self, batch: Batch) -> Image.Image:
        """A picture of what the model makes of a batch; uses no global random numbers."""

    @abstractmethod
    def export(self, weights: Mapping[str, Tensor]) -> None:
        """Write the weights for others to use: those of `model`, averaged if `ema` says so."""

    # -- the loop

    def stop(self) -> None:
        """Make `run` save and return after the step at hand; may be called from a signal handler."""
        self._stopping = True

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or all minutes of a run that ends by the clock are over."""
        return self.step >= self.config.steps or self._elapsed >= 1

    @property
    def _elapsed(self) -> float:
        """Share of the minutes of a run that ends by the clock."""
        return self.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0

    def run(self, max_minutes: float | None = None) -> int:
        """Train until the run is finished, `stop()`, or for `max_minutes`; save; return the number of steps done."""
        config, started, before = self.config, time.perf_counter(), self.seconds
        log = TrainingLog(self.output, self.step + 1) if self.world.is_main else None
        meter = _Meter(config, self.world, self.statistics)
        self.model.train()
        batches = self.stream(self.step * config.accumulate, config.steps * config.accumulate)
        while not self.finished:
            rate = self._learning_rate()
            batch, norm = self._train_step(batches, meter, rate)
            self.step += 1
            self.seconds = before + time.perf_counter() - started
            if config.minutes:
                self.seconds = self.world.agree(self.seconds)
            row = meter.finish(self.step, norm, rate, self.seconds)
            if log is not None:
                if row is not None:
                    log.row(row)
                if config.picture_every and self.step % config.picture_every == 0:
                    log.picture(self.draw(batch), self.step)
                self.report(self.step, row)
            late = max_minutes is not None and time.perf_counter() - started > 60 * max_minutes
            stop = self.world.any(self._stopping or late)
            if stop or self.step % config.save_every == 0 or self.finished:
                self.save()
            if stop:
                break
        if log is not None:
            log.close()
        return self.step

    def _train_step(self, batches: Iterator[Batch], meter: _Meter, rate: float) -> tuple[Batch, Tensor]:
        """Gradients of all accumulated batches, and the update. Returns the last batch and the gradient's norm."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(config.accumulate):
            batch = meter.wait_for(batches).to(self.world.device)
            rng = np.random.default_rng((config.seed, _STEP_SEEDS, self.step, self.world.rank, part))
            torch.manual_seed(int(rng.integers(2**62)))  # drop path
            meter.add(self.learn(batch, rng, 1 / config.accumulate))
        self.world.average_gradients(self.parameters)
        norm = clip_gradients(self.parameters, config.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, self.step)
        return batch, norm

    def _learning_rate(self) -> float:
        config = self.config
        return learning_rate(
            self.step,
            base=config.lr,
            warmup=config.warmup,
            steps=config.steps,
            schedule=config.schedule,
            elapsed=self._elapsed,
        )

    def load_ahead(self, items: Dataset[Item], indices: range) -> DataLoader[Item]:
        """Items of a dataset in order, made by the loader processes and ready for the device."""
        return DataLoader(
            items,
            batch_size=None,
            sampler=indices,
            num_workers=self.config.workers,
            pin_memory=self.world.device.type == "cuda",
        )

    # -- checkpoints

    def save(self) -> None:
        """Write the checkpoint and the weights; a kill at any time leaves the old files or the new ones whole."""
        if self.world.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            state = {
                "model": self.model.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "config": asdict(self.config),  # type: ignore[call-overload]
                "world_size": self.world.size,
            }
            self.export(self.model.state_dict() if self.average is None else self.average.state_dict())
            # Last: of a run that is killed before, the steps since the old checkpoint are done again, and exported.
            replace_file(self.output / CHECKPOINT, lambda path: torch.save(state, path))
        self.world.barrier()

    def _resume(self) -> None:
        """Continue from the checkpoint, if there is one: all processes from the same, or none."""
        step = -1  # of a process that cannot load
        try:
            if (self.output / CHECKPOINT).exists():
                self._load(self.output / CHECKPOINT)
            step = self.step
        finally:  # the others wait here for this process's step, whatever became of it
            differ = self.world.any(step != self.world.agree(step))
        if differ:
            raise ValueError(
                f"the processes do not find the same checkpoint in {self.output}: it must be one folder for all of them"
            )

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.world.device, weights_only=True)
        self._check_settings(path, state)
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"{path} is of another model or image size: {error}") from error
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def _check_settings(self, path: Path, state: Mapping[str, Any]) -> None:
        """Raise ValueError if the checkpoint belongs to another kind of run, or to one with other settings."""
        try:
            theirs = type(self.config)(**state["config"])
        except TypeError as error:
            raise ValueError(f"{path} is of another kind of run: {error}") from error
        names = [field.name for field in fields(self.config)]  # type: ignore[arg-type]
        different = [
            f"{name} {getattr(theirs, name)} there, {getattr(self.config, name)} now"
            for name in names
            if name not in _NOT_PART_OF_A_RUN and getattr(theirs, name) != getattr(self.config, name)
        ]
        if state["world_size"] != self.world.size:
            different.append(f"{state['world_size']} processes there, {self.world.size} now")
        if different:
            raise ValueError(
                f"{path} is of a run with other settings ({'; '.join(different)}); continue it with the same ones, "
                "or begin another output folder from its weights"
            )


def _said_by_a_process(text: str) -> str | None:
    """The message in what DataLoader makes of a loader process's error: its traceback, which ends in type and message.

    None if the text is not such a traceback.
    """
    if not text.startswith("Caught "):
        return None
    last = text.rstrip().rpartition("\n")[2]
    return last.partition(": ")[2] or last


class _Meter:
    """Averages what is logged over `log_every` steps, without a synchronisation in between."""

    def __init__(self, config: RunConfig, world: World, names: Sequence[str]) -> None:
        self.config = config
        self.world = world
        self.names = names
        self._clear()

    def _clear(self) -> None:
        self.statistics: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.started = time.perf_counter()
        self.waited = 0.0

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time that it takes is noted.

        Raises:
            ValueError: the data is at fault.
        """
        started = time.perf_counter()
        try:
            batch = next(batches)
        except (ValueError, OSError) as error:
            said = _said_by_a_process(str(error))
            if said is None:
                raise
            raise ValueError(said) from error
        self.waited += time.perf_counter() - started
        return batch

    def add(self, statistics: Tensor) -> None:
        """Note what one batch gave."""
        self.statistics.append(statistics)

    def finish(self, step: int, norm: Tensor, lr: float, seconds: float) -> dict[str, float] | None:
        """End a step; returns a row every `log_every` steps."""
        self.norms.append(norm)
        if step % self.config.log_every and step != self.config.steps:
            return None
        count = len(self.norms)
        means = torch.cat([torch.stack(self.statistics).mean(0), torch.stack(self.norms).mean()[None]])
        values = self.world.mean(means).tolist()  # waits for the device, which recorded steps leave behind
        elapsed = time.perf_counter() - self.started
        images = count * self.config.batch_size * self.config.accumulate * self.world.size
        row = {
            "step": step,
            **dict(zip((*self.names, "gradient_norm"), values, strict=True)),
            "learning_rate": lr,
            "step_seconds": elapsed / count,
            "data_seconds": self.waited / count,
            "images_per_second": images / elapsed,
            "seconds": seconds,
        }
        self._clear()
        return row
