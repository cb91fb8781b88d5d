"""Files of annotated data: JSON, and images whose size must be what the annotations say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam_fast.preprocess import EXIF_ORIENTATION, read_image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} is not readable JSON: {error}") from error


def read_annotated_image(
    path: Path, size: tuple[int, int] | None, annotated_in: str | os.PathLike[str], *, upright: bool
) -> np.ndarray:
    """Read an image whose annotations give its size.

    Args:
        path: the image file.
        size: (H, W) by the annotations; None if they do not say.
        annotated_in: the file that says so, for the error.
        upright: turn the image by its EXIF orientation. Without it the pixels are taken as they are stored.

    Returns:
        uint8 [H, W, 3], RGB, writable.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a readable image, or its size is another one.
    """
    try:
        with Image.open(path) as file:
            orientation = file.getexif().get(EXIF_ORIENTATION, 1)
            image = read_image(path) if upright else read_image(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}, which {os.fspath(annotated_in)} describes, does not exist") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        unreadable = f"{path} is not a readable image"
        said = str(error)  # by read_image, if the file was opened by it
        raise ValueError(said if said.startswith(unreadable) else f"{unreadable}: {said}") from error
    if size is not None and image.shape[:2] != size:
        raise ValueError(_wrong_size(path, image, size, annotated_in, orientation in (5, 6, 7, 8), upright))
    return np.require(image, requirements=["C", "W"])


def _wrong_size(
    path: Path, image: np.ndarray, size: tuple[int, int], annotated_in: Any, turned: bool, upright: bool
) -> str:
    height, width = image.shape[:2]
    message = (
        f"{path} is {height} x {width} pixels (height x width), "
        f"but {os.fspath(annotated_in)} is about {size[0]} x {size[1]}"
    )
    if turned and (width, height) == size:
        message += (
            "; the annotations belong to the pixels as stored: leave out upright"
            if upright
            else "; the annotations belong to the image turned by its EXIF orientation: use upright"
        )
    return message
