"""Masks of COCO's "segmentation" field: polygons, run lengths, or run lengths as COCO's string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from sam_fast.data.polygons import pack_polygons
from sam_fast.ops.packed_masks import row_bytes, unpack_masks
from sam_fast.ops.rle import decode_rle

Segmentation: TypeAlias = "Sequence[Sequence[float] | np.ndarray] | Mapping[str, Any]"


def decode_segmentations(
    segmentations: Sequence[Segmentation], size: tuple[int, int], labels: Sequence[str]
) -> np.ndarray:
    """Decode the segmentations of one image, without those that cover no pixel.

    Args:
        segmentations: each a list of polygons, whose union is the object, or a code with "size" and "counts".
        size: (H, W) of the image.
        labels: what each is called in an error.

    Returns:
        bool [N, H, W], in the order given.

    Raises:
        ValueError: a segmentation is malformed, or of another size; the text begins with its label.
    """
    masks = []
    for segmentation, label in zip(segmentations, labels, strict=True):
        try:
            bits = _decode(segmentation, size)
        except KeyError as error:
            raise ValueError(f"{label}: its run-length code has no {error}") from error
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{label}: {error}") from error
        if bits.any():
            masks.append(bits)
    packed = torch.stack(masks) if masks else torch.zeros((0, size[0], row_bytes(size[1])), dtype=torch.uint8)
    return unpack_masks(packed, size[1]).numpy()


def _decode(segmentation: Segmentation, size: tuple[int, int]) -> torch.Tensor:
    """One object's packed mask, uint8 [H, row_bytes(W)]."""
    height, width = size
    if isinstance(segmentation, Mapping):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"its size is {segmentation['size']} and that of the image [{height}, {width}]")
        return decode_rle([segmentation])[0]
    if isinstance(segmentation, str) or not isinstance(segmentation, Sequence):
        raise TypeError(f"it must be a list of polygons or a run-length code, got {type(segmentation).__name__}")
    return pack_polygons(segmentation, size)
