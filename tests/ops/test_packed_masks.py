"""Packed masks: native and torch packing against the definition of the format, bit by bit."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sam_fast.ops import packed_masks
from sam_fast.ops.packed_masks import pack_masks, place_masks, row_bytes, unpack_masks, unpack_masks_apart

BACKENDS = ["native", "torch"]
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 4, 64), (2, 3, 65), (1, 2, 1023), (4, 300, 257), (0, 5, 9), (2, 0, 9), (2, 5, 0)]


def random_masks(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def expected_bits(masks: torch.Tensor) -> torch.Tensor:
    """The format by its definition: numpy packs eight pixels with the lowest bit first."""
    packed = np.packbits(masks.numpy(), axis=-1, bitorder="little")
    padding = [(0, 0)] * (masks.ndim - 1) + [(0, row_bytes(masks.shape[-1]) - packed.shape[-1])]
    return torch.from_numpy(np.pad(packed, padding))


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty in the operation returns memory full of 0xAA, so that an unwritten byte shows."""

    def empty(*args, **kwargs):
        tensor = torch.full(*args, 0, **kwargs)
        tensor.view(torch.uint8).fill_(0xAA)
        return tensor

    class PoisonedTorch:
        def __getattr__(self, name):
            return empty if name == "empty" else getattr(torch, name)

    monkeypatch.setattr(packed_masks, "torch", PoisonedTorch())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [*(shape for shape in SHAPES if len(shape) == 3), (3, 1100, 500)], ids=str)
def test_masks_apart(shape, backend, poisoned_empty):
    masks = random_masks(*shape)
    apart = unpack_masks_apart(pack_masks(masks), shape[-1], backend=backend)
    assert len(apart) == len(masks) and all(map(torch.equal, apart, masks))
    if masks.numel():
        assert len({mask.untyped_storage().data_ptr() for mask in apart}) == len(masks)


def test_masks_apart_are_a_row_of_masks():
    with pytest.raises(ValueError, match=r"\[N, H"):
        unpack_masks_apart(torch.zeros(2, 8, dtype=torch.uint8), 64)


@pytest.mark.parametrize(("width", "expected"), [(0, 0), (1, 8), (64, 8), (65, 16), (1800, 232)])
def test_row_bytes(width, expected):
    assert row_bytes(width) == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pack_and_unpack(backend, shape, poisoned_empty):
    masks = random_masks(*shape)
    bits = pack_masks(masks, backend=backend)
    assert torch.equal(bits, expected_bits(masks))
    back = unpack_masks(bits, shape[-1], backend=backend)
    assert back.dtype == torch.bool
    assert torch.equal(back.view(torch.uint8), masks.view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_dimensions(backend):
    masks = random_masks(2, 3, 4, 5, 70)
    bits = pack_masks(masks, backend=backend)
    assert bits.shape == (2, 3, 4, 5, 16)
    assert torch.equal(unpack_masks(bits, 70, backend=backend), masks)
    one = random_masks(5, 70)
    assert torch.equal(unpack_masks(pack_masks(one, backend=backend), 70, backend=backend), one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_and_odd_offsets(backend):
    masks = random_masks(70, 6, 3).permute(2, 1, 0)
    bits = pack_masks(masks, backend=backend)
    assert torch.equal(bits, expected_bits(masks.contiguous()))
    shifted = torch.empty(bits.numel() + 1, dtype=torch.uint8)[1:].view_as(bits).copy_(bits)
    assert torch.equal(unpack_masks(shifted, 70, backend=backend), masks)
    assert torch.equal(unpack_masks(bits[:, ::2], 70, backend=backend), masks[:, ::2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_bits_are_ignored(backend):
    masks = random_masks(2, 3, 67)
    bits = pack_masks(masks)
    bits[..., 9:] = 0xFF
    bits[..., 8] |= 0xF8
    assert torch.equal(unpack_masks(bits, 67, backend=backend), masks)


def test_large_batches_use_threads():
    masks = random_masks(40, 700, 601)  # above the size from which threads are used
    bits = pack_masks(masks, backend="native")
    assert torch.equal(bits, expected_bits(masks))
    assert torch.equal(unpack_masks(bits, 601, backend="native"), masks)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 15), (2, 3, 16), (2, 3, 17), (3, 7, 79), (70, 1, 1)], ids=str)
def test_gpu_packs_and_unpacks(gpu, shape, poisoned_memory):
    masks = random_masks(*shape)
    bits = pack_masks(masks.to(gpu), backend="native")
    assert bits.device.type == gpu.type
    assert torch.equal(bits.cpu(), expected_bits(masks))
    back = unpack_masks(bits, shape[-1], backend="native")
    assert torch.equal(back.cpu().view(torch.uint8), masks.view(torch.uint8))


def test_gpu_strides_padding_and_addresses(gpu):
    masks = random_masks(70, 6, 3).permute(2, 1, 0)
    bits = pack_masks(masks.to(gpu), backend="native")
    assert torch.equal(bits.cpu(), expected_bits(masks.contiguous()))
    dirty = bits.clone()
    dirty[..., 9:] = 0xFF
    dirty[..., 8] |= 0xC0
    odd = torch.empty(bits.numel() + 3, dtype=torch.uint8, device=gpu)[3:].view_as(bits).copy_(dirty)
    assert torch.equal(unpack_masks(odd, 70, backend="native").cpu(), masks)
    assert torch.equal(unpack_masks(odd[:, ::2], 70, backend="native").cpu(), masks[:, ::2])


@given(
    shape=st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 150)),
    margins=st.tuples(st.integers(0, 140), st.integers(0, 3), st.integers(0, 140), st.integers(0, 3)),
)
@settings(deadline=None, max_examples=60)
def test_masks_placed_in_a_canvas(shape, margins):
    left, top, right, bottom = margins
    masks = random_masks(*shape)
    canvas = torch.nn.functional.pad(masks, (left, right, top, bottom))
    placed = place_masks(pack_masks(masks), shape[2], tuple(canvas.shape[1:]), (left, top))
    assert torch.equal(placed, pack_masks(canvas))


@given(shape=st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(0, 300)), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_random_shapes(shape, seed):
    masks = random_masks(*shape, seed=seed)
    for backend in BACKENDS:
        bits = pack_masks(masks, backend=backend)
        assert torch.equal(bits, expected_bits(masks))
        assert torch.equal(unpack_masks(bits, shape[-1], backend=backend), masks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_are_registered_well(backend):
    masks = random_masks(2, 3, 70)
    torch.library.opcheck(torch.ops.sam_fast.pack_masks.default, (masks, backend))
    torch.library.opcheck(torch.ops.sam_fast.unpack_masks.default, (pack_masks(masks), 70, backend))


def test_compiles_as_one_graph():
    def invert(bits):
        return pack_masks(~unpack_masks(bits, 70))

    masks = random_masks(2, 3, 70)
    inverted = torch.compile(invert, fullgraph=True, backend="aot_eager")(pack_masks(masks))
    assert torch.equal(inverted, pack_masks(~masks))


def test_bad_input():
    with pytest.raises(TypeError, match=r"bool tensor, got torch\.float32"):
        pack_masks(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="bool tensor, got list"):
        pack_masks([[True]])
    with pytest.raises(ValueError, match=r"\[\.\.\., H, W\], got \[3\]"):
        pack_masks(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="uint8 tensor, got"):
        unpack_masks(torch.zeros(3, 8, dtype=torch.bool), 5)
    with pytest.raises(ValueError, match=r"65 pixels wide must be \[\.\.\., H, 16\], got \[3, 8\]"):
        unpack_masks(torch.zeros(3, 8, dtype=torch.uint8), 65)
    with pytest.raises(ValueError, match="negative"):
        unpack_masks(torch.zeros(3, 8, dtype=torch.uint8), -1)
    with pytest.raises(ValueError, match="backend must be"):
        pack_masks(torch.zeros(3, 4, dtype=torch.bool), backend="cuda")
