"""From samples to the batches of a training step.

A batch is a function of (seed, step, rank) alone: whatever the number of loader processes, and wherever training was
interrupted, step n sees the same images, augmentations, objects and first prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sam_fast.data.sample import Sample, SampleSource
from sam_fast.training.prompts import central_point, mask_boxes, noised_boxes, random_point

_SAMPLES = 1000  # tried for one place of a batch: many may have no object
_LOOKS = 20  # at a sample that is shown again: what is cut out of it may have no object
_SPREAD = 16  # batches between two that show the same samples
_CANDIDATES = 8  # masks decoded per prompt: small ones vanish at the resolution of the logits, and regions need many


@dataclass(frozen=True)
class TrainingBatch:
    """B images with K objects each.

    Attributes:
        images: uint8 [B, 3, S, S], zeros in the padding (bottom and right).
        sizes: int64 [B, 2], (h, w) of the images without padding.
        targets: bool [B, K, s, s], at the resolution of the logits: S/4 for patches of 16 pixels.
        points: float32 [B, K, 2], a foreground pixel of each object, (x, y) in pixels of the model input.
        boxes: float32 [B, K, 4], its noised box, XYXY in the same frame.
        regions: int64 [B, s, s], the same number where pixels lie in the same masks, -1 in the padding; see
            `losses.grouping_loss`.
    """

    images: Tensor
    sizes: Tensor
    targets: Tensor
    points: Tensor
    boxes: Tensor
    regions: Tensor

    @property
    def scale(self) -> int:
        """Side of a pixel of the targets in pixels of the model input."""
        return self.images.shape[-1] // self.targets.shape[-1]

    def to(self, device: torch.device) -> TrainingBatch:
        """The same batch on another device."""
        return TrainingBatch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def pin_memory(self) -> TrainingBatch:
        """The same batch in pinned memory; DataLoader calls it."""
        return TrainingBatch(*(getattr(self, field.name).pin_memory() for field in fields(self)))

    def unshared(self) -> TrainingBatch:
        """The same batch without the memory of a loader process, each tensor of which is an open file."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return TrainingBatch(*(tensor.clone() if tensor.is_shared() else tensor for tensor in tensors))


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a sample.

    Attributes:
        flip: mirror every second image.
        jitter: range of the factor by which the image is scaled before it is cut or padded to the model's side
            (large-scale jitter: Ghiasi et al., "Simple Copy-Paste", 2021); (1, 1) keeps the image whole.
    """

    flip: bool = False
    jitter: tuple[float, float] = (1.0, 1.0)


class TrainingBatches(Dataset[TrainingBatch]):
    """Batch `index` of one of `world_size` processes, as a map-style dataset.

    Args:
        source: where samples come from; it is run through in a new random order each time.
        side: S, side of the model input.
        batch_size: B, images.
        prompts: K, objects per image; an image with fewer objects repeats them with other prompts.
        scale: side of a pixel of the logits in pixels of the model input, a quarter of a patch.
        smallest: pixels of the logits that an object must cover to be trained on.
        centre_share: share of points that are `prompts.central_point`; the others lie anywhere on their object.
        seed: of everything random.
        rank, world_size: this process, and how many there are; their batches share no sample.
        length: how many batches there are.
        augmentation: random changes.
        repeats: how many batches show the same samples, each time with other augmentations, objects and prompts, for
            samples that are slow to load (data echoing: Choi et al., "Faster Neural Network Training with Data
            Echoing", 2019). These batches are spread over others, see `Blocks`.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        side: int,
        batch_size: int,
        prompts: int,
        seed: int,
        length: int,
        scale: int = 4,
        smallest: int = 1,
        centre_share: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        augmentation: Augmentation | None = None,
        repeats: int = 1,
    ) -> None:
        if len(source) == 0:
            raise ValueError("there are no samples to train on")
        self.source = source
        self.side = side
        self.batch_size = batch_size
        self.prompts = prompts
        self.seed = seed
        self.length = length
        self.scale = scale
        self.smallest = smallest
        self.centre_share = centre_share
        self.rank = rank
        self.world_size = world_size
        self.augmentation = augmentation or Augmentation()
        self.repeats = repeats
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> TrainingBatch:
        block, repeat = divide_index(index, self.repeats)
        return self.block(block)[repeat]

    def block(self, index: int) -> list[TrainingBatch]:
        """The `repeats` batches of the same samples, of which `index` counts the first ones."""
        first = (index * self.world_size + self.rank) * self.batch_size
        items = [self._items(first + place) for place in range(self.batch_size)]
        return [
            TrainingBatch(*(torch.from_numpy(np.stack(column)) for column in zip(*batch, strict=True)))
            for batch in zip(*items, strict=True)
        ]

    def _items(self, position: int) -> list[tuple[np.ndarray, ...]]:
        """The fields of one image of each batch of a block; a sample without a usable object is replaced by another."""
        rng = np.random.default_rng((self.seed, 1, position))
        index = self._sample_index(position)
        for _ in range(_SAMPLES):
            sample = self.source.load(index, max_masks=_CANDIDATES * self.prompts, rng=rng)
            first = self._prepare(sample, rng)
            if first is not None:
                return [first, *(self._again(sample, position, repeat) or first for repeat in range(1, self.repeats))]
            index = int(rng.integers(len(self.source)))
        raise ValueError(f"no object in {_SAMPLES} samples drawn at random: is this data for training?")

    def _again(self, sample: Sample, position: int, repeat: int) -> tuple[np.ndarray, ...] | None:
        """Another look at a sample; None if what is cut out of it has no object time and again."""
        rng = np.random.default_rng((self.seed, 1, position, repeat))
        looks = (self._prepare(sample, rng) for _ in range(_LOOKS))
        return next((look for look in looks if look is not None), None)

    def _prepare(self, sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, ...] | None:
        return prepare(
            sample,
            self.side,
            self.prompts,
            self.augmentation,
            rng,
            scale=self.scale,
            smallest=self.smallest,
            centre_share=self.centre_share,
        )

    def _sample_index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.source))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.source))
        return int(self._order[1][place])


class Blocks(Dataset[list[TrainingBatch]]):
    """The blocks of `batches`, see `TrainingBatches.block`: what a loader process makes at once."""

    def __init__(self, batches: TrainingBatches) -> None:
        self.batches = batches

    def __getitem__(self, index: int) -> list[TrainingBatch]:
        return self.batches.block(index)

    def needed(self, start: int) -> range:
        """The blocks of the batches from `start` on, those included that `interleave` begins with."""
        window = _SPREAD * self.batches.repeats
        return range(start // window * _SPREAD, -(-len(self.batches) // window) * _SPREAD)

    def interleave(self, blocks: Iterator[Sequence[TrainingBatch]], start: int) -> Iterator[TrainingBatch]:
        """The batches from `start` on, of the blocks `needed`: the first ones of 16 blocks, their second ones, ..."""
        kept: list[Sequence[TrainingBatch]] = []
        for index in range(start, len(self.batches)):
            inside = index % (_SPREAD * self.batches.repeats)
            if inside == 0:
                kept = []
            repeat, place = divmod(inside, _SPREAD)
            while len(kept) <= place:
                kept.append([batch.unshared() for batch in next(blocks)])
            yield kept[place][repeat]


def divide_index(index: int, repeats: int) -> tuple[int, int]:
    """The block that batch `index` belongs to, and its place in it, in the order of `Blocks.interleave`."""
    window, inside = divmod(index, _SPREAD * repeats)
    repeat, place = divmod(inside, _SPREAD)
    return window * _SPREAD + place, repeat


def prepare(
    sample: Sample,
    side: int,
    prompts: int,
    augmentation: Augmentation,
    rng: np.random.Generator,
    *,
    scale: int = 4,
    smallest: int = 1,
    centre_share: float = 0.0,
) -> tuple[np.ndarray, ...] | None:
    """One image of a batch: the fields of `TrainingBatch` without B.

    Returns:
        None if no object of the sample covers `smallest` pixels at the resolution of the logits.
    """
    flip = augmentation.flip and rng.random() < 0.5
    window = _draw_window(sample.image.shape[:2], side, rng.uniform(*augmentation.jitter), flip, rng)
    height, width = len(window.rows), len(window.columns)
    counts = _count_pixels(sample.masks, window.rows, window.columns, side, scale)
    targets = _majority(counts, scale)
    usable = np.flatnonzero([np.count_nonzero(target) >= smallest for target in targets])
    if len(usable) == 0:
        return None
    rounds = -(-prompts // len(usable))
    chosen = np.concatenate([rng.permutation(usable) for _ in range(rounds)])[:prompts]
    points, tight = _points_and_boxes(sample.masks, counts, window, scale, chosen, rng, centre_share)
    boxes = noised_boxes(tight, side, rng)
    pixels = np.zeros((3, side, side), np.uint8)
    shown = window.cut_image(sample.image)
    for channel, plane in enumerate(pixels):  # faster than all at once
        plane[:height, :width] = shown[..., channel]
    regions = number_regions(targets, (-(-height // scale), -(-width // scale)))
    return pixels, np.array([height, width]), targets[chosen], points, boxes, regions


def low_resolution(masks: np.ndarray, scale: int = 4) -> np.ndarray:
    """Masks bool [N, S, S] at the resolution of the logits, [N, S/scale, S/scale]: set where half of the pixels are."""
    everything = np.arange(masks.shape[1])
    return _majority(_count_pixels(masks, everything, everything, len(everything), scale), scale)


def number_regions(targets: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Number the regions between the outlines of all masks.

    Args:
        targets: bool [N, s, s], masks at the resolution of the logits.
        size: (h, w) of the part that is not padding, in the same pixels.

    Returns:
        int64 [s, s]; the same number where pixels lie in the same masks, -1 in the padding.
    """
    flat = targets.reshape(len(targets), -1)
    # Sorting is slow: only the pixels where a mask begins or ends are numbered, and others are as those before them.
    starts = np.flatnonzero(np.append(True, (flat[:, 1:] != flat[:, :-1]).any(0)))
    code = np.random.default_rng(0).integers(1, 2**40, len(targets))  # sums of different sets of masks differ
    numbers = np.unique(code @ flat[:, starts], return_inverse=True)[1]
    regions = np.repeat(numbers, np.diff(starts, append=flat.shape[1])).reshape(targets.shape[1:])
    regions[size[0] :], regions[:, size[1] :] = -1, -1
    return regions.astype(np.int64)


@dataclass(frozen=True)
class _Window:
    """What is seen of a sample: a window of its image, resized and maybe mirrored.

    Attributes:
        rows, columns: int [h] and [w], the row or column of the sample that is nearest to each of the window.
        box: (left, top, right, bottom) of the window in pixels of the sample.
        resized: whether the window has other pixels than the sample.
        flip: whether it is mirrored; `columns` are.
    """

    rows: np.ndarray
    columns: np.ndarray
    box: tuple[float, float, float, float]
    resized: bool
    flip: bool

    def cut_image(self, image: np.ndarray) -> np.ndarray:
        """The window of an image, uint8 [H, W, 3], by bilinear interpolation: [h, w, 3]."""
        if self.resized:
            size = len(self.columns), len(self.rows)
            window = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, box=self.box))
        else:
            left, top, right, bottom = map(int, self.box)
            window = image[top:bottom, left:right]
        return window[:, ::-1] if self.flip else window

    def cut_mask(self, mask: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """What `rows` and `columns` of the window show of a mask, bool [H, W], by its nearest pixels."""
        y, x = self.rows[rows], self.columns[columns]
        if self.resized:
            return mask.take(y, 0).take(x, 1)
        window = mask[y[0] : y[-1] + 1, x.min() : x.max() + 1]  # the same as a view, without a copy
        return window[:, ::-1] if self.flip else window


def _draw_window(shape: tuple[int, ...], side: int, factor: float, flip: bool, rng: np.random.Generator) -> _Window:
    """Resize so that the longest side is `factor` * `side`, and draw a window of at most `side` squared.

    Args:
        shape: (H, W) of the sample.
        side: of the model input.
        factor: by which the longest side of the image is longer than that.
        flip: whether to mirror the window.
        rng: draws where it lies.
    """
    height, width = shape
    scale = factor * side / max(height, width)
    size = np.array([max(1, round(height * scale)), max(1, round(width * scale))])
    h, w = np.minimum(size, side)
    y, x = (int(rng.integers(slack + 1)) for slack in size - (h, w))
    steps = (height, width) / size
    rows = ((y + np.arange(h) + 0.5) * steps[0]).astype(int)
    columns = ((x + np.arange(w) + 0.5) * steps[1]).astype(int)
    box = (x * steps[1], y * steps[0], (x + w) * steps[1], (y + h) * steps[0])
    return _Window(rows, columns[::-1] if flip else columns, box, tuple(size) != shape, flip)


def _count_pixels(masks: np.ndarray, rows: np.ndarray, columns: np.ndarray, side: int, scale: int) -> np.ndarray:
    """How many of its scale * scale pixels each mask has in each pixel of the logits.

    Masks are not brought to `side` first: most of what would be written and read again is empty.

    Args:
        masks: bool [N, H, W].
        rows, columns: int [h] and [w], the ones of `masks` that are seen; what is missing to `side` is padding.

    Returns:
        [N, side/scale, side/scale], of the smallest unsigned type that holds scale * scale.
    """
    cells, pixels = side // scale, masks.view(np.uint8)
    counts = np.zeros((len(masks), cells, cells), np.min_scalar_type(scale * scale))
    # Most masks are empty in most rows: only those that are not are gathered, uppermost first.
    occupied = np.logical_or.reduceat(_occupied_rows(masks)[:, rows], np.arange(0, len(rows), scale), axis=1)
    cell, mask = np.nonzero(occupied.T)
    lines = np.zeros((len(cell), masks.shape[2]), counts.dtype)
    for first in range(scale):
        part = rows[first::scale]
        some = np.searchsorted(cell, len(part))  # the lowest may have fewer rows
        lines[:some] += pixels[mask[:some], part[cell[:some]]]
    sums = np.zeros((len(cell), cells), counts.dtype)
    for first in range(scale):
        part = columns[first::scale]
        sums[:, : len(part)] += lines.take(part, 1)
    counts[mask, cell] = sums
    return counts


def _occupied_rows(masks: np.ndarray) -> np.ndarray:
    """Which rows of masks, bool [N, H, W], have a pixel: bool [N, H]."""
    if masks.flags.c_contiguous and masks.shape[2] % 8 == 0:
        masks = masks.view(np.uint64)  # the same in half of the time
    return np.bitwise_or.reduce(masks, axis=2) > 0


def _majority(counts: np.ndarray, scale: int) -> np.ndarray:
    """Where at least half of the scale * scale pixels are set."""
    return counts >= -(-scale * scale // 2)


def _points_and_boxes(
    masks: np.ndarray,
    counts: np.ndarray,
    window: _Window,
    scale: int,
    chosen: np.ndarray,
    rng: np.random.Generator,
    centre_share: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """A point of each chosen mask, and its tight box, in the frame of a window.

    Args:
        masks: bool [N, H, W].
        counts: [N, s, s], see `_count_pixels`.
        chosen: int [K], which of the masks; each has pixels in the window.
        centre_share: share of points that lie at the centre, see `TrainingBatches`.

    Returns:
        float32 [K, 2], (x, y), and float32 [K, 4], XYXY.
    """
    distinct, places = np.unique(chosen, return_inverse=True)
    # In whole pixels of the logits; only what lies in these boxes has to be cut out of the masks.
    outer = mask_boxes(counts[distinct] > 0).astype(int) * scale
    crops = []
    for mask, (left, top, right, bottom) in zip(distinct.tolist(), outer.tolist(), strict=True):
        crops.append(window.cut_mask(masks[mask], slice(top, bottom + scale), slice(left, right + scale)))
    corners = np.tile(outer[:, :2], 2).astype(np.float32)
    centred = rng.random(len(places)) < centre_share if centre_share > 0 else np.zeros(len(places), bool)
    centres = {place: central_point(crops[place]) for place in np.unique(places[centred]).tolist()}
    points = np.stack(
        [
            centres[place] if at_centre else random_point(crops[place], rng)
            for place, at_centre in zip(places.tolist(), centred.tolist(), strict=True)
        ]
    )
    points += corners[places, :2]
    boxes = np.concatenate([mask_boxes(crop[None]) for crop in crops]) + corners
    return points, boxes[places]
