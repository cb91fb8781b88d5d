"""Procedural scenes per second on one core: `python -m benchmarks.scenes`.

There is no peer: a row's time is that of one scene, the median over different scenes, JPEG round trip and all masks
included. It is processor time of the one thread, as a loader's neighbours usually keep the machine busy. The gate is
that a scene comes out twice the same and that its masks are not empty.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.timing import Row, Timing, WrongResult, positive, print_rows, rows, write_rows
from sam_fast.data.sample import Sample
from sam_fast.data.scenes import make_scene


def gate(sample: Sample, again: Sample) -> None:
    """Refuse scenes that are not reproducible or have an empty mask."""
    if sample.image.tobytes() != again.image.tobytes() or sample.masks.tobytes() != again.masks.tobytes():
        raise WrongResult(f"{sample.name} differs from call to call")
    if not sample.masks.any((1, 2)).all():
        raise WrongResult(f"{sample.name} has an empty mask")


def measure(size: int, scenes: int, held_out: bool) -> list[Row]:
    """Gate and times of `scenes` scenes, each made twice."""
    seconds = []
    for index in range(scenes):
        sample = make_scene(0, index, size, held_out=held_out)
        start = time.process_time()
        again = make_scene(0, index, size, held_out=held_out)
        seconds.append(time.process_time() - start)
        gate(sample, again)
    print(f"{size} px: {scenes / sum(seconds):.1f} scenes per second of one core")
    timing = Timing("sam_fast", tuple(seconds))
    case = "held out" if held_out else "training"
    return rows("scenes", case, f"{size}x{size}", "uint8", [timing])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--scenes", type=positive, default=200)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--no-write", action="store_true", help="print only, leave benchmarks/results alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for size in arguments.sizes:
        measured = measure(size, arguments.scenes, arguments.held_out)
        print_rows(measured)
        if not arguments.no_write:
            write_rows("scenes", measured)


if __name__ == "__main__":
    main()
