"""LayerNorm of rows, with what surrounds it in a transformer block: a residual before it, 8-bit numbers after it.

x + shift + delta is normalised over its C channels; shift [C] is constant (the biases of the layers before, which then
cost nothing in those layers), delta [rows, C] is what a layer adds to the residual stream. One program per row: it is
read once and written once, where the separate operations read it three times and write it twice. Statistics and sums
are float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from sam_fast.kernels.launch import TRITON_TYPES, Variant
from sam_fast.kernels.quantise import row_constants, row_options, store_row
from torch import Tensor


def layer_norm(
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None = None,
    delta: Tensor | None = None,
    total: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """Write LayerNorm(x + shift + delta) to `output`, and x + delta to `total`.

    Args:
        output: [rows, C], or float8_e4m3fn with `scales`.
        x, delta: [rows, C], contiguous.
        weight, bias, shift: [C], float32.
        total: [rows, C], of x's type; may be x. Needed with `delta` alone.
        scales: [rows, 1] float32, by which the output is to be multiplied.
    """
    rows, C = x.shape
    if rows and C:
        layer_norm_kernel[(rows,)](
            output, x, weight, bias, shift, delta, total, scales, eps, **row_constants(C), **row_options(C)
        )


@triton.jit
def layer_norm_kernel(
    output,  # [rows, C]
    x,  # [rows, C]
    weight,  # [C]
    bias,  # [C]
    shift,  # [C], or None
    delta,  # [rows, C], or None
    total,  # [rows, C], or None
    scales,  # [rows], or None
    eps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,  # C as a power of two
):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, CHANNELS)
    exists = c < C
    values = tl.load(x + row * C + c, mask=exists, other=0.0).to(tl.float32)
    if delta is not None:
        values += tl.load(delta + row * C + c, mask=exists, other=0.0).to(tl.float32)
    if total is not None:
        values = values.to(total.dtype.element_ty)
        tl.store(total + row * C + c, values, mask=exists)
        values = values.to(tl.float32)
    if shift is not None:
        values += tl.load(shift + c, mask=exists, other=0.0)
    mean = tl.sum(values, 0) / C
    centred = tl.where(exists, values - mean, 0.0)
    normalised = centred * tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    y = normalised * tl.load(weight + c, mask=exists, other=0.0) + tl.load(bias + c, mask=exists, other=0.0)
    store_row(output, scales, row, c, exists, y, C)


def variants(architecture: int) -> Iterator[Variant]:
    """All that the encoders of the package ask for, and what the tokens of the decoder do."""
    formats = (torch.bfloat16, torch.float16, torch.float32)
    for C in (256, 768, 1024, 1280):
        for dtype in formats:
            kind = TRITON_TYPES[dtype]
            signature = {"output": f"*{kind}:16", "delta": f"*{kind}:16", "eps": "fp32"}
            signature |= {name: "*fp32:16" for name in ("x", "weight", "bias", "shift", "total")}
            name, rest = f"{C} channels {kind}", {"scales": None}
            yield Variant(name, layer_norm_kernel, signature, {**row_constants(C), **rest}, row_options(C))
            signature = {"output": f"*{kind}:16", "x": f"*{kind}:16", "eps": "fp32"}
            signature |= {name: "*fp32:16" for name in ("weight", "bias", "shift")}
            rest = dict.fromkeys(("delta", "total", "scales"))
            name += ", rows alone"
            yield Variant(name, layer_norm_kernel, signature, {**row_constants(C), **rest}, row_options(C))
            if C == 256:
                name = f"tokens, {kind}"
                signature = {name: "*fp32:16" for name in ("output", "x", "weight", "bias", "total")}
                signature |= {"delta": f"*{kind}:16", "eps": "fp32"}
                rest = dict.fromkeys(("shift", "scales"))
                yield Variant(name, layer_norm_kernel, signature, {**row_constants(C), **rest}, row_options(C))
                signature = {name: "*fp32:16" for name in ("output", "weight", "bias")}
                signature |= {"x": f"*{kind}:16", "eps": "fp32"}
                rest = dict.fromkeys(("shift", "delta", "total", "scales"))
                name += ", rows alone"
                yield Variant(name, layer_norm_kernel, signature, {**row_constants(C), **rest}, row_options(C))
        if architecture >= 90:  # which has products of 8-bit numbers
            signature = {"output": "*fp8e4nv:16", "delta": "*bf16:16", "eps": "fp32"}
            signature |= {name: "*fp32:16" for name in ("x", "weight", "bias", "shift", "total", "scales")}
            yield Variant(f"{C} channels to 8 bits", layer_norm_kernel, signature, row_constants(C), row_options(C))
