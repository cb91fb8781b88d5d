"""Rows of numbers to 8-bit integers and back, around products of integers on a CPU.

Integers have a scale per row and one zero for all: x = scale (integer - zero). One zero is what products of unsigned
with signed integers ask for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_fast import native
from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register

_SMALLEST = 1e-30  # of a row's largest number: a row of zeros stays zeros


def quantise_rows(
    x: Tensor,
    most: int,
    *,
    factors: Tensor | None = None,
    bias: Tensor | None = None,
    gelu: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Round rows to integers whose zero is `most` + 1 and whose largest distance from it is `most`.

    Args:
        x: [M, K], float32 or bfloat16.
        most: from 1 to 127.
        factors: [M], what rows are multiplied with first; or None.
        bias: [K], what is then added; or None.
        gelu: apply x (1 + erf(x / sqrt 2)) / 2 then.
        backend: "native", for K in eights, "torch" or "auto".

    Returns:
        uint8 [M, K], and scales float32 [M]. The scale of a row that is not finite is NaN.

    Raises:
        ValueError: shapes do not fit, or the native backend cannot take these.
    """
    if not 1 <= most <= 127:
        raise ValueError(f"most must be from 1 to 127, got {most}")
    _check(x, factors, bias)
    run = torch.ops.sam_fast.quantise_rows if torch.compiler.is_compiling() else _quantise_rows
    return run(x, most, factors, bias, gelu, backend)


def scale_rows_(
    out: Tensor, x: Tensor, factors: Tensor, bias: Tensor | None = None, *, add: bool = False, backend: str = "auto"
) -> Tensor:
    """x factors + bias, written to `out` or added to it.

    Args:
        out: [M, N], float32 or bfloat16.
        x: float32 [M, N], a product of integers.
        factors: [M], of its rows.
        bias: [N] or None.
        add: keep what `out` holds.
        backend: "native", for N in eights, "torch" or "auto".

    Returns:
        out.

    Raises:
        ValueError: shapes do not fit, or the native backend cannot take these.
    """
    _check(x, factors, bias)
    if out.shape != x.shape:
        raise ValueError(f"out must be {list(x.shape)}, got {list(out.shape)}")
    run = torch.ops.sam_fast.scale_rows_ if torch.compiler.is_compiling() else _scale_rows
    run(out, x, factors, bias, add, backend)
    return out


def _check(x: Tensor, factors: Tensor | None, bias: Tensor | None) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [rows, columns], got {list(x.shape)}")
    if factors is not None and factors.shape != x.shape[:1]:
        raise ValueError(f"factors must be [{x.shape[0]}], got {list(factors.shape)}")
    if bias is not None and bias.shape != x.shape[1:]:
        raise ValueError(f"bias must be [{x.shape[1]}], got {list(bias.shape)}")


def _choose(backend: str, wide: Tensor, *others: Tensor | None) -> str:
    """The backend, for a tensor that may be bfloat16 and others in float32."""
    given = [x for x in others if x is not None]
    fits = wide.dtype in (torch.float32, torch.bfloat16) and all(x.dtype == torch.float32 for x in given)
    fits &= wide.shape[1] % 8 == 0 and all(x.is_contiguous() for x in (wide, *given))
    takes = {"native": None if fits else "contiguous float32 or bfloat16, and columns in eights"}
    return choose_backend("int8_rows", backend, wide, *given, takes=takes)


def _quantise_rows(
    x: Tensor, most: int, factors: Tensor | None, bias: Tensor | None, gelu: bool, backend: str
) -> tuple[Tensor, Tensor]:
    if _choose(backend, x, factors, bias) == "native":
        integers, scales = _quantise_rows_fake(x)
        native.module().quantise_rows(integers, scales, x, factors, bias, gelu, most, native.num_threads())
        return integers, scales
    x = x.float().contiguous()
    x = x if factors is None else x * factors[:, None]
    x = x if bias is None else x + bias
    x = F.gelu(x) if gelu else x
    scales = x.abs().amax(1).clamp(min=_SMALLEST) / most
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    return (x / scales[:, None]).nan_to_num(0).round_().add_(most + 1).to(torch.uint8), scales


def _quantise_rows_fake(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(len(x), dtype=torch.float32)


def _scale_rows(out: Tensor, x: Tensor, factors: Tensor, bias: Tensor | None, add: bool, backend: str) -> None:
    if _choose(backend, out, x, factors, bias) == "native":
        native.module().scale_rows(out, x, factors, bias, add, native.num_threads())
        return
    y = x * factors[:, None]
    y = y if bias is None else y + bias
    out.copy_(out + y if add else y)


register(
    "quantise_rows(Tensor x, int most, Tensor? factors, Tensor? bias, bool gelu, str backend) -> (Tensor, Tensor)",
    _quantise_rows,
    _quantise_rows_fake,
)
register(
    "scale_rows_(Tensor(a!) out, Tensor x, Tensor factors, Tensor? bias, bool add, str backend) -> ()",
    _scale_rows,
    lambda *arguments: None,
)
