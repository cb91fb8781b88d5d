"""Configurations of the model, and the functions that build it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamConfig:
    """Everything that fixes the architecture of a `Sam` (defaults: what ViT-B, ViT-L and ViT-H share).

    Sizes are in pixels (`image_size`, `patch_size`), tokens (`window_size`) or channels (`embed_dim`, `prompt_embed_dim`,
    `mask_in_chans`, `decoder_mlp_dim`). Blocks listed in `global_attn_indexes` attend to the whole image, the others
    to windows of `window_size` x `window_size` tokens.

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
