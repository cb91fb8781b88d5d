"""The linear layers of the image encoder's blocks in narrower formats, for CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_fast import native
from sam_fast.modeling.image_encoder import Block

_SMALLEST = 1e-30  # of a token's scale: a token of zeros stays zeros


class BlockLinears(NamedTuple):
    """What multiplies in a block, each [..., K] -> [..., N], and the format of its attention."""

    qkv: Callable[[Tensor], Tensor]
    proj: Callable[[Tensor], Tensor]
    lin1: Callable[[Tensor], Tensor]
    lin2: Callable[[Tensor], Tensor]
    attention: torch.dtype = torch.float32


def block_linears(block: Block, dtype: torch.dtype) -> BlockLinears:
    """The linear layers of a block, with weights of their own unless `dtype` is float32.

    Where the CPU multiplies in bfloat16, attention is bfloat16 beside both narrower formats.

    Args:
        block: with float32 weights.
        dtype: float32, bfloat16 or int8.
    """
    layers = block.attn.qkv, block.attn.proj, block.mlp.lin1, block.mlp.lin2
    if dtype == torch.float32:
        return BlockLinears(*layers)
    attention = torch.bfloat16 if native.multiplies_bfloat16() else torch.float32
    if dtype == torch.int8:
        return BlockLinears(*(Int8Linear(layer) for layer in layers), attention)
    qkv, *others = layers
    return BlockLinears(BFloat16Linear(qkv, attention), *(BFloat16Linear(layer) for layer in others), attention)


class BFloat16Linear:
    """What a `nn.Linear` computes, with factors in bfloat16; sums are float32 within the product.

    Args:
        layer: the layer; its weight is copied, its bias is used as it is, or copied where the output is bfloat16.
        output: the format of what comes out.
    """

    def __init__(self, layer: nn.Linear, output: torch.dtype = torch.float32) -> None:
        self._output = output
        self._weight = layer.weight.detach().bfloat16()
        self._bias = None if layer.bias is None else layer.bias.detach().to(output)

    def __call__(self, x: Tensor) -> Tensor:
        if self._output == torch.bfloat16:
            return F.linear(x.bfloat16(), self._weight, self._bias)
        y = F.linear(x.bfloat16(), self._weight).float()
        return y if self._bias is None else y.add_(self._bias)


class Int8Linear:
    """What a `nn.Linear` computes, with factors in 8-bit integers: a scale per output of the weight, and per token.

    oneDNN's product takes one scale for all of its input. It is given 1, and results are multiplied by the tokens' own
    scales afterwards. CPUs without VNNI add pairs of products in 16 bits: there activations have 7 bits, lest sums
    saturate.

    Args:
        layer: the layer; its weight is copied, its bias is used as it is.
    """

    def __init__(self, layer: nn.Linear) -> None:
        weight = layer.weight.detach()
        self._scales = weight.abs().amax(1).clamp(min=_SMALLEST) / 127
        self._zeros = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        integers = (weight / self._scales[:, None]).round_().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(integers, None)
        self._bias = None if layer.bias is None else layer.bias.detach()
        self._most = 127 if torch.cpu._is_vnni_supported() else 63

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).float()
        scales = rows.abs().amax(1, keepdim=True).clamp_(min=_SMALLEST) / self._most
        zero_point = self._most + 1
        integers = (rows / scales).round_().add_(zero_point).to(torch.uint8)
        weight = self._packed, self._scales, self._zeros
        # Then: no bias; scale, zero point and format of the output; and nothing that follows the product.
        y = torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, zero_point, *weight, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y *= scales
        if self._bias is not None:
            y += self._bias
        return y.unflatten(0, x.shape[:-1])
