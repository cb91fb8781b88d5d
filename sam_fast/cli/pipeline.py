"""Files of the next items are read, and those of the last one written, while the model works on an item."""

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
    """A thread that does what nobody waits for, a task at a time; a context, at whose end all is done.

    What a task raises is raised by the next call, or by the end of the context.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._task: Future[None] | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._pool.shutdown()
        if kind is None:
            self._finish()

    def __call__(self, task: Callable[[], None]) -> None:
        """Have `task` done; waits for the one before, so that what two of them hold is the most that is held."""
        self._finish()
        self._task = self._pool.submit(task)

    def _finish(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.result()
