"""Polygons against pycocotools, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from sam_fast.data.polygons import polygon_runs, rasterise_polygons

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def by_coco(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size))).astype(bool)


def polygons_of(coordinate: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
    vertices = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=10)
    return vertices.map(lambda points: [float(value) for point in points for value in point])


# Whole and half pixels and fifths meet the ties of the rule; repeated vertices, lines and crossings come with them.
COORDINATES = st.one_of(
    st.integers(-5, 45),
    st.integers(-20, 90).map(lambda value: value / 2),
    st.integers(-60, 260).map(lambda value: value / 5),
    st.integers(-600, 2600).map(lambda value: value / 50),
    st.floats(-10, 50),
    st.floats(-3000, 3000),
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(polygons_of(COORDINATES), min_size=1, max_size=3), SIZES)
@example([[0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]], (1, 1))
@example([[5.0, 5.0] * 4], (10, 10))
@example([[2.0, 3.0, 30.0, 3.0, 2.0, 3.0]], (10, 40))
@example([[-1e5, -1e5, 1e5, -1e5, 7.3, 1e5]], (20, 20))
@example([[-0.2, -0.3, -0.1, 25.0, 12.5, 12.5]], (20, 20))
def test_same_pixels_as_pycocotools(polygons: list[list[float]], size: tuple[int, int]) -> None:
    mask = rasterise_polygons(polygons, size)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, by_coco(polygons, size))


def test_a_detailed_outline_on_a_large_image() -> None:
    angle = np.linspace(0, 2 * np.pi, 700, endpoint=False)
    radius = 400 + 90 * np.sin(17 * angle) + np.random.default_rng(0).normal(0, 4, angle.size)
    outline = np.stack([620 + radius * np.cos(angle), 480 + radius * np.sin(angle)], axis=1).ravel()
    mask = rasterise_polygons([outline], (960, 1280))
    np.testing.assert_array_equal(mask, by_coco([outline.tolist()], (960, 1280)))
    assert 0.3 < mask.mean() < 0.6


@pytest.mark.parametrize("polygon", [[], [1.0, 2.0], [1.0, 2.0, 30.0, 17.0]], ids=["none", "point", "line"])
def test_fewer_than_three_vertices_enclose_nothing(polygon: list[float]) -> None:
    assert not rasterise_polygons([polygon], (20, 30)).any()


def test_no_polygons_make_an_empty_mask() -> None:
    assert rasterise_polygons([], (3, 5)).shape == (3, 5)
    assert not rasterise_polygons([], (3, 5)).any()


def test_runs_add_up_to_the_image() -> None:
    runs = polygon_runs([-3.0, -3.0, 20.0, 1.0, 8.0, 30.0], (17, 11))
    assert runs.dtype == np.int64 and runs.min() >= 0 and runs.sum() == 17 * 11


@pytest.mark.parametrize(
    ("polygon", "text"),
    [
        ([1.0, 2.0, 3.0], "x0, y0"),
        ([[1.0, 2.0], [3.0, 4.0]], "x0, y0"),
        ("outline", "x0, y0"),
        ([0.0, 0.0, float("nan"), 1.0, 1.0, 1.0], "finite"),
        ([0.0, 0.0, float("inf"), 1.0, 1.0, 1.0], "finite"),
        ([0.0, 0.0, 1.0e7, 1.0, 1.0, 1.0], "1000000 pixels"),
    ],
)
def test_malformed_polygons_are_refused(polygon: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        rasterise_polygons([polygon], (4, 4))  # type: ignore[list-item]
