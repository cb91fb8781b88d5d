"""The GPU benchmark's own ways, tried on a CPU with a model of a few pixels."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import gpu, gpu_sections, peers
from benchmarks.device_timing import DeviceRow, measure, p90
from benchmarks.timing import RESULTS, WrongResult

ROOT = Path(__file__).parents[1]
ARGUMENTS = ["--device", "cpu", "--quick", "--models", "tiny", "--sizes", "32x48", "--points-per-side", "2"]
ARGUMENTS += ["--prompts", "2"]


@pytest.fixture(autouse=True)
def gradients_come_back():
    """`main` switches them off for its whole process."""
    yield
    torch.set_grad_enabled(True)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_section_writes_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "ensure_built", lambda: None)
    before = {path: path.read_bytes() for path in RESULTS.glob("*.csv")}
    output = tmp_path / "new" / "gpu.csv"
    rest = ["--precisions", "fp32", "fp8", "--output", str(output), "--commit", "abc", "--budget", "1000"]
    assert gpu.main([*ARGUMENTS, *rest, "--sections", "encoder,click,decode,post,amg"]) == 0
    rows = rows_of(output)
    found = {(row["case"], row["peer"], row["precision"]) for row in rows}
    for section in ("encoder", "click", "decode", "post", "amg"):
        assert {(section, peers.OFFICIAL, "fp32"), (section, peers.OURS, "fp32")} <= found
    assert ("encoder", "transformers SDPA", "bf16") in found and ("decode", peers.OFFICIAL, "bf16") in found
    for row in rows:
        assert 0 < float(row["device_ms"]) <= float(row["device_p90_ms"])
        assert row["device"] and row["torch"] == torch.__version__ and row["commit"] == "abc" and row["driver"] == ""
        assert row["command"].startswith("python -m benchmarks.gpu --device cpu")
        if row["peer"] == peers.OURS:
            assert float(row["error"]) <= 1e-5  # float32 sums in another order
    assert "left out: a peer of tiny: precision 'fp8'" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in RESULTS.glob("*.csv")} == before


def test_cold_start(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ensure_built", lambda: None)
    monkeypatch.setattr(peers, "has_official", lambda: False)  # ours alone: each process imports torch for seconds
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "gpu.csv"
    assert gpu.main([*ARGUMENTS, "--sections", "cold", "--output", str(output), "--budget", "1000"]) == 0
    rows = rows_of(output)
    assert [row["shape"] for row in rows] == ["tiny, 32x48, empty cache", "tiny, 32x48, filled cache"]
    assert all(0 < float(row["device_ms"]) < float(row["wall_ms"]) for row in rows)


def make_run(tmp_path: Path, **changes) -> gpu_sections.Run:
    fixed = {"seconds": 0.01, "deadline": float("inf"), "sections": ["encoder"], "precisions": ["fp32"]}
    fixed |= {"batches": [1], "prompts": [2], "sizes": [(32, 48)], "points_per_side": 2}
    return gpu_sections.Run(torch.device("cpu"), tmp_path / "gpu.csv", {}, **(fixed | changes))


def test_wrong_results_have_no_time(tmp_path):
    run = make_run(tmp_path)
    good = torch.ones(2, 3)
    peer = peers.DevicePeer("other", "bf16", lambda pixels: pixels)
    first = {"encoder shape": (good, 1.0)}
    calls = []

    def call(i: int) -> torch.Tensor:
        calls.append(i)
        return good * 1.5

    gpu_sections._measure_case(run, peer, "encoder", "shape", call, first)
    assert calls == [0] and run.rows == [] and not run.output.exists()
    assert run.refused == ["encoder shape | other bf16: error 5.00e-01, at most 5e-02 is allowed"]
    gpu_sections._measure_case(run, peer, "encoder", "shape", lambda i: good * torch.nan, first)
    assert len(run.refused) == 2
    gpu_sections._measure_case(run, peer, "encoder", "shape", lambda i: good, first)
    assert len(rows_of(run.output)) == 1 and run.rows[0].error == 0


def test_nothing_begins_late(tmp_path):
    run = make_run(tmp_path, deadline=0.0)
    gpu_sections._measure_case(run, peers.DevicePeer("p", "fp32", lambda x: x), "encoder", "s", pytest.fail, {})
    assert run.left_out == ["encoder s | p fp32"]


def test_errors():
    error_of = gpu_sections.error_of
    one = torch.ones(4)
    assert error_of("decode", one, one * 1.25) == 0.25
    with pytest.raises(WrongResult, match="shape"):
        error_of("encoder", one, torch.ones(5))
    masks = np.array([[1, 1, 0, 0]], bool)
    assert error_of("click", masks, np.array([[1, 0, 0, 0]], bool)) == 0.5
    assert error_of("click", masks & False, masks & False) == 0
    boxes = torch.tensor([[0, 0, 5, 5], [1, 1, 2, 2]])
    assert error_of("post", (boxes, one[:2]), (boxes.clamp(max=4), one[:2])) == 0.5
    with pytest.raises(WrongResult, match="stability"):
        error_of("post", (boxes, one[:2]), (boxes, one[:2] * 0.5))
    records = [{"bbox": [0, 0, 9, 9]}, {"bbox": [20, 20, 9, 9]}]
    assert error_of("amg", records, records[::-1]) == 0
    assert error_of("amg", records, records[:1]) == 0.5
    assert error_of("amg", records, []) == 1 and error_of("amg", [], []) == 0


def test_narrow_modules_take_and_give_float32():
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor, *, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert x.dtype == self.weight.dtype == torch.bfloat16
            return x * self.weight, index

    module = Doubled()
    peers._narrow(module, torch.bfloat16)
    product, index = module(torch.full((2,), 1.001), index=torch.tensor(3))
    assert product.dtype == torch.float32 and (product == 1).all() and index.dtype == torch.int64


def test_measure_counts_calls():
    calls: list[int] = []
    measured = measure(calls.append, torch.device("cpu"), seconds=0.0, fewest=4)
    assert calls == [0, 0, 1, 2, 3] and len(measured.wall) == 4 and measured.peak_bytes is None
    assert p90([float(i) for i in range(1, 11)]) == 9 and p90([7.0]) == 7


def test_rows_have_the_columns_that_a_figure_needs():
    columns = set(DeviceRow.__dataclass_fields__)
    assert {"device", "driver", "torch", "triton", "commit", "shape", "precision", "date", "command"} <= columns


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "needs a GPU" in done.stderr


@pytest.mark.parametrize("bad", [["--sections", "encoder,decoder"], ["--models", "vit_x"]])
def test_unknown_names(bad, monkeypatch):
    monkeypatch.setattr(gpu, "ensure_built", lambda: None)
    with pytest.raises(SystemExit, match="unknown"):
        gpu.main(["--device", "cpu", "--no-tests", *bad])
