"""Results side by side, for the terminal and as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from sam_fast.evaluation.protocol import CENTRE, RANDOM
from sam_fast.evaluation.results import Results

_LABELS = {
    "click_1_oracle": "1 click, best of 3 (oracle)",
    "box": "box",
    "box_top": "box, highest score of 3",
    "box_oracle": "box, best of 3 (oracle)",
    "boundary_box": "boundary IoU, box",
    "score_correlation": "r of predicted and true IoU",
    "masks_per_image": "masks per image",
}


def comparison(results: Sequence[Results]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Lay out results as a table.

    Args:
        results: of methods that were shown the same objects.

    Returns:
        The names of the methods, and rows of a label and one cell for each method; empty where it has no such figure.

    Raises:
        ValueError: the results are of different objects, or of clicks that begin differently.
    """
    if len({result.digest for result in results}) > 1:
        given = ", ".join(f"{r.method}: {_described(r)}" for r in results)
        alike = len({_described(r) for r in results}) == 1  # then images have other bytes: docs/data.md says when
        objects = "the same objects in images of the same bytes" if alike else "the same objects"
        raise ValueError(f"these results are not about {objects}, so they cannot be compared: {given}")
    if len({_first_click(result) for result in results} - {None}) > 1:
        raise ValueError("some of these results are of first clicks at the centre, others of first clicks at random")
    keys = sorted({key for result in results for key in result.summary}, key=_order)
    rows = [(_label(key), [_cell(result.summary.get(key)) for result in results]) for key in keys]
    return [result.method for result in results], rows


def heading(results: Sequence[Results]) -> str:
    """What the table is about, in a line."""
    return _described(results[0])


def terminal_table(results: Sequence[Results]) -> Table:
    """The table for a rich console; see `comparison`."""
    methods, rows = comparison(results)
    table = Table(title=escape(heading(results)), title_justify="left", title_style="bold")
    table.add_column("mean IoU")
    for method in methods:
        table.add_column(escape(method), justify="right")
    for label, cells in rows:
        table.add_row(label, *cells)
    return table


def markdown_table(results: Sequence[Results]) -> str:
    """The table as Markdown, with where its columns come from; see `comparison`."""
    methods, rows = comparison(results)
    lines = [heading(results), ""]
    lines.append("| mean IoU | " + " | ".join(methods) + " |")
    lines.append("|---|" + "---:|" * len(methods))
    lines += [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows]
    lines.append("")
    for result in results:
        made = result.provenance
        seconds = ", ".join(f"{kind} {value:.0f} s" for kind, value in result.seconds.items())
        lines.append(f"* {result.method}: {made['date']}, torch {made['torch']}, {made['threads']} threads, {seconds}.")
        if made["command"]:
            lines.append(f"  `{made['command']}`")
    return "\n".join(lines) + "\n"


def _described(result: Results) -> str:
    where = result.protocol["data"] or "data"
    images, objects = result.counts["images"], result.counts["objects"]
    first = ", first clicks at random" if _first_click(result) == RANDOM else ""
    return f"{objects} objects of {images} images, {where}, seed {result.protocol['seed']}{first}"


def _first_click(result: Results) -> str | None:
    """Where first clicks lie, None where there are none."""
    return result.protocol.get("first_click", CENTRE) if "clicks" in result.protocol["prompts"] else None


def _number(key: str) -> int:
    found = re.search(r"\d+", key)
    return int(found.group()) if found else 0


def _order(key: str) -> tuple[int, int, str]:
    for place, prefix in enumerate(("click_", "box", "boundary_", "recall_", "masks_", "score_")):
        if key.startswith(prefix):
            return place, _number(key), key
    return 99, 0, key


def _label(key: str) -> str:
    if key in _LABELS:
        return _LABELS[key]
    count = _number(key)
    clicks = f"{count} click{'s' * (count != 1)}"
    if key.startswith("click_"):
        return clicks
    if key.startswith("boundary_click_"):
        return f"boundary IoU, {clicks}"
    return f"AR@{count}" if key.startswith("recall_") else key


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    if math.isnan(value):
        return "undefined"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
