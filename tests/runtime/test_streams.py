"""Uploads and downloads. Streams need a GPU; how tensors are packed, and in which order they arrive, does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam_fast.runtime import streams
from sam_fast.runtime.streams import Download, upload

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture(params=["as they are", "packed"])
def download(request, device) -> Download:
    """On a CPU either as it is, or packed as for a GPU."""
    download = Download(torch.device(device))
    if request.param == "packed":
        download._copies = True
    elif device == "cuda":
        pytest.skip("a GPU's tensors are packed")
    return download


def some_tensors(device: str) -> list[torch.Tensor]:
    """Odd numbers of bytes before wide elements, nothing at all, a scalar, strides."""
    return [
        torch.tensor([True, False, True], device=device),
        torch.arange(5, device=device),
        torch.empty(0, 4, dtype=torch.float64, device=device),
        torch.tensor(2.5, device=device),
        torch.rand(3, 7, dtype=torch.float64, device=device).T,
        torch.arange(7, dtype=torch.uint8, device=device)[1:],
        torch.tensor([[1.5, float("nan")]], dtype=torch.float16, device=device),
        torch.arange(3, device=device)[:1].expand(4, 1),
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_arrive_as_they_were(download, device):
    tensors, received = some_tensors(device), []
    download.add(tensors[:3], lambda *some: received.extend(t.clone() for t in some))
    download.add((), lambda: received.append(None))
    download.add(tensors[3:], lambda *some: received.extend(t.clone() for t in some))
    download.finish()
    assert received.pop(3) is None
    for got, expected in zip(received, tensors, strict=True):
        assert got.device.type == "cpu" and got.dtype == expected.dtype and got.shape == expected.shape
        np.testing.assert_array_equal(got.numpy(), expected.cpu().numpy())


@pytest.mark.parametrize("device", DEVICES)
def test_much_goes_in_several_copies_and_in_order(download, device, monkeypatch):
    monkeypatch.setattr(streams, "_MOST_BYTES", 100)
    received: list[int] = []
    for i in range(10):
        download.add([torch.full((40,), i, dtype=torch.uint8, device=device)], lambda t: received.append(int(t[-1])))
        assert len(download._under_way) <= 2
    download.finish()
    assert received == list(range(10))
    download.finish()
    assert received == list(range(10))


@pytest.mark.parametrize("device", DEVICES)
def test_upload(device):
    for values in ([[1, 2], [3, 4]], np.arange(6.0).reshape(3, 2)):
        tensor = upload(values, torch.device(device))
        assert tensor.device.type == device and tensor.dtype == torch.as_tensor(values).dtype
        np.testing.assert_array_equal(tensor.cpu().numpy(), values)
