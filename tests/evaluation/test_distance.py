"""The distance transform against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from sam_fast.evaluation.distance import squared_distance


def expected(mask: np.ndarray) -> np.ndarray:
    """SciPy knows nothing of the outside: a frame of background stands for it."""
    return np.rint(distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] ** 2)


@pytest.mark.parametrize("background", [0.0, 0.002, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (33, 47), (120, 61), (70, 300)], ids=str)
def test_of_noise(shape: tuple[int, int], background: float) -> None:
    mask = np.random.default_rng(0).random(shape) >= background
    distance = squared_distance(mask)
    assert distance.dtype == np.int32
    np.testing.assert_array_equal(distance, expected(mask))


def test_of_shapes() -> None:
    y, x = np.mgrid[:201, :160]
    ring = np.abs(np.hypot(x - 80, y - 100) - 55) < 20
    stripe = np.abs(x - y + 20) < 30
    for mask in (ring, stripe, ring ^ stripe, np.asfortranarray(ring)):
        np.testing.assert_array_equal(squared_distance(mask), expected(mask))


def test_of_nothing() -> None:
    assert squared_distance(np.zeros((0, 5), dtype=bool)).shape == (0, 5)
    assert squared_distance(np.zeros((5, 0), dtype=bool)).shape == (5, 0)


@pytest.mark.parametrize("mask", [np.zeros((2, 3)), np.zeros((1, 2, 3), dtype=bool)], ids=["float", "3 dimensions"])
def test_of_something_else(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"bool \[H, W\]"):
        squared_distance(mask)
