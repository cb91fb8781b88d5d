"""Self-attention of few tokens, such as a prompt's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register

_TRITON_TOKENS = 16
_TRITON_CHANNELS = (16, 32, 64)
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def token_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head.

    Args:
        q, k, v: [N, T, heads d], of one type; they may lie side by side in one tensor.
        heads: how many there are; head i has channels i d to (i + 1) d.
        backend: "triton", "torch" or "auto". Triton takes up to 16 tokens, and heads of 16, 32 or 64 channels; what it
            does not take, auto leaves to PyTorch.

    Returns:
        [N, T, heads d], contiguous.

    Raises:
        ValueError: shapes do not fit, or the backend that was asked for cannot take these.
    """
    if q.dim() != 3 or q.shape != k.shape or q.shape != v.shape or heads < 1 or q.shape[2] % heads:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must be [N, T, {heads} d], got {shapes}")
    run = torch.ops.sam_fast.token_attention if torch.compiler.is_compiling() else _token_attention
    return run(q, k, v, heads, backend)


def token_attention_reference(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`token_attention` in PyTorch."""
    by_head = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2)


def _token_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, backend: str) -> Tensor:
    fits = q.shape[1] <= _TRITON_TOKENS and q.shape[2] // heads in _TRITON_CHANNELS
    fits = fits and q.dtype == k.dtype == v.dtype and q.dtype in _TRITON_TYPES
    got = f"got {q.shape[1]} tokens, {q.shape[2] // heads} channels and {q.dtype}"
    triton = f"{_TRITON_TOKENS} tokens, heads of {_TRITON_CHANNELS} channels, and one of {_TRITON_TYPES}, {got}"
    takes = {"triton": None if fits else triton}
    if choose_backend("token_attention", backend, q, k, v, takes=takes) == "torch":
        return token_attention_reference(q, k, v, heads).contiguous()
    from sam_fast.kernels import token_attention as kernels  # here, that importing sam_fast does not import triton

    output = q.new_empty(q.shape)
    with torch.cuda.device_of(q):
        kernels.token_attention(output, *(x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v)), heads)
    return output


def _token_attention_fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


register(
    "token_attention(Tensor q, Tensor k, Tensor v, int heads, str backend) -> Tensor",
    _token_attention,
    _token_attention_fake,
)
