"""`sam-fast pretrain` on a tiny model and a folder of pictures."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import TINY

from sam_fast.build_sam import model_configs
from sam_fast.cli.training_run import build_model
from sam_fast.training.mae import is_mae_checkpoint


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> tuple[Any, ...]:
    monkeypatch.setitem(model_configs, "tiny", dataclasses.replace(TINY, embed_dim=64))
    sizes = ("--model-type", "tiny", "--image-size", 64, "--batch-size", 2, "--workers", 0)
    return ("--data", pictures, *sizes, "--device", "cpu", "--log-every", 1, "--picture-every", 2)


def test_three_steps_and_a_sam_that_starts_from_them(cli: Any, flags: tuple[Any, ...], tmp_path: Path) -> None:
    text = cli("pretrain", *flags, "--steps", 3, "--output", tmp_path)
    assert re.search(rf"3 of 3 steps, [0-9.]+ minutes; {re.escape(str(tmp_path / 'mae.safetensors'))}", text)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(0.5 < float(row["loss"]) < 3 for row in rows)
    assert float(rows[0]["learning_rate"]) == pytest.approx(1.5e-4 * 2 / 256, rel=0.3)
    assert (tmp_path / "pictures" / "step-0000002.jpg").exists()
    assert is_mae_checkpoint(tmp_path / "mae.safetensors")
    sam = build_model("tiny", 128, tmp_path / "mae.safetensors", seed=5)
    assert sam.image_encoder.pos_embed.shape == (1, 8, 8, 64)
    trained = torch.load(tmp_path / "last.pt", weights_only=True)["model"]["encoder.blocks.2.mlp.lin1.weight"]
    assert torch.equal(sam.image_encoder.get_parameter("blocks.2.mlp.lin1.weight"), trained)


def test_time_is_up_and_the_same_command_goes_on(cli: Any, flags: tuple[Any, ...], tmp_path: Path) -> None:
    arguments = ("pretrain", *flags, "--steps", 2, "--output", tmp_path)
    assert "1 of 2 steps" in cli(*arguments, "--max-minutes", 0)
    assert "2 of 2 steps" in cli(*arguments)
    assert "mask_ratio 0.75 there, 0.6 now" in cli(*arguments, "--mask-ratio", 0.6, expect=1)


def test_the_warmup_of_a_run_by_the_clock_is_short(cli: Any, flags: tuple[Any, ...], tmp_path: Path) -> None:
    cli("pretrain", *flags, "--minutes", 9, "--max-minutes", 0, "--lr", 1, "--output", tmp_path)
    (row,) = csv.DictReader((tmp_path / "metrics.csv").open())
    assert float(row["learning_rate"]) == pytest.approx(1 / 250)


def test_errors_name_what_is_wrong(cli: Any, flags: tuple[Any, ...], tmp_path: Path) -> None:
    text = cli("pretrain", *flags, "--device", "cuda:99", "--output", tmp_path, expect=1)
    assert "--device cuda:99: torch" in text
    text = cli("pretrain", *flags, "--model-type", "vit_x", "--output", tmp_path, expect=1)
    assert "--model-type must be one of" in text
    (tmp_path / "empty").mkdir()
    text = cli("pretrain", *flags, "--data", tmp_path / "empty", "--output", tmp_path, expect=1)
    assert "no images in" in text
