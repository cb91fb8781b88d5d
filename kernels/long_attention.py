"""Attention in windows of any size, the whole image above all: online over rows of keys.

One program per block of queries and head. A row's vertical term is one number per query, and its horizontal terms are
the same tile for every row, kept in registers if rows are no longer than the block. Accumulators and softmax are
float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from sam_fast.kernels.rel_terms import OUTSIDE, load, load_box


@triton.jit
def long_kernel(
    output,  # [B, H, W, heads d]
    qkv,  # [B, H, W, 3, heads, d]
    boxes0,  # descriptor of qkv as [B, H, W, 3 heads d] with boxes of [1, 1, KEYS, D0], or None
    boxes1,  # the same with D1 channels, or None
    down,  # float32 [B, heads, ROWS, H W], or None
    across,  # float32 [B, heads, H W, ACROSS_STRIDE], or None
    H,
    W,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    QK_SCALE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,  # of one row, at a time
    BOXES: tl.constexpr,
    FULL: tl.constexpr,  # the window is the image, and KEYS divide its rows: every key exists
):
    D: tl.constexpr = D0 + D1
    STRIDE: tl.constexpr = 3 * HEADS * D
    CHUNKS: tl.constexpr = (COLUMNS + KEYS - 1) // KEYS  # of a row of keys
    ACROSS_STRIDE: tl.constexpr = CHUNKS * KEYS
    head = tl.program_id(1)
    windows_across = tl.cdiv(W, COLUMNS)
    windows = tl.cdiv(H, ROWS) * windows_across
    image, window = tl.program_id(2) // windows, tl.program_id(2) % windows
    y0, x0 = window // windows_across * ROWS, window % windows_across * COLUMNS
    m = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    y, x = y0 + m // COLUMNS, x0 + m % COLUMNS
    exists = (m < ROWS * COLUMNS) & (y < H) & (x < W)
    token = y * W + x
    base = qkv + image.to(tl.int64) * H * W * STRIDE + head * D
    d0 = tl.arange(0, D0)[None, :]
    d1 = D0 + tl.arange(0, D1 if D1 > 0 else 1)[None, :]
    q0 = load(base + token[:, None] * STRIDE + d0, exists[:, None])
    q1 = q0
    if D1 > 0:
        q1 = load(base + token[:, None] * STRIDE + d1, exists[:, None])
    start = (image * HEADS + head).to(tl.int64) * H * W
    j = tl.arange(0, KEYS)
    if down is not None:
        downs = down + start * ROWS + token
        acrosses = across + start * ACROSS_STRIDE + token[:, None] * ACROSS_STRIDE + j[None, :]
        if CHUNKS == 1:
            own_across = load(acrosses, exists[:, None])

    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    read0 = tl.zeros([QUERIES, D0], tl.float32)
    read1 = tl.zeros([QUERIES, D1 if D1 > 0 else 1], tl.float32)
    for step in range(0, ROWS * CHUNKS):
        row, first = step // CHUNKS, step % CHUNKS * KEYS
        if BOXES:
            k0 = load_box(boxes0, image, y0 + row, x0 + first, (HEADS + head) * D, KEYS, D0)
            v0 = load_box(boxes0, image, y0 + row, x0 + first, (2 * HEADS + head) * D, KEYS, D0)
        else:
            inside = ((x0 + first + j < W) & (y0 + row < H) & (first + j < COLUMNS))[:, None]
            keys = base + ((y0 + row) * W + x0 + first + j)[:, None] * STRIDE + HEADS * D
            k0 = load(keys + d0, inside, not FULL)
            v0 = load(keys + HEADS * D + d0, inside, not FULL)
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1 > 0:
            if BOXES:
                k1 = load_box(boxes1, image, y0 + row, x0 + first, (HEADS + head) * D + D0, KEYS, D1)
                v1 = load_box(boxes1, image, y0 + row, x0 + first, (2 * HEADS + head) * D + D0, KEYS, D1)
            else:
                k1 = load(keys + d1, inside, not FULL)
                v1 = load(keys + HEADS * D + d1, inside, not FULL)
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
        if down is not None:
            own_down = load(downs + row * (H * W), exists)
            if CHUNKS > 1:
                own_across = load(acrosses + first, exists[:, None])
            s = s * QK_SCALE + own_across
        else:
            own_down = tl.zeros([QUERIES], tl.float32)
            s = tl.where((first + j < COLUMNS)[None, :], s * QK_SCALE, OUTSIDE)
        higher = tl.maximum(most, tl.max(s, 1) + own_down)
        p = tl.exp2(s - (higher - own_down)[:, None])
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(p, 1)
        p = p.to(v0.dtype)
        read0 = tl.dot(p, v0, read0 * shrink[:, None], input_precision="ieee")
        if D1 > 0:
            read1 = tl.dot(p, v1, read1 * shrink[:, None], input_precision="ieee")
        most = higher
    to = output + image.to(tl.int64) * H * W * HEADS * D + head * D + token[:, None] * (HEADS * D)
    tl.store(to + d0, (read0 / total[:, None]).to(output.dtype.element_ty), mask=exists[:, None])
    if D1 > 0:
        tl.store(to + d1, (read1 / total[:, None]).to(output.dtype.element_ty), mask=exists[:, None])
