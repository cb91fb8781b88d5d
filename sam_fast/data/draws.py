"""Random choices of procedural scenes: the draws of `numpy.random.Generator.choice`, at a fraction of its cost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np


def pick(rng: np.random.Generator, options: Sequence[float]) -> float:
    """The same as `rng.choice(options)`, without making an array first."""
    return options[int(rng.integers(len(options)))]


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """The same as `rng.uniform(low, high)`, which takes most of its time to find out that these are no arrays."""
    return low + (high - low) * rng.random()


def draw_index(rng: np.random.Generator, bounds: Sequence[float]) -> int:
    """The same as `rng.choice(len(weights), p=weights / sum(weights))`; `bounds` are `cumulative_shares(weights)`."""
    return bisect_right(bounds, rng.random())


def cumulative_shares(weights: Sequence[float]) -> tuple[float, ...]:
    """Running sums of weights, the last one 1, to the bit as `numpy.random.Generator.choice` makes them."""
    sums = (np.array(weights) / np.array(weights).sum()).cumsum()
    return tuple((sums / sums[-1]).tolist())
