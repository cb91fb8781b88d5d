"""Shape families of procedural scenes: closed outlines in an object's own frame, and their drawing with soft edges.

A shape is a list of primitives. Its own frame is about -1 .. 1 in x (right) and y (down); `Placement` carries it into
the scene's frame, 0 .. 1 in both, whatever the number of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sam_fast.data.draws import cumulative_shares, draw_index, pick, uniform

HELD_OUT_FAMILIES = ("gear", "petal")  # only drawn where held_out=True, so that evaluation meets new geometry


class Contour(NamedTuple):
    """A filled polygon [K, 2], or several [P, K, 2]; with `fill` False a hole in the contours before it."""

    points: np.ndarray
    fill: bool = True


class Glyphs(NamedTuple):
    """Text, drawn in the parallelogram of three points [3, 2]: upper left, upper right, lower left."""

    points: np.ndarray
    text: str


Shape = list[Contour | Glyphs]
Family = Callable[[np.random.Generator], Shape]


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


def _polar(radius: np.ndarray) -> Shape:
    return [Contour(circle(len(radius)) * radius[:, None])]


def _polygon(rng: np.random.Generator) -> Shape:
    corners = int(rng.integers(3, 9))
    angle = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.35, 0.35, corners)) / corners
    radius = rng.uniform(pick(rng, (0.4, 0.85)), 1, corners)
    return [Contour(densify(np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]))]


def _quadrilateral(rng: np.random.Generator) -> Shape:
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    corners += rng.uniform(-1, 1, (4, 2)) * pick(rng, (0.0, 0.1, 0.45))
    return [Contour(densify(corners))]


def _bracket(rng: np.random.Generator) -> Shape:
    """L, T, U and plus shapes."""
    arm = uniform(rng, 0.15, 0.4)
    bars = [(-1, -1, 1, -1 + 2 * arm), (-1, 1 - 2 * arm, 1, 1), (-1, -1, -1 + 2 * arm, 1), (1 - 2 * arm, -1, 1, 1)]
    bars += [(-1, -arm, 1, arm), (-arm, -1, arm, 1)]
    choice = [(0, 2), (0, 5), (2, 1, 3), (4, 5), (2, 4, 3), (2, 0, 4, 1)][int(rng.integers(6))]
    return [primitive for index in choice for primitive in box(*bars[index])]


def _rounded(rng: np.random.Generator) -> Shape:
    return rounded_box(-1, -1, 1, 1, uniform(rng, 0.1, 1))


def _ellipse(rng: np.random.Generator) -> Shape:
    power = float(pick(rng, (1, 1, uniform(rng, 0.6, 1.4))))
    points = circle(56)
    return [Contour(np.sign(points) * np.abs(points) ** power)]


def _blob(rng: np.random.Generator) -> Shape:
    radius = 0.75 + uniform(rng, 0.05, 0.25) * ragged_line(rng, 72, uniform(rng, 1.5, 2.5))[:-1]
    return _polar(radius.clip(0.15, 1.4))


def _ragged(rng: np.random.Generator) -> Shape:
    """Rocks, crowns of trees, puddles: fractal outlines."""
    radius = 0.75 + uniform(rng, 0.1, 0.2) * ragged_line(rng, 120, uniform(rng, 0.7, 1.2))[:-1]
    return _polar(radius.clip(0.15, 1.4))


def _cluster(rng: np.random.Generator) -> Shape:
    """Overlapping discs: clouds, bushes, animals without legs."""
    count = int(rng.integers(2, 7))
    centers = rng.uniform(-0.55, 0.55, (count, 2)) * (1, uniform(rng, 0.2, 1))
    radii = rng.uniform(0.25, 0.6, (count, 1, 1)) * (1, uniform(rng, 0.6, 1.3))
    return [Contour(circle(36) * radii + centers[:, None]), Contour(circle(36) * 0.35)]


def _limbs(rng: np.random.Generator) -> Shape:
    """A thick body with tapering arms: hands, branches, animals."""
    shape: Shape = [Contour(circle(36) * rng.uniform(0.25, 0.5, 2))]
    for angle in rng.uniform(0, 2 * np.pi, int(rng.integers(2, 7))):
        reach = np.linspace(0, uniform(rng, 0.6, 1.1), 8)[:, None]
        turn = angle + uniform(rng, -0.8, 0.8) * reach
        line = reach * np.concatenate([np.cos(turn), np.sin(turn)], axis=1)
        shape += strip(line, np.linspace(uniform(rng, 0.12, 0.25), uniform(rng, 0.04, 0.12), 8))
    return shape


def _stroke(rng: np.random.Generator) -> Shape:
    steps = 20
    heading = uniform(rng, 0, 2 * np.pi) + np.cumsum(rng.normal(0, uniform(rng, 0, 0.25), steps) + rng.normal(0, 0.08))
    line = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    line = 2 * (line - (line.min(0) + line.max(0)) / 2) / max(np.ptp(line, axis=0).max(), 1e-6)
    thick = uniform(rng, 0.03, 0.12) if rng.random() < 0.6 else uniform(rng, 0.12, 0.3)
    taper = np.linspace(1, pick(rng, (1, uniform(rng, 0.3, 1))), steps)
    return strip(line, thick * taper, bool(rng.random() < 0.7))


def _ring(rng: np.random.Generator) -> Shape:
    outer = [_ellipse, _rounded, _blob][int(rng.integers(3))](rng)[0]
    inner = Contour(outer.points * uniform(rng, 0.35, 0.85) + rng.uniform(-0.05, 0.05, 2), fill=False)
    return [outer, inner]


def _crescent(rng: np.random.Generator) -> Shape:
    angle = np.linspace(0, uniform(rng, 0.6, 1.7) * np.pi, 24)
    line = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    bulge = np.sin(np.linspace(0, np.pi, 24)) ** pick(rng, (0.3, 1.0))
    return strip(line * 0.85, uniform(rng, 0.1, 0.3) * bulge + 0.02, False)


def glyph_width(text: str) -> float:
    """Width of a text over its height, as `Glyphs` draws it without distortion."""
    image = _glyph_image(text, 32)
    return image.width / image.height


LETTERS = "ABCDEFGHJKLMNOPQRSTUVWXYZabdefghkmnpqrstuwxyz0123456789&?$@%"


def glyphs(text: str, x0: float, y0: float, x1: float, y1: float) -> Shape:
    """Text stretched to a rectangle."""
    return [Glyphs(np.array([[x0, y0], [x1, y0], [x0, y1]], float), text)]


def _letter(rng: np.random.Generator) -> Shape:
    text = LETTERS[int(rng.integers(len(LETTERS)))]
    half = min(1.0, glyph_width(text))
    return glyphs(text, -half, -1, half, 1)


def _gear(rng: np.random.Generator) -> Shape:
    """Stars and cogwheels, some with a hole."""
    teeth = int(rng.integers(4, 13))
    inner = uniform(rng, 0.35, 0.8)
    if rng.random() < 0.5:
        radius = np.tile([1, inner], teeth)
        angle = np.pi * np.arange(2 * teeth) / teeth
    else:
        radius = np.tile([1, 1, inner, inner], teeth)
        angle = 2 * np.pi * (np.arange(teeth)[:, None] + np.array([-0.18, 0.18, 0.3, 0.7])).ravel() / teeth
    outline = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]
    shape: Shape = [Contour(densify(outline))]
    if rng.random() < 0.4:
        shape.append(Contour(circle() * inner * uniform(rng, 0.3, 0.7), fill=False))
    return shape


def _petal(rng: np.random.Generator) -> Shape:
    """Rose curves, pointed leaves and hearts."""
    angle = np.linspace(0, 2 * np.pi, 160, endpoint=False)
    kind = int(rng.integers(3))
    if kind == 0:
        petals = int(rng.integers(3, 9))
        return _polar(uniform(rng, 0.15, 0.4) + 0.65 * np.abs(np.cos(petals * angle / 2)) ** uniform(rng, 0.5, 1.5))
    if kind == 1:
        x = np.cos(angle)
        y = np.sign(np.sin(angle)) * uniform(rng, 0.3, 0.6) * (1 - x**2) * (1 + 0.5 * uniform(rng, -1, 1) * x)
        return [Contour(np.stack([x, y], axis=1))]
    x = 16 * np.sin(angle) ** 3
    y = -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle))
    return [Contour(np.stack([x, y], axis=1) / 17)]


FAMILIES: dict[str, Family] = {
    "polygon": _polygon,
    "quadrilateral": _quadrilateral,
    "bracket": _bracket,
    "rounded": _rounded,
    "ellipse": _ellipse,
    "blob": _blob,
    "ragged": _ragged,
    "cluster": _cluster,
    "limbs": _limbs,
    "stroke": _stroke,
    "ring": _ring,
    "crescent": _crescent,
    "letter": _letter,
    "gear": _gear,
    "petal": _petal,
}
_WEIGHTS = {
    "quadrilateral": 2.0,
    "rounded": 1.5,
    "ellipse": 2.0,
    "blob": 3.0,
    "ragged": 1.5,
    "cluster": 1.5,
    "limbs": 1.5,
    "bracket": 0.6,
}


def draw_family(rng: np.random.Generator, *, compact: bool = False, held_out: bool = False) -> tuple[str, Shape]:
    """A random family's name and a shape of it, in the object's frame.

    Args:
        rng: draws everything.
        compact: only families that can carry parts, without holes and thin limbs.
        held_out: six of ten shapes come from `HELD_OUT_FAMILIES`, which are never drawn otherwise.
    """
    if held_out and rng.random() < 0.6:
        name = HELD_OUT_FAMILIES[int(rng.integers(len(HELD_OUT_FAMILIES)))]
        return name, FAMILIES[name](rng)
    names, bounds = _usual_families(compact)
    name = names[draw_index(rng, bounds)]
    return name, FAMILIES[name](rng)


@lru_cache
def _usual_families(compact: bool) -> tuple[list[str], tuple[float, ...]]:
    """The families that are not held out, and their cumulative shares."""
    thin = ("bracket", "stroke", "ring", "crescent", "letter", "limbs") if compact else ()
    names = [name for name in FAMILIES if name not in HELD_OUT_FAMILIES + thin]
    return names, cumulative_shares([_WEIGHTS.get(name, 1.0) for name in names])
