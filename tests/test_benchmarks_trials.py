"""Trials of GPU kernels, tried on a CPU: kernels interpreted, with a model of a few pixels."""

from __future__ import annotations

import csv
import sys
import threading
import time
import types
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks import peers
from benchmarks.trials import __main__ as program
from benchmarks.trials import decoder, run, training, variants
from benchmarks.trials.timing import randn
from sam_fast.runtime import decoding, plain

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


@pytest.fixture(autouse=True)
def gradients_come_back():
    """The program switches them off for its whole process."""
    yield
    torch.set_grad_enabled(True)


def work(folder: Path, section: str, *arguments: str) -> tuple[list[str], dict[str, dict[str, dict[str, str]]]]:
    """Make a section's trials in this process; returns its lines, and rows by case and variant."""
    begun = folder / "begun.txt"
    begun.touch()
    rest = ["--device", "cpu", "--batches", "1", "--prompts", "1", "3", "--size", "32x48", "--points-per-side", "2"]
    rest += ["--precisions", "fp32", "--commit", "abc", "--output", str(folder), "--begun", str(begun)]
    given = program.parse_arguments(["--sections", section, *arguments, *rest])
    assert program.work(given, "python -m benchmarks.trials") == 0
    lines = (folder / "trials.txt").read_text().splitlines()
    rows: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    with (folder / "trials.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["variant"] not in rows[row["case"]], "one row for each"
            rows[row["case"]][row["variant"]] = row
            assert row["section"] == section and float(row["microseconds"]) > 0
            assert row["device"] and row["commit"] == "abc" and row["torch"] == torch.__version__
            assert row["command"] == "python -m benchmarks.trials"
    assert lines[0].startswith("# device") and "commit abc" in lines[0]
    if section not in ("profiles", "training"):
        assert len(lines) == 1 + sum(map(len, rows.values()))
    return lines, rows


def check_errors(rows: dict[str, dict[str, dict[str, str]]], most: float) -> None:
    """All variants of kernels have an error, and PyTorch's own operations none."""
    for case, ways in rows.items():
        for variant, row in ways.items():
            if "terms" in case or variant.startswith("PyTorch"):
                assert row["error"] == ""
            else:
                assert 0 < float(row["error"]) < most, (case, variant)


@INTERPRETED
def test_attention(tmp_path, monkeypatch):
    """Windows, and a global block that is too large for their kernel."""
    monkeypatch.setitem(peers.CONFIGS, "wide", replace(peers.TINY, image_size=272, embed_dim=16, window_size=16))
    _, rows = work(tmp_path, "attention", "--models", "wide")
    pytorch = ["PyTorch, no bias", "PyTorch, bias given"]
    assert {case: list(ways) for case, ways in rows.items()} == {
        "wide windows, batch 1": ["present", "blocks 2", "stages 1", "boxes False", *pytorch],
        "wide windows, batch 1, terms": ["present"],
        "wide global, batch 1": ["present", "stages 2", "stages 4", "boxes False", *pytorch],
        "wide global, batch 1, terms": ["present"],
    }
    check_errors(rows, 0.005)


@INTERPRETED
def test_rows(tmp_path):
    _, rows = work(tmp_path, "rows", "--models", "tiny")
    assert list(rows) == [
        "LayerNorm 64 x 64, adds",
        "LayerNorm 64 x 64, adds, to e4m3",
        "LayerNorm 64 x 64, alone",
        "GELU 64 x 256, to e4m3",
    ]
    assert list(rows["GELU 64 x 256, to e4m3"]) == ["present", "warps 2", "warps 8"]
    assert "PyTorch" in rows["LayerNorm 64 x 64, alone"]
    check_errors(rows, variants.MOST_ERROR)


@INTERPRETED
def test_gradients(tmp_path):
    _, rows = work(tmp_path, "gradients")
    present = ["present", "pixels 64, warps 1", "pixels 128, warps 4", "PyTorch"]
    assert {case: list(ways) for case, ways in rows.items()} == {
        "tokens read, 3 prompts, with gradients": present,
        "pixels take, 3 prompts, with gradients": present,
        "LayerNorm 3072 x 64, with gradients": ["present", "PyTorch"],
        "LayerNorm 768 x 256, with gradients": ["present", "PyTorch"],
        "sums of 768 x 256": ["present", "PyTorch"],
    }
    check_errors(rows, 0.01)


@INTERPRETED
def test_decoder(tmp_path, monkeypatch):
    monkeypatch.setitem(peers.CONFIGS, "narrow", replace(peers.TINY, prompt_embed_dim=64))
    chunks: list[int] = []
    predict = decoding.PackedDecoder.predict_tokens

    def counted(self, image, pe, sparse):
        chunks.append(len(sparse))
        return predict(self, image, pe, sparse)

    monkeypatch.setattr(decoding.PackedDecoder, "predict_tokens", counted)
    monkeypatch.setattr(plain, "PACKED_ON", {"cpu"})
    monkeypatch.setattr(decoder, "AT_A_TIME", (1, 2))
    before = decoding.MOST_PROMPTS
    _, rows = work(tmp_path, "decoder", "--models", "narrow")
    assert set(chunks) == {1, 2, 3} and before == decoding.MOST_PROMPTS
    whole = {case: rows.pop(case) for case in ("decode, 3 prompts", "decode_filtered, 3 prompts")}
    assert all(list(ways) == ["1 at a time", "2 at a time"] for ways in whole.values())
    kernels = "write", "write, one image", "read", "upscale", "upscale in bf16"
    assert list(rows) == [f"{kernel}, 1 prompts" for kernel in kernels]
    assert list(rows["read, 1 prompts"]) == ["present", "pixels 32", "programs x 0.5", "programs x 2"]
    assert list(rows["write, one image, 1 prompts"])[:3] == ["present", "pixels 128, warps 8", "programs x 2"]
    assert list(rows["upscale, 1 prompts"])[:3] == ["present", "warps 4", "pixels 64, warps 4"]
    check_errors(rows, 0.005)


@pytest.mark.parametrize("section", ["ceilings", "products"])
def test_products(section, tmp_path, monkeypatch):
    """With products of 8-bit numbers on any CPU."""

    def multiply(a, b, a_scales, b_scales, *, bias, out_dtype, use_fast_accum):
        assert not use_fast_accum and b.stride(0) == 1
        y = (a.float() @ b.float()) * a_scales * b_scales
        return (y if bias is None else y + bias).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    _, rows = work(tmp_path, section, "--models", "tiny")
    ways = ["bf16", "e4m3, scales of rows", "e4m3, scales of tensors"]
    if section == "ceilings":
        assert {case: list(found) for case, found in rows.items()} == {
            "copy of 0 MiB": ["PyTorch"],
            "sum of 0 MiB": ["PyTorch"],
            "64^3": ways,
        }
        return
    assert list(rows) == [f"tiny {layer}, batch 1" for layer in ("qkv", "proj", "lin1", "lin2")]
    assert list(rows["tiny proj, batch 1"]) == list(rows["tiny lin2, batch 1"]) == ways
    assert set(rows["tiny qkv, batch 1"]) == set(rows["tiny lin1, batch 1"]) == {*ways, "bf16, the product alone"}


def test_profiles(tmp_path):
    """The cases of benchmarks/gpu.py; on a CPU PyTorch's operations stand for kernels."""
    lines, rows = work(tmp_path, "profiles", "--models", "tiny")
    sections = ["encoder", "click", "decode", "decode", "post", "amg"]
    assert [case.split()[0] for case in rows] == sections
    for found in rows.values():
        assert list(found)[:3] == ["a caller waits", "one after another", "all kernels"]
        kernels = [float(row["microseconds"]) for row in list(found.values())[3:]]
        assert kernels == sorted(kernels, reverse=True)
    assert any("aten::addmm" in found for found in rows.values())
    assert sum(line.startswith("profiles") for line in lines) == len(sections)


def test_training(tmp_path, monkeypatch):
    """The whole step has the kernels of its parts, and gradients are computed though the program switches them off."""
    monkeypatch.setitem(peers.CONFIGS, "narrow", replace(peers.TINY, prompt_embed_dim=64))
    monkeypatch.setattr(training, "CASES", (training.Case("narrow", 64, 1, 2, 1, 1),))
    lines, rows = work(tmp_path, "training", "--models", "tiny")
    parts = [case.removeprefix("narrow 64 px, 1 images of 2 prompts, ") for case in rows]
    assert parts == [
        "the whole step",
        "the whole step, recorded",
        "the encoder",
        "the encoder and first prompts",
        "the encoder and grouping",
        "the update",
    ]
    whole, recorded, encoder, prompts, grouping, update = rows.values()
    backward = "aten::native_layer_norm_backward"
    launches = [float(found[backward]["rate"]) for found in (encoder, prompts, whole)]
    assert launches == sorted(set(launches)), "more with each part"
    assert "aten::_fused_adamw_" in whole and "aten::_fused_adamw_" in update and backward not in update
    assert backward in grouping and backward in recorded
    assert sum(line.startswith("training") for line in lines) == len(rows)


# -- variants


def test_functions_stand_in_for_others():
    """In the thread that says so, and as long as the modules are prepared."""
    module = types.SimpleNamespace(launch=lambda x: ("own", x))
    seen = []
    with variants.replaceable((module, "launch")):
        with variants.instead({"launch": lambda x: ("other", x)}):
            thread = threading.Thread(target=lambda: seen.append(module.launch(1)))
            thread.start()
            thread.join()
            with variants.instead({"something else": print}):
                seen.append(module.launch(2))
        seen.append(module.launch(3))
    with variants.instead({"launch": lambda x: ("other", x)}):
        seen.append(module.launch(4))
    assert seen == [("own", 1), ("other", 2), ("own", 3), ("own", 4)]


def test_launches():
    class Launch(NamedTuple):
        pixels: int
        warps: int

    made = variants.launches("launch", Launch(64, 4), {"warps": 8}, {"warps": 4}, {"pixels": 32, "warps": 2})
    assert list(made) == ["present", "warps 8", "pixels 32, warps 2"] and made["present"] == {}
    assert made["pixels 32, warps 2"]["launch"](90, torch.bfloat16) == Launch(32, 2)


def test_what_is_left_unwritten_is_seen():
    memory = torch.zeros(3)
    assert variants._unwritten_is_nan(lambda: (memory, None))[0].isnan().all()


def test_wrong_results_have_no_time(tmp_path):
    trials = make_run(tmp_path)
    calls = [lambda: torch.ones(2)]
    for error in (0.07, float("nan")):
        case = variants.Case(f"case {error}", 1.0, "TB/s", calls, lambda _, error=error: error)
        variants.measure_cases(trials, "section", [case])
    assert trials.failed == ["section: case 0.07: present", "section: case nan: present"]
    assert not (tmp_path / "trials.csv").exists()
    assert "WrongResult: error 7.0e-02, at most 0.06" in (tmp_path / "trials.txt").read_text()


def test_numbers_of_a_seed():
    x = randn(torch.device("cpu"), 5, 7, scale=2.0, seed=3)
    assert x.dtype == torch.bfloat16 and torch.equal(x, randn(torch.device("cpu"), 5, 7, scale=2.0, seed=3))


# -- runs and processes


def make_run(folder: Path, **changes) -> run.Run:
    begun = folder / "begun.txt"
    begun.touch()
    fixed = {"origin": {"device": "some"}, "deadline": float("inf"), "begun": begun, "models": ["tiny"]}
    fixed |= {"precisions": ["fp32"], "batches": [1], "prompts": [2], "size": (32, 48), "points_per_side": 2}
    return run.Run(torch.device("cpu"), folder, **(fixed | {"threads": 0} | changes))


def test_trials_are_begun_once(tmp_path):
    first = make_run(tmp_path)
    done: list[str] = []
    first.trial("one", lambda: done.append("one"))
    second = make_run(tmp_path)  # another process
    second.trial("one", lambda: done.append("again"))
    second.trial("two", lambda: done.append("two"))
    assert done == ["one", "two"] and second.has_begun("one") and not second.failed
    late = make_run(tmp_path, deadline=0.0)
    late.trial("three", pytest.fail)
    assert late.left_out == ["three"]
    assert (tmp_path / "trials.txt").read_text() == "# device some\n"


def test_failures_are_written_and_stop_nothing(tmp_path, monkeypatch):
    trials = make_run(tmp_path)

    def fail():
        raise RuntimeError("no such instruction\nin line 3")

    trials.trial("one", fail)
    assert trials.failed == ["one"]
    assert "!! one: RuntimeError: no such instruction | in line 3" in (tmp_path / "trials.txt").read_text()
    monkeypatch.setattr(run.torch, "zeros", lambda *_, **__: fail())  # as after an illegal address
    with pytest.raises(run.BrokenContext, match="two"):
        trials.trial("two", fail)


CHILD = """
import os, sys, time
from pathlib import Path
begun, ends = Path(sys.argv[1]), sys.argv[2].split(",")
count = len(begun.read_text().splitlines())
for end in ends[count:]:
    with begun.open("a") as file:
        file.write(f"trial {end}\\n")
    if end == "hangs":
        time.sleep(60)
    if end == "aborts":
        os.abort()
sys.exit(1 if "fails" in ends else 0)
"""


@pytest.mark.parametrize(
    "ends, code, replaced",
    [
        ("ends,ends", 0, []),
        ("ends,fails", 1, []),
        ("ends,aborts,ends,hangs,ends", 1, ["-6 in: trial aborts", "-9 in: trial hangs"]),
    ],
)
def test_another_process_goes_on(ends, code, replaced, tmp_path):
    begun, log = tmp_path / "begun.txt", tmp_path / "trials.txt"
    command = [sys.executable, "-c", CHILD, str(begun), ends]
    assert program.supervise(command, begun, log, time.time() + 60, patience=3.0) == code
    assert len(begun.read_text().splitlines()) == len(ends.split(","))
    lines = log.read_text().splitlines() if log.exists() else []
    assert lines == [f"!! the process ended with {how}" for how in replaced]


def test_nothing_is_tried_for_ever(tmp_path):
    """A process that comes no further than the one before it was the last."""
    begun, log = tmp_path / "begun.txt", tmp_path / "trials.txt"
    command = [sys.executable, "-c", "import os; os.abort()"]
    assert program.supervise(command, begun, log, time.time() + 60, patience=10.0) == 1
    assert log.read_text().splitlines() == ["!! the process ended with -6 in: its start"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu(tmp_path, capfd):
    assert program.main(["--output", str(tmp_path / "new")]) == 2
    assert "needs a GPU" in capfd.readouterr().err


def test_the_whole_program(tmp_path, monkeypatch):
    """Parent and child, which begins elsewhere; the command that rows name is the one that was given."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path.parent)
    arguments = ["--sections", "ceilings", "--device", "cpu", "--models", "tiny", "--output", tmp_path.name]
    assert program.main(arguments) in (0, 1)  # 1: no products of 8-bit numbers here
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["case"] == "copy of 0 MiB" and rows[0]["command"] == " ".join(
        ["python", "-m", "benchmarks.trials", *arguments]
    )


def test_unknown_names(tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["--sections", "attention,rest"])
    assert "unknown section rest" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program.main(["--size", "1080"])
    assert "such as 1080x1920, got '1080'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="unknown model vit_x"):
        work(tmp_path, "rows", "--models", "vit_x")
