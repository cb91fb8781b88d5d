"""Antialiased resize of a uint8 image, one axis at a time, and its way into the model's input.

out = (2^21 + sum_k weight[k] * pixel[start + k]) >> 22, in int32, clipped to 0..255: the fixed-point arithmetic of
Pillow, hence the same bytes. The taps of an axis come as a table [1 + K, target] int32, whose first row is `start`.

* `resize_axis_kernel` makes one pass, bytes to bytes. A program owns some rows and a stretch of bytes of each, so that
  neighbouring threads read neighbouring bytes; colours are interleaved.
* `preprocess_kernel` makes the last pass and goes on to (pixel - mean) / std in float32 and to zeros outside of the
  resized image. A program owns a tile of one channel of the model's input.

The official way resizes on the CPU and moves float pixels through memory four times; here bytes are read twice and the
input is written once. Offsets into images are 64 bits wide; sides are below 2^24.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from sam_fast.kernels.launch import TRITON_TYPES, Variant
from torch import Tensor

_ROWS, _COLUMNS = 4, 256
_OPTIONS = {"num_warps": 4}
_SIZES = ("height", "width", "target_height", "target_width", "taps")


def resize_axis(output: Tensor, image: Tensor, table: Tensor, vertical: bool) -> None:
    """One pass: image [H, W, 3] uint8 to output [h, W, 3] if vertical, else [H, w, 3]; table [1 + K, h or w] int32."""
    height, width, _ = output.shape
    grid = (triton.cdiv(height, _ROWS), triton.cdiv(3 * width, _COLUMNS))
    resize_axis_kernel[grid](
        output, image, table, image.shape[0], image.shape[1], height, width, len(table) - 1, vertical, _ROWS, _COLUMNS,
        **_OPTIONS,
    )  # fmt: skip


def preprocess(
    pixels: Tensor, image: Tensor, table: Tensor, mean: Tensor, std: Tensor, vertical: bool, reverse: bool
) -> None:
    """The last pass into pixels [3, S, S] of any floating format, normalised and padded with zeros.

    Args:
        pixels: [3, S, S], written.
        image: [H, W, 3] uint8, of the final size along the other axis.
        table: [1 + K, h or w] int32.
        mean, std: [3, 1, 1] float32, in the order of the channels of `pixels`.
        vertical: which axis this pass resizes.
        reverse: whether the channels of `pixels` are in the opposite order of those of `image`.
    """
    side = pixels.shape[-1]
    target = table.shape[1]
    height, width = (target, image.shape[1]) if vertical else (image.shape[0], target)
    grid = (triton.cdiv(side, _ROWS), triton.cdiv(side, _COLUMNS), 3)
    preprocess_kernel[grid](
        pixels, image, table, mean, std, side, image.shape[0], image.shape[1], height, width, len(table) - 1,
        vertical, reverse, _ROWS, _COLUMNS,
        **_OPTIONS,
    )  # fmt: skip


@triton.jit
def _resampled(
    image,  # [height, width, 3] uint8
    table,  # [1 + taps, target] int32
    y,  # [ROWS, 1] of the output
    x,  # [1, COLUMNS] of the output
    channel,  # scalar or [1, COLUMNS]
    inside,  # [ROWS, COLUMNS], which of them exist
    height,
    width,
    target,
    taps,
    VERTICAL: tl.constexpr,
):
    """Bytes [ROWS, COLUMNS] of the output of a pass, as int32."""
    along = y if VERTICAL else x
    length = height if VERTICAL else width
    exists = along < target
    start = tl.load(table + along, mask=exists, other=0)
    total = tl.full(inside.shape, 1 << 21, tl.int32)
    for k in range(taps):
        weight = tl.load(table + (1 + k) * target + along, mask=exists, other=0)
        row = start + k if VERTICAL else y
        column = x if VERTICAL else start + k
        offsets = row.to(tl.int64) * (3 * width) + (3 * column + channel)
        pixel = tl.load(image + offsets, mask=inside & (start + k < length), other=0)
        total += pixel.to(tl.int32) * weight
    return tl.minimum(tl.maximum(total >> 22, 0), 255)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["image"])
def resize_axis_kernel(
    output,  # [target_height, target_width, 3] uint8
    image,  # [height, width, 3] uint8
    table,  # [1 + taps, target_height or target_width] int32
    height,
    width,
    target_height,
    target_width,
    taps,
    VERTICAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    y = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    byte = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (y < target_height) & (byte < 3 * target_width)
    target = target_height if VERTICAL else target_width
    values = _resampled(image, table, y, byte // 3, byte % 3, inside, height, width, target, taps, VERTICAL)
    tl.store(output + y.to(tl.int64) * (3 * target_width) + byte, values.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=("side", *_SIZES), do_not_specialize_on_alignment=["image", "mean", "std"])
def preprocess_kernel(
    pixels,  # [3, side, side]
    image,  # [height, width, 3] uint8
    table,  # [1 + taps, target_height or target_width] int32
    mean,  # [3] float32
    std,  # [3] float32
    side,
    height,
    width,
    target_height,
    target_width,
    taps,
    VERTICAL: tl.constexpr,
    REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    channel = tl.program_id(2)
    source = 2 - channel if REVERSE else channel
    y = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (y < target_height) & (x < target_width)
    target = target_height if VERTICAL else target_width
    padding = (tl.program_id(0) * ROWS >= target_height) | (tl.program_id(1) * COLUMNS >= target_width)
    taps = tl.where(padding, 0, taps)
    values = _resampled(image, table, y, x, source, inside, height, width, target, taps, VERTICAL)
    # Rounded as IEEE 754 says, like PyTorch's division; the operator "/" is approximate.
    normalised = tl.div_rn(values.to(tl.float32) - tl.load(mean + channel), tl.load(std + channel))
    offsets = (channel * side + y).to(tl.int64) * side + x
    tl.store(pixels + offsets, tl.where(inside, normalised, 0.0), mask=(y < side) & (x < side))


def variants(architecture: int) -> Iterator[Variant]:
    """Both kernels along both axes, and the formats of the model's input."""
    tile = {"ROWS": _ROWS, "COLUMNS": _COLUMNS}
    sizes = dict.fromkeys(_SIZES, "i32")
    for axis, vertical in (("vertical", True), ("horizontal", False)):
        image = {"image": "*u8", "table": "*i32:16"}
        constants = {"VERTICAL": vertical, **tile}
        yield Variant(axis, resize_axis_kernel, {"output": "*u8:16", **image, **sizes}, constants, _OPTIONS)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            kind = TRITON_TYPES[dtype]
            signature = {"pixels": f"*{kind}:16", **image, "mean": "*fp32", "std": "*fp32", "side": "i32", **sizes}
            for order, reverse in (("", False), (" reversed", True)):
                name = f"{axis} into {kind}{order}"
                yield Variant(name, preprocess_kernel, signature, {**constants, "REVERSE": reverse}, _OPTIONS)
