"""`ResizeLongestSide` against the published one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sam_fast.utils.transforms import ResizeLongestSide
from tests.oracle import official

OfficialResize = official.utils.transforms.ResizeLongestSide

SIZES = [(480, 640), (641, 479), (1, 1), (1, 7), (1024, 1024), (1023, 1024), (37, 2001), (300, 5)]


def random_image(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def size_id(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


@pytest.mark.parametrize("target", [64, 1024])
@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_apply_image_equals_official(size, target):
    image = random_image(*size, 3)
    before = image.copy()
    resized = ResizeLongestSide(target).apply_image(image)
    np.testing.assert_array_equal(resized, OfficialResize(target).apply_image(image))
    assert resized.dtype == np.uint8 and max(resized.shape[:2]) == target
    assert resized.flags.writeable and not np.shares_memory(resized, image)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("view", ["read_only", "negative_strides", "every_other_column", "fortran"])
def test_apply_image_takes_any_memory_layout(view):
    image = random_image(60, 90, 3)
    if view == "read_only":
        image.flags.writeable = False
    elif view == "negative_strides":
        image = image[::-1, ::-1, ::-1]
    elif view == "every_other_column":
        image = image[:, ::2]
    else:
        image = np.asfortranarray(image)
    expected = OfficialResize(128).apply_image(np.ascontiguousarray(image))
    np.testing.assert_array_equal(ResizeLongestSide(128).apply_image(image), expected)


@pytest.mark.parametrize("shape", [(50, 80), (50, 80, 2), (50, 80, 4)], ids=["gray", "gray_alpha", "rgba"])
def test_apply_image_resizes_other_channel_counts_as_official(shape):
    image = random_image(*shape)
    np.testing.assert_array_equal(ResizeLongestSide(64).apply_image(image), OfficialResize(64).apply_image(image))


def test_apply_image_drops_a_single_channel():
    image = random_image(50, 80, 1)
    np.testing.assert_array_equal(
        ResizeLongestSide(64).apply_image(image), OfficialResize(64).apply_image(image[:, :, 0])
    )


def test_apply_image_resizes_a_float_plane_as_official():
    plane = np.random.default_rng(0).normal(size=(50, 80)).astype(np.float32)
    np.testing.assert_array_equal(ResizeLongestSide(64).apply_image(plane), OfficialResize(64).apply_image(plane))


@pytest.mark.parametrize("size", [(20000, 5), (3, 20000)], ids=size_id)
def test_a_side_never_vanishes(size):
    resize = ResizeLongestSide(1024)
    expected = (1024, 1) if size[0] > size[1] else (1, 1024)
    assert resize.get_preprocess_shape(*size, 1024) == expected
    assert resize.apply_image(random_image(*size, 3)).shape == (*expected, 3)


@given(st.integers(1, 30000), st.integers(1, 30000), st.integers(1, 2048))
def test_preprocess_shape_equals_official_up_to_the_one_pixel_floor(height, width, target):
    expected = OfficialResize.get_preprocess_shape(height, width, target)
    assert ResizeLongestSide.get_preprocess_shape(height, width, target) == (max(1, expected[0]), max(1, expected[1]))


@pytest.mark.parametrize("size", [(480, 640), (37, 2001), (1, 1)], ids=size_id)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_coords_and_boxes_equal_official(size, dtype):
    coords = np.random.default_rng(0).uniform(-50, 2000, (3, 4, 2)).astype(dtype)
    boxes = coords.reshape(-1, 4)
    before = coords.copy()
    ours, theirs = ResizeLongestSide(1024), OfficialResize(1024)
    for given_array, method in [(coords, "apply_coords"), (boxes, "apply_boxes")]:
        result = getattr(ours, method)(given_array, size)
        np.testing.assert_array_equal(result, getattr(theirs, method)(given_array, size))
        assert result.dtype == np.float64
        tensor = torch.from_numpy(given_array)
        result = getattr(ours, method + "_torch")(tensor, size)
        assert torch.equal(result, getattr(theirs, method + "_torch")(tensor, size))
        assert result.dtype == torch.float32
    np.testing.assert_array_equal(coords, before)


@pytest.mark.parametrize("count", [0, 1])
def test_empty_prompts_stay_empty(count):
    resize = ResizeLongestSide(1024)
    assert resize.apply_coords(np.zeros((count, 2)), (10, 20)).shape == (count, 2)
    assert resize.apply_boxes(np.zeros((count, 4)), (10, 20)).shape == (count, 4)
    assert resize.apply_coords_torch(torch.zeros(count, 3, 2), (10, 20)).shape == (count, 3, 2)
    assert resize.apply_boxes_torch(torch.zeros(count, 4), (10, 20)).shape == (count, 4)


def test_float64_points_keep_their_precision():
    point = np.array([[1 / 3, 1e-12 + 100]])
    assert ResizeLongestSide(1024).apply_coords(point, (512, 512)).tolist() == [[2 / 3, 2e-12 + 200]]


def test_apply_image_torch_resizes_height_and_width():
    images = torch.rand(2, 3, 45, 31, generator=torch.Generator().manual_seed(0))
    result = ResizeLongestSide(90).apply_image_torch(images)
    expected = F.interpolate(images, (90, 62), mode="bilinear", align_corners=False, antialias=True)
    assert torch.equal(result, expected)


def test_apply_image_torch_is_within_rounding_of_apply_image():
    image = random_image(300, 500, 3)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    smooth = ResizeLongestSide(128).apply_image_torch(tensor)[0].permute(1, 2, 0).numpy()
    # Pillow rounds to uint8 after each of the two passes: half a level each
    assert np.abs(smooth - ResizeLongestSide(128).apply_image(image)).max() <= 1.01


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["five_channels", "float_colours", "one_dimension", "empty"],
)
def test_apply_image_says_what_is_wrong(image):
    with pytest.raises(ValueError, match=r"\d"):
        ResizeLongestSide(64).apply_image(image)


def test_wrong_types_and_coordinates_raise():
    resize = ResizeLongestSide(64)
    with pytest.raises(TypeError, match="list"):
        resize.apply_image([[1, 2]])
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        resize.apply_coords(np.zeros((2, 3)), (10, 10))
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        resize.apply_coords_torch(torch.zeros(2, 3), (10, 10))
    with pytest.raises(ValueError, match=r"\(3, 4, 5\)"):
        resize.apply_image_torch(torch.zeros(3, 4, 5))
