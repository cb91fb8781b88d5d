"""The `sam-fast` command as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import sam_fast
from sam_fast.cli import app

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
