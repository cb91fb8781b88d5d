"""Which recordings are kept, where CUDA does nothing; on a GPU, see TestGraphs in test_packed_encoder.py."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_fast.runtime.graphs import Graphs


class OnCuda(Tensor):
    """A tensor on the CPU that says otherwise."""

    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]


class Nothing:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


@pytest.fixture(autouse=True)
def cuda_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDAGraph", "Event", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    for name in ("graph", "device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def double(x: Tensor) -> tuple[Tensor]:
    return (2 * x,)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_recordings_serve_all_modes(first, then):
    graphs, x = Graphs(), torch.ones(3).as_subclass(OnCuda)
    with first():
        for _ in range(2):
            graphs("double", double, x)
    assert len(graphs._recordings) == 1
    with then():
        graphs("double", double, x)
    assert len(graphs._recordings) == 1


def test_what_was_used_longest_ago_is_dropped():
    graphs = Graphs(most=3)
    for size in (1, 2, 3, 1, 4):
        for _ in range(2):
            graphs("double", double, torch.ones(size).as_subclass(OnCuda))
    assert [key[2][0] for key in graphs._recordings] == [(3,), (1,), (4,)]
