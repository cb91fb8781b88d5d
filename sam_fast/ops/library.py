"""Registration of the operations with `torch.library`, so that torch.compile and torch.export go through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("sam_fast", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `sam_fast::<schema>` with one implementation for every device and a shape function."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sam_fast::{name}", fake, lib=_LIBRARY)
