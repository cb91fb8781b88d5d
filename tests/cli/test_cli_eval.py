"""`sam-fast eval` on two drawn scenes in a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation.drawings import Drawings
from PIL import Image

from sam_fast.cli.eval import parse_methods
from sam_fast.evaluation.results import Results


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ and masks/ of two drawings, whose rectangles do not hide each other wholly."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    for i in range(2):
        sample = Drawings(3).load(i)
        Image.fromarray(sample.image).save(folder / "images" / f"{i}.png")
        labels = np.zeros(sample.image.shape[:2], np.uint8)
        for number, mask in enumerate(sample.masks, 1):
            labels[mask] = number
        Image.fromarray(labels).save(folder / "masks" / f"{i}.png")
    return folder


@pytest.fixture
def model_flags(tiny_checkpoint: Path) -> tuple[Any, ...]:
    return ("--model-type", "tiny", "--checkpoint", tiny_checkpoint)


def test_one_table_of_all_methods(cli: Any, scenes: Path, tmp_path: Path, model_flags: tuple) -> None:
    grid = ("--points-per-side", 3)
    text = cli(
        "eval", "--data", scenes, "--output", tmp_path, *model_flags, "--objects", 0, "--amg", "--classical", *grid
    )
    found = {path.name: Results.load(path) for path in tmp_path.glob("*.json")}
    assert found.keys() == {"tiny.json", "grabcut.json", "random_walker.json"}
    sam = found["tiny.json"]
    assert sam.counts == {"images": 2, "objects": 6}
    assert sam.method_settings["generator"]["points_per_side"] == 3
    assert sam.provenance["command"].startswith("sam-fast eval --data ")
    assert " --model-type tiny " in sam.provenance["command"] and " --amg " in sam.provenance["command"]
    assert "--no-clicks" not in sam.provenance["command"]
    assert len({results.digest for results in found.values()}) == 1
    markdown = (tmp_path / "table.md").read_text()
    assert "| mean IoU | tiny | grabcut | random_walker |" in markdown
    printed = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    for label, key in (("1 click", "click_1"), ("box", "box"), ("AR@100", "recall_100")):
        cells = [results.summary.get(key) for results in (sam, found["grabcut.json"], found["random_walker.json"])]
        row = [label, *("" if value is None else f"{value:.3f}" for value in cells)]
        assert f"| {' | '.join(row)} |" in markdown
        assert row in printed


def test_methods_one_after_the_other(cli: Any, scenes: Path, tmp_path: Path, model_flags: tuple) -> None:
    """Separate calls, one of which repeats an earlier one, add up to the same table."""
    shared = ("--data", scenes, "--objects", 2, "--no-clicks")
    cli("eval", *shared, "--methods", "grabcut", "--output", tmp_path / "a")
    cli("eval", *shared, *model_flags, "--output", tmp_path / "b", "--name", "mine")
    joint = cli("eval", tmp_path / "b" / "mine.json", tmp_path / "a" / "grabcut.json")
    assert "4 objects of 2 images" in joint
    again = cli(
        "eval", *shared, *model_flags, "--name", "mine", "--output", tmp_path / "b", tmp_path / "a/grabcut.json"
    )
    assert "mine is from" in again
    assert joint.splitlines() == again.splitlines()[1:-1]  # less the note and where it was written to
    assert "| mean IoU | mine | grabcut |" in (tmp_path / "b" / "table.md").read_text()
    for precision, kept in (("fp32", True), ("int8", False)):  # auto is fp32 on a CPU
        flags = ("--name", "mine", "--output", tmp_path / "b", "--precision", precision, "--device", "cpu")
        assert ("mine is from" in cli("eval", *shared, *model_flags, *flags)) == kept


def test_results_of_the_output_folder_are_in_the_table_once(cli: Any, scenes: Path, tmp_path: Path) -> None:
    """Though a pattern names them, too: measured anew or not."""
    cli("eval", "--data", scenes, "--no-clicks", "--methods", "grabcut", "--output", tmp_path)
    (tmp_path / "other.json").write_bytes((tmp_path / "grabcut.json").read_bytes())
    files = sorted(tmp_path.glob("*.json"))
    for more in ((), ("--recompute",)):
        cli("eval", "--data", scenes, "--no-clicks", "--methods", "grabcut", "--output", tmp_path, *more, *files)
        assert "| mean IoU | grabcut | grabcut |\n" in (tmp_path / "table.md").read_text()


def test_an_output_that_is_a_file_is_found_out_before_the_measurement(
    cli: Any, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sam_fast.evaluation.evaluate.evaluate", pytest.fail)
    (tmp_path / "file").touch()
    line = ("eval", "--data", scenes, "--no-clicks", "--methods", "grabcut", "--output", tmp_path / "file")
    assert "File exists" in cli(*line, expect=1)


def test_results_are_measured_again(cli: Any, scenes: Path, tmp_path: Path) -> None:
    """On request, or for another question; not otherwise."""
    flags = ("eval", "--data", scenes, "--no-clicks", "--methods", "grabcut", "--output", tmp_path)
    cli(*flags)
    path = tmp_path / "grabcut.json"
    document = json.loads(path.read_text())
    document["provenance"]["date"] = "long ago"
    for more, kept in (((), True), (("--recompute",), False), (("--seed", 7), False)):
        path.write_text(json.dumps(document))
        assert ("grabcut is from" in cli(*flags, *more)) == kept
        assert (Results.load(path).provenance["date"] == "long ago") == kept


def test_results_of_data_that_changed_are_measured_again(cli: Any, scenes: Path, tmp_path: Path) -> None:
    """An outline that was corrected counts, though the command is the same."""
    shutil.copytree(scenes, tmp_path / "data")
    line = ("eval", "--data", tmp_path / "data", "--objects", 0, "--no-clicks", "--methods", "grabcut")
    line += ("--output", tmp_path / "out")
    cli(*line)
    before = Results.load(tmp_path / "out" / "grabcut.json")
    assert "grabcut is from" in cli(*line)
    labels = np.asarray(Image.open(tmp_path / "data" / "masks" / "1.png")).copy()
    labels[labels == 1] = 0
    labels[:9, :9] = 1
    Image.fromarray(labels).save(tmp_path / "data" / "masks" / "1.png")
    text = cli(*line)
    assert "grabcut is measured again" in text and "has changed since" in text
    after = Results.load(tmp_path / "out" / "grabcut.json")
    assert after.digest != before.digest and 81 in [row["area"] for row in after.objects]
    assert "grabcut is from" in cli(*line)


def test_methods_without_an_answer_are_left_out(cli: Any, scenes: Path) -> None:
    text = cli("eval", "--data", scenes, "--no-clicks", "--methods", "random_walker,grabcut")
    assert "random_walker answers clicks only, and is left out" in text


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ((), 2, "give --data to measure on"),
        (("--data", "nowhere"), 1, "nowhere"),
        (("--data", "{scenes}", "--methods", "sam,magic"), 2, "'sam,magic'"),
        (("--data", "{scenes}", "--model-type", "tiny"), 1, "tiny needs --checkpoint"),
        (("--data", "{scenes}", "--no-clicks", "--no-box"), 1, "clicks, box and everything"),
        (("--data", "{scenes}", "--methods", "grabcut", "--no-box"), 1, "none of the methods answers the prompts"),
        (("--data", "{scenes}", "--name", "grabcut"), 2, "--name grabcut is the name of another method"),
        (("nothing.json",), 1, "nothing.json"),
    ],
    ids=["nothing", "data", "methods", "checkpoint", "prompts", "answers", "name", "results"],
)
def test_errors(cli: Any, scenes: Path, flags: tuple[str, ...], status: int, message: str) -> None:
    assert message in cli("eval", *(flag.format(scenes=scenes) for flag in flags), expect=status)


def test_results_of_other_objects_are_refused(cli: Any, scenes: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        flags = ("--no-clicks", "--methods", "grabcut", "--seed", seed, "--output", tmp_path / str(seed))
        cli("eval", "--data", scenes, *flags)
    text = cli("eval", tmp_path / "0" / "grabcut.json", tmp_path / "1" / "grabcut.json", expect=1)
    assert "not about the same objects" in text and len(text.splitlines()) == 1


def test_parse_methods() -> None:
    assert parse_methods("grabcut, sam", False) == ["sam", "grabcut"]
    assert parse_methods("sam", True) == ["sam", "grabcut", "random_walker"]
