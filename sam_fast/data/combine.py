"""Sources made of sources: several behind one another, and parts of one."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from sam_fast.data.sample import Sample, SampleSource

_BUCKETS = 10_000  # a share is a number of these


class ConcatSource:
    """Several sources one behind the other. A source that is given twice has its samples twice.

    Attributes:
        sources: the sources.
    """

    def __init__(self, sources: Sequence[SampleSource]) -> None:
        self.sources = list(sources)
        self._ends = list(itertools.accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def sample_name(self, index: int) -> str:
        """The sample's name in its own source."""
        return sample_name(*self._locate(index))

    def load(self, index: int, *, max_masks: int | None = None, rng: np.random.Generator | None = None) -> Sample:
        """Read sample `index`, as `SampleSource.load`."""
        source, inner = self._locate(index)
        return source.load(inner, max_masks=max_masks, rng=rng)

    def _locate(self, index: int) -> tuple[SampleSource, int]:
        index = range(len(self))[index]  # IndexError outside, and the meaning of negative ones
        at = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[at], index - (self._ends[at - 1] if at else 0)


class SubsetSource:
    """Some samples of a source.

    Attributes:
        source: the source.
        indices: which of its samples, int64 [N].
    """

    def __init__(self, source: SampleSource, indices: Iterable[int] | np.ndarray) -> None:
        self.source = source
        self.indices = np.array(indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def sample_name(self, index: int) -> str:
        """The sample's name in the source."""
        return sample_name(self.source, int(self.indices[index]))

    def load(self, index: int, *, max_masks: int | None = None, rng: np.random.Generator | None = None) -> Sample:
        """Read sample `index`, as `SampleSource.load`."""
        return self.source.load(int(self.indices[index]), max_masks=max_masks, rng=rng)


def first_samples(source: SampleSource, count: int) -> SubsetSource:
    """The first `count` samples, or all if there are fewer."""
    return SubsetSource(source, np.arange(min(count, len(source))))


def validation_samples(source: SampleSource, share: float) -> SubsetSource:
    """About `share` (0..1) of the samples, chosen by a hash of their names.

    A sample stays on its side when others are added or removed, and on every machine. What is left of it is
    `training_samples(source, 1 - share)`; the two never overlap when their shares add up to at most 1.
    """
    return SubsetSource(source, np.flatnonzero(_buckets(source) < _limit(share)))


def training_samples(source: SampleSource, share: float) -> SubsetSource:
    """About `share` (0..1) of the samples, from the other end than `validation_samples`."""
    return SubsetSource(source, np.flatnonzero(_buckets(source) >= _BUCKETS - _limit(share)))


def sample_name(source: SampleSource, index: int) -> str:
    """The name of a sample without loading it: the source's `sample_name`, or else the index."""
    name_of = getattr(source, "sample_name", None)
    return str(index) if name_of is None else name_of(index)


def _limit(share: float) -> int:
    if not 0 <= share <= 1:
        raise ValueError(f"a share of the samples lies between 0 and 1, got {share}")
    return round(share * _BUCKETS)


def _buckets(source: SampleSource) -> np.ndarray:
    """A number in 0.._BUCKETS - 1 for each sample, int64 [N]."""
    digests = (hashlib.blake2b(sample_name(source, i).encode(errors="surrogateescape")) for i in range(len(source)))
    return np.fromiter((int.from_bytes(digest.digest()[:8], "big") % _BUCKETS for digest in digests), np.int64)
