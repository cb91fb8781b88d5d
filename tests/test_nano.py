"""nano, the trained model in the package: what it is, and that it segments what it has never seen."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from oracle import build_official, official
from records import assert_same_records

from sam_fast import SamAutomaticMaskGenerator, sam_model_registry
from sam_fast.build_sam import NANO, build_sam_from_config, build_sam_nano
from sam_fast.cli.demo import NANO_SETTINGS
from sam_fast.data.scenes import SceneSource
from sam_fast.evaluation.evaluate import EvaluationSettings, evaluate
from sam_fast.evaluation.methods import SamMethod


@pytest.fixture(scope="module")
def nano():
    return sam_model_registry["nano"]()


def test_the_registry_gives_trained_weights_in_float32(nano):
    assert sum(p.numel() for p in nano.parameters()) <= 12e6
    assert not nano.training and all(p.dtype == torch.float32 for p in nano.parameters())
    assert all(p.isfinite().all() for p in nano.parameters())
    packaged = resources.files("sam_fast") / "assets" / "nano" / "model.safetensors"
    with resources.as_file(packaged) as path:
        assert path.stat().st_size <= 24e6
        again = build_sam_nano(path)
    assert all(torch.equal(a, b) for a, b in zip(nano.state_dict().values(), again.state_dict().values(), strict=True))
    assert nano.image_encoder.img_size == NANO.image_size == 512


def test_the_official_prompt_encoder_and_mask_decoder_hold_its_weights(nano):
    theirs = build_official(NANO)
    theirs.load_state_dict(nano.state_dict())


def test_it_finds_objects_of_held_out_scenes(nano):
    """Far above what random weights reach; the whole table is in the model card."""
    source = SceneSource(512, length=12, held_out=True)
    settings = EvaluationSettings(objects_per_image=3, clicks=(1, 5), boundary_clicks=(1,))
    trained = evaluate(source, SamMethod(nano), settings).summary
    torch.manual_seed(0)
    random = build_sam_from_config(NANO)
    untrained = evaluate(source, SamMethod(random), settings).summary
    for key in ("box", "click_1_oracle"):
        assert trained[key] > untrained[key] + 0.2


def test_the_generator_equals_the_official_one(nano, photo):
    """On masks that mean something, the records are those of segment_anything in the same order."""
    theirs = build_official(NANO)
    theirs.load_state_dict(nano.state_dict())
    settings = {**NANO_SETTINGS, "points_per_side": 10}
    ours = SamAutomaticMaskGenerator(nano, **settings).generate(photo)
    assert_same_records(ours, official.SamAutomaticMaskGenerator(theirs, **settings).generate(photo))
