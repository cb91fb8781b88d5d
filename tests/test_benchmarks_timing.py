"""What the benchmarks share: rows that outlive a mistake, and where they come from."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import timing


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
