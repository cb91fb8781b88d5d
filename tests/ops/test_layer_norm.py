"""LayerNorm with what surrounds it: Triton kernels and PyTorch in half precision against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from oracle import relative_error
from torch import Tensor

from sam_fast.ops.layer_norm import layer_norm, layer_norm_e4m3, layer_norm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
# What rounding the result to each type costs: half of its last place, 2^-9 and 2^-12; float32 sums 1e-6.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
E4M3_TOLERANCE = 0.04  # 3 bits after the first: at most 2^-4, 0.03 on average of normal numbers
# Triton's interpreter cuts 8-bit numbers off where a GPU rounds: up to twice the error.
INTERPRETERS_FACTOR = 2.2
BACKENDS = ["triton", "torch"]


def problem(rows: int, C: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + C)
    x, delta = torch.randn(2, rows, C, generator=generator).to(dtype)
    weight, bias, shift = torch.randn(3, C, generator=generator)
    tensors = {"x": 3 * x + 1, "delta": delta, "weight": weight, "bias": bias, "shift": shift}
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def expected_of(
    given: dict[str, Tensor], dtype: torch.dtype, with_delta: bool, with_shift: bool
) -> tuple[Tensor, Tensor]:
    total = given["x"]
    if with_delta:
        total = (given["x"].double() + given["delta"].double()).to(dtype)
    shift = given["shift"].double() if with_shift else None
    y, _ = layer_norm_reference(total.double(), given["weight"].double(), given["bias"].double(), 1e-6, shift)
    return y, total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rows, C", [(1, 1), (3, 16), (5, 100), (2, 1280)])
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("with_shift", [True, False])
def test_equals_reference(rows, C, dtype, with_delta, with_shift, backend):
    given = problem(rows, C, dtype)
    y, total = layer_norm(
        given["x"],
        given["weight"],
        given["bias"],
        1e-6,
        shift=given["shift"] if with_shift else None,
        delta=given["delta"] if with_delta else None,
        backend=backend,
    )
    expected, expected_total = expected_of(given, dtype, with_delta, with_shift)
    assert y.dtype == dtype and total.dtype == dtype
    assert relative_error(y.double(), expected) <= TOLERANCE[dtype]
    assert torch.equal(total, expected_total)
    assert with_delta or total is given["x"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_float32_stream_between_half_precision(dtype, backend):
    given = problem(3, 100, torch.float32)
    given["delta"] = given["delta"].to(dtype)
    arguments = given["x"], given["weight"], given["bias"], 1e-6
    options = dict(shift=given["shift"], delta=given["delta"])
    y, total = layer_norm(*arguments, **options, dtype=dtype, backend=backend)
    expected, expected_total = expected_of(given, torch.float32, True, True)
    assert y.dtype == dtype
    assert torch.equal(total, expected_total)
    assert relative_error(y.double(), expected) <= TOLERANCE[dtype]
    y, scales, total = layer_norm_e4m3(*arguments, **options, backend=backend)
    assert torch.equal(total, expected_total)
    factor = INTERPRETERS_FACTOR if INTERPRETED and backend == "triton" else 1
    assert relative_error(y.double() * scales.double(), expected) <= E4M3_TOLERANCE * factor


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_8_bits(backend):
    given = problem(4, 200, torch.bfloat16)
    arguments = given["x"], given["weight"], given["bias"], 1e-6
    options = dict(shift=given["shift"], delta=given["delta"], backend=backend)
    y, scales, total = layer_norm_e4m3(*arguments, **options)
    assert y.dtype == torch.float8_e4m3fn and scales.shape == (4, 1)
    expected, expected_total = expected_of(given, torch.bfloat16, True, True)
    factor = INTERPRETERS_FACTOR if INTERPRETED and backend == "triton" else 1
    assert torch.equal(total, expected_total)
    assert relative_error(y.double() * scales.double(), expected) <= E4M3_TOLERANCE * factor


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_channels_give_the_bias(backend):
    """Their mean may be off by a bit or two of a float32, which is divided by the square root of epsilon."""
    x, weight, bias = torch.full((3, 24), 5.0), torch.ones(24), torch.linspace(-1, 1, 24)
    y, _ = layer_norm(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), 1e-6, backend=backend)
    bit = 4 * torch.finfo(torch.float32).eps  # between neighbours of 5
    torch.testing.assert_close(y.cpu(), bias.expand(3, 24), rtol=0, atol=2 * bit / 1e-6**0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_not_contiguous(backend):
    given = problem(6, 32, torch.float32)
    rest = given["weight"], given["bias"], 1e-6
    assert layer_norm(given["x"][:0], *rest, backend=backend)[0].shape == (0, 32)
    assert torch.equal(
        layer_norm(given["x"][::2], *rest, backend=backend)[0], layer_norm(given["x"], *rest, backend=backend)[0][::2]
    )


def test_bad_input():
    given = problem(3, 8, torch.float32)
    with pytest.raises(ValueError, match="x must be"):
        layer_norm(given["x"][0], given["weight"], given["bias"], 1e-6)
    with pytest.raises(ValueError, match="shift must be"):
        layer_norm(given["x"], given["weight"], given["bias"], 1e-6, shift=given["shift"][:4])
    with pytest.raises(ValueError, match="weight must be"):
        layer_norm(given["x"], given["weight"].half(), given["bias"], 1e-6)
    with pytest.raises(ValueError, match="delta must be"):
        layer_norm(given["x"], given["weight"], given["bias"], 1e-6, delta=given["delta"][:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=["fp32", "e4m3"])
def test_operator_is_registered_well(dtype, backend):
    given = problem(3, 16, torch.float32)
    for shift, delta in ((None, None), (given["shift"], given["delta"])):
        arguments = given["x"], given["weight"], given["bias"], 1e-6, shift, delta, dtype, backend
        torch.library.opcheck(torch.ops.sam_fast.layer_norm.default, arguments, test_utils=_CHECKS)


# 8-bit results cannot be compared by opcheck's autograd test, which asks for allclose.
_CHECKS = ("test_schema", "test_faketensor")


def test_compiles_as_one_graph():
    given = problem(3, 16, torch.float32)
    arguments = given["x"], given["weight"], given["bias"], 1e-6
    compiled = torch.compile(lambda *a: 2 * layer_norm(*a)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), 2 * layer_norm(*arguments)[0])
