"""The outlines of `assets/photos/objects.json`: a valid COCO file whose figures agree with its polygons."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import sam_fast

PHOTOS = Path(sam_fast.__file__).parent / "assets" / "photos"
OUTLINES = json.loads((PHOTOS / "objects.json").read_text())
NAMES = {category["id"]: category["name"] for category in OUTLINES["categories"]}
SIZES = {image["id"]: (image["width"], image["height"]) for image in OUTLINES["images"]}
# (whole, part): the part lies within the whole.
PARTS = [
    ("astronaut", "face and neck"),
    ("astronaut", "hair"),
    ("astronaut", "collar ring"),
    ("face and neck", "teeth"),
    ("cup", "coffee"),
    ("cup", "cup's handle"),
    ("eye, left in the photo", "pupil, left in the photo"),
    ("eye, right in the photo", "pupil, right in the photo"),
    ("rocket", "rocket's fairing"),
    ("rocket's fairing", "emblem"),
]
# Neighbours that hide one another: each outline is the visible region, so the two do not overlap.
NEIGHBOURS = [
    ("astronaut", "helmet"),
    ("name tag", "helmet"),
    ("face and neck", "hair"),
    ("external tank", "right booster"),
    ("cup", "saucer"),
    ("cup", "spoon"),
    ("spoon", "saucer"),
    ("rocket", "launch platform"),
]


@pytest.fixture(scope="module")
def coco() -> COCO:
    return COCO(str(PHOTOS / "objects.json"))


@pytest.fixture(scope="module")
def masks(coco: COCO) -> dict[str, np.ndarray]:
    """Mask of each object by its name, bool [H, W]."""
    return {NAMES[row["category_id"]]: coco.annToMask(row).astype(bool) for row in coco.dataset["annotations"]}


def polygon_area(flat: list[float]) -> float:
    """Area of a polygon [x0, y0, x1, y1, ...] in square pixels, by the shoelace formula."""
    x, y = np.asarray(flat[::2]), np.asarray(flat[1::2])
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def test_ids_are_unique_and_refer_to_each_other() -> None:
    for section in ("images", "categories", "annotations"):
        ids = [row["id"] for row in OUTLINES[section]]
        assert len(ids) == len(set(ids)), section
    assert len(set(NAMES.values())) == len(NAMES)
    for row in OUTLINES["annotations"]:
        assert row["image_id"] in SIZES
        assert row["category_id"] in NAMES
        assert row["iscrowd"] == 0


def test_twenty_objects_on_the_four_photos() -> None:
    assert len(OUTLINES["annotations"]) >= 20
    outlined = {image["file_name"] for image in OUTLINES["images"]}
    assert outlined == {path.name for path in PHOTOS.glob("*.jpg")}
    assert {row["image_id"] for row in OUTLINES["annotations"]} == set(SIZES)
    for image in OUTLINES["images"]:
        with Image.open(PHOTOS / image["file_name"]) as photo:
            assert photo.size == (image["width"], image["height"])


@pytest.mark.parametrize("row", OUTLINES["annotations"], ids=lambda row: NAMES[row["category_id"]])
def test_polygons_agree_with_box_and_area(row: dict, coco: COCO) -> None:
    width, height = SIZES[row["image_id"]]
    for flat in row["segmentation"]:
        assert len(flat) >= 6 and len(flat) % 2 == 0
        assert min(flat[::2]) >= 0 and max(flat[::2]) <= width
        assert min(flat[1::2]) >= 0 and max(flat[1::2]) <= height

    mask = coco.annToMask(row)
    assert mask.shape == (height, width)
    assert row["area"] == pytest.approx(mask.sum(), rel=0.02)
    # A second opinion on the area: polygons that cross themselves or each other would differ. Whole pixels along the
    # outline of a small object make up to 5 square pixels.
    assert row["area"] == pytest.approx(sum(map(polygon_area, row["segmentation"])), rel=0.02, abs=6)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
    np.testing.assert_allclose(row["bbox"], box, atol=0.02 * max(box[2:]))


@pytest.mark.parametrize(("whole", "part"), PARTS)
def test_a_part_lies_within_its_whole(whole: str, part: str, masks: dict[str, np.ndarray]) -> None:
    assert (masks[part] & masks[whole]).sum() >= 0.98 * masks[part].sum()
    assert masks[part].sum() < masks[whole].sum()


@pytest.mark.parametrize(("one", "other"), NEIGHBOURS)
def test_neighbours_do_not_overlap(one: str, other: str, masks: dict[str, np.ndarray]) -> None:
    assert (masks[one] & masks[other]).sum() <= 0.01 * min(masks[one].sum(), masks[other].sum())
