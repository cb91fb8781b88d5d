"""How close masks are to the truth: IoU, boundary IoU, average recall, and how well a score predicts the IoU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from sam_fast.evaluation.protocol import tight_box

# COCO's thresholds of the IoU, 0.5, 0.55, ..., 0.95.
RECALL_THRESHOLDS = np.linspace(0.5, 0.95, 10)


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks, bool [H, W]; 1 if both are empty.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"masks must be of one size, got {list(a.shape)} and {list(b.shape)}")
    union = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / union if union else 1.0


def boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask that are at most `width` pixels (in x and in y) away from a pixel outside of the mask.

    What lies beyond the image counts as outside. An erosion by `width` steps of 3 x 3 gives the rest.

    Args:
        mask: bool [H, W].
        width: in pixels, at least 1.

    Returns:
        bool [H, W].
    """
    side = 2 * width + 1
    sums = np.pad(mask.astype(np.int32), ((width + 1, width), (width + 1, width))).cumsum(0).cumsum(1)
    inside = sums[side:, side:] - sums[side:, :-side] - sums[:-side, side:] + sums[:-side, :-side]
    return mask & (inside < side * side)


def boundary_iou(a: np.ndarray, b: np.ndarray, ratio: float = 0.02) -> float:
    """IoU of the boundaries of two masks (Cheng et al., "Boundary IoU", CVPR 2021).

    Args:
        a, b: bool [H, W].
        ratio: how wide a boundary is, as a fraction of the image's diagonal.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"masks must be of one size, got {list(a.shape)} and {list(b.shape)}")
    width = max(1, round(ratio * float(np.hypot(*a.shape))))
    either = a | b
    rows, columns = np.flatnonzero(either.any(axis=1)), np.flatnonzero(either.any(axis=0))
    if len(rows) == 0:
        return 1.0
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    return mask_iou(boundary(a[window], width), boundary(b[window], width))


def pairwise_iou(masks: Iterable[np.ndarray], truths: np.ndarray) -> np.ndarray:
    """IoU of each mask with each truth.

    Args:
        masks: D masks, bool [H, W].
        truths: bool [N, H, W].

    Returns:
        float64 [D, N].
    """
    boxes = np.array([_box(truth) for truth in truths]).reshape(-1, 4)
    areas = np.array([np.count_nonzero(truth) for truth in truths], float)
    ious = []
    for mask in masks:
        box, shared = _box(mask), np.zeros(len(truths))
        first, last = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])  # (x, y) where boxes overlap
        for i in np.flatnonzero((first <= last).all(1)):
            window = slice(first[i, 1], last[i, 1] + 1), slice(first[i, 0], last[i, 0] + 1)
            shared[i] = np.count_nonzero(mask[window] & truths[i][window])
        ious.append(shared / np.maximum(np.count_nonzero(mask) + areas - shared, 1))
    return np.array(ious).reshape(len(ious), len(truths))


def _box(mask: np.ndarray) -> np.ndarray:
    """`tight_box`, and one that overlaps no other for an empty mask."""
    return tight_box(mask) if mask.any() else np.array([0, 0, -1, -1])


def match_ranks(ious: np.ndarray, thresholds: Sequence[float] | np.ndarray = RECALL_THRESHOLDS) -> np.ndarray:
    """Match masks, best first, to truths as COCO does, and tell by which mask each truth is found.

    Of the truths that no earlier mask took, each mask takes the one with which its IoU is highest (of equals the last),
    if that reaches the threshold.

    Args:
        ious: [D, N], the masks in descending order of score.
        thresholds: T thresholds of the IoU.

    Returns:
        int64 [T, N], the position of the mask that took the truth; D where none did.
    """
    count, truths = ious.shape
    limits = np.minimum(np.asarray(thresholds, dtype=np.float64), 1 - 1e-10)
    ranks = np.full((len(limits), truths), count, dtype=np.int64)
    if truths == 0:
        return ranks
    which = np.arange(len(limits))
    for rank, row in enumerate(ious):
        free = np.where(ranks == count, row, -1.0)
        best = truths - 1 - free[:, ::-1].argmax(axis=1)
        found = free[which, best] >= limits
        ranks[which[found], best[found]] = rank
    return ranks


def average_recall(ranks: Sequence[np.ndarray], counts: Sequence[int], limit: int) -> float:
    """Share of all truths that the best `limit` masks of their image find, averaged over the thresholds.

    Args:
        ranks: per image, what `match_ranks` returns.
        counts: per image, the number of masks that were matched.
        limit: how many masks of an image count.

    Returns:
        The recall, between 0 and 1; NaN if there are no truths.
    """
    truths = sum(rank.shape[1] for rank in ranks)
    if truths == 0:
        return float("nan")
    found = sum(float((rank < min(limit, count)).mean(axis=0).sum()) for rank, count in zip(ranks, counts, strict=True))
    return found / truths


def correlation(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Pearson's r of two lists of numbers; NaN for fewer than two pairs or where one does not vary."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(x) != len(y):
        raise ValueError(f"the lists must be of one length, got {len(x)} and {len(y)}")
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
