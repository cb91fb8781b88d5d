"""The `sam-fast` command as a whole."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sam_fast
from sam_fast.cli import app, main

COMMANDS = ("amg", "predict", "train", "pretrain", "eval", "download", "export-onnx", "doctor", "demo")


def test_help_names_every_command(cli: Any) -> None:
    text = cli("--help")
    for command in COMMANDS:
        assert f" {command} " in text
        assert f"Usage: sam-fast {command} [OPTIONS]" in cli(command, "-h")


def test_version(cli: Any) -> None:
    assert cli("--version").strip() == f"sam_fast {sam_fast.__version__}"


def test_traceback_lets_the_exception_through(tmp_path: Path) -> None:
    flags = ["amg", "--input", str(tmp_path / "x"), "--output", "y", "--model-type", "vit_b", "--checkpoint", "z"]
    assert isinstance(CliRunner().invoke(app, flags).exception, SystemExit)
    assert isinstance(CliRunner().invoke(app, ["--traceback", *flags]).exception, FileNotFoundError)


@pytest.mark.parametrize("name", ["out[best]", "out[/best]", "a:car:b"])
def test_names_are_no_markup(cli: Any, pictures: Path, tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    image = tmp_path / f"{name.replace('/', '')}.png"
    image.write_bytes((pictures / "wide.png").read_bytes())
    output = tmp_path / name
    model = ("--model-type", "tiny", "--checkpoint", tiny_checkpoint, "--device", "cpu")
    text = cli("predict", "--input", image, "--output", output, *model, "--point", "60,70", "--single")
    assert f"{image.stem}_0.png: predicted" in text and f"written to {output}\n" in text
    assert f"written to {output}\n" in cli("amg", "--input", image, "--output", output, *model, "--points-per-side", 1)
    assert f"no image or folder at {output}.gone\n" in cli(
        "amg", "--input", f"{output}.gone", "--output", output, *model, expect=1
    )


def test_names_need_not_be_text(
    pictures: Path, tiny_checkpoint: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / f"{name}.png").write_bytes((pictures / "wide.png").read_bytes())
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    line = ["predict", "--input", f"{tmp_path / name}.png", "--output", str(tmp_path / "out"), "--point", "60,70"]
    line += ["--model-type", "tiny", "--checkpoint", str(tiny_checkpoint), "--device", "cpu", "--single"]
    monkeypatch.setattr(sys, "argv", ["sam-fast", *line])
    with pytest.raises(SystemExit) as ended:
        main()
    sys.stdout.flush()
    assert ended.value.code == 0
    assert written.getvalue().startswith(b"caf\\udce9_0.png: predicted")
