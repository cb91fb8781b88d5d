"""Self-attention of an image's tokens in windows, with decomposed relative positions: the image encoder's.

Source: Li et al., "MViTv2", 2022, equation 4; Li et al., "Exploring Plain Vision Transformer Backbones for Object
Detection" (ViTDet), 2022, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_fast import native
from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register

_NATIVE_TYPES = (torch.float32, torch.bfloat16)
_NATIVE_WIDTH = 512  # kMostHeadWidth of csrc/rel_pos_attention.h
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def rel_pos_attention(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    rel_pos: tuple[Tensor, Tensor] | None,
    window: tuple[int, int],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q k^T + q . Rh[y_q - y_k] + q . Rw[x_q - x_k]) v within each window.

    Windows tile the image from its upper left corner. Where the last ones reach beyond it there are tokens of padding,
    which take part unmasked, as in the official code: their projections are the bias alone.

    Args:
        qkv: projected tokens with their bias, [B, H, W, 3, heads, d].
        qkv_bias: [3 heads d], what padding is projected to; None if the projection has no bias.
        rel_pos: Rh [2 rows - 1, d] and Rw [2 columns - 1, d], or None.
        window: rows and columns of a window; (H, W) for attention over the whole image.
        scale: by default 1 / sqrt(d).
        backend: "native" (float32 or bfloat16, d a multiple of 8 up to 512), "triton" (d = 16, 32, 48, 64, 80, 96, 128,
            ..., and no qkv_bias where there is padding: see `runtime.packed_encoder`), "torch" or "auto".

    Returns:
        [B, H, W, heads d].

    Raises:
        ValueError: shapes do not fit, or the backend that was named cannot take these.
    """
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be [B, H, W, 3, heads, d], got {list(qkv.shape)}")
    if rel_pos is not None:
        shapes, expected = [list(table.shape) for table in rel_pos], [[2 * side - 1, qkv.shape[5]] for side in window]
        if shapes != expected:
            raise ValueError(f"relative positions {shapes} do not fit windows of {window}, which need {expected}")
    scale = qkv.shape[5] ** -0.5 if scale is None else scale
    arguments = qkv, qkv_bias, *(rel_pos or (None, None)), *window, scale, backend
    if torch.compiler.is_compiling():
        return torch.ops.sam_fast.rel_pos_attention(*arguments)
    return _rel_pos_attention(*arguments)


def native_takes_heads_of(width: int) -> bool:
    """Whether the native backend takes heads as wide as that."""
    return width % 8 == 0 and width <= _NATIVE_WIDTH


def rel_pos_attention_reference(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    rel_pos: tuple[Tensor, Tensor] | None,
    window: tuple[int, int],
    scale: float | None = None,
) -> Tensor:
    """`rel_pos_attention` in PyTorch, windows and biases materialised."""
    B, H, W, _, heads, d = qkv.shape
    h, w = window
    rows, columns = -(-H // h), -(-W // w)
    padding = qkv.new_zeros(3 * heads * d) if qkv_bias is None else qkv_bias
    padded = padding.view(3, heads, d).expand(B, rows * h, columns * w, 3, heads, d).clone()
    padded[:, :H, :W] = qkv
    tiles = padded.view(B, rows, h, columns, w, 3, heads, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = tiles.flatten(5, 6).flatten(1, 3)  # each [windows, heads, h w, d]
    bias = None
    if rel_pos is not None:
        spread = q.unflatten(2, (h, w))
        places = [torch.arange(side, device=qkv.device) for side in window]
        offsets = [place[:, None] - place + len(place) - 1 for place in places]
        bias_h = torch.einsum("bnhwd,hkd->bnhwk", spread, rel_pos[0][offsets[0]])
        bias_w = torch.einsum("bnhwd,wkd->bnhwk", spread, rel_pos[1][offsets[1]])
        bias = (bias_h[..., :, None] + bias_w[..., None, :]).reshape(*q.shape[:2], h * w, h * w)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    x = x.view(B, rows, columns, heads, h, w, d).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(B, rows * h, columns * w, heads * d)[:, :H, :W]


def _rel_pos_attention(
    qkv: Tensor,
    bias: Tensor | None,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    rows: int,
    columns: int,
    scale: float,
    backend: str,
) -> Tensor:
    tensors = [x for x in (qkv, bias, rel_h, rel_w) if x is not None]
    chosen = choose_backend("rel_pos_attention", backend, *tensors, takes=_takes(qkv, bias, tensors, (rows, columns)))
    rel_pos = None if rel_h is None or rel_w is None else (rel_h.contiguous(), rel_w.contiguous())
    if chosen == "torch":
        return rel_pos_attention_reference(qkv, bias, rel_pos, (rows, columns), scale).contiguous()
    output, qkv = _rel_pos_attention_fake(qkv), qkv.contiguous()
    if chosen == "triton":
        from sam_fast.kernels import rel_pos_attention as kernels

        with torch.cuda.device_of(qkv):
            kernels.rel_pos_attention(output, qkv, rel_pos, (rows, columns), scale)
        return output
    bias = None if bias is None else bias.contiguous()
    native.module().rel_pos_attention(
        output, qkv, bias, *(rel_pos or (None, None)), rows, columns, scale, native.num_threads()
    )
    return output


def _takes(qkv: Tensor, bias: Tensor | None, tensors: list[Tensor], window: tuple[int, int]) -> dict[str, str | None]:
    """Backend -> what it takes that these arguments are not; see `choose_backend`."""
    _, H, W, _, heads, d = qkv.shape
    first = 1 << (d.bit_length() - 1)
    rest = d - first
    one_type, native, triton = all(x.dtype == qkv.dtype for x in tensors), None, None
    if not one_type or qkv.dtype not in _NATIVE_TYPES or not native_takes_heads_of(d):
        native = f"one type, float32 or bfloat16, and heads as wide as a multiple of 8, up to {_NATIVE_WIDTH}"
    if not one_type or qkv.dtype not in _TRITON_TYPES or first < 16 or rest & (rest - 1) or 0 < rest < 16:
        triton = "one type, of half precision or float32, and heads as wide as 16, 32, 48, 64, 80, 96, 128, ..."
    elif H * W * 3 * heads * d >= 2**31:  # offsets within an image have 32 bits
        triton = "images of fewer numbers than 2**31"
    elif bias is not None and (H % window[0] or W % window[1]):
        triton = "no qkv_bias where there is padding"
    return {"native": native, "triton": triton}


def _rel_pos_attention_fake(qkv: Tensor, *rest: Any) -> Tensor:
    B, H, W, _, heads, d = qkv.shape
    return qkv.new_empty(B, H, W, heads * d)


register(
    "rel_pos_attention(Tensor qkv, Tensor? qkv_bias, Tensor? rel_h, Tensor? rel_w, SymInt rows, SymInt columns, "
    "float scale, str backend) -> Tensor",
    _rel_pos_attention,
    _rel_pos_attention_fake,
)
