"""Files that are read before, and written behind, the work that everything waits for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def ahead(function: Callable[[_Item], _Made], items: Iterable[_Item], count: int = 2) -> Iterator[Future[_Made]]:
    """Yield what `function` makes of each item, in order, while up to `count` threads work on the next ones.

    Args:
        function: is called in threads; what it raises, the `result()` of its item raises.
        items: are asked for when their turn comes.
        count: of items that are worked on, or finished and not yet asked for.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(count, thread_name_prefix="ahead") as pool:
        coming = deque(pool.submit(function, item) for item in islice(remaining, count))
        try:
            while coming:
                first = coming.popleft()
                first.exception()  # waits: of a finished one there is nothing left to do, so the next may begin
                coming.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield first
        finally:
            for future in coming:
                future.cancel()


class Behind:
    """Threads that do what nobody waits for; a context, at whose end all of it is done.

    What a task raises is raised by a later call, or by the end of the context.
    """

    def __init__(self, most: int = 1) -> None:
        """
        Args:
            most: tasks that are not finished; one more has to wait.
        """
        self._most = most
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="behind")
        self._unfinished: deque[Future[None]] = deque()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._pool.shutdown()
        if kind is None:
            self._wait_for(0)

    def __call__(self, task: Callable[[], None]) -> None:
        """Have `task` done."""
        self._wait_for(self._most - 1)
        self._unfinished.append(self._pool.submit(task))

    def _wait_for(self, most: int) -> None:
        while len(self._unfinished) > most:
            self._unfinished.popleft().result()
