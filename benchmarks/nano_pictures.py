"""Pictures by which a person can judge nano: clicked objects and automatic masks of the photos, and its training curve.

`python -m benchmarks.nano_pictures [metrics.csv ...]` writes nano_clicks.jpg, nano_masks.jpg and, if given the logs of
its training runs in order, nano_curve.png.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sam_fast import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from sam_fast.cli.demo import NANO_SETTINGS
from sam_fast.data.open import open_source
from sam_fast.evaluation.protocol import next_click
from sam_fast.utils.overlay import beside, draw_masks, draw_prompts

FOLDER = Path(__file__).parents[1] / "docs" / "images"
_SCALE = 1.5  # so that points do not cover small objects


def draw_clicks(predictor: SamPredictor, image: np.ndarray, masks: np.ndarray, columns: int = 6) -> Image.Image:
    """One picture per object: its centre-most pixel clicked, and the mask with the highest predicted IoU."""
    predictor.set_image(image)
    tiles = []
    for mask in masks:
        click = next_click(mask)
        assert click is not None
        answers, scores, _ = predictor.predict(np.array([[click.x, click.y]]), np.array([1]))
        picture = draw_masks(image, answers[scores.argmax()][None])
        width, height = (round(_SCALE * n) for n in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        picture = draw_prompts(picture, points=_SCALE * np.array([[click.x, click.y]]))
        tiles.append(np.asarray(picture.resize((240, round(240 * height / width)), Image.Resampling.LANCZOS)))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
    return Image.fromarray(np.concatenate(rows))


def draw_curve(logs: list[Path]) -> Image.Image:
    """IoU of the first answer over the images of training, the logs one after the other, averaged over 10 rows.

    Steps without prompts have no IoU (NaN), and leave a gap.
    """
    canvas = Image.new("RGB", (900, 420), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    left, top, right, bottom = 60, 30, 880, 370
    curves: dict[str, list[tuple[float, float]]] = {"first_iou": [], "best_iou": []}
    offset, borders = 0.0, []
    for path in logs:
        with open(path, newline="") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        batch = round(rows[-1]["images_per_second"] * rows[-1]["step_seconds"])
        for i in range(0, len(rows), 10):
            chunk = rows[i : i + 10]
            for name, points in curves.items():
                points.append((offset + chunk[-1]["step"] * batch, sum(r[name] for r in chunk) / len(chunk)))
        offset += rows[-1]["step"] * batch
        borders.append(offset)
    for level in np.arange(0, 1.01, 0.2):
        y = bottom - level * (bottom - top)
        draw.line((left, y, right, y), (225, 225, 225))
        draw.text((left - 34, y - 9), f"{level:.1f}", "black", font)
    for border in borders:
        x = left + border / offset * (right - left)
        draw.line((x, top, x, bottom), (200, 200, 200))
    draw.text((right - 110, bottom + 8), f"{offset:,.0f} images", "black", font)
    for (name, points), color in zip(curves.items(), ((31, 119, 180), (44, 160, 44)), strict=True):
        line = [(left + x / offset * (right - left), bottom - y * (bottom - top)) for x, y in points if not np.isnan(y)]
        draw.line(line, color, 3)
        label = {"first_iou": "highest predicted IoU", "best_iou": "best of 3"}[name]
        draw.text((left + 10 + 230 * (name == "best_iou"), top - 24), label, color, font)
    draw.text((right - 330, top - 24), "true IoU of the first answer, training scenes", "black", font)
    return canvas


def main(arguments: list[str] | None = None) -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", type=Path, metavar="metrics.csv", help="of training runs, in order")
    parser.add_argument("--output", type=Path, default=FOLDER, help="a folder")
    given = parser.parse_args(arguments)
    missing = [str(path) for path in given.logs if not path.is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    given.output.mkdir(parents=True, exist_ok=True)
    model = sam_model_registry["nano"]()
    predictor, generator = SamPredictor(model), SamAutomaticMaskGenerator(model, **NANO_SETTINGS)
    source = open_source("photos")
    clicked, automatic = [], []
    for index in range(len(source)):
        sample = source.load(index)
        clicked.append(np.asarray(draw_clicks(predictor, sample.image, sample.masks)))
        pair = beside(Image.fromarray(sample.image), draw_masks(sample.image, generator.generate(sample.image)))
        automatic.append(np.asarray(pair.resize((900, round(900 * pair.height / pair.width)))))
    Image.fromarray(np.concatenate(clicked)).save(given.output / "nano_clicks.jpg", quality=85)
    Image.fromarray(np.concatenate(automatic)).save(given.output / "nano_masks.jpg", quality=85)
    if given.logs:
        draw_curve(given.logs).save(given.output / "nano_curve.png")
    print(f"pictures: {given.output}")


if __name__ == "__main__":
    main()
