"""The GPUs that tests of operations run on."""

from __future__ import annotations

import pytest
import torch

from sam_fast import native


@pytest.fixture(params=["emulated", "cuda"])
def gpu(request, monkeypatch) -> torch.device:
    """Where the tensors of a native CUDA operation go: to an emulated GPU, whose memory is the CPU's, or a real one."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
        if (reason := native.cuda_unavailable_reason()) is not None:
            pytest.skip(reason)
        return torch.device("cuda")
    from cuda_emulation.build import emulated_module

    module = emulated_module()
    monkeypatch.setattr(native, "module", lambda: module)
    monkeypatch.setattr(native, "uses_cuda", lambda tensor: True)
    monkeypatch.setattr(native, "cuda_stream", lambda tensor: 0)
    return torch.device("cpu")


@pytest.fixture
def poisoned_memory():
    """New tensors are full of NaN and all ones, so that an output left unwritten shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
