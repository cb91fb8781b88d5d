"""Memory of masks is used again, and never while anybody can still see it."""

import gc
import os
import signal
import threading

import numpy as np
import pytest
import torch

from sam_fast import recycling
from sam_fast.ops.packed_masks import pack_masks, unpack_masks_apart
from sam_fast.recycling import LEAST_BYTES, Recycler

SHAPE = (2, LEAST_BYTES)  # of which no other is kept by the recyclers of these tests
SIZE = 2 * LEAST_BYTES


def test_memory_is_used_again():
    recycler = Recycler()
    first = recycler.take(SHAPE)
    address = first.tensor.data_ptr()
    assert first.fresh and first.tensor.shape == SHAPE and first.tensor.dtype == torch.bool
    assert recycler.kept_bytes == 0
    del first
    assert recycler.kept_bytes == SIZE
    second = recycler.take(SHAPE[::-1])  # the bytes count, not their form
    assert second.tensor.data_ptr() == address and not second.fresh and second.tensor.shape == SHAPE[::-1]
    assert recycler.kept_bytes == 0


@pytest.mark.parametrize(
    "see",
    [
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.numpy()[1, 5:9],
        lambda tensor: tensor.numpy().T.view(np.uint8)[::2][3:],
        lambda tensor: tensor[1],
        lambda tensor: torch.from_numpy(tensor.numpy()[0]).view(torch.uint8),
        lambda tensor: memoryview(tensor.numpy()),
        lambda tensor: np.asarray(memoryview(tensor.numpy())),
        lambda tensor: torch.utils.dlpack.from_dlpack(tensor.numpy()),
        lambda tensor: tensor.numpy().reshape(-1),
    ],
    ids=["array", "slice", "view", "row", "tensor of it", "memoryview", "array of it", "dlpack", "reshaped"],
)
def test_what_anybody_sees_stays_as_it_is(see):
    recycler = Recycler()
    tensor = recycler.take(SHAPE).tensor
    tensor[:] = True
    seen = see(tensor)
    del tensor
    gc.collect()
    assert recycler.kept_bytes == 0
    other = recycler.take(SHAPE)
    assert other.fresh
    other.tensor[:] = False
    assert np.asarray(seen).astype(bool).all()
    del seen
    gc.collect()
    assert recycler.kept_bytes == SIZE


def test_memory_comes_back_from_cycles():
    recycler = Recycler()
    cycle = [recycler.take(SHAPE).tensor.numpy()]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert recycler.kept_bytes == SIZE


def test_small_ones_are_left_to_the_allocator():
    recycler = Recycler()
    small = recycler.take((LEAST_BYTES - 1,))
    assert small.fresh and small.tensor.shape == (LEAST_BYTES - 1,)
    del small
    assert recycler.take((0, 5)).tensor.shape == (0, 5)
    assert recycler.kept_bytes == 0


def test_what_is_kept_is_bounded_and_sizes_in_use_go_last():
    recycler = Recycler(most_bytes=10 * LEAST_BYTES)
    old = [recycler.take((2, LEAST_BYTES)).tensor for _ in range(4)]
    new = [recycler.take((3, LEAST_BYTES)).tensor for _ in range(3)]
    old.clear()
    assert recycler.kept_bytes == 8 * LEAST_BYTES
    new.pop()
    assert recycler.kept_bytes == 9 * LEAST_BYTES  # one of four old ones gave way
    new.clear()
    assert recycler.kept_bytes == 9 * LEAST_BYTES  # and now all of them: three new ones
    assert not recycler.take((3, LEAST_BYTES)).fresh and recycler.take((2, LEAST_BYTES)).fresh
    larger = recycler.take((11, LEAST_BYTES)).tensor
    del larger
    assert recycler.kept_bytes <= 10 * LEAST_BYTES


def test_threads_never_share_memory():
    recycler, failures = Recycler(most_bytes=4 * SIZE), []

    def work(number: int) -> None:
        for _ in range(200):
            array = recycler.take(SHAPE).tensor.numpy().view(np.uint8)
            array[:] = number
            half = array[1]
            del array
            if not (half == number).all():
                failures.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert 0 < recycler.kept_bytes <= 4 * SIZE


def test_what_comes_back_in_the_midst_of_a_call_is_sorted_in_later():
    """As where garbage is collected, or a signal handled, with the lock held: it must not push out what is taken."""
    recycler = Recycler(most_bytes=2 * LEAST_BYTES)
    small = recycler.take((LEAST_BYTES,)).tensor
    large = [recycler.take((2 * LEAST_BYTES,)).tensor]
    address = small.data_ptr()
    del small
    pop = recycler._pop

    def interrupted(size: int, index: int) -> np.ndarray:
        large.clear()
        return pop(size, index)

    recycler._pop = interrupted
    assert recycler.take((LEAST_BYTES,)).tensor.data_ptr() == address
    recycler._pop = pop
    assert recycler.kept_bytes == LEAST_BYTES  # what came back last: both are too much


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # which the test is about
def test_a_child_process_does_not_wait_for_its_parents_threads():
    """Nor finds what they left half done."""
    recycler = recycling.masks
    del (taken := [recycler.take(SHAPE).tensor])[:]
    locked, finished = threading.Event(), threading.Event()

    def hold() -> None:
        with recycler._lock:
            blocks, recycler._kept[SIZE] = recycler._kept[SIZE], []
            locked.set()
            finished.wait()
            recycler._kept[SIZE] = blocks

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends it
        try:
            tensor = recycler.take(SHAPE).tensor
            del tensor
            os._exit(0 if recycler.kept_bytes == SIZE else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    finished.set()
    thread.join()
    assert status == 0 and not taken


def test_masks_of_a_later_call_take_the_memory_of_dropped_ones(monkeypatch):
    recycler = Recycler()
    monkeypatch.setattr(recycling, "masks", recycler)
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 3, 600, 500, generator=generator) > 0.5
    first, second = (pack_masks(some) for some in masks)
    kept, *dropped = unpack_masks_apart(first, 500)
    addresses = {mask.data_ptr() for mask in dropped}
    kept = kept.numpy()
    del dropped
    assert recycler.kept_bytes == 2 * 600 * 500
    later = unpack_masks_apart(second, 500)
    assert addresses < {mask.data_ptr() for mask in later}
    assert all(map(torch.equal, later, masks[1]))
    assert np.array_equal(kept, masks[0, 0].numpy())
