"""`sam-fast train`: fine-tuning on a COCO folder, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from rectangles import TINY, Rectangles, tiny_sam

from sam_fast import build_sam_from_config
from sam_fast.build_sam import model_configs
from sam_fast.checkpoints import save_checkpoint

FLAGS = ("--batch-size", 2, "--prompts", 3, "--clicks", 1, "--warmup", 1, "--workers", 0, "--device", "cpu")


@pytest.fixture
def coco(tmp_path: Path) -> str:
    """Rectangles as a COCO file with the folder of its images."""
    folder = tmp_path / "images"
    folder.mkdir()
    images, annotations = [], []
    for index in range(6):
        sample = Rectangles().load(index)
        Image.fromarray(sample.image).save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": 64, "width": 64})
        for mask in sample.masks:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x0, y0, x1, y1 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            polygon = [int(v) for v in (x0, y0, x1, y0, x1, y1, x0, y1)]
            annotations.append(
                {"id": len(annotations), "image_id": index, "category_id": 1, "segmentation": [polygon], "iscrowd": 0}
            )
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}))
    return f"{path}:{folder}"


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_configs, "small", TINY)


def test_fine_tunes_a_checkpoint_on_a_coco_folder(cli: Any, tmp_path: Path, coco: str) -> None:
    start = tiny_sam()
    save_checkpoint(start, tmp_path / "start.safetensors")
    output = tmp_path / "run"
    flags = ("--model-type", "small", "--checkpoint", tmp_path / "start.safetensors", "--data", coco, *FLAGS)
    text = cli("train", *flags, "--output", output, "--steps", 3, "--freeze-encoder", "--ema", 0, "--log-every", 1)
    assert "3 of 3 steps" in text and "step 3" in text
    tuned = build_sam_from_config(TINY, output / "model.safetensors")
    for name, tensor in start.state_dict().items():
        if name.startswith("image_encoder"):
            assert torch.equal(tuned.state_dict()[name], tensor), "frozen"
    assert not torch.equal(tuned.mask_decoder.mask_tokens.weight, start.mask_decoder.mask_tokens.weight)


def test_goes_on_where_it_stopped(cli: Any, tmp_path: Path, coco: str) -> None:
    flags = ("--model-type", "small", "--data", coco, *FLAGS, "--steps", 2)
    text = cli("train", *flags, "--output", tmp_path / "parts", "--max-minutes", 0)
    assert "1 of 2 steps" in text and "the same command goes on" in text
    assert "2 of 2 steps" in cli("train", *flags, "--output", tmp_path / "parts")
    cli("train", *flags, "--output", tmp_path / "whole")
    first, second = (safetensors.torch.load_file(tmp_path / n / "model.safetensors") for n in ("parts", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    refused = cli("train", *flags, "--output", tmp_path / "parts", "--lr", 0.5, expect=1)
    assert "other settings" in refused and "lr" in refused


def test_other_image_size_and_jitter(cli: Any, tmp_path: Path, coco: str) -> None:
    flags = ("--model-type", "small", "--image-size", 96, "--data", coco, *FLAGS, "--steps", 1, "--jitter", 0.5, 2.0)
    cli("train", *flags, "--output", tmp_path / "run")
    weights = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert weights["image_encoder.pos_embed"].shape == (1, 6, 6, 32)


def test_several_sources(cli: Any, tmp_path: Path, coco: str) -> None:
    flags = ("--model-type", "small", "--data", coco, "--data", "scenes:size=64", *FLAGS, "--steps", 1)
    assert "1 of 1 steps" in cli("train", *flags, "--output", tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--model-type", "vit_x", "--data", "scenes"), 1, "--model-type must be one of"),
        (("--model-type", "small", "--data", "nowhere.json"), 1, "nowhere.json"),
        (("--model-type", "small", "--data", "scenes", "--steps", 0), 1, "steps must be at least 1"),
        (("--model-type", "small", "--data", "scenes", "--checkpoint", "missing.pth"), 1, "missing.pth"),
        (("--model-type", "small", "--data", "scenes", "--device", "cuda:99"), 1, "--device cuda:99: torch"),
        (("--model-type", "small", "--data", "scenes", "--seed", -1), 2, "--seed"),
    ],
)
def test_bad_input(cli: Any, tmp_path: Path, flags: tuple[object, ...], status: int, message: str) -> None:
    assert message in cli("train", "--output", tmp_path, "--device", "cpu", *flags, expect=status)
