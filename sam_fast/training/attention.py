"""Attention of training on CPUs, written for its gradients: `FastAttention`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sam_fast.training.watched import is_watched

_FORMATS = (torch.float32, torch.bfloat16)
_FEW = 32  # keys or queries that are tokens
_MANY = 64  # queries or keys that are pixels
_LONG = 256  # queries and keys whose scores are many enough to be made head by head


class FastAttention(TorchFunctionMode):
    """Within it, attention on CPUs is quick to differentiate, once; results are PyTorch's, up to rounding.

    PyTorch has no gradient of its own for a mask, so it materialises scores in float32, checks and copies them; and its
    gradients in half precision between a few tokens and many pixels take three times as long as those in float32. Here
    few tokens are computed in float32, which keeps some megabytes more per call for the gradient.

    It is PyTorch's without gradients, and where modules are compiled, traced, checkpointed or in `torch.func`.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        captured = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if func is F.scaled_dot_product_attention and not captured:
            result = _attention(*args, **(kwargs or {}))
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *others: Any,
    scale: float | None = None,
    **named: Any,
) -> Tensor | None:
    """`F.scaled_dot_product_attention` with its names of arguments; None where that is PyTorch's to compute."""
    given = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    way = None if others or named or not _fits(*given) else _way(query, key, attn_mask)
    if way is None:
        return None
    with torch.autocast("cpu", enabled=False):
        return way(*given, query.shape[-1] ** -0.5 if scale is None else scale)


def _way(query: Tensor, key: Tensor, bias: Tensor | None) -> Callable[..., Tensor] | None:
    """The function that attends with these lengths; None leaves it to PyTorch."""
    queries, keys = query.shape[-2], key.shape[-2]
    if bias is not None:
        if not bias.requires_grad or not bias.detach().amin().isfinite():  # rows that are masked throughout are zero
            return None
        return _Biased.apply if min(queries, keys) >= _LONG else _biased
    if keys <= _FEW and queries >= _MANY:
        return _write
    if queries <= _FEW and keys >= _MANY and query.dtype != torch.float32:
        return _read
    return None


def _fits(*given: Tensor) -> bool:
    """Whether these are q, k, v [N, heads, T, d] and maybe a bias [N, heads, Tq, Tk], for autograd and no other."""
    query, key, value = given[:3]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return (
        torch.is_grad_enabled()
        and not any(x.is_nested for x in given)
        and any(x.requires_grad for x in given)
        and all(x.dim() == 4 and x.dtype == dtype and x.device.type == "cpu" for x in given)
        and dtype in _FORMATS
        and query.shape[:2] == key.shape[:2]
        and query.shape[3] == key.shape[3]
        and key.shape == value.shape
        and all(x.shape == (*query.shape[:3], key.shape[2]) for x in given[3:])
        and query.numel() > 0 < key.numel()
        and not is_watched(*given)
    )


def _write(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Many queries read few keys: scores [keys, queries], whose softmax goes along vectors of queries."""
    scores = k.float() @ (scale * q.float()).transpose(-1, -2)
    result = scores.softmax(-2).transpose(-1, -2) @ v.float()
    # As PyTorch's lies: the heads of a query together.
    return result.transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format).contiguous().transpose(1, 2)


def _read(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Few queries read many keys."""
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale).to(q.dtype)


def _biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Short attention with a bias, all heads at once."""
    scores = (scale * q.float()) @ k.float().transpose(-1, -2) + bias
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


class _Biased(torch.autograd.Function):
    """Long attention with a bias that has a gradient, head by head, so that scores stay in the cache.

    Scores and their softmax are in float32; what is kept for the gradient is in the format of the inputs.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        output = torch.empty_like(q, memory_format=torch.contiguous_format)
        weights = torch.empty_like(bias, memory_format=torch.contiguous_format)
        for out, weight, query, key, value, add in _heads(output, weights, q, k, v, bias):
            scores = torch.addmm(add.float(), query.float(), key.float().t(), alpha=scale)
            weight.copy_(scores.softmax(-1))
            torch.mm(weight, value, out=out)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            grads = _biased_gradients(grad, q, k, v, weights, ctx.scale, any(ctx.needs_input_grad[:3]))
        return (*grads, None)


def _biased_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float, projected: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of q, k, v [N, heads, T, d], which come from one projection or need none, and of the bias."""
    grad_q, grad_k, grad_v, grad_bias = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, weights)
    )
    # A vector that all values share changes no gradient of scores but would be rounded with them.
    centred = (v.float() - v.float().mean(-2, keepdim=True)).to(v.dtype)
    for to_q, to_k, to_v, to_bias, query, key, value, weight, given in _heads(
        grad_q, grad_k, grad_v, grad_bias, q, k, centred, weights, grad
    ):
        grad_weight = given @ value.t()
        torch._softmax_backward_data(grad_weight, weight, -1, grad_weight.dtype, grad_input=to_bias)
        if projected:
            torch.mm(weight.t(), given, out=to_v)
            torch.mm(to_bias, key, out=to_q)
            torch.mm(to_bias.t(), query, out=to_k)
    if not projected:
        return None, None, None, grad_bias
    return grad_q.mul_(scale), grad_k.mul_(scale), grad_v, grad_bias


def _heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matrices of all tensors [N, heads, ...] together, however they lie."""
    return zip(*((matrix for batch in x for matrix in batch) for x in tensors), strict=True)
