"""Notices when a module is no longer what it was, in microseconds: what was derived from it must then be made anew."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_Made = TypeVar("_Made")


class Watch:
    """A module's layers and weights as they are now, all of them, with what they contain.

    It holds them weakly enough: what is remembered are parts of the module, not the module. What is written through
    `.data` PyTorch does not count, and it goes unnoticed.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self._parts, self._types = parts[1:], [type(part) for part in parts[1:]]
        self._root, self._root_type = weakref.ref(module), type(module)
        self._dicts = [part.__dict__ for part in parts]
        self._child_dicts = [part._modules for part in parts]
        self._children = self._current_children()
        self._tensor_dicts = [d for part in parts for d in (part._parameters, part._buffers)]
        self._tensors = self._current_tensors()
        self._present = [tensor for tensor in self._tensors if tensor is not None]
        self._versioned = [tensor for tensor in self._present if not torch.is_inference(tensor)]
        self._state = self._current_state()
        self._callers = self._current_callers()

    def same(self) -> bool:
        """Whether nothing was replaced, moved, written to, hooked or compiled since."""
        children, tensors = self._current_children(), self._current_tensors()
        return (
            len(children) == len(self._children)
            and all(map(is_, children, self._children))
            and len(tensors) == len(self._tensors)
            and all(map(is_, tensors, self._tensors))
            and type(self._root()) is self._root_type
            and [type(part) for part in self._parts] == self._types
            and self._current_state() == self._state
            and self._current_callers() == self._callers
        )

    def _current_children(self) -> list[Any]:
        return [child for d in self._child_dicts if d for child in d.values()]

    def _current_tensors(self) -> list[Any]:
        return [tensor for d in self._tensor_dicts if d for tensor in d.values()]  # most are empty

    def _current_state(self) -> tuple[list[int], list[int]]:
        """Where each tensor lies, and how often it was written to."""
        return list(map(Tensor.data_ptr, self._present)), [tensor._version for tensor in self._versioned]

    def _current_callers(self) -> list[Any]:
        """Hooks, functions put in the place of `forward`, and compiled ones, of each part."""
        return [
            (len(d["_forward_hooks"]), len(d["_forward_pre_hooks"]), d.get("forward"), d.get("_compiled_call_impl"))
            for d in self._dicts
        ]


class Derived:
    """Values that are made from a module once, and again when it has changed."""

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[nn.Module, tuple[Watch, dict[Any, Any]]] = weakref.WeakKeyDictionary()

    def of(self, module: nn.Module, key: Any, make: Callable[[], _Made]) -> _Made:
        """What `make` returns, or returned for this key when the module was the same as now."""
        known = self._kept.get(module)
        if known is None or not known[0].same():
            known = self._kept[module] = Watch(module), {}
        values = known[1]
        if key not in values:
            values[key] = make()
        return values[key]


def _count_writes(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """PyTorch does not count what a fused optimiser writes to weights."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for weight in group["params"]:
                torch.autograd.graph.increment_version(weight)


register_optimizer_step_post_hook(_count_writes)
_stamps = Derived()


def stamp(module: nn.Module) -> object:
    """An object that stays the same one for as long as the module is the same, and is never that of another."""
    return _stamps.of(module, "stamp", object)
