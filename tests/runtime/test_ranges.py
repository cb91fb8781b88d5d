"""Bounds of the numbers in the mask decoder: nothing is larger, and what they say of float16."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import DEVICE, decoder_inputs, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sam_fast.build_sam import VIT_B, build_sam_from_config, sam_model_registry
from sam_fast.modeling import MaskDecoder
from sam_fast.modeling.seeded import seed_weights
from sam_fast.runtime import ranges
from sam_fast.runtime.packed_decoder import PackedDecoder
from sam_fast.runtime.ranges import LONGEST_INPUT, fits_float16


@pytest.fixture
def decoder(tiny) -> MaskDecoder:
    return copy.deepcopy(tiny.mask_decoder).to(DEVICE)


def largest_bound(decoder: MaskDecoder) -> float:
    return float(torch.stack(list(ranges._of_transformer(decoder.transformer))).max())


class Largest(TorchFunctionMode):
    """The largest number that a product makes, or that goes into one."""

    def __init__(self) -> None:
        self.number = 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (F.linear, torch.bmm, Tensor.matmul):
            of_product = [x for x in (*args[:2], result) if isinstance(x, Tensor)]
            self.number = max(self.number, *(float(x.abs().max()) for x in of_product))
        return result


def long_inputs(kind: str) -> tuple[Tensor, ...]:
    """Of the largest length: every pixel and token, alike or one by one."""
    features, pe, sparse, dense = decoder_inputs(2, 3, 5, 7)
    if kind == "in one channel":
        features, sparse = torch.zeros_like(features), torch.zeros_like(sparse)
        features[:, 17], sparse[..., 200] = 1, 1
    features = LONGEST_INPUT * F.normalize(features, dim=1)
    sparse = LONGEST_INPUT * F.normalize(sparse, dim=2)
    return features, 128**0.5 * F.normalize(pe, dim=1), sparse, 0 * dense


@torch.no_grad()
@pytest.mark.parametrize("kind", ["everywhere", "in one channel"])
@pytest.mark.parametrize("growth", [0.5, 1.0, 4.0])
def test_no_number_is_larger_than_the_bound(growth, kind, decoder):
    for part in decoder.transformer.modules():
        if isinstance(part, nn.Linear | nn.LayerNorm):
            part.weight *= growth
    with Largest() as largest:
        run(PackedDecoder(decoder, torch.float32), *long_inputs(kind))
    bound = largest_bound(decoder)
    assert bound / 300 < largest.number <= bound


@torch.no_grad()
def test_the_bound_of_one_layer_is_reached(decoder):
    """By a weight of rank one, which makes a vector as much longer as its norm says."""
    attention = decoder.transformer.layers[0].self_attn
    direction, out = F.normalize(torch.randn(2, 256, generator=torch.Generator().manual_seed(0)), dim=1).to(DEVICE)
    attention.v_proj.weight.copy_(3 * out[:, None] * direction)
    attention.v_proj.bias.zero_()
    attention.out_proj.weight.zero_()[5] = 400 * out
    attention.out_proj.bias.zero_()
    assert largest_bound(decoder) == pytest.approx(400 * 3 * LONGEST_INPUT, rel=1e-5)
    reached = attention.out_proj(attention.v_proj(LONGEST_INPUT * direction))
    assert float(reached.max()) == pytest.approx(400 * 3 * LONGEST_INPUT, rel=1e-5)


def test_what_fits():
    assert fits_float16(sam_model_registry["nano"]().mask_decoder)
    assert fits_float16(seed_weights(build_sam_from_config(VIT_B), 3).mask_decoder)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["everywhere", "in one channel"])
def test_what_fits_stays_finite_and_close(kind, decoder):
    """Just so: the weights are as large as they may be."""
    while fits_float16(decoder):
        fitting = copy.deepcopy(decoder)
        for part in decoder.transformer.modules():
            if isinstance(part, nn.Linear):
                part.weight *= 1.2
    inputs = long_inputs(kind)
    packed = PackedDecoder(fitting, torch.bfloat16)
    assert packed.dtype == torch.float16 and PackedDecoder(decoder, torch.bfloat16).dtype == torch.bfloat16
    assert all(x.isfinite().all() for x in run(packed, *inputs))


LINEAR = [
    f"layers.{layer}.{attention}.{projection}"
    for layer, attention in enumerate(["self_attn", "cross_attn_image_to_token"])
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj")
] + ["layers.1.mlp.lin1", "layers.0.mlp.lin2", "final_attn_token_to_image.out_proj"]


@torch.no_grad()
@pytest.mark.parametrize("name", LINEAR)
def test_every_layer_counts(name, decoder):
    layer = decoder.transformer.get_submodule(name)
    weight = layer.weight.clone()
    assert fits_float16(decoder)
    for factor, fits in ((1e5, False), (1e-4, False), (0.0, True), (torch.nan, False)):
        layer.weight.copy_(factor * weight)  # too large; of few digits; nothing
        assert fits_float16(decoder) == fits, factor
    layer.weight.copy_(weight)
    layer.bias[3] = 2**16
    assert not fits_float16(decoder)
    layer.bias = None
    assert not fits_float16(decoder)


@torch.no_grad()
@pytest.mark.parametrize("factor", [1e5, 1e-4, torch.nan])
@pytest.mark.parametrize("name", ["norm1", "norm2", "norm3", "norm4"])
def test_every_norm_counts(name, factor, decoder):
    getattr(decoder.transformer.layers[1], name).weight *= factor
    assert not fits_float16(decoder)


@torch.no_grad()
@pytest.mark.parametrize("factor", [1e6, 1e-4, torch.nan])
@pytest.mark.parametrize("index", [1, 3], ids=["norm", "second convolution"])
def test_the_upscaling_counts(index, factor, decoder):
    decoder.output_upscaling[index].weight *= factor
    assert not fits_float16(decoder)


@torch.no_grad()
def test_the_bound_of_the_upscaling_is_reached(decoder):
    """All of a LayerNorm's size in one channel, and a convolution that reads that one."""
    _, norm, _, second, _ = decoder.output_upscaling
    C1 = len(norm.weight)
    norm.weight.fill_(2), norm.bias.zero_()
    for factor, fits in ((0.99, True), (1.01, False)):
        second.weight.zero_()[2, 1, 0, 0] = factor * 2**15 / (2 * C1**0.5)
        second.bias.zero_()
        assert fits_float16(decoder) == fits
        row = torch.zeros(C1, device=DEVICE)
        row[2] = 1e3
        squares = F.gelu(F.layer_norm(row, (C1,), norm.weight, norm.bias))
        pixel = second(squares[None, :, None, None])[0, 1, 0, 0]
        assert float(pixel) == pytest.approx(factor * 2**15, rel=0.02)  # sqrt(C1 - 1) of sqrt(C1)
