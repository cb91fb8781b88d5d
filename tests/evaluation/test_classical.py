"""The classical tools on images that they must get right, and at the edge of what they take."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from evaluation.drawings import Drawings

from sam_fast.evaluation.classical import GrabCut, RandomWalker
from sam_fast.evaluation.evaluate import EvaluationSettings, evaluate
from sam_fast.evaluation.metrics import mask_iou
from sam_fast.evaluation.protocol import Click, next_click, tight_box


def disc(size: tuple[int, int] = (150, 200), centre: tuple[int, int] = (90, 70), radius: int = 40) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]]
    return np.hypot(x - centre[0], y - centre[1]) <= radius


def picture(mask: np.ndarray) -> np.ndarray:
    """A reddish object on a bluish ground, with noise."""
    image = np.where(mask[..., None], [200, 60, 40], [40, 80, 180])
    return (image + np.random.default_rng(0).normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)


def test_grabcut_cuts_out_a_disc() -> None:
    mask = disc()
    method = GrabCut()
    method.set_image(picture(mask))
    answer = method.box(tight_box(mask))
    assert mask_iou(answer.mask, mask) > 0.95
    np.testing.assert_array_equal(answer.mask, method.box(tight_box(mask)).mask)


@pytest.mark.parametrize("box", [(0, 0, 199, 149), (7, 9, 7, 9), (0, 0, 0, 149), (199, 149, 199, 149)], ids=str)
def test_grabcut_of_degenerate_boxes(box: tuple[int, int, int, int]) -> None:
    """All of the image, one pixel, one column: an answer inside the box, and not an empty one."""
    method = GrabCut()
    method.set_image(picture(disc()))
    mask = method.box(np.array(box)).mask
    x0, y0, x1, y1 = box
    assert mask.shape == (150, 200) and mask.any()
    outside = mask.copy()
    outside[y0 : y1 + 1, x0 : x1 + 1] = False
    assert not outside.any()


def test_grabcut_of_one_colour() -> None:
    method = GrabCut()
    method.set_image(np.full((40, 50, 3), 77, np.uint8))
    assert method.box(np.array([10, 10, 20, 25])).mask.any()


@pytest.mark.parametrize("longest_side", [200, 100], ids=["full size", "half size"])
def test_random_walker_finds_a_disc(longest_side: int) -> None:
    mask = disc()
    method = RandomWalker(longest_side)
    method.set_image(picture(mask))
    click = next_click(mask)
    assert click is not None
    answer = method.click([click], None)
    assert answer.mask.shape == mask.shape
    assert mask_iou(answer.mask, mask) > 0.93


def test_random_walker_obeys_background_clicks() -> None:
    """Two discs of one colour joined by a bridge; a background click on one takes it away."""
    left, right = disc(centre=(50, 70), radius=25), disc(centre=(140, 70), radius=25)
    bridge = np.zeros_like(left)
    bridge[66:75, 50:140] = True
    method = RandomWalker(200)
    method.set_image(picture(left | right | bridge))
    one = method.click([Click(50, 70, 1)], None)
    two = method.click([Click(50, 70, 1), Click(140, 70, 0)], one)
    assert two.mask[70, 50] and not two.mask[70, 140]
    assert mask_iou(two.mask & ~bridge, left & ~bridge) > 0.9


def test_random_walker_at_the_edges() -> None:
    method = RandomWalker(64)
    method.set_image(picture(disc()))
    assert method.click([Click(0, 0, 1)], None).mask[0, 0]
    assert method.click([Click(199, 149, 1)], None).mask[149, 199]
    method.set_image(np.zeros((1, 1, 3), np.uint8))
    assert method.click([Click(0, 0, 1)], None).mask.all()
    method.set_image(np.zeros((500, 3, 3), np.uint8))
    assert method.click([Click(1, 250, 1)], None).mask.shape == (500, 3)


def test_both_under_the_protocol() -> None:
    source = Drawings()
    grabcut = evaluate(source, GrabCut())
    assert grabcut.summary.keys() == {"box", "boundary_box"}
    walker = evaluate(source, RandomWalker(), EvaluationSettings(clicks=(1, 3), boundary_clicks=(1,)))
    assert walker.summary.keys() == {"click_1", "click_3", "boundary_click_1"}
    assert walker.digest == grabcut.digest
    assert walker.summary["click_3"] > walker.summary["click_1"]


@pytest.mark.parametrize(("method", "module"), [(GrabCut, "cv2"), (RandomWalker, "skimage.segmentation")])
def test_missing_package(method: type, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=r"pip install 'sam_fast\[eval\]'"):
        method()
