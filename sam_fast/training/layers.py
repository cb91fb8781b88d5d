"""How the layers of a training step run on a device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from sam_fast.ops.backend import triton_unavailable_reason
from sam_fast.training.attention import FastAttention
from sam_fast.training.rows import FastRows


def fast_layers(device: torch.device) -> AbstractContextManager[object]:
    """Within it, layers on `device` run in ways that are quick to differentiate, where there are any."""
    if device.type == "cpu":
        return FastAttention()
    usable = device.type == "cuda" and triton_unavailable_reason("cuda") is None
    return FastRows() if usable else nullcontext()
