"""The trainer: it learns, and an interrupted run ends with the same bits as an uninterrupted one."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from rectangles import TINY, Rectangles, tiny_sam

from sam_fast import SamConfig, SamPredictor, build_sam_from_config
from sam_fast.data.sample import Sample
from sam_fast.data.scenes import make_scene
from sam_fast.training import run
from sam_fast.training.batches import Augmentation, TrainingBatches
from sam_fast.training.config import TrainConfig
from sam_fast.training.initialise import initialise_weights
from sam_fast.training.logs import TrainingLog
from sam_fast.training.run import CHECKPOINT
from sam_fast.training.trainer import WEIGHTS, Trainer

CONFIG = TrainConfig(
    steps=6,
    batch_size=2,
    prompts=3,
    clicks=1,
    lr=1e-3,
    schedule="cosine",
    warmup=2,
    drop_path=0.3,
    ema=0.9,
    loss_blend=4,
    save_every=2,
    log_every=1,
    picture_every=4,
    workers=0,
)


BATCHES = dict(side=64, batch_size=2, prompts=3, seed=0, length=1, augmentation=Augmentation(flip=True))


def train(output: Path, config: TrainConfig = CONFIG, source=None, **options) -> Trainer:
    trainer = Trainer(tiny_sam(), source or Rectangles(), config, output)
    trainer.run(**options)
    return trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_resume_is_bit_exact(tmp_path):
    """A run that dies between two checkpoints, without a chance to save, and is started again."""
    whole = train(tmp_path / "whole")

    def die(step, row):
        if step == 3:  # the last checkpoint is that of step 2
            raise KeyboardInterrupt

    dying = Trainer(tiny_sam(), Rectangles(), CONFIG, tmp_path / "killed")
    dying.report = die
    with pytest.raises(KeyboardInterrupt):
        dying.run()
    torch.manual_seed(12345)  # nothing may depend on what is left in global generators
    resumed = Trainer(tiny_sam(seed=1), Rectangles(), replace(CONFIG, workers=1), tmp_path / "killed")
    assert resumed.step == 2
    resumed.run()
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))

    def rows(folder):
        with open(folder / "metrics.csv", newline="") as file:
            return [(row["step"], row["loss"], row["gradient_norm"]) for row in csv.DictReader(file)]

    assert [step for step, *_ in rows(tmp_path / "killed")] == list("123456"), "no row twice"
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")


def test_resume_amid_repeats_is_bit_exact(tmp_path):
    config = replace(CONFIG, repeats=2, steps=19, save_every=17, prompts=2, batch_size=1, clicks=0, picture_every=0)
    whole = train(tmp_path / "whole", config)
    short = Trainer(tiny_sam(), Rectangles(), config, tmp_path / "stopped")
    short.report = lambda step, row: short.stop() if step == 17 else None  # the first batch that is a repetition
    assert short.run() == 17
    resumed = train(tmp_path / "stopped", replace(config, workers=2))
    assert same(whole.model.state_dict(), resumed.model.state_dict())


def test_a_killed_process_goes_on(tmp_path):
    """SIGKILL at an arbitrary moment, through the command line."""
    command = [sys.executable, "-m", "sam_fast", "train", "--data", "scenes:size=64", "--model-type", "nano"]
    command += ["--image-size", "64", "--steps", "4", "--prompts", "2", "--clicks", "0", "--save-every", "1"]
    command += ["--workers", "0", "--picture-every", "0", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = [*command, "--output", str(tmp_path / "killed"), "--log-every", "1"]
    process = subprocess.Popen(killed, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2"):
            break
    process.kill()
    process.wait()
    subprocess.run(killed, check=True, stdout=subprocess.DEVNULL, env=environment)
    subprocess.run(
        [*command, "--output", str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL, env=environment
    )
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_overfits_one_scene(tmp_path):
    """A small model learns one procedural scene by heart, and the predictor then finds every object in it."""
    scene = make_scene(0, 2, size=128)
    large = scene.masks.sum((1, 2)) >= 2000  # an eighth of the scene: the rim weighs little
    scene = Sample(scene.image, scene.masks[large], scene.name)
    assert len(scene.masks) >= 4

    class One:
        def __len__(self):
            return 1

        def load(self, index, *, max_masks=None, rng=None):
            return scene

    torch.manual_seed(0)
    model = build_sam_from_config(
        SamConfig(embed_dim=64, depth=2, num_heads=2, global_attn_indexes=(0, 1), image_size=128, patch_size=8)
    )
    initialise_weights(model)
    config = TrainConfig(
        steps=150,
        prompts=4,
        box_share=1.0,
        clicks=0,
        lr=1e-3,
        schedule="cosine",
        warmup=10,
        layer_decay=1.0,
        drop_path=0.0,
        weight_decay=0.0,
        ema=0.0,
        loss_blend=120,
        flip=False,
        save_every=1000,
        picture_every=0,
        workers=0,
    )
    Trainer(model, One(), config, tmp_path).run()
    predictor = SamPredictor(model.eval())
    predictor.set_image(scene.image)
    ious = []
    for mask in scene.masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = np.array([columns[0], rows[0], columns[-1], rows[-1]])
        predicted, _, _ = predictor.predict(box=box, multimask_output=False)
        ious.append((predicted[0] & mask).sum() / (predicted[0] | mask).sum())
    assert np.mean(ious) > 0.95, ious


def test_grouping_comes_first_and_alone_if_asked(tmp_path):
    config = replace(CONFIG, steps=2, clicks=0, grouping=1.0, grouping_steps=1, log_every=1)
    train(tmp_path, config)
    with open(tmp_path / "metrics.csv", newline="") as file:
        first, second = ({k: float(v) for k, v in row.items()} for row in csv.DictReader(file))
    assert np.isnan(first["loss"]) and np.isfinite(second["loss"])
    assert np.isfinite([first["grouping_iou"], second["grouping_iou"]]).all()
    with pytest.raises(ValueError, match="grouping_steps need a grouping above 0"):
        replace(CONFIG, grouping_steps=1)


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    """`torchrun` with gloo on the CPU; without corrections and drop path both see the same prompts."""
    config = replace(CONFIG, steps=3, batch_size=2, clicks=0, drop_path=0.0, box_share=0.0, clip=0.0)
    single = train(tmp_path / "single", config)
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import pytest\n"
        "from rectangles import Rectangles, tiny_sam\n"
        "from sam_fast.training.config import TrainConfig\n"
        "from sam_fast.training.distributed import join_world\n"
        "from sam_fast.training.trainer import Trainer\n"
        "with join_world('cpu') as world:\n"
        "    assert world.size == 2\n"
        f"    config = {replace(config, batch_size=1)!r}\n"
        f"    Trainer(tiny_sam(seed=world.rank), Rectangles(), config, {str(tmp_path / 'two')!r}, world).run()\n"
        # Machines that do not share the folder, then one that refuses what the other accepts: both end with an error.
        "    from dataclasses import replace\n"
        f"    folder = {str(tmp_path)!r} + ('/two', '/missing')[world.rank]\n"
        "    with pytest.raises(ValueError, match=f'{folder}: it must be one folder'):\n"
        "        Trainer(tiny_sam(), Rectangles(), config, folder, world)\n"
        "    with pytest.raises(ValueError, match=('it must be one folder', 'other settings')[world.rank]):\n"
        "        other = replace(config, seed=world.rank)\n"
        f"        Trainer(tiny_sam(), Rectangles(), other, {str(tmp_path / 'two')!r}, world)\n"
        # The clocks of machines differ: the first one's counts.
        "    from itertools import count\n"
        "    from types import SimpleNamespace\n"
        "    from sam_fast.training import run\n"
        "    run.time = SimpleNamespace(perf_counter=count(0, 1 + 50 * world.rank).__next__)\n"
        "    config = replace(config, steps=9, minutes=0.5, schedule='linear')\n"
        f"    trainer = Trainer(tiny_sam(), Rectangles(), config, {str(tmp_path / 'clock')!r}, world)\n"
        "    assert 2 < trainer.run() < 9\n"
        "    assert trainer.seconds == world.agree(trainer.seconds)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(launch, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    both, one = weights(tmp_path / "two"), weights(tmp_path / "single")
    start = tiny_sam().state_dict()
    assert both.keys() == one.keys() == start.keys()
    moved = max((one[name] - start[name]).abs().max().item() for name in one)
    assert moved > 1e-3
    # AdamW turns the rounding of a gradient near zero into a step of full size: compare the mean, not the maximum.
    difference = sum((both[n] - one[n]).abs().sum() for n in one) / sum((one[n] - start[n]).abs().sum() for n in one)
    assert difference < 0.02
    state = torch.load(tmp_path / "two" / CHECKPOINT, weights_only=True)
    assert state["world_size"] == 2 and state["step"] == 3
    assert single.step == 3


def test_accumulation_equals_a_larger_batch(tmp_path):
    config = replace(CONFIG, steps=2, batch_size=4, clicks=0, drop_path=0.0, box_share=0.0)
    large = train(tmp_path / "large", config)
    parts = train(tmp_path / "parts", replace(config, batch_size=1, accumulate=4))
    start = tiny_sam().state_dict()
    a, b = large.model.state_dict(), parts.model.state_dict()
    difference = sum((a[n] - b[n]).abs().sum() for n in a) / sum((a[n] - start[n]).abs().sum() for n in a)
    assert difference < 0.02


def test_prompts_and_losses_are_as_the_settings_say(tmp_path):
    """Where points lie, and how much the IoU head's error weighs, which shows in the loss of the first step alone."""
    config = replace(CONFIG, steps=1, clicks=0, drop_path=0.0, box_share=0.0, loss_blend=0, picture_every=0)
    centred = Trainer(tiny_sam(), Rectangles(), replace(config, centre_share=1.0), tmp_path / "centred")
    points = centred.batches(1)[0].points
    assert torch.equal(points, TrainingBatches(Rectangles(), **BATCHES, centre_share=1.0)[0].points)
    assert not torch.equal(points, TrainingBatches(Rectangles(), **BATCHES)[0].points)
    losses = []
    for weight in (0.0, 1.0, 3.0):
        train(tmp_path / str(weight), replace(config, iou_weight=weight))
        with open(tmp_path / str(weight) / "metrics.csv", newline="") as file:
            losses.append(float(next(csv.DictReader(file))["loss"]))
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=0.01) and losses[1] > losses[0]


def test_a_run_saved_before_a_setting_existed_goes_on(tmp_path):
    train(tmp_path, replace(CONFIG, steps=2, picture_every=0))
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    del state["config"]["iou_weight"], state["config"]["centre_share"]
    torch.save(state, tmp_path / CHECKPOINT)
    assert Trainer(tiny_sam(), Rectangles(), replace(CONFIG, steps=2, picture_every=0), tmp_path).step == 2
    with pytest.raises(ValueError, match=r"centre_share 0\.0 there, 0\.5 now"):
        Trainer(tiny_sam(), Rectangles(), replace(CONFIG, steps=2, picture_every=0, centre_share=0.5), tmp_path)


def test_a_frozen_encoder_stays(tmp_path):
    trainer = train(tmp_path, replace(CONFIG, freeze_encoder=True))
    start = tiny_sam().state_dict()
    for name, tensor in trainer.model.state_dict().items():
        if name.startswith("image_encoder"):
            assert torch.equal(tensor, start[name]), name
    assert not torch.equal(trainer.model.mask_decoder.iou_token.weight, start["mask_decoder.iou_token.weight"])
    encoder, images = trainer.sam.image_encoder.train(), torch.zeros(16, 3, TINY.image_size, TINY.image_size)
    with torch.no_grad():
        assert torch.equal(encoder(images), encoder(images)), "nothing of a frozen encoder is dropped"


def test_logs_and_pictures(tmp_path):
    train(tmp_path)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(float(row["images_per_second"]) > 0 and 0 <= float(row["best_iou"]) <= 1 for row in rows)
    assert float(rows[0]["learning_rate"]) == pytest.approx(5e-4)
    picture = Image.open(tmp_path / "pictures" / "step-0000004.jpg")
    assert picture.size == (3 * TINY.image_size, 2 * TINY.image_size), "truth, by point, by box; one row per image"
    assert list(tmp_path.glob("events.out.tfevents.*")), "tensorboard is in the test environment"


def test_late_steps_are_logged_exactly(tmp_path):
    log = TrainingLog(tmp_path, 1)
    for step in (1_000_001, 1_234_567):
        log.row({"step": step, "loss": 0.123456789})
    log.close()
    TrainingLog(tmp_path, 1_000_002).close()
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,loss", "1000001,0.123457"]


def test_exported_weights_are_the_average(tmp_path):
    trainer = train(tmp_path)
    exported = weights(tmp_path)
    assert same(exported, trainer.average.state_dict())
    assert not same(exported, trainer.model.state_dict())
    loaded = build_sam_from_config(TINY, tmp_path / WEIGHTS)
    assert torch.equal(loaded.mask_decoder.iou_token.weight, exported["mask_decoder.iou_token.weight"])
    from_checkpoint = build_sam_from_config(TINY, tmp_path / CHECKPOINT)
    assert same(from_checkpoint.state_dict(), trainer.model.state_dict())


def test_a_run_killed_while_it_saves_still_exports(tmp_path, monkeypatch):
    config = replace(CONFIG, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "export", lambda self, weights: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, config)
    assert train(tmp_path, config).step == 1
    assert (tmp_path / WEIGHTS).exists()


def test_stop_and_time_limit_save(tmp_path):
    trainer = Trainer(tiny_sam(), Rectangles(), replace(CONFIG, save_every=100), tmp_path)
    trainer.report = lambda step, row: trainer.stop()
    assert trainer.run() == 1
    assert Trainer(tiny_sam(), Rectangles(), CONFIG, tmp_path).step == 1
    assert train(tmp_path, max_minutes=0.0).step == 2
    assert train(tmp_path).step == 6


def test_a_run_ends_by_the_clock_and_its_schedule_with_it(tmp_path, monkeypatch):
    """Steps of 12 seconds in a run of one minute, interrupted in the middle."""
    clock = SimpleNamespace(now=0.0)
    ticks = count(step=1e-6)
    monkeypatch.setattr("sam_fast.training.run.time", SimpleNamespace(perf_counter=lambda: clock.now + next(ticks)))
    config = replace(CONFIG, steps=100, minutes=1.0, schedule="linear", warmup=0)
    for expected in (3, 7):
        trainer = Trainer(tiny_sam(), Rectangles(), config, tmp_path)

        def tick(step, row, trainer=trainer):
            clock.now += 12
            if step == 3:
                trainer.stop()

        trainer.report = tick
        clock.now += 1000  # time between two sessions does not count
        assert trainer.run() == expected
        assert trainer.finished == (expected == 7)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [round(float(row["seconds"])) for row in rows] == [0, 12, 24, 24, 36, 48, 60]
    rates = [float(row["learning_rate"]) / config.lr for row in rows]
    assert rates == pytest.approx([1 - 0.99 * share for share in (0, 0.01, 0.2, 0.4, 0.4, 0.6, 0.8)], abs=1e-4)
    assert (tmp_path / WEIGHTS).exists()


def test_another_run_is_not_continued_by_mistake(tmp_path):
    train(tmp_path, replace(CONFIG, steps=2))
    with pytest.raises(ValueError, match=r"lr 0\.001 there, 0\.002 now"):
        Trainer(tiny_sam(), Rectangles(), replace(CONFIG, steps=2, lr=2e-3), tmp_path)
    Trainer(tiny_sam(), Rectangles(), replace(CONFIG, steps=2, workers=3), tmp_path)


@pytest.mark.parametrize(("kind", "workers"), [(ValueError, 0), (ValueError, 1), (FileNotFoundError, 1)])
def test_bad_data_is_named_in_a_line(tmp_path, kind, workers):
    class Broken(Rectangles):
        def load(self, index, **options):
            raise kind("an image: it is broken")

    with pytest.raises(ValueError, match=r"^an image: it is broken$"):
        train(tmp_path, replace(CONFIG, workers=workers), Broken())


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"minutes": -1},
        {"clicks": -1},
        {"precision": "fp8"},
        {"jitter": (2.0, 1.0)},
        {"schedule": "x"},
        {"drop_path": 1.0},
        {"refined": 0},
        {"centre_share": 1.5},
        {"iou_weight": -1.0},
        {"iou_weight": float("nan")},
    ],
)
def test_bad_settings(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        TrainConfig(**{"steps": 1, **change})


def test_a_row_counts_the_wait_for_the_device():
    """What recorded steps have left to it: a mean over processes is the first that waits."""
    world = SimpleNamespace(size=1, mean=lambda values: time.sleep(0.2) or values)
    meter = run._Meter(SimpleNamespace(log_every=2, steps=9, batch_size=3, accumulate=1), world, ["loss"])
    for step in (1, 2):
        meter.add(torch.tensor([float(step)]))
        row = meter.finish(step, torch.tensor(1.0), lr=0.1, seconds=0.0)
    assert row["loss"] == 1.5 and row["step_seconds"] >= 0.1 and row["images_per_second"] <= 30
