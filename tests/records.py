"""Comparison of the generator's records with the official generator's."""

from __future__ import annotations

import numpy as np
import pytest


def assert_same_mask(mask, expected):
    """At most 1e-4 of the pixels differ, or two: on the rim of a small mask a logit near 0 may round to either side."""
    assert mask.dtype == bool and mask.shape == expected.shape
    assert np.count_nonzero(mask != expected) <= max(2, 1e-4 * np.count_nonzero(mask | expected))


def assert_same_records(ours, theirs):
    assert len(ours) == len(theirs) > 3, "too few records for a comparison"
    for mine, other in zip(ours, theirs, strict=True):
        assert list(mine) == list(other)
        assert mine["bbox"] == other["bbox"] and mine["crop_box"] == other["crop_box"]
        assert mine["point_coords"] == other["point_coords"]
        assert mine["area"] == pytest.approx(other["area"], rel=1e-4, abs=2)
        assert isinstance(mine["area"], int) and all(isinstance(v, int) for v in mine["bbox"])
        assert mine["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-4)
        # A share of two numbers of pixels. Logits agree to a relative 1e-5, but fall by about 1 per pixel: now and then
        # one lies so near a threshold that it rounds to the other side.
        two_pixels = max(1e-4, 2 / max(1, other["area"]))
        assert mine["stability_score"] == pytest.approx(other["stability_score"], abs=two_pixels, nan_ok=True)
        assert_same_mask(mine["segmentation"], other["segmentation"])
