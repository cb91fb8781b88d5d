"""Attention in windows of up to 16 x 16 tokens: all keys of a window at once, hence no online softmax.

One program per window, head and few blocks of queries. Relative positions are added by one more product: a query's 16
vertical and 16 horizontal terms with a matrix of zeros and ones. Accumulators and softmax are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from sam_fast.kernels.rel_terms import OUTSIDE, load, load_box


@triton.jit
def _window_origin(index, H, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first row and column of a window; those that lie whole within the image come first, for they are longest."""
    whole_down, whole_across = H // ROWS, W // COLUMNS
    across = tl.cdiv(W, COLUMNS)
    whole = whole_down * whole_across
    beside = whole + whole_down * (across - whole_across)
    if index < whole:
        row, column = index // whole_across, index % whole_across
    elif index < beside:
        row, column = index - whole, whole_across
    else:
        row, column = whole_down, index - beside
    return row * ROWS, column * COLUMNS


@triton.jit
def window_kernel(
    output,  # [B, H, W, heads d]
    qkv,  # [B, H, W, 3, heads, d]
    boxes0,  # descriptor of qkv as [B, H, W, 3 heads d] with boxes of [1, PADDED_ROWS, PADDED_COLUMNS, D0], or None
    boxes1,  # the same with D1 channels, or None
    terms,  # [B, heads, H W, 32] from `rel_terms_kernel`, or None
    H,
    W,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    QK_SCALE: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    PADDED_COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEYS: tl.constexpr,  # at a time: all, or a divisor
    BOXES: tl.constexpr,
):
    D: tl.constexpr = D0 + D1
    ALL_KEYS: tl.constexpr = PADDED_ROWS * PADDED_COLUMNS
    STRIDE: tl.constexpr = 3 * HEADS * D  # from token to token
    head, group = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    image = tl.program_id(1)
    y0, x0 = _window_origin(tl.program_id(2), H, W, ROWS, COLUMNS)
    columns_here = tl.minimum(COLUMNS, W - x0)
    queries_here = tl.minimum(ROWS, H - y0) * columns_here
    first_block = group * BLOCKS
    last_block = tl.minimum(first_block + BLOCKS, tl.cdiv(queries_here, QUERIES))
    if first_block >= last_block:
        return
    base = qkv + image.to(tl.int64) * H * W * STRIDE + head * D
    d0 = tl.arange(0, D0)[None, :]
    d1 = D0 + tl.arange(0, D1 if D1 > 0 else 1)[None, :]
    if KEYS == ALL_KEYS:
        # Before the loop over queries, which would otherwise hold several copies of them.
        k0, v0, k1, v1 = _keys(
            base, boxes0, boxes1, image, y0, x0, head, H, W, d0, d1, 0,
            HEADS, D0, D1, PADDED_ROWS, PADDED_COLUMNS, KEYS, BOXES,
        )  # fmt: skip
        places = _places(0, ROWS, COLUMNS, PADDED_COLUMNS, KEYS, k0.dtype)
    for block in range(first_block, last_block):
        m = block * QUERIES + tl.arange(0, QUERIES)
        exists = (m < queries_here)[:, None]
        token = ((y0 + m // columns_here) * W + x0 + m % columns_here)[:, None]
        q0 = load(base + token * STRIDE + d0, exists)
        q1 = q0
        if D1 > 0:
            q1 = load(base + token * STRIDE + d1, exists)
        own_terms = q0
        if terms is not None:
            start = (image * HEADS + head).to(tl.int64) * H * W
            own_terms = load(terms + start * 32 + (token * 32 + tl.arange(0, 32)[None, :]), exists)
        to = output + image.to(tl.int64) * H * W * HEADS * D + head * D
        if KEYS == ALL_KEYS:
            s = _scores(q0, q1, k0, k1, own_terms, places, terms is not None, D1, QK_SCALE)
            p = tl.exp2(s - tl.max(s, 1)[:, None])
            share = 1 / tl.sum(p, 1)[:, None]
            p = p.to(v0.dtype)
            read0 = tl.dot(p, v0, input_precision="ieee") * share
            tl.store(to + token * (HEADS * D) + d0, read0.to(output.dtype.element_ty), mask=exists)
            if D1 > 0:
                read1 = tl.dot(p, v1, input_precision="ieee") * share
                tl.store(to + token * (HEADS * D) + d1, read1.to(output.dtype.element_ty), mask=exists)
        else:
            most = tl.full([QUERIES], float("-inf"), tl.float32)
            total = tl.zeros([QUERIES], tl.float32)
            read0 = tl.zeros([QUERIES, D0], tl.float32)
            read1 = tl.zeros([QUERIES, D1 if D1 > 0 else 1], tl.float32)
            for first in range(0, ALL_KEYS, KEYS):
                k0, v0, k1, v1 = _keys(
                    base, boxes0, boxes1, image, y0, x0, head, H, W, d0, d1, first,
                    HEADS, D0, D1, PADDED_ROWS, PADDED_COLUMNS, KEYS, BOXES,
                )  # fmt: skip
                places = _places(first, ROWS, COLUMNS, PADDED_COLUMNS, KEYS, k0.dtype)
                s = _scores(q0, q1, k0, k1, own_terms, places, terms is not None, D1, QK_SCALE)
                higher = tl.maximum(most, tl.max(s, 1))
                p = tl.exp2(s - higher[:, None])
                shrink = tl.exp2(most - higher)
                total = total * shrink + tl.sum(p, 1)
                p = p.to(v0.dtype)
                read0 = tl.dot(p, v0, read0 * shrink[:, None], input_precision="ieee")
                if D1 > 0:
                    read1 = tl.dot(p, v1, read1 * shrink[:, None], input_precision="ieee")
                most = higher
            share = 1 / total[:, None]
            tl.store(to + token * (HEADS * D) + d0, (read0 * share).to(output.dtype.element_ty), mask=exists)
            if D1 > 0:
                tl.store(to + token * (HEADS * D) + d1, (read1 * share).to(output.dtype.element_ty), mask=exists)


@triton.jit
def _keys(
    base, boxes0, boxes1, image, y0, x0, head, H, W, d0, d1, first,
    HEADS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PADDED_ROWS: tl.constexpr, PADDED_COLUMNS: tl.constexpr, KEYS: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    """Keys [KEYS, D0] and values of a window from its key `first` on, and their last D1 channels; zero outside."""
    D: tl.constexpr = D0 + D1
    if BOXES:  # what lies beyond the image comes as zero
        keys, values = (HEADS + head) * D, (2 * HEADS + head) * D
        k0 = load_box(boxes0, image, y0, x0, keys, KEYS, D0)
        v0 = load_box(boxes0, image, y0, x0, values, KEYS, D0)
        k1, v1 = k0, v0
        if D1 > 0:
            k1 = load_box(boxes1, image, y0, x0, keys + D0, KEYS, D1)
            v1 = load_box(boxes1, image, y0, x0, values + D0, KEYS, D1)
    else:
        n = first + tl.arange(0, KEYS)
        y, x = y0 + n // PADDED_COLUMNS, x0 + n % PADDED_COLUMNS
        exists = ((y < H) & (x < W))[:, None]
        keys = base + (y * W + x)[:, None] * (3 * HEADS * D) + HEADS * D
        k0 = load(keys + d0, exists)
        v0 = load(keys + HEADS * D + d0, exists)
        k1, v1 = k0, v0
        if D1 > 0:
            k1 = load(keys + d1, exists)
            v1 = load(keys + HEADS * D + d1, exists)
    return k0, v0, k1, v1


@triton.jit
def _places(first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PADDED_COLUMNS: tl.constexpr, KEYS: tl.constexpr, dtype):
    """[32, KEYS]: 1 at each key's row and at 16 + its column; `OUTSIDE` at a spare place if it is in no window."""
    place, n = tl.arange(0, 32)[:, None], (first + tl.arange(0, KEYS))[None, :]
    y, x = n // PADDED_COLUMNS, n % PADDED_COLUMNS
    inside = (y < ROWS) & (x < COLUMNS)
    here = inside & ((place == y) | (place == 16 + x))
    spare: tl.constexpr = 15 if ROWS < 16 else 31
    outside = (~inside) & (place == spare)
    return tl.where(here, 1.0, tl.where(outside, OUTSIDE, 0.0)).to(dtype)


@triton.jit
def _scores(q0, q1, k0, k1, own_terms, places, WITH_TERMS: tl.constexpr, D1: tl.constexpr, QK_SCALE: tl.constexpr):
    """Scores times log2(e), [queries, keys]."""
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if D1 > 0:
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    if QK_SCALE != 1.0:
        s = s * QK_SCALE
    if WITH_TERMS:
        s = tl.dot(own_terms, places, s, input_precision="ieee")
    else:
        s += tl.min(places.to(tl.float32), 0)[None, :]
    return s
