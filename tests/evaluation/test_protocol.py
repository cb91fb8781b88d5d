"""The simulated user, against drawings and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from sam_fast.evaluation.protocol import Click, centre_most, largest_region, next_click, tight_box


def rectangle(x0: int, y0: int, x1: int, y1: int, size: tuple[int, int] = (60, 80)) -> np.ndarray:
    """A mask of the pixels from (x0, y0) to (x1, y1), both included."""
    mask = np.zeros(size, dtype=bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return mask


def test_tight_box() -> None:
    assert tight_box(rectangle(3, 5, 20, 11)).tolist() == [3, 5, 20, 11]
    assert tight_box(rectangle(7, 9, 7, 9)).tolist() == [7, 9, 7, 9]
    with pytest.raises(ValueError, match="empty mask"):
        tight_box(np.zeros((4, 4), dtype=bool))


def test_centre_of_a_rectangle() -> None:
    assert centre_most(rectangle(10, 20, 20, 40)) == (15, 25)  # the first pixel of the middle line
    assert centre_most(rectangle(79, 59, 79, 59)) == (79, 59)


def test_beyond_the_image_is_outside() -> None:
    assert centre_most(np.ones((11, 11), dtype=bool)) == (5, 5)


def test_first_click_of_two_parts_is_in_the_thicker_one() -> None:
    assert next_click(rectangle(2, 2, 70, 8) | rectangle(30, 30, 44, 44)) == Click(37, 37, 1)


def test_missed_and_added_regions() -> None:
    truth = rectangle(10, 10, 29, 29)
    assert next_click(truth, np.zeros_like(truth)) == Click(19, 19, 1)
    assert next_click(truth, truth | rectangle(50, 40, 60, 50)) == Click(55, 45, 0)
    # Both are wrong, and the larger one counts, not the thicker one: 120 pixels in 3 rows against 100 in 10.
    assert next_click(truth, truth & ~rectangle(20, 20, 29, 29) | rectangle(35, 40, 74, 42)) == Click(36, 41, 0)
    # Of equally large ones the missed one.
    assert next_click(truth, truth & ~rectangle(10, 10, 14, 14) | rectangle(50, 40, 54, 44)) == Click(12, 12, 1)


def test_regions_meet_at_corners_but_missed_and_added_stay_apart() -> None:
    truth = rectangle(10, 10, 19, 19)
    # Two squares that share a corner are one region of 50 pixels, larger than the one of 36.
    error = rectangle(40, 40, 44, 44) | rectangle(45, 45, 49, 49) | rectangle(60, 5, 65, 10)
    assert next_click(truth, truth | error) == Click(42, 42, 0)
    # A missed half (50 pixels) beside a wrongly added strip (60): the click is in the strip's middle, not the union's.
    prediction = truth & ~rectangle(15, 10, 19, 19) | rectangle(20, 10, 25, 19)
    click = next_click(truth, prediction)
    assert click is not None and click.label == 0 and 20 <= click.x <= 25


def test_nothing_wrong_nothing_clicked() -> None:
    assert next_click(rectangle(1, 2, 3, 4), rectangle(1, 2, 3, 4)) is None


@pytest.mark.parametrize("seed", range(8))
def test_clicks_of_noise_against_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random((2, 57, 83)), (0, 3, 3))
    truth, prediction = smooth > smooth.mean()
    click = next_click(truth, prediction)
    regions = []
    for error, missed in ((truth & ~prediction, 1), (prediction & ~truth, 0)):
        labels, count = ndimage.label(error, np.ones((3, 3)))
        regions += [(labels == label, missed) for label in range(1, count + 1)]
    region, missed = max(regions, key=lambda item: np.count_nonzero(item[0]))
    distance = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    assert click == Click(x, y, missed)


def test_largest_region_of_nothing() -> None:
    with pytest.raises(ValueError, match="no region"):
        largest_region(np.zeros((2, 4, 4), dtype=bool))
