"""What gives the textures of training scenes more variety than their few photos have: mixtures, hues and collages.

A model that sees ten photos again and again learns where their edges are, and takes those of others for outlines.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sam_fast.data.draws import pick, uniform

_COLLAGE = 384  # pixels of a collage's side
_PIECES = 36  # of a collage
_GRAY_AXIS = np.full((3, 3), 1 / 3)
_ROTATION = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)  # around the gray axis, by a right angle


def collage(rng: np.random.Generator, pictures: list[Image.Image]) -> Image.Image:
    """Cuttings of pictures that cover one another, in other colours: [384, 384] RGB. Its edges are no outlines."""
    sheet = Image.new("RGB", (_COLLAGE, _COLLAGE))
    low, high = pick(rng, (0.05, 0.1, 0.2)), uniform(rng, 0.25, 0.6)
    for number in range(_PIECES):
        radius = _COLLAGE * (1.5 if number == 0 else low + (high - low) * rng.random() ** 2)  # the first covers all
        x, y = rng.uniform(0, _COLLAGE, 2).tolist()
        left, top, right, bottom = (
            int(min(max(at, 0), _COLLAGE)) for at in (x - radius, y - radius, x + radius, y + radius)
        )
        piece, outline = _colored(rng, pictures), _outline(rng, x - left, y - top, radius)
        mask = Image.new("L", (right - left, bottom - top), 0 if number else 255)
        if number:
            ImageDraw.Draw(mask).polygon(outline, fill=255)
        sheet.paste(piece.resize(mask.size, Image.Resampling.BILINEAR), (left, top), mask)
    return sheet.filter(ImageFilter.GaussianBlur(uniform(rng, 0.4, 1.2)))


def _colored(rng: np.random.Generator, pictures: list[Image.Image]) -> Image.Image:
    """A quarter of a picture, or less, between two random colours or in other hues."""
    picture = pictures[int(rng.integers(len(pictures)))]
    share, at, plain = uniform(rng, 0.1, 0.5), rng.random(2), rng.random() < 0.5
    width, height = (max(1, int(share * side)) for side in picture.size)
    left, top = (int(place * (side - own)) for place, side, own in zip(at, picture.size, (width, height), strict=True))
    piece = picture.crop((left, top, left + width, top + height))
    vivid, dark, matrix = rng.random() ** 1.5, rng.uniform(0, 255, 3), hues(rng)
    dark = dark.mean() + vivid * (dark - dark.mean())
    if piece.mode == "RGB" and not plain:
        return piece.convert("RGB", matrix)
    table = np.linspace(dark, dark + rng.normal(0, 60, 3), 256).clip(0, 255).astype(np.uint8)
    gray = piece.convert("L")
    gray.putpalette(table.tobytes())
    return gray.convert("RGB")


def _outline(rng: np.random.Generator, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """A polygon with few corners, or a round one."""
    corners = int(pick(rng, (3, 4, 5, 7, 24)))
    angle = 2 * np.pi * (np.arange(corners) / corners + rng.random())
    reach = radius * (rng.uniform(0.5, 1, corners) if corners < 24 else np.full(corners, 0.9))
    return list(zip((x + reach * np.cos(angle)).tolist(), (y + reach * np.sin(angle)).tolist(), strict=True))


def hues(rng: np.random.Generator) -> tuple[float, ...]:
    """A matrix of `Image.convert` from RGB to RGB: hues are turned, colours and channels made stronger or weaker."""
    angle, saturation = uniform(rng, -np.pi, np.pi), uniform(rng, 0.2, 1.5)
    turned = np.cos(angle) * (np.eye(3) - _GRAY_AXIS) + np.sin(angle) * _ROTATION
    matrix = (_GRAY_AXIS + saturation * turned) * rng.uniform(0.75, 1.25, (3, 1))
    return tuple(np.concatenate([matrix, np.zeros((3, 1))], axis=1).ravel().tolist())


def cut_turned(rng: np.random.Generator, picture: Image.Image, width: int, height: int, scale: float) -> Image.Image:
    """A crop of a picture at any angle, stretched and mirrored, to fill a window of width x height pixels.

    Args:
        rng: draws place, angle and stretch.
        picture: any mode.
        width, height: pixels of the window.
        scale: pixels of the picture per pixel of the window; less where the picture is too small.
    """
    angle, stretch = uniform(rng, 0, 2 * np.pi), np.exp(uniform(rng, -0.5, 0.5))
    if scale >= 2:  # `transform` takes single pixels
        picture, scale = picture.reduce(int(scale)), scale / int(scale)
    mirror, x, y = pick(rng, (-1, 1)), rng.random(), rng.random()
    axes = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    axes = axes * (mirror * stretch**0.5, stretch**-0.5)
    extent = np.abs(axes) @ (width, height)
    fit = min(1.0, *(0.999 * np.array(picture.size) / extent).tolist())
    axes, extent = axes * fit, extent * fit
    center = extent / 2 + (x, y) * (np.array(picture.size) - extent)
    shift = center - axes @ (width / 2, height / 2)
    coefficients = (*axes[0].tolist(), float(shift[0]), *axes[1].tolist(), float(shift[1]))
    return picture.transform((width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
