"""One training step: which gradients it leaves, and that they are those of one joint loss."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from rectangles import Rectangles, batch_of, error_of, gradients, tiny_sam

from sam_fast.modeling import MaskDecoder, PromptEncoder
from sam_fast.runtime.upscaling import masks_by_products, upscale_by_products
from sam_fast.training.decoding import embed_points
from sam_fast.training.losses import draw_anchors, grouping_loss, prompt_loss
from sam_fast.training.step import InteractiveStep, StepSettings, draw_plan


def run(model, batch, settings, *, train_encoder=True, seed=0):
    model.train().zero_grad()
    step = InteractiveStep(model, train_encoder=train_encoder)
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
    unused = found.keys() - expected.keys()
    assert all(name.startswith("prompt_encoder.") and not found[name].any() for name in unused), "kinds of no prompt"
    assert found.keys() >= expected.keys()
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
        step = InteractiveStep(model, train_encoder=True, together=together)
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
    seen, boxed = [], set()
    original = InteractiveStep._decode

    def watched(self, embedding, objects, chosen):
        seen.append(tuple(objects.coords.shape[:2]))
        boxed.update(objects.boxed.tolist())
        for i, target in enumerate(objects.targets):
            image = 3 * i // len(objects.targets)
            corners, point = objects.coords[i, :2].flatten().tolist(), objects.coords[i, 0].tolist()
            assert any(torch.equal(target, own) for own in batch.targets[image])
            assert objects.labels[i, :2].tolist() == ([2, 3] if objects.boxed[i] else [1, -1])
            assert corners in batch.boxes[image].tolist() if objects.boxed[i] else point in batch.points[image].tolist()
        return original(self, embedding, objects, chosen)

    monkeypatch.setattr(InteractiveStep, "_decode", watched)
    step = InteractiveStep(model, train_encoder=True, together=3)
    statistics = step(batch, StepSettings(clicks=2, refined=2), np.random.default_rng(0))
    assert np.isfinite([statistics.loss.item(), statistics.last_iou.item()]).all()
    assert boxed == {True, False}
    assert seen[0] == (12, 2) and len(seen) == 5
    assert all(count == 6 for count, _ in seen[1:]) and seen[-1][1] == 4


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

    def watched(self, embedding, objects, chosen):
        points = objects.coords.shape[1]
        seen.append((len(objects.targets), points, objects.mask_input is not None))
        logits, predicted = original(self, embedding, objects, chosen)
        assert logits.shape[1] == predicted.shape[1] == (4 if objects.single_prompt else 1)
        return logits, predicted

    monkeypatch.setattr(InteractiveStep, "_decode", watched)
    run(model, batch, StepSettings(clicks=8, refined=3))
    for image in (seen[:11], seen[11:]):
        assert len(image) == 11, "1 + 8 + 2, as in the paper"
        assert image[0] == (4, 2, False), "a point and padding, or two corners"
        assert all(objects == 3 and fed_back for objects, _, fed_back in image[1:])
        points = [points for _, points, _ in image]
        assert points[-1] == 10 and points[-2] == points[-1], "the last pass brings no click"
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
    step = InteractiveStep(model, train_encoder=True, half=torch.bfloat16)
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


def test_tokens_are_those_of_the_prompt_encoder():
    """Padding and corners come behind the clicks there, which tokens without an order do not notice."""
    encoder = tiny_sam().prompt_encoder
    generator = torch.Generator().manual_seed(0)
    coords = 64 * torch.rand(2, 4, 2, generator=generator)
    labels = torch.tensor([[1, -1, 0, 1], [2, 3, 1, 0]])
    found = embed_points(encoder, coords, labels)
    point = encoder((coords[:1, [0, 2, 3]], labels[:1, [0, 2, 3]]), None, None)[0]
    box = encoder((coords[1:, 2:], labels[1:, 2:]), coords[1:, :2].flatten(1), None)[0]
    torch.testing.assert_close(found[:1], point[:, [0, 3, 1, 2]])
    torch.testing.assert_close(found[1:], box[:, [2, 3, 0, 1]])


@pytest.mark.parametrize("clicks", [0, 1])
def test_half_precision_changes_the_gradient_a_little(clicks, monkeypatch):
    """Most of the difference is another best one of three masks, which a processor's way to round may tip: the mean of
    several draws. Clicks, which could tip too, are the same here.
    """
    model, batch, settings = tiny_sam(), batch_of(), StepSettings(clicks=clicks)
    places = torch.arange(6)[:, None] * torch.tensor([[7.0, 9.0]])
    clicked = lambda logits, *_: (places[: len(logits)], torch.ones(len(logits), dtype=torch.int64))  # noqa: E731
    monkeypatch.setattr("sam_fast.training.step.error_clicks", clicked)
    errors = []
    for seed in range(5):
        found = {}
        for half in (None, torch.bfloat16):
            model.train().zero_grad()
            InteractiveStep(model, train_encoder=True, half=half)(batch, settings, np.random.default_rng(seed))
            found[half] = gradients(model)
        assert found[None].keys() == found[torch.bfloat16].keys()
        errors.append(error_of(found[torch.bfloat16], found[None]))
    assert min(errors) > 1e-4
    assert np.mean(errors) < 0.15, errors


def test_half_precision_reads_the_weights_of_each_step():
    model, batch, settings = tiny_sam(), batch_of(), StepSettings(clicks=0)
    step = InteractiveStep(model.train(), train_encoder=True, half=torch.bfloat16)
    first = step(batch, settings, np.random.default_rng(0)).loss
    with torch.no_grad():
        model.mask_decoder.iou_prediction_head.layers[2].bias += 1
    changed = step(batch, settings, np.random.default_rng(0)).loss
    assert changed > first + 0.5
    fresh = InteractiveStep(model, train_encoder=True, half=torch.bfloat16)
    assert fresh(batch, settings, np.random.default_rng(0)).loss == changed


def test_gradients_add_up_over_steps():
    for half in (None, torch.bfloat16):
        model, batch = tiny_sam().train(), batch_of()
        step = InteractiveStep(model, train_encoder=True, half=half)
        step(batch, StepSettings(clicks=1), np.random.default_rng(0))
        once = gradients(model)
        step(batch, StepSettings(clicks=1), np.random.default_rng(0))
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, 2 * once[name], rtol=1e-4, atol=1e-7, msg=name)


def test_a_plan_has_the_share_of_boxes_and_corrects_different_objects():
    batch = batch_of(batch_size=3, prompts=40)
    plan = draw_plan(batch, StepSettings(clicks=2, refined=5, box_share=0.3), np.random.default_rng(0))
    assert plan.boxed.shape == (3, 40) and 0.15 < plan.boxed.float().mean() < 0.45
    assert plan.refined.shape == (3, 5) and (plan.refined.diff(dim=1) > 0).all() and plan.refined.max() < 40
    assert len({tuple(row) for row in plan.refined.tolist()}) == 3
    assert sum(plan.passes) == 2 and len(plan.passes) == 4 and not plan.passes[-1]
    every = draw_plan(batch, StepSettings(clicks=1), np.random.default_rng(0))
    assert every.refined.tolist() == [list(range(40))] * 3


class OwnEncoder(PromptEncoder):
    """Adds to the tokens of points, and to what masks say."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.shift = torch.nn.Parameter(torch.zeros(self.embed_dim))
        self.offset = torch.nn.Parameter(torch.zeros(()))

    def _embed_points(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return super()._embed_points(*arguments, **options) + self.shift

    def _embed_masks(self, masks: torch.Tensor) -> torch.Tensor:
        return super()._embed_masks(masks) + self.offset


class OwnDecoder(MaskDecoder):
    """Adds a number to the predicted IoU."""

    def predict_tokens(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, image, iou = super().predict_tokens(*arguments, **options)
        return tokens, image, iou + self.more

    def add(self, more: float) -> OwnDecoder:
        self.more = torch.nn.Parameter(torch.tensor(more))
        return self


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_modules_of_ones_own_are_called(half, together):
    """Where they change nothing the gradients are those of the plain ones, and they have gradients themselves."""
    model, batch, settings = tiny_sam(), batch_of(batch_size=2), StepSettings(clicks=1)
    step = InteractiveStep(model.train(), train_encoder=True, half=half, together=together)
    plain, expected = step(batch, settings, np.random.default_rng(0)).loss, gradients(model)

    encoder = model.prompt_encoder
    own = OwnEncoder(encoder.embed_dim, encoder.image_embedding_size, encoder.input_image_size, 16)
    own.load_state_dict(encoder.state_dict(), strict=False)
    model.prompt_encoder = own
    model.mask_decoder.__class__ = OwnDecoder
    model.mask_decoder.add(0.0)
    model.train().zero_grad()
    step = InteractiveStep(model, train_encoder=True, half=half, together=together)
    loss, found = step(batch, settings, np.random.default_rng(0)).loss, gradients(model)
    names = {"prompt_encoder.shift", "prompt_encoder.offset", "mask_decoder.more"}
    assert found.keys() == expected.keys() | names
    assert all(found[name].any() for name in names)
    if half is None:
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
        assert error_of(found, expected) < 1e-3
    else:
        torch.testing.assert_close(loss, plain, rtol=0.03, atol=0)
        assert all(torch.isfinite(gradient).all() for gradient in found.values())

    model.mask_decoder.add(1.0)
    assert run(model, batch, settings).loss > plain + 0.5
