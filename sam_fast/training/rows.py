"""Layers of training by kernels made for their gradients, on GPUs: `FastRows`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sam_fast.modeling.positions import grid_attention
from sam_fast.ops.backend import triton_unavailable_reason
from sam_fast.training.watched import is_watched

_FEWEST = 32  # rows that are worth a kernel; a guess
_MANY = 64  # pixels: a tile of PyTorch's attention
_WIDEST = 8192  # channels of a row that a program holds
_HALVES = (torch.bfloat16, torch.float16)
_LONG = 256  # keys whose biases take longer than wider heads; a guess
_WIDEST_HEAD = 256  # channels of PyTorch's attention
_FORMATS = (torch.float32, *_HALVES)


class FastRows(TorchFunctionMode):
    """Within it, layers run by kernels that are quick to differentiate; results are PyTorch's, up to rounding.

    Of `F.layer_norm` and `F.linear` those of `kernels/training_rows.py`; of `F.scaled_dot_product_attention` between
    few tokens and many pixels, in half precision, those of `kernels/few_tokens_attention.py`. Where `attend_on_grid` is
    long, in bfloat16, its biases become channels.

    What LayerNorm returns under autocast is in autocast's format, to which most of what reads it would round it anyway.

    Where modules are compiled, transformed (`torch.func`) or checkpointed, whose activations are computed again outside
    of this mode, layers are PyTorch's.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        if func is F.layer_norm:
            return _layer_norm(*args, **(kwargs or {}))
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and len(args) == 3 and not kwargs:
            return _attention(*args)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> FastRows:
        self._before = grid_attention.set(_attend_on_grid)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        grid_attention.reset(self._before)
        super().__exit__(*error)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    if (
        weight is None
        or bias is None
        or not x.shape[-1:] == tuple(shape) == weight.shape == bias.shape
        or not 0 < shape[0] <= _WIDEST
        or not _are_plain(x, weight, bias)
    ):
        return F.layer_norm(x, shape, weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps, _autocast_format(x) or x.dtype)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with its names of arguments."""
    x, fits = input, input.dim() > 1 and weight.dim() == 2 and input.shape[:-1].numel() >= _FEWEST
    if bias is None or not fits or not _are_plain(x, weight, bias):
        return F.linear(x, weight, bias)
    half = _autocast_format(x)
    if half is not None:
        x, weight = x.to(half), weight.to(half)
    return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [N, heads, Tq, d] to k, v [N, heads, Tk, d]."""
    from sam_fast.kernels.few_tokens_attention import CHANNELS, MOST_TOKENS

    alike = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    few, many = sorted((q.shape[-2], k.shape[-2]))
    fits = alike and 0 < few <= MOST_TOKENS and many >= _MANY and q.shape[3] in CHANNELS
    if not (fits and q.dtype in _HALVES and q.dtype == k.dtype == v.dtype and _are_plain(q, k, v)):
        return F.scaled_dot_product_attention(q, k, v)
    function = _Read if q.shape[2] == few else _Write
    return function.apply(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _attend_on_grid(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor, scale: float) -> Tensor | None:
    """`attend_on_grid` of `modeling/positions.py` without biases for each query and key; None where these are few.

    scale [q, by_row / scale, by_column / scale] . [k, row of k, column of k], both as vectors of zeros and a one, is
    the product of q and k with the biases. Attention that takes no bias is the one that is quick to differentiate.
    """
    (H, W), d = by_row.shape[2:4], q.shape[-1]
    width = -(-(d + H + W) // 8) * 8
    biased = q, k, v, by_row, by_column
    fits = H * W >= _LONG and width <= _WIDEST_HEAD and all(x.dtype == torch.bfloat16 for x in biased)
    if not (fits and _are_plain(*biased)):
        return None
    rows = torch.eye(H, dtype=k.dtype, device=k.device)[:, None].expand(H, W, H)
    columns = torch.eye(W, dtype=k.dtype, device=k.device).expand(H, W, W)
    places = torch.cat([rows, columns], 2).flatten(0, 1).expand(*k.shape[:3], H + W)
    by_place = torch.cat([by_row, by_column], 4).flatten(2, 3) / scale
    rest = width - d - H - W
    wide = F.scaled_dot_product_attention(
        F.pad(torch.cat([q, by_place], 3), (0, rest)),
        F.pad(torch.cat([k, places], 3), (0, rest)),
        F.pad(v, (0, width - d)),
        scale=scale,
    )
    return wide[..., :d]


def _are_plain(*tensors: Tensor) -> bool:
    """Whether the kernels may take these: of their formats and devices, with no ways of their own to compute."""
    device = tensors[0].device
    return (
        triton_unavailable_reason(device.type) is None
        and all(x.dtype in _FORMATS and x.device == device for x in tensors)
        and not is_watched(*tensors)
    )


def _autocast_format(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        from sam_fast.kernels.training_rows import normalise

        rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
        y = torch.empty(x.shape, dtype=dtype, device=x.device)  # a view of rows could not be changed in place
        with torch.cuda.device_of(x):
            normalise(y.view(rows.shape), rows, weight, bias.contiguous(), eps)
        ctx.save_for_backward(rows, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        from sam_fast.kernels.training_rows import normalise_gradients

        rows, weight = ctx.saved_tensors
        grad_x = torch.empty_like(rows)
        found = normalise_gradients(grad_x, grad_y.reshape(rows.shape).contiguous(), rows, weight, ctx.eps)
        grad_weight, grad_bias = found.to(weight.dtype)
        return grad_x.view(grad_y.shape), grad_weight, grad_bias, None, None


class _Linear(torch.autograd.Function):
    """Of x [rows, C], as no view of what `F.linear` makes of more dimensions could be changed in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        ctx.dtype = bias.dtype
        return F.linear(x, weight, bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        from sam_fast.kernels.training_rows import column_sums

        x, weight = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad_y.t() @ x if ctx.needs_input_grad[1] else None
        grad_bias = column_sums(grad_y).to(ctx.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


class _Read(torch.autograd.Function):
    """Attention of q [N, T, heads, d] to k, v [N, P, heads, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from sam_fast.kernels.few_tokens_attention import MOST_TOKENS, read

        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        output = torch.empty_like(q)
        sums = q.new_empty(q.shape[0], q.shape[2], MOST_TOKENS, dtype=torch.float32)
        with torch.cuda.device_of(q):
            read(output, sums, q, k, v)
        ctx.save_for_backward(output, sums, q, k, v)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        from sam_fast.kernels.few_tokens_attention import read_gradients

        output, sums, q, k, v = ctx.saved_tensors
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        read_gradients(grads, grad_output.contiguous(), output, sums, q, k, v)
        return grads


class _Write(torch.autograd.Function):
    """Attention of q [N, P, heads, d] to k, v [N, T, heads, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from sam_fast.kernels.few_tokens_attention import write

        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        output = torch.empty_like(q)
        with torch.cuda.device_of(q):
            write(output, q, k, v)
        ctx.save_for_backward(q, k, v)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        from sam_fast.kernels.few_tokens_attention import write_gradients

        q, k, v = ctx.saved_tensors
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        write_gradients(grads, grad_output.contiguous(), q, k, v)
        return grads
