"""Every public name of `utils.amg` against the published one, with cv2 and pycocotools behind the latter."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_masks

from sam_fast.utils import amg
from tests.oracle import official

theirs = official.utils.amg

MASK_SHAPES = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=70)
MASKS = hnp.arrays(bool, MASK_SHAPES)


def random_masks(*shape: int, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def blobs(height: int, width: int, seed: int) -> np.ndarray:
    """A bool mask of irregular regions with holes: thresholded noise, enlarged."""
    noise = np.random.default_rng(seed).random((height // 3 + 2, width // 3 + 2))
    return np.kron(noise, np.ones((3, 3)))[:height, :width] < (0.3, 0.5, 0.7)[seed % 3]


# --- MaskData


def rows(module, count: int = 5):
    """One MaskData of either module with a value of each kind."""
    return module.MaskData(
        boxes=torch.arange(count * 4).reshape(count, 4),
        points=np.arange(count * 2.0).reshape(count, 2),
        rles=[{"size": [1, 1], "counts": [i]} for i in range(count)],
    )


def assert_same_data(ours, expected) -> None:
    assert [key for key, _ in ours.items()] == [key for key, _ in expected.items()]
    for key, value in expected.items():
        assert type(ours[key]) is type(value), key
        if isinstance(value, list):
            assert ours[key] == value
        else:
            np.testing.assert_array_equal(np.asarray(ours[key]), np.asarray(value), err_msg=key)


@pytest.mark.parametrize(
    "keep",
    [
        torch.tensor([True, False, True, True, False]),
        torch.zeros(5, dtype=torch.bool),
        torch.tensor([3, 0, 0]),
        torch.tensor([], dtype=torch.int64),
    ],
    ids=["bool", "bool_none", "indices", "no_indices"],
)
def test_filter_equals_official(keep):
    ours, expected = rows(amg), rows(theirs)
    ours.filter(keep)
    expected.filter(keep)
    assert_same_data(ours, expected)


def test_filter_takes_an_empty_float_tensor():
    data = rows(amg)
    data.filter(torch.tensor([]))
    assert [len(value) for _, value in data.items()] == [0, 0, 0]


def test_cat_equals_official():
    ours, expected = amg.MaskData(), theirs.MaskData()
    for data, module in [(ours, amg), (expected, theirs)]:
        for count in (2, 0, 3):
            data.cat(rows(module, count))
    assert_same_data(ours, expected)
    assert len(ours["rles"]) == 5


def test_cat_copies_what_it_takes():
    source, data = rows(amg), amg.MaskData()
    data.cat(source)
    data.cat(source)
    source["boxes"][0] = -1
    source["rles"][0]["counts"][0] = -1
    assert data["boxes"].min() == 0
    assert data["rles"][0]["counts"] == data["rles"][5]["counts"] == [0]


def test_to_numpy_and_item_access_equal_official():
    ours, expected = rows(amg), rows(theirs)
    for data in (ours, expected):
        data["scores"] = torch.ones(5, requires_grad=True)
        del data["points"]
        data.to_numpy()
    assert_same_data(ours, expected)
    assert isinstance(ours["boxes"], np.ndarray)
    with pytest.raises(KeyError):
        ours["points"]


def test_mask_data_refuses_other_values():
    with pytest.raises(TypeError, match=r"tuple.*'boxes'"):
        amg.MaskData(boxes=(1, 2))
    data = amg.MaskData()
    with pytest.raises(TypeError, match=r"int.*'boxes'"):
        data["boxes"] = 3


# --- boxes, points, crops


@pytest.mark.parametrize("crop_box", [[0, 0, 300, 200], [0, 50, 160, 130], [100, 40, 300, 200]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_is_box_near_crop_edge_equals_official(crop_box, dtype):
    generator = torch.Generator().manual_seed(0)
    boxes = torch.randint(0, 200, (500, 4), generator=generator).to(dtype)
    for keywords in ({}, {"atol": 7.0}, {"atol": 0.0}):
        result = amg.is_box_near_crop_edge(boxes, crop_box, [0, 0, 300, 200], **keywords)
        assert torch.equal(result, theirs.is_box_near_crop_edge(boxes, crop_box, [0, 0, 300, 200], **keywords))
    assert amg.is_box_near_crop_edge(boxes[:0], crop_box, [0, 0, 300, 200]).shape == (0,)


def test_boxes_exactly_at_the_tolerance_are_near():
    boxes = torch.tensor([[20, 50, 60, 60], [21, 50, 60, 60]])
    assert amg.is_box_near_crop_edge(boxes, [100, 100, 200, 200], [0, 0, 300, 300]).tolist() == [True, False]


@pytest.mark.parametrize("make", [torch.tensor, np.array, list], ids=["tensor", "array", "list"])
def test_box_xyxy_to_xywh_equals_official(make):
    box = make([3, 5, 10, 5])
    result = amg.box_xyxy_to_xywh(box)
    assert type(result) is type(box)
    assert list(result) == list(theirs.box_xyxy_to_xywh(box)) == [3, 5, 7, 0]
    assert list(box) == [3, 5, 10, 5]


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["tensor", "array"])
def test_box_xyxy_to_xywh_takes_many_boxes(make):
    assert amg.box_xyxy_to_xywh(make([[3, 5, 10, 9], [0, 0, 0, 0]])).tolist() == [[3, 5, 7, 4], [0, 0, 0, 0]]


@pytest.mark.parametrize("size", [1, 3, 6, 7, 100])
def test_batch_iterator_equals_official(size):
    arguments = (list(range(6)), np.arange(12).reshape(6, 2))
    ours = [[list(map(str, part)) for part in batch] for batch in amg.batch_iterator(size, *arguments)]
    assert ours == [[list(map(str, part)) for part in batch] for batch in theirs.batch_iterator(size, *arguments)]


def test_batch_iterator_edges():
    assert list(amg.batch_iterator(4, [])) == []
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        next(amg.batch_iterator(4, [1, 2], [1, 2, 3]))
    with pytest.raises(ValueError, match=r"\[\]"):
        next(amg.batch_iterator(4))
    with pytest.raises(ValueError, match="0"):
        next(amg.batch_iterator(0, [1]))


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_build_point_grid_equals_official(count):
    np.testing.assert_array_equal(amg.build_point_grid(count), theirs.build_point_grid(count))


def test_build_all_layer_point_grids_equals_official():
    for ours, expected in zip(
        amg.build_all_layer_point_grids(30, 3, 2), theirs.build_all_layer_point_grids(30, 3, 2), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)


def test_point_grids_without_points_raise():
    with pytest.raises(ValueError, match="got 0"):
        amg.build_point_grid(0)
    with pytest.raises(ValueError, match="got 0"):
        amg.build_all_layer_point_grids(4, 3, 2)


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(480, 640), (1000, 37), (1023, 1025), (16, 16)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_generate_crop_boxes_equals_official(size, layers):
    assert amg.generate_crop_boxes(size, layers, 512 / 1500) == theirs.generate_crop_boxes(size, layers, 512 / 1500)
    assert amg.generate_crop_boxes(size, layers, 0.0) == theirs.generate_crop_boxes(size, layers, 0.0)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3), st.floats(0, 0.9))
def test_crops_of_small_images_are_the_official_ones_that_hold_pixels(height, width, layers, overlap):
    boxes, crop_layers = amg.generate_crop_boxes((height, width), layers, overlap)
    expected = zip(*theirs.generate_crop_boxes((height, width), layers, overlap), strict=True)
    expected = [(box, layer) for box, layer in expected if box[0] < box[2] and box[1] < box[3]]
    assert list(zip(boxes, crop_layers, strict=True)) == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("middle", [(), (3,)], ids=["flat", "channels"])
@pytest.mark.parametrize("count", [0, 5])
def test_uncrop_boxes_and_points_equal_official(dtype, middle, count):
    crop_box = [11, 7, 40, 90]
    for name, last in [("uncrop_boxes_xyxy", 4), ("uncrop_points", 2)]:
        values = torch.arange(count * max(1, *middle, 1) * last).reshape(count, *middle, last).to(dtype)
        result = getattr(amg, name)(values, crop_box)
        expected = getattr(theirs, name)(values, crop_box)
        assert torch.equal(result, expected) and result.dtype == expected.dtype


@pytest.mark.parametrize("crop_box", [[0, 0, 30, 20], [4, 3, 12, 20], [29, 19, 30, 20], [0, 0, 29, 20]])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("count", [0, 3])
def test_uncrop_masks_equals_official(crop_box, dtype, count):
    masks = random_masks(count, crop_box[3] - crop_box[1], crop_box[2] - crop_box[0]).to(dtype)
    result = amg.uncrop_masks(masks, crop_box, 20, 30)
    assert result.shape == (count, 20, 30) and result.dtype == dtype
    if count:  # the published code pads an empty batch too, but not in every version of torch
        assert torch.equal(result, theirs.uncrop_masks(masks, crop_box, 20, 30))


# --- masks


@given(MASKS)
@settings(deadline=None)
def test_mask_to_rle_equals_official_and_decodes(masks):
    tensor = torch.from_numpy(masks)
    rles = amg.mask_to_rle_pytorch(tensor)
    if masks[0].size > 1:  # the published code has no runs to look for in a single pixel
        assert rles == theirs.mask_to_rle_pytorch(tensor)
    for mask, rle in zip(masks, rles, strict=True):
        decoded = amg.rle_to_mask(rle)
        assert decoded.dtype == bool and decoded.flags.writeable
        np.testing.assert_array_equal(decoded, mask)
        np.testing.assert_array_equal(decoded, theirs.rle_to_mask(rle))
        assert amg.area_from_rle(rle) == theirs.area_from_rle(rle) == mask.sum()
        json.dumps(rle)


def test_compressed_rle_is_decoded_too():
    mask = random_masks(1, 30, 41)
    compressed = amg.coco_encode_rle(amg.mask_to_rle_pytorch(mask)[0])
    np.testing.assert_array_equal(amg.rle_to_mask(compressed), mask[0].numpy())
    assert amg.area_from_rle(compressed) == int(mask.sum())


@pytest.mark.parametrize("fill", [False, True], ids=["empty", "full"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 63, 65), (1, 1, 200), (1, 200, 1)])
def test_rle_of_uniform_masks(fill, shape):
    rles = amg.mask_to_rle_pytorch(torch.full(shape, fill))
    pixels = shape[1] * shape[2]
    assert rles == [{"size": [*shape[1:]], "counts": [0, pixels] if fill else [pixels]}] * shape[0]


def test_mask_to_rle_takes_non_contiguous_masks():
    masks = random_masks(3, 41, 67)
    assert amg.mask_to_rle_pytorch(masks.transpose(1, 2)) == theirs.mask_to_rle_pytorch(masks.transpose(1, 2))
    assert amg.mask_to_rle_pytorch(masks[::2, 1:, ::3]) == theirs.mask_to_rle_pytorch(masks[::2, 1:, ::3])


def test_mask_to_rle_of_no_masks():
    assert amg.mask_to_rle_pytorch(torch.zeros(0, 5, 7, dtype=torch.bool)) == []
    with pytest.raises(ValueError, match=r"\(5, 7\)"):
        amg.mask_to_rle_pytorch(torch.zeros(5, 7, dtype=torch.bool))


@pytest.mark.parametrize("counts", [[5], [3, 4], [7, -1], []])
def test_rle_to_mask_refuses_wrong_counts(counts):
    with pytest.raises(ValueError, match="6"):
        amg.rle_to_mask({"size": [2, 3], "counts": counts})


@given(MASKS)
@settings(deadline=None)
def test_coco_encode_rle_equals_pycocotools(masks):
    for mask, rle in zip(masks, amg.mask_to_rle_pytorch(torch.from_numpy(masks)), strict=True):
        encoded = amg.coco_encode_rle(rle)
        assert encoded == theirs.coco_encode_rle(rle)
        np.testing.assert_array_equal(coco_masks.decode(encoded), mask)
        json.dumps(encoded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_calculate_stability_score_equals_official(dtype):
    logits = (torch.randn(4, 3, 37, 53, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    for threshold, offset in [(0.0, 1.0), (-1.5, 0.5), (0.3, 0.0)]:
        score = amg.calculate_stability_score(logits, threshold, offset)
        assert torch.equal(score, theirs.calculate_stability_score(logits, threshold, offset))
        assert score.dtype == torch.float32 and score.min() > 0


def test_stability_of_an_empty_mask_is_nan_and_of_no_masks_is_empty():
    assert amg.calculate_stability_score(torch.full((1, 4, 4), -9.0), 0.0, 1.0).isnan().all()
    assert amg.calculate_stability_score(torch.zeros(0, 4, 4), 0.0, 1.0).shape == (0,)


def test_stability_of_rows_wider_than_int16():
    logits = torch.full((1, 2, 40000), 5.0)
    logits[:, :, 30000:] = 0.5
    assert amg.calculate_stability_score(logits, 0.0, 1.0).tolist() == [0.75]


@given(MASKS)
@settings(deadline=None)
def test_batched_mask_to_box_equals_official(masks):
    masks = torch.from_numpy(masks)
    boxes = amg.batched_mask_to_box(masks)
    assert torch.equal(boxes, theirs.batched_mask_to_box(masks)) and boxes.dtype == torch.int64


@pytest.mark.parametrize("shape", [(40, 31), (3, 40, 31), (2, 3, 40, 31), (2, 1, 2, 40, 31)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.002, 1.0])
def test_batched_mask_to_box_keeps_leading_dimensions(shape, density):
    masks = random_masks(*shape, density=density)
    assert torch.equal(amg.batched_mask_to_box(masks), theirs.batched_mask_to_box(masks))


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 5, 7), (3, 0, 7)], ids=str)
def test_boxes_of_nothing_are_integers(shape):
    boxes = amg.batched_mask_to_box(torch.zeros(shape, dtype=torch.bool))
    assert boxes.shape == (*shape[:-2], 4) and boxes.dtype == torch.int64 and not boxes.any()


@pytest.mark.parametrize("mode", ["holes", "islands"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (64, 65), (61, 130)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_remove_small_regions_equals_official(shape, mode):
    changes = 0
    for seed in range(12):
        mask = blobs(*shape, seed)
        for area in (1, 10, 36.5, 10**6):
            before = mask.copy()
            result, changed = amg.remove_small_regions(mask, area, mode)
            expected, expected_changed = theirs.remove_small_regions(mask, area, mode)
            np.testing.assert_array_equal(result, expected)
            assert changed is expected_changed and result.dtype == bool
            np.testing.assert_array_equal(mask, before)
            changes += changed
    assert changes or shape == (1, 1)


@pytest.mark.parametrize("fill", [False, True], ids=["empty", "full"])
@pytest.mark.parametrize("mode", ["holes", "islands"])
def test_remove_small_regions_of_uniform_masks(fill, mode):
    mask = np.full((20, 30), fill)
    result, changed = amg.remove_small_regions(mask, 10, mode)
    assert result is mask and changed is False


def test_remove_small_regions_refuses_wrong_input():
    with pytest.raises(ValueError, match="'edges'"):
        amg.remove_small_regions(np.zeros((4, 4), bool), 3, "edges")
    with pytest.raises(ValueError, match=r"\(1, 4, 4\)"):
        amg.remove_small_regions(np.zeros((1, 4, 4), bool), 3, "holes")


def test_public_names_cover_the_official_module():
    public = {name for name, value in vars(theirs).items() if getattr(value, "__module__", None) == theirs.__name__}
    assert len(public) == 17 and public <= set(vars(amg))
