"""Objects of procedural scenes as trees of parts: single shapes, bodies with parts on them, things, rows of items.

Parts lie in the object's own frame (see `shapes`), painted in order, a part before its own parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from sam_fast.data.draws import cumulative_shares, draw_index, pick, uniform
from sam_fast.data.families import draw_family
from sam_fast.data.shapes import (
    LETTERS,
    Contour,
    Glyphs,
    Placement,
    Shape,
    box,
    circle,
    densify,
    ellipse,
    glyph_width,
    glyphs,
    rounded_box,
    strip,
)


@dataclass
class Part:
    """A region of an object and what belongs to it.

    Attributes:
        shape: what is painted; None for a mere union of parts.
        parts: painted on top of it.
        color: index into the object's own few colours; parts with the same one look alike.
        clip: painted only where the parent is.
        named: whether it is a mask of its own (with all its parts).
        family: the shape family, or the kind of object.
    """

    shape: Shape | None = None
    parts: list[Part] = field(default_factory=list)
    color: int = 0
    clip: bool = False
    named: bool = True
    family: str = ""

    def placed(self, placement: Placement) -> Part:
        """The same in another frame."""
        return self._with_outlines(iter(placement.shape(self._outlines())))

    def _outlines(self) -> Shape:
        """All that is painted, in the order of painting."""
        outlines = list(self.shape or ())
        for part in self.parts:
            outlines += part._outlines()
        return outlines

    def _with_outlines(self, outlines: Iterator[Contour | Glyphs]) -> Part:
        """A copy with other outlines, as many as `_outlines` gives."""
        shape = None if self.shape is None else [next(outlines) for _ in self.shape]
        parts = [part._with_outlines(outlines) for part in self.parts]
        return Part(shape, parts, self.color, self.clip, self.named, self.family)


Maker = Callable[[np.random.Generator, bool], Part]


def _inside(shape: Shape, x: float, y: float, scale: float, aspect: float = 1.0, angle: float = 0.0) -> Shape:
    """A shape shrunk, turned and moved within the object's frame."""
    cos, sin = scale * float(np.cos(angle)), scale * float(np.sin(angle))
    wide, high = aspect**0.5, aspect**-0.5
    return Placement(np.array([[cos * wide, -sin * high], [sin * wide, cos * high]]), np.array([x, y])).shape(shape)


def _single(rng: np.random.Generator, held_out: bool) -> Part:
    family, shape = draw_family(rng, held_out=held_out)
    return Part(shape, family=family)


def _spotted(rng: np.random.Generator, held_out: bool) -> Part:
    """A body with parts anywhere on it, each sometimes with a part of its own."""
    family, body = draw_family(rng, compact=True, held_out=held_out)
    whole = Part(body, family=family)
    alike = rng.random() < 0.5
    kind, shape = draw_family(rng, compact=alike, held_out=held_out)
    for _ in range(int(rng.integers(1, 6))):
        if not alike:
            kind, shape = draw_family(rng, held_out=held_out)
        radius, angle = 0.6 * np.sqrt(rng.random()), uniform(rng, 0, 2 * np.pi)
        x, y, scale = radius * np.cos(angle), radius * np.sin(angle), uniform(rng, 0.1, 0.4)
        turn = uniform(rng, 0, 2 * np.pi)
        part = Part(_inside(shape, x, y, scale, angle=turn), color=1 if alike else int(rng.integers(1, 4)), family=kind)
        if rng.random() < 0.35:
            inner, core = draw_family(rng, compact=True, held_out=held_out)
            part.parts.append(Part(_inside(core, x, y, scale * uniform(rng, 0.35, 0.6)), color=3, family=inner))
        part.clip = rng.random() < 0.5
        whole.parts.append(part)
    return whole


def _banded(rng: np.random.Generator, held_out: bool) -> Part:
    """A body cut into zones by straight or bent lines: bottles with labels, clothes, animals of two colours."""
    family, body = draw_family(rng, compact=True, held_out=held_out)
    whole = Part(body, family=family)
    angle = pick(rng, (0.0, np.pi / 2, uniform(rng, 0, np.pi)))
    if rng.random() < 0.5:
        low = uniform(rng, -0.6, 0.3)
        spans = [(low, low + uniform(rng, 0.2, 0.6))]
    else:
        spans = [(uniform(rng, -0.3, 0.4), 3.0)]
    if rng.random() < 0.3:
        spans.append((-3.0, uniform(rng, -0.7, -0.4)))
    x = np.linspace(-3, 3, 40)
    wave = uniform(rng, 0, 0.15) * np.sin(uniform(rng, 1, 6) * x + uniform(rng, 0, 6))
    for color, (low, high) in enumerate(spans, 1):
        upper, lower = np.stack([x, low + wave], 1), np.stack([x, high + wave], 1)[::-1]
        zone: Shape = [Contour(np.concatenate([upper, lower]))]
        whole.parts.append(Part(_inside(zone, 0, 0, 1, angle=angle), color=color, clip=True, family="band"))
    return whole


def _face(rng: np.random.Generator, held_out: bool) -> Part:
    """A head with eyes (and pupils), mouth, nose, ears or hair: faces, animals, plugs, fronts of cars."""
    head = Part(draw_family(rng, compact=True, held_out=held_out)[1], family="face")
    if rng.random() < 0.5:
        head.shape = ellipse(0, 0, uniform(rng, 0.7, 1), 1)
    gap, height, radius = uniform(rng, 0.2, 0.45), uniform(rng, -0.4, 0.0), uniform(rng, 0.08, 0.22)
    squash = uniform(rng, 0.5, 1.2)
    pupils = rng.random() < 0.7
    for side in (-1, 1):
        eye = Part(ellipse(side * gap, height, radius, radius * squash), color=1)
        if pupils:
            eye.parts.append(Part(ellipse(side * gap, height, radius * 0.5, radius * 0.5 * squash), color=2))
        head.parts.append(eye)
    if rng.random() < 0.7:
        width, y = uniform(rng, 0.15, 0.5), uniform(rng, 0.35, 0.65)
        line = np.stack([np.linspace(-width, width, 12), y + uniform(rng, -0.2, 0.2) * np.linspace(-1, 1, 12) ** 2], 1)
        head.parts.append(Part(strip(line, np.full(12, uniform(rng, 0.03, 0.1))), color=3))
    if rng.random() < 0.5:
        head.parts.append(
            Part(ellipse(0, uniform(rng, 0.05, 0.25), uniform(rng, 0.06, 0.15), 0.12), color=int(rng.integers(4)))
        )
    if rng.random() < 0.4:
        head.parts.append(Part(box(-2, -2, 2, uniform(rng, -0.8, -0.45)), color=3, clip=True))
    if rng.random() < 0.5:
        ears = [_ear(rng, side) for side in (-1, 1)]
        return Part(None, [*ears, head], family="face")
    return head


def _ear(rng: np.random.Generator, side: int) -> Part:
    if rng.random() < 0.5:
        return Part(ellipse(side * 0.8, -0.6, 0.3, 0.35), color=0)
    return Part([Contour(densify(np.array([[side * 0.35, -0.7], [side * 0.95, -0.3], [side * 0.9, -1.3]])))], color=0)


def _building(rng: np.random.Generator, held_out: bool) -> Part:
    """A wall with windows in rows, a door, a roof."""
    half, top = uniform(rng, 0.4, 1), uniform(rng, -0.9, -0.2)
    wall = Part(box(-half, top, half, 1), family="building")
    columns, lines = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    fill, arched, panes = uniform(rng, 0.4, 0.75), rng.random() < 0.3, rng.random() < 0.3
    for x in (np.arange(columns) + 0.5) / columns:
        for y in (np.arange(lines) + 0.5) / lines:
            cx, cy = half * (2 * x - 1), top + (1 - top) * 0.75 * y
            rx, ry = half / columns * fill, (1 - top) * 0.375 / lines * fill
            window = Part(rounded_box(cx - rx, cy - ry, cx + rx, cy + ry, 0.9 if arched else 0.05), color=1)
            if panes and columns * lines < 7:
                window.parts += [
                    Part(
                        box(cx + a * rx - 0.4 * rx, cy - 0.8 * ry, cx + a * rx + 0.4 * rx, cy + 0.8 * ry),
                        color=3,
                        named=False,
                    )
                    for a in (-0.45, 0.45)
                ]
            wall.parts.append(window)
    if rng.random() < 0.7:
        x, width = uniform(rng, -0.6, 0.6) * half, half * uniform(rng, 0.1, 0.2)
        wall.parts.append(Part(box(x - width, 1 - (1 - top) * 0.3, x + width, 1), color=2))
    if rng.random() < 0.6:
        peak, eave = uniform(rng, -0.8, 0.8) * half, half * uniform(rng, 1, 1.25)
        corners = np.array([[-eave, top], [eave, top], [peak * pick(rng, (0, 1)), top - uniform(rng, 0.3, 0.7)]])
        if rng.random() < 0.4:
            corners = np.array([[-eave, top], [eave, top], [half * 0.7, top - 0.4], [-half * 0.7, top - 0.4]])
        return Part(None, [wall, Part([Contour(densify(corners))], color=3)], family="building")
    return wall


def _vehicle(rng: np.random.Generator, held_out: bool) -> Part:
    """A body on wheels with hubs, a cabin with windows."""
    low, top = 0.35, uniform(rng, -0.25, 0.0)
    body = Part(rounded_box(-1, top, 1, low, uniform(rng, 0.1, 0.8)), family="vehicle")
    left, right, roof = uniform(rng, -0.8, -0.2), uniform(rng, 0.2, 0.9), top - uniform(rng, 0.25, 0.5)
    slope = uniform(rng, 0, 0.3)
    cabin = Part(
        [
            Contour(
                densify(
                    np.array([[left, top + 0.05], [right, top + 0.05], [right - slope, roof], [left + slope, roof]])
                )
            )
        ]
    )
    for a, b in ((0.12, 0.46), (0.54, 0.88)):
        width = right - left - 2 * slope
        x0, x1 = left + slope + a * width, left + slope + b * width
        cabin.parts.append(Part(box(x0, roof + 0.06, x1, top - 0.02), color=1))
    if rng.random() < 0.5:
        body.parts.append(Part(ellipse(0.85, (top + low) / 2, 0.1, 0.08), color=3))
    wheels = []
    radius = uniform(rng, 0.17, 0.3)
    for x in (uniform(rng, -0.7, -0.45), uniform(rng, 0.45, 0.7)):
        hub = Part(ellipse(x, low, radius * 0.5, radius * 0.5), color=3)
        wheels.append(Part(ellipse(x, low, radius, radius), [hub], color=2))
    return Part(None, [cabin, body, *wheels], family="vehicle")


def _vessel(rng: np.random.Generator, held_out: bool) -> Part:
    """Cups, bottles, pots and lamps: a turned profile with neck, lid, handle, label or plant."""
    y = np.linspace(-0.7, 1, 24)
    profile = uniform(rng, 0.35, 0.7) + uniform(rng, -0.25, 0.25) * np.sin(
        uniform(rng, 0.5, 3.5) * y + uniform(rng, 0, 6)
    )
    profile = profile.clip(0.15, 0.9)
    outline = np.concatenate([np.stack([profile, y], 1), np.stack([-profile, y], 1)[::-1]])
    body = Part([Contour(outline)], family="vessel")
    parts = [body]
    if rng.random() < 0.5:
        low = uniform(rng, -0.4, 0.3)
        body.parts.append(Part(box(-2, low, 2, low + uniform(rng, 0.25, 0.6)), color=1, clip=True))
        if rng.random() < 0.4:
            body.parts[-1].parts.append(Part(ellipse(0, low + 0.2, 0.16, 0.12), color=2))
    if rng.random() < 0.6:
        rim = float(profile[0])
        mouth = Part(ellipse(0, -0.7, rim, rim * uniform(rng, 0.15, 0.4)), color=int(rng.integers(2, 4)))
        if rng.random() < 0.5:
            mouth.parts.append(Part(ellipse(0, -0.68, rim * 0.85, rim * 0.2), color=1))
        body.parts.append(mouth)
    if rng.random() < 0.5:
        angle = np.linspace(-1.6, 1.6, 16)
        line = np.stack([0.5 + uniform(rng, 0.3, 0.5) * np.cos(angle), 0.1 + 0.45 * np.sin(angle)], 1)
        parts.insert(0, Part(strip(line, np.full(16, uniform(rng, 0.05, 0.12))), color=0))
    if rng.random() < 0.35:
        width = float(profile[0]) * uniform(rng, 0.4, 1)
        neck = Part(box(-width, -1.1, width, -0.66), color=0)
        parts = [neck, *parts, Part(rounded_box(-width, -1.3, width, -1.08, 0.3), color=3)]
    elif rng.random() < 0.3:
        parts.insert(0, _plant(rng))
    return Part(None, parts, family="vessel") if len(parts) > 1 else body


def _plant(rng: np.random.Generator) -> Part:
    """Blades that rise from a pot."""
    blades: Shape = []
    for lean in rng.uniform(-1, 1, int(rng.integers(3, 8))):
        t = np.linspace(0, 1, 10)
        line = np.stack([lean * t**1.5, -0.6 - uniform(rng, 0.5, 1) * t], 1)
        blades += strip(line, 0.13 * np.sin(np.pi * (0.15 + 0.83 * t)), False)
    return Part(blades, color=2)


def _tree(rng: np.random.Generator, held_out: bool) -> Part:
    """Trunk and crown; also mushrooms, umbrellas, lollipops and signposts."""
    width = uniform(rng, 0.05, 0.2)
    line = np.stack([uniform(rng, -0.15, 0.15) * np.linspace(-1, 1, 10) ** 2, np.linspace(-0.3, 1.2, 10)], 1)
    trunk = Part(strip(line, np.linspace(width * 0.7, width, 10), False), color=1)
    family, shape = draw_family(rng, compact=True, held_out=held_out)
    crown = Part(_inside(shape, 0, -0.45, uniform(rng, 0.5, 0.85), uniform(rng, 0.7, 1.8)), family=family)
    if rng.random() < 0.3:
        crown.parts += [
            Part(ellipse(x, y, 0.1, 0.1), color=2) for x, y in rng.uniform((-0.4, -0.8), (0.4, -0.2), (3, 2))
        ]
    return Part(None, [trunk, crown], family="tree")


def _figure(rng: np.random.Generator, held_out: bool) -> Part:
    """A person: head with hair, torso, arms with hands, legs."""
    torso = Part(rounded_box(-0.3, -0.55, 0.3, 0.3, uniform(rng, 0.1, 0.9)), color=0, family="figure")
    if rng.random() < 0.4:
        torso.parts.append(Part(ellipse(0, uniform(rng, -0.35, 0), uniform(rng, 0.08, 0.2), 0.12), color=3))
    head = Part(ellipse(0, -0.82, uniform(rng, 0.16, 0.24), 0.26), color=1)
    if rng.random() < 0.7:
        head.parts.append(Part(box(-1, -2, 1, uniform(rng, -0.98, -0.8)), color=3, clip=True))
    parts = []
    for side in (-1, 1):
        swing = uniform(rng, -0.3, 0.5)
        leg = np.array(
            [[0.14 * side, 0.2], [side * (0.15 + 0.4 * abs(swing)), 0.7], [side * (0.15 + 0.3 * swing), 1.2]]
        )
        parts.append(Part(strip(leg, np.array([0.14, 0.11, 0.09])), color=2))
        reach, lift = uniform(rng, 0.4, 0.8), uniform(rng, -0.6, 0.5)
        arm = np.array([[0.25 * side, -0.42], [side * (0.25 + reach * 0.5), -0.2], [side * (0.25 + reach * 0.6), lift]])
        hand = Part([Contour(circle(20) * 0.09 + arm[2])], color=1)
        parts.append(Part(strip(arm, np.array([0.11, 0.09, 0.07])), [hand], color=0))
    return Part(None, [*parts, torso, head], family="figure")


def _animal(rng: np.random.Generator, held_out: bool) -> Part:
    """Four legs, body, head with ear and eye, tail, perhaps with a coat of patches."""
    length = uniform(rng, 0.5, 0.8)
    body = Part(ellipse(0, 0, length, uniform(rng, 0.25, 0.45)), family="animal")
    if rng.random() < 0.4:
        _, patch = draw_family(rng, compact=True, common=True)
        body.parts.append(Part(_inside(patch, uniform(rng, -0.3, 0.3), 0, 0.35), color=1, clip=True))
    tall = uniform(rng, 0.4, 0.9)
    legs = []
    for x in (-0.75, -0.5, 0.5, 0.75):
        line = np.array([[x * length, 0.1], [x * length + uniform(rng, -0.08, 0.08), 0.1 + tall]])
        legs.append(Part(strip(line, np.array([0.11, 0.07])), color=0, named=bool(rng.random() < 0.5)))
    x, y = length + uniform(rng, 0.0, 0.25), uniform(rng, -0.6, -0.1)
    neck = strip(np.array([[length * 0.7, 0.0], [x, y]]), np.array([0.2, 0.15]))
    head = Part(_inside(ellipse(0, 0, 0.3, 0.2), x, y, 1, angle=uniform(rng, -0.4, 0.6)), color=0)
    head.parts.append(Part(ellipse(x + 0.05, y - 0.05, 0.05, 0.05), color=3))
    head.parts.append(Part([Contour(np.array([[x - 0.2, y - 0.1], [x, y - 0.15], [x - 0.15, y - 0.4]]))], color=1))
    tail = np.array(
        [[-length * 0.9, -0.1], [-length - 0.2, uniform(rng, -0.5, 0.3)], [-length - 0.35, uniform(rng, -0.6, 0.5)]]
    )
    return Part(
        None,
        [*legs, Part(strip(tail, np.array([0.08, 0.06, 0.04])), color=0), Part(neck, color=0, named=False), body, head],
        family="animal",
    )


def _solid(rng: np.random.Generator, held_out: bool) -> Part:
    """A cuboid or a cylinder seen from above, at times with something on the front."""
    depth_x, depth_y = uniform(rng, 0.15, 0.6), uniform(rng, 0.15, 0.5)
    named = bool(rng.random() < 0.7)
    if rng.random() < 0.35:
        side = [*box(-0.8, -0.6, 0.8, 0.7), *ellipse(0, 0.7, 0.8, depth_y * 0.6)]
        body = Part(side, family="solid")
        if rng.random() < 0.4:
            body.parts.append(Part(box(-2, -0.1, 2, 0.4), color=2, clip=True))
        return Part(None, [body, Part(ellipse(0, -0.6, 0.8, depth_y * 0.6), color=1)], family="solid")
    front = Part(box(-0.9, -0.4, 0.6, 0.9), named=named)
    corners = np.array([[-0.9, -0.4], [0.6, -0.4], [0.6 + depth_x, -0.4 - depth_y], [-0.9 + depth_x, -0.4 - depth_y]])
    lid = Part([Contour(densify(corners))], color=1, named=named)
    corners = np.array([[0.6, -0.4], [0.6 + depth_x, -0.4 - depth_y], [0.6 + depth_x, 0.9 - depth_y], [0.6, 0.9]])
    side_face = Part([Contour(densify(corners))], color=2, named=named)
    for _ in range(int(rng.integers(0, 3))):
        _, shape = draw_family(rng, held_out=held_out)
        front.parts.append(
            Part(_inside(shape, uniform(rng, -0.5, 0.2), uniform(rng, 0, 0.5), uniform(rng, 0.15, 0.35)), color=3)
        )
    return Part(None, [front, lid, side_face], family="solid")


def _row(rng: np.random.Generator, held_out: bool) -> Part:
    """A carrier with items in a row or a grid: shelves, keyboards, plates of food, panels of buttons."""
    columns, lines = int(rng.integers(2, 6)), int(pick(rng, (1, 1, 2, 3)))
    width, height = 1.0, min(1.0, uniform(rng, 0.6, 1.3) * lines / columns)
    carrier = rounded_box(-width, -height, width, height, pick(rng, (0.02, 0.3, 1.0)))
    whole = Part(carrier, family="row")
    family, shape = draw_family(rng, compact=True, held_out=held_out)
    fill, jitter, turn = uniform(rng, 0.5, 0.85), pick(rng, (0.0, 0.1)), pick(rng, (0.0, 0.4))
    cored, various = rng.random() < 0.3, rng.random() < 0.35
    _, core = draw_family(rng, compact=True, held_out=held_out)
    for x in (np.arange(columns) + 0.5) / columns:
        for y in (np.arange(lines) + 0.5) / lines:
            if various:
                family, shape = draw_family(rng, held_out=held_out)
            scale = fill * min(width / columns, height / lines)
            cx, cy = np.array([width * (2 * x - 1), height * (2 * y - 1)]) * 0.92 + rng.normal(0, jitter * scale, 2)
            angle = rng.normal(0, turn)
            item = Part(
                _inside(shape, cx, cy, scale, angle=angle),
                color=int(rng.integers(1, 4)) if various else 1,
                family=family,
            )
            if cored:
                item.parts.append(Part(_inside(core, cx, cy, scale * 0.5, angle=angle), color=2))
            whole.parts.append(item)
    return whole if rng.random() < 0.8 else Part(None, whole.parts, family="row")


def _sign(rng: np.random.Generator, held_out: bool) -> Part:
    """A word, its letters parts of it, on a plate or alone."""
    text = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=int(rng.integers(2, 6))))
    widths = np.array([max(glyph_width(letter), 0.25) for letter in text]) + 0.15
    edges = np.concatenate([[0], np.cumsum(widths)]) / widths.sum() * 2 - 1
    height = 1.0 / widths.sum()
    letters = [
        Part(glyphs(letter, a, -height, b - 0.15 * (b - a), height), color=1, family="letter")
        for letter, a, b in zip(text, edges[:-1], edges[1:], strict=True)
    ]
    if rng.random() < 0.3:
        return Part(None, letters, family="sign")
    margin = uniform(rng, 0.05, 0.3)
    plate = rounded_box(-1 - margin, -height - margin, 1 + margin, height + margin, pick(rng, (0.05, 0.5, 1.0)))
    return Part(plate, letters, family="sign")


MAKERS: dict[str, tuple[Maker, float]] = {
    "single": (_single, 5.0),
    "spotted": (_spotted, 1.6),
    "banded": (_banded, 1.4),
    "face": (_face, 0.7),
    "building": (_building, 0.6),
    "vehicle": (_vehicle, 0.5),
    "vessel": (_vessel, 1.0),
    "tree": (_tree, 0.6),
    "figure": (_figure, 0.8),
    "animal": (_animal, 0.7),
    "solid": (_solid, 0.7),
    "row": (_row, 0.8),
    "sign": (_sign, 0.5),
}


def make_object(rng: np.random.Generator, *, compound: float = 1.0, held_out: bool = False) -> Part:
    """A random object in its own frame, about -1 .. 1.

    Args:
        rng: draws everything.
        compound: weight of objects with parts against single shapes, 1 for the usual mixture.
        held_out: also draw `HELD_OUT_FAMILIES`.
    """
    maker, _ = list(MAKERS.values())[draw_index(rng, _maker_shares(compound))]
    return maker(rng, held_out)


@lru_cache
def _maker_shares(compound: float) -> tuple[float, ...]:
    """Cumulative shares of `MAKERS`."""
    return cumulative_shares(
        [weight if name == "single" else weight * compound for name, (_, weight) in MAKERS.items()]
    )
