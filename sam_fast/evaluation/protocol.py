"""The user that an evaluation simulates: where it clicks, and which box it draws.

Clicks follow the paper (Kirillov et al., "Segment Anything", 2023, section 7.1): the first one at the point of the
object that is farthest from its outline, each next one at such a point of the largest error region. The paper also
measures first clicks anywhere on the object (figure 9d).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sam_fast.evaluation.distance import squared_distance
from sam_fast.ops.connected_components import connected_components
from sam_fast.ops.packed_masks import pack_masks

CENTRE, RANDOM = "centre", "random"  # where a first click lies on its object


class Click(NamedTuple):
    """A pixel that the simulated user points at: x, y, and 1 for foreground or 0 for background."""

    x: int
    y: int
    label: int


def tight_box(mask: np.ndarray) -> np.ndarray:
    """The box of a mask: int64 [4] XYXY, the first and the last column and row with a mask pixel.

    Args:
        mask: bool [H, W].

    Raises:
        ValueError: the mask is empty.
    """
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if len(columns) == 0:
        raise ValueError("an empty mask has no box")
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], dtype=np.int64)


def centre_most(mask: np.ndarray) -> tuple[int, int]:
    """The pixel (x, y) of a mask that is farthest from all pixels outside; of several the first in reading order.

    What lies beyond the image counts as outside.

    Args:
        mask: bool [H, W].

    Raises:
        ValueError: the mask is empty.
    """
    x0, y0, x1, y1 = tight_box(mask).tolist()
    distance = squared_distance(mask[y0 : y1 + 1, x0 : x1 + 1])
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return x0 + int(x), y0 + int(y)


def random_pixel(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """A pixel (x, y) of a mask, bool [H, W], not empty, drawn uniformly."""
    inside = np.flatnonzero(mask)
    y, x = divmod(int(inside[rng.integers(len(inside))]), mask.shape[1])
    return x, y


def largest_region(masks: np.ndarray) -> tuple[int, np.ndarray]:
    """The largest 8-connected component of several masks; of equally large ones the first.

    Args:
        masks: bool [N, H, W], not all empty.

    Returns:
        Which of the masks it belongs to, and the component, bool [H, W].

    Raises:
        ValueError: all masks are empty.
    """
    labels, count = connected_components(pack_masks(torch.from_numpy(np.ascontiguousarray(masks))), masks.shape[-1])
    best = (0, 0, 0)  # area, mask, label
    for i in range(len(masks)):
        if count[i] > 0:
            areas = labels[i].flatten().bincount()[1:]
            label = int(areas.argmax())
            best = max(best, (int(areas[label]), -i, -label - 1))
    area, i, label = best
    if area == 0:
        raise ValueError("empty masks have no region")
    return -i, (labels[-i] == -label).numpy()


def next_click(truth: np.ndarray, prediction: np.ndarray | None = None) -> Click | None:
    """Where the user clicks: into the object, or, shown a prediction, into the largest region that is wrong.

    A region of missed pixels gets a foreground click, one of wrongly added pixels a background click.

    Args:
        truth: bool [H, W], not empty.
        prediction: bool [H, W]; None at first.

    Returns:
        The click; None where nothing is wrong.
    """
    if prediction is None:
        return Click(*centre_most(truth), 1)
    wrong = truth != prediction
    if not wrong.any():
        return None
    x0, y0, x1, y1 = tight_box(wrong).tolist()
    wrong, object_here = wrong[y0 : y1 + 1, x0 : x1 + 1], truth[y0 : y1 + 1, x0 : x1 + 1]
    kind, region = largest_region(np.stack([wrong & object_here, wrong & ~object_here]))
    x, y = centre_most(region)
    return Click(x0 + x, y0 + y, 1 - kind)
