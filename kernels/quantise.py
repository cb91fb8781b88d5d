"""Rows of numbers to 8 bits (e4m3) with a scale per row, through a GELU on the way if so wanted.

One program per row, which is read once: the perceptron's hidden layer goes from one product to the next in one pass.
The scale makes the largest number of a row the largest of the format. Of half precision GELU is the one by tanh, whose
error is far below a rounding to 8 bits; with the one by erf arithmetic would take longer than memory. Of float32 it is
the one by erf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from sam_fast.kernels.gelu import gelu_of_double
from sam_fast.kernels.launch import Variant
from torch import Tensor

_LARGEST = tl.constexpr(448.0)  # of e4m3
_SMALLEST = tl.constexpr(1e-12)  # of a row's largest number, lest zeros be divided by zero


def quantise(output: Tensor, scales: Tensor, x: Tensor, *, gelu: bool) -> None:
    """Write rows of x [rows, C], contiguous, to `output`, float8_e4m3fn, and their scales [rows, 1], float32."""
    rows, C = x.shape
    if rows and C:
        quantise_kernel[(rows,)](output, scales, x, GELU=gelu, **_constants(C), **_options(C))


@triton.jit
def quantise_kernel(
    output,  # [rows, C]
    scales,  # [rows]
    x,  # [rows, C]
    GELU: tl.constexpr,
    C: tl.constexpr,
    C0: tl.constexpr,  # the largest power of two in C
    C1: tl.constexpr,  # what is left, as a power of two; or 0
):
    row = tl.program_id(0).to(tl.int64)
    x += row * C
    output += row * C
    c0 = tl.arange(0, C0)
    y0 = tl.load(x + c0).to(tl.float32)
    if C1 > 0:
        c1 = C0 + tl.arange(0, C1)
        exists = None if C0 + C1 == C else c1 < C
        y1 = tl.load(x + c1, mask=exists).to(tl.float32)
        if C0 + C1 > C:
            y1 = tl.where(exists, y1, 0.0)
    if GELU:
        y0 = gelu_of_double(0.5 * y0, x.dtype.element_ty == tl.float32)
        if C1 > 0:
            y1 = gelu_of_double(0.5 * y1, x.dtype.element_ty == tl.float32)
    largest = tl.max(tl.abs(y0), 0)
    if C1 > 0:
        largest = tl.maximum(largest, tl.max(tl.abs(y1), 0))
    factor = _store_scale(scales, row, largest)
    tl.store(output + c0, (y0 * factor).to(output.dtype.element_ty))
    if C1 > 0:
        tl.store(output + c1, (y1 * factor).to(output.dtype.element_ty), mask=exists)


@triton.jit
def _store_scale(scales, row, largest):
    """Store a row's scale, and return by what to multiply the row."""
    scale = tl.maximum(largest, _SMALLEST) / _LARGEST
    tl.store(scales + row, scale)
    return 1.0 / scale


@triton.jit
def store_row(output, scales, row, c, exists, y, C: tl.constexpr):
    """Store a row, divided by its scale if it gets one."""
    if scales is not None:
        # What comes out a rounding above the largest of the format is rounded to it.
        y *= _store_scale(scales, row, tl.max(tl.abs(y), 0))
    tl.store(output + row * C + c, y.to(output.dtype.element_ty), mask=exists)


def _constants(C: int) -> dict[str, Any]:
    first = 1 << (C.bit_length() - 1)
    return {"C": C, "C0": first, "C1": triton.next_power_of_2(C - first) if first < C else 0}


def _options(C: int) -> dict[str, int]:
    return {"num_warps": 4 if C <= 4096 else 8}


def row_constants(C: int) -> dict[str, Any]:
    """Constants of kernels that hold a row as one tile, LayerNorm's."""
    return {"C": C, "CHANNELS": triton.next_power_of_2(C)}


def row_options(C: int) -> dict[str, int]:
    return {"num_warps": 4 if C <= 2048 else 8}


def variants(architecture: int) -> Iterator[Variant]:
    """The hidden layers of ViT-B, L and H; the format is of sm_89 and later."""
    for C in (3072, 4096, 5120) if architecture >= 89 else ():
        signature = {"output": "*fp8e4nv:16", "scales": "*fp32:16", "x": "*bf16:16"}
        yield Variant(f"GELU of {C}", quantise_kernel, signature, {**_constants(C), "GELU": True}, _options(C))
