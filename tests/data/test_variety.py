"""What varies the textures of training scenes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from sam_fast.data import textures
from sam_fast.data.families import FAMILIES, HELD_OUT_FAMILIES, TRAINING_FAMILIES, draw_family
from sam_fast.data.scenes import compose
from sam_fast.data.shapes import Placement, rasterize
from sam_fast.data.variety import collage, cut_turned, hues
from sam_fast.ops.connected_components import connected_components
from sam_fast.ops.packed_masks import pack_masks


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize("scale", [0.3, 2.0])
@pytest.mark.parametrize("shape", [(7, 90), (300, 200), (512, 512)], ids=str)
def test_a_turned_crop_stays_inside_its_picture(shape, scale) -> None:
    picture = Image.new("L", (128, 96), 255)
    for seed in range(60):
        piece = cut_turned(generator(seed), picture, *shape, scale)
        assert piece.size == shape
        assert np.asarray(piece).min() == 255, "what lies outside of the picture is black"


def test_a_turned_crop_has_the_scale_that_was_asked_for() -> None:
    """Two crossed ramps tell how large a pixel is in the picture, whatever the angle and the stretch, and mirroring."""
    mirrored = set()
    ramps = [np.tile(np.arange(256, dtype=np.float32), (256, 1)), np.tile(np.arange(256, dtype=np.float32), (256, 1)).T]
    for seed in range(20):
        slopes = []
        for ramp in ramps:
            piece = np.asarray(cut_turned(generator(seed), Image.fromarray(ramp), 24, 24, 1.5))[4:-4, 4:-4]
            slopes.append([np.diff(piece, axis=1).mean(), np.diff(piece, axis=0).mean()])
        area = np.linalg.det(slopes)
        assert abs(area) == pytest.approx(1.5**2, rel=1e-3)
        mirrored.add(area > 0)
    assert mirrored == {False, True}


def test_a_turned_crop_is_smooth_where_it_shrinks() -> None:
    noise = Image.fromarray(generator(0).integers(0, 256, (512, 512)).astype(np.uint8))
    one, four = (
        np.mean([np.std(cut_turned(generator(seed), noise, 40, 40, scale)) for seed in range(20)]) for scale in (1, 4)
    )
    assert four < 0.6 * one


def test_hues_leave_gray_gray_but_for_the_channels_brightness() -> None:
    matrices = np.array([hues(generator(seed)) for seed in range(50)]).reshape(50, 3, 4)
    assert (matrices[:, :, 3] == 0).all()
    gains = matrices[:, :, :3].sum(2)
    assert (gains >= 0.75).all() and (gains <= 1.25).all()
    red = matrices[:, :, 0].argmax(1)  # what red becomes
    assert set(red.tolist()) == {0, 1, 2}


def test_a_collage_has_many_edges_and_comes_out_the_same() -> None:
    pictures = [Image.new("L", (64, 64), 90), Image.new("RGB", (64, 64), (200, 30, 90))]
    one, other, again = (collage(generator(seed), pictures) for seed in (0, 1, 0))
    assert one.mode == "RGB" and one.size == (384, 384)
    assert one.tobytes() == again.tobytes() != other.tobytes()
    for sheet in (one, other):  # of one-coloured pictures: all edges are cuttings'
        middles = np.asarray(sheet)[::16, ::16].reshape(-1, 3)
        assert len(np.unique(middles // 8, axis=0)) > 12


def test_only_training_scenes_are_varied() -> None:
    training, held_out = textures.texture_bank(False), textures.texture_bank(True)
    assert training.varied and not held_out.varied
    assert len(training.photos) == len(list(textures.TRAINING_PHOTOS.glob("*.jpg"))) + textures._COLLAGES
    assert len(held_out.photos) == len(list(textures.HELD_OUT_PHOTOS.glob("*.jpg")))


@pytest.mark.parametrize("held_out", [False, True])
def test_a_texture_draws_as_often_for_every_window(held_out) -> None:
    """Or else parts of one colour would not look alike, and a larger size would show another scene."""
    bank, color = textures.texture_bank(held_out), np.array([90.0, 120, 60])
    for seed in range(80):
        states = []
        for width, height in ((20, 30), (90, 11)):
            rng = generator(seed)
            textures.fill(rng, bank, color, width, height, 128)
            states.append(rng.bit_generator.state["state"])
        assert states[0] == states[1]


def test_photos_of_training_scenes_are_turned() -> None:
    """Of a picture with upright edges alone come crops with slanting ones; of a held-out scene's none."""
    edges = Image.fromarray(np.kron([[0, 255] * 16] * 2, np.ones((128, 8))).astype(np.uint8))
    bank = textures.texture_bank(False)
    slanting = []
    for varied in (False, True):
        few = textures.Bank((edges,), bank.colors, bank.noise, bank.patches, varied)
        count = 0
        for seed in range(40):
            piece = np.asarray(textures._photo(generator(seed), few, np.zeros(3), (30, 30), 64).picture, np.float32)
            across, down = (np.abs(np.diff(piece, axis=axis)).mean() for axis in (0, 1))
            count += min(across, down) > 2
        slanting.append(count)
    assert slanting[0] == 0 and 12 <= slanting[1] <= 36


def test_held_out_scenes_are_what_they_were() -> None:
    """The random draws and families of 60 layouts, whatever processor or library paints them; textures: no variety."""
    digest = hashlib.sha256()
    for seed in range(60):
        rng = generator(seed)
        canvas = compose(rng, 64, True)
        assert canvas.bank is textures.texture_bank(True)
        digest.update(str([region.family for region in canvas.regions]).encode())
        digest.update(str(rng.bit_generator.state["state"]).encode())
    assert digest.hexdigest()[:16] == "02a182e2ba3ef7a5"


def test_held_out_textures_are_never_varied(monkeypatch) -> None:
    monkeypatch.delattr(textures, "_varied_photo")
    for seed in range(20):
        compose(generator(seed), 64, True)
    with pytest.raises(NameError):
        for seed in range(20):
            compose(generator(seed), 64, False)


def test_photos_of_training_scenes_are_mixed_and_in_other_hues() -> None:
    """From a bank of one red and one blue photo come textures that neither has alone."""
    photos = tuple(Image.new("RGB", (64, 64), color) for color in ((250, 0, 0), (0, 0, 250)))
    bank = textures.texture_bank(False)
    few = textures.Bank(photos, bank.colors, bank.noise, bank.patches, varied=True)
    seen = set()
    for seed in range(120):
        texture = textures._photo(generator(seed), few, np.array([128.0, 128, 128]), (8, 8), 64)
        if texture.picture.mode == "RGB":
            seen.add(texture.picture.getpixel((4, 4)))
    assert any(red > 40 and blue > 40 and green < 10 for red, green, blue in seen), "mixed"
    assert any(green > 100 for _, green, _ in seen), "in another hue"


def test_backgrounds_of_training_scenes_are_in_other_hues(monkeypatch) -> None:
    photo = Image.new("RGB", (64, 64), (250, 0, 0))
    bank = textures.texture_bank(False)
    monkeypatch.setattr(
        "sam_fast.data.scenes.texture_bank",
        lambda held_out: textures.Bank((photo,), bank.colors, bank.noise, bank.patches, varied=not held_out),
    )
    monkeypatch.setattr("sam_fast.data.scenes._objects", lambda *arguments: [])
    corners = {
        held_out: {compose(generator(seed), 64, held_out).image.getpixel((0, 0)) for seed in range(120)}
        for held_out in (False, True)
    }
    assert (250, 0, 0) in corners[False] and (250, 0, 0) in corners[True]
    assert any(green > 150 > red for red, green, _ in corners[False])


@pytest.mark.parametrize("family", TRAINING_FAMILIES)
def test_shapes_of_training_scenes(family) -> None:
    """They fit their frame, are not empty, and are not as full as a plain shape."""
    full, pierced = [], 0
    placement = Placement(np.eye(2) * 0.25, np.array([0.5, 0.5]))
    for seed in range(40):
        raster = rasterize(placement.shape(FAMILIES[family](generator(seed))), 128)
        assert raster is not None
        inside = np.asarray(raster.alpha) >= 128
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert len(rows) > 8 and len(columns) > 8
        assert raster.left > 0 and raster.top > 0 and raster.left + inside.shape[1] < 128
        outside = torch.from_numpy(np.pad(~inside, 1, constant_values=True))[None]
        pierced += int(connected_components(pack_masks(outside), outside.shape[2])[1]) > 1  # what is around it is one
        full.append(inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean())
    assert 0.3 < np.mean(full) < 0.85
    assert (pierced > 5) == (family in ("notched", "lattice"))


def test_which_families_are_drawn() -> None:
    rng = generator(0)
    drawn = [draw_family(rng)[0] for _ in range(600)]
    assert 0.15 < np.mean([name in TRAINING_FAMILIES for name in drawn]) < 0.4
    usual, held_out, common = (
        {draw_family(rng, **how)[0] for _ in range(600)} for how in ({}, {"held_out": True}, {"common": True})
    )
    assert usual == set(FAMILIES) - set(HELD_OUT_FAMILIES)
    assert held_out == set(FAMILIES) - set(TRAINING_FAMILIES)
    assert common == usual & held_out
    compact = {draw_family(rng, compact=True)[0] for _ in range(600)}
    assert compact & set(TRAINING_FAMILIES) == {"joined"}
