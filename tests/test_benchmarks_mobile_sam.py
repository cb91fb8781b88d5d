"""The benchmark of trained weights: what it counts, and its way with a model of a few pixels."""

from __future__ import annotations

import copy
import importlib.util
import sys

import numpy as np
import pytest
import torch
from oracle import TINY, build_official

from benchmarks import mobile_sam
from benchmarks.mobile_sam import alone, build_models, differences, measure
from benchmarks.peers import OFFICIAL
from benchmarks.timing import WrongResult

CASES = ["clicks", "automatic masks"]


@pytest.fixture
def models(tiny):
    theirs = build_official(TINY)
    theirs.load_state_dict(tiny.state_dict())
    return theirs, copy.deepcopy(tiny)


@torch.no_grad()
def test_rows_of_a_photo(models, photo, monkeypatch):
    monkeypatch.setattr(mobile_sam, "IOU_FILTER", -10.0)  # arbitrary masks, of any predicted IoU
    table = measure(*models, "photo", photo, CASES, 4, 2)
    height, width = photo.shape[:2]
    assert {row.shape for row in table} == {f"photo, {height}x{width}, {side}x{side} points" for side in (2, 4)}
    found = {(row.case, row.peer): row for row in table}
    assert len(found) == len(table) == 4 + 4 + 3
    for case in ("clicks", "clicks, -10.0", "automatic masks"):
        first, ours, narrow = (found[case, peer] for peer in (OFFICIAL, "sam_fast", "sam_fast bf16"))
        assert first.error is None and first.speedup == 1.0
        assert 0 <= ours.error <= 1e-4 and 0 <= narrow.error < 0.5
        assert ours.repetitions == (1 if case == "automatic masks" else 2)
    assert found["clicks", f"{OFFICIAL} bf16"].error > 0
    assert found["clicks", "sam_fast bf16"].error == found["clicks, -10.0", "sam_fast bf16"].error


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_other_masks_are_refused(case, models, photo):
    theirs, ours = models
    ours.mask_decoder.output_upscaling[0].weight.mul_(0.5)
    ours.mask_decoder.iou_prediction_head.layers[2].bias.add_(5)  # so that there are records
    with pytest.raises(WrongResult, match=r"IoU|records"):
        measure(theirs, ours, "photo", photo, [case], 4, 1)


def test_differences():
    masks = torch.zeros(3, 4, 5, dtype=torch.bool)
    masks[0, :2], masks[1, :, 0] = True, True
    expected = torch.zeros_like(masks)
    expected[0, :3], expected[1, :, 1] = True, True
    assert differences(masks, expected).tolist() == pytest.approx([1 / 3, 1.0, 0.0])


def test_alone():
    masks = np.zeros((3, 10, 20), dtype=bool)
    masks[0, :, :10], masks[1, :, :9], masks[1, :5, 9], masks[2, :, 10:] = True, True, True, True
    records = [{"segmentation": mask} for mask in masks]
    assert [alone(records[:1], some) for some in (records[1:2], records[2:], records, [])] == [0, 1, 0, 1]
    assert alone([], records) == 0


def test_an_encoder_without_timm(tmp_path):
    """What a file takes from it, twice, and nothing is left behind."""
    if importlib.util.find_spec("timm") is not None:
        pytest.skip("timm is here, and no stand-in is needed")
    path = tmp_path / "encoder.py"
    path.write_text(
        "from timm.models.layers import DropPath, to_2tuple, trunc_normal_\n"
        "from timm.models.registry import register_model\n"
        "@register_model\n"
        "def size(side):\n"
        "    return to_2tuple(side)\n"
    )
    for _ in range(2):
        assert mobile_sam._module(path).size(3) == (3, 3)
        assert not [name for name in sys.modules if name.partition(".")[0] == "timm"]


def test_another_checkpoint_is_refused(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "mobile_sam.pt").write_bytes(b"something else")
    with pytest.raises(WrongResult, match="not the published file"):
        build_models(tmp_path)
