"""Perceptrons on few rows: native code against float64, and against the modules that it stands for."""

from __future__ import annotations

import pytest
import torch
from oracle import relative_error
from torch import Tensor, nn

from sam_fast.modeling.layers import MLP, MLPBlock
from sam_fast.ops.perceptron import perceptron, perceptron_reference
from sam_fast.runtime.perceptrons import perceptron_of

TOLERANCE = 1e-6  # of float32 against float64; 3e-7 measured

Problem = tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, tuple[Tensor, Tensor, float] | None]


def problem(rows: tuple[int, ...], widths: tuple[int, ...], *, residual: bool = False, norm: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(len(widths))
    x = torch.randn(*rows, widths[0], generator=generator)
    sides = list(zip(widths[1:], widths, strict=False))
    weights = [torch.randn(*shape, generator=generator) / shape[1] ** 0.5 for shape in sides]
    biases = [torch.randn(width, generator=generator) for width in widths[1:]]
    last = widths[-1]
    return (
        x,
        weights,
        biases,
        torch.randn(*rows, last, generator=generator) if residual else None,
        (1 + torch.randn(last, generator=generator) / 9, torch.randn(last, generator=generator), 1e-5)
        if norm
        else None,
    )


def in_float64(arguments: Problem) -> Problem:
    x, weights, biases, residual, norm = arguments
    wide_norm = None if norm is None else (norm[0].double(), norm[1].double(), norm[2])
    wide_residual = None if residual is None else residual.double()
    return x.double(), [w.double() for w in weights], [b.double() for b in biases], wide_residual, wide_norm


CASES = {
    "projection": (((1, 7), (256, 128)), {}),
    "projection with residual and norm": (((1, 7), (128, 256)), {"residual": True, "norm": True}),
    "token perceptron": (((4, 7), (256, 2048, 256)), {"residual": True, "norm": True}),
    "IoU head": (((1,), (256, 256, 256, 4)), {}),
    "odd outputs": (((5,), (8, 16, 13)), {}),
    "one output": (((2,), (16, 1)), {"residual": True}),
    "norm alone": (((4,), (24, 40)), {"norm": True}),
    "one row": (((), (64, 72)), {"norm": True}),
    "no rows": (((0, 7), (64, 32)), {"residual": True}),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_native_equals_float64(name, threads, monkeypatch):
    shape, options = CASES[name]
    arguments = problem(*shape, **options)
    monkeypatch.setattr("sam_fast.native.num_threads", lambda: threads)
    got = perceptron(*arguments, backend="native")
    expected = perceptron_reference(*in_float64(arguments))
    assert got.shape == expected.shape
    if got.numel():
        assert relative_error(got.double(), expected) <= TOLERANCE


@pytest.mark.parametrize("rows", range(1, 9))
def test_every_number_of_rows(rows):
    arguments = problem((rows,), (16, 24, 8))
    got = perceptron(*arguments, backend="native")
    assert relative_error(got.double(), perceptron_reference(*in_float64(arguments))) <= TOLERANCE


def test_rows_and_weights_need_not_be_contiguous():
    x, weights, biases, _, _ = problem((6,), (32, 16))
    spread = torch.stack([x, x], dim=2)[..., 0]
    turned = weights[0].T.contiguous().T
    assert torch.equal(perceptron(spread, [turned], biases), perceptron(x, weights, biases))


def test_not_a_number_stays_in_its_row():
    x, weights, biases, residual, norm = problem((5,), (32, 32, 32), residual=True, norm=True)
    x[2, 3] = torch.nan
    got = perceptron(x, weights, biases, residual, norm, backend="native")
    assert got[2].isnan().all() and got[[0, 1, 3, 4]].isfinite().all()


def test_bad_input():
    x, weights, biases, _, _ = problem((5,), (32, 16))
    with pytest.raises(ValueError, match="0 weights and 0 biases"):
        perceptron(x, [], [])
    with pytest.raises(ValueError, match="residual must be"):
        perceptron(x, weights, biases, x)
    with pytest.raises(ValueError, match="widths in eights"):
        perceptron(x[:, :12], [weights[0][:, :12]], biases, backend="native")
    with pytest.raises(ValueError, match="wrong size"):
        perceptron(x[:, :16], weights, biases, backend="native")
    with pytest.raises(ValueError, match="wrong size"):
        perceptron(x, weights, [biases[0][:-1]], backend="native")
    with pytest.raises(RuntimeError, match="inference-only"):
        perceptron(x.requires_grad_(), weights, biases, backend="native")


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_operator_is_registered_well(backend):
    x, weights, biases, residual, _ = problem((3,), (8, 16), residual=True)
    arguments = x, weights, biases, residual, None, None, 0.0, backend
    torch.library.opcheck(torch.ops.sam_fast.perceptron.default, arguments)


def test_compiles_as_one_graph():
    x, weights, biases, _, _ = problem((3,), (8, 16))
    compiled = torch.compile(lambda y: perceptron(2 * y, weights, biases), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), perceptron(2 * x, weights, biases))


# -- in the place of modules


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


MODULES = {
    "perceptron": lambda: MLP(32, 16, 4, 3),
    "with a sigmoid": lambda: MLP(32, 16, 4, 3, sigmoid_output=True),
    "block": lambda: MLPBlock(32, 64, nn.ReLU),
    "block with GELU": lambda: MLPBlock(32, 64),
    "layer of somebody's own": lambda: Doubled(32, 32),
    "no bias": lambda: nn.Linear(32, 32, bias=False),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_stands_for_modules(name, dtype):
    torch.manual_seed(0)
    module = MODULES[name]().to(dtype)
    x = torch.randn(2, 7, 32, dtype=dtype)
    expected = module(x)
    assert relative_error(perceptron_of(module)(x), expected) <= TOLERANCE
    norm = nn.LayerNorm(expected.shape[-1], dtype=dtype)
    if expected.shape == x.shape:
        assert relative_error(perceptron_of(module, norm)(x, x), norm(x + expected)) <= TOLERANCE


def test_modules_keep_gradients_and_autocast():
    module = MLPBlock(32, 64, nn.ReLU)
    x = torch.randn(7, 32, requires_grad=True)
    perceptron_of(module)(x).sum().backward()
    assert x.grad is not None and module.lin1.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert perceptron_of(module)(x).dtype == torch.bfloat16
