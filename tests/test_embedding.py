"""ImageEmbedding: used, saved, copied, and tied to the weights that made it."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sam_fast import ImageEmbedding, SamPredictor
from sam_fast.embedding import model_fingerprint


@pytest.fixture(scope="module")
def predictor(tiny_models) -> SamPredictor:
    return SamPredictor(tiny_models[1])


@pytest.fixture
def landscape(photo) -> np.ndarray:
    return photo[100:280, 50:350]


def test_set_image_returns_what_predict_accepts(predictor, photo, landscape):
    ours = predictor
    box = np.array([20, 30, 120, 140])
    first = ours.set_image(landscape)
    expected = ours.predict(box=box)
    ours.set_image(photo)
    for a, b in zip(ours.predict(box=box, embedding=first), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_saved_and_loaded(predictor, tmp_path, landscape):
    ours = predictor
    embedding = ours.set_image(landscape)
    embedding.cache["derived"] = torch.ones(3)
    embedding.metadata["file"] = "landscape.jpg"
    embedding.save(tmp_path / "image.safetensors")
    loaded = ImageEmbedding.load(tmp_path / "image.safetensors")
    assert torch.equal(loaded.features, embedding.features) and loaded.cache == {}
    assert loaded.metadata == {"file": "landscape.jpg"}
    assert (loaded.original_size, loaded.input_size) == (embedding.original_size, embedding.input_size)
    box = np.array([20, 30, 120, 140])
    for a, b in zip(ours.predict(box=box, embedding=loaded), ours.predict(box=box), strict=True):
        np.testing.assert_array_equal(a, b)


def test_of_another_model_raises(predictor, photo, tiny_models):
    ours = predictor
    embedding = ours.set_image(photo)
    other = copy.deepcopy(tiny_models[1])
    with torch.no_grad():
        other.image_encoder.patch_embed.proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="another model"):
        SamPredictor(other).predict(embedding=embedding)


def test_fingerprint_follows_the_weights(tiny_models, photo):
    model = copy.deepcopy(tiny_models[1])
    predictor = SamPredictor(model)
    embedding = predictor.set_image(photo)
    predictor.predict(embedding=embedding)
    with torch.no_grad():
        model.image_encoder.pos_embed.add_(0.1)
    with pytest.raises(ValueError, match="another model"):
        predictor.predict(embedding=embedding)


@pytest.mark.parametrize("damage", ["truncated", "text", "other safetensors"])
def test_damaged_file(predictor, photo, tmp_path, damage):
    path = tmp_path / "image.safetensors"
    predictor.set_image(photo).save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "text":
        path.write_text("not an embedding")
    else:
        save_file({"x": torch.ones(1)}, str(path))
    with pytest.raises(ValueError, match=r"image\.safetensors"):
        ImageEmbedding.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("original_size", "[8]"),
        ("input_size", "8"),
        ("image_size", "x"),
        ("metadata", "[1]"),
        ("original_size", "[Infinity, 8]"),
    ],
)
def test_damaged_metadata(predictor, landscape, tmp_path, name, value):
    path = tmp_path / "image.safetensors"
    predictor.set_image(landscape).save(path)
    with safe_open(str(path), framework="pt") as file:
        metadata, features = file.metadata(), file.get_tensor("features")
    save_file({"features": features}, str(path), metadata={**metadata, name: value})
    with pytest.raises(ValueError, match=r"image\.safetensors is not a readable image embedding"):
        ImageEmbedding.load(path)
    for changed, message in (({"format": "x"}, "not an image embedding of sam_fast$"), ({"version": "9"}, "reads 1$")):
        save_file({"features": features}, str(path), metadata={**metadata, **changed})
        with pytest.raises(ValueError, match=rf"image\.safetensors .*{message}"):
            ImageEmbedding.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        ImageEmbedding.load(tmp_path / "none.safetensors")


def test_copies_and_pickles_leave_the_cache_out(predictor, landscape):
    embedding = predictor.set_image(landscape)
    embedding.cache["derived"] = torch.ones(3)
    expected = predictor.predict()
    for other in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert other.cache == {} and other.features is not embedding.features
        for a, b in zip(predictor.predict(embedding=other), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    assert "derived" in embedding.cache


def test_to_its_own_device_is_itself(predictor, landscape):
    embedding = predictor.set_image(landscape)
    assert embedding.to("cpu") is embedding
    assert embedding.to("meta").device.type == "meta"


def test_fingerprint_overlooks_compilation(tiny):
    compiled = torch.compile(tiny.image_encoder, backend="eager")
    assert model_fingerprint(compiled) == model_fingerprint(tiny.image_encoder)


@pytest.mark.filterwarnings("ignore")  # torch announces the end of this way to quantise, which scripts still use
def test_fingerprint_of_quantised_weights(tiny):
    fingerprints = []
    for factor in (1, 1, 3):
        encoder = copy.deepcopy(tiny.image_encoder)
        with torch.no_grad():
            encoder.blocks[0].mlp.lin1.weight.mul_(factor)
        encoder = torch.ao.quantization.quantize_dynamic(encoder, {torch.nn.Linear})
        fingerprints.append(model_fingerprint(encoder))
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert fingerprints[0] != model_fingerprint(tiny.image_encoder)
