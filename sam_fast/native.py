"""The only importer of the compiled module `_C`."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch  # maps the OpenMP runtime that _C shares with torch; must come first

_module: ModuleType | None
unavailable_reason: str | None
try:
    from sam_fast import _C as _module  # type: ignore[attr-defined, no-redef]

    unavailable_reason = None
except ImportError as error:
    _module = None
    unavailable_reason = f"the compiled module sam_fast._C could not be imported: {error}"


def module() -> ModuleType:
    """Return the compiled module.

    Raises:
        RuntimeError: it is not installed, with the reason.
    """
    if _module is None:
        raise RuntimeError(unavailable_reason)
    return _module


def is_available() -> bool:
    """Whether the compiled module was imported."""
    return _module is not None


@cache
def cuda_unavailable_reason() -> str | None:
    """Why the native operations cannot run on a GPU though the module is installed, or None if they can."""
    if not module().built_with_cuda:
        return "sam_fast was built without CUDA: when it was installed, no nvcc was found, or SAM_FAST_CUDA was OFF"
    if torch.version.hip is not None:
        return "the native operations are built for CUDA, and this torch is built for ROCm"
    reason = module().cuda_unavailable_reason()
    return f"the native operations cannot run on this GPU: {reason}" if reason else None


def uses_cuda(tensor: torch.Tensor) -> bool:
    """Whether a native operation on `tensor` runs on a GPU."""
    return tensor.is_cuda


def cuda_stream(tensor: torch.Tensor) -> int:
    """The address of torch's current stream on the device of `tensor`, on which a native operation runs."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def cpu_level() -> str:
    """The instruction set of the CPU kernels: base, avx2, avx512 or avx512bf16; the variable SAM_FAST_CPU lowers it."""
    return str(module().cpu_level())


def multiplies_bfloat16() -> bool:
    """Whether native operations on a CPU are faster in bfloat16 than in float32."""
    return is_available() and cpu_level() == "avx512bf16"


def num_threads() -> int:
    """How many OpenMP threads a native operation uses: as many as torch does."""
    return torch.get_num_threads()
