"""The weights that training from nothing begins with."""

from __future__ import annotations

import pytest
import torch
from rectangles import tiny_sam

from sam_fast import SamConfig, build_sam_from_config
from sam_fast.training.initialise import initialise_weights, sine_positions


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


def test_prompts_begin_by_reading_the_image_where_they_are():
    torch.manual_seed(0)
    model = build_sam_from_config(
        SamConfig(embed_dim=32, depth=1, num_heads=2, global_attn_indexes=(0,), image_size=256)
    )
    places = torch.tensor([[60.0, 180.0], [128.0, 128.0], [220.0, 40.0]])
    centres = 16 * torch.arange(16) + 8.0
    distances = torch.hypot(centres - places[:, None, None, 0], centres[:, None] - places[:, None, None, 1]).flatten(1)

    def attended_nearby() -> float:
        """Mean weight that a click's token gives to the image within 40 px, in the first attention."""
        image = model.image_encoder(torch.randn(1, 3, 256, 256))
        sparse, dense = model.prompt_encoder(points=(places[:, None], torch.ones(3, 1)), boxes=None, masks=None)
        tokens = model.mask_decoder.prompt_tokens(sparse)
        layer = model.mask_decoder.transformer.layers[0]
        attention = layer.cross_attn_token_to_image
        q = layer.norm1(layer.self_attn(q=tokens, k=tokens, v=tokens)) + tokens
        k = (image + dense[:1] + model.prompt_encoder.get_dense_pe()).flatten(2).transpose(1, 2)
        q, k = attention._heads(attention.q_proj(q)), attention._heads(attention.k_proj(k))
        weights = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)[:, :, 5]  # the click comes after 5 others
        return (weights * (distances < 40)[:, None]).sum(2).mean().item()

    assert attended_nearby() < 0.15
    initialise_weights(model)
    assert attended_nearby() > 0.5
