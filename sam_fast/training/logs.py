"""Logs of a run: a CSV file, pictures of predictions, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sam_fast.modeling import Sam
from sam_fast.training.batches import TrainingBatch
from sam_fast.utils.overlay import draw_masks, draw_prompts

_PICTURED = 4  # images per picture


class TrainingLog:
    """Writes `metrics.csv`, `pictures/` and TensorBoard events into a folder.

    Args:
        folder: where; made if it is missing.
        start: the step that a resumed run begins with: rows of this step and later, written after the checkpoint, go.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.folder = folder
        self.path = folder / "metrics.csv"
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = _rows_before(self.path, start)
        self._board = _tensorboard(folder, start)
        if self.path.exists():
            _write(self.path, self._rows)

    def row(self, row: Mapping[str, float]) -> None:
        """Append a row; it has a `step`."""
        new = not self.path.exists() or not self.path.stat().st_size
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            plain = {name: str(v) if isinstance(v, int) else f"{v:.6g}" for name, v in row.items()}
            writer.writerow(plain)
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, int(row["step"]))

    def picture(self, picture: Image.Image, step: int) -> Path:
        """Keep a picture of step `step`; returns its path."""
        path = self.folder / "pictures" / f"step-{step:07d}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture.save(path, quality=90)
        if self._board is not None:
            self._board.add_image("predictions", np.asarray(picture), step, dataformats="HWC")
        return path

    def close(self) -> None:
        """Finish the files."""
        if self._board is not None:
            self._board.close()


def _rows_before(path: Path, start: int) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if int(float(row["step"])) < start]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _tensorboard(folder: Path, start: int) -> Any:
    """A TensorBoard writer, or None where the package is not installed (extra `train`)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start)


@torch.no_grad()
def draw_predictions(model: Sam, batch: TrainingBatch) -> Image.Image:
    """Up to four images of a batch, one under the other: the object's truth, and the answers to its point and its box.

    The answer is the mask with the highest predicted IoU. Runs the model in eval mode and draws no random number.
    """
    was_training = model.training
    model.eval()
    count = min(_PICTURED, len(batch.images))
    embeddings = model.image_encoder(model.preprocess(batch.images[:count].float()))
    rows = []
    for i in range(count):
        height, width = (int(n) for n in batch.sizes[i])
        side = batch.images.shape[-1]
        point, box = batch.points[i, :1], batch.boxes[i, :1]
        image = batch.images[i, :, :height, :width].permute(1, 2, 0).cpu().numpy()
        truth = _full_size(batch.targets[i, :1].float() - 0.5, side, height, width)
        by_point = _answer(model, embeddings[i : i + 1], point=point)
        by_box = _answer(model, embeddings[i : i + 1], box=box)
        panels = [
            draw_masks(image, truth),
            draw_prompts(draw_masks(image, _full_size(by_point, side, height, width)), points=point.cpu().numpy()),
            draw_prompts(draw_masks(image, _full_size(by_box, side, height, width)), boxes=box.cpu().numpy()),
        ]
        rows.append(np.concatenate([_padded(np.asarray(panel), model.image_encoder.img_size) for panel in panels], 1))
    model.train(was_training)
    return Image.fromarray(np.concatenate(rows))


def _answer(
    model: Sam, embedding: torch.Tensor, point: torch.Tensor | None = None, box: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits [1, s, s] for one point [1, 2] or one box [1, 4]."""
    points = None if point is None else (point[None], torch.ones(1, 1, device=point.device))
    sparse, dense = model.prompt_encoder(points=points, boxes=box, masks=None)
    logits, iou = model.mask_decoder(embedding, model.prompt_encoder.get_dense_pe(), sparse, dense, True)
    return logits[0, iou[0].argmax()][None]


def _full_size(logits: torch.Tensor, side: int, height: int, width: int) -> np.ndarray:
    """Masks bool [N, H, W] of logits [N, s, s]."""
    upscaled = torch.nn.functional.interpolate(logits[None].float(), (side, side), mode="bilinear")[0]
    return (upscaled[:, :height, :width] > 0).cpu().numpy()


def _padded(picture: np.ndarray, side: int) -> np.ndarray:
    return np.pad(picture, ((0, side - picture.shape[0]), (0, side - picture.shape[1]), (0, 0)))
