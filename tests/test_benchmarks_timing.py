"""What the benchmarks share: rows that outlive a mistake, where they come from, and arguments that make no sense."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import cpu, nano_pictures, postprocess, scenes, test_ops, timing


@dataclass(frozen=True)
class Line:
    name: str
    value: int | None = None


def test_rows_are_added_and_new_columns_are_empty_in_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.csv"
    timing.append_rows(path, [Line("a", 1)])
    timing.append_rows(path, [Line("b")], {"commit": "abc"})
    assert path.read_text().splitlines() == ["name,value,commit", "a,1,", "b,,abc"]


def test_a_file_of_other_columns_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("name,seconds\nprecious,3600\n")
    with pytest.raises(ValueError, match=r"rows\.csv holds something else: columns seconds"):
        timing.append_rows(path, [Line("a", 1)])
    assert path.read_text() == "name,seconds\nprecious,3600\n"


def test_a_row_does_not_make_the_next_one_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        run = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "cpu.csv").write_text("name\n")
    (tmp_path / "code.py").write_text("1\n")
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    git("init", "-q")
    assert timing.commit() == "unknown"  # nothing is committed yet
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "--short=10", "HEAD")
    (results / "cpu.csv").write_text("name\nrow\n")
    (tmp_path / "untracked.py").write_text("2\n")
    assert timing.commit() == head
    (tmp_path / "code.py").write_text("3\n")
    assert timing.commit() == f"{head}-dirty"


def test_outside_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    assert timing.commit() == "unknown"
    monkeypatch.setenv("PATH", "")
    assert timing.commit() == "unknown"


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (cpu, ["--peers", "sam_fast", "sam_slow"], "invalid choice: 'sam_slow'"),
        (scenes, ["--scenes", "0"], "--scenes: must be a whole number from 1 on, got '0'"),
        (postprocess, ["--masks", "-1"], "--masks: must be a whole number from 1 on, got '-1'"),
        (nano_pictures, ["no_such.csv"], "no such file: no_such.csv"),
    ],
    ids=["cpu", "scenes", "postprocess", "nano_pictures"],
)
def test_wrong_arguments_are_named(
    program, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
    with pytest.raises(SystemExit):
        program.main()
    assert message in capsys.readouterr().err


def test_help_draws_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nano_pictures, "FOLDER", tmp_path / "images")
    monkeypatch.setattr(sys, "argv", ["nano_pictures", "--help"])
    with pytest.raises(SystemExit):
        nano_pictures.main()
    assert not any(tmp_path.iterdir())


def test_operations_with_a_wrong_result_have_no_time() -> None:
    timed: list[object] = []
    test_ops.check_and_time(timed.append, lambda: 1, lambda result: result == 1)
    assert len(timed) == 1
    with pytest.raises(AssertionError):
        test_ops.check_and_time(timed.append, lambda: 1, lambda result: result == 2)
    assert len(timed) == 1
