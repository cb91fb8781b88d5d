"""A run of trials: which of them have begun, until when new ones may, and where their lines and rows go."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import append_rows


class BrokenContext(RuntimeError):
    """After an error on the GPU nothing more runs in this process."""


@dataclass(frozen=True)
class TrialRow:
    """One line of trials.csv, before where it comes from.

    `rate` is what one call moves or computes per second, how often it launches a kernel, or what memory it takes, as
    `unit` says; `error` that of its result in the Euclidean norm, against PyTorch in float32.
    """

    section: str
    case: str
    variant: str
    microseconds: float
    rate: float | None = None
    unit: str = ""
    error: float | None = None


@dataclass
class Run:
    """What to try, how long, and what came of it."""

    device: torch.device
    folder: Path
    origin: dict[str, str]  # of all lines
    deadline: float  # by time.time(), which processes share: no trial begins after it
    begun: Path  # names of trials that have begun, in this process or one before it
    models: list[str]
    precisions: list[str]
    batches: list[int]
    prompts: list[int]
    size: tuple[int, int]
    points_per_side: int
    threads: int  # that compile kernels at the same time
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names = set(self.begun.read_text().splitlines())
        if not self._names:
            self.say("# " + ", ".join(f"{key} {value}" for key, value in self.origin.items() if value))

    def say(self, line: str) -> None:
        """Print a line, and write it at once: what comes later may fail."""
        print(line, flush=True)
        with (self.folder / "trials.txt").open("a") as file:
            file.write(line + "\n")

    def keep(self, section: str, case: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Write rows: variant, microseconds, and maybe rate, unit and error."""
        append_rows(self.folder / "trials.csv", [TrialRow(section, case, *row) for row in rows], self.origin)

    def has_begun(self, name: str) -> bool:
        return name in self._names

    def is_late(self, what: str) -> bool:
        """Whether time is over, and `what` is left out."""
        if time.time() <= self.deadline:
            return False
        self.left_out.append(what)
        return True

    def trial(self, name: str, function: Callable[[], object]) -> None:
        """Make a trial that has not begun yet; what it raises is written, and the next one may come.

        Raises:
            BrokenContext: no other can, in this process.
        """
        if self.has_begun(name) or self.is_late(name):
            return
        self._names.add(name)
        with self.begun.open("a") as file:
            file.write(name + "\n")
        try:
            function()
            self.wait()
        except Exception as error:  # of compilers, drivers, memory
            self.fail(name, error)
            try:
                self.wait()
                torch.zeros(8, device=self.device).sum().item()
            except Exception:
                raise BrokenContext(name) from error

    def fail(self, name: str, error: Exception) -> None:
        """Write what went wrong, and where."""
        self.failed.append(name)
        reason = " | ".join(str(error).strip().splitlines()[:3])
        self.say(f"!! {name}: {type(error).__name__}: {reason[:400]}")
        for frame in traceback.extract_tb(error.__traceback__)[-2:]:
            self.say(f"     {Path(frame.filename).name}:{frame.lineno} {frame.name}: {frame.line}")

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
