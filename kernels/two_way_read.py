"""The image side of the mask decoder's two-way attention: tokens read pixels (how pixels take: `two_way_attention.py`).

`read_kernel`: scores of rows against a tile of pixels, online softmax over pixels, weighted sum of pixels. One program
per run of tiles, prompt and block of rows; `combine_kernel` joins the runs, where there are several. In half precision
X and its encoding are multiplied one after the other, for their sum would be rounded; in float32 they are added first.

Keys and values of the pixels are never formed, and the image and its encoding not repeated per prompt. Scores, softmax
and sums are float32; shares of the softmax are rounded to the type of the image. C is a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from sam_fast.kernels.launch import LOG2_E, TRITON_TYPES, WIDENED, Variant, architecture
from sam_fast.kernels.two_way_attention import (
    MOST_CHANNELS,
    SIZES,
    Launch,
    box_type,
    boxes,
    load_pixels,
    padded,
    tiles_each,
)
from torch import Tensor

_LOG2_E = tl.constexpr(LOG2_E)
_LOWEST = tl.constexpr(-1e30)  # where maxima begin: finite, so that scores of -inf weigh nothing instead of NaN
_RUNS = 16  # that `combine_kernel` reads at a time


def read_launch(architecture: int, dtype: torch.dtype, rows: int) -> Launch:
    """How that many rows read, a power of two from 64 on."""
    if dtype == torch.float32:
        return Launch(32, 16, 4)
    if architecture >= 90:
        return Launch(64, min(rows, 128), 4 if rows <= 64 else 8, boxes=True)
    return Launch(32, 32, 4)


def read_runs(image: Tensor, prompts: int, rows: int) -> int:
    """Into how many runs `read` divides the pixels of images [.., P, C]: what its workspace must hold."""
    launch = read_launch(architecture(image.device), image.dtype, padded(rows))
    return triton.cdiv(triton.cdiv(image.shape[1], launch.pixels), _tiles_each(image, prompts, rows, launch))


def read(
    output: Tensor, workspace: tuple[Tensor, Tensor, Tensor] | None, image: Tensor, pe: Tensor, queries: Tensor
) -> None:
    """Let tokens read pixels: all contiguous and of one type.

    Args:
        output: [N, R, C].
        workspace: with as many runs as `read_runs` says, float32 [N, runs, R, C] and two of [N, runs, R]; None for one.
        image: [N, P, C] or [1, P, C].
        pe: [P, C].
        queries: absorbed ones, [N, R, C].
    """
    N, R, C = output.shape
    if output.numel() == 0:
        return
    P = image.shape[1]
    launch = read_launch(architecture(image.device), image.dtype, padded(R))
    each = _tiles_each(image, N, R, launch)
    runs = triton.cdiv(triton.cdiv(P, launch.pixels), each)
    assert runs == 1 if workspace is None else workspace[0].shape == (N, runs, R, C)
    tensors = tuple(boxes(x, launch.pixels) for x in (image, pe)) if launch.boxes else (image, pe)
    read_kernel[(N, runs, triton.cdiv(R, launch.rows))](
        *(*(workspace or (output, None, None)), *tensors, queries, int(len(image) > 1), P, R, each),
        **{"C": C, "BOXES": launch.boxes, "ADD_PE": image.dtype == torch.float32},
        **launch.constants(),
        **launch.options(),
    )
    if workspace is not None:
        combine_kernel[(N, R)](output, *workspace, runs, R, C=C, RUNS=_RUNS, num_warps=4)


@triton.jit(do_not_specialize=["image_step", "R", "tiles_each"])
def read_kernel(
    sums,  # float32 [N, runs, R, C], of pixels times e^(score - most); of one run the output [N, R, C]
    most,  # float32 [N, runs, R], the largest score times log2(e); None for one run
    total,  # float32 [N, runs, R], of e^(score - most); None for one run
    image,  # [N, P, C], or [1, P, C] with image_step 0; BOXES: its descriptor, as of the next
    pe,  # [P, C]
    queries,  # [N, R, C]
    image_step,
    P,
    R,
    tiles_each,
    C: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    PIXELS: tl.constexpr,  # of a tile
    BOXES: tl.constexpr,
    ADD_PE: tl.constexpr,  # X + pe before the product, rather than a product of each
):
    prompt = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C)
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    known = r < R
    q = tl.load(queries + (prompt * R + r[:, None]) * C + c[None, :], mask=known[:, None], other=0.0)
    if WIDENED:
        q = q.to(tl.float32)
    highest = tl.full([ROWS], _LOWEST, tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    y = tl.zeros([ROWS, C], tl.float32)
    first = tl.program_id(1) * tiles_each
    last = tl.minimum(first + tiles_each, tl.cdiv(P, PIXELS))
    for tile in range(first, last):
        place = load_pixels(pe, 0, tile, P, C, PIXELS, BOXES, True)
        if not ADD_PE:
            s = tl.dot(q, tl.trans(place), input_precision="ieee")
        x = load_pixels(image, prompt * image_step, tile, P, C, PIXELS, BOXES, False)
        if ADD_PE:
            s = tl.dot(q, tl.trans(x + place), input_precision="ieee")
        else:
            s = tl.dot(q, tl.trans(x), s, input_precision="ieee")
        s = tl.where((tile * PIXELS + tl.arange(0, PIXELS) < P)[None, :], s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1) * _LOG2_E)
        shares = tl.exp2(s * _LOG2_E - higher[:, None])
        shrink = tl.exp2(highest - higher)
        count = count * shrink + tl.sum(shares, 1)
        y = tl.dot(shares.to(x.dtype), x, y * shrink[:, None], input_precision="ieee")
        highest = higher
    row = (prompt * tl.num_programs(1) + tl.program_id(1)) * R + r
    if most is None:
        y = (y * (1.0 / count)[:, None]).to(sums.dtype.element_ty)
    else:
        tl.store(most + row, highest, mask=known)
        tl.store(total + row, count, mask=known)
    tl.store(sums + row[:, None] * C + c[None, :], y, mask=known[:, None])


@triton.jit(do_not_specialize=["runs", "R"])
def combine_kernel(
    output,  # [N, R, C]
    sums,  # float32 [N, runs, R, C]
    most,  # float32 [N, runs, R]
    total,  # float32 [N, runs, R]
    runs,
    R,
    C: tl.constexpr,
    RUNS: tl.constexpr,  # at a time
):
    """One program per row and prompt."""
    r, prompt = tl.program_id(1), tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C)[None, :]
    highest = _LOWEST
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        highs = tl.load(most + (prompt * runs + run) * R + r, mask=run < runs, other=_LOWEST)
        highest = tl.maximum(highest, tl.max(highs, 0))
    denominator = 0.0
    y = tl.zeros([C], tl.float32)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        exists = run < runs
        row = (prompt * runs + run) * R + r
        weight = tl.exp2(tl.load(most + row, mask=exists, other=float("-inf")) - highest)
        denominator += tl.sum(weight * tl.load(total + row, mask=exists, other=0.0), 0)
        some = tl.load(sums + row[:, None] * C + c, mask=exists[:, None], other=0.0)
        y += tl.sum(weight[:, None] * some, 0)
    to = output + (prompt * R + r) * C + tl.arange(0, C)
    tl.store(to, (y / denominator).to(output.dtype.element_ty))


def _tiles_each(image: Tensor, prompts: int, rows: int, launch: Launch) -> int:
    """Tiles of pixels per program: two at least, for each run leaves a sum [R, C] behind."""
    tiles = triton.cdiv(image.shape[1], launch.pixels)
    blocks = prompts * triton.cdiv(rows, launch.rows)
    return max(2, tiles_each(tiles, blocks, image.device))


def variants(architecture: int) -> Iterator[Variant]:
    """All that the launch table can ask for, with the sizes of SAM's decoder."""
    for dtype, kind in TRITON_TYPES.items():
        blocks = {read_launch(architecture, dtype, rows).rows: rows for rows in (128, 64)}
        for rows in blocks.values():
            for runs in (1, 2):
                yield _variant(architecture, dtype, rows, runs)
        signature = {"output": f"*{kind}:16", **_WORKSPACE, "runs": "i32", "R": "i32"}
        constants = {"C": MOST_CHANNELS, "RUNS": _RUNS}
        yield Variant(f"combine {kind}", combine_kernel, signature, constants, {"num_warps": 4})


_WORKSPACE = dict.fromkeys(("sums", "most", "total"), "*fp32:16")


def _variant(architecture: int, dtype: torch.dtype, rows: int, runs: int) -> Variant:
    launch = read_launch(architecture, dtype, rows)
    kind, C, exact = TRITON_TYPES[dtype], MOST_CHANNELS, dtype == torch.float32
    data = f"*{kind}:16"
    signature = {**_WORKSPACE, "image": data, "pe": data, "queries": data, **SIZES}
    constants = {"C": C, "BOXES": launch.boxes, "ADD_PE": exact, **launch.constants()}
    if launch.boxes:
        signature |= {name: box_type(kind, launch.pixels, C, flat=name == "pe") for name in ("image", "pe")}
    if runs == 1:
        signature["sums"] = data
        for name in ("most", "total"):
            del signature[name]
            constants[name] = None
    name = f"{launch.rows}{'' if runs == 1 else ', in runs'} {kind}"
    return Variant(name, read_kernel, signature, constants, launch.options(), not exact)
