"""Shapes of procedural scenes: closed outlines in an object's own frame, and their drawing with soft edges.

A shape is a list of primitives. Its own frame is about -1 .. 1 in x (right) and y (down); `Placement` carries it into
the scene's frame, 0 .. 1 in both, whatever the number of pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont


class Contour(NamedTuple):
    """A filled polygon [K, 2], or several [P, K, 2]; with `fill` False a hole in the contours before it."""

    points: np.ndarray
    fill: bool = True


class Glyphs(NamedTuple):
    """Text, drawn in the parallelogram of three points [3, 2]: upper left, upper right, lower left."""

    points: np.ndarray
    text: str


Shape = list[Contour | Glyphs]


@dataclass(frozen=True)
class Placement:
    """An affine map, after a smooth bending, of an object's frame into the scene's.

    Attributes:
        matrix: [2, 2].
        offset: [2], where the object's origin lies in the scene.
        bend: [2, 3] amplitude, frequency and phase of a wave along each axis, in the object's frame, or None.
    """

    matrix: np.ndarray
    offset: np.ndarray
    bend: np.ndarray | None = None

    def __call__(self, points: np.ndarray) -> np.ndarray:
        if self.bend is not None:
            amplitude, frequency, phase = self.bend.T
            points = points + amplitude * np.sin(frequency * points[..., ::-1] + phase)
        return points @ self.matrix.T + self.offset

    def shape(self, shape: Shape) -> Shape:
        if not shape:
            return []
        # All points at once: numpy takes about as long for many as for few.
        flat = [primitive.points.reshape(-1, 2) for primitive in shape]
        points = self(np.concatenate(flat)) if len(flat) > 1 else self(flat[0])
        placed: Shape = []
        end = 0
        for primitive, own in zip(shape, flat, strict=True):
            start, end = end, end + len(own)
            moved = points[start:end].reshape(primitive.points.shape)
            placed.append(
                Contour(moved, primitive.fill) if isinstance(primitive, Contour) else Glyphs(moved, primitive.text)
            )
        return placed


class Raster(NamedTuple):
    """Coverage of a window of the image."""

    alpha: Image.Image  # mode L, w x h: 255 inside
    left: int
    top: int


def rasterize(shape: Shape, size: int) -> Raster | None:
    """Draw a shape in the scene's frame onto an image of size x size pixels, with antialiased edges.

    Returns:
        The window that the shape touches, cut at the image's border; None if it lies outside.
    """
    flat = [primitive.points.reshape(-1, 2) for primitive in shape]
    flat += [
        corners[1:2] + corners[2:3] - corners[0:1]
        for corners, primitive in zip(flat, shape, strict=False)
        if isinstance(primitive, Glyphs)
    ]
    points = np.concatenate(flat) if len(flat) > 1 else flat[0]
    (low_x, low_y), (high_x, high_y) = points.min(0).tolist(), points.max(0).tolist()
    left, top = max(math.floor(low_x * size - 0.5), 0), max(math.floor(low_y * size - 0.5), 0)
    width = min(math.ceil(high_x * size + 0.5), size) - left
    height = min(math.ceil(high_y * size + 0.5), size) - top
    if width <= 0 or height <= 0:
        return None
    factor = 4 if width * height <= 96 * 96 else 3 if width * height <= 180 * 180 else 2
    sheet = Image.new("L", (factor * width, factor * height))
    draw, corner = ImageDraw.Draw(sheet), np.array([left, top], np.float64)
    for primitive in shape:
        pixels = factor * (primitive.points * size - corner)
        if isinstance(primitive, Glyphs):
            _draw_glyphs(sheet, primitive.text, pixels)
        else:
            # A polygon of PIL includes its border line, half a fine pixel too much.
            for polygon in (pixels - 0.5).reshape(-1, 2 * pixels.shape[-2]).tolist():
                draw.polygon(polygon, fill=255 * primitive.fill)
    return Raster(sheet.reduce(factor), left, top)


@lru_cache(maxsize=32)
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=height)


@lru_cache(maxsize=512)
def _glyph_image(text: str, height: int) -> Image.Image:
    font = _font(height)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font)
    return image


def _draw_glyphs(sheet: Image.Image, text: str, corners: np.ndarray) -> None:
    """Draw text into the parallelogram of `corners` [3, 2], pixels of `sheet`."""
    origin, right, down = corners[0], corners[1] - corners[0], corners[2] - corners[0]
    target = float(np.hypot(*down))
    image = _glyph_image(text, min(512, 16 * 2 ** max(0, round(np.log2(max(target, 1) / 12)))))
    axes = np.stack([right / image.width, down / image.height], axis=1)
    if abs(np.linalg.det(axes)) < 1e-6:
        return
    inverse = np.linalg.inv(axes)
    shift = -inverse @ origin
    coefficients = (*inverse[0], shift[0], *inverse[1], shift[1])
    drawn = image.transform(sheet.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    sheet.paste(255, (0, 0), drawn)


@lru_cache
def circle(steps: int = 40) -> np.ndarray:
    """A unit circle [steps, 2]."""
    angle = np.linspace(0, 2 * np.pi, steps, endpoint=False)
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points.flags.writeable = False
    return points


def ellipse(x: float, y: float, rx: float, ry: float) -> Shape:
    return [Contour(circle() * (rx, ry) + (x, y))]


def box(x0: float, y0: float, x1: float, y1: float) -> Shape:
    """A rectangle whose sides can bend."""
    return [Contour(densify(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)))]


def rounded_box(x0: float, y0: float, x1: float, y1: float, roundness: float) -> Shape:
    """A rectangle with round corners; at roundness 1 the shorter sides are half circles."""
    rx, ry = (x1 - x0) / 2, (y1 - y0) / 2
    radius = roundness * min(abs(rx), abs(ry))
    corner = circle(48)
    outline = corner * radius + _quadrants(48) * (abs(rx) - radius, abs(ry) - radius)
    center = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
    return [Contour(densify(outline + center, 0.5))]


@lru_cache
def _quadrants(steps: int) -> np.ndarray:
    """The signs [steps, 2] of the coordinates of `circle`, -1 for 0."""
    return np.where(circle(steps) > 1e-9, 1, -1)


def densify(corners: np.ndarray, step: float = 0.25) -> np.ndarray:
    """Points along a closed polygon [K, 2], at most about `step` apart, its corners among them."""
    sides = np.concatenate([corners[1:], corners[:1]]) - corners
    counts = np.minimum(np.maximum(np.ceil(np.hypot(*sides.T) / step).astype(int), 1), 24)
    starts = np.cumsum(counts) - counts
    share = (np.arange(counts.sum()) - starts.repeat(counts)) / counts.repeat(counts)
    return corners.repeat(counts, 0) + sides.repeat(counts, 0) * share[:, None]


def strip(line: np.ndarray, widths: np.ndarray, round_ends: bool = True) -> Shape:
    """A band along a line [K, 2] of half-widths [K], one quadrilateral per segment, so that it may cross itself."""
    tangent = np.empty_like(line)
    tangent[1:-1] = line[2:] - line[:-2]
    tangent[0], tangent[-1] = line[1] - line[0], line[-1] - line[-2]
    tangent /= np.hypot(*tangent.T)[:, None] + 1e-9
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1) * widths[:, None]
    left, right = line + normal, line - normal
    quads = np.stack([left[:-1], left[1:], right[1:], right[:-1]], axis=1)
    shape: Shape = [Contour(quads)]
    if round_ends:
        shape.append(Contour(np.stack([circle(16) * widths[i] + line[i] for i in (0, -1)])))
    return shape


def ragged_line(rng: np.random.Generator, steps: int, roughness: float) -> np.ndarray:
    """A random function [steps + 1] of about unit height, its ends equal; its spectrum falls as 1/f^roughness."""
    weight = _HARMONICS**-roughness * rng.standard_normal(12)
    phase = rng.uniform(0, 2 * np.pi, 12)
    waves = weight * np.sin(_harmonic_angles(steps) + phase)
    return waves.sum(1) / np.sqrt((_HARMONICS ** (-2 * roughness)).sum() / 2)


_HARMONICS = np.arange(1, 13)


@lru_cache
def _harmonic_angles(steps: int) -> np.ndarray:
    """Multiples [steps + 1, 12] of angles once around."""
    return _HARMONICS * np.linspace(0, 2 * np.pi, steps + 1)[:, None]


def glyph_width(text: str) -> float:
    """Width of a text over its height, as `Glyphs` draws it without distortion."""
    image = _glyph_image(text, 32)
    return image.width / image.height


LETTERS = "ABCDEFGHJKLMNOPQRSTUVWXYZabdefghkmnpqrstuwxyz0123456789&?$@%"


def glyphs(text: str, x0: float, y0: float, x1: float, y1: float) -> Shape:
    """Text stretched to a rectangle."""
    return [Glyphs(np.array([[x0, y0], [x1, y0], [x0, y1]], float), text)]
