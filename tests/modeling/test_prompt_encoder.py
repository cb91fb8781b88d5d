"""The prompt encoder against the official one."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import relative_error

GENERATOR = torch.Generator().manual_seed(0)
POINTS = torch.rand(3, 4, 2, generator=GENERATOR) * 300 - 20  # some outside of the 256 x 256 input
LABELS = torch.tensor([[1, 0, -1, 1], [0, 0, 1, 1], [-1, -1, -1, -1]])
BOXES = torch.rand(3, 4, generator=GENERATOR) * 256
MASKS = torch.randn(3, 1, 64, 64, generator=GENERATOR) * 8

PROMPTS = {
    "points": ((POINTS, LABELS), None, None),
    "float-labels": ((POINTS, LABELS.float()), None, None),
    "float64-points": ((POINTS.double(), LABELS), None, None),
    "unknown-label": ((POINTS, LABELS + 5), None, None),
    "no-points": ((POINTS[:, :0], LABELS[:, :0]), None, None),
    "boxes": (None, BOXES, None),
    "box-pairs": (None, BOXES.view(3, 2, 2), None),
    "masks": (None, None, MASKS),
    "points-boxes": ((POINTS, LABELS), BOXES, None),
    "points-masks": ((POINTS, LABELS), None, MASKS),
    "all": ((POINTS, LABELS), BOXES, MASKS),
    "one-mask-for-all": ((POINTS, LABELS), None, MASKS[:1]),
    "nothing": (None, None, None),
    "zero-prompts": ((POINTS[:0], LABELS[:0]), None, None),
}


@torch.no_grad()
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_embeddings_equal_official(prompts, official_tiny, tiny):
    expected = official_tiny.prompt_encoder(*prompts)
    actual = tiny.prompt_encoder(*prompts)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= 1e-6  # the same operations; sums over channels in another order


@torch.no_grad()
def test_dense_positional_encoding_equals_official(official_tiny, tiny):
    assert relative_error(tiny.prompt_encoder.get_dense_pe(), official_tiny.prompt_encoder.get_dense_pe()) <= 1e-6


def test_encoding_under_the_name_that_exporters_call(official_tiny, tiny):
    """Tools that write ONNX files bring a `SamOnnxModel` of their own, which reaches for this method."""
    positions = POINTS / 256
    expected = official_tiny.prompt_encoder.pe_layer._pe_encoding(positions)
    # phases of up to a hundred, in float32
    torch.testing.assert_close(tiny.prompt_encoder.pe_layer._pe_encoding(positions), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_half_precision_keeps_point_positions(tiny):
    """In bfloat16 coordinates near 250 would be rounded by a pixel, and the encoding would be another."""
    half = copy.deepcopy(tiny.prompt_encoder).bfloat16()
    points = torch.tensor([[[250.0, 33.0]]]), torch.tensor([[-2]])  # a label without an embedding: only the encoding
    exact = tiny.prompt_encoder(points, None, None)[0][:, 0]
    # Rounding the frequencies to bfloat16 alone moves phases by up to 2^-9 of about 10 radians.
    assert (half(points, None, None)[0][:, 0].float() - exact).abs().max() < 0.2
    assert half.get_dense_pe().dtype == torch.bfloat16


def test_float64(tiny):
    double = copy.deepcopy(tiny.prompt_encoder).double()
    prompts = (POINTS.double(), LABELS), BOXES.double(), MASKS.double()
    for exact, single in zip(double(*prompts), tiny.prompt_encoder(*PROMPTS["all"]), strict=True):
        assert exact.dtype == torch.float64
        assert relative_error(single.double(), exact) <= 1e-5


@torch.no_grad()
def test_extra_tokens_come_last(tiny):
    extra = torch.randn(3, 2, 256, generator=torch.Generator().manual_seed(1))
    plain, dense = tiny.prompt_encoder(*PROMPTS["points-boxes"])
    sparse, dense_with_extra = tiny.prompt_encoder(*PROMPTS["points-boxes"], extra_tokens=extra)
    assert torch.equal(sparse, torch.cat([plain, extra], dim=1))
    assert torch.equal(dense_with_extra, dense)
    alone, dense_alone = tiny.prompt_encoder(None, None, None, extra_tokens=extra)
    assert torch.equal(alone, extra)
    assert dense_alone.shape == (3, 256, 16, 16)


def test_gradients_reach_every_embedding(tiny):
    encoder = copy.deepcopy(tiny.prompt_encoder)
    sparse, dense = encoder((POINTS, LABELS), BOXES, None)
    padded, _ = encoder((POINTS, LABELS), None, MASKS)
    (
        sparse.square().sum() + dense.square().sum() + padded.square().sum() + encoder(None, None, MASKS)[1].sum()
    ).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


BAD = {
    "points-2d": (((POINTS[0], LABELS[0]), None, None), "points must be"),
    "labels-short": (((POINTS, LABELS[:, :2]), None, None), r"labels \[N, K\], got \(3, 4, 2\) and \(3, 2\)"),
    "one-box-1d": ((None, BOXES[0], None), r"boxes must be \[N, 4\], got \(4,\)"),
    "boxes-of-3": ((None, BOXES[:, :3], None), r"boxes must be \[N, 4\]"),
    "masks-3d": ((None, None, MASKS[0]), "masks must be"),
    "mask-size": ((None, None, MASKS[..., :60]), r"masks must be .*64, 64\]"),
    "different-N": (((POINTS, LABELS), BOXES[:2], None), "same number N"),
    "extra-width": ((None, None, None, torch.zeros(3, 2, 255)), r"extra_tokens must be \[N, L, 256\]"),
}


@pytest.mark.parametrize("prompts, message", BAD.values(), ids=BAD)
def test_bad_prompts_are_refused(prompts, message, tiny):
    with pytest.raises(ValueError, match=message):
        tiny.prompt_encoder(*prompts)
