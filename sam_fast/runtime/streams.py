"""Tensors that are made once and then read by whoever comes: on a GPU, perhaps in another stream."""

from __future__ import annotations

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
