"""The image side of the mask decoder's two-way attention: one sweep over the pixels of an image.

Notation: X [P, C] are an image's pixels (its tokens), `pe` their positional encoding, T the tokens of a prompt, h heads
of width d, and row t h + i of the R = T h rows is head i of token t. Wq, Wk, Wv, Wo are projections of an attention.

* Pixels that take from tokens score (X + pe) (Wq^T k) / sqrt(d) + bq . k / sqrt(d), and add softmax (v Wo^T) + bo: the
  few tokens are projected, never the image. Residual and LayerNorm follow.
* Tokens that read pixels score (q Wk) (X + pe)^T / sqrt(d); q . bk is the same for every pixel and cancels in the
  softmax. What they read is (softmax X), to be projected by Wv and Wo afterwards.

Where no prompt has written into the image yet, the pixels' queries are the same for all prompts and may be given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_fast import native
from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register

HEADS = 8  # of the native backend: the lanes of its vectors


class Write(NamedTuple):
    """What N prompts offer to the pixels of an image, and the normalisation that follows.

    Attributes:
        offered: v Wo^T by head, [N, R, C].
        bias: bo, [C].
        norm_weight, norm_bias, eps: of the LayerNorm, [C].
        absorbed_keys: Wq^T k / sqrt(d) by head, [N, C, R]; None with `queries`.
        constant: bq . k / sqrt(d), [N, R]; None with `queries`.
        queries: projections (X + pe) Wq^T + bq of one image for all prompts, [P, d, h], or None.
        keys: k / sqrt(d), [N, T, d, h]; None without `queries`.
    """

    offered: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    absorbed_keys: Tensor | None = None
    constant: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None


def two_way_attention(
    image: Tensor,
    pe: Tensor,
    write: Write | None,
    absorbed_queries: Tensor | None,
    heads: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Let pixels take from tokens, then let tokens read the pixels; either may be left out.

    Args:
        image: X, [N, P, C], or [1, P, C] for all prompts.
        pe: [P, C].
        write: what pixels take from; None leaves the image as it is.
        absorbed_queries: q Wk / sqrt(d) by head, [N, C, R]; None if nobody reads.
        heads: h.
        backend: "native", "torch" or "auto", which takes the native one for 8 heads of float32 and channels in eights.

    Returns:
        the image that was written [N, P, C], or `image` itself, and what was read, [N, R, C] or None.

    Raises:
        ValueError: shapes do not fit, or the native backend cannot take these.
    """
    P, C = image.shape[1:]
    tensors = [image, pe, *(x for x in write or () if isinstance(x, Tensor))]
    if absorbed_queries is not None:
        tensors.append(absorbed_queries)
    if P == 0:
        raise ValueError("an image must have pixels")
    if pe.shape != (P, C) or (absorbed_queries is not None and absorbed_queries.shape[1] != C):
        raise ValueError(f"pe must be [{P}, {C}] and absorbed_queries [N, {C}, R]")
    fits = heads == HEADS and C % HEADS == 0 and all(x.dtype == torch.float32 for x in tensors)
    if backend == "native" and not fits:
        raise ValueError(f"the native two_way_attention takes {HEADS} heads, channels in eights, and float32")
    if write is None and absorbed_queries is None:
        return image, None
    arguments = image, pe, *(write or _NO_WRITE), absorbed_queries, heads, backend if fits else "torch"
    if torch.compiler.is_compiling():
        written, read = torch.ops.sam_fast.two_way_attention(*arguments)
    else:
        written, read = _two_way_attention(*arguments)
    return image if write is None else written, None if absorbed_queries is None else read


def two_way_attention_reference(
    image: Tensor, pe: Tensor, write: Write | None, absorbed_queries: Tensor | None, heads: int
) -> tuple[Tensor, Tensor | None]:
    """`two_way_attention` in PyTorch."""
    if write is not None:
        if write.queries is None:
            assert write.absorbed_keys is not None and write.constant is not None
            scores = torch.baddbmm(write.constant[:, None], _for_all(image + pe, write), write.absorbed_keys)
        else:
            assert write.keys is not None
            scores = torch.einsum("pdh,ntdh->npth", write.queries, write.keys).flatten(2)
        shares = scores.unflatten(2, (-1, heads)).softmax(2).flatten(2)  # [N, P, R]
        written = image + torch.baddbmm(write.bias, shares, write.offered)
        image = F.layer_norm(written, write.bias.shape, write.norm_weight, write.norm_bias, write.eps)
    if absorbed_queries is None:
        return image, None
    scores = absorbed_queries.transpose(1, 2) @ (image + pe).transpose(1, 2)  # [N, R, P]
    return image, scores.softmax(2) @ image


def _for_all(image: Tensor, write: Write) -> Tensor:
    return image.expand(len(write.offered), -1, -1)


# What the operator's arguments are where nothing is written.
_NO_WRITE: tuple[Any, ...] = (None, None, None, None, 0.0, None, None, None, None)


def _two_way_attention(image: Tensor, pe: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The operator: what is not written or read is empty."""
    *parts, absorbed_queries, heads, backend = rest
    write = None if parts[0] is None else Write(*parts)
    tensors = [x for x in (image, pe, *parts, absorbed_queries) if isinstance(x, Tensor)]
    written, read = _two_way_attention_fake(image, pe, *rest)
    if choose_backend("two_way_attention", backend, *tensors) == "torch":
        results = two_way_attention_reference(image, pe, write, absorbed_queries, heads)
        return written if write is None else results[0], read if results[1] is None else results[1]
    native.module().two_way_attention(
        written,
        read,
        image.contiguous(),
        pe.contiguous(),
        len(written) if write is not None else len(read),
        0 if write is None else write.offered.shape[1] // HEADS,
        read.shape[1] // HEADS,
        *(x.contiguous() if isinstance(x, Tensor) else x for x in parts),
        None if absorbed_queries is None else absorbed_queries.contiguous(),
        native.num_threads(),
    )
    return written, read


def _two_way_attention_fake(image: Tensor, pe: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    offered, absorbed_queries = rest[0], rest[-3]
    _, P, C = image.shape
    written = image.new_empty(0 if offered is None else len(offered), P, C)
    if absorbed_queries is None:
        return written, image.new_empty(len(written), 0, C)
    return written, image.new_empty(len(absorbed_queries), absorbed_queries.shape[2], C)


register(
    "two_way_attention(Tensor image, Tensor pe, Tensor? offered, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, Tensor? absorbed_keys, Tensor? constant, Tensor? queries, Tensor? keys, Tensor? absorbed_queries, "
    "int heads, str backend) -> (Tensor, Tensor)",
    _two_way_attention,
    _two_way_attention_fake,
)
