"""The two-way transformer against the official one."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import relative_error

TOLERANCE = 1e-5  # float32, sums in another order (contract: 1e-4)


def _inputs(prompts: int, tokens: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(prompts + 10 * tokens)
    image = torch.randn(prompts, 256, height, width, generator=generator)
    positions = torch.randn(1, 256, height, width, generator=generator)
    return image, positions, torch.randn(prompts, tokens, 256, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize(
    "prompts, tokens, height, width", [(1, 5, 16, 16), (3, 7, 16, 16), (2, 1, 7, 5), (4, 21, 1, 1)]
)
def test_equals_official(prompts, tokens, height, width, official_tiny, tiny):
    image, positions, point_tokens = _inputs(prompts, tokens, height, width)
    expected = official_tiny.mask_decoder.transformer(image, positions.expand_as(image), point_tokens)
    actual = tiny.mask_decoder.transformer(image, positions, point_tokens)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= TOLERANCE


@torch.no_grad()
def test_one_image_serves_all_prompts(tiny):
    image, positions, tokens = _inputs(3, 7, 16, 16)
    shared = tiny.mask_decoder.transformer(image[:1], positions, tokens)
    copied = tiny.mask_decoder.transformer(image[:1].repeat(3, 1, 1, 1), positions, tokens)
    for ours, theirs in zip(shared, copied, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= TOLERANCE


@torch.no_grad()
def test_zero_prompts(tiny):
    image, positions, tokens = _inputs(1, 7, 16, 16)
    queries, keys = tiny.mask_decoder.transformer(image, positions, tokens[:0])
    assert queries.shape == (0, 7, 256)
    assert keys.shape[0] == 0


def test_gradients_equal_official_in_float64(official_tiny, tiny):
    inputs = [tensor.double() for tensor in _inputs(2, 7, 6, 5)]
    gradients = []
    for model in (official_tiny, tiny):
        transformer = copy.deepcopy(model.mask_decoder.transformer).double()
        image = inputs[0].clone().requires_grad_()
        positions = inputs[1].expand_as(image)
        queries, keys = transformer(image, positions, inputs[2])
        (queries.sin().sum() + keys.cos().sum()).backward()
        gradients.append({"image": image.grad} | {name: p.grad for name, p in transformer.named_parameters()})
    for name, expected in gradients[0].items():
        if name.endswith("k_proj.bias"):  # the same for every key: its true gradient is zero, what is left is rounding
            assert gradients[1][name].abs().max() < 1e-9
        else:
            assert relative_error(gradients[1][name], expected) <= 1e-9, name
