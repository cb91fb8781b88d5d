"""The end of the mask decoder as a Triton kernel, interpreted where there is no GPU, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from oracle import relative_error
from sam_fast.kernels import upscale_masks as kernels
from torch import Tensor

from sam_fast.ops.upscale_masks import Upscaling, upscale_masks, upscale_masks_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Of the largest logit, against float64 and GELU by erf on the same rounded inputs: what leaves each GELU is rounded
# once (2^-9, 2^-12), and in half precision GELU is the one by tanh (error 5e-4). Float32 differs by the order of sums.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
WAYS = {"float32": (torch.float32, 90), "bfloat16": (torch.bfloat16, 90), "float16": (torch.float16, 90)}
if DEVICE == "cpu":
    WAYS |= {"bfloat16 by addresses": (torch.bfloat16, 80), "float16 by addresses": (torch.float16, 80)}


@pytest.fixture(params=WAYS)
def dtype(request, monkeypatch) -> torch.dtype:
    """Each way to run; and outputs that are not a number until they are written."""
    dtype, architecture = WAYS[request.param]
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "architecture", lambda _: architecture)
    empty = Tensor.new_empty

    def poisoned(self, *shape, **kind):
        made = empty(self, *shape, **kind)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    return dtype


def problem(
    images: int, height: int, width: int, channels: int, masks: int, dtype: torch.dtype
) -> tuple[Tensor, Upscaling, Tensor]:
    generator = torch.Generator().manual_seed(images + height + width + channels + masks)

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)

    first, second = channels // 4, channels // 8
    weights = Upscaling(
        *(random(4 * first, channels, scale=channels**-0.5), random(first)),
        *(1 + random(first, scale=0.1).float(), random(first).float(), 1e-6),
        *(random(4 * second, first, scale=first**-0.5), random(second)),
    )
    return random(images, height, width, channels), weights, random(images, masks, second)


def in_float64(arguments: tuple[Tensor, Upscaling, Tensor]) -> tuple[Tensor, Upscaling, Tensor]:
    image, weights, classifiers = arguments
    wide = Upscaling(*(x.double() if isinstance(x, Tensor) else x for x in weights))
    return image.double(), wide, classifiers.double()


@pytest.mark.parametrize("shape", [(2, 7, 11, 64, 3), (1, 1, 1, 64, 1), (1, 5, 13, 128, 9), (1, 3, 64, 64, 4)], ids=str)
def test_equals_reference(shape, dtype):
    arguments = problem(*shape, dtype)
    logits = upscale_masks(*arguments, backend="triton")
    expected = upscale_masks_reference(*in_float64(arguments))
    assert logits.dtype == torch.float32 and logits.shape == expected.shape
    assert relative_error(logits.double(), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_size_of_the_decoder(dtype):
    arguments = problem(1, 2, 64, 256, 3, dtype)
    expected = upscale_masks_reference(*in_float64(arguments))
    logits = upscale_masks(*arguments, backend="triton")
    assert relative_error(logits.double(), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("size", [1e-12, 1e6, 1e30])
def test_classifiers_of_any_size(size, dtype):
    image, weights, classifiers = problem(1, 3, 5, 64, 3, dtype)
    classifiers = classifiers.float() * torch.tensor([size, 0.0, 1.0], device=DEVICE)[:, None]
    logits = upscale_masks(image, weights, classifiers, backend="triton")
    expected = upscale_masks_reference(*in_float64((image, weights, classifiers)))
    assert (logits[0, 1] == 0).all()
    for mask in (0, 2):
        assert relative_error(logits[0, mask].double(), expected[0, mask]) <= TOLERANCE[dtype]


def test_only_named_rows_are_written(dtype):
    image, weights, classifiers = problem(3, 3, 11, 64, 3, dtype)
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


def test_not_a_number_stays_in_its_square_and_mask(dtype):
    image, weights, classifiers = problem(2, 3, 11, 64, 3, dtype)
    clean = upscale_masks(image, weights, classifiers, backend="triton")
    image[0, 2, 3, 7] = torch.nan
    classifiers[1, 2, 1] = torch.nan
    logits = upscale_masks(image, weights, classifiers, backend="triton")
    square = torch.zeros(12, 44, dtype=torch.bool, device=DEVICE)
    square[8:12, 12:16] = True
    assert logits[0, :, square].isnan().all() and torch.equal(logits[0, :, ~square], clean[0, :, ~square])
    assert logits[1, 2].isnan().all() and torch.equal(logits[1, :2], clean[1, :2])


def test_large_values_do_not_overflow(dtype):
    image, weights, classifiers = problem(1, 3, 5, 64, 2, dtype)
    weights = weights._replace(norm_weight=100 * weights.norm_weight)
    assert upscale_masks(30 * image, weights, classifiers, backend="triton").isfinite().all()


def test_what_is_far_below_zero_is_zero(dtype):
    """Also below float16's range, in the first GELU and in the second."""
    image, weights, classifiers = problem(1, 3, 5, 64, 2, dtype)
    weights.norm_bias[3] = -1.4e5
    rows = torch.arange(2, 32, 8)  # of one channel in each of the four places
    weights.second_weight[rows] = -3e4
    arguments = image, weights, classifiers
    logits = upscale_masks(*arguments, backend="triton")
    expected = upscale_masks_reference(*in_float64(arguments))
    assert relative_error(logits.double(), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["first_weight", "first_bias", "second_weight", "second_bias"])
def test_all_factors_have_one_type(name):
    image, weights, classifiers = problem(1, 3, 5, 64, 2, torch.bfloat16)
    mixed = weights._replace(**{name: getattr(weights, name).half()})
    with pytest.raises(ValueError, match="one of float32, bfloat16, float16"):
        upscale_masks(image, mixed, classifiers, backend="triton")


def test_tensors_of_any_strides(dtype):
    image, weights, classifiers = problem(2, 3, 11, 64, 3, dtype)
    expected = upscale_masks(image, weights, classifiers, backend="triton")
    channels_first = image.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    spread = Upscaling(*(torch.stack([x, x], -1)[..., 0] if isinstance(x, Tensor) else x for x in weights))
    assert torch.equal(upscale_masks(channels_first, spread, classifiers, backend="triton"), expected)
