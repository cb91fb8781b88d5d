"""Reading weights: official `.pth` files, safetensors, and Hugging Face `SamModel` checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    state = torch.load(Path(path), map_location="cpu", weights_only=True)
    model.load_state_dict(state, assign=any(p.is_meta for p in model.parameters()))
