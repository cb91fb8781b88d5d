"""Whether a module may be run by other means than calling it: somebody may listen, or have put in something else."""

from __future__ import annotations

from torch import nn

PACKED_ON = {"cuda"}  # device types for which encoder and decoder are packed


def is_packed_on(device_type: str) -> bool:
    """Whether the plain encoder and decoder run as `PackedEncoder` and `PackedDecoder` on devices of this type."""
    return device_type in PACKED_ON


def is_untouched(module: nn.Module) -> bool:
    """Whether calling `module` does what its class says: no hooks, no `forward` of its own, not compiled."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


def is_untouched_throughout(module: nn.Module) -> bool:
    """`is_untouched` of a module and of everything in it."""
    return all(is_untouched(part) for part in module.modules())
