"""Overlay pictures: which pixels change, and to what."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sam_fast.utils.amg import coco_encode_rle, mask_to_rle_pytorch
from sam_fast.utils.overlay import beside, draw_masks, draw_prompts, line_width, mask_color, save_picture

GRAY = np.full((61, 83, 3), 100, np.uint8)


def block(top: int, left: int, bottom: int, right: int, shape: tuple[int, int] = (61, 83)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


def test_film_covers_the_mask_and_nothing_else() -> None:
    mask = block(10, 20, 40, 60)
    drawn = np.asarray(draw_masks(GRAY, [mask], alpha=0.25, outline=False))
    np.testing.assert_array_equal(drawn[~mask], 100)
    expected = np.rint(100 + 0.25 * (np.array(mask_color(0), np.float32) - 100))
    np.testing.assert_array_equal(drawn[mask], np.broadcast_to(expected, (mask.sum(), 3)))


def test_small_masks_lie_on_top_in_any_order() -> None:
    large, small = block(0, 0, 61, 83), block(20, 20, 30, 30)
    first = np.asarray(draw_masks(GRAY, [large, small], outline=False))
    np.testing.assert_array_equal(first, np.asarray(draw_masks(GRAY, np.stack([small, large]), outline=False)))
    assert (first[25, 25] != first[5, 5]).any()


def test_outline_is_the_inner_border_but_not_along_the_frame() -> None:
    mask = block(10, 0, 40, 30)
    plain = np.asarray(draw_masks(GRAY, [mask], outline=False)).astype(int)
    lined = np.asarray(draw_masks(GRAY, [mask])).astype(int)
    border = (plain != lined).any(-1)
    assert line_width(*GRAY.shape[:2]) == 1
    np.testing.assert_array_equal(border, mask & ~block(11, 0, 39, 29))


def test_outline_of_a_ring_follows_the_hole() -> None:
    ring = block(10, 10, 50, 50) & ~block(25, 25, 35, 35)
    plain, lined = (np.asarray(draw_masks(GRAY, [ring], outline=outline)) for outline in (False, True))
    border = (plain != lined).any(-1)
    # The square structuring element reaches corners, so the hole's border is the frame one pixel around it.
    np.testing.assert_array_equal(border, (ring & ~block(11, 11, 49, 49)) | (block(24, 24, 36, 36) & ring))


def test_every_form_of_record_is_drawn_alike() -> None:
    mask = block(3, 5, 20, 77)
    rle = mask_to_rle_pytorch(torch.from_numpy(mask)[None])[0]
    forms = [mask, rle, coco_encode_rle(rle)]
    pictures = [np.asarray(draw_masks(GRAY, [{"segmentation": form}])) for form in forms]
    for picture in pictures[1:]:
        np.testing.assert_array_equal(picture, pictures[0])
    np.testing.assert_array_equal(pictures[0], np.asarray(draw_masks(GRAY, [mask])))


@pytest.mark.parametrize(
    "masks", [[], np.zeros((0, 61, 83), bool), [np.zeros((61, 83), bool)]], ids=["list", "array", "empty"]
)
def test_nothing_to_draw_leaves_the_image(masks: object) -> None:
    np.testing.assert_array_equal(np.asarray(draw_masks(GRAY, masks)), GRAY)  # type: ignore[arg-type]


def test_inputs_are_not_changed() -> None:
    image, mask = GRAY.copy(), block(1, 1, 30, 30)
    draw_prompts(draw_masks(image, [mask]), np.array([[3, 3]]))
    np.testing.assert_array_equal(image, GRAY)
    np.testing.assert_array_equal(mask, block(1, 1, 30, 30))


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (700, 3)], ids=["1x1", "1x50", "700x3"])
def test_extreme_images(shape: tuple[int, int]) -> None:
    image = np.zeros((*shape, 3), np.uint8)
    drawn = draw_prompts(
        draw_masks(image, [np.ones(shape, bool)]), np.array([[0.0, 0.0]]), boxes=np.array([[0, 0, 9, 9]])
    )
    assert drawn.size == shape[::-1]


def test_neighbouring_colours_differ() -> None:
    colors = np.array([mask_color(i) for i in range(24)]).astype(float)
    assert min(np.abs(a - b).sum() for a, b in itertools.pairwise(colors)) > 100
    assert min(np.abs(a - b).sum() for a, b in itertools.combinations(colors, 2)) > 8


def test_points_are_green_or_red_markers_in_place() -> None:
    drawn = np.asarray(draw_prompts(GRAY, np.array([[20, 30], [60, 30]]), np.array([1, 0]))).astype(int)
    changed = (drawn != GRAY).any(-1)
    rows, columns = changed.nonzero()
    assert {int(columns[columns < 40].mean().round()), int(columns[columns > 40].mean().round())} == {20, 60}
    assert rows.mean() == pytest.approx(30, abs=0.01)
    green, red = drawn[:, :40][changed[:, :40]].mean(0), drawn[:, 40:][changed[:, 40:]].mean(0)
    assert green[1] > green[0] and red[0] > red[1]


def test_points_outside_are_not_seen() -> None:
    points = np.array([[-500, 3], [1e9, -1e9], [1e10, 5], [5, -1e300], [np.inf, 0], [np.nan, 1]])
    np.testing.assert_array_equal(np.asarray(draw_prompts(GRAY, points)), GRAY)


@pytest.mark.parametrize("point", [(-7, 30), (89, 30), (40, -7), (40, 67)], ids=["left", "right", "above", "below"])
def test_points_near_the_edge_are_seen_in_part(point: tuple[int, int]) -> None:
    """The marker's radius on this canvas is 7.7 pixels."""
    assert (np.asarray(draw_prompts(GRAY, np.array([point]))) != GRAY).any()


def test_a_box_beyond_the_canvas_is_soon_drawn() -> None:
    for corners in ([-1e10, 20, 1e10, 1e10], [-90, 20, 900, 900]):
        drawn = np.asarray(draw_prompts(GRAY, boxes=np.array([corners])))
        assert (drawn[20] != 100).any(-1).all() and (drawn[26:] == 100).all() and (drawn[:17] == 100).all()


def test_box_is_a_frame_for_any_order_of_corners() -> None:
    drawn = np.asarray(draw_prompts(GRAY, boxes=np.array([[10, 10, 50, 40]])))
    np.testing.assert_array_equal(drawn, np.asarray(draw_prompts(GRAY, boxes=np.array([[50, 40, 10, 10]]))))
    assert (drawn[10, 10:51] != 100).any(-1).all() and (drawn[10:41, 50] != 100).any(-1).all()
    np.testing.assert_array_equal(drawn[15:35, 15:45], 100)


def test_beside() -> None:
    sheet = beside(Image.new("RGB", (10, 5), "red"), Image.new("RGB", (7, 9), "blue"), gap=3)
    assert sheet.size == (20, 9)
    assert [sheet.getpixel(xy) for xy in [(9, 4), (11, 4), (13, 8), (0, 8)]] == [
        (255, 0, 0),
        (255, 255, 255),
        (0, 0, 255),
        (255, 255, 255),
    ]


@pytest.mark.parametrize(
    ("size", "saved"), [((65_500, 2), (65_500, 2)), ((70_000, 4), (65_500, 4)), ((1, 65_501), (1, 65_500))]
)
def test_pictures_too_long_for_a_jpeg_are_made_smaller(
    tmp_path: Path, size: tuple[int, int], saved: tuple[int, int]
) -> None:
    picture = Image.new("RGB", size, "red")
    save_picture(picture, tmp_path / "long.jpg")
    assert picture.size == size
    with Image.open(tmp_path / "long.jpg") as opened:
        assert opened.size == saved and opened.getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_masks(GRAY, [np.zeros((3, 3), bool)]), "61 x 83 like the image"),
        (lambda: draw_masks(GRAY, [block(0, 0, 1, 1)], alpha=1.5), "alpha"),
        (lambda: draw_prompts(GRAY, np.zeros((2, 3))), r"\[K, 2\]"),
        (lambda: draw_prompts(GRAY, np.zeros((2, 2)), np.zeros(3)), "labels"),
        (lambda: draw_prompts(GRAY, boxes=np.zeros(4)), r"\[N, 4\]"),
    ],
    ids=["mask-shape", "alpha", "points", "labels", "boxes"],
)
def test_wrong_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
