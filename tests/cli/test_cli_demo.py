"""`sam-fast demo`: a picture of a packaged photo beside its masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def shown_masks(picture: Path, photo: np.ndarray) -> np.ndarray:
    """Where the right half of the picture differs from the photo, which the left half shows."""
    sheet = np.asarray(Image.open(picture)).astype(int)
    height, width = photo.shape[:2]
    assert sheet.shape[0] == height and sheet.shape[1] > 2 * width
    left, right = sheet[:, :width], sheet[:, -width:]
    assert np.abs(left - photo).mean() < 4  # JPEG
    return np.abs(right - photo).sum(-1) > 60


def test_nano_needs_nothing_but_the_package(cli: Any, tmp_path: Path, photo: np.ndarray) -> None:
    text = cli("demo", "--output", tmp_path, "--device", "cpu")
    assert "by nano on cpu" in text and "random" not in text
    assert int(text.split(" masks of astronaut (512 x 512)")[0].split()[-1]) > 3
    assert 0.1 < shown_masks(tmp_path / "astronaut_masks.jpg", photo).mean() < 1


def test_without_a_checkpoint_it_says_that_the_weights_are_random(cli: Any, tmp_path: Path, photo: np.ndarray) -> None:
    text = cli("demo", "--output", tmp_path / "new", "--model-type", "tiny", "--device", "cpu")
    picture = tmp_path / "new" / "astronaut_masks.jpg"
    assert str(picture) in text
    assert "random" in text and "mean nothing" in text
    assert int(text.split(" masks of astronaut (512 x 512)")[0].split()[-1]) > 3
    assert shown_masks(picture, photo).mean() > 0.02


def test_with_a_checkpoint_and_an_image(cli: Any, tmp_path: Path, pictures: Path, tiny_checkpoint: Path) -> None:
    flags = ("--model-type", "tiny", "--checkpoint", tiny_checkpoint, "--image", pictures / "tall.png")
    text = cli("demo", "--output", tmp_path, *flags, "--device", "cpu")
    assert "random" not in text
    assert "masks of tall (101 x 171)" in text
    shown_masks(tmp_path / "tall_masks.jpg", np.asarray(Image.open(pictures / "tall.png")))


def test_unreadable_image(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no picture")
    flags = ("--model-type", "tiny", "--image", tmp_path / "x.png", "--device", "cpu")
    assert "not a readable image" in cli("demo", "--output", tmp_path, *flags, expect=1)


@pytest.mark.parametrize("model_type", ["vit_x", ""])
def test_unknown_model(cli: Any, tmp_path: Path, model_type: str) -> None:
    assert "--model-type must be one of" in cli("demo", "--output", tmp_path, "--model-type", model_type, expect=1)
