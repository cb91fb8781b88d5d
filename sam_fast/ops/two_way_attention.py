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

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_fast import native
from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register

HEADS = 8  # of the native backend, the lanes of its vectors, and of Triton's
_TRITON_CHANNELS = (32, 64, 128, 256)
_TRITON_ROWS = 128  # that pixels take from: of 16 tokens
_SHARED_BY_128_ROWS = 163 * 1024  # bytes of shared memory that suffice for them, in half precision
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Let pixels take from tokens, then let tokens read the pixels; either may be left out.

    Args:
        image: X, [N, P, C], or [1, P, C] for all prompts.
        pe: [P, C].
        write: what pixels take from; None leaves the image as it is.
        absorbed_queries: q Wk / sqrt(d) by head, [N, C, R]; None if nobody reads.
        heads: h.
        backend: "native", "triton", "torch" or "auto". Native takes channels in eights, images in float32 or bfloat16
            and all else in float32: with a bfloat16 image it rounds to that what it multiplies with pixels. Triton
            takes up to 16 tokens to take from, 32, 64, 128 or 256 channels, and float32 or half precision, which
            image, pe and all that is multiplied with them share. Both take 8 heads. What they do not take, auto leaves
            to PyTorch.
        overwrite: the caller has no more use for X [N, P, C]: Triton then writes over it, and takes no more memory.

    Returns:
        the image that was written [N, P, C], or `image` itself, of its type; and what was read, [N, R, C] or None, of
        the type of absorbed_queries.

    Raises:
        ValueError: shapes do not fit, or the backend that was asked for cannot take these.
    """
    P, C = image.shape[1:]
    if P == 0:
        raise ValueError("an image must have pixels")
    if pe.shape != (P, C) or (absorbed_queries is not None and absorbed_queries.shape[1] != C):
        raise ValueError(f"pe must be [{P}, {C}] and absorbed_queries [N, {C}, R]")
    if write is None and absorbed_queries is None:
        return image, None
    arguments = image, pe, *(write or _NO_WRITE), absorbed_queries, heads, backend
    if torch.compiler.is_compiling():
        written, read = torch.ops.sam_fast.two_way_attention(*arguments)
    else:
        written, read = _two_way_attention(*arguments, overwrite=overwrite)
    return image if write is None else written, None if absorbed_queries is None else read


def two_way_attention_reference(
    image: Tensor, pe: Tensor, write: Write | None, absorbed_queries: Tensor | None, heads: int
) -> tuple[Tensor, Tensor | None]:
    """`two_way_attention` in PyTorch, float32 inside."""
    dtype, read_dtype = image.dtype, None if absorbed_queries is None else absorbed_queries.dtype
    image, pe, write, absorbed_queries = _widened(image, pe, write, absorbed_queries)
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
        return image.to(dtype), None
    image = image.to(dtype).to(image.dtype)  # tokens read what was stored
    scores = absorbed_queries.transpose(1, 2) @ (image + pe).transpose(1, 2)  # [N, R, P]
    return image.to(dtype), (scores.softmax(2) @ image).to(read_dtype)


def _takes(
    image: Tensor, pe: Tensor, write: Write | None, absorbed_queries: Tensor | None, heads: int
) -> dict[str, str | None]:
    """Backend -> what it takes that these arguments are not; see `choose_backend`."""
    C = image.shape[2]
    factors = [image, pe, absorbed_queries]
    if write is not None:
        factors += [write.offered, write.absorbed_keys, write.queries, write.keys]
    dtypes = {x.dtype for x in factors if x is not None}
    beside = [x for x in (*factors[1:], *(write or ())) if isinstance(x, Tensor)]
    native_fits = heads == HEADS and C % HEADS == 0 and image.dtype in (torch.float32, torch.bfloat16)
    native_fits &= all(x.dtype == torch.float32 for x in beside)
    triton_fits = heads == HEADS and C in _TRITON_CHANNELS and len(dtypes) == 1 and image.dtype in _TRITON_TYPES
    if write is not None:
        width = 128 if write.queries is None else write.queries[0].numel()
        rows = write.offered.shape[1]
        triton_fits &= rows <= _triton_rows(image) and width in _TRITON_CHANNELS
    triton_fits &= pe.numel() < 2**31  # offsets within an image have 32 bits
    native = f"{HEADS} heads, channels in eights, an image in float32 or bfloat16, and all else in float32"
    triton = (
        f"{HEADS} heads, {_TRITON_CHANNELS} channels, {_triton_rows(image) // HEADS} tokens and one of float32, "
        f"bfloat16, float16, got {heads}, {C} and {sorted(map(str, dtypes))}"
    )
    return {"native": None if native_fits else native, "triton": None if triton_fits else triton}


def _triton_rows(image: Tensor) -> int:
    """How many rows Triton's pixels can take from, on that device and of that type.

    In half precision a program holds all of them in shared memory: more than 64 do not fit into that of GPUs other than
    those for data centres (99 KiB on sm_86, sm_89 and sm_120).
    """
    if not image.is_cuda or image.dtype == torch.float32 or _shared_memory(image.device) >= _SHARED_BY_128_ROWS:
        return _TRITON_ROWS
    return _TRITON_ROWS // 2


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may use at most."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def _widened(
    image: Tensor, pe: Tensor, write: Write | None, absorbed_queries: Tensor | None
) -> tuple[Tensor, Tensor, Write | None, Tensor | None]:
    dtype = torch.promote_types(image.dtype, torch.float32)
    if write is not None:
        parts: list[Any] = [x.to(dtype) if isinstance(x, Tensor) else x for x in write]
        write = Write(*parts)
    if absorbed_queries is not None:
        absorbed_queries = absorbed_queries.to(dtype)
    return image.to(dtype), pe.to(dtype), write, absorbed_queries


def _for_all(image: Tensor, write: Write) -> Tensor:
    return image.expand(len(write.offered), -1, -1)


# What the operator's arguments are where nothing is written.
_NO_WRITE: tuple[Any, ...] = (None, None, None, None, 0.0, None, None, None, None)


def _two_way_attention(image: Tensor, pe: Tensor, *rest: Any, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """The operator: what is not written or read is empty."""
    *parts, absorbed_queries, heads, backend = rest
    write = None if parts[0] is None else Write(*parts)
    tensors = [x for x in (image, pe, *parts, absorbed_queries) if isinstance(x, Tensor)]
    takes = _takes(image, pe, write, absorbed_queries, heads)
    chosen = choose_backend("two_way_attention", backend, *tensors, takes=takes)
    own = write is not None and len(image) == len(write.offered)  # none of these images is another prompt's as well
    if overwrite and own and chosen == "triton" and image.is_contiguous():
        read = _read_like(image, len(image), absorbed_queries)
        _launch(image, read, image, pe, write, absorbed_queries)
        return image, read
    written, read = _two_way_attention_fake(image, pe, *rest)
    if chosen == "torch":
        results = two_way_attention_reference(image, pe, write, absorbed_queries, heads)
        return written if write is None else results[0], read if results[1] is None else results[1]
    if chosen == "triton":
        _launch(written, read, image, pe, write, absorbed_queries)
        return written, read
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


def _launch(
    written: Tensor, read: Tensor, image: Tensor, pe: Tensor, write: Write | None, absorbed_queries: Tensor | None
) -> None:
    """The Triton kernels; transposed arguments are contiguous the other way round where `runtime.two_way` made them."""
    from sam_fast.kernels import two_way_attention as kernels  # here, that importing sam_fast does not import triton
    from sam_fast.kernels import two_way_read

    _check_shapes(image, pe, write, absorbed_queries)
    image, pe = image.contiguous(), pe.contiguous()
    with torch.cuda.device_of(image):
        if write is not None:
            if write.queries is None:
                assert write.absorbed_keys is not None
                places, keys, constant = pe, write.absorbed_keys.mT, write.constant
            else:
                assert write.keys is not None
                places, keys, constant = write.queries.flatten(1), write.keys, None
            rest = constant, write.offered, write.bias, write.norm_weight, write.norm_bias
            arguments = (None if x is None else x.contiguous() for x in (places, keys, *rest))
            kernels.write(written, image, *arguments, write.eps)  # type: ignore[arg-type]
            image = written
        if absorbed_queries is not None and read.numel() > 0:
            N, R, C = read.shape
            runs, workspace = two_way_read.read_runs(image, N, R), None
            if runs > 1:
                most, total = image.new_empty(2, N, runs, R, dtype=torch.float32)
                workspace = image.new_empty(N, runs, R, C, dtype=torch.float32), most, total
            two_way_read.read(read, workspace, image, pe, absorbed_queries.mT.contiguous())


def _check_shapes(image: Tensor, pe: Tensor, write: Write | None, absorbed_queries: Tensor | None) -> None:
    """Raise ValueError where a tensor has another size than its neighbours: kernels would read beyond its end."""
    P, C = pe.shape
    if write is not None:
        N, R, _ = write.offered.shape
        expected: dict[str, tuple[int, ...]] = {"offered": (N, R, C)}
        expected |= dict.fromkeys(("bias", "norm_weight", "norm_bias"), (C,))
        if write.queries is None:
            expected |= {"absorbed_keys": (N, C, R), "constant": (N, R)}
        else:
            d = write.queries.shape[1]
            expected |= {"queries": (P, d, HEADS), "keys": (N, R // HEADS, d, HEADS)}
        for name, shape in expected.items():
            if getattr(write, name) is None or getattr(write, name).shape != shape:
                raise ValueError(f"{name} has the wrong size, expected {list(shape)}")
        if R == 0 or R % HEADS:
            raise ValueError(f"rows must be those of all {HEADS} heads, got {R}")
    counts = [len(write.offered)] if write is not None else []
    counts += [len(absorbed_queries)] if absorbed_queries is not None else []
    if len(set(counts)) > 1 or len(image) not in (1, counts[0]):
        raise ValueError(f"got images of {len(image)} and tokens of {counts} prompts")


def _two_way_attention_fake(image: Tensor, pe: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    offered, absorbed_queries = rest[0], rest[-3]
    _, P, C = image.shape
    written = image.new_empty(0 if offered is None else len(offered), P, C)
    return written, _read_like(image, len(written), absorbed_queries)


def _read_like(image: Tensor, prompts: int, absorbed_queries: Tensor | None) -> Tensor:
    """Memory for what is read, [N, R, C]; [N, 0, C] if nobody reads."""
    if absorbed_queries is None:
        return image.new_empty(prompts, 0, image.shape[2])
    return absorbed_queries.new_empty(len(absorbed_queries), absorbed_queries.shape[2], image.shape[2])


register(
    "two_way_attention(Tensor image, Tensor pe, Tensor? offered, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, Tensor? absorbed_keys, Tensor? constant, Tensor? queries, Tensor? keys, Tensor? absorbed_queries, "
    "int heads, str backend) -> (Tensor, Tensor)",
    _two_way_attention,
    _two_way_attention_fake,
)
