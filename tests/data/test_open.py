"""Specs of data, and sources made of sources."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_fast.data.coco import CocoSource
from sam_fast.data.combine import ConcatSource, SubsetSource, first_samples, training_samples, validation_samples
from sam_fast.data.folder import MaskFolderSource
from sam_fast.data.open import DATA_FORMS, open_source, open_sources
from sam_fast.data.sa1b import Sa1bSource
from sam_fast.data.sample import Sample, SampleSource
from tests.data.test_coco import write_coco, write_image
from tests.data.test_sa1b import random_masks, write_pair

TRIANGLE = [[1, 1, 30, 1, 30, 30]]


@dataclass(frozen=True)
class Numbers:
    """A source of samples named by prefix and number, whose image is the number."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def sample_name(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int, *, max_masks: int | None = None, rng: np.random.Generator | None = None) -> Sample:
        return Sample(np.zeros((1, 1, 3), np.uint8), np.ones((max_masks or 5, 1, 1), bool), self.names[index])


def numbered(count: int, prefix: str = "") -> Numbers:
    return Numbers(tuple(f"{prefix}{i}" for i in range(count)))


def names(source: SampleSource) -> list[str]:
    return [source.load(i).name for i in range(len(source))]


def test_scenes() -> None:
    from sam_fast.data.scenes import SceneSource

    assert open_source("scenes") == SceneSource()
    assert open_source("scenes:held-out") == SceneSource(held_out=True)
    assert open_source("scenes:seed=3,size=128,length=10") == SceneSource(128, seed=3, length=10)
    first = open_source("scenes:seed=3,size=64#first=2")
    assert len(first) == 2
    np.testing.assert_array_equal(first.load(1).image, SceneSource(64, seed=3).load(1).image)


def test_photos() -> None:
    source = open_source("photos")
    assert isinstance(source, CocoSource) and len(source) >= 1
    assert len(source.load(0).masks) >= 1


def test_folders(tmp_path: Path) -> None:
    write_pair(tmp_path / "sa1b" / "sa_000000", "sa_1", random_masks(1, 2))
    source = open_source(str(tmp_path / "sa1b"))
    assert isinstance(source, Sa1bSource) and len(source.load(0).masks) == 2

    write_image(tmp_path / "folder" / "images" / "a.png")
    (tmp_path / "folder" / "masks").mkdir()
    labels = np.random.default_rng(0).choice([0, 4, 255], (37, 53)).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "folder" / "masks" / "a.png")
    source = open_source(f"{tmp_path / 'folder'}/")
    assert isinstance(source, MaskFolderSource) and len(source.load(0).masks) == 2
    assert len(open_source(f"{tmp_path / 'folder'}#ignore=255").load(0).masks) == 1
    assert not len(open_source(f"{tmp_path / 'folder'}#ignore=255,ignore=4").load(0).masks)


def test_coco(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "annotations" / "instances_a.json", {"a.png": [TRIANGLE]})
    write_image(tmp_path / "pictures" / "a.png")
    source = open_source(f"{path}:{tmp_path / 'pictures'}")
    assert isinstance(source, CocoSource) and len(source.load(0).masks) == 1
    with pytest.raises(FileNotFoundError, match=r"a\.png, which is not in"):
        open_source(str(path))
    (tmp_path / "pictures").rename(tmp_path / "images")
    assert len(open_source(str(path)).load(0).masks) == 1


def test_names_with_separators_in_them(tmp_path: Path) -> None:
    folder = tmp_path / "a:b#first=1" / "x.json:y"
    for stem in ("sa_1", "sa_2"):
        write_pair(folder, stem, random_masks(1, 1))
    assert len(open_source(str(folder))) == 2
    assert len(open_source(f"{folder}#first=1")) == 1
    path = write_coco(tmp_path / "c:d.json", {"a.png": [TRIANGLE]})
    write_image(tmp_path / "e:f" / "a.png")
    assert len(open_source(f"{path}:{tmp_path / 'e:f'}")) == 1
    path = write_coco(tmp_path / "my#folder" / "c.json", {"a.png": [TRIANGLE], "b.png": [TRIANGLE]})
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "my#folder" / "pictures" / name)
    pair = f"{path}:{tmp_path / 'my#folder' / 'pictures'}"
    assert len(open_source(pair)) == 2
    assert len(open_source(f"{pair}#first=1")) == 1


def test_options_select_in_the_order_written(tmp_path: Path) -> None:
    for i in range(40):
        write_pair(tmp_path, f"sa_{i}", np.ones((1, 2, 2), bool))
    everything = names(open_source(str(tmp_path)))
    training, validation = (names(open_source(f"{tmp_path}#{half}")) for half in ("train=0.7", "validation=0.3"))
    assert sorted(training + validation) == everything
    assert names(open_source(f"{tmp_path}#first=4")) == everything[:4]
    assert names(open_source(f"{tmp_path}#validation=0.3,first=4")) == validation[:4]
    assert names(open_source(f"{tmp_path}#first=4,train=0.7")) == [name for name in everything[:4] if name in training]


def test_upright(tmp_path: Path) -> None:
    write_pair(tmp_path, "sa_1", np.ones((1, 20, 30), bool))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(tmp_path / "sa_1.jpg", exif=exif)
    assert open_source(f"{tmp_path}#upright").load(0).image.shape == (20, 30, 3)
    with pytest.raises(ValueError, match="use upright"):
        open_source(str(tmp_path)).load(0)


def test_several_specs(tmp_path: Path) -> None:
    write_pair(tmp_path, "sa_1", random_masks(1, 1))
    spec = str(tmp_path)
    assert names(open_sources([spec, spec, "photos#first=1"])) == ["sa_1.jpg", "sa_1.jpg", "astronaut.jpg"]
    assert isinstance(open_sources([spec]), Sa1bSource)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("scene", "no data at 'scene'"),
        ("", "no data at ''"),
        ("scenes:seed=x", "'seed=x' in 'scenes:seed=x' needs a number"),
        ("scenes:colour=3", "unknown option 'colour=3' of scenes"),
        ("scenes:size", "'size' in 'scenes:size' needs a number"),
        ("photos#first", "'first' in 'photos#first' needs a number"),
        ("photos#last=3", "unknown option 'last=3' in 'photos#last=3'"),
        ("{empty}", "holds no images with a JSON"),
    ],
)
def test_errors_list_the_accepted_forms(tmp_path: Path, spec: str, text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        open_source(spec.format(empty=tmp_path))
    assert DATA_FORMS in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("photos#first=0", "leaves no samples"),
        ("photos#train=1.5", "between 0 and 1, got 1.5"),
        ("photos#train=nan", "between 0 and 1"),
        ("photos#ignore=255", "applies to folders of label maps only"),
        ("photos#upright", "applies to files only"),
    ],
)
def test_options_that_make_no_sense_are_refused(spec: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        open_source(spec)


def test_missing_files_and_no_specs() -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: nowhere/a\.json"):
        open_source("nowhere/a.json:images")
    with pytest.raises(ValueError, match="no data given"):
        open_sources([])


def test_concatenation() -> None:
    source = ConcatSource([numbered(3, "a"), numbered(0), numbered(2, "b")])
    assert names(source) == ["a0", "a1", "a2", "b0", "b1"]
    assert [source.sample_name(i) for i in range(5)] == names(source)
    assert source.load(-1).name == "b1"
    assert len(source.load(4, max_masks=2).masks) == 2
    for index in (5, -6):
        with pytest.raises(IndexError):
            source.load(index)
    assert len(ConcatSource([])) == 0


def test_subsets() -> None:
    source = SubsetSource(numbered(10), [7, 2, 2])
    assert names(source) == ["7", "2", "2"]
    assert source.sample_name(0) == "7" and len(source.load(0, max_masks=2).masks) == 2
    with pytest.raises(IndexError):
        source.load(3)
    assert names(first_samples(numbered(3), 9)) == ["0", "1", "2"]
    assert names(pickle.loads(pickle.dumps(source))) == names(source)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1.0])
def test_training_and_validation_divide_the_samples(share: float) -> None:
    source = numbered(4000)
    validation, training = names(validation_samples(source, share)), names(training_samples(source, 1 - share))
    assert sorted(validation + training) == sorted(source.names)
    assert abs(len(validation) / len(source) - share) < 0.02
    assert set(names(validation_samples(source, share / 2))) <= set(validation)


def test_a_sample_keeps_its_side_when_others_come() -> None:
    """Wherever it lies: the hash is of its name. The list is fixed for all machines and versions."""
    few, many = numbered(30), Numbers(tuple(f"{i}" for i in reversed(range(300))))
    assert set(names(validation_samples(few, 0.3))) == set(names(validation_samples(many, 0.3))) & set(few.names)
    assert names(validation_samples(few, 0.2)) == ["2", "5", "9", "17", "19"]


def test_sources_without_names_are_divided_by_index() -> None:
    class Nameless:
        def __len__(self) -> int:
            return 4000

        def load(self, index: int, **_: object) -> Sample:
            raise AssertionError("dividing must not load")

    divided = validation_samples(Nameless(), 0.25)  # type: ignore[arg-type]
    np.testing.assert_array_equal(divided.indices, validation_samples(numbered(4000), 0.25).indices)
