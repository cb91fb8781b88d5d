"""What light and a camera do to a procedural scene: uneven light, tone, blur, noise, JPEG."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from sam_fast.data.draws import pick, uniform

_REFERENCE = 256  # lengths are in pixels of a scene of this size
_LIGHT = 48  # pixels of the side of a map of light
_NOISE = 640
_NOISE_STD = 32


@lru_cache(maxsize=1)
def _noise_tiles() -> tuple[np.ndarray, np.ndarray]:
    """White noise and noise of neighbouring pixels alike, int8 [640, 640, 3] of standard deviation 32."""
    rng = np.random.Generator(np.random.PCG64(7))
    white = rng.standard_normal((_NOISE, _NOISE, 3), dtype=np.float32)
    white += 0.7 * rng.standard_normal((_NOISE, _NOISE, 1), dtype=np.float32)
    smooth = white + np.roll(white, 1, 0) + np.roll(white, 1, 1) + np.roll(white, (1, 1), (0, 1))
    white, smooth = ((_NOISE_STD / tile.std() * tile).clip(-127, 127).astype(np.int8) for tile in (white, smooth))
    return white, smooth


@lru_cache(maxsize=1)
def _light_map() -> tuple[np.ndarray, np.ndarray]:
    """x and y [48, 48] of a map of light, -1 to 1."""
    y, x = np.mgrid[-1 : 1 : _LIGHT * 1j, -1 : 1 : _LIGHT * 1j]
    return x, y


def light(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Multiply by smooth, slightly coloured light: a gradient, vignetting, at times the shadow of something unseen."""
    x, y = _light_map()
    angle, slope = uniform(rng, 0, 2 * np.pi), uniform(rng, 0, 0.35)
    field = 1 + slope * (np.cos(angle) * x + np.sin(angle) * y)
    if rng.random() < 0.4:
        field *= 1 - uniform(rng, 0.05, 0.35) * (x**2 + y**2) / 2
    if rng.random() < 0.3:
        center, width = rng.uniform(-1, 1, 2), uniform(rng, 0.3, 1.2)
        field *= 1 + uniform(rng, -0.4, 0.6) * np.exp(-((x - center[0]) ** 2 + (y - center[1]) ** 2) / width**2)
    if rng.random() < 0.25:
        field *= 1 - uniform(rng, 0.2, 0.55) * _unseen_shadow(rng)
    cast = 1 + rng.normal(0, 0.06, 3) * pick(rng, (0.3, 1, 2))
    colored = field[..., None] * cast
    pixels = (255 * colored / max(1.0, colored.max())).clip(0, 255).astype(np.uint8)
    return ImageChops.multiply(image, Image.fromarray(pixels).resize(image.size, Image.Resampling.BICUBIC))


def _unseen_shadow(rng: np.random.Generator) -> np.ndarray:
    """Coverage [48, 48] of a polygon or of stripes, as of a window or of leaves."""
    sheet = Image.new("L", (_LIGHT, _LIGHT))
    draw = ImageDraw.Draw(sheet)
    if rng.random() < 0.5:
        draw.polygon((rng.uniform(-0.5, 1.5, (4, 2)) * _LIGHT).ravel().tolist(), fill=255)
    else:
        x0, step, lean = uniform(rng, -20, 0), uniform(rng, 10, 24), uniform(rng, -30, 30)
        for left in np.arange(x0, 2 * _LIGHT, step).tolist():
            draw.line((left, 0, left + lean, _LIGHT), fill=255, width=int(step / 2.5))
    return np.asarray(sheet.filter(ImageFilter.GaussianBlur(uniform(rng, 0.4, 2.5))), np.float64) / 255


def tone(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Exposure to a random mean, gamma and contrast, as one table per channel; at times without colour."""
    mean = max(8.0, float(np.asarray(image.resize((16, 16), Image.Resampling.BOX)).mean()))
    target = rng.normal(112, 24)
    gain = min(max(target / mean, 0.6), 3.0) * uniform(rng, 0.9, 1.1)
    gamma, contrast, haze = uniform(rng, 0.75, 1.3), uniform(rng, 0.75, 1.15), pick(rng, (0, 0, uniform(rng, 0, 40)))
    level = np.arange(256) / 255 * gain
    level = level.clip(0, 1.0) ** gamma
    level = (level - 0.45) * contrast + 0.45
    table = (haze + (255 - haze) * level).clip(0, 255).astype(np.uint8).tolist()
    colorless, saturation = rng.random() < 0.08, uniform(rng, 0.6, 1.1)
    image = image.point(table * 3)
    if colorless:
        return image.convert("L").convert("RGB")
    gray = np.array([0.299, 0.587, 0.114])
    matrix = np.concatenate([saturation * np.eye(3) + (1 - saturation) * gray, np.zeros((3, 1))], axis=1)
    return image.convert("RGB", tuple(matrix.ravel().tolist()))


def blur(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """A lens out of focus, or a short motion, in half of the images; of the rest, most are a little soft."""
    unit = image.width / _REFERENCE
    kind, strength, angle = rng.random(), rng.random(), uniform(rng, 0, np.pi)
    if kind < 0.3:
        return gaussian_blur(image, (0.4 + 0.8 * strength) * unit)
    if kind < 0.36:
        return _smear(image, (1.5 + 3 * strength) * unit * np.array([np.cos(angle), np.sin(angle)]))
    if kind < 0.5:  # an enlarged small image
        side = round(image.width * (0.5 + 0.4 * strength))
        return image.resize((side, side), Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BICUBIC)
    return image


def gaussian_blur(image: Image.Image, radius: float) -> Image.Image:
    """The same as the filter of Pillow, which blurs a fourth, unused channel of RGB pictures along."""
    blurred = ImageFilter.GaussianBlur(radius)
    return Image.merge("RGB", [channel.filter(blurred) for channel in image.split()])


def _smear(image: Image.Image, path: np.ndarray, steps: int = 4) -> Image.Image:
    """The mean of copies moved along `path` [2] pixels, centred."""
    result = image
    for index, share in enumerate(np.linspace(-0.5, 0.5, steps).tolist()):
        x, y = (share * path).tolist()
        moved = image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y), Image.Resampling.BILINEAR)
        # What moves in from beyond the border is unknown: the image itself stands in.
        inner = Image.new("L", image.size, 255).transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y))
        result = Image.blend(result, Image.composite(moved, image, inner), 1 / (index + 1))
    return result


def sensor(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Noise of a random strength, up to a standard deviation of 12 of 255, and JPEG of a random quality, mostly."""
    tile = _noise_tiles()[int(rng.random() < 0.4)]
    row, column = (int(v) for v in rng.integers(0, 128, 2))
    strength = rng.gamma(1.2, 2.2)
    quality, coarse, plain = int(uniform(rng, 35, 96)), rng.random() < 0.7, rng.random() < 0.12
    if strength > 0.8:
        size = image.width
        if size + 128 > _NOISE:
            tile = np.tile(tile, (2, 2, 1))
        noisy = tile[row : row + size, column : column + size] * np.float32(min(strength, 12) / _NOISE_STD)
        noisy += np.asarray(image)
        np.minimum(np.maximum(noisy, 0, out=noisy), 255, out=noisy)
        image = Image.fromarray(noisy.astype(np.uint8))
    if plain:
        return image
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=2 if coarse else 0)
    photo = Image.open(buffer, formats=("JPEG",))
    photo.load()
    return photo


def degrade(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Light, tone, blur, noise and JPEG, in a camera's order."""
    for step in (light, tone, blur, sensor):
        image = step(rng, image)
    return image
