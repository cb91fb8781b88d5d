"""LayerNorm of rows with what surrounds it in a transformer block: constants and a residual before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register
from sam_fast.ops.quantise import quantise_reference


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    shift: Tensor | None = None,
    delta: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """LayerNorm(x + delta + shift) over C channels, in float32 inside.

    Args:
        x: [rows, C], float32 or half precision.
        weight, bias: [C], float32.
        shift: [C], float32, the same for all rows.
        delta: [rows, C], float32 or half precision.
        dtype: of the normalised rows, x's by default.
        backend: "triton", "torch" or "auto".

    Returns:
        the normalised rows, and x + delta rounded to x's type (x itself without `delta`).

    Raises:
        ValueError: shapes do not fit.
    """
    _check(x, weight, bias, shift, delta)
    y, _, total = _run(x, weight, bias, eps, shift, delta, dtype or x.dtype, backend)
    return y, x if delta is None else total


def layer_norm_e4m3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    shift: Tensor | None = None,
    delta: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm` whose result is rounded to 8 bits, as `ops.quantise.quantise` does.

    Returns:
        float8_e4m3fn [rows, C], by what to multiply it [rows, 1], and x + delta.
    """
    _check(x, weight, bias, shift, delta)
    y, scales, total = _run(x, weight, bias, eps, shift, delta, torch.float8_e4m3fn, backend)
    return y, scales, x if delta is None else total


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None, delta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`layer_norm` in PyTorch, the normalised rows in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x if delta is None else (x.to(wide) + delta.to(wide)).to(x.dtype)
    shifted = total.to(wide) if shift is None else total.to(wide) + shift
    return F.layer_norm(shifted, weight.shape, weight.to(wide), bias.to(wide), eps), total


def _check(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, delta: Tensor | None) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [rows, C], got {list(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias), ("shift", shift)):
        if vector is not None and (vector.shape != x.shape[1:] or vector.dtype != torch.float32):
            raise ValueError(f"{name} must be [{x.shape[1]}] float32, got {list(vector.shape)} {vector.dtype}")
    if delta is not None and delta.shape != x.shape:
        raise ValueError(f"delta must be like x, {list(x.shape)}, got {list(delta.shape)}")


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    run = torch.ops.sam_fast.layer_norm if torch.compiler.is_compiling() else _layer_norm
    return run(*arguments)


def _layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None,
    delta: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator: scales are empty without 8 bits, the sum without a delta."""
    tensors = [t for t in (x, weight, bias, shift, delta) if t is not None]
    y, scales, total = _layer_norm_fake(x, delta, dtype, backend)
    to_e4m3 = dtype == torch.float8_e4m3fn
    if choose_backend("layer_norm", backend, *tensors) == "torch":
        normalised, summed = layer_norm_reference(x, weight, bias, eps, shift, delta)
        total = total if delta is None else summed
        return (*quantise_reference(normalised), total) if to_e4m3 else (normalised.to(dtype), scales, total)
    from sam_fast.kernels import layer_norm as kernels

    with torch.cuda.device_of(x):
        kernels.layer_norm(
            y,
            x.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            eps,
            None if shift is None else shift.contiguous(),
            None if delta is None else delta.contiguous(),
            None if delta is None else total,
            scales if to_e4m3 else None,
        )
    return y, scales, total


def _layer_norm_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    delta, dtype = rest[-3:-1]
    rows, C = x.shape
    y = x.new_empty(rows, C, dtype=dtype)
    scales = x.new_empty(rows if dtype == torch.float8_e4m3fn else 0, 1, dtype=torch.float32)
    return y, scales, x.new_empty(0 if delta is None else rows, C)


register(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? shift, Tensor? delta, ScalarType dtype, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _layer_norm,
    _layer_norm_fake,
)
