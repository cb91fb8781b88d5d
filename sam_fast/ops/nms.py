"""Non-maximum suppression of boxes by torchvision's rule, with its vague points settled."""

from __future__ import annotations

import math

import torch

from sam_fast import native
from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, *, backend: str = "auto") -> torch.Tensor:
    """Drop every box that overlaps a better one too much.

    Boxes are visited by descending score, equal scores by index, NaN scores last. A box is dropped when its IoU with
    a kept one is above the threshold, where area = (x2 - x1) * (y2 - y1), also if that is zero or negative, and all
    arithmetic is float32; a NaN IoU (0 / 0) is above nothing.

    Args:
        boxes: [N, 4] float32, XYXY.
        scores: [N] float32.
        iou_threshold: the largest IoU that two kept boxes may have.
        backend: "native", "torch" or "auto".

    Returns:
        [K] int64 indices of the kept boxes, by descending score.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: a shape is wrong, the threshold is NaN, or the tensors are on different devices.
    """
    for name, tensor in (("boxes", boxes), ("scores", scores)):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be a float32 tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4], got {list(boxes.shape)}")
    if scores.ndim != 1 or scores.shape[0] != boxes.shape[0]:
        raise ValueError(f"scores must be [{boxes.shape[0]}], got {list(scores.shape)}")
    if math.isnan(iou_threshold):
        raise ValueError("iou_threshold must be a number, got nan")
    if torch.compiler.is_compiling():
        return torch.ops.sam_fast.nms(boxes, scores, iou_threshold, backend)
    return _nms(boxes, scores, float(iou_threshold), backend)


def nms_reference(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """`nms` in PyTorch: strike out what each kept box suppresses."""
    order = scores.where(~scores.isnan(), -math.inf).sort(descending=True, stable=True).indices
    order = order[scores[order].isnan().sort(stable=True).indices]  # NaN behind -inf
    top_left, bottom_right = boxes[order, :2], boxes[order, 2:]
    area = (bottom_right - top_left).prod(1)
    alive = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for i in range(len(order)):
        if not alive[i]:
            continue
        sides = torch.minimum(bottom_right[i], bottom_right[i:]) - torch.maximum(top_left[i], top_left[i:])
        inter = sides.clamp(min=0).prod(1)
        iou = inter / (area[i] + area[i:] - inter)
        alive[i + 1 :] &= ~(iou.double() > iou_threshold)[1:]
    return order[alive]


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, backend: str) -> torch.Tensor:
    if choose_backend("nms", backend, boxes, scores) == "torch":
        return nms_reference(boxes, scores, iou_threshold)
    if native.uses_cuda(boxes):
        return _nms_cuda(boxes, scores, iou_threshold)
    kept = torch.empty(boxes.shape[0], dtype=torch.int64, device="cpu")
    count = native.module().nms(kept, boxes.contiguous(), scores.contiguous(), iou_threshold)
    return kept[:count]


def _nms_cuda(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """`nms` on a GPU; waits for it once, at the end, for the number of boxes that are left."""
    n, module, stream = boxes.shape[0], native.module(), native.cuda_stream(boxes)
    keys = torch.empty(n, dtype=torch.int64, device=boxes.device)
    module.nms_keys_cuda(keys, scores.contiguous(), stream)
    keys = keys.sort().values
    kept, count, workspace = (keys.new_empty(size) for size in (n, 1, module.nms_workspace(n)))
    module.nms_cuda(kept, count, workspace, keys, boxes.contiguous(), iou_threshold, stream)
    return kept[: int(count)]


def _nms_fake(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, backend: str) -> torch.Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


register("nms(Tensor boxes, Tensor scores, float iou_threshold, str backend) -> Tensor", _nms, _nms_fake)
