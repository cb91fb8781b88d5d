"""Which rows the plots of benchmarks are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import plots


def row(case: str, peer: str, ms: float, commit: str, precision: str = "bf16") -> dict[str, str]:
    return {"case": case, "shape": "x", "peer": peer, "device_ms": str(ms), "commit": commit, "precision": precision}


def test_newest_rows_and_what_was_measured_with_them() -> None:
    rows = [
        row("encoder", "official", 50, "old", "fp32"),
        row("encoder", "sam_fast", 5, "old"),
        row("click", "official", 7, "old", "fp32"),  # sam_fast has no row of it
        row("encoder", "sam_fast", 4, "new"),
        row("encoder", "official", 40, "new", "fp32"),
        row("encoder", "transformers", 20, "newest"),  # without sam_fast beside it
        row("decode", "sam_fast", 1, "old"),
    ]
    encoder, decode = plots.newest(rows, plots.name_on_gpu, "device_ms")
    assert encoder.name == "encoder, x" and encoder.commit == "new"
    assert list(encoder.bars.items()) == [("official", 40), ("sam_fast bf16", 4)], "ours last"
    assert decode.bars == {"sam_fast bf16": 1}


def test_bars_are_as_long_as_times_say() -> None:
    groups = [plots.Group("a", {"sam_fast": 10.0, "onnxruntime": 1000.0}, "abc")]
    pixels = np.asarray(plots.draw_bars(groups, "title"))
    lengths = [(pixels == plots._COLORS[name]).all(2).sum(1).max() for name in ("sam_fast", "onnxruntime")]
    whole = plots._WIDTH - plots._LEFT - plots._RIGHT
    assert lengths[0] <= 1 and abs(lengths[1] - whole) <= 2, "from 10 ms to 1 s"


def test_the_packaged_results_are_drawn(tmp_path: Path) -> None:
    plots.main(["--output", str(tmp_path)])
    for name in ("speed_gpu.png", "speed_cpu.png"):
        assert np.asarray(Image.open(tmp_path / name)).shape[1:] == (plots._WIDTH, 3)
