"""Batches: determinism, frames, augmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from rectangles import Rectangles
from torch.utils.data import DataLoader

from sam_fast.data.sample import Sample
from sam_fast.evaluation.protocol import centre_most
from sam_fast.training import batches
from sam_fast.training.batches import (
    Augmentation,
    Blocks,
    TrainingBatch,
    TrainingBatches,
    low_resolution,
    number_regions,
    prepare,
)
from sam_fast.training.prompts import mask_boxes, random_point


def make(source=None, **changes) -> TrainingBatches:
    settings = dict(side=64, batch_size=2, prompts=4, seed=5, length=20)
    return TrainingBatches(Rectangles() if source is None else source, **{**settings, **changes})


def equal(first: TrainingBatch, second: TrainingBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_shapes_and_kinds():
    batch = make(Rectangles(height=48, width=64))[0]
    assert batch.images.shape == (2, 3, 64, 64) and batch.images.dtype == torch.uint8
    assert batch.sizes.tolist() == [[48, 64]] * 2
    assert batch.targets.shape == (2, 4, 16, 16) and batch.targets.dtype == torch.bool
    assert batch.points.shape == (2, 4, 2) and batch.boxes.shape == (2, 4, 4)
    assert batch.points.dtype == batch.boxes.dtype == torch.float32
    assert not batch.images[:, :, 48:].any() and not batch.targets[:, :, 12:].any(), "padding is empty"


def test_a_batch_depends_on_its_index_alone():
    batches = make()
    wanted = batches[7]
    assert equal(wanted, make()[7]) and equal(wanted, batches[7])
    assert not equal(wanted, batches[8])
    assert not equal(wanted, make(seed=6)[7])
    loaded = list(DataLoader(make(), batch_size=None, sampler=range(6, 9), num_workers=2))
    assert equal(loaded[1], wanted), "and not on the process that makes it"


def test_repeats_show_the_same_samples_far_apart():
    class Watched(Rectangles):
        def load(self, index, **options):
            seen.append(index)
            return super().load(index, **options)

    seen: list[int] = []
    batches = make(Watched(1000), repeats=3, length=70, augmentation=Augmentation(jitter=(1.0, 1.6)))
    shown = []
    for index in range(len(batches)):
        seen.clear()
        wanted = batches[index]
        shown.append((tuple(seen), wanted))
    assert [samples for samples, _ in shown[:48]] == [samples for samples, _ in shown[:16]] * 3
    assert len({samples for samples, _ in shown}) == 16 + 16, "48 batches of 16 blocks, 22 of the 16 after them"
    assert not equal(shown[0][1], shown[16][1]) and not equal(shown[16][1], shown[32][1])
    assert equal(shown[0][1], make(Watched(1000), augmentation=Augmentation(jitter=(1.0, 1.6)))[0])
    for start in (0, 5, 40, 48, 69):
        blocks = Blocks(batches)
        found = list(blocks.interleave((blocks[i] for i in blocks.needed(start)), start))
        assert len(found) == 70 - start
        assert all(equal(a, b) for a, (_, b) in zip(found, shown[start:], strict=True))


def test_batches_that_are_kept_are_not_shared():
    """Each tensor of a loader process is an open file."""
    batches = make(repeats=2, length=32)
    shared = [[TrainingBatch(*(t.share_memory_() for t in vars(batch).values())) for batch in [batches[0]] * 2]] * 16
    for batch in Blocks(batches).interleave(iter(shared), 0):
        assert not any(tensor.is_shared() for tensor in vars(batch).values())
        assert equal(batch, shared[0][0])


def test_processes_share_no_sample_and_an_epoch_has_all():
    seen = []

    class Watched(Rectangles):
        def load(self, index, **options):
            seen.append(index)
            return super().load(index, **options)

    ranks = [make(Watched(12), rank=rank, world_size=3) for rank in range(3)]
    for step in range(2):
        for rank in ranks:
            rank[step]
    assert sorted(seen) == list(range(12))
    first_epoch, seen = list(seen), []
    for step in range(2, 4):
        for rank in ranks:
            rank[step]
    assert sorted(seen) == list(range(12)) and seen != first_epoch, "every epoch has an order of its own"


def test_points_lie_on_objects_and_boxes_around_them():
    for batch in (make(prompts=6)[i] for i in range(5)):
        for targets, points, boxes in zip(batch.targets, batch.points, batch.boxes, strict=True):
            for target, (x, y), box in zip(targets, points.int().tolist(), boxes, strict=True):
                near = target[max(0, y // 4 - 1) : y // 4 + 2, max(0, x // 4 - 1) : x // 4 + 2]
                assert near.any()
                rows, columns = target.any(1).nonzero()[:, 0], target.any(0).nonzero()[:, 0]
                tight = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) * 4.0
                assert (box - tight).abs().max() < 4 + 3, "noise is at most 20/1024 of the side"


def test_objects_repeat_only_when_there_are_too_few():
    source = Rectangles()
    rng = np.random.default_rng(0)
    *_, points, _, _ = prepare(source.load(2), 64, 3, Augmentation(), rng)  # three objects
    *_, targets, _, _, _ = prepare(source.load(2), 64, 3, Augmentation(), rng)
    assert len({target.tobytes() for target in targets}) == 3
    *_, targets, points, _, _ = prepare(source.load(0), 64, 3, Augmentation(), rng)  # one object
    assert len({target.tobytes() for target in targets}) == 1
    assert len({tuple(point) for point in points}) > 1, "with other prompts"


def test_low_resolution_is_the_majority():
    masks = np.random.default_rng(0).random((3, 32, 32)) < 0.5
    expected = torch.nn.functional.avg_pool2d(torch.from_numpy(masks)[:, None].double(), 4)[:, 0] >= 0.5
    assert np.array_equal(low_resolution(masks), expected.numpy())


def test_flip_moves_image_mask_and_prompts_together():
    image = np.zeros((64, 64, 3), np.uint8)
    mask = np.zeros((1, 64, 64), bool)
    mask[0, 20:40, 4:16] = True
    image[mask[0]] = 200
    sides = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pixels, _, targets, points, boxes, _ = prepare(Sample(image, mask, ""), 64, 1, Augmentation(flip=True), rng)
        lit = pixels[0] > 0
        assert np.array_equal(low_resolution(lit[None])[0], targets[0])
        x, y = points[0].astype(int)
        assert lit[y, x]
        sides.add(bool(lit[:, :32].any()))
        assert (boxes[0, 0] < 32) == lit[:, :32].any()
    assert sides == {True, False}


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_jitter_scales_and_cuts(factor):
    sample = Rectangles(height=40, width=80).load(2)
    rng = np.random.default_rng(0)
    prepared = prepare(sample, 64, 2, Augmentation(jitter=(factor, factor)), rng)
    assert prepared is not None
    assert prepared[1].tolist() == [min(64, 32 * factor), min(64, 64 * factor)]


def whole_masks(window, masks: np.ndarray) -> np.ndarray:
    return np.stack([window.cut_mask(mask, slice(None), slice(None)) for mask in masks])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.7, 2.5])
def test_the_window_is_that_of_the_resized_image(factor, flip):
    """Only the window is computed; here everything is, by Pillow, and the window lies somewhere in it."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (45, 77, 3), np.uint8)
    masks = rng.random((3, 45, 77)) < 0.5
    drawn = batches._draw_window(image.shape[:2], 64, factor, flip, rng)
    window, cut = drawn.cut_image(image), whole_masks(drawn, masks)
    h, w = window.shape[:2]
    assert cut.shape == (3, h, w)
    size = round(64 * factor), round(45 * 64 * factor / 77)
    whole = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)).astype(int)
    resized = np.stack([np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks])
    assert (h, w) == tuple(np.minimum(whole.shape[:2], 64))
    if flip:
        window, cut = window[:, ::-1], cut[:, :, ::-1]
    found = []
    for y in range(whole.shape[0] - h + 1):
        for x in range(whole.shape[1] - w + 1):
            if np.array_equal(cut, resized[:, y : y + h, x : x + w]):
                found.append(np.abs(window - whole[y : y + h, x : x + w]).max())
    assert len(found) == 1 and found[0] <= 1, "rounding"


@pytest.mark.parametrize("scale", [1, 2, 4, 16])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("height", "width", "factor"), [(64, 64, 1.0), (45, 77, 0.7), (45, 64, 1.0), (80, 61, 1.6)])
def test_targets_points_and_boxes_are_those_of_the_whole_window(height, width, factor, flip, scale):
    """They are computed of parts of the masks; here of all of the window."""
    rng = np.random.default_rng(2)
    masks = np.zeros((9, height, width), bool)
    for mask in masks:
        top, left = rng.integers(height // 2), rng.integers(width // 2)
        mask[top : top + 30, left : left + 30] = rng.random(mask[top : top + 30, left : left + 30].shape) < rng.random()
    for given in (masks, np.asfortranarray(masks)):
        window = batches._draw_window((height, width), 64, factor, flip, rng)
        counts = batches._count_pixels(given, window.rows, window.columns, 64, scale)
        padded = np.zeros((9, 64, 64), bool)
        padded[:, : len(window.rows), : len(window.columns)] = whole_masks(window, masks)
        cells = padded.reshape(9, 64 // scale, scale, 64 // scale, scale)
        assert np.array_equal(counts, cells.sum((2, 4)))
        chosen = rng.permutation(np.repeat(np.flatnonzero(padded.any((1, 2))), 2))
        found = batches._points_and_boxes(given, counts, window, scale, chosen, np.random.default_rng(3))
        again = np.random.default_rng(3)
        assert np.array_equal(found[0], [random_point(padded[i], again) for i in chosen])
        assert np.array_equal(found[1], mask_boxes(padded[chosen]))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_some_points_lie_at_the_centre(share):
    sample = Rectangles().load(2)
    prepared = prepare(sample, 64, 300, Augmentation(), np.random.default_rng(0), centre_share=share)
    centres = np.array([centre_most(mask) for mask in sample.masks])
    points, boxes = prepared[3], prepared[4]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    own = np.abs(centres - middle[:, None]).sum(2).argmin(1)
    assert set(own.tolist()) == {0, 1, 2}
    found = np.mean((points == centres[own]).all(1))
    assert found == pytest.approx(share, abs=0.1)
    assert found == 1 if share == 1 else found < 0.7
    assert sample.masks[:, points[:, 1].astype(int), points[:, 0].astype(int)].any(0).all()


def test_samples_without_objects_are_replaced():
    class Mostly(Rectangles):
        def load(self, index, **options):
            return super().load(index, **options) if index == 4 else Rectangles(empty=True).load(index)

    assert make(Mostly(100), batch_size=1)[0].targets.any((2, 3)).all(), "however few have one"
    with pytest.raises(ValueError, match="no object in 1000 samples"):
        make(Rectangles(empty=True))[0]
    with pytest.raises(ValueError, match="no samples"):
        make(Rectangles(0))


def test_a_flat_image_has_regions():
    """An object of two rows is half of a row of targets, so it is trained on, and needs a region."""
    sample = Sample(np.zeros((16, 200, 3), np.uint8), np.ones((1, 16, 200), bool), "")
    prepared = prepare(sample, 256, 1, Augmentation(jitter=(0.1, 0.1)), np.random.default_rng(0))
    assert prepared is not None
    assert prepared[1].tolist() == [2, 26]
    assert np.argwhere(prepared[-1] >= 0).tolist() == [[0, column] for column in range(7)]


def test_regions_lie_between_the_outlines_of_all_masks():
    targets = np.zeros((3, 8, 8), bool)
    targets[0, :, :4] = True  # the left half
    targets[1, 2:4, 2:6] = True  # across the middle
    targets[2, 6:, :] = True
    regions = number_regions(targets, (8, 7))
    assert regions.shape == (8, 8) and regions.dtype == np.int64
    assert (regions[:, 7] == -1).all() and (regions[:, :7] >= 0).all(), "the padding, and nothing else, is -1"
    memberships = targets.reshape(3, -1).T
    known = np.flatnonzero(regions.ravel() >= 0)
    for i in known:
        same = regions.ravel()[known] == regions.ravel()[i]
        assert np.array_equal(same, (memberships[known] == memberships[i]).all(1))
