"""The encoder that inference uses on a CPU, against the plain one and the official one."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from oracle import TINY, build_official, relative_error, seed_weights
from torch import nn

from sam_fast import sam_model_registry
from sam_fast.build_sam import build_sam_from_config
from sam_fast.modeling.image_encoder import Block
from sam_fast.runtime.image_encoder import can_encode, encode
from sam_fast.runtime.inference import InferenceRuntime

TOLERANCE = 1e-5  # float32, sums in another order (contract: 1e-4; measured: 1e-6 for ViT-B)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window_size": 8},
        {"window_size": 7},
        {"window_size": 20},
        {"global_attn_indexes": ()},
        {"image_size": 144, "num_heads": 4},
    ],
    ids=str,
)
@torch.no_grad()
def test_equals_official(changes):
    config = dataclasses.replace(TINY, **changes)
    official = seed_weights(build_official(config), seed=1).eval()
    ours = seed_weights(build_sam_from_config(config), seed=1).eval()
    images = torch.randn(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    assert can_encode(ours.image_encoder)
    before = images.clone()
    assert relative_error(encode(ours.image_encoder, images), official.image_encoder(images)) <= TOLERANCE
    assert torch.equal(images, before)


@torch.no_grad()
def test_other_sizes_and_the_stem_of_nano():
    encoder = sam_model_registry["nano"]().image_encoder.eval()
    images = torch.randn(1, 3, 256, 384, generator=torch.Generator().manual_seed(0))
    assert can_encode(encoder)
    assert relative_error(encode(encoder, images), encoder(images)) <= TOLERANCE
    with pytest.raises(ValueError, match="multiples of 16"):
        encode(encoder, images[..., 1:])


@torch.no_grad()
def test_layers_that_compute_something_else_run_as_they_are(tiny, photo):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    class Own(Block):
        pass

    for change in (
        lambda e: setattr(e.blocks[0].attn, "proj", Adapted(*reversed(e.blocks[0].attn.proj.weight.shape))),
        lambda e: setattr(e.blocks[1].mlp, "act", nn.ReLU()),
        lambda e: setattr(e.blocks[1].mlp, "act", nn.GELU(approximate="tanh")),
        lambda e: setattr(e.blocks[0], "__class__", Own),
        lambda e: e.train(),
    ):
        model = copy.deepcopy(tiny)
        change(model.image_encoder)
        assert not can_encode(model.image_encoder)
        images = torch.randint(0, 256, (1, 3, 256, 256)).float()
        (embedding,) = InferenceRuntime(model).encode(images, [(256, 256)])
        torch.testing.assert_close(embedding.features, model.image_encoder(model.preprocess(images)))


@torch.no_grad()
def test_hooks_are_called_and_replaced_forwards_are_used(tiny, photo):
    model = copy.deepcopy(tiny)
    images = torch.randint(0, 256, (1, 3, 256, 256)).float()
    runtime = InferenceRuntime(model)
    plain = runtime.encode(images, [(256, 256)])[0].features
    seen = []
    handle = model.image_encoder.blocks[1].attn.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(runtime.encode(images, [(256, 256)])[0].features, plain, rtol=1e-4, atol=1e-4)
    assert seen == [1]
    handle.remove()
    assert can_encode(model.image_encoder)
    block = model.image_encoder.blocks[0]
    block.forward = lambda x: x
    changed = runtime.encode(images, [(256, 256)])[0].features
    assert relative_error(changed, plain) > 0.01
    del block.forward
    assert torch.equal(runtime.encode(images, [(256, 256)])[0].features, plain)


@torch.no_grad()
def test_autocast_of_the_caller_is_respected(tiny):
    images = torch.randint(0, 256, (1, 3, 256, 256), generator=torch.Generator().manual_seed(0)).float()
    runtime = InferenceRuntime(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = runtime.encode(images, [(256, 256)])[0].features
        expected = tiny.image_encoder(tiny.preprocess(images)).float()
    assert torch.equal(narrow, expected)
    assert relative_error(narrow, runtime.encode(images, [(256, 256)])[0].features) > 1e-4


@torch.no_grad()
def test_backends_agree(tiny):
    images = torch.randint(0, 256, (1, 3, 256, 256), generator=torch.Generator().manual_seed(0)).float()
    native, reference = (
        InferenceRuntime(tiny, backend=backend).encode(images, [(256, 256)])[0].features
        for backend in ("native", "torch")
    )
    assert relative_error(native, reference) <= TOLERANCE
