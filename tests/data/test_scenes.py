"""Procedural scenes: determinism, the split for evaluation, and masks that agree with what is painted."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sam_fast.data import draws, families, objects, scenes, shapes, textures
from sam_fast.data.canvas import Canvas, Style
from sam_fast.data.degrade import gaussian_blur
from sam_fast.data.objects import Part
from sam_fast.data.sample import Sample
from sam_fast.data.scenes import SceneSource, make_scene, visible_regions

PLAIN = Style(np.array([0.0, -1.0]), relief=0.0, shadow=0.0, reach=0.1, softness=0.05, contrast=30.0)
CASES = [(3, 0, 64, False), (3, 1, 96, False), (3, 0, 64, True), (4, 7, 128, True)]


def digest(sample: Sample) -> str:
    return hashlib.sha256(sample.image.tobytes() + sample.masks.tobytes() + sample.name.encode()).hexdigest()


def disc(x: float, y: float, radius: float) -> shapes.Shape:
    return shapes.ellipse(x, y, radius, radius)


def painted(*parts: Part, size: int = 128, style: Style = PLAIN) -> Canvas:
    """Parts painted one after another, on black."""
    rng = np.random.default_rng(0)
    canvas = Canvas(size, textures.texture_bank(), style)
    for part in parts:
        canvas.paint(rng, part, np.full((4, 3), 200, np.float32))
    return canvas


def region_mask(canvas: Canvas, number: int) -> np.ndarray:
    region = canvas.regions[number]
    return (canvas.owner >= region.first) & (canvas.owner < region.last)


@pytest.fixture(scope="module")
def training() -> list[Sample]:
    return [make_scene(0, index, 128) for index in range(24)]


def test_same_bytes_in_another_process_and_order() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_scenes import CASES, digest\n"
        "from sam_fast.data.scenes import make_scene\n"
        "for seed, index, size, held_out in reversed(CASES):\n"
        "    print(digest(make_scene(seed, index, size, held_out=held_out)))\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(Path(__file__).parents[2])]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = [digest(make_scene(s, i, size, held_out=h)) for s, i, size, h in CASES]
    assert run.stdout.split() == expected[::-1]


def test_source_makes_the_same_scenes() -> None:
    source = SceneSource(64, seed=3, length=2, held_out=True)
    assert len(source) == 2
    assert digest(source.load(0)) == digest(make_scene(3, 0, 64, held_out=True))


def test_scenes_differ_by_seed_index_and_split() -> None:
    samples = [
        make_scene(s, i, 64, held_out=h) for s, i, h in [(0, 0, False), (0, 1, False), (1, 0, False), (0, 0, True)]
    ]
    assert len({sample.image.tobytes() for sample in samples}) == 4
    assert [sample.name for sample in samples] == ["scene-0-0", "scene-0-1", "scene-1-0", "held-out-0-0"]


@pytest.mark.parametrize("size", [64, 256, 512])
@pytest.mark.parametrize("held_out", [False, True])
def test_masks_are_sound(size: int, held_out: bool) -> None:
    for index in range(2):
        sample = make_scene(1, index, size, held_out=held_out)
        assert sample.image.shape == (size, size, 3) and sample.image.dtype == np.uint8
        assert sample.masks.shape[1:] == (size, size) and sample.masks.dtype == bool
        assert (sample.masks.sum((1, 2)) >= scenes.LEAST_AREA * size**2).all()
        assert len({mask.tobytes() for mask in sample.masks}) == len(sample.masks)


def test_a_larger_size_shows_the_same_scene() -> None:
    for index in range(6):
        small, large = (
            scenes.compose(np.random.Generator(np.random.PCG64(index)), size, False).image for size in (96, 288)
        )
        shrunk = np.asarray(large.reduce(3), np.float64)
        assert np.abs(shrunk - np.asarray(small, np.float64)).mean() < 12


def test_number_of_masks(training: list[Sample]) -> None:
    counts = [len(sample.masks) for sample in training]
    assert 10 <= np.mean(counts) <= 30


def test_parts_lie_in_wholes(training: list[Sample]) -> None:
    """At least half of the scenes have a part in an object, a fifth a part of a part."""

    def depth(masks: np.ndarray) -> int:
        flat = masks.reshape(len(masks), -1)
        areas = flat.sum(1)
        inside = flat.astype(np.float32) @ flat.T.astype(np.float32) == areas[:, None]  # [part, whole]
        inside &= areas[:, None] < areas[None]
        levels = np.ones(len(masks), int)
        for part in np.argsort(-areas):
            levels[part] = 1 + max([0, *levels[inside[part]]])
        return int(levels.max(initial=0))

    depths = np.array([depth(sample.masks) for sample in training])
    assert (depths >= 2).mean() >= 0.5
    assert (depths >= 3).mean() >= 0.2


def held_out_families(part: Part) -> set[str]:
    found = {part.family} & set(families.HELD_OUT_FAMILIES)
    return found.union(*(held_out_families(child) for child in part.parts))


@pytest.mark.parametrize("held_out", [False, True])
def test_families_and_photos_of_the_split(monkeypatch: pytest.MonkeyPatch, held_out: bool) -> None:
    drawn: list[str] = []
    made: list[Part] = []
    read: list[Path] = []
    for name, family in families.FAMILIES.items():
        monkeypatch.setitem(families.FAMILIES, name, lambda rng, n=name, f=family: (drawn.append(n), f(rng))[1])
    read_photo, make_object = textures._read_photo, objects.make_object
    monkeypatch.setattr(textures, "_read_photo", lambda path: (read.append(path), read_photo(path))[1])

    def spy(*args: object, **kwargs: object) -> Part:
        made.append(make_object(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(scenes, "make_object", spy)
    textures.texture_bank.cache_clear()
    for index in range(30):
        make_scene(5, index, 64, held_out=held_out)
    share = np.mean([bool(held_out_families(part)) for part in made])
    folder = textures.HELD_OUT_PHOTOS if held_out else textures.TRAINING_PHOTOS
    assert len(read) >= 4 and {path.parent for path in read} == {folder}
    if held_out:
        assert set(families.HELD_OUT_FAMILIES) <= set(drawn)
        assert not set(families.TRAINING_FAMILIES) & set(drawn)
        assert 0.3 <= share <= 0.55
    else:
        assert set(drawn) == set(families.FAMILIES) - set(families.HELD_OUT_FAMILIES)
        assert share == 0


def test_boundaries_are_where_the_image_changes() -> None:
    """Without a camera's imperfections, the image changes more across a mask's border than three pixels beside it."""
    better, total = 0, 0
    for index in range(8):
        canvas = scenes.compose(np.random.Generator(np.random.PCG64([9, index])), 192, False)
        pixels = np.asarray(canvas.image, np.float64)
        change = np.abs(pixels[:, 1:] - pixels[:, :-1]).max(2)[:-1] + np.abs(pixels[1:] - pixels[:-1]).max(2)[:, :-1]
        for region in visible_regions(canvas):
            mask = (canvas.owner >= region.first) & (canvas.owner < region.last)
            border = (mask[:-1, 1:] != mask[:-1, :-1]) | (mask[1:, :-1] != mask[:-1, :-1])
            border[:4] = border[-4:] = border[:, :4] = border[:, -4:] = False
            if border.sum() < 20:
                continue
            there = change[border].mean()
            aside = [change[np.roll(border, shift, axis)].mean() for axis in (0, 1) for shift in (-3, 3)]
            better += there > max(aside)
            total += 1
    assert total > 60
    assert better / total > 0.9


def test_a_mask_is_the_disc_that_was_painted() -> None:
    canvas = painted(Part(disc(0.5, 0.4, 0.3)))
    y, x = (np.mgrid[:128, :128] + 0.5) / 128
    expected = np.hypot(x - 0.5, y - 0.4) < 0.3
    mask = region_mask(canvas, 0)
    assert (mask & expected).sum() / (mask | expected).sum() > 0.99
    lit = np.asarray(canvas.image).max(2) > 60
    assert (mask & lit).sum() / (mask | lit).sum() > 0.97


def test_masks_are_what_is_visible() -> None:
    hidden = Part(disc(0.3, 0.5, 0.05))
    whole = Part(disc(0.4, 0.5, 0.3), [Part(disc(0.4, 0.5, 0.1))])
    cover = Part(disc(0.7, 0.5, 0.25))
    canvas = painted(hidden, whole, cover)
    assert not region_mask(canvas, 0).any()
    whole_mask, part_mask, cover_mask = (region_mask(canvas, number) for number in (1, 2, 3))
    assert (part_mask <= whole_mask).all() and part_mask.sum() < whole_mask.sum()
    assert not (whole_mask & cover_mask).any()
    alone = region_mask(painted(whole), 0)
    np.testing.assert_array_equal(whole_mask, alone & ~cover_mask)
    assert visible_regions(canvas) == canvas.regions[1:]


def test_holes_and_clipped_parts() -> None:
    ring = [shapes.Contour(shapes.circle() * 0.4 + 0.5), shapes.Contour(shapes.circle() * 0.2 + 0.5, fill=False)]
    band = Part(shapes.box(-1, 0.4, 2, 0.6), clip=True)
    canvas = painted(Part(ring, [band]))
    whole, part = region_mask(canvas, 0), region_mask(canvas, 1)
    assert not whole[64, 64] and whole[64, 20] and part[64, 20] and not part[64, 4]
    assert (part <= whole).all()


def test_small_hidden_and_equal_regions_have_no_mask() -> None:
    speck = Part(disc(0.1, 0.1, 0.01))
    nearly_hidden, cover = Part(disc(0.5, 0.5, 0.2)), Part(disc(0.51, 0.5, 0.2))
    same = Part(None, [Part(disc(0.85, 0.2, 0.1))])
    canvas = painted(speck, nearly_hidden, cover, same)
    assert len(canvas.regions) == 5
    assert visible_regions(canvas) == [canvas.regions[2], canvas.regions[3]]


def test_shadows_are_not_in_masks() -> None:
    ground, thing = Part(shapes.box(-0.1, -0.1, 1.1, 1.1)), Part(disc(0.5, 0.4, 0.2))
    clear = replace(PLAIN, contrast=0.0)
    plain = painted(ground, thing, style=clear)
    shaded = painted(ground, thing, style=replace(clear, shadow=0.7, reach=0.3, softness=0.02))
    np.testing.assert_array_equal(shaded.owner, plain.owner)
    darker = np.asarray(plain.image, int).sum(2) - np.asarray(shaded.image, int).sum(2) > 60
    y, x = (np.mgrid[:128, :128] + 0.5) / 128
    core = np.hypot(x - 0.5, y - 0.4) < 0.19  # the outermost pixels mix with what lies behind
    assert darker.sum() > 100
    assert not (darker & core).any()


def test_max_masks() -> None:
    source = SceneSource(96, seed=2)
    everything = source.load(5).masks
    assert len(everything) > 6
    first = source.load(5, max_masks=4)
    np.testing.assert_array_equal(first.masks, everything[:4])
    drawn = source.load(5, max_masks=4, rng=np.random.default_rng(1)).masks
    places = [next(i for i, mask in enumerate(everything) if np.array_equal(mask, m)) for m in drawn]
    assert places == sorted(set(places)) and len(places) == 4
    assert len(source.load(5, max_masks=0).masks) == 0
    np.testing.assert_array_equal(source.load(5, max_masks=1000).masks, everything)


@pytest.mark.parametrize("arguments", [(-1, 0, 64), (0, -1, 64), (0, 0, 63), (0, 0, 1025)])
def test_bad_arguments(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="got"):
        make_scene(*arguments)


def test_bad_source() -> None:
    with pytest.raises(ValueError, match="size"):
        SceneSource(32)
    with pytest.raises(ValueError, match="length"):
        SceneSource(64, length=-1)
    for index in (-1, 3):
        with pytest.raises(IndexError, match="0 to 2"):
            SceneSource(64, length=3).load(index)


def test_a_crop_stays_inside_its_picture() -> None:
    """Boxes as large as the picture: rounding once carried one over its border."""
    picture = Image.new("L", (427, 511))
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = rng.integers(1, 700, 2).tolist()
        piece = textures.cut(rng, picture, width, height, 733, 8.0)
        assert piece.size == (width, height)


@pytest.mark.parametrize("weights", [(1.0,), (5.0, 1.6, 0.7, 0.5), (0.1,) * 12])
def test_own_choices_are_those_of_numpy(weights: tuple[float, ...]) -> None:
    ours, numpys = np.random.default_rng(0), np.random.default_rng(0)
    shares, bounds = np.array(weights) / np.array(weights).sum(), draws.cumulative_shares(weights)
    for _ in range(200):
        assert draws.draw_index(ours, bounds) == numpys.choice(len(weights), p=shares)
        assert draws.pick(ours, weights) == numpys.choice(weights)
        assert draws.uniform(ours, -0.3, weights[0]) == numpys.uniform(-0.3, weights[0])
    assert ours.random() == numpys.random()


@pytest.mark.parametrize("mode", ["L", "RGB", "F"])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (0, 0)])
def test_as_array_is_asarray(mode: str, size: tuple[int, int]) -> None:
    picture = Image.effect_noise(size, 60).convert(mode)
    ours, expected = textures.as_array(picture), np.asarray(picture)
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_texture_is_rendered_by_its_formula(mode: str) -> None:
    """Its picture through its table, times the shade, plus the shift; the same whether or not there is a shade."""
    rng = np.random.default_rng(0)
    picture = Image.effect_noise((37, 23), 60).convert(mode)
    table = rng.uniform(-40, 300, (256, 3 if mode == "L" else 1)).astype(np.float32)
    texture = textures.Texture(picture, table)
    colors = table[np.asarray(picture)].reshape(23, 37, 3)
    np.testing.assert_array_equal(texture.sample(5), colors[::5, ::5])
    shade = rng.uniform(0.5, 1.5, (23, 37)).astype(np.float32)
    for factor in (None, shade):
        lit = colors if factor is None else colors * factor[..., None]
        expected = (lit + np.float32(7.3)).clip(0, 255).astype(np.uint8)
        np.testing.assert_array_equal(np.asarray(texture.render(7.3, factor)), expected)
    assert texture.picture.mode == mode


def test_turns_are_made_of_a_quarter_turn_and_flips() -> None:
    picture = Image.effect_noise((5, 3), 60)
    for turn, turned in enumerate(textures._TURNS):
        steps = [Image.Transpose.ROTATE_90, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM]
        expected = picture
        for bit, step in enumerate(steps):
            expected = expected.transpose(step) if turn >> bit & 1 else expected
        assert (picture if turned is None else picture.transpose(turned)) == expected


def test_prepared_objects_are_painted_as_one_by_one() -> None:
    parts = [Part(disc(x, 0.5, 0.25), [Part(disc(x, 0.45, 0.1), color=1)]) for x in (0.3, 0.5, 0.7)]
    expected = painted(*parts)
    rng, canvas = np.random.default_rng(0), Canvas(128, textures.texture_bank(), PLAIN)
    prepared = [canvas.prepare(rng, part, np.full((4, 3), 200, np.float32)) for part in parts]
    canvas.show(*prepared)
    assert canvas.image == expected.image
    np.testing.assert_array_equal(canvas.owner, expected.owner)
    assert canvas.regions == expected.regions


@pytest.mark.parametrize("radius", [0.3, 1.0, 4.7])
def test_a_blur_by_channels_is_the_filter(radius: float) -> None:
    picture = Image.merge("RGB", [Image.effect_noise((37, 23), spread) for spread in (20, 60, 200)])
    assert gaussian_blur(picture, radius) == picture.filter(ImageFilter.GaussianBlur(radius))


def test_outlines_are_placed_as_one_by_one() -> None:
    """A tree of a part without a shape, several outlines, several polygons in one, and text."""
    band = shapes.strip(np.array([[0.0, 0], [1, 0.5], [0.3, 1]]), np.array([0.1, 0.2, 0.1]))
    tree = Part(None, [Part(disc(0, 0, 1), [Part(band, color=2)]), Part(shapes.glyphs("A", -1, -1, 1, 1), clip=True)])
    placement = shapes.Placement(np.array([[0.2, -0.1], [0.1, 0.3]]), np.array([0.5, 0.4]), np.full((2, 3), 0.7))
    placed = tree.placed(placement)
    assert placed.shape is None and placed.parts[0].parts[0].color == 2 and placed.parts[1].clip
    for old, new in zip(tree.parts + tree.parts[0].parts, placed.parts + placed.parts[0].parts, strict=True):
        for before, after in zip(old.shape or [], new.shape or [], strict=True):
            np.testing.assert_allclose(after.points, placement(before.points), rtol=1e-12)
            assert after[1] == before[1]
    assert Part(None).placed(placement) == Part(None)


def test_texture_photos_state_their_licences_and_are_small() -> None:
    files = sorted(textures.TRAINING_PHOTOS.glob("*.jpg"))
    readme = (textures.TRAINING_PHOTOS / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == [file.name for file in files]
    assert all(any(word in row for word in ("CC0", "CC BY 2.0", "public domain")) for row in rows)
    assert sum(file.stat().st_size for file in files) <= 1.2e6
    for file in files:
        with Image.open(file) as photo:
            assert max(photo.size) <= 512
    assert not {file.name for file in files} & {file.name for file in textures.HELD_OUT_PHOTOS.glob("*.jpg")}
