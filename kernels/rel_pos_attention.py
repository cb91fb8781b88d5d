"""Attention in windows of an image's tokens, with decomposed relative positions: the image encoder's.

softmax(scale q k^T + q . Rh[y_q - y_k] + q . Rw[x_q - x_k]) v, read in place from qkv [B, H, W, 3, heads, d], so that
windows are neither cut out nor padded. Keys of a window that lie outside the image are zero, and so are their values:
they add only exp(their relative positions) to the denominator.

Three kernels. `rel_terms_kernel` computes q . Rh and q . Rw, which are [.., rows] and [.., columns] per query: one
program owns a row of the image (whose queries share y_q), or a column, so that the table it needs is one tile. Then

* `window_kernel` for windows of up to 16 x 16: all keys of a window at once, hence no online softmax. The relative
  positions are added by one more product, [rows | columns] with a matrix of ones and zeros. One program per window,
  head and few blocks of queries.
* `long_kernel` for anything larger, online over rows of keys: a row's vertical term is one number per query, and its
  horizontal term is the same tile for every row. One program per block of queries and head.

Per layer the official code writes and reads the scores and their biases, 2 x 400 MB for 4096 tokens and 12 heads; here
nothing that grows with tokens squared leaves the chip. Sums, softmax and accumulators are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from sam_fast.kernels.launch import LOG2_E, TRITON_TYPES, WIDENED, Variant, architecture
from torch import Tensor

LARGEST_SIDE = 16  # of a window that `window_kernel` takes
_SLOT = tl.constexpr(LARGEST_SIDE)  # where the horizontal terms begin in a row of relative terms
_OUTSIDE = tl.constexpr(-30000.0)  # what is added to the score of a key that is outside of the window


class Launch(NamedTuple):
    """Sizes of a launch: queries at a time, blocks of queries per program, keys at a time, and Triton's options."""

    queries: int
    blocks: int
    keys: int
    warps: int
    stages: int
    boxes: bool = False  # keys come by the copy engine of Hopper


def window_launch(architecture: int, dtype: torch.dtype, keys: int, d: int) -> Launch:
    """How `window_kernel` is launched for windows of `keys` keys, padding to powers of two included."""
    if dtype == torch.float32:
        return Launch(queries=32, blocks=2, keys=min(keys, 32), warps=4, stages=1)
    if architecture >= 90 and d <= 80:
        return Launch(queries=64, blocks=2, keys=keys, warps=4, stages=1, boxes=True)
    return Launch(queries=64, blocks=2, keys=min(keys, 64), warps=4, stages=1)


def long_launch(architecture: int, dtype: torch.dtype, columns: int, d: int) -> Launch:
    """How `long_kernel` is launched for windows of that many columns."""
    keys = min(64, max(16, triton.next_power_of_2(columns)))
    if dtype == torch.float32:
        return Launch(queries=32, blocks=1, keys=min(keys, 32), warps=4, stages=1)
    return Launch(queries=64, blocks=1, keys=keys, warps=4, stages=2, boxes=architecture >= 90)


def fits(qkv: Tensor) -> bool:
    """Whether the kernels take qkv [B, H, W, 3, heads, d]: half precision or float32, d a sum of two powers of two."""
    return qkv.dtype in TRITON_TYPES and _parts(qkv.shape[5]) is not None


def rel_pos_attention(
    output: Tensor, qkv: Tensor, rel_pos: tuple[Tensor, Tensor] | None, window: tuple[int, int], scale: float
) -> None:
    """Write the attention of qkv [B, H, W, 3, heads, d], contiguous, to output [B, H, W, heads d].

    Args:
        output, qkv: of one type. Tokens of padding are zero.
        rel_pos: Rh [2 rows - 1, d] and Rw [2 columns - 1, d], contiguous, of that type; or None.
        window: rows and columns.
        scale: of q k^T.
    """
    B, H, W, _, heads, d = qkv.shape
    if 0 in qkv.shape:
        return
    small = max(window) <= LARGEST_SIDE
    terms = None if rel_pos is None else _rel_terms(qkv, rel_pos, window, small)
    rows, columns = window
    windows = triton.cdiv(H, rows) * triton.cdiv(W, columns)
    shape: dict[str, Any] = {"HEADS": heads, "ROWS": rows, "COLUMNS": columns, **_widths(d)}
    shape["QK_SCALE"] = _rounded(scale * LOG2_E)
    if small:
        padded = _padded(window)
        launch = window_launch(architecture(qkv.device), qkv.dtype, padded[0] * padded[1], d)
        boxes = _boxes(qkv, padded, d) if launch.boxes else (None, None)
        programs = triton.cdiv(rows * columns, launch.queries * launch.blocks)
        window_kernel[(programs * heads, B, windows)](
            output, qkv, *boxes, terms, H, W, **shape, **_window_constants(padded, launch), **_options(launch)
        )
    else:
        launch = long_launch(architecture(qkv.device), qkv.dtype, columns, d)
        boxes = _boxes(qkv, (1, launch.keys), d) if launch.boxes else (None, None)
        programs = triton.cdiv(rows * columns, launch.queries)
        long_kernel[(programs, heads, B * windows)](
            output,
            qkv,
            *boxes,
            *(terms or (None, None)),
            H,
            W,
            **shape,
            **_long_constants(launch, window, (H, W)),
            **_options(launch),
        )


def _rel_terms(qkv: Tensor, rel_pos: tuple[Tensor, Tensor], window: tuple[int, int], small: bool) -> Any:
    """q . Rh and q . Rw times log2(e): for `window_kernel` one tensor, for `long_kernel` two."""
    B, H, W, _, heads, d = qkv.shape
    if small:
        terms = qkv.new_empty(B, heads, H * W, 2 * LARGEST_SIDE)
        down, across = terms, terms[..., LARGEST_SIDE:]
    else:
        down = qkv.new_empty(B, heads, window[0], H * W, dtype=torch.float32)
        width = _padded_columns(window[1], long_launch(architecture(qkv.device), qkv.dtype, window[1], d).keys)
        across = qkv.new_empty(B, heads, H * W, width, dtype=torch.float32)
    rel_terms_kernel[(H + W, heads, B)](
        down,
        across,
        qkv,
        *rel_pos,
        H,
        W,
        ACROSS_STRIDE=across.stride(2),
        **_terms_constants(qkv.dtype, window, heads, d, small),
    )
    return terms if small else (down, across)


@triton.jit
def _load(pointers, exists, MASKED: tl.constexpr = True):
    """What is there, and zero where nothing is."""
    x = tl.load(pointers, mask=exists, other=0.0) if MASKED else tl.load(pointers)
    return x.to(tl.float32) if WIDENED else x


@triton.jit
def _load_box(boxes, image, y0, x0, channel, KEYS: tl.constexpr, WIDTH: tl.constexpr):
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
        t0 = _load(table + row * D + d0[:, None], known)
        if D1 > 0:
            t1 = _load(table + row * D + d1[:, None], known)
        for i0 in range(0, count, QUERIES):
            i = i0 + tl.arange(0, QUERIES)
            exists = (i < count)[:, None]
            token = (start + i * step)[:, None]
            q_row = q_base + token * (3 * HEADS * D)
            q0 = _load(q_row + d0[None, :], exists)
            terms = tl.dot(q0, t0, input_precision="ieee")
            if D1 > 0:
                q1 = _load(q_row + d1[None, :], exists)
                terms = tl.dot(q1, t1, terms, input_precision="ieee")
            terms = terms * LOG2_E
            if SMALL:
                # Where keys are outside of the window `window_kernel` has `_OUTSIDE` in the row of this slot.
                slot = (j == 15) & (along_row if ROWS < 16 else (line >= H) & (COLUMNS < 16))
                terms = tl.where(known, terms, tl.where(slot, 1.0, 0.0)[None, :])
            else:
                terms = tl.where(known, terms, _OUTSIDE)
            address = to + token.to(tl.int64) * query_stride + j[None, :].to(tl.int64) * key_stride
            tl.store(address, terms.to(to.dtype.element_ty), mask=exists & (j < last)[None, :])


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
        q0 = _load(base + token * STRIDE + d0, exists)
        q1 = q0
        if D1 > 0:
            q1 = _load(base + token * STRIDE + d1, exists)
        own_terms = q0
        if terms is not None:
            start = (image * HEADS + head).to(tl.int64) * H * W
            own_terms = _load(terms + start * 32 + (token * 32 + tl.arange(0, 32)[None, :]), exists)
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
        k0 = _load_box(boxes0, image, y0, x0, keys, KEYS, D0)
        v0 = _load_box(boxes0, image, y0, x0, values, KEYS, D0)
        k1, v1 = k0, v0
        if D1 > 0:
            k1 = _load_box(boxes1, image, y0, x0, keys + D0, KEYS, D1)
            v1 = _load_box(boxes1, image, y0, x0, values + D0, KEYS, D1)
    else:
        n = first + tl.arange(0, KEYS)
        y, x = y0 + n // PADDED_COLUMNS, x0 + n % PADDED_COLUMNS
        exists = ((y < H) & (x < W))[:, None]
        keys = base + (y * W + x)[:, None] * (3 * HEADS * D) + HEADS * D
        k0 = _load(keys + d0, exists)
        v0 = _load(keys + HEADS * D + d0, exists)
        k1, v1 = k0, v0
        if D1 > 0:
            k1 = _load(keys + d1, exists)
            v1 = _load(keys + HEADS * D + d1, exists)
    return k0, v0, k1, v1


@triton.jit
def _places(first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PADDED_COLUMNS: tl.constexpr, KEYS: tl.constexpr, dtype):
    """[32, KEYS]: 1 at each key's row and at 16 + its column; `_OUTSIDE` at a spare place if it is in no window."""
    place, n = tl.arange(0, 32)[:, None], (first + tl.arange(0, KEYS))[None, :]
    y, x = n // PADDED_COLUMNS, n % PADDED_COLUMNS
    inside = (y < ROWS) & (x < COLUMNS)
    here = inside & ((place == y) | (place == 16 + x))
    spare: tl.constexpr = 15 if ROWS < 16 else 31
    outside = (~inside) & (place == spare)
    return tl.where(here, 1.0, tl.where(outside, _OUTSIDE, 0.0)).to(dtype)


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
    q0 = _load(base + token[:, None] * STRIDE + d0, exists[:, None])
    q1 = q0
    if D1 > 0:
        q1 = _load(base + token[:, None] * STRIDE + d1, exists[:, None])
    start = (image * HEADS + head).to(tl.int64) * H * W
    j = tl.arange(0, KEYS)
    if down is not None:
        downs = down + start * ROWS + token
        acrosses = across + start * ACROSS_STRIDE + token[:, None] * ACROSS_STRIDE + j[None, :]
        if CHUNKS == 1:
            own_across = _load(acrosses, exists[:, None])

    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    read0 = tl.zeros([QUERIES, D0], tl.float32)
    read1 = tl.zeros([QUERIES, D1 if D1 > 0 else 1], tl.float32)
    for step in range(0, ROWS * CHUNKS):
        row, first = step // CHUNKS, step % CHUNKS * KEYS
        if BOXES:
            k0 = _load_box(boxes0, image, y0 + row, x0 + first, (HEADS + head) * D, KEYS, D0)
            v0 = _load_box(boxes0, image, y0 + row, x0 + first, (2 * HEADS + head) * D, KEYS, D0)
        else:
            inside = ((x0 + first + j < W) & (y0 + row < H) & (first + j < COLUMNS))[:, None]
            keys = base + ((y0 + row) * W + x0 + first + j)[:, None] * STRIDE + HEADS * D
            k0 = _load(keys + d0, inside, not FULL)
            v0 = _load(keys + HEADS * D + d0, inside, not FULL)
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1 > 0:
            if BOXES:
                k1 = _load_box(boxes1, image, y0 + row, x0 + first, (HEADS + head) * D + D0, KEYS, D1)
                v1 = _load_box(boxes1, image, y0 + row, x0 + first, (2 * HEADS + head) * D + D0, KEYS, D1)
            else:
                k1 = _load(keys + d1, inside, not FULL)
                v1 = _load(keys + HEADS * D + d1, inside, not FULL)
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
        if down is not None:
            own_down = _load(downs + row * (H * W), exists)
            if CHUNKS > 1:
                own_across = _load(acrosses + first, exists[:, None])
            s = s * QK_SCALE + own_across
        else:
            own_down = tl.zeros([QUERIES], tl.float32)
            s = tl.where((first + j < COLUMNS)[None, :], s * QK_SCALE, _OUTSIDE)
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


# -- what a launch and an ahead-of-time compilation have in common


def _parts(d: int) -> tuple[int, int] | None:
    """d as a power of two and, maybe, a smaller one, both at least 16: 80 = 64 + 16."""
    first = 1 << (d.bit_length() - 1)
    rest = d - first
    if first < 16 or rest & (rest - 1) or 0 < rest < 16:
        return None
    return first, rest


def _widths(d: int) -> dict[str, int]:
    parts = _parts(d)
    assert parts is not None
    return {"D0": parts[0], "D1": parts[1]}


def _padded(window: tuple[int, int]) -> tuple[int, int]:
    """Sides of a window as powers of two, with at least 16 keys."""
    rows, columns = (triton.next_power_of_2(side) for side in window)
    return rows, max(columns, 16 // min(rows, 16))


def _padded_columns(columns: int, keys: int) -> int:
    return triton.cdiv(columns, keys) * keys


def _rounded(scale: float) -> float:
    """The scale of scores, exactly 1 where weights were prepared to that end: the kernels then leave it out."""
    return 1.0 if abs(scale - 1.0) < 1e-9 else scale


def _boxes(qkv: Tensor, padded: tuple[int, int], d: int) -> tuple[Any, Any]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    tokens = qkv.flatten(3)
    widths = _widths(d)
    return tuple(
        TensorDescriptor.from_tensor(tokens, [1, *padded, width]) if width else None for width in widths.values()
    )  # type: ignore[return-value]


def _options(launch: Launch) -> dict[str, int]:
    return {"num_warps": launch.warps, "num_stages": launch.stages}


def _terms_constants(dtype: torch.dtype, window: tuple[int, int], heads: int, d: int, small: bool) -> dict[str, Any]:
    offsets = 64 if not small and dtype != torch.float32 else LARGEST_SIDE
    shape = {"HEADS": heads, "ROWS": window[0], "COLUMNS": window[1], **_widths(d)}
    return {**shape, "SMALL": small, "QUERIES": 64, "OFFSETS": offsets, "LOG2_E": LOG2_E}


def _window_constants(padded: tuple[int, int], launch: Launch) -> dict[str, Any]:
    return {
        "PADDED_ROWS": padded[0],
        "PADDED_COLUMNS": padded[1],
        "QUERIES": launch.queries,
        "BLOCKS": launch.blocks,
        "KEYS": launch.keys,
        "BOXES": launch.boxes,
    }


def _long_constants(launch: Launch, window: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    full = window == size and size[1] % launch.keys == 0
    return {"QUERIES": launch.queries, "KEYS": launch.keys, "BOXES": launch.boxes, "FULL": full}


# (name, heads, d, window, side of the grid): ViT-B and ViT-L, ViT-H, nano, and other widths.
_SHAPES = (
    ("vit_b windows", 12, 64, (14, 14)),
    ("vit_h windows", 16, 80, (14, 14)),
    ("nano windows", 5, 32, (8, 8)),
    ("windows of 96", 8, 96, (14, 14)),
    ("vit_b global", 12, 64, (64, 64)),
    ("vit_h global", 16, 80, (64, 64)),
    ("nano global", 5, 32, (32, 32)),
    ("global of 48", 8, 48, (64, 64)),
    ("global of 128", 8, 128, (64, 64)),
    ("global, not square", 12, 64, (40, 100)),
)


def variants(architecture: int) -> Iterator[Variant]:
    """All that the launch tables can ask for, by model."""
    for dtype in (torch.bfloat16, torch.float32):
        for name, heads, d, window in _SHAPES:
            if dtype == torch.bfloat16 or d in (64, 80):
                yield from _variants_of(architecture, dtype, f"{name} {TRITON_TYPES[dtype]}", heads, d, window)


def _variants_of(
    architecture: int, dtype: torch.dtype, name: str, heads: int, d: int, window: tuple[int, int]
) -> Iterator[Variant]:
    kind = TRITON_TYPES[dtype]
    data = f"*{kind}:16"
    sizes = {"H": "i32:16", "W": "i32:16"}
    small = max(window) <= LARGEST_SIDE
    wgmma = dtype != torch.float32
    scratch = data if small else "*fp32:16"
    constants = {
        "ACROSS_STRIDE": 2 * LARGEST_SIDE
        if small
        else _padded_columns(window[1], long_launch(architecture, dtype, window[1], d).keys),
        **_terms_constants(dtype, window, heads, d, small),
    }
    tensors = {"down": scratch, "across": scratch, "qkv": data, "rel_h": data, "rel_w": data}
    yield Variant(f"{name}: terms", rel_terms_kernel, {**tensors, **sizes}, constants, {"num_warps": 4}, wgmma)

    shape = {"HEADS": heads, "ROWS": window[0], "COLUMNS": window[1], **_widths(d), "QK_SCALE": 1.0}
    signature = {"output": data, "qkv": data, **sizes}
    if small:
        padded = _padded(window)
        launch = window_launch(architecture, dtype, padded[0] * padded[1], d)
        constants = {**shape, **_window_constants(padded, launch)}
    else:
        launch = long_launch(architecture, dtype, window[1], d)
        padded = 1, launch.keys
        constants = {**shape, **_long_constants(launch, window, window)}
    for name_of_box, width in zip(("boxes0", "boxes1"), _widths(d).values(), strict=True):
        if launch.boxes and width:
            signature[name_of_box] = f"tensordesc<{kind}[1, {padded[0]}, {padded[1]}, {width}]>"
        else:
            constants[name_of_box] = None
    if small:
        signature["terms"] = data
        yield Variant(f"{name}: windows", window_kernel, signature, constants, _options(launch), wgmma)
    else:
        signature |= {"down": scratch, "across": scratch}
        yield Variant(f"{name}: long", long_kernel, signature, constants, _options(launch), wgmma)
