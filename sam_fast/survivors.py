"""Masks that outlived the filters of automatic generation: their logits until all duplicates are gone, and then what
records have.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sam_fast import recycling
from sam_fast.ops.connected_components import remove_small_regions
from sam_fast.ops.packed_masks import place_masks, unpack_masks_apart
from sam_fast.ops.rle import Rle, encode_runs, measure_runs, split_runs
from sam_fast.ops.rle_string import encode_strings, split_strings
from sam_fast.runtime.inference import Frame
from sam_fast.runtime.streams import Download, upload
from sam_fast.runtime.threads import in_threads


class Crop(NamedTuple):
    """A part of an image: `box` [x0, y0, x1, y1] in pixels of the image, and how the model sees it."""

    box: tuple[int, int, int, int]
    frame: Frame


class MaskLogits:
    """Low-resolution logits [K, 4s, 4s] of masks in one or more crops, in parts that are never put together."""

    def __init__(self) -> None:
        self._parts: list[tuple[Crop, Tensor]] = []
        # Which rows of the last part are meant, if not all: few of them may be left soon, and only those need a copy.
        self._rows: Tensor | None = None

    def __len__(self) -> int:
        surplus = 0 if self._rows is None else len(self._parts[-1][1]) - len(self._rows)
        return sum(len(logits) for _, logits in self._parts) - surplus

    def add(self, crop: Crop, logits: Tensor, rows: Tensor | None = None) -> None:
        """Append rows: those that are named, or all. The others stay in memory until the next `add` or `keep`."""
        self._settle()
        self._parts.append((crop, logits))
        self._rows = rows

    def extend(self, other: MaskLogits) -> None:
        """Append the rows of `other`."""
        self._settle()
        self._parts += other._parts
        self._rows = other._rows

    def _settle(self) -> None:
        """Drop rows of the last part that are not meant."""
        if self._rows is not None:
            crop, logits = self._parts.pop()
            self._parts.append((crop, logits[self._rows]))
            self._rows = None

    def keep(self, rows: Tensor) -> Tensor:
        """Drop all rows but `rows` [K], and return where each of these lies from now on, [K].

        Where there are several parts the host waits for a GPU, to learn how many rows each of them keeps.
        """
        if len(self._parts) == 1:
            ((crop, logits),) = self._parts
            meant = rows if self._rows is None else self._rows[rows]
            self._parts, self._rows = [(crop, logits[meant])], None
            return torch.arange(len(rows), device=rows.device)
        self._settle()
        ascending, order = rows.sort()
        parts, self._parts = self._parts[::-1], []
        ends = list(itertools.accumulate(len(logits) for _, logits in reversed(parts)))
        cuts = torch.searchsorted(ascending, upload(ends, rows.device)).tolist() if ends else []
        numbers: Counter[Crop] = Counter()
        for (crop, _), (begin, cut) in zip(reversed(parts), itertools.pairwise([0, *cuts]), strict=True):
            numbers[crop] += cut - begin
        room: dict[Crop, Tensor] = {}  # that is left for rows of a crop
        for (first, end), (begin, cut) in zip(
            itertools.pairwise([0, *ends]), itertools.pairwise([0, *cuts]), strict=True
        ):
            crop, logits = parts.pop()  # whose memory is free from here on
            assert len(logits) == end - first
            if cut > begin:
                if crop not in room:
                    room[crop] = logits.new_empty(numbers[crop], *logits.shape[1:])
                    self.add(crop, room[crop])
                place, room[crop] = room[crop].tensor_split([cut - begin])
                torch.index_select(logits, 0, ascending[begin:cut] - first, out=place)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        return places

    def take(self, most: int) -> Iterator[tuple[Crop, Tensor]]:
        """Rows in order, at most so many at a time; they are gone from here then."""
        self._settle()
        while self._parts:
            crop, logits = self._parts.pop(0)
            for some in logits.split(most):
                if len(some):
                    yield crop, some


class Cleaned(NamedTuple):
    """What the removal of small regions did to masks: [N] bool; [N] int64, pixels; [N, 4] int64 XYXY of the image."""

    changed: Tensor
    areas: Tensor
    boxes: Tensor


class Segmentations:
    """What records hold as `segmentation`, in the order in which bits are added.

    Attributes:
        finished: the segmentations, all of them once the `Download` is finished.
    """

    def __init__(self, mode: str, size: tuple[int, int], download: Download, backend: str) -> None:
        """
        Args:
            mode: binary_mask, uncompressed_rle or coco_rle.
            size: (H, W) of the image.
            download: takes them to the host.
            backend: of the operations.
        """
        self.finished: list[np.ndarray | Rle] = []
        self._mode = mode
        self._size = size
        self._download = download
        self._backend = backend

    def add(self, bits: Tensor, crop: Crop) -> None:
        """Add masks of a crop, bits [N, h, row_bytes(w)]. Of codes a GPU's run lengths are counted, and waited for."""
        x0, y0, x1, _ = crop.box
        if self._mode == "binary_mask":
            self._add_bits(bits, crop)
        else:
            place = {"canvas_size": self._size, "offset": (x0, y0)}
            self._add_runs(*encode_runs(bits, x1 - x0, **place, backend=self._backend))  # type: ignore[arg-type]

    def add_cleaned(self, bits: Tensor, crop: Crop, min_area: float) -> Cleaned:
        """`add` masks of which holes and islands of fewer than `min_area` pixels were removed."""
        x0, y0, x1, _ = crop.box
        height, width = self._size
        bits = place_masks(bits, x1 - x0, self._size, (x0, y0))
        bits, changed = clean(bits, width, min_area, self._backend)
        runs = encode_runs(bits, width, backend=self._backend)
        if self._mode == "binary_mask":
            self._add_bits(bits, crop._replace(box=(0, 0, width, height)))
        else:
            self._add_runs(*runs)
        return Cleaned(changed, *measure_runs(*runs, height))

    def _add_bits(self, bits: Tensor, crop: Crop) -> None:
        x0, y0, x1, y1 = crop.box

        def place(mask: Tensor) -> np.ndarray:
            whole = recycling.masks.take(self._size).tensor.numpy()
            whole.fill(False)
            whole[y0:y1, x0:x1] = mask.numpy()
            return whole

        def receive(bits: Tensor) -> None:
            masks = unpack_masks_apart(bits, x1 - x0, backend=self._backend)
            fills = (y1 - y0, x1 - x0) == self._size
            self.finished += [mask.numpy() for mask in masks] if fills else in_threads(place, masks)

        self._download.add((bits,), receive)

    def _add_runs(self, counts: Tensor, offsets: Tensor) -> None:
        def receive_strings(text: Tensor, string_offsets: Tensor) -> None:
            size = [int(side) for side in self._size]
            self.finished += [{"size": list(size), "counts": s} for s in split_strings(text, string_offsets)]

        def receive_counts(counts: Tensor, offsets: Tensor) -> None:
            self.finished += split_runs(counts, offsets, self._size)

        if self._mode == "uncompressed_rle":
            self._download.add((counts, offsets), receive_counts)
            return
        largest = self._size[0] * self._size[1]
        strings = encode_strings(counts, offsets, largest=largest, backend=self._backend)
        self._download.add(strings, receive_strings)


def clean(bits: Tensor, width: int, min_area: float, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Fill holes and remove islands of fewer than `min_area` pixels: new bits, and which masks had any, [N] bool."""
    bits, filled = remove_small_regions(bits, width, min_area, "holes", backend=backend)
    bits, cleared = remove_small_regions(bits, width, min_area, "islands", backend=backend)
    return bits, filled | cleared
