"""A folder of images and a folder of masks: label maps, or one file per mask."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from sam_fast.data.files import IMAGE_SUFFIXES, read_annotated_image
from sam_fast.data.sample import Sample, choose_masks

_MOST_LABELS = 10_000  # more values than this are those of a photo or of smoothed edges, not of objects


class MaskFolderSource:
    """The images in `folder/images` that have masks in `folder/masks`, sorted by name.

    The masks of `images/cup.jpg` are either the label map `masks/cup.png`, in which every value other than 0, or every
    colour other than black, is an object; or the files `masks/cup/*.png`, sorted by name, each a mask of one object:
    its pixels other than 0. Transparent pixels belong to no object. A label map may be gray of 1 to 16 bits, a palette
    PNG (the index counts, not the colour), or RGB of 8 bits. Images without masks are not part of the source.

    Attributes:
        folder: where `images` and `masks` lie.
    """

    def __init__(self, folder: str | os.PathLike[str], *, ignore: Collection[int] = (), upright: bool = False) -> None:
        """List the files.

        Args:
            folder: holds `images` and `masks`.
            ignore: values of label maps that are no objects, e.g. 255, the unlabelled pixels of Pascal VOC; a colour is
                0xRRGGBB.
            upright: masks belong to images turned by their EXIF orientation, not to the pixels as stored.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: two images share a stem, masks have no image or are no PNG files, or there are no masks.
        """
        self.folder = Path(folder)
        self._ignore = tuple(ignore)
        self._upright = upright
        self._files = sorted(_pair_files(self.folder / "images", self.folder / "masks"))
        if not self._files:
            raise ValueError(f"{self.folder / 'masks'} holds no masks")

    def __len__(self) -> int:
        return len(self._files)

    def sample_name(self, index: int) -> str:
        """The image's file name."""
        return self._files[index][0]

    def load(self, index: int, *, max_masks: int | None = None, rng: np.random.Generator | None = None) -> Sample:
        """Read sample `index`, as `SampleSource.load`; chosen masks that turn out empty are left out.

        Raises:
            ValueError: a file is malformed, or image and masks differ in size; the text names the files.
            FileNotFoundError: a file is gone.
        """
        name, masks_name = self._files[index]
        masks_path = self.folder / "masks" / masks_name
        if masks_path.is_dir():
            masks = _read_separate_masks(masks_path, max_masks, rng)
        else:
            masks = _read_label_map(masks_path, self._ignore, max_masks, rng)
        size = None if masks is None else (masks.shape[1], masks.shape[2])
        image = read_annotated_image(self.folder / "images" / name, size, masks_path, upright=self._upright)
        if masks is None:
            masks = np.zeros((0, *image.shape[:2]), bool)
        return Sample(image, masks, name)


def _pair_files(images_folder: Path, masks_folder: Path) -> Iterator[tuple[str, str]]:
    """Names of images and of the label map or folder with their masks."""
    images: dict[str, str] = {}
    for entry in os.scandir(images_folder):
        stem, suffix = os.path.splitext(entry.name)
        if suffix.lower() not in IMAGE_SUFFIXES or stem.startswith("."):
            continue
        if stem in images:
            raise ValueError(
                f"{images_folder} holds {images[stem]} and {entry.name}: which one do the masks belong to?"
            )
        images[stem] = entry.name
    masks: dict[str, str] = {}
    for entry in os.scandir(masks_folder):
        stem, suffix = (entry.name, "") if entry.is_dir() else os.path.splitext(entry.name)
        if stem.startswith(".") or (suffix and suffix.lower() not in IMAGE_SUFFIXES):
            continue
        if suffix and suffix.lower() != ".png":
            raise ValueError(f"{masks_folder / entry.name}: masks must be PNG files; JPEG and resampling alter labels")
        if stem not in images:
            raise ValueError(f"{masks_folder / entry.name} has no image of that name in {images_folder}")
        if stem in masks:
            raise ValueError(f"{masks_folder} holds both {masks[stem]} and {entry.name}")
        masks[stem] = entry.name
        yield images[stem], entry.name


def _read_label_map(
    path: Path, ignore: Collection[int], max_masks: int | None, rng: np.random.Generator | None
) -> np.ndarray:
    """Masks of the values of a label map, ascending, bool [N, H, W]."""
    labels = _read_labels(path)
    values = np.setdiff1d(labels, [0, *ignore])
    if len(values) > _MOST_LABELS:
        raise ValueError(f"{path} has {len(values)} values: a photo or smoothed edges, and no label map")
    return labels == values[choose_masks(len(values), max_masks, rng)][:, None, None]


def _read_separate_masks(folder: Path, max_masks: int | None, rng: np.random.Generator | None) -> np.ndarray | None:
    """Masks of one file each, bool [N, H, W], without empty ones; None if the folder holds none."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".png" and file.name[0] != ".")
    masks = [_read_labels(files[i]) != 0 for i in choose_masks(len(files), max_masks, rng)]
    if len({mask.shape for mask in masks}) > 1:
        raise ValueError(f"the masks in {folder} differ in size: {sorted({mask.shape for mask in masks})}")
    if not masks:
        return None
    stacked = np.stack(masks)
    return stacked[stacked.any(axis=(1, 2))]


def _read_labels(path: Path) -> np.ndarray:
    """The values of a PNG as non-negative integers [H, W]: gray, palette indices, or 0xRRGGBB; 0 where transparent."""
    try:
        with Image.open(path) as file:
            mode, deep = file.mode, any("16" in str(tile[3]) for tile in file.tile)
            transparent = _transparent_labels(file)
            pixels = np.asarray(file)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} is not a readable image: {error}") from error
    if mode in ("RGB", "RGBA") and not deep:
        red, green, blue = (pixels[:, :, i].astype(np.int32) for i in range(3))
        labels = red << 16 | green << 8 | blue
    elif mode == "LA" and not deep:
        labels = pixels[:, :, 0].astype(np.int32)
    elif pixels.ndim == 2 and mode != "F":
        labels = pixels.astype(np.int32)
    else:
        raise ValueError(
            f"{path} is a PNG of mode {mode}{', 16 bits' if deep else ''}: labels are gray, palette, or RGB of 8 bits"
        )
    if mode in ("RGBA", "LA"):
        labels[pixels[:, :, -1] == 0] = 0
    if transparent:
        labels[np.isin(labels, transparent)] = 0
    return labels


def _transparent_labels(file: ImageFile.ImageFile) -> list[int]:
    """The palette indices, the gray or the colour that a PNG without alpha channel declares transparent (tRNS)."""
    value = file.info.get("transparency")
    if value is None:
        return []
    if isinstance(value, bytes):  # the alpha of the first indices
        return [index for index, alpha in enumerate(value) if alpha == 0]
    if isinstance(value, tuple):
        red, green, blue = value
        return [red << 16 | green << 8 | blue]
    if file.mode == "1":
        return [int(value != 0)]  # Pillow says 255 for 1
    scale = {"L;2": 85, "L;4": 17}.get(str(file.tile[0][3]), 1)  # Pillow stretches gray of 2 and 4 bits to 255
    return [value * scale]
