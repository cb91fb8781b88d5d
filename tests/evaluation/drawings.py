"""A tiny source of data, and methods that know the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sam_fast.data.sample import Sample, choose_masks
from sam_fast.evaluation.methods import BOX, CLICKS, EVERYTHING, Answer, Method, Proposals
from sam_fast.evaluation.protocol import Click


class Drawings:
    """Red, green and blue rectangles on gray, one of them inside another; the last image has no object."""

    def __init__(self, length: int = 4, size: tuple[int, int] = (48, 64)) -> None:
        self.length, self.size = length, size

    def __len__(self) -> int:
        return self.length

    def load(self, index: int, *, max_masks: int | None = None, rng: np.random.Generator | None = None) -> Sample:
        draw = np.random.default_rng(index)
        image = np.full((*self.size, 3), 128, np.uint8)
        masks = np.zeros((0 if index == self.length - 1 else 3, *self.size), dtype=bool)
        for i, mask in enumerate(masks):
            x, y = (2, 2) if i == 0 else (int(draw.integers(5, 30)), int(draw.integers(5, 20)))
            mask[y : y + 30 - 8 * i, x : x + 40 - 8 * i] = True
            image[mask] = 40
            image[mask, i] = 220
        keep = choose_masks(len(masks), max_masks, rng)
        return Sample(image, masks[keep], f"drawing {index}")


class Knowing(Method):
    """Answers with an object's mask or what `spoil` makes of it: of the object with that box, or at the first click.

    It sees the objects of the whole source, as it is told of images only.
    """

    name = "knowing"
    prompts = frozenset((CLICKS, BOX, EVERYTHING))

    def __init__(self, source: Drawings, spoil: Any = lambda mask: mask) -> None:
        self.spoil = spoil
        self.settings = {"version": 1}
        self.samples = [source.load(i) for i in range(len(source))]
        self.masks = self.samples[0].masks
        self.clicked: list[tuple[Click, ...]] = []

    def set_image(self, image: np.ndarray) -> None:
        (self.masks,) = (sample.masks for sample in self.samples if np.array_equal(sample.image, image))

    def click(self, clicks: Sequence[Click], previous: Answer | None) -> Answer:
        from sam_fast.evaluation.protocol import next_click

        self.clicked.append(tuple(clicks))
        (mask,) = (mask for mask in self.masks if next_click(mask) == clicks[0])
        return self._answer(mask)

    def box(self, box: np.ndarray) -> Answer:
        from sam_fast.evaluation.protocol import tight_box

        (mask,) = (mask for mask in self.masks if np.array_equal(tight_box(mask), box))
        return self._answer(mask)

    def box_candidates(self, box: np.ndarray) -> Answer | None:
        return self.box(box)

    def everything(self, limit: int) -> Proposals:
        masks = [self.spoil(mask) for mask in self.masks][:limit]
        return Proposals(len(masks), iter(masks))

    def _answer(self, mask: np.ndarray) -> Answer:
        candidates = np.stack([self.spoil(mask), mask, ~mask])
        return Answer(candidates[0], candidates, np.array([0.9, 0.8, 0.1]))
