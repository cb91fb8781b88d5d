"""GELU within kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from sam_fast.kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def gelu_of_double(h, EXACT: tl.constexpr):
    """GELU of 2 h: h (1 + erf(sqrt(2) h)), unless EXACT by tanh: h + h tanh(sqrt(2 / pi) (2 h + 0.044715 (2 h)^3)).

    The error of tanh is below a rounding to half precision, and far below one to 8 bits; erf takes far longer.
    """
    if EXACT:
        y = h * (1.0 + tl.erf(h * 1.4142135623730951))
    else:
        argument = h * (1.5957691216 + 0.2854193276 * h * h)
        if _INTERPRETED:
            tanh = 2.0 * tl.sigmoid(2.0 * tl.maximum(argument, -40.0)) - 1.0
        else:
            tanh = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [argument], dtype=tl.float32, is_pure=True, pack=1
            )
        y = h + h * tanh
    return y
