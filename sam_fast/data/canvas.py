"""The picture of a procedural scene while it is painted, and who owns each of its pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from sam_fast.data.objects import Part
from sam_fast.data.shapes import Raster, rasterize
from sam_fast.data.textures import Bank, Texture, fill

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


@dataclass(frozen=True)
class Region:
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
        """Paint an object.

        Args:
            rng: draws textures and shading; as often for every size.
            part: the object, in the scene's frame.
            colors: [4, 3], 0..255, the object's own.
            flat: neither shadow nor shading, as for what is far or large.
        """
        seeds = rng.integers(2**62, size=len(colors)).tolist()
        bevel, slope = rng.uniform(0, self.style.relief), rng.normal(0, 0.3 * self.style.relief, 2)
        relief = Relief(0.0 if flat else bevel, slope)
        leaves: list[tuple[Part, Raster | None, int]] = []
        self._collect(part, None, leaves)
        if not flat and self.style.shadow > 0:
            self._cast_shadow([raster for _, raster, _ in leaves if raster is not None])
        first = self._leaves
        for number, (leaf, raster, area) in enumerate(leaves):
            if raster is not None and area > _SPECK * self.size**2:
                index = leaf.color % len(colors)
                self._paint_leaf(seeds[index], raster, area, colors[index], first + number, relief, number > 0)
        self._leaves += len(leaves)
        self._register(part, leaves, first)

    def blur(self, radius: float) -> None:
        """Put everything so far out of focus; radius in pixels of a 256-pixel scene."""
        self.image = self.image.filter(ImageFilter.GaussianBlur(radius * self.size / 256))

    def _collect(self, part: Part, parent: Raster | None, leaves: list[tuple[Part, Raster | None, int]]) -> None:
        """The leaves of a tree in the order of painting, with their coverage and its area."""
        raster = None
        if part.shape is not None:
            raster = rasterize(part.shape, self.size)
            if part.clip and parent is not None and raster is not None:
                raster = _intersection(raster, parent)
            area = 0 if raster is None else sum(raster.alpha.histogram()[128:])
            leaves.append((part, raster, area))
        for child in part.parts:
            self._collect(child, raster, leaves)

    def _register(self, whole: Part, leaves: list[tuple[Part, Raster | None, int]], first: int) -> None:
        """Add the regions of an object that has just been painted."""
        areas = iter([area for _, _, area in leaves])

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

    def _paint_leaf(
        self, seed: int, raster: Raster, area: int, color: np.ndarray, number: int, relief: Relief, calm: bool
    ) -> None:
        alpha, left, top = raster
        width, height = alpha.size
        window = (left, top, left + width, top + height)
        coverage = np.asarray(alpha)
        if area < _TINY * self.size**2:
            behind = np.array(self.image.resize((1, 1), Image.Resampling.BOX, window).getpixel((0, 0)), np.float64)
            shift = _separation(color, behind, self.style.contrast)
            self.image.paste(tuple((color + shift).clip(0, 255).astype(int).tolist()), window, alpha)
        else:
            rng = np.random.Generator(np.random.PCG64(seed))
            texture = fill(rng, self.bank, color, width, height, self.size, calm=calm)
            shade = self._shading(alpha, relief) if relief.bevel > 0.05 and area > 3 * _TINY * self.size**2 else None
            shift = self._contrast(texture, coverage, window)
            self.image.paste(Image.fromarray(texture.render(shift, shade)), window, alpha)
        owner = self.owner[top : top + height, left : left + width]
        np.copyto(owner, np.uint16(number), where=coverage >= 128)

    def _contrast(self, texture: Texture, coverage: np.ndarray, window: tuple[int, int, int, int]) -> float:
        """How much lighter or darker a texture must get to stand out from what it will cover."""
        step = max(1, min(coverage.shape) // 10)
        share = coverage[::step, ::step].astype(np.float32)
        old = np.asarray(self.image.resize(share.shape[::-1], Image.Resampling.NEAREST, window))
        weight = share.ravel() / max(float(share.sum()), 1e-6)
        mean_new, mean_old = (weight @ pixels.reshape(-1, 3) for pixels in (texture.sample(step), old))
        return _separation(mean_new, mean_old, self.style.contrast)

    def _shading(self, alpha: Image.Image, relief: Relief) -> np.ndarray:
        """A factor [h, w] around 1: the light on a surface that bulges towards its middle, plus a plain gradient."""
        ratio = _SHADE / max(alpha.size)
        width, height = (max(2, round(side * min(1.0, ratio))) for side in alpha.size)
        # A margin of nothing around the region, so that it falls off at the window's border too.
        small = Image.new("L", (width + 8, height + 8))
        small.paste(alpha.resize((width, height), Image.Resampling.BOX), (4, 4))
        dome = np.asarray(small.filter(ImageFilter.BoxBlur(max(width, height) / 8)), np.float32) / 255
        across, down = dome[4:-4, 5:-3] - dome[4:-4, 3:-5], dome[5:-3, 4:-4] - dome[3:-5, 4:-4]
        lit = (self.style.light[0] * across + self.style.light[1] * down) * (0.125 * max(width, height))
        x = relief.slope[0] * (2 * np.arange(width) / width - 1)
        y = relief.slope[1] * (2 * np.arange(height) / height - 1)
        factor = 1 + relief.bevel * (lit.clip(-0.9, 0.9) + 0.25 * (dome[4:-4, 4:-4] - 0.7)) + (x + y[:, None])
        image = Image.fromarray(factor.clip(0.25, 1.9).astype(np.float32))
        return np.asarray(image.resize(alpha.size, Image.Resampling.BICUBIC))

    def _cast_shadow(self, rasters: list[Raster]) -> None:
        """Darken what lies behind an object, away from the light."""
        if not rasters:
            return
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
        sheet = sheet.resize((width * step, height * step), Image.Resampling.BILINEAR)
        self.image.paste((12, 12, 18), (left - margin, top - margin), sheet)


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
    difference = float((new - old).mean())
    if np.abs(new - old).max() >= least and abs(difference) >= 0.5 * least:
        return 0.0
    sign = 1.0 if difference >= 0 else -1.0
    away = sign * (least - abs(difference))
    if not 15 < float(new.mean()) + away < 240:
        away = -sign * (least + abs(difference))
    return away
