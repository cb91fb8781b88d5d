"""Relative positions' part of attention scores, q . Rh[y_q - y_k] and q . Rw[x_q - x_k], times log2(e).

One program owns a row of the image, whose queries share y_q, or a column, or a part of one if it is long: the part of
the table that it needs is one tile, and the terms are one product. Sums are float32.
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
    # Heads come first: all of a token's queries, side by side in memory, are read at about the same time.
    head, program, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q = qkv + (image * H * W * 3 * HEADS + head) * (D0 + D1)
    first = (image * HEADS + head) * H * W
    across += first * ACROSS_STRIDE
    programs_of_row = tl.cdiv(W, QUERIES)
    programs_of_rows = H * programs_of_row
    # Two calls, not one with strides chosen here: each has strides, of 1 above all, that the compiler knows.
    if program < programs_of_rows:
        line, start = program // programs_of_row, program % programs_of_row * QUERIES
        down += first * (ACROSS_STRIDE if SMALL else ROWS)
        _line_terms(
            down, q, rel_h, start, W, line * W, 1, line % ROWS, ACROSS_STRIDE if SMALL else 1, 1 if SMALL else H * W,
            ROWS, OFFSETS if SMALL else ROWS, True, HEADS, D0, D1, SMALL, QUERIES, OFFSETS, LOG2_E,
        )  # fmt: skip
    else:
        programs_of_column = tl.cdiv(H, QUERIES)
        program -= programs_of_rows
        line, start = program // programs_of_column, program % programs_of_column * QUERIES
        _line_terms(
            across, q, rel_w, start, H, line, W, line % COLUMNS, ACROSS_STRIDE, 1,
            COLUMNS, OFFSETS if SMALL else ACROSS_STRIDE, ROWS == 16, HEADS, D0, D1, SMALL, QUERIES, OFFSETS, LOG2_E,
        )  # fmt: skip


@triton.jit
def _line_terms(
    to,
    q,
    table,  # [2 SIDE - 1, d]
    start,  # the first query, of `count` in the line
    count,
    token,  # the line's first, from which to the next it is `step`
    step,
    own,  # the line's position in a window
    query_stride,  # of `to`, from token to token
    key_stride,
    SIDE: tl.constexpr,
    LAST: tl.constexpr,  # positions of keys to write, known or not
    SLOT: tl.constexpr,
    HEADS: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    SMALL: tl.constexpr,
    QUERIES: tl.constexpr,
    OFFSETS: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    """Terms of up to QUERIES queries of a line, whose table is shifted by the line's position."""
    D: tl.constexpr = D0 + D1
    i = start + tl.arange(0, QUERIES)
    exists = (i < count)[:, None]
    tokens = (token + i * step)[:, None]
    d0 = tl.arange(0, D0)
    q += tokens * (3 * HEADS * D)
    q0 = load(q + d0[None, :], exists)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = load(q + d1[None, :], exists)
    for first in tl.range(0, LAST, OFFSETS, num_stages=1):
        j = first + tl.arange(0, OFFSETS)
        known = (j < SIDE)[None, :]
        row = (own - j + SIDE - 1)[None, :]
        t0 = load(table + row * D + d0[:, None], known, SIDE % OFFSETS != 0)
        terms = tl.dot(q0, t0, input_precision="ieee")
        if D1 > 0:
            t1 = load(table + row * D + d1[:, None], known, SIDE % OFFSETS != 0)
            terms = tl.dot(q1, t1, terms, input_precision="ieee")
        terms = terms * LOG2_E
        if SMALL:
            # Where keys are outside of the window `window_kernel` has `OUTSIDE` in the row of this slot.
            terms = tl.where(known, terms, tl.where((j == 15) & SLOT, 1.0, 0.0)[None, :])
        else:
            terms = tl.where(known, terms, OUTSIDE)
        written = exists if LAST % OFFSETS == 0 else exists & (j < LAST)[None, :]
        tl.store(to + (tokens * query_stride + j[None, :] * key_stride), terms.to(to.dtype.element_ty), mask=written)
