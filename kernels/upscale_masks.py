"""The end of the mask decoder: both transposed convolutions, LayerNorm, GELU and the classifiers, in one kernel.

A transposed convolution whose stride is its kernel's side is a product per position of the square that it makes. One
program per prompt and run of tiles of pixels: for each of the four positions in the first square, product with C1
columns, LayerNorm, GELU, product with C2 columns of both rows of the second square, GELU, and a product with the
classifiers as a block-diagonal matrix, whose columns are mask 2 + column of the second square. Programs of prompts
without a mask that is wanted end at once: which masks are, is read from memory, and nobody waits for it.

Upscaled pixels, 16 C2 per pixel of the image, are never stored: PyTorch writes and reads them and their predecessors,
30 MB per prompt. Sums and LayerNorm are float32. In half precision GELU is the one by tanh, whose error is an eighth of
a rounding to bfloat16, and in float16 two at a time; in float32 the one by erf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from sam_fast.kernels.gelu import gelu_of_double, gelu_of_double_in_pairs
from sam_fast.kernels.launch import TRITON_TYPES, WIDENED, Variant, architecture
from sam_fast.kernels.two_way_attention import (
    MOST_CHANNELS,
    Launch,
    box_type,
    boxes,
    load_pixels,
    programs_at_a_time,
)
from torch import Tensor

_CHUNK = tl.constexpr(32)  # channels at a time of products without tensor cores
MOST_MASKS = 16  # per prompt


def upscale_launch(architecture: int, dtype: torch.dtype) -> Launch:
    """How pixels are upscaled."""
    if dtype == torch.float32:
        return Launch(32, 0, 4)
    return Launch(128, 0, 8, boxes=True) if architecture >= 90 else Launch(64, 0, 4)


def upscale(
    logits: Tensor,
    rows: Tensor | None,
    image: Tensor,
    width: int,
    first: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor, float],
    second: tuple[Tensor, Tensor],
    classifiers: Tensor,
) -> None:
    """Write the masks of N prompts.

    Args:
        logits: output, float32 [K, 4h, 4w].
        rows: int32 [N, M], which of the K rows a mask goes to, -1 or K and more for none; or None for the K = N M masks
            in order.
        image: [N, P, C], P = h w.
        width: w.
        first: weight [4 C1, C] and bias [C1], of the type of the image. All of these are contiguous.
        norm: weight and bias [C1], epsilon.
        second: weight [4 C2, C1] and bias [C2], of that type.
        classifiers: float32 [N, M, C2].
    """
    N, M, _ = classifiers.shape
    P, C = image.shape[1:]
    if logits.numel() == 0 or classifiers.numel() == 0:
        return
    launch = upscale_launch(architecture(image.device), image.dtype)
    tiles = triton.cdiv(P, launch.pixels)
    each = triton.cdiv(tiles * N, 4 * programs_at_a_time(image.device))  # many, for those of skipped prompts are short
    upscale_kernel[(N, triton.cdiv(tiles, each))](
        *(logits, rows, boxes(image, launch.pixels) if launch.boxes else image),
        *(*first, *norm, *second, classifiers, P, width, M, logits.numel() // (16 * P), each),
        **_constants(C, M, image.dtype, launch),
        **launch.options(),
    )


@triton.jit(do_not_specialize=["M", "K", "tiles_each"])
def upscale_kernel(
    logits,  # float32 [K, 4h, 4w]
    rows,  # int32 [N, M] or None
    image,  # [N, P, C]; BOXES: its descriptor
    first_weight,  # [4 C1, C]
    first_bias,  # [C1]
    norm_weight,  # [C1]
    norm_bias,  # [C1]
    eps,
    second_weight,  # [4 C2, C1]
    second_bias,  # [C2]
    classifiers,  # float32 [N, M, C2]
    P,
    width,
    M,
    K,
    tiles_each,
    C: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    MASKS: tl.constexpr,  # M, padded
    PIXELS: tl.constexpr,  # of a tile
    BOXES: tl.constexpr,
    EXACT: tl.constexpr,  # float32
    PAIRS: tl.constexpr,  # float16
):
    prompt = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, MASKS)
    row = prompt * M + m
    if rows is not None:
        row = tl.load(rows + row, mask=m < M, other=-1).to(tl.int64)
    row = tl.where((m < M) & (row < K), row, -1)
    if tl.max(row, 0) < 0:
        return
    # Classifiers [2 C2, 2 MASKS]: those of a column of the second square meet pixels of that column.
    pair = tl.arange(0, 2 * C2)[:, None]
    out = tl.arange(0, 2 * MASKS)[None, :]
    at = classifiers + (prompt * M + out // 2) * C2 + pair % C2
    hyper = tl.load(at, mask=(out // 2 < M) & (pair // C2 == out % 2), other=0.0)
    low = hyper
    scale = 1.0
    if PAIRS:  # classifiers of any size
        scale = tl.max(tl.abs(hyper), 0)
        scale = tl.where(scale > 0.0, scale, 1.0)
        hyper = (hyper / scale[None, :]).to(tl.float16)
        if WIDENED:
            hyper = hyper.to(tl.float32)
    elif not (EXACT or WIDENED):  # two numbers of 8 digits for each, lest all of a mask's logits be off together
        high = hyper.to(first_weight.dtype.element_ty)
        low = (hyper - high.to(tl.float32)).to(high.dtype)
        hyper = high
    to = logits + row * (16 * P)

    first = tl.program_id(1) * tiles_each
    last = tl.minimum(first + tiles_each, tl.cdiv(P, PIXELS))
    for tile in range(first, last):
        p = tile * PIXELS + tl.arange(0, PIXELS)
        corner = (p // width * 4) * (4 * width) + p % width * 4
        if not EXACT:
            x = load_pixels(image, prompt, tile, P, C, PIXELS, BOXES, False)
        for square in range(0, 4):
            if EXACT:
                a = _long_product(image + prompt * P * C, first_weight + square * C1 * C, p, P, C, C1, PIXELS)
            else:
                a = tl.dot(x, _matrix(first_weight, square * C1, C, C1))
            a = _gelu_of_double(_half_normalised(a, first_bias, norm_weight, norm_bias, eps, C1), hyper, EXACT, PAIRS)
            for down in range(0, 2):
                b = tl.dot(a, _matrix(second_weight, down * 2 * C2, C1, 2 * C2), input_precision="ieee")
                bias = tl.load(second_bias + tl.arange(0, 2 * C2) % C2).to(tl.float32)
                b = _gelu_of_double(b * 0.5 + bias[None, :] * 0.5, hyper, EXACT, PAIRS)
                masks = tl.dot(b, hyper, input_precision="ieee")
                if PAIRS:
                    masks *= scale[None, :]
                elif not (EXACT or WIDENED):
                    masks = tl.dot(b, low, masks)
                masks = tl.reshape(masks, [PIXELS, MASKS, 2])
                here = corner + (square // 2 * 2 + down) * (4 * width) + square % 2 * 2
                addresses = to[None, :, None] + here[:, None, None] + tl.arange(0, 2)[None, None, :]
                tl.store(addresses, masks, mask=(p < P)[:, None, None] & (row >= 0)[None, :, None])


@triton.jit
def _matrix(weight, begin, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Rows `begin` to `begin` + OUTPUTS of a weight [.., INPUTS], transposed."""
    o, i = begin + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    w = tl.load(weight + (o[:, None] * INPUTS + i[None, :]))
    if WIDENED:
        w = w.to(tl.float32)
    return tl.trans(w)


@triton.jit
def _long_product(x, weight, p, P, C: tl.constexpr, C1: tl.constexpr, PIXELS: tl.constexpr):
    """Pixels p of x [P, C] times a weight [C1, C], transposed: a few channels at a time."""
    o = tl.arange(0, C1)[:, None]
    a = tl.zeros([PIXELS, C1], tl.float32)
    for begin in range(0, C, _CHUNK):
        c = tl.arange(0, _CHUNK)[None, :] + begin
        some = tl.load(x + (p[:, None] * C + c), mask=(p < P)[:, None], other=0.0)
        a = tl.dot(some, tl.trans(tl.load(weight + (o * C + c))), a, input_precision="ieee")
    return a


@triton.jit
def _half_normalised(a, first_bias, norm_weight, norm_bias, eps, C1: tl.constexpr):
    """Half of the LayerNorm of rows a + first_bias."""
    c = tl.arange(0, C1)
    a += tl.load(first_bias + c).to(tl.float32)[None, :]
    a -= (tl.sum(a, 1) / C1)[:, None]
    scale = tl.rsqrt(tl.sum(a * a, 1) / C1 + eps)
    weight, bias = tl.load(norm_weight + c).to(tl.float32), tl.load(norm_bias + c).to(tl.float32)
    return a * scale[:, None] * weight[None, :] * 0.5 + bias[None, :] * 0.5


@triton.jit
def _gelu_of_double(h, like, EXACT: tl.constexpr, PAIRS: tl.constexpr):
    """GELU of 2 h as an operand of a product with `like`."""
    y = gelu_of_double_in_pairs(h) if PAIRS else gelu_of_double(h, EXACT)
    return y.to(like.dtype)


def _constants(C: int, masks: int, dtype: torch.dtype, launch: Launch) -> dict[str, Any]:
    return {
        "C": C,
        "C1": C // 4,
        "C2": C // 8,
        "MASKS": max(4, triton.next_power_of_2(masks)),
        "PIXELS": launch.pixels,
        "BOXES": launch.boxes,
        "EXACT": dtype == torch.float32,
        "PAIRS": dtype == torch.float16,
    }


def variants(architecture: int) -> Iterator[Variant]:
    """All that the launch table can ask for, with the sizes of SAM's decoder, for few masks and for the most."""
    for dtype in TRITON_TYPES:
        for masks in (4, MOST_MASKS):
            for chosen in (True, False):
                yield _variant(architecture, dtype, masks, chosen)


def _variant(architecture: int, dtype: torch.dtype, masks: int, chosen: bool) -> Variant:
    launch = upscale_launch(architecture, dtype)
    kind, exact = TRITON_TYPES[dtype], dtype == torch.float32
    names = ("image", "first_weight", "first_bias", "second_weight", "second_bias")
    signature = {"logits": "*fp32:16", "classifiers": "*fp32:16", **dict.fromkeys(names, f"*{kind}:16"), "eps": "fp32"}
    signature |= {"norm_weight": "*fp32:16", "norm_bias": "*fp32:16", "P": "i32:16", "width": "i32:16"}
    signature |= {"M": "i32", "K": "i32", "tiles_each": "i32"}
    constants = _constants(MOST_CHANNELS, masks, dtype, launch)
    if launch.boxes:
        signature["image"] = box_type(kind, launch.pixels, MOST_CHANNELS, flat=False)
    if chosen:
        signature["rows"] = "*i32:16"
    else:
        constants["rows"] = None
    name = f"{masks} masks{', chosen' if chosen else ''}, {kind}"
    return Variant(name, upscale_kernel, signature, constants, launch.options(), not exact)
