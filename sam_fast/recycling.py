"""Memory of masks that nobody holds any more, for the masks of the next call.

The masks of one image take a hundred megabytes. A system that is asked for so much anew clears it page by page, and
takes it back page by page when they are dropped: together that takes longer than to write the masks.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LEAST_BYTES = 1 << 17  # of less, malloc of glibc asks the system seldom
MOST_BYTES = 256 << 20  # that are kept in all while nobody uses them: the masks of an image or two


class Taken(NamedTuple):
    """A bool tensor of undefined values, and whether the system may still have to provide the memory behind it."""

    tensor: Tensor
    fresh: bool


class Recycler:
    """Hands out memory that comes back by itself, when the last array or tensor that refers to it is gone.

    Any thread may call it. What has been back for longest is given up first.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        """
        Args:
            most_bytes: that are kept while they are not used.
        """
        self._most_bytes = most_bytes
        self.forget()

    def forget(self) -> None:
        """Begin anew, as a new process must: of a thread that was at work here nothing but its traces came along."""
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, list[np.ndarray]] = OrderedDict()  # by their bytes; sizes in use of late are last
        self._returned: deque[np.ndarray] = deque()  # what came back while the lock was held, not yet sorted in

    def take(self, shape: Sequence[int]) -> Taken:
        """A bool tensor on the CPU whose values are undefined."""
        size = math.prod(shape)
        if size < LEAST_BYTES:
            return Taken(torch.empty(tuple(shape), dtype=torch.bool, device="cpu"), True)
        with self._lock:
            self._sort_in()
            memory = self._pop(size, -1) if size in self._kept else None
        fresh = memory is None
        if memory is None:
            memory = np.empty(size, dtype=np.uint8)
        return Taken(torch.from_numpy(np.asarray(_Loan(memory, tuple(shape), self._take_back))), fresh)

    @property
    def kept_bytes(self) -> int:
        """How many bytes wait for their next use."""
        with self._lock:
            self._sort_in()
            return self._bytes()

    def _take_back(self, memory: np.ndarray) -> None:
        """Never waits: it is called wherever the last reference goes, even within `take`, if garbage is collected."""
        self._returned.append(memory)
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    # -- with the lock held

    def _sort_in(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            self._kept.setdefault(memory.nbytes, []).append(memory)
            self._kept.move_to_end(memory.nbytes)
        while self._bytes() > self._most_bytes:
            self._pop(next(iter(self._kept)), 0)

    def _bytes(self) -> int:
        return sum(size * len(blocks) for size, blocks in self._kept.items())

    def _pop(self, size: int, index: int) -> np.ndarray:
        memory = self._kept[size].pop(index)
        if not self._kept[size]:
            del self._kept[size]
        return memory


class _Loan:
    """What an array of borrowed memory, and thereby each view of it, refers to as its owner."""

    def __init__(self, memory: np.ndarray, shape: tuple[int, ...], take_back: Callable[[np.ndarray], None]) -> None:
        self._memory = memory
        self._take_back = take_back
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": "|b1", "data": (memory.ctypes.data, False)}

    def __del__(self) -> None:
        self._take_back(self._memory)


masks = Recycler()  # of this process: predictors and generators share what is kept
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=masks.forget)
