"""Masked autoencoding: the loss against a float64 transcription, what learns, and what becomes of the weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from oracle import TINY, relative_error
from torch import Tensor, nn

from sam_fast.build_sam import build_sam_from_config
from sam_fast.modeling import Sam
from sam_fast.modeling.seeded import seed_weights
from sam_fast.training.initialise import initialise_weights
from sam_fast.training.mae import (
    MaskedAutoencoder,
    initialise_from_mae,
    is_mae_checkpoint,
    run_globally,
    save_mae_checkpoint,
)

SMALL = dataclasses.replace(TINY, image_size=64, embed_dim=32, depth=3, global_attn_indexes=(1,))  # 4 x 4 tokens


def build(mask_ratio: float = 0.75, normalise: bool = True, stem: tuple[int, ...] = ()) -> MaskedAutoencoder:
    torch.manual_seed(0)
    sam = seed_weights(build_sam_from_config(dataclasses.replace(SMALL, stem_channels=stem)))
    return MaskedAutoencoder(sam.image_encoder, 24, 2, 3, mask_ratio, normalise)


def images(count: int, side: int = 64) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The transcription: numpy, float64, one image, one head, one token at a time.


def as_arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


def layer_norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def transformer_block(x: np.ndarray, weights: dict[str, np.ndarray], name: str, heads: int) -> np.ndarray:
    """A ViT block over tokens [N, C]: Dosovitskiy et al., 2021, equations 2 and 3."""
    C = x.shape[1]
    d = C // heads
    qkv = linear(layer_norm(x, weights, f"{name}.norm1"), weights, f"{name}.attn.qkv")
    mixed = np.zeros_like(x)
    for head in range(heads):
        q, k, v = (qkv[:, part * C + head * d : part * C + (head + 1) * d] for part in range(3))
        for token in range(len(x)):
            scores = np.exp(k @ q[token] / math.sqrt(d))
            mixed[token, head * d : (head + 1) * d] = (scores / scores.sum()) @ v
    x = x + linear(mixed, weights, f"{name}.attn.proj")
    hidden = linear(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.lin1")
    gelu = np.vectorize(lambda value: value * 0.5 * (1 + math.erf(value / math.sqrt(2))))
    return x + linear(gelu(hidden), weights, f"{name}.mlp.lin2")


def patch_of(image: np.ndarray, index: int, patch: int, grid: int) -> np.ndarray:
    """Pixels [patch, patch, 3] of patch `index`, counted by rows."""
    y, x = index // grid * patch, index % grid * patch
    return image[:, y : y + patch, x : x + patch].transpose(1, 2, 0)


def position(index: int, grid: int, channels: int) -> np.ndarray:
    y, x = divmod(index, grid)
    waves = [10000.0 ** (-i / (channels / 4)) for i in range(channels // 4)]
    return np.array([f(place * wave) for place in (x, y) for f in (math.sin, math.cos) for wave in waves])


def transcribed_loss(model: MaskedAutoencoder, image: np.ndarray, masked: np.ndarray, normalise: bool) -> float:
    """Sum of the mean squared errors of one image's masked patches."""
    weights = as_arrays(model)
    patch, grid, heads = SMALL.patch_size, SMALL.image_size // SMALL.patch_size, SMALL.num_heads
    kernel = weights["encoder.patch_embed.proj.weight"]  # [C, 3, patch, patch]
    tokens = []
    visible = [index for index in range(grid * grid) if not masked[index]]
    for index in visible:
        pixels = patch_of(image, index, patch, grid)
        token = [(pixels.transpose(2, 0, 1) * kernel[channel]).sum() for channel in range(len(kernel))]
        place = weights["encoder.pos_embed"][0, index // grid, index % grid]
        tokens.append(np.array(token) + weights["encoder.patch_embed.proj.bias"] + place)
    x = np.stack(tokens)
    for block in range(SMALL.depth):
        x = transformer_block(x, weights, f"encoder.blocks.{block}", heads)
    encoded = linear(layer_norm(x, weights, "norm"), weights, "decoder.embed")
    x = np.stack(
        [
            (weights["decoder.mask_token"][0, 0] if masked[index] else encoded[visible.index(index)])
            + position(index, grid, encoded.shape[1])
            for index in range(grid * grid)
        ]
    )
    for block in range(len(model.decoder.blocks)):
        x = transformer_block(x, weights, f"decoder.blocks.{block}", 3)
    prediction = linear(layer_norm(x, weights, "decoder.norm"), weights, "decoder.predict")
    total = 0.0
    for index in np.flatnonzero(masked):
        target = patch_of(image, index, patch, grid).reshape(-1)
        if normalise:
            target = (target - target.mean()) / math.sqrt(target.var(ddof=1) + 1e-6)
        total += ((prediction[index] - target) ** 2).mean()
    return total


@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "pixels"])
def test_loss_equals_a_literal_transcription(normalise: bool) -> None:
    model = build(normalise=normalise)
    for parameter in (model.norm, model.decoder.norm):
        nn.init.normal_(parameter.weight, 1, 0.3)
    batch = images(2) * 0.5 + 0.2
    loss, _, masked = model(batch, generator(3))
    total = sum(
        transcribed_loss(model, image.double().numpy(), mask.numpy(), normalise)
        for image, mask in zip(batch, masked, strict=True)
    )
    assert loss.item() == pytest.approx(total / masked.sum().item(), rel=1e-5)  # float32 against float64


def test_three_quarters_are_masked_in_each_image_at_other_places() -> None:
    masked = build()(images(40), generator()).masked
    assert masked.sum(1).tolist() == [12] * 40
    assert len(masked.unique(dim=0)) >= 38  # of 1820 masks; two of 40 are now and then the same


@pytest.mark.parametrize("ratio, count", [(0.5, 8), (0.6, 10), (0.01, 1), (0.99, 15)])
def test_other_ratios_leave_something_to_see_and_to_predict(ratio: float, count: int) -> None:
    assert build(mask_ratio=ratio)(images(2), generator()).masked.sum(1).tolist() == [count, count]


def test_every_patch_is_masked_equally_often() -> None:
    visible = build().draw_visible(4000, generator())
    shares = torch.bincount(visible.flatten(), minlength=16) / 4000
    assert (shares - 0.25).abs().max() < 0.035  # five standard deviations of a binomial share


def test_one_seed_gives_one_mask_and_one_loss() -> None:
    model, batch = build(), images(2)
    first, again, other = (model(batch, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.masked, again.masked) and torch.equal(first.loss, again.loss)
    assert not torch.equal(first.masked, other.masked)


@pytest.mark.parametrize("stem", [(), (4, 8)])
def test_the_encoder_sees_visible_patches_only_and_the_loss_masked_ones_only(stem: tuple[int, ...]) -> None:
    model, batch = build(normalise=False, stem=stem), images(1)
    before = model(batch, generator())
    masked = before.masked[..., None]
    noise = torch.randn(1, 16, 768, generator=generator(9))
    changed = model.unpatchify(torch.where(masked, noise, model.patchify(batch)))
    after = model(changed, generator())
    assert torch.equal(after.patches, before.patches) and not torch.equal(after.loss, before.loss)
    expected = (after.patches - noise).square()[before.masked].mean()
    torch.testing.assert_close(after.loss, expected)


@pytest.mark.parametrize("stem", [(), (4, 8)])
def test_gradients_reach_what_is_trained_and_nothing_else(stem: tuple[int, ...]) -> None:
    model = build(stem=stem)
    model(images(2), generator()).loss.backward()
    for name, parameter in model.named_parameters():
        if ".rel_pos_" in name or ".neck." in name:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_run_globally_equals_a_block_without_windows_and_relative_positions() -> None:
    block = build().encoder.blocks[1]  # global
    for table in (block.attn.rel_pos_h, block.attn.rel_pos_w):
        nn.init.zeros_(table)
    tokens = torch.randn(2, 4, 4, 32, generator=generator())
    assert relative_error(run_globally(block, tokens.flatten(1, 2)), block(tokens).flatten(1, 2)) <= 1e-6


def test_patches_come_back_and_pictures_keep_what_was_seen() -> None:
    model, batch = build(), images(2)
    assert torch.equal(model.unpatchify(model.patchify(batch)), batch)
    result = model(batch, generator())
    exact = result._replace(patches=model.target(batch))
    masked_picture, restored = model.paint(batch, exact)
    torch.testing.assert_close(restored, batch)  # a perfect prediction paints the image itself
    hidden = result.masked.view(2, 4, 1, 4, 1).expand(2, 4, 16, 4, 16).reshape(2, 1, 64, 64)
    assert torch.equal(masked_picture, batch * ~hidden)
    assert torch.equal(model.paint(batch, result)[1] * ~hidden, masked_picture)


def test_a_few_steps_overfit_one_image() -> None:
    torch.manual_seed(0)
    sam = build_sam_from_config(SMALL)
    initialise_weights(sam)
    model = MaskedAutoencoder(sam.image_encoder, 24, 2, 3)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = torch.stack([(x / 9).sin(), (y / 7).cos(), ((x + y) / 11).sin()])[None]
    parameters = [parameter for name, parameter in model.named_parameters() if ".neck." not in name]
    optimiser = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for step in range(150):
        loss = model(image.expand(8, -1, -1, -1), generator(step)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert 0.7 < losses[0] < 3  # the target's variance is 1
    assert np.mean(losses[-10:]) < losses[0] / 3


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5])
def test_ratios_outside_0_1_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="mask_ratio"):
        build(mask_ratio=ratio)


@pytest.mark.parametrize("shape", [(1, 3, 32, 64), (1, 3, 128, 128), (3, 64, 64)], ids=str)
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \[B, C, 64, 64\]"):
        build()(torch.zeros(shape))


# What becomes of the weights.


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[MaskedAutoencoder, Path]:
    model = build()
    save_mae_checkpoint(model.encoder.state_dict(), tmp_path / "mae.safetensors")
    return model, tmp_path / "mae.safetensors"


def loaded(path: Path, image_size: int = 64, **changes: int) -> tuple[Sam, dict[str, Tensor]]:
    """A differently seeded Sam after `initialise_from_mae`, and its weights before."""
    sam = seed_weights(build_sam_from_config(dataclasses.replace(SMALL, image_size=image_size, **changes)), seed=7)
    before = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    initialise_from_mae(sam, path)
    return sam, before


def test_a_sam_starts_with_the_pretrained_weights(checkpoint: tuple[MaskedAutoencoder, Path]) -> None:
    model, path = checkpoint
    sam, before = loaded(path)
    pretrained = model.encoder.state_dict()
    for name, tensor in sam.state_dict().items():
        inner = name.removeprefix("image_encoder.")
        if inner == name or inner.startswith("neck."):
            assert torch.equal(tensor, before[name]), name
        elif "rel_pos" in name:
            assert not tensor.any(), name
        else:
            assert torch.equal(tensor, pretrained[inner]), name
            assert not torch.equal(tensor, before[name]), name


def test_positions_are_interpolated_to_another_image_size(checkpoint: tuple[MaskedAutoencoder, Path]) -> None:
    model, path = checkpoint
    positions = loaded(path, image_size=128)[0].image_encoder.pos_embed
    expected = nn.functional.interpolate(model.encoder.pos_embed.permute(0, 3, 1, 2), (8, 8), mode="bicubic")
    assert torch.equal(positions, expected.permute(0, 2, 3, 1))


def official_layout(grid: int = 4, patch: int = 16, C: int = 32, depth: int = 3) -> dict[str, Tensor]:
    """Weights as facebookresearch/mae saves them, with its decoder."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, C),
        "pos_embed": (1, 1 + grid * grid, C),
        "mask_token": (1, 1, 24),
        "decoder_pos_embed": (1, 1 + grid * grid, 24),
        "patch_embed.proj.weight": (C, 3, patch, patch),
        "patch_embed.proj.bias": (C,),
        "norm.weight": (C,),
        "norm.bias": (C,),
        "decoder_blocks.0.attn.qkv.weight": (72, 24),
        "decoder_pred.weight": (patch * patch * 3, 24),
    }
    for block in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * C, C),
            ("attn.proj", C, C),
            ("mlp.fc1", 4 * C, C),
            ("mlp.fc2", C, 4 * C),
        ):
            shapes[f"blocks.{block}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{block}.{name}.bias"] = (rows,)
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{block}.{name}.weight"] = shapes[f"blocks.{block}.{name}.bias"] = (C,)
    draw = generator(11)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_official_layout(tmp_path: Path, kind: str) -> None:
    state, path = official_layout(), tmp_path / f"mae.{kind}"
    if kind == "pth":
        torch.save({"model": state}, path)
    else:
        safetensors.torch.save_file(state, path)
    assert is_mae_checkpoint(path)
    encoder = loaded(path)[0].image_encoder
    assert torch.equal(encoder.pos_embed[0, 1, 2], state["pos_embed"][0, 1 + 4 + 2])
    assert torch.equal(encoder.patch_embed.proj.weight, state["patch_embed.proj.weight"])
    for index, block in enumerate(encoder.blocks):
        for ours, theirs in {"mlp.lin1": "mlp.fc1", "mlp.lin2": "mlp.fc2", "attn.qkv": "attn.qkv"}.items():
            for part in ("weight", "bias"):
                tensor = block.get_parameter(f"{ours}.{part}")
                assert torch.equal(tensor, state[f"blocks.{index}.{theirs}.{part}"])


def test_patches_of_14_pixels_become_16(tmp_path: Path) -> None:
    """A picture of smooth patches, drawn 16/14 as large, gives about the same tokens."""
    state = official_layout(patch=14)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 14), torch.linspace(-1, 1, 14), indexing="ij")
    waves = generator(2)
    coefficients = torch.randn(32, 3, 3, generator=waves)
    kernel = coefficients @ torch.stack([torch.ones_like(x), x, y]).flatten(1)
    state["patch_embed.proj.weight"] = kernel.view(32, 3, 14, 14)
    torch.save(state, tmp_path / "mae.pth")
    projection = loaded(tmp_path / "mae.pth")[0].image_encoder.patch_embed.proj
    pixels = nn.functional.interpolate(torch.randn(1, 3, 2, 2, generator=waves), 14, mode="bilinear")
    small = nn.functional.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"])
    large = projection(nn.functional.interpolate(pixels, 16, mode="bilinear"))
    assert relative_error(large, small) < 0.03


def test_what_is_a_checkpoint_of_masked_autoencoding(
    checkpoint: tuple[MaskedAutoencoder, Path], tmp_path: Path
) -> None:
    assert is_mae_checkpoint(checkpoint[1])
    state = build_sam_from_config(SMALL).state_dict()
    torch.save(state, tmp_path / "sam.pth")
    safetensors.torch.save_file(state, tmp_path / "sam.safetensors")
    assert not is_mae_checkpoint(tmp_path / "sam.pth")
    assert not is_mae_checkpoint(tmp_path / "sam.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{noise")
    for path in (tmp_path / "noise.safetensors", tmp_path / "missing.pth"):
        with pytest.raises((ValueError, FileNotFoundError), match=path.name):
            is_mae_checkpoint(path)


@pytest.mark.parametrize("changes, name", [({"depth": 4}, "blocks.3.norm1"), ({"embed_dim": 64}, "pos_embed")], ids=str)
def test_another_architecture_is_refused(
    checkpoint: tuple[MaskedAutoencoder, Path], changes: dict[str, int], name: str
) -> None:
    with pytest.raises(ValueError, match=f"does not fit this image encoder.*{name}"):
        loaded(checkpoint[1], **changes)


def test_a_sam_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save(build_sam_from_config(SMALL).state_dict(), tmp_path / "sam.pth")
    with pytest.raises(ValueError, match="does not fit this image encoder"):
        loaded(tmp_path / "sam.pth")
