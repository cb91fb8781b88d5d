"""Self-attention of a prompt's tokens, of which there are at most 16: one program per prompt and head.

Tiles of attention for long sequences hold 64 queries and 128 keys, almost all of them padding here. Queries, keys and
values are read where a product left them, side by side; what is read is written side by side again. Scores, softmax and
sums are float32; shares of the softmax are rounded to the type of the values.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from sam_fast.kernels.launch import LOG2_E, TRITON_TYPES, WIDENED, Variant
from torch import Tensor

_TOKENS = tl.constexpr(16)  # at most


def token_attention(output: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int) -> None:
    """Write softmax(q k / sqrt(d)) v of each head.

    Args:
        output: [N, T, heads d], contiguous.
        q, k, v: [N, T, heads d], of any strides but 1 of the last.
        heads: how many there are.
    """
    N, T, width = q.shape
    d = width // heads
    if N and T:
        strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
        token_attention_kernel[(N * heads,)](
            output, q, k, v, *strides, T, d**-0.5 * LOG2_E, HEADS=heads, D=d, num_warps=1
        )


@triton.jit(do_not_specialize=["T"])
def token_attention_kernel(
    output,  # [N, T, HEADS, D]
    q,  # [N, T, HEADS, D], as the next two
    k,
    v,
    q_prompt,  # strides
    q_token,
    k_prompt,
    k_token,
    v_prompt,
    v_token,
    T,
    scale,  # log2(e) / sqrt(D)
    HEADS: tl.constexpr,
    D: tl.constexpr,
):
    prompt, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    t = tl.arange(0, _TOKENS)
    c = head * D + tl.arange(0, D)[None, :]
    exists = (t < T)[:, None]
    queries = _load(q + prompt * q_prompt, t[:, None] * q_token + c, exists)
    keys = _load(k + prompt * k_prompt, t[:, None] * k_token + c, exists)
    values = _load(v + prompt * v_prompt, t[:, None] * v_token + c, exists)
    s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    s = tl.where((t < T)[None, :], s, float("-inf"))
    shares = tl.exp2(s - tl.max(s, 1)[:, None])
    y = tl.dot(shares.to(values.dtype), values, input_precision="ieee") * (1.0 / tl.sum(shares, 1))[:, None]
    tl.store(output + (prompt * T + t[:, None]) * (HEADS * D) + c, y.to(output.dtype.element_ty), mask=exists)


@triton.jit
def _load(x, at, exists):
    values = tl.load(x + at, mask=exists, other=0.0)
    return values.to(tl.float32) if WIDENED else values


def variants(architecture: int) -> Iterator[Variant]:
    """The decoder's: 8 heads of 32 channels."""
    strides = [f"{x}_{of}" for x in "qkv" for of in ("prompt", "token")]
    for kind in TRITON_TYPES.values():
        signature = dict.fromkeys(("output", "q", "k", "v"), f"*{kind}:16")
        signature |= {**dict.fromkeys(strides, "i32:16"), "T": "i32", "scale": "fp32"}
        yield Variant(kind, token_attention_kernel, signature, {"HEADS": 8, "D": 32}, {"num_warps": 1})
