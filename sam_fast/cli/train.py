"""`sam-fast train`: train a SAM from nothing, or fine-tune one, on one or several devices and machines."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated

import typer

from sam_fast.cli import training_run as shared
from sam_fast.cli.model import Device, choose_device


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
    output: shared.Output,
    model_type: Annotated[str, typer.Option("--model-type", help="nano, vit_b, vit_l or vit_h.")] = "vit_b",
    checkpoint: shared.Start = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Side of the model input.", show_default="the model's")
    ] = None,
    steps: shared.Steps = 90_000,
    minutes: shared.Minutes = 0.0,
    max_minutes: shared.MaxMinutes = None,
    batch_size: shared.BatchSize = 1,
    accumulate: shared.Accumulate = 1,
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
    iou_weight: Annotated[float, typer.Option("--iou-weight", help="Weight of the loss of predicted IoU.")] = 1.0,
    box_share: Annotated[float, typer.Option("--box-share", help="Share of first prompts that are boxes.")] = 0.5,
    centre_share: Annotated[
        float, typer.Option("--centre-share", help="Share of points at the centre of an object, not anywhere on it.")
    ] = 0.0,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 8e-4,
    schedule: Annotated[Schedule, typer.Option("--schedule", help="Learning rate after warm-up.")] = Schedule.step,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps of linear warm-up.")] = 250,
    weight_decay: shared.WeightDecay = 0.1,
    layer_decay: Annotated[float, typer.Option("--layer-decay", help="1 where there is no pre-training.")] = 0.8,
    drop_path: Annotated[float, typer.Option("--drop-path", help="Drop rate of the last block.")] = 0.4,
    clip: shared.Clip = 1.0,
    ema: shared.Ema = 0.999,
    loss_blend: Annotated[
        int, typer.Option("--loss-blend", help="Steps from cross entropy to focal loss, when training from nothing.")
    ] = 0,
    grouping: Annotated[
        float, typer.Option("--grouping", help="Weight of a loss on which pixels resemble, when training from nothing.")
    ] = 0.0,
    grouping_steps: Annotated[
        int, typer.Option("--grouping-steps", help="First steps, which train nothing but that loss.")
    ] = 0,
    precision: shared.TrainPrecisionOption = shared.TrainPrecision.fp32,
    graphs: Annotated[bool, typer.Option("--graphs", help="On a GPU, record steps as CUDA graphs.")] = False,
    freeze_encoder: Annotated[bool, typer.Option("--freeze-encoder", help="Train prompt encoder and decoder.")] = False,
    flip: shared.Flip = True,
    jitter: Annotated[
        tuple[float, float], typer.Option("--jitter", help="Range of random scaling, such as 0.5 2.0.")
    ] = (1.0, 1.0),
    repeats: Annotated[
        int, typer.Option("--repeats", help="Batches that each image is in, for images that are slow to load.")
    ] = 1,
    seed: shared.Seed = 0,
    save_every: shared.SaveEvery = 500,
    log_every: shared.LogEvery = 10,
    picture_every: shared.PictureEvery = 500,
    workers: shared.Workers = 2,
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
        iou_weight=iou_weight,
        box_share=box_share,
        centre_share=centre_share,
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
        graphs=graphs,
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
    with join_world(choose_device(device)) as world:
        model = shared.build_model(model_type, image_size, checkpoint, seed).to(world.device)
        trainer = Trainer(model, source, config, output, world)
        shared.run_to_the_end(trainer, max_minutes, output / WEIGHTS, _describe)


def _describe(row: Mapping[str, float]) -> str:
    return (
        f"loss {row['loss']:.3f}  IoU {row['first_iou']:.3f}, best of 3 {row['best_iou']:.3f}, "
        f"corrected {row['last_iou']:.3f}  {row['images_per_second']:.2f} images/s"
    )
