"""The runtime on models that were converted to another number format."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sam_fast import SamAutomaticMaskGenerator, SamPredictor

# Of the embedding, in the Euclidean norm. Half precision through four blocks: the mantissa has 10 bits (7 in bfloat16),
# and each of the residual stream's dozen additions rounds. In float64 what differs is the float32 original.
CONVERTED = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-5}
BOX = np.array([50, 60, 200, 220])


@pytest.mark.parametrize("dtype", CONVERTED, ids=str)
def test_converted_model(tiny, photo, dtype):
    original, converted = SamPredictor(tiny), SamPredictor(copy.deepcopy(tiny).to(dtype))
    for predictor in (original, converted):
        predictor.set_image(photo)
    assert converted.features.dtype == torch.float32
    error = (converted.features - original.features).norm() / original.features.norm()
    assert 0 < error <= CONVERTED[dtype]
    previous = original.predict(box=BOX, multimask_output=False)[2]
    expected = original.predict(np.array([[120, 130]]), np.array([1]), BOX, previous)
    masks, iou, low_res = converted.predict(np.array([[120, 130]]), np.array([1]), BOX, previous)
    assert masks.dtype == bool and iou.dtype == low_res.dtype == np.float32
    assert (masks & expected[0]).sum() / (masks | expected[0]).sum() >= 0.9  # a seeded mask's rim is wide
    extra = torch.zeros(1, 1, tiny.prompt_encoder.embed_dim)
    assert converted.predict_torch(None, None, extra_tokens=extra)[0].shape == (1, 3, *photo.shape[:2])


@pytest.mark.parametrize("dtype", CONVERTED, ids=str)
def test_generator_with_a_converted_model(tiny, photo, dtype):
    settings = {"points_per_side": 4, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.5}
    records = SamAutomaticMaskGenerator(copy.deepcopy(tiny).to(dtype), **settings).generate(photo)
    assert records and all(record["segmentation"].dtype == bool for record in records)


def test_encoder_alone_in_half_precision(tiny, photo):
    mixed = copy.deepcopy(tiny)
    mixed.image_encoder.half()
    predictor = SamPredictor(mixed)
    predictor.set_image(photo)
    assert np.isfinite(predictor.predict(box=BOX)[2]).all()


def test_fp32_by_name_needs_float32_weights(tiny, photo):
    predictor = SamPredictor(copy.deepcopy(tiny).half(), precision="fp32")
    with pytest.raises(RuntimeError, match=r"fp32' needs float32 weights, got torch\.float16"):
        predictor.set_image(photo)


def test_pixels_in_float64(tiny):
    """numpy's floats are doubles, and reach `set_torch_image` as such."""
    predictor = SamPredictor(tiny)
    pixels = torch.randint(0, 256, (1, 3, 256, 200), generator=torch.Generator().manual_seed(0))
    expected = predictor.set_torch_image(pixels.float(), (512, 400)).features
    # The normalisation is done in float64 and rounded once.
    torch.testing.assert_close(
        predictor.set_torch_image(pixels.double(), (512, 400)).features, expected, rtol=0, atol=1e-4
    )


def test_quantised_encoder(tiny, photo):
    model = copy.deepcopy(tiny)
    with pytest.warns(DeprecationWarning):
        model.image_encoder = torch.ao.quantization.quantize_dynamic(model.image_encoder, {nn.Linear})
    predictor = SamPredictor(model)
    embedding = predictor.set_image(photo)
    original = SamPredictor(tiny).set_image(photo)
    error = (embedding.features - original.features).norm() / original.features.norm()
    assert 0 < error < 0.2  # 8-bit weights and activations, one scale per tensor
    assert predictor.predict(box=BOX, embedding=embedding)[0].any()
