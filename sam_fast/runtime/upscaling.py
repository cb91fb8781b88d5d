"""The last stage of the mask decoder as matrix products, faster on a CPU than transposed convolutions, and to train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sam_fast.modeling import MaskDecoder
from sam_fast.modeling.layers import LayerNorm2d


def masks_by_products(decoder: MaskDecoder, mask_tokens: Tensor, image: Tensor, chosen: range) -> Tensor:
    """What `decoder.masks_from(mask_tokens, decoder.upscale(image), chosen)` returns, up to rounding.

    Pixels stay rows of channels up to the masks, and only those are rearranged.

    Args:
        decoder: with the official upscaling: transposed convolution, LayerNorm2d, GELU, transposed convolution, GELU.
        mask_tokens: [N, num_mask_tokens, C].
        image: [N, C, h, w].
        chosen: indices of the mask tokens to use.

    Returns:
        logits [N, len(chosen), 4h, 4w].
    """
    classifiers = [decoder.output_hypernetworks_mlps[index](mask_tokens[:, index]) for index in chosen]
    logits = _upscaled_squares(decoder.output_upscaling, image) @ torch.stack(classifiers, dim=2)  # [N, 16hw, M]
    return _from_squares(logits, image.shape[-2:])


def upscale_by_products(upscaling: nn.Sequential, image: Tensor) -> Tensor:
    """What `upscaling(image)`, the decoder's, returns, up to rounding: [N, C, h, w] -> [N, C/8, 4h, 4w]."""
    return _from_squares(_upscaled_squares(upscaling, image), image.shape[-2:])


def _upscaled_squares(upscaling: nn.Sequential, image: Tensor) -> Tensor:
    """Upscaled pixels in the order of `_from_squares`, [N, C, h, w] -> [N, 16hw, C/8].

    A transposed convolution whose stride is its kernel's side makes each 2 x 2 square of pixels from one input pixel
    alone: it is a matrix product.
    """
    first, norm, act, second, last_act = upscaling
    x = _fourfold(cast(nn.ConvTranspose2d, first), image.flatten(2).transpose(1, 2))  # [N, hw, 4, C/4]
    norm = cast(LayerNorm2d, norm)
    x = act(nn.functional.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps))
    return last_act(_fourfold(cast(nn.ConvTranspose2d, second), x.flatten(1, 2))).flatten(1, 2)


def _from_squares(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """Rearrange pixels [N, 16hw, M], square by square of the squares of an image (h, w), to [N, M, 4h, 4w]."""
    h, w = size
    # Rows, columns of the embedding; row, column in the first square; row, column in the second.
    pixels = pixels.transpose(1, 2).unflatten(2, (h, w, 2, 2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return pixels.reshape(len(pixels), pixels.shape[1], 4 * h, 4 * w)


def _fourfold(conv: nn.ConvTranspose2d, pixels: Tensor) -> Tensor:
    """The 2 x 2 square that each pixel becomes, row by row: [N, P, C_in] -> [N, P, 4, C_out]."""
    matrix = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [4 C_out, C_in]
    bias = None if conv.bias is None else conv.bias.repeat(4)
    return nn.functional.linear(pixels, matrix, bias).unflatten(2, (4, conv.out_channels))
