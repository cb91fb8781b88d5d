"""Results to disk and back, and the tables made of them."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation.drawings import Drawings, Knowing
from rich.console import Console

from sam_fast.evaluation.evaluate import EvaluationSettings, evaluate, protocol_of
from sam_fast.evaluation.results import Results
from sam_fast.evaluation.tables import comparison, markdown_table, terminal_table


@pytest.fixture(scope="module")
def results() -> Results:
    settings = EvaluationSettings(prompts=("clicks", "box", "everything"))
    return evaluate(Drawings(), Knowing(Drawings()), settings, data="drawings", command="sam-fast eval --data x")


def test_there_and_back(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "a.json")
    loaded = Results.load(tmp_path / "a.json")
    assert loaded.summary == pytest.approx(results.summary, abs=1e-5)
    assert loaded.objects[2]["ious"] == results.objects[2]["ious"]
    assert (loaded.method, loaded.protocol, loaded.digest) == (results.method, results.protocol, results.digest)
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "b.json").read_text() == (tmp_path / "a.json").read_text()
    assert loaded.provenance["command"] == "sam-fast eval --data x"


def test_undefined_is_null(results: Results, tmp_path: Path) -> None:
    replace(results, summary={"click_1": math.nan, "box": 0.5}).save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["summary"] == {"click_1": None, "box": 0.5}
    loaded = Results.load(tmp_path / "a.json")
    assert math.isnan(loaded.summary["click_1"])
    assert "undefined" in markdown_table([loaded])


def test_answers_the_same_question_only(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "a.json")
    loaded = Results.load(tmp_path / "a.json")
    method = Knowing(Drawings())
    settings = EvaluationSettings(prompts=("clicks", "box", "everything"))
    protocol = protocol_of(Drawings(), method, settings, "drawings")
    assert loaded.answers(method.settings, protocol)
    assert not loaded.answers({"version": 2}, protocol)
    assert not loaded.answers(method.settings, protocol_of(Drawings(), method, settings, "others"))
    assert not loaded.answers(method.settings, protocol_of(Drawings(3), method, settings, "drawings"))
    assert not loaded.answers(method.settings, {**protocol, "seed": 1})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "method": "sam"}', "\x00"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        Results.load(tmp_path / "a.json")


def test_rows_are_in_the_order_of_the_protocol(results: Results) -> None:
    other = replace(results, method="boxes", summary={"box": 0.25, "boundary_box": 0.125})
    methods, rows = comparison([results, other])
    assert methods == ["knowing", "boxes"]
    assert [label for label, _ in rows] == [
        "1 click",
        "1 click, best of 3 (oracle)",
        "2 clicks",
        "3 clicks",
        "5 clicks",
        "9 clicks",
        "box",
        "box, best of 3 (oracle)",
        "box, highest score of 3",
        "boundary IoU, box",
        "boundary IoU, 1 click",
        "boundary IoU, 5 clicks",
        "AR@10",
        "AR@100",
        "AR@1000",
        "masks per image",
        "r of predicted and true IoU",
    ]
    cells = dict(rows)
    assert cells["box"] == ["1.000", "0.250"] and cells["2 clicks"] == ["1.000", ""]


def test_tables_hold_the_same_cells(results: Results) -> None:
    other = replace(results, method="boxes", summary={"box": 0.25})
    markdown = markdown_table([results, other])
    assert "| box | 1.000 | 0.250 |" in markdown and "| mean IoU | knowing | boxes |" in markdown
    assert "3 objects of 4 images, drawings, seed 0" in markdown and "`sam-fast eval --data x`" in markdown
    screen = io.StringIO()
    Console(file=screen, width=100).print(terminal_table([results, other]))
    lines = screen.getvalue().splitlines()
    (line,) = (line for line in lines if line.startswith("│ box "))
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["box", "1.000", "0.250"]


def test_names_in_tables_are_no_markup(results: Results) -> None:
    named = replace(results, method="sam[/b]", protocol={**results.protocol, "data": "val[bold].json"})
    screen = io.StringIO()
    Console(file=screen, width=100).print(terminal_table([named]))
    assert "sam[/b]" in screen.getvalue() and "val[bold].json" in screen.getvalue()


def test_different_objects_are_not_compared(results: Results) -> None:
    with pytest.raises(ValueError, match=r"about the same objects in images of the same bytes, .*knowing: 3 objects"):
        comparison([results, replace(results, digest="0")])
    other = replace(results, digest="0", counts={**results.counts, "objects": 2})
    with pytest.raises(ValueError, match=r"about the same objects, so .*knowing: 3 objects.*knowing: 2 objects"):
        comparison([results, other])
