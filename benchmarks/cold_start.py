"""A process that builds a model from a checkpoint and makes a first mask; prints the seconds of each stage as JSON.

`python -m benchmarks.cold_start MODEL CHECKPOINT PEER DEVICE HEIGHT WIDTH`, for benchmarks/gpu.py.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    name, checkpoint, peer, device, height, width = sys.argv[1:]
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def stage(title: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[title] = now - start
        start = now

    import numpy as np
    import torch

    if peer == "sam_fast":
        from sam_fast import SamPredictor
        from sam_fast.build_sam import build_sam_from_config
    else:
        from tests.oracle import build_official
        from tests.oracle import official as package
    from benchmarks.peers import CONFIGS

    image = np.random.default_rng(0).integers(0, 256, (int(height), int(width), 3), dtype=np.uint8)
    stage("import")
    if peer == "sam_fast":
        predictor = SamPredictor(build_sam_from_config(CONFIGS[name], checkpoint=checkpoint).to(device))
    else:
        model = build_official(CONFIGS[name])
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        predictor = package.SamPredictor(model.to(device))
    stage("load")
    predictor.set_image(image)
    if device != "cpu":
        torch.cuda.synchronize()
    stage("encode")
    masks = predictor.predict(np.array([[int(width) // 2, int(height) // 2]]), np.ones(1))[0]
    assert masks.shape == (3, int(height), int(width))
    stage("mask")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
