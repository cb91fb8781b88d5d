"""The building blocks of automatic mask generation under the names that `segment_anything.utils.amg` gives them."""

from __future__ import annotations

import math
from collections.abc import Generator, ItemsView
from copy import deepcopy
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sam_fast.ops import connected_components
from sam_fast.ops.packed_masks import pack_masks, unpack_masks
from sam_fast.ops.rle import compress_counts, decode_rle, encode_rle, rle_area


class MaskData:
    """Masks and what is known about them: named lists, numpy arrays and tensors of one common length."""

    def __init__(self, **kwargs: Any) -> None:
        self._stats: dict[str, Any] = {}
        for key, value in kwargs.items():
            self[key] = value

    def __setitem__(self, key: str, item: Any) -> None:
        if not isinstance(item, (list, np.ndarray, torch.Tensor)):
            raise TypeError(f"MaskData holds lists, numpy arrays and tensors, got {type(item).__name__} for {key!r}")
        self._stats[key] = item

    def __delitem__(self, key: str) -> None:
        del self._stats[key]

    def __getitem__(self, key: str) -> Any:
        return self._stats[key]

    def items(self) -> ItemsView[str, Any]:
        """The (name, values) pairs."""
        return self._stats.items()

    def filter(self, keep: torch.Tensor) -> None:
        """Keep, in place, the rows that `keep` selects: a bool tensor [N] or int indices [K], on any device."""
        keep = keep.detach() if isinstance(keep, torch.Tensor) else torch.as_tensor(keep, device="cpu")
        # Indices once, not once per field: on a GPU the host waits to learn how many there are. And torch.tensor([]) is
        # a float tensor, yet means "none".
        rows = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep.long()
        on_host = None
        for key, values in self._stats.items():
            if isinstance(values, torch.Tensor):
                self._stats[key] = values[rows.to(values.device)]
                continue
            on_host = rows.cpu().numpy() if on_host is None else on_host
            self._stats[key] = values[on_host] if isinstance(values, np.ndarray) else [values[i] for i in on_host]

    def cat(self, new_stats: MaskData) -> None:
        """Append, in place, the rows of `new_stats`; names that this object lacks are copied."""
        for key, values in new_stats.items():
            if key not in self._stats:
                self._stats[key] = values.clone() if isinstance(values, torch.Tensor) else deepcopy(values)
            elif isinstance(values, torch.Tensor):
                self._stats[key] = torch.cat([self._stats[key], values], dim=0)
            elif isinstance(values, np.ndarray):
                self._stats[key] = np.concatenate([self._stats[key], values], axis=0)
            else:
                self._stats[key] = self._stats[key] + deepcopy(values)

    def to_numpy(self) -> None:
        """Turn, in place, every tensor into a numpy array."""
        for key, values in self._stats.items():
            if isinstance(values, torch.Tensor):
                self._stats[key] = values.detach().cpu().numpy()


def is_box_near_crop_edge(
    boxes: torch.Tensor, crop_box: list[int] | torch.Tensor, orig_box: list[int] | torch.Tensor, atol: float = 20.0
) -> torch.Tensor:
    """Find the boxes that a crop has probably cut: a side near the crop's edge that is not near the image's edge.

    Args:
        boxes: [N,4], XYXY, pixels of the crop.
        crop_box: [x0, y0, x1, y1] of the crop, pixels of the image.
        orig_box: [0, 0, W, H] of the image.
        atol: how many pixels still count as near.

    Returns:
        bool [N].
    """
    in_image = uncrop_boxes_xyxy(boxes, crop_box).float()
    crop_edges = torch.as_tensor(crop_box, dtype=torch.float32, device=boxes.device)
    image_edges = torch.as_tensor(orig_box, dtype=torch.float32, device=boxes.device)
    near_crop = (in_image - crop_edges).abs() <= atol
    near_image = (in_image - image_edges).abs() <= atol
    return (near_crop & ~near_image).any(dim=1)


def box_xyxy_to_xywh(box_xyxy: Any) -> Any:
    """Turn corners into corner and extent; inclusive corners give an extent that is one less than the pixel count.

    Args:
        box_xyxy: [4] or [..., 4], XYXY; a tensor, array or list.

    Returns:
        A new box of the same kind, XYWH.
    """
    if isinstance(box_xyxy, torch.Tensor):
        return torch.cat([box_xyxy[..., :2], box_xyxy[..., 2:] - box_xyxy[..., :2]], dim=-1)
    if isinstance(box_xyxy, np.ndarray):
        return np.concatenate([box_xyxy[..., :2], box_xyxy[..., 2:] - box_xyxy[..., :2]], axis=-1)
    x0, y0, x1, y1 = box_xyxy
    return type(box_xyxy)([x0, y0, x1 - x0, y1 - y0])


def batch_iterator(batch_size: int, *args: Any) -> Generator[list[Any], None, None]:
    """Walk along several sequences of one length together, `batch_size` items at a time; the last batch may be short.

    Raises:
        ValueError: no sequence, sequences of different lengths, or a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    lengths = [len(sequence) for sequence in args]
    if len(set(lengths)) != 1:
        raise ValueError(f"batch_iterator needs sequences of one length, got lengths {lengths}")
    for start in range(0, lengths[0], batch_size):
        yield [sequence[start : start + batch_size] for sequence in args]


def mask_to_rle_pytorch(tensor: torch.Tensor) -> list[dict[str, Any]]:
    """Encode masks as run lengths down the columns, starting with zeros; masks of any total size.

    Args:
        tensor: [B,H,W], nonzero is foreground.

    Returns:
        B dicts {"size": [H,W], "counts": [int, ...]}.

    Raises:
        ValueError: not three dimensions.
    """
    if tensor.ndim != 3:
        raise ValueError(f"masks must be [B,H,W], got {tuple(tensor.shape)}")
    return encode_rle(pack_masks(tensor != 0), tensor.shape[2])


def rle_to_mask(rle: dict[str, Any]) -> np.ndarray:
    """Decode one RLE, its counts integers or COCO's string, to a bool mask [H,W].

    Raises:
        ValueError: the counts do not add up to H * W.
    """
    return unpack_masks(decode_rle([rle]), rle["size"][1])[0].numpy()


def area_from_rle(rle: dict[str, Any]) -> int:
    """The number of foreground pixels of an RLE, its counts integers or COCO's string."""
    return rle_area(rle)


def calculate_stability_score(masks: torch.Tensor, mask_threshold: float, threshold_offset: float) -> torch.Tensor:
    """Measure how little a mask depends on its threshold: the IoU of the masks at a higher and at a lower one.

    Args:
        masks: logits [..., H, W].
        mask_threshold: the middle threshold.
        threshold_offset: how far the two thresholds lie above and below it.

    Returns:
        float32 [...]; NaN where no logit passes the lower threshold.
    """

    def count_above(threshold: float) -> torch.Tensor:
        # torch widens its input to the dtype of the sum, so the large sum is kept narrow; int16 overflows on wide rows
        row_dtype = torch.int16 if masks.shape[-1] < 2**15 else torch.int32
        return (masks > threshold).sum(-1, dtype=row_dtype).sum(-1, dtype=torch.int32)

    return count_above(mask_threshold + threshold_offset) / count_above(mask_threshold - threshold_offset)


def build_point_grid(n_per_side: int) -> np.ndarray:
    """Place n x n points in the middles of the cells of the unit square: float64 [n*n, 2], XY, row by row.

    Raises:
        ValueError: fewer than 1 point per side.
    """
    if n_per_side < 1:
        raise ValueError(f"a point grid needs at least 1 point per side, got {n_per_side}")
    offset = 1 / (2 * n_per_side)
    middles = np.linspace(offset, 1 - offset, n_per_side)
    y, x = np.meshgrid(middles, middles, indexing="ij")
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def build_all_layer_point_grids(n_per_side: int, n_layers: int, scale_per_layer: int) -> list[np.ndarray]:
    """Build the point grid of the image and of each of `n_layers` crop layers, each thinner by `scale_per_layer`.

    Raises:
        ValueError: a layer would be left without points.
    """
    return [build_point_grid(int(n_per_side / scale_per_layer**layer)) for layer in range(n_layers + 1)]


def generate_crop_boxes(
    im_size: tuple[int, ...], n_layers: int, overlap_ratio: float
) -> tuple[list[list[int]], list[int]]:
    """Cover an image with overlapping crops: layer 0 is the image, layer i a grid of 2^i x 2^i crops.

    Crops that lie outside an image too small for its grid are left out.

    Args:
        im_size: (H, W) of the image.
        n_layers: how many layers follow the image itself.
        overlap_ratio: overlap of the crops of layer 1 as a part of the image's short side; it halves with each layer.

    Returns:
        (boxes [x0, y0, x1, y1] in pixels of the image, the layer of each box), column by column of the grid.
    """
    height, width = im_size
    boxes, layers = [[0, 0, width, height]], [0]
    for layer in range(1, n_layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / per_side))
        crop_width, crop_height = (math.ceil((overlap * (per_side - 1) + side) / per_side) for side in (width, height))
        for column, row in product(range(per_side), repeat=2):
            x0, y0 = column * (crop_width - overlap), row * (crop_height - overlap)
            if x0 < width and y0 < height:
                boxes.append([x0, y0, min(x0 + crop_width, width), min(y0 + crop_height, height)])
                layers.append(layer)
    return boxes, layers


def _crop_offset(crop_box: list[int] | torch.Tensor, repeats: int, like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(crop_box[:2], device=like.device).repeat(repeats)


def uncrop_boxes_xyxy(boxes: torch.Tensor, crop_box: list[int] | torch.Tensor) -> torch.Tensor:
    """Move boxes [N,4] or [N,C,4], XYXY, from pixels of the crop to pixels of the image."""
    return boxes + _crop_offset(crop_box, 2, boxes)


def uncrop_points(points: torch.Tensor, crop_box: list[int] | torch.Tensor) -> torch.Tensor:
    """Move points [N,2] or [N,C,2], XY, from pixels of the crop to pixels of the image."""
    return points + _crop_offset(crop_box, 1, points)


def uncrop_masks(masks: torch.Tensor, crop_box: list[int], orig_h: int, orig_w: int) -> torch.Tensor:
    """Pad masks [..., h, w] of a crop with zeros to the size of the image [..., orig_h, orig_w]."""
    x0, y0, x1, y1 = crop_box
    if (x0, y0, x1, y1) == (0, 0, orig_w, orig_h):
        return masks
    return F.pad(masks, (x0, orig_w - x1, y0, orig_h - y1), value=0)


def remove_small_regions(mask: np.ndarray, area_thresh: float, mode: str) -> tuple[np.ndarray, bool]:
    """Fill the small holes of a mask, or erase its small islands; regions are 8-connected.

    If every island is small, the largest stays.

    Args:
        mask: bool [H,W].
        area_thresh: regions of strictly fewer pixels are small.
        mode: "holes" or "islands".

    Returns:
        (bool [H,W], whether anything changed); the mask itself if nothing did.

    Raises:
        ValueError: unknown mode, or not two dimensions.
    """
    if mode not in ("holes", "islands"):
        raise ValueError(f"mode must be 'holes' or 'islands', got {mode!r}")
    if mask.ndim != 2:
        raise ValueError(f"mask must be [H,W], got {mask.shape}")
    bits = pack_masks(torch.from_numpy(np.array(mask != 0))[None])
    bits, changed = connected_components.remove_small_regions(bits, mask.shape[1], area_thresh, mode)
    if not changed[0]:
        return mask, False
    return unpack_masks(bits, mask.shape[1])[0].numpy(), True


def coco_encode_rle(uncompressed_rle: dict[str, Any]) -> dict[str, Any]:
    """Compress an RLE to COCO's string form, {"size": [H,W], "counts": str}, ready for JSON and pycocotools."""
    height, width = uncompressed_rle["size"]
    return {"size": [height, width], "counts": compress_counts(uncompressed_rle["counts"])}


def batched_mask_to_box(masks: torch.Tensor) -> torch.Tensor:
    """Find the bounding boxes of masks.

    Args:
        masks: [..., H, W], nonzero is foreground.

    Returns:
        int64 [..., 4], XYXY, both corners inside the mask; zeros for an empty mask. Integers for an empty batch too,
        where the published code returns floats.
    """
    height, width = masks.shape[-2:]
    if masks.numel() == 0:
        return torch.zeros(*masks.shape[:-2], 4, dtype=torch.int64, device=masks.device)
    masks = masks != 0
    top, bottom = _first_and_last(masks.any(dim=-1), height)
    left, right = _first_and_last(masks.any(dim=-2), width)
    boxes = torch.stack([left, top, right, bottom], dim=-1)
    return boxes * (right >= left)[..., None]


def _first_and_last(occupied: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and last true index along the last dimension; `length` and 0, so last < first, where none is true."""
    index = torch.arange(length, device=occupied.device)
    return torch.where(occupied, index, length).amin(dim=-1), torch.where(occupied, index, 0).amax(dim=-1)
