"""From whatever a user calls an image to the input of the image encoder.

Two steps: `read_image` makes uint8 RGB [H,W,3] of arrays, tensors, Pillow images and files; `prepare_image` resizes
that and turns it into a tensor. Normalisation and padding belong to the model (`Sam.preprocess`).
"""

from __future__ import annotations

import os
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from sam_fast.utils.transforms import ResizeLongestSide

ImageLike: TypeAlias = "np.ndarray | torch.Tensor | Image.Image | str | os.PathLike[str]"

_IMAGE_FORMATS = ("RGB", "BGR")


def read_image(image: ImageLike, image_format: str = "RGB") -> np.ndarray:
    """Return an image as uint8 RGB.

    An alpha channel is dropped, not blended: the model sees the stored colours, as it does with `Image.convert("RGB")`.
    Gray becomes three equal channels. 16-bit gray from Pillow is scaled linearly, 65535 to 255. Files are turned
    upright by their EXIF orientation; Pillow images and arrays are taken as they are.

    Args:
        image: a numpy array [H,W], [H,W,1], [H,W,3] or [H,W,4], uint8, of any strides; a tensor [H,W], [1,H,W], [3,H,W]
            or [4,H,W], uint8, on any device; a Pillow image; or the path of an image file.
        image_format: "RGB" or "BGR", the order of the colour channels of an array or tensor. Pillow images and files
            know their own order, and it does not apply to them.

    Returns:
        uint8 [H,W,3], C-contiguous, RGB. It may share memory with `image`, and may be read-only.

    Raises:
        TypeError: not one of these kinds of image.
        ValueError: wrong dtype, shape or image_format, an empty image, or a file that is not a readable image.
        FileNotFoundError: there is no such file.
    """
    if image_format not in _IMAGE_FORMATS:
        raise ValueError(f"image_format must be one of {_IMAGE_FORMATS}, got {image_format!r}")
    if isinstance(image, np.ndarray):
        return _from_array(image, image_format)
    if isinstance(image, torch.Tensor):
        return _from_tensor(image, image_format)
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if isinstance(image, (str, os.PathLike)):
        return _from_file(image)
    raise TypeError(f"an image is a numpy array, a tensor, a Pillow image or a path, got {type(image).__name__}")


def prepare_image(image: np.ndarray, image_size: int) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
    """Resize an image to the model's input side, bit for bit as `ResizeLongestSide.apply_image` does.

    A side never gets shorter than 1 pixel, so very long and thin images work.

    Args:
        image: uint8 [H,W,3], RGB, from `read_image`.
        image_size: the input side S of the model in pixels.

    Returns:
        (tensor uint8 [1,3,h,w], input size (h, w) with max(h, w) = S, original size (H, W)).

    Raises:
        ValueError: not such an array.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image must be uint8 [H,W,3], got {image.dtype} {image.shape}")
    resized = ResizeLongestSide(image_size).apply_image(image)
    tensor = torch.from_numpy(resized).permute(2, 0, 1).contiguous()[None]
    return tensor, (resized.shape[0], resized.shape[1]), (image.shape[0], image.shape[1])


def _require_uint8(kind: str, dtype: object, is_uint8: bool) -> None:
    if not is_uint8:
        raise ValueError(
            f"{kind} must be uint8 with values 0 to 255, got {dtype}; "
            "for floats in [0, 1] pass (image * 255).round() as uint8"
        )


def _from_array(image: np.ndarray, image_format: str) -> np.ndarray:
    _require_uint8("an image array", image.dtype, image.dtype == np.uint8)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        looks_planar = image.ndim == 3 and image.shape[0] in (1, 3, 4)
        hint = "; for channels first use image.transpose(1, 2, 0)" if looks_planar else ""
        raise ValueError(f"an image array must be [H,W], [H,W,1], [H,W,3] or [H,W,4], got {image.shape}{hint}")
    if image.size == 0:
        raise ValueError(f"the image is empty: {image.shape}")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    colours = image[:, :, :3]
    return np.ascontiguousarray(colours[:, :, ::-1] if image_format == "BGR" else colours)


def _from_tensor(image: torch.Tensor, image_format: str) -> np.ndarray:
    _require_uint8("an image tensor", image.dtype, image.dtype == torch.uint8)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[0] not in (1, 3, 4)):
        looks_interleaved = image.ndim == 3 and image.shape[2] in (1, 3, 4)
        hint = "; for channels last use image.permute(2, 0, 1)" if looks_interleaved else ""
        raise ValueError(f"an image tensor must be [H,W], [1,H,W], [3,H,W] or [4,H,W], got {tuple(image.shape)}{hint}")
    array = image.cpu().numpy()
    return _from_array(array if image.ndim == 2 else array.transpose(1, 2, 0), image_format)


def _from_pillow(image: Image.Image) -> np.ndarray:
    if min(image.size) == 0:
        raise ValueError(f"the image is empty: {image.size[0]} x {image.size[1]} pixels")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow itself clips these at 255, which turns most 16-bit images white
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError("a Pillow image of mode I must hold values 0 to 65535; scale it to uint8 first")
        return _from_array(((gray * 255 + 32767) // 65535).astype(np.uint8), "RGB")
    if image.mode == "F":
        raise ValueError("a Pillow image of mode F (float) has no fixed range; scale it to uint8 first")
    try:
        return _from_array(np.asarray(image.convert("RGB")), "RGB")
    except ValueError as error:
        raise ValueError(f"a Pillow image of mode {image.mode} cannot be made RGB: {error}") from error


def _from_file(path: str | os.PathLike[str]) -> np.ndarray:
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            return _from_pillow(image)
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is not a readable image: {error}") from error
