"""LayerNorms of sums, as the packed decoder has them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_fast.runtime.perceptrons import Perceptron, SumLayerNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def norm_of(channels: int, backend: str, **options: bool) -> SumLayerNorm:
    norm = SumLayerNorm(channels, **options).to(DEVICE).requires_grad_(False)
    norm.backend = backend
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(channels, generator=torch.Generator().manual_seed(1)))
    return norm


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["triton", "torch", "auto"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sum_layer_norm_is_float32(dtype, options, backend):
    norm = norm_of(32, backend, **options)
    residual, delta = random(3, 5, 32, seed=2), random(3, 5, 32, seed=3).to(dtype)
    plain = nn.LayerNorm(32, **options).to(DEVICE).double()
    plain.load_state_dict(norm.state_dict())
    for got, expected in (
        (norm(delta, residual), plain(residual.double() + delta.double())),
        (norm(delta), plain(delta.double())),
        (norm(delta.transpose(0, 1), residual.transpose(0, 1)).transpose(0, 1), plain(residual + delta.double())),
    ):
        assert got.dtype == torch.float32 and got.shape == (3, 5, 32)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_perceptron_hands_its_residual_to_the_norm(monkeypatch):
    norm, linear = norm_of(32, "auto"), nn.Linear(16, 32).to(DEVICE)
    x, residual = random(3, 5, 16, seed=2), random(3, 5, 32, seed=3)
    perceptron = Perceptron((linear,), norm)
    expected = nn.LayerNorm.forward(norm, residual + linear(x)), nn.LayerNorm.forward(norm, linear(x))
    for got, one in zip((perceptron(x, residual), perceptron(x)), expected, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-5, atol=1e-5)
    sums = []
    monkeypatch.setattr(SumLayerNorm, "forward", lambda self, x, residual=None: sums.append(residual is not None))
    perceptron(x, residual)
    perceptron(x)
    assert sums == [True, False]
