"""Metrics against cases worked out by hand, OpenCV's erosion, and COCOeval."""

from __future__ import annotations

import contextlib
import io
import math

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam_fast.evaluation.metrics import (
    average_recall,
    boundary,
    boundary_iou,
    correlation,
    mask_iou,
    match_ranks,
    pairwise_iou,
)


def square(x: int, y: int, side: int, size: int = 100) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_iou_by_hand() -> None:
    assert mask_iou(square(0, 0, 10), square(5, 0, 10)) == 50 / 150
    assert mask_iou(square(0, 0, 10), square(20, 0, 10)) == 0.0
    assert mask_iou(square(0, 0, 10), square(0, 0, 10)) == 1.0
    assert mask_iou(square(0, 0, 0), square(0, 0, 0)) == 1.0
    with pytest.raises(ValueError, match="one size"):
        mask_iou(square(0, 0, 1), square(0, 0, 1, size=50))


def test_boundary_iou_by_hand() -> None:
    # The diagonal of 100 x 100 is 141.4, and 2% of it 2.8: boundaries are 3 wide. 20^2 - 14^2 = 204 pixels of boundary.
    a, b = square(40, 40, 20), square(41, 40, 20)
    assert boundary(a, 3).sum() == 204
    # Columns 41..59 are in both squares. Top and bottom: 2 x 3 x 19 pixels. Left and right, 14 rows each: columns
    # 40..42 and 41..43 share 2, 57..59 and 58..60 share 2.
    shared = 2 * 3 * 19 + 14 * 4
    assert boundary_iou(a, b) == shared / (204 + 204 - shared)
    assert boundary_iou(a, a) == 1.0
    assert boundary_iou(a, ~a) == 0.0
    assert boundary_iou(a & False, a & False) == 1.0


@pytest.mark.parametrize("width", [1, 4, 14])
def test_boundary_against_opencv(width: int) -> None:
    noise = cv2.GaussianBlur(np.random.default_rng(0).random((90, 131)), None, 6)
    mask = noise > np.median(noise)
    padded = np.pad(mask, 1).astype(np.uint8)  # as in the authors' code: the frame is background
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1].astype(bool)
    np.testing.assert_array_equal(boundary(mask, width), mask & ~eroded)


def test_boundary_iou_crops_without_a_trace() -> None:
    """Masks far from each other, at the border, and over all of the image: the same as without cropping."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = np.zeros((2, 80, 110), dtype=bool)
        for mask in (a, b):
            x, y = rng.integers(0, 100), rng.integers(0, 70)
            mask[y : y + rng.integers(1, 80), x : x + rng.integers(1, 110)] = True
        width = round(0.02 * math.hypot(80, 110))
        assert boundary_iou(a, b) == mask_iou(boundary(a, width), boundary(b, width))


def test_pairwise_iou() -> None:
    """Dense masks, an empty one on each side, and rectangles that overlap, touch, or are apart."""
    rng = np.random.default_rng(2)
    masks, truths = rng.random((37, 20, 30)) > 0.6, rng.random((25, 20, 30)) > 0.4
    masks[3], truths[2] = False, False
    for i in range(10):
        for rectangle in (masks[10 + i], truths[10 + i]):
            y, x, height, width = rng.integers(1, 12, 4)
            rectangle[:] = False
            rectangle[y : y + height, x : x + width] = True
    ious = pairwise_iou(iter(masks), truths)
    # By mask_iou, to which two empty masks are the same; of truths there is none to find.
    expected = np.array([[mask_iou(mask, truth) for truth in truths] for mask in masks])
    expected[3, 2] = 0
    np.testing.assert_allclose(ious, expected, rtol=1e-12)
    assert (expected[10:20, 10:20] == 0).any() and (expected[10:20, 10:20] > 0).any()
    assert pairwise_iou([], truths).shape == (0, 25) and pairwise_iou(masks, truths[:0]).shape == (37, 0)


def test_recall_by_hand() -> None:
    # The first mask fits both truths and takes the better one; the second fits that one only, and comes too late.
    ious = np.array([[0.60, 0.80], [0.30, 0.99], [0.72, 0.10]])
    ranks = match_ranks(ious, [0.5, 0.75])
    assert ranks.tolist() == [[2, 0], [3, 0]]
    assert average_recall([ranks], [3], 1) == 0.5
    assert average_recall([ranks], [3], 3) == 0.75
    # A second image with one truth and no mask.
    assert average_recall([ranks, match_ranks(np.zeros((0, 1)), [0.5, 0.75])], [3, 0], 1000) == pytest.approx(0.5)
    assert math.isnan(average_recall([], [], 10))


def test_recall_at_the_threshold() -> None:
    assert match_ranks(np.array([[0.5]]), [0.5]).tolist() == [[0]]
    assert match_ranks(np.array([[1.0]]), [1.0]).tolist() == [[0]]
    assert match_ranks(np.array([[0.7, 0.7]]), [0.5]).tolist() == [[1, 0]]


def blobs(rng: np.random.Generator, count: int) -> np.ndarray:
    y, x = np.mgrid[:48, :64]
    cx, cy, rx, ry = rng.uniform(((8,), (8,), (4,), (4,)), ((56,), (40,), (20,), (15,)), (4, count))
    return ((x - cx[:, None, None]) / rx[:, None, None]) ** 2 + ((y - cy[:, None, None]) / ry[:, None, None]) ** 2 < 1


def coco_recalls(images: list[tuple[np.ndarray, np.ndarray, np.ndarray]], limits: list[int]) -> list[float]:
    """Class-agnostic average recalls of (truths, masks, scores) by COCOeval."""

    def code(mask: np.ndarray) -> dict:
        return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))

    truths, found = [], []
    for image, (objects, masks, scores) in enumerate(images, 1):
        for mask in objects:
            truths.append({"id": len(truths) + 1, "image_id": image, "category_id": 1, "iscrowd": 0})
            truths[-1] |= {"segmentation": code(mask), "area": int(mask.sum()), "bbox": [0, 0, 1, 1]}
        for mask, score in zip(masks, scores, strict=True):
            found.append({"image_id": image, "category_id": 1, "segmentation": code(mask), "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i, "height": 48, "width": 64} for i in range(1, len(images) + 1)],
            "categories": [{"id": 1, "name": "object"}],
            "annotations": truths,
        }
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(found), "segm")
        judge.params.maxDets = limits
        judge.params.useCats = 0
        judge.evaluate()
        judge.accumulate()
    return [float(judge.eval["recall"][:, 0, 0, i].mean()) for i in range(len(limits))]


@pytest.mark.parametrize("seed", range(4))
def test_recall_against_cocoeval(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(6):
        objects = blobs(rng, int(rng.integers(1, 7)))
        near = [np.roll(mask, rng.integers(-3, 4, 2), (0, 1)) for mask in np.repeat(objects, 3, axis=0)]
        masks = np.concatenate([near, blobs(rng, 4)])
        images.append((objects, masks, rng.permutation(len(masks)) / len(masks)))
    limits = [1, 5, 20]
    ranks = []
    for objects, masks, scores in images:
        ranks.append(match_ranks(pairwise_iou(masks[np.argsort(-scores)], objects)))
    ours = [average_recall(ranks, [len(masks) for _, masks, _ in images], limit) for limit in limits]
    assert 0 < ours[0] < ours[1] < ours[2] < 1
    np.testing.assert_allclose(ours, coco_recalls(images, limits), rtol=1e-9)


def test_correlation() -> None:
    rng = np.random.default_rng(0)
    x = rng.random(50)
    y = x + rng.random(50)
    centred = (x - x.mean()) @ (y - y.mean()) / math.sqrt(((x - x.mean()) ** 2).sum() * ((y - y.mean()) ** 2).sum())
    assert correlation(x, y) == pytest.approx(centred)
    assert correlation([1, 2, 3], [6, 4, 2]) == pytest.approx(-1)
    assert math.isnan(correlation([1, 1, 1], [1, 2, 3])) and math.isnan(correlation([1], [2]))
    with pytest.raises(ValueError, match="one length"):
        correlation([1, 2], [1])
