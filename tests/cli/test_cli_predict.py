"""`sam-fast predict`: what is written equals what SamPredictor returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import TINY, seed_weights
from PIL import Image
from pycocotools import mask as coco

from sam_fast import ImageEmbedding, SamPredictor
from sam_fast.build_sam import build_sam_from_config, sam_model_registry
from sam_fast.modeling import Sam


@pytest.fixture
def flags(tiny_checkpoint: Path, pictures: Path, tmp_path: Path) -> tuple[Any, ...]:
    model = ("--model-type", "tiny", "--checkpoint", tiny_checkpoint, "--device", "cpu")
    return ("predict", "--input", pictures / "wide.png", "--output", tmp_path / "out", *model)


@pytest.fixture(scope="module")
def predictor(tiny: Sam, pictures: Path) -> SamPredictor:
    predictor = SamPredictor(tiny)
    predictor.set_image(pictures / "wide.png")
    return predictor


def read(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The JSON, and the masks of the PNGs it names; checks that RLE, area and box fit the PNG."""
    document = json.loads((folder / "wide.json").read_text())
    masks = []
    for entry in document["masks"]:
        mask = np.asarray(Image.open(folder / entry["file"]))
        assert set(np.unique(mask)) <= {0, 255}
        masks.append(mask == 255)
        np.testing.assert_array_equal(coco.decode(entry["segmentation"]), masks[-1])
        assert entry["area"] == masks[-1].sum()
        if entry["area"] == 0:
            assert entry["bbox"] == [0, 0, 0, 0]
            continue
        rows, columns = masks[-1].any(1).nonzero()[0], masks[-1].any(0).nonzero()[0]
        assert entry["bbox"] == [columns[0], rows[0], columns[-1] - columns[0], rows[-1] - rows[0]]
    assert any(mask.any() for mask in masks)
    return document, np.stack(masks)


CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "point": (("--point", "60,70"), {"point_coords": [[60, 70]], "point_labels": [1]}),
    "points": (
        ("--point", "60.5,70", "--point", "150,20,0"),
        {"point_coords": [[60.5, 70], [150, 20]], "point_labels": [1, 0]},
    ),
    "box": (("--box", "20,30,120,140"), {"box": [20, 30, 120, 140]}),
    "point-and-box": (
        ("--point", "60,70,1", "--box", "20,30,120,140"),
        {"point_coords": [[60, 70]], "point_labels": [1], "box": [20, 30, 120, 140]},
    ),
    "boxes": (
        ("--box", "20,30,120,140", "--box", "90,5,190,99"),
        {"box": [[20, 30, 120, 140], [90, 5, 190, 99]]},
    ),
}


@pytest.mark.parametrize(
    ("case", "multimask"),
    [
        ("point", True),
        ("points", False),
        ("box", True),
        ("point-and-box", False),
        ("boxes", True),
        ("boxes", False),
    ],
)
def test_files_hold_the_prediction(
    cli: Any, flags: tuple, tmp_path: Path, predictor: SamPredictor, case: str, multimask: bool
) -> None:
    prompts, arrays = CASES[case]
    text = cli(*flags, *prompts, "--multimask" if multimask else "--single")
    document, masks = read(tmp_path / "out")
    expected, scores, _ = predictor.predict(
        **{name: np.array(value) for name, value in arrays.items()}, multimask_output=multimask
    )
    np.testing.assert_array_equal(masks, expected.reshape(masks.shape))
    written = [entry["predicted_iou"] for entry in document["masks"]]
    np.testing.assert_allclose(written, scores.ravel(), rtol=1e-6)
    count = len(expected) if expected.ndim == 4 else 1
    assert [entry["prompt"] for entry in document["masks"]] == np.repeat(range(count), len(masks) // count).tolist()
    assert document["points"] == arrays.get("point_coords")
    assert document["boxes"] == arrays.get("box")
    assert text.count("predicted IoU") == len(masks)
    assert Image.open(tmp_path / "out" / "wide_overlay.jpg").size == Image.open(flags[2]).size


def test_mask_input_refines_an_earlier_prediction(
    cli: Any, flags: tuple, tmp_path: Path, predictor: SamPredictor
) -> None:
    cli(*flags, "--point", "60,70", "--single", "--save-logits")
    logits = tmp_path / "out" / "wide_0_logits.npy"
    point = {"point_coords": np.array([[60, 70]]), "point_labels": np.array([1])}
    _, _, low_res = predictor.predict(**point, multimask_output=False)
    np.testing.assert_array_equal(np.load(logits), low_res)

    cli(*flags, "--point", "60,70", "--single", "--mask-input", logits)
    expected, _, _ = predictor.predict(**point, mask_input=low_res, multimask_output=False)
    np.testing.assert_array_equal(read(tmp_path / "out")[1], expected)


def test_nothing_of_an_earlier_call_stays(cli: Any, flags: tuple, tmp_path: Path) -> None:
    """Neither masks of other prompts nor logits of other masks; what no call wrote, and the logits given, do."""
    out = tmp_path / "out"
    cli(*flags, "--point", "60,70", "--save-logits")
    for name in ("wide_3.png", "wide_side.png", "wide_0_logits.txt"):
        (out / name).write_text("mine")
    cli(*flags, "--point", "20,30", "--single")
    others = {"wide.json", "wide_overlay.jpg", "wide_3.png", "wide_side.png", "wide_0_logits.txt"}
    assert {path.name for path in out.iterdir()} == {"wide_0.png", *others}
    cli(*flags, "--point", "60,70", "--save-logits")
    cli(*flags, "--point", "60,70", "--single", "--mask-input", out / "wide_1_logits.npy")
    assert {path.name for path in out.iterdir()} == {"wide_0.png", "wide_1_logits.npy", *others}


@pytest.mark.parametrize("text", ["[]", "{}", "not JSON", '{"masks": 3}'])
def test_json_of_another_program_counts_nothing(cli: Any, flags: tuple, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "wide.json").write_text(text)
    (out / "wide_2.png").write_text("mine")
    cli(*flags, "--point", "20,30", "--single")
    assert (out / "wide_2.png").read_text() == "mine" and read(out)[0]["image"] == "wide.png"


def test_a_picture_too_long_for_a_jpeg_is_made_smaller(cli: Any, flags: tuple, tmp_path: Path) -> None:
    Image.new("RGB", (70_000, 4)).save(tmp_path / "long.png")
    cli(*flags[:2], tmp_path / "long.png", *flags[3:], "--point", "1e10,2", "--single")
    assert json.loads((tmp_path / "out" / "long.json").read_text())["size"] == [4, 70_000]
    assert Image.open(tmp_path / "out" / "long_overlay.jpg").size == (65_500, 4)


def test_files_beside_the_image_are_not_replaced(cli: Any, flags: tuple, tmp_path: Path) -> None:
    folder = tmp_path / "sequence"
    folder.mkdir()
    for name in ("f.png", "f_0.png"):
        Image.new("L", (9, 8), 77).save(folder / name)
    line = ("predict", "--input", folder / "f.png", "--output", folder / ".." / "sequence", *flags[5:])
    assert "f_0.png exists beside the image" in cli(*line, "--point", "5,2", expect=1)
    assert Image.open(folder / "f_0.png").getextrema() == (77, 77)
    assert len(list(folder.iterdir())) == 2
    (folder / "f_0.png").rename(folder / "g_0.png")
    cli(*line, "--point", "5,2")
    assert (folder / "f_0.png").exists() and (folder / "f.json").exists()


class TestEmbedding:
    """--embedding: encode once, and never answer about another image or model."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "cache" / "wide.safetensors"

    @pytest.fixture
    def encoded(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """One entry per image that was encoded."""
        calls: list[int] = []
        encode = SamPredictor.encode_images

        def counted(self: SamPredictor, images: Any, *rest: Any) -> list[ImageEmbedding]:
            calls.extend(1 for _ in images)
            return encode(self, images, *rest)

        monkeypatch.setattr(SamPredictor, "encode_images", counted)
        return calls

    def test_is_written_then_reused(
        self, cli: Any, flags: tuple, tmp_path: Path, path: Path, encoded: list[int], predictor: SamPredictor
    ) -> None:
        line = (*flags, "--point", "60,70", "--embedding", path)
        cli(*line)
        first = read(tmp_path / "out")
        before = path.read_bytes()
        np.testing.assert_array_equal(ImageEmbedding.load(path).features, predictor.get_image_embedding())
        cli(*line)
        assert encoded == [1]
        assert path.read_bytes() == before
        again = read(tmp_path / "out")
        assert again[0] == first[0]

    def test_of_another_image_of_the_same_size_is_replaced(
        self, cli: Any, flags: tuple, tmp_path: Path, path: Path, encoded: list[int]
    ) -> None:
        other = tmp_path / "wide.png"
        Image.open(flags[2]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
        flipped = (*flags[:2], other, *flags[3:])
        cli(*flags, "--point", "60,70", "--embedding", path)
        assert "another image" in cli(*flipped, "--point", "60,70", "--embedding", path)
        assert len(encoded) == 2
        assert "note" not in cli(*flipped, "--point", "60,70", "--embedding", path)
        assert len(encoded) == 2

    def test_of_another_model_is_replaced(
        self, cli: Any, flags: tuple, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cli(*flags, "--point", "60,70", "--embedding", path)

        def other(checkpoint: str | None = None) -> Sam:
            return seed_weights(build_sam_from_config(TINY), seed=1)

        monkeypatch.setitem(sam_model_registry, "tiny", other)
        assert "another model" in cli(*flags, "--point", "60,70", "--embedding", path)

    def test_another_file_is_left_alone(self, cli: Any, flags: tuple, tmp_path: Path) -> None:
        precious = tmp_path / "thesis.txt"
        precious.write_text("years of work")
        assert "not a readable image embedding" in cli(*flags, "--point", "60,70", "--embedding", precious, expect=1)
        assert precious.read_text() == "years of work"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ((), "at least one"),
        (("--point", "1"), "--point takes 2 or 3 numbers"),
        (("--point", "1,2,3,4"), "--point takes 2 or 3 numbers"),
        (("--point", "a,b"), "'a,b'"),
        (("--point", "nan,2"), "'nan,2'"),
        (("--point", "1,2,7"), "label is 1 (foreground) or 0 (background)"),
        (("--box", "1,2,3"), "--box takes 4 numbers"),
        (("--box", "1,2,3,4", "--box", "5,6,7,8", "--point", "1,2"), "objects of their own"),
        (("--box", "1,2,3,4", "--box", "50,60,70,40"), "--box 50,60,70,40: X0,Y0 is the upper left corner"),
    ],
    ids=["none", "short", "long", "letters", "nan", "label", "box", "boxes-and-point", "corners"],
)
def test_wrong_prompts_are_usage_errors(cli: Any, flags: tuple, prompts: tuple[str, ...], message: str) -> None:
    text = " ".join(cli(*flags, *prompts, expect=2).replace("│", " ").split())
    assert message in text


def test_mask_file_of_wrong_content(cli: Any, flags: tuple, tmp_path: Path) -> None:
    np.save(tmp_path / "bad.npy", np.zeros((2, 64, 64), np.float32))
    assert "float logits [1,h,w]" in cli(*flags, "--mask-input", tmp_path / "bad.npy", expect=1)
    np.save(tmp_path / "small.npy", np.zeros((1, 8, 8), np.float32))
    assert "h = w = 64" in cli(*flags, "--mask-input", tmp_path / "small.npy", expect=1)
    np.save(tmp_path / "nan.npy", np.full((1, 64, 64), np.nan, np.float32))
    assert "nan.npy must hold finite logits" in cli(*flags, "--mask-input", tmp_path / "nan.npy", expect=1)
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "allow_pickle=False" in cli(*flags, "--mask-input", tmp_path / "object.npy", expect=1)


@pytest.mark.parametrize("content", ["archive", "damaged archive", "empty", "truncated"])
def test_unreadable_mask_files_are_named(cli: Any, flags: tuple, tmp_path: Path, content: str) -> None:
    path = tmp_path / "mask.npy"
    with open(path, "wb") as file:
        np.savez(file, np.zeros(3)) if content == "archive" else np.save(file, np.zeros((1, 64, 64), np.float32))
    if content == "damaged archive":
        path.write_bytes(b"PK\x03\x04 and no more")
    elif content in ("empty", "truncated"):
        path.write_bytes(path.read_bytes()[: 0 if content == "empty" else 300])
    text = cli(*flags, "--mask-input", path, expect=1)
    assert str(path) in text and ".npy file" in text
    assert len(text.splitlines()) == 1
