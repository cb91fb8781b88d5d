"""`sam-fast train`: train a SAM from nothing, or fine-tune one, on one or several devices and machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam_fast.cli.model import Device
from sam_fast.cli.training_run import run_to_the_end

if TYPE_CHECKING:
    from sam_fast.modeling import Sam


class TrainPrecision(str, Enum):
    """Number formats of training."""

    fp32 = "fp32"
    bf16 = "bf16"


class Schedule(str, Enum):
    """Courses of the learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    step = "step"
    constant = "constant"


def train(
    data: Annotated[
        list[str],
        typer.Option("--data", help="What to train on: scenes, SA-1B, COCO or mask folders; may be repeated."),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder of checkpoints and logs; a run in it goes on.")],
    model_type: Annotated[str, typer.Option("--model-type", help="nano, vit_b, vit_l or vit_h.")] = "vit_b",
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Weights to start from (a SAM, or an MAE's encoder); random without it."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Side of the model input.", show_default="the model's")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps.")] = 90_000,
    minutes: Annotated[
        float, typer.Option("--minutes", help="End the run and its schedule after so long, if not after --steps.")
    ] = 0.0,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", help="Save and stop after so long; the same command goes on.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images per process and backward pass.")] = 1,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Backward passes per step.")] = 1,
    prompts: Annotated[int, typer.Option("--prompts", help="Objects per image.")] = 64,
    smallest: Annotated[
        int, typer.Option("--smallest", help="Logit pixels (1/4 of a patch wide) that an object must cover.")
    ] = 1,
    clicks: Annotated[int, typer.Option("--clicks", help="Corrections per object after its first prompt.")] = 8,
    refined: Annotated[
        int | None, typer.Option("--refined", help="Objects per image that are corrected.", show_default="all")
    ] = None,
    correction_weight: Annotated[
        float, typer.Option("--correction-weight", help="Weight of the loss of corrections; less while they are new.")
    ] = 1.0,
    box_share: Annotated[float, typer.Option("--box-share", help="Share of first prompts that are boxes.")] = 0.5,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 8e-4,
    schedule: Annotated[Schedule, typer.Option("--schedule", help="Learning rate after warm-up.")] = Schedule.step,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps of linear warm-up.")] = 250,
    weight_decay: Annotated[float, typer.Option("--weight-decay")] = 0.1,
    layer_decay: Annotated[float, typer.Option("--layer-decay", help="1 where there is no pre-training.")] = 0.8,
    drop_path: Annotated[float, typer.Option("--drop-path", help="Drop rate of the last block.")] = 0.4,
    clip: Annotated[float, typer.Option("--clip", help="Limit of the gradient's norm; 0 for none.")] = 1.0,
    ema: Annotated[float, typer.Option("--ema", help="Decay of the average of the weights; 0 for none.")] = 0.999,
    loss_blend: Annotated[
        int, typer.Option("--loss-blend", help="Steps from cross entropy to focal loss, when training from nothing.")
    ] = 0,
    grouping: Annotated[
        float, typer.Option("--grouping", help="Weight of a loss on which pixels resemble, when training from nothing.")
    ] = 0.0,
    grouping_steps: Annotated[
        int, typer.Option("--grouping-steps", help="First steps, which train nothing but that loss.")
    ] = 0,
    precision: Annotated[TrainPrecision, typer.Option("--precision")] = TrainPrecision.fp32,
    freeze_encoder: Annotated[bool, typer.Option("--freeze-encoder", help="Train prompt encoder and decoder.")] = False,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror images at random.")] = True,
    jitter: Annotated[
        tuple[float, float], typer.Option("--jitter", help="Range of random scaling, such as 0.5 2.0.")
    ] = (1.0, 1.0),
    repeats: Annotated[
        int, typer.Option("--repeats", help="Batches that each image is in, for images that are slow to load.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    save_every: Annotated[int, typer.Option("--save-every", help="Steps between checkpoints.")] = 500,
    log_every: Annotated[int, typer.Option("--log-every", help="Steps between rows of metrics.csv.")] = 10,
    picture_every: Annotated[int, typer.Option("--picture-every", help="Steps between pictures; 0: none.")] = 500,
    workers: Annotated[int, typer.Option("--workers", help="Processes that prepare batches.")] = 2,
    device: Device = None,
) -> None:
    """Train a SAM from nothing, or fine-tune one.

    Several GPUs: `torchrun --nproc-per-node 8 -m sam_fast train ...`. An interrupted run goes on with the same command.
    """
    from sam_fast.data.open import open_sources
    from sam_fast.training.config import TrainConfig
    from sam_fast.training.distributed import join_world
    from sam_fast.training.trainer import WEIGHTS, Trainer

    config = TrainConfig(
        steps=steps,
        minutes=minutes,
        batch_size=batch_size,
        accumulate=accumulate,
        prompts=prompts,
        smallest=smallest,
        clicks=clicks,
        refined=refined,
        correction_weight=correction_weight,
        box_share=box_share,
        lr=lr,
        schedule=schedule.value,
        warmup=warmup,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        drop_path=drop_path,
        clip=clip,
        ema=ema,
        loss_blend=loss_blend,
        grouping=grouping,
        grouping_steps=grouping_steps,
        precision=precision.value,
        freeze_encoder=freeze_encoder,
        flip=flip,
        jitter=jitter,
        repeats=repeats,
        seed=seed,
        save_every=save_every,
        log_every=log_every,
        picture_every=picture_every,
        workers=workers,
    )
    source = open_sources(data)
    with join_world(device) as world:
        model = build_model(model_type, image_size, checkpoint, seed).to(world.device)
        trainer = Trainer(model, source, config, output, world)
        run_to_the_end(trainer, max_minutes, output / WEIGHTS, _describe)


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


def _describe(row: Mapping[str, float]) -> str:
    return (
        f"loss {row['loss']:.3f}  IoU {row['first_iou']:.3f}, best of 3 {row['best_iou']:.3f}, "
        f"corrected {row['last_iou']:.3f}  {row['images_per_second']:.2f} images/s"
    )
