"""Building models: sizes of the published ones, names of their tensors, the registry."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from oracle import TINY, build_official

from sam_fast.modeling import Sam

# `from sam_fast import build_sam` gives the function of that name, as in the official package.
module = importlib.import_module("sam_fast.build_sam")

PUBLISHED = {
    "vit_b": (module.VIT_B, module.build_sam_vit_b, 93_735_472, 314),
    "vit_l": (module.VIT_L, module.build_sam_vit_l, 312_342_832, 482),
    "vit_h": (module.VIT_H, module.build_sam_vit_h, 641_090_608, 594),
}


@pytest.mark.parametrize("config, build, parameters, tensors", PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_have_the_official_tensors(config, build, parameters, tensors):
    with torch.device("meta"):  # shapes without memory
        sam = build()
        official = build_official(config)
    assert sum(parameter.numel() for parameter in sam.parameters()) == parameters
    state = sam.state_dict()
    assert len(state) == tensors
    expected = {name: tensor.shape for name, tensor in official.state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == expected
    assert list(state) == list(expected)


def test_registry():
    assert module.build_sam is module.build_sam_vit_h
    assert module.sam_model_registry == {
        "default": module.build_sam_vit_h,
        "vit_h": module.build_sam_vit_h,
        "vit_l": module.build_sam_vit_l,
        "vit_b": module.build_sam_vit_b,
        "nano": module.build_sam_nano,
    }


def test_a_model_is_built_in_eval_mode_and_finite():
    sam = module.build_sam_from_config(TINY)
    assert isinstance(sam, Sam)
    assert not any(part.training for part in sam.modules())
    assert all(tensor.isfinite().all() for tensor in sam.state_dict().values())


def test_other_decoder_sizes():
    config = dataclasses.replace(
        TINY, prompt_embed_dim=64, mask_in_chans=8, decoder_depth=1, decoder_num_heads=4, decoder_mlp_dim=96
    )
    sam = module.build_sam_from_config(config)
    record = {"image": torch.zeros(3, 200, 256), "original_size": (20, 26), "boxes": torch.tensor([[3.0, 4, 90, 80]])}
    assert sam([record], True)[0]["masks"].shape == (1, 3, 20, 26)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 250}, "image_size must be a multiple of patch_size, got 250 and 16"),
        ({"patch_size": 0}, "image_size must be a multiple"),
        ({"num_heads": 3}, "embed_dim must be a multiple of num_heads, got 128 and 3"),
        ({"global_attn_indexes": (1, 4)}, r"must lie in 0..3, got \(1, 4\)"),
    ],
    ids=lambda value: str(value),
)
def test_configurations_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_a_list_of_global_blocks_is_taken():
    assert dataclasses.replace(TINY, global_attn_indexes=[1, 3]) == TINY
