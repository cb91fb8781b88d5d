"""What is derived from a module is made anew when, and only when, the module has changed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sam_fast.watch import Derived, Watch


def build() -> nn.Sequential:
    norm = nn.BatchNorm1d(4)  # which has buffers
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(norm, nn.GELU()), nn.Linear(4, 2, bias=False)).eval()


class Adapted(nn.Linear):
    pass


def _set(owner: object, name: str, value: object) -> None:
    setattr(owner, name, value)


@torch.no_grad()
def _write(tensor: torch.Tensor) -> None:
    tensor.mul_(2)


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a weight is written to": lambda m: _write(m[0].weight),
    "a buffer is written to": lambda m: _write(m[1][0].running_mean),
    "a parameter is replaced": lambda m: _set(m[2], "weight", nn.Parameter(torch.ones(2, 4))),
    "a parameter is removed": lambda m: _set(m[0], "bias", None),
    "data is swapped": lambda m: _set(m[0].weight, "data", torch.ones(4, 3)),
    "other numbers": lambda m: m.double(),
    "a layer is replaced": lambda m: _set(m[1], "1", nn.ReLU()),
    "a layer is added": lambda m: m.append(nn.ReLU()),
    "a layer becomes another": lambda m: _set(m[0], "__class__", Adapted),
    "a hook": lambda m: m[1][1].register_forward_hook(lambda *arguments: None),
    "a hook before": lambda m: m.register_forward_pre_hook(lambda *arguments: None),
    "another forward": lambda m: _set(m[0], "forward", lambda x: x),
    "compiled": lambda m: m[1].compile(backend="eager"),
    "a state is loaded": lambda m: m.load_state_dict(build().state_dict()),
    "a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name):
    module = build()
    watch = Watch(module)
    assert watch.same() and watch.same()
    CHANGES[name](module)
    assert not watch.same()
    assert Watch(module).same()


def test_use_is_no_change():
    module = build()
    watch = Watch(module)
    module(torch.ones(2, 3)).sum().backward()
    module.zero_grad()
    module.state_dict()
    assert watch.same()


def test_weights_of_inference_mode():
    with torch.inference_mode():
        module = build()
    watch = Watch(module)
    assert watch.same()
    module[0].weight = nn.Parameter(torch.ones(4, 3))
    assert not watch.same()


def test_derived_is_made_once_for_each_key_and_again_after_a_change():
    derived, module, made = Derived(), build(), []

    def make() -> int:
        made.append(1)
        return len(made)

    assert [derived.of(module, "a", make), derived.of(module, "a", make), derived.of(module, "b", make)] == [1, 1, 2]
    _write(module[0].weight)
    assert derived.of(module, "a", make) == 3
    assert derived.of(build(), "a", make) == 4


def test_derived_keeps_no_module():
    derived, module = Derived(), build()
    derived.of(module, "a", object)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
