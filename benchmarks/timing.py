"""The timing core: peers interleaved in one run, a correctness gate before any time, rows with provenance.

A time on a shared machine wanders by tens of percent within minutes, so peers take turns and ratios of medians are what
counts. A peer whose result is wrong has no time: `compare` raises before it measures.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import gc
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class WrongResult(RuntimeError):
    """A peer's result does not pass the gate; its time must not be reported."""


@dataclass(frozen=True)
class Peer:
    """One implementation: `run()` does all of the work and returns the result."""

    name: str
    run: Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition of one peer, and how far its result is from the first peer's, if the gate says so."""

    name: str
    seconds: tuple[float, ...]
    error: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class Row:
    """One line of benchmarks/results/*.csv: what was measured, the result, and where it comes from."""

    benchmark: str
    case: str
    shape: str
    dtype: str
    peer: str
    median_ms: float
    best_ms: float
    repetitions: int
    speedup: float  # median of the first peer / median of this one
    peak_extra_mb: float | None = None  # 10**6 bytes above the memory held before the call
    error: float | None = None  # relative, against the first peer's result; what it is of, the benchmark says
    device: str = ""
    cores: int = 0
    threads: int = 0
    cpu_capability: str = ""
    torch: str = ""
    python: str = ""
    commit: str = ""
    date: str = ""
    command: str = ""


def compare(
    peers: Sequence[Peer],
    gate: Callable[[Any, Any], float | None],
    *,
    repetitions: int = 5,
    warmup: int = 1,
) -> list[Timing]:
    """Time peers in turns after checking each one's result against the first's.

    Args:
        peers: the first one is the reference.
        gate: called as gate(reference result, other result); raises `WrongResult` if they differ too much, and returns
            by how much they do, or None.
        repetitions: rounds; every round runs every peer once. 0 takes the gate's own runs, for what lasts minutes.
        warmup: rounds before the timed ones, the gate's run included.

    Raises:
        WrongResult: from the gate.
    """
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    errors: dict[str, float | None] = {}
    reference = None
    for peer in peers:
        result, duration = _timed(peer)
        if peer is peers[0]:
            reference = result
        else:
            errors[peer.name] = gate(reference, result)
        if repetitions == 0:
            seconds[peer.name].append(duration)
        del result
    del reference
    for _ in range(warmup - 1):
        for peer in peers:
            peer.run()
    for _ in range(repetitions):
        for peer in peers:
            seconds[peer.name].append(_timed(peer)[1])
    return [Timing(name, tuple(values), errors.get(name)) for name, values in seconds.items()]


def _timed(peer: Peer) -> tuple[Any, float]:
    """A peer's result, and the seconds that it took."""
    start = time.perf_counter()
    result = peer.run()
    return result, time.perf_counter() - start


def peak_extra_memory(setup: Callable[..., Callable[[], Any]], *args: Any) -> int:
    """Peak resident memory in bytes that `setup(*args)()` takes above what is held before it, in a fresh process.

    `setup` is a module-level function; it prepares inputs, warms libraries up and returns the call to measure. The
    result is alive at the peak and counts.

    Raises:
        RuntimeError: not on Linux, whose kernel keeps and resets the peak.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("peak memory is read from /proc, which only Linux has")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_measure_memory, torch.get_num_threads(), setup, args).result()


def _measure_memory(threads: int, setup: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> int:
    torch.set_num_threads(threads)
    call = setup(*args)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc: give freed memory back, or its reuse would be free
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current resident size
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return peak - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def provenance() -> dict[str, Any]:
    """Where and how a row was measured: the provenance fields of `Row`."""
    return {
        "device": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", _module_name(), *sys.argv[1:]]),
    }


def cpu_model() -> str:
    """The processor's name as the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The short hash of the checked-out commit, or "unknown" outside git.

    It ends in -dirty if tracked files differ, other than results: the rows of one case are no change to the next.
    """
    name = _git("rev-parse", "--short=10", "HEAD")
    if not name:
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return f"{name}-dirty" if changed else name


def _git(*arguments: str) -> str:
    """What git prints about this checkout; nothing where it fails or is not installed."""
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def positive(text: str) -> int:
    """A number of a command line.

    Raises:
        argparse.ArgumentTypeError: it is not a whole number, or below 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def rows(
    benchmark: str,
    case: str,
    shape: str,
    dtype: str,
    timings: Sequence[Timing],
    peak_bytes: dict[str, int] | None = None,
) -> list[Row]:
    """Timings as rows; the speed-ups are against the first."""
    origin = provenance()
    peaks = peak_bytes or {}
    return [
        Row(
            benchmark=benchmark,
            case=case,
            shape=shape,
            dtype=dtype,
            peer=timing.name,
            median_ms=round(timing.median * 1e3, 4),
            best_ms=round(timing.best * 1e3, 4),
            repetitions=len(timing.seconds),
            speedup=round(timings[0].median / timing.median, 2),
            peak_extra_mb=round(peaks[timing.name] / 1e6, 1) if timing.name in peaks else None,
            error=None if timing.error is None else float(f"{timing.error:.2g}"),
            **origin,
        )
        for timing in timings
    ]


def write_rows(name: str, new: Sequence[Row]) -> Path:
    """Add rows to benchmarks/results/<name>.csv; what older rows did not know stays empty."""
    return append_rows(RESULTS / f"{name}.csv", new)


def append_rows(path: Path, new: Sequence[Any], origin: Mapping[str, str] | None = None) -> Path:
    """Add dataclass instances of one kind to a CSV file, whose columns are their fields, and then those of `origin`.

    Raises:
        ValueError: the file has other columns, and is left as it is.
    """
    origin = origin or {}
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [*(field.name for field in fields(new[0])), *origin]
    known: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            known = list(reader)
        other = sorted(set(reader.fieldnames or ()) - set(columns))
        if other:
            raise ValueError(f"{path} holds something else: columns {', '.join(other)}")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows([*known, *({**asdict(row), **origin} for row in new)])
    return path


def print_rows(new: Sequence[Row]) -> None:
    """Print rows as a table."""
    header = f"{'median ms':>12}{'best ms':>12}{'speed-up':>10}{'peak MB':>10}{'error':>10}"
    print(f"{'case':<26}{'peer':<26}{header}")
    for row in new:
        peak = "" if row.peak_extra_mb is None else f"{row.peak_extra_mb:.1f}"
        error = "" if row.error is None else f"{row.error:.1e}"
        print(
            f"{row.case:<26}{row.peer:<26}{row.median_ms:>12.3f}{row.best_ms:>12.3f}{row.speedup:>9.1f}x{peak:>10}"
            f"{error:>10}",
            flush=True,
        )


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else "benchmarks"
