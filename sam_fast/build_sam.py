"""Configurations of the model, and the functions that build it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from sam_fast.checkpoints import load_checkpoint
from sam_fast.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer


@dataclass(frozen=True)
class SamConfig:
    """Everything that fixes the architecture of a `Sam` (defaults: what ViT-B, ViT-L and ViT-H share).

    Sizes are in pixels (`image_size`, `patch_size`), tokens (`window_size`) or channels (`embed_dim`,
    `prompt_embed_dim`, `mask_in_chans`, `decoder_mlp_dim`). Blocks listed in `global_attn_indexes` attend to the whole
    image, the others to windows of `window_size` x `window_size` tokens (to the whole image where it is 0).
    `stem_channels` are those of the convolutions before the patches (`image_encoder.ConvStem`), none in the official
    models.

    Raises:
        ValueError: the numbers do not fit together.
    """

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    image_size: int = 1024
    patch_size: int = 16
    window_size: int = 14
    mlp_ratio: float = 4.0
    prompt_embed_dim: int = 256
    mask_in_chans: int = 16
    decoder_depth: int = 2
    decoder_num_heads: int = 8
    decoder_mlp_dim: int = 2048
    stem_channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "global_attn_indexes", tuple(self.global_attn_indexes))
        object.__setattr__(self, "stem_channels", tuple(self.stem_channels))
        if self.image_size <= 0 or self.patch_size <= 0 or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}"
            )
        if self.num_heads <= 0 or self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {self.embed_dim} and {self.num_heads}")
        if any(not 0 <= index < self.depth for index in self.global_attn_indexes):
            raise ValueError(f"global_attn_indexes must lie in 0..{self.depth - 1}, got {self.global_attn_indexes}")


NANO = SamConfig(
    embed_dim=256,
    depth=9,
    num_heads=4,
    global_attn_indexes=(2, 4, 5, 8),
    image_size=512,
    window_size=8,
    stem_channels=(32, 64, 128),
)
VIT_B = SamConfig(embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11))
VIT_L = SamConfig(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23))
VIT_H = SamConfig(embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31))

model_configs: dict[str, SamConfig] = {"nano": NANO, "vit_b": VIT_B, "vit_l": VIT_L, "vit_h": VIT_H}


def build_sam_from_config(config: SamConfig, checkpoint: str | os.PathLike[str] | None = None) -> Sam:
    """Build a model in eval mode, with PyTorch's random initialisation or the weights of a file.

    Args:
        config: the architecture.
        checkpoint: any file that `sam_fast.checkpoints.load_checkpoint` reads; positions of another image size
            than the configuration's are interpolated.

    Raises:
        ValueError: the file is not a checkpoint of this architecture.
    """
    if checkpoint is None:
        sam = Sam(*_build_stages(config))
    else:
        with torch.device("meta"):  # the file brings every weight: do not draw random ones first
            stages = _build_stages(config)
        sam = Sam(*stages)
        load_checkpoint(sam, checkpoint)
    sam.runner = _run_batch
    return sam.eval()


def build_sam_vit_h(checkpoint: str | os.PathLike[str] | None = None) -> Sam:
    """Build ViT-H, 641 million parameters."""
    return build_sam_from_config(VIT_H, checkpoint)


def build_sam_vit_l(checkpoint: str | os.PathLike[str] | None = None) -> Sam:
    """Build ViT-L, 312 million parameters."""
    return build_sam_from_config(VIT_L, checkpoint)


def build_sam_vit_b(checkpoint: str | os.PathLike[str] | None = None) -> Sam:
    """Build ViT-B, 94 million parameters."""
    return build_sam_from_config(VIT_B, checkpoint)


def build_sam_nano(checkpoint: str | os.PathLike[str] | None = None) -> Sam:
    """Build nano, 11.9 million parameters for images of 512 px, with the weights that come with the package.

    Args:
        checkpoint: other weights of this architecture instead.
    """
    if checkpoint is not None:
        return build_sam_from_config(NANO, checkpoint)
    with resources.as_file(resources.files("sam_fast") / "assets" / "nano" / "model.safetensors") as packaged:
        return build_sam_from_config(NANO, packaged)


def _run_batch(sam: Sam, batched_input: list[dict[str, Any]], multimask_output: bool) -> list[dict[str, Tensor]] | None:
    """`Sam.forward` by the runtime, where that gives the same."""
    from sam_fast.runtime import batched  # here: a model can be built and trained without it

    return batched.run(sam, batched_input, multimask_output)


build_sam = build_sam_vit_h

sam_model_registry: dict[str, Callable[..., Sam]] = {
    "default": build_sam,
    "vit_h": build_sam_vit_h,
    "vit_l": build_sam_vit_l,
    "vit_b": build_sam_vit_b,
    "nano": build_sam_nano,
}


def _build_stages(config: SamConfig) -> tuple[ImageEncoderViT, PromptEncoder, MaskDecoder]:
    grid = config.image_size // config.patch_size
    image_encoder = ImageEncoderViT(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        out_chans=config.prompt_embed_dim,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
        use_rel_pos=True,
        window_size=config.window_size,
        global_attn_indexes=config.global_attn_indexes,
        stem_channels=config.stem_channels,
    )
    prompt_encoder = PromptEncoder(
        embed_dim=config.prompt_embed_dim,
        image_embedding_size=(grid, grid),
        input_image_size=(config.image_size, config.image_size),
        mask_in_chans=config.mask_in_chans,
    )
    transformer = TwoWayTransformer(
        depth=config.decoder_depth,
        embedding_dim=config.prompt_embed_dim,
        num_heads=config.decoder_num_heads,
        mlp_dim=config.decoder_mlp_dim,
    )
    mask_decoder = MaskDecoder(transformer_dim=config.prompt_embed_dim, transformer=transformer)
    return image_encoder, prompt_encoder, mask_decoder
