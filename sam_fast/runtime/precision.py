"""The number formats that inference can run in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
# What modules that run as they are use instead.
_BESIDE = {torch.float8_e4m3fn: torch.bfloat16, torch.int8: torch.float32}


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products for `precision` on `device`.

    `auto` is bfloat16 on a CUDA device that has it and float32 elsewhere. On a CUDA device the mask decoder multiplies
    float16 numbers by bf16, where its weights show that none can leave the range (`runtime.ranges`). On a CPU, bf16 and
    int8 are for the linear layers of the image encoder's blocks; where it multiplies bfloat16, attention and the pixels
    of the mask decoder are bfloat16 beside both, and everything else is float32. int8 is for CPUs only, fp16 for CUDA.
    fp8 (e4m3) is for GPUs of compute capability 8.9 and later, for linear layers of the image encoder's blocks, and
    everything else is as by bf16. Whatever the precision, features, logits and scores are returned in float32.

    Raises:
        ValueError: `precision` is unknown.
        RuntimeError: the device cannot run it.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    if precision not in _DTYPES:
        raise ValueError(f"precision must be auto, {', '.join(_DTYPES)}, got {precision!r}")
    if precision == "fp16" and device.type != "cuda":
        raise RuntimeError(f"precision 'fp16' needs a CUDA device, the model is on {device}; use 'bf16' or 'fp32'")
    if precision == "int8" and device.type != "cpu":
        raise RuntimeError(f"precision 'int8' runs on CPUs, the model is on {device}; use 'auto'")
    if precision == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise RuntimeError(
            f"precision 'fp8' needs a GPU of compute capability 8.9, the model is on {device}; use 'auto'"
        )
    return _DTYPES[precision]


def format_beside(dtype: torch.dtype) -> torch.dtype:
    """Where the encoder's linear layers have 8 bits, the format of modules beside them; else `dtype` itself."""
    return _BESIDE.get(dtype, dtype)


def autocast(precision: str, device: torch.device, weights: torch.dtype) -> AbstractContextManager[object]:
    """The number format of modules that run as they are.

    Args:
        precision: see `resolve_precision`.
        device: where they run.
        weights: the format of their weights; with auto, a narrower one than float32 is kept.

    Raises:
        RuntimeError: float32 was asked for of narrower weights.
    """
    dtype = format_beside(resolve_precision(precision, device))
    if precision == "auto" and weights != torch.float32:
        return nullcontext()
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, dtype)
    if weights.itemsize < 4:
        raise RuntimeError(f"precision {precision!r} needs float32 weights, got {weights}; use 'auto' or model.float()")
    return nullcontext()


def weight_dtype(stage: nn.Module) -> torch.dtype:
    """The number format of a stage's weights; float32 if it has none."""
    return next((p.dtype for p in stage.parameters() if p.is_floating_point()), torch.float32)


def advice_for_cpu() -> str:
    """Which precisions are worth trying on this CPU, by its instructions."""
    if torch.cpu._is_avx512_bf16_supported():
        return "bf16 and int8 are faster than fp32"
    if torch.cpu._is_vnni_supported():
        return "int8 is faster than fp32; bf16 is slower, this CPU has no instructions for it"
    return "int8 is a little faster than fp32; bf16 is slower, this CPU has no instructions for it"
