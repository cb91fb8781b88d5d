"""Rows of channels as training needs them: LayerNorm with its gradients, and sums of columns, a bias's gradient.

A decoder that is trained has a million rows of few channels (64 of an upscaled pixel, 4 of a mask prompt). PyTorch's
LayerNorm gives each of them a block of threads; here a program takes as many rows as make a tile of some thousand
numbers. Its sums over all rows leave most processors idle; here a fixed number of programs take tiles in turns, and
another launch adds up what they found. Statistics and sums are float32, and nothing depends on the order of programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from sam_fast.kernels.launch import TRITON_TYPES, Variant
from torch import Tensor

_TILE = 4096  # numbers
_GRADIENTS_TILE = 2048  # two sums of its size are kept in registers
_PROGRAMS = 512  # about as many as a Hopper GPU runs at once
_SUMS_COLUMNS = 256
_FEW = 1024  # rows that one launch adds up sooner than two
_FEW_COLUMNS = 16


def normalise(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Write LayerNorm(x) to `y`.

    Args:
        y, x: [rows, C], contiguous.
        weight, bias: [C].
    """
    rows, C = x.shape
    if rows:
        constants = _constants(C, _TILE)
        grid = (triton.cdiv(rows, constants["ROWS"]),)
        normalise_kernel[grid](y, x, weight, bias, rows, eps, **constants, num_warps=4)


def normalise_gradients(grad_x: Tensor, grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Write the gradient of `normalise` to `grad_x`; return float32 [2, C], those of weight and bias.

    Args:
        grad_x, grad_y, x: [rows, C], contiguous.
        weight: [C].
    """
    rows, C = x.shape
    constants = _constants(C, _GRADIENTS_TILE)
    programs = min(triton.cdiv(rows, constants["ROWS"]), _PROGRAMS)
    sums = x.new_empty(programs, 2 * C, dtype=torch.float32)
    if rows:
        gradients_kernel[(programs,)](grad_x, sums, grad_y, x, weight, rows, eps, **constants, num_warps=4)
    return _sums_of_few(sums).view(2, C)


def column_sums(x: Tensor) -> Tensor:
    """The sum of the rows of x [rows, C], contiguous, as float32 [C]."""
    rows, C = x.shape
    if rows <= _FEW:
        return _sums_of_few(x)
    constants = _columns(C)
    programs = min(triton.cdiv(rows, constants["ROWS"]), _PROGRAMS)
    sums = x.new_empty(programs, C, dtype=torch.float32)
    if C:
        grid = (programs, triton.cdiv(C, constants["CHANNELS"]))
        sums_kernel[grid](sums, x, rows, **constants, num_warps=4)
    return _sums_of_few(sums)


def _sums_of_few(x: Tensor) -> Tensor:
    """`column_sums` where a program can take all rows of its columns."""
    rows, C = x.shape
    total = x.new_empty(C, dtype=torch.float32)
    if C:
        constants = _columns(C, _FEW_COLUMNS)
        grid = (1, triton.cdiv(C, constants["CHANNELS"]))
        sums_kernel[grid](total, x, rows, **constants, num_warps=4)
    return total


def _constants(C: int, tile: int) -> dict[str, Any]:
    channels = triton.next_power_of_2(C)
    return {"C": C, "CHANNELS": channels, "ROWS": max(1, tile // channels)}


def _columns(C: int, most: int = _SUMS_COLUMNS) -> dict[str, Any]:
    channels = min(triton.next_power_of_2(C), most)
    return {"C": C, "CHANNELS": channels, "ROWS": _TILE // channels}


@triton.jit
def _statistics(x, row, rows, c, eps, C: tl.constexpr):
    """Offsets of a tile, which of its numbers exist, the rows normalised, and by what each was multiplied."""
    exists = (row < rows)[:, None] & (c < C)[None]
    at = row.to(tl.int64)[:, None] * C + c[None]
    values = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    centred = tl.where(exists, values - (tl.sum(values, 1) / C)[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return at, exists, centred * factor[:, None], factor


@triton.jit
def normalise_kernel(
    y,  # [rows, C]
    x,  # [rows, C]
    weight,  # [C]
    bias,  # [C]
    rows,
    eps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,  # C as a power of two
    ROWS: tl.constexpr,
):
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    at, exists, normalised, _ = _statistics(x, row, rows, c, eps, C)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(y + at, normalised * w[None] + b[None], mask=exists)


@triton.jit
def gradients_kernel(
    grad_x,  # [rows, C]
    sums,  # [programs, 2, C]
    grad_y,  # [rows, C]
    x,  # [rows, C]
    weight,  # [C]
    rows,
    eps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program, c = tl.program_id(0), tl.arange(0, CHANNELS)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None]
    grad_weight = tl.zeros([ROWS, CHANNELS], tl.float32)
    grad_bias = tl.zeros([ROWS, CHANNELS], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        at, exists, normalised, factor = _statistics(x, row, rows, c, eps, C)
        g = tl.load(grad_y + at, mask=exists, other=0.0).to(tl.float32)
        grad_weight += g * normalised
        grad_bias += g
        g *= w
        mean = tl.sum(g, 1) / C
        along = tl.sum(g * normalised, 1) / C
        tl.store(grad_x + at, factor[:, None] * (g - mean[:, None] - normalised * along[:, None]), mask=exists)
    at = sums + program.to(tl.int64) * 2 * C + c
    tl.store(at, tl.sum(grad_weight, 0), mask=c < C)
    tl.store(at + C, tl.sum(grad_bias, 0), mask=c < C)


@triton.jit
def sums_kernel(
    sums,  # [programs, C]
    x,  # [rows, C]
    rows,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program, c = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        exists = (row < rows)[:, None] & (c < C)[None]
        total += tl.load(x + row[:, None] * C + c[None], mask=exists, other=0.0).to(tl.float32)
    tl.store(sums + program.to(tl.int64) * C + c, tl.sum(total, 0), mask=c < C)


def variants(architecture: int) -> Iterator[Variant]:
    """What training of nano and of ViT-B in bfloat16 asks for, and the widest rows."""
    for C in (4, 16, 32, 64, 128, 256, 768, 1280):
        for wide in (False, True):  # rows of the encoder are float32, what leaves them is not
            kind = TRITON_TYPES[torch.float32 if wide else torch.bfloat16]
            name, rest = f"{C} channels {kind}", {"rows": "i32", "eps": "fp32"}
            signature = {"y": "*bf16:16", "x": f"*{kind}:16", "weight": f"*{kind}:16", "bias": f"*{kind}:16"} | rest
            yield Variant(name, normalise_kernel, signature, _constants(C, _TILE), {"num_warps": 4})
            signature = {"grad_x": f"*{kind}:16", "sums": "*fp32:16", "grad_y": "*bf16:16", "x": f"*{kind}:16"}
            signature |= {"weight": f"*{kind}:16"} | rest
            constants = _constants(C, _GRADIENTS_TILE)
            yield Variant(f"{name}, gradients", gradients_kernel, signature, constants, {"num_warps": 4})
    for C in (32, 256, 3072):
        signature = {"sums": "*fp32:16", "x": "*bf16:16", "rows": "i32"}
        yield Variant(f"sums of {C} columns", sums_kernel, signature, _columns(C), {"num_warps": 4})
        few = _columns(C, _FEW_COLUMNS)
        for kind in ("bf16", "fp32"):
            signature = {"sums": "*fp32:16", "x": f"*{kind}:16", "rows": "i32"}
            yield Variant(f"sums of {C} columns of few rows {kind}", sums_kernel, signature, few, {"num_warps": 4})
