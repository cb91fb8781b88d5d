"""Where Triton kernels can run."""

from __future__ import annotations

import pytest
from sam_fast.kernels import launch


@pytest.mark.parametrize(("architecture", "runs"), [(75, False), (80, True), (90, True), (120, True)])
def test_gpus_that_are_old_are_left_to_pytorch(architecture, runs, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    reason = launch.unavailable_reason("cuda")
    assert reason is None if runs else "compute capability 8.0" in str(reason)
