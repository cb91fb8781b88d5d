"""The end of the mask decoder as a Triton kernel, interpreted where there is no GPU, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from oracle import relative_error
from sam_fast.kernels import upscale_masks as kernels
from torch import Tensor
from torch.nn import functional as F

from sam_fast.ops.upscale_masks import Upscaling, fits_float16, upscale_masks, upscale_masks_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Types = tuple[torch.dtype, torch.dtype]  # up to the LayerNorm, and behind it

# Of the largest logit, against float64 and GELU by erf on the same rounded inputs: what leaves each GELU is rounded
# once (2^-9, 2^-12), and in half precision GELU is the one by tanh (error 5e-4). Float32 differs by the order of sums.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # by the second type
WAYS = {
    "float32": (torch.float32, torch.float32, 90),
    "bfloat16": (torch.bfloat16, torch.bfloat16, 90),
    "bfloat16, then float16": (torch.bfloat16, torch.float16, 90),
    "float16": (torch.float16, torch.float16, 90),
}
if DEVICE == "cpu":
    WAYS["bfloat16 by addresses"] = torch.bfloat16, torch.bfloat16, 80
    WAYS["bfloat16, then float16, by addresses"] = torch.bfloat16, torch.float16, 80


@pytest.fixture(params=WAYS)
def types(request, monkeypatch) -> Types:
    """Each way to run; and outputs that are not a number until they are written."""
    *types, architecture = WAYS[request.param]
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "architecture", lambda _: architecture)
    empty = Tensor.new_empty

    def poisoned(self, *shape, **kind):
        made = empty(self, *shape, **kind)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    return tuple(types)


def problem(
    images: int, height: int, width: int, channels: int, masks: int, types: Types
) -> tuple[Tensor, Upscaling, Tensor]:
    generator = torch.Generator().manual_seed(images + height + width + channels + masks)

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = types[0]) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)

    first, second = channels // 4, channels // 8
    weights = Upscaling(
        *(random(4 * first, channels, scale=channels**-0.5), random(first)),
        *(1 + random(first, scale=0.1).float(), random(first).float(), 1e-6),
        *(random(4 * second, first, scale=first**-0.5, dtype=types[1]), random(second, dtype=types[1])),
    )
    return random(images, height, width, channels), weights, random(images, masks, second)


def in_float64(arguments: tuple[Tensor, Upscaling, Tensor]) -> tuple[Tensor, Upscaling, Tensor]:
    image, weights, classifiers = arguments
    wide = Upscaling(*(x.double() if isinstance(x, Tensor) else x for x in weights))
    return image.double(), wide, classifiers.double()


@pytest.mark.parametrize("shape", [(2, 7, 11, 64, 3), (1, 1, 1, 64, 1), (1, 5, 13, 128, 9), (1, 3, 64, 64, 4)], ids=str)
def test_equals_reference(shape, types):
    arguments = problem(*shape, types)
    logits = upscale_masks(*arguments, backend="triton")
    expected = upscale_masks_reference(*in_float64(arguments))
    assert logits.dtype == torch.float32 and logits.shape == expected.shape
    assert relative_error(logits.double(), expected) <= TOLERANCE[types[1]]


@pytest.mark.parametrize("second", [torch.bfloat16, torch.float16], ids=str)
def test_size_of_the_decoder(second):
    arguments = problem(1, 2, 64, 256, 3, (torch.bfloat16, second))
    expected = upscale_masks_reference(*in_float64(arguments))
    logits = upscale_masks(*arguments, backend="triton")
    assert relative_error(logits.double(), expected) <= TOLERANCE[second]


@pytest.mark.parametrize("size", [1e-12, 1e6, 1e30])
def test_classifiers_of_any_size(size, types):
    image, weights, classifiers = problem(1, 3, 5, 64, 3, types)
    classifiers = classifiers.float() * torch.tensor([size, 0.0, 1.0], device=DEVICE)[:, None]
    logits = upscale_masks(image, weights, classifiers, backend="triton")
    expected = upscale_masks_reference(*in_float64((image, weights, classifiers)))
    assert (logits[0, 1] == 0).all()
    for mask in (0, 2):
        assert relative_error(logits[0, mask].double(), expected[0, mask]) <= TOLERANCE[types[1]]


def test_only_named_rows_are_written(types):
    image, weights, classifiers = problem(3, 3, 11, 64, 3, types)
    every = upscale_masks(image, weights, classifiers, backend="triton")
    # Rows beyond the result are not written either.
    rows = torch.tensor([[-1, 4, 9], [-1, -1, -1], [0, -1, 8]], dtype=torch.int32, device=DEVICE)
    logits = upscale_masks(image, weights, classifiers, rows, backend="triton")
    for row, mask in ((4, every[0, 1]), (0, every[2, 0]), (8, every[2, 2])):
        assert torch.equal(logits[row], mask)
    assert logits[[1, 2, 3, 5, 6, 7]].isnan().all()
    # Nor in room for more or for less, whatever lies behind it.
    for room in (12, 6):
        around = torch.full((16, 12, 44), torch.nan, device=DEVICE)
        upscale_masks(image, weights, classifiers, rows, out=around[2 : 2 + room], backend="triton")
        written = {
            row: mask
            for row, mask in ((4, every[0, 1]), (9, every[0, 2]), (0, every[2, 0]), (8, every[2, 2]))
            if row < room
        }
        for row, mask in written.items():
            assert torch.equal(around[2 + row], mask)
        assert around[[i for i in range(16) if i - 2 not in written]].isnan().all()


def test_not_a_number_stays_in_its_square_and_mask(types):
    image, weights, classifiers = problem(2, 3, 11, 64, 3, types)
    clean = upscale_masks(image, weights, classifiers, backend="triton")
    image[0, 2, 3, 7] = torch.nan
    classifiers[1, 2, 1] = torch.nan
    logits = upscale_masks(image, weights, classifiers, backend="triton")
    square = torch.zeros(12, 44, dtype=torch.bool, device=DEVICE)
    square[8:12, 12:16] = True
    assert logits[0, :, square].isnan().all() and torch.equal(logits[0, :, ~square], clean[0, :, ~square])
    assert logits[1, 2].isnan().all() and torch.equal(logits[1, :2], clean[1, :2])


def test_large_values_do_not_overflow(types):
    image, weights, classifiers = problem(1, 3, 5, 64, 2, types)
    weights = weights._replace(norm_weight=100 * weights.norm_weight)
    assert upscale_masks(30 * image, weights, classifiers, backend="triton").isfinite().all()


def test_only_these_types_meet():
    image, weights, classifiers = problem(1, 3, 5, 64, 2, (torch.float32, torch.float16))
    with pytest.raises(ValueError, match="one of float32, bfloat16, float16"):
        upscale_masks(image, weights, classifiers, backend="triton")


def test_what_fits_float16():
    """The bound holds for an image that reaches it."""
    _, weights, _ = problem(1, 1, 1, 64, 1, (torch.float32, torch.float32))
    assert fits_float16(weights)
    # All of a LayerNorm's size in one channel: sqrt(15) of sqrt(16) here.
    row = torch.zeros(16, device=DEVICE)
    row[3] = 1e3
    largest = F.layer_norm(row, (16,), weights.norm_weight, torch.zeros_like(row), 0.0).abs().max()
    assert largest == pytest.approx(15**0.5 * float(weights.norm_weight[3]), rel=1e-5)
    for factor, fits in ((0.99, True), (1.01, False)):
        only = torch.zeros_like(weights.norm_weight)
        one = weights._replace(norm_weight=only + 2, norm_bias=only, second_weight=0 * weights.second_weight)
        one.second_weight[5, 2] = 1.0
        assert fits_float16(one._replace(norm_bias=only + factor * (2**15 - 8))) == fits
        one.second_weight[5, 2] = -factor * (2**15 - 100) / 8
        assert fits_float16(one._replace(second_bias=one.second_bias * 0 - 100)) == fits
    for factor, fits in ((1.0, True), (1e-4, False)):  # of which few digits would be left
        assert fits_float16(weights._replace(second_weight=factor * weights.second_weight)) == fits
        small = weights._replace(norm_weight=factor * weights.norm_weight, norm_bias=factor * weights.norm_bias)
        assert fits_float16(small) == fits
    for name in ("norm_weight", "norm_bias", "second_weight", "second_bias"):
        assert not fits_float16(weights._replace(**{name: getattr(weights, name) * torch.nan}))


def test_tensors_of_any_strides(types):
    image, weights, classifiers = problem(2, 3, 11, 64, 3, types)
    expected = upscale_masks(image, weights, classifiers, backend="triton")
    channels_first = image.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    spread = Upscaling(*(torch.stack([x, x], -1)[..., 0] if isinstance(x, Tensor) else x for x in weights))
    assert torch.equal(upscale_masks(channels_first, spread, classifiers, backend="triton"), expected)
