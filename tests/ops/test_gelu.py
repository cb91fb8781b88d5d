"""GELU in place against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sam_fast.ops.gelu import gelu_


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 100_001])
def test_equals_float64(count, threads, monkeypatch):
    monkeypatch.setattr("sam_fast.native.num_threads", lambda: threads)
    x = torch.linspace(-12, 12, count)
    expected = F.gelu(x.double())
    result = x.clone()
    assert gelu_(result, backend="native") is result
    assert ((result.double() - expected).abs() <= 2.5e-7 * x.abs().clamp(min=1)).all()


def test_extremes():
    x = torch.tensor([-torch.inf, -1e30, -100.0, -0.0, 0.0, 100.0, 1e30, torch.inf, torch.nan])
    got = gelu_(x.clone(), backend="native")
    expected = torch.tensor([-0.0, -0.0, -0.0, -0.0, 0.0, 100.0, 1e30, torch.inf, torch.nan])
    torch.testing.assert_close(got[1:], expected[1:], equal_nan=True)
    assert got[0].isnan()  # -inf * 0, as F.gelu has it
    assert F.gelu(x[:1]).isnan()


def test_bad_input():
    with pytest.raises(ValueError, match="contiguous float32"):
        gelu_(torch.zeros(4, 4).T[1:], backend="native")
    with pytest.raises(ValueError, match="contiguous float32"):
        gelu_(torch.zeros(4, dtype=torch.float64), backend="native")
    x = torch.randn(4, 6).T
    expected = F.gelu(x)
    torch.testing.assert_close(gelu_(x), expected)  # auto: PyTorch's, in place all the same
    with pytest.raises(RuntimeError, match="inference-only"):
        gelu_(torch.zeros(4, requires_grad=True) + 1)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_operator_is_registered_well(backend):
    torch.library.opcheck(torch.ops.sam_fast.gelu_.default, (torch.randn(50), backend))


def test_compiles_as_one_graph():
    x = torch.randn(50)
    compiled = torch.compile(lambda y: gelu_(2 * y), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.gelu(2 * x))
