"""What is derived from weights once, and again when they change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sam_fast.runtime.streams import Ready

_Made = TypeVar("_Made")


class _Value(NamedTuple):
    made_for: tuple[Any, ...]
    made: Any
    ready: Ready
    tensors: list[Tensor]  # in `made`


class Kept:
    """Values by name, each for as long as what it was made for stays the same."""

    def __init__(self, device: Callable[[], torch.device]) -> None:
        """
        Args:
            device: says where values are made; asked each time, for a model may move.
        """
        self._device = device
        self._values: dict[Hashable, _Value] = {}

    def of(self, name: Hashable, make: Callable[[], _Made], *made_for: Any) -> _Made:
        """What `make` returns, or has returned for the same `made_for`. On a GPU it may be used in any stream.

        Args:
            name: a value made for something else takes the place of the one of the same name.
            make: returns tensors, or an object that holds tensors.
            made_for: compared by ==, such as stamps of modules (`watch.stamp`).
        """
        known = self._values.get(name)
        if known is None or known.made_for != made_for:
            made, device = make(), self._device()
            tensors = list(_tensors_in(made, set())) if device.type == "cuda" else []
            known = self._values[name] = _Value(made_for, made, Ready(device), tensors)
        known.ready.wait(known.tensors)
        return known.made


def _tensors_in(value: Any, met: set[int]) -> Iterator[Tensor]:
    """The tensors of a value made of collections, modules and objects of this package; `met`: ids of parts seen."""
    if id(value) in met:
        return
    met.add(id(value))
    parts: list[Any] = []
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from (*value.parameters(), *value.buffers())
    elif isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (tuple, list)):
        parts = list(value)
    elif type(value).__module__.startswith("sam_fast."):
        parts = list(vars(value).values()) if hasattr(value, "__dict__") else []
    for part in parts:
        yield from _tensors_in(part, met)
