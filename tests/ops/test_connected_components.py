"""Components and small regions: every backend against OpenCV and the official remove_small_regions."""

import importlib.util
import math
from pathlib import Path

import cv2
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sam_fast.ops import connected_components as module
from sam_fast.ops.connected_components import connected_components, remove_small_regions
from sam_fast.ops.packed_masks import pack_masks, unpack_masks

BACKENDS = ["native", "torch"]
MODES = ["holes", "islands"]


@pytest.fixture(scope="module")
def official_remove_small_regions():
    """segment_anything's function, from its file: importing the package would need torchvision."""
    package = importlib.util.find_spec("segment_anything").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("official_amg", Path(package) / "utils" / "amg.py")
    amg = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(amg)
    return amg.remove_small_regions


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty in the operation returns memory full of 0xAA, so that an unwritten byte shows."""

    def poison(tensor):
        tensor.view(torch.uint8).fill_(0xAA)
        return tensor

    class PoisonedTorch:
        def __getattr__(self, name):
            if name == "empty":
                return lambda *size, **options: poison(torch.empty(*size, **options))
            if name == "empty_like":
                return lambda other: poison(torch.empty_like(other))
            return getattr(torch, name)

    monkeypatch.setattr(module, "torch", PoisonedTorch())


def random_mask(seed: int, largest_side: int = 90) -> np.ndarray:
    """A mask [H, W] of random size: noise of any density, or blobs of any smoothness with some noise on them."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, largest_side, 2)
    noise = rng.random((height, width))
    if seed % 3 == 0:
        return noise < rng.random()
    smooth = cv2.GaussianBlur(rng.standard_normal((height, width)), (0, 0), rng.uniform(0.5, 6))
    mask = smooth > np.quantile(smooth, rng.random())
    return mask ^ (noise < 0.05) if seed % 3 == 1 else mask


def pack(mask: np.ndarray) -> torch.Tensor:
    return pack_masks(torch.from_numpy(mask)[None])


SPECIAL = {
    "empty": np.zeros((5, 70), bool),
    "full": np.ones((5, 70), bool),
    "full_words": np.ones((3, 128), bool),
    "pixel": np.ones((1, 1), bool),
    "row": (np.arange(130) % 3 != 0)[None],
    "column": (np.arange(130) % 3 != 0)[:, None],
    "checkerboard": np.indices((9, 66)).sum(0) % 2 == 0,
    "isolated": (np.indices((9, 131)) % 2 == 0).all(0),
    "diagonal": np.eye(70, dtype=bool),
    "antidiagonal_across_words": np.eye(70, dtype=bool)[:, ::-1].copy(),
    "comb": np.vstack([np.arange(99) % 2 == 0] * 7 + [np.ones(99, bool)]),
    "spiral": cv2.polylines(
        np.zeros((71, 71), np.uint8),
        [
            np.array(
                [
                    [35 + (-1) ** ((i + 1) // 2) * 2 * (i // 2), 35 + (-1) ** (i // 2) * 2 * ((i + 1) // 2)]
                    for i in range(34)
                ]
            )
        ],
        False,
        1,
    ).astype(bool),
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_equal_opencv(backend, name, poisoned_empty):
    mask = SPECIAL[name]
    labels, count = connected_components(pack(mask), mask.shape[1], backend=backend)
    n, expected = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    assert labels.dtype == torch.int32
    assert count.tolist() == [n - 1]
    assert np.array_equal(labels[0].numpy(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_random_masks_equal_opencv(backend):
    for seed in range(300 if backend == "native" else 60):
        mask = random_mask(seed)
        labels, count = connected_components(pack(mask), mask.shape[1], backend=backend)
        n, expected = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        assert count.tolist() == [n - 1], seed
        assert np.array_equal(labels[0].numpy(), expected), seed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threshold", [0, 1, 2, 30, 1e6, 30.5, math.inf])
@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_masks_equal_the_official_code(
    backend, name, threshold, mode, official_remove_small_regions, poisoned_empty
):
    mask = SPECIAL[name]
    cleaned, changed = remove_small_regions(pack(mask), mask.shape[1], threshold, mode, backend=backend)
    expected, expected_changed = official_remove_small_regions(mask, threshold, mode)
    assert changed.tolist() == [expected_changed]
    assert torch.equal(cleaned, pack(expected))


@pytest.mark.parametrize("mode", MODES)
def test_1000_random_masks_equal_the_official_code(mode, official_remove_small_regions):
    outcomes = {"changed": 0, "all_small": 0}
    for seed in range(1000):
        mask = random_mask(seed)
        threshold = int(np.random.default_rng(seed).integers(1, 60))
        cleaned, changed = remove_small_regions(pack(mask), mask.shape[1], threshold, mode, backend="native")
        expected, expected_changed = official_remove_small_regions(mask, threshold, mode)
        assert changed.tolist() == [expected_changed], seed
        assert torch.equal(cleaned, pack(expected)), seed
        if seed % 20 == 0:
            reference, flags = remove_small_regions(pack(mask), mask.shape[1], threshold, mode, backend="torch")
            assert torch.equal(reference, cleaned) and torch.equal(flags, changed), seed
        outcomes["changed"] += expected_changed
        outcomes["all_small"] += expected_changed and 0 < expected.sum() < threshold
    # The cases that differ in the code are all among the masks.
    assert 200 < outcomes["changed"] < 1000
    assert mode == "holes" or outcomes["all_small"] > 20


# ---- CUDA.


def stacked(masks: list[np.ndarray]) -> torch.Tensor:
    """Masks of any sizes as one batch, on a canvas as large as the largest."""
    height, width = max(mask.shape[0] for mask in masks), max(mask.shape[1] for mask in masks)
    canvas = np.zeros((len(masks), height, width), bool)
    for whole, mask in zip(canvas, masks, strict=True):
        whole[: mask.shape[0], : mask.shape[1]] = mask
    return torch.from_numpy(canvas)


def check_gpu(gpu, masks: torch.Tensor, thresholds, official) -> None:
    bits = pack_masks(masks, backend="torch").to(gpu)
    width = masks.shape[2]
    labels, count = connected_components(bits, width, backend="native")
    assert labels.device.type == gpu.type and labels.dtype == torch.int32 and count.dtype == torch.int64
    for i, mask in enumerate(masks.numpy()):
        n, expected = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        assert int(count[i]) == n - 1, i
        assert np.array_equal(labels[i].cpu().numpy(), expected), i
    for threshold in thresholds:
        for mode in MODES:
            cleaned, changed = remove_small_regions(bits, width, threshold, mode, backend="native")
            for i, mask in enumerate(masks.numpy()):
                expected, expected_changed = official(mask, threshold, mode)
                assert bool(changed[i]) == expected_changed, (i, mode, threshold)
                packed = pack_masks(torch.from_numpy(expected)[None], backend="torch")[0]
                assert torch.equal(cleaned[i].cpu(), packed), (i, mode, threshold)


@pytest.mark.parametrize("name", SPECIAL)
def test_gpu_special_masks(gpu, name, official_remove_small_regions, poisoned_memory):
    masks = torch.from_numpy(SPECIAL[name])[None]
    check_gpu(gpu, masks, [0, 1, 2, 30, 1e6, 30.5, math.inf], official_remove_small_regions)


@pytest.mark.parametrize("batch", range(6))
def test_gpu_random_masks(gpu, batch, official_remove_small_regions, poisoned_memory):
    masks = stacked(
        [random_mask(seed, (24, 40, 66, 70, 90, 140)[batch]) for seed in range(10 * batch, 10 * batch + 10)]
    )
    check_gpu(gpu, masks, [7, 40], official_remove_small_regions)


def test_gpu_equal_islands_workspace_parts_and_addresses(gpu, official_remove_small_regions, monkeypatch):
    mask = np.zeros((4, 80), bool)
    mask[0, 70:73] = mask[1, 3:6] = mask[3, 0:3] = True
    monkeypatch.setattr(module, "_WORKSPACE_BYTES", 2 * 8 * 2 * 40)  # two masks at a time
    check_gpu(
        gpu,
        torch.from_numpy(np.stack([mask, mask[:, ::-1], mask[::-1], ~mask, mask])),
        [10],
        official_remove_small_regions,
    )
    bits = pack_masks(torch.from_numpy(mask)[None], backend="torch")
    bits[..., 10:] = 0xFF
    odd = torch.empty(bits.numel() + 1, dtype=torch.uint8, device=gpu)[1:].view_as(bits).copy_(bits)
    cleaned, _ = remove_small_regions(odd, 80, 10, "islands", backend="native")
    expected, _ = official_remove_small_regions(mask, 10, "islands")
    assert torch.equal(cleaned[0].cpu(), pack_masks(torch.from_numpy(expected), backend="torch"))


def test_gpu_nothing_to_do(gpu):
    for shape in ((0, 5, 9), (2, 0, 9), (2, 5, 0)):
        bits = pack_masks(torch.zeros(shape, dtype=torch.bool), backend="torch").to(gpu)
        labels, count = connected_components(bits, shape[2], backend="native")
        assert labels.shape == shape and count.tolist() == [0] * shape[0]
        for mode in MODES:
            cleaned, changed = remove_small_regions(bits, shape[2], 5, mode, backend="native")
            assert cleaned.shape == bits.shape and changed.tolist() == [False] * shape[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_islands_keep_opencvs_first(backend, official_remove_small_regions):
    # The lower island begins in an earlier block of 2 x 2 pixels than the upper one, so OpenCV numbers it first.
    mask = np.zeros((4, 80), bool)
    mask[0, 70:73] = mask[1, 3:6] = mask[3, 0:3] = True
    expected, _ = official_remove_small_regions(mask, 10, "islands")
    assert expected[1, 3:6].all() and expected.sum() == 3
    cleaned, changed = remove_small_regions(pack(mask), 80, 10, "islands", backend=backend)
    assert changed.tolist() == [True]
    assert torch.equal(cleaned, pack(expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_non_contiguous_bits_and_dirty_padding(backend, mode, official_remove_small_regions):
    masks = np.random.default_rng(0).random((9, 24, 67)) < np.linspace(0.05, 0.95, 9)[:, None, None]
    bits = pack_masks(torch.from_numpy(masks))
    bits[..., 9:] = 0xFF
    bits[..., 8] |= 0xF8
    cleaned, changed = remove_small_regions(bits[::2, 1:], 67, 8, mode, backend=backend)
    for mask, ours, flag in zip(masks[::2, 1:], cleaned, changed, strict=True):
        expected, expected_changed = official_remove_small_regions(mask, 8, mode)
        assert bool(flag) == expected_changed
        assert torch.equal(ours[None], pack(expected))  # padding bits are 0 again
    labels, count = connected_components(bits, 67, backend=backend)
    for mask, ours, n in zip(masks, labels, count.tolist(), strict=True):
        expected_n, expected = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        assert n == expected_n - 1
        assert np.array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("mode", MODES)
def test_large_batches_use_threads(mode, official_remove_small_regions):
    fields = np.random.default_rng(0).random((11, 700, 601))  # above the size from which threads are used
    masks = np.stack([cv2.blur(field, (5, 5)) > 0.4 + 0.02 * i for i, field in enumerate(fields)])
    cleaned, changed = remove_small_regions(pack_masks(torch.from_numpy(masks)), 601, 50, mode, backend="native")
    assert changed.all()
    for mask, ours in zip(masks, cleaned, strict=True):
        assert torch.equal(ours[None], pack(official_remove_small_regions(mask, 50, mode)[0]))


@pytest.mark.parametrize("shape", [(0, 5, 9), (2, 0, 9), (2, 5, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend, shape):
    bits = pack_masks(torch.zeros(shape, dtype=torch.bool))
    labels, count = connected_components(bits, shape[2], backend=backend)
    assert labels.shape == shape
    assert count.tolist() == [0] * shape[0]
    for mode in MODES:
        cleaned, changed = remove_small_regions(bits, shape[2], 5, mode, backend=backend)
        assert torch.equal(cleaned, bits)
        assert changed.tolist() == [False] * shape[0]


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 25), st.integers(1, 150)),
    density=st.sampled_from([0.1, 0.4, 0.6, 0.9]),
    threshold=st.integers(0, 20),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_random_shapes(shape, density, threshold, mode, seed):
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    bits = pack_masks(masks)
    for ours, reference in zip(
        remove_small_regions(bits, shape[2], threshold, mode, backend="native"),
        remove_small_regions(bits, shape[2], threshold, mode, backend="torch"),
        strict=True,
    ):
        assert torch.equal(ours, reference)
    for ours, reference in zip(*(connected_components(bits, shape[2], backend=b) for b in BACKENDS), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_are_registered_well(backend):
    bits = pack(SPECIAL["checkerboard"])
    torch.library.opcheck(torch.ops.sam_fast.connected_components.default, (bits, 66, backend))
    torch.library.opcheck(torch.ops.sam_fast.remove_small_regions.default, (bits, 66, 3.0, "holes", backend))


def test_the_reference_does_not_depend_on_memory_that_nobody_wrote(monkeypatch):
    """New memory may hold just what an equal call left there."""
    bits = pack(SPECIAL["checkerboard"])
    expected = connected_components(bits, 66, backend="native")
    monkeypatch.setattr(torch, "empty_like", torch.clone)
    for ours, theirs in zip(connected_components(bits, 66, backend="torch"), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_compiles_as_one_graph():
    def clean(bits):
        filled, changed = remove_small_regions(bits, 70, 4, "holes")
        labels, _ = connected_components(filled, 70)
        return unpack_masks(filled, 70), labels, changed

    masks = torch.rand((2, 20, 70), generator=torch.Generator().manual_seed(0)) < 0.7
    bits = pack_masks(masks)
    for compiled, eager in zip(
        torch.compile(clean, fullgraph=True, backend="aot_eager")(bits), clean(bits), strict=True
    ):
        assert torch.equal(compiled, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    bits = torch.zeros(1, 4, 8, dtype=torch.uint8)
    with pytest.raises(TypeError, match="uint8 tensor, got"):
        connected_components(bits.bool(), 5, backend=backend)
    with pytest.raises(ValueError, match=r"\[N, H, 8\], got \[4, 8\]"):
        connected_components(bits[0], 5, backend=backend)
    with pytest.raises(ValueError, match=r"\[N, H, 16\], got \[1, 4, 8\]"):
        remove_small_regions(bits, 65, 3, "holes", backend=backend)
    with pytest.raises(ValueError, match="mode must be 'holes' or 'islands', got 'hole'"):
        remove_small_regions(bits, 5, 3, "hole", backend=backend)
    with pytest.raises(ValueError, match="got nan"):
        remove_small_regions(bits, 5, math.nan, "holes", backend=backend)
    huge = bits[:, :1].expand(1, 2**29, 8)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 pixels, got 536870912 x 5"):
        connected_components(huge, 5, backend=backend)
