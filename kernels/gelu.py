"""GELU within kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from sam_fast.kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_MOST_FLOAT16 = tl.constexpr(65504.0)


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


@triton.jit
def gelu_of_double_in_pairs(h):
    """`gelu_of_double` of float32 h as float16, by tanh, two numbers at a time: two thirds of the instructions.

    Steps are rounded to float16, which together is at most half of a rounding to bfloat16. h is no further from zero
    than float16 reaches: below that GELU is 0 as well, and above it infinite.
    """
    if _INTERPRETED:
        h = tl.maximum(h, -_MOST_FLOAT16, propagate_nan=tl.PropagateNan.ALL)
        h = tl.minimum(h, _MOST_FLOAT16, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
        argument = h * (1.5957691216 + (h * h) * 0.2854193276).to(tl.float16)
        tanh = 2.0 * tl.sigmoid(2.0 * tl.maximum(argument.to(tl.float32), -40.0)) - 1.0
        y = h + h * tanh.to(tl.float16)
    else:
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 h, s, t;
            cvt.rn.satfinite.f16x2.f32 h, $2, $1;
            mul.rn.f16x2 s, h, h;
            fma.rn.f16x2 t, s, $4, $3;
            mul.rn.f16x2 t, t, h;
            tanh.approx.f16x2 t, t;
            fma.rn.f16x2 $0, h, t, h;
            }""",
            "=r,f,f,r,r",
            [h, tl.full([1], 1.5957691216, tl.float16), tl.full([1], 0.2854193276, tl.float16)],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return y
