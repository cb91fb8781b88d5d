"""Bars of the newest rows in benchmarks/results: `python -m benchmarks.plots`.

It writes speed_gpu.png and speed_cpu.png. Of each case the newest rows of sam_fast are drawn, beside the rows of other
implementations that the same version of the sources was measured with. Axes are logarithmic.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.timing import RESULTS

FOLDER = Path(__file__).parents[1] / "docs" / "images"
_OURS = "sam_fast"
_WIDTH, _LEFT, _RIGHT, _TOP, _BAR, _GAP = 1000, 290, 210, 44, 15, 12
_COLORS = {
    "segment_anything 1.0": (150, 150, 150),
    "segment_anything 1.0 bf16": (190, 190, 190),
    "transformers": (214, 164, 92),
    "transformers SDPA bf16": (214, 164, 92),
    "onnxruntime": (160, 130, 190),
    "sam_fast": (31, 119, 180),
    "sam_fast bf16": (31, 119, 180),
    "sam_fast fp8": (44, 160, 44),
    "sam_fast int8": (44, 160, 44),
}
_OTHER = (200, 120, 120)
Row = Mapping[str, str]


@dataclass(frozen=True)
class Group:
    """The bars of one case: milliseconds by implementation, sam_fast's last, and the version of the sources."""

    name: str
    bars: dict[str, float]
    commit: str


def newest(rows: Sequence[Row], name_of: Callable[[Row], str], milliseconds: str) -> list[Group]:
    """Of each case the newest version of sam_fast that has rows, and all that was measured with it.

    Args:
        rows: of a file of results, oldest first.
        name_of: what an implementation is called.
        milliseconds: the column of times.

    Returns:
        Groups of a kind of case together, in the order in which they first came; those that sam_fast has no row of are
        left out.
    """
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["case"], row["shape"]), []).append(row)
    kinds = list(dict.fromkeys(case for case, _ in cases))
    groups = []
    for (case, shape), some in sorted(cases.items(), key=lambda item: kinds.index(item[0][0])):
        commits = [row["commit"] for row in some if row["peer"].startswith(_OURS)]
        if commits:
            beside = [row for row in some if row["commit"] == commits[-1]]
            beside.sort(key=lambda row: row["peer"].startswith(_OURS))
            bars = {name_of(row): float(row[milliseconds]) for row in beside}
            groups.append(Group(f"{case}, {shape}", bars, commits[-1]))
    return groups


def name_on_gpu(row: Row) -> str:
    """The implementation, and its format where that is not float32."""
    return row["peer"] if row["precision"] == "fp32" else f"{row['peer']} {row['precision']}"


def draw_bars(groups: Sequence[Group], title: str) -> Image.Image:
    """All bars under each other, from the fastest decade to the slowest."""
    times = [ms for group in groups for ms in group.bars.values()]
    low, high = math.floor(math.log10(min(times))), math.log10(max(times))
    height = _TOP + sum(_BAR * len(group.bars) + _GAP for group in groups) + 34
    canvas = Image.new("RGB", (_WIDTH, height), "white")
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(size=15), ImageFont.load_default(size=12)

    def x_of(ms: float) -> float:
        return _LEFT + (math.log10(ms) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    draw.text((12, 12), title, "black", font)
    versions = ", ".join(dict.fromkeys(group.commit for group in groups))
    draw.text((_WIDTH - 12, 14), f"medians, at {versions}", "black", small, anchor="ra")
    for power in range(low, math.floor(high) + 1):
        x = x_of(10.0**power)
        draw.line((x, _TOP - 6, x, height - 28), (225, 225, 225))
        draw.text((x, height - 14), _time(10.0**power), "black", small, anchor="mm")
    y = _TOP
    for group in groups:
        middle = y + _BAR * len(group.bars) / 2
        draw.text((_LEFT - 12, middle), group.name, "black", small, anchor="rm")
        for name, ms in group.bars.items():
            draw.rectangle((_LEFT, y + 1, x_of(ms), y + _BAR - 2), _COLORS.get(name, _OTHER))
            draw.text((x_of(ms) + 5, y + _BAR / 2), f"{_time(ms)}  {name}", "black", small, anchor="lm")
            y += _BAR
        y += _GAP
    return canvas


def _time(ms: float) -> str:
    return f"{ms / 1000:,.3g} s" if ms >= 1000 else f"{ms:.3g} ms"


def _read(name: str) -> list[Row]:
    with open(RESULTS / name, newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: list[str] | None = None) -> None:
    """Draw all plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="a folder")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    on_gpu, on_cpu = _read("gpu.csv"), _read("cpu.csv")
    plots = {
        "speed_gpu.png": (newest(on_gpu, name_on_gpu, "device_ms"), f"{on_gpu[-1]['device']}, device time"),
        "speed_cpu.png": (
            newest(on_cpu, lambda row: row["peer"], "median_ms"),
            "{cores} cores of an {device} ({cpu_capability}), float32 unless named".format(**on_cpu[-1]),
        ),
    }
    for name, (groups, title) in plots.items():
        draw_bars(groups, title).save(given.output / name)
    print(f"plots: {given.output}")


if __name__ == "__main__":
    main()
