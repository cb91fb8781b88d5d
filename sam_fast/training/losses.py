"""The losses of SAM's training.

Source: Kirillov et al., "Segment Anything", 2023, section 3 ("Losses and training") and appendix A ("Making the model
ambiguity-aware", "Training algorithm"); focal loss: Lin et al., 2017; dice loss: Milletari et al., "V-Net", 2016.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 20.0, 1.0, 1.0
START_BCE_WEIGHT = 3.0  # see `mask_loss`


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

    From random weights this loss leaves masks empty for long: nearly all pixels are easy background, which the focal
    factor mutes. With `blend` < 1 the focal term is 20 blend focal + 3 (1 - blend) cross entropy; training from nothing
    raises it from 0 to 1 over the first steps.
    """
    loss = DICE_WEIGHT * dice_loss(logits, targets, valid)
    if blend > 0:
        loss = loss + blend * FOCAL_WEIGHT * focal_loss(logits, targets, valid)
    if blend < 1:
        targets = targets.to(logits.dtype).expand_as(logits)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        loss = loss + (1 - blend) * START_BCE_WEIGHT * _mean_over_pixels(cross_entropy, valid)
    return loss


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
    logits: Tensor, predicted_iou: Tensor, targets: Tensor, valid: Tensor | None = None, blend: float = 1.0
) -> PromptLoss:
    """The loss of one pass: only the best of the M masks of a prompt is trained, and the IoU head on all of them.

    M is 3 for a first, ambiguous prompt, and 1 (the fourth token) when a prompt consists of several.

    Args:
        logits: [N, M, H, W].
        predicted_iou: [N, M].
        targets: [N, H, W], 0 or 1.
        valid: [N, H, W], see `focal_loss`.
        blend: see `mask_loss`.
    """
    logits, predicted_iou = logits.float(), predicted_iou.float()
    targets = targets[:, None].float()
    valid = None if valid is None else valid[:, None].float()
    losses = mask_loss(logits, targets, valid, blend)  # [N, M]
    lowest, chosen = losses.min(dim=1)
    iou = true_iou(logits, targets, valid)
    iou_error = F.mse_loss(predicted_iou, iou, reduction="none").mean(dim=1)
    return PromptLoss(total=lowest + IOU_WEIGHT * iou_error, mask=lowest, chosen=chosen, iou=iou)


def grouping_loss(embedding: Tensor, segments: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrast of image tokens: those of one segment attract, those of others repel. Not in SAM's paper.

    Minus the mean log-probability of each other token of the same segment, under a softmax of cosine similarities. Half
    of the embedding's channels take part, so that the others are free for what the mask decoder needs besides. Masks of
    a few prompts say little about an image; this says of all its tokens what belongs together, at next to no cost.

    Source: Khosla et al., "Supervised Contrastive Learning", 2020, equation 2.

    Args:
        embedding: [B, C, h, w], of the image encoder.
        segments: [B, h, w], integers; -1 where a token lies in no single segment.
        temperature: of the softmax.

    Returns:
        scalar, the mean over tokens that have company in their segment; 0 if there are none.
    """
    tokens = torch.nn.functional.normalize(embedding[:, : embedding.shape[1] // 2].flatten(2).float(), dim=1)
    segments = segments.flatten(1)
    logits = tokens.transpose(1, 2) @ tokens / temperature  # [B, P, P]
    known = segments >= 0
    apart = ~torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)
    others = known[:, None, :] & known[:, :, None] & apart
    same = others & (segments[:, :, None] == segments[:, None, :])
    log_probability = logits - torch.logsumexp(logits.masked_fill(~others, -1e4), dim=2, keepdim=True)
    company = same.sum(2)
    losses = -(log_probability * same).sum(2) / company.clamp(min=1)
    return losses.sum() / (company > 0).sum().clamp(min=1)


def _mean_over_pixels(values: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return values.mean((-2, -1))
    return (values * valid).sum((-2, -1)) / valid.sum((-2, -1)).clamp(min=1)
