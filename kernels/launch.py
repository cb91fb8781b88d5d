"""What all Triton kernels share: where they can run, and how a specialisation of one is named and compiled."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Set by TRITON_INTERPRET=1 before this is imported: kernels then run on CPU tensors, slowly, for tests.
INTERPRETED: bool = triton.knobs.runtime.interpret

# Of tl.constexpr type, that kernels may read it. The interpreter computes bfloat16 wrongly: there, what is loaded is
# made float32 first, and only what is stored is rounded.
WIDENED = tl.constexpr(INTERPRETED)

LOG2_E = 1.4426950408889634
TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Variant(NamedTuple):
    """One specialisation of a kernel as the package launches it, with what a compiler needs to know of it.

    Every kernel file has `variants(architecture)`, all that its launch table can ask for; a test compiles them without
    a GPU and looks at registers, spills and instructions.

    Attributes:
        name: readable, unique in its file.
        kernel: the function under `triton.jit`.
        signature: argument -> Triton's type ("*bf16", "i32", "fp32", "tensordesc<bf16[1, 16, 16, 64]>"), for all
            arguments that are no constants; ":16" at its end says that a pointer or number is a multiple of 16.
        constants: argument -> value, for those that are `tl.constexpr`.
        options: num_warps, num_stages, maxnreg.
        wgmma: whether its products must be wgmma instructions on Hopper.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    wgmma: bool = False


@cache
def architecture(device: torch.device) -> int:
    """Compute capability of a CUDA device as two digits, 90 for Hopper; 90 too where kernels are interpreted."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def unavailable_reason(device_type: str) -> str | None:
    """Why Triton kernels cannot run on tensors of `device_type`, or None if they can."""
    if device_type == "cuda":
        if INTERPRETED:
            return "TRITON_INTERPRET=1 is set: kernels are interpreted on CPU tensors"
        return (
            None if architecture(torch.device("cuda")) >= 80 else "Triton kernels need compute capability 8.0 or more"
        )
    if device_type == "cpu" and INTERPRETED:
        return None
    return f"Triton kernels run on CUDA tensors, got {device_type} (for tests: TRITON_INTERPRET=1 interprets them)"
