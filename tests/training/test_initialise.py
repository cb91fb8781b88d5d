"""The weights that training from nothing begins with."""

from __future__ import annotations

import pytest
import torch
from rectangles import tiny_sam

from sam_fast.training.initialise import sine_positions


def test_positions_are_unique_and_near_ones_are_alike():
    positions = sine_positions(6, 5, 64)
    assert positions.shape == (6, 5, 64) and positions.abs().max() <= 1
    flat = positions.flatten(0, 1)
    distances = torch.cdist(flat, flat)
    assert distances[~torch.eye(30, dtype=torch.bool)].min() > 0.1
    assert distances[0, 1] < distances[0, 4] and distances[0, 5] < distances[0, 25]
    # "Attention Is All You Need", 3.5: sin(pos / 10000^(2i/d)), here with d = 32 channels for each axis
    assert positions[3, 2, 1] == pytest.approx(torch.sin(torch.tensor(2 / 10000 ** (1 / 16))).item())
    assert positions[3, 2, 32 + 1] == pytest.approx(torch.sin(torch.tensor(3 / 10000 ** (1 / 16))).item())
    assert positions[3, 2, 32 + 16] == pytest.approx(torch.cos(torch.tensor(3.0)).item())


def test_a_mask_prompt_begins_as_no_mask():
    encoder = tiny_sam().prompt_encoder
    mask = 20 * torch.randn(2, 1, 16, 16)
    with_mask = encoder(points=None, boxes=None, masks=mask)[1]
    without = encoder(points=None, boxes=None, masks=None)[1]
    torch.testing.assert_close(with_mask, without.expand_as(with_mask))


def test_matrices_are_xavier():
    model = tiny_sam()
    weight = model.image_encoder.blocks[0].mlp.lin1.weight
    limit = (6 / sum(weight.shape)) ** 0.5
    assert limit * 0.95 < weight.abs().max() <= limit
    assert not model.image_encoder.blocks[0].mlp.lin1.bias.any()
    assert not model.image_encoder.blocks[0].attn.rel_pos_h.any()
