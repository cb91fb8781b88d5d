"""Attention between at most 16 tokens and the pixels of an image, either way, with its gradients: for training.

Tiles of attention for long sequences hold 64 or 128 queries and keys; where one side has 7 of them, most of a tile is
padding. Here a program takes one head of one prompt: the tokens stay in registers, pixels pass by. Products take what
PyTorch's take, softmax and sums are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from sam_fast.kernels.launch import TRITON_TYPES, WIDENED, Variant
from torch import Tensor

MOST_TOKENS = 16
CHANNELS = (16, 32, 64)  # of a head


def read(output: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Tokens read pixels: write softmax(q k / sqrt(d)) v to `output`.

    Args:
        output, q: [N, T, heads, d], contiguous.
        sums: float32 [N, heads, 16], where logarithms of the softmax's sums are written.
        k, v: [N, P, heads, d], contiguous.
    """
    arguments = output, sums, q, k, v, q.shape[1], k.shape[1], _scale(q)
    read_kernel[_grid(q)](*arguments, **_arguments(q, read_launch()))


def read_gradients(
    grads: tuple[Tensor, Tensor, Tensor], grad_output: Tensor, output: Tensor, sums: Tensor, *qkv: Tensor
) -> None:
    """Write the gradients of `read` with respect to q, k and v to `grads`, shaped as these are."""
    q, k, _ = qkv
    arguments = *grads, grad_output, output, sums, *qkv, q.shape[1], k.shape[1], _scale(q)
    read_gradients_kernel[_grid(q)](*arguments, **_arguments(q, read_launch()))


def write(output: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Pixels take from tokens: write softmax(q k / sqrt(d)) v to `output`.

    Args:
        output, q: [N, P, heads, d], contiguous.
        k, v: [N, T, heads, d], contiguous.
    """
    arguments = output, q, k, v, k.shape[1], q.shape[1], _scale(q)
    write_kernel[_grid(q)](*arguments, **_arguments(q, write_launch()))


def write_gradients(grads: tuple[Tensor, Tensor, Tensor], grad_output: Tensor, *qkv: Tensor) -> None:
    """Write the gradients of `write` with respect to q, k and v to `grads`, shaped as these are."""
    q, k, _ = qkv
    arguments = *grads, grad_output, *qkv, k.shape[1], q.shape[1], _scale(q)
    write_gradients_kernel[_grid(q)](*arguments, **_arguments(q, write_launch()))


def _grid(q: Tensor) -> tuple[int]:
    return (q.shape[0] * q.shape[2],)


def _scale(q: Tensor) -> float:
    return q.shape[3] ** -0.5


class Launch(NamedTuple):
    """How a kernel is launched: the pixels of a tile, and the warps that share it."""

    pixels: int
    warps: int


def read_launch() -> Launch:
    return Launch(64, 2)


def write_launch() -> Launch:
    return Launch(64, 2)


def _arguments(q: Tensor, launch: Launch) -> dict[str, Any]:
    return {**_constants(q.shape[2], q.shape[3], launch), "num_warps": launch.warps}


def _constants(heads: int, d: int, launch: Launch) -> dict[str, Any]:
    return {"HEADS": heads, "D": d, "TOKENS": MOST_TOKENS, "PIXELS": launch.pixels}


@triton.jit
def _load(x, at, exists):
    values = tl.load(x + at, mask=exists, other=0.0)
    return values.to(tl.float32) if WIDENED else values


@triton.jit
def _as(values, other):
    """In the type of another operand of a product."""
    return values.to(other.dtype)


@triton.jit
def _rows(row, count, HEADS: tl.constexpr, D: tl.constexpr):
    """Offsets of `row` of this program's head of its prompt, [rows, D], and which of them exist."""
    n, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    at = ((n.to(tl.int64) * count + row)[:, None] * HEADS + head) * D + tl.arange(0, D)[None]
    return at, (row < count)[:, None]


@triton.jit
def read_kernel(
    output,  # [N, T, heads, D]
    sums,  # [N, heads, TOKENS]
    q,  # [N, T, heads, D]
    k,  # [N, P, heads, D]
    v,  # [N, P, heads, D]
    T,
    P,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    t = tl.arange(0, TOKENS)
    at, exists = _rows(t, T, HEADS, D)
    queries = _load(q, at, exists)
    most = tl.full([TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    taken = tl.zeros([TOKENS, D], tl.float32)
    for first in range(0, P, PIXELS):
        p = first + tl.arange(0, PIXELS)
        pixel, inside = _rows(p, P, HEADS, D)
        keys, values = _load(k, pixel, inside), _load(v, pixel, inside)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * 1.4426950408889634)
        scores = tl.where((p < P)[None], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        factor = tl.exp2(most - higher)
        total = total * factor + tl.sum(weights, 1)
        taken = taken * factor[:, None] + tl.dot(_as(weights, values), values, input_precision="ieee")
        most = higher
    tl.store(output + at, taken / total[:, None], mask=exists)
    tl.store(sums + tl.program_id(0).to(tl.int64) * TOKENS + t, most + tl.log2(total))


@triton.jit
def read_gradients_kernel(
    grad_q,  # [N, T, heads, D]
    grad_k,  # [N, P, heads, D]
    grad_v,  # [N, P, heads, D]
    grad_output,  # [N, T, heads, D]
    output,  # [N, T, heads, D]
    sums,  # [N, heads, TOKENS]
    q,  # [N, T, heads, D]
    k,  # [N, P, heads, D]
    v,  # [N, P, heads, D]
    T,
    P,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    t = tl.arange(0, TOKENS)
    at, exists = _rows(t, T, HEADS, D)
    queries, grads = _load(q, at, exists), _load(grad_output, at, exists)
    logarithm = tl.load(sums + tl.program_id(0).to(tl.int64) * TOKENS + t)
    along = tl.sum(grads.to(tl.float32) * _load(output, at, exists).to(tl.float32), 1)
    to_queries = tl.zeros([TOKENS, D], tl.float32)
    for first in range(0, P, PIXELS):
        p = first + tl.arange(0, PIXELS)
        pixel, inside = _rows(p, P, HEADS, D)
        keys, values = _load(k, pixel, inside), _load(v, pixel, inside)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * 1.4426950408889634)
        weights = tl.where((p < P)[None], tl.exp2(scores - logarithm[:, None]), 0.0)
        to_values = tl.dot(tl.trans(_as(weights, grads)), grads, input_precision="ieee")
        tl.store(grad_v + pixel, to_values, mask=inside)
        to_weights = tl.dot(grads, tl.trans(values), input_precision="ieee")
        to_scores = _as(weights * (to_weights - along[:, None]) * scale, queries)
        tl.store(grad_k + pixel, tl.dot(tl.trans(to_scores), queries, input_precision="ieee"), mask=inside)
        to_queries += tl.dot(to_scores, keys, input_precision="ieee")
    tl.store(grad_q + at, to_queries, mask=exists)


@triton.jit
def write_kernel(
    output,  # [N, P, heads, D]
    q,  # [N, P, heads, D]
    k,  # [N, T, heads, D]
    v,  # [N, T, heads, D]
    T,
    P,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    t = tl.arange(0, TOKENS)
    at, exists = _rows(t, T, HEADS, D)
    keys, values = _load(k, at, exists), _load(v, at, exists)
    for first in range(0, P, PIXELS):
        pixel, inside = _rows(first + tl.arange(0, PIXELS), P, HEADS, D)
        weights = _weights(_load(q, pixel, inside), keys, t < T, scale)
        tl.store(output + pixel, tl.dot(_as(weights, values), values, input_precision="ieee"), mask=inside)


@triton.jit
def write_gradients_kernel(
    grad_q,  # [N, P, heads, D]
    grad_k,  # [N, T, heads, D]
    grad_v,  # [N, T, heads, D]
    grad_output,  # [N, P, heads, D]
    q,  # [N, P, heads, D]
    k,  # [N, T, heads, D]
    v,  # [N, T, heads, D]
    T,
    P,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    t = tl.arange(0, TOKENS)
    at, exists = _rows(t, T, HEADS, D)
    keys, values = _load(k, at, exists), _load(v, at, exists)
    to_keys = tl.zeros([TOKENS, D], tl.float32)
    to_values = tl.zeros([TOKENS, D], tl.float32)
    for first in range(0, P, PIXELS):
        pixel, inside = _rows(first + tl.arange(0, PIXELS), P, HEADS, D)
        queries, grads = _load(q, pixel, inside), _load(grad_output, pixel, inside)  # zeros where there is no pixel
        weights = _weights(queries, keys, t < T, scale)
        to_values += tl.dot(tl.trans(_as(weights, grads)), grads, input_precision="ieee")
        to_weights = tl.dot(grads, tl.trans(values), input_precision="ieee")
        to_scores = weights * (to_weights - tl.sum(weights * to_weights, 1)[:, None]) * scale
        to_scores = _as(to_scores, keys)
        tl.store(grad_q + pixel, tl.dot(to_scores, keys, input_precision="ieee"), mask=inside)
        to_keys += tl.dot(tl.trans(to_scores), queries, input_precision="ieee")
    tl.store(grad_k + at, to_keys, mask=exists)
    tl.store(grad_v + at, to_values, mask=exists)


@triton.jit
def _weights(queries, keys, exists, scale):
    """Softmax over tokens that exist, [PIXELS, TOKENS]."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * 1.4426950408889634)
    scores = tl.where(exists[None], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


def variants(architecture: int) -> Iterator[Variant]:
    """What training of the package's models in bfloat16 asks for: heads of 16 channels."""
    kind = f"*{TRITON_TYPES[torch.bfloat16]}:16"
    rest = {"T": "i32", "P": "i32:16", "scale": "fp32"}
    qkv = dict.fromkeys(("q", "k", "v"), kind)
    grads = dict.fromkeys(("grad_q", "grad_k", "grad_v", "grad_output"), kind)
    for kernel, launch, tensors in (
        (read_kernel, read_launch(), {"output": kind, "sums": "*fp32:16", **qkv}),
        (read_gradients_kernel, read_launch(), {**grads, "output": kind, "sums": "*fp32:16", **qkv}),
        (write_kernel, write_launch(), {"output": kind, **qkv}),
        (write_gradients_kernel, write_launch(), {**grads, **qkv}),
    ):
        constants = _constants(8, 16, launch)
        yield Variant(kernel.__name__, kernel, tensors | rest, constants, {"num_warps": launch.warps})
