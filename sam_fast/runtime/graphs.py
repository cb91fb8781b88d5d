"""A function of a tensor, recorded as a CUDA graph for each shape it meets: the host launches one thing, not 200."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MOST_GRAPHS = 8  # of one function; what was used longest ago is dropped


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    input: Tensor
    output: Tensor


class Graphed:
    """Calls `function` by replaying what it launched for an input of the same shape, type and device.

    Results are the caller's own: no later call writes over them. Calls may come from any thread and stream; those of
    one object follow each other, for its graphs share their memory.

    The function must launch the same work for inputs of one shape, wait for nothing on the host, and leave its input
    as it is. On a CPU, and while the caller records a graph of its own, it is simply called.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self._lock = threading.Lock()
        self._recordings: OrderedDict[tuple[object, ...], _Recording] = OrderedDict()
        self._pool: Any = None
        self._last_use: torch.cuda.Event | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return self.function(x)
        with self._lock, torch.cuda.device(x.device):
            recording = self._recording(x)
            stream = torch.cuda.current_stream()
            if self._last_use is None:
                self._last_use = torch.cuda.Event()
            else:
                stream.wait_event(self._last_use)
            recording.input.copy_(x)
            recording.graph.replay()
            output = recording.output.clone()
            self._last_use.record(stream)
            return output

    def _recording(self, x: Tensor) -> _Recording:
        key = x.device, x.shape, x.dtype
        known = self._recordings.get(key)
        if known is None:
            if len(self._recordings) == _MOST_GRAPHS:
                assert self._last_use is not None
                self._last_use.synchronize()
                self._recordings.popitem(last=False)
            known = self._recordings[key] = self._record(x)
        self._recordings.move_to_end(key)
        return known

    def _record(self, x: Tensor) -> _Recording:
        # Kernels are compiled, and libraries take their workspaces, before the recording, where neither may happen.
        given = x.clone(memory_format=torch.contiguous_format)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.function(given)
        current.wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self.function(given)
        return _Recording(graph, given, output)
