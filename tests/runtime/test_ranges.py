"""Bounds of the numbers in the mask decoder: nothing is larger, and what they say of float16."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import DEVICE, decoder_inputs, run
from oracle import relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sam_fast.build_sam import VIT_B, build_sam_from_config, sam_model_registry
from sam_fast.modeling import MaskDecoder
from sam_fast.modeling.layers import LayerNorm2d
from sam_fast.modeling.seeded import seed_weights
from sam_fast.runtime import ranges
from sam_fast.runtime.packed_decoder import PackedDecoder
from sam_fast.runtime.ranges import LONGEST_INPUT, fits_float16


@pytest.fixture
def decoder(tiny) -> MaskDecoder:
    return copy.deepcopy(tiny.mask_decoder).to(DEVICE)


def largest_bound(decoder: MaskDecoder) -> float:
    return float(torch.stack(list(ranges._of_transformer(decoder, decoder.transformer))).max())


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
def test_what_fits(tiny):
    nano = sam_model_registry["nano"]()
    assert fits_float16(nano.mask_decoder)
    assert fits_float16(seed_weights(build_sam_from_config(VIT_B), 3).mask_decoder)
    # Far below the longest inputs that the decoder is judged by: pixels, and the tokens of points and boxes.
    norm = [part for part in nano.image_encoder.neck.modules() if isinstance(part, LayerNorm2d)][-1]
    prompts, C = nano.prompt_encoder, len(norm.weight)
    pixels = norm.weight.abs().max() * C**0.5 + norm.bias.norm() + prompts.no_mask_embed.weight.norm()
    learned = [part.weight.norm() for part in (*prompts.point_embeddings, prompts.not_a_point_embed)]
    assert pixels < 30 and max(learned) + (C / 2) ** 0.5 < 30


@torch.no_grad()
@pytest.mark.parametrize("kind", ["everywhere", "in one channel"])
def test_what_just_fits_stays_finite(kind, decoder):
    """Weights as large as they may be."""
    while fits_float16(decoder):
        fitting = copy.deepcopy(decoder)
        for part in decoder.transformer.modules():
            if isinstance(part, nn.Linear):
                part.weight *= 1.2
    inputs = long_inputs(kind)
    packed = PackedDecoder(fitting, torch.bfloat16)
    assert packed.dtype == torch.float16 and PackedDecoder(decoder, torch.bfloat16).dtype == torch.bfloat16
    assert all(x.isfinite().all() for x in run(packed, *inputs))


# -- one number alone, as large as it may be: everything else is small

C, HEADS, LENGTH = 256, 8, 16.0  # of what the LayerNorms return, whose weights are 1
LARGEST = 2.0**15
ENCODING = 128**0.5


@pytest.fixture
def quiet(decoder) -> MaskDecoder:
    """A decoder whose matrices and biases are zero."""
    with torch.no_grad():
        for part in decoder.transformer.modules():
            if isinstance(part, nn.Linear | nn.LayerNorm):
                part.weight.fill_(isinstance(part, nn.LayerNorm)), part.bias.zero_()
        for part in (*decoder.output_upscaling, decoder.iou_token, decoder.mask_tokens):
            if isinstance(part, nn.ConvTranspose2d | LayerNorm2d | nn.Embedding):
                part.weight.fill_(isinstance(part, LayerNorm2d))
            if isinstance(part, nn.ConvTranspose2d | LayerNorm2d):
                part.bias.zero_()
    return decoder


def row_of(layer: nn.Linear, number: float) -> None:
    """A row of that length."""
    layer.weight[5] = number * F.normalize(torch.ones(layer.in_features), dim=0)


# What goes into projections of queries, keys and values: (attention, q, k, v).
GIVEN = [
    ("layers.0.self_attn", LONGEST_INPUT, LONGEST_INPUT, LONGEST_INPUT),
    ("layers.1.self_attn", LENGTH + LONGEST_INPUT, LENGTH + LONGEST_INPUT, LENGTH),
    ("layers.0.cross_attn_token_to_image", LENGTH + LONGEST_INPUT, LONGEST_INPUT + ENCODING, LONGEST_INPUT),
    ("layers.1.cross_attn_token_to_image", LENGTH + LONGEST_INPUT, LENGTH + ENCODING, LENGTH),
    ("layers.0.cross_attn_image_to_token", LONGEST_INPUT + ENCODING, LENGTH + LONGEST_INPUT, LENGTH),
    ("layers.1.cross_attn_image_to_token", LENGTH + ENCODING, LENGTH + LONGEST_INPUT, LENGTH),
    ("final_attn_token_to_image", LENGTH + LONGEST_INPUT, LENGTH + ENCODING, LENGTH),
]
PROJECTED = [
    (name, projection, length)
    for name, *lengths in GIVEN
    for projection, length in zip(("q_proj", "k_proj", "v_proj"), lengths, strict=True)
]
PERCEPTRONS = ["layers.0.mlp", "layers.1.mlp"]
PROJECTED += [(name, "lin1", LENGTH) for name in PERCEPTRONS]
# Two layers in a row: what goes into the first one, and what lies between them is no longer than that makes it.
IN_A_ROW = [(name, "v_proj", "out_proj", length) for name, _, _, length in GIVEN]
IN_A_ROW += [(name, "lin1", "lin2", LENGTH) for name in PERCEPTRONS]
JUST = pytest.mark.parametrize(("factor", "fits"), [(0.999, True), (1.001, False)], ids=["fits", "does not fit"])


@JUST
@pytest.mark.parametrize(("name", "projection", "length"), PROJECTED)
@torch.no_grad()
def test_projections(name, projection, length, factor, fits, quiet):
    layer = quiet.transformer.get_submodule(name).get_submodule(projection)
    row_of(layer, factor * LARGEST / length)
    assert fits_float16(quiet) == fits
    layer.weight.mul_(0.5)
    layer.bias[5] = factor * LARGEST / 2
    assert fits_float16(quiet) == fits


@JUST
@pytest.mark.parametrize(("name", "first", "second", "length"), IN_A_ROW)
@torch.no_grad()
def test_layers_in_a_row(name, first, second, length, factor, fits, quiet):
    part = quiet.transformer.get_submodule(name)
    one, other = part.get_submodule(first), part.get_submodule(second)
    row_of(one, 4.0)
    row_of(other, factor * LARGEST / (4 * length))
    assert fits_float16(quiet) == fits
    one.bias[100] = 4 * length  # which makes its product twice as long
    other.weight *= 0.5
    assert fits_float16(quiet) == fits
    other.weight *= 0.5
    other.bias[5] = factor * LARGEST / 2
    assert fits_float16(quiet) == fits


@JUST
@pytest.mark.parametrize(
    ("name", "projection", "other"),
    [
        (name, *(("k_proj", "q_proj") if "image_to" in name else ("q_proj", "k_proj")))
        for name, *_ in GIVEN
        if "self" not in name
    ],
)
@torch.no_grad()
def test_absorbed_projections(name, projection, other, factor, fits, quiet):
    """Tokens times two of them, of one head; in other heads they are as large, and do not meet."""
    attention = quiet.transformer.get_submodule(name)
    first, second = attention.get_submodule(projection), attention.get_submodule(other)
    row_of(first, 8.0)
    length, width = LENGTH + LONGEST_INPUT, second.out_features // HEADS
    second.weight[:width, 9] = factor * LARGEST / (8 * length) / width**0.5
    second.weight[width:, 10] = 4 * second.weight[0, 9]
    assert fits_float16(quiet) == fits
    first.bias[6] = 8 * length
    first.weight *= 0.5
    second.weight *= 2 / 3
    assert fits_float16(quiet) == fits


@JUST
@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((f"layers.{layer}.norm{norm}", LONGEST_INPUT) for layer in (0, 1) for norm in (1, 3)),
        *((f"layers.{layer}.norm2", 0.0) for layer in (0, 1)),  # read by the perceptron alone
        *((f"layers.{layer}.norm4", ENCODING) for layer in (0, 1)),
    ],
)
@torch.no_grad()
def test_norms(name, more, factor, fits, quiet):
    norm = quiet.transformer.get_submodule(name)
    norm.bias[5] = factor * (LARGEST - more) - LENGTH
    assert fits_float16(quiet) == fits
    norm.bias.zero_()
    norm.weight[5] = factor * (LARGEST - more) / C**0.5
    assert fits_float16(quiet) == fits


@JUST
@pytest.mark.parametrize("name", ["iou_token", "mask_tokens"])
@torch.no_grad()
def test_output_tokens(name, factor, fits, quiet):
    getattr(quiet, name).weight[-1] = (factor * LARGEST - LENGTH) / C**0.5  # a number for each of the channels
    assert fits_float16(quiet) == fits


@JUST
@torch.no_grad()
def test_biases_of_the_upscaling(factor, fits, quiet):
    first, norm, _, second, _ = quiet.output_upscaling
    C1 = len(norm.weight)
    for given in (first.bias, norm.bias, second.bias):
        given[2] = factor * LARGEST - (C1**0.5 if given is norm.bias else 0)
        assert fits_float16(quiet) == fits
        given.zero_()


@JUST
@torch.no_grad()
def test_the_bound_of_the_upscaling_is_reached(factor, fits, quiet):
    """All of a LayerNorm's size in one channel, and a convolution that reads that one."""
    _, norm, _, second, _ = quiet.output_upscaling
    C1 = len(norm.weight)
    norm.weight.fill_(2)
    second.weight[2, 1, 0, 0] = factor * LARGEST / (2 * C1**0.5)
    assert fits_float16(quiet) == fits
    row = torch.zeros(C1, device=DEVICE)
    row[2] = 1e3
    squares = F.gelu(F.layer_norm(row, (C1,), norm.weight, norm.bias))
    pixel = second(squares[None, :, None, None])[0, 1, 0, 0]
    assert float(pixel) == pytest.approx(factor * LARGEST, rel=0.02)  # sqrt(C1 - 1) of sqrt(C1)


# -- weights that float16 does not hold well, whatever they are multiplied with


@torch.no_grad()
def test_weights_beyond_the_range(quiet):
    layer = quiet.transformer.layers[0]
    layer.norm2.weight.zero_()
    for number, fits in ((3e4, True), (1e5, False)):
        layer.mlp.lin1.weight[5, 6] = number  # times nothing
        assert fits_float16(quiet) == fits


@torch.no_grad()
@pytest.mark.parametrize("name", [f"{name}.{part}" for name, *_ in GIVEN for part in ("q_proj", "out_proj")])
def test_weights_of_few_digits(name, decoder):
    layer = decoder.transformer.get_submodule(name)
    weight = layer.weight.clone()
    for factor, fits in ((1e-4, False), (0.0, True), (torch.nan, False)):
        layer.weight.copy_(factor * weight)
        assert fits_float16(decoder) == fits, factor
    layer.weight.copy_(weight)
    layer.bias = None
    assert not fits_float16(decoder)


@torch.no_grad()
@pytest.mark.parametrize("factor", [1e-4, torch.nan])
@pytest.mark.parametrize("index", [0, 1, 3], ids=["first convolution", "norm", "second convolution"])
def test_weights_of_few_digits_in_the_upscaling(index, factor, decoder):
    decoder.output_upscaling[index].weight *= factor
    assert not fits_float16(decoder)


@torch.no_grad()
@pytest.mark.parametrize("change", ["iou token", "bias of the first convolution", "norm before a small projection"])
def test_what_bfloat16_holds_alone_stays_that(change, decoder):
    if change == "iou token":
        decoder.iou_token.weight[0, 3] = 7e4
    elif change == "bias of the first convolution":
        decoder.output_upscaling[0].bias += 1e5
    else:
        decoder.transformer.layers[1].norm1.bias[5] = 7e4
        decoder.transformer.layers[1].cross_attn_token_to_image.q_proj.weight.zero_()
    packed = PackedDecoder(decoder, torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    arguments = decoder_inputs(2, 3, 5, 7)
    expected, _ = decoder(*arguments, multimask_output=True)
    assert relative_error(run(packed, *arguments)[0], expected) < 0.2
