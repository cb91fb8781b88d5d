"""Pictures without masks, and the batches of them that masked autoencoding learns from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sam_fast.data.combine import ConcatSource
from sam_fast.data.files import IMAGE_SUFFIXES
from sam_fast.data.open import open_source
from sam_fast.data.sample import Sample, SampleSource, choose_masks
from sam_fast.preprocess import read_image

_ASPECTS = (3 / 4, 4 / 3)  # of what is cut out of a picture


def open_pictures(specs: Sequence[str]) -> SampleSource:
    """The pictures of one or several folders, searched to any depth, or of what `data.open` takes.

    Of a folder with the two folders `images` and `masks` only the former is searched.

    Raises:
        ValueError: there is nothing of that kind, or a folder holds no image.
    """
    if not specs:
        raise ValueError("no data given")
    sources = [PictureFolder(spec) if Path(spec).is_dir() else open_source(spec) for spec in specs]
    return sources[0] if len(sources) == 1 else ConcatSource(sources)


class PictureFolder:
    """A `SampleSource` of the images in a folder and its subfolders, sorted by path, without any masks.

    Raises:
        ValueError: the folder holds no image.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if (self.folder / "images").is_dir() and (self.folder / "masks").is_dir():
            self.folder = self.folder / "images"
        found = (
            os.path.relpath(os.path.join(parent, name), self.folder)
            for parent, names in _walk(self.folder)
            for name in names
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
        )
        self._names = sorted(found)
        if not self._names:
            raise ValueError(f"no images in {self.folder} or its subfolders")

    def __len__(self) -> int:
        return len(self._names)

    def sample_name(self, index: int) -> str:
        """The image's path in the folder."""
        return self._names[index]

    def load(self, index: int, *, max_masks: int | None = None, rng: np.random.Generator | None = None) -> Sample:
        """Read image `index`, turned upright.

        Raises:
            ValueError: it is not a readable image.
        """
        image = read_image(self.folder / self._names[index])
        return Sample(
            image, np.zeros((len(choose_masks(0, max_masks, rng)), *image.shape[:2]), bool), self._names[index]
        )


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder in `root`, itself and linked ones included, with the names of its files."""
    open_folders: dict[str, frozenset[tuple[int, int]]] = {}
    for folder, inner, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        above = open_folders.get(os.path.dirname(folder), frozenset())
        if identity in above:  # a link to a folder that holds it
            inner.clear()
            continue
        open_folders[folder] = above | {identity}
        yield folder, names


class PictureBatches(Dataset[Tensor]):
    """Batch `index` of one of `world_size` processes, uint8 [B, 3, S, S], a function of the seed and the index alone.

    Args:
        source: where pictures come from; it is run through in a new random order each time.
        side: S, pixels.
        batch_size: B.
        seed: of everything random.
        length: how many batches there are.
        rank, world_size: this process, and how many there are; their batches share no picture.
        crop: range of the share of a picture's area that is cut out, at a random place, and resized to S x S.
        flip: mirror every second image.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        side: int,
        batch_size: int,
        seed: int,
        length: int,
        rank: int = 0,
        world_size: int = 1,
        crop: tuple[float, float] = (0.2, 1.0),
        flip: bool = True,
    ) -> None:
        if len(source) == 0:
            raise ValueError("there are no pictures to train on")
        self.source = source
        self.side = side
        self.batch_size = batch_size
        self.seed = seed
        self.length = length
        self.rank = rank
        self.world_size = world_size
        self.crop = crop
        self.flip = flip
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        first = (index * self.world_size + self.rank) * self.batch_size
        return torch.from_numpy(np.stack([self._picture(first + place) for place in range(self.batch_size)]))

    def _picture(self, position: int) -> np.ndarray:
        """One image of a batch, uint8 [3, S, S]."""
        epoch, place = divmod(position, len(self.source))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.source))
        rng = np.random.default_rng((self.seed, 1, position))
        image = self.source.load(int(self._order[1][place]), max_masks=0, rng=rng).image
        image = random_crop(image, self.side, self.crop, rng)
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return image.transpose(2, 0, 1)


def random_crop(image: np.ndarray, side: int, area: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Cut a random rectangle out of a picture and resize it (bicubic) to a square.

    Its share of the area is uniform in `area`, the logarithm of its aspect ratio uniform between those of 3/4 and 4/3;
    a rectangle that does not fit is narrowed to the picture. Source: Szegedy et al., "Going Deeper with Convolutions",
    2015, section 6.

    Args:
        image: uint8 [H, W, 3].
        side: pixels of the square.
        area: range of the share of the picture's area.
        rng: draws the rectangle.

    Returns:
        uint8 [side, side, 3].
    """
    H, W = image.shape[:2]
    pixels = rng.uniform(*area) * H * W
    aspect = math.exp(rng.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
    width = min(max(round(math.sqrt(pixels * aspect)), 1), W)
    height = min(max(round(math.sqrt(pixels / aspect)), 1), H)
    x, y = int(rng.integers(W - width + 1)), int(rng.integers(H - height + 1))
    cut = Image.fromarray(image[y : y + height, x : x + width])
    return np.asarray(cut.resize((side, side), Image.Resampling.BICUBIC))
