"""Precisions: what they resolve to, and what they cost in masks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import PHOTOS, needs_8_bits
from oracle import TINY, relative_error
from PIL import Image
from torch import nn

from sam_fast import SamAutomaticMaskGenerator, SamPredictor, native, sam_model_registry
from sam_fast.build_sam import build_sam_from_config
from sam_fast.cli.demo import NANO_SETTINGS
from sam_fast.runtime import InferenceRuntime, decoding, inference, plain, resolve_precision
from sam_fast.runtime import precision as precisions
from sam_fast.runtime.cpu_decoder import can_narrow_pixels
from sam_fast.runtime.inference import Prompts
from sam_fast.runtime.linears import BFloat16Linear, Int8Linear, block_linears
from sam_fast.runtime.precision import advice_for_cpu

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.int8)],
)
def test_precision_on_a_cpu(precision, dtype):
    assert resolve_precision(precision, CPU) == dtype


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_on_a_gpu_is_bf16_where_the_gpu_has_it(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert resolve_precision("auto", torch.device("cuda")) == (torch.bfloat16 if has_bf16 else torch.float32)
    assert resolve_precision("fp16", torch.device("cuda")) == torch.float16


def test_fp16_on_a_cpu_raises():
    with pytest.raises(RuntimeError, match="CUDA device"):
        resolve_precision("fp16", CPU)


def test_int8_on_a_gpu_raises():
    with pytest.raises(RuntimeError, match="runs on CPUs"):
        resolve_precision("int8", torch.device("cuda"))


def test_advice_follows_the_instructions(monkeypatch):
    for bf16, vnni, expected in (
        (True, True, "bf16 and int8 are faster"),
        (False, True, "int8 is faster"),
        (False, False, "a little"),
    ):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=bf16: value)
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda value=vnni: value)
        assert expected in advice_for_cpu()


def test_unknown_precision_raises():
    with pytest.raises(ValueError, match="'int3'"):
        resolve_precision("int3", CPU)


# -- linear layers


@pytest.mark.parametrize("narrow, tolerance", [(BFloat16Linear, 0.005), (Int8Linear, 0.02)])
@torch.no_grad()
def test_narrow_layers_are_close(narrow, tolerance):
    torch.manual_seed(0)
    for bias in (True, False):
        layer = nn.Linear(200, 96, bias=bias)
        x = torch.randn(3, 5, 200)
        assert 0 < relative_error(narrow(layer)(x), layer(x)) <= tolerance


@torch.no_grad()
def test_int8_has_a_scale_per_token():
    torch.manual_seed(0)
    layer = nn.Linear(64, 40)
    x = torch.randn(6, 64)
    x[0] *= 1e4  # with one scale for all tokens the others would be zero
    x[1] = 0
    got, expected = Int8Linear(layer)(x), layer(x)
    for token in range(6):
        assert relative_error(got[token], expected[token]) <= 0.03
    assert torch.equal(got[1], layer.bias)


# -- inside the runtime


@torch.no_grad()
def test_narrow_weights_follow_the_model(tiny, photo):
    model = copy.deepcopy(tiny)
    predictor = SamPredictor(model, precision="int8")
    predictor.set_image(photo)
    first = predictor.features
    predictor.set_image(photo)
    assert torch.equal(predictor.features, first)
    assert 0 < relative_error(first, InferenceRuntime(model).encode(*_resized(predictor, photo))[0].features) < 0.1
    model.image_encoder.blocks[1].mlp.lin1.weight.mul_(1.5)
    predictor.set_image(photo)
    assert relative_error(predictor.features, first) > 0.01


def _resized(predictor, photo):
    pixels = torch.from_numpy(predictor.transform.apply_image(photo)).permute(2, 0, 1)[None].float()
    return pixels, [photo.shape[:2]]


@torch.no_grad()
def test_int8_needs_layers_that_it_knows(tiny, photo):
    model = copy.deepcopy(tiny)

    class Adapted(nn.Linear):
        pass

    model.image_encoder.blocks[0].attn.proj.__class__ = Adapted
    with pytest.raises(RuntimeError, match="plain image encoder"):
        SamPredictor(model, precision="int8").set_image(photo)
    with pytest.raises(RuntimeError, match="float32 weights"):
        SamPredictor(copy.deepcopy(tiny).half(), precision="int8").set_image(photo)


# -- what they cost, with trained weights


@pytest.fixture(scope="module")
def nano():
    return sam_model_registry["nano"]()


@pytest.mark.parametrize("precision, least, counts", [("bf16", 0.99, 0.02), ("int8", 0.97, 0.05)])
def test_masks_of_trained_weights_stay(precision, least, counts, nano):
    check_masks(precision, least, counts, nano)


@pytest.mark.parametrize(
    "precision, least, counts", [("bf16", 0.995, 0.02), pytest.param("fp8", 0.965, 0.05, marks=needs_8_bits)]
)
def test_masks_of_trained_weights_stay_on_a_gpu(precision, least, counts, nano, monkeypatch):
    """The arithmetic of encoder and decoder there, on whatever device there is."""
    if torch.cuda.is_available():
        nano = copy.deepcopy(nano).cuda()
    else:
        monkeypatch.setattr(plain, "PACKED_ON", {"cpu"})
        monkeypatch.setattr(decoding, "unavailable_reason", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        dtype = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
        for module in (inference, decoding, precisions):
            monkeypatch.setattr(module, "resolve_precision", lambda name, device: dtype.get(name, torch.float32))
    check_masks(precision, least, counts, nano)


@torch.no_grad()
def check_masks(precision, least, counts, nano):
    """Mean IoU with float32's masks over all photos, clicks on a grid; and how many records the generator makes."""
    reference, narrow = SamPredictor(nano, precision="fp32"), SamPredictor(nano, precision=precision)
    ious, records = [], []
    for path in sorted(PHOTOS.glob("*.jpg")):
        image = np.asarray(Image.open(path).convert("RGB"))
        sides = torch.linspace(30, 480, 6)
        points = torch.cartesian_prod(sides, sides)[:, None].to(nano.device)
        masks = []
        for predictor in (reference, narrow):
            predictor.set_image(image)
            masks.append(predictor.predict_torch(points, torch.ones(36, 1, device=nano.device))[0].flatten(2))
        both, either = (masks[0] & masks[1]).sum(2), (masks[0] | masks[1]).sum(2)
        # The mask of a part is often empty where there is none: of a tenth of all on a photo.
        assert (masks[0].sum(2) > 0).float().mean() > 0.85
        ious.append(torch.where(either > 0, both / either, 1.0).mean())
        settings = {**NANO_SETTINGS, "points_per_side": 12}
        records.append(
            [len(SamAutomaticMaskGenerator(nano, precision=p, **settings).generate(image)) for p in ("fp32", precision)]
        )
    assert torch.stack(ious).mean() >= least
    expected, got = np.sum(records, axis=0)
    assert expected > 50 and abs(got - expected) <= counts * expected


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("pixels", [torch.bfloat16, None], ids=["bf16 pixels", "fp32 pixels"])
@torch.no_grad()
def test_one_embedding_decoded_in_several_precisions(precision, pixels, tiny, photo, monkeypatch):
    """On whatever CPU: where it does not multiply bfloat16, kernels compute the same with other instructions."""
    monkeypatch.setattr(native, "multiplies_bfloat16", lambda: pixels is not None)
    exact, narrow = InferenceRuntime(tiny, "fp32"), InferenceRuntime(tiny, precision)
    (embedding,) = exact.encode(*_resized(SamPredictor(tiny), photo))
    generator = torch.Generator().manual_seed(0)
    clicks = torch.rand(5, 2, 2, generator=generator) * 200
    many = torch.rand(2, 14, 2, generator=generator) * 200  # with the output tokens too many for the absorbed decoder
    masks = torch.randn(5, 1, 64, 64, generator=generator)
    cases = {
        "clicks": Prompts(clicks, torch.ones(5, 2)),
        "masks": Prompts(clicks, torch.ones(5, 2), masks=masks),
        "many tokens": Prompts(many, torch.ones(2, 14)),
    }
    for name, prompts in cases.items():
        with torch.autocast("cpu", torch.bfloat16):  # first: the embedding keeps projections of either kind
            cast = [runtime.decode(embedding, prompts)[0] for runtime in (exact, narrow)]
        expected = exact.decode(embedding, prompts)
        got = narrow.decode(embedding, prompts)
        errors = [relative_error(ours, theirs) for ours, theirs in zip(got, expected, strict=True)]
        assert all(x.dtype == torch.float32 for x in got)
        assert max(errors) <= (1e-6 if pixels is None else 0.02) and (errors[0] > 0) == (pixels is not None), name
        assert all(relative_error(logits, expected[0]) <= 0.05 for logits in cast), name
        for ours, again in zip(narrow.decode(embedding, prompts), got, strict=True):
            assert torch.equal(ours, again), name
        assert torch.equal(exact.decode(embedding, prompts)[0], expected[0]), name


def test_models_that_native_operations_do_not_take_stay_float32(monkeypatch):
    monkeypatch.setattr(native, "multiplies_bfloat16", lambda: True)
    block = build_sam_from_config(TINY).image_encoder.blocks[0]
    for heads, dtype in ((block.attn.num_heads, torch.bfloat16), (block.attn.qkv.in_features // 4, torch.float32)):
        block.attn.num_heads = heads  # at last heads of 4 channels
        for narrow in (torch.bfloat16, torch.int8):
            assert block_linears(block, narrow).attention == dtype
    assert block_linears(block, torch.bfloat16, backend="torch").attention == torch.float32
    decoder = build_sam_from_config(TINY).mask_decoder
    assert can_narrow_pixels(decoder)
    decoder.transformer.layers[1].cross_attn_image_to_token.num_heads = 4
    assert not can_narrow_pixels(decoder)
    assert not can_narrow_pixels(build_sam_from_config(TINY).mask_decoder.double())
