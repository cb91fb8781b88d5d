"""The GPU benchmark's own ways, tried on a CPU with a model of a few pixels."""

from __future__ import annotations

import copy
import csv
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import build_official
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
    assert gpu.main([*ARGUMENTS, *rest, "--sections", "encoder,click,decode,post,amg,batch"]) == 0
    rows = rows_of(output)
    found = {(row["case"], row["peer"], row["precision"]) for row in rows}
    for section in ("encoder", "click", "decode", "post", "amg"):
        assert {(section, peers.OFFICIAL, "fp32"), (section, peers.OURS, "fp32")} <= found
    assert {("batch", f"{peers.OURS}, one by one", "fp32"), ("batch", peers.OURS, "fp32")} <= found
    assert ("encoder", "transformers SDPA", "bf16") in found and ("decode", peers.OFFICIAL, "bf16") in found
    for row in rows:
        assert 0 < float(row["device_ms"]) <= float(row["device_p90_ms"])
        assert row["device"] and row["torch"] == torch.__version__ and row["commit"] == "abc" and row["driver"] == ""
        assert row["command"].startswith("python -m benchmarks.gpu --device cpu")
        if row["peer"] == peers.OURS:
            assert float(row["error"]) <= 1e-5  # float32 sums in another order
    assert "left out: a peer of tiny: RuntimeError: precision 'fp8'" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in RESULTS.glob("*.csv")} == before


def test_cold_start(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ensure_built", lambda: None)
    for module in (peers, gpu_sections):  # ours alone: each process imports torch for seconds
        monkeypatch.setattr(module, "has_official", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "gpu.csv"
    assert gpu.main([*ARGUMENTS, "--sections", "cold", "--output", str(output), "--budget", "1000"]) == 0
    rows = rows_of(output)
    assert [row["shape"] for row in rows] == ["tiny, 32x48, empty cache", "tiny, 32x48, filled cache"]
    assert all(0 < float(row["device_ms"]) < float(row["wall_ms"]) for row in rows)


def test_cold_starts_are_compared_with_the_official_one(tmp_path, monkeypatch):
    """In its own precision; what cannot be imported is left out, and where we fail, so does the program."""
    seconds = {peers.OFFICIAL: [3.0], peers.OURS: [6.0, 1.5]}
    code = 0

    def start(command, **_):
        stages = f'{{"mask": {seconds[command[5]].pop(0)}}}'
        return subprocess.CompletedProcess(command, code, stages, "Traceback:\nImportError: no such name")

    monkeypatch.setattr(gpu_sections.subprocess, "run", start)
    run = make_run(tmp_path)
    gpu_sections.run_cold(run, "tiny", None)
    found = [(row.peer, row.precision, row.shape.split(", ")[-1], row.speedup) for row in run.rows]
    assert found == [
        (peers.OFFICIAL, "fp32", "no cache", 1.0),
        (peers.OURS, "auto", "empty cache", 0.5),
        (peers.OURS, "auto", "filled cache", 2.0),
    ]
    code, seconds = 1, {peers.OFFICIAL: [0.0], peers.OURS: [0.0, 0.0]}
    gpu_sections.run_cold(run, "tiny", None)
    assert run.left_out == [f"cold tiny, 32x48, no cache | {peers.OFFICIAL}: ImportError: no such name"]
    assert [line.split(" | ")[1] for line in run.refused] == [f"{peers.OURS}: ImportError: no such name"] * 2


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


def test_failures_are_named_and_stop_nothing(tmp_path, monkeypatch):
    """Compilers raise what they like. Where we fail, so does the program."""

    class CompilationError(Exception):
        pass

    def fail(*_):
        raise CompilationError("no such instruction\nin line 3")

    run = make_run(tmp_path)
    reason = "CompilationError: no such instruction"
    for name, lines in (("other", run.left_out), (peers.OURS, run.refused)):
        gpu_sections._measure_case(run, peers.DevicePeer(name, "bf16", fail), "encoder", "s", fail, {})
        assert lines == [f"encoder s | {name} bf16: {reason}"]
    monkeypatch.setattr(gpu_sections, "peers_of", lambda *_: iter([fail]))
    gpu_sections.run_model(run, "tiny")
    assert run.left_out[1:] == [f"a peer of tiny: {reason}"] and run.rows == []


@pytest.fixture
def eager_compiler(monkeypatch) -> list[str]:
    """torch.compile with a backend that compiles nothing; returns the modes that were asked for."""
    modes: list[str] = []
    compile_ = torch.compile

    def without_code(function, mode):
        modes.append(mode)
        return compile_(function, backend="eager")

    monkeypatch.setattr(torch, "compile", without_code)
    return modes


@torch.no_grad()
def test_compiled_peers(monkeypatch, eager_compiler):
    """The official encoder under --compile, and segment-anything-fast: here a package of the same interface."""
    model = peers.build_ours("tiny", torch.device("cpu"))
    weights = model.state_dict()

    def build_fast() -> nn.Module:
        built = build_official(peers.TINY).bfloat16()
        built.image_encoder = torch.compile(built.image_encoder, mode="max-autotune")
        return built

    def generator(model, *, process_batch_size: int, **settings):
        assert isinstance(model, nn.Module) and process_batch_size > 0
        return types.SimpleNamespace(generate=lambda image: [settings])

    package = types.SimpleNamespace(sam_model_fast_registry={"tiny": build_fast}, SamAutomaticMaskGenerator=generator)
    monkeypatch.setitem(sys.modules, "segment_anything_fast", package)
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    expected = peers.reference(model).encode(pixels)
    compiled = peers.official("tiny", weights, model.device, "bf16 compiled")
    for peer in (compiled, peers.segment_anything_fast("tiny", weights, model.device)):
        assert gpu_sections.error_of("encoder", expected, peer.encode(pixels)) < 0.02
    settings = {"points_per_side": 2, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.6}
    assert peer.generator(*settings.values())(np.zeros((4, 4, 3), np.uint8)) == [settings]
    assert eager_compiler == ["max-autotune"] * 2
    assert gpu_sections.TOLERANCES["encoder"][compiled.precision.split()[0]]


def build_with(monkeypatch, *codes: int) -> tuple[list[list[str]], list[tuple]]:
    """`ensure_built` where programs exit with these codes; returns what was run, and what took this process's place."""
    ran: list[list[str]] = []
    replaced: list[tuple] = []
    exits = iter(codes)

    def run(command, **_):
        ran.append(command)
        return subprocess.CompletedProcess(command, next(exits), "", "no module\nbuilt without it")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu.os, "execve", lambda *arguments: replaced.append(arguments))
    monkeypatch.setattr(gpu.os, "chdir", lambda _: None)
    gpu.ensure_built()
    return ran, replaced


def test_builds_what_is_missing(monkeypatch):
    monkeypatch.delenv(gpu._BUILT, raising=False)
    ran, replaced = build_with(monkeypatch, 0)
    assert len(ran) == 1 and not replaced
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick"])
    (_, pip), ((_, command, environment),) = build_with(monkeypatch, 1, 0)
    assert pip[1:4] == ["-m", "pip", "install"] and pip[-2:] == ["-e", str(ROOT)]
    assert {"--no-build-isolation", "--no-deps"} <= set(pip)
    assert command[1:] == ["-m", "benchmarks.gpu", "--quick"] and environment[gpu._BUILT] == "1"
    with pytest.raises(RuntimeError, match="pip could not build"):
        build_with(monkeypatch, 1, 1)
    monkeypatch.setenv(gpu._BUILT, "1")
    with pytest.raises(RuntimeError, match="was built, and still: built without it"):
        build_with(monkeypatch, 1)


def test_tests_that_cannot_run_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_TESTS_NEED", ("torch", "no_such_package"))
    assert gpu.run_tests(None) and "they need no_such_package" in capsys.readouterr().out


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


def test_batches_must_have_the_same_records():
    first, second = ({"bbox": [0, 0, 3, side], "segmentation": np.eye(4) > side - 0.5} for side in (0, 2))
    images = [[first, second], [second], []]
    assert gpu_sections.error_of("batch", images, copy.deepcopy(images)) == 0
    others = (
        [[second, first], [first], [first]],
        [[first], [], []],
        [[first, {**second, "segmentation": np.eye(4) > 0.5}]],
    )
    for other, share in zip((others[0], others[1], others[2] + images[1:]), (1.0, 2 / 3, 1 / 3), strict=True):
        assert gpu_sections.error_of("batch", images, other) == pytest.approx(share)
    for wrong in ([], images[:2], [*images, []]):
        with pytest.raises(WrongResult, match="images"):
            gpu_sections.error_of("batch", images, wrong)


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


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--sections", "encoder,decoder"], "unknown section decoder; there are encoder, click"),
        (["--sizes", "1080x1920", "1080"], "such as 1080x1920, got '1080'"),
        (["--sizes", "0x5"], "got '0x5'"),
        (["--precisions", "bf16", "bf61"], "invalid choice: 'bf61'"),
    ],
    ids=["section", "size", "no pixels", "precision"],
)
def test_wrong_arguments_are_named_at_once(bad, message, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "ensure_built", pytest.fail)
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", *bad])
    assert message in capsys.readouterr().err


def test_unknown_models_are_named_before_the_tests(monkeypatch):
    monkeypatch.setattr(gpu, "ensure_built", lambda: None)
    monkeypatch.setattr(gpu, "run_tests", pytest.fail)
    with pytest.raises(SystemExit, match="unknown model vit_x; there are vit_b"):
        gpu.main(["--device", "cpu", "--models", "vit_x"])


def test_tests_find_the_peers_of_a_relative_folder(monkeypatch, tmp_path):
    """They begin in the repository's folder, wherever this program was called."""
    monkeypatch.setattr(gpu, "ensure_built", lambda: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    folders: list[str | None] = []
    monkeypatch.setattr(gpu, "run_tests", lambda folder: folders.append(folder) is None)
    gpu.main([*ARGUMENTS, "--peers", "packages", "--sections", "cold", "--budget", "0"])
    assert folders == []  # --quick makes no tests
    arguments = [argument for argument in ARGUMENTS if argument != "--quick"]
    gpu.main([*arguments, "--peers", "packages", "--sections", "cold", "--budget", "0"])
    assert folders == [str(tmp_path / "packages")] and sys.path[0] == str(tmp_path / "packages")
