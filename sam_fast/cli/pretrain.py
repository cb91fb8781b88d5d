"""`sam-fast pretrain`: let a SAM's image encoder learn from pictures alone, as a masked autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from sam_fast.cli import training_run as shared
from sam_fast.cli.model import Device, choose_device

_BATCH_OF_PAPER = 256  # images per step, for which the paper states its learning rate


def pretrain(
    data: Annotated[
        list[str],
        typer.Option("--data", help="A folder of images, to any depth, or what `train` takes; may be repeated."),
    ],
    output: shared.Output,
    model_type: Annotated[str, typer.Option("--model-type", help="nano, vit_b, vit_l or vit_h.")] = "vit_b",
    checkpoint: shared.Start = None,
    image_size: Annotated[
        int, typer.Option("--image-size", help="Side of the images; `train` interpolates positions to its own.")
    ] = 224,
    steps: shared.Steps = 100_000,
    minutes: shared.Minutes = 0.0,
    max_minutes: shared.MaxMinutes = None,
    batch_size: shared.BatchSize = 64,
    accumulate: shared.Accumulate = 1,
    mask_ratio: Annotated[float, typer.Option("--mask-ratio", help="Share of the patches that are masked.")] = 0.75,
    decoder_dim: Annotated[
        int | None, typer.Option("--decoder-dim", help="Channels of the decoder.", show_default="half the encoder's")
    ] = None,
    decoder_depth: Annotated[int, typer.Option("--decoder-depth", help="Blocks of the decoder.")] = 2,
    decoder_heads: Annotated[
        int | None, typer.Option("--decoder-heads", help="Its attention heads.", show_default="the encoder's")
    ] = None,
    normalise: Annotated[
        bool, typer.Option("--normalise/--pixels", help="Predict pixels normalised within each patch, or as they are.")
    ] = True,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Peak learning rate.", show_default="1.5e-4 per 256 images of a step"),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            "--warmup", help="Steps of linear warm-up.", show_default="5% of all; with --minutes at most 250 of them"
        ),
    ] = None,
    weight_decay: shared.WeightDecay = 0.05,
    clip: shared.Clip = 0.0,
    ema: shared.Ema = 0.0,
    precision: shared.TrainPrecisionOption = shared.TrainPrecision.fp32,
    crop: Annotated[
        tuple[float, float], typer.Option("--crop", help="Range of the share of a picture that is cut out.")
    ] = (0.2, 1.0),
    flip: shared.Flip = True,
    seed: shared.Seed = 0,
    save_every: shared.SaveEvery = 500,
    log_every: shared.LogEvery = 10,
    picture_every: shared.PictureEvery = 500,
    workers: shared.Workers = 2,
    device: Device = None,
) -> None:
    """Let a SAM's image encoder learn from pictures alone, as a masked autoencoder.

    The result, mae.safetensors, is what `sam-fast train --checkpoint` starts from. Several GPUs: `torchrun
    --nproc-per-node 8 -m sam_fast pretrain ...`. An interrupted run goes on with the same command.
    """
    from sam_fast.build_sam import model_configs
    from sam_fast.training.distributed import join_world
    from sam_fast.training.pictures import open_pictures
    from sam_fast.training.pretraining import WEIGHTS, PretrainConfig, Pretrainer

    source = open_pictures(data)
    if warmup is None:
        warmup = min(steps // 20, 250) if minutes else steps // 20
    with join_world(choose_device(device)) as world:
        sam = shared.build_model(model_type, image_size, checkpoint, seed).to(world.device)
        architecture = model_configs[model_type]
        config = PretrainConfig(
            steps=steps,
            minutes=minutes,
            batch_size=batch_size,
            accumulate=accumulate,
            mask_ratio=mask_ratio,
            decoder_dim=architecture.embed_dim // 2 if decoder_dim is None else decoder_dim,
            decoder_depth=decoder_depth,
            decoder_heads=architecture.num_heads if decoder_heads is None else decoder_heads,
            normalise_patches=normalise,
            lr=1.5e-4 * batch_size * accumulate * world.size / _BATCH_OF_PAPER if lr is None else lr,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            ema=ema,
            precision=precision.value,
            crop=crop,
            flip=flip,
            seed=seed,
            save_every=save_every,
            log_every=log_every,
            picture_every=picture_every,
            workers=workers,
        )
        trainer = Pretrainer(sam, source, config, output, world)
        shared.run_to_the_end(trainer, max_minutes, output / WEIGHTS, _describe)


def _describe(row: Mapping[str, float]) -> str:
    return f"loss {row['loss']:.4f}  {row['images_per_second']:.1f} images/s"
