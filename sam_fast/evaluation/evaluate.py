"""Show the objects of a source of data to a method, prompt after prompt, and measure its masks.

The way of the data: image and masks of a sample -> some of its objects, drawn by seed -> clicks and boxes
(protocol.py) -> masks (methods.py) -> IoUs (metrics.py) -> results.py.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from sam_fast.data.sample import Sample, SampleSource, choose_masks
from sam_fast.evaluation.methods import BOX, CLICKS, EVERYTHING, Answer, Method
from sam_fast.evaluation.metrics import (
    average_recall,
    boundary_iou,
    correlation,
    mask_iou,
    match_ranks,
    pairwise_iou,
)
from sam_fast.evaluation.protocol import CENTRE, RANDOM, Click, next_click, random_pixel, tight_box
from sam_fast.evaluation.results import Results, provenance

_DIGEST_LETTERS = 16
_FIRST_CLICKS = 1  # the stream of random numbers that they are drawn from
Track = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and on which objects.

    Attributes:
        prompts: of "clicks", "box" and "everything" those that are measured, as far as the method answers them.
        clicks: after how many clicks the IoU is taken.
        boundary_clicks: after how many of them the boundary IoU is taken as well.
        first_click: where the first one lies: at the "centre" of the object, or anywhere on it, "random" by the seed.
        objects_per_image: how many objects of an image are prompted, None for all; "everything" is measured on all.
        max_images: only the first ones of the source; None for all.
        seed: of the draw of objects.
        recall_at: how many masks of an image count for the average recall.
        boundary_ratio: width of a boundary, as a fraction of the image's diagonal.

    Raises:
        ValueError: a number is out of range, or there is no such kind of prompts.
    """

    prompts: tuple[str, ...] = (CLICKS, BOX)
    clicks: tuple[int, ...] = (1, 2, 3, 5, 9)
    boundary_clicks: tuple[int, ...] = (1, 5)
    first_click: str = CENTRE
    objects_per_image: int | None = 1
    max_images: int | None = None
    seed: int = 0
    recall_at: tuple[int, ...] = (10, 100, 1000)
    boundary_ratio: float = 0.02

    def __post_init__(self) -> None:
        unknown = set(self.prompts) - {CLICKS, BOX, EVERYTHING}
        if unknown or not self.prompts:
            raise ValueError(f"prompts must be some of clicks, box and everything, got {list(self.prompts)}")
        if min(self.clicks, default=0) < 1 or not set(self.boundary_clicks) <= set(self.clicks):
            raise ValueError(
                f"clicks must be positive and contain boundary_clicks, got {self.clicks} and {self.boundary_clicks}"
            )
        if self.first_click not in (CENTRE, RANDOM):
            raise ValueError(f"first_click must be centre or random, got {self.first_click!r}")
        for name in ("objects_per_image", "max_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")


@dataclass
class _Measured:
    """What is known after some images."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    ranks: list[np.ndarray] = field(default_factory=list)
    proposals: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    digest: Any = field(default_factory=hashlib.sha256)


def evaluate(
    source: SampleSource,
    method: Method,
    settings: EvaluationSettings | None = None,
    *,
    track: Track = iter,
    data: str = "",
    command: str = "",
) -> Results:
    """Measure a method.

    Args:
        source: images with the masks of their objects.
        method: what is measured.
        settings: what of it, and on which objects; every method is shown the same ones.
        track: goes through the numbers of the images, for a progress bar.
        data, command: how the results say where the images came from and how they were made.

    Raises:
        ValueError: the method answers none of the prompts, or there is no object in the images.
    """
    settings = settings or EvaluationSettings()
    protocol = protocol_of(source, method, settings, data)
    kinds, count = protocol["prompts"], protocol["images"]
    if not kinds:
        raise ValueError(f"{method.name} answers {sorted(method.prompts)}, asked for {list(settings.prompts)}")
    measured = _Measured(seconds=dict.fromkeys(kinds, 0.0))
    for index in track(range(count)):
        _measure_image(source.load(index), index, method, kinds, settings, measured)
    if not measured.rows:
        raise ValueError(f"no object in {count} images")
    return Results(
        method=method.name,
        method_settings=dict(method.settings),
        protocol=protocol,
        digest=measured.digest.hexdigest()[:_DIGEST_LETTERS],
        counts={"images": count, "objects": len(measured.rows)},
        summary=_summary(measured, settings),
        objects=measured.rows,
        seconds={kind: round(seconds, 2) for kind, seconds in measured.seconds.items()},
        provenance=provenance(command),
    )


def protocol_of(source: SampleSource, method: Method, settings: EvaluationSettings, data: str) -> dict[str, Any]:
    """Everything besides the method that fixes the results, as JSON values: settings, data and number of images."""
    plain = {key: list(item) if isinstance(item, tuple) else item for key, item in asdict(settings).items()}
    kinds = [kind for kind in (CLICKS, BOX, EVERYTHING) if kind in settings.prompts and kind in method.prompts]
    if settings.first_click == CENTRE or CLICKS not in kinds:
        del plain["first_click"]  # which earlier releases did not write: their results stay valid
    return {**plain, "prompts": kinds, "data": data, "images": _count(source, settings)}


def digest_of(source: SampleSource, settings: EvaluationSettings) -> str:
    """The digest that results have whose images and prompted objects are these; every image is read for it."""
    digest = hashlib.sha256()
    for index in range(_count(source, settings)):
        _add_to_digest(digest, source.load(index), index, settings)
    return digest.hexdigest()[:_DIGEST_LETTERS]


def _count(source: SampleSource, settings: EvaluationSettings) -> int:
    """How many images are measured."""
    return len(source) if settings.max_images is None else min(len(source), settings.max_images)


def _measure_image(
    sample: Sample, index: int, method: Method, kinds: list[str], settings: EvaluationSettings, measured: _Measured
) -> None:
    method.set_image(sample.image)
    for number in _add_to_digest(measured.digest, sample, index, settings):
        truth = sample.masks[number]
        row: dict[str, Any] = {"image": sample.name, "object": number, "area": int(np.count_nonzero(truth))}
        for kind, measure in ((CLICKS, partial(_clicks, place=(index, number))), (BOX, _box)):
            if kind in kinds:
                started = time.perf_counter()
                row.update(measure(truth, method, settings))
                measured.seconds[kind] += time.perf_counter() - started
        measured.rows.append(row)
    if EVERYTHING in kinds and len(sample.masks):
        started = time.perf_counter()
        proposals = method.everything(max(settings.recall_at))
        measured.ranks.append(match_ranks(pairwise_iou(proposals.masks, sample.masks)))
        measured.proposals.append(proposals.count)
        measured.seconds[EVERYTHING] += time.perf_counter() - started


def _add_to_digest(digest: Any, sample: Sample, index: int, settings: EvaluationSettings) -> list[int]:
    """Draw the objects of an image that are prompted, and hash it and them; returns their numbers."""
    rng = np.random.default_rng([settings.seed, index])
    chosen = choose_masks(len(sample.masks), settings.objects_per_image, rng).tolist()
    name = sample.name.encode(errors="surrogateescape")  # a file's, which need not be UTF-8
    digest.update(name + f" {sample.image.shape}".encode() + sample.image.tobytes())
    for number in chosen:
        truth = sample.masks[number]
        digest.update(f"{number} {truth.shape}".encode() + np.packbits(truth).tobytes())
    return chosen


def _first_click(truth: np.ndarray, settings: EvaluationSettings, place: tuple[int, int]) -> Click | None:
    if settings.first_click == CENTRE:
        return next_click(truth)
    # Its last word keeps the seed apart from that of the draw of objects: zeros at the end of a seed do not count.
    rng = np.random.default_rng([settings.seed, *place, _FIRST_CLICKS])
    return Click(*random_pixel(truth, rng), 1)


def _clicks(truth: np.ndarray, method: Method, settings: EvaluationSettings, place: tuple[int, int]) -> dict[str, Any]:
    """Values of the object at a place (image, object).

    These are click_<n>, boundary_click_<n>, click_1_oracle, scores and ious of the first candidates.
    """
    values: dict[str, Any] = {}
    clicks: list[Click] = []
    answer: Answer | None = None
    for number in range(1, max(settings.clicks) + 1):
        click = _first_click(truth, settings, place) if answer is None else next_click(truth, answer.mask)
        if click is not None:  # otherwise nothing is wrong, and the answer stays
            clicks.append(click)
            answer = method.click(clicks, answer)
        assert answer is not None
        if number == 1 and answer.scores is not None:
            ious = [mask_iou(candidate, truth) for candidate in answer.candidates]
            values |= {"click_1_oracle": max(ious), "scores": answer.scores.tolist(), "ious": ious}
        if number in settings.clicks:
            values[f"click_{number}"] = mask_iou(answer.mask, truth)
        if number in settings.boundary_clicks:
            values[f"boundary_click_{number}"] = boundary_iou(answer.mask, truth, settings.boundary_ratio)
    return values


def _box(truth: np.ndarray, method: Method, settings: EvaluationSettings) -> dict[str, Any]:
    """Values of one object: box, boundary_box, and for a method of several candidates box_top and box_oracle."""
    box = tight_box(truth)
    mask = method.box(box).mask
    values = {"box": mask_iou(mask, truth), "boundary_box": boundary_iou(mask, truth, settings.boundary_ratio)}
    answer = method.box_candidates(box)
    if answer is not None:
        values["box_top"] = mask_iou(answer.mask, truth)
        values["box_oracle"] = max(mask_iou(candidate, truth) for candidate in answer.candidates)
    return values


def _summary(measured: _Measured, settings: EvaluationSettings) -> dict[str, float]:
    """Means over the objects, the correlation over all first candidates, recalls over all truths of all images."""
    first = measured.rows[0]
    summary = {
        name: float(np.mean([row[name] for row in measured.rows]))
        for name, value in first.items()
        if isinstance(value, float)
    }
    if "scores" in first:
        scores, ious = ([x for row in measured.rows for x in row[name]] for name in ("scores", "ious"))
        summary["score_correlation"] = correlation(scores, ious)
    if measured.ranks:
        for limit in settings.recall_at:
            summary[f"recall_{limit}"] = average_recall(measured.ranks, measured.proposals, limit)
        summary["masks_per_image"] = float(np.mean(measured.proposals))
    return summary
