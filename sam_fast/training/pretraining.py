"""The loop of masked autoencoding: from pictures without masks to the weights that a SAM's image encoder starts from.

Everything random in step n follows from (seed, n, rank), as in `trainer`: an interrupted run goes on bit for bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from sam_fast.data.sample import SampleSource
from sam_fast.modeling import Sam
from sam_fast.training.distributed import World
from sam_fast.training.logs import TrainingLog
from sam_fast.training.mae import MaskedAutoencoder, is_pretrained, save_mae_checkpoint
from sam_fast.training.optim import MovingAverage, clip_gradients, learning_rate, parameter_groups
from sam_fast.training.pictures import PictureBatches

CHECKPOINT, WEIGHTS = "last.pt", "mae.safetensors"

_NOT_PART_OF_A_RUN = ("save_every", "log_every", "picture_every", "workers")
_MASK_SEEDS = 2  # keeps the random numbers of masks apart from those of pictures (0 and 1, see `PictureBatches`)
_PICTURED = 4  # images per picture


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pre-training run but its data and its model; optimiser and augmentation as in the paper.

    Attributes:
        steps: optimiser steps.
        batch_size: images per process and backward pass.
        accumulate: backward passes per step.
        mask_ratio: share of the patches that are masked.
        decoder_dim, decoder_depth, decoder_heads: size of the decoder; see `mae.PatchDecoder`.
        normalise_patches: predict pixels normalised within each patch.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up; a cosine follows.
        weight_decay: of AdamW.
        betas: of AdamW.
        clip: limit of the gradient's norm; 0 for none.
        ema: decay of the moving average of the weights, which is what is exported; 0 exports the weights themselves.
        precision: fp32, or bf16 for autocast.
        crop: range of the share of a picture's area that is cut out.
        flip: mirror images at random.
        seed: of everything random.
        save_every: steps between checkpoints.
        log_every: steps between rows of the log.
        picture_every: steps between pictures; 0 for none.
        workers: processes that prepare batches; 0 prepares them in the training process.

    Raises:
        ValueError: a setting is out of range.
    """

    steps: int
    batch_size: int = 64
    accumulate: int = 1
    mask_ratio: float = 0.75
    decoder_dim: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4
    normalise_patches: bool = True
    lr: float = 1.5e-4
    warmup: int = 250
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 0.0
    ema: float = 0.0
    precision: str = "fp32"
    crop: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    seed: int = 0
    save_every: int = 500
    log_every: int = 10
    picture_every: int = 500
    workers: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "crop", tuple(self.crop))
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "workers", "picture_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema <= 1:
            raise ValueError(f"ema must lie in 0..1, got {self.ema}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop must be an ascending range of shares of the area, got {self.crop}")


class Pretrainer:
    """Trains the image encoder of a Sam as a masked autoencoder.

    Attributes:
        model: the encoder with its decoder.
        step: how many steps are done.
        seconds: how long that took, earlier sessions of the run included.
        report: called after each step with the number of steps done, and with the row of the log if there is one.
    """

    def __init__(
        self,
        sam: Sam,
        source: SampleSource,
        config: PretrainConfig,
        output: str | os.PathLike[str],
        world: World | None = None,
    ) -> None:
        """
        Args:
            sam: the weights to start from, on the device of `world`; its image encoder is trained in place.
            source: pictures; their masks are not looked at.
            config: how.
            output: folder of checkpoints and logs; a checkpoint in it is continued.
            world: the processes that train together; this one alone by default.

        Raises:
            ValueError: the folder holds the checkpoint of a run with other settings, or of another model.
        """
        self.world = world or World()
        self.config = config
        self.output = Path(output)
        self.step = 0
        self.seconds = 0.0
        self.report: Callable[[int, Mapping[str, float] | None], None] = lambda step, row: None
        self._stopping = False
        self._sam = sam
        self._source = source
        torch.manual_seed(config.seed)
        self.model = MaskedAutoencoder(
            sam.image_encoder,
            config.decoder_dim,
            config.decoder_depth,
            config.decoder_heads,
            config.mask_ratio,
            config.normalise_patches,
        ).to(self.world.device)
        for name, parameter in self.model.encoder.named_parameters():
            parameter.requires_grad_(is_pretrained(name))
        self.world.broadcast_(self.model)
        groups = parameter_groups(self.model, self.model.encoder, weight_decay=config.weight_decay, layer_decay=1.0)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.average = MovingAverage(self.model, config.ema) if config.ema > 0 else None
        if (self.output / CHECKPOINT).exists():
            self._load(self.output / CHECKPOINT)

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
            images, loss, norm = self._train_step(batches, meter)
            self.step += 1
            self.seconds = before + time.perf_counter() - started
            row = meter.finish(self.step, loss, norm, self._learning_rate(self.step - 1), self.seconds)
            if log is not None:
                if row is not None:
                    log.row(row)
                if self.config.picture_every and self.step % self.config.picture_every == 0:
                    log.picture(draw_reconstructions(self.model, self._sam, images), self.step)
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

    def save(self) -> None:
        """Write the checkpoint and the encoder; a kill at any time leaves the old files or the new ones whole."""
        if self.world.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            state = {
                "model": self.model.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "config": asdict(self.config),
                "world_size": self.world.size,
            }
            part = self.output / f"{CHECKPOINT}.part"
            torch.save(state, part)
            part.replace(self.output / CHECKPOINT)
            weights = self.model.state_dict() if self.average is None else self.average.state_dict()
            encoder = {name.removeprefix("encoder."): t for name, t in weights.items() if name.startswith("encoder.")}
            save_mae_checkpoint(encoder, self.output / WEIGHTS)
        self.world.barrier()

    def _train_step(self, batches: Iterator[Tensor], meter: _Meter) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of all accumulated batches, and the update. Returns the last images, the loss, the norm."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.world.device)
        for part in range(config.accumulate):
            images = meter.wait_for(batches).to(self.world.device, non_blocking=True)
            rng = np.random.default_rng((config.seed, _MASK_SEEDS, self.step, self.world.rank, part))
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = self.model(self._sam.preprocess(images.float()), generator).loss / config.accumulate
            loss.backward()
            total += loss.detach()
        self.world.average_gradients(self.parameters)
        norm = clip_gradients(self.parameters, config.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, self.step)
        return images, total, norm

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate(step, base=config.lr, warmup=config.warmup, steps=config.steps, schedule="cosine")

    def _loader(self) -> DataLoader[Tensor]:
        """The batches from the current step on."""
        config = self.config
        batches = PictureBatches(
            self._source,
            side=self.model.encoder.img_size,
            batch_size=config.batch_size,
            seed=config.seed,
            length=config.steps * config.accumulate,
            rank=self.world.rank,
            world_size=self.world.size,
            crop=config.crop,
            flip=config.flip,
        )
        return DataLoader(
            batches,
            batch_size=None,
            sampler=range(self.step * config.accumulate, len(batches)),
            num_workers=config.workers,
            pin_memory=self.world.device.type == "cuda",
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
        try:
            theirs = PretrainConfig(**state["config"])
        except TypeError as error:
            raise ValueError(f"{path} is not of a pre-training run") from error
        different = [
            f"{name} {getattr(theirs, name)} there, {getattr(self.config, name)} now"
            for name in (field.name for field in fields(PretrainConfig))
            if name not in _NOT_PART_OF_A_RUN and getattr(theirs, name) != getattr(self.config, name)
        ]
        if state["world_size"] != self.world.size:
            different.append(f"{state['world_size']} processes there, {self.world.size} now")
        if different:
            raise ValueError(
                f"{path} is of a run with other settings ({'; '.join(different)}); continue it with the same ones, "
                "or begin another output folder from its weights"
            )


@torch.no_grad()
def draw_reconstructions(model: MaskedAutoencoder, sam: Sam, images: Tensor) -> Image.Image:
    """Up to four images, one under the other: what the encoder saw, what the decoder made of it, and the image.

    Args:
        model: the autoencoder; the same patches are masked at every call.
        sam: knows the mean and the deviation of pixels.
        images: uint8 [B, 3, S, S].
    """
    normalised = sam.preprocess(images[:_PICTURED].float())
    reconstruction = model(normalised, torch.Generator().manual_seed(0))
    panels = torch.cat([*model.paint(normalised, reconstruction), normalised], dim=3)  # [B, 3, S, 3S]
    pixels = (panels * sam.pixel_std + sam.pixel_mean).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(0, 2, 3, 1).flatten(0, 1).cpu().numpy())


class _Meter:
    """Averages what is logged over `log_every` steps, without a synchronisation in between."""

    def __init__(self, config: PretrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self._clear()

    def _clear(self) -> None:
        self.values: list[Tensor] = []
        self.started = time.perf_counter()
        self.waited = 0.0

    def wait_for(self, batches: Iterator[Tensor]) -> Tensor:
        started = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - started
        return batch

    def finish(self, step: int, loss: Tensor, norm: Tensor, lr: float, seconds: float) -> dict[str, float] | None:
        """End a step; returns a row every `log_every` steps."""
        self.values.append(torch.stack([loss, norm]))
        if step % self.config.log_every and step != self.config.steps:
            return None
        count = len(self.values)
        mean_loss, mean_norm = self.world.mean(torch.stack(self.values).mean(0)).tolist()
        elapsed = time.perf_counter() - self.started
        images = count * self.config.batch_size * self.config.accumulate * self.world.size
        row = {
            "step": step,
            "loss": mean_loss,
            "gradient_norm": mean_norm,
            "learning_rate": lr,
            "step_seconds": elapsed / count,
            "data_seconds": self.waited / count,
            "images_per_second": images / elapsed,
            "seconds": seconds,
        }
        self._clear()
        return row
