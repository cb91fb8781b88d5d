"""The losses of SAM's training.

Source: Kirillov et al., "Segment Anything", 2023, section 3 ("Losses and training") and appendix A ("Making the model
ambiguity-aware", "Training algorithm"); focal loss: Lin et al., 2017; dice loss: Milletari et al., "V-Net", 2016.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sam_fast.ops.backend import triton_unavailable_reason
from sam_fast.training.watched import is_watched

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 20.0, 1.0, 1.0
GROUPING_SCALE, GROUPING_RADIUS = 10.0, 20  # see `grouping_loss`
_KERNEL_DEVICES = ("cuda",)  # tests add the CPU, where kernels are interpreted
_KERNEL_FORMATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_MASKS = 8  # of a prompt, in kernels


@dataclass(frozen=True)
class PromptLoss:
    """What one pass of the decoder cost; each field has one entry per prompt, [N], but `iou` [N, M].

    Attributes:
        total: what is back-propagated, `mask` of the chosen mask + the IoU head's error.
        mask: mask loss of the chosen mask, the one with the lowest.
        chosen: its index, int64.
        iou: true IoU of every mask with the target, not differentiable.
    """

    total: Tensor
    mask: Tensor
    chosen: Tensor
    iou: Tensor


def focal_loss(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over pixels of -alpha_t (1 - p_t)^gamma log p_t, with alpha 0.25 and gamma 2.

    Args:
        logits: [..., H, W].
        targets: 0 or 1, shaped alike (or broadcastable).
        valid: 1 where a pixel counts, 0 in the padding; all count without it.

    Returns:
        [...].
    """
    targets = targets.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets.expand_as(logits), reduction="none")
    # 1 - p_t is the probability of the wrong answer, sigmoid of the logit with the sign turned against the target.
    wrong = torch.sigmoid(logits * (1 - 2 * targets))
    alpha = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    return _mean_over_pixels(alpha * wrong**FOCAL_GAMMA * cross_entropy, valid)


def dice_loss(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """1 - (2 sum p g + 1) / (sum p + sum g + 1) over the pixels, [..., H, W] -> [...] (arguments: `focal_loss`)."""
    probabilities, targets = torch.sigmoid(logits), targets.to(logits.dtype)
    if valid is not None:
        probabilities, targets = probabilities * valid, targets * valid
    overlap = (probabilities * targets).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (probabilities.sum((-2, -1)) + targets.sum((-2, -1)) + 1)


def mask_loss(logits: Tensor, targets: Tensor, valid: Tensor | None = None, blend: float = 1.0) -> Tensor:
    """20 focal + dice, [..., H, W] -> [...] (arguments: `focal_loss`).

    From random weights this loss leaves masks empty for long: nearly all pixels are easy background. With `blend` < 1
    the focal term is 20 blend focal + (1 - blend) `balanced_cross_entropy`, to which an object counts as much as all
    that it is not; training from nothing raises it from 0 to 1 over the first steps.
    """
    loss = DICE_WEIGHT * dice_loss(logits, targets, valid)
    if blend > 0:
        loss = loss + blend * FOCAL_WEIGHT * focal_loss(logits, targets, valid)
    if blend < 1:
        loss = loss + (1 - blend) * balanced_cross_entropy(logits, targets, valid)
    return loss


def balanced_cross_entropy(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean cross entropy of the pixels inside plus that of those outside, [..., H, W] -> [...] (as `focal_loss`)."""
    inside = targets.to(logits.dtype).expand_as(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, inside, reduction="none")
    counted = torch.ones_like(inside) if valid is None else valid.to(inside.dtype).expand_as(inside)
    return _mean_over_pixels(cross_entropy, inside * counted) + _mean_over_pixels(cross_entropy, (1 - inside) * counted)


@torch.no_grad()
def true_iou(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """IoU of the thresholded masks `logits` > 0 with the targets, [..., H, W] -> [...]; two empty masks give 1."""
    predicted, targets = logits > 0, targets > 0
    if valid is not None:
        predicted, targets = predicted & (valid > 0), targets & (valid > 0)
    overlap = (predicted & targets).sum((-2, -1)).float()
    union = (predicted | targets).sum((-2, -1)).float()
    return torch.where(union > 0, overlap / union.clamp(min=1), 1.0)


def prompt_loss(
    logits: Tensor,
    predicted_iou: Tensor,
    targets: Tensor,
    valid: Tensor | None = None,
    blend: float = 1.0,
    iou_weight: float = IOU_WEIGHT,
) -> PromptLoss:
    """The loss of one pass: only the best of the M masks of a prompt is trained, and the IoU head on all of them.

    M is 3 for a first, ambiguous prompt, and 1 (the fourth token) when a prompt consists of several. Computes in
    float32, whatever it is given. On GPUs `kernels/mask_sums.py` does, where targets are bool and nothing is blended:
    then there are no gradients of gradients, and nothing given may be changed before `backward`.

    Args:
        logits: [N, M, H, W].
        predicted_iou: [N, M].
        targets: [N, H, W], 0 or 1.
        valid: [N, H, W], see `focal_loss`.
        blend: see `mask_loss`.
        iou_weight: of the IoU head's squared error; 1 in the paper.
    """
    if blend == 1 and _kernels_take(logits, predicted_iou, targets, valid):
        return PromptLoss(*_PromptLoss.apply(logits, predicted_iou, targets, valid, iou_weight))
    logits, predicted_iou = logits.float(), predicted_iou.float()
    targets = targets[:, None].float()
    valid = None if valid is None else valid[:, None].float()
    losses = mask_loss(logits, targets, valid, blend)  # [N, M]
    lowest, chosen = losses.min(dim=1)
    iou = true_iou(logits, targets, valid)
    iou_error = F.mse_loss(predicted_iou, iou, reduction="none").mean(dim=1)
    return PromptLoss(total=lowest + iou_weight * iou_error, mask=lowest, chosen=chosen, iou=iou)


def grouping_loss(
    upscaled: Tensor, regions: Tensor, anchors: Tensor, radius: int = GROUPING_RADIUS
) -> tuple[Tensor, Tensor]:
    """How well the pixels of a region resemble each other, and no others. Not in SAM's paper.

    Each anchor makes a mask of the pixels around it by their cosine similarity to it, seen from the image's mean pixel,
    with logits 10 (cos - 1/2); it costs dice + `balanced_cross_entropy` against the anchor's region. A decoder from
    nothing finds that a click means a blob around it, and stays there; this loss needs no decoder, and teaches what
    belongs together from all pixels of an image.

    Args:
        upscaled: [B, C, s, s], pixels after the upscaling of the mask decoder.
        regions: [B, s, s], number of the region that a pixel lies in; -1 in the padding.
        anchors: int64 [B, A], indices of pixels, row by row.
        radius: pixels on each side of an anchor that are compared with it.

    Returns:
        scalar loss, and the mean true IoU of those masks, not differentiable.
    """
    pixels = upscaled.flatten(2).float()  # [B, C, P]
    pixels = F.normalize(pixels - pixels.mean(2, keepdim=True), dim=1)
    chosen = pixels.gather(2, anchors[:, None].expand(-1, pixels.shape[1], -1))
    logits = GROUPING_SCALE * (chosen.transpose(1, 2) @ pixels - 0.5)  # [B, A, P]
    regions = regions.flatten(1)
    targets = regions.gather(1, anchors)[:, :, None] == regions[:, None]
    H, W = upscaled.shape[-2:]
    rows, columns = (torch.arange(size, device=regions.device) for size in (H, W))
    near_rows = (rows - (anchors // W)[..., None]).abs() <= radius
    near_columns = (columns - (anchors % W)[..., None]).abs() <= radius
    near = (near_rows[..., :, None] & near_columns[..., None, :]).flatten(2)
    # As images one pixel high:
    logits, targets, valid = (x[:, :, None] for x in (logits, targets, near & (regions[:, None] >= 0)))
    return mask_loss(logits, targets, valid, blend=0.0).mean(), true_iou(logits, targets, valid).mean()


def draw_anchors(regions: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw pixels of regions [B, s, s], not in the padding, to compare others with: int64 [B, count].

    A region is drawn as often as the square root of its area says: small ones count, and large ones count more.
    """
    numbers = regions.flatten(1) + 1  # 0 in the padding
    areas = torch.zeros(len(numbers), numbers.shape[1] + 1, dtype=torch.int64, device=numbers.device)
    areas.scatter_add_(1, numbers, torch.ones_like(numbers))
    weights = areas.gather(1, numbers).float().rsqrt() * (numbers > 0)
    return torch.multinomial(weights, count, replacement=True, generator=generator)


def _mean_over_pixels(values: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return values.mean((-2, -1))
    return (values * valid).sum((-2, -1)) / valid.sum((-2, -1)).clamp(min=1)


def _kernels_take(logits: Tensor, predicted_iou: Tensor, targets: Tensor, valid: Tensor | None) -> bool:
    """Whether `_PromptLoss` computes the loss of these (see `prompt_loss`), which has no gradients of gradients."""
    if torch.compiler.is_compiling() or logits.device.type not in _KERNEL_DEVICES or FOCAL_GAMMA != 2:
        return False
    pixels = [targets] if valid is None else [targets, valid]
    tensors = [logits, predicted_iou, *pixels]
    return (
        triton_unavailable_reason(logits.device.type) is None
        and logits.dim() == 4
        and logits.numel() > 0
        and logits.shape[1] <= _MOST_MASKS
        and predicted_iou.shape == logits.shape[:2]
        and logits.dtype in _KERNEL_FORMATS
        and predicted_iou.dtype in _KERNEL_FORMATS
        and all(x.dtype == torch.bool and x.shape == logits[:, 0].shape for x in pixels)
        and all(x.device == logits.device for x in tensors)
        and not is_watched(*tensors)
    )


class _PromptLoss(torch.autograd.Function):
    """The fields of a `PromptLoss` by kernels that read logits once, as they are; all gradients by one more."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, predicted: Tensor, targets: Tensor, valid: Tensor | None, iou_weight: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from sam_fast.kernels.mask_sums import losses

        if not logits[0, 0].is_contiguous():
            logits = logits.contiguous()
        targets = targets.contiguous().view(torch.uint8)
        valid = None if valid is None else valid.contiguous().view(torch.uint8)
        with torch.cuda.device_of(logits):
            found = losses(logits, predicted, targets, valid, _weights(iou_weight))
        ctx.save_for_backward(logits, predicted, targets, valid, found.chosen, found.iou, found.slopes)
        ctx.mark_non_differentiable(found.chosen, found.iou)
        ctx.set_materialize_grads(False)
        ctx.iou_weight = iou_weight
        return found.total, found.lowest, found.chosen, found.iou

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor | None, grad_lowest: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        from sam_fast.kernels.mask_sums import gradients

        if grad_total is None:
            if grad_lowest is None:
                return (None,) * 5
            grad_total = torch.zeros_like(grad_lowest)
        logits, predicted, targets, valid, *found = ctx.saved_tensors
        total = grad_total.contiguous()
        lowest = total if grad_lowest is None else total + grad_lowest
        grad_logits = logits.new_empty(logits.shape)
        grad_predicted = predicted.new_empty(predicted.shape)
        inputs = logits, predicted, targets, valid, _weights(ctx.iou_weight)
        gradients(grad_logits, grad_predicted, total, lowest, *found, *inputs)
        return grad_logits, grad_predicted, None, None, None


def _weights(iou_weight: float) -> Any:
    from sam_fast.kernels.mask_sums import Weights

    return Weights(FOCAL_ALPHA, FOCAL_WEIGHT, DICE_WEIGHT, iou_weight)
