"""The runtime: chunks of prompts, masks filtered by predicted IoU, converted models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sam_fast import SamAutomaticMaskGenerator, SamPredictor
from sam_fast.runtime.inference import InferenceRuntime, Prompts

# Of the embedding, in the Euclidean norm. Half precision through four blocks: the mantissa has 10 bits (7 in bfloat16),
# and each of the residual stream's dozen additions rounds. In float64 what differs is the float32 original.
CONVERTED = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-5}
BOX = np.array([50, 60, 200, 220])


@pytest.fixture
def encoded(tiny, photo):
    predictor = SamPredictor(tiny)
    return predictor.runtime, predictor.set_image(photo)


def point_prompts(count):
    points = 250 * torch.rand(count, 1, 2, generator=torch.Generator().manual_seed(0))
    return Prompts(points, torch.ones(count, 1))


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_prompts_in_chunks_equal_one_by_one(encoded, count):
    runtime, embedding = encoded
    prompts = point_prompts(count)
    low_res, iou = runtime.decode(embedding, prompts)
    assert low_res.shape == (count, 3, 64, 64) and iou.shape == (count, 3)
    for i in range(count):
        one, score = runtime.decode(embedding, Prompts(prompts.points[i : i + 1], prompts.labels[i : i + 1]))
        torch.testing.assert_close(low_res[i], one[0], rtol=0, atol=1e-5 * float(one.abs().max()))
        torch.testing.assert_close(iou[i], score[0], rtol=0, atol=1e-5)


def test_mask_prompts_in_chunks(encoded):
    runtime, embedding = encoded
    masks = 5 * torch.randn(6, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = point_prompts(6)._replace(masks=masks)
    low_res, _ = runtime.decode(embedding, prompts)
    last, _ = runtime.decode(embedding, Prompts(prompts.points[5:], prompts.labels[5:], masks=masks[5:]))
    torch.testing.assert_close(low_res[5:], last, rtol=0, atol=1e-5 * float(last.abs().max()))
    shared, _ = runtime.decode(embedding, prompts._replace(masks=masks[:1]))
    assert shared.shape == low_res.shape and not torch.equal(shared[5], low_res[5])


@pytest.mark.parametrize("threshold", [None, 0.9, 10.0])
@pytest.mark.parametrize("own_decoder", [False, True], ids=["staged", "foreign decoder"])
def test_filtered_equals_all_then_filter(encoded, tiny, threshold, own_decoder):
    runtime, embedding = encoded
    prompts = point_prompts(9)
    low_res, iou = runtime.decode(embedding, prompts)
    if own_decoder:
        model = copy.copy(tiny)
        model._modules = {**tiny._modules, "mask_decoder": Foreign(tiny.mask_decoder)}
        runtime = InferenceRuntime(model)
    keep = torch.ones_like(iou, dtype=torch.bool) if threshold is None else iou > threshold
    assert threshold != 0.9 or 0 < keep.sum() < keep.numel()
    logits, scores, prompt = runtime.decode_filtered(embedding, prompts, threshold)
    assert torch.equal(prompt, keep.nonzero()[:, 0])
    torch.testing.assert_close(scores, iou[keep], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, low_res[keep], rtol=0, atol=1e-5 * float(low_res.abs().max()))


class Foreign(nn.Module):
    """A mask decoder that offers only the official signature."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output):
        return self.decoder(
            image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output
        )


def test_official_model_in_our_predictor(official_tiny, tiny, photo):
    ours, theirs = SamPredictor(tiny), SamPredictor(official_tiny)
    for predictor in (ours, theirs):
        predictor.set_image(photo)
    masks = theirs.predict(box=BOX)[0]
    assert (masks != ours.predict(box=BOX)[0]).sum() <= max(2, 1e-4 * masks.sum())


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
    extra = torch.zeros(2, 1, tiny.prompt_encoder.embed_dim)
    assert converted.predict_torch(None, None, extra_tokens=extra)[0].shape == (2, 3, *photo.shape[:2])


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
