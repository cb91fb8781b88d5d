"""Masks and prompts drawn over an image, with Pillow and numpy alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sam_fast.preprocess import ImageLike, read_image
from sam_fast.utils.amg import rle_to_mask

_GOLDEN_ANGLE = 137.50776  # degrees; successive multiples never come close to one another
_FOREGROUND, _BACKGROUND, _BOX = (48, 209, 88), (255, 69, 58), (255, 214, 10)
_LONGEST_SIDE = 65_500  # pixels, of a JPEG
_FILM_LIGHTNESS, _LINE_LIGHTNESS = (0.72, 0.62, 0.80), 0.93


def mask_color(index: int, lightness: float | None = None) -> tuple[int, int, int]:
    """Return the sRGB colour of mask `index`, 0..255 per channel.

    Hues are steps of the golden angle in Oklch, so that any two of a few dozen neighbours differ, at about equal
    chroma; lightness cycles through three levels unless it is given (0 black .. 1 white).

    Source: Björn Ottosson, "A perceptual color space for image processing", 2020.
    """
    level = _FILM_LIGHTNESS[index % 3] if lightness is None else lightness
    hue = np.deg2rad(20 + index * _GOLDEN_ANGLE)
    chroma = 0.16 if lightness is None else 0.06
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    lms = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_rgb @ (lms @ np.array([level, a, b])) ** 3, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = (round(255 * float(channel)) for channel in encoded)
    return red, green, blue


def draw_masks(
    image: ImageLike,
    masks: Sequence[Mapping[str, Any]] | Sequence[np.ndarray] | np.ndarray,
    *,
    alpha: float = 0.5,
    outline: bool = True,
) -> Image.Image:
    """Lay a film of its own colour over each mask, larger masks first, so that small ones stay visible on top.

    Args:
        image: anything that `read_image` takes, H x W pixels.
        masks: records of `SamAutomaticMaskGenerator` in any output mode, or bool masks, [N,H,W] or a list of [H,W].
        alpha: opacity of the film, 0 to 1.
        outline: also draw the border of each mask, inside the mask, as a light line.

    Returns:
        An RGB image, W x H.

    Raises:
        ValueError: a mask is not [H,W], or alpha is outside 0 to 1.
    """
    pixels = read_image(image)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    height, width = pixels.shape[:2]
    thickness = line_width(height, width)
    colors = pixels.copy()
    opacity = np.zeros((height, width, 1), np.float32)
    for index, mask in enumerate(_largest_first(masks, height, width)):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows) == 0:
            continue
        window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        inside = mask[window]
        colors[window][inside] = mask_color(index)
        opacity[window][inside] = alpha
        if outline:
            edge = inside & ~_eroded(mask, window, thickness)
            colors[window][edge] = mask_color(index, _LINE_LIGHTNESS)
            opacity[window][edge] = max(alpha, 0.9)
    blended = pixels + opacity * (colors.astype(np.float32) - pixels)
    return Image.fromarray(np.rint(blended).astype(np.uint8))


def draw_prompts(
    image: ImageLike,
    points: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    boxes: np.ndarray | None = None,
) -> Image.Image:
    """Draw point prompts (green with a plus: foreground, red with a minus: background) and box prompts (yellow).

    Args:
        image: anything that `read_image` takes.
        points: [K,2], XY, pixels of the image; those outside are not seen.
        labels: [K], 1 foreground, 0 background; all foreground if left out.
        boxes: [N,4], XYXY, pixels of the image.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: a shape is wrong or the numbers of points and labels differ.
    """
    canvas = Image.fromarray(read_image(image))
    spots = np.zeros((0, 2)) if points is None else np.asarray(points, np.float64)
    signs = np.ones(len(spots)) if labels is None else np.asarray(labels)
    frames = np.zeros((0, 4)) if boxes is None else np.asarray(boxes, np.float64)
    if spots.ndim != 2 or spots.shape[1] != 2 or signs.shape != spots.shape[:1]:
        raise ValueError(f"points must be [K, 2] with labels [K], got {spots.shape} and {signs.shape}")
    if frames.ndim != 2 or frames.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4], got {frames.shape}")
    thickness = line_width(canvas.height, canvas.width)
    draw = ImageDraw.Draw(canvas)
    beyond = thickness + 4  # lines there are not seen; Pillow draws them all the same, pixel by pixel
    largest = np.array([canvas.width, canvas.height, canvas.width, canvas.height]) + beyond
    for x0, y0, x1, y1 in np.clip(frames, -beyond, largest):
        x0, x1 = sorted((x0, x1))
        y0, y1 = sorted((y0, y1))
        # A dark casing keeps the line readable on any ground.
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(20, 20, 20), width=thickness + 3)
        draw.rectangle((x0, y0, x1, y1), outline=_BOX, width=thickness + 1)
    for (x, y), sign in zip(spots, signs, strict=True):
        _stamp(canvas, x, y, 3.0 * thickness + 3, positive=bool(sign == 1))
    return canvas


def beside(left: Image.Image, right: Image.Image, gap: int = 12) -> Image.Image:
    """Put two images side by side on white, their upper edges in line, `gap` pixels apart."""
    sheet = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + gap, 0))
    return sheet


def save_picture(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture as a JPEG, made smaller first where one side is longer than a JPEG's can be."""
    if max(picture.size) > _LONGEST_SIDE:
        picture = picture.copy()
        picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    picture.save(path, quality=92)


def line_width(height: int, width: int) -> int:
    """How many pixels wide a line is on an image of this size: about 1/300 of the shorter side."""
    return max(1, round(min(height, width) / 300))


def _largest_first(masks: Any, height: int, width: int) -> Iterator[np.ndarray]:
    """Bool masks [H,W] by descending area; RLEs are decoded one at a time, as all together may not fit in memory."""
    entries = [entry["segmentation"] if isinstance(entry, Mapping) else entry for entry in masks]
    areas = []
    for entry in entries:
        mask = _decoded(entry)
        if mask.shape != (height, width):
            raise ValueError(f"masks must be {height} x {width} like the image, got {mask.shape}")
        areas.append(int(mask.sum()))
    for index in np.argsort(areas, kind="stable")[::-1]:
        yield _decoded(entries[index])


def _decoded(segmentation: Any) -> np.ndarray:
    if not isinstance(segmentation, Mapping):
        return np.asarray(segmentation) != 0
    return rle_to_mask(dict(segmentation))


def _eroded(mask: np.ndarray, window: tuple[slice, slice], radius: int) -> np.ndarray:
    """The pixels of `mask[window]` with only mask in the square of this radius; beyond the image counts as mask."""
    margins = [
        (max(0, side.start - radius), min(length, side.stop + radius))
        for side, length in zip(window, mask.shape, strict=True)
    ]
    (top, bottom), (left, right) = margins
    padding = [
        (radius - (side.start - low), radius - (high - side.stop))
        for side, (low, high) in zip(window, margins, strict=True)
    ]
    padded = np.pad(mask[top:bottom, left:right], padding, constant_values=True)
    rows, columns = (side.stop - side.start for side in window)
    across = np.logical_and.reduce([padded[:, shift : shift + columns] for shift in range(2 * radius + 1)])
    return np.logical_and.reduce([across[shift : shift + rows] for shift in range(2 * radius + 1)])


def _stamp(canvas: Image.Image, x: float, y: float, radius: float, *, positive: bool) -> None:
    """Paste a round antialiased marker with a white rim and a plus or minus, centred on pixel position (x, y)."""
    rim = 0.28 * radius
    reach = int(np.ceil(radius + rim)) + 1
    if not (-reach <= x <= canvas.width + reach and -reach <= y <= canvas.height + reach):  # also for NaN
        return
    left, top = int(np.floor(x)) - reach, int(np.floor(y)) - reach
    dy, dx = np.mgrid[0 : 2 * reach + 1, 0 : 2 * reach + 1].astype(np.float64)
    dx += left - x
    dy += top - y
    distance = np.hypot(dx, dy)
    bar, arm = 0.14 * radius, 0.55 * radius
    glyph = _coverage(arm - np.abs(dx)) * _coverage(bar - np.abs(dy))
    if positive:
        glyph = np.maximum(glyph, _coverage(bar - np.abs(dx)) * _coverage(arm - np.abs(dy)))
    white = np.maximum(glyph, _coverage(distance - radius))[..., None]
    color = np.array(_FOREGROUND if positive else _BACKGROUND)
    sprite = Image.fromarray(np.rint(color + white * (255 - color)).astype(np.uint8))
    shape = Image.fromarray(np.rint(255 * _coverage(radius + rim - distance)).astype(np.uint8))
    canvas.paste(sprite, (left, top), shape)


def _coverage(signed_distance: np.ndarray) -> np.ndarray:
    """How much of a pixel lies inside an edge, given its centre's distance to the edge (inside is positive)."""
    return np.clip(signed_distance + 0.5, 0, 1)
