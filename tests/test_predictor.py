"""SamPredictor against the official one with the same weights, and what it offers beyond."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from oracle import official, relative_error

from sam_fast import SamPredictor
from sam_fast.checkpoints import load_checkpoint

SIZES = {"landscape": (180, 300), "portrait": (300, 180), "square": (256, 256), "tiny": (9, 14), "huge": (1400, 2100)}
# Float32 through two implementations of the same sums: rounding alone (bound 1e-4, see the contract in the README).
RELATIVE_ERROR = 1e-4


def photo_of(photo: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def predictors(tiny_models):
    theirs, ours = tiny_models
    return official.SamPredictor(theirs), SamPredictor(ours)


def prompts(size: tuple[int, int]) -> dict[str, dict]:
    h, w = size
    points = np.array([[0.4 * w, 0.5 * h], [0.7 * w, 0.3 * h], [0.1 * w, 0.9 * h]])
    labels = np.array([1, 0, 1])
    box = np.array([0.2 * w, 0.3 * h, 0.8 * w, 0.75 * h])
    low_res = np.random.default_rng(3).normal(0, 5, (1, 64, 64)).astype(np.float32)
    return {
        "one point": {"point_coords": points[:1], "point_labels": labels[:1]},
        "points": {"point_coords": points, "point_labels": labels},
        "box": {"box": box},
        "points and box": {"point_coords": points, "point_labels": labels, "box": box},
        "mask": {"mask_input": low_res},
        "point and mask": {"point_coords": points[:1], "point_labels": labels[:1], "mask_input": low_res},
        "everything": {"point_coords": points, "point_labels": labels, "box": box, "mask_input": low_res},
        "nothing": {},
        "points outside": {"point_coords": points * 3 - w, "point_labels": labels},
    }


def assert_same(ours, theirs):
    masks, iou, low_res = ours
    their_masks, their_iou, their_low_res = theirs
    assert masks.shape == their_masks.shape and masks.dtype == their_masks.dtype
    assert iou.dtype == low_res.dtype == np.float32
    scale = np.abs(their_low_res).max()
    assert np.abs(low_res - their_low_res).max() <= RELATIVE_ERROR * scale
    assert np.abs(iou - their_iou).max() <= RELATIVE_ERROR
    if masks.dtype == bool:
        # A logit that differs by rounding may fall on either side of 0: one in ten thousand, or one of a small mask.
        assert np.count_nonzero(masks != their_masks) <= max(1, 1e-4 * np.count_nonzero(their_masks))
    else:
        assert np.abs(masks - their_masks).max() <= RELATIVE_ERROR * scale


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_every_prompt_like_official(predictors, photo, size):
    theirs, ours = predictors
    image = photo_of(photo, size)
    theirs.set_image(image)
    ours.set_image(image)
    assert ours.original_size == theirs.original_size and ours.input_size == theirs.input_size
    error = (ours.get_image_embedding() - theirs.get_image_embedding()).norm() / theirs.features.norm()
    assert error <= 1e-5
    covered = 0
    for kwargs in prompts(size).values():
        for multimask_output in (True, False):
            expected = theirs.predict(**kwargs, multimask_output=multimask_output)
            assert_same(ours.predict(**kwargs, multimask_output=multimask_output), expected)
            covered += 0 < expected[0].mean() < 1
    assert covered >= 9, "the comparison is of trivial masks"


def test_logits_like_official(predictors, photo):
    theirs, ours = predictors
    image = photo_of(photo, SIZES["landscape"])
    theirs.set_image(image)
    ours.set_image(image)
    kwargs = prompts(SIZES["landscape"])["points and box"]
    assert_same(ours.predict(**kwargs, return_logits=True), theirs.predict(**kwargs, return_logits=True))


def test_bgr_like_official(predictors, photo):
    theirs, ours = predictors
    image = photo_of(photo, SIZES["landscape"])
    theirs.set_image(image[..., ::-1], "BGR")
    ours.set_image(image[..., ::-1], "BGR")
    bgr = ours.features
    torch.testing.assert_close(bgr, theirs.features, rtol=0, atol=1e-4)
    ours.set_image(image)
    assert torch.equal(bgr, ours.features)
    ours.set_image(image[..., ::-1])
    assert not torch.equal(bgr, ours.features)


def test_predict_torch_like_official(predictors, photo):
    theirs, ours = predictors
    size = SIZES["portrait"]
    image = photo_of(photo, size)
    theirs.set_image(image)
    ours.set_image(image)
    coords = torch.rand(5, 2, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([size[1], size[0]])
    coords = ours.transform.apply_coords_torch(coords, size)
    labels = torch.tensor([[1, 0]]).repeat(5, 1)
    boxes = torch.cat([coords[:, 0] * 0.5, coords[:, 0] * 0.5 + 40], dim=1)
    for kwargs in ({}, {"boxes": boxes}, {"multimask_output": False}, {"return_logits": True}):
        expected = theirs.predict_torch(coords, labels, **kwargs)
        result = ours.predict_torch(coords, labels, **kwargs)
        assert [t.shape for t in result] == [t.shape for t in expected]
        assert_same([t.numpy() for t in result], [t.numpy() for t in expected])


def test_set_torch_image_like_official(predictors):
    theirs, ours = predictors
    image = torch.randint(0, 256, (1, 3, 256, 200), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    theirs.set_torch_image(image, (512, 400))
    ours.set_torch_image(image, (512, 400))
    torch.testing.assert_close(ours.features, theirs.features, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"\[1, 3, h, w\] with longest side 256"):
        ours.set_torch_image(image[..., :100, :100], (512, 400))


def test_several_boxes_equal_one_by_one(predictors, photo):
    _, ours = predictors
    ours.set_image(photo_of(photo, SIZES["landscape"]))
    boxes = np.array([[20, 30, 120, 140], [100, 20, 250, 160], [5, 5, 60, 60]])
    masks, iou, low_res = ours.predict(box=boxes)
    assert masks.shape == (3, 3, 180, 300) and iou.shape == (3, 3) and low_res.shape == (3, 3, 64, 64)
    for i, box in enumerate(boxes):
        one = ours.predict(box=box)
        np.testing.assert_allclose(low_res[i], one[2], atol=1e-4 * np.abs(low_res).max())
        assert (masks[i] == one[0]).mean() > 0.9999
    assert ours.predict(box=boxes[:1])[0].shape == (3, 180, 300)
    points = np.array([[[50, 60]], [[200, 90]]])
    assert ours.predict(points, np.ones((2, 1)))[0].shape == (2, 3, 180, 300)
    assert ours.predict(points[:0], np.ones((0, 1)))[0].shape == (0, 3, 180, 300)


@pytest.mark.parametrize("size", [(1, 1), (20000, 50), (3, 9000)], ids=str)
def test_extreme_images(predictors, size):
    _, ours = predictors
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours.set_image(image)
    masks, iou, low_res = ours.predict(np.array([[0, 0], [10**6, -(10**6)]]), np.array([1, 0]))
    assert masks.shape == (3, *size) and np.isfinite(iou).all() and np.isfinite(low_res).all()
    logits = ours.predict(box=np.array([0, 0, size[1], size[0]]), return_logits=True)[0]
    np.testing.assert_array_equal(logits > 0, ours.predict(box=np.array([0, 0, size[1], size[0]]))[0])


def test_no_image_raises_the_official_message(tiny_models):
    predictor = SamPredictor(tiny_models[1])
    for call in (predictor.predict, predictor.get_image_embedding, lambda: predictor.predict_torch(None, None)):
        with pytest.raises(
            RuntimeError, match=r"^An image must be set with \.set_image\(\.\.\.\) before mask prediction\.$"
        ):
            call()


def test_reset_image_forgets_everything(predictors, photo):
    _, ours = predictors
    ours.set_image(photo)
    ours.reset_image()
    assert (ours.is_image_set, ours.features, ours.original_size, ours.input_size) == (False, None, None, None)


def test_attributes_restored_by_hand_are_used(predictors, photo):
    """Scripts cache embeddings of the official predictor by saving and assigning its attributes."""
    _, ours = predictors
    size = SIZES["landscape"]
    ours.set_image(photo_of(photo, size))
    box = np.array([20, 30, 120, 140])
    expected = ours.predict(box=box)
    saved = (ours.features, ours.original_size, ours.input_size)
    ours.set_image(photo_of(photo, SIZES["portrait"]))
    ours.features, ours.original_size, ours.input_size = saved
    ours.is_image_set = True
    for a, b in zip(ours.predict(box=box), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sizes_restored_as_lists_are_recognised(predictors, photo):
    """JSON has no tuples; what is derived from the features is kept between calls all the same."""
    _, ours = predictors
    ours.set_image(photo_of(photo, SIZES["landscape"]))
    ours.original_size, ours.input_size = list(ours.original_size), list(ours.input_size)
    before = ours._embedding
    ours.predict(box=np.array([20, 30, 120, 140]))
    assert ours._embedding is before


@pytest.mark.parametrize("change", [lambda f: f[0], lambda f: f.repeat(2, 1, 1, 1), lambda f: f[..., :8]])
def test_restored_features_of_a_wrong_shape(predictors, photo, change):
    _, ours = predictors
    ours.set_image(photo)
    ours.features = change(ours.features)
    with pytest.raises(ValueError, match=r"must be \[1, 256, 16, 16\]"):
        ours.predict(box=np.array([20, 30, 120, 140]))


def test_predict_torch_says_what_is_wrong(predictors, photo):
    _, ours = predictors
    ours.set_image(photo)
    with pytest.raises(ValueError, match="point_labels must be supplied"):
        ours.predict_torch(torch.ones(1, 1, 2), None)
    with pytest.raises(TypeError, match="boxes must be a tensor, got ndarray"):
        ours.predict_torch(None, None, boxes=np.ones((1, 4)))


def test_empty_prompts_like_official(predictors, photo):
    theirs, ours = predictors
    image = photo_of(photo, SIZES["landscape"])
    theirs.set_image(image)
    ours.set_image(image)
    none = {"point_coords": np.zeros((0, 2)), "point_labels": np.zeros(0)}
    for kwargs in (none, {**none, "box": np.array([20, 30, 120, 140])}):
        assert_same(ours.predict(**kwargs), theirs.predict(**kwargs))
    assert [a.shape for a in ours.predict(box=np.zeros((0, 4)))] == [(0, 3, 180, 300), (0, 3), (0, 3, 64, 64)]


@pytest.mark.parametrize("given", ["RGB", "BGR"])
def test_model_that_wants_bgr_like_official(tiny_models, photo, given):
    theirs, ours = copy.deepcopy(tiny_models)
    theirs.image_format = ours.image_format = "BGR"
    expected, predictor = official.SamPredictor(theirs), SamPredictor(ours)
    expected.set_image(photo, given)
    predictor.set_image(photo, given)
    torch.testing.assert_close(predictor.features, expected.features, rtol=0, atol=1e-4)


def test_copies_and_pickles_go_on_with_the_image(tiny_models, photo):
    predictor = SamPredictor(tiny_models[1])
    predictor.set_image(photo)
    expected = predictor.predict(box=np.array([20, 30, 120, 140]))
    for other in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        for a, b in zip(other.predict(box=np.array([20, 30, 120, 140])), expected, strict=True):
            np.testing.assert_array_equal(a, b)


class OtherEncoder(torch.nn.Module):
    """What variants such as MobileSAM put in the place of the image encoder: any module that knows its `img_size`."""

    img_size = 256

    def __init__(self, *, weights: bool) -> None:
        super().__init__()
        self.proj = torch.nn.Conv2d(3, 256, 16, 16) if weights else torch.nn.PixelUnshuffle(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)[:, :256]


@pytest.mark.parametrize("weights", [True, False], ids=["with weights", "without weights"])
def test_another_image_encoder(tiny_models, photo, tmp_path, weights):
    models = copy.deepcopy(tiny_models)
    encoder = OtherEncoder(weights=weights)
    for model in models:
        model.image_encoder = encoder
    theirs, ours = official.SamPredictor(models[0]), SamPredictor(models[1])
    theirs.set_image(photo)
    embedding = ours.set_image(photo)
    box = np.array([20, 30, 120, 140])
    assert_same(ours.predict(box=box), theirs.predict(box=box))
    assert_same(ours.predict(box=box, embedding=embedding), theirs.predict(box=box))
    torch.save(models[1].state_dict(), tmp_path / "other.pth")
    with torch.no_grad():
        models[1].mask_decoder.iou_token.weight.zero_()
    load_checkpoint(models[1], tmp_path / "other.pth")
    assert_same(ours.predict(box=box), theirs.predict(box=box))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"point_coords": np.ones((1, 2))}, "point_labels must be supplied"),
        ({"point_coords": np.ones((2, 3)), "point_labels": np.ones(2)}, r"\[K, 2\]"),
        ({"point_coords": np.ones((2, 2)), "point_labels": np.ones(3)}, "one label per point"),
        ({"point_coords": np.ones(2), "point_labels": np.ones(1)}, r"\[K, 2\]"),
        ({"point_coords": np.full((1, 2), np.nan), "point_labels": np.ones(1)}, "finite"),
        ({"box": np.ones(5)}, r"box must be \[4\]"),
        ({"box": np.array([0, 0, np.inf, 1])}, "finite"),
        ({"box": np.array(["a", "b", "c", "d"])}, "numbers"),
        ({"mask_input": np.ones((1, 256, 256))}, "h = w = 64"),
        ({"box": np.ones((3, 4)), "point_coords": np.ones((2, 2)), "point_labels": np.ones(2)}, "same N"),
    ],
)
def test_bad_prompts_say_what_is_wrong(predictors, photo, kwargs, message):
    _, ours = predictors
    ours.set_image(photo)
    with pytest.raises(ValueError, match=message):
        ours.predict(**kwargs)


def test_labels_without_points_are_no_prompt(predictors, photo):
    theirs, ours = predictors
    theirs.set_image(photo)
    ours.set_image(photo)
    assert_same(ours.predict(point_labels=np.ones(2)), theirs.predict(point_labels=np.ones(2)))


@pytest.mark.parametrize("arguments", [{"precision": "fp64"}, {"backend": "cpp"}])
def test_unknown_precision_and_backend(tiny_models, arguments):
    with pytest.raises(ValueError, match="must be auto"):
        SamPredictor(tiny_models[1], **arguments)


def test_fp16_needs_a_gpu(tiny_models):
    with pytest.raises(RuntimeError, match="CUDA"):
        SamPredictor(tiny_models[1], precision="fp16")


def test_backends_agree(tiny_models, photo):
    image = photo_of(photo, SIZES["landscape"])
    results = []
    for backend in ("native", "torch"):
        predictor = SamPredictor(tiny_models[1], backend=backend)
        predictor.set_image(image)
        results.append(predictor.predict(box=np.array([20, 30, 120, 140])))
    (masks, *scores), (their_masks, *their_scores) = results
    for native, reference in zip(scores, their_scores, strict=True):
        assert relative_error(torch.from_numpy(native), torch.from_numpy(reference)) <= 1e-5
    # Bit for bit where torch interpolates with AVX2 or AVX-512; elsewhere a logit within 1e-4 of 0 may fall either way.
    assert np.count_nonzero(masks != their_masks) <= 1e-4 * masks.size


def test_bf16_is_close(tiny_models, photo):
    fp32, bf16 = SamPredictor(tiny_models[1]), SamPredictor(tiny_models[1], precision="bf16")
    fp32.set_image(photo)
    bf16.set_image(photo)
    assert bf16.features.dtype == torch.float32
    error = (fp32.features - bf16.features).norm() / fp32.features.norm()
    assert 0 < error < 0.05  # eight bits of mantissa through four blocks


def test_batch_equals_one_by_one(predictors, photo):
    _, ours = predictors
    images = [photo_of(photo, SIZES[name]) for name in ("landscape", "portrait", "landscape", "tiny")]
    boxes = [np.array([2, 3, 8, 8]), None, np.array([[20, 30, 120, 140], [0, 0, 90, 90]]), None]
    ragged = [np.array([[40.0, 50.0]]), np.array([[100.0, 90.0], [20.0, 200.0]]), np.array([[10.0, 10.0]])]
    ragged_labels = [np.array([1]), np.array([1, 0]), np.array([0])]
    points = [None, ragged, None, np.array([[3, 4]])]
    labels = [None, ragged_labels, None, np.array([1])]
    ours.set_image_batch(images)
    masks, iou, low_res = ours.predict_batch(points, labels, boxes)
    assert [m.shape for m in masks] == [(3, 180, 300), (3, 3, 300, 180), (2, 3, 180, 300), (3, 9, 14)]

    ours.set_image(images[0])
    np.testing.assert_allclose(ours.predict(box=boxes[0])[2], low_res[0], rtol=0, atol=1e-3)
    ours.set_image(images[1])
    for i in range(3):
        single = ours.predict(ragged[i], ragged_labels[i])
        np.testing.assert_allclose(single[2], low_res[1][i], rtol=0, atol=1e-3)
        np.testing.assert_allclose(single[1], iou[1][i], rtol=0, atol=1e-4)

    ours.set_image_batch(images)
    with pytest.raises(ValueError, match="one entry per image"):
        ours.predict_batch(box_batch=boxes[:2])
    ours.reset_image()
    with pytest.raises(RuntimeError, match="set_image_batch"):
        ours.predict_batch()


def test_one_model_serves_many_threads(predictors, photo):
    _, ours = predictors
    names = ["landscape", "portrait", "square", "tiny"]
    images = [photo_of(photo, SIZES[name]) for name in names]
    embeddings = ours.encode_images(images)
    expected = [ours.predict(np.array([[5, 5]]), np.array([1]), embedding=e) for e in embeddings]

    def work(thread: int) -> list:
        own = ours.encode_images([images[thread % 4]])[0]
        return [ours.predict(np.array([[5, 5]]), np.array([1]), embedding=e) for e in (own, *embeddings[thread % 4 :])]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    for i in range(8):
        for got, want in zip(results[i], (expected[i % 4], *expected[i % 4 :]), strict=True):
            np.testing.assert_allclose(got[2], want[2], rtol=0, atol=1e-3)
            assert (got[0] == want[0]).mean() > 0.9999


def test_warmup_sets_nothing_and_changes_nothing(tiny, photo):
    predictor = SamPredictor(tiny)
    predictor.warmup(batch_sizes=(1, 2))
    assert not predictor.is_image_set and predictor.features is None
    before = predictor.set_image(photo).features
    predictor.warmup()
    assert predictor.features is before
    assert torch.equal(before, SamPredictor(tiny).set_image(photo).features)
