"""`sam-fast export-onnx`: the flags of the official script, checked by running what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from sam_fast.modeling import Sam
from sam_fast.utils.onnx import SamOnnxModel

INPUTS = {
    "image_embeddings": np.random.default_rng(0).standard_normal((1, 256, 16, 16), np.float32),
    "point_coords": np.array([[[60, 70], [0, 0]]], np.float32),
    "point_labels": np.array([[1, -1]], np.float32),
    "mask_input": np.zeros((1, 1, 64, 64), np.float32),
    "has_mask_input": np.zeros(1, np.float32),
    "orig_im_size": np.array([151, 201], np.float32),
}


@pytest.fixture
def flags(tiny_checkpoint: Path, tmp_path: Path) -> tuple[Any, ...]:
    return (
        "export-onnx",
        "--checkpoint",
        tiny_checkpoint,
        "--model-type",
        "tiny",
        "--output",
        tmp_path / "new" / "sam.onnx",
    )


def outputs(path: Path) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, INPUTS), strict=True))


@pytest.mark.parametrize(
    ("given", "settings", "names"),
    [
        ((), {"return_single_mask": False}, ["masks", "iou_predictions", "low_res_masks"]),
        (
            ("--return-single-mask", "--use-stability-score", "--return-extra-metrics"),
            {"return_single_mask": True, "use_stability_score": True, "return_extra_metrics": True},
            ["masks", "iou_predictions", "stability_scores", "areas", "low_res_masks"],
        ),
    ],
    ids=["plain", "every-flag"],
)
def test_file_computes_what_the_module_computes(
    cli: Any, flags: tuple, tiny: Sam, given: tuple[str, ...], settings: dict[str, bool], names: list[str]
) -> None:
    assert cli(*flags, *given).split() == [str(flags[-1])]
    found = outputs(flags[-1])
    assert list(found) == names
    expected = SamOnnxModel(tiny, **settings)(**{name: torch.from_numpy(value) for name, value in INPUTS.items()})
    for name, value in zip(names, expected, strict=True):
        # Logits are tens; pixels on the threshold may change sides in the two counts.
        tolerance = 20 if name == "areas" else 5e-3
        np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-3, atol=tolerance, err_msg=name)


def test_quantized_and_approximate(cli: Any, flags: tuple, tmp_path: Path) -> None:
    small = tmp_path / "also new" / "small.onnx"
    text = cli(*flags, "--gelu-approximate", "--opset", "18", "--quantize-out", small)
    assert text.splitlines() == [str(flags[-1]), str(small)]
    assert small.stat().st_size < 0.5 * flags[-1].stat().st_size
    assert outputs(small)["masks"].shape == (1, 4, 151, 201)
    assert outputs(flags[-1])["masks"].shape == (1, 4, 151, 201)


def test_old_opset_is_refused(cli: Any, flags: tuple) -> None:
    assert "opset must be 17 or newer, got 11" in cli(*flags, "--opset", "11", expect=1)


def test_both_models_in_one_file_are_refused(cli: Any, flags: tuple) -> None:
    text = cli(*flags, "--quantize-out", flags[-1].parent / ".." / "new" / "sam.onnx", expect=2)
    assert "--quantize-out would replace" in text and not flags[-1].exists()
