"""Textures of procedural scenes: crops of photos and noise, stripes, checks, dots and patches in random colours.

Every texture is a scalar or RGB picture mapped through a random colour ramp. What is expensive (photos, noise with a
natural spectrum) is made once per process and cut from; nothing depends on the order of calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from sam_fast.data.draws import pick, uniform
from sam_fast.data.variety import collage, cut_turned, hues

ASSETS = Path(__file__).parents[1] / "assets"
TRAINING_PHOTOS = ASSETS / "textures"
HELD_OUT_PHOTOS = ASSETS / "photos"  # never a texture of a training scene

_TILE = 512  # pixels of a noise tile's side, which wraps around
_COLLAGES = 6  # among the photos of training scenes
_REFERENCE = 256  # texture scales are in pixels of a scene of this size
_LEVELS = np.linspace(-1, 1, 256, dtype=np.float32)[:, None]


@dataclass(frozen=True)
class Bank:
    """The pictures that textures are cut from.

    Attributes:
        photos: RGB and gray (mode L) photos.
        colors: [C, 3] float32, colours that occur in the RGB photos.
        noise: gray tiles whose spectra fall with different exponents, the smoothest first.
        patches: gray tiles of flat patches.
        varied: whether photos are also mixed and changed in hue, see `variety`.
    """

    photos: tuple[Image.Image, ...]
    colors: np.ndarray
    noise: tuple[Image.Image, ...]
    patches: tuple[Image.Image, ...]
    varied: bool


@lru_cache(maxsize=2)
def texture_bank(held_out: bool = False) -> Bank:
    """The bank of training or of held-out scenes, made at the first call in a process."""
    folder = HELD_OUT_PHOTOS if held_out else TRAINING_PHOTOS
    photos = tuple(_read_photo(path) for path in sorted(folder.glob("*.jpg")))
    small = [np.asarray(p.resize((24, 24), Image.Resampling.BOX)).reshape(-1, 3) for p in photos if p.mode == "RGB"]
    rng = np.random.Generator(np.random.PCG64([int(held_out), 1]))
    noise = tuple(_noise_tile(rng, exponent) for exponent in (2.2, 1.7, 1.3, 1.0, 0.6))
    patches = tuple(_patch_tile(rng, cells) for cells in (40, 200)) + tuple(_bands_tile(tile) for tile in noise[:2])
    colors = np.concatenate(small).astype(np.float32)
    # The night sky and the rims of round pictures would make most scenes black.
    colors = colors[colors.max(1) > 45]
    if not held_out:  # scenes for evaluation stay what they are
        photos += tuple(collage(rng, [*photos, *noise[1:], *patches]) for _ in range(_COLLAGES))
    return Bank(photos, colors, noise, patches, varied=not held_out)


def _read_photo(path: Path) -> Image.Image:
    with Image.open(path) as file:
        photo = file.convert("L") if file.mode == "L" else file.convert("RGB")
    photo.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    return photo


def _noise_tile(rng: np.random.Generator, exponent: float) -> Image.Image:
    """Noise of amplitude 1/f^exponent, mean 128 and standard deviation about 50, that wraps around."""
    frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None]) * _TILE
    spectrum = np.fft.rfft2(rng.standard_normal((_TILE, _TILE))) * np.maximum(frequency, 2.0) ** -exponent
    spectrum[0, 0] = 0
    values = np.fft.irfft2(spectrum, (_TILE, _TILE))
    return Image.fromarray((128 + 50 * values / values.std()).clip(0, 255).astype(np.uint8))


def _patch_tile(rng: np.random.Generator, cells: int) -> Image.Image:
    """Voronoi cells of random gray, that wrap around."""
    at = np.arange(_TILE // 2, dtype=np.float32)
    best = np.full((_TILE // 2, _TILE // 2), np.inf, np.float32)
    gray = np.zeros(best.shape, np.uint8)
    for x, y, value in zip(*rng.uniform(0, _TILE // 2, (2, cells)), rng.integers(0, 256, cells), strict=True):
        dx, dy = (np.minimum(np.abs(at - c), _TILE // 2 - np.abs(at - c)) for c in (x, y))
        distance = dy[:, None] ** 2 + dx[None] ** 2
        closer = distance < best
        best[closer], gray[closer] = distance[closer], value
    return Image.fromarray(gray).resize((_TILE, _TILE), Image.Resampling.BILINEAR)


def _bands_tile(tile: Image.Image) -> Image.Image:
    """Camouflage: noise in four levels."""
    return tile.point([min(255, 85 * (max(0, value - 40) // 45)) for value in range(256)])


def cut(rng: np.random.Generator, picture: Image.Image, width: int, height: int, size: int, zoom: float) -> Image.Image:
    """A crop of a picture, turned and mirrored at random, to fill a window of an image of size x size pixels.

    Args:
        rng: draws place and orientation.
        picture: any mode.
        width, height: pixels of the window.
        size: pixels of the image's side.
        zoom: pixels of the picture per pixel of a 256-pixel image.
    """
    turn, (x, y, spin) = int(rng.integers(8)), rng.random(3).tolist()
    scale = zoom * _REFERENCE / size
    if turn & 1:
        width, height = height, width
    scale = min(scale, picture.width / width, picture.height / height)
    across, down = width * scale, height * scale
    # Rounding must not carry the box over the picture's border.
    left, top = max(0.0, x * (picture.width - across)), max(0.0, y * (picture.height - down))
    box = (left, top, min(left + across, picture.width), min(top + down, picture.height))
    piece = picture.resize((width, height), Image.Resampling.BILINEAR, box)
    turned = _TURNS[turn if 2 * spin - 1 > -0.4 else turn & 3]
    return piece if turned is None else piece.transpose(turned)


_TURNS = (  # bit 0: a quarter turn; then bit 1: left and right change places; then bit 2: top and bottom do
    None,
    Image.Transpose.ROTATE_90,
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
)


def ramp(rng: np.random.Generator, color: np.ndarray, contrast: float) -> np.ndarray:
    """A table [256, 3] float32 from dark to light around a colour (0..255), its hue drifting a little.

    Args:
        rng: draws the drift and, one time in four, turns the ramp round.
        color: [3], the middle.
        contrast: 0 flat, 1 from black to twice the colour.
    """
    signed = -contrast if rng.random() < 0.25 else contrast
    slope = (color + rng.normal(20, 25, 3)) * signed
    return color.astype(np.float32) + _LEVELS * slope.astype(np.float32)


@dataclass(frozen=True)
class Texture:
    """A picture that is not in its colours yet, so that they can be shifted for next to nothing.

    Attributes:
        picture: gray (mode L) with a table [256, 3], or RGB with a table [256, 1] for all channels alike.
        table: float32, the colour or the value of each level, about 0..255, not clipped.
    """

    picture: Image.Image
    table: np.ndarray

    @cached_property
    def index(self) -> np.ndarray:
        """The picture as an array, [h, w] or [h, w, 3] uint8."""
        return as_array(self.picture)

    def sample(self, step: int) -> np.ndarray:
        """Every `step`-th pixel of every `step`-th row, [h / step, w / step, 3] float32."""
        return self._look_up(self.table, self.index[::step, ::step])

    def render(self, shift: float, shade: np.ndarray | None) -> Image.Image:
        """The texture times `shade` [h, w], if there is one, plus `shift`, as an RGB picture."""
        if shade is None:
            levels = _to_bytes(self.table + np.float32(shift)).tobytes()
            if self.index.ndim == 3:
                return Image.frombytes("RGB", self.picture.size, self.index.tobytes().translate(levels))
            # Pillow looks a palette's colours up several times as fast as numpy's `take`.
            colored = self.picture.copy()
            colored.putpalette(levels)
            return colored.convert("RGB")
        # A fourth channel is work for nothing, but numpy is a good deal faster with four than with three.
        table = np.concatenate([self.table, self.table[:, :1]], axis=1) if self.index.ndim == 2 else self.table
        lit = self._look_up(table, self.index)
        lit *= shade[..., None]
        lit += np.float32(shift)
        return Image.frombytes("RGB", self.picture.size, _to_bytes(lit), "raw", "RGBX" if lit.shape[2] == 4 else "RGB")

    def _look_up(self, table: np.ndarray, index: np.ndarray) -> np.ndarray:
        # Without mode="clip" this takes four times as long.
        return table.take(index, 0, mode="clip") if index.ndim == 2 else table[:, 0].take(index, mode="clip")


def as_array(image: Image.Image) -> np.ndarray:
    """What `np.asarray` makes of a picture of mode L, RGB or F, in a third of the time where it is small."""
    channels, kind = _LAYOUTS[image.mode]
    shape = (image.height, image.width, *channels)
    if 0 in shape:
        return np.empty(shape, kind)
    # As `tobytes` does it; but that takes at least 64 KiB of memory at each call, and drives others' out of the caches.
    image.load()
    encoder = Image.core.raw_encoder(image.mode, image.mode)
    encoder.setimage(image.im, (0, 0, *image.size))
    _, _, data = encoder.encode(math.prod(shape) * kind.itemsize)
    return np.frombuffer(data, kind).reshape(shape)


_LAYOUTS: dict[str, tuple[tuple[int, ...], np.dtype]] = {  # shape of a pixel and type, by mode
    "L": ((), np.dtype(np.uint8)),
    "RGB": ((3,), np.dtype(np.uint8)),
    "F": ((), np.dtype(np.float32)),
}


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Values of an array, which is overwritten, clipped to 0..255 and cut off to uint8."""
    return np.minimum(np.maximum(values, 0, out=values), 255, out=values).astype(np.uint8)


def _log_uniform(rng: np.random.Generator, logs: tuple[float, float]) -> float:
    """A number whose logarithm is uniform between two."""
    return float(np.exp(uniform(rng, *logs)))


_PERIODS, _PHOTO_ZOOMS, _NOISE_ZOOMS = (
    (float(np.log(low)), float(np.log(high))) for low, high in ((0.015, 0.12), (0.3, 2.2), (0.4, 4))
)


def _stripes(rng: np.random.Generator, width: int, height: int, size: int) -> np.ndarray:
    """A periodic pattern [h, w] uint8: stripes, checks, dots, or stripes bent like wood."""
    kind, angle = int(rng.integers(5)), uniform(rng, 0, np.pi)
    period = size * _log_uniform(rng, _PERIODS)
    sharp, duty, phase, bend = pick(rng, (1.0, 4.0, 20.0)), uniform(rng, -0.5, 0.5), rng.uniform(0, 7, 2), rng.random()
    step = np.float32(2 * np.pi / period)
    x = np.arange(width, dtype=np.float32)[None] * step
    y = np.arange(height, dtype=np.float32)[:, None] * step
    u = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)) + np.float32(phase[0])
    if kind in (0, 1):  # stripes, bent stripes
        if kind == 1:
            u = u + np.float32(0.3 + 3 * bend) * np.sin(0.31 * y + np.float32(phase[1])) * np.cos(0.17 * x)
        wave = np.sin(u)
    else:  # checks, dots, grid
        v = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle)) + np.float32(phase[1])
        a, b = np.sin(u), np.sin(v)
        wave = a * b if kind == 2 else (a + b) / 2 if kind == 3 else np.maximum(a, b)
    wave -= np.float32(duty)
    wave *= np.float32(sharp)
    np.minimum(np.maximum(wave, -1, out=wave), 1, out=wave)
    wave *= 127.5
    wave += 127.5
    return wave.astype(np.uint8)


def _photo(rng: np.random.Generator, bank: Bank, color: np.ndarray, shape: tuple[int, int], size: int) -> Texture:
    """A crop of a photo: colour photos as they are, or tinted; gray ones through a ramp."""
    index, zoom = int(rng.integers(len(bank.photos))), _log_uniform(rng, _PHOTO_ZOOMS)
    tint, gain, contrast = rng.random(), uniform(rng, 0.7, 1.3), uniform(rng, 0.3, 1)
    width, height = shape[1], shape[0]
    if bank.varied:
        piece = _varied_photo(rng, bank, index, width, height, size, zoom)
    else:
        piece = cut(rng, bank.photos[index], width, height, size, zoom)
    table = ramp(rng, color, contrast)
    if piece.mode == "L" or tint < 0.35:
        return Texture(piece.convert("L"), table)
    return Texture(piece, np.arange(256, dtype=np.float32)[:, None] * np.float32(gain))


def _varied_photo(
    rng: np.random.Generator, bank: Bank, index: int, width: int, height: int, size: int, zoom: float
) -> Image.Image:
    """A crop of a photo at any angle, at times mixed with one of another, or in other hues."""
    other, mixed, share = int(rng.integers(len(bank.photos))), rng.random() < 0.3, uniform(rng, 0.25, 0.75)
    recolored, matrix = rng.random() < 0.6, hues(rng)
    if rng.random() < 0.6:
        piece = cut_turned(rng, bank.photos[index], width, height, zoom * _REFERENCE / size)
    else:
        piece = cut(rng, bank.photos[index], width, height, size, zoom)
    if mixed:
        second = cut(rng, bank.photos[other], width, height, size, zoom)
        piece = Image.blend(piece, second.convert(piece.mode), share)
    return piece.convert("RGB", matrix) if recolored and piece.mode == "RGB" else piece


def fill(
    rng: np.random.Generator, bank: Bank, color: np.ndarray, width: int, height: int, size: int, *, calm: bool = False
) -> Texture:
    """A random texture for a window of an image.

    Args:
        rng: draws everything; how often does not depend on the window.
        bank: pictures to cut from.
        color: [3], 0..255, around which the texture lies (colour photos ignore it).
        width, height: pixels of the window.
        size: pixels of the image's side.
        calm: prefer smooth surfaces, as small parts and skies have them.
    """
    kind = rng.random() ** (1.6 if calm else 1.0)
    contrast = uniform(rng, 0.05, 0.25) if rng.random() < 0.6 else uniform(rng, 0.25, 0.7)
    noise, zoom = bank.noise[int(rng.integers(len(bank.noise)))], _log_uniform(rng, _NOISE_ZOOMS)
    if kind < 0.19:  # a plain surface with faint mottle
        table = ramp(rng, color, 0.02 + 0.2 * contrast)
        return Texture(cut(rng, noise, width, height, size, zoom), table)
    if kind < 0.38:
        table = ramp(rng, color, contrast)
        return Texture(cut(rng, noise, width, height, size, zoom), table)
    if kind < 0.46:  # two colours that change places slowly
        other = bank.colors[int(rng.integers(len(bank.colors)))]
        share = cut(rng, bank.noise[int(rng.integers(2))], width, height, size, zoom)
        return Texture(share, color + (other - color) * (_LEVELS + 1) / 2)
    if kind < 0.78:
        return _photo(rng, bank, color, (height, width), size)
    if kind < 0.89:
        table = ramp(rng, color, contrast)
        pattern = Image.fromarray(_stripes(rng, width, height, size))
        return Texture(Image.blend(pattern, cut(rng, noise, width, height, size, zoom), 0.2), table)
    patches = bank.patches[int(rng.integers(len(bank.patches)))]
    table = ramp(rng, color, contrast)
    return Texture(cut(rng, patches, width, height, size, zoom), table)


def palette(rng: np.random.Generator, bank: Bank, count: int) -> np.ndarray:
    """Colours [count, 3] float32, 0..255, of one scene: from photos, of subdued or vivid paint, or of a few hues."""
    kind = rng.random()
    if kind < 0.45:
        colors = bank.colors[rng.integers(len(bank.colors), size=count)]
        return (colors * uniform(rng, 0.6, 1.4) + rng.normal(0, 12, (count, 3))).clip(5, 250).astype(np.float32)
    hue = rng.random() + rng.uniform(0, 0.12 if kind > 0.8 else 1.0, count)
    saturation = rng.beta(1.2, 3.0, count) if kind < 0.7 else rng.beta(3, 2, count)
    value = rng.uniform(0.08, 1, count)
    wheel = 0.5 + 0.5 * np.cos(2 * np.pi * (hue[:, None] + np.array([0, 1 / 3, 2 / 3])))
    colors = 255 * value[:, None] * (1 - saturation[:, None] * (1 - wheel))
    return colors.clip(5, 250).astype(np.float32)
