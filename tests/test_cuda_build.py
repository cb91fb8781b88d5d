"""Every CUDA source compiles for the GPUs that are supported, without one; on Hopper without spilling registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sam_fast import native
from sam_fast.ops import backend

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted(path.name for path in CSRC.glob("*.cu"))
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc, on PATH or named by CUDACXX")
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills_on_hopper(source, tmp_path):
    command = [NVCC, "-std=c++17", "-O3", "--fmad=false", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra"]
    command += ["--threads=2", "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    run = subprocess.run(
        [*command, "-Xptxas=-v", "-c", CSRC / source, "-o", tmp_path / "out.o"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    kernels = re.split(r"Compiling entry function '", run.stderr)[1:]
    found = {architecture: [k for k in kernels if f"for '{architecture}'" in k] for architecture in ("sm_80", "sm_90a")}
    assert found["sm_80"] and len(found["sm_80"]) == len(found["sm_90a"]), run.stderr
    for kernel in found["sm_90a"]:
        match = SPILLS.search(kernel)
        assert match is not None and match.groups() == ("0", "0"), kernel


def test_there_are_cuda_sources():
    assert "postprocess_masks.cu" in SOURCES


def test_why_there_is_no_native_backend_on_a_gpu(monkeypatch):
    class WithoutCuda:
        built_with_cuda = False

    class OldDriver:
        built_with_cuda = True
        cuda_unavailable_reason = staticmethod(lambda: "driver too old")

    for module, reason in ((WithoutCuda, "built without CUDA"), (OldDriver, "driver too old")):
        monkeypatch.setattr(native, "module", lambda module=module: module)
        monkeypatch.setattr(native, "cuda_unavailable_reason", native.cuda_unavailable_reason.__wrapped__)
        assert reason in str(backend.unavailable_reason("postprocess_masks", "native", "cuda"))
        assert backend.unavailable_reason("postprocess_masks", "native", "cpu") is None
        monkeypatch.undo()
    assert backend.unavailable_reason("gelu", "native", "cuda") == "gelu has no 'native' backend for cuda tensors"


@pytest.mark.skipif(not native.module().built_with_cuda, reason="this build has no CUDA operations")
def test_cuda_operations_refuse_cpu_tensors():
    logits, output = torch.zeros(1, 8, 8), torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match="logits must be on a CUDA device"):
        native.module().resize_logits_cuda(output, logits, (8, 8), (4, 4), 8, 0)
