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
from sam_fast.kernels.launch import LOG2_E, TRITON_TYPES, Variant, architecture
from sam_fast.kernels.long_attention import long_kernel
from sam_fast.kernels.rel_terms import rel_terms_kernel
from sam_fast.kernels.window_attention import window_kernel
from torch import Tensor

LARGEST_SIDE = 16  # of a window that `window_kernel` takes


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
        return Launch(queries=64, blocks=4, keys=keys, warps=4, stages=2 if d <= 64 else 1, boxes=True)
    return Launch(queries=64, blocks=2, keys=min(keys, 64), warps=4, stages=1)


def long_launch(architecture: int, dtype: torch.dtype, columns: int, d: int) -> Launch:
    """How `long_kernel` is launched for windows of that many columns."""
    keys = min(64, max(16, triton.next_power_of_2(columns)))
    if dtype == torch.float32:
        return Launch(queries=32, blocks=1, keys=min(keys, 32), warps=4, stages=1)
    boxes = architecture >= 90
    return Launch(queries=64, blocks=1, keys=keys, warps=4, stages=3 if boxes and d <= 80 else 2, boxes=boxes)


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
    constants = _terms_constants(qkv.dtype, window, heads, d, small)
    rel_terms_kernel[_terms_grid(qkv, constants)](
        down,
        across,
        qkv,
        *rel_pos,
        H,
        W,
        ACROSS_STRIDE=across.stride(2),
        **constants,
    )
    return terms if small else (down, across)


def _terms_grid(qkv: Tensor, constants: dict[str, Any]) -> tuple[int, int, int]:
    """Heads, parts of rows and of columns, images."""
    B, H, W, _, heads, _ = qkv.shape
    queries = constants["QUERIES"]
    return heads, H * triton.cdiv(W, queries) + W * triton.cdiv(H, queries), B


# -- what a launch and an ahead-of-time compilation have in common


def _widths(d: int) -> dict[str, int]:
    """d as a power of two and, maybe, a smaller one: 80 = 64 + 16."""
    first = 1 << (d.bit_length() - 1)
    return {"D0": first, "D1": d - first}


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
