"""Encoding, one prompt and automatic masks against segment_anything 1.0, same weights: `python -m benchmarks.amg`.

Weights are seeded, so masks are arbitrary; the generator's thresholds are set such that a fair share of them passes
each filter. The photo is the packaged coffee.jpg, enlarged to 1200 x 1800.

Cases: "encode" (set_image), "click" (one point, three masks, image set), "automatic masks" (generate, with encoding).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import Peer, WrongResult, compare, peak_extra_memory, print_rows, rows, write_rows
from sam_fast import SamAutomaticMaskGenerator, SamPredictor
from sam_fast.build_sam import VIT_B, build_sam_from_config
from sam_fast.modeling.seeded import seed_weights

OFFICIAL, OURS = "segment_anything 1.0", "sam_fast"
SIZE = (1200, 1800)
THRESHOLDS = {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.8}
SEED = 3  # of 0 to 3, the seed whose masks are the most varied
CASES = ("encode", "click", "automatic masks")


def photo() -> np.ndarray:
    """uint8 [1200, 1800, 3]."""
    with resources.as_file(resources.files("sam_fast") / "assets" / "photos" / "coffee.jpg") as path:
        return np.asarray(Image.open(path).convert("RGB").resize(SIZE[::-1], Image.Resampling.BICUBIC))


def build(peer: str, points_per_side: int) -> tuple[Any, Any]:
    """The predictor and the generator of one peer, with the seeded weights."""
    settings = {**THRESHOLDS, "points_per_side": points_per_side}
    if peer == OURS:
        model = seed_weights(build_sam_from_config(VIT_B), SEED)
        return SamPredictor(model), SamAutomaticMaskGenerator(model, **settings)
    from tests.oracle import build_official, official

    theirs = seed_weights(build_official(VIT_B), SEED)
    return official.SamPredictor(theirs), official.SamAutomaticMaskGenerator(theirs, **settings)


def calls(predictor: Any, generator: Any, image: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The call of each case; "click" works on the image that "encode" set."""

    def encode() -> torch.Tensor:
        predictor.set_image(image)
        return predictor.get_image_embedding()

    point = np.array([[900, 600]])
    return {
        "encode": encode,
        "click": lambda: predictor.predict(point, np.array([1])),
        "automatic masks": lambda: generator.generate(image),
    }


def gate(expected: Any, got: Any) -> None:
    """Equal embeddings (1e-5), masks (IoU 0.9999), and records (same boxes in the same order)."""
    if isinstance(got, torch.Tensor):
        error = ((got - expected).norm() / expected.norm()).item()
        if error > 1e-5:
            raise WrongResult(f"embedding differs by {error:.1e}")
    elif isinstance(got, list):
        if not got or [r["bbox"] for r in got] != [r["bbox"] for r in expected]:
            raise WrongResult(f"{len(got)} records against {len(expected)}, or other boxes")
    else:
        union = (got[0] | expected[0]).sum()
        if (got[0] & expected[0]).sum() < 0.9999 * union:
            raise WrongResult("masks differ")


def prepare_memory(peer: str, points_per_side: int) -> Callable[[], Any]:
    """For the peak of "automatic masks": everything but the call."""
    predictor, generator = build(peer, points_per_side)
    return calls(predictor, generator, photo())["automatic masks"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3, help="of encode, click (x 5); automatic masks: once")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--no-write", action="store_true", help="print only, leave benchmarks/results alone")
    arguments = parser.parse_args()
    image = photo()
    peers = {peer: calls(*build(peer, arguments.points_per_side), image) for peer in (OFFICIAL, OURS)}
    for peer in peers.values():
        peer["encode"]()  # an image must be set for "click"
    for case in arguments.cases:
        long = case == "automatic masks"
        repetitions = 1 if long else arguments.repetitions * (5 if case == "click" else 1)
        timings = compare([Peer(name, peers[name][case]) for name in peers], gate, repetitions=repetitions)
        peaks = {p: peak_extra_memory(prepare_memory, p, arguments.points_per_side) for p in peers} if long else None
        side = arguments.points_per_side
        shape = f"vit_b, {SIZE[0]}x{SIZE[1]}" + (f", {side}x{side} points" if long else "")
        measured = rows("amg", case, shape, "float32", timings, peaks)
        print_rows(measured)
        if not arguments.no_write:
            write_rows("amg", measured)


if __name__ == "__main__":
    main()
