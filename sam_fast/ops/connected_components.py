"""8-connected components of packed masks, and the removal of small islands and holes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from sam_fast import native
from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register
from sam_fast.ops.packed_masks import aligned, check_bits, pack_masks_reference, unpack_masks_reference

_MODES = ("holes", "islands")
_WORKSPACE_BYTES = 256 << 20  # of GPU memory, for as many masks at a time as that is enough for


def connected_components(bits: torch.Tensor, width: int, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Number the 8-connected components of masks.

    The numbers are those of OpenCV: by the first block of 2 x 2 pixels (in reading order of the blocks) that holds a
    pixel of the component.

    Args:
        bits: [N, H, row_bytes(width)] uint8.
        width: pixels of a mask row, W.
        backend: "native", "torch" or "auto".

    Returns:
        labels: [N, H, W] int32, 0 outside of the mask, else from 1.
        count: [N] int64, the number of components.

    Raises:
        TypeError: `bits` is no uint8 tensor.
        ValueError: the shape does not fit `width`, or a mask has 2**31 pixels or more.
    """
    _check(bits, width)
    if torch.compiler.is_compiling():
        return torch.ops.sam_fast.connected_components(bits, width, backend)
    return _connected_components(bits, width, backend)


def remove_small_regions(
    bits: torch.Tensor, width: int, area_threshold: float, mode: str, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill small holes of masks, or remove their small islands (segment_anything, `utils/amg.py`).

    A region is small if it has strictly fewer pixels than `area_threshold`. If all islands are small the largest one
    stays (of several, the one with the lowest number in `connected_components`).

    Args:
        bits: [N, H, row_bytes(width)] uint8.
        width: pixels of a mask row, W.
        area_threshold: in pixels.
        mode: "holes" or "islands".
        backend: "native", "torch" or "auto".

    Returns:
        bits: [N, H, row_bytes(width)] uint8, new memory.
        changed: [N] bool, whether there was a small region (true even if it was the island that stays).

    Raises:
        TypeError: `bits` is no uint8 tensor.
        ValueError: the shape does not fit `width`, a mask has 2**31 pixels or more, `mode` is unknown, or
            `area_threshold` is NaN.
    """
    _check(bits, width)
    if mode not in _MODES:
        raise ValueError(f"mode must be 'holes' or 'islands', got {mode!r}")
    if math.isnan(area_threshold):
        raise ValueError("area_threshold must be a number, got nan")
    if torch.compiler.is_compiling():
        return torch.ops.sam_fast.remove_small_regions(bits, width, area_threshold, mode, backend)
    return _remove_small_regions(bits, width, float(area_threshold), mode, backend)


def connected_components_reference(bits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`connected_components` in PyTorch: spread the lowest block number over 3 x 3 neighbourhoods until it rests."""
    masks = unpack_masks_reference(bits, width)
    n, height, _ = masks.shape
    labels = torch.zeros(masks.shape, dtype=torch.int32, device=bits.device)
    count = torch.zeros(n, dtype=torch.int64, device=bits.device)
    rows, columns = (torch.arange(side, device=bits.device) // 2 for side in (height, width))
    blocks = 1 + rows[:, None] * ((width + 1) // 2) + columns
    for i in range(n if labels[:1].numel() else 0):
        lowest = torch.where(masks[i], blocks, 0).double()  # exact up to 2**53
        previous = torch.full_like(lowest, -1)
        while not torch.equal(lowest, previous):
            previous = lowest
            seen = lowest.where(masks[i], math.inf)
            lowest = torch.where(masks[i], -F.max_pool2d(-seen[None], 3, stride=1, padding=1)[0], 0)
        # A zero in front, so that 0 is the first number also of a mask without background.
        numbers, ranks = F.pad(lowest.flatten(), (1, 0)).unique(return_inverse=True)
        labels[i], count[i] = ranks[1:].view_as(lowest), len(numbers) - 1
    return labels, count


def remove_small_regions_reference(
    bits: torch.Tensor, width: int, area_threshold: float, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`remove_small_regions` in PyTorch, from the labels and areas of the regions."""
    masks = unpack_masks_reference(bits, width)
    regions = ~masks if mode == "holes" else masks
    labels, count = connected_components_reference(pack_masks_reference(regions), width)
    changed = torch.zeros(len(masks), dtype=torch.bool, device=bits.device)
    for i, mask in enumerate(masks):
        area = labels[i].flatten().bincount(minlength=int(count[i]) + 1)
        small = area < area_threshold
        small[0] = False  # not a region
        changed[i] = small.any()
        if mode == "islands" and changed[i] and small[1:].all():
            small[1 + (area[1:] == area[1:].max()).nonzero()[0]] = False
        mask ^= small[labels[i]]
    return pack_masks_reference(masks), changed


def _check(bits: torch.Tensor, width: int) -> None:
    check_bits(bits, width, ndim=3)
    if bits.shape[1] * width >= 2**31:
        raise ValueError(f"masks must have fewer than 2**31 pixels, got {bits.shape[1]} x {width}")


def _connected_components(bits: torch.Tensor, width: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    if choose_backend("connected_components", backend, bits) == "torch":
        return connected_components_reference(bits, width)
    n, height, _ = bits.shape
    if native.uses_cuda(bits):
        return _connected_components_cuda(bits, width)
    labels = torch.empty((n, height, width), dtype=torch.int32, device="cpu")
    count = torch.empty(n, dtype=torch.int64, device="cpu")
    native.module().connected_components(labels, count, bits.contiguous(), native.num_threads())
    return labels, count


def _connected_components_cuda(bits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    bits = aligned(bits)
    n, height, _ = bits.shape
    labels = torch.empty((n, height, width), dtype=torch.int32, device=bits.device)
    count = torch.empty(n, dtype=torch.int64, device=bits.device)
    for part in _parts(n, height, width):
        blocks = _block_workspace(bits[part], width)
        rows = torch.empty((len(bits[part]), (height + 1) // 2), dtype=torch.int64, device=bits.device)
        native.module().connected_components_cuda(
            labels[part], count[part], blocks, rows, bits[part], native.cuda_stream(bits)
        )
    return labels, count


def _parts(n: int, height: int, width: int) -> list[slice]:
    """Masks that are worked on at a time, so that their workspace is bounded."""
    step = max(1, _WORKSPACE_BYTES // max(1, 8 * ((height + 1) // 2) * ((width + 1) // 2)))
    return [slice(i, i + step) for i in range(0, n, step)]


def _block_workspace(bits: torch.Tensor, width: int) -> torch.Tensor:
    """Two numbers for each block of 2 x 2 pixels of masks."""
    n, height, _ = bits.shape
    blocks = ((height + 1) // 2) * ((width + 1) // 2)
    return torch.empty((2, n, blocks), dtype=torch.int32, device=bits.device)


def _connected_components_fake(bits: torch.Tensor, width: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    n, height, _ = bits.shape
    return bits.new_empty((n, height, width), dtype=torch.int32), bits.new_empty(n, dtype=torch.int64)


def _remove_small_regions(
    bits: torch.Tensor, width: int, area_threshold: float, mode: str, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if choose_backend("connected_components", backend, bits) == "torch":
        return remove_small_regions_reference(bits, width, area_threshold, mode)
    if native.uses_cuda(bits):
        return _remove_small_regions_cuda(bits, width, area_threshold, mode)
    bits = bits.contiguous()
    cleaned, changed = torch.empty_like(bits), torch.empty(bits.shape[0], dtype=torch.bool, device="cpu")
    native.module().remove_small_regions(
        cleaned, changed, bits, width, area_threshold, mode == "holes", native.num_threads()
    )
    return cleaned, changed


def _remove_small_regions_cuda(
    bits: torch.Tensor, width: int, area_threshold: float, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    bits = aligned(bits)
    n, height, _ = bits.shape
    module = native.module()
    cleaned, changed = torch.empty_like(bits), torch.empty(n, dtype=torch.bool, device=bits.device)
    for part in _parts(n, height, width):
        blocks = _block_workspace(bits[part], width)
        judgements = torch.empty((len(bits[part]), module.judgement_workspace), dtype=torch.int64, device=bits.device)
        module.remove_small_regions_cuda(
            cleaned[part],
            changed[part],
            blocks,
            judgements,
            bits[part],
            width,
            area_threshold,
            mode == "holes",
            native.cuda_stream(bits),
        )
    return cleaned, changed


def _remove_small_regions_fake(
    bits: torch.Tensor, width: int, area_threshold: float, mode: str, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return bits.new_empty(bits.shape), bits.new_empty(bits.shape[0], dtype=torch.bool)


register(
    "connected_components(Tensor bits, int width, str backend) -> (Tensor, Tensor)",
    _connected_components,
    _connected_components_fake,
)
register(
    "remove_small_regions(Tensor bits, int width, float area_threshold, str mode, str backend) -> (Tensor, Tensor)",
    _remove_small_regions,
    _remove_small_regions_fake,
)
