"""Learning rates, groups, drop path and the moving average."""

from __future__ import annotations

import pytest
import torch
from rectangles import tiny_sam

from sam_fast import SamConfig, build_sam_from_config
from sam_fast.modeling.layers import DropPath
from sam_fast.training.optim import MovingAverage, learning_rate, parameter_groups, set_drop_path


def test_groups_hold_every_parameter_once_with_its_layers_rate():
    model = tiny_sam()
    groups = parameter_groups(model, model.image_encoder, weight_decay=0.1, layer_decay=0.5)
    settings = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(settings) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    encoder, decoder = model.image_encoder, model.mask_decoder
    # depth 2: patches are three layers below the neck
    assert settings[id(encoder.patch_embed.proj.weight)] == (0.125, 0.1)
    assert settings[id(encoder.pos_embed)] == (0.125, 0.0)
    assert settings[id(encoder.blocks[0].mlp.lin1.weight)] == (0.25, 0.1)
    assert settings[id(encoder.blocks[1].attn.qkv.bias)] == (0.5, 0.0)
    assert settings[id(encoder.blocks[1].attn.rel_pos_h)] == (0.5, 0.0)
    assert settings[id(encoder.neck[0].weight)] == (1.0, 0.1)
    assert settings[id(decoder.iou_token.weight)] == settings[id(decoder.mask_tokens.weight)] == (1.0, 0.0)
    assert settings[id(decoder.transformer.layers[0].cross_attn_token_to_image.q_proj.weight)] == (1.0, 0.1)
    assert settings[id(model.prompt_encoder.point_embeddings[2].weight)] == (1.0, 0.0)
    assert settings[id(model.prompt_encoder.no_mask_embed.weight)] == (1.0, 0.0)
    model.extra = torch.nn.Parameter(torch.ones(2, 2))  # a name without a module before it
    extra = parameter_groups(model, encoder, weight_decay=0.1, layer_decay=0.5)
    assert [g["weight_decay"] for g in extra if any(p is model.extra for p in g["params"])] == [0.1]
    del model.extra
    encoder.requires_grad_(False)
    frozen = parameter_groups(model, encoder, weight_decay=0.1, layer_decay=0.5)
    assert {group["lr_scale"] for group in frozen} == {1.0}


def test_upscaling_behind_a_folding_neck_learns_slowly():
    config = SamConfig(
        embed_dim=32, depth=1, num_heads=2, global_attn_indexes=(0,), image_size=64, stem_channels=(8, 16)
    )
    model = build_sam_from_config(config)
    groups = parameter_groups(model, model.image_encoder, weight_decay=0.1, layer_decay=0.5)
    rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {rates[id(p)] for p in model.mask_decoder.output_upscaling.parameters()} == {0.1}
    assert {rates[id(p)] for p in model.mask_decoder.output_hypernetworks_mlps.parameters()} == {1.0}
    assert {rates[id(p)] for p in model.image_encoder.patch_embed.parameters()} == {0.25}


def test_schedules():
    def rate(step, schedule):
        return learning_rate(step, base=8e-4, warmup=250, steps=90_000, schedule=schedule)

    for schedule in ("cosine", "linear", "step", "constant"):
        assert rate(0, schedule) == pytest.approx(8e-4 / 250)
        assert rate(249, schedule) == pytest.approx(8e-4)
    assert [rate(step, "step") for step in (59_999, 60_000, 86_665, 86_666)] == pytest.approx([8e-4, 8e-5, 8e-5, 8e-6])
    assert rate(90_000, "cosine") == pytest.approx(8e-6) == rate(90_000, "linear")
    middle = 250 + (90_000 - 250) / 2
    assert rate(middle, "cosine") == pytest.approx(8e-4 * 0.505) == rate(middle, "linear")
    assert rate(89_999, "constant") == 8e-4

    def rate_by_clock(step, schedule, elapsed):
        return learning_rate(step, base=8e-4, warmup=0, steps=90_000, schedule=schedule, elapsed=elapsed)

    assert rate_by_clock(10, "linear", 0.5) == pytest.approx(8e-4 * 0.505) == rate_by_clock(45_000, "linear", 0.1)
    assert rate_by_clock(10, "step", 0.7) == pytest.approx(8e-5)
    assert rate_by_clock(10, "cosine", 1.1) == pytest.approx(8e-6)

    def rate_in_warmup(step, elapsed):
        return learning_rate(step, base=8e-4, warmup=250, steps=90_000, schedule="linear", elapsed=elapsed)

    assert rate_in_warmup(124, 0.5) == pytest.approx(8e-4 * 0.505 / 2), "few steps, and half of the time is over"
    assert rate_in_warmup(249, 0.5) == pytest.approx(rate_in_warmup(250, 0.5)), "no jump"
    with pytest.raises(ValueError, match="schedule"):
        rate(3, "no")


def test_drop_path_keeps_the_expectation():
    drop = DropPath(0.25).train()
    torch.manual_seed(0)
    branch = torch.ones(20_000, 1, 2)
    dropped = drop(branch)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 4 / 3]))
    assert dropped.mean() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(dropped[..., 0], dropped[..., 1]), "whole samples"
    assert drop.eval()(branch) is branch


def test_drop_rates_grow_with_depth():
    encoder = tiny_sam().image_encoder
    set_drop_path(encoder, 0.4)
    assert [block.drop_path.rate for block in encoder.blocks] == [0.0, 0.4]


def test_moving_average():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    average = MovingAverage(model, 0.8)
    value = 1.0
    for step, new in enumerate([3.0, -1.0, 5.0]):
        torch.nn.init.constant_(model.weight, new)
        decay = min(0.8, (1 + step) / (10 + step))
        value = decay * value + (1 - decay) * new
        average.update(model, step)
    assert average.state_dict()["weight"].item() == pytest.approx(value)
    assert MovingAverage(model, 0.0).state_dict()["weight"].item() == 5.0
