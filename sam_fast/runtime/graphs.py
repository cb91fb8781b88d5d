"""Functions of tensors, recorded as CUDA graphs for the shapes they meet: the host launches one thing, not hundreds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Calls functions by replaying what they launched for inputs of the same shapes and types.

    The first call for some shapes is a plain one, in which kernels are compiled and libraries take their workspaces;
    the second is recorded. Results are the caller's own: no later call writes over them. Calls may come from any thread
    and stream; those of one object follow each other, for its graphs share their memory.

    A function must launch the same work for inputs of the same shapes, wait for nothing on the host, and leave its
    inputs as they are. On a CPU, and while the caller records a graph of its own, it is simply called.
    """

    def __init__(self, most: int = 8) -> None:
        """
        Args:
            most: graphs that are kept; what was used longest ago is dropped.
        """
        self._most = most
        self._lock = threading.Lock()
        self._met: set[Hashable] = set()
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._pool: Any = None
        self._last_use: torch.cuda.Event | None = None

    def __call__(self, key: Hashable, function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What `function(*inputs)` returns; `key` stands for the function and all else that it depends on."""
        device = inputs[0].device
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return function(*inputs)
        key = key, device, *((x.shape, x.dtype) for x in inputs)
        with self._lock, torch.cuda.device(device):
            if key not in self._met:
                self._met.add(key)
                return function(*inputs)
            stream = torch.cuda.current_stream()
            if self._last_use is None:
                self._last_use = torch.cuda.Event()
            else:
                stream.wait_event(self._last_use)
            recording = self._recording(key, function, inputs)
            for own, given in zip(recording.inputs, inputs, strict=True):
                own.copy_(given)
            recording.graph.replay()
            outputs = tuple(output.clone() for output in recording.outputs)
            self._last_use.record(stream)
            return outputs

    def _recording(self, key: Hashable, function: Function, inputs: tuple[Tensor, ...]) -> _Recording:
        if key not in self._recordings:
            if len(self._recordings) == self._most:
                assert self._last_use is not None
                self._last_use.synchronize()
                self._recordings.popitem(last=False)
            self._recordings[key] = self._record(function, inputs)
        self._recordings.move_to_end(key)
        return self._recordings[key]

    def _record(self, function: Function, inputs: tuple[Tensor, ...]) -> _Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        own = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = function(*own)
        return _Recording(graph, own, outputs)
