"""Reading ahead and writing behind: order, bounds, errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from sam_fast.cli.pipeline import Behind, ahead

PATIENCE = 20  # seconds after which a test has failed


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_ahead_keeps_the_order(count: int) -> None:
    def slowest_first(item: int) -> int:
        time.sleep(0.002 * (10 - item))
        return item**2

    assert [future.result() for future in ahead(slowest_first, range(10), count)] == [i**2 for i in range(10)]


def test_ahead_of_nothing() -> None:
    assert list(ahead(str, [])) == []


def test_ahead_works_on_the_next_items_and_on_no_more() -> None:
    begun: list[int] = []
    futures = ahead(begun.append, range(10), 3)
    assert begun == []
    next(futures)
    wait_until(lambda: len(begun) == 4)
    time.sleep(0.05)
    assert sorted(begun) == [0, 1, 2, 3]
    futures.close()  # type: ignore[attr-defined]
    assert sorted(begun) == [0, 1, 2, 3]


def test_what_ahead_raises_belongs_to_its_item() -> None:
    def invert(item: int) -> float:
        return 1 / item

    def value(future: Future[float]) -> float | str:
        try:
            return future.result()
        except ZeroDivisionError as error:
            return type(error).__name__

    assert [value(future) for future in ahead(invert, [1, 0, 2])] == [1, "ZeroDivisionError", 0.5]


def test_behind_is_done_at_the_end() -> None:
    done: list[int] = []

    def task(number: int) -> None:
        time.sleep(0.005)
        done.append(number)

    with Behind() as behind:
        for number in range(7):
            behind(lambda number=number: task(number))  # type: ignore[misc]
    assert sorted(done) == list(range(7))


def test_behind_does_a_task_at_a_time() -> None:
    go_on, begun = threading.Event(), threading.Event()
    handed_over: list[int] = []

    def task() -> None:
        begun.set()
        assert go_on.wait(PATIENCE)

    def submit() -> None:
        with Behind() as behind:
            for number in range(2):
                behind(task)
                handed_over.append(number)

    thread = threading.Thread(target=submit)
    thread.start()
    assert begun.wait(PATIENCE)
    time.sleep(0.05)
    assert handed_over == [0]  # the second waits
    go_on.set()
    thread.join(PATIENCE)
    assert handed_over == [0, 1]


def fail() -> None:
    raise OSError("no space left")


def test_what_a_task_raises_is_raised_by_the_next_call_or_at_the_end() -> None:
    done: list[int] = []
    with pytest.raises(OSError, match="no space"), Behind() as behind:
        behind(lambda: done.append(1))
        behind(fail)
    with pytest.raises(OSError, match="no space"), Behind() as behind:
        behind(fail)
        behind(lambda: done.append(2))
    assert done == [1]


def test_an_error_of_the_context_comes_first() -> None:
    with pytest.raises(KeyError), Behind() as behind:
        behind(fail)
        raise KeyError
