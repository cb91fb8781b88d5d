"""What every source of training and evaluation data hands out: an image and the masks of its objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Sample:
    """An image with the masks of its objects.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        masks: bool [N, H, W], none of them empty; N may be 0. Masks may overlap (a part lies in its whole).
        name: what the sample is called in logs and tables: a file's name, or a scene's seed.
    """

    image: np.ndarray
    masks: np.ndarray
    name: str


class SampleSource(Protocol):
    """A finite, indexable source of samples; `load` is safe to call from many threads and processes."""

    def __len__(self) -> int: ...

    def load(self, index: int, *, max_masks: int | None = None, rng: np.random.Generator | None = None) -> Sample:
        """Read sample `index`.

        Args:
            index: 0 .. len - 1.
            max_masks: decode at most this many masks.
            rng: draws which ones, without repetition; the first ones without it.
        """
        ...


def choose_masks(count: int, max_masks: int | None, rng: np.random.Generator | None) -> np.ndarray:
    """Indices, ascending, of the masks that `SampleSource.load` decodes out of `count`."""
    if max_masks is None or count <= max_masks:
        return np.arange(count)
    if rng is None:
        return np.arange(max_masks)
    return np.sort(rng.choice(count, max_masks, replace=False))
