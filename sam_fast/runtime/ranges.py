"""How large numbers in the mask decoder may get: whether float16, which has more digits than bfloat16, holds them all.

Bounds follow from the weights. Lengths are Euclidean norms: that of what a LayerNorm returns is known, a matrix makes
a vector longer by its Frobenius norm at most, and no number of the product is larger than the length of the matrix's
longest row times the vector's. An average, as a softmax makes it, is no longer than the longest that goes into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from sam_fast.modeling import MaskDecoder, TwoWayTransformer
from sam_fast.modeling.layers import MLPBlock
from sam_fast.modeling.transformer import Attention, TwoWayAttentionBlock
from sam_fast.ops.upscale_masks import Upscaling
from sam_fast.runtime.upscaling import upscaling_weights

# Of an image's pixels and a prompt's tokens, which the decoder's weights say nothing of.
LONGEST_INPUT = 256.0
_LARGEST = 2.0**15  # half of what float16 holds
_SMALLEST = 2.0**-8  # that the largest number of a weight must reach; what is 64 times smaller has all its digits


@torch.no_grad()
def fits_float16(decoder: MaskDecoder) -> bool:
    """Whether float16 holds all that a decoder multiplies, for images and prompts up to `LONGEST_INPUT`.

    Args:
        decoder: the plain one, of plain layers (see `runtime.packed_decoder.can_pack`).
    """
    transformer = cast(TwoWayTransformer, decoder.transformer)
    layers = [part for part in transformer.modules() if isinstance(part, nn.Linear | nn.LayerNorm)]
    if any(layer.bias is None for layer in layers):
        return False
    upscaling = upscaling_weights(decoder.output_upscaling)
    matrices = [layer.weight for layer in layers]
    matrices += [upscaling.first_weight, upscaling.norm_weight, upscaling.second_weight]
    weights = torch.stack([matrix.abs().max().float() for matrix in matrices])
    numbers = torch.stack([*_of_transformer(decoder, transformer), *_of_upscaling(upscaling)])
    keep_digits = (weights == 0) | (weights >= _SMALLEST)
    return bool((numbers < _LARGEST).all() & (weights < _LARGEST).all() & keep_digits.all())


def _of_transformer(decoder: MaskDecoder, transformer: TwoWayTransformer) -> Iterator[Tensor]:
    """Bounds of all numbers that are rounded on the way of tokens and pixels."""
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).float().norm(dim=1).max()
    given = own.clamp(min=LONGEST_INPUT)  # tokens, whose places are encoded by adding them once more
    encoding = (transformer.embedding_dim / 2) ** 0.5  # of pixels: sines and cosines
    tokens, pixels = given, torch.full_like(given, LONGEST_INPUT)
    for layer in cast(list[TwoWayAttentionBlock], list(transformer.layers)):
        placed = tokens if layer.skip_first_layer_pe else tokens + given
        yield from _of_attention(layer.self_attn, placed, placed, tokens)
        tokens = _length_of_norm(layer.norm1)
        yield from _of_attention(layer.cross_attn_token_to_image, tokens + given, pixels + encoding, pixels)
        yield _of_absorbed(layer.cross_attn_token_to_image, "q_proj", tokens + given, "k_proj")
        tokens = _length_of_norm(layer.norm2)
        perceptron = cast(MLPBlock, layer.mlp)
        yield tokens
        yield _largest(perceptron.lin1, tokens)
        yield _largest(perceptron.lin2, _length(perceptron.lin1, tokens))
        tokens = _length_of_norm(layer.norm3)
        yield from _of_attention(layer.cross_attn_image_to_token, pixels + encoding, tokens + given, tokens)
        yield _of_absorbed(layer.cross_attn_image_to_token, "k_proj", tokens + given, "q_proj")
        pixels = _length_of_norm(layer.norm4)
    final = transformer.final_attn_token_to_image
    yield from _of_attention(final, tokens + given, pixels + encoding, pixels)
    yield _of_absorbed(final, "q_proj", tokens + given, "k_proj")


def _of_attention(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
    """Of what goes into the projections of queries, keys and values, and is so long; of these, and of what is read.

    What tokens offer to pixels, each head's part of `out_proj` alone, is no larger than the latter.
    """
    yield from (q, k, v)
    yield _largest(attention.q_proj, q)
    yield _largest(attention.k_proj, k)
    yield _largest(attention.v_proj, v)
    yield _largest(attention.out_proj, _length(attention.v_proj, v))


def _of_absorbed(attention: Attention, projection: str, length: Tensor, other: str) -> Tensor:
    """Of tokens that are projected, and multiplied head by head with another projection (`ops.two_way_attention`)."""
    first, second, heads = getattr(attention, projection), getattr(attention, other), (attention.num_heads, -1)
    weight, bias, then = (x.float().unflatten(0, heads) for x in (first.weight, first.bias, second.weight))
    lengths = weight.flatten(1).norm(dim=1) * length + bias.norm(dim=1)
    return (lengths * then.norm(dim=1).amax(1)).max()


def _of_upscaling(upscaling: Upscaling) -> Iterator[Tensor]:
    """Of what is behind the LayerNorm: no value of C1 is larger than sqrt(C1), and no GELU than what goes into it.

    Before it numbers are float32, but for the bias.
    """
    squares = upscaling.norm_weight.abs().float() * len(upscaling.norm_weight) ** 0.5 + upscaling.norm_bias.abs()
    pixels = upscaling.second_weight.abs().float() @ squares.float() + upscaling.second_bias.abs().float().repeat(4)
    yield from (upscaling.first_bias.abs().max().float(), squares.max().float(), pixels.max())


def _largest(layer: nn.Linear, length: Tensor) -> Tensor:
    """Of the numbers that a layer makes of a vector of that length."""
    return (layer.weight.float().norm(dim=1) * length + layer.bias.float().abs()).max()


def _length(layer: nn.Linear, length: Tensor) -> Tensor:
    """Of what a layer makes of a vector of that length."""
    return layer.weight.float().norm() * length + layer.bias.float().norm()


def _length_of_norm(norm: nn.LayerNorm) -> Tensor:
    return norm.weight.abs().max().float() * len(norm.weight) ** 0.5 + norm.bias.float().norm()
