"""COCO files against pycocotools' own reader."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from sam_fast.data.coco import CocoSource

HEIGHT, WIDTH = 37, 53


def runs(mask: np.ndarray) -> list[int]:
    """Uncompressed run lengths, by hand."""
    flat = mask.ravel(order="F").astype(int)
    counts, colour = [0], 0
    for pixel in flat:
        if pixel != colour:
            counts.append(0)
            colour = pixel
        counts[-1] += 1
    return counts


def string(mask: np.ndarray) -> str:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def blob(seed: int, shape: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    return np.kron(np.random.default_rng(seed).random((40, 60)) > 0.6, np.ones((3, 3)))[: shape[0], : shape[1]] > 0


SEGMENTATIONS: dict[str, Any] = {
    "polygon": [[3.3, 4.1, 40.7, 9.2, 22.5, 33.0]],
    "two polygons": [[1, 1, 9, 1, 9, 9, 1, 9], [30.5, 20.5, 70.0, 21.0, 44.2, 50.0]],
    "counts": {"size": [HEIGHT, WIDTH], "counts": runs(blob(1))},
    "string": {"size": [HEIGHT, WIDTH], "counts": string(blob(2))},
}


def write_image(path: Path, height: int = HEIGHT, width: int = WIDTH, **options: Any) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def write_coco(path: Path, per_image: dict[str, list[Any]], **fields: Any) -> Path:
    """One image per key, with the segmentations listed for it; `fields` go into every annotation."""
    images = [{"id": 10 + i, "file_name": n, "height": HEIGHT, "width": WIDTH} for i, n in enumerate(per_image)]
    annotations = [
        {"image_id": 10 + i, "segmentation": segmentation, "iscrowd": 0, "category_id": 1, **fields}
        for i, listed in enumerate(per_image.values())
        for segmentation in listed
    ]
    for identity, annotation in enumerate(annotations):
        annotation["id"] = 100 + identity
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1}]}))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two images, b.png before a.png in the file; every kind of segmentation on b.png."""
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    return write_coco(
        tmp_path / "instances.json", {"b.png": list(SEGMENTATIONS.values()), "a.png": [[[0, 0, 9, 0, 9, 9]]]}
    )


def test_masks_and_pixels_are_those_of_pycocotools(data: Path) -> None:
    source = CocoSource(data, data.parent)
    assert [source.sample_name(i) for i in range(len(source))] == ["a.png", "b.png"]
    oracle = COCO(str(data))
    for index in range(len(source)):
        sample = source.load(index)
        identity = next(i["id"] for i in oracle.dataset["images"] if i["file_name"] == sample.name)
        expected = [oracle.annToMask(a) for a in oracle.loadAnns(oracle.getAnnIds(imgIds=identity))]
        np.testing.assert_array_equal(sample.masks, np.stack(expected).astype(bool))
        np.testing.assert_array_equal(sample.image, np.asarray(Image.open(data.parent / sample.name)))
        assert sample.masks.dtype == bool and sample.image.flags.writeable


def test_at_most_so_many_masks(data: Path) -> None:
    source = CocoSource(data, data.parent)
    every = source.load(1).masks
    np.testing.assert_array_equal(source.load(1, max_masks=2).masks, every[:2])
    drawn = source.load(1, max_masks=2, rng=np.random.default_rng(3)).masks
    chosen = np.sort(np.random.default_rng(3).choice(4, 2, replace=False))
    np.testing.assert_array_equal(drawn, every[chosen])
    assert source.load(1, max_masks=0).masks.shape == (0, HEIGHT, WIDTH)


def test_only_chosen_masks_are_decoded(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    good = SEGMENTATIONS["string"]
    broken = {"size": [HEIGHT, WIDTH], "counts": [1, 2]}
    source = CocoSource(write_coco(tmp_path / "a.json", {"a.png": [good, broken]}), tmp_path)
    assert len(source.load(0, max_masks=1).masks) == 1
    with pytest.raises(ValueError, match=r"a\.json: annotation 101 of a\.png: counts of mask 0 add up to 3"):
        source.load(0)


def test_empty_masks_are_left_out(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    outside = [[100, 100, 120, 100, 120, 120]]
    nothing = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    source = CocoSource(write_coco(tmp_path / "a.json", {"a.png": [outside, [[1, 1, 9, 1, 9, 9]], nothing]}), tmp_path)
    assert len(source.load(0).masks) == 1


def test_crowds_only_on_request(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    crowd = write_coco(tmp_path / "a.json", {"a.png": [SEGMENTATIONS["counts"]]}, iscrowd=1)
    with pytest.raises(ValueError, match=r"a\.json holds no segmentations of its 1 images"):
        CocoSource(crowd, tmp_path)
    np.testing.assert_array_equal(CocoSource(crowd, tmp_path, include_crowd=True).load(0).masks[0], blob(1))


def test_images_without_annotations_are_skipped_or_kept(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / name)
    path = write_coco(tmp_path / "a.json", {"a.png": [], "b.png": [[[1, 1, 9, 1, 9, 9]]], "c.png": [None, []]})
    skipped = CocoSource(path, tmp_path)
    assert [skipped.sample_name(i) for i in range(len(skipped))] == ["b.png"]
    kept = CocoSource(path, tmp_path, keep_empty=True)
    assert [kept.sample_name(i) for i in range(len(kept))] == ["a.png", "b.png", "c.png"]
    assert kept.load(0).masks.shape == (0, HEIGHT, WIDTH)


def test_one_pixel(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 1, 1)
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 1, "width": 1}],
        "annotations": [{"id": 1, "image_id": 1, "segmentation": {"size": [1, 1], "counts": [0, 1]}}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    sample = CocoSource(tmp_path / "a.json", tmp_path).load(0)
    assert sample.masks.shape == (1, 1, 1) and sample.masks.all()


@pytest.mark.parametrize("images", ["", "images", "../images", "../val2017", "../images/val2017", "val2017"])
def test_images_in_usual_places_are_found(tmp_path: Path, images: str) -> None:
    folder = tmp_path / "annotations" / images
    path = write_coco(tmp_path / "annotations" / "instances_val2017.json", {"a.png": [SEGMENTATIONS["string"]]})
    write_image(folder / "a.png")
    assert CocoSource(path).images_folder.resolve() == folder.resolve()
    assert len(CocoSource(path).load(0).masks) == 1


def test_missing_images_are_named(data: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"instances\.json describes a\.png, which is not in .*elsewhere"):
        CocoSource(data, data.parent / "elsewhere")
    source = CocoSource(data, data.parent)
    (data.parent / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png, which .*instances\.json describes"):
        source.load(1)


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("damage", ["not an image", "truncated"])
def test_corrupt_images_are_named(data: Path, damage: str, upright: bool) -> None:
    path = data.parent / "b.png"
    path.write_bytes(b"text" if damage == "not an image" else path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"b\.png is not a readable image"):
        CocoSource(data, data.parent, upright=upright).load(1)


def test_another_size_than_annotated_is_refused(data: Path) -> None:
    write_image(data.parent / "b.png", 20, 30)
    with pytest.raises(ValueError, match=rf"b\.png is 20 x 30 .*instances\.json is about {HEIGHT} x {WIDTH}$"):
        CocoSource(data, data.parent).load(1)


def test_a_byte_order_mark_and_sizes_of_null_are_read(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    path = write_coco(tmp_path / "a.json", {"a.png": [SEGMENTATIONS["string"]]})
    content = json.loads(path.read_text())
    content["images"][0]["height"] = None
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    assert CocoSource(path, tmp_path).load(0).masks.shape == (1, HEIGHT, WIDTH)


def test_a_code_of_another_size_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    path = write_coco(tmp_path / "a.json", {"a.png": [{"size": [3, 4], "counts": [12]}]})
    with pytest.raises(ValueError, match=r"annotation 100 of a\.png: its size is \[3, 4\] and that of the image"):
        CocoSource(path, tmp_path).load(0)


def turned_jpeg(path: Path) -> np.ndarray:
    """A JPEG whose EXIF orientation turns it by a quarter; its pixels as stored, [HEIGHT, WIDTH, 3]."""
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(path, exif=exif)
    return np.asarray(Image.open(path))


def test_annotations_belong_to_stored_pixels_unless_upright(tmp_path: Path) -> None:
    stored = turned_jpeg(tmp_path / "a.jpg")
    path = write_coco(tmp_path / "a.json", {"a.jpg": [SEGMENTATIONS["string"]]})
    np.testing.assert_array_equal(CocoSource(path, tmp_path).load(0).image, stored)
    with pytest.raises(ValueError, match="pixels as stored: leave out upright"):
        CocoSource(path, tmp_path, upright=True).load(0)

    content = json.loads(path.read_text())
    content["images"][0].update(height=WIDTH, width=HEIGHT)
    content["annotations"][0]["segmentation"] = [[1, 1, 20, 1, 20, 45]]
    path.write_text(json.dumps(content))
    sample = CocoSource(path, tmp_path, upright=True).load(0)
    np.testing.assert_array_equal(sample.image, np.rot90(stored, -1))
    assert sample.masks.shape == (1, WIDTH, HEIGHT)
    with pytest.raises(ValueError, match="turned by its EXIF orientation: use upright"):
        CocoSource(path, tmp_path).load(0)


IMAGE = {"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}
TRIANGLE = [[1, 1, 9, 1, 9, 9]]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not readable JSON"),
        ("[]", "not a COCO file"),
        ('{"images": []}', "not a COCO file"),
        ({"images": [], "annotations": []}, "no segmentations of its 0 images"),
        ({"images": [{"id": 1}], "annotations": []}, '"file_name"'),
        ({"images": [{**IMAGE, "id": [1]}], "annotations": []}, 'no valid "id"'),
        ({"images": [{**IMAGE, "file_name": 5}], "annotations": []}, '"file_name"'),
        ({"images": [{**IMAGE, "file_name": None}], "annotations": []}, '"file_name"'),
        ({"images": [IMAGE, IMAGE], "annotations": []}, "two images have the id 1"),
        ({"images": [IMAGE], "annotations": [{"image_id": 2, "segmentation": TRIANGLE}]}, "belongs to no image"),
        ({"images": [IMAGE], "annotations": [{"id": 7, "image_id": 1, "segmentation": ["x"]}]}, "annotation 7: "),
        ({"images": [IMAGE], "annotations": [{"id": 7, "image_id": 1, "segmentation": [[1, 2, 3]]}]}, "x0, y0"),
        (
            {"images": [IMAGE], "annotations": [{"id": 7, "image_id": 1, "segmentation": [[10**400] * 6]}]},
            "annotation 7",
        ),
        ({"images": [IMAGE], "annotations": [{"image_id": 1, "segmentation": {"size": [37, 53]}}]}, "no 'counts'"),
        ({"images": [IMAGE], "annotations": [{"image_id": 1, "segmentation": "abc"}]}, "annotation without id: "),
    ],
)
def test_malformed_files_are_refused_by_name(tmp_path: Path, content: Any, text: str) -> None:
    write_image(tmp_path / "a.png")
    path = tmp_path / "broken.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=text) as caught:
        CocoSource(path, tmp_path).load(0)
    assert "broken.json" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        CocoSource(tmp_path / "nowhere.json", tmp_path)


def test_a_pickled_source_reads_the_same(data: Path) -> None:
    source = CocoSource(data, data.parent)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.load(1).masks, source.load(1).masks)
