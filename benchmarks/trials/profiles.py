"""The cases of benchmarks/gpu.py, and which kernels they are made of."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from benchmarks import gpu_sections
from benchmarks.device_timing import measure
from benchmarks.gpu_sections import median_iou, set_image
from benchmarks.peers import build_ours, ours
from benchmarks.trials.run import Run

_PRINTED = 10  # kernels of a case; all of them are rows
_WIDTH = 100  # of a kernel's name
_KEPT = 200


class Kernel(NamedTuple):
    """What a call launches under one name."""

    name: str
    microseconds: float  # per call, all launches together
    launches: float


def try_profiles(run: Run) -> None:
    """All cases of the first model in the first precision, and encoders of the others."""
    for name in run.models:
        if run.is_late(f"profiles of {name}"):
            return
        model = build_ours(name, run.device)
        state = set_image(model, run.size)
        threshold = median_iou(model, state)
        for precision in run.precisions:
            complete = (name, precision) == (run.models[0], run.precisions[0])
            benchmark = gpu_sections.Run(
                device=run.device,
                output=run.folder,  # to which nothing is written
                origin=run.origin,
                seconds=0,
                deadline=float("inf"),
                sections=["encoder", "click", "decode", "post", "amg"] if complete else ["encoder"],
                precisions=[precision],
                batches=run.batches,
                prompts=run.prompts,
                sizes=[run.size],
                points_per_side=run.points_per_side,
            )
            peer = ours(model, precision)
            for section, shape, call in gpu_sections.cases_of(benchmark, peer, model, state, name, threshold):
                case = f"{section} {shape}, {precision}"
                run.trial(f"profiles: {case}", partial(profile, run, "profiles", case, call))


def profile(run: Run, section: str, case: str, call: Callable[[int], Any]) -> None:
    """Time a case with an empty queue before each call and with a full one, then look at its kernels."""
    for i in range(2):  # graphs are recorded by the second call
        call(i)
    measured = measure(call, run.device, seconds=0.3)
    wall, device = (1e3 * statistics.median(times) for times in (measured.wall, measured.device))
    kernels = kernels_of(call, run.device)
    total, launches = sum(k.microseconds for k in kernels), sum(k.launches for k in kernels)
    head = f"{section:<10}{case}: a caller waits {wall:.1f} us, one after another {device:.1f} us"
    run.say(f"{head}; kernels {total:.1f} us in {launches:.0f} launches")
    for kernel in kernels[:_PRINTED]:
        run.say(f"{kernel.microseconds:>12.1f} us{kernel.launches:>6.0f}x  {tidy(kernel.name)[:_WIDTH]}")
    times = [("a caller waits", round(wall, 2)), ("one after another", round(device, 2))]
    rows = [(tidy(k.name)[:_KEPT], round(k.microseconds, 2), k.launches, "launches") for k in kernels]
    run.keep(section, case, [*times, ("all kernels", round(total, 2), launches, "launches"), *rows])


def kernels_of(call: Callable[[int], Any], device: torch.device, repetitions: int = 2) -> list[Kernel]:
    """The kernels of a call, longest first; on a CPU PyTorch's operations, which contain one another."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for i in range(repetitions):
            call(i)
            if on_gpu:
                torch.cuda.synchronize(device)
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.device_type().name == device.type.upper() and not event.name().startswith(("Profiler", "Activity")):
            times[event.name()].append(event.duration_ns() / 1e3)
    kernels = [Kernel(name, sum(us) / repetitions, len(us) / repetitions) for name, us in times.items()]
    return sorted(kernels, key=lambda kernel: -kernel.microseconds)


def tidy(name: str) -> str:
    """A kernel's name without the namespaces that all of them share."""
    for word in ("void ", "at::native::", "(anonymous namespace)::", "std::", "c10::"):
        name = name.replace(word, "")
    return name
