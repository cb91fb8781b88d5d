"""Whether layers may compute otherwise than PyTorch does: others than autograd may want to know what happens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_watched(*tensors: Tensor) -> bool:
    """Whether tensors are of subclasses, or transforms (`torch.func`), forward gradients, compilation, tracing or hooks
    of what is saved for gradients are on.

    Those have ways of their own to compute, or compute again what they did not keep, as checkpointing does.
    """
    return (
        any(type(x) not in (Tensor, nn.Parameter) for x in tensors)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )
