"""Pre-training: pictures and their batches, runs that go on bit for bit, and what they write."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from oracle import TINY
from PIL import Image

from sam_fast.build_sam import build_sam_from_config
from sam_fast.data.sample import Sample
from sam_fast.modeling import Sam
from sam_fast.training.initialise import initialise_weights
from sam_fast.training.mae import MaskedAutoencoder, initialise_from_mae, is_mae_checkpoint
from sam_fast.training.pictures import PictureBatches, PictureFolder, open_pictures, random_crop
from sam_fast.training.pretraining import PretrainConfig, Pretrainer, draw_reconstructions

SMALL = dataclasses.replace(TINY, image_size=64, embed_dim=32, depth=2, global_attn_indexes=(1,))
CONFIG = PretrainConfig(
    steps=6, batch_size=2, decoder_dim=16, decoder_heads=2, lr=1e-3, warmup=2, log_every=2, picture_every=3, workers=0
)


class Numbered:
    """Samples of one colour each, (index, 0, 0), of different sizes; counts what was asked for."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.max_masks: set[int | None] = set()

    def __len__(self) -> int:
        return self.length

    def load(self, index: int, *, max_masks: int | None = None, rng: np.random.Generator | None = None) -> Sample:
        self.max_masks.add(max_masks)
        image = np.zeros((20 + index, 50, 3), np.uint8)
        image[:, :, 0] = index
        return Sample(image, np.zeros((0, *image.shape[:2]), bool), str(index))


class Noise(Numbered):
    """Samples of noise."""

    def load(self, index: int, *, max_masks: int | None = None, rng: np.random.Generator | None = None) -> Sample:
        image = np.random.default_rng(index).integers(0, 256, (80, 70, 3), np.uint8)
        return Sample(image, np.zeros((0, 80, 70), bool), str(index))


def build() -> Sam:
    torch.manual_seed(0)
    sam = build_sam_from_config(SMALL)
    initialise_weights(sam)
    return sam


def batches(source: Numbered, **changes: int) -> PictureBatches:
    settings = {"side": 32, "batch_size": 3, "seed": 0, "length": 20, **changes}
    return PictureBatches(source, **settings)  # type: ignore[arg-type]


def test_an_epoch_shows_every_picture_once_and_the_next_in_another_order() -> None:
    source = Numbered(30)
    data = batches(source)
    batch = data[0]
    assert batch.dtype == torch.uint8 and batch.shape == (3, 3, 32, 32)
    orders = [[int(image[0, 0, 0]) for index in part for image in data[index]] for part in (range(10), range(10, 20))]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(30))
    assert orders[0] != orders[1] and orders[0] != list(range(30))
    assert source.max_masks == {0}  # no mask is decoded


def test_a_batch_depends_on_seed_and_index_alone() -> None:
    source = Noise(30)
    expected = batches(source)[7]
    data = batches(source)
    for index in (19, 3):
        data[index]
    assert torch.equal(data[7], expected)
    assert not torch.equal(data[8], expected)
    assert not torch.equal(batches(source, seed=1)[7], expected)


def test_processes_share_no_picture() -> None:
    shown = [
        int(image[0, 0, 0])
        for rank in range(2)
        for index in range(5)
        for image in batches(Numbered(30), rank=rank, world_size=2)[index]
    ]
    assert sorted(shown) == list(range(30))


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (90, 120)], ids=str)
def test_crops_lie_in_the_picture_and_have_the_share_they_should(size: tuple[int, int]) -> None:
    """On a picture whose pixels are their own coordinates (0..255) the corners tell what was cut out."""
    rows, columns = (np.linspace(0, 255, n) for n in size)
    image = np.zeros((*size, 3), np.uint8)
    image[:, :, 0], image[:, :, 1] = rows[:, None], columns[None]
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        crop = random_crop(image, 24, (0.3, 0.6), rng)
        assert crop.shape == (24, 24, 3) and crop.dtype == np.uint8
        height, width = (np.ptp(crop[:, :, axis].astype(float)) / 255 for axis in (0, 1))
        shares.append(height * width)
    if size == (90, 120):  # the others are narrowed to the picture
        assert 0.25 < min(shares) < 0.33 and 0.55 < max(shares) < 0.64


def test_folders_are_searched_to_any_depth(tmp_path: Path, photo: np.ndarray) -> None:
    for name in ("b.png", "deep/er/a.JPG", "deep/.hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("txt"):
            (tmp_path / name).write_text("no image")
        else:
            Image.fromarray(photo[:40, :30]).save(tmp_path / name)
    folder = PictureFolder(tmp_path)
    assert [folder.load(i).name for i in range(len(folder))] == ["b.png", "deep/er/a.JPG"]
    assert np.array_equal(folder.load(0).image, photo[:40, :30])
    assert folder.load(0, max_masks=0).masks.shape == (0, 40, 30)
    (tmp_path / "deep" / "circle").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "deep" / "er")
    linked = PictureFolder(tmp_path)
    assert [linked.sample_name(i) for i in range(len(linked))] == ["again/a.JPG", "b.png", "deep/er/a.JPG"]
    (tmp_path / "again").unlink()
    both = open_pictures([str(tmp_path), "scenes:size=64,length=3"])
    assert len(both) == 5 and both.load(4, max_masks=0).image.shape == (64, 64, 3)


def test_the_masks_of_a_mask_folder_are_no_pictures(tmp_path: Path, photo: np.ndarray) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        Image.fromarray(photo[:40, :30]).save(tmp_path / kind / f"{kind}.png")
    assert [PictureFolder(tmp_path).load(0).name, len(PictureFolder(tmp_path))] == ["images.png", 1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        PictureFolder(tmp_path / "empty")


def run(folder: Path, config: PretrainConfig = CONFIG, stop_at: int | None = None) -> Pretrainer:
    trainer = Pretrainer(build(), Noise(9), config, folder)
    if stop_at is not None:
        trainer.report = lambda step, row: trainer.stop() if step == stop_at else None
    trainer.run()
    return trainer


@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 2, "ema": 0.9, "workers": 1, "clip": 1.0}], ids=["plain", "all"]
)
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, changes: dict[str, int]) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    straight = run(tmp_path / "straight", config)
    assert run(tmp_path / "stopped", config, stop_at=2).step == 2
    resumed = run(tmp_path / "stopped", config)
    assert resumed.step == straight.step == 6
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    exported = [safetensors.torch.load_file(tmp_path / run / "mae.safetensors") for run in ("straight", "stopped")]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])
    losses = [
        [row["loss"] for row in csv.DictReader((tmp_path / run / "metrics.csv").open())]
        for run in ("straight", "stopped")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_what_a_run_trains_and_writes(tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in build().image_encoder.state_dict().items()}
    trainer = run(tmp_path)
    for name, tensor in trainer.model.encoder.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name.startswith("neck.") or "rel_pos" in name), name
    assert is_mae_checkpoint(tmp_path / "mae.safetensors")
    sam = build()
    initialise_from_mae(sam, tmp_path / "mae.safetensors")
    qkv = "blocks.1.attn.qkv.weight"
    assert torch.equal(sam.image_encoder.get_parameter(qkv), trainer.model.encoder.get_parameter(qkv))
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["step-0000003.jpg", "step-0000006.jpg"]
    assert Image.open(tmp_path / "pictures" / "step-0000006.jpg").size == (3 * 64, 2 * 64)
    assert not list(tmp_path.glob("*.part"))


def test_the_average_is_exported(tmp_path: Path) -> None:
    trainer = run(tmp_path, dataclasses.replace(CONFIG, ema=0.99))
    exported = safetensors.torch.load_file(tmp_path / "mae.safetensors")["blocks.0.attn.qkv.weight"]
    assert trainer.average is not None
    assert torch.equal(exported, trainer.average.tensors["encoder.blocks.0.attn.qkv.weight"])
    assert not torch.equal(exported, trainer.model.encoder.get_parameter("blocks.0.attn.qkv.weight"))


def test_a_run_with_other_settings_is_not_continued(tmp_path: Path) -> None:
    run(tmp_path, stop_at=1)
    for changes, text in (({"mask_ratio": 0.5}, "mask_ratio 0.75 there, 0.5 now"), ({"seed": 1}, "seed 0 there")):
        with pytest.raises(ValueError, match=text):
            Pretrainer(build(), Noise(9), dataclasses.replace(CONFIG, **changes), tmp_path)  # type: ignore[arg-type]
    Pretrainer(build(), Noise(9), dataclasses.replace(CONFIG, save_every=7, workers=1), tmp_path)
    other = build_sam_from_config(dataclasses.replace(SMALL, image_size=128))
    with pytest.raises(ValueError, match=r"last\.pt is of another model or image size"):
        Pretrainer(other, Noise(9), CONFIG, tmp_path)


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"workers": -1}, {"ema": 1.5}, {"precision": "fp16"}, {"crop": (0.5, 0.2)}], ids=str
)
def test_settings_out_of_range_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(CONFIG, **changes)


def test_pictures_show_the_seen_the_painted_and_the_image() -> None:
    sam = build()
    model = MaskedAutoencoder(sam.image_encoder, 16, 1, 2)
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    picture = np.asarray(draw_reconstructions(model, sam, images)).reshape(4, 64, 3, 64, 3)
    seen, painted, original = (picture[:, :, panel].astype(int) for panel in range(3))
    assert np.array_equal(original, images[:4].permute(0, 2, 3, 1).numpy())
    mean = np.array([124, 116, 104])  # the colour of what is masked
    masked = (seen == mean).all(-1)
    assert masked.mean() == pytest.approx(0.75, abs=0.01)
    assert np.array_equal(seen[~masked], original[~masked])
    assert (painted != seen).any(-1)[masked].mean() > 0.9
    assert np.array_equal(painted[~masked], original[~masked])
    assert np.array_equal(picture, np.asarray(draw_reconstructions(model, sam, images)).reshape(picture.shape))
