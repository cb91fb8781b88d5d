"""Exact Euclidean distance to the background, in NumPy."""

from __future__ import annotations

import numpy as np

# Pixels that are compared with their neighbours at a time: they stay in the first-level cache.
_BLOCK = 1 << 12
# Shifts between two looks at whether a block is done.
_SHIFTS = 8


def squared_distance(mask: np.ndarray) -> np.ndarray:
    """Squared distance of each mask pixel to the nearest pixel outside of the mask; beyond the array is outside.

    d(y, x) = min over x' of (x - x')^2 + g(y, x'), where g is the squared distance within column x' (Felzenszwalb and
    Huttenlocher, "Distance transforms of sampled functions", 2012, section 3). The minimum is taken by shifts
    |x - x'| = 1, 2, ... as long as some distance is larger than the shift.

    Args:
        mask: bool [H, W].

    Returns:
        int32 [H, W], pixels squared, 0 outside of the mask.

    Raises:
        ValueError: not such an array, or a side has 30000 pixels or more.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_ or max(mask.shape) >= 30000:
        raise ValueError(f"mask must be bool [H, W] with sides below 30000, got {mask.dtype} {list(mask.shape)}")
    height, width = mask.shape
    columns = _distance_within_columns(mask) ** 2
    x = np.arange(1, width + 1, dtype=np.int32)
    squared = np.minimum(columns, np.minimum(x, width + 1 - x) ** 2).ravel()
    # Rows lie one behind the other, and a shift may reach into the next row. That is harmless: a pixel for which it
    # does is no farther from its row's end than the shift, which the line above took into account.
    reach = width + _SHIFTS
    padded = np.pad(columns.ravel(), reach)
    candidate = np.empty(_BLOCK, np.int32)
    for start in range(0, len(squared), _BLOCK):
        block = squared[start : start + _BLOCK]
        _lower(block, padded[start : start + len(block) + 2 * reach], reach, candidate[: len(block)])
    return squared.reshape(height, width)


def _distance_within_columns(mask: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the nearest pixel outside of the mask in its column, int32 [H, W]."""
    height = len(mask)
    rows = np.arange(1, height + 1, dtype=np.int32)[:, None]
    above = np.maximum.accumulate(np.where(mask, np.int32(0), rows), axis=0)
    below = np.minimum.accumulate(np.where(mask, np.int32(height + 1), rows)[::-1], axis=0)[::-1]
    return np.minimum(rows - above, below - rows)


def _lower(block: np.ndarray, columns: np.ndarray, reach: int, candidate: np.ndarray) -> None:
    """Lower `block` to min over s of s^2 + columns[i + reach +- s], in place.

    Args:
        block: int32 [P], an upper bound of the result.
        columns: int32 [P + 2 * reach].
        candidate: int32 [P], to work in.
    """
    for first in range(1, reach - _SHIFTS + 1, _SHIFTS):
        if block.max() <= first * first:
            return
        for shift in range(first, first + _SHIFTS):
            left, right = reach - shift, reach + shift
            np.minimum(columns[left : left + len(block)], columns[right : right + len(block)], out=candidate)
            np.add(candidate, shift * shift, out=candidate)
            np.minimum(block, candidate, out=block)
