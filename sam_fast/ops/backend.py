"""Which implementation of an operation runs: one table, one function.

Backends are `native` (C++ on the CPU, CUDA on a GPU), `triton` and `torch` (the reference, on any device). Asking for
one by name either gets it or raises with the reason; `auto` takes the first of the device's row that is available.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache

import torch

from sam_fast import native

# operation -> device type -> backends in order of preference
OPERATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "postprocess_masks": {"cpu": ("native", "torch"), "cuda": ("native", "torch")},
    "packed_masks": {"cpu": ("native", "torch"), "cuda": ("native", "torch")},
    "nms": {"cpu": ("native", "torch"), "cuda": ("native", "torch")},
    "rle": {"cpu": ("native", "torch"), "cuda": ("native", "torch")},
    "connected_components": {"cpu": ("native", "torch"), "cuda": ("native", "torch")},
    "gelu": {"cpu": ("native", "torch"), "cuda": ("torch",)},
    "int8_rows": {"cpu": ("native", "torch"), "cuda": ("torch",)},
    "perceptron": {"cpu": ("native", "torch"), "cuda": ("torch",)},
    "rel_pos_attention": {"cpu": ("native", "torch", "triton"), "cuda": ("triton", "torch")},
    "layer_norm": {"cpu": ("torch", "triton"), "cuda": ("triton", "torch")},
    "quantise": {"cpu": ("torch", "triton"), "cuda": ("triton", "torch")},
    "two_way_attention": {"cpu": ("native", "torch", "triton"), "cuda": ("triton", "torch")},
    "token_attention": {"cpu": ("torch", "triton"), "cuda": ("triton", "torch")},
    "upscale_masks": {"cpu": ("native", "torch", "triton"), "cuda": ("triton", "torch")},
    "resize": {"cpu": ("torch", "triton"), "cuda": ("triton", "torch")},
}
BACKENDS = ("native", "triton", "torch")


def unavailable_reason(operation: str, backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run `operation` on `device_type`, or None if it can."""
    if backend not in OPERATIONS[operation].get(device_type, ("torch",)):
        return f"{operation} has no {backend!r} backend for {device_type} tensors"
    if backend == "native":
        return native.unavailable_reason or (native.cuda_unavailable_reason() if device_type == "cuda" else None)
    if backend == "triton":
        return triton_unavailable_reason(device_type)
    return None


@cache
def triton_unavailable_reason(device_type: str) -> str | None:
    """Why Triton kernels cannot run on tensors of `device_type`, or None if they can."""
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return "triton kernels run on CUDA tensors (TRITON_INTERPRET=1 interprets them on a CPU, for tests)"
    try:
        from sam_fast.kernels import launch  # here, that importing sam_fast does not import triton
    except ImportError as error:
        return f"triton could not be imported: {error}"
    return launch.unavailable_reason(device_type)


def choose_backend(
    operation: str, requested: str, *tensors: torch.Tensor, takes: Mapping[str, str | None] | None = None
) -> str:
    """Return the backend that runs `operation` on `tensors`.

    Args:
        operation: a key of `OPERATIONS`.
        requested: auto, or a backend.
        tensors: the arguments.
        takes: backend -> what it takes that these arguments are not, or None if it takes them; auto passes it over.

    Raises:
        ValueError: `requested` is unknown or does not take the arguments, or the tensors lie on different devices.
        RuntimeError: `requested` was named and cannot run, or a native backend got a tensor that needs a gradient.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"{operation}: tensors are on different devices: {sorted(map(str, devices))}")
    device_type = devices.pop().type if devices else "cpu"
    candidates = OPERATIONS[operation].get(device_type, ("torch",))
    takes = takes or {}
    if requested == "auto":
        fit = (b for b in candidates if takes.get(b) is None)
        backend = next(b for b in fit if unavailable_reason(operation, b, device_type) is None)
    elif requested in BACKENDS:
        reason = unavailable_reason(operation, requested, device_type)
        if reason is not None:
            raise RuntimeError(reason)
        if takes.get(requested) is not None:
            raise ValueError(f"the {requested} {operation} takes {takes[requested]}")
        backend = requested
    else:
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}, got {requested!r}")
    if backend != "torch" and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{operation}: the {backend} backend is inference-only; detach the input or use torch.no_grad()"
        )
    return backend
