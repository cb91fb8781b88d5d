"""The command line on a tiny model: it stands in the registry as `tiny`, and its weights in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import TINY
from PIL import Image
from typer.testing import CliRunner

from sam_fast.build_sam import build_sam_from_config, sam_model_registry
from sam_fast.cli import app
from sam_fast.modeling import Sam


class Cli:
    """`sam-fast` as a function."""

    def __call__(self, *arguments: Any, expect: int = 0) -> str:
        """Run a command and return its standard output and standard error; check the exit code."""
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
        assert result.exit_code == expect, (result.output, result.stderr, result.exception)
        return result.output


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setitem(sam_model_registry, "tiny", lambda checkpoint=None: build_sam_from_config(TINY, checkpoint))
    return Cli()


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny: Sam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(tiny.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def pictures(photo: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two lossless pictures of odd sizes, wide.png and tall.png."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.fromarray(photo[:301:2, :401:2]).save(folder / "wide.png")
    Image.fromarray(photo[::3, 100:401:3]).save(folder / "tall.png")
    return folder
