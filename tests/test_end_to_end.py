"""ViT-B at 1024 px on a photo, from pixels to records, against the official code with the same weights."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import build_official, official, relative_error, seed_weights

from sam_fast import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from sam_fast.build_sam import VIT_B


@pytest.fixture(scope="module")
def vit_b():
    theirs = seed_weights(build_official(VIT_B), seed=3)
    ours = sam_model_registry["vit_b"]()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_vit_b_from_photo_to_masks(vit_b, photo):
    theirs, ours = official.SamPredictor(vit_b[0]), SamPredictor(vit_b[1])
    image = photo[:400]
    theirs.set_image(image)
    ours.set_image(image)
    assert relative_error(ours.features, theirs.features) <= 1e-5
    for prompt in (
        {"point_coords": np.array([[220, 110], [60, 300]]), "point_labels": np.array([1, 0])},
        {"box": np.array([140, 10, 310, 200])},
    ):
        masks, iou, low_res = ours.predict(**prompt)
        expected_masks, expected_iou, expected_low_res = theirs.predict(**prompt)
        assert 0 < expected_masks.mean() < 1
        assert np.abs(low_res - expected_low_res).max() <= 1e-4 * np.abs(expected_low_res).max()
        np.testing.assert_allclose(iou, expected_iou, rtol=0, atol=1e-4)
        assert (masks != expected_masks).sum() <= 1e-4 * (masks | expected_masks).sum()


def test_vit_b_automatic_masks(vit_b, photo):
    settings = {"points_per_side": 4, "stability_score_thresh": 0.7, "pred_iou_thresh": 0.85}
    expected = official.SamAutomaticMaskGenerator(vit_b[0], **settings).generate(photo)
    records = SamAutomaticMaskGenerator(vit_b[1], **settings).generate(photo)
    assert len(records) == len(expected) >= 3
    for record, other in zip(records, expected, strict=True):
        assert record["bbox"] == other["bbox"] and record["point_coords"] == other["point_coords"]
        difference = np.count_nonzero(record["segmentation"] != other["segmentation"])
        assert difference <= max(2, 1e-4 * other["area"])
