"""Training a Sam on images with masks: what `run.TrainingRun` does at each step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sam_fast.checkpoints import write_tensors
from sam_fast.data.sample import SampleSource
from sam_fast.modeling import Sam
from sam_fast.training.batches import Augmentation, Blocks, TrainingBatch, TrainingBatches
from sam_fast.training.config import TrainConfig
from sam_fast.training.distributed import World
from sam_fast.training.logs import draw_predictions
from sam_fast.training.optim import set_drop_path
from sam_fast.training.recorded import RecordedStep
from sam_fast.training.run import TrainingRun
from sam_fast.training.step import InteractiveStep, StepSettings, StepStatistics
from sam_fast.utils.files import replace_file

WEIGHTS = "model.safetensors"


class Trainer(TrainingRun[TrainConfig, TrainingBatch]):
    """Trains a Sam on a source of samples, see `TrainingRun` for the attributes."""

    statistics = tuple(field.name for field in fields(StepStatistics))

    def __init__(
        self,
        model: Sam,
        source: SampleSource,
        config: TrainConfig,
        output: str | os.PathLike[str],
        world: World | None = None,
    ) -> None:
        """
        Args:
            model: the weights to start from, on the device of `world`; trained in place.
            source: what to train on.
            config: how.
            output: folder of checkpoints and logs; a checkpoint in it is continued.
            world: the processes that train together; this one alone by default.

        Raises:
            ValueError: the folder holds the checkpoint of a run with other settings, or of another model.
        """
        model.image_encoder.requires_grad_(not config.freeze_encoder)
        set_drop_path(model.image_encoder, 0.0 if config.freeze_encoder else config.drop_path)
        super().__init__(model, model.image_encoder, config, output, world)
        self.sam = model
        self._source = source
        half = torch.bfloat16 if config.precision == "bf16" else None
        step = InteractiveStep(model, train_encoder=not config.freeze_encoder, half=half)
        self._interactive = RecordedStep(step) if config.graphs else step

    def batches(self, length: int) -> TrainingBatches:
        config = self.config
        return TrainingBatches(
            self._source,
            side=self.sam.image_encoder.img_size,
            batch_size=config.batch_size,
            prompts=config.prompts,
            scale=self.sam.image_encoder.patch_size // 4,
            smallest=config.smallest,
            centre_share=config.centre_share,
            seed=config.seed,
            length=length,
            rank=self.world.rank,
            world_size=self.world.size,
            augmentation=Augmentation(config.flip, config.jitter),
            repeats=config.repeats,
        )

    def stream(self, start: int, length: int) -> Iterator[TrainingBatch]:
        if self.config.repeats == 1:
            return super().stream(start, length)
        blocks = Blocks(self.batches(length))
        return blocks.interleave(iter(self.load_ahead(blocks, blocks.needed(start))), start)

    def learn(self, batch: TrainingBatch, rng: np.random.Generator, scale: float) -> Tensor:
        config = self.config
        blend = min(1.0, self.step / config.loss_blend) if config.loss_blend else 1.0
        settings = StepSettings(
            clicks=config.clicks,
            refined=config.refined,
            correction_weight=config.correction_weight,
            iou_weight=config.iou_weight,
            box_share=config.box_share,
            blend=blend,
            grouping=0.0 if config.freeze_encoder else config.grouping,
            prompted=self.step >= config.grouping_steps,
        )
        found = self._interactive(batch, settings, rng, scale)
        return torch.stack([getattr(found, name) for name in self.statistics])

    def draw(self, batch: TrainingBatch) -> Image.Image:
        return draw_predictions(self.sam, batch)

    def export(self, weights: Mapping[str, Tensor]) -> None:
        weights = {name: tensor.detach().float().contiguous().cpu() for name, tensor in weights.items()}
        replace_file(self.output / WEIGHTS, lambda path: write_tensors(path, weights))
