"""The last stage of the mask decoder as matrix products, which train faster than transposed convolutions on a CPU."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sam_fast.modeling import MaskDecoder
from sam_fast.modeling.layers import LayerNorm2d


def masks_by_products(decoder: MaskDecoder, mask_tokens: Tensor, image: Tensor, chosen: range) -> Tensor:
    """What `decoder.masks_from(mask_tokens, decoder.upscale(image), chosen)` returns, up to rounding.

    A transposed convolution whose stride is its kernel's side makes each 2 x 2 square of pixels from one input pixel
    alone: it is a matrix product. Pixels stay rows of channels up to the masks, and only those are rearranged.

    Args:
        decoder: with the official upscaling: transposed convolution, LayerNorm2d, GELU, transposed convolution, GELU.
        mask_tokens: [N, num_mask_tokens, C].
        image: [N, C, h, w].
        chosen: indices of the mask tokens to use.

    Returns:
        logits [N, len(chosen), 4h, 4w].
    """
    first, norm, act, second, last_act = decoder.output_upscaling
    N, _, h, w = image.shape
    x = _fourfold(cast(nn.ConvTranspose2d, first), image.flatten(2).transpose(1, 2))  # [N, hw, 4, C/4]
    norm = cast(LayerNorm2d, norm)
    x = act(nn.functional.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps))
    x = last_act(_fourfold(cast(nn.ConvTranspose2d, second), x.flatten(1, 2)))  # [N, 4hw, 4, C/8]
    classifiers = [decoder.output_hypernetworks_mlps[index](mask_tokens[:, index]) for index in chosen]
    logits = torch.stack(classifiers, dim=1) @ x.flatten(1, 2).transpose(1, 2)  # [N, M, 16hw]
    # Rows, columns of the embedding; row, column in the first square; row, column in the second.
    logits = logits.view(N, len(chosen), h, w, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return logits.reshape(N, len(chosen), 4 * h, 4 * w)


def _fourfold(conv: nn.ConvTranspose2d, pixels: Tensor) -> Tensor:
    """The 2 x 2 square that each pixel becomes, row by row: [N, P, C_in] -> [N, P, 4, C_out]."""
    matrix = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [4 C_out, C_in]
    bias = None if conv.bias is None else conv.bias.repeat(4)
    return nn.functional.linear(pixels, matrix, bias).unflatten(2, (4, conv.out_channels))
