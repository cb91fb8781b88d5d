"""Evaluations whose outcome is known, and a real model's, counted again from its predictor."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation.drawings import Drawings, Knowing

from sam_fast import SamPredictor
from sam_fast.data.sample import Sample, choose_masks
from sam_fast.evaluation.evaluate import EvaluationSettings, _first_click, evaluate
from sam_fast.evaluation.methods import Answer, SamMethod, _rank, weights_digest
from sam_fast.evaluation.metrics import mask_iou
from sam_fast.evaluation.protocol import Click, next_click, tight_box
from sam_fast.evaluation.results import Results
from sam_fast.evaluation.tables import comparison, heading
from sam_fast.modeling import Sam

ALL = EvaluationSettings(prompts=("clicks", "box", "everything"), objects_per_image=None)


def test_truth_scores_one() -> None:
    results = evaluate(Drawings(), Knowing(Drawings()), ALL)
    assert results.counts == {"images": 4, "objects": 9}
    correlation = results.summary.pop("score_correlation")
    assert results.summary.pop("masks_per_image") == 3
    expected = {f"click_{n}" for n in (1, 2, 3, 5, 9)} | {"box", "box_top", "box_oracle", "click_1_oracle"}
    expected |= {"boundary_click_1", "boundary_click_5", "boundary_box", "recall_10", "recall_100", "recall_1000"}
    assert results.summary == dict.fromkeys(expected, 1.0)
    scores, ious = [0.9, 0.8, 0.1] * 9, [1.0, 1.0, 0.0] * 9
    assert correlation == pytest.approx(np.corrcoef(scores, ious)[0, 1])


def test_complement_scores_zero_but_its_oracle_one() -> None:
    method = Knowing(Drawings(), spoil=np.logical_not)
    results = evaluate(Drawings(), method, ALL)
    del results.summary["score_correlation"], results.summary["masks_per_image"]
    oracles = {name: value for name, value in results.summary.items() if "oracle" in name}
    assert oracles == {"click_1_oracle": 1.0, "box_oracle": 1.0}
    assert all(value == 0 for name, value in results.summary.items() if name not in oracles)
    # Each click is into the largest region that is wrong: the whole object again, or around it.
    assert [len(clicks) for clicks in method.clicked] == list(range(1, 10)) * 9


def test_half_of_each_object() -> None:
    def left_half(mask: np.ndarray) -> np.ndarray:
        x0, _, x1, _ = tight_box(mask)
        return mask & (np.arange(mask.shape[1]) < (x0 + x1 + 1) / 2)

    method = Knowing(Drawings(), spoil=left_half)
    results = evaluate(Drawings(), method, ALL)
    for name in ("click_1", "click_2", "click_9", "box", "box_top"):
        assert results.summary[name] == 0.5
    assert results.summary["recall_10"] == pytest.approx(0.1)  # at the threshold 0.5 only
    assert {click.label for clicks in method.clicked for click in clicks} == {1}


def test_objects_depend_on_the_seed_alone() -> None:
    def seen(seed: int, **settings: Any) -> list[tuple[str, int]]:
        chosen = EvaluationSettings(seed=seed, objects_per_image=2, **settings)
        return [(row["image"], row["object"]) for row in evaluate(Drawings(), Knowing(Drawings()), chosen).objects]

    assert seen(0) == seen(0) == seen(0, prompts=("box",)) == seen(0, prompts=("box", "everything"))
    assert len({tuple(seen(seed)) for seed in range(6)}) > 1
    assert seen(0, max_images=2) == seen(0)[:4]
    assert [name for name, _ in seen(0)] == [f"drawing {i}" for i in (0, 0, 1, 1, 2, 2)]


def test_digest_tells_objects_apart() -> None:
    def digest(source: Drawings, **settings: Any) -> str:
        return evaluate(source, Knowing(source), EvaluationSettings(**settings)).digest

    assert digest(Drawings()) == digest(Drawings(), prompts=("box",))
    different = [digest(Drawings()), digest(Drawings(), seed=3), digest(Drawings(), objects_per_image=2)]
    assert len({*different, digest(Drawings(size=(50, 64)))}) == 4


def test_first_clicks_anywhere() -> None:
    """Each object has its own, which the seed decides, and later ones are as they are after any other."""

    class Nothing(Knowing):
        def click(self, clicks: Sequence[Click], previous: Answer | None) -> Answer:
            self.clicked.append(tuple(clicks))
            return Answer(np.zeros_like(self.masks[0]), np.zeros_like(self.masks[:1]))

    def clicked(**settings: Any) -> tuple[list[tuple[Click, ...]], Results]:
        method = Nothing(Drawings())
        chosen = EvaluationSettings(prompts=("clicks",), clicks=(1, 2), boundary_clicks=(), **settings)
        results = evaluate(Drawings(), method, replace(chosen, objects_per_image=None))
        return [clicks for clicks in method.clicked if len(clicks) == 2], results

    (central, at_centre), (found, results), (again, _), (other, _) = (
        clicked(**settings)
        for settings in ({}, {"first_click": "random"}, {"first_click": "random"}, {"first_click": "random", "seed": 1})
    )
    assert found == again != other and found != central
    samples = [Drawings().load(i) for i in range(4)]
    truths = [mask for sample in samples for mask in sample.masks]
    assert len(truths) == len(found) == 9
    for truth, (first, second) in zip(truths, found, strict=True):
        assert truth[first.y, first.x] and first.label == 1
        assert second == next_click(truth)
    assert "first_click" not in at_centre.protocol and results.protocol["first_click"] == "random"
    with pytest.raises(ValueError, match="some of these results are of first clicks at the centre, others of first"):
        comparison([results, at_centre])
    boxes = [
        evaluate(Drawings(), Knowing(Drawings()), EvaluationSettings(prompts=("box",), first_click=click))
        for click in ("centre", "random")
    ]
    assert boxes[0].protocol == boxes[1].protocol and boxes[0].digest == boxes[1].digest
    comparison([results, replace(boxes[0], digest=results.digest)])
    assert heading([results]).endswith("seed 0, first clicks at random") and heading([at_centre]).endswith("seed 0")


def test_first_clicks_do_not_follow_from_the_draw_of_objects() -> None:
    """Object 0 is drawn by small random numbers; its click must not be the pixel of the same small number."""
    truth, settings = np.ones((1, 1000), bool), EvaluationSettings(first_click="random")
    places = []
    for index in range(400):
        if choose_masks(10, 1, np.random.default_rng([0, index])).tolist() == [0]:
            click = _first_click(truth, settings, (index, 0))
            assert click is not None
            places.append(click.x)
    assert len(places) > 20 and 350 < np.mean(places) < 650 and max(places) > 800
    drawn = [_first_click(truth, settings, (0, number)) for number in range(20)]
    assert len(set(drawn)) > 15


def test_digest_tells_images_apart() -> None:
    """Also where the masks are the same: scenes of another release, say."""

    class Brighter(Drawings):
        def load(self, index: int, **options: Any) -> Sample:
            sample = super().load(index, **options)
            return replace(sample, image=sample.image + np.uint8(1))

    digests = {evaluate(source, Knowing(source)).digest for source in (Drawings(), Brighter(), Brighter())}
    assert len(digests) == 2


def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    class Latin(Drawings):
        def load(self, index: int, **options: Any) -> Sample:
            return replace(super().load(index, **options), name=os.fsdecode(b"caf\xe9.jpg"))

    results = evaluate(Latin(2), Knowing(Drawings(2)))
    results.save(tmp_path / "a.json")
    assert os.fsencode(Results.load(tmp_path / "a.json").objects[0]["image"]) == b"caf\xe9.jpg"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ("text",)}, "clicks, box and everything"),
        ({"prompts": ()}, "clicks, box and everything"),
        ({"clicks": (0, 1)}, "clicks must be positive"),
        ({"boundary_clicks": (4,)}, "contain boundary_clicks"),
        ({"first_click": "left"}, "first_click must be centre or random, got 'left'"),
        ({"objects_per_image": 0}, "objects_per_image must be positive"),
        ({"max_images": 0}, "max_images must be positive"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**settings)


def test_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match="no object in 1 images"):
        evaluate(Drawings(1), Knowing(Drawings(1)))
    method = Knowing(Drawings())
    method.prompts = frozenset(("box",))
    with pytest.raises(ValueError, match="answers \\['box'\\], asked for \\['clicks'\\]"):
        evaluate(Drawings(), method, EvaluationSettings(prompts=("clicks",)))


def test_sam_by_its_predictor(tiny: Sam) -> None:
    """The protocol of a Sam, written out for one object."""
    source = Drawings(2)
    settings = EvaluationSettings(clicks=(1, 2, 3), boundary_clicks=(), prompts=("clicks", "box"))
    results = evaluate(source, SamMethod(tiny), settings)
    (row,) = results.objects
    sample = source.load(0)
    truth = sample.masks[row["object"]]

    predictor = SamPredictor(tiny)
    predictor.set_image(sample.image)
    click = next_click(truth)
    assert click is not None
    points, labels = [[click.x, click.y]], [click.label]
    masks, scores, logits = predictor.predict(np.array(points), np.array(labels))
    np.testing.assert_allclose(row["scores"], scores, rtol=1e-5)
    assert row["ious"] == [mask_iou(mask, truth) for mask in masks]
    assert row["click_1_oracle"] == max(row["ious"])
    mask, logits = masks[scores.argmax()], logits[[scores.argmax()]]
    assert row["click_1"] == mask_iou(mask, truth)
    for number in (2, 3):
        click = next_click(truth, mask)
        assert click is not None
        points.append([click.x, click.y])
        labels.append(click.label)
        (mask,), _, logits = predictor.predict(
            np.array(points), np.array(labels), mask_input=logits, multimask_output=False
        )
        assert row[f"click_{number}"] == mask_iou(mask, truth)
    (mask,), _, _ = predictor.predict(box=tight_box(truth), multimask_output=False)
    assert row["box"] == mask_iou(mask, truth)
    masks, scores, _ = predictor.predict(box=tight_box(truth))
    assert row["box_top"] == mask_iou(masks[scores.argmax()], truth)
    assert row["box_oracle"] == max(mask_iou(mask, truth) for mask in masks)


def test_proposals_of_sam(tiny: Sam) -> None:
    method = SamMethod(
        tiny, generator={"points_per_side": 4, "pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 1}
    )
    method.set_image(Drawings().load(0).image)
    several = method.everything(1000)
    records = method._generator.generate(Drawings().load(0).image)
    masks = list(several.masks)
    assert several.count == len(masks) == len(records) > 10
    scores = [(record["predicted_iou"], np.nan_to_num(record["stability_score"])) for record in records]
    order = sorted(range(len(records)), key=lambda i: -sum(scores[i]))
    assert order not in (sorted(order, key=lambda i: -scores[i][kind]) for kind in (0, 1)), "of no use as a test"
    areas = [records[i]["area"] for i in order]
    assert [int(mask.sum()) for mask in masks] == areas
    few = method.everything(7)
    assert [int(mask.sum()) for mask in few.masks] == areas[:7]
    results = evaluate(Drawings(), method, EvaluationSettings(prompts=("everything",)))
    assert results.summary.keys() == {"recall_10", "recall_100", "recall_1000", "masks_per_image"}
    assert not math.isnan(results.summary["recall_10"])


def test_masks_whose_stability_is_unknown_come_last_among_their_like() -> None:
    scores = [(0.5, math.nan), (0.9, 0.9), (0.5, 0.1), (0.8, math.nan), (0.7, 0.9), (0.9, math.nan), (0.2, 0.1)]
    records = [{"predicted_iou": iou, "stability_score": stability} for iou, stability in scores]
    assert [scores.index((r["predicted_iou"], r["stability_score"])) for r in sorted(records, key=_rank)] == [
        1, 4, 5, 3, 2, 0, 6,
    ]  # fmt: skip


def test_weights_digest(tiny: Sam) -> None:
    before = weights_digest(tiny)
    bias = tiny.mask_decoder.iou_prediction_head.layers[-1].bias
    value = bias.data[0].item()
    bias.data[0] += 1e-3
    changed = weights_digest(tiny)
    bias.data[0] = value
    assert changed != before == weights_digest(tiny)
