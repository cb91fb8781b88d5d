"""What the host and the streams of a GPU must know of each other's tensors; on a CPU there is nothing to wait for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_MOST_BYTES = 64 << 20  # that are on their way to the host in one copy, or a little more
_MOST_COPIES = 2  # at a time


def upload(values: Any, device: torch.device) -> Tensor:
    """A tensor of `values` (a list, an array) on a device; the host does not wait for it."""
    tensor = torch.as_tensor(values, device="cpu")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Ready:
    """When tensors that the current stream is computing may be read; on a CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._told: set[int] = set()  # streams that the memory of tensors is kept for
        if self._stream is not None:
            self._event = torch.cuda.Event()
            self._event.record(self._stream)

    def wait(self, tensors: Iterable[Tensor] = ()) -> None:
        """Make the current stream wait, and keep the memory of `tensors` from being reused before it is done.

        Args:
            tensors: the same at each call; PyTorch is told of them once for each stream.
        """
        if self._stream is None or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self._stream.device)
        if stream != self._stream:
            stream.wait_event(self._event)
            if stream.cuda_stream not in self._told:
                for tensor in tensors:
                    tensor.record_stream(stream)
                self._told.add(stream.cuda_stream)


class Number:
    """An integer that a GPU computes, on its way to the host: `int` waits for it, and for nothing launched later."""

    def __init__(self, number: Tensor) -> None:
        self._on_host = number.to("cpu", non_blocking=True)
        self._ready: torch.cuda.Event | None = None
        if number.is_cuda:
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(number.device))

    def __int__(self) -> int:
        if self._ready is not None:
            self._ready.synchronize()
        return int(self._on_host)


class Download:
    """Tensors on their way to the host: packed into one buffer, copied together and waited for once, in `finish`.

    Of more than 64 MB several copies are made, of which two at most are under way, so that memory is bounded. On a CPU
    tensors arrive as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._copies = device.type != "cpu"
        self._packed: list[tuple[Sequence[Tensor], Callable[..., None]]] = []
        self._under_way: deque[tuple[Tensor, torch.cuda.Event | None, list]] = deque()

    def add(self, tensors: Sequence[Tensor], receive: Callable[..., None]) -> None:
        """Have `receive(*tensors)` called with them on the host, in the order of these calls.

        What it gets lies in memory of the copy, and should not be kept.
        """
        self._packed.append((tensors, receive))
        if sum(tensor.nbytes for some, _ in self._packed for tensor in some) > _MOST_BYTES:
            self.start()

    def start(self) -> None:
        """Let what was added so far leave; on a CPU it arrives at once."""
        if not self._copies:
            while self._packed:
                tensors, receive = self._packed.pop(0)
                receive(*tensors)
        if not self._packed:
            return
        if len(self._under_way) == _MOST_COPIES:
            self._arrive()
        packed = _pack([tensor for tensors, _ in self._packed for tensor in tensors])
        staged, ready = packed, None
        if packed.is_cuda:
            # PyTorch keeps pinned memory for the next copy.
            staged = torch.empty(packed.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
            staged.copy_(packed, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(packed.device))
        shapes = [([(t.dtype, t.shape) for t in tensors], receive) for tensors, receive in self._packed]
        self._under_way.append((staged, ready, shapes))
        self._packed = []

    def finish(self) -> None:
        """Wait until all has been received; any thread may, after `start`."""
        self.start()
        while self._under_way:
            self._arrive()

    def _arrive(self) -> None:
        staged, ready, shapes = self._under_way.popleft()
        if ready is not None:
            ready.synchronize()
        received = iter(_unpack(staged, [one for some, _ in shapes for one in some]))
        for some, receive in shapes:
            receive(*(next(received) for _ in some))


def _order(dtypes: Iterable[torch.dtype]) -> list[int]:
    """Wide elements first: then each tensor begins at a multiple of its elements' size."""
    return [i for i, _ in sorted(enumerate(dtypes), key=lambda item: -item[1].itemsize)]


def _pack(tensors: list[Tensor]) -> Tensor:
    """The bytes of tensors, in one."""
    order = _order(tensor.dtype for tensor in tensors)
    # Strides are named: those of a dimension of one element may be anything.
    return torch.cat([tensors[i].contiguous().as_strided((tensors[i].numel(),), (1,)).view(torch.uint8) for i in order])


def _unpack(packed: Tensor, like: list[tuple[torch.dtype, torch.Size]]) -> list[Tensor]:
    """The tensors that `_pack` got, by type and shape; views of `packed`."""
    tensors: list[Tensor] = [packed] * len(like)
    begin = 0
    for i in _order(dtype for dtype, _ in like):
        dtype, shape = like[i]
        end = begin + shape.numel() * dtype.itemsize
        tensors[i] = packed[begin:end].view(dtype).view(shape)
        begin = end
    return tensors
