"""Simulated users: the first prompt of an object, and the clicks that correct a mask.

Source: Kirillov et al., "Segment Anything", 2023, appendix A, "Training algorithm"; clicks from the error region:
Sofiiuk et al., "RITM", 2021.

All coordinates are pixels of the model input, and a pixel (column x, row y) has the coordinates (x, y), as those that
`SamPredictor` gives to the prompt encoder.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sam_fast.evaluation.protocol import centre_most, random_pixel

BOX_NOISE = 0.1  # standard deviation, of the side of the box
BOX_NOISE_LIMIT = 20 / 1024  # at most, of the side of the model input
_CENTRED = 128  # pixels of a side beyond which a mask is looked at in steps, to find its centre


def mask_boxes(masks: np.ndarray) -> np.ndarray:
    """The tight boxes of masks, bool [N, H, W], none empty: [N, 4] float32, XYXY, last pixels included."""
    edges = []
    for lines in (np.asarray(masks.any(1)), np.asarray(masks.any(2))):  # [N, W] and [N, H]
        edges += [lines.argmax(1), lines.shape[1] - 1 - lines[:, ::-1].argmax(1)]
    left, right, top, bottom = edges
    return np.stack([left, top, right, bottom], axis=1).astype(np.float32)


def noised_boxes(boxes: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Boxes with each edge moved by noise of 10% of the box's side, at most 20 pixels at 1024.

    Args:
        boxes: [N, 4] float32, XYXY, in the frame of the model input.
        side: S, side of the model input; the limit scales with it.
        rng: where the noise comes from.

    Returns:
        [N, 4] float32, XYXY, inside the S x S input.
    """
    extent = np.tile(boxes[:, 2:] - boxes[:, :2] + 1, 2)
    limit = BOX_NOISE_LIMIT * side
    noise = (rng.normal(size=boxes.shape) * BOX_NOISE * extent).clip(-limit, limit)
    corners = (boxes + noise).clip(0, side - 1).reshape(-1, 2, 2)
    return np.concatenate([corners.min(1), corners.max(1)], axis=1).astype(np.float32)


def random_point(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A foreground pixel of a mask, bool [H, W], not empty, drawn uniformly: [2] float32, (x, y)."""
    return np.array(random_pixel(mask, rng), np.float32)


def central_point(mask: np.ndarray) -> np.ndarray:
    """The pixel of a mask that is farthest from its outline, as `evaluation.protocol.centre_most`: [2] float32, (x, y).

    Of a mask larger than 128 pixels only every second, third, ... row and column is looked at.

    Args:
        mask: bool [H, W], not empty; what lies beyond it counts as outside.
    """
    step = -(-max(mask.shape) // _CENTRED)
    first = step // 2
    seen = mask[first::step, first::step]
    if not seen.any():
        step, first, seen = 1, 0, mask
    return np.array(centre_most(seen), np.float32) * step + first


def error_clicks(
    logits: Tensor, targets: Tensor, scale: int, generator: torch.Generator | None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Clicks drawn uniformly from where the masks are wrong: foreground where they miss, background where they spill.

    A mask without an error is clicked anywhere on its target (or on its background, if the target is empty).

    Args:
        logits: [N, h, w], low-resolution logits of the last pass.
        targets: [N, h, w], 0 or 1, at the same resolution.
        scale: side of a low-resolution pixel in pixels of the model input.
        generator: of the device of `logits`; PyTorch's own one without it.
        valid: [N, h, w], 1 where clicks may fall; everywhere without it.

    Returns:
        coordinates [N, 2] float32, the centres of low-resolution pixels; labels [N] int64, 1 or 0.
    """
    targets = targets > 0
    candidates = (logits > 0) != targets
    if valid is not None:
        candidates &= valid > 0
    anywhere = targets | ~targets.flatten(1).any(1)[:, None, None]
    candidates = torch.where(candidates.flatten(1).any(1)[:, None, None], candidates, anywhere).flatten(1)
    # The largest of uniform numbers lies at each candidate with the same probability; torch.multinomial refuses
    # large images (2^24 categories) and synchronises.
    draws = torch.rand(candidates.shape, generator=generator, device=candidates.device)
    index = torch.where(candidates, draws, -1.0).argmax(dim=1)
    labels = targets.flatten(1).gather(1, index[:, None])[:, 0].long()
    width = targets.shape[-1]
    cells = torch.stack([index % width, index // width], dim=1).float()
    return (cells + 0.5) * scale - 0.5, labels


def plan_passes(clicks: int, rng: np.random.Generator) -> list[bool]:
    """Which passes after the first bring a new click: `clicks` that do and two that do not, only the mask fed back.

    One of the two lies at a random place in the sequence, the other at its end. Without clicks there is no pass.
    """
    if clicks == 0:
        return []
    passes = [True] * clicks
    passes.insert(int(rng.integers(0, clicks + 1)), False)
    return [*passes, False]
