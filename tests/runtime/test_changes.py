"""A model that changes, or is somebody's own: predictions are those of its modules as they are when it is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from oracle import relative_error
from torch import Tensor

from sam_fast import SamAutomaticMaskGenerator, SamPredictor
from sam_fast.modeling import MaskDecoder, PromptEncoder, Sam

POINT = dict(point_coords=np.array([[250.0, 200.0]]), point_labels=np.array([1]), return_logits=True)
SAME = 1e-5


@pytest.fixture
def model(tiny: Sam) -> Sam:
    return copy.deepcopy(tiny)


def logits_of(predictor: SamPredictor, **options: Any) -> Tensor:
    return torch.from_numpy(predictor.predict(**POINT, **options)[2])


def anew(model: Sam, image: np.ndarray) -> Tensor:
    """Low-resolution logits of a copy of a model that has never predicted."""
    predictor = SamPredictor(copy.deepcopy(model))
    predictor.set_image(image)
    return logits_of(predictor)


@pytest.mark.parametrize("way", [{"fused": True}, {"foreach": True}, {}], ids=["fused", "foreach", "plain"])
@pytest.mark.parametrize("part", ["mask_decoder", "image_encoder"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_weights_that_an_optimiser_writes_are_noticed(model, photo, part, way, precision):
    predictor = SamPredictor(model, precision=precision)
    embedding = predictor.set_image(photo)
    before = logits_of(predictor)
    weights = list(model.get_submodule(part).parameters())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(weights, lr=0.02, **way).step()
    if part == "image_encoder":
        with pytest.raises(ValueError, match="another model"):
            logits_of(predictor, embedding=embedding)
    fresh = SamPredictor(copy.deepcopy(model), precision=precision)
    expected = [predictor_.set_image(photo) and logits_of(predictor_) for predictor_ in (predictor, fresh)]
    assert relative_error(*expected) <= SAME < 0.1 < relative_error(expected[0], before)
    if part == "mask_decoder":
        assert relative_error(logits_of(predictor, embedding=embedding), expected[1]) <= SAME


def test_autocast_leaves_nothing_behind(model, photo):
    predictor = SamPredictor(model)
    predictor.set_image(photo)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits_of(predictor)
    expected = anew(model, photo)
    assert relative_error(logits_of(predictor), expected) <= SAME
    assert SAME < relative_error(rounded.float(), expected) < 0.1


def test_features_that_change_are_read_anew(model, photo):
    predictor = SamPredictor(model)
    embedding = predictor.set_image(photo)
    whole, original = logits_of(predictor), embedding.features.clone()
    embedding.features.mul_(0.5)
    halved = logits_of(predictor)
    assert relative_error(halved, whole) > 0.01
    embedding.features = original
    assert torch.equal(logits_of(predictor, embedding=embedding), whole)
    embedding.features = original * 0.5
    assert torch.equal(logits_of(predictor, embedding=embedding), halved)


class Shifted(PromptEncoder):
    def forward(self, points: Any, boxes: Any, masks: Any) -> tuple[Tensor, Tensor]:
        sparse, dense = super().forward(points, boxes, masks)
        return sparse, dense + 3


def subclassed(model: Sam) -> None:
    model.prompt_encoder.__class__ = Shifted


def hooked(model: Sam) -> None:
    model.prompt_encoder.register_forward_hook(lambda module, given, result: (result[0], result[1] + 3))


@pytest.mark.parametrize("change", [subclassed, hooked])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_a_prompt_encoder_of_ones_own_says_of_the_image_counts(model, photo, change: Callable, backend):
    """As if its features were shifted."""
    predictor = SamPredictor(model, backend=backend)
    embedding = predictor.set_image(photo)
    plain = logits_of(predictor)
    change(model)
    shifted = logits_of(predictor)
    points = np.array([[[250.0, 200.0]]] * 9), np.ones((9, 1))
    many = torch.from_numpy(predictor.predict(*points, return_logits=True)[2])
    unchanged = SamPredictor(copy.deepcopy(model))
    unchanged.model.prompt_encoder.__class__ = PromptEncoder
    unchanged.model.prompt_encoder._forward_hooks.clear()
    moved = unchanged.set_image(photo)
    moved.features = embedding.features + 3
    expected = logits_of(unchanged, embedding=moved)
    assert relative_error(shifted, expected) <= SAME < 0.01 < relative_error(shifted, plain)
    assert all(relative_error(one, expected) <= SAME for one in many)


class Sevens(MaskDecoder):
    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        masks, iou = super().forward(*arguments, **options)
        return torch.full_like(masks, 7), torch.full_like(iou, 0.5)


class SevensInside(MaskDecoder):
    def predict_masks(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        masks, iou = super().predict_masks(*arguments, **options)
        return torch.full_like(masks, 7), torch.full_like(iou, 0.5)


@pytest.mark.parametrize("kind", [Sevens, SevensInside])
@pytest.mark.parametrize("several", [True, False])
def test_a_decoder_of_ones_own_decides(model, photo, kind, several):
    model.mask_decoder.__class__ = kind
    predictor = SamPredictor(model)
    predictor.set_image(photo)
    masks, iou, logits = predictor.predict(**POINT, multimask_output=several)
    assert len(masks) == (3 if several else 1) and (logits == 7).all() and (iou == 0.5).all() and (masks == 7).all()
    image = torch.zeros(3, 48, 64)
    record = {"image": image, "original_size": (48, 64), "point_coords": torch.ones(2, 1, 2)}
    result = model([{**record, "point_labels": torch.ones(2, 1)}], several)[0]
    assert (result["low_res_logits"] == 7).all() and result["masks"].all()
    settings = dict(points_per_side=2, stability_score_thresh=0.0, box_nms_thresh=1.0)
    assert not SamAutomaticMaskGenerator(model, pred_iou_thresh=0.6, **settings).generate(photo)
    records = SamAutomaticMaskGenerator(model, pred_iou_thresh=0.4, **settings).generate(photo)
    assert records and all(record["segmentation"].all() for record in records)


class Empty(Sam):
    def postprocess_masks(self, masks: Tensor, input_size: Any, original_size: Any) -> Tensor:
        return torch.full((*masks.shape[:2], *original_size), -2.0)


@pytest.mark.parametrize("of", ["the object", "its class"])
def test_postprocessing_of_ones_own_counts(model, photo, of):
    if of == "its class":
        model.__class__ = Empty
    else:
        model.postprocess_masks = lambda *given: Empty.postprocess_masks(model, *given)
    predictor = SamPredictor(model)
    predictor.set_image(photo)
    masks, _, logits = predictor.predict(POINT["point_coords"], POINT["point_labels"])
    assert masks.shape == (3, 512, 512) and masks.dtype == bool and not masks.any() and logits.any()
    assert (predictor.predict(**POINT)[0] == -2).all()
    record = {"image": torch.zeros(3, 48, 64), "original_size": (48, 64)}
    assert not model([record], True)[0]["masks"].any()


def test_sizes_in_tensors(model):
    """As a loader collates them."""
    image = 255 * torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))
    sizes = (48, 64), (torch.tensor(48), torch.tensor(64)), torch.tensor([48, 64])
    first, *others = (model([{"image": image, "original_size": size}], True)[0]["masks"] for size in sizes)
    assert first.shape == (1, 3, 48, 64) and all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("context", ["float64", "another device"])
def test_defaults_of_pytorch_do_not_matter(model, photo, context):
    settings = dict(points_per_side=3, pred_iou_thresh=0.0, stability_score_thresh=0.0, min_mask_region_area=20)

    def run() -> tuple[np.ndarray, list[dict[str, Any]]]:
        predictor = SamPredictor(model)
        predictor.set_image(photo)
        records = SamAutomaticMaskGenerator(model, **settings, output_mode="coco_rle").generate(photo)
        return predictor.predict(**POINT)[0], records

    mask, records = run()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if context == "float64" else before)
    try:
        with torch.device("meta") if context == "another device" else nullcontext():
            other_mask, other_records = run()
    finally:
        torch.set_default_dtype(before)
    np.testing.assert_allclose(other_mask, mask, rtol=0, atol=1e-5 * abs(mask).max())
    assert [r["segmentation"] for r in other_records] == [r["segmentation"] for r in records] and records


def test_prompts_in_any_form(tiny, photo):
    """Arrays that run backwards, in foreign byte order and read-only, and tensors of any format."""
    predictor = SamPredictor(tiny)
    predictor.set_image(photo)
    mask = np.linspace(-8, 8, 64 * 64, dtype=np.float32).reshape(1, 64, 64).astype(np.float16).astype(np.float32)
    plain = dict(point_coords=np.array([[250.0, 200.0], [90.0, 80.0]]), point_labels=np.array([1, 0]), mask_input=mask)
    expected = predictor.predict(**plain, return_logits=True)[2]
    backwards = {name: np.flip(np.flip(value).copy()) for name, value in plain.items()}
    foreign = {name: value.astype(value.dtype.newbyteorder()) for name, value in plain.items()}
    read_only = {name: value.copy() for name, value in plain.items()}
    for value in read_only.values():
        value.setflags(write=False)
    tensors = {name: torch.from_numpy(value) for name, value in plain.items()}
    for given in (backwards, foreign, read_only, tensors):
        assert np.array_equal(predictor.predict(**given, return_logits=True)[2], expected)
    halves = {**tensors, "mask_input": torch.from_numpy(mask).bfloat16()}
    narrow = predictor.predict(**halves, return_logits=True)[2]
    rounded = {**plain, "mask_input": torch.from_numpy(mask).bfloat16().float().numpy()}
    assert np.array_equal(narrow, predictor.predict(**rounded, return_logits=True)[2])
    ragged = dict(point_coords=[tensors["point_coords"]], point_labels=[tensors["point_labels"]])
    many = predictor.predict_batch(
        [ragged["point_coords"]],
        [ragged["point_labels"]],
        mask_input_batch=[mask[None]],
        return_logits=True,
        embeddings=[predictor.encode_images([photo])[0]],
    )
    assert relative_error(torch.from_numpy(many[2][0][0]), torch.from_numpy(expected)) <= SAME
