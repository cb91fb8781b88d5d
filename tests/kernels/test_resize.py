"""The kernels of resizing at the edges of their tiles, and far from the beginning of memory."""

from __future__ import annotations

import pytest
import torch
from sam_fast.kernels import resize as kernels
from sam_fast.kernels.launch import unavailable_reason

from sam_fast.ops.resize import _resize_axis, _table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GUARD = 173


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 2 rows of 16, that a small image is many of."""
    monkeypatch.setattr(kernels, "_ROWS", 2)
    monkeypatch.setattr(kernels, "_COLUMNS", 16)


def noise(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).to(DEVICE)


def guarded(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of a constant, and what lies around it in memory."""
    memory = torch.full((2 * 64 + shape[0] * shape[1] * shape[2],), GUARD, dtype=torch.uint8, device=DEVICE)
    return memory[64:-64].view(shape), memory


def test_kernels_can_run_here():
    assert unavailable_reason(DEVICE.type) is None


@pytest.mark.parametrize("vertical", [True, False], ids=["vertical", "horizontal"])
@pytest.mark.parametrize(
    ("source", "target"),
    [(1, 1), (1, 9), (4, 1), (3, 4), (5, 4), (7, 5), (5, 11), (17, 2)],
)
@pytest.mark.parametrize("other", [1, 2, 3, 6])
def test_one_axis(source, target, other, vertical, small_tiles):
    """A tile is 5 pixels wide, and one byte."""
    image = noise(source, other) if vertical else noise(other, source)
    expected = _resize_axis(image, 0 if vertical else 1, target)
    output, memory = guarded(*expected.shape)
    kernels.resize_axis(output, image, _table(source, target, DEVICE), vertical)
    assert torch.equal(output, expected)
    assert (memory[:64] == GUARD).all() and (memory[-64:] == GUARD).all()


@pytest.mark.parametrize("vertical", [True, False], ids=["vertical", "horizontal"])
@pytest.mark.parametrize(("target", "other", "side"), [(17, 2, 17), (16, 5, 18), (3, 17, 18), (1, 1, 3)])
def test_preprocess_fills_every_tile(target, other, side, vertical, small_tiles):
    """Mean 0 and deviation 1: pixels are the bytes, zero around them."""
    image = noise(7, other) if vertical else noise(other, 7)
    resized = _resize_axis(image, 0 if vertical else 1, target)
    pixels = torch.full((3, side, side), torch.nan, device=DEVICE)
    zero, one = (torch.full((3, 1, 1), value, device=DEVICE) for value in (0.0, 1.0))
    kernels.preprocess(pixels, image, _table(7, target, DEVICE), zero, one, vertical, reverse=True)
    expected = torch.zeros_like(pixels)
    expected[:, : resized.shape[0], : resized.shape[1]] = resized.permute(2, 0, 1).flip(0)
    assert torch.equal(pixels, expected)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs 7 GB of memory, and the interpreter hours")
def test_offsets_beyond_32_bits():
    image = torch.zeros(28000, 26000, 3, dtype=torch.uint8, device=DEVICE)
    image[-20:] = 200
    expected = _resize_axis(image[-40:], 1, 100)[-10:]
    output = torch.empty(28000, 100, 3, dtype=torch.uint8, device=DEVICE)
    kernels.resize_axis(output, image, _table(26000, 100, DEVICE), False)
    assert torch.equal(output[-10:], expected)
