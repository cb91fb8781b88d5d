"""The linear layers of the image encoder's blocks in narrower formats, for CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_fast import native
from sam_fast.modeling.image_encoder import Block
from sam_fast.ops.gelu import gelu_
from sam_fast.ops.int8_rows import quantise_rows, scale_rows_
from sam_fast.ops.rel_pos_attention import native_takes_heads_of

_SMALLEST = 1e-30  # of a token's scale: a token of zeros stays zeros


class BlockLinears:
    """The linear layers of a block, and what is done between them.

    Attributes:
        attention: the format that attention runs in.
    """

    def __init__(self, layers: Sequence[Callable[[Tensor], Tensor]], attention: torch.dtype = torch.float32) -> None:
        """
        Args:
            layers: qkv, proj, lin1 and lin2, each [..., K] -> [..., N]; qkv in the format of attention.
            attention: that format.
        """
        self.qkv, self._proj, self._lin1, self._lin2 = layers
        self.attention = attention

    def project(self, x: Tensor, read: Tensor) -> Tensor:
        """x [..., C] and the projection of what attention has read."""
        return x + self._proj(read)

    def add_perceptron(self, x: Tensor, normalised: Tensor, backend: str) -> None:
        """Add the perceptron of `normalised` to x, both [M, C]."""
        hidden = gelu_(self._lin1(normalised), backend=backend)
        x += self._lin2(hidden)


class Int8BlockLinears(BlockLinears):
    """The same in 8-bit integers, where what is between two products is done in one pass over memory."""

    def __init__(self, layers: Sequence[nn.Linear], attention: torch.dtype, backend: str) -> None:
        """
        Args:
            layers: qkv, proj, lin1 and lin2; weights are copied.
            attention: the format of attention.
            backend: of the operations between products.
        """
        qkv, *others = layers
        proj, lin1, lin2 = (Int8Linear(layer, backend=backend) for layer in others)
        super().__init__((Int8Linear(qkv, attention, backend), proj, lin1, lin2), attention)
        self._integers = proj, lin1, lin2

    def project(self, x: Tensor, read: Tensor) -> Tensor:
        """As above."""
        proj, total = self._integers[0], x.clone()
        proj.add_to(total.flatten(0, -2), proj.product(*proj.quantise(read)))
        return total

    def add_perceptron(self, x: Tensor, normalised: Tensor, backend: str) -> None:
        """As above."""
        _, lin1, lin2 = self._integers
        hidden = lin1.product(*lin1.quantise(normalised))
        lin2.add_to(x, lin2.product(*lin2.quantise(hidden.values, hidden.scales, lin1.bias, gelu=True)))


def block_linears(block: Block, dtype: torch.dtype, backend: str = "auto") -> BlockLinears:
    """The linear layers of a block, with weights of their own unless `dtype` is float32.

    Where native attention multiplies in bfloat16, it does beside both narrower formats.

    Args:
        block: with float32 weights.
        dtype: float32, bfloat16 or int8.
        backend: of the operations between them.
    """
    layers = block.attn.qkv, block.attn.proj, block.mlp.lin1, block.mlp.lin2
    if dtype == torch.float32:
        return BlockLinears(layers)
    narrow = native.multiplies_bfloat16() and backend != "torch"
    narrow &= native_takes_heads_of(block.attn.qkv.in_features // block.attn.num_heads)
    attention = torch.bfloat16 if narrow else torch.float32
    if dtype == torch.int8:
        return Int8BlockLinears(layers, attention, backend)
    qkv, *others = layers
    return BlockLinears([BFloat16Linear(qkv, attention), *map(BFloat16Linear, others)], attention)


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


class _Product(NamedTuple):
    """A product of integers, float32 [M, N], and the scales of its rows [M]; without bias."""

    values: Tensor
    scales: Tensor


class Int8Linear:
    """What a `nn.Linear` computes, with factors in 8-bit integers: a scale per output of the weight, and per token.

    oneDNN's product takes one scale for all of its input. It is given 1, and results are multiplied by the tokens' own
    scales afterwards. CPUs without VNNI add pairs of products in 16 bits: there activations have 7 bits, lest sums
    saturate.

    Attributes:
        bias: the layer's, or None.

    Args:
        layer: the layer; its weight is copied, its bias is used as it is.
        output: the format of what comes out.
        backend: of the operations around the product.
    """

    def __init__(self, layer: nn.Linear, output: torch.dtype = torch.float32, backend: str = "auto") -> None:
        weight = layer.weight.detach()
        self._scales = weight.abs().amax(1).clamp(min=_SMALLEST) / 127
        self._zeros = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        integers = (weight / self._scales[:, None]).round_().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(integers, None)
        self._most = 127 if torch.cpu._is_vnni_supported() else 63
        self._output, self._backend = output, backend
        self.bias = None if layer.bias is None else layer.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        product = self.product(*self.quantise(x))
        y = product.values if self._output == torch.float32 else torch.empty_like(product.values, dtype=self._output)
        scale_rows_(y, *product, self.bias, backend=self._backend)
        return y.unflatten(0, x.shape[:-1])

    def quantise(
        self, x: Tensor, factors: Tensor | None = None, bias: Tensor | None = None, *, gelu: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Tokens [..., K] as integers [M, K] and their scales [M]; arguments as of `quantise_rows`."""
        rows = x.flatten(0, -2)
        return quantise_rows(rows, self._most, factors=factors, bias=bias, gelu=gelu, backend=self._backend)

    def product(self, integers: Tensor, scales: Tensor) -> _Product:
        """What `quantise` returned, times the weight."""
        weight = self._packed, self._scales, self._zeros
        # Then: no bias; scale, zero point and format of the output; and nothing that follows the product.
        values = torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, self._most + 1, *weight, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return _Product(values, scales)

    def add_to(self, x: Tensor, product: _Product) -> None:
        """Add a product and the bias to rows x [M, N]."""
        scale_rows_(x, *product, self.bias, add=True, backend=self._backend)
