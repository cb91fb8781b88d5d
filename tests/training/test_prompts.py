"""Simulated users: points, boxes and clicks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam_fast.evaluation.protocol import centre_most
from sam_fast.training.prompts import central_point, error_clicks, mask_boxes, noised_boxes, plan_passes, random_point


def rectangle(y0: int, y1: int, x0: int, x1: int, side: int = 64) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_the_tight_box_includes_the_last_pixels():
    masks = np.stack([rectangle(3, 10, 20, 41), rectangle(5, 6, 7, 8), rectangle(0, 64, 0, 64)])
    assert mask_boxes(masks).tolist() == [[20, 3, 40, 9], [7, 5, 7, 5], [0, 0, 63, 63]]
    assert mask_boxes(masks[:0]).shape == (0, 4)


def test_box_noise_has_a_tenth_of_the_side_and_a_limit():
    rng = np.random.default_rng(0)
    boxes = np.tile(mask_boxes(rectangle(300, 340, 200, 400, side=1024)[None]), (4000, 1))  # 40 high, 200 wide
    noise = noised_boxes(boxes, 1024, rng) - boxes
    assert noise[:, 1].std() == pytest.approx(4, rel=0.06), "10% of the height, hardly cut off"
    assert noise[:, 3].std() == pytest.approx(4, rel=0.06)
    # 10% of the width is 20 = the limit: a normal distribution cut at one standard deviation
    assert np.abs(noise[:, [0, 2]]).max() == 20
    assert noise[:, 0].std() == pytest.approx(20 * 0.718, rel=0.06)
    assert len(np.unique(noise, axis=0)) > 3000, "each box has its own"
    small = np.tile(mask_boxes(rectangle(75, 85, 50, 100, side=256)[None]), (100, 1))
    assert np.abs(noised_boxes(small, 256, rng) - small).max() <= 5, "the limit scales with the input"


def test_noised_boxes_stay_in_the_image_and_in_order():
    rng = np.random.default_rng(0)
    masks = np.stack([rectangle(0, 64, 0, 64), rectangle(10, 11, 63, 64), rectangle(0, 1, 0, 64)])
    x0, y0, x1, y1 = noised_boxes(np.tile(mask_boxes(masks), (50, 1)), 64, rng).T
    assert ((x0 >= 0) & (x0 <= x1) & (x1 <= 63)).all() and ((y0 >= 0) & (y0 <= y1) & (y1 <= 63)).all()


def test_random_points_are_uniform_on_the_mask():
    rng = np.random.default_rng(0)
    mask = np.zeros((8, 8), bool)
    mask[2, 5] = mask[7, 0] = True
    points = [tuple(random_point(mask, rng)) for _ in range(400)]
    assert set(points) == {(5.0, 2.0), (0.0, 7.0)}
    assert 140 < points.count((5.0, 2.0)) < 260


def test_central_points_are_those_of_an_evaluation():
    rng = np.random.default_rng(0)
    for _ in range(20):
        y, x, height, width = rng.integers(1, 60, 4)
        mask = rectangle(y, y + height, x, x + width, side=128) | (rng.random((128, 128)) < 0.01)
        assert tuple(central_point(mask)) == centre_most(mask)


def test_central_points_of_large_masks_are_nearly_so():
    mask = np.zeros((500, 1000), bool)
    mask[100:301, 200:601] = mask[300:, 700:760] = True  # 201 x 401 pixels, and a smaller piece
    x, y = central_point(mask)
    assert abs(y - 200) <= 4 and 300 - 4 <= x <= 500 + 4 and mask[int(y), int(x)]
    thin = np.zeros((500, 1000), bool)
    thin[:, 0] = True  # where no step of 8 looks
    assert central_point(thin)[0] == 0


def clicks(logits, targets, valid=None, seed=0):
    return error_clicks(logits, targets, 4, torch.Generator().manual_seed(seed), valid)


def test_clicks_fall_into_errors_with_the_true_label():
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(50, 16, 12, generator=generator) < 0.5).float()
    logits = torch.randn(50, 16, 12, generator=generator)
    coords, labels = clicks(logits, targets, seed=1)
    assert coords.shape == (50, 2) and labels.shape == (50,)
    x, y = ((coords + 0.5) / 4 - 0.5).long().unbind(1)
    n = torch.arange(50)
    assert ((logits[n, y, x] > 0) != (targets[n, y, x] > 0)).all()
    assert torch.equal(labels, targets[n, y, x].long())
    assert set(labels.tolist()) == {0, 1}


def test_clicks_are_uniform_over_the_error():
    targets = torch.zeros(1, 4, 4)
    targets[0, 1, 2] = targets[0, 3, 0] = 1
    found = [tuple(clicks(torch.full((1, 4, 4), -1.0), targets, seed=seed)[0][0].tolist()) for seed in range(300)]
    assert set(found) == {(2 * 4 + 1.5, 1 * 4 + 1.5), (1.5, 3 * 4 + 1.5)}, "centres of low-resolution pixels"
    assert 110 < found.count((9.5, 5.5)) < 190


def test_a_perfect_mask_is_clicked_inside():
    targets = torch.zeros(2, 8, 8)
    targets[0, 2:5, 3:6] = 1  # the second target is empty
    logits = targets - 0.5
    for seed in range(20):
        coords, labels = clicks(logits, targets, seed=seed)
        assert labels.tolist() == [1, 0]
        assert 3 * 4 <= coords[0, 0] < 6 * 4 and 2 * 4 <= coords[0, 1] < 5 * 4


def test_no_click_in_the_padding():
    targets, logits = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)  # wrong everywhere
    valid = torch.zeros(1, 8, 8)
    valid[:, :2, :3] = 1
    for seed in range(30):
        coords, labels = clicks(logits, targets, valid, seed)
        assert coords[0, 0] < 12 and coords[0, 1] < 8 and labels.item() == 0


def test_clicks_are_reproducible():
    targets = (torch.rand(5, 16, 16) < 0.5).float()
    first, second = clicks(torch.zeros(5, 16, 16), targets, seed=3), clicks(torch.zeros(5, 16, 16), targets, seed=3)
    assert torch.equal(first[0], second[0])


def test_the_plan_has_two_passes_without_a_click():
    rng = np.random.default_rng(0)
    plans = [plan_passes(8, rng) for _ in range(300)]
    assert all(len(plan) == 10 and sum(plan) == 8 and not plan[-1] for plan in plans)
    places = {plan.index(False) for plan in plans}
    assert places == set(range(9)), "one at a random place, maybe just before the last"
    assert plan_passes(0, rng) == []
