"""The files of `sam-fast amg`, which are those of segment_anything's scripts/amg.py."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

METADATA_COLUMNS = (
    "id,area,bbox_x0,bbox_y0,bbox_w,bbox_h,point_input_x,point_input_y,"
    "predicted_iou,stability_score,crop_box_x0,crop_box_y0,crop_box_w,crop_box_h"
)


class AmgFiles:
    """Writes what was found in images, each picture of a mask in a thread of its own; a context."""

    def __init__(self, output: Path, as_json: bool, overlay: bool) -> None:
        """
        Args:
            output: the folder.
            as_json: one JSON of RLEs per image, instead of a folder of PNGs and a CSV.
            overlay: also write <image>_overlay.jpg, the masks drawn on the image.
        """
        self._output = output
        self._as_json = as_json
        self._overlay = overlay
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="png")

    def __enter__(self) -> AmgFiles:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()

    def write(self, stem: str, image: np.ndarray, records: Sequence[dict[str, Any]]) -> None:
        """Write the records of an image [H, W, 3] whose file is called `stem`; any thread may."""
        if self._as_json:
            (self._output / f"{stem}.json").write_text(json.dumps(records))
        else:
            write_folder(records, self._output / stem, self._pool)
        if self._overlay:
            from sam_fast.utils.overlay import draw_masks, save_picture

            save_picture(draw_masks(image, records), self._output / f"{stem}_overlay.jpg")


def write_folder(records: Sequence[dict[str, Any]], folder: Path, pool: Executor) -> None:
    """Write masks as 0.png, 1.png, ... (0 and 255), and at last what is known about them as metadata.csv.

    What an earlier run left in the folder is removed before, so that a table says that all of its masks are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.csv").unlink(missing_ok=True)
    for stale in folder.glob("*.png"):
        if stale.stem.isdigit():
            stale.unlink()
    masks = [record["segmentation"] for record in records]
    list(pool.map(_write_mask, masks, [folder / f"{i}.png" for i in range(len(masks))]))
    rows = [METADATA_COLUMNS]
    for i, record in enumerate(records):
        values = [
            i,
            record["area"],
            *record["bbox"],
            *record["point_coords"][0],
            record["predicted_iou"],
            record["stability_score"],
            *record["crop_box"],
        ]
        rows.append(",".join(map(str, values)))
    (folder / "metadata.csv").write_text("\n".join(rows))


def _write_mask(mask: np.ndarray, path: Path) -> None:
    from PIL import Image

    picture = Image.fromarray(np.multiply(mask, 255, dtype=np.uint8))
    picture.save(path, compress_level=1, compress_type=zlib.Z_RLE)  # smaller than by default, and as fast
