"""Times of single kernels, inputs that take turns so that no cache holds them, and errors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
_CALLS = 48  # in a graph, about
_MICROSECONDS = 10_000  # that a graph takes at most, about
_REPLAYS = 5


def microseconds(calls: Sequence[Call], device: torch.device) -> float:
    """The time of one call, of several that take turns in a CUDA graph: the median of its replays.

    In a graph nobody waits for the host. On a CPU, for trying things out, it is the clock's time of one call.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        calls[0]()
        return 1e6 * (time.perf_counter() - start)
    for call in calls:
        call()
    one = _milliseconds(lambda: [call() for call in calls], device) / len(calls)
    rounds = max(1, min(-(-_CALLS // len(calls)), int(_MICROSECONDS / 1e3 / max(one, 0.005) / len(calls))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    replays = [_milliseconds(graph.replay, device) for _ in range(_REPLAYS)]
    return 1e3 * statistics.median(replays) / (rounds * len(calls))


def _milliseconds(call: Call, device: torch.device) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def turns(nbytes: int) -> range:
    """Seeds of inputs that take turns: as many as no second-level cache holds, at least two."""
    return range(max(2, min(16, -(-120_000_000 // nbytes))))


def randn(
    device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, seed: int = 0
) -> Tensor:
    """Normal numbers of a seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def error_of(got: Tensor, expected: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()
