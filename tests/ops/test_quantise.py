"""Rows to 8 bits: Triton kernels and the reference against what the format can hold."""

from __future__ import annotations

import pytest
import torch
from oracle import relative_error
from torch.nn import functional as F

from sam_fast.ops.quantise import LARGEST_E4M3, quantise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "torch"]
INTERPRETED = DEVICE == "cpu"  # Triton's interpreter cuts 8-bit numbers off where a GPU rounds, and has no NaN there


def rows_of(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-3, 3, shape[0])[:, None]  # rows of very different sizes
    return (spread * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (4, 3072)])
def test_each_row_keeps_its_precision(shape, gelu, dtype, backend):
    x = rows_of(shape, dtype)
    y, scales = quantise(x, gelu=gelu, backend=backend)
    expected = F.gelu(x.double()) if gelu else x.double()
    assert y.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    cut_off = INTERPRETED and backend == "triton"
    largest = y.float().abs().amax(1)
    assert (largest <= LARGEST_E4M3).all() and (largest >= (416 if cut_off else LARGEST_E4M3)).all()
    for row in range(shape[0]):  # half of the last of 3 bits: 2^-4 at most, less on average
        error = relative_error(y[row].double() * scales[row].double(), expected[row])
        assert error <= (0.09 if cut_off else 0.04)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_lie_anyhow(backend):
    x = rows_of((48, 32), torch.float32)
    expected = quantise(x, backend=backend)
    for other in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, :32]):
        y, scales = quantise(other, backend=backend)
        assert torch.equal(y.float(), expected[0].float()) and torch.equal(scales, expected[1])


def test_triton_has_the_scales_of_the_reference():
    x = rows_of((5, 500), torch.float32)
    (y, scales), (expected, expected_scales) = (quantise(x, backend=backend) for backend in BACKENDS)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    if not INTERPRETED:
        assert (y.view(torch.uint8) != expected.view(torch.uint8)).sum() <= 2  # ties


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_not_a_number(backend):
    x = torch.zeros(3, 40)
    x[1, 7] = torch.nan
    x[2] = 1
    y, scales = (part.cpu() for part in quantise(x.to(DEVICE), backend=backend))
    assert (y[0].float() == 0).all() and scales.isfinite()[[0, 2]].all()
    if backend == "torch" or not INTERPRETED:
        assert torch.isnan(y[1].float() * scales[1])[7]
    torch.testing.assert_close(y[2].float() * scales[2], x[2], rtol=0.08, atol=0)


def test_bad_input():
    with pytest.raises(ValueError, match="x must be"):
        quantise(torch.zeros(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_is_registered_well(backend):
    x = rows_of((3, 16), torch.float32)
    checks = ("test_schema", "test_faketensor")  # its other tests cannot compare numbers of 8 bits
    torch.library.opcheck(torch.ops.sam_fast.quantise.default, (x, True, backend), test_utils=checks)
