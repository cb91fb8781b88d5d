"""Procedural scenes with exact masks: what a SAM learns from when there is no annotated data.

A scene is painted back to front: stuff (sky, ground, walls) or a photo, then objects that are trees of parts, with
shadows, shading, occlusion, and a camera's imperfections. Masks are the visible regions of named parts and of their
wholes, so that a point is ambiguous as it is in photos. Shadows belong to no mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sam_fast.data.canvas import Canvas, Region, Style
from sam_fast.data.degrade import degrade
from sam_fast.data.draws import cumulative_shares, draw_index, pick, uniform
from sam_fast.data.objects import Part, make_object
from sam_fast.data.sample import Sample, choose_masks
from sam_fast.data.shapes import Contour, Placement, Shape, ragged_line
from sam_fast.data.textures import cut, palette, texture_bank
from sam_fast.data.variety import hues

LEAST_AREA = 48 / 256**2  # smaller visible regions have no mask, as a share of the image
LEAST_VISIBLE = 0.15  # nor have those of which less is seen, as a share of themselves
SAME = 0.92  # nor has a part that is this much of its whole
_FLAT_OR_NOT = cumulative_shares((0.2, 0.8))
_GROUNDS = cumulative_shares((0.55, 0.3, 0.15))  # one, two or three of them
_DOMAINS = (20230405, 20230406)  # first words of the random streams of training and of held-out scenes


@dataclass(frozen=True)
class SceneSource:
    """An endless supply of scenes, cut at `length`; see `make_scene`.

    Attributes:
        size: pixels of the side.
        seed: which supply.
        length: how many scenes there are.
        held_out: scenes for evaluation: other streams, photos and shape families than any training scene.
    """

    size: int = 256
    seed: int = 0
    length: int = 1_000_000
    held_out: bool = False

    def __post_init__(self) -> None:
        _check(self.seed, 0, self.size)
        if self.length < 0:
            raise ValueError(f"length must not be negative, got {self.length}")

    def __len__(self) -> int:
        return self.length

    def load(self, index: int, *, max_masks: int | None = None, rng: np.random.Generator | None = None) -> Sample:
        """Make scene `index`; see `SampleSource`.

        Raises:
            IndexError: index is not from 0 to length - 1.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"index must be from 0 to {self.length - 1}, got {index}")
        return _make(self.seed, index, self.size, self.held_out, max_masks, rng)


def make_scene(seed: int, index: int, size: int = 256, *, held_out: bool = False) -> Sample:
    """Make one scene, the same bytes in every process.

    Args:
        seed: not negative.
        index: not negative; which scene of that seed.
        size: pixels of the side, 64 to 1024. A larger one shows the same kind of scene, sharper.
        held_out: a scene for evaluation. Its random stream is no training scene's, its photo textures come from
            `assets/photos` only, and a third to a half of its objects have shapes of `families.HELD_OUT_FAMILIES`;
            training scenes have neither.

    Returns:
        A sample of size x size pixels with all of its masks, a whole before its parts.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check(seed, index, size)
    return _make(seed, index, size, held_out, None, None)


def _check(seed: int, index: int, size: int) -> None:
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}")
    if not 64 <= size <= 1024:
        raise ValueError(f"size must be from 64 to 1024, got {size}")


def _make(
    seed: int, index: int, size: int, held_out: bool, max_masks: int | None, chooser: np.random.Generator | None
) -> Sample:
    stream = np.random.SeedSequence([_DOMAINS[held_out], seed, index])
    layout, camera = (np.random.Generator(np.random.PCG64(child)) for child in stream.spawn(2))
    canvas = compose(layout, size, held_out)
    image = np.asarray(degrade(camera, canvas.image))
    kept = visible_regions(canvas)
    chosen = choose_masks(len(kept), max_masks, chooser)
    masks, above = np.zeros((len(chosen), size, size), bool), np.empty_like(canvas.owner)
    for mask, which in zip(masks, chosen.tolist(), strict=True):
        region = kept[which]
        # Unsigned arithmetic wraps around: one comparison for both ends of the range.
        np.subtract(canvas.owner, np.uint16(region.first), out=above)
        np.less(above, np.uint16(region.last - region.first), out=mask)
    return Sample(image, masks, f"{'held-out' if held_out else 'scene'}-{seed}-{index}")


def visible_regions(canvas: Canvas) -> list[Region]:
    """The regions that are worth a mask: large enough, not hidden, and not nearly the same as their whole."""
    seen = np.concatenate([[0], np.cumsum(np.bincount(canvas.owner.ravel(), minlength=int(canvas.owner.max()) + 1))])
    least = LEAST_AREA * canvas.size**2
    kept: list[Region] = []
    shown: dict[int, int] = {}  # visible pixels of the nearest kept region at or above each region
    last = len(seen) - 1
    for number, region in enumerate(canvas.regions):
        area = int(seen[min(region.last, last)] - seen[min(region.first, last)])
        whole = shown.get(region.parent, 0)
        shown[number] = whole
        if area < least or area < LEAST_VISIBLE * region.area or (whole and area > SAME * whole):
            continue
        shown[number] = area
        kept.append(region)
    return kept


def compose(rng: np.random.Generator, size: int, held_out: bool) -> Canvas:
    """Paint a scene, without the camera's imperfections."""
    bank = texture_bank(held_out)
    angle = uniform(rng, -0.9, 0.1) * np.pi  # mostly from above
    shadows, contrast = rng.random() < 0.6, pick(rng, (10.0, 18.0, 28.0))
    style = Style(
        light=np.array([np.cos(angle), np.sin(angle)]),
        relief=(0.0, uniform(rng, 0.2, 1))[draw_index(rng, _FLAT_OR_NOT)],
        shadow=uniform(rng, 0.25, 0.75) if shadows else 0.0,
        reach=uniform(rng, 0.01, 0.25),
        softness=uniform(rng, 0.01, 0.12),
        contrast=float(contrast),
    )
    canvas = Canvas(size, bank, style)
    colors = palette(rng, bank, 8)
    horizon = _paint_background(rng, canvas, colors)
    if rng.random() < 0.2:
        canvas.blur(uniform(rng, 0.6, 3.0))
    prepared = []
    for part, radius in _objects(rng, horizon, held_out):
        own = colors[rng.integers(len(colors), size=4)] * rng.uniform(0.7, 1.25, (4, 1)) + rng.normal(0, 10, (4, 3))
        related = rng.random(4) < 0.35
        own[related] = own[0] * rng.uniform(0.5, 1.5, (4, 1))[related]
        own = np.minimum(np.maximum(own, 4), 251).astype(np.float32)
        prepared.append(canvas.prepare(rng, part, own, flat=bool(rng.random() < 0.1 or radius > 1)))
    canvas.show(*prepared)
    return canvas


def _paint_background(rng: np.random.Generator, canvas: Canvas, colors: np.ndarray) -> float | None:
    """Paint a photo, or stuff; return the height of a horizon, 0..1, if there is one."""
    kind, everything = rng.random(), Part([Contour(np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]]) * 1.2 - 0.1)])
    everything.family = "stuff"
    shades = colors[rng.integers(len(colors), size=(4, 4))]
    if kind < 0.15:
        photo = canvas.bank.photos[int(rng.integers(len(canvas.bank.photos)))]
        canvas.image = cut(rng, photo, canvas.size, canvas.size, canvas.size, uniform(rng, 0.8, 2)).convert("RGB")
        if canvas.bank.varied and rng.random() < 0.5:
            canvas.image = canvas.image.convert("RGB", hues(rng))
        return None
    canvas.paint(rng, everything, shades[0], flat=True)
    if kind < 0.4:
        return None
    turned = rng.random() < 0.15
    heights = np.sort(rng.uniform(0.15, 0.85, 1 + draw_index(rng, _GROUNDS)))
    for height, shade in zip(heights.tolist(), shades[1:], strict=False):
        part = Part(_ground(rng, height, turned), family="stuff")
        canvas.paint(rng, part, shade, flat=True)
    return None if turned else float(heights[-1])


def _ground(rng: np.random.Generator, height: float, turned: bool) -> Shape:
    """Everything below a straight, wavy or ragged line."""
    x = np.linspace(-0.1, 1.1, 81)
    y = height + pick(rng, (0.0, rng.normal(0, 0.12))) * (x - 0.5)
    kind = rng.random()
    if kind < 0.35:
        y = y + uniform(rng, 0.01, 0.06) * ragged_line(rng, 80, uniform(rng, 1.5, 2.5))
    elif kind < 0.55:
        y = y + uniform(rng, 0.01, 0.05) * ragged_line(rng, 80, uniform(rng, 0.6, 1.1))
    elif kind < 0.65:  # a corner, as of walls
        y = y + np.abs(x - uniform(rng, 0.2, 0.8)) * uniform(rng, -0.5, 0.5)
    points = np.concatenate([np.stack([x, y], axis=1), [[1.2, 1.3], [-0.2, 1.3]]])
    return [Contour(points[:, ::-1] if turned else points)]


def _objects(rng: np.random.Generator, horizon: float | None, held_out: bool) -> list[tuple[Part, float]]:
    """Objects in the scene's frame with their radii, farthest first."""
    kind = rng.random()
    count, exponent, low, high = int(rng.integers(4, 13)), uniform(rng, 1.05, 2.3), 0.06, 0.4
    if kind < 0.15:  # dead leaves: everything covered
        count, low, high = int(rng.integers(14, 26)), 0.08, 0.5
    compound = 0.25 if kind < 0.15 else pick(rng, (0.6, 1.0, 2.5))
    radii = (low ** (1 - exponent) + rng.random(count) * (high ** (1 - exponent) - low ** (1 - exponent))) ** (
        1 / (1 - exponent)
    )
    if kind > 0.7:  # one object that fills the view
        radii = np.concatenate([[uniform(rng, 0.35, 0.75)], radii[: max(3, count // 2)]])
    elif kind >= 0.15 and rng.random() < 0.7:
        radii = np.sort(radii)[::-1]
    standing = horizon is not None and kind >= 0.15 and rng.random() < 0.6
    objects = []
    for number, radius in enumerate(radii.tolist()):
        part = make_object(rng, compound=3.0 if radius > 0.3 and kind >= 0.15 else compound, held_out=held_out)
        center = rng.uniform(0, 1, 2)
        if kind > 0.7 and number == 0:
            center = rng.uniform(0.3, 0.7, 2)
        elif standing and horizon is not None:
            depth = rng.random()
            center[1] = min(horizon + depth * (1 - horizon), 1.0) - 0.8 * radius
        objects.append((part, _placement(rng, part, center, radius), radius))
    return [(part.placed(placement), radius) for part, placement, radius in objects]


def _placement(rng: np.random.Generator, part: Part, center: np.ndarray, radius: float) -> Placement:
    """Turn, stretch, shear and bend an object; things with an upright stay nearly so."""
    upright = bool(part.parts) or rng.random() < 0.3
    angle = rng.normal(0, 0.15) if upright and rng.random() < 0.8 else uniform(rng, 0, 2 * np.pi)
    stretch = np.exp(rng.normal(0, 0.25 if upright else 0.35))
    shear, mirror = rng.normal(0, 0.12), 1 if part.family in ("letter", "sign") else int(pick(rng, (-1, 1)))
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]])
    matrix = matrix @ np.diag([mirror * stretch**0.5, stretch**-0.5]) * radius
    bend = np.array([rng.normal(0, 0.05, 2), rng.uniform(1, 3, 2), rng.uniform(0, 6.3, 2)]).T
    return Placement(matrix, center, None if rng.random() < 0.4 else bend)
