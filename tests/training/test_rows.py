"""LayerNorm and linear layers of training: Triton kernels, interpreted where there is no GPU, against float64."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from oracle import relative_error
from rectangles import batch_of, error_of, gradients, tiny_sam
from sam_fast.kernels.training_rows import column_sums
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from sam_fast.modeling import image_encoder, positions
from sam_fast.training import rows as module
from sam_fast.training import step
from sam_fast.training.layers import fast_layers
from sam_fast.training.rows import FastRows
from sam_fast.training.step import InteractiveStep, StepSettings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Results are rounded once; in bfloat16 by half of their last place, 2^-9.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def results(function, *inputs: Tensor) -> list[Tensor]:
    """What a function makes of float64 or other inputs, and their gradients for one and the same random gradient."""
    y = function(*inputs)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.device, y.dtype))]


def check(function, inputs: list[Tensor], tolerance: float) -> None:
    expected = results(function, *(x.detach().double().requires_grad_() for x in inputs))
    with FastRows():
        found = results(function, *inputs)
    assert [y.dtype for y in found[1:]] == [x.dtype for x in inputs]
    for name, one, other in zip(("result", "first", "second", "third"), found, expected, strict=True):
        assert relative_error(one.double(), other) <= tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 100), (3000, 4), (5, 1280)], ids=str)
def test_layer_norm(shape, dtype):
    x = random(*shape, dtype=dtype)
    weight, bias = random(shape[-1], dtype=dtype), random(shape[-1] + 1, dtype=dtype)[1:]
    check(lambda x, w, b: F.layer_norm(x, shape[-1:], w, b, 1e-5), [x, weight, bias], TOLERANCE[dtype])


def test_layer_norm_of_channels_that_do_not_lie_together():
    x, weight, bias = random(2, 16, 5, 7), random(16), random(17)[1:]
    check(
        lambda x, w, b: F.layer_norm(x.movedim(1, -1), (16,), w, b).movedim(-1, 1),
        [x, weight, bias],
        TOLERANCE[torch.float32],
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 700, 24), (1200, 32), (2, 20, 32)], ids=str)
def test_linear(shape, dtype):
    x, weight, bias = random(*shape, dtype=dtype), random(40, shape[-1], dtype=dtype), random(40, dtype=dtype)
    assert x[..., 0].numel() >= module._FEWEST
    check(lambda x, w, b: F.linear(x, w, b), [x, weight, bias], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens, pixels, channels", [(7, 64, 16), (16, 200, 32), (2, 1000, 64)])
@pytest.mark.parametrize("way", ["read", "write"])
def test_attention(way, tokens, pixels, channels, dtype, monkeypatch):
    monkeypatch.setattr(module, "_HALVES", tuple(TOLERANCE))
    lengths = (tokens, pixels, pixels) if way == "read" else (pixels, tokens, tokens)
    q, k, v = (random(2, length, 3 * channels, dtype=dtype) for length in lengths)

    def attention(q, k, v):
        q, k, v = (x.unflatten(2, (3, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    check(attention, [2 * q, k, v], 4 * TOLERANCE[dtype])  # weights and their gradients are rounded, too


@pytest.mark.parametrize("shape, channels", [((16, 20), 16), ((17, 16), 64)], ids=str)
def test_attention_on_a_grid(shape, channels, monkeypatch):
    (H, W), tokens = shape, shape[0] * shape[1]
    given = [random(1, 2, tokens, channels + i, dtype=torch.bfloat16)[..., i:] for i in range(3)]
    given += [random(1, 2, H, W, size, dtype=torch.bfloat16) for size in (H, W)]
    inputs = [x.detach().double().requires_grad_() for x in given]
    attend = partial(positions.attend_on_grid, scale=channels**-0.5)
    expected = results(attend, *inputs)
    without = inputs[3] * 0, inputs[4]
    assert relative_error(attend(*inputs[:3], *without), expected[0]) > 0.1, "biases matter"
    monkeypatch.delattr(positions, "bias_on_grid")
    with FastRows():
        found = results(attend, *(x.detach().requires_grad_() for x in given))
    for name, one, other in zip(("result", "q", "k", "v", "by row", "by column"), found, expected, strict=True):
        assert one.dtype == torch.bfloat16 and one.shape == other.shape
        assert relative_error(one.double(), other) <= 4 * TOLERANCE[torch.bfloat16], name


@pytest.mark.parametrize("shape, channels, dtype", [
    ((15, 16), 16, torch.bfloat16), ((16, 16), 16, torch.float32), ((16, 16), 232, torch.bfloat16)
], ids=str)  # fmt: skip
def test_attention_on_a_grid_that_is_left_to_pytorch(shape, channels, dtype, monkeypatch):
    (H, W), tokens = shape, shape[0] * shape[1]
    given = [random(1, 2, tokens, channels, dtype=dtype) for _ in range(3)]
    given += [random(1, 2, H, W, size, dtype=dtype) for size in (H, W)]
    bias = Mock(wraps=positions.bias_on_grid)
    monkeypatch.setattr(positions, "bias_on_grid", bias)
    with FastRows():
        found = positions.attend_on_grid(*given, channels**-0.5)
    assert bias.called and torch.equal(found, positions.attend_on_grid(*given, channels**-0.5))


def test_attention_on_a_grid_where_others_look():
    """A mode of one's own sees PyTorch's attention, and compilation gets that."""
    attention = image_encoder.Attention(32, 2, use_rel_pos=True, input_size=(16, 16)).to(DEVICE)
    x = random(1, 16, 16, 32)
    seen = []

    class Look(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Look():
        expected = attention(x)
    assert F.scaled_dot_product_attention in seen
    with FastRows(), torch.autocast(DEVICE.type, torch.bfloat16):
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)(x)
    assert relative_error(compiled.double(), expected.double()) < 0.02
    assert positions.grid_attention.get() is None


def test_attention_on_a_grid_that_backward_computes_again():
    """Outside of the mode, so it must have been PyTorch's within it."""
    given = [random(1, 2, 256, 16, dtype=torch.bfloat16) for _ in range(3)]
    given += [random(1, 2, 16, 16, 16, dtype=torch.bfloat16) for _ in range(2)]
    attend = partial(positions.attend_on_grid, scale=0.25)
    expected = results(attend, *given)
    with FastRows():
        found = results(lambda *inputs: checkpoint(attend, *inputs, use_reentrant=False), *given)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_an_encoder_in_half_precision_attends_on_grids(monkeypatch):
    """Relative positions of its global blocks, under autocast, in the ways and the precision of training."""
    attention = image_encoder.Attention(32, 2, use_rel_pos=True, input_size=(16, 16)).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(DEVICE) * 0.3
    x = random(1, 16, 16, 32)
    expected = results(lambda x: copy.deepcopy(attention).double()(x), x.detach().double().requires_grad_())
    monkeypatch.delattr(positions, "bias_on_grid")
    with FastRows(), torch.autocast(DEVICE.type, torch.bfloat16):
        found = results(attention, x)
    assert relative_error(found[0].double(), expected[0]) < 0.02
    assert relative_error(found[1].double(), expected[1]) < 0.03


def test_what_is_left_to_pytorch(monkeypatch):
    for name in ("_LayerNorm", "_Linear", "_Read", "_Write"):
        monkeypatch.delattr(module, name)
    x, weight = random(2000, 6), random(6, 6)
    with FastRows():
        assert torch.equal(F.linear(x, weight), x @ weight.T)
        assert F.linear(x[:5], weight, weight[0]).shape == (5, 6)
        assert F.layer_norm(x, (6,)).shape == x.shape
        assert F.layer_norm(x.view(-1, 2, 3), (2, 3), weight[:2, :3], weight[:2, 3:]).shape == (2000, 2, 3)
        wide = x.double(), weight.double()
        assert F.layer_norm(F.linear(*wide, wide[1][0]), (6,), *wide[1][:2]).dtype == torch.float64

        class Own(Tensor):
            """Such as a library for quantised weights has."""

        own = weight.detach().as_subclass(Own)
        assert F.linear(x, own, own[0]).shape == x.shape and F.layer_norm(x, (6,), own[0], own[1]).shape == x.shape


def test_what_is_left_to_pytorch_for_its_shapes_or_how_it_is_called(monkeypatch):
    for name in ("_LayerNorm", "_Linear", "_Read", "_Write"):
        monkeypatch.delattr(module, name)
    x, weight = random(2000, 6), random(6, 6)
    q, k = random(2, 3, 7, 16, dtype=torch.bfloat16), random(2, 3, 70, 16, dtype=torch.bfloat16)

    def layers(x: Tensor) -> Tensor:
        return F.layer_norm(F.linear(x, weight, weight[0]), (6,), weight[0], weight[1])

    attention = F.scaled_dot_product_attention
    unlike = [(q, k[:1], k[:1]), (q, k, k[..., :5]), (q[0, 0], k[0, 0], k[0, 0])]
    expected = [attention(*given) for given in unlike]
    with FastRows():
        found = [attention(*given) for given in unlike]
        on_meta = F.linear(*(torch.empty(shape, device="meta") for shape in ((2000, 6), (6, 6), (6,))))
        assert attention(k, k[:, :, :0], k[:, :, :0]).isfinite().all()
        with pytest.raises(RuntimeError, match="normalized_shape"):
            F.layer_norm(x, (4,), weight[0, :4], weight[1, :4])
        assert torch.vmap(layers)(x.unflatten(0, (1, -1))).shape == (1, 2000, 6)
        compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)(x)
        checkpoint(layers, x, use_reentrant=False).sum().backward()  # here backward computes layers again
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled, layers(x))
    assert x.grad is not None and on_meta.shape == x.shape


def test_arguments_by_name_and_weights_that_do_not_lie_together():
    x, weight, others = random(1500, 8), random(8, 8), random(8, 3)
    check(
        lambda x, w, o: F.layer_norm(F.linear(input=x, weight=w, bias=o[:, 0]), (8,), weight=o[:, 1], bias=o[:, 2]),
        [x, weight, others],
        TOLERANCE[torch.float32],
    )


def test_results_can_be_changed_in_place():
    x, weight, bias = random(2, 700, 8), random(8, 8), random(8)
    check(
        lambda x, w, b: F.layer_norm(F.linear(x, w, b).relu_(), (8,), b, b).add_(1).relu_(),
        [x, weight, bias],
        TOLERANCE[torch.float32],
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, columns", [(0, 5), (1, 1), (17, 300), (1024, 20), (1025, 20), (40_000, 3)])
def test_column_sums(rows, columns, dtype):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)
    torch.testing.assert_close(column_sums(x).double(), x.double().sum(0), rtol=1e-5, atol=1e-3)


def test_weights_that_get_no_gradient():
    x, weight, bias = random(1500, 8), random(8, 8).detach(), random(8).detach()
    with FastRows():
        linear = F.linear(x, weight, bias)
        y = F.layer_norm(linear, (8,), bias, bias)
    saved = linear.grad_fn.next_functions[0][0].saved_tensors  # before the view that `linear` is
    assert [kept is None for kept in saved] == [True, False], "activations are kept for nothing"
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == x.shape


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_step_has_the_gradients_that_it_had(half, monkeypatch):
    model = tiny_sam().to(DEVICE).train()
    batch, settings = batch_of().to(DEVICE), StepSettings(clicks=1, refined=1, grouping=0.3)
    for limit in ("_FEWEST", "_MANY"):
        monkeypatch.setattr(module, limit, 1)
    found = []
    for mode in (nullcontext(), FastRows()):
        monkeypatch.setattr(step, "fast_layers", lambda device, mode=mode: mode)
        model.zero_grad()
        InteractiveStep(model, train_encoder=True, half=half)(batch, settings, np.random.default_rng(0))
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert error_of(*found) < (1e-4 if half is None else 0.15)


def test_only_where_kernels_run():
    assert not isinstance(fast_layers(torch.device("cpu")), FastRows)
    if DEVICE.type == "cuda":
        assert isinstance(fast_layers(DEVICE), FastRows)
