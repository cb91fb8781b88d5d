"""The image side of the mask decoder's two-way attention: pixels take from tokens (how tokens read: `two_way_read.py`).

Notation as in `ops/two_way_attention.py`: X [P, C] are an image's pixels, and row t HEADS + i of R rows is head i of
token t. In this order a head's softmax over tokens reduces the middle axis of [pixels, tokens, heads], which lies
within a thread.

`write_kernel`: scores, softmax over tokens, residual, LayerNorm. One program per prompt and run of tiles of pixels.
With queries that all prompts share the scores are one product with a block-diagonal matrix of keys, else two, of X and
of pe. `write_fp32_kernel` is the same without tensor cores, a few channels and rows at a time.

Neither queries of the pixels nor scores are ever stored, nor is an image or its encoding repeated per prompt. Writing
and reading are not one kernel, because that one spills. Scores, softmax and LayerNorm are float32; shares of the
softmax are rounded to the type of the image. C is a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from sam_fast.kernels.launch import INTERPRETED, LOG2_E, TRITON_TYPES, WIDENED, Variant, architecture
from torch import Tensor

HEADS = 8
MOST_CHANNELS = 256
MOST_ROWS = 128  # that pixels take from
_WHOLE = 7 / 8  # of an image
_HEADS = tl.constexpr(HEADS)
_LOG2_E = tl.constexpr(LOG2_E)
_CHUNK = tl.constexpr(32)  # channels at a time of products without tensor cores
_FEW = tl.constexpr(16)  # rows at a time of these


class Launch(NamedTuple):
    """Sizes of a launch: pixels at a time, rows of a program, and Triton's options."""

    pixels: int
    rows: int
    warps: int
    boxes: bool = False  # pixels come, and go, by the copy engine of Hopper: no registers for addresses, no masks

    def constants(self) -> dict[str, Any]:
        """What kernels know of it."""
        return {"ROWS": self.rows, "PIXELS": self.pixels}

    def options(self) -> dict[str, int]:
        """What Triton knows of it."""
        return {"num_warps": self.warps, "num_stages": 1}


def write_launch(architecture: int, dtype: torch.dtype, rows: int) -> Launch:
    """How pixels take from that many rows, a power of two from 64 on."""
    if dtype == torch.float32:
        return Launch(16, rows, 4)
    warps = 4 if rows <= 64 else 8
    return Launch(64, rows, warps, boxes=True) if architecture >= 90 else Launch(32, rows, warps)


def write(
    written: Tensor,
    image: Tensor,
    pe: Tensor,
    keys: Tensor,
    constant: Tensor | None,
    offered: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> None:
    """Let pixels take from tokens.

    Args:
        written: output, [N, P, C].
        image: [N, P, C] or [1, P, C].
        pe: [P, C]; without `constant` queries of the pixels, [P, D].
        keys: absorbed ones [N, R, C]; without `constant` [N, T, D / 8, 8].
        constant: [N, R], or None.
        offered: [N, R, C]. All of these are contiguous and of one type, but for `constant`.
        bias, norm_weight, norm_bias: [C].
        eps: of the LayerNorm.
    """
    N, P, C = written.shape
    if written.numel() == 0:
        return
    D, R = pe.shape[1], offered.shape[1]
    launch = write_launch(architecture(image.device), image.dtype, padded(R))
    tiles = triton.cdiv(P, launch.pixels)
    each = tiles_each(tiles, N, image.device)
    grid = N, triton.cdiv(tiles, each)
    rest = (keys, constant, offered, bias, norm_weight, norm_bias, eps, int(len(image) > 1), P, R, each)
    sizes = {"C": C, "D": D, **launch.constants(), **launch.options()}
    if image.dtype == torch.float32:
        write_fp32_kernel[grid](written, image, pe, *rest, **sizes)
    elif launch.boxes:
        written, image, pe = (boxes(x, launch.pixels) for x in (written, image, pe))
        write_kernel[grid](written, image, pe, *rest, **sizes, BOXES=True)
    else:
        write_kernel[grid](written, image, pe, *rest, **sizes, BOXES=False)


@triton.jit(do_not_specialize=["image_step", "R", "tiles_each"])
def write_kernel(
    written,  # [N, P, C]; BOXES: its descriptor, as of the next two
    image,  # [N, P, C], or [1, P, C] with image_step 0
    pe,  # [P, C]; without constant the pixels' queries [P, D]
    keys,  # [N, R, C]; without constant [N, T, D / HEADS, HEADS]
    constant,  # [N, R] or None
    offered,  # [N, R, C]
    bias,  # [C]
    norm_weight,  # [C]
    norm_bias,  # [C]
    eps,
    image_step,
    P,
    R,
    tiles_each,
    C: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,  # R, padded
    PIXELS: tl.constexpr,  # of a tile
    BOXES: tl.constexpr,
):
    prompt = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C)
    r = tl.arange(0, ROWS)
    known = r < R
    offers = tl.load(offered + (prompt * R + r[:, None]) * C + c[None, :], mask=known[:, None], other=0.0)
    # A pixel's shares sum to 1 in each head.
    share_of_bias = tl.load(bias + c).to(tl.float32) / _HEADS
    v = (offers.to(tl.float32) + tl.where(known[:, None], share_of_bias[None, :], 0.0)).to(offers.dtype)
    k = keys_chunk(keys, prompt, 0, R, C, D, ROWS, D, constant is None)
    if WIDENED:
        k, v = k.to(tl.float32), v.to(tl.float32)

    first = tl.program_id(1) * tiles_each
    last = tl.minimum(first + tiles_each, tl.cdiv(P, PIXELS))
    for tile in range(first, last):
        place = load_pixels(pe, 0, tile, P, D, PIXELS, BOXES, True)
        s = tl.dot(place, k)
        x = load_pixels(image, prompt * image_step, tile, P, C, PIXELS, BOXES, False)
        if constant is None:
            s = tl.where(known[None, :], s, float("-inf"))
        else:
            s = tl.dot(x, k, s)
            s += tl.load(constant + prompt * R + r, mask=known, other=float("-inf")).to(tl.float32)[None, :]
        shares = _softmax_over_tokens(s, PIXELS, ROWS)
        y = _normalise(tl.dot(shares.to(v.dtype), v, x.to(tl.float32)), norm_weight, norm_bias, eps, C)
        if BOXES:
            box = tl.reshape(y.to(written.dtype), [1, PIXELS, C])
            written.store([tl.program_id(0), tile * PIXELS, 0], box)
        else:
            p = (tile * PIXELS + tl.arange(0, PIXELS))[:, None]
            tl.store(written + prompt * P * C + (p * C + c[None, :]), y.to(written.dtype.element_ty), mask=p < P)


@triton.jit(do_not_specialize=["image_step", "R", "tiles_each"])
def write_fp32_kernel(
    written, image, pe, keys, constant, offered, bias, norm_weight, norm_bias, eps, image_step, P, R, tiles_each,
    C: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """`write_kernel` without descriptors: arguments as there, all float32."""
    prompt = tl.program_id(0).to(tl.int64)
    image += prompt * image_step * P * C
    c = tl.arange(0, C)[None, :]
    r = tl.arange(0, ROWS)
    block = tl.arange(0, ROWS // _FEW)[None, :, None]
    first = tl.program_id(1) * tiles_each
    last = tl.minimum(first + tiles_each, tl.cdiv(P, PIXELS))
    for tile in range(first, last):
        p = (tile * PIXELS + tl.arange(0, PIXELS))[:, None]
        exists = p < P
        s = tl.zeros([PIXELS, ROWS], tl.float32)
        for begin in range(0, D, _CHUNK):
            d = tl.arange(0, _CHUNK)[None, :] + begin
            place = tl.load(pe + (p * D + d), mask=exists, other=0.0)
            if constant is not None:
                place += tl.load(image + (p * C + d), mask=exists, other=0.0)
            k = keys_chunk(keys, prompt, begin, R, C, D, ROWS, _CHUNK, constant is None)
            s = tl.dot(place, k, s, input_precision="ieee")
        if constant is None:
            s = tl.where((r < R)[None, :], s, float("-inf"))
        else:
            s += tl.load(constant + prompt * R + r, mask=r < R, other=float("-inf"))[None, :]
        shares = tl.reshape(_softmax_over_tokens(s, PIXELS, ROWS), [PIXELS, ROWS // _FEW, _FEW])
        y = tl.load(image + (p * C + c), mask=exists, other=0.0) + tl.load(bias + c)
        for b in range(0, ROWS // _FEW):
            row = (tl.arange(0, _FEW) + b * _FEW)[:, None]
            v = tl.load(offered + (prompt * R + row) * C + c, mask=row < R, other=0.0)
            y = tl.dot(tl.sum(tl.where(block == b, shares, 0.0), 1), v, y, input_precision="ieee")
        y = _normalise(y, norm_weight, norm_bias, eps, C)
        tl.store(written + prompt * P * C + (p * C + c), y, mask=exists)


@triton.jit
def keys_chunk(
    keys, prompt, begin, R,
    C: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """Channels `begin` to `begin` + COUNT of a prompt's keys, [COUNT, ROWS]; absorbed or as a block-diagonal matrix."""
    r = tl.arange(0, ROWS)
    if PROJECTED:
        # Keys of a head meet queries of that head; elsewhere the matrix is zero.
        d = tl.arange(0, COUNT)[:, None] + begin
        at = keys + (prompt * R + r[None, :] // _HEADS * _HEADS) * (D // _HEADS) + d
        k = tl.load(at, mask=(r < R)[None, :] & (d % _HEADS == r[None, :] % _HEADS), other=0.0)
    else:
        c = tl.arange(0, COUNT) + begin
        k = tl.load(keys + (prompt * R + r[:, None]) * C + c[None, :], mask=(r < R)[:, None], other=0.0)
        k = tl.trans(k)
    return k


@triton.jit
def load_pixels(
    source, index, tile, P, C: tl.constexpr, PIXELS: tl.constexpr, BOXES: tl.constexpr, FLAT: tl.constexpr
):  # fmt: skip
    """A tile [PIXELS, C] of image number `index` of [.., P, C], or of [P, C] if FLAT; beyond P, the last row or 0."""
    if BOXES:
        if FLAT:
            x = source.load([tile * PIXELS, 0])
        else:
            x = tl.reshape(source.load([index.to(tl.int32), tile * PIXELS, 0]), [PIXELS, C])
    else:
        p = tl.minimum(tile * PIXELS + tl.arange(0, PIXELS), P - 1)
        here = p[:, None] * C + tl.arange(0, C)[None, :]
        if not FLAT:
            source += index * P * C
        x = tl.load(source + here)
    if WIDENED:
        x = x.to(tl.float32)
    return x


@triton.jit
def _softmax_over_tokens(s, PIXELS: tl.constexpr, ROWS: tl.constexpr):
    """Softmax of scores [PIXELS, ROWS] over the tokens of each head."""
    s = tl.reshape(s, [PIXELS, ROWS // _HEADS, _HEADS])
    most = tl.max(s, 1) * _LOG2_E
    shares = tl.exp2(s * _LOG2_E - most[:, None, :])
    shares *= (1.0 / tl.sum(shares, 1))[:, None, :]
    return tl.reshape(shares, [PIXELS, ROWS])


@triton.jit
def _normalise(y, norm_weight, norm_bias, eps, C: tl.constexpr):
    """LayerNorm of rows [.., C]."""
    c = tl.arange(0, C)
    y -= (tl.sum(y, 1) / C)[:, None]
    scale = tl.rsqrt(tl.sum(y * y, 1) / C + eps)
    y = y * scale[:, None] * tl.load(norm_weight + c).to(tl.float32)[None, :]
    return y + tl.load(norm_bias + c).to(tl.float32)[None, :]


# -- what a launch and an ahead-of-time compilation have in common


def padded(rows: int) -> int:
    """Rows as a power of two."""
    return max(64, triton.next_power_of_2(rows))


@cache
def programs_at_a_time(device: torch.device) -> int:
    """How many programs a device runs: two per processor."""
    if INTERPRETED:
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def tiles_each(tiles: int, programs: int, device: torch.device) -> int:
    """How many of an image's tiles each of `programs` programs takes, or more of them, that all run at a time.

    Who is to take nearly all of an image takes all of it: a program for a tile or two would begin when others end.
    """
    each = triton.cdiv(tiles * programs, programs_at_a_time(device))
    return tiles if each >= _WHOLE * tiles else each


def boxes(x: Tensor, pixels: int) -> Any:
    """A descriptor of images [.., P, C], or of [P, C], by tiles of pixels."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [1] * (x.dim() - 2) + [pixels, x.shape[-1]])


SIZES = {"image_step": "i32", "P": "i32:16", "R": "i32", "tiles_each": "i32"}  # types of a kernel's arguments


def box_type(kind: str, pixels: int, C: int, flat: bool) -> str:
    """The type of a descriptor from `boxes`."""
    return f"tensordesc<{kind}[{pixels}, {C}]>" if flat else f"tensordesc<{kind}[1, {pixels}, {C}]>"


def variants(architecture: int) -> Iterator[Variant]:
    """All that the launch table can ask for, with the sizes of SAM's decoder."""
    for dtype in TRITON_TYPES:
        for rows in (64, MOST_ROWS):
            for projected in (True, False):
                yield _variant(architecture, dtype, rows, projected)


def _variant(architecture: int, dtype: torch.dtype, rows: int, projected: bool) -> Variant:
    launch = write_launch(architecture, dtype, rows)
    kind, C, D = TRITON_TYPES[dtype], MOST_CHANNELS, MOST_CHANNELS // 2 if projected else MOST_CHANNELS
    data = f"*{kind}:16"
    signature = {"written": data, "image": data, "pe": data, "keys": data, "constant": "*fp32:16", "offered": data}
    signature |= {"bias": data, "norm_weight": "*fp32:16", "norm_bias": "*fp32:16", "eps": "fp32", **SIZES}
    constants = {"C": C, "D": D, **launch.constants()}
    exact = dtype == torch.float32
    if not exact:
        constants["BOXES"] = launch.boxes
    if launch.boxes:
        signature |= dict.fromkeys(("written", "image"), box_type(kind, launch.pixels, C, flat=False))
        signature["pe"] = box_type(kind, launch.pixels, D, flat=True)
    if projected:
        del signature["constant"]
        constants["constant"] = None
    name = f"{'projected' if projected else 'absorbed'} {rows} {kind}"
    kernel = write_fp32_kernel if exact else write_kernel
    return Variant(name, kernel, signature, constants, launch.options(), not exact)
