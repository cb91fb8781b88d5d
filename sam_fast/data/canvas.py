"""The picture of a procedural scene while it is painted, and who owns each of its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from sam_fast.data.degrade import gaussian_blur
from sam_fast.data.draws import uniform
from sam_fast.data.objects import Part
from sam_fast.data.shapes import Raster, rasterize
from sam_fast.data.textures import Bank, Texture, as_array, fill

_SHADE = 28  # pixels of the longer side of a map of shading
_TINY = 120 / 256**2  # smaller leaves are of one colour, as a share of the image
_SPECK = 6 / 256**2  # smaller ones are left out


@dataclass(frozen=True)
class Style:
    """How everything in one scene is lit and painted.

    Attributes:
        light: [2], unit vector from where the light comes, x right and y down.
        relief: how strongly surfaces look curved, 0 to 1.
        shadow: darkness of cast shadows, 0 for none.
        reach: how far they fall, as a share of an object's size.
        softness: their blur, likewise.
        contrast: least difference of the mean colours of a region and of what it is painted on, 0..255.
    """

    light: np.ndarray
    relief: float
    shadow: float
    reach: float
    softness: float
    contrast: float


@dataclass(frozen=True)
class Relief:
    """How one object is shaded: how strongly it bulges, and a plain gradient [2] in x and y."""

    bevel: float
    slope: np.ndarray


class Region(NamedTuple):
    """A candidate for a mask: the leaves `first` .. `last` - 1 of a scene.

    Attributes:
        first, last: the range of leaves.
        area: pixels it would show if nothing lay before it.
        parent: index of the region it is a part of; -1 if none.
        family: the shape family or kind of its object.
    """

    first: int
    last: int
    area: int
    parent: int
    family: str


class Leaf(NamedTuple):
    """A part with a shape of its own.

    Attributes:
        part: the part.
        raster: where it is painted; None if outside of the image.
        alpha: the raster's picture, empty if there is none.
        window: left, top, right, bottom of it in the image.
        coverage: [h, w] uint8, the raster's, 255 inside.
        inside: [h, w] bool, where it owns the pixel.
        area: pixels of `inside`.
    """

    part: Part
    raster: Raster | None
    alpha: Image.Image
    window: tuple[int, int, int, int]
    coverage: np.ndarray
    inside: np.ndarray
    area: int


class Look(NamedTuple):
    """How a leaf is painted that is not too small for a texture.

    Attributes:
        texture: of the size of its window.
        grid: columns and rows of the pixels where it is compared with what it will cover.
        weight: [rows * columns] float32, the leaf's share of each, of sum 1.
        mean: [3] float32, the texture's colour there, weighted.
        shade: [h, w], what the texture is multiplied by, or None.
    """

    texture: Texture
    grid: tuple[int, int]
    weight: np.ndarray
    mean: np.ndarray
    shade: np.ndarray | None


@dataclass(frozen=True)
class Prepared:
    """An object of which nothing is left to chance.

    Attributes:
        part: the object, in the scene's frame.
        colors: [4, 3], 0..255.
        seeds: of the textures of each colour.
        relief: how it is shaded.
        flat: whether it casts no shadow.
    """

    part: Part
    colors: np.ndarray
    seeds: list[int]
    relief: Relief
    flat: bool


_Drawn = list[tuple[Part, Raster | None]]  # parts with shapes, and where they are painted
_Streams = dict[int, np.random.PCG64]  # by the index of a colour


class Canvas:
    """A picture of size x size pixels, painted back to front.

    Attributes:
        image: the picture so far, RGB.
        owner: [size, size] uint16, the leaf that is seen at each pixel; 0 for nothing with a mask.
        regions: every named part that was painted, a whole before its parts.
    """

    def __init__(self, size: int, bank: Bank, style: Style) -> None:
        self.size = size
        self.bank = bank
        self.style = style
        self.image = Image.new("RGB", (size, size))
        self.owner = np.zeros((size, size), np.uint16)
        self.regions: list[Region] = []
        self._leaves = 1

    def paint(self, rng: np.random.Generator, part: Part, colors: np.ndarray, *, flat: bool = False) -> None:
        """Paint an object: see `prepare`."""
        self.show(self.prepare(rng, part, colors, flat=flat))

    def prepare(self, rng: np.random.Generator, part: Part, colors: np.ndarray, *, flat: bool = False) -> Prepared:
        """Draw all that is random about an object, for `show`.

        Args:
            rng: draws textures and shading; as often for every size.
            part: the object, in the scene's frame.
            colors: [4, 3], 0..255, the object's own.
            flat: neither shadow nor shading, as for what is far or large.
        """
        seeds = rng.integers(2**62, size=len(colors)).tolist()
        bevel, slope = uniform(rng, 0, self.style.relief), rng.normal(0, 0.3 * self.style.relief, 2)
        return Prepared(part, colors, seeds, Relief(0.0 if flat else bevel, slope), flat)

    def show(self, *prepared: Prepared) -> None:
        """Paint prepared objects, one after another, over all that has been painted.

        What does not depend on the picture so far is made before, step by step for all objects: code that runs many
        times in a row stays in the processor's caches.
        """
        rasters = [self._collect(each.part, None, []) for each in prepared]
        leaves = [[_leaf(part, raster) for part, raster in own] for own in rasters]
        streams = [self._streams(*each) for each in zip(prepared, leaves, strict=True)]
        textures = [self._textures(*each) for each in zip(prepared, leaves, streams, strict=True)]
        shades = [self._shades(*each) for each in zip(prepared, leaves, strict=True)]
        looks = [_looks(*each) for each in zip(leaves, textures, shades, strict=True)]
        shadows = [self._shadow(*each) for each in zip(prepared, leaves, strict=True)]
        for each, own, shadow, look in zip(prepared, leaves, shadows, looks, strict=True):
            if shadow is not None:
                self.image.paste((12, 12, 18), (shadow.left, shadow.top), shadow.alpha)
            self._paint_leaves(own, each.colors, look)
            self._register(each.part, own, self._leaves)
            self._leaves += len(own)

    def blur(self, radius: float) -> None:
        """Put everything so far out of focus; radius in pixels of a 256-pixel scene."""
        self.image = gaussian_blur(self.image, radius * self.size / 256)

    def _collect(self, part: Part, parent: Raster | None, drawn: _Drawn) -> _Drawn:
        """Append the parts of a tree that have shapes, in the order of painting."""
        raster = None
        if part.shape is not None:
            raster = rasterize(part.shape, self.size)
            if part.clip and parent is not None and raster is not None:
                raster = _intersection(raster, parent)
            drawn.append((part, raster))
        for child in part.parts:
            self._collect(child, raster, drawn)
        return drawn

    def _register(self, whole: Part, leaves: list[Leaf], first: int) -> None:
        """Add the regions of an object that has just been painted."""
        areas = iter([leaf.area for leaf in leaves])

        def visit(part: Part, begin: int, parent: int, family: str) -> tuple[int, int]:
            family = part.family or family
            end, area, index = begin, 0, parent
            if part.named:
                index = len(self.regions)
                self.regions.append(Region(begin, begin, 0, parent, family))
            if part.shape is not None:
                end, area = begin + 1, next(areas)
            for child in part.parts:
                end, inner = visit(child, end, index, family)
                area += inner if part.shape is None else 0
            if part.named:
                self.regions[index] = Region(begin, end, area, parent, family)
            return end, area

        visit(whole, first, -1, "")

    def _paint_leaves(self, leaves: list[Leaf], colors: np.ndarray, looks: dict[int, Look]) -> None:
        for number, leaf in enumerate(leaves):
            if leaf.area <= _SPECK * self.size**2:
                continue
            if number in looks:
                self._paint_texture(leaf, looks[number])
            else:
                self._paint_plain(leaf, colors[leaf.part.color % len(colors)])
            left, top, right, bottom = leaf.window
            np.copyto(self.owner[top:bottom, left:right], np.uint16(self._leaves + number), where=leaf.inside)

    def _streams(self, prepared: Prepared, leaves: list[Leaf]) -> _Streams:
        """What draws the textures of each colour that has one."""
        textured = {leaf.part.color % len(prepared.colors) for leaf in leaves if leaf.area >= _TINY * self.size**2}
        return {index: np.random.PCG64(prepared.seeds[index]) for index in textured}

    def _textures(self, prepared: Prepared, leaves: list[Leaf], streams: _Streams) -> dict[int, Texture]:
        """The textures of the leaves that are not too small, by number; those of one colour are alike."""
        starts = {index: stream.state for index, stream in streams.items()}
        textures = {}
        for number, leaf in enumerate(leaves):
            if leaf.area < _TINY * self.size**2:
                continue
            index = leaf.part.color % len(prepared.colors)
            streams[index].state = starts[index]  # much faster than seeding again
            rng, (width, height) = np.random.Generator(streams[index]), leaf.alpha.size
            textures[number] = fill(rng, self.bank, prepared.colors[index], width, height, self.size, calm=number > 0)
        return textures

    def _shades(self, prepared: Prepared, leaves: list[Leaf]) -> dict[int, np.ndarray]:
        """The shading of the leaves that are large enough for it, by number."""
        if prepared.relief.bevel <= 0.05:
            return {}
        least = 3 * _TINY * self.size**2
        return {
            number: self._shading(leaf.alpha, prepared.relief)
            for number, leaf in enumerate(leaves)
            if leaf.area > least
        }

    def _paint_plain(self, leaf: Leaf, color: np.ndarray) -> None:
        behind = self.image.resize((1, 1), Image.Resampling.BOX, leaf.window).getpixel((0, 0))
        shifted = color + _separation(color, np.array(behind, np.float64), self.style.contrast)
        shifted = np.minimum(np.maximum(shifted, 0), 255).astype(int)
        self.image.paste(tuple(shifted.tolist()), leaf.window, leaf.alpha)

    def _paint_texture(self, leaf: Leaf, look: Look) -> None:
        behind = as_array(self.image.resize(look.grid, Image.Resampling.NEAREST, leaf.window)).reshape(-1, 3)
        shift = _separation(look.mean, look.weight @ behind, self.style.contrast)
        everywhere = leaf.area == leaf.coverage.size and leaf.coverage.min() == 255
        self.image.paste(look.texture.render(shift, look.shade), leaf.window, None if everywhere else leaf.alpha)

    def _shading(self, alpha: Image.Image, relief: Relief) -> np.ndarray:
        """A factor [h, w] around 1: the light on a surface that bulges towards its middle, plus a plain gradient."""
        ratio = _SHADE / max(alpha.size)
        width, height = (max(2, round(side * min(1.0, ratio))) for side in alpha.size)
        # A margin of nothing around the region, so that it falls off at the window's border too.
        small = Image.new("L", (width + 8, height + 8))
        small.paste(alpha.resize((width, height), Image.Resampling.BOX), (4, 4))
        dome = as_array(small.filter(ImageFilter.BoxBlur(max(width, height) / 8))).astype(np.float32)
        dome /= 255
        across, down = dome[4:-4, 5:-3] - dome[4:-4, 3:-5], dome[5:-3, 4:-4] - dome[3:-5, 4:-4]
        lit = (self.style.light[0] * across + self.style.light[1] * down) * (0.125 * max(width, height))
        x, y = relief.slope[0] * _centred(width), relief.slope[1] * _centred(height)
        np.minimum(np.maximum(lit, -0.9, out=lit), 0.9, out=lit)
        factor = 1 + relief.bevel * (lit + 0.25 * (dome[4:-4, 4:-4] - 0.7)) + (x + y[:, None])
        np.minimum(np.maximum(factor, 0.25, out=factor), 1.9, out=factor)
        image = Image.fromarray(factor.astype(np.float32))
        return as_array(image.resize(alpha.size, Image.Resampling.BICUBIC))

    def _shadow(self, prepared: Prepared, leaves: list[Leaf]) -> Raster | None:
        """How an object darkens what lies behind it, away from the light."""
        rasters = [leaf.raster for leaf in leaves if leaf.raster is not None]
        if prepared.flat or self.style.shadow <= 0 or not rasters:
            return None
        left, top, right, bottom = _bounds(rasters)
        extent = max(right - left, bottom - top)
        reach, soft = self.style.reach * extent, max(self.style.softness * extent, self.size / 200)
        margin = round(reach + 2 * soft) + 1
        step = max(1, round(soft / 1.5), self.size // 128)
        width, height = (right - left + 2 * margin) // step + 1, (bottom - top + 2 * margin) // step + 1
        sheet = Image.new("L", (width, height))
        shift = self.style.light * -reach
        for alpha, x, y in rasters:
            side = (max(1, round(alpha.width / step)), max(1, round(alpha.height / step)))
            small = alpha.resize(side, Image.Resampling.BOX)
            at = (round((x - left + margin + shift[0]) / step), round((y - top + margin + shift[1]) / step))
            sheet.paste(round(255 * self.style.shadow), at, small)
        sheet = sheet.filter(ImageFilter.GaussianBlur(soft / step))
        return self._enlarged(sheet, step, left - margin, top - margin)

    def _enlarged(self, sheet: Image.Image, step: int, left: int, top: int) -> Raster | None:
        """What is not empty of a sheet that has one pixel for step x step of the image."""
        shaded = sheet.getbbox()
        if shaded is None:
            return None
        # What is neither empty nor outside of the image, and one more pixel on each side for the interpolation.
        first_x, first_y = (max(0, low - 1, -at // step - 1) for low, at in zip(shaded[:2], (left, top), strict=True))
        last_x, last_y = (
            min(side, high + 1, (self.size - at - 1) // step + 2)
            for side, high, at in zip(sheet.size, shaded[2:], (left, top), strict=True)
        )
        if last_x <= first_x or last_y <= first_y:
            return None
        part = sheet.crop((first_x, first_y, last_x, last_y))
        mask = part.resize((part.width * step, part.height * step), Image.Resampling.BILINEAR)
        return Raster(mask, left + first_x * step, top + first_y * step)


def _looks(leaves: list[Leaf], textures: dict[int, Texture], shades: dict[int, np.ndarray]) -> dict[int, Look]:
    """How leaves with textures are painted, by number."""
    looks = {}
    for number, texture in textures.items():
        coverage = leaves[number].coverage
        step = max(1, min(coverage.shape) // 10)
        share = coverage[::step, ::step].astype(np.float32)
        weight = share.ravel() / max(float(share.sum()), 1e-6)
        mean = weight @ texture.sample(step).reshape(-1, 3)
        looks[number] = Look(texture, share.shape[::-1], weight, mean, shades.get(number))
    return looks


def _leaf(part: Part, raster: Raster | None) -> Leaf:
    if raster is None:
        return Leaf(part, None, _NO_ALPHA, (0, 0, 0, 0), _NO_COVERAGE, _NO_COVERAGE >= 128, 0)
    alpha, left, top = raster
    coverage = as_array(alpha)
    inside = coverage >= 128
    window = (left, top, left + alpha.width, top + alpha.height)
    return Leaf(part, raster, alpha, window, coverage, inside, int(np.count_nonzero(inside)))


_NO_ALPHA, _NO_COVERAGE = Image.new("L", (0, 0)), np.zeros((0, 0), np.uint8)


@lru_cache
def _centred(steps: int) -> np.ndarray:
    """From -1 up to less than 1, [steps]."""
    return 2 * np.arange(steps) / steps - 1


def _bounds(rasters: list[Raster]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of windows."""
    return (
        min(raster.left for raster in rasters),
        min(raster.top for raster in rasters),
        max(raster.left + raster.alpha.width for raster in rasters),
        max(raster.top + raster.alpha.height for raster in rasters),
    )


def _intersection(raster: Raster, parent: Raster) -> Raster | None:
    left, top = max(raster.left, parent.left), max(raster.top, parent.top)
    right = min(raster.left + raster.alpha.width, parent.left + parent.alpha.width)
    bottom = min(raster.top + raster.alpha.height, parent.top + parent.alpha.height)
    if right <= left or bottom <= top:
        return None
    a, b = (r.alpha.crop((left - r.left, top - r.top, right - r.left, bottom - r.top)) for r in (raster, parent))
    return Raster(ImageChops.darker(a, b), left, top)


def _separation(new: np.ndarray, old: np.ndarray, least: float) -> float:
    """What to add to a colour [3] so that it differs from another by `least`, and in lightness by half of that."""
    channels = new - old
    difference = _mean(channels)
    if abs(difference) >= 0.5 * least and max(map(abs, channels.tolist())) >= least:
        return 0.0
    sign = 1.0 if difference >= 0 else -1.0
    away = sign * (least - abs(difference))
    if not 15 < _mean(new) + away < 240:
        away = -sign * (least + abs(difference))
    return away


def _mean(color: np.ndarray) -> float:
    """The mean of a colour [3], to the bit as `color.mean()` in a third of its time."""
    return float(color.dtype.type(color.sum() / 3))
