"""What a model lacks on held-out scenes: their textures, or their shapes? `python -m benchmarks.nano_gap`.

Training scenes that no training run draws (seed 777): as they are, with the photos of held-out scenes in place of those
of training, as they are there, and with the families of shapes of held-out scenes. The photos change the layouts of the
scenes that have one behind, the shapes those of most. One object of each is clicked and boxed as `sam-fast eval` does.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from unittest import mock

from benchmarks.timing import RESULTS, positive, provenance
from sam_fast import sam_model_registry
from sam_fast.data import scenes
from sam_fast.data.textures import texture_bank
from sam_fast.evaluation.evaluate import EvaluationSettings, evaluate
from sam_fast.evaluation.methods import SamMethod, weights_digest
from sam_fast.modeling import Sam

_SEED = 777
_KEPT = ("click_1", "click_1_oracle", "click_5", "box", "score_correlation")
_FILE = RESULTS / "nano" / "gap.csv"
CASES = ("training", "held-out textures", "held-out shapes")


def measure(model: Sam, case: str, images: int) -> dict[str, float]:
    """Means of one case."""
    compose = scenes.compose
    textures, shapes = case == "held-out textures", case == "held-out shapes"
    with (
        mock.patch.object(scenes, "texture_bank", lambda held_out: texture_bank(textures)),
        mock.patch.object(scenes, "compose", lambda rng, size, held_out: compose(rng, size, shapes)),
    ):
        source = scenes.SceneSource(size=512, seed=_SEED)
        settings = EvaluationSettings(max_images=images, prompts=("clicks", "box"))
        return evaluate(source, SamMethod(model), settings).summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="other weights of nano")
    parser.add_argument("--images", type=positive, default=120)
    parser.add_argument("--no-write", action="store_true", help="print only, leave benchmarks/results alone")
    arguments = parser.parse_args()
    model = sam_model_registry["nano"](checkpoint=arguments.checkpoint)
    origin = provenance()
    table = []
    for case in CASES:
        found = measure(model, case, arguments.images)
        means = {name: round(found[name], 4) for name in _KEPT}
        print(case, means, flush=True)
        weights = {"weights": weights_digest(model), "images": arguments.images}
        table.append({"case": case, **weights, **means, **{key: origin[key] for key in ("commit", "date", "command")}})
    if arguments.no_write:
        return
    exists = _FILE.exists()
    with _FILE.open("a", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        if not exists:
            writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
