"""`sam-fast demo`: automatic masks of a photo that comes with the package, as a picture."""

from __future__ import annotations

import time
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from sam_fast.cli.console import escaped, out
from sam_fast.cli.model import Device, ModelType, choose_device, load_model

_SEED = 0
# Grids smaller than the default of 32: the demo is to end within a minute on two cores.
_SETTINGS: dict[str, Any] = {"points_per_side": 16}
# nano predicts far lower IoU than the official models, and its logits are shallow: their thresholds leave nothing.
NANO_SETTINGS: dict[str, Any] = {
    "points_per_side": 24,
    "pred_iou_thresh": 0.35,
    "stability_score_thresh": 0.7,
    "stability_score_offset": 0.3,
    "box_nms_thresh": 0.5,
}
# Random weights answer different prompts with similar masks and low scores: the usual thresholds leave next to none.
_SEEDED_SETTINGS: dict[str, Any] = {
    "points_per_side": 8,
    "pred_iou_thresh": 0.5,
    "stability_score_thresh": 0.8,
    "box_nms_thresh": 0.95,
}


def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder for the picture; made if it is missing.")],
    model_type: ModelType = "nano",
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Weights of that model; nano brings its own, others: random.")
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", help="A photo of your own.")] = None,
    device: Device = None,
) -> None:
    """Run automatic mask generation on a photo and draw the masks beside it."""
    from PIL import Image

    from sam_fast import SamAutomaticMaskGenerator
    from sam_fast.preprocess import read_image
    from sam_fast.utils.overlay import beside, draw_masks, save_picture

    name = "astronaut" if image is None else image.stem
    with resources.as_file(resources.files("sam_fast") / "assets" / "photos" / "astronaut.jpg") as packaged:
        photo = read_image(packaged if image is None else image)

    device = choose_device(device)
    model = load_model(model_type, checkpoint, device)
    seeded = checkpoint is None and model_type != "nano"
    if seeded:
        from sam_fast.modeling.seeded import seed_weights

        seed_weights(model, _SEED)
    settings = _SEEDED_SETTINGS if seeded else NANO_SETTINGS if model_type == "nano" else _SETTINGS
    generator = SamAutomaticMaskGenerator(model, **settings)
    started = time.perf_counter()
    records = generator.generate(photo)
    seconds = time.perf_counter() - started

    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}_masks.jpg"
    save_picture(beside(Image.fromarray(photo), draw_masks(photo, records)), path)
    console = out()
    height, width = photo.shape[:2]
    side = settings["points_per_side"]
    console.print(
        f"{len(records)} masks of {escaped(name)} ({width} x {height}) by {model_type} on {device} in {seconds:.1f} s, "
        f"{side} x {side} points"
    )
    console.print(f"picture: {escaped(path)}")
    if seeded:
        console.print(
            f"[yellow]These weights are random (seed {_SEED}): "
            "the masks mean nothing, they show that the pipeline works.[/]\n"
            f"For real masks: sam-fast download {model_type} and then --checkpoint with the file."
        )
