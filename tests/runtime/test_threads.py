"""Work shared out to threads of Python, each with its share of PyTorch's threads."""

from __future__ import annotations

import threading

import pytest
import torch
from oracle import relative_error

from sam_fast import SamPredictor
from sam_fast.runtime.inference import Prompts
from sam_fast.runtime.threads import in_threads


@pytest.fixture
def threads():
    """Sets how many threads this thread's operations use, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_are_in_order_and_threads_are_shared_out(threads):
    threads(4)
    meeting = threading.Barrier(2)  # passes only if two run at once

    def work(item):
        meeting.wait(timeout=20)
        assert not torch.is_grad_enabled()
        return item, torch.get_num_threads(), threading.get_ident()

    results = in_threads(work, [10, 20])
    assert [item for item, _, _ in results] == [10, 20]
    assert [count for _, count, _ in results] == [2, 2]
    assert threading.get_ident() not in {ident for *_, ident in results}
    assert torch.get_num_threads() == 4  # of the caller, and of threads to come
    counts = []
    later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert counts == [4]


def test_one_thread_or_one_item_stays_in_the_caller(threads):
    threads(1)
    assert set(in_threads(lambda _: threading.get_ident(), [1, 2, 3])) == {threading.get_ident()}
    threads(4)
    assert in_threads(lambda _: threading.get_ident(), [1]) == [threading.get_ident()]
    assert in_threads(int, []) == []


def test_errors_reach_the_caller(threads):
    threads(2)
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda x: 1 / x, [1, 0])
    assert in_threads(lambda x: 1 / x, [1, 2]) == [1, 0.5]


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_prompts_do_not_depend_on_threads(count, threads, tiny, photo):
    predictor = SamPredictor(tiny)
    embedding = predictor.set_image(photo)
    points = 250 * torch.rand(count, 1, 2, generator=torch.Generator().manual_seed(0))
    prompts = Prompts(points, torch.ones(count, 1))
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append((*predictor.runtime.decode(embedding, prompts), *_filtered(predictor, embedding, prompts)))
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert ours.shape == theirs.shape
            if not ours.is_floating_point():
                assert torch.equal(ours, theirs)
                continue
            assert relative_error(ours.double(), theirs.double()) <= 1e-5  # products of other numbers of rows


def _filtered(predictor, embedding, prompts):
    iou = predictor.runtime.decode(embedding, prompts)[1].flatten().sort().values
    between = (iou[len(iou) // 2 - 1] + iou[len(iou) // 2]).item() / 2
    return predictor.runtime.decode_filtered(embedding, prompts, between)
