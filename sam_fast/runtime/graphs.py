"""Functions of tensors, recorded as CUDA graphs for the shapes they meet: the host launches one thing, not hundreds."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]

_recording_lock = threading.Lock()  # a recording begins by waiting for the device, which would call off another one


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Calls functions by replaying what they launched for inputs of the same shapes and types.

    The first call for some shapes is a plain one, in which kernels are compiled; the second is recorded, after a plain
    one in the same thread: handles of cuBLAS and cuDNN belong to threads and cannot be made within a recording. Results
    are the caller's own: no later call writes over them. Calls may come from any thread and stream; those of one object
    follow each other, for its graphs share their memory.

    A recording fails where another thread waits for the whole device meanwhile (`torch.cuda.synchronize`). The call is
    a plain one then, with a warning, and the next one records anew.

    A function must launch the same work for inputs of the same shapes, wait for nothing on the host, and leave its
    inputs as they are. On a CPU, and while the caller records a graph of its own, it is simply called.

    Results that are large and read once need not be copied: see `finish`.
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
        self._stream: torch.cuda.Stream | None = None  # of recordings only: cuBLAS has a workspace for each stream
        self._last_use: torch.cuda.Event | None = None

    def __call__(
        self, key: Hashable, function: Function, *inputs: Tensor, finish: Function | None = None
    ) -> tuple[Tensor, ...]:
        """What `finish(*function(*inputs))` returns, and without `finish` what the function does.

        Args:
            key: stands for the function and all else that it depends on.
            function: is recorded.
            inputs: on one device.
            finish: is called each time, in the stream of the caller, with results that the next call writes over. What
                it returns is handed on as it is, and must be in memory of its own.
        """

        def plain() -> tuple[Tensor, ...]:
            results = function(*inputs)
            return results if finish is None else finish(*results)

        device = inputs[0].device
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return plain()
        key = key, device, *((x.shape, x.dtype) for x in inputs)
        with self._lock, torch.cuda.device(device):
            if key not in self._met:
                self._met.add(key)
                return plain()
            stream = torch.cuda.current_stream()
            if self._last_use is None:
                self._last_use = torch.cuda.Event()
            else:
                stream.wait_event(self._last_use)
            try:
                recording = self._recording(key, function, inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph could be recorded, the call is a plain one: {error}", stacklevel=2)
                return plain()
            try:
                for own, given in zip(recording.inputs, inputs, strict=True):
                    own.copy_(given)
                recording.graph.replay()
                return (finish or _copies)(*recording.outputs)
            finally:  # after an error too, lest the next call write over what is still being read
                self._last_use.record(stream)

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
        with torch.inference_mode(False), torch.no_grad():  # or calls outside of that mode could not write to them
            own = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        function(*own)
        graph = torch.cuda.CUDAGraph()
        with _recording_lock, torch.cuda.stream(torch.cuda.current_stream()):  # the stream returns after an error too
            if self._pool is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
            try:
                with torch.cuda.graph(graph, **options):
                    outputs = function(*own)
            except BaseException:
                self._close_pool(inputs[0].device)
                raise
        return _Recording(graph, own, outputs)

    def _close_pool(self, device: torch.device) -> None:
        """After an error: PyTorch may have left the pool open, in which state its allocator takes no memory back."""
        with contextlib.suppress(RuntimeError):  # it was closed
            torch._C._cuda_endAllocateToPool(device.index, self._pool)
            torch._C._cuda_releasePool(device.index, self._pool)
        self._pool = None


def _copies(*results: Tensor) -> tuple[Tensor, ...]:
    return tuple(result.clone() for result in results)
