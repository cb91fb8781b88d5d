"""What the tests of training share: a source of simple pictures, and a tiny model (imported as `rectangles`)."""

from __future__ import annotations

import numpy as np
import torch

from sam_fast.build_sam import SamConfig, build_sam_from_config
from sam_fast.data.sample import Sample, choose_masks
from sam_fast.modeling import Sam
from sam_fast.training.batches import TrainingBatch, TrainingBatches
from sam_fast.training.initialise import initialise_weights

TINY = SamConfig(
    embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,), image_size=64, window_size=2, decoder_mlp_dim=64
)


class Rectangles:
    """Bright rectangles on a dark ground, `height` x `width`; sample i holds i % 3 + 1 of them (none if `empty`)."""

    def __init__(self, length: int = 10, height: int = 64, width: int = 64, empty: bool = False) -> None:
        self.length, self.height, self.width, self.empty = length, height, width, empty

    def __len__(self) -> int:
        return self.length

    def load(self, index: int, *, max_masks: int | None = None, rng: np.random.Generator | None = None) -> Sample:
        own = np.random.default_rng(index)
        count = 0 if self.empty else index % 3 + 1
        masks = np.zeros((count, self.height, self.width), bool)
        image = np.full((self.height, self.width, 3), 30, np.uint8)
        for mask in masks:
            y, x = own.integers(0, self.height // 2), own.integers(0, self.width // 2)
            mask[y : y + own.integers(12, 30), x : x + own.integers(12, 30)] = True
            image[mask] = own.integers(90, 255, 3)
        return Sample(image, masks[choose_masks(count, max_masks, rng)], f"rectangles-{index}")


def tiny_sam(seed: int = 0) -> Sam:
    """A model of the configuration `TINY`, its weights drawn from `seed`."""
    torch.manual_seed(seed)
    model = build_sam_from_config(TINY)
    initialise_weights(model)
    return model


def batch_of(source: Rectangles | None = None, batch_size: int = 2, prompts: int = 3) -> TrainingBatch:
    """A batch for the model of `tiny_sam`."""
    source = source or Rectangles()
    return TrainingBatches(source, side=64, batch_size=batch_size, prompts=prompts, seed=0, length=5)[0]


def gradients(model: Sam) -> dict[str, torch.Tensor]:
    """Copies of the gradients of a model's parameters."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error_of(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Distance of all gradients together, relative to their length."""
    difference = torch.stack([(found[name] - gradient).norm() for name, gradient in expected.items()]).norm()
    return (difference / torch.stack([gradient.norm() for gradient in expected.values()]).norm()).item()
