"""Rows of numbers to 8 bits (e4m3) with a scale per row, through a GELU on the way if so wanted.

One program per row, which is read once: the perceptron's hidden layer goes from one product to the next in one pass.
The scale makes the largest number of a row the largest of the format.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from sam_fast.kernels.launch import Variant
from torch import Tensor

_LARGEST = tl.constexpr(448.0)  # of e4m3
_SMALLEST = tl.constexpr(1e-12)  # of a row's largest number, lest zeros be divided by zero


def quantise(output: Tensor, scales: Tensor, x: Tensor, *, gelu: bool) -> None:
    """Write rows of x [rows, C], contiguous, to `output`, float8_e4m3fn, and their scales [rows, 1], float32."""
    rows, C = x.shape
    if rows and C:
        quantise_kernel[(rows,)](output, scales, x, GELU=gelu, **row_constants(C), **row_options(C))


@triton.jit
def quantise_kernel(
    output,  # [rows, C]
    scales,  # [rows]
    x,  # [rows, C]
    GELU: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,  # C as a power of two
):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, CHANNELS)
    exists = c < C
    y = tl.load(x + row * C + c, mask=exists, other=0.0).to(tl.float32)
    if GELU:
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    store_row(output, scales, row, c, exists, y, C)


@triton.jit
def store_row(output, scales, row, c, exists, y, C: tl.constexpr):
    """Store a row, divided by its scale if it gets one."""
    if scales is not None:
        scale = tl.maximum(tl.max(tl.abs(y), 0), _SMALLEST) / _LARGEST
        tl.store(scales + row, scale)
        # The quotient may round beyond it.
        y = tl.clamp(y / scale, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(output + row * C + c, y.to(output.dtype.element_ty), mask=exists)


def row_constants(C: int) -> dict[str, Any]:
    return {"C": C, "CHANNELS": triton.next_power_of_2(C)}


def row_options(C: int) -> dict[str, int]:
    return {"num_warps": 4 if C <= 2048 else 8}


def variants(architecture: int) -> Iterator[Variant]:
    """The hidden layers of ViT-B, L and H; the format is of sm_89 and later."""
    for C in (3072, 4096, 5120) if architecture >= 89 else ():
        signature = {"output": "*fp8e4nv:16", "scales": "*fp32:16", "x": "*bf16:16"}
        yield Variant(f"GELU of {C}", quantise_kernel, signature, {**row_constants(C), "GELU": True}, row_options(C))
