"""`SamOnnxModel` against the published one in torch, and the exported file against both in ONNX Runtime."""

import functools
import importlib.util
from importlib import resources

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from sam_fast.build_sam import build_sam_from_config
from sam_fast.utils.onnx import SamOnnxModel, export_onnx_model, quantize_onnx_model
from tests.oracle import TINY, build_official, official, seed_weights

OfficialOnnxModel = official.utils.onnx.SamOnnxModel


class DefinedScores(OfficialOnnxModel):
    """The published module, kept from choosing a mask because its score is NaN (see `SamOnnxModel.select_masks`)."""

    def select_masks(self, masks, iou_preds, num_points):
        return super().select_masks(masks, iou_preds.nan_to_num(), num_points)


# Logits reach tens to hundreds; float32 sums in another order differ in the last digits of the largest term.
LOGITS = {"rtol": 1e-4, "atol": 5e-3}
# A stability score moves by one pixel over the area of the mask when that pixel lies at the very threshold.
SCORES = {"rtol": 1e-5, "atol": 2e-3}


@pytest.fixture(scope="module")
def ours():
    return seed_weights(build_sam_from_config(TINY)).eval()


@pytest.fixture(scope="module")
def theirs():
    return seed_weights(build_official(TINY))


@functools.cache
def photo_embedding() -> torch.Tensor:
    """The embedding [1,C,h,w] of a photo by the published encoder."""
    with Image.open(str(resources.files("sam_fast") / "assets/photos/coffee.jpg")) as photo:
        pixels = np.array(photo.resize((TINY.image_size, TINY.image_size)))
    sam = seed_weights(build_official(TINY))
    with torch.no_grad():
        return sam.image_encoder(sam.preprocess(torch.from_numpy(pixels).permute(2, 0, 1)[None]))


def make_inputs(
    prompts: int = 1, points: int = 5, size: tuple[float, float] = (150.0, 225.0), has_mask: float = 1.0, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    side = TINY.image_size // TINY.patch_size
    return {
        "image_embeddings": photo_embedding(),
        "point_coords": torch.rand(prompts, points, 2, generator=generator) * TINY.image_size,
        "point_labels": torch.randint(-1, 4, (prompts, points), generator=generator).float(),
        "mask_input": 5 * torch.randn(1, 1, 4 * side, 4 * side, generator=generator),
        "has_mask_input": torch.tensor([has_mask]),
        "orig_im_size": torch.tensor(size),
    }


def assert_same_outputs(result, expected) -> None:
    assert len(result) == len(expected)
    for ours, theirs in zip(result, expected, strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if ours.dtype == np.int64:
            assert np.abs(ours - theirs).max() <= 2  # areas: pixels at the very threshold
        else:
            tolerance = LOGITS if ours.ndim == 4 else SCORES
            np.testing.assert_allclose(np.nan_to_num(ours), np.nan_to_num(theirs), **tolerance)


@pytest.mark.parametrize("extra", [False, True], ids=["plain", "extra_metrics"])
@pytest.mark.parametrize("stability", [False, True], ids=["iou", "stability"])
@pytest.mark.parametrize("single", [False, True], ids=["all", "single"])
def test_module_equals_official(ours, theirs, single, stability, extra):
    model, reference = SamOnnxModel(ours, single, stability, extra), DefinedScores(theirs, single, stability, extra)
    inside = []
    for prompts, points, size, has_mask in [
        (1, 1, (150.0, 225.0), 1.0),
        (1, 2, (300.0, 101.0), 0.0),
        (2, 3, (256.0, 256.0), 0.0),
        (3, 7, (5.0, 9.0), 1.0),
    ]:
        inputs = make_inputs(prompts, points, size, has_mask)
        result, expected = model(**inputs), reference(**inputs)
        assert_same_outputs(result, expected)
        inside.append((expected[0] > 0).float().mean())
    assert any(0.01 < share < 0.99 for share in inside), inside


def test_positional_arguments_as_in_the_published_class(ours):
    model = SamOnnxModel(ours, True, False, True)
    assert model.return_single_mask and model.return_extra_metrics and not model.use_stability_score
    assert (model.img_size, model.stability_score_offset) == (TINY.image_size, 1.0)
    assert len(model(*make_inputs().values())) == 5


@pytest.mark.parametrize("points", [1, 2, 3, 9])
def test_select_masks_follows_the_number_of_points(ours, theirs, points):
    generator = torch.Generator().manual_seed(points)
    masks, scores = torch.rand(6, 4, 3, 5, generator=generator), torch.rand(6, 4, generator=generator)
    result = SamOnnxModel(ours, True).select_masks(masks, scores, points)
    expected = OfficialOnnxModel(theirs, True).select_masks(masks, scores, points)
    for mine, reference in zip(result, expected, strict=True):
        assert torch.equal(mine, reference)
    assert bool((result[1] == scores[:, :1]).all()) == (points >= 3)


def test_select_masks_never_prefers_an_undefined_score(ours):
    scores = torch.tensor([[float("nan"), 0.2, float("nan"), 0.3]])
    masks = torch.arange(4.0).reshape(1, 4, 1, 1)
    model = SamOnnxModel(ours, True)
    assert [model.select_masks(masks, scores, points)[0].item() for points in (1, 3)] == [3, 0]


@pytest.mark.parametrize("size", [(150, 225), (1, 1), (20000, 333), (31, 1023)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_resize_longest_image_size_equals_official(size):
    result = SamOnnxModel.resize_longest_image_size(torch.tensor(size), 1024)
    assert torch.equal(result, OfficialOnnxModel.resize_longest_image_size(torch.tensor(size), 1024))


def test_resize_longest_image_size_keeps_a_pixel():
    assert SamOnnxModel.resize_longest_image_size(torch.tensor([20000, 5]), 1024).tolist() == [1024, 1]


def run(path, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


def io_names(path) -> tuple[list[str], list[str]]:
    graph = onnx.load(str(path)).graph
    return [entry.name for entry in graph.input], [entry.name for entry in graph.output]


@pytest.fixture(scope="module")
def plain_file(ours, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "decoder.onnx"
    export_onnx_model(ours, path)
    return path


@pytest.mark.parametrize(
    ("prompts", "points", "size", "has_mask"),
    [
        (1, 5, (150.0, 225.0), 1.0),
        (1, 1, (7.0, 1.0), 0.0),
        (1, 2, (256.0, 256.0), 1.0),
        (4, 9, (613.0, 200.0), 0.0),
    ],
)
def test_file_equals_official_in_torch(theirs, plain_file, prompts, points, size, has_mask):
    inputs = make_inputs(prompts, points, size, has_mask, seed=points)
    expected = OfficialOnnxModel(theirs, False)(**inputs)
    assert_same_outputs(run(plain_file, inputs), expected)
    assert expected[0].shape == (prompts, 4, int(size[0]), int(size[1]))


def test_file_equals_the_official_export(theirs, plain_file, tmp_path):
    # The published export freezes the size of the example image, so the comparison keeps to that size.
    inputs = make_inputs()
    names = list(inputs)
    with pytest.warns():
        torch.onnx.export(
            OfficialOnnxModel(theirs, False),
            tuple(inputs.values()),
            str(tmp_path / "official.onnx"),
            input_names=names,
            output_names=["masks", "iou_predictions", "low_res_masks"],
            opset_version=17,
            dynamic_axes={"point_coords": {1: "num_points"}, "point_labels": {1: "num_points"}},
            dynamo=False,
        )
    assert io_names(tmp_path / "official.onnx") == io_names(plain_file)
    for points in (5, 2):
        inputs = make_inputs(points=points, seed=points)
        assert_same_outputs(run(plain_file, inputs), run(tmp_path / "official.onnx", inputs))


def test_file_holds_no_image_encoder(plain_file):
    decoder = sum(p.numel() for name, p in build_official(TINY).named_parameters() if "image_encoder" not in name)
    assert plain_file.stat().st_size < 4.2 * decoder + 500_000


def test_all_options_together(ours, theirs, tmp_path):
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    path, small = tmp_path / "single.onnx", tmp_path / "small.onnx"
    export_onnx_model(
        ours,
        path,
        return_single_mask=True,
        opset=17,
        gelu_approximate=True,
        use_stability_score=True,
        return_extra_metrics=True,
    )
    assert {entry.version for entry in onnx.load(str(path)).opset_import if entry.domain == ""} == {17}
    assert io_names(path)[1] == ["masks", "iou_predictions", "stability_scores", "areas", "low_res_masks"]
    # The model itself still has its weights and the exact GELU.
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    assert {m.approximate for m in ours.modules() if isinstance(m, torch.nn.GELU)} == {"none"}

    reference = DefinedScores(theirs, True, True, True)
    gelus = [module for module in reference.modules() if isinstance(module, torch.nn.GELU)]
    for module in gelus:
        module.approximate = "tanh"
    inputs = make_inputs(prompts=2, points=4, size=(180.0, 77.0))
    expected = reference(**inputs)
    for module in gelus:
        module.approximate = "none"
    assert_same_outputs(run(path, inputs), expected)

    quantize_onnx_model(path, small)
    assert small.stat().st_size < 0.4 * path.stat().st_size
    quantized = run(small, inputs)
    agreement = ((quantized[0] > 0) == (expected[0].numpy() > 0)).mean()
    assert agreement > 0.9  # 8-bit weights move the borders of random masks


def test_export_says_what_is_missing(ours, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="16"):
        export_onnx_model(ours, tmp_path / "old.onnx", opset=16)
    (tmp_path / "kept.onnx").write_text("of an earlier export")
    with pytest.raises(RuntimeError, match="cannot write opset 99"):
        export_onnx_model(ours, tmp_path / "kept.onnx", opset=99)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.onnx"]
    assert (tmp_path / "kept.onnx").read_text() == "of an earlier export"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export_onnx_model(ours, tmp_path / "nowhere" / "decoder.onnx")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(RuntimeError, match=r"onnxscript.*sam_fast\[onnx\]"):
        export_onnx_model(ours, tmp_path / "missing.onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    with pytest.raises(RuntimeError, match=r"onnxruntime.*sam_fast\[onnx\]"):
        quantize_onnx_model(tmp_path / "missing.onnx", tmp_path / "small.onnx")
