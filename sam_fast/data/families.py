"""Families of shapes in procedural scenes, and which of them training and held-out scenes draw."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from sam_fast.data.draws import cumulative_shares, draw_index, pick, uniform
from sam_fast.data.shapes import (
    LETTERS,
    Contour,
    Placement,
    Shape,
    box,
    circle,
    densify,
    ellipse,
    glyph_width,
    glyphs,
    ragged_line,
    rounded_box,
    strip,
)

Family = Callable[[np.random.Generator], Shape]

HELD_OUT_FAMILIES = ("gear", "petal")  # only drawn where held_out=True, so that evaluation meets new geometry
TRAINING_FAMILIES = ("joined", "notched", "comb", "lattice")  # never drawn there, so that its scenes stay what they are


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


def _joined(rng: np.random.Generator) -> Shape:
    """Two or three shapes, most of which overlap and stand out: keys, guitars, houses, fish."""
    shape = _simple(rng)
    for _ in range(int(rng.integers(1, 3))):
        shape += _moved(rng, _simple(rng), uniform(rng, 0.5, 0.9), uniform(rng, 0.4, 0.8))
    return shape


def _notched(rng: np.random.Generator) -> Shape:
    """A shape with bites out of its border or holes, now and then in pieces."""
    shape = _simple(rng)
    for _ in range(int(rng.integers(1, 5))):
        bite = _moved(rng, _simple(rng), uniform(rng, 0.2, 1.1), uniform(rng, 0.1, 0.45))
        shape += [Contour(part.points, fill=False) for part in bite if isinstance(part, Contour)]
    return shape


def _comb(rng: np.random.Generator) -> Shape:
    """A bar with teeth on one side or both: combs, forks, fences, stairs."""
    teeth, back = int(rng.integers(2, 9)), uniform(rng, 0.1, 0.4)
    width, lean, both = uniform(rng, 0.25, 0.75) / teeth, uniform(rng, -0.3, 0.3), rng.random() < 0.3
    reach = np.linspace(uniform(rng, 0.3, 1), uniform(rng, 0.3, 1), teeth)
    shape = box(-1, -back, 1, back)
    for x, far in zip((2 * np.arange(teeth) + 1) / teeth - 1, reach, strict=True):
        for side in (1, -1) if both else (1,):
            corners = np.array(
                [[x - width, 0], [x + width, 0], [x + width + lean, side * far], [x - width + lean, side * far]]
            )
            shape.append(Contour(densify(corners)))
    return shape


def _lattice(rng: np.random.Generator) -> Shape:
    """A plate with holes in rows: windows, gratings, baskets."""
    columns, lines, fill = int(rng.integers(1, 5)), int(rng.integers(1, 5)), uniform(rng, 0.5, 0.85)
    round_holes, shape = rng.random() < 0.4, rounded_box(-1, -1, 1, 1, uniform(rng, 0, 0.5))
    rx, ry = 0.9 * fill / columns, 0.9 * fill / lines
    for x in 0.9 * ((2 * np.arange(columns) + 1) / columns - 1):
        for y in 0.9 * ((2 * np.arange(lines) + 1) / lines - 1):
            hole = ellipse(x, y, rx, ry) if round_holes else box(x - rx, y - ry, x + rx, y + ry)
            shape += [Contour(part.points, fill=False) for part in hole if isinstance(part, Contour)]
    return shape


def _simple(rng: np.random.Generator) -> Shape:
    return [_polygon, _quadrilateral, _rounded, _ellipse, _blob][int(rng.integers(5))](rng)


def _moved(rng: np.random.Generator, shape: Shape, distance: float, scale: float) -> Shape:
    """A shape made smaller, turned, and moved by a distance in any direction."""
    turn, way = rng.uniform(0, 2 * np.pi, 2).tolist()
    cos, sin, aspect = np.cos(turn) * scale, np.sin(turn) * scale, np.exp(uniform(rng, -0.6, 0.6))
    matrix = np.array([[cos, -sin], [sin, cos]]) * (aspect, 1 / aspect)
    return Placement(matrix, distance * np.array([np.cos(way), np.sin(way)])).shape(shape)


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
    "joined": _joined,
    "notched": _notched,
    "comb": _comb,
    "lattice": _lattice,
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
    "joined": 2.5,
    "notched": 2.5,
    "comb": 0.8,
    "lattice": 0.7,
}


def draw_family(
    rng: np.random.Generator, *, compact: bool = False, held_out: bool = False, common: bool = False
) -> tuple[str, Shape]:
    """A random family's name and a shape of it, in the object's frame.

    Args:
        rng: draws everything.
        compact: only families that can carry parts, without holes and thin limbs.
        held_out: six of ten shapes come from `HELD_OUT_FAMILIES`, which are never drawn otherwise.
        common: only families that scenes for training and for evaluation share.
    """
    if held_out and rng.random() < 0.6:
        name = HELD_OUT_FAMILIES[int(rng.integers(len(HELD_OUT_FAMILIES)))]
        return name, FAMILIES[name](rng)
    names, bounds = _usual_families(compact, held_out or common)
    name = names[draw_index(rng, bounds)]
    return name, FAMILIES[name](rng)


@lru_cache
def _usual_families(compact: bool, common: bool) -> tuple[list[str], tuple[float, ...]]:
    """The families that are not held out, and their cumulative shares."""
    thin = ("bracket", "stroke", "ring", "crescent", "letter", "limbs", "notched", "comb", "lattice")
    others = HELD_OUT_FAMILIES + (thin if compact else ()) + (TRAINING_FAMILIES if common else ())
    names = [name for name in FAMILIES if name not in others]
    return names, cumulative_shares([_WEIGHTS.get(name, 1.0) for name in names])
