"""SamAutomaticMaskGenerator against the official one with the same weights."""

from __future__ import annotations

import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from oracle import TINY, build_official, official, seed_weights
from pycocotools import mask as coco
from records import assert_same_mask, assert_same_records

from sam_fast import SamAutomaticMaskGenerator, automatic_mask_generator, build_sam_from_config, sam_model_registry
from sam_fast.runtime.streams import Download
from sam_fast.utils.amg import MaskData, rle_to_mask

# Thresholds that keep a good dozen of the seeded weights' masks and drop the others.
BASE = {"points_per_side": 8, "stability_score_thresh": 0.8}
SETTINGS = {
    # Of these points' masks none is within five pixels of the threshold, where rounding would decide.
    "default thresholds": {"points_per_side": 14, "stability_score_thresh": 0.95},
    "loose": {"pred_iou_thresh": 0.85, "stability_score_thresh": 0.6, "box_nms_thresh": 0.9},
    "filters off": {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "points_per_side": 4},
    "offset": {"stability_score_offset": 3.0, "stability_score_thresh": 0.5},
    "crops": {"crop_n_layers": 1, "points_per_side": 6, "crop_n_points_downscale_factor": 2},
    "two crop layers": {"crop_n_layers": 2, "points_per_side": 2, "crop_nms_thresh": 0.5, "crop_overlap_ratio": 0.2},
    "small regions": {"min_mask_region_area": 60},
    "small regions in crops": {"min_mask_region_area": 40, "crop_n_layers": 1, "points_per_side": 5},
    "batches of 7": {"points_per_batch": 7},
}


@pytest.fixture(scope="module")
def tiny_models():
    """Weights of another seed than the other tests', one that gives many masks."""
    theirs = seed_weights(build_official(TINY), seed=2)
    ours = build_sam_from_config(TINY)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture(scope="module")
def image(photo) -> np.ndarray:
    return np.ascontiguousarray(photo[40:300, 60:460])


def generators(tiny_models, **settings):
    theirs, ours = tiny_models
    settings = {**BASE, **settings}
    return official.SamAutomaticMaskGenerator(theirs, **settings), SamAutomaticMaskGenerator(ours, **settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_like_official(tiny_models, image, settings):
    theirs, ours = generators(tiny_models, **settings)
    assert_same_records(ours.generate(image), theirs.generate(image))


def test_small_regions_were_there_to_remove(tiny_models, image):
    """The comparison above would prove nothing if no mask had small regions."""
    with_regions = generators(tiny_models)[1].generate(image)
    without = generators(tiny_models, min_mask_region_area=60)[1].generate(image)
    assert sum(r["area"] for r in with_regions) != sum(r["area"] for r in without)


@pytest.mark.parametrize("mode", ["uncompressed_rle", "coco_rle"])
def test_output_modes_like_official(tiny_models, image, mode):
    theirs, ours = generators(tiny_models, output_mode="uncompressed_rle")
    ours.output_mode = mode
    records, expected = ours.generate(image), theirs.generate(image)
    assert len(records) == len(expected) > 3
    for record, other in zip(records, expected, strict=True):
        rle = record["segmentation"]
        assert rle["size"] == other["segmentation"]["size"]
        mask = rle_to_mask(rle) if mode == "uncompressed_rle" else coco.decode(rle).astype(bool)
        expected_mask = rle_to_mask(other["segmentation"])
        if np.array_equal(mask, expected_mask) and mode == "uncompressed_rle":
            assert rle["counts"] == other["segmentation"]["counts"]
        assert_same_mask(mask, expected_mask)
    assert any(r["area"] == e["area"] for r, e in zip(records, expected, strict=True)), (
        "no mask was identical, so no RLE was compared"
    )


def test_point_grids(tiny_models, image):
    grid = np.random.default_rng(0).random((30, 2))
    theirs, ours = generators(tiny_models, points_per_side=None, point_grids=[grid])
    records, expected = ours.generate(image), theirs.generate(image)
    assert_same_records(records, expected)


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (500, 20)], ids=str)
def test_odd_images_like_official(tiny_models, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs, ours = generators(tiny_models, pred_iou_thresh=0.1, stability_score_thresh=0.0)
    assert_same_records(ours.generate(image), theirs.generate(image))


@pytest.mark.parametrize("settings", [{}, {"crop_n_layers": 1}, {"min_mask_region_area": 10}], ids=str)
def test_nothing_survives(tiny_models, image, settings):
    """With crops the official code raises IndexError here."""
    assert generators(tiny_models, pred_iou_thresh=1e6, **settings)[1].generate(image) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_crops_and_small_regions_on_cuda(tiny_models, image):
    """Boxes lie on the device then, as must all that meets them."""
    settings = {**BASE, **SETTINGS["small regions in crops"]}
    on_cpu = SamAutomaticMaskGenerator(tiny_models[1], **settings).generate(image)
    model = copy.deepcopy(tiny_models[1]).cuda()
    on_cuda = SamAutomaticMaskGenerator(model, **settings, precision="fp32").generate(image)
    # Products are summed in another order: a mask near a threshold may come or go.
    assert len(on_cpu) > 3 and abs(len(on_cuda) - len(on_cpu)) <= 1


def test_points_that_are_judged_together(tiny_models, image, monkeypatch):
    """As on a GPU: more points at a time than points_per_batch says, and more masks at full size."""
    module = automatic_mask_generator
    generator = generators(tiny_models, points_per_batch=7)[1]
    expected = generator.generate(image)
    monkeypatch.setattr(module, "_FEWEST_POINTS", {"cpu": 1024})
    monkeypatch.setattr(module, "_FULL_SIZE_BATCH", {"cpu": 256})
    calls = []
    decode = generator.predictor.runtime.decode_filtered
    monkeypatch.setattr(
        generator.predictor.runtime, "decode_filtered", lambda *arguments: calls.append(1) or decode(*arguments)
    )
    assert_same_records(generator.generate(image), expected)
    assert len(calls) == 1


def test_generate_batch(tiny_models, image):
    generator = generators(tiny_models)[1]
    other = image[::-1]
    batch = generator.generate_batch([image, other])
    for records, single in zip(batch, (image, other), strict=True):
        assert_same_records(records, generator.generate(single))


def test_what_was_begun_is_finished_in_any_order_and_thread(tiny_models, image, monkeypatch):
    """Also where records come in copies, as from a GPU."""
    generator = generators(tiny_models)[1]
    images = [image, image[::-1], image[:, ::-1]]
    expected = [generator.generate(one) for one in images]
    start = Download.__init__

    def copying(self, device):
        start(self, device)
        self._copies = True

    for copies in (False, True):
        if copies:
            monkeypatch.setattr(Download, "__init__", copying)
        begun = [generator.begin(one) for one in images]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda finish: finish(), reversed(begun)))[::-1]
        for records, single, finish in zip(found, expected, begun, strict=True):
            assert_same_records(records, single)
            assert finish() is records


def test_a_batch_makes_records_while_the_next_image_is_begun(tiny_models, image, monkeypatch):
    generator = generators(tiny_models)[1]
    begun = [threading.Event() for _ in range(4)]
    order = iter(range(4))

    def begin(_):
        number = next(order)
        begun[number].set()

        def finish():
            assert number == 3 or begun[number + 1].wait(60), "the next image waits for records"
            return [{"image": number}]

        return finish

    monkeypatch.setattr(generator, "begin", begin)
    assert generator.generate_batch([image] * 4) == [[{"image": number}] for number in range(4)]
    assert generator.generate_batch([]) == []


@pytest.mark.parametrize("where", ["subclass", "instance", "class"])
def test_a_batch_asks_somebodys_own_way(where, tiny_models, image, monkeypatch):
    generator = generators(tiny_models)[1]

    def generate(self, image):
        return [image.shape]

    if where == "subclass":
        generator.__class__ = type("Own", (SamAutomaticMaskGenerator,), {"generate": generate})
    elif where == "instance":
        generator.generate = functools.partial(generate, generator)
    else:
        monkeypatch.setattr(SamAutomaticMaskGenerator, "generate", generate)
    assert generator.generate_batch([image, image[:4]]) == [[image.shape], [(4, *image.shape[1:])]]


def test_a_batch_with_something_else_in_it_raises(tiny_models, image):
    with pytest.raises(FileNotFoundError):
        generators(tiny_models)[1].generate_batch([image, "no such file.jpg", image])


def test_keeps_its_arguments_as_attributes(tiny_models):
    settings = {
        "points_per_batch": 3,
        "pred_iou_thresh": 0.1,
        "stability_score_thresh": 0.2,
        "stability_score_offset": 0.3,
        "box_nms_thresh": 0.4,
        "crop_n_layers": 1,
        "crop_nms_thresh": 0.5,
        "crop_overlap_ratio": 0.6,
        "crop_n_points_downscale_factor": 2,
        "min_mask_region_area": 7,
        "output_mode": "coco_rle",
    }
    theirs, ours = generators(tiny_models, **settings)
    for name, value in settings.items():
        assert getattr(ours, name) == getattr(theirs, name) == value
    for mine, other in zip(ours.point_grids, theirs.point_grids, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_postprocess_small_regions_like_official():
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.random((12, 40, 60)) > 0.5)
    masks[:4, 5:30, 10:40] = True
    amg = official.utils.amg

    def data(cls):
        return cls(
            rles=amg.mask_to_rle_pytorch(masks),
            boxes=amg.batched_mask_to_box(masks),
            iou_preds=torch.rand(12, generator=torch.Generator().manual_seed(0)),
        )

    expected = official.SamAutomaticMaskGenerator.postprocess_small_regions(data(amg.MaskData), 30, 0.7)
    result = SamAutomaticMaskGenerator.postprocess_small_regions(data(MaskData), 30, 0.7)
    assert result["rles"] == expected["rles"]
    assert torch.equal(result["boxes"], expected["boxes"]) and torch.equal(result["iou_preds"], expected["iou_preds"])


def test_out_of_memory_halves_the_batch(tiny_models, image, monkeypatch):
    generator = generators(tiny_models)[1]
    expected = generator.generate(image)
    runtime = generator.predictor.runtime
    decode = runtime.decode_filtered

    def decode_up_to_20(embedding, prompts, *args):
        if len(prompts.points) > 20:
            raise torch.OutOfMemoryError("no room")
        return decode(embedding, prompts, *args)

    monkeypatch.setattr(runtime, "decode_filtered", decode_up_to_20)
    with pytest.warns(UserWarning, match="out of memory with points_per_batch") as warned:
        assert_same_records(generator.generate(image), expected)
    assert len(warned) == 1  # for 64 -> 32 -> 16
    assert generator.points_per_batch == 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_that_is_short_halves_the_batch(photo):
    """Room for half of what a run took besides its model."""
    gpu, found = torch.device("cuda", torch.cuda.current_device()), []
    for limited in (False, True):
        model = sam_model_registry["nano"]().to(gpu)
        generator = SamAutomaticMaskGenerator(model, pred_iou_thresh=0.5, stability_score_thresh=0.5)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(gpu)
        held = torch.cuda.memory_reserved(gpu)
        if not limited:
            found.append(generator.generate(photo))
            taken = torch.cuda.max_memory_reserved(gpu) - held
            continue
        torch.cuda.set_per_process_memory_fraction((held + taken / 2) / torch.cuda.mem_get_info(gpu)[1], gpu)
        try:
            with pytest.warns(UserWarning, match="out of memory with points_per_batch=1024"):
                found.append(generator.generate(photo))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, gpu)
    whole, parts = found
    assert len(whole) > 20 and abs(len(parts) - len(whole)) <= 0.02 * len(whole)
    masks = [np.stack([r["segmentation"].ravel() for r in records]).astype(np.float32) for records in found]
    shared, areas = masks[0] @ masks[1].T, [mask.sum(1) for mask in masks]
    assert (shared / (areas[0][:, None] + areas[1] - shared)).max(1).mean() > 0.98


def test_bits_of_few_masks_exist_at_a_time(tiny_models, image, monkeypatch):
    generator = generators(tiny_models, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0)[1]
    postprocess = generator.predictor.runtime.postprocess
    at_full_size = []

    def watched(embedding, low_res, **settings):
        if settings.get("return_bits", True):
            at_full_size.append(len(low_res))
        return postprocess(embedding, low_res, **settings)

    monkeypatch.setattr(generator.predictor.runtime, "postprocess", watched)
    records = generator.generate(image)
    assert len(records) == sum(at_full_size) > 100
    assert max(at_full_size) <= 32


def test_backends_agree(tiny_models, image):
    theirs = generators(tiny_models, min_mask_region_area=30)[1]
    ours = SamAutomaticMaskGenerator(tiny_models[1], **BASE, min_mask_region_area=30, backend="torch")
    assert_same_records(ours.generate(image), theirs.generate(image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points_per_side": None}, "Exactly one of"),
        ({"point_grids": [np.zeros((1, 2))]}, "Exactly one of"),
        ({"output_mode": "png"}, "output_mode must be one of"),
        ({"points_per_batch": 0}, "points_per_batch must be positive"),
        ({"crop_overlap_ratio": 1.5}, "crop_overlap_ratio must be from 0 to 1, got 1.5"),
        ({"crop_overlap_ratio": -0.1}, "crop_overlap_ratio must be"),
        ({"crop_overlap_ratio": np.nan}, "crop_overlap_ratio must be"),
        ({"pred_iou_thresh": np.nan}, "pred_iou_thresh must be a number, got nan"),
        ({"crop_nms_thresh": float("nan")}, "crop_nms_thresh must be a number, got nan"),
        ({"points_per_side": None, "point_grids": [np.zeros((1, 2))], "crop_n_layers": 1}, "needs 2 point_grids"),
    ],
)
def test_bad_arguments(tiny_models, arguments, message):
    with pytest.raises(ValueError, match=message):
        SamAutomaticMaskGenerator(tiny_models[1], **arguments)
