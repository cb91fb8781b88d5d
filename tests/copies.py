"""Counts what PyTorch copies."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_COPIES = {"clone", "copy_", "_to_copy", "cat", "stack", "index", "index_put_", "index_select", "masked_select"}


class Copies(TorchDispatchMode):
    """Bytes that copies write while this is entered, of tensors whose last sides are `sides`.

    Attributes:
        nbytes: so far.
    """

    def __init__(self, *sides: int, names: Container[str] = _COPIES) -> None:
        super().__init__()
        self._names = names
        self.nbytes = 0
        self._sides = sides
        self._listens = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self._listens and function.overloadpacket.__name__ in self._names:
            written = args[2] if function.overloadpacket.__name__ == "index_put_" else result
            if isinstance(written, Tensor) and written.shape[-len(self._sides) :] == self._sides:
                self.nbytes += written.nbytes
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Without counting."""
        before, self._listens = self._listens, False
        try:
            yield
        finally:
            self._listens = before
