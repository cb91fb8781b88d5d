"""The image encoder against the official one."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from oracle import TINY, build_official, relative_error, seed_weights
from segment_anything.modeling import image_encoder as official_code

from sam_fast.build_sam import build_sam_from_config
from sam_fast.modeling import image_encoder as code

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
