"""The number formats that inference can run in."""

from __future__ import annotations

import torch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products for `precision` on `device`.

    `auto` is bfloat16 on a CUDA device that has it and float32 elsewhere. Whatever the precision, features, logits and
    scores are returned in float32.

    Raises:
        ValueError: `precision` is unknown.
        RuntimeError: the device cannot run it.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    if precision not in _DTYPES:
        raise ValueError(f"precision must be auto, fp32, bf16 or fp16, got {precision!r}")
    if precision == "fp16" and device.type != "cuda":
        raise RuntimeError(f"precision 'fp16' needs a CUDA device, the model is on {device}; use 'bf16' or 'fp32'")
    return _DTYPES[precision]
