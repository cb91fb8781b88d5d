"""The image encoder for inference on a CPU: nothing is padded, and neither scores nor relative biases are ever whole.

Up to rounding (relative 1e-6 in float32) the numbers are those of `modeling.ImageEncoderViT`, which stays the reference
and is what training uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sam_fast.modeling.image_encoder import Attention, Block, ImageEncoderViT
from sam_fast.modeling.layers import MLPBlock
from sam_fast.modeling.positions import resize_relative_positions
from sam_fast.ops.rel_pos_attention import rel_pos_attention
from sam_fast.runtime.linears import BlockLinears, block_linears
from sam_fast.runtime.plain import is_untouched_throughout

_TOKENS_AT_ONCE = 1024  # in a perceptron: what its hidden layer holds then stays in the cache (12 MB for ViT-B)


def can_encode(encoder: nn.Module) -> bool:
    """Whether an encoder is the plain one, whose weights may be read: no subclass, no other kind of layer, no hooks.

    Quantised, adapted or parametrised layers compute what their `weight` does not say.
    """
    if type(encoder) is not ImageEncoderViT or encoder.training or not is_untouched_throughout(encoder):
        return False
    for block in encoder.blocks:
        if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not MLPBlock:
            return False
        layers = (block.attn.qkv, block.attn.proj, block.mlp.lin1, block.mlp.lin2)
        act = block.mlp.act
        if (
            any(type(layer) is not nn.Linear for layer in layers)
            or type(act) is not nn.GELU
            or act.approximate != "none"
        ):
            return False
    return True


def encode(
    encoder: ImageEncoderViT, images: Tensor, linears: Sequence[BlockLinears] | None = None, *, backend: str = "auto"
) -> Tensor:
    """What `encoder(images)` returns, without gradients: [B, 3, H, W] -> [B, C, H/patch, W/patch].

    Args:
        encoder: one that `can_encode` says yes to.
        images: as for the encoder.
        linears: what multiplies in each block; by default the encoder's own layers.
        backend: of the operations.
    """
    if linears is None:
        linears = linears_of(encoder, torch.float32, backend)
    tokens, fine = encoder.to_tokens(images)
    tokens = tokens.contiguous()
    for block, own in zip(encoder.blocks, linears, strict=True):
        tokens = _block(block, own, tokens, backend)
    return encoder.to_embedding(tokens, fine)


def linears_of(encoder: ImageEncoderViT, dtype: torch.dtype, backend: str = "auto") -> list[BlockLinears]:
    """The linear layers of all blocks in float32, bfloat16 or int8; the backend is that of operations between them."""
    return [block_linears(block, dtype, backend) for block in encoder.blocks if isinstance(block, Block)]


def _block(block: nn.Module, linears: BlockLinears, x: Tensor, backend: str) -> Tensor:
    """A transformer block over tokens [B, H, W, C]."""
    assert isinstance(block, Block)
    attention = block.attn
    H, W = x.shape[1:3]
    window = (block.window_size, block.window_size) if block.window_size else (H, W)
    rel_pos, dtype = None, linears.attention
    if attention.use_rel_pos:
        rel_pos = (
            resize_relative_positions(attention.rel_pos_h, 2 * window[0] - 1).to(dtype),
            resize_relative_positions(attention.rel_pos_w, 2 * window[1] - 1).to(dtype),
        )
    qkv = linears.qkv(block.norm1(x)).unflatten(3, (3, attention.num_heads, -1))
    bias = None if attention.qkv.bias is None else attention.qkv.bias.to(dtype)
    read = rel_pos_attention(qkv, bias, rel_pos, window, backend=backend)
    del qkv
    x = linears.project(x, read)
    rows = x.flatten(0, 2)
    for some in rows.split(_TOKENS_AT_ONCE):
        linears.add_perceptron(some, block.norm2(some), backend)
    return x
