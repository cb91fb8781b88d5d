"""The image encoder for inference on a GPU: weights packed once, and few kernels between the products.

What is exact algebra here (up to rounding the numbers are those of `modeling.ImageEncoderViT`):

* Keys need no bias: it adds the same to all scores of a query. The values' bias comes out of the attention as it is and
  goes through the projection: proj.bias + proj.weight v.bias. Tokens of padding then are zero, so that windows are read
  in place.
* The bias of a block's LayerNorm is the same for all tokens, and goes through the next layer into its bias: rows are
  rounded without it. (Padding of windows, which passes no LayerNorm, does not get it there either.)
* Queries are scaled by 1 / sqrt(d) and log2(e) in their weights, and relative positions, which see queries unscaled, by
  the inverse.
* Biases of `proj` and `lin2` are the same for all tokens: they are left out of the residual stream, and what has
  accumulated of them enters with each LayerNorm (`shift`).

The residual stream is float32, and each LayerNorm adds to it what the product before it made: rounded to bfloat16 after
each layer it doubles the error.

With `e4m3`, the products of 8-bit numbers are qkv, lin1 and lin2; `proj`, whose input would have to be rounded on its
own, and patches and neck stay in half precision. A convolutional stem and its neck run as they are, in float32: rounded
to bfloat16 they cost nano ten times the error of all its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sam_fast.modeling.image_encoder import (
    Block,
    ConvStem,
    ImageEncoderViT,
    PatchEmbed,
)
from sam_fast.modeling.layers import LayerNorm2d
from sam_fast.modeling.positions import resize_absolute_positions, resize_relative_positions
from sam_fast.ops.layer_norm import layer_norm, layer_norm_e4m3
from sam_fast.ops.quantise import quantise, quantise_reference
from sam_fast.ops.rel_pos_attention import rel_pos_attention

_LN2 = math.log(2)  # the softmax of scores in base 2 is that of ln(2) times them


class Norm(NamedTuple):
    """A LayerNorm, with what has been left out of the residual stream before it: float32 [C] each."""

    weight: Tensor
    bias: Tensor
    eps: float
    shift: Tensor | None


class Weight(NamedTuple):
    """The weight of a product, [inputs, outputs], in the model's format or in 8 bits with scales [1, outputs]."""

    values: Tensor
    scales: Tensor | None = None


class PackedBlock(NamedTuple):
    """The weights of a transformer block; Rh and Rw of its attention are resized when the image's size is known."""

    norm1: Norm
    qkv: Weight
    qkv_bias: Tensor
    rel_pos: tuple[Tensor, Tensor] | None
    window: int
    heads: int
    proj: Weight
    norm2: Norm
    lin1: Weight
    lin1_bias: Tensor
    lin2: Weight


def can_pack(encoder: ImageEncoderViT) -> bool:
    """Whether norms, patches and neck of an encoder that `can_encode` says yes to are the usual ones, too."""
    norms = [norm for block in encoder.blocks if isinstance(block, Block) for norm in (block.norm1, block.norm2)]
    if not norms or any(type(norm) is not nn.LayerNorm or norm.bias is None for norm in norms):
        return False
    if type(encoder.patch_embed) is ConvStem:
        return True
    if type(encoder.patch_embed) is not PatchEmbed or type(encoder.neck) is not nn.Sequential:
        return False
    kinds = [nn.Conv2d, LayerNorm2d, nn.Conv2d, LayerNorm2d]
    return type(encoder.patch_embed.proj) is nn.Conv2d and [type(layer) for layer in encoder.neck] == kinds


class PackedEncoder:
    """An image encoder's weights in one format, made ready for a GPU."""

    def __init__(self, encoder: ImageEncoderViT, dtype: torch.dtype, *, e4m3: bool = False) -> None:
        """
        Args:
            encoder: one that `runtime.image_encoder.can_encode` says yes to.
            dtype: of products and attention: float32, bfloat16 or float16.
            e4m3: products of 8-bit numbers where they pay.
        """
        self.encoder, self.dtype, self.e4m3 = encoder, dtype, e4m3
        blocks = [block for block in encoder.blocks if isinstance(block, Block)]
        left_out = torch.zeros_like(blocks[0].attn.proj.weight[0], dtype=torch.float32).detach()
        if not isinstance(encoder.patch_embed, ConvStem):
            projection = encoder.patch_embed.proj
            self.patches = projection.weight.detach().flatten(1).t().to(dtype)
            if projection.bias is not None:
                left_out = left_out + projection.bias.detach().float()
        self.blocks = []
        for block in blocks:
            packed, left_out = _pack_block(block, left_out, dtype, e4m3)
            self.blocks.append(packed)
        self.left_out = left_out
        if isinstance(encoder.neck, nn.Sequential):
            self._pack_neck(encoder.neck)

    def _pack_neck(self, neck: nn.Sequential) -> None:
        """The last left-out biases go through the first convolution, which has none, into the norm after it."""
        first, norm1, second, norm2 = neck
        assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
        weight = first.weight.detach().flatten(1)
        shift = weight.float() @ self.left_out
        self.neck1, self.neck2 = weight.t().to(self.dtype), second.weight.detach().to(self.dtype)
        self.neck_norms = _pack_norm(norm1, shift), _pack_norm(norm2, None)

    def __call__(self, images: Tensor, *, backend: str = "auto") -> Tensor:
        """What the encoder returns for images [B, 3, H, W], normalised and padded: float32 [B, C, h, w]."""
        x, fine = self._to_tokens(images)
        B, h, w, C = x.shape
        x, delta = x.view(B * h * w, C), None
        for block in self.blocks:
            x, delta = self._block(block, x, delta, (B, h, w), backend)
        if delta is not None:
            x = x + delta
        return self._to_embedding(x.view(B, h, w, C), fine, backend)

    def _to_tokens(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        encoder = self.encoder
        if isinstance(encoder.patch_embed, ConvStem):
            with _ExactConvolutions():
                tokens, fine = encoder.to_tokens(images)
            return tokens.float().contiguous(), fine
        side = encoder.patch_size
        B, channels, H, W = images.shape
        if H % side or W % side:
            raise ValueError(f"images must be [B, C, H, W] with H and W multiples of {side}, got {tuple(images.shape)}")
        h, w = H // side, W // side
        patches = images.to(self.dtype).view(B, channels, h, side, w, side).permute(0, 2, 4, 1, 3, 5)
        tokens = patches.reshape(B * h * w, -1) @ self.patches
        tokens = tokens.view(B, h, w, -1).float()
        if encoder.pos_embed is not None:
            tokens = tokens + resize_absolute_positions(encoder.pos_embed.detach(), (h, w))
        return tokens, None

    def _block(
        self, block: PackedBlock, x: Tensor, delta: Tensor | None, size: tuple[int, int, int], backend: str
    ) -> tuple[Tensor, Tensor]:
        """A transformer block over the residual stream x + delta, [B h w, C] each; so is what it returns."""
        qkv, x = self._normalised_product(x, delta, block.norm1, block.qkv, block.qkv_bias, backend)
        window = (block.window, block.window) if block.window else size[1:]
        tables = None
        if block.rel_pos is not None:
            tables = (
                resize_relative_positions(block.rel_pos[0], 2 * window[0] - 1).contiguous(),
                resize_relative_positions(block.rel_pos[1], 2 * window[1] - 1).contiguous(),
            )
        read = rel_pos_attention(qkv.view(*size, 3, block.heads, -1), None, tables, window, scale=_LN2, backend=backend)
        delta = read.view(x.shape) @ block.proj.values
        if block.lin1.scales is not None:
            hidden, x = self._normalised_product(x, delta, block.norm2, block.lin1, block.lin1_bias, backend)
            return x, _product_of_8_bits(*quantise(hidden, gelu=True, backend=backend), block.lin2, None, self.dtype)
        norm = block.norm2
        rows, x = layer_norm(x, *norm[:3], shift=norm.shift, delta=delta, dtype=self.dtype, backend=backend)
        if self.dtype == torch.float32:
            hidden = F.gelu(torch.addmm(block.lin1_bias, rows, block.lin1.values))
        else:  # cuBLAS has the approximation by tanh in the product's epilogue; it differs less than rounding does
            hidden = torch._addmm_activation(block.lin1_bias, rows, block.lin1.values, use_gelu=True)
        return x, hidden @ block.lin2.values

    def _normalised_product(
        self, x: Tensor, delta: Tensor | None, norm: Norm, weight: Weight, bias: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        """A linear layer of the normalised x + delta, and x + delta."""
        if weight.scales is not None:
            rows, scales, x = layer_norm_e4m3(x, *norm[:3], shift=norm.shift, delta=delta, backend=backend)
            return _product_of_8_bits(rows, scales, weight, bias, self.dtype), x
        rows, x = layer_norm(x, *norm[:3], shift=norm.shift, delta=delta, dtype=self.dtype, backend=backend)
        return torch.addmm(bias, rows, weight.values), x

    def _to_embedding(self, tokens: Tensor, fine: Tensor | None, backend: str) -> Tensor:
        """The neck, over tokens [B, h, w, C]."""
        if fine is not None or not isinstance(self.encoder.neck, nn.Sequential):
            with _ExactConvolutions():
                return self.encoder.to_embedding(tokens.float() + self.left_out, fine).float()
        B, h, w, C = tokens.shape
        first, second = self.neck_norms
        x = tokens.view(B * h * w, C).to(self.dtype) @ self.neck1
        x, _ = layer_norm(x, *first[:3], shift=first.shift, backend=backend)
        image = x.view(B, h, w, -1).permute(0, 3, 1, 2)  # channels last, as cuDNN likes it
        image = _exact_conv2d(image, self.neck2, padding=1)
        rows = image.permute(0, 2, 3, 1).reshape(B * h * w, -1)
        x, _ = layer_norm(rows, *second[:3], backend=backend)
        return x.view(B, h, w, -1).permute(0, 3, 1, 2).float().contiguous()


class _ExactConvolutions(TorchFunctionMode):
    """Within it, convolutions of float32 are not rounded to TF32.

    cuDNN's own switch is one for all threads, and PyTorch refuses to read it where the user has set `fp32_precision`.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d:
            return _exact_conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _exact_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    stride, padding, dilation = ((x, x) if isinstance(x, int) else x for x in (stride, padding, dilation))
    cudnn = torch.backends.cudnn
    found: Tensor = torch.ops.aten._convolution(
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        transposed=False,
        output_padding=(0, 0),
        groups=groups,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        cudnn_enabled=cudnn.enabled,
        allow_tf32=False,
    )
    return found


def _pack_block(block: Block, left_out: Tensor, dtype: torch.dtype, e4m3: bool) -> tuple[PackedBlock, Tensor]:
    """A block's weights, and what is left out of the residual stream after it."""
    attention, perceptron = block.attn, block.mlp
    C, heads = attention.proj.in_features, attention.num_heads
    query_scale = (C // heads) ** -0.5 / _LN2
    weight = attention.qkv.weight.detach().float().clone()
    weight[:C] *= query_scale
    proj = attention.proj.weight.detach()
    norm1, through1 = _without_bias(_pack_norm(block.norm1, left_out))
    bias = weight @ through1
    if attention.proj.bias is not None:
        left_out = left_out + attention.proj.bias.detach().float()
    if attention.qkv.bias is not None:
        given = attention.qkv.bias.detach().float()
        bias[:C] += given[:C] * query_scale
        left_out = left_out + proj.float() @ given[2 * C :]
    rel_pos = None
    if attention.use_rel_pos:
        tables = attention.rel_pos_h, attention.rel_pos_w
        rel_h, rel_w = ((table.detach().float() / query_scale).to(dtype) for table in tables)
        rel_pos = rel_h, rel_w
    norm2, through2 = _without_bias(_pack_norm(block.norm2, left_out))
    if perceptron.lin2.bias is not None:
        left_out = left_out + perceptron.lin2.bias.detach().float()
    lin1_bias = perceptron.lin1.weight.detach().float() @ through2
    if perceptron.lin1.bias is not None:
        lin1_bias = lin1_bias + perceptron.lin1.bias.detach().float()
    packed = PackedBlock(
        norm1,
        _pack_weight(weight, dtype, e4m3),
        bias.to(dtype),
        rel_pos,
        block.window_size,
        heads,
        _pack_weight(proj, dtype, False),
        norm2,
        _pack_weight(perceptron.lin1.weight.detach(), dtype, e4m3),
        lin1_bias.to(dtype),
        _pack_weight(perceptron.lin2.weight.detach(), dtype, e4m3),
    )
    return packed, left_out


def _pack_norm(norm: nn.Module, shift: Tensor | None) -> Norm:
    assert isinstance(norm, (nn.LayerNorm, LayerNorm2d))
    return Norm(norm.weight.detach().float(), norm.bias.detach().float(), norm.eps, shift)


def _without_bias(norm: Norm) -> tuple[Norm, Tensor]:
    """The norm without its bias, and the bias."""
    return norm._replace(bias=torch.zeros_like(norm.bias)), norm.bias


def _pack_weight(weight: Tensor, dtype: torch.dtype, e4m3: bool) -> Weight:
    """The weight of a linear layer [outputs, inputs], which stays as it lies: the product takes it transposed."""
    if not e4m3:
        return Weight(weight.to(dtype).t())
    values, scales = quantise_reference(weight)
    return Weight(values.t(), scales.t().contiguous())


def _product_of_8_bits(rows: Tensor, scales: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product; on a GPU its sums have some bits less than float32, and still many more than the factors."""
    assert weight.scales is not None
    fast = rows.is_cuda
    return torch._scaled_mm(rows, weight.values, scales, weight.scales, bias=bias, out_dtype=dtype, use_fast_accum=fast)
