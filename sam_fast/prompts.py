"""Prompts as a user writes them -> prompts as the model reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sam_fast.embedding import ImageEmbedding
from sam_fast.runtime.inference import Prompts
from sam_fast.utils.transforms import ResizeLongestSide

# what -> (dimensions of one prompt, how the shape is described to the user)
_SHAPES = {
    "points": (2, "point_coords must be [K, 2] or [N, K, 2]"),
    "labels": (1, "point_labels must be [K] or [N, K]"),
    "boxes": (1, "box must be [4] or [N, 4]"),
    "masks": (3, "mask_input must be [1, h, w] or [N, 1, h, w]"),
}


def to_prompts(arrays: Mapping[str, Any], embedding: ImageEmbedding, device: torch.device) -> Prompts:
    """Check the prompts of `SamPredictor.predict` and bring them into the frame of the model's input.

    Args:
        arrays: "points", "labels", "boxes", "masks", each an array (in pixels of the original image) or None.
        embedding: gives the sizes and the side of a mask prompt.

    Raises:
        ValueError: a shape is wrong, points and labels do not fit, or the numbers of prompts differ.
    """
    batched: dict[str, np.ndarray] = {}
    for name, (dims, message) in _SHAPES.items():
        value = arrays.get(name)
        if value is None or (name == "labels" and arrays.get("points") is None):
            continue  # like the official code, labels without points are no prompt
        array = _to_array(value)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{message} with numbers in it, got dtype {array.dtype}")
        if array.ndim not in (dims, dims + 1):
            raise ValueError(f"{message}, got {list(array.shape)}")
        batched[name] = array if array.ndim == dims + 1 else array[None]
    _check(batched, embedding)

    transform = ResizeLongestSide(embedding.image_size)
    points = labels = boxes = masks = None
    if "points" in batched:
        coords = transform.apply_coords(batched["points"], embedding.original_size)
        points = torch.as_tensor(coords, dtype=torch.float, device=device)
        labels = torch.as_tensor(np.array(batched["labels"], dtype=np.int32), device=device)
    if "boxes" in batched:
        corners = transform.apply_boxes(batched["boxes"], embedding.original_size)
        boxes = torch.as_tensor(corners, dtype=torch.float, device=device)
    if "masks" in batched:
        masks = torch.as_tensor(np.array(batched["masks"], dtype=np.float32), device=device)
    return Prompts(points, labels, boxes, masks)


def _check(batched: Mapping[str, np.ndarray], embedding: ImageEmbedding) -> None:
    if "points" in batched:
        if "labels" not in batched:
            raise ValueError("point_labels must be supplied if point_coords is supplied.")
        if batched["points"].shape[-1] != 2:
            raise ValueError(f"{_SHAPES['points'][1]}, got {list(batched['points'].shape)}")
        if batched["labels"].shape != batched["points"].shape[:-1]:
            raise ValueError(
                f"point_labels must have one label per point, got labels {list(batched['labels'].shape)} "
                f"for points {list(batched['points'].shape)}"
            )
    if "boxes" in batched and batched["boxes"].shape[-1] != 4:
        raise ValueError(f"{_SHAPES['boxes'][1]}, got {list(batched['boxes'].shape)}")
    if "masks" in batched:
        side = 4 * embedding.features.shape[-1]
        if batched["masks"].shape[1:] != (1, side, side):
            raise ValueError(
                f"{_SHAPES['masks'][1]} with h = w = {side} for this model, got {list(batched['masks'].shape)}"
            )
    for name in ("points", "boxes"):
        if name in batched and not np.isfinite(batched[name]).all():
            raise ValueError(f"{_SHAPES[name][1]} of finite coordinates, got NaN or infinity")
    counts = {name: len(array) for name, array in batched.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"all prompts must have the same N, got {counts}; give points as [N, K, 2] beside boxes [N, 4]"
        )


def single_prompt_shape(arrays: Mapping[str, Any], count: int) -> bool:
    """Whether results lose their leading N: one prompt, not given as points [1, K, 2] or a mask [1, 1, h, w]."""
    explicit = any(
        arrays.get(name) is not None and np.ndim(arrays[name]) == _SHAPES[name][0] + 1 for name in ("points", "masks")
    )
    return count == 1 and not explicit


def group_prompts(
    coords: Any, labels: Any, boxes: Any, masks: Any
) -> list[tuple[list[int], dict[str, np.ndarray | None]]] | None:
    """Group ragged prompts (a list of point arrays) by their number of points; None if the points are not ragged.

    Prompts are not padded to one length: a padding token takes part in the attention and would change the masks.
    """
    if not isinstance(coords, (list, tuple)) or not coords or np.ndim(coords[0]) != 2:
        return None
    if labels is None or len(labels) != len(coords):
        raise ValueError(f"ragged points need one array of labels each, got {len(coords)} arrays of points")
    for name, value in (("box", boxes), ("mask_input", masks)):
        if value is not None and len(value) != len(coords):
            raise ValueError(f"{name} must have one entry per prompt ({len(coords)}), got {len(value)}")
    by_count: dict[int, list[int]] = {}
    for i, points in enumerate(coords):
        by_count.setdefault(len(points), []).append(i)
    groups: list[tuple[list[int], dict[str, np.ndarray | None]]] = []
    for indices in by_count.values():
        arrays: dict[str, np.ndarray | None] = {
            "points": np.stack([_to_array(coords[i]) for i in indices]),
            "labels": np.stack([_to_array(labels[i]) for i in indices]),
            "boxes": None if boxes is None else _to_array(boxes)[indices],
            "masks": None if masks is None else _to_array(masks)[indices],
        }
        groups.append((indices, arrays))
    return groups


def _to_array(value: Any) -> np.ndarray:
    """An array of a list, of an array, or of a tensor on any device."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
    return np.asarray(value)
