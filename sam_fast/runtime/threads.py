"""Many prompts on a CPU: one per thread, rather than all threads on one operation after the other.

A prompt's tokens are few, and operations on them are over before a second core has begun.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_MOST_WORKERS = 8  # more would wait for Python's lock; further threads work inside the operations
_pools: dict[tuple[int, int, int], ThreadPoolExecutor] = {}
_lock = threading.Lock()


def in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Return [function(item) for item in items], without gradients and with all of `torch.get_num_threads()` busy."""
    threads = torch.get_num_threads()
    workers = min(threads, len(items), _MOST_WORKERS)
    if workers < 2:
        return [function(item) for item in items]

    def run(item: _Item) -> _Result:
        with torch.no_grad():  # a property of the thread
            return function(item)

    return list(_pool(workers, threads // workers, threads).map(run, items))


def _pool(workers: int, threads: int, callers: int) -> ThreadPoolExecutor:
    """Workers whose operations use `threads` threads each; kept for the life of the process, not of its forks."""
    key = os.getpid(), workers, threads
    with _lock:
        if key not in _pools:
            started = threading.Barrier(workers + 1)

            def begin() -> None:
                torch.set_num_threads(threads)  # of this thread, and of threads that are still to come
                torch.get_num_threads()  # else the first operation would ask for the number again
                started.wait()

            pool = ThreadPoolExecutor(workers, thread_name_prefix="sam_fast", initializer=begin)
            for _ in range(workers):
                pool.submit(int)
            started.wait()
            torch.set_num_threads(callers)
            _pools[key] = pool
        return _pools[key]
