"""`sam-fast convert`: any checkpoint that can be read, as safetensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sam_fast.cli.console import escaped, out


def convert(
    source: Annotated[Path, typer.Argument(help="A .pth or .safetensors file, or a Hugging Face folder.")],
    target: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    model_type: Annotated[str, typer.Option("--model-type", help="nano, vit_b, vit_l or vit_h.")] = "vit_b",
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Resize positions to this input.", show_default="the model's")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store 16-bit floats: half the size, loaded as 32-bit.")] = False,
) -> None:
    """Write a checkpoint as safetensors, under the official names."""
    import torch

    from sam_fast.build_sam import build_sam_from_config, model_configs
    from sam_fast.checkpoints import save_checkpoint

    if model_type not in model_configs:
        raise ValueError(f"--model-type must be one of {', '.join(model_configs)}, got {model_type!r}")
    config = model_configs[model_type]
    if image_size is not None:
        config = replace(config, image_size=image_size)
    model = build_sam_from_config(config, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, target, dtype=torch.float16 if half else torch.float32)
    out().print(f"{escaped(target)}: {target.stat().st_size / 1e6:.1f} MB")
