"""The last stage of the mask decoder as matrix products, faster on a CPU than transposed convolutions, and to train."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sam_fast.modeling import MaskDecoder
from sam_fast.modeling.layers import LayerNorm2d
from sam_fast.ops.upscale_masks import Upscaling, from_squares, upscaled_squares


def can_upscale_by_products(upscaling: nn.Sequential) -> bool:
    """Whether an upscaling is the official one: convolution, LayerNorm2d, GELU, convolution, GELU, no subclasses."""
    kinds = [nn.ConvTranspose2d, LayerNorm2d, nn.GELU, nn.ConvTranspose2d, nn.GELU]
    if [type(layer) for layer in upscaling] != kinds:
        return False
    return all(act.approximate == "none" for act in upscaling if isinstance(act, nn.GELU)) and all(
        conv.bias is not None for conv in upscaling if isinstance(conv, nn.ConvTranspose2d)
    )


def masks_by_products(decoder: MaskDecoder, mask_tokens: Tensor, image: Tensor, chosen: range) -> Tensor:
    """What `decoder.masks_from(mask_tokens, decoder.upscale(image), chosen)` returns, up to rounding; differentiable.

    Args:
        decoder: with the official upscaling, see `can_upscale_by_products`.
        mask_tokens: [N, num_mask_tokens, C].
        image: [N, C, h, w].
        chosen: indices of the mask tokens to use.

    Returns:
        logits [N, len(chosen), 4h, 4w].
    """
    classifiers = [decoder.output_hypernetworks_mlps[index](mask_tokens[:, index]) for index in chosen]
    pixels = upscaled_squares(image.permute(0, 2, 3, 1), upscaling_weights(decoder.output_upscaling))
    return from_squares(pixels @ torch.stack(classifiers, dim=2), image.shape[-2:])


def upscale_by_products(upscaling: nn.Sequential, image: Tensor) -> Tensor:
    """What `upscaling(image)`, the decoder's, returns, up to rounding: [N, C, h, w] -> [N, C/8, 4h, 4w]."""
    pixels = upscaled_squares(image.permute(0, 2, 3, 1), upscaling_weights(upscaling))
    return from_squares(pixels, image.shape[-2:])


def upscaling_weights(upscaling: nn.Sequential) -> Upscaling:
    """The weights of the official upscaling as matrices."""
    first, norm, _, second, _ = upscaling
    first, second = cast(nn.ConvTranspose2d, first), cast(nn.ConvTranspose2d, second)
    norm = cast(LayerNorm2d, norm)
    assert first.bias is not None and second.bias is not None
    return Upscaling(_matrix(first), first.bias, norm.weight, norm.bias, norm.eps, _matrix(second), second.bias)


def _matrix(conv: nn.ConvTranspose2d) -> Tensor:
    """[C_in, C_out, 2, 2] -> [4 C_out, C_in]."""
    return conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
