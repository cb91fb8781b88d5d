"""`sam-fast amg`: flags and files of the official script, and what it does beyond them."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import official
from PIL import Image
from pycocotools import mask as coco
from torch import nn

import sam_fast
from sam_fast import SamAutomaticMaskGenerator, preprocess
from sam_fast.cli.amg import find_images
from sam_fast.cli.amg_files import AmgFiles
from sam_fast.modeling import Sam

HEADER = "id,area,bbox_x0,bbox_y0,bbox_w,bbox_h,point_input_x,point_input_y,predicted_iou,stability_score,"
HEADER += "crop_box_x0,crop_box_y0,crop_box_w,crop_box_h"
SETTINGS: dict[str, Any] = {"points_per_side": 6, "pred_iou_thresh": 0.85, "stability_score_thresh": 0.5}
SETTINGS_FLAGS = ("--points-per-side", 6, "--pred-iou-thresh", 0.85, "--stability-score-thresh", 0.5)


@pytest.fixture
def model_flags(tiny_checkpoint: Path) -> tuple[Any, ...]:
    return ("--model-type", "tiny", "--checkpoint", tiny_checkpoint, "--device", "cpu")


def test_folder_of_masks_and_metadata(cli: Any, pictures: Path, tmp_path: Path, model_flags: tuple, tiny: Sam) -> None:
    text = cli("amg", "--input", pictures, "--output", tmp_path, *model_flags, *SETTINGS_FLAGS)
    assert {path.name for path in tmp_path.iterdir()} == {"wide", "tall"}
    total = 0
    for name in ("wide", "tall"):
        records = SamAutomaticMaskGenerator(tiny, **SETTINGS).generate(pictures / f"{name}.png")
        assert records
        total += len(records)
        names = {path.name for path in (tmp_path / name).iterdir()}
        assert names == {"metadata.csv", *(f"{i}.png" for i in range(len(records)))}
        lines = [HEADER]
        for i, record in enumerate(records):
            picture = Image.open(tmp_path / name / f"{i}.png")
            assert picture.mode == "L"
            np.testing.assert_array_equal(np.asarray(picture), record["segmentation"].astype(np.uint8) * 255)
            x, y, w, h = record["bbox"]
            (px, py), (cx, cy, cw, ch) = record["point_coords"][0], record["crop_box"]
            scores = f"{record['predicted_iou']},{record['stability_score']}"
            lines.append(f"{i},{record['area']},{x},{y},{w},{h},{px},{py},{scores},{cx},{cy},{cw},{ch}")
        assert (tmp_path / name / "metadata.csv").read_text() == "\n".join(lines)
    assert f"{total} masks of 2 images" in text


def test_metadata_equals_the_official_generators(
    cli: Any, pictures: Path, tmp_path: Path, model_flags: tuple, official_tiny: nn.Module
) -> None:
    cli("amg", "--input", pictures / "wide.png", "--output", tmp_path, *model_flags, *SETTINGS_FLAGS)
    image = np.asarray(Image.open(pictures / "wide.png"))
    with torch.no_grad():
        expected = official.SamAutomaticMaskGenerator(official_tiny, **SETTINGS).generate(image)
    table = np.loadtxt(tmp_path / "wide" / "metadata.csv", delimiter=",", skiprows=1, ndmin=2)
    assert len(table) == len(expected) > 0
    for row, record in zip(table, expected, strict=True):
        assert row[1] == pytest.approx(record["area"], rel=1e-3)  # pixels on the threshold
        assert row[2:8].tolist() == [*record["bbox"], *record["point_coords"][0]]
        assert row[8:10] == pytest.approx([record["predicted_iou"], record["stability_score"]], abs=1e-3)
        assert row[10:].tolist() == record["crop_box"]


def test_json_of_coco_rles(cli: Any, pictures: Path, tmp_path: Path, model_flags: tuple, tiny: Sam) -> None:
    flags = ("--convert-to-rle", *SETTINGS_FLAGS)
    cli("amg", "--input", pictures / "tall.png", "--output", tmp_path, *model_flags, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["tall.json"]
    written = json.loads((tmp_path / "tall.json").read_text())
    records = SamAutomaticMaskGenerator(tiny, **SETTINGS).generate(pictures / "tall.png")
    assert len(written) == len(records) > 0
    for ours, record in zip(written, records, strict=True):
        assert ours.keys() == record.keys()
        mask = coco.decode(ours["segmentation"]).astype(bool)
        np.testing.assert_array_equal(mask, record["segmentation"])
        assert ours["area"] == mask.sum()
        assert {k: v for k, v in ours.items() if k != "segmentation"} == {
            k: v for k, v in record.items() if k != "segmentation"
        }


@pytest.mark.parametrize("form", [(), ("--convert-to-rle",)], ids=["png", "rle"])
def test_overlay_has_the_images_size(
    cli: Any, pictures: Path, tmp_path: Path, model_flags: tuple, form: tuple[str, ...]
) -> None:
    cli(
        "amg", "--input", pictures / "tall.png", "--output", tmp_path, *model_flags, *SETTINGS_FLAGS, "--overlay", *form
    )
    drawn = np.asarray(Image.open(tmp_path / "tall_overlay.jpg")).astype(int)
    image = np.asarray(Image.open(pictures / "tall.png")).astype(int)
    assert drawn.shape == image.shape
    assert np.abs(drawn - image).mean() > 5  # something was drawn


def test_overlay_of_an_image_too_long_for_a_jpeg(cli: Any, tmp_path: Path, model_flags: tuple) -> None:
    Image.new("RGB", (70_000, 4)).save(tmp_path / "long.png")
    flags = ("--points-per-side", 1, "--convert-to-rle", "--overlay")
    cli("amg", "--input", tmp_path / "long.png", "--output", tmp_path / "out", *model_flags, *flags)
    assert Image.open(tmp_path / "out" / "long_overlay.jpg").size == (65_500, 4)


def test_unreadable_images_are_reported_and_the_others_done(
    cli: Any, pictures: Path, tmp_path: Path, model_flags: tuple
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(pictures / "tall.png", folder)
    (folder / "broken.png").write_bytes((pictures / "wide.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("not an image")
    (folder / "notes.pdf").write_text("not an image")
    (folder / ".hidden.png").write_text("not an image either")
    text = cli("amg", "--input", folder, "--output", tmp_path / "out", *model_flags, *SETTINGS_FLAGS, expect=1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tall"}
    assert "broken.png" in text
    assert "1 image in" in text and "1 unreadable" in text and "2 other files ignored" in text


def test_files_are_read_and_written_beside_the_model(
    cli: Any, pictures: Path, tmp_path: Path, model_flags: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an image is worked on, the next one is read and the one before is written."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        shutil.copy(pictures / "tall.png", folder / f"{i}.png")
    read, all_read, written = [], threading.Event(), threading.Event()
    read_image, write = preprocess.read_image, AmgFiles.write
    second_begun = threading.Event()
    order = []

    def reading(path: Any) -> Any:
        read.append(path.name)
        if len(read) == 3:
            all_read.set()
        return read_image(path)

    def writing(self: AmgFiles, stem: str, *rest: Any) -> None:
        assert stem != "0" or second_begun.wait(20)  # else nobody went on
        write(self, stem, *rest)
        order.append(("written", stem))
        written.set()

    class Generator(SamAutomaticMaskGenerator):
        def begin(self, image: Any) -> Callable[[], list[dict[str, Any]]]:
            if type(image) is np.ndarray:
                order.append(("begun", len([step for step in order if step[0] == "begun"])))
                if order[-1] == ("begun", 1):
                    second_begun.set()
                    assert written.wait(20) and all_read.wait(20)
            return super().begin(image)

    monkeypatch.setattr(preprocess, "read_image", reading)
    monkeypatch.setattr(AmgFiles, "write", writing)
    monkeypatch.setattr(sam_fast, "SamAutomaticMaskGenerator", Generator)
    cli("amg", "--input", folder, "--output", tmp_path / "out", *model_flags, *SETTINGS_FLAGS)
    assert order.index(("begun", 1)) < order.index(("written", "0")) < order.index(("begun", 2))
    tables = {(tmp_path / "out" / str(i) / "metadata.csv").read_text() for i in range(3)}
    assert len(tables) == 1 and tables.pop() != HEADER


def test_a_full_disk_is_an_error(
    cli: Any, pictures: Path, tmp_path: Path, model_flags: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    flags = ("amg", "--input", pictures / "tall.png", "--output", tmp_path, *model_flags, *SETTINGS_FLAGS)
    cli(*flags)
    monkeypatch.setattr(Image.Image, "save", save)
    assert "no space left" in cli(*flags, "--overwrite", expect=1)
    assert not (tmp_path / "tall" / "metadata.csv").exists()  # which says that a folder is complete


def test_existing_results_are_replaced_on_request_only(
    cli: Any, pictures: Path, tmp_path: Path, model_flags: tuple
) -> None:
    old = tmp_path / "tall"
    old.mkdir()
    (old / "999.png").write_text("of an earlier run")
    (old / "mine.png").write_text("not of any run")
    flags = ("amg", "--input", pictures / "tall.png", "--output", tmp_path, *model_flags, *SETTINGS_FLAGS)
    assert "--overwrite" in cli(*flags, expect=1)
    assert {path.name for path in old.iterdir()} == {"999.png", "mine.png"}
    cli(*flags, "--overwrite")
    names = {path.name for path in old.iterdir()}
    assert {"0.png", "metadata.csv", "mine.png"} <= names
    assert "999.png" not in names


def test_existing_json_is_replaced_on_request_only(
    cli: Any, pictures: Path, tmp_path: Path, model_flags: tuple
) -> None:
    (tmp_path / "tall.json").write_text("the truth")
    flags = ("amg", "--input", pictures / "tall.png", "--output", tmp_path, *model_flags, *SETTINGS_FLAGS)
    assert "--overwrite" in cli(*flags, "--convert-to-rle", expect=1)
    assert (tmp_path / "tall.json").read_text() == "the truth"
    cli(*flags, "--convert-to-rle", "--overwrite")
    assert json.loads((tmp_path / "tall.json").read_text())
    cli(*flags)  # a folder of masks is no JSON


def test_formats_that_cannot_be_read_are_no_images(tmp_path: Path) -> None:
    names = ("a.png", "b.mpo", "c.pdf", "d.palm", "e.mpg", "f.h5", "g.grib", "h.bufr", "i.txt")
    for name in names:
        (tmp_path / name).touch()
    images, ignored = find_images(tmp_path)
    assert [image.name for image in images] == ["a.png", "b.mpo"]
    assert ignored == len(names) - 2


def test_images_of_one_name_are_refused(cli: Any, pictures: Path, tmp_path: Path, model_flags: tuple) -> None:
    shutil.copy(pictures / "tall.png", tmp_path / "a.png")
    Image.open(pictures / "tall.png").save(tmp_path / "a.jpg")
    assert "a.jpg, a.png" in cli("amg", "--input", tmp_path, "--output", tmp_path / "out", *model_flags, expect=1)


OFFICIAL_FLAGS = {
    "points-per-side": 5,
    "points-per-batch": 7,
    "pred-iou-thresh": 0.1,
    "stability-score-thresh": 0.2,
    "stability-score-offset": 0.3,
    "box-nms-thresh": 0.4,
    "crop-n-layers": 1,
    "crop-nms-thresh": 0.5,
    "crop-overlap-ratio": 0.6,
    "crop-n-points-downscale-factor": 2,
    "min-mask-region-area": 11,
}


@pytest.mark.parametrize("given", [*OFFICIAL_FLAGS, "all", "none"])
def test_official_flags_reach_the_generator(
    cli: Any, pictures: Path, tmp_path: Path, model_flags: tuple, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    seen: dict[str, Any] = {}

    class Recorder(SamAutomaticMaskGenerator):
        def __init__(self, model: Sam, **settings: Any) -> None:
            super().__init__(model, **settings)
            seen.update(settings)

        def begin(self, image: Any) -> Callable[[], list[dict[str, Any]]]:
            return list

    monkeypatch.setattr(sam_fast, "SamAutomaticMaskGenerator", Recorder)
    flags = {name: value for name, value in OFFICIAL_FLAGS.items() if given in (name, "all")}
    line = [part for name, value in flags.items() for part in (f"--{name}", value)]
    cli("amg", "--input", pictures / "tall.png", "--output", tmp_path, *model_flags, *line, "--backend", "torch")
    expected = {name.replace("-", "_"): value for name, value in flags.items()}
    assert seen == {**expected, "output_mode": "binary_mask", "precision": "auto", "backend": "torch"}
    # Without masks: the folder and a table of no rows, as in the official script.
    assert (tmp_path / "tall" / "metadata.csv").read_text() == HEADER


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model-type", "vit_x"), "one of default, nano, tiny, vit_b, vit_h, vit_l, got 'vit_x'"),
        (("--checkpoint", "missing.pth"), "no checkpoint at missing.pth"),
        (("--device", "tpu!"), "--device must be like cpu"),
        (("--device", "cuda:77"), "cuda:77"),
        (("--device", "xpu:9"), "--device xpu:9"),
        (("--device", "vulkan"), "--device vulkan"),
        (("--input", "missing"), "no image or folder at missing"),
    ],
    ids=["model-type", "checkpoint", "device-name", "device-absent", "xpu", "vulkan", "input"],
)
def test_errors_are_one_line(
    cli: Any, pictures: Path, tmp_path: Path, model_flags: tuple, flags: tuple[str, ...], message: str
) -> None:
    text = cli("amg", "--input", pictures, "--output", tmp_path, *model_flags, *flags, expect=1)
    assert message in text
    assert len(text.splitlines()) == 1


def test_only_nano_needs_no_checkpoint(cli: Any, pictures: Path, tmp_path: Path) -> None:
    flags = ("amg", "--input", pictures / "tall.png", "--output", tmp_path, "--device", "cpu", "--points-per-side", 3)
    text = cli(*flags, "--model-type", "vit_b", expect=1)
    assert "vit_b needs --checkpoint" in text and len(text.splitlines()) == 1
    assert "of 1 image in" in cli(*flags, "--model-type", "nano")
    assert (tmp_path / "tall" / "metadata.csv").exists()


def test_folder_without_images(cli: Any, tmp_path: Path, model_flags: tuple) -> None:
    assert "no images in the folder" in cli("amg", "--input", tmp_path, "--output", tmp_path, *model_flags, expect=1)
