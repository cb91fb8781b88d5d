"""The mask decoder for GPUs, on the CPU too: by PyTorch and native code, and small by Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
from copies import Copies
from decoders import decoder_inputs, rows_of, run
from oracle import relative_error
from torch import Tensor, nn

from sam_fast import SamPredictor
from sam_fast.build_sam import sam_model_registry
from sam_fast.modeling import MaskDecoder, Sam
from sam_fast.runtime import decoding, packed_decoder, plain
from sam_fast.runtime.inference import InferenceRuntime, Prompts
from sam_fast.runtime.packed_decoder import PackedDecoder, can_pack
from sam_fast.runtime.streams import Ready
from sam_fast.runtime.two_way import StackedSharing, project_first_layer, two_way

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5  # of float32: products in another order; 2e-6 measured
# Errors in bfloat16, by those of the decoder's own modules in bfloat16. Random weights enlarge the rounding (2^-9) of
# operands and of the image: logits 2.4e-2 and 3.3e-2; with trained weights ours are no larger, up to chance. Where
# float16 is as safe, bfloat16 means that, whose rounding is an eighth: a tenth and a seventh measured.
RANDOM, TRAINED = {"bfloat16": 1.2, "float16": 0.25}, {"bfloat16": 1.05, "float16": 0.25}


@pytest.fixture(params=["bfloat16", "float16"])
def format_of_bf16(request, monkeypatch) -> str:
    if request.param == "bfloat16":
        monkeypatch.setattr(packed_decoder, "fits_float16", lambda decoder: False)
    return request.param


@pytest.fixture(scope="module")
def model(tiny) -> Sam:
    return copy.deepcopy(tiny).to(DEVICE).eval()


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 2], ids=["one image", "an image each"])
def test_triton_equals_the_plain_decoder(images, model):
    arguments = decoder_inputs(2, 3, 5, 7, images)
    expected, scores = model.mask_decoder(*arguments, multimask_output=True)
    logits, iou = run(PackedDecoder(model.mask_decoder, torch.float32, "triton"), *arguments)
    assert logits.shape == expected.shape and logits.dtype == torch.float32
    assert relative_error(logits, expected) <= TOLERANCE
    torch.testing.assert_close(iou, scores, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 2], ids=["one image", "an image each"])
def test_triton_in_half_precision(images, format_of_bf16, model):
    arguments = decoder_inputs(2, 3, 5, 7, images)
    expected, scores = model.mask_decoder(*arguments, multimask_output=True)
    packed = PackedDecoder(model.mask_decoder, torch.bfloat16, "triton")
    assert packed.dtype == getattr(torch, format_of_bf16)
    logits, iou = run(packed, *arguments)
    half = copy.deepcopy(model.mask_decoder).bfloat16()
    plain, plain_scores = half(*(x.bfloat16() for x in arguments), multimask_output=True)
    assert logits.shape == expected.shape and logits.dtype == torch.float32
    assert 0 < relative_error(logits, expected) <= RANDOM[format_of_bf16] * relative_error(plain.float(), expected)
    of_scores = RANDOM[format_of_bf16] * float((plain_scores.float() - scores).abs().max())
    torch.testing.assert_close(iou, scores, rtol=0, atol=of_scores)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 11])
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (9, 5)], ids=str)
def test_float32_equals_the_plain_decoder(size, tokens, model):
    arguments = decoder_inputs(3, tokens, *size)
    expected, scores = model.mask_decoder(*arguments, multimask_output=True)
    logits, iou = run(PackedDecoder(model.mask_decoder, torch.float32), *arguments)
    assert relative_error(logits, expected) <= TOLERANCE
    torch.testing.assert_close(iou, scores, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_half_precision_is_no_worse_than_the_plain_decoder_in_bfloat16(format_of_bf16, photo):
    """With trained weights: seeded ones say little about errors of the real ones."""
    nano = sam_model_registry["nano"]().to(DEVICE)
    features = SamPredictor(nano, precision="fp32").set_image(photo).features
    points = 512 * torch.rand(32, 1, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sparse, dense = nano.prompt_encoder((points, torch.ones(32, 1, device=DEVICE)), None, None)
    arguments = features, nano.prompt_encoder.get_dense_pe(), sparse, dense[:1]
    expected, scores = nano.mask_decoder(*arguments, multimask_output=True)

    def errors(logits: Tensor, iou: Tensor) -> tuple[float, float]:
        return relative_error(logits.float(), expected), float((iou.float() - scores).abs().mean())

    with torch.autocast(DEVICE, torch.bfloat16):
        plain = errors(*nano.mask_decoder(*arguments, multimask_output=True))
    half = copy.deepcopy(nano.mask_decoder).bfloat16()
    converted = errors(*half(*(x.bfloat16() for x in arguments), multimask_output=True))
    packed = errors(*run(PackedDecoder(nano.mask_decoder, torch.bfloat16), *arguments))
    assert 0 < packed[0] <= TRAINED[format_of_bf16] * min(plain[0], converted[0])
    assert packed[1] <= TRAINED[format_of_bf16] * min(plain[1], converted[1])


@torch.no_grad()
def test_two_way_with_triton_equals_the_plain_transformer(model):
    transformer = model.mask_decoder.transformer
    image, pe, tokens, _ = decoder_inputs(2, 7, 5, 7)
    expected = transformer(image, pe, tokens)
    start = project_first_layer(transformer, rows_of(image), rows_of(pe))
    got = two_way(transformer, start, rows_of(pe), tokens, backend="triton")
    for ours, theirs in zip(got, expected, strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1])
def test_stacked_projections_equal_single_ones(index, model):
    layer = model.mask_decoder.transformer.layers[index]
    queries, tokens = (torch.randn(3, 7, 256, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in (0, 1))
    assert layer.skip_first_layer_pe == (index == 0) and StackedSharing.fits(layer)
    if index == 0:
        expected = layer.norm1(layer.self_attn(queries, queries, queries))
    else:
        placed = queries + tokens
        expected = layer.norm1(queries + layer.self_attn(placed, placed, queries))
    assert relative_error(StackedSharing(layer)(queries, tokens), expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("change", ["no bias", "another class"])
def test_projections_that_cannot_be_stacked(change, model):
    decoder = copy.deepcopy(model.mask_decoder)
    attention = decoder.transformer.layers[1].self_attn
    if change == "no bias":
        attention.k_proj = nn.Linear(256, 256, bias=False, device=DEVICE)
    else:
        attention.__class__ = type("Own", (type(attention),), {})
    assert not StackedSharing.fits(decoder.transformer.layers[1]) and can_pack(decoder) == (change == "no bias")
    arguments = decoder_inputs(2, 3, 5, 7)
    expected, _ = decoder(*arguments, multimask_output=True)
    assert relative_error(run(PackedDecoder(decoder, torch.float32), *arguments)[0], expected) <= TOLERANCE


@torch.no_grad()
def test_products_of_tokens_are_written_where_they_are_read(model, monkeypatch):
    features, pe, sparse, dense = decoder_inputs(2, 2, 5, 7)
    packed = PackedDecoder(model.mask_decoder, torch.bfloat16)
    first = packed.project_first_layer(rows_of(features + dense), rows_of(pe))
    copied, results = [], []
    for devices in (set(), {DEVICE}):
        monkeypatch.setattr(plain, "PACKED_ON", devices)
        with Copies(8, 256, names={"clone"}) as copies:
            results.append(packed.predict_tokens(first, rows_of(pe), sparse))
        copied.append(copies.nbytes)
    # [N, 7 tokens, 8 heads, C] four times, and five tokens at last.
    assert copied == [2 * 2 * (4 * 7 + 5) * 8 * 256, 0]
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours.float(), theirs.float()) <= 1e-2  # the same, but for the order of sums


def test_only_plain_decoders_are_packed(model):
    assert can_pack(model.mask_decoder)

    class Inverted(MaskDecoder):
        pass

    def hooked(decoder: MaskDecoder) -> None:
        decoder.transformer.layers[1].mlp.register_forward_hook(lambda *_: None)

    def replaced(decoder: MaskDecoder) -> None:
        decoder.output_hypernetworks_mlps[1].layers[0] = type("Adapted", (nn.Linear,), {})(256, 256)

    def activated(decoder: MaskDecoder) -> None:
        decoder.transformer.layers[0].mlp.act = nn.SiLU()

    def sigmoid(decoder: MaskDecoder) -> None:
        decoder.output_hypernetworks_mlps[0].sigmoid_output = True

    for change in (lambda d: setattr(d, "__class__", Inverted), hooked, replaced, activated, sigmoid):
        decoder = copy.deepcopy(model.mask_decoder)
        change(decoder)
        assert not can_pack(decoder)


# -- inside the runtime


@pytest.fixture
def packs(monkeypatch) -> list[int]:
    """Decoders are packed wherever the test runs; the list grows with the prompts of each chunk that is."""
    monkeypatch.setattr(plain, "PACKED_ON", {DEVICE})
    monkeypatch.setattr(decoding, "MOST_PROMPTS", 16)  # fewer than on a GPU, which are too slow here
    chunks: list[int] = []
    predict = PackedDecoder.predict_tokens

    def counted(self, image, pe, sparse):
        chunks.append(len(sparse))
        return predict(self, image, pe, sparse)

    monkeypatch.setattr(PackedDecoder, "predict_tokens", counted)
    return chunks


@pytest.fixture
def embedding(model, photo):
    return SamPredictor(model, precision="fp32").set_image(photo)


def prompts_of(kind: str, count: int) -> Prompts:
    generator = torch.Generator().manual_seed(7)
    points = (250 * torch.rand(count, 2, 2, generator=generator)).to(DEVICE)
    labels = torch.tensor([[1, 0]], device=DEVICE).expand(count, -1)
    masks = (5 * torch.randn(count, 1, 64, 64, generator=generator)).to(DEVICE)
    extra = torch.randn(count, 2, 256, generator=generator).to(DEVICE)
    return {
        "points": Prompts(points, labels),
        "boxes": Prompts(boxes=points.sort(1).values.flatten(1)),
        "masks": Prompts(points, labels, masks=masks),
        "one mask for all": Prompts(points, labels, masks=masks[:1]),
        "extra tokens": Prompts(points, labels, extra_tokens=extra),
    }[kind]


KINDS = ["points", "boxes", "masks", "one mask for all", "extra tokens"]


def official(model: Sam, embedding, prompts: Prompts, multimask: bool) -> tuple[Tensor, Tensor]:
    points = None if prompts.points is None else (prompts.points, prompts.labels)
    extra = {} if prompts.extra_tokens is None else {"extra_tokens": prompts.extra_tokens}
    sparse, dense = model.prompt_encoder(points=points, boxes=prompts.boxes, masks=prompts.masks, **extra)
    pe = model.prompt_encoder.get_dense_pe()
    return model.mask_decoder(embedding.features, pe, sparse, dense, multimask_output=multimask)


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_plain_decoder(kind, multimask, model, embedding, packs):
    prompts = prompts_of(kind, 18)
    low_res, iou = InferenceRuntime(model, "fp32").decode(embedding, prompts, multimask)
    assert packs == [16, 2]
    expected, scores = official(model, embedding, prompts, multimask)
    assert low_res.shape == expected.shape and relative_error(low_res, expected) <= TOLERANCE
    torch.testing.assert_close(iou, scores, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 64])
def test_clicks_of_numbers_that_come_again(count, model, embedding, packs):
    """Their prompts are encoded by a graph on a GPU."""
    prompts = prompts_of("points", count)
    low_res, _ = InferenceRuntime(model, "fp32").decode(embedding, prompts)
    expected, _ = official(model, embedding, prompts, True)
    assert sum(packs) == count and relative_error(low_res, expected) <= TOLERANCE


@torch.no_grad()
def test_a_hook_of_the_prompt_encoder_is_called_each_time(model, embedding, packs):
    listened, heard = copy.deepcopy(model), []
    listened.prompt_encoder.register_forward_hook(lambda *_: heard.append(1))
    runtime = InferenceRuntime(listened, "fp32")
    for _ in range(3):
        runtime.decode(embedding, prompts_of("points", 1))
    assert heard == [1, 1, 1] and packs == [1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("threshold", [None, 0.9, 10.0])
@pytest.mark.parametrize("kind", ["points", "masks"])
def test_filtered_equals_all_then_filter(kind, threshold, model, embedding, packs):
    prompts = prompts_of(kind, 66 if kind == "points" else 18)
    expected, iou = official(model, embedding, prompts, True)
    keep = torch.ones_like(iou, dtype=torch.bool) if threshold is None else iou > threshold
    assert threshold != 0.9 or 0 < keep.sum() < keep.numel()
    logits, scores, prompt = InferenceRuntime(model, "fp32").decode_filtered(embedding, prompts, threshold)
    assert packs == ([16, 16, 16, 16, 2] if kind == "points" else [16, 2])
    assert torch.equal(prompt, keep.nonzero()[:, 0])
    torch.testing.assert_close(scores, iou[keep], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logits, expected[keep], rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@torch.no_grad()
def test_results_of_many_prompts_stay_the_callers(model, embedding, packs, monkeypatch):
    """By graphs on a GPU, from the third chunk on; on a CPU see test_graphs.py."""
    monkeypatch.setattr(decoding, "MOST_PROMPTS", 8)
    monkeypatch.setattr(packed_decoder, "_GRAPHED", 4)
    runtime, prompts = InferenceRuntime(model, "fp32"), prompts_of("points", 20)
    assert prompts.points is not None
    given = [prompts._replace(points=prompts.points.roll(i, 0)) for i in range(3)]
    every = [runtime.decode(embedding, some) for some in given]
    filtered = [runtime.decode_filtered(embedding, some, 0.9) for some in given]
    assert packs == [8, 8, 4] * 6 or (DEVICE == "cuda" and packs[:2] == [8, 8])  # a replay calls nothing
    for some, (low_res, iou), (logits, scores, prompt) in zip(given, every, filtered, strict=True):
        expected, expected_iou = official(model, embedding, some, True)
        assert relative_error(low_res, expected) <= TOLERANCE
        torch.testing.assert_close(iou, expected_iou, rtol=0, atol=TOLERANCE)
        keep = expected_iou > 0.9
        assert 0 < keep.sum() < keep.numel() and torch.equal(prompt, keep.nonzero()[:, 0])
        assert relative_error(logits, expected[keep]) <= TOLERANCE
        torch.testing.assert_close(scores, expected_iou[keep], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_no_prompts(model, embedding, packs):
    runtime = InferenceRuntime(model, "fp32")
    none = Prompts(torch.zeros(0, 1, 2, device=DEVICE), torch.ones(0, 1, device=DEVICE))
    assert [tuple(x.shape) for x in runtime.decode(embedding, none)] == [(0, 3, 64, 64), (0, 3)]
    assert [len(x) for x in runtime.decode_filtered(embedding, none, 0.5)] == [0, 0, 0]
    assert packs == [0, 0]


@torch.no_grad()
def test_many_clicks_project_the_image(model, embedding, packs):
    points = prompts_of("points", 2).points
    assert points is not None
    prompts = Prompts(points.repeat(1, 6, 1), torch.ones(2, 12, device=DEVICE))
    low_res, _ = InferenceRuntime(model, "fp32").decode(embedding, prompts)
    expected, _ = official(model, embedding, prompts, True)
    assert not packs and relative_error(low_res, expected) <= TOLERANCE


@torch.no_grad()
def test_weights_and_projections_are_packed_once_and_again_when_they_change(model, embedding, packs, monkeypatch):
    model = copy.deepcopy(model)
    runtime = InferenceRuntime(model, "fp32")
    made = []
    project = PackedDecoder.project_first_layer
    monkeypatch.setattr(
        PackedDecoder, "project_first_layer", lambda *arguments: made.append(arguments[0]) or project(*arguments)
    )
    prompts = prompts_of("points", 3)
    first, _ = runtime.decode(embedding, prompts)
    again, _ = runtime.decode(embedding, prompts)
    assert len(made) == 1 and torch.equal(first, again)
    model.mask_decoder.output_hypernetworks_mlps[1].layers[2].weight.mul_(2)
    changed, _ = runtime.decode(embedding, prompts)
    assert not torch.equal(changed, first)
    model.mask_decoder.transformer.layers[0].cross_attn_token_to_image.k_proj.weight.mul_(1.5)
    runtime.decode(embedding, prompts)
    assert len(made) == 3 and len(set(map(id, made))) == 3
    expected, _ = official(model, embedding, prompts, True)
    assert relative_error(runtime.decode(embedding, prompts)[0], expected) <= TOLERANCE


@torch.no_grad()
def test_converted_models_run_in_their_own_format(model, embedding, packs):
    prompts = prompts_of("points", 3)
    expected, scores = official(model, embedding, prompts, True)
    half = copy.deepcopy(model)
    half.mask_decoder.bfloat16()
    low_res, iou = InferenceRuntime(half).decode(embedding, prompts)
    assert packs == [3] and low_res.dtype == iou.dtype == torch.float32
    assert 0 < (low_res - expected).norm() / expected.norm() <= 0.06  # its weights are rounded as well
    torch.testing.assert_close(iou, scores, rtol=0, atol=1e-2)


@torch.no_grad()
def test_somebodys_own_ways_are_kept(model, embedding, packs):
    prompts = prompts_of("points", 3)
    expected, _ = official(model, embedding, prompts, True)
    heard: list[int] = []
    listened = copy.deepcopy(model)
    listened.mask_decoder.transformer.register_forward_hook(lambda *_: heard.append(1))
    results = [
        InferenceRuntime(listened, "fp32").decode(embedding, prompts)[0],
        InferenceRuntime(model, "fp32", backend="torch").decode(embedding, prompts)[0],
    ]
    with torch.autocast(DEVICE, torch.bfloat16):
        rounded, _ = InferenceRuntime(model, "fp32").decode(embedding, prompts)
    assert heard and not packs
    for low_res in results:
        assert relative_error(low_res, expected) <= TOLERANCE
    assert relative_error(rounded, expected) > TOLERANCE


@torch.no_grad()
@pytest.mark.skipif(DEVICE == "cpu", reason="streams need a GPU")
def test_what_is_kept_waits_for_the_stream_that_made_it(model, embedding):
    runtime = InferenceRuntime(model, "fp32")
    prompts = prompts_of("points", 3)
    expected, _ = runtime.decode(embedding, prompts)  # compiles the kernels
    embedding.cache.clear()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        torch.cuda._sleep(200_000_000)
        slow, _ = runtime.decode(embedding, prompts)
    with torch.cuda.stream(second):
        quick, _ = runtime.decode(embedding, prompts)
    torch.cuda.synchronize()
    assert torch.equal(slow, expected) and torch.equal(quick, expected)


def test_nothing_to_wait_for_on_a_cpu():
    Ready(torch.device("cpu")).wait([torch.zeros(1)])
