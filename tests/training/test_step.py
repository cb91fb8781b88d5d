"""One training step: which gradients it leaves, and that they are those of one joint loss."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from rectangles import Rectangles, tiny_sam

from sam_fast.runtime.upscaling import masks_by_products, upscale_by_products
from sam_fast.training.batches import TrainingBatches
from sam_fast.training.losses import draw_anchors, grouping_loss, prompt_loss
from sam_fast.training.step import InteractiveStep, StepSettings


def batch_of(source=None, batch_size=2, prompts=3):
    source = source or Rectangles()
    return TrainingBatches(source, side=64, batch_size=batch_size, prompts=prompts, seed=0, length=5)[0]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(model, batch, settings, *, train_encoder=True, seed=0):
    model.train().zero_grad()
    step = InteractiveStep(model, train_encoder=train_encoder, autocast=contextlib.nullcontext())
    return step(batch, settings, np.random.default_rng(seed))


def test_products_equal_the_transposed_convolutions():
    decoder = tiny_sam().mask_decoder
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 4, 256, generator=generator)
    image = torch.randn(2, 256, 5, 3, generator=generator)
    for chosen in (range(1, 4), range(1)):
        expected = decoder.masks_from(tokens, decoder.upscale(image), chosen)
        torch.testing.assert_close(masks_by_products(decoder, tokens, image, chosen), expected, rtol=1e-5, atol=1e-6)
    upscaled = upscale_by_products(decoder.output_upscaling, image)
    torch.testing.assert_close(upscaled, decoder.upscale(image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("box_share", [0.0, 1.0])
def test_gradients_equal_those_of_the_plain_model(box_share):
    """Without corrections a step is one forward pass of the public modules and one backward pass."""
    model, batch = tiny_sam(), batch_of()
    statistics = run(model, batch, StepSettings(clicks=0, box_share=box_share))
    found = gradients(model)

    model.zero_grad()
    embeddings = model.image_encoder(model.preprocess(batch.images.float()))
    losses, singles = [], []
    for i in range(2):
        labels = torch.ones(3, 1)
        sparse, dense = model.prompt_encoder(
            points=(batch.points[i][:, None], labels) if box_share == 0 else None,
            boxes=batch.boxes[i] if box_share == 1 else None,
            masks=None,
        )
        logits, iou = model.mask_decoder(
            embeddings[i : i + 1], model.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True
        )
        losses.append(prompt_loss(logits, iou, batch.targets[i].float()).total.mean())
        if box_share == 1:  # the single mask of a box is trained too, and not counted in the statistics
            logits, iou = model.mask_decoder(
                embeddings[i : i + 1], model.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False
            )
            singles.append(prompt_loss(logits, iou, batch.targets[i].float()).total.mean())
    loss = torch.stack(losses).mean()
    (loss + torch.stack(singles).mean() if singles else loss).backward()
    expected = gradients(model)
    assert statistics.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # The bias of keys cancels in the softmax: what is left of its gradient is the rounding of terms as large as
        # those of its weight.
        terms = expected[name.replace("bias", "weight")] if name.endswith("k_proj.bias") else gradient
        scale = terms.abs().max().clamp(min=1e-5)
        assert (found[name] - gradient).abs().max() / scale < 1e-3, name


@pytest.mark.parametrize("box_share", [0.0, 0.5, 1.0])
def test_images_together_have_the_gradients_of_images_alone(box_share):
    model, batch = tiny_sam().train(), batch_of(Rectangles(height=48), batch_size=3)
    found = []
    for together in (1, 2, 3):
        model.zero_grad()
        step = InteractiveStep(model, train_encoder=True, autocast=contextlib.nullcontext(), together=together)
        statistics = step(batch, StepSettings(clicks=0, box_share=box_share), np.random.default_rng(0))
        found.append((statistics, gradients(model)))
    (alone, expected), *others = found
    for statistics, gradient in others:
        for name in ("loss", "first_iou", "best_iou", "last_iou", "iou_error"):
            torch.testing.assert_close(getattr(statistics, name), getattr(alone, name), rtol=1e-5, atol=1e-6)
        assert gradient.keys() == expected.keys()
        for name, value in gradient.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_images_together_are_corrected_alike(monkeypatch):
    """As many objects of each image, each with its own target, box and clicks."""
    model, batch = tiny_sam().train(), batch_of(batch_size=3, prompts=4)
    seen = []
    original = InteractiveStep._decode

    def watched(self, embedding, objects):
        seen.append((objects.image.tolist(), len(objects.boxes), objects.coords.shape[1]))
        for image, target in zip(objects.image, objects.targets, strict=True):
            assert any(torch.equal(target, own) for own in batch.targets[image])
        for image, box in zip(objects.image, objects.boxes, strict=False):
            assert box.tolist() in batch.boxes[image].tolist()
        return original(self, embedding, objects)

    monkeypatch.setattr(InteractiveStep, "_decode", watched)
    step = InteractiveStep(model, train_encoder=True, autocast=contextlib.nullcontext(), together=3)
    statistics = step(batch, StepSettings(clicks=2, refined=2), np.random.default_rng(0))
    assert np.isfinite([statistics.loss.item(), statistics.last_iou.item()]).all()
    (first, *corrected) = seen
    assert sorted(first[0]) == [0] * 4 + [1] * 4 + [2] * 4
    assert len(corrected) == 4 and all(sorted(image) == [0, 0, 1, 1, 2, 2] for image, *_ in corrected)
    assert corrected[-1][2] == 3


def test_corrections_train_the_single_mask_and_the_mask_prompt():
    model, batch = tiny_sam(), batch_of()
    run(model, batch, StepSettings(clicks=0, box_share=0.0))
    first = gradients(model)
    heads = "mask_decoder.output_hypernetworks_mlps."
    assert any(first[f"{heads}{i}.layers.2.weight"].abs().sum() > 0 for i in (1, 2, 3))
    assert f"{heads}0.layers.2.weight" not in first, "the fourth token is for several prompts"
    assert not any("mask_downscaling" in name for name in first)
    run(model, batch, StepSettings(clicks=1))
    corrected = gradients(model)
    assert corrected[f"{heads}0.layers.2.weight"].abs().sum() > 0
    assert corrected["prompt_encoder.mask_downscaling.6.weight"].abs().sum() > 0


def test_the_number_of_passes_and_objects(monkeypatch):
    model, batch = tiny_sam(), batch_of(prompts=4)
    seen = []
    original = InteractiveStep._decode

    def watched(self, embedding, objects):
        points = objects.coords.shape[1]
        seen.append((len(objects.targets), points, objects.mask_input is not None))
        logits, predicted = original(self, embedding, objects)
        assert logits.shape[1] == predicted.shape[1] == (4 if objects.single_prompt else 1)
        return logits, predicted

    monkeypatch.setattr(InteractiveStep, "_decode", watched)
    run(model, batch, StepSettings(clicks=8, refined=3))
    for image in (seen[:11], seen[11:]):
        assert len(image) == 11, "1 + 8 + 2, as in the paper"
        assert image[0] == (4, 1, False)
        assert all(objects == 3 and fed_back for objects, _, fed_back in image[1:])
        points = [points for _, points, _ in image]
        assert points[-1] == 9 and points[-2] == points[-1], "the last pass brings no click"
        assert sum(b == a for a, b in pairwise(points)) == 2


def test_a_frozen_encoder_gets_no_gradient_and_the_rest_the_same():
    model, batch = tiny_sam(), batch_of()
    run(model, batch, StepSettings(clicks=1))
    free = gradients(model)
    model.image_encoder.requires_grad_(False)
    run(model, batch, StepSettings(clicks=1), train_encoder=False)
    frozen = gradients(model)
    assert not any(name.startswith("image_encoder") for name in frozen)
    assert set(frozen) == {name for name in free if not name.startswith("image_encoder")}
    for name, gradient in frozen.items():
        torch.testing.assert_close(gradient, free[name], rtol=1e-4, atol=1e-6, msg=name)


def test_padding_changes_nothing():
    """What lies in the padding of a target does not reach the loss."""
    model, batch = tiny_sam(), batch_of(Rectangles(height=32))
    expected = run(model, batch, StepSettings(clicks=0)).loss
    batch.targets[:, :, 8:] = True
    assert run(model, batch, StepSettings(clicks=0)).loss == expected
    batch.targets[:, :, 7] = True
    assert run(model, batch, StepSettings(clicks=0)).loss != expected


def test_a_step_depends_on_its_generator_alone():
    model, batch = tiny_sam(), batch_of()
    settings = StepSettings(clicks=2)
    first, second = run(model, batch, settings, seed=1), run(model, batch, settings, seed=1)
    assert first.loss == second.loss and first.last_iou == second.last_iou
    assert run(model, batch, settings, seed=2).loss != first.loss


def test_bfloat16_autocast():
    model, batch = tiny_sam(), batch_of()
    expected = run(model, batch, StepSettings(clicks=1)).loss
    step = InteractiveStep(model, train_encoder=True, autocast=torch.autocast("cpu", torch.bfloat16))
    model.zero_grad()
    loss = step(batch, StepSettings(clicks=1), np.random.default_rng(0)).loss
    assert loss.item() == pytest.approx(expected.item(), rel=0.03)
    assert all(
        torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None
    )


def test_grouping_adds_its_gradients_to_the_encoder():
    model, batch = tiny_sam(), batch_of()
    assert torch.isnan(run(model, batch, StepSettings(clicks=0)).grouping_iou)
    plain = gradients(model)
    statistics = run(model, batch, StepSettings(clicks=0, grouping=0.5))
    grouped = gradients(model)
    only = run(model, batch, StepSettings(clicks=0, grouping=0.5, prompted=False))
    alone = gradients(model)
    assert torch.isnan(only.loss) and 0 <= statistics.grouping_iou <= 1

    model.zero_grad()
    anchors = draw_anchors(batch.regions, 48, first_generator())
    model.mask_decoder.requires_grad_(False)
    upscaled = model.mask_decoder.upscale(model.image_encoder(model.preprocess(batch.images.float())))
    loss, iou = grouping_loss(upscaled, batch.regions, anchors)
    (0.5 * loss).backward()
    assert only.grouping_iou.item() == pytest.approx(iou.item(), abs=1e-3)
    expected = gradients(model)
    assert alone.keys() == expected.keys()
    assert all(name.startswith("image_encoder") for name in alone)
    for name, gradient in alone.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)
    for name, gradient in grouped.items():
        total = plain[name] + alone[name] if name in alone else plain[name]
        torch.testing.assert_close(gradient, total, rtol=1e-3, atol=1e-6, msg=name)


def first_generator() -> torch.Generator:
    """What a step with seed 0 draws anchors from, when it draws nothing before."""
    return torch.Generator().manual_seed(int(np.random.default_rng(0).integers(2**62)))


def test_corrections_may_weigh_less():
    model, batch = tiny_sam(), batch_of()
    found = {}
    for weight in (0.0, 0.5, 1.0):
        run(model, batch, StepSettings(clicks=1, correction_weight=weight, box_share=0.0))
        found[weight] = gradients(model)
    run(model, batch, StepSettings(clicks=0, box_share=0.0))
    alone = gradients(model)
    for name, gradient in found[1.0].items():
        torch.testing.assert_close(found[0.0][name], alone.get(name, torch.zeros_like(gradient)), msg=name)
        middle = (found[0.0][name] + gradient) / 2
        torch.testing.assert_close(found[0.5][name], middle, rtol=1e-3, atol=1e-5, msg=name)
