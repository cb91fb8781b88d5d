"""Masked autoencoding: from pictures without masks to the weights that a SAM's image encoder starts from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sam_fast.data.sample import SampleSource
from sam_fast.modeling import Sam
from sam_fast.training.distributed import World
from sam_fast.training.mae import MaskedAutoencoder, is_pretrained, save_mae_checkpoint
from sam_fast.training.pictures import PictureBatches
from sam_fast.training.run import TrainingRun

WEIGHTS = "mae.safetensors"

_PICTURED = 4  # images per picture


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pre-training run but its data and its model; optimiser and augmentation as in the paper.

    Attributes:
        steps: optimiser steps.
        minutes: after how long the run ends, and its schedule with it, if not after `steps`; 0 for no such end. The
            learning rate then follows the clock, so that no two runs are the same bit for bit.
        batch_size: images per process and backward pass.
        accumulate: backward passes per step.
        mask_ratio: share of the patches that are masked.
        decoder_dim, decoder_depth, decoder_heads: size of the decoder; see `mae.PatchDecoder`.
        normalise_patches: predict pixels normalised within each patch.
        lr: peak learning rate of AdamW.
        schedule: see `optim.learning_rate`.
        warmup: steps of linear warm-up.
        weight_decay: of AdamW.
        betas: of AdamW.
        layer_decay: factor of the learning rate from each block of the encoder to the one before it.
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
    minutes: float = 0.0
    batch_size: int = 64
    accumulate: int = 1
    mask_ratio: float = 0.75
    decoder_dim: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4
    normalise_patches: bool = True
    lr: float = 1.5e-4
    schedule: str = "cosine"
    warmup: int = 250
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    layer_decay: float = 1.0
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
        for name in ("minutes", "warmup", "workers", "picture_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema <= 1:
            raise ValueError(f"ema must lie in 0..1, got {self.ema}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop must be an ascending range of shares of the area, got {self.crop}")


class Pretrainer(TrainingRun[PretrainConfig, Tensor]):
    """Trains the image encoder of a Sam as a masked autoencoder, see `TrainingRun` for the attributes."""

    statistics = ("loss",)

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
        torch.manual_seed(config.seed)
        self.autoencoder = MaskedAutoencoder(
            sam.image_encoder,
            config.decoder_dim,
            config.decoder_depth,
            config.decoder_heads,
            config.mask_ratio,
            config.normalise_patches,
        ).to(world.device if world is not None else "cpu")
        encoder = self.autoencoder.encoder
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(is_pretrained(name))
        super().__init__(self.autoencoder, encoder, config, output, world)
        self._sam = sam
        self._source = source

    def batches(self, length: int) -> PictureBatches:
        config = self.config
        return PictureBatches(
            self._source,
            side=self.autoencoder.encoder.img_size,
            batch_size=config.batch_size,
            seed=config.seed,
            length=length,
            rank=self.world.rank,
            world_size=self.world.size,
            crop=config.crop,
            flip=config.flip,
        )

    def learn(self, batch: Tensor, rng: np.random.Generator, scale: float) -> Tensor:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss = self.autoencoder(self._sam.preprocess(batch.float()), generator).loss
        (scale * loss).backward()
        return loss.detach()[None]

    def draw(self, batch: Tensor) -> Image.Image:
        return draw_reconstructions(self.autoencoder, self._sam, batch)

    def export(self, weights: Mapping[str, Tensor]) -> None:
        encoder = {name.removeprefix("encoder."): t for name, t in weights.items() if name.startswith("encoder.")}
        save_mae_checkpoint(encoder, self.output / WEIGHTS)


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
