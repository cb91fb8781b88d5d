"""Reading checkpoints of every kind, and refusing what is none."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import stat

import pytest
import safetensors.torch
import torch
import transformers
from oracle import TINY, relative_error, seed_weights
from safetensors import SafetensorError

from sam_fast.build_sam import build_sam_from_config, sam_model_registry
from sam_fast.checkpoints import load_checkpoint, read_state_dict, write_tensors


@pytest.fixture(scope="module")
def state(tiny) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tiny.state_dict().items()}


def _assert_equal(model, state):
    loaded = model.state_dict()
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert loaded[name].device.type == "cpu"
        assert torch.equal(loaded[name], tensor), name


def _save_nested(state, path):
    torch.save({"model": state, "epoch": 3}, path)


def _save_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


SAVERS = {
    "pth": torch.save,
    "legacy-pth": _save_legacy,
    "nested-pth": _save_nested,
    "safetensors": safetensors.torch.save_file,
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_files_are_read_whatever_their_name(save, state, tmp_path):
    path = tmp_path / "weights"
    save(state, path)
    model = build_sam_from_config(TINY, path)
    os.unlink(path)  # nothing of the model may still be a view of the file
    _assert_equal(model, state)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_a_model_built_from_a_file_predicts(tiny, state, tmp_path, tiny_image):
    torch.save(state, tmp_path / "tiny.pth")
    record = {"image": tiny_image, "original_size": (192, 256), "boxes": torch.tensor([[20.0, 30, 150, 120]])}
    loaded = build_sam_from_config(TINY, str(tmp_path / "tiny.pth"))
    assert torch.equal(loaded([record], True)[0]["low_res_logits"], tiny([record], True)[0]["low_res_logits"])


def test_loading_into_an_existing_model_keeps_its_dtype(state, tmp_path):
    half = {name: tensor.half() for name, tensor in state.items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    existing = build_sam_from_config(TINY)
    load_checkpoint(existing, tmp_path / "half.safetensors")
    _assert_equal(existing, {name: tensor.float() for name, tensor in half.items()})
    _assert_equal(build_sam_from_config(TINY, tmp_path / "half.safetensors"), existing.state_dict())


# Hugging Face


@pytest.fixture(scope="module")
def hugging_face_model() -> transformers.SamModel:
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": TINY.embed_dim,
            "num_hidden_layers": TINY.depth,
            "num_attention_heads": TINY.num_heads,
            "image_size": TINY.image_size,
            "window_size": TINY.window_size,
            "global_attn_indexes": list(TINY.global_attn_indexes),
            "mlp_dim": int(TINY.embed_dim * TINY.mlp_ratio),
        },
        prompt_encoder_config={"image_size": TINY.image_size, "image_embedding_size": 16},
        mask_decoder_config={"layer_norm_eps": 1e-5},  # its default, 1e-6, is not what the official decoder has
    )
    model = transformers.SamModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def _save_directory_safetensors(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def _save_directory_bin(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path


def _save_single_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    return (tmp_path / "model.safetensors").rename(tmp_path / "my_sam.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("save", [_save_directory_safetensors, _save_directory_bin, _save_single_file])
def test_hugging_face_checkpoint_gives_equal_outputs(save, hugging_face_model, tmp_path, tiny_image):
    ours = build_sam_from_config(TINY, save(hugging_face_model, tmp_path))
    pixels = ours.preprocess(tiny_image)[None]
    points, labels = torch.tensor([[[60.0, 70.0], [150, 20]]]), torch.tensor([[1, 0]])
    theirs = hugging_face_model(pixel_values=pixels, input_points=points[None], input_labels=labels[None])
    embedding = ours.image_encoder(pixels)
    sparse, dense = ours.prompt_encoder((points, labels), None, None)
    masks, iou = ours.mask_decoder(embedding, ours.prompt_encoder.get_dense_pe(), sparse, dense, True)
    # The same float32 formulas in another order of summation.
    assert relative_error(embedding, hugging_face_model.get_image_embeddings(pixels)) <= 1e-5
    assert relative_error(masks, theirs.pred_masks[0]) <= 1e-4
    assert relative_error(iou, theirs.iou_scores[0]) <= 1e-5


# Another image size


@pytest.mark.parametrize("image_size", [512, 160])
@torch.no_grad()
def test_positions_are_interpolated_to_the_image_size(image_size, tiny, state, tmp_path):
    torch.save(state, tmp_path / "tiny.pth")
    other = build_sam_from_config(dataclasses.replace(TINY, image_size=image_size), tmp_path / "tiny.pth")
    grid = image_size // 16
    assert other.image_encoder.pos_embed.shape == (1, grid, grid, 128)
    assert other.image_encoder.blocks[1].attn.rel_pos_h.shape == (2 * grid - 1, 64)
    assert torch.equal(other.image_encoder.blocks[0].attn.rel_pos_h, tiny.image_encoder.blocks[0].attn.rel_pos_h)
    image = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    # The same interpolation, once on load and once on the fly.
    assert relative_error(other.image_encoder(image), tiny.image_encoder(image)) <= 1e-5


def test_other_windows_are_not_interpolated(state, tmp_path):
    torch.save(state, tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"wrong shape: .*rel_pos_h \(11, 64\) instead of \(15, 64\)"):
        build_sam_from_config(dataclasses.replace(TINY, window_size=8), tmp_path / "tiny.pth")


# Files that are no checkpoint of this model


def test_weights_of_another_model_are_recognised(tmp_path):
    names = {"vit_b": (12, 768), "vit_l": (24, 1024), "x": (7, 768)}
    for kind, (depth, channels) in names.items():
        state = {f"image_encoder.blocks.{i}.norm1.weight": torch.ones(channels) for i in range(depth)}
        write_tensors(tmp_path / kind, state)
    for kind, wanted, hint in (
        ("vit_b", "vit_l", " does not fit this model: it is of vit_b; missing: "),
        ("vit_l", "nano", " does not fit this model: it is of vit_l; missing: "),
        ("vit_b", "vit_b", " does not fit this model; missing: "),
        ("x", "vit_b", " does not fit this model; missing: "),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / kind}{hint}")):
            sam_model_registry[wanted](checkpoint=tmp_path / kind)


def test_missing_unexpected_and_misshapen_keys_are_named(state, tmp_path):
    path = tmp_path / "broken.pth"
    wrong = dict(state)
    del wrong["mask_decoder.iou_token.weight"]
    wrong["mask_decoder.extra"] = torch.zeros(1)
    wrong["image_encoder.neck.0.weight"] = torch.zeros(256, 64, 1, 1)
    torch.save(wrong, path)
    model = seed_weights(build_sam_from_config(TINY), seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_checkpoint(model, path)
    for part in (
        str(path),
        "missing: mask_decoder.iou_token.weight",
        "unexpected: mask_decoder.extra",
        "wrong shape: image_encoder.neck.0.weight (256, 64, 1, 1) instead of (256, 128, 1, 1)",
    ):
        assert part in str(error.value)
    _assert_equal(model, before)  # nothing was half loaded


def test_long_lists_of_keys_are_cut(tmp_path):
    torch.save({f"resnet.{index}": torch.zeros(1) for index in range(9)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"unexpected: resnet.0, .*resnet.4 and 4 more"):
        build_sam_from_config(TINY, tmp_path / "resnet.pth")


class _Attack:
    """Unpickling this makes a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return (open, (self.victim, "w"))


@pytest.mark.parametrize(
    "dump", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))], ids=["zip", "pickle"]
)
def test_code_in_a_checkpoint_is_not_run(dump, tmp_path):
    path, victim = tmp_path / "evil.pth", tmp_path / "victim"
    dump({"image_encoder.pos_embed": _Attack(str(victim))}, path)
    with pytest.raises(ValueError, match=r"evil\.pth is not a readable checkpoint"):
        read_state_dict(path)
    assert not victim.exists()


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_truncated_files_are_refused(share, save, state, tmp_path):
    path = tmp_path / "half.pth"
    save(state, path)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match=r"half\.pth"):
        build_sam_from_config(TINY, path)


@pytest.mark.parametrize(
    "content", [b"", b"<html>404 Not Found</html>", b"\0" * 300, b"PK\x03\x04", b"\xff" * 8 + b"{}"], ids=repr
)
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "page.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"page\.pth"):
        read_state_dict(tmp_path / "page.pth")


@pytest.mark.parametrize("value", [torch.zeros(3), [1, 2], {}, {"a": 1}, {3: torch.zeros(1)}], ids=repr)
def test_other_contents_are_refused(value, tmp_path):
    torch.save(value, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds a"):
        read_state_dict(tmp_path / "other.pth")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nothing\.pth"):
        read_state_dict(tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors, pytorch_model\.bin"):
        read_state_dict(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_others_may_read_weights_where_they_may_read_new_files(tmp_path, umask):
    path = tmp_path / "model.safetensors"
    before = os.umask(umask)
    try:
        write_tensors(path, {"x": torch.ones(2)})
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
        path.chmod(0o600)
        write_tensors(path, {"x": torch.zeros(3)}, {"format": "f"})
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, "as it was"
    finally:
        os.umask(before)
    assert safetensors.torch.load_file(path)["x"].tolist() == [0, 0, 0]
    with pytest.raises(OSError, match=r"could not be written|No such file"):
        write_tensors(tmp_path / "missing" / "x.safetensors", {"x": torch.ones(2)})


def test_what_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise SafetensorError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="could not be written: disk full"):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)})
    assert not list(tmp_path.iterdir())
