"""Folders of images and masks: every form of PNG that holds labels."""

from __future__ import annotations

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from sam_fast.data.folder import MaskFolderSource

HEIGHT, WIDTH = 23, 31
LABELS = np.random.default_rng(0).choice([0, 1, 2, 7, 255], (HEIGHT, WIDTH)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folders `images`, with cup.jpg, and `masks`, empty."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    write_image(tmp_path / "images" / "cup.jpg")
    return tmp_path


def write_image(path: Path, height: int = HEIGHT, width: int = WIDTH) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def masks_of(labels: np.ndarray, values: list[int]) -> np.ndarray:
    return np.stack([labels == value for value in values])


def with_alpha(image: Image.Image) -> Image.Image:
    """The image, transparent where LABELS is 7."""
    image.putalpha(Image.fromarray(np.where(LABELS == 7, 0, 255).astype(np.uint8)))
    return image


def palette_png(path: Path, transparent: bool) -> None:
    image = Image.fromarray(LABELS).convert("P")
    image.putpalette([0, 0, 0, 0, 0, 0, 0, 0, 0] + [9, 9, 9] * 253)  # colours say nothing: 0, 1 and 2 are all black
    image.save(path, **({"transparency": 1} if transparent else {}))


@pytest.mark.parametrize("form", ["gray", "palette", "transparent palette", "16 bits"])
def test_label_maps_of_values(folder: Path, form: str) -> None:
    path = folder / "masks" / "cup.png"
    scale = 1
    if "palette" in form:
        palette_png(path, form.startswith("transparent"))
    elif form == "gray":
        Image.fromarray(LABELS).save(path)
    else:
        scale = 257  # no two labels agree in their low or high byte alone
        Image.fromarray(LABELS.astype(np.uint16) * np.uint16(scale)).save(path)
    sample = MaskFolderSource(folder).load(0)
    shown = [2, 7, 255] if form.startswith("transparent") else [1, 2, 7, 255]
    np.testing.assert_array_equal(sample.masks, masks_of(LABELS, shown))
    np.testing.assert_array_equal(sample.image, np.asarray(Image.open(folder / "images" / "cup.jpg")))
    assert sample.name == "cup.jpg" and sample.masks.dtype == bool
    ignored = MaskFolderSource(folder, ignore=[255 * scale, 2 * scale]).load(0)
    np.testing.assert_array_equal(ignored.masks, masks_of(LABELS, [v for v in shown if v in (1, 7)]))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_label_maps_of_few_bits(folder: Path, bits: int) -> None:
    labels = np.random.default_rng(1).integers(0, 2**bits, (HEIGHT, WIDTH))
    image = Image.fromarray(labels.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0] * 256)
    image.save(folder / "masks" / "cup.png", bits=bits)
    np.testing.assert_array_equal(MaskFolderSource(folder).load(0).masks, masks_of(labels, list(range(1, 2**bits))))


def test_label_maps_of_colours(folder: Path) -> None:
    """Colours in the order of 0xRRGGBB; black is the background, and one differing channel makes another object."""
    colours = {1: (255, 0, 0), 2: (0, 0, 255), 7: (255, 0, 1), 255: (0, 255, 0)}
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for value, colour in colours.items():
        pixels[value == LABELS] = colour
    path = folder / "masks" / "cup.png"
    Image.fromarray(pixels).save(path)
    np.testing.assert_array_equal(MaskFolderSource(folder).load(0).masks, masks_of(LABELS, [2, 255, 1, 7]))
    ignored = MaskFolderSource(folder, ignore=[0xFF0001, 0x00FF00]).load(0)
    np.testing.assert_array_equal(ignored.masks, masks_of(LABELS, [2, 1]))
    with_alpha(Image.fromarray(pixels)).save(path)
    np.testing.assert_array_equal(MaskFolderSource(folder).load(0).masks, masks_of(LABELS, [2, 255, 1]))


def test_transparent_pixels_of_gray_label_maps(folder: Path) -> None:
    with_alpha(Image.fromarray(LABELS)).save(folder / "masks" / "cup.png")
    np.testing.assert_array_equal(MaskFolderSource(folder).load(0).masks, masks_of(LABELS, [1, 2, 255]))


@pytest.mark.parametrize("form", ["alphas", "gray", "16 bits", "colour"])
def test_pixels_that_a_png_declares_transparent(folder: Path, form: str) -> None:
    """A tRNS chunk instead of an alpha channel: 2 is transparent, and of a palette 1 half so."""
    path = folder / "masks" / "cup.png"
    if form == "alphas":
        image = Image.fromarray(LABELS).convert("P")
        image.putpalette([9, 9, 9] * 256)
        image.save(path, transparency=bytes([255, 128, 0]))
    elif form == "gray":
        Image.fromarray(LABELS).save(path, transparency=2)
    elif form == "16 bits":
        Image.fromarray(LABELS.astype(np.uint16) * np.uint16(257)).save(path, transparency=2 * 257)
    else:
        Image.fromarray(LABELS).convert("RGB").save(path, transparency=(2, 2, 2))
    np.testing.assert_array_equal(MaskFolderSource(folder).load(0).masks, masks_of(LABELS, [1, 7, 255]))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_transparent_gray_of_few_bits(folder: Path, bits: int) -> None:
    labels = np.random.default_rng(1).integers(0, 2**bits, (HEIGHT, WIDTH))
    (folder / "masks" / "cup.png").write_bytes(gray_png(labels, bits, transparent=1))
    levels = np.unique(labels)[2:]
    np.testing.assert_array_equal(MaskFolderSource(folder).load(0).masks, labels == levels[:, None, None])


def test_one_file_per_mask(folder: Path) -> None:
    separate = folder / "masks" / "cup"
    separate.mkdir()
    masks = masks_of(LABELS, [1, 2, 7])
    Image.fromarray(masks[0]).save(separate / "0.png")
    Image.fromarray(masks[1].astype(np.uint8) * 255).convert("RGB").save(separate / "1.png")
    Image.fromarray(np.zeros_like(LABELS)).save(separate / "2.png")
    Image.fromarray(masks[2].astype(np.uint8)).save(separate / "3.PNG")
    (separate / "metadata.csv").write_text("id,area")
    (separate / "._0.png").write_bytes(b"\0")
    source = MaskFolderSource(folder)
    np.testing.assert_array_equal(source.load(0).masks, masks)
    np.testing.assert_array_equal(source.load(0, max_masks=3).masks, masks[:2])  # the chosen third is empty


def test_a_folder_without_files_is_an_image_without_objects(folder: Path) -> None:
    (folder / "masks" / "cup").mkdir()
    assert MaskFolderSource(folder).load(0).masks.shape == (0, HEIGHT, WIDTH)


def test_a_label_map_of_zeros_is_an_image_without_objects(folder: Path) -> None:
    Image.fromarray(np.zeros_like(LABELS)).save(folder / "masks" / "cup.png")
    assert MaskFolderSource(folder).load(0).masks.shape == (0, HEIGHT, WIDTH)


def test_one_pixel(folder: Path) -> None:
    write_image(folder / "images" / "cup.jpg", 1, 1)
    Image.fromarray(np.full((1, 1), 3, np.uint8)).save(folder / "masks" / "cup.png")
    assert MaskFolderSource(folder).load(0).masks.tolist() == [[[True]]]


def test_at_most_so_many_masks(folder: Path) -> None:
    Image.fromarray(LABELS).save(folder / "masks" / "cup.png")
    source = MaskFolderSource(folder)
    np.testing.assert_array_equal(source.load(0, max_masks=2).masks, masks_of(LABELS, [1, 2]))
    chosen = np.sort(np.random.default_rng(5).choice(4, 2, replace=False))
    drawn = source.load(0, max_masks=2, rng=np.random.default_rng(5)).masks
    np.testing.assert_array_equal(drawn, masks_of(LABELS, [1, 2, 7, 255])[chosen])


def test_images_with_masks_sorted_by_name(folder: Path) -> None:
    for name in ("b.png", "a.png", "unlabelled.png"):
        write_image(folder / "images" / name)
    for name in ("cup", "b", "a"):
        Image.fromarray(LABELS).save(folder / "masks" / f"{name}.png")
    source = pickle.loads(pickle.dumps(MaskFolderSource(folder)))
    assert [source.sample_name(i) for i in range(len(source))] == ["a.png", "b.png", "cup.jpg"]
    assert source.load(2).name == "cup.jpg"


def png(bits: int, colour_type: int, rows: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of a kind that Pillow cannot write; `rows` are unfiltered, each behind a 0."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def deep_rgb_png() -> bytes:
    """RGB of 16 bits per channel."""
    return png(16, 2, (b"\0" + bytes(6 * WIDTH)) * HEIGHT)


def gray_png(labels: np.ndarray, bits: int, transparent: int) -> bytes:
    """Gray of 1, 2 or 4 bits, one level of it transparent."""
    digits = (labels[:, :, None] >> np.arange(bits)[::-1]) & 1  # [H, W, bits], the highest first
    rows = np.packbits(digits.reshape(HEIGHT, -1).astype(np.uint8), axis=1)
    return png(bits, 0, b"".join(b"\0" + row.tobytes() for row in rows), (b"tRNS", struct.pack(">H", transparent)))


def test_colours_of_16_bits_are_refused(folder: Path) -> None:
    (folder / "masks" / "cup.png").write_bytes(deep_rgb_png())
    with pytest.raises(ValueError, match=r"cup\.png is a PNG of mode RGB, 16 bits"):
        MaskFolderSource(folder).load(0)


def test_a_photo_is_no_label_map(folder: Path) -> None:
    write_image(folder / "images" / "cup.jpg", 150, 150)
    write_image(folder / "masks" / "cup.png", 150, 150)
    with pytest.raises(ValueError, match=r"cup\.png has 2\d{4} values: a photo"):
        MaskFolderSource(folder).load(0)


@pytest.mark.parametrize("damage", ["not an image", "truncated"])
def test_corrupt_masks_are_named(folder: Path, damage: str) -> None:
    path = folder / "masks" / "cup.png"
    Image.fromarray(LABELS).save(path)
    path.write_bytes(b"text" if damage == "not an image" else path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"masks/cup\.png is not a readable image"):
        MaskFolderSource(folder).load(0)


@pytest.mark.parametrize("place", ["masks/cup.png", "images/cup.jpg"])
def test_whatever_a_decoder_raises_names_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    Image.fromarray(LABELS).save(folder / "masks" / "cup.png")
    load = ImageFile.ImageFile.load

    def fail(self: ImageFile.ImageFile) -> object:
        if str(self.filename).endswith(place):
            raise RuntimeError("failed to decode")
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ValueError, match=f"{place} is not a readable image: failed to decode"):
        MaskFolderSource(folder).load(0)


def test_sizes_must_agree(folder: Path) -> None:
    Image.fromarray(LABELS[1:]).save(folder / "masks" / "cup.png")
    with pytest.raises(ValueError, match=r"cup\.jpg is 23 x 31 .*cup\.png is about 22 x 31"):
        MaskFolderSource(folder).load(0)


def test_sizes_of_separate_masks_must_agree(folder: Path) -> None:
    (folder / "masks" / "cup").mkdir()
    Image.fromarray(LABELS).save(folder / "masks" / "cup" / "0.png")
    Image.fromarray(LABELS[:, 1:]).save(folder / "masks" / "cup" / "1.png")
    with pytest.raises(ValueError, match=r"masks/cup differ in size: \[\(23, 30\), \(23, 31\)\]"):
        MaskFolderSource(folder).load(0)


def test_orientation(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn: sizes cannot tell
    path = folder / "images" / "cup.jpg"
    Image.open(path).copy().save(path, exif=exif)
    stored = np.asarray(Image.open(path))
    Image.fromarray(LABELS).save(folder / "masks" / "cup.png")
    np.testing.assert_array_equal(MaskFolderSource(folder).load(0).image, stored)
    np.testing.assert_array_equal(MaskFolderSource(folder, upright=True).load(0).image, stored[::-1, ::-1])


def test_files_that_do_not_pair_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="masks holds no masks"):
        MaskFolderSource(folder)
    masks = folder / "masks"
    Image.fromarray(LABELS).save(masks / "cup.png")
    (masks / "cup").mkdir()
    with pytest.raises(ValueError, match="masks holds both"):
        MaskFolderSource(folder)
    (masks / "cup").rmdir()
    write_image(folder / "images" / "cup.png")
    with pytest.raises(ValueError, match="which one do the masks belong to"):
        MaskFolderSource(folder)
    (folder / "images" / "cup.png").unlink()
    (masks / "spoon.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"spoon\.jpg: masks must be PNG"):
        MaskFolderSource(folder)
    (masks / "spoon.jpg").rename(masks / "spoon.png")
    with pytest.raises(ValueError, match=r"spoon\.png has no image of that name"):
        MaskFolderSource(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MaskFolderSource(folder / "nowhere")
