"""Rows of numbers to 8 bits with a scale per row, for products of 8-bit numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register

LARGEST_E4M3 = 448.0
_SMALLEST = 1e-12  # of a row's largest number, lest zeros be divided by zero


def quantise(x: Tensor, *, gelu: bool = False, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Round rows to e4m3, each divided by a scale that makes its largest number the largest of the format.

    Args:
        x: [rows, C], float32 or half precision.
        gelu: apply x (1 + erf(x / sqrt 2)) / 2 first; kernels for half precision take its form with tanh.
        backend: "triton", "torch" or "auto".

    Returns:
        float8_e4m3fn [rows, C], and by what to multiply it, float32 [rows, 1].

    Raises:
        ValueError: x has another shape.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [rows, C], got {list(x.shape)}")
    if torch.compiler.is_compiling():
        return torch.ops.sam_fast.quantise(x, gelu, backend)
    return _quantise(x, gelu, backend)


def quantise_reference(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """`quantise` in PyTorch."""
    x = F.gelu(x.float()) if gelu else x.float()
    scales = x.abs().amax(1, keepdim=True).clamp(min=_SMALLEST) / LARGEST_E4M3
    return (x / scales).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn), scales


def _quantise(x: Tensor, gelu: bool, backend: str) -> tuple[Tensor, Tensor]:
    if choose_backend("quantise", backend, x) == "torch":
        return quantise_reference(x, gelu)
    from sam_fast.kernels import quantise as kernels

    y, scales = _quantise_fake(x, gelu, backend)
    with torch.cuda.device_of(x):
        kernels.quantise(y, scales, x.contiguous(), gelu=gelu)
    return y, scales


def _quantise_fake(x: Tensor, gelu: bool, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(len(x), 1, dtype=torch.float32)


register("quantise(Tensor x, bool gelu, str backend) -> (Tensor, Tensor)", _quantise, _quantise_fake)
