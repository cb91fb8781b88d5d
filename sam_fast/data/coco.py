"""COCO instances: one JSON file of polygons and run-length codes for a folder of images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sam_fast.data.files import read_annotated_image, read_json
from sam_fast.data.sample import Sample, choose_masks
from sam_fast.data.segmentations import Segmentation, decode_segmentations


class _Record(NamedTuple):
    file_name: str
    size: tuple[int, int] | None  # (height, width), if the file gives it
    annotations: list[tuple[Any, Segmentation]]  # (id, segmentation)


class CocoSource:
    """The annotated images of a COCO file, sorted by file name; categories are not used.

    Opening reads the whole JSON and keeps the segmentations only, coordinates as arrays. Annotations without a
    segmentation (boxes, captions, key points) are left out.

    Attributes:
        annotations_json: the file.
        images_folder: where its images lie.
    """

    def __init__(
        self,
        annotations_json: str | os.PathLike[str],
        images_folder: str | os.PathLike[str] | None = None,
        *,
        include_crowd: bool = False,
        keep_empty: bool = False,
        upright: bool = False,
    ) -> None:
        """Read the annotations.

        Args:
            annotations_json: the file.
            images_folder: what the file names of the images are relative to. By default it is found: the folder of the
                JSON file, `images` in it or beside it, or, for instances_val2017.json, a folder `val2017` in any of
                these places.
            include_crowd: keep annotations with "iscrowd": groups of objects under one mask.
            keep_empty: keep images without annotations, as samples of no masks.
            upright: annotations belong to images turned by their EXIF orientation, not to the pixels as stored.

        Raises:
            FileNotFoundError: the file, or the first image, does not exist.
            ValueError: the file is not a COCO file, or holds no segmentation; the text says where.
        """
        self.annotations_json = Path(annotations_json)
        self._upright = upright
        records = _parse(read_json(self.annotations_json), self.annotations_json, include_crowd)
        if not any(record.annotations for record in records):
            raise ValueError(f"{self.annotations_json} holds no segmentations of its {len(records)} images")
        kept = [record for record in records if keep_empty or record.annotations]
        self._records = sorted(kept, key=lambda record: record.file_name)
        self.images_folder = _find_images(self.annotations_json, images_folder, self._records[0].file_name)

    def __len__(self) -> int:
        return len(self._records)

    def sample_name(self, index: int) -> str:
        """The image's file name, as in the JSON file."""
        return self._records[index].file_name

    def load(self, index: int, *, max_masks: int | None = None, rng: np.random.Generator | None = None) -> Sample:
        """Read sample `index`, as `SampleSource.load`; chosen masks that turn out empty are left out.

        Raises:
            ValueError: a segmentation or image is malformed, or they differ in size; the text names the files.
            FileNotFoundError: the image does not exist.
        """
        record = self._records[index]
        path = self.images_folder / record.file_name
        image = read_annotated_image(path, record.size, self.annotations_json, upright=self._upright)
        chosen = [record.annotations[i] for i in choose_masks(len(record.annotations), max_masks, rng)]
        masks = decode_segmentations(
            [segmentation for _, segmentation in chosen],
            (image.shape[0], image.shape[1]),
            [f"{self.annotations_json}: annotation {identity} of {record.file_name}" for identity, _ in chosen],
        )
        return Sample(image, masks, record.file_name)


def _parse(content: Any, path: Path, include_crowd: bool) -> list[_Record]:
    """The images of a COCO file, in its order, with their annotations in its order."""
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise ValueError(f'{path} is not a COCO file: no lists of "images" and "annotations"')
    records: dict[Any, _Record] = {}
    for image in content["images"]:
        try:
            height, width = image.get("height"), image.get("width")
            size = None if height is None or width is None else (height, width)
            identity, name = image["id"], image["file_name"]
            is_second = identity in records
            if not isinstance(name, str):
                raise TypeError("a file name is text")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path}: an image has no valid "id" or "file_name": {str(image)[:200]}') from error
        if is_second:
            raise ValueError(f"{path}: two images have the id {identity}")
        records[identity] = _Record(name, size, [])
    for annotation in content["annotations"]:
        try:
            segmentation = annotation.get("segmentation")
            if not segmentation or (annotation.get("iscrowd") and not include_crowd):
                continue
            record = records[annotation["image_id"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: an annotation belongs to no image: {str(annotation)[:200]}") from error
        identity = annotation.get("id", "without id")
        record.annotations.append((identity, _compact(segmentation, f"{path}: annotation {identity}")))
    return list(records.values())


def _compact(segmentation: Any, where: str) -> Segmentation:
    """A segmentation in a third of the memory: coordinates of polygons as arrays."""
    if isinstance(segmentation, Mapping):
        return segmentation
    try:
        return [np.array(polygon, dtype=np.float64) for polygon in segmentation]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: a segmentation is a list of lists of numbers or a run-length code") from error


def _find_images(annotations: Path, folder: str | os.PathLike[str] | None, first: str) -> Path:
    """The folder of the images: the given one, or the one of several likely ones that has the first image."""
    if folder is not None:
        candidates = [Path(folder)]
    else:
        beside, above = annotations.parent, annotations.parent.parent
        places = [beside, beside / "images", above, above / "images"]
        split = annotations.stem.rpartition("_")[2]
        candidates = [*places[:2], places[3], *(place / split for place in places)]
    for candidate in candidates:
        if (candidate / first).is_file():
            return candidate
    places_text = ", ".join(map(str, candidates))
    raise FileNotFoundError(f"{annotations} describes {first}, which is not in {places_text}")
