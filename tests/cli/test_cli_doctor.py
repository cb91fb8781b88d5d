"""`sam-fast doctor`: the report agrees with what the package does."""

from __future__ import annotations

import json
import platform
from typing import Any

import pytest
import torch

import sam_fast
from sam_fast import native
from sam_fast.ops import backend


def test_report(cli: Any) -> None:
    report = json.loads(cli("doctor", "--json"))
    assert report["versions"]["python"] == platform.python_version()
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["versions"]["sam_fast"] == sam_fast.__version__
    assert report["cpu"]["instruction_set"] == native.cpu_level()
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["native"] == {
        "available": True,
        "unavailable_because": None,
        "built_with_cuda": native.module().built_with_cuda,
    }
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert (report["no_gpu_because"] is None) == torch.cuda.is_available()
    assert report["auto_precision"]["cpu"] == "float32"
    assert report["problems"] == []


def test_operations_agree_with_the_choice_of_backend(cli: Any) -> None:
    report = json.loads(cli("doctor", "--json"))
    assert report["operations"].keys() == backend.OPERATIONS.keys()
    for operation, row in report["operations"].items():
        chosen = backend.choose_backend(operation, "auto", torch.zeros(1))
        assert row["cpu"]["backend"] == chosen
        assert {chosen, *row["cpu"]["also"], *row["cpu"]["not"]} == {"native", "triton", "torch"}


def test_readable_report_says_the_same(cli: Any) -> None:
    report = json.loads(cli("doctor", "--json"))
    text = cli("doctor")
    for value in (report["cpu"]["model"], report["cpu"]["instruction_set"], report["versions"]["torch"]):
        assert value in text
    for operation in report["operations"]:
        assert operation in text
    assert "no problems" in text


def test_missing_native_module_is_a_problem(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the compiled module sam_fast._C could not be imported: for this test"
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "unavailable_reason", reason)
    report = json.loads(cli("doctor", "--json", expect=1))
    assert any(reason in problem for problem in report["problems"])
    no_triton = "nms has no 'triton' backend for cpu tensors"
    assert report["operations"]["nms"]["cpu"] == {
        "backend": "torch",
        "also": [],
        "not": {"native": reason, "triton": no_triton},
    }
    assert "problem:" in cli("doctor", expect=1)
