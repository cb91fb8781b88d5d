"""`sam-fast download`: the official weights."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sam_fast.cli.console import escaped, item_progress, out


class OfficialModel(str, Enum):
    """Models whose weights are published."""

    vit_b = "vit_b"
    vit_l = "vit_l"
    vit_h = "vit_h"


def download(
    model: Annotated[OfficialModel, typer.Argument(help="375 MB, 1.2 GB or 2.5 GB.", show_default=False)],
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Where the file goes.", show_default="~/.cache/sam_fast")
    ] = None,
) -> None:
    """Download an official checkpoint and print its path; a download that was broken off goes on where it stopped."""
    from sam_fast.checkpoints import download_checkpoint

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with item_progress(*columns) as bar:
        task = bar.add_task(model.value, total=None)

        def show(received: int, total: int | None) -> None:
            bar.update(task, completed=received, total=total)

        path = download_checkpoint(model.value, directory, progress=show)
    out().print(escaped(path))
