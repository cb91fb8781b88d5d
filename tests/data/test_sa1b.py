"""SA-1B folders against pycocotools."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from sam_fast.data.sa1b import Sa1bSource

HEIGHT, WIDTH = 41, 67


def code(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def random_masks(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).random((count, HEIGHT, WIDTH)) < np.linspace(0.01, 0.99, count)[:, None, None]


def write_pair(folder: Path, stem: str, masks: np.ndarray, suffix: str = ".jpg") -> np.ndarray:
    """An image and its JSON as in SA-1B; the image's pixels as decoded."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*masks.shape[1:], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / (stem + suffix))
    annotations = [
        {"id": i, "segmentation": code(mask), "area": int(mask.sum()), "predicted_iou": 0.9, "stability_score": 0.97}
        for i, mask in enumerate(masks)
    ]
    image = {"image_id": 1, "height": masks.shape[1], "width": masks.shape[2], "file_name": stem + suffix}
    (folder / f"{stem}.json").write_text(json.dumps({"image": image, "annotations": annotations}))
    return np.asarray(Image.open(folder / (stem + suffix)))


def names(source: Sa1bSource) -> list[str]:
    return [source.sample_name(i) for i in range(len(source))]


def test_masks_and_pixels(tmp_path: Path) -> None:
    masks = random_masks(1, 5)
    pixels = write_pair(tmp_path, "sa_1", masks)
    sample = Sa1bSource(tmp_path).load(0)
    np.testing.assert_array_equal(sample.masks, masks)
    np.testing.assert_array_equal(sample.image, pixels)
    assert sample.name == "sa_1.jpg" and sample.image.flags.writeable


@pytest.mark.parametrize("image", [{"height": None, "width": None}, {"height": HEIGHT, "width": None}, None])
def test_sizes_need_not_be_given(image: Any, tmp_path: Path) -> None:
    masks = random_masks(1, 2)
    write_pair(tmp_path, "sa_1", masks)
    file = tmp_path / "sa_1.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image": image}))
    np.testing.assert_array_equal(Sa1bSource(tmp_path).load(0).masks, masks)


def test_folders_of_any_depth_sorted_by_path(tmp_path: Path) -> None:
    mask = random_masks(1, 1)
    for folder, stem in (("sa_000001", "sa_9"), ("sa_000000", "sa_7"), ("x/y", "sa_3"), ("", "sa_5")):
        write_pair(tmp_path / folder, stem, mask)
    source = Sa1bSource(str(tmp_path))
    assert names(source) == ["sa_000000/sa_7.jpg", "sa_000001/sa_9.jpg", "sa_5.jpg", "x/y/sa_3.jpg"]
    np.testing.assert_array_equal(source.load(3).masks, mask)


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    write_pair(tmp_path / "disk", "sa_1", random_masks(1, 1))
    root = tmp_path / "data"
    root.mkdir()
    (root / "sa_000000").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(root)
    assert names(Sa1bSource(root)) == ["sa_000000/sa_1.jpg"]


def test_images_without_a_json_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    write_pair(tmp_path, "sa_1", random_masks(1, 1), ".png")
    Image.new("RGB", (3, 3)).save(tmp_path / "sa_2.jpg")
    (tmp_path / "._sa_1.json").write_bytes(b"\0")
    (tmp_path / "README.txt").write_text("about")
    assert names(Sa1bSource(tmp_path)) == ["sa_1.png"]


def test_names_of_any_characters(tmp_path: Path) -> None:
    write_pair(tmp_path, "größe 1.5", random_masks(1, 1))
    assert Sa1bSource(tmp_path).load(0).name == "größe 1.5.jpg"


def test_at_most_so_many_masks_are_decoded(tmp_path: Path) -> None:
    masks = random_masks(2, 9)
    write_pair(tmp_path, "sa_1", masks)
    path = tmp_path / "sa_1.json"
    content = json.loads(path.read_text())
    content["annotations"][8]["segmentation"]["counts"] = "!"
    path.write_text(json.dumps(content))
    source = Sa1bSource(tmp_path)
    np.testing.assert_array_equal(source.load(0, max_masks=4).masks, masks[:4])
    seed = next(s for s in range(99) if 8 not in np.random.default_rng(s).choice(9, 4, replace=False))
    chosen = np.sort(np.random.default_rng(seed).choice(9, 4, replace=False))
    np.testing.assert_array_equal(source.load(0, max_masks=4, rng=np.random.default_rng(seed)).masks, masks[chosen])
    with pytest.raises(ValueError, match=r"sa_1\.json: annotation 8: compressed counts are malformed"):
        source.load(0)


def test_empty_masks_and_images_without_masks(tmp_path: Path) -> None:
    masks = random_masks(3, 3)
    masks[1] = False
    write_pair(tmp_path, "sa_1", masks)
    write_pair(tmp_path, "sa_2", masks[:0])
    source = Sa1bSource(tmp_path)
    np.testing.assert_array_equal(source.load(0).masks, masks[[0, 2]])
    assert source.load(1).masks.shape == (0, HEIGHT, WIDTH)


def test_one_pixel(tmp_path: Path) -> None:
    write_pair(tmp_path, "sa_1", np.ones((1, 1, 1), bool))
    assert Sa1bSource(tmp_path).load(0).masks.tolist() == [[[True]]]


def test_what_the_mask_generator_writes(tmp_path: Path) -> None:
    """A bare list of records, as in `sam-fast amg --convert-to-rle`."""
    masks = random_masks(4, 2)
    write_pair(tmp_path, "cup", masks)
    (tmp_path / "cup.json").write_text(json.dumps([{"segmentation": code(mask), "area": 1} for mask in masks]))
    np.testing.assert_array_equal(Sa1bSource(tmp_path).load(0).masks, masks)


def test_opening_reads_no_file(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"sa_{i}.json").write_text("{")
        (tmp_path / f"sa_{i}.jpg").write_text("")
    source = Sa1bSource(tmp_path)
    assert len(source) == 3
    with pytest.raises(ValueError, match=r"sa_0\.json is not readable JSON"):
        source.load(0)


def test_a_folder_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images with a JSON"):
        Sa1bSource(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Sa1bSource(tmp_path / "nowhere")
    (tmp_path / "sa_1.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sa_1\.json has no image"):
        Sa1bSource(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{}", 'no list of "annotations"'),
        ("3", 'no list of "annotations"'),
        ('{"annotations": [{"bbox": [0, 0, 1, 1]}]}', 'an annotation has no "segmentation"'),
        ('{"annotations": [7]}', 'an annotation has no "segmentation"'),
        ('{"annotations": [{"segmentation": {"counts": "1"}}]}', "annotation 0: its run-length code has no 'size'"),
        ('{"annotations": [{"segmentation": 7}]}', "annotation 0: it must be a list of polygons"),
        (f'{{"annotations": [{{"segmentation": [[1, 1, 5, 1, 5, {10**400}]]}}]}}', "annotation 0: "),
        ('{"image": {"height": 1, "width": 2}, "annotations": []}', f"{HEIGHT} x {WIDTH} .* about 1 x 2"),
    ],
)
def test_malformed_annotations_are_refused_by_name(tmp_path: Path, content: str, text: str) -> None:
    write_pair(tmp_path, "sa_1", random_masks(1, 1))
    (tmp_path / "sa_1.json").write_text(content)
    with pytest.raises(ValueError, match=text) as caught:
        Sa1bSource(tmp_path).load(0)
    assert "sa_1.json" in str(caught.value)


def test_files_that_vanish_are_named(tmp_path: Path) -> None:
    write_pair(tmp_path, "sa_1", random_masks(1, 1))
    source = Sa1bSource(tmp_path)
    (tmp_path / "sa_1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"sa_1\.jpg, which .*sa_1\.json describes"):
        source.load(0)


def test_orientation(tmp_path: Path) -> None:
    """The pixels as stored by default; turned by EXIF with `upright`, e.g. for what `sam-fast amg` found."""
    mask = random_masks(1, 1)
    write_pair(tmp_path, "sa_1", mask)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(tmp_path / "sa_1.jpg").copy().save(tmp_path / "sa_1.jpg", exif=exif)
    stored = np.asarray(Image.open(tmp_path / "sa_1.jpg"))
    np.testing.assert_array_equal(Sa1bSource(tmp_path).load(0).image, stored)
    (tmp_path / "sa_1.json").write_text(json.dumps([{"segmentation": code(np.rot90(mask[0]))}]))
    sample = Sa1bSource(tmp_path, upright=True).load(0)
    np.testing.assert_array_equal(sample.image, np.rot90(stored))
    np.testing.assert_array_equal(sample.masks[0], np.rot90(mask[0]))


class _Masks(torch.utils.data.Dataset):
    def __init__(self, source: Sa1bSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> int:
        return int(self.source.load(index).masks.sum())


def test_workers_of_a_data_loader_read_the_same(tmp_path: Path) -> None:
    masks = random_masks(5, 2)
    for i in range(3):
        write_pair(tmp_path, f"sa_{i}", masks[: i + 1])
    source = pickle.loads(pickle.dumps(Sa1bSource(tmp_path)))
    loader = torch.utils.data.DataLoader(_Masks(source), batch_size=None, num_workers=1)
    sums = [int(masks[:1].sum()), int(masks.sum()), int(masks.sum())]
    assert [int(value) for value in loader] == sums
