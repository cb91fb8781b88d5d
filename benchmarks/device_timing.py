"""Times on a GPU: events for what the device does, the clock for what a caller waits, and rows that say where.

On a CPU, for trying the benchmark out, both are the clock's.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from typing import Any, NamedTuple

import torch

from benchmarks.timing import commit, cpu_model


class Measurement(NamedTuple):
    """Milliseconds of each repetition, and the bytes of device memory that one takes at its peak."""

    device: tuple[float, ...]
    wall: tuple[float, ...]
    peak_bytes: int | None


@dataclass(frozen=True)
class DeviceRow:
    """One line of benchmarks/results/gpu.csv.

    Device time is that between two events in a full queue (wall time, where a call is long), wall time what a caller
    waits for a result, the queue being empty before. `error` is against the first peer of the case; of what, the
    benchmark says.
    """

    benchmark: str
    case: str
    shape: str
    precision: str
    peer: str
    device_ms: float
    device_p90_ms: float
    wall_ms: float
    wall_p90_ms: float
    repetitions: int
    speedup: float  # device time of the first peer / of this one
    peak_extra_mb: float | None = None  # 10**6 bytes above the memory held before the call
    error: float | None = None
    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    python: str = ""
    commit: str = ""
    date: str = ""
    command: str = ""


def p90(values: Sequence[float]) -> float:
    """The value that nine in ten are not above."""
    return sorted(values)[max(0, -(-9 * len(values) // 10) - 1)]


def measure(
    run: Callable[[int], Any], device: torch.device, *, seconds: float, fewest: int = 3, most: int = 100
) -> Measurement:
    """Time `run(i)` for i = 0, 1, ...: with a wait after each, and, where it is short, back to back on a GPU.

    Args:
        run: does the work for the i-th input; inputs should differ, that caches hold none of them.
        device: where it works.
        seconds: about how long each of the two series may take.
        fewest, most: repetitions of each.
    """
    before = _reset_peak(device)
    start = time.perf_counter()
    run(0)  # a warm-up
    _wait(device)
    one = time.perf_counter() - start
    peak = None if before is None else torch.cuda.max_memory_allocated(device) - before
    count = max(fewest, min(most, int(seconds / max(one, 1e-6))))

    wall = []
    for i in range(count):
        start = time.perf_counter()
        run(i)
        _wait(device)
        wall.append(1e3 * (time.perf_counter() - start))
    if device.type != "cuda" or count * one > 2 * seconds:  # beside long calls, launching the first kernel is nothing
        return Measurement(tuple(wall), tuple(wall), peak)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for i in range(count):
        run(i)
        events[i + 1].record()
    _wait(device)
    return Measurement(tuple(a.elapsed_time(b) for a, b in itertools.pairwise(events)), tuple(wall), peak)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int | None:
    """Start a new count of the most memory in use; what is in use now."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def row(
    case: str,
    shape: str,
    precision: str,
    peer: str,
    measured: Measurement,
    first_ms: float | None,
    error: float | None,
    origin: dict[str, str],
) -> DeviceRow:
    """A measurement as a row; `first_ms` is the device time of the case's first peer, None for itself."""
    median = statistics.median(measured.device)
    return DeviceRow(
        benchmark="gpu",
        case=case,
        shape=shape,
        precision=precision,
        peer=peer,
        device_ms=round(median, 4),
        device_p90_ms=round(p90(measured.device), 4),
        wall_ms=round(statistics.median(measured.wall), 4),
        wall_p90_ms=round(p90(measured.wall), 4),
        repetitions=len(measured.device),
        speedup=round((first_ms or median) / median, 2),
        peak_extra_mb=None if measured.peak_bytes is None else round(measured.peak_bytes / 1e6, 1),
        error=None if error is None else float(f"{error:.2g}"),
        **origin,
    )


def provenance(device: torch.device, command: str, commit_name: str | None = None) -> dict[str, str]:
    """Where and how rows are measured: the last fields of `DeviceRow`."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "driver": _driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit_name or commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": command,
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return lines[0].strip() if lines else "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def print_rows(rows: Sequence[DeviceRow]) -> None:
    """Print rows as a table."""
    header = f"{'device ms':>11}{'p90':>10}{'wall ms':>11}{'speed-up':>10}{'peak MB':>10}{'error':>9}"
    print(f"\n{'case':<15}{'shape':<26}{'peer':<30}{header}")
    for r in rows:
        peak = "" if r.peak_extra_mb is None else f"{r.peak_extra_mb:.0f}"
        error = "" if r.error is None else f"{r.error:.1e}"
        times = f"{r.device_ms:>11.3f}{r.device_p90_ms:>10.3f}{r.wall_ms:>11.3f}{r.speedup:>9.2f}x"
        print(f"{r.case:<15}{r.shape:<26}{r.peer + ' ' + r.precision:<30}{times}{peak:>10}{error:>9}", flush=True)
