"""The end of the mask decoder: pixels of an image, upscaled four times, and the masks that tokens make of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_fast import native
from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register

_NATIVE_CHANNELS = {torch.float32: 8, torch.bfloat16: 16}  # multiples of which
_TRITON_CHANNELS = (64, 128, 256)
_TRITON_MASKS = 16
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Upscaling(NamedTuple):
    """The weights of the upscaling, C channels to C1 to C2, both transposed convolutions as matrices.

    A transposed convolution whose stride is its kernel's side makes each 2 x 2 square from one pixel alone: it is a
    matrix product. Rows are square-major: row (2 i + j) C1 + c makes channel c of the square's pixel (i, j).

    Attributes:
        first_weight: [4 C1, C]; first_bias: [C1].
        norm_weight, norm_bias: [C1], and eps, of the LayerNorm between them.
        second_weight: [4 C2, C1]; second_bias: [C2].
    """

    first_weight: Tensor
    first_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    second_weight: Tensor
    second_bias: Tensor


def upscale_masks(
    image: Tensor,
    upscaling: Upscaling,
    classifiers: Tensor,
    rows: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Logits of masks: convolution, LayerNorm, GELU, convolution, GELU, and a linear classifier per mask.

    Args:
        image: [N, h, w, C].
        upscaling: the weights.
        classifiers: [N, M, C2].
        rows: which masks are wanted, and where: int32 [N, M], the row of the result that each goes to, no two the same,
            or -1. Prompts without a wanted mask cost nothing, and with Triton nobody waits to learn which these are.
        out: where logits are written, contiguous, of the type and shape below; with `rows` [K, 4h, 4w] with K larger
            than any row. None makes one.
        backend: "native", "triton", "torch" or "auto". Native takes image and matrices in float32 and channels in
            eights, or bfloat16, channels in sixteens and C1 even. Triton takes float32 or half precision, the same for
            image and all weights but those of the LayerNorm, of 64, 128 or 256 channels to a quarter and an eighth, and
            up to 16 masks. What they do not take, auto leaves to PyTorch.

    Returns:
        `out`: [N, M, 4h, 4w], float32 (float64 of float64); with `rows` [N M, 4h, 4w], where what no row names is
        undefined, or as it was in an `out` that was given.

    Raises:
        ValueError: shapes do not fit, or the backend that was asked for cannot take these.
    """
    if len(image) != len(classifiers) or image.shape[3] != upscaling.first_weight.shape[1]:
        raise ValueError(f"got images {list(image.shape)} and classifiers {list(classifiers.shape)} of other weights")
    if rows is not None and (rows.shape != classifiers.shape[:2] or rows.dtype != torch.int32):
        raise ValueError(f"rows must be int32 {list(classifiers.shape[:2])}, got {rows.dtype} {list(rows.shape)}")
    arguments = image, *upscaling, classifiers, rows, backend
    if out is None:
        run = torch.ops.sam_fast.upscale_masks if torch.compiler.is_compiling() else _upscale_masks
        return run(*arguments)
    shape, dtype = _like(*arguments)
    shape = shape if rows is None else (*out.shape[:1], *shape[1:])
    if out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {dtype} {list(shape)}, got {out.dtype} {list(out.shape)}")
    write = torch.ops.sam_fast.upscale_masks_into if torch.compiler.is_compiling() else _upscale_masks_into
    write(out, *arguments)
    return out


def upscale_masks_reference(image: Tensor, upscaling: Upscaling, classifiers: Tensor) -> Tensor:
    """`upscale_masks` of all masks in PyTorch, float32 inside.

    Pixels stay rows of channels up to the masks, and only those are rearranged.
    """
    dtype = torch.promote_types(image.dtype, torch.float32)
    weights: list[Any] = [x.to(dtype) if isinstance(x, Tensor) else x for x in upscaling]
    pixels = upscaled_squares(image.to(dtype), Upscaling(*weights))
    return from_squares(pixels @ classifiers.to(pixels.dtype).transpose(1, 2), image.shape[1:3]).to(dtype)


def upscaled_squares(image: Tensor, upscaling: Upscaling) -> Tensor:
    """Upscaled pixels in the order of `from_squares`: [N, h, w, C] -> [N, 16hw, C2]."""
    x = F.linear(image.flatten(1, 2), upscaling.first_weight, upscaling.first_bias.repeat(4)).unflatten(2, (4, -1))
    x = F.gelu(F.layer_norm(x, x.shape[3:], upscaling.norm_weight, upscaling.norm_bias, upscaling.eps))
    x = F.linear(x.flatten(1, 2), upscaling.second_weight, upscaling.second_bias.repeat(4))
    return F.gelu(x).unflatten(2, (4, -1)).flatten(1, 2)


def from_squares(pixels: Tensor, size: torch.Size) -> Tensor:
    """Rearrange pixels [N, 16hw, M], square by square of the squares of an image (h, w), to [N, M, 4h, 4w]."""
    h, w = size
    # Rows, columns of the embedding; row, column in the first square; row, column in the second.
    pixels = pixels.transpose(1, 2).unflatten(2, (h, w, 2, 2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return pixels.reshape(len(pixels), pixels.shape[1], 4 * h, 4 * w)


def _takes(image: Tensor, upscaling: Upscaling, classifiers: Tensor) -> dict[str, str | None]:
    """Backend -> what it takes that these arguments are not; see `choose_backend`."""
    C, M = image.shape[3], classifiers.shape[1]
    factors = (image, upscaling.first_weight, upscaling.first_bias, upscaling.second_weight, upscaling.second_bias)
    dtypes = {x.dtype for x in factors}
    others = {classifiers.dtype, upscaling.norm_weight.dtype, upscaling.norm_bias.dtype}
    multiplied = {image.dtype, upscaling.first_weight.dtype, upscaling.second_weight.dtype}
    native_fits = C % _NATIVE_CHANNELS.get(image.dtype, C + 1) == 0 and multiplied == {image.dtype}
    native_fits &= dtypes | others <= {torch.float32, image.dtype}
    native_fits &= image.dtype != torch.bfloat16 or len(upscaling.norm_weight) % 2 == 0  # of which it makes pairs
    triton_fits = C in _TRITON_CHANNELS and M <= _TRITON_MASKS and len(dtypes) == 1 and image.dtype in _TRITON_TYPES
    triton = (
        f"{_TRITON_CHANNELS} channels, {_TRITON_MASKS} masks and one of float32, bfloat16, float16, "
        f"got {C}, {M} and {sorted(map(str, dtypes))}"
    )
    native = "float32 and channels in eights, or bfloat16, channels in sixteens and then an even number"
    return {"native": None if native_fits else native, "triton": None if triton_fits else triton}


def _upscale_masks(image: Tensor, *rest: Any) -> Tensor:
    return _upscale(None, image, *rest)


def _upscale_masks_into(logits: Tensor, image: Tensor, *rest: Any) -> None:
    _upscale(logits, image, *rest)


def _upscale(out: Tensor | None, image: Tensor, *rest: Any) -> Tensor:
    *weights, classifiers, rows, backend = rest
    upscaling = Upscaling(*weights)
    tensors = [x for x in (*upscaling, rows, out) if isinstance(x, Tensor)]
    takes = _takes(image, upscaling, classifiers)
    chosen = choose_backend("upscale_masks", backend, image, classifiers, *tensors, takes=takes)
    if chosen == "torch" and rows is None:
        made = upscale_masks_reference(image, upscaling, classifiers)
        return made if out is None else out.copy_(made)
    logits = _upscale_masks_fake(image, *rest) if out is None else out
    if chosen == "triton":
        _launch(logits, image, upscaling, classifiers, rows)
    elif rows is not None:
        prompts = (rows >= 0).any(dim=1)
        wanted = rows[prompts]
        some = _upscale_masks(image[prompts], *weights, classifiers[prompts], None, chosen)
        logits[wanted[wanted >= 0].long()] = some[wanted >= 0]
    else:
        _upscale_natively(logits, image, upscaling, classifiers)
    return logits


def _upscale_natively(logits: Tensor, image: Tensor, upscaling: Upscaling, classifiers: Tensor) -> None:
    first_weight, *first, eps, second_weight, second_bias = upscaling
    native.module().upscale_masks(
        logits,
        image.contiguous(),
        first_weight.contiguous(),
        *(x.float().contiguous() for x in first),
        eps,
        second_weight.contiguous(),
        second_bias.float().contiguous(),
        classifiers.float().contiguous(),
        native.num_threads(),
    )


def _launch(logits: Tensor, image: Tensor, upscaling: Upscaling, classifiers: Tensor, rows: Tensor | None) -> None:
    """The Triton kernel."""
    from sam_fast.kernels import upscale_masks as kernels  # here, that importing sam_fast does not import triton

    C = image.shape[3]
    shapes = ((C, C), (C // 4,), (C // 4,), (C // 4,), (), (C // 2, C // 4), (C // 8,))
    for name, weight, shape in zip(Upscaling._fields, upscaling, shapes, strict=True):
        if isinstance(weight, Tensor) and weight.shape != shape:
            raise ValueError(f"{name} has the wrong size, expected {list(shape)}, got {list(weight.shape)}")
    if classifiers.shape[2] != C // 8:
        raise ValueError(f"classifiers have the wrong size, expected {C // 8} channels, got {classifiers.shape[2]}")
    weights = [x.contiguous() if isinstance(x, Tensor) else x for x in upscaling]
    with torch.cuda.device_of(image):
        kernels.upscale(
            logits,
            None if rows is None else rows.contiguous(),
            image.contiguous().flatten(1, 2),
            image.shape[2],
            *(tuple(weights[:2]), tuple(weights[2:5]), tuple(weights[5:])),
            classifiers.float().contiguous(),
        )


def _like(image: Tensor, *rest: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of the logits."""
    N, h, w, _ = image.shape
    classifiers, rows = rest[-3:-1]
    M = classifiers.shape[1]
    dtype = torch.promote_types(image.dtype, torch.float32)
    return (*((N, M) if rows is None else (N * M,)), 4 * h, 4 * w), dtype


def _upscale_masks_fake(image: Tensor, *rest: Any) -> Tensor:
    shape, dtype = _like(image, *rest)
    return image.new_empty(*shape, dtype=dtype)


_ARGUMENTS = (
    "Tensor image, Tensor first_weight, Tensor first_bias, Tensor norm_weight, Tensor norm_bias, float eps, "
    "Tensor second_weight, Tensor second_bias, Tensor classifiers, Tensor? rows, str backend"
)
register(f"upscale_masks({_ARGUMENTS}) -> Tensor", _upscale_masks, _upscale_masks_fake)
register(f"upscale_masks_into(Tensor(a!) logits, {_ARGUMENTS}) -> ()", _upscale_masks_into, lambda *arguments: None)
