"""Pillow's antialiased bilinear resize of uint8 images, and with it the way into the model's input.

Two passes, one per axis, with bytes in between. A pixel of a pass is the sum of its taps with 22-bit fixed-point
weights of a triangle, which is as wide as one pixel of the coarser of the two grids. The bytes are Pillow's; on a CPU
Pillow is the fastest way to them (`preprocess.prepare_image`), on a GPU the Triton kernels are.

Source: Pillow, Image.resize with Resampling.BILINEAR.
"""

from __future__ import annotations

import math
from functools import lru_cache
from numbers import Integral
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register

_FRACTION_BITS = 22
_LONGEST_SIDE = (1 << 24) - 1  # float32, in which Pillow keeps the frame, is exact up to here
_PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])  # the order of its passes depends on it


def resize(image: Tensor, size: tuple[int, int], *, backend: str = "auto") -> Tensor:
    """Resize an image, bit for bit as Pillow does with its antialiased bilinear filter.

    Args:
        image: [H, W, 3] uint8.
        size: (h, w) of the result, in pixels.
        backend: "auto", "triton" or "torch".

    Returns:
        A new tensor [h, w, 3] uint8.

    Raises:
        TypeError: image is not a tensor, or a size no integer.
        ValueError: wrong dtype, shape or size.
        RuntimeError: the backend is not available here.
    """
    height, width = _validate("resize", image, size)
    if torch.compiler.is_compiling():
        return torch.ops.sam_fast.resize(image, height, width, backend)
    return _resize(image, height, width, backend)


def preprocess_image_(
    pixels: Tensor,
    image: Tensor,
    size: tuple[int, int],
    mean: Tensor,
    std: Tensor,
    *,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Resize an image, normalise it, (x - mean) / std in float32, and pad it with zeros, bottom and right.

    Args:
        pixels: [3, S, S] float32, bfloat16 or float16, contiguous; written.
        image: [H, W, 3] uint8.
        size: (h, w) of the resized image inside of `pixels`, at most S each.
        mean, std: [3, 1, 1] float32, of values 0..255, by channel of `pixels`.
        reverse: the channels of `image` are in the opposite order, BGR for RGB.
        backend: "auto", "triton" or "torch".

    Returns:
        pixels.

    Raises:
        TypeError, ValueError, RuntimeError: as `resize`.
    """
    height, width = _validate("preprocess_image_", image, size)
    side = pixels.shape[-1]
    if pixels.shape != (3, side, side) or not pixels.is_contiguous() or max(height, width) > side:
        raise ValueError(
            f"preprocess_image_: pixels must be contiguous [3, S, S] with S >= {max(height, width)}, "
            f"got {tuple(pixels.shape)}"
        )
    if pixels.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"preprocess_image_: pixels must be float32, bfloat16 or float16, got {pixels.dtype}")
    for name, statistic in (("mean", mean), ("std", std)):
        if statistic.shape != (3, 1, 1) or statistic.dtype != torch.float32 or not statistic.is_contiguous():
            raise ValueError(
                f"preprocess_image_: {name} must be contiguous float32 [3, 1, 1], "
                f"got {statistic.dtype} {tuple(statistic.shape)}"
            )
    if torch.compiler.is_compiling():
        torch.ops.sam_fast.preprocess_image_(pixels, image, height, width, mean, std, reverse, backend)
    else:
        _preprocess(pixels, image, height, width, mean, std, reverse, backend)
    return pixels


def resize_reference(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`resize` in plain PyTorch; validated arguments."""
    for axis in _passes(image.shape[0], image.shape[1], *size):
        image = _resize_axis(image, axis, size[axis])
    return image


def preprocess_image_reference(
    pixels: Tensor, image: Tensor, size: tuple[int, int], mean: Tensor, std: Tensor, reverse: bool = False
) -> Tensor:
    """`preprocess_image_` in plain PyTorch; validated arguments."""
    resized = resize_reference(image, size).permute(2, 0, 1)
    resized = resized.flip(0) if reverse else resized
    pixels.zero_()
    pixels[:, : size[0], : size[1]] = (resized - mean) / std
    return pixels


def _passes(source_height: int, source_width: int, height: int, width: int) -> list[int]:
    """The axes to resize, 0 vertical and 1 horizontal, in Pillow's order; the result depends on it.

    The horizontal pass comes first, but since Pillow 12.2 not for very tall images that shrink in height, and since 13
    not where the height shrinks by much more than the width.
    """
    vertical_first = source_height > height and (
        (_PILLOW >= (13, 0) and source_height - height > 2 * (source_width - width))
        or ((12, 2) <= _PILLOW < (13, 0) and source_height > 100 * source_width)
    )
    axes = {0: source_height != height, 1: source_width != width}
    return [axis for axis in ((0, 1) if vertical_first else (1, 0)) if axes[axis]]


@lru_cache(maxsize=256)
def _taps(source: int, target: int, pinned: bool) -> Tensor:
    """Where the taps of each pixel begin, then their weights times 2^22: int32 [1 + K, target], on the CPU.

    It goes to the device with every image rather than stay there, so that no stream waits for another one's copy.
    """
    scale = source / target
    width = max(scale, 1.0)  # of the triangle, from its middle
    centre = (np.arange(target) + 0.5) * scale
    start = np.maximum((centre - width + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + width + 0.5).astype(np.int64), source)
    position = start + np.arange(math.ceil(width) * 2 + 1)[:, None]
    distance = np.abs((position - centre + 0.5) * (1.0 / width))
    weights = np.where(position < stop, np.maximum(1.0 - distance, 0.0), 0.0)
    weights /= np.cumsum(weights, axis=0)[-1]  # one by one: the last bit of a sum depends on its order
    rounded = (0.5 + weights * (1 << _FRACTION_BITS)).astype(np.int64)
    used = rounded.any(1).nonzero()[0][-1] + 1
    table = torch.from_numpy(np.concatenate([start[None], rounded[:used]]).astype(np.int32))
    return table.pin_memory() if pinned else table


def _table(source: int, target: int, device: torch.device) -> Tensor:
    return _taps(source, target, device.type == "cuda").to(device, non_blocking=True)


def _resize_axis(image: Tensor, axis: int, target: int) -> Tensor:
    """One pass over [H, W, 3] uint8, along axis 0 or 1."""
    source = image.shape[axis]
    start, *weights = _table(source, target, image.device).unbind()
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    total: Tensor | int = 1 << (_FRACTION_BITS - 1)
    for k, weight in enumerate(weights):
        tap = image.index_select(axis, (start + k).clamp(max=source - 1))
        total = total + tap.int() * weight.view(shape)
    assert isinstance(total, Tensor)
    return (total >> _FRACTION_BITS).clamp(0, 255).to(torch.uint8)


def _validate(name: str, image: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """Check the arguments; return the size as integers."""
    if not isinstance(image, Tensor):
        raise TypeError(f"{name}: image must be a torch.Tensor, got {type(image).__name__}")
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] != 3:
        raise ValueError(f"{name}: image must be [H, W, 3] uint8, got {image.dtype} {tuple(image.shape)}")
    if len(size) != 2:
        raise ValueError(f"{name}: size must be (height, width), got {tuple(size)}")
    if not all(isinstance(side, (Integral, torch.SymInt)) for side in size):
        raise TypeError(f"{name}: size must be integers, got {tuple(size)}")
    height, width = int(size[0]), int(size[1])
    if not all(0 < side <= _LONGEST_SIDE for side in (*image.shape[:2], height, width)):
        raise ValueError(
            f"{name}: sides must be in 1..2**24-1, got {tuple(image.shape[:2])} to be resized to {(height, width)}"
        )
    return height, width


def _resize(image: Tensor, height: int, width: int, backend: str) -> Tensor:
    """The implementation behind function and operator."""
    passes = _passes(image.shape[0], image.shape[1], height, width)
    if not passes:
        return image.clone(memory_format=torch.contiguous_format)
    if choose_backend("resize", backend, image) == "torch":
        return resize_reference(image, (height, width))
    return _passes_by_triton(image.contiguous(), (height, width), passes)


def _passes_by_triton(image: Tensor, size: tuple[int, int], passes: list[int]) -> Tensor:
    from sam_fast.kernels import resize as kernels

    with torch.cuda.device_of(image):
        for axis in passes:
            shape = list(image.shape)
            shape[axis] = size[axis]
            output = image.new_empty(shape)
            table = _table(image.shape[axis], size[axis], image.device)
            kernels.resize_axis(output, image, table, vertical=axis == 0)
            image = output
    return image


def _preprocess(
    pixels: Tensor,
    image: Tensor,
    height: int,
    width: int,
    mean: Tensor,
    std: Tensor,
    reverse: bool,
    backend: str,
) -> None:
    """The implementation behind function and operator."""
    if choose_backend("resize", backend, pixels, image, mean, std) == "torch":
        preprocess_image_reference(pixels, image, (height, width), mean, std, reverse)
        return
    from sam_fast.kernels import resize as kernels

    # The last pass is part of the kernel; where nothing is to be resized, it is one with a single tap of weight 1.
    *first, last = _passes(image.shape[0], image.shape[1], height, width) or [0]
    image = _passes_by_triton(image.contiguous(), (height, width), first)
    with torch.cuda.device_of(pixels):
        table = _table(image.shape[last], (height, width)[last], pixels.device)
        kernels.preprocess(pixels, image, table, mean, std, vertical=last == 0, reverse=reverse)


def _resize_fake(image: Tensor, height: int, width: int, backend: str) -> Tensor:
    return image.new_empty((height, width, 3))


def _preprocess_fake(*_: Any) -> None:
    return None


register("resize(Tensor image, int height, int width, str backend) -> Tensor", _resize, _resize_fake)
register(
    "preprocess_image_(Tensor(a!) pixels, Tensor image, int height, int width, Tensor mean, Tensor std, bool reverse, "
    "str backend) -> ()",
    _preprocess,
    _preprocess_fake,
)
