"""Attention of training on CPUs against PyTorch's in float64, and what is left to PyTorch."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from oracle import relative_error
from rectangles import batch_of, error_of, gradients, tiny_sam
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sam_fast.modeling.image_encoder import Attention
from sam_fast.training import attention as module
from sam_fast.training import step
from sam_fast.training.attention import FastAttention
from sam_fast.training.layers import fast_layers
from sam_fast.training.step import InteractiveStep, StepSettings

# In bfloat16 weights, results and gradients are rounded, each by half of its last place, 2^-9.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
WAYS = ("_write", "_read", "_biased", "_Biased")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def heads_of(length: int, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    """`count` tensors [2, 3, length, 16] that lie as a projection leaves them."""
    joint = random(2, length, count, 3, 16, dtype=dtype)
    return list(joint.permute(2, 0, 3, 1, 4).unbind(0))


def differentiate(given: list[Tensor], scale: float | None = None) -> list[Tensor]:
    """The result for q, k, v and maybe a bias, and the gradients of all of them for one random gradient."""
    y = F.scaled_dot_product_attention(*given, scale=scale)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return [y.detach(), *torch.autograd.grad(y, given, grad.to(y.dtype))]


def check(given: list[Tensor], scale: float | None = None) -> None:
    expected = differentiate([x.detach().double().requires_grad_() for x in given], scale)
    with FastAttention():
        found = differentiate(given, scale)
    for name, one, other in zip(("result", "q", "k", "v", "bias"), found, expected, strict=False):
        assert one.dtype == given[0].dtype and one.shape == other.shape
        assert relative_error(one.double(), other) <= TOLERANCE[given[0].dtype], name


def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways of attention that are gone, in the order in which they are, from now on."""
    names: list[str] = []

    def note(name: str, function):
        def noted(*args):
            names.append(name)
            return function(*args)

        return noted

    for name in ("_write", "_read", "_biased"):
        monkeypatch.setattr(module, name, note(name, getattr(module, name)))
    monkeypatch.setattr(module._Biased, "apply", note("_Biased", module._Biased.apply))
    return names


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("queries, keys, way", [(100, 7, "_write"), (64, 32, "_write"), (7, 100, "_read")])
def test_tokens_and_pixels(queries, keys, way, dtype, scale, monkeypatch):
    names = called(monkeypatch)
    q, (k, v) = heads_of(queries, dtype, 1)[0], heads_of(keys, dtype, 2)
    check([q, k, v], scale)
    assert names == ([] if way == "_read" and dtype == torch.float32 else [way])  # PyTorch's is quick in float32


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("queries, keys, way", [(49, 49, "_biased"), (256, 300, "_Biased")])
def test_a_bias_with_gradients(queries, keys, way, dtype, scale, monkeypatch):
    names = called(monkeypatch)
    q, (k, v) = heads_of(queries, dtype, 1)[0], heads_of(keys, dtype, 2)
    check([q, k, v, random(2, 3, keys, queries, dtype=dtype).transpose(2, 3)], scale)
    assert names == [way]


@pytest.mark.parametrize("side, way", [(8, "_biased"), (16, "_Biased")])
def test_the_encoders_attention_under_autocast_is_as_exact_as_pytorchs(side, way, monkeypatch):
    attention = Attention(32, 2, use_rel_pos=True, input_size=(side, side))
    torch.manual_seed(0)
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        torch.nn.init.normal_(table)
    x = random(2, side, side, 32)
    exact = attention.double()(x.double())
    expected = torch.autograd.grad(exact.square().sum(), [x, *attention.parameters()])
    attention.float()

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            y = attention(x)
        assert y.dtype == torch.bfloat16
        found = torch.autograd.grad(y.double().square().sum(), [x, *attention.parameters()])
        return max(relative_error(one.double(), other.double()) for one, other in zip(found, expected, strict=True))

    plain, names = error(), called(monkeypatch)
    with FastAttention():
        assert error() < 1.2 * plain
    assert names == [way]


@pytest.mark.parametrize("side, way", [(7, "_biased"), (16, "_Biased")])
def test_values_that_share_an_offset(side, way, monkeypatch):
    """Which changes no gradient of scores, but is rounded with them."""
    names = called(monkeypatch)
    q, k, v = (x.detach() for x in heads_of(side * side, torch.bfloat16))
    v = v + 20 * random(16, dtype=torch.bfloat16).detach()
    bias = random(2, 3, side * side, side * side, dtype=torch.bfloat16)
    check([x.detach().requires_grad_() for x in (q, k, v)] + [bias])
    assert names == [way]


@pytest.mark.parametrize("side, way", [(7, "_biased"), (16, "_Biased")])
def test_only_the_bias_is_trained(side, way, monkeypatch):
    names, bias = called(monkeypatch), random(2, 3, side * side, side * side)
    q, k, v = (x.detach() for x in heads_of(side * side, torch.float32))
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, bias).square().sum(), bias)
    with FastAttention():
        found = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, bias).square().sum(), bias)
    torch.testing.assert_close(found, expected)
    assert names == [way]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("queries, keys", [(100, 7), (7, 100)])
def test_the_result_lies_as_pytorchs(queries, keys, dtype):
    """Code of somebody's own may make a view of it."""
    q, (k, v) = heads_of(queries, dtype, 1)[0], heads_of(keys, dtype, 2)
    expected = F.scaled_dot_product_attention(q, k, v)
    with FastAttention():
        found = F.scaled_dot_product_attention(q, k, v)
    assert found.stride() == expected.stride()


def test_gradients_under_autocast_of_a_result_that_is_not():
    given = [*heads_of(256, torch.float32), random(2, 3, 256, 256)]
    expected = differentiate(given)
    with FastAttention():
        y = F.scaled_dot_product_attention(*given)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, given, grad.to(y.dtype))
    torch.testing.assert_close(found, tuple(expected[1:]))


def test_what_is_left_to_pytorch(monkeypatch):
    for name in WAYS:
        monkeypatch.delattr(module, name)
    few, many = heads_of(7, torch.bfloat16), heads_of(300, torch.bfloat16)
    bias = random(2, 3, 300, 300, dtype=torch.bfloat16)
    attend = F.scaled_dot_product_attention
    hidden = torch.zeros(2, 3, 300, 300, dtype=torch.bfloat16)
    hidden[:, :, 5] = -torch.inf  # a query that may read nothing
    hidden.requires_grad_()

    class Own(Tensor):
        """Such as a library for quantised weights has."""

    calls = [
        lambda: attend(*heads_of(100, torch.float32)),
        lambda: attend(heads_of(63, torch.bfloat16)[0], *heads_of(32, torch.bfloat16, 2)),
        lambda: attend(heads_of(64, torch.bfloat16)[0], *heads_of(33, torch.bfloat16, 2)),
        lambda: attend(many[0].half(), *(x.half() for x in few[1:])),
        lambda: attend(many[0].as_subclass(Own), *few[1:]),
        lambda: attend(*many, hidden),
        lambda: attend(*many),
        lambda: attend(*many, bias.detach()),
        lambda: attend(*many, bias[0, 0] > 0),
        lambda: attend(*many, bias[:1]),
        lambda: attend(few[0], *many[1:], None, 0.0),
        lambda: attend(*many, is_causal=True),
        lambda: attend(few[0], many[1], many[2][..., :5]),
        lambda: attend(few[0], many[1][:1], many[2][:1]),
        lambda: attend(few[0][0, 0], many[1][0, 0], many[2][0, 0]),
        lambda: attend(many[0], few[1][:, :, :0], few[2][:, :, :0]),
        lambda: attend(*(x.detach() for x in (many[0], *few[1:]))),
        lambda: attend(few[0].double(), *(x.double() for x in many[1:])),
    ]
    expected = [call().detach() for call in calls]
    with FastAttention():
        torch.testing.assert_close([call().detach() for call in calls], expected, rtol=0, atol=0)
        with torch.no_grad():
            attend(many[0], *few[1:])
        with torch.autocast("cpu", torch.bfloat16):  # PyTorch casts float32, and returns what it is cast to
            assert attend(many[0].float(), *(x.float() for x in few[1:])).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="dtype"):
            attend(many[0].float(), *few[1:])


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore:The PyTorch API of nested tensors")
def test_where_attention_is_compiled_transformed_or_computed_again(monkeypatch):
    for name in WAYS:
        monkeypatch.delattr(module, name)
    q, (k, v) = heads_of(100, torch.float32, 1)[0], heads_of(7, torch.float32, 2)
    attend = F.scaled_dot_product_attention
    with FastAttention():
        transformed = torch.func.grad(lambda q: attend(q, k, v).sum())(q)
        traced = torch.jit.trace(attend, (q, k, v), check_trace=False)
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v)
        (grad,) = torch.autograd.grad(checkpoint(attend, q, k, v, use_reentrant=False).sum(), q)
        nested = torch.nested.nested_tensor(list(q.detach())).requires_grad_()
        assert attend(nested, nested, nested).is_nested
    torch.testing.assert_close(compiled, attend(q, k, v))
    torch.testing.assert_close(traced(q, k, v), attend(q, k, v))
    torch.testing.assert_close(transformed, grad)
    torch.testing.assert_close(grad, torch.autograd.grad(attend(q, k, v).sum(), q)[0])


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_step_has_the_gradients_that_it_had(half, monkeypatch):
    model = tiny_sam().train()
    batch, settings = batch_of(), StepSettings(clicks=1, refined=1, grouping=0.3)
    for limit in ("_MANY", "_LONG"):
        monkeypatch.setattr(module, limit, 1)
    found = []
    for mode in (nullcontext(), FastAttention()):
        monkeypatch.setattr(step, "fast_layers", lambda device, mode=mode: mode)
        names = called(monkeypatch)
        model.zero_grad()
        InteractiveStep(model, train_encoder=True, half=half)(batch, settings, np.random.default_rng(0))
        found.append(gradients(model))
    assert {"_write", "_Biased"} <= set(names)
    assert found[0].keys() == found[1].keys()
    assert error_of(*found) < (1e-4 if half is None else 0.15)


def test_only_on_a_cpu():
    assert isinstance(fast_layers(torch.device("cpu")), FastAttention)
    assert not isinstance(fast_layers(torch.device("cuda")), FastAttention)
