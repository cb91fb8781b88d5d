"""`sam-fast convert`: checkpoints as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from oracle import TINY

from sam_fast.build_sam import build_sam_from_config, model_configs
from sam_fast.modeling import Sam


@pytest.fixture(autouse=True)
def tiny_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_configs, "tiny", TINY)


def test_official_names_and_values(cli: Any, tmp_path: Path, tiny_checkpoint: Path, tiny: Sam) -> None:
    target = tmp_path / "new" / "tiny.safetensors"
    assert "MB" in cli("convert", tiny_checkpoint, target, "--model-type", "tiny")
    state = safetensors.torch.load_file(target)
    assert state.keys() == tiny.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny.state_dict().items())


def test_half_is_half_the_size_and_loads_as_float32(cli: Any, tmp_path: Path, tiny_checkpoint: Path, tiny: Sam) -> None:
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    cli("convert", tiny_checkpoint, whole, "--model-type", "tiny")
    cli("convert", tiny_checkpoint, half, "--model-type", "tiny", "--half")
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    loaded = build_sam_from_config(TINY, half)
    for name, tensor in tiny.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-3, atol=1e-6)


def test_another_image_size(cli: Any, tmp_path: Path, tiny_checkpoint: Path) -> None:
    target = tmp_path / "small.safetensors"
    cli("convert", tiny_checkpoint, target, "--model-type", "tiny", "--image-size", 128)
    assert safetensors.torch.load_file(target)["image_encoder.pos_embed"].shape == (1, 8, 8, 128)


def test_a_target_that_cannot_be_written_is_named(cli: Any, tmp_path: Path, tiny_checkpoint: Path) -> None:
    text = cli("convert", tiny_checkpoint, tmp_path, "--model-type", "tiny", expect=1)
    assert f"{tmp_path} could not be written" in text
    assert len(text.splitlines()) == 1


def test_bad_input(cli: Any, tmp_path: Path, tiny_checkpoint: Path) -> None:
    target = tmp_path / "x.safetensors"
    assert "--model-type must be one of" in cli("convert", tiny_checkpoint, target, "--model-type", "vit_x", expect=1)
    assert "does not fit" in cli("convert", tiny_checkpoint, target, "--model-type", "nano", expect=1)
    assert "no checkpoint" in cli("convert", tmp_path / "missing", target, expect=1)
    assert not target.exists()
