"""Everything that fixes a training run but its data and its model."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the defaults are the paper's where it states them.

    Attributes:
        steps: optimiser steps.
        minutes: after how long the run ends, and its schedule with it, if not after `steps`; 0 for no such end. The
            learning rate then follows the clock, so that no two runs are the same bit for bit.
        batch_size: images per process and backward pass.
        accumulate: backward passes per step.
        prompts: objects per image.
        smallest: pixels of the logits that an object must cover to be trained on.
        clicks: corrections per object after its first prompt.
        refined: objects per image that are corrected; None is all of them.
        correction_weight: weight of the loss of corrections; see `step.StepSettings`.
        iou_weight: weight of the IoU head's loss; see `losses.prompt_loss`.
        box_share: share of first prompts that are boxes.
        centre_share: share of points that lie at the centre of their object; see `batches.TrainingBatches`.
        lr: peak learning rate of AdamW.
        schedule: cosine, linear, step or constant; see `optim.learning_rate`.
        warmup: steps of linear warm-up.
        weight_decay: of AdamW.
        betas: of AdamW.
        layer_decay: factor of the learning rate from each block of the encoder to the one before it.
        drop_path: rate of the last block of an encoder that is trained.
        clip: limit of the gradient's norm; 0 for none.
        ema: decay of the moving average of the weights, which is what is exported; 0 exports the weights themselves.
        loss_blend: steps over which the loss passes from cross entropy to focal, for training from nothing; 0 for none.
        grouping: weight of `losses.grouping_loss`, for training from nothing.
        grouping_steps: first steps, which train nothing but the grouping.
        precision: fp32 or bf16; see `step.InteractiveStep`.
        graphs: on a GPU, record steps as CUDA graphs; see `recorded.RecordedStep`.
        freeze_encoder: leave the image encoder as it is.
        flip: mirror images at random.
        jitter: range of random scaling; see `batches.Augmentation`.
        repeats: batches that show the same samples; see `batches.TrainingBatches`.
        seed: of everything random.
        save_every: steps between checkpoints.
        log_every: steps between rows of the log.
        picture_every: steps between pictures; 0 for none.
        workers: processes that prepare batches; 0 prepares them in the training process.
    """

    steps: int
    minutes: float = 0.0
    batch_size: int = 1
    accumulate: int = 1
    prompts: int = 64
    smallest: int = 1
    clicks: int = 8
    refined: int | None = None
    correction_weight: float = 1.0
    iou_weight: float = 1.0
    box_share: float = 0.5
    centre_share: float = 0.0
    lr: float = 8e-4
    schedule: str = "step"
    warmup: int = 250
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.8
    drop_path: float = 0.4
    clip: float = 1.0
    ema: float = 0.999
    loss_blend: int = 0
    grouping: float = 0.0
    grouping_steps: int = 0
    precision: str = "fp32"
    graphs: bool = False
    freeze_encoder: bool = False
    flip: bool = True
    jitter: tuple[float, float] = (1.0, 1.0)
    repeats: int = 1
    seed: int = 0
    save_every: int = 500
    log_every: int = 10
    picture_every: int = 500
    workers: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "jitter", tuple(self.jitter))
        positive = ("steps", "batch_size", "accumulate", "prompts", "smallest", "repeats", "save_every", "log_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("clicks", "warmup", "workers", "loss_blend", "picture_every", "grouping_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("minutes", "grouping", "correction_weight", "iou_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if self.refined is not None and self.refined < 1:
            raise ValueError(f"refined must be at least 1, or None for all, got {self.refined}")
        if self.grouping_steps and not (self.grouping and not self.freeze_encoder):
            raise ValueError("grouping_steps need a grouping above 0, and an encoder that is trained")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")
        for name in ("box_share", "centre_share", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and less than 1, got {self.drop_path}")
        if not 0 < self.jitter[0] <= self.jitter[1]:
            raise ValueError(f"jitter must be an ascending range of positive factors, got {self.jitter}")
        if self.schedule not in ("cosine", "linear", "step", "constant"):
            raise ValueError(f"schedule must be cosine, linear, step or constant, got {self.schedule!r}")
