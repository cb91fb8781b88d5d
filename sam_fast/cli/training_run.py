"""What `sam-fast train` and `sam-fast pretrain` share: running with a progress bar until the end or a signal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam_fast.cli.console import item_progress, out

if TYPE_CHECKING:
    from sam_fast.training.run import TrainingRun

Describe = Callable[[Mapping[str, float]], str]


def run_to_the_end(run: TrainingRun[Any, Any], max_minutes: float | None, weights: Path, describe: Describe) -> None:
    """Run, save and stop on SIGINT or SIGTERM, and say on the main process how far it came.

    Args:
        run: the run.
        max_minutes: stop after so long.
        weights: the file that holds the result.
        describe: turns a row of the log into a short line.
    """
    with ExitStack() as stack:
        if run.world.is_main:
            run.report = stack.enter_context(_Progress(run, describe))
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: run.stop()))
        done = run.run(max_minutes)
    if run.world.is_main:
        minutes = f" of {run.config.minutes:g}" if run.config.minutes else ""
        out().print(f"{done} of {run.config.steps} steps, {run.seconds / 60:.1f}{minutes} minutes; {weights}")
        if not run.finished:
            out().print("the same command goes on")


class _Progress:
    """A bar over steps, or seconds, with the last row of the log; where there is no terminal, a line per row."""

    def __init__(self, run: TrainingRun[Any, Any], describe: Describe) -> None:
        self._run = run
        self._bar = item_progress()
        total = 60 * run.config.minutes or run.config.steps
        self._task = self._bar.add_task("training", total=total, completed=self._done())
        self._describe = describe

    def _done(self) -> int:
        return int(self._run.seconds) if self._run.config.minutes else self._run.step

    def __enter__(self) -> Callable[[int, Mapping[str, float] | None], None]:
        self._bar.__enter__()
        return self._show

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _show(self, step: int, row: Mapping[str, float] | None) -> None:
        self._bar.update(self._task, completed=self._done())
        if row is None:
            return
        line = self._describe(row)
        if self._bar.disable:
            out().print(f"step {step}  {line}")
        else:
            self._bar.update(self._task, description=line)
