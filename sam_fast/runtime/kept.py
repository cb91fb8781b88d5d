"""What is derived from weights once, and again when they change."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from sam_fast.runtime.streams import Ready

_Made = TypeVar("_Made")


class Kept:
    """Values by name, each for as long as what it was made for stays the same."""

    def __init__(self, device: Callable[[], torch.device]) -> None:
        """
        Args:
            device: says where values are made; asked each time, for a model may move.
        """
        self._device = device
        self._values: dict[Hashable, tuple[tuple[Any, ...], Any, Ready]] = {}

    def of(self, name: Hashable, make: Callable[[], _Made], *made_for: Any) -> _Made:
        """What `make` returns, or has returned for the same `made_for`. On a GPU it may be used in any stream.

        Args:
            name: a value made for something else takes the place of the one of the same name.
            make: returns a tensor, a tuple of tensors, or anything that does not depend on a stream.
            made_for: compared by ==, such as stamps of modules (`watch.stamp`).
        """
        known = self._values.get(name)
        if known is None or known[0] != made_for:
            known = self._values[name] = made_for, make(), Ready(self._device())
        made, ready = known[1:]
        if isinstance(made, Tensor):
            ready.wait([made])
        elif isinstance(made, tuple) and all(isinstance(part, Tensor) for part in made):
            ready.wait(made)
        else:
            ready.wait()
        return made
