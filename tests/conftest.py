"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is imported: they then run on CPU tensors

import triton.language as tl
from oracle import TINY, build_official, seed_weights
from PIL import Image
from torch import nn
from triton.runtime import interpreter

import sam_fast
from sam_fast.build_sam import build_sam_from_config
from sam_fast.modeling import Sam

PHOTOS = Path(sam_fast.__file__).parent / "assets" / "photos"

_convert_float = interpreter._convert_float


def _rounded(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: object) -> np.ndarray:
    """Triton's interpreter cuts float32 off to bfloat16; GPUs round to the nearest, as PyTorch does."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert_float(values, source, target, rounding_mode)
    bits = torch.from_numpy(np.array(values, np.float32)).bfloat16().view(torch.int16)
    return bits.numpy().view(np.uint16)


interpreter._convert_float = _rounded


def _multiplies_in_8_bits() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 9)
    operand = torch.ones(16, 16).to(torch.float8_e4m3fn)
    scales = torch.ones(16, 1)
    try:
        torch._scaled_mm(operand, operand.t(), scales, scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


# On CPUs PyTorch 2.11 multiplies 8-bit numbers with one scale for all rows only, 2.13 with one for each.
needs_8_bits = pytest.mark.skipif(not _multiplies_in_8_bits(), reason="no products of 8-bit rows here")


@pytest.fixture(scope="session", autouse=True)
def exact_convolutions() -> Iterator[None]:
    """Unless told otherwise, cuDNN rounds float32 to TF32 in PyTorch's own modules, which tests compare to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def tiny_models() -> tuple[nn.Module, Sam]:
    """The official model and ours, of the tiny configuration, with the same weights."""
    official = seed_weights(build_official(TINY))
    ours = build_sam_from_config(TINY)
    ours.load_state_dict(official.state_dict())
    return official, ours


@pytest.fixture(scope="session")
def official_tiny(tiny_models: tuple[nn.Module, Sam]) -> nn.Module:
    return tiny_models[0]


@pytest.fixture(scope="session")
def tiny(tiny_models: tuple[nn.Module, Sam]) -> Sam:
    return tiny_models[1]


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A portrait, uint8 [512, 512, 3], RGB (public domain, NASA)."""
    return np.asarray(Image.open(PHOTOS / "astronaut.jpg"))


@pytest.fixture(scope="session")
def tiny_image(photo: np.ndarray) -> torch.Tensor:
    """The photo for the tiny model, float32 [3, 192, 256] in 0..255; `preprocess` pads it at the bottom."""
    pixels = torch.from_numpy(photo[:384:2, ::2].copy())
    return pixels.permute(2, 0, 1).float()
