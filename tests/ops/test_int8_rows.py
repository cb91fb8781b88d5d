"""Rows as 8-bit integers: native code and the reference against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_fast.ops.int8_rows import quantise_rows, scale_rows_

BACKENDS = ["native", "torch"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("most", [127, 63])
@pytest.mark.parametrize("shape", [(1, 8), (37, 96), (3, 3072), (0, 16)], ids=str)
def test_integers_are_the_nearest(shape, most, dtype, threads, backend, monkeypatch):
    monkeypatch.setattr("sam_fast.native.num_threads", lambda: threads)
    x = (random(*shape) * random(shape[0], 1, seed=1).exp()).to(dtype)
    integers, scales = quantise_rows(x, most, backend=backend)
    assert integers.dtype == torch.uint8 and integers.shape == x.shape and scales.shape == x.shape[:1]
    distances = integers.double() - (most + 1)
    torch.testing.assert_close(scales, x.float().abs().amax(1) / most)
    assert (distances.abs() <= most).all()
    assert ((distances - x.double() / scales.double()[:, None]).abs() <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
def test_what_comes_first(gelu, with_bias, backend):
    x, factors, bias = random(20, 64), random(20, seed=2), random(64, seed=3) if with_bias else None
    integers, scales = quantise_rows(x, 127, factors=factors, bias=bias, gelu=gelu, backend=backend)
    expected = x.double() * factors.double()[:, None] + (0 if bias is None else bias.double())
    expected = F.gelu(expected) if gelu else expected
    got = (integers.double() - 128) * scales.double()[:, None]
    assert ((got - expected).abs() <= 0.501 * scales.double()[:, None]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_rows_that_are_not_finite(backend):
    x = random(4, 16)
    x[0] = 0
    x[1, 5], x[2, 3] = torch.nan, -torch.inf
    integers, scales = quantise_rows(x, 127, backend=backend)
    assert (integers[0] == 128).all() and scales[0] > 0
    assert scales[1].isnan() and scales[2].isnan() and scales[3].isfinite()
    assert torch.equal(integers[3], quantise_rows(x[3:], 127, backend=backend)[0][0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_scaled_rows(with_bias, add, dtype, threads, backend, monkeypatch):
    monkeypatch.setattr("sam_fast.native.num_threads", lambda: threads)
    x, factors, bias = random(50, 24), random(50, seed=4), random(24, seed=5) if with_bias else None
    before = random(50, 24, seed=6).to(dtype)
    out = before.clone()
    assert scale_rows_(out, x, factors, bias, add=add, backend=backend) is out
    expected = x * factors[:, None] + (0 if bias is None else bias) + (before.float() if add else 0)
    torch.testing.assert_close(out.float(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_in_place():
    x, factors = random(5, 16), random(5, seed=1)
    expected = x * factors[:, None]
    torch.testing.assert_close(scale_rows_(x, x, factors, backend="native"), expected)


def test_bad_input():
    x, factors = random(4, 16), random(4, seed=1)
    for wrong in (dict(factors=factors[:2]), dict(bias=x[0, :8])):
        with pytest.raises(ValueError, match="must be"):
            quantise_rows(x, 127, **wrong)
    with pytest.raises(ValueError, match="from 1 to 127"):
        quantise_rows(x, 128)
    with pytest.raises(ValueError, match="rows, columns"):
        quantise_rows(x[0], 127)
    with pytest.raises(ValueError, match="out must be"):
        scale_rows_(x[:2], x, factors)
    for unfit in (x[:, :9], x[:, :8], x.double()):  # not in eights, not contiguous, of another type
        with pytest.raises(ValueError, match="columns in eights"):
            quantise_rows(unfit, 127, backend="native")
        assert quantise_rows(unfit, 127)[0].shape == unfit.shape  # auto: PyTorch's
    with pytest.raises(RuntimeError, match="inference-only"):
        quantise_rows(x.requires_grad_(), 127)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_are_registered_well(backend):
    x, factors, bias = random(4, 16), random(4, seed=1), random(16, seed=2)
    torch.library.opcheck(torch.ops.sam_fast.quantise_rows.default, (x, 127, factors, bias, True, backend))
    if backend == "torch":  # which takes what is not contiguous
        torch.library.opcheck(torch.ops.sam_fast.quantise_rows.default, (x.T, 127, None, None, False, backend))
    torch.library.opcheck(torch.ops.sam_fast.scale_rows_.default, (x.clone(), x, factors, bias, True, backend))


def test_compiles_as_one_graph():
    x = random(4, 16)

    def there_and_back(y: Tensor) -> Tensor:
        integers, scales = quantise_rows(2 * y, 127)
        return scale_rows_(torch.empty_like(y), integers.float() - 128, scales)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), 2 * x, rtol=0, atol=0.05)
