"""`sam-fast amg`: masks of everything in images, with the flags and files of segment_anything's scripts/amg.py."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from sam_fast.cli.amg_files import AmgFiles
from sam_fast.cli.console import escaped, item_progress, out, report_error
from sam_fast.cli.model import (
    Backend,
    BackendOption,
    Checkpoint,
    Device,
    ModelType,
    Precision,
    PrecisionOption,
    choose_device,
    load_trained_model,
)
from sam_fast.cli.pipeline import Behind, ahead

_SETTINGS = "Mask generator"
_NO_PHOTOS = {"PDF", "PALM", "MPEG", "HDF5", "GRIB", "BUFR"}  # formats that Pillow knows, but cannot read by itself


def amg(
    input: Annotated[Path, typer.Option("--input", help="An image, or a folder of images.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the results; made if it is missing.")],
    model_type: ModelType,
    checkpoint: Checkpoint = None,
    device: Device = None,
    convert_to_rle: Annotated[
        bool, typer.Option("--convert-to-rle", help="One JSON of COCO RLEs per image, not a folder of PNGs and a CSV.")
    ] = False,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write <image>_overlay.jpg, the masks drawn on the image.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an image's folder of masks, or JSON, if it exists.")
    ] = False,
    precision: PrecisionOption = Precision.auto,
    backend: BackendOption = Backend.auto,
    points_per_side: Annotated[
        int | None, typer.Option(help="Side of the grid of point prompts.", min=1, rich_help_panel=_SETTINGS)
    ] = None,
    points_per_batch: Annotated[
        int | None, typer.Option(help="Prompts decoded together.", min=1, rich_help_panel=_SETTINGS)
    ] = None,
    pred_iou_thresh: Annotated[
        float | None, typer.Option(help="Keep masks whose predicted IoU is above it.", rich_help_panel=_SETTINGS)
    ] = None,
    stability_score_thresh: Annotated[
        float | None, typer.Option(help="Keep masks whose stability score reaches it.", rich_help_panel=_SETTINGS)
    ] = None,
    stability_score_offset: Annotated[
        float | None, typer.Option(help="Shift of the threshold that measures stability.", rich_help_panel=_SETTINGS)
    ] = None,
    box_nms_thresh: Annotated[
        float | None, typer.Option(help="Box IoU above which masks are duplicates.", rich_help_panel=_SETTINGS)
    ] = None,
    crop_n_layers: Annotated[
        int | None, typer.Option(help="Layers of crops to run on as well.", min=0, rich_help_panel=_SETTINGS)
    ] = None,
    crop_nms_thresh: Annotated[
        float | None, typer.Option(help="The same between masks of different crops.", rich_help_panel=_SETTINGS)
    ] = None,
    crop_overlap_ratio: Annotated[
        float | None, typer.Option(help="Overlap of the crops, part of the shorter side.", rich_help_panel=_SETTINGS)
    ] = None,
    crop_n_points_downscale_factor: Annotated[
        int | None,
        typer.Option(help="Divides the grid's side in each layer of crops.", min=1, rich_help_panel=_SETTINGS),
    ] = None,
    min_mask_region_area: Annotated[
        int | None, typer.Option(help="Remove holes and islands of fewer pixels.", min=0, rich_help_panel=_SETTINGS)
    ] = None,
) -> None:
    """Find masks of everything in an image or in each image of a folder.

    Settings of the mask generator that are left out take SamAutomaticMaskGenerator's defaults. Exit code 1 if an image
    could not be read; the others are done all the same.
    """
    settings = {
        "points_per_side": points_per_side,
        "points_per_batch": points_per_batch,
        "pred_iou_thresh": pred_iou_thresh,
        "stability_score_thresh": stability_score_thresh,
        "stability_score_offset": stability_score_offset,
        "box_nms_thresh": box_nms_thresh,
        "crop_n_layers": crop_n_layers,
        "crop_nms_thresh": crop_nms_thresh,
        "crop_overlap_ratio": crop_overlap_ratio,
        "crop_n_points_downscale_factor": crop_n_points_downscale_factor,
        "min_mask_region_area": min_mask_region_area,
    }
    images, ignored = find_images(input)
    check_targets(images, output, convert_to_rle, overwrite)

    from sam_fast import SamAutomaticMaskGenerator
    from sam_fast.preprocess import read_image

    device = choose_device(device)
    generator = SamAutomaticMaskGenerator(
        load_trained_model(model_type, checkpoint, device),
        output_mode="coco_rle" if convert_to_rle else "binary_mask",
        precision=precision.value,
        backend=backend.value,
        **{name: value for name, value in settings.items() if value is not None},  # type: ignore[arg-type]
    )
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    counts: list[int] = []  # of masks
    unreadable = 0
    with item_progress() as progress, AmgFiles(output, convert_to_rle, overlay) as files, Behind() as behind:
        read = zip(images, ahead(read_image, images), strict=True)
        for path, coming in progress.track(read, description="masks", total=len(images)):
            try:
                image = coming.result()
            except (ValueError, OSError) as error:
                report_error(f"skipped: {error}")
                unreadable += 1
                continue
            behind(partial(_write, files, path.stem, image, generator.begin(image), counts))
            del image  # which is gone when its masks are written
    seconds = time.perf_counter() - started
    done = len(images) - unreadable
    summary = f"{sum(counts)} masks of {done} image{'s' * (done != 1)} in {seconds:.1f} s on {device}"
    summary += f", written to {output}"
    if ignored:
        summary += f"; {ignored} other file{'s' * (ignored != 1)} ignored"
    out().print(escaped(summary) + (f"; [red]{unreadable} unreadable[/]" if unreadable else ""))
    if unreadable:
        raise typer.Exit(1)


def _write(
    files: AmgFiles, stem: str, image: np.ndarray, finish: Callable[[], list[dict[str, Any]]], counts: list[int]
) -> None:
    """Wait for an image's records and write their files, while the model works on the next image."""
    records = finish()
    counts.append(len(records))
    files.write(stem, image, records)


def find_images(path: Path) -> tuple[list[Path], int]:
    """Return the images that `path` stands for, in order of name, and how many other files lie beside them.

    A file is taken at its word; of a folder those files are taken whose suffix is that of an image format that Pillow
    reads.

    Raises:
        FileNotFoundError: there is no such file or folder, or no image in the folder.
    """
    from PIL import Image

    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"no image or folder at {path}")
        return [path], 0
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name not in _NO_PHOTOS}
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    images = [file for file in files if file.suffix.lower() in suffixes]
    if not images:
        raise FileNotFoundError(f"no images in the folder {path}")
    return images, len(files) - len(images)


def check_targets(images: Sequence[Path], output: Path, as_json: bool, overwrite: bool) -> None:
    """Find out before any work that two images would share their results, or that results exist.

    Raises:
        ValueError: two images differ in their suffix only.
        FileExistsError: a folder of masks, or a JSON file with `as_json`, exists and `overwrite` is off.
    """
    stem, count = Counter(image.stem for image in images).most_common(1)[0]
    if count > 1:
        names = ", ".join(image.name for image in images if image.stem == stem)
        raise ValueError(f"the results of {names} would share one name; put these images into different folders")
    targets = [output / (f"{image.stem}.json" if as_json else image.stem) for image in images]
    existing = [target for target in targets if target.exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{existing[0]} exists; remove it, choose another --output, or pass --overwrite")
