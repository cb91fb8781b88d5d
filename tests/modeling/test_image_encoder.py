"""The image encoder against the official one."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from oracle import TINY, build_official, relative_error, seed_weights
from segment_anything.modeling import image_encoder as official_code
from torch import nn

from sam_fast.build_sam import SamConfig, build_sam_from_config
from sam_fast.modeling import image_encoder as code
from sam_fast.training.initialise import initialise_weights

# Same formulas in float32; attention and layer norms sum in another order. The contract with the official code is 1e-4.
TOLERANCE = 1e-5


@torch.no_grad()
def test_embedding_equals_official(official_tiny, tiny, tiny_image):
    image = tiny.preprocess(tiny_image)[None]
    batch = torch.cat([image, image.flip(3), image.roll(40, 2)])
    expected = official_tiny.image_encoder(batch)
    assert expected.std((2, 3)).mean() > 0.3  # the embedding follows the picture
    assert relative_error(tiny.image_encoder(batch), expected) <= TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"window_size": 8},  # windows without padding
        {"window_size": 7},  # 2 of 7 rows real in the last window
        {"window_size": 20},  # one window larger than the image
        {"window_size": 0},  # global blocks only
        {"global_attn_indexes": ()},  # windows only
        {"image_size": 144, "mlp_ratio": 2.0, "num_heads": 4},  # 9 x 9 tokens
        {"patch_size": 8, "image_size": 128, "depth": 2, "global_attn_indexes": (0,)},
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()),
)
@torch.no_grad()
def test_other_configurations_equal_official(changes):
    config = dataclasses.replace(TINY, **changes)
    official = seed_weights(build_official(config), seed=1)
    ours = seed_weights(build_sam_from_config(config), seed=1)
    image = torch.randn(1, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    assert relative_error(ours.image_encoder(image), official.image_encoder(image)) <= TOLERANCE


@torch.no_grad()
def test_float64_agrees_with_float32(official_tiny, tiny, tiny_image):
    image = tiny.preprocess(tiny_image)[None]
    exact = copy.deepcopy(tiny.image_encoder).double()(image.double())
    assert exact.dtype == torch.float64
    assert relative_error(tiny.image_encoder(image).double(), exact) <= TOLERANCE
    official = copy.deepcopy(official_tiny.image_encoder).double()(image.double())
    assert relative_error(exact, official) <= 1e-13  # the same function, up to float64 rounding


@torch.no_grad()
@pytest.mark.parametrize("size", [(256, 384), (160, 96), (512, 512), (16, 16)], ids=str)
def test_other_resolutions_equal_official_with_interpolated_positions(size, official_tiny, tiny):
    """The official encoder adds its positions without resizing them: give it resized ones, the rest it does itself."""
    grid = (size[0] // 16, size[1] // 16)
    positions = official_tiny.image_encoder.pos_embed
    resized = torch.nn.functional.interpolate(positions.permute(0, 3, 1, 2), grid, mode="bicubic").permute(0, 2, 3, 1)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    official_tiny.image_encoder.pos_embed = torch.nn.Parameter(resized)
    try:
        expected = official_tiny.image_encoder(image)
    finally:
        official_tiny.image_encoder.pos_embed = positions
    actual = tiny.image_encoder(image)
    assert actual.shape == (1, 256, *grid)
    assert relative_error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("shape", [(3, 256, 256), (1, 3, 250, 256), (1, 3, 256, 8)], ids=str)
def test_images_that_do_not_fit_the_patches_are_refused(shape, tiny):
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny.image_encoder(torch.zeros(shape))


def test_gradients_equal_official(official_tiny, tiny, tiny_image):
    image = tiny.preprocess(tiny_image)[None]
    direction = torch.randn(1, 256, 16, 16, generator=torch.Generator().manual_seed(0))
    gradients = {}
    for name, model in (("official", official_tiny), ("ours", tiny)):
        parameters = dict(model.image_encoder.named_parameters())
        loss = (model.image_encoder(image) * direction).mean()
        values = torch.autograd.grad(loss, list(parameters.values()))
        gradients[name] = dict(zip(parameters, values, strict=True))
    for name, expected in gradients["official"].items():
        assert expected.abs().max() > 0, name
        # Sums over thousands of products of both signs: rounding shows ten times more than in the output.
        assert relative_error(gradients["ours"][name], expected) <= 1e-4, name


@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (7, 5), (12, 13)], ids=str)
def test_windows_come_back(shape):
    x = torch.randn(2, *shape, 3)
    windows, padded = code.window_partition(x, 6)
    expected, expected_padded = official_code.window_partition(x, 6)
    assert padded == expected_padded
    assert torch.equal(windows, expected)
    assert torch.equal(code.window_unpartition(windows, 6, padded, shape), x)


@pytest.mark.parametrize(
    "q_size, k_size, length", [(5, 5, 9), (5, 5, 27), (16, 16, 9), (4, 8, 15), (8, 4, 15), (1, 1, 3)]
)
def test_relative_positions_equal_official(q_size, k_size, length):
    table = torch.randn(length, 8)
    expected = official_code.get_rel_pos(q_size, k_size, table)
    assert torch.equal(code.get_rel_pos(q_size, k_size, table), expected)


@pytest.mark.parametrize("q_size, k_size", [((3, 5), (3, 5)), ((4, 2), (2, 6)), ((1, 1), (7, 3))], ids=str)
def test_decomposed_relative_positions_equal_official(q_size, k_size):
    rows, columns = torch.randn(9, 8), torch.randn(11, 8)
    attn = torch.randn(2, q_size[0] * q_size[1], k_size[0] * k_size[1])
    q = torch.randn(2, q_size[0] * q_size[1], 8)
    arguments = (attn, q, rows, columns, q_size, k_size)
    before = attn.clone()
    torch.testing.assert_close(
        code.add_decomposed_rel_pos(*arguments), official_code.add_decomposed_rel_pos(*arguments)
    )
    assert torch.equal(attn, before)


def test_convolutional_stem():
    torch.manual_seed(0)
    stem = code.ConvStem(16, 3, (8, 12, 16), 24)
    image = torch.randn(2, 3, 64, 112)
    tokens, fine = stem.with_details(image)
    assert tokens.shape == (2, 4, 7, 24) and fine.shape == (2, 12, 16, 28)
    assert torch.equal(stem(image), tokens)
    kinds = [(layer.out_channels, layer.stride[0]) for layer in stem.layers if isinstance(layer, nn.Conv2d)]
    assert kinds == [(8, 2), (12, 2), (12, 1), (16, 2), (16, 1)] and stem.proj.stride == (2, 2)
    # Convolutions move with the image, up to what the borders let in.
    moved = stem(torch.roll(image, 16, dims=3))
    torch.testing.assert_close(moved[:, :, 3:6], tokens[:, :, 2:5])
    with pytest.raises(ValueError, match="5 halvings do not fit into patches of 16"):
        code.ConvStem(16, 3, (8,) * 5, 24)


def test_folded_pixels_are_unfolded_by_the_upscaling_that_training_begins_with():
    """A quarter-resolution pixel reaches the decoder's upscaled pixel at its own place, and hardly any other."""
    torch.manual_seed(0)
    config = SamConfig(
        embed_dim=32, depth=1, num_heads=2, global_attn_indexes=(0,), image_size=64, stem_channels=(8, 16)
    )
    sam = build_sam_from_config(config)
    initialise_weights(sam)
    neck, fine, tokens = sam.image_encoder.neck, torch.randn(1, 16, 16, 16), torch.randn(1, 32, 4, 4)
    changed = fine.clone()
    changed[0, :, 9, 6] *= -3
    before, after = (sam.mask_decoder.upscale(neck(tokens, pixels)) for pixels in (fine, changed))
    difference = (after - before).abs().sum(1)[0]
    near, token = difference[8:11, 5:8], difference[8:12, 4:8]  # the neck convolves 3 x 3 pixels
    assert difference.sum().item() == pytest.approx(token.sum().item()), "no other token"
    assert near.mean() > 2 * (token.sum() - near.sum()) / 7, "the normalisation spreads it a little"
    with pytest.raises(ValueError, match="folding needs patches of 16 pixels, a second stage"):
        code.FoldingNeck((8,), 16, 32, 256)
    with pytest.raises(ValueError, match="got 8, "):
        code.FoldingNeck((8, 16), 8, 32, 256)


def test_gradients_reach_every_weight_of_an_encoder_with_a_stem():
    encoder = code.ImageEncoderViT(
        img_size=32, embed_dim=16, depth=1, num_heads=2, out_chans=32, use_rel_pos=True, stem_channels=(4, 8)
    )
    embedding = encoder(torch.randn(1, 3, 32, 48))
    assert embedding.shape == (1, 32, 2, 3)
    (embedding * torch.randn_like(embedding)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
