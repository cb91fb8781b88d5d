"""From whatever a user calls an image to the input of the image encoder.

Two steps: `read_image` makes uint8 RGB [H,W,3] of arrays, tensors, Pillow images and files; `prepare_image` resizes
that and turns it into a tensor. Normalisation and padding belong to the model (`Sam.preprocess`).

On a GPU, `preprocess_images` does all of it there: the bytes of the original image are copied, and nothing waits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image

from sam_fast.modeling import Sam
from sam_fast.ops.resize import preprocess_image_
from sam_fast.utils.transforms import ResizeLongestSide

ImageLike: TypeAlias = "np.ndarray | torch.Tensor | Image.Image | str | os.PathLike[str]"

_IMAGE_FORMATS = ("RGB", "BGR")
EXIF_ORIENTATION = 0x0112  # the tag; 5 to 8 exchange height and width
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
    _require_format(image_format)
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


class ModelInput(NamedTuple):
    """Images as the image encoder takes them.

    pixels: [B, 3, S, S], normalised and padded.
    input_sizes: (h, w) of each image inside of its padding.
    original_sizes: (H, W) of each image before the resize.
    """

    pixels: torch.Tensor
    input_sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]


def preprocess_images(
    images: Sequence[ImageLike],
    model: Sam,
    image_format: str = "RGB",
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> ModelInput:
    """Resize, normalise and pad images on the model's device, as `Sam.preprocess(prepare_image(image))` would.

    A GPU's stream gets all of the work, copies from pinned memory included; the host waits for none of it.

    Args:
        images: what `read_image` takes, of any sizes; a tensor that is on the device stays there.
        model: whose input side, channel order and statistics these are; `preprocesses_plainly(model)` holds.
        image_format: channel order of arrays and tensors.
        dtype: of the result; float32, bfloat16 or float16.
        backend: of `preprocess_image_`.

    Raises:
        TypeError, ValueError: as `read_image`.
    """
    side = model.image_encoder.img_size
    pixels = torch.empty(len(images), 3, side, side, dtype=dtype, device=model.device)
    input_sizes, original_sizes = [], []
    for slot, image in zip(pixels, images, strict=True):
        uploaded, order = _upload(image, image_format, model.device)
        height, width, _ = uploaded.shape
        size = ResizeLongestSide.get_preprocess_shape(height, width, side)
        reverse = order != model.image_format
        preprocess_image_(slot, uploaded, size, model.pixel_mean, model.pixel_std, reverse=reverse, backend=backend)
        input_sizes.append(size)
        original_sizes.append((height, width))
    return ModelInput(pixels, input_sizes, original_sizes)


def preprocesses_plainly(model: Sam) -> bool:
    """Whether `preprocess_images` can stand in for the model's own `preprocess`, which somebody may have replaced."""
    if getattr(type(model), "preprocess", None) is not Sam.preprocess or "preprocess" in model.__dict__:
        return False
    statistics = (model.pixel_mean, model.pixel_std)
    plain = all(s.shape == (3, 1, 1) and s.dtype == torch.float32 and s.is_contiguous() for s in statistics)
    return plain and model.image_format in _IMAGE_FORMATS


def postprocesses_plainly(model: Sam) -> bool:
    """Whether masks may be made without the model's own `postprocess_masks`, which somebody may have replaced."""
    own = getattr(type(model), "postprocess_masks", None)
    return own is Sam.postprocess_masks and "postprocess_masks" not in model.__dict__


def _upload(image: ImageLike, image_format: str, device: torch.device) -> tuple[torch.Tensor, str]:
    """An image as uint8 [H,W,3] on a device, not waited for, and the order of its channels."""
    _require_format(image_format)
    if isinstance(image, torch.Tensor) and image.device.type != "cpu":
        _check_tensor(image)
        interleaved = image[:, :, None] if image.ndim == 2 else image.permute(1, 2, 0)
        colours = interleaved.expand(-1, -1, 3) if interleaved.shape[2] == 1 else interleaved[:, :, :3]
        return colours.to(device).contiguous(), image_format
    knows_its_order = not isinstance(image, (np.ndarray, torch.Tensor))
    array = read_image(image)
    # PyTorch keeps pinned memory for the next image, once the copy out of it is done.
    staged = torch.empty(array.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.copyto(staged.numpy(), array)
    return staged.to(device, non_blocking=True), "RGB" if knows_its_order else image_format


def _require_format(image_format: str) -> None:
    if image_format not in _IMAGE_FORMATS:
        raise ValueError(f"image_format must be one of {_IMAGE_FORMATS}, got {image_format!r}")


def _require_uint8(kind: str, dtype: object, is_uint8: bool) -> None:
    if not is_uint8:
        hint = "; for floats in [0, 1] pass (image * 255).round() as uint8" if "float" in str(dtype) else ""
        raise ValueError(f"{kind} must be uint8 with values 0 to 255, got {dtype}{hint}")


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


def _check_tensor(image: torch.Tensor) -> None:
    _require_uint8("an image tensor", image.dtype, image.dtype == torch.uint8)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[0] not in (1, 3, 4)):
        looks_interleaved = image.ndim == 3 and image.shape[2] in (1, 3, 4)
        hint = "; for channels last use image.permute(2, 0, 1)" if looks_interleaved else ""
        raise ValueError(f"an image tensor must be [H,W], [1,H,W], [3,H,W] or [4,H,W], got {tuple(image.shape)}{hint}")
    if image.numel() == 0:
        raise ValueError(f"the image is empty: {tuple(image.shape)}")


def _from_tensor(image: torch.Tensor, image_format: str) -> np.ndarray:
    _check_tensor(image)
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
            file.load()  # of a PNG, the EXIF may come after the pixels
            # Not ImageOps.exif_transpose: it writes the EXIF anew, which fails where some other tag is odd.
            turn = _UPRIGHT.get(file.getexif().get(EXIF_ORIENTATION))
            return _from_pillow(file if turn is None else file.transpose(turn))
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{os.fspath(path)} is not a readable image: {error}") from error
