"""What the host and the streams of a GPU must know of each other's tensors; on a CPU there is nothing to wait for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor


class Ready:
    """When tensors that the current stream is computing may be read; on a CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._event = torch.cuda.Event()
            self._event.record(self._stream)

    def wait(self, tensors: Iterable[Tensor] = ()) -> None:
        """Make the current stream wait, and keep the memory of `tensors` from being reused before it is done."""
        if self._stream is None or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self._stream.device)
        if stream != self._stream:
            stream.wait_event(self._event)
            for tensor in tensors:
                tensor.record_stream(stream)


class FirstRows:
    """Collects the first rows of tensors, where a GPU computes how many.

    The host learns a number two tensors later, when it need not wait for it, and then gives the memory of the other
    rows back.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Tensor, torch.cuda.Event | None]] = deque()
        self._cut: list[Tensor] = []

    def add(self, rows: Tensor, count: Tensor) -> None:
        """Keep the first `count` (a tensor of one integer) of `rows`."""
        count = count.to("cpu", non_blocking=True)
        ready = None
        if rows.is_cuda:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(rows.device))
        self._waiting.append((rows, count, ready))
        if len(self._waiting) > 2:
            self._cut_first()

    def concatenated(self) -> Tensor:
        """All that was kept, in order."""
        while self._waiting:
            self._cut_first()
        return torch.cat(self._cut)

    def _cut_first(self) -> None:
        rows, count, ready = self._waiting.popleft()
        if ready is not None:
            ready.synchronize()
        self._cut.append(rows[: int(count)].clone())
