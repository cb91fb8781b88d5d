"""The whole model against the official one."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from oracle import relative_error

from sam_fast.modeling import Sam

TOLERANCE = 1e-5  # float32, sums in another order (contract: 1e-4)


def _batch(image: torch.Tensor) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(4, 2, 2, generator=generator) * 200
    return [
        {"image": image, "original_size": (300, 400), "point_coords": points, "point_labels": torch.ones(4, 2)},
        {"image": image[:, :, :130], "original_size": (768, 521), "boxes": torch.rand(3, 4, generator=generator) * 200},
        {"image": image.flip(2), "original_size": (96, 128)},
        {
            "image": image,
            "original_size": (192, 256),
            "point_coords": points[:2],
            "point_labels": torch.tensor([[1, 0], [1, -1]]),
            "boxes": torch.rand(2, 4, generator=generator) * 200,
            "mask_inputs": torch.randn(2, 1, 64, 64, generator=generator) * 8,
        },
    ]


@pytest.mark.parametrize("multimask_output", [True, False], ids=["multimask", "single"])
def test_forward_equals_official(multimask_output, official_tiny, tiny, tiny_image):
    batch = _batch(tiny_image)
    expected = official_tiny(batch, multimask_output)
    actual = tiny(batch, multimask_output)
    for record, ours, theirs in zip(batch, actual, expected, strict=True):
        assert list(ours) == list(theirs)
        assert ours["masks"].dtype == torch.bool
        assert ours["masks"].shape == theirs["masks"].shape
        assert ours["masks"].shape[-2:] == record["original_size"]
        assert relative_error(ours["low_res_logits"], theirs["low_res_logits"]) <= TOLERANCE
        assert relative_error(ours["iou_predictions"], theirs["iou_predictions"]) <= TOLERANCE
        # Logits reach hundreds here: a relative 1e-5 moves the border of a mask by a pixel at most now and then.
        assert (ours["masks"] != theirs["masks"]).float().mean() <= 1e-4
    assert any(0.01 < record["masks"].float().mean() < 0.99 for record in expected)


def test_forward_is_run_by_the_runtime(tiny, tiny_image, monkeypatch):
    """The stages are not called; and the modules' own way gives the same."""
    plain = Sam(tiny.image_encoder, tiny.prompt_encoder, tiny.mask_decoder)
    batch = _batch(tiny_image)
    expected = plain(batch, True)
    monkeypatch.setattr(type(tiny.image_encoder), "forward", None)
    for ours, theirs in zip(tiny(batch, True), expected, strict=True):
        assert relative_error(ours["low_res_logits"], theirs["low_res_logits"]) <= TOLERANCE
        assert (ours["masks"] != theirs["masks"]).float().mean() <= 1e-4
    with pytest.raises(TypeError):
        plain(batch, True)


def test_forward_calls_what_somebody_put_in(tiny, tiny_image):
    batch = _batch(tiny_image)[:1]
    expected = tiny(batch, True)[0]
    seen = []
    hooked = copy.deepcopy(tiny)
    hooked.mask_decoder.transformer.register_forward_hook(lambda *arguments: seen.append(1))
    assert relative_error(hooked(batch, True)[0]["low_res_logits"], expected["low_res_logits"]) <= TOLERANCE
    assert seen  # once for each few prompts

    class Upside(Sam):
        def postprocess_masks(self, *arguments):
            return -super().postprocess_masks(*arguments)

    upside = copy.deepcopy(tiny)
    upside.__class__ = Upside
    assert (upside(batch, True)[0]["masks"] == expected["masks"]).float().mean() < 0.1


def test_forward_keeps_no_model_alive(tiny, tiny_image):
    model = copy.deepcopy(tiny)
    model(_batch(tiny_image)[:1], True)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_forward_takes_extra_tokens(tiny, tiny_image):
    record = _batch(tiny_image)[0]
    plain = tiny([record], True)[0]
    extra = torch.randn(4, 1, 256, generator=torch.Generator().manual_seed(1))
    prompted = tiny([record | {"extra_tokens": extra}], True)[0]
    assert prompted["masks"].shape == plain["masks"].shape
    assert not torch.allclose(prompted["low_res_logits"], plain["low_res_logits"])


def test_forward_does_not_record_gradients(tiny, tiny_image):
    assert not tiny(_batch(tiny_image)[:1], True)[0]["low_res_logits"].requires_grad


def test_stages_carry_gradients_to_the_image(tiny, tiny_image):
    """What training does: call the stages, not `forward`."""
    image = tiny.preprocess(tiny_image)[None].requires_grad_()
    sparse, dense = tiny.prompt_encoder((torch.tensor([[[80.0, 90.0]]]), torch.ones(1, 1)), None, None)
    masks, _ = tiny.mask_decoder(tiny.image_encoder(image), tiny.prompt_encoder.get_dense_pe(), sparse, dense, False)
    (gradient,) = torch.autograd.grad(masks.tanh().sum(), image)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_float64_forward(tiny, tiny_image):
    double = copy.deepcopy(tiny).double()
    record = {"image": tiny_image.double(), "original_size": (300, 400), "boxes": torch.tensor([[20.0, 30, 150, 120]])}
    logits = double([record], True)[0]["low_res_logits"]
    assert logits.dtype == torch.float64
    single = tiny([record | {"image": tiny_image}], True)[0]["low_res_logits"]
    assert relative_error(single.double(), logits) <= TOLERANCE


@pytest.mark.parametrize("size", [(192, 256), (256, 130), (1, 256), (256, 256)], ids=str)
def test_preprocess_equals_official(size, official_tiny, tiny):
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 255
    assert torch.equal(tiny.preprocess(image), official_tiny.preprocess(image))
    assert torch.equal(tiny.preprocess(image[None]), official_tiny.preprocess(image[None]))


@pytest.mark.parametrize(
    "input_size, original_size", [((192, 256), (600, 800)), ((256, 1), (999, 3)), ((7, 256), (7, 256))]
)
def test_postprocess_masks_equals_official(input_size, original_size, official_tiny, tiny):
    logits = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 5
    expected = official_tiny.postprocess_masks(logits, input_size, original_size)
    assert torch.equal(tiny.postprocess_masks(logits, torch.Size(input_size), original_size), expected)


def test_attributes_of_the_official_model(official_tiny, tiny):
    assert tiny.mask_threshold == official_tiny.mask_threshold
    assert tiny.image_format == official_tiny.image_format
    assert tiny.device == official_tiny.device
    assert tiny.image_encoder.img_size == official_tiny.image_encoder.img_size
    assert tiny.prompt_encoder.mask_input_size == official_tiny.prompt_encoder.mask_input_size
    assert torch.equal(tiny.pixel_std, official_tiny.pixel_std)
    assert not tiny.training
