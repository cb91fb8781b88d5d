"""Packed masks: eight pixels in a byte, the form in which the other operations hand masks to each other.

`bits` is uint8 [..., H, row_bytes(W)]: row-major, pixel x of a row is bit x % 8 of byte x // 8, and each row is padded
with zero bits to a multiple of 64, so that a row is an array of little-endian 64-bit words.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from sam_fast import native, recycling
from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register


def row_bytes(width: int) -> int:
    """How many bytes a packed row of `width` pixels takes."""
    return 8 * ((width + 63) // 64)


def check_bits(bits: torch.Tensor, width: int, ndim: int | None = None) -> None:
    """Check that `bits` are packed masks of `width` pixels.

    Args:
        bits: [..., H, row_bytes(width)] uint8.
        width: pixels of a row.
        ndim: the number of dimensions that `bits` must have, if it is fixed.

    Raises:
        TypeError: `bits` is no uint8 tensor.
        ValueError: the shape does not fit `width` or `ndim`.
    """
    if not isinstance(bits, torch.Tensor) or bits.dtype != torch.uint8:
        raise TypeError(f"bits must be a uint8 tensor, got {getattr(bits, 'dtype', type(bits).__name__)}")
    if width < 0:
        raise ValueError(f"width must not be negative, got {width}")
    if bits.ndim < 2 or (ndim is not None and bits.ndim != ndim) or bits.shape[-1] != row_bytes(width):
        lead = "N, " if ndim == 3 else "..., "
        raise ValueError(
            f"bits of masks that are {width} pixels wide must be [{lead}H, {row_bytes(width)}], got {list(bits.shape)}"
        )


def aligned(bits: torch.Tensor) -> torch.Tensor:
    """Packed masks as CUDA kernels read them: contiguous, from an address that is a multiple of 8."""
    bits = bits.contiguous()
    return bits if bits.data_ptr() % 8 == 0 else bits.clone()


def pack_masks(masks: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Pack boolean masks into bits.

    Args:
        masks: [..., H, W] bool.
        backend: "native", "torch" or "auto".

    Returns:
        bits: [..., H, row_bytes(W)] uint8.

    Raises:
        TypeError: `masks` is no bool tensor.
        ValueError: `masks` has fewer than two dimensions, or `backend` is unknown.
    """
    if not isinstance(masks, torch.Tensor) or masks.dtype != torch.bool:
        raise TypeError(f"masks must be a bool tensor, got {getattr(masks, 'dtype', type(masks).__name__)}")
    if masks.ndim < 2:
        raise ValueError(f"masks must be [..., H, W], got {list(masks.shape)}")
    if torch.compiler.is_compiling():
        return torch.ops.sam_fast.pack_masks(masks, backend)
    return _pack_masks(masks, backend)


def unpack_masks(bits: torch.Tensor, width: int, *, backend: str = "auto") -> torch.Tensor:
    """Unpack bits into boolean masks.

    Args:
        bits: [..., H, row_bytes(width)] uint8; the padding bits are ignored.
        width: pixels of a row, W.
        backend: "native", "torch" or "auto".

    Returns:
        masks: [..., H, W] bool.

    Raises:
        TypeError: `bits` is no uint8 tensor.
        ValueError: the shape does not fit `width`, or `backend` is unknown.
    """
    check_bits(bits, width)
    if torch.compiler.is_compiling():
        return torch.ops.sam_fast.unpack_masks(bits, width, backend)
    return _unpack_masks(bits, width, backend)


def unpack_masks_apart(bits: torch.Tensor, width: int, *, backend: str = "auto") -> list[torch.Tensor]:
    """`unpack_masks` of N masks into tensors of their own: one that is kept keeps no others in memory.

    On a CPU their memory is used again for the next masks as soon as the last array or view of it is gone.

    Args:
        bits, width, backend: as of `unpack_masks`, bits being [N, H, row_bytes(width)].

    Returns:
        N masks [H, W] bool.
    """
    check_bits(bits, width)
    if bits.ndim != 3:
        raise ValueError(f"bits must be [N, H, {row_bytes(width)}], got {list(bits.shape)}")
    if choose_backend("packed_masks", backend, bits) == "torch" or native.uses_cuda(bits):
        return [_unpack_masks(one, width, backend) for one in bits]
    taken = [recycling.masks.take((bits.shape[1], width)) for _ in range(len(bits))]
    native.module().unpack_masks_apart(taken, bits.contiguous(), width, native.num_threads())
    return [mask for mask, _ in taken]


def place_masks(bits: torch.Tensor, width: int, canvas_size: tuple[int, int], offset: tuple[int, int]) -> torch.Tensor:
    """Place packed masks in larger images of zeros, word by word.

    Args:
        bits: [..., h, row_bytes(width)] uint8, padding bits zero.
        width: pixels of a mask row.
        canvas_size: (H, W) of the images.
        offset: (x0, y0), where pixel (0, 0) of a mask lies in its image; the mask is inside.

    Returns:
        bits: [..., H, row_bytes(W)] uint8; `bits` itself where that is the same.
    """
    check_bits(bits, width)
    *lead, height, _ = bits.shape
    if (height, width) == canvas_size:
        return bits
    if bits.numel() == 0:
        return bits.new_zeros(*lead, canvas_size[0], row_bytes(canvas_size[1]))
    words = aligned(bits).view(torch.int64)
    stride = row_bytes(canvas_size[1]) // 8
    canvas = words.new_zeros(*lead, canvas_size[0], stride + 1)  # the last word takes zeros alone
    rows, first, shift = slice(offset[1], offset[1] + height), offset[0] // 64, offset[0] % 64
    canvas[..., rows, first : first + words.shape[-1]] = words << shift
    if shift:
        carried = (words >> (64 - shift)) & ((1 << shift) - 1)
        canvas[..., rows, first + 1 : first + 1 + words.shape[-1]] |= carried
    return canvas[..., :stride].contiguous().view(torch.uint8)


def pack_masks_reference(masks: torch.Tensor) -> torch.Tensor:
    """`pack_masks` in PyTorch: eight pixels weighted by the powers of two."""
    padded = F.pad(masks.to(torch.uint8), (0, 8 * row_bytes(masks.shape[-1]) - masks.shape[-1]))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=masks.device)
    return (padded.unflatten(-1, (padded.shape[-1] // 8, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_masks_reference(bits: torch.Tensor, width: int) -> torch.Tensor:
    """`unpack_masks` in PyTorch: each byte shifted by 0 to 7."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)[..., :width].contiguous()


def _pack_masks(masks: torch.Tensor, backend: str) -> torch.Tensor:
    if choose_backend("packed_masks", backend, masks) == "torch":
        return pack_masks_reference(masks)
    *lead, width = masks.shape
    rows = math.prod(lead)
    bits = torch.empty((*lead, row_bytes(width)), dtype=torch.uint8, device=masks.device)
    flat, pixels = bits.view(rows, row_bytes(width)), masks.contiguous().view(rows, width)
    if native.uses_cuda(masks):
        native.module().pack_masks_cuda(flat, pixels, native.cuda_stream(masks))
    else:
        native.module().pack_masks(flat, pixels, native.num_threads())
    return bits


def _unpack_masks(bits: torch.Tensor, width: int, backend: str) -> torch.Tensor:
    if choose_backend("packed_masks", backend, bits) == "torch":
        return unpack_masks_reference(bits, width)
    *lead, stride = bits.shape
    rows = math.prod(lead)
    masks = torch.empty((*lead, width), dtype=torch.bool, device=bits.device)
    pixels = masks.view(rows, width)
    if native.uses_cuda(bits):
        native.module().unpack_masks_cuda(pixels, aligned(bits).view(rows, stride), native.cuda_stream(bits))
    else:
        native.module().unpack_masks(pixels, bits.contiguous().view(rows, stride), native.num_threads())
    return masks


def _pack_masks_fake(masks: torch.Tensor, backend: str) -> torch.Tensor:
    return masks.new_empty((*masks.shape[:-1], row_bytes(masks.shape[-1])), dtype=torch.uint8)


def _unpack_masks_fake(bits: torch.Tensor, width: int, backend: str) -> torch.Tensor:
    return bits.new_empty((*bits.shape[:-1], width), dtype=torch.bool)


register("pack_masks(Tensor masks, str backend) -> Tensor", _pack_masks, _pack_masks_fake)
register("unpack_masks(Tensor bits, int width, str backend) -> Tensor", _unpack_masks, _unpack_masks_fake)
