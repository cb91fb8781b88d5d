"""The absorbed two-way transformer against the plain one, alone and inside the runtime."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracle import relative_error
from torch import nn

from sam_fast import SamPredictor
from sam_fast.modeling import MaskDecoder
from sam_fast.modeling.transformer import TwoWayTransformer
from sam_fast.runtime.inference import InferenceRuntime, Prompts
from sam_fast.runtime.two_way import MOST_TOKENS, can_absorb, project_first_layer, two_way

TOLERANCE = 1e-5  # float32, other products in another order (contract: 1e-4; measured: 2e-7)


def inputs(prompts: int, tokens: int, height: int = 16, width: int = 16) -> tuple[torch.Tensor, ...]:
    """Images [N, C, h, w], encoding [1, C, h, w], tokens [N, T, C]."""
    generator = torch.Generator().manual_seed(prompts + 10 * tokens)
    image = torch.randn(max(prompts, 1), 256, height, width, generator=generator)
    pe = torch.randn(1, 256, height, width, generator=generator)
    return image, pe, torch.randn(prompts, tokens, 256, generator=generator)


def pixels(image: torch.Tensor) -> torch.Tensor:
    return image.flatten(2).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False], ids=["one image", "an image each"])
@pytest.mark.parametrize("prompts, tokens, size", [(1, 7, (16, 16)), (3, 9, (16, 16)), (2, 1, (7, 5)), (4, 21, (1, 1))])
def test_equals_the_plain_transformer(prompts, tokens, size, shared, tiny):
    transformer = tiny.mask_decoder.transformer
    image, pe, tokens = inputs(prompts, tokens, *size)
    image = image[:1] if shared else image
    expected = transformer(image, pe, tokens)
    start = project_first_layer(transformer, pixels(image), pixels(pe)) if shared else pixels(image)
    for ours, theirs in zip(two_way(transformer, start, pixels(pe), tokens), expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= TOLERANCE


@torch.no_grad()
def test_float64_tells_rounding_from_algebra(tiny):
    transformer = copy.deepcopy(tiny.mask_decoder.transformer).double()
    image, pe, tokens = (x.double() for x in inputs(2, 7))
    expected = transformer(image[:1], pe, tokens)
    start = project_first_layer(transformer, pixels(image[:1]), pixels(pe))
    for ours, theirs in zip(two_way(transformer, start, pixels(pe), tokens), expected, strict=True):
        assert relative_error(ours, theirs) <= 1e-13


@torch.no_grad()
def test_no_prompts(tiny):
    transformer = tiny.mask_decoder.transformer
    image, pe, tokens = inputs(0, 7)
    start = project_first_layer(transformer, pixels(image), pixels(pe))
    queries, keys = two_way(transformer, start, pixels(pe), tokens)
    assert queries.shape == (0, 7, 256) and keys.shape == (0, 256, 256)


def test_layers_that_compute_something_else_are_not_absorbed(tiny):
    transformer = copy.deepcopy(tiny.mask_decoder.transformer)
    assert can_absorb(transformer)

    class Adapted(nn.Linear):
        pass

    transformer.layers[1].cross_attn_token_to_image.v_proj = Adapted(256, 128)
    assert not can_absorb(transformer)
    assert not can_absorb(type("Own", (TwoWayTransformer,), {})(2, 256, 8, 64))


# -- inside the runtime


def prompts_of(kind: str, count: int) -> Prompts:
    generator = torch.Generator().manual_seed(7)
    points = 250 * torch.rand(count, 2, 2, generator=generator)
    labels = torch.tensor([[1, 0]]).expand(count, -1)
    masks = 5 * torch.randn(count, 1, 64, 64, generator=generator)
    boxes = torch.tensor([[20.0, 30.0, 180.0, 200.0]]).repeat(count, 1)
    many = MOST_TOKENS - 5  # with the padding point one token too many to be absorbed
    return {
        "points": Prompts(points, labels),
        "boxes": Prompts(boxes=boxes),
        "points and boxes": Prompts(points, labels, boxes),
        "masks": Prompts(points, labels, masks=masks),
        "one mask for all": Prompts(points, labels, masks=masks[:1]),
        "nothing but masks": Prompts(masks=masks),
        "extra tokens": Prompts(points, labels, extra_tokens=torch.randn(count, 2, 256, generator=generator)),
        "many points": Prompts(points[:, :1].repeat(1, many, 1), torch.ones(count, many)),
    }[kind]


KINDS = ["points", "boxes", "points and boxes", "masks", "one mask for all"]
KINDS += ["nothing but masks", "extra tokens", "many points"]


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_plain_decoder(kind, multimask, tiny, photo):
    predictor = SamPredictor(tiny)
    embedding = predictor.set_image(photo)
    prompts = prompts_of(kind, 6)
    low_res, iou = predictor.runtime.decode(embedding, prompts, multimask)
    points = None if prompts.points is None else (prompts.points, prompts.labels)
    extra = {} if prompts.extra_tokens is None else {"extra_tokens": prompts.extra_tokens}
    sparse, dense = tiny.prompt_encoder(points=points, boxes=prompts.boxes, masks=prompts.masks, **extra)
    expected, scores = tiny.mask_decoder(
        embedding.features, tiny.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=multimask
    )
    assert relative_error(low_res, expected) <= TOLERANCE
    torch.testing.assert_close(iou, scores, rtol=0, atol=1e-5)


@torch.no_grad()
def test_projections_are_made_once_per_image_and_again_when_weights_change(tiny, photo, monkeypatch):
    model = copy.deepcopy(tiny)
    runtime = InferenceRuntime(model)
    embedding = SamPredictor(model).set_image(photo)
    calls = []
    monkeypatch.setattr(
        "sam_fast.runtime.cpu_decoder.project_first_layer",
        lambda *arguments: calls.append(1) or project_first_layer(*arguments),
    )
    prompts = prompts_of("points", 9)
    first, _ = runtime.decode(embedding, prompts)
    again, _ = runtime.decode(embedding, prompts)
    assert len(calls) == 1 and torch.equal(first, again)
    for change in (
        lambda: model.mask_decoder.transformer.layers[0].cross_attn_token_to_image.k_proj.weight.mul_(1.5),
        lambda: model.prompt_encoder.no_mask_embed.weight.add_(1),
        lambda: setattr(model, "mask_decoder", copy.deepcopy(model.mask_decoder)),
    ):
        change()
        calls.clear()
        changed, _ = runtime.decode(embedding, prompts)
        fresh, _ = runtime.decode(SamPredictor(model).set_image(photo), prompts)
        assert len(calls) == 2 and torch.equal(changed, fresh)


@torch.no_grad()
def test_a_runtime_that_has_decoded_can_be_pickled(tiny, photo):
    runtime = InferenceRuntime(tiny)
    embedding = SamPredictor(tiny).set_image(photo)
    prompts = prompts_of("points", 2)
    expected, _ = runtime.decode(embedding, prompts)
    again, moved = pickle.loads(pickle.dumps((runtime, embedding)))
    assert torch.equal(again.decode(moved, prompts)[0], expected)


@torch.no_grad()
def test_a_subclass_of_the_decoder_keeps_its_own_way(tiny, photo):
    model = copy.deepcopy(tiny)

    class Inverted(MaskDecoder):
        def upscale(self, image):
            return -super().upscale(image)

    model.mask_decoder.__class__ = Inverted
    embedding = SamPredictor(model).set_image(photo)
    prompts = prompts_of("points", 2)
    plain, _ = InferenceRuntime(tiny).decode(embedding, prompts)
    inverted, _ = InferenceRuntime(model).decode(embedding, prompts)
    torch.testing.assert_close(inverted, -plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("where", ["", "transformer.layers.1.mlp", "output_upscaling.0"])
def test_hooks_of_the_decoder_are_called(where, tiny, photo):
    model = copy.deepcopy(tiny)
    runtime = InferenceRuntime(model)
    embedding = SamPredictor(model).set_image(photo)
    prompts = prompts_of("points", 3)
    expected, scores = runtime.decode(embedding, prompts)
    seen = []
    model.mask_decoder.get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    logits, iou = runtime.decode(embedding, prompts)
    kept, _, _ = runtime.decode_filtered(embedding, prompts, None)
    assert seen
    torch.testing.assert_close(iou, scores, rtol=1e-4, atol=1e-5)
    for ours in (logits, kept.view_as(logits)):
        assert relative_error(ours, expected) <= TOLERANCE
