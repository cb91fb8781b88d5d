"""The mask decoder against the official one."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import relative_error

TOLERANCE = 1e-5  # float32, sums in another order (contract: 1e-4)
GENERATOR = torch.Generator().manual_seed(0)
POINTS = torch.rand(6, 2, 2, generator=GENERATOR) * 256
LABELS = torch.tensor([[1, 0]]).repeat(6, 1)
BOXES = torch.rand(6, 4, generator=GENERATOR) * 256
MASKS = torch.randn(6, 1, 64, 64, generator=GENERATOR) * 8

PROMPTS = {
    "points": ((POINTS, LABELS), None, None),
    "boxes": (None, BOXES, None),
    "points-boxes-masks": ((POINTS, LABELS), BOXES, MASKS),
    "nothing": (None, None, None),
    "many-points": ((torch.rand(2, 40, 2, generator=GENERATOR) * 256, torch.ones(2, 40)), None, None),
    "one-mask-for-all": ((POINTS, LABELS), None, MASKS[:1]),
}


@pytest.fixture(scope="module")
def embedding(official_tiny, tiny_image) -> torch.Tensor:
    with torch.no_grad():
        return official_tiny.image_encoder(official_tiny.preprocess(tiny_image)[None])


def _arguments(model, embedding, prompts):
    sparse, dense = model.prompt_encoder(*prompts)
    return embedding, model.prompt_encoder.get_dense_pe(), sparse, dense


@torch.no_grad()
@pytest.mark.parametrize("multimask_output", [True, False], ids=["multimask", "single"])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_masks_equal_official(prompts, multimask_output, official_tiny, tiny, embedding):
    arguments = _arguments(official_tiny, embedding, prompts)
    expected_masks, expected_iou = official_tiny.mask_decoder(*arguments, multimask_output)
    masks, iou = tiny.mask_decoder(*arguments, multimask_output)
    assert masks.shape == expected_masks.shape
    assert iou.shape == expected_iou.shape
    assert relative_error(masks, expected_masks) <= TOLERANCE
    assert relative_error(iou, expected_iou) <= TOLERANCE


@torch.no_grad()
def test_seeded_masks_are_worth_comparing(tiny, embedding):
    masks, iou = tiny.mask_decoder(*_arguments(tiny, embedding, PROMPTS["points"]), True)
    cover = (masks > 0).float().mean((2, 3))
    assert ((cover > 0.01) & (cover < 0.99)).sum() >= 4
    assert iou.std() > 0.01
    assert len(torch.unique((masks > 0).flatten(0, 1).flatten(1), dim=0)) > 6  # prompts matter


@torch.no_grad()
def test_predict_masks_returns_single_and_multimask(official_tiny, tiny, embedding):
    arguments = _arguments(official_tiny, embedding, PROMPTS["points"])
    masks, iou = tiny.mask_decoder.predict_masks(*arguments)
    expected_masks, expected_iou = official_tiny.mask_decoder.predict_masks(*arguments)
    assert relative_error(masks, expected_masks) <= TOLERANCE
    assert relative_error(iou, expected_iou) <= TOLERANCE


@torch.no_grad()
def test_one_embedding_per_prompt(tiny, embedding):
    """A training batch: prompt i belongs to image i."""
    images = torch.cat([embedding, embedding.flip(3)])
    sparse, dense = tiny.prompt_encoder((POINTS[:2], LABELS[:2]), None, None)
    pe = tiny.prompt_encoder.get_dense_pe()
    masks, iou = tiny.mask_decoder(images, pe, sparse, dense, True)
    for index in range(2):
        part = slice(index, index + 1)
        alone = tiny.mask_decoder(images[part], pe, sparse[part], dense[part], True)
        assert relative_error(masks[part], alone[0]) <= TOLERANCE
        assert relative_error(iou[part], alone[1]) <= TOLERANCE


@torch.no_grad()
def test_zero_prompts(tiny, embedding):
    masks, iou = tiny.mask_decoder(*_arguments(tiny, embedding, ((POINTS[:0], LABELS[:0]), None, None)), True)
    assert masks.shape == (0, 3, 64, 64)
    assert iou.shape == (0, 3)


@torch.no_grad()
def test_extra_tokens_act_as_prompts(tiny, embedding):
    image, pe, sparse, dense = _arguments(tiny, embedding, PROMPTS["points"])
    extra = torch.randn(6, 2, 256, generator=torch.Generator().manual_seed(1))
    masks, iou = tiny.mask_decoder(image, pe, sparse, dense, True, extra_tokens=extra)
    expected = tiny.mask_decoder(image, pe, torch.cat([sparse, extra], dim=1), dense, True)
    assert torch.equal(masks, expected[0]) and torch.equal(iou, expected[1])
    assert not torch.allclose(masks, tiny.mask_decoder(image, pe, sparse, dense, True)[0])


def test_float64_and_gradients(official_tiny, tiny, embedding):
    gradients = []
    for model in (official_tiny, tiny):
        model = copy.deepcopy(model).double()
        image = embedding.double().requires_grad_()
        # The official prompt encoder has float32 inside; its float64 embeddings serve both decoders.
        sparse, dense = copy.deepcopy(tiny.prompt_encoder).double()((POINTS.double(), LABELS), None, None)
        pe = copy.deepcopy(tiny.prompt_encoder).double().get_dense_pe()
        masks, iou = model.mask_decoder(image, pe, sparse, dense, True)
        (masks.tanh().sum() + iou.sum()).backward()
        named = {name: p.grad for name, p in model.mask_decoder.named_parameters() if p.grad is not None}
        gradients.append({"masks": masks.detach(), "image": image.grad} | named)
    assert gradients[1]["masks"].dtype == torch.float64
    for name, expected in gradients[0].items():
        if name.endswith("k_proj.bias"):  # its true gradient is zero, what is left is rounding
            assert gradients[1][name].abs().max() < 1e-6
        elif expected.abs().max() == 0:  # the head of the mask that was not asked for
            assert name.startswith("output_hypernetworks_mlps.0.")
        else:
            assert relative_error(gradients[1][name], expected) <= 1e-8, name
