"""SA-1B: a JSON file of run-length coded masks beside each image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sam_fast.data.files import IMAGE_SUFFIXES, read_annotated_image, read_json
from sam_fast.data.sample import Sample, choose_masks
from sam_fast.data.segmentations import decode_segmentations


class Sa1bSource:
    """The images with a JSON of the same name beside them, in a folder and the folders in it, sorted by path.

    A JSON is `{"image": {"height", "width", ...}, "annotations": [{"segmentation": {"size", "counts"}, ...}, ...]}`, or
    the bare list of annotations, which is what `sam-fast amg --convert-to-rle` writes. Opening lists the folders and
    reads no file; images without a JSON are not part of the source.

    Attributes:
        folder: where the files lie.
    """

    def __init__(self, folder: str | os.PathLike[str], *, upright: bool = False) -> None:
        """List the files.

        Args:
            folder: may hold folders (sa_000000, sa_000001, ...).
            upright: annotations belong to images turned by their EXIF orientation, not to the pixels as stored.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it holds no annotated image, or a JSON without its image.
        """
        self.folder = Path(folder)
        self._upright = upright
        # One array, not eleven million strings: it is shared with forked workers, and small for others.
        self._names = np.array(sorted(_annotated_images(os.fsencode(folder), b"", set())), dtype=np.bytes_)
        if not len(self._names):
            raise ValueError(f"{self.folder} holds no images with a JSON of the same name beside them")

    def __len__(self) -> int:
        return len(self._names)

    def sample_name(self, index: int) -> str:
        """The image's path inside of the folder."""
        return os.fsdecode(self._names[index])

    def load(self, index: int, *, max_masks: int | None = None, rng: np.random.Generator | None = None) -> Sample:
        """Read sample `index`, as `SampleSource.load`; chosen masks that turn out empty are left out.

        Raises:
            ValueError: a file is malformed, or image and annotations differ in size; the text names the file.
            FileNotFoundError: a file is gone.
        """
        name = self.sample_name(index)
        path = self.folder / name
        annotations_path = path.with_suffix(".json")
        size, annotations = _parse(read_json(annotations_path), annotations_path)
        image = read_annotated_image(path, size, annotations_path, upright=self._upright)
        chosen = choose_masks(len(annotations), max_masks, rng)
        labels = [f"{annotations_path}: annotation {i}" for i in chosen]
        try:
            segmentations = [annotations[i]["segmentation"] for i in chosen]
        except (KeyError, TypeError) as error:
            raise ValueError(f'{annotations_path}: an annotation has no "segmentation"') from error
        masks = decode_segmentations(segmentations, (image.shape[0], image.shape[1]), labels)
        return Sample(image, masks, name)


def _annotated_images(root: bytes, inside: bytes, open_folders: set[tuple[int, int]]) -> Iterator[bytes]:
    """Paths, relative to `root`, of the annotated images in root/inside and the folders in it."""
    folder = os.path.join(root, inside)
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in open_folders:  # a link to a folder that holds it
        return
    images: dict[bytes, bytes] = {}
    annotated, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if entry.name.startswith(b"."):
                continue
            if suffix == b".json":
                annotated.append(stem)
            elif suffix.lower().decode("ascii", "replace") in IMAGE_SUFFIXES:
                images[stem] = min(entry.name, images.get(stem, entry.name))
            elif entry.is_dir():
                folders.append(entry.name)
    for stem in annotated:
        if stem not in images:
            raise ValueError(f"{os.fsdecode(os.path.join(folder, stem))}.json has no image of that name beside it")
        yield os.path.join(inside, images[stem])
    for name in folders:
        yield from _annotated_images(root, os.path.join(inside, name), open_folders | {identity})


def _parse(content: Any, path: Path) -> tuple[tuple[int, int] | None, list[Any]]:
    """(height, width) of the image, if it is given, and the annotations."""
    size = None
    annotations = content
    if isinstance(content, dict):
        annotations = content.get("annotations")
        image = content.get("image")
        if isinstance(image, dict) and image.get("height") is not None and image.get("width") is not None:
            size = (image["height"], image["width"])
    if not isinstance(annotations, list):
        raise ValueError(f'{path} is not in SA-1B form: no list of "annotations"')
    return size, annotations
