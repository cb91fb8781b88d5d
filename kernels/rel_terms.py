"""Relative positions' part of attention scores, q . Rh[y_q - y_k] and q . Rw[x_q - x_k], times log2(e).

One program owns a row of the image, whose queries share y_q, or a column: the part of the table that it needs is one
tile, and the terms are one product. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from sam_fast.kernels.launch import WIDENED

OUTSIDE = tl.constexpr(-30000.0)  # what is added to the score of a key that is outside of the window


@triton.jit
def load(pointers, exists, MASKED: tl.constexpr = True):
    """What is there, and zero where nothing is."""
    x = tl.load(pointers, mask=exists, other=0.0) if MASKED else tl.load(pointers)
    return x.to(tl.float32) if WIDENED else x


@triton.jit
def load_box(boxes, image, y0, x0, channel, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """The tokens of a window, [KEYS, WIDTH], zero beyond the image."""
    x = boxes.load([image, y0, x0, channel]).reshape(KEYS, WIDTH)
    return x.to(tl.float32) if WIDENED else x


@triton.jit
def rel_terms_kernel(
    down,  # small: [B, heads, H W, 32], else float32 [B, heads, ROWS, H W]
    across,  # small: the same from column 16 on, else float32 [B, heads, H W, ACROSS_STRIDE]
    qkv,  # [B, H, W, 3, heads, d]
    rel_h,  # [2 ROWS - 1, d]
    rel_w,  # [2 COLUMNS - 1, d]
    H,
    W,
    ACROSS_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    SMALL: tl.constexpr,
    QUERIES: tl.constexpr,
    OFFSETS: tl.constexpr,  # positions of keys at a time
    LOG2_E: tl.constexpr,
):
    line, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    D: tl.constexpr = D0 + D1
    along_row = line < H
    # The line's queries are `start + i step`; its tables are shifted by its own position in a window.
    if along_row:
        start, step, count, own, side = line * W, 1, W, line % ROWS, ROWS
        table, to = rel_h, down
    else:
        start, step, count, own, side = line - H, W, H, (line - H) % COLUMNS, COLUMNS
        table, to = rel_w, across
    q_base = qkv + (image * H * W * 3 * HEADS + head) * D
    d0 = tl.arange(0, D0)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
    if SMALL:
        to += (image * HEADS + head) * H * W * ACROSS_STRIDE
        query_stride, key_stride = ACROSS_STRIDE, 1
        last = OFFSETS
    elif along_row:
        to += (image * HEADS + head) * ROWS * H * W
        query_stride, key_stride = 1, H * W
        last = ROWS
    else:
        to += (image * HEADS + head) * H * W * ACROSS_STRIDE
        query_stride, key_stride = ACROSS_STRIDE, 1
        last = ACROSS_STRIDE
    for first in range(0, last, OFFSETS):
        j = first + tl.arange(0, OFFSETS)
        known = (j < side)[None, :]
        row = (own - j + side - 1)[None, :]
        t0 = load(table + row * D + d0[:, None], known)
        if D1 > 0:
            t1 = load(table + row * D + d1[:, None], known)
        for i0 in range(0, count, QUERIES):
            i = i0 + tl.arange(0, QUERIES)
            exists = (i < count)[:, None]
            token = (start + i * step)[:, None]
            q_row = q_base + token * (3 * HEADS * D)
            q0 = load(q_row + d0[None, :], exists)
            terms = tl.dot(q0, t0, input_precision="ieee")
            if D1 > 0:
                q1 = load(q_row + d1[None, :], exists)
                terms = tl.dot(q1, t1, terms, input_precision="ieee")
            terms = terms * LOG2_E
            if SMALL:
                # Where keys are outside of the window `window_kernel` has `OUTSIDE` in the row of this slot.
                slot = (j == 15) & (along_row if ROWS < 16 else (line >= H) & (COLUMNS < 16))
                terms = tl.where(known, terms, tl.where(slot, 1.0, 0.0)[None, :])
            else:
                terms = tl.where(known, terms, OUTSIDE)
            address = to + token.to(tl.int64) * query_stride + j[None, :].to(tl.int64) * key_stride
            tl.store(address, terms.to(to.dtype.element_ty), mask=exists & (j < last)[None, :])
