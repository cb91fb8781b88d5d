"""Run-length codes of masks: packed bits to column-major counts and back, and COCO's compressed string.

A code is a dict `{"size": [H, W], "counts": [...]}`: the lengths of the runs in column-major order, starting with the
run of zeros (which may be 0 long). Format: pycocotools, `common/maskApi.c`. Several codes in tensors are `counts`
int64 [R] of all masks one behind the other and `offsets` int64 [N+1]; mask n has counts[offsets[n]:offsets[n+1]].
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sam_fast import native
from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register
from sam_fast.ops.packed_masks import aligned, check_bits, pack_masks_reference, row_bytes, unpack_masks_reference
from sam_fast.ops.rle_string import compress_runs, decompress_runs, encode_strings, split_strings

Rle = dict[str, Any]


def encode_rle(
    bits: torch.Tensor,
    width: int,
    *,
    canvas_size: tuple[int, int] | None = None,
    offset: tuple[int, int] = (0, 0),
    backend: str = "auto",
) -> list[Rle]:
    """Encode packed masks as run lengths, each mask optionally placed in a larger image of zeros.

    Args:
        bits: [N, H, row_bytes(width)] uint8.
        width: pixels of a mask row, W.
        canvas_size: (H, W) of the image in which the mask lies; the mask's own size by default.
        offset: (x0, y0), where pixel (0, 0) of the mask lies in that image.
        backend: "native", "torch" or "auto".

    Returns:
        One `{"size": [H, W], "counts": [int, ...]}` per mask, of the image's size.

    Raises:
        TypeError: `bits` is no uint8 tensor.
        ValueError: the shape does not fit `width`, or the mask is not inside the canvas.
    """
    counts, offsets = encode_runs(bits, width, canvas_size=canvas_size, offset=offset, backend=backend)
    return split_runs(counts, offsets, canvas_size if canvas_size is not None else (bits.shape[1], width))


def encode_coco_rle(
    bits: torch.Tensor,
    width: int,
    *,
    canvas_size: tuple[int, int] | None = None,
    offset: tuple[int, int] = (0, 0),
    backend: str = "auto",
) -> list[Rle]:
    """Like `encode_rle` with "counts" as COCO's compressed string, without the detour over Python integers."""
    height, width_of_all = size = _check_placement(bits, width, canvas_size, offset)
    counts, offsets = encode_runs(bits, width, canvas_size=size, offset=offset, backend=backend)
    strings = split_strings(*encode_strings(counts, offsets, largest=height * width_of_all, backend=backend))
    return [{"size": [int(height), int(width_of_all)], "counts": string} for string in strings]


def decode_rle(rles: Sequence[Mapping[str, Any]], *, backend: str = "auto") -> torch.Tensor:
    """Decode run-length codes of masks of one size into packed bits, on the CPU.

    Args:
        rles: codes with "size" and "counts" (a list of integers, or COCO's string as str or bytes).
        backend: "native", "torch" or "auto".

    Returns:
        bits: [N, H, row_bytes(W)] uint8; [0, 0, 0] if there are no codes.

    Raises:
        TypeError: "counts" is of another type.
        ValueError: the sizes differ, a string is malformed, or counts are negative or do not add up to H * W.
    """
    sizes = {tuple(int(side) for side in rle["size"]) for rle in rles}
    if len(sizes) > 1:
        raise ValueError(f"the masks must be of one size, got {sorted(sizes)}")
    size = sizes.pop() if sizes else (0, 0)
    if len(size) != 2 or min(size) < 0:
        raise ValueError(f"size must be [H, W], got {list(size)}")
    per_mask = [_counts_tensor(rle["counts"], backend) for rle in rles]
    lengths = torch.tensor([0, *(len(counts) for counts in per_mask)], dtype=torch.int64)
    counts = torch.cat(per_mask) if per_mask else torch.empty(0, dtype=torch.int64, device="cpu")
    return decode_runs(counts, lengths.cumsum(0), size, backend=backend)


def rle_area(rle: Mapping[str, Any]) -> int:
    """The number of mask pixels of a code (counts as integers or as COCO's string)."""
    counts = rle["counts"]
    return sum(decompress_counts(counts)[1::2] if isinstance(counts, str | bytes) else counts[1::2])


def compress_counts(counts: Sequence[int], *, backend: str = "auto") -> str:
    """COCO's compressed string of run lengths.

    Raises:
        TypeError: `counts` is no sequence of integers.
        ValueError: a count is negative or above 2**63 - 1.
    """
    values = _counts_tensor(counts, backend)
    if bool((values < 0).any()):
        raise ValueError(f"counts must not be negative, got {int(values.min())}")
    return compress_runs(values, torch.tensor([0, len(values)]), backend=backend)[0]


def decompress_counts(text: str | bytes, *, backend: str = "auto") -> list[int]:
    """The run lengths that COCO's compressed string stands for.

    Raises:
        TypeError: `text` is neither str nor bytes.
        ValueError: it holds a character outside of the code, ends inside a number, or gives a negative count.
    """
    return decompress_runs(text, backend=backend).tolist()


def encode_runs(
    bits: torch.Tensor,
    width: int,
    *,
    canvas_size: tuple[int, int] | None = None,
    offset: tuple[int, int] = (0, 0),
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `encode_rle`, with the codes in tensors.

    Returns:
        counts: [R] int64, the run lengths of all masks.
        offsets: [N+1] int64, where each mask's counts begin and end.
    """
    canvas_height, canvas_width = _check_placement(bits, width, canvas_size, offset)
    x0, y0 = offset
    if torch.compiler.is_compiling():
        return torch.ops.sam_fast.encode_rle(bits, width, canvas_height, canvas_width, x0, y0, backend)
    return _encode_rle(bits, width, canvas_height, canvas_width, x0, y0, backend)


def split_runs(counts: torch.Tensor, offsets: torch.Tensor, size: tuple[int, int]) -> list[Rle]:
    """The codes, as `encode_rle` returns them, of runs in tensors.

    Args:
        counts: [R] int64.
        offsets: [N+1] int64.
        size: (H, W) of every mask.
    """
    values = counts.cpu().numpy()  # lists of Python ints are made mask by mask: one list of all would be copied
    return [
        {"size": [int(size[0]), int(size[1])], "counts": values[begin:end].tolist()}
        for begin, end in itertools.pairwise(offsets.tolist())
    ]


def measure_runs(counts: torch.Tensor, offsets: torch.Tensor, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Areas and boxes of masks from their run lengths. Nobody waits for a GPU.

    Args:
        counts: [R] int64.
        offsets: [N+1] int64.
        height: pixels of a mask column, H.

    Returns:
        areas: [N] int64, in pixels.
        boxes: [N, 4] int64, XYXY, both corners inside the mask; zeros for an empty mask.
    """
    begins, lengths = offsets[:-1], offsets.diff()
    mask = torch.arange(len(lengths), device=counts.device).repeat_interleave(lengths, output_size=len(counts))
    odd = (torch.arange(len(counts), device=counts.device) - begins[mask]) % 2 == 1
    before = F.pad(counts.cumsum(0), (1, 0))
    areas = F.pad((counts * odd).cumsum(0), (1, 0))[offsets].diff()
    start = before[:-1] - before[begins][mask]
    last = start + counts - 1
    x0, y0, x1, y1 = start // height, start % height, last // height, last % height
    wraps = x0 != x1  # a run over the end of a column touches top and bottom
    low = torch.stack([x0, torch.where(wraps, 0, y0)], dim=1)
    high = torch.stack([x1, torch.where(wraps, height - 1, y1)], dim=1)
    drawn = (odd & (counts > 0))[:, None]
    rows, beyond = mask[:, None].expand(-1, 2), torch.iinfo(torch.int64).max
    top_left = low.new_full((len(lengths), 2), beyond).scatter_reduce(0, rows, low.where(drawn, beyond), "amin")
    bottom_right = high.new_full((len(lengths), 2), -1).scatter_reduce(0, rows, high.where(drawn, -1), "amax")
    return areas, torch.cat([top_left, bottom_right], dim=1) * (areas > 0)[:, None]


def decode_runs(
    counts: torch.Tensor, offsets: torch.Tensor, size: tuple[int, int], *, backend: str = "auto"
) -> torch.Tensor:
    """Decode run lengths in tensors (as `encode_runs` returns them) into packed bits.

    Args:
        counts: [R] int64.
        offsets: [N+1] int64.
        size: (H, W) of every mask.
        backend: "native", "torch" or "auto".

    Returns:
        bits: [N, H, row_bytes(W)] uint8.

    Raises:
        TypeError: a tensor is not int64.
        ValueError: offsets do not ascend inside `counts`, or counts are negative or do not add up to H * W.
    """
    for name, tensor in (("counts", counts), ("offsets", offsets)):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
        if tensor.ndim != 1:
            raise ValueError(f"{name} must have one dimension, got {list(tensor.shape)}")
    if offsets.shape[0] == 0:
        raise ValueError("offsets must hold at least one entry")
    height, width = size
    if torch.compiler.is_compiling():
        return torch.ops.sam_fast.decode_rle(counts, offsets, height, width, backend)
    return _decode_rle(counts, offsets, height, width, backend)


def encode_runs_reference(
    bits: torch.Tensor, width: int, canvas_size: tuple[int, int], offset: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode_runs` in PyTorch: transpose the mask and find where neighbours differ, one mask after the other."""
    (canvas_height, canvas_width), (x0, y0) = canvas_size, offset
    zero, end = (
        bits.new_tensor([0], dtype=torch.int64),
        bits.new_tensor([canvas_height * canvas_width], dtype=torch.int64),
    )
    runs = []
    for mask in bits:
        canvas = torch.zeros((canvas_width, canvas_height), dtype=torch.bool, device=bits.device)
        canvas[x0 : x0 + width, y0 : y0 + mask.shape[0]] = unpack_masks_reference(mask, width).T
        before = torch.cat([zero.bool(), canvas.flatten()])
        starts = (before[1:] != before[:-1]).nonzero().squeeze(1)
        runs.append(torch.cat([zero, starts, end]).diff())
    lengths = torch.tensor([0, *(len(run) for run in runs)], dtype=torch.int64, device=bits.device)
    return torch.cat([*runs, end[:0]]), lengths.cumsum(0)


def decode_runs_reference(counts: torch.Tensor, offsets: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`decode_runs` in PyTorch: repeat 0, 1, 0, ... by the counts and transpose."""
    height, width = size
    masks = torch.zeros((len(offsets) - 1, height, width), dtype=torch.bool, device=counts.device)
    for mask, begin, end in zip(masks, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        colours = torch.arange(end - begin, device=counts.device) % 2 == 1
        mask[:] = colours.repeat_interleave(counts[begin:end]).view(width, height).T
    return pack_masks_reference(masks)


def _check_placement(
    bits: torch.Tensor, width: int, canvas_size: tuple[int, int] | None, offset: tuple[int, int]
) -> tuple[int, int]:
    """Check the arguments of an encoder; return (height, width) of the canvas."""
    check_bits(bits, width, ndim=3)
    height = bits.shape[1]
    canvas_height, canvas_width = canvas_size if canvas_size is not None else (height, width)
    x0, y0 = offset
    if not (0 <= x0 <= canvas_width - width and 0 <= y0 <= canvas_height - height):
        raise ValueError(
            f"a mask of {height} x {width} pixels at offset (x, y) = ({x0}, {y0}) "
            f"is not inside a canvas of {canvas_height} x {canvas_width}"
        )
    return canvas_height, canvas_width


def _counts_tensor(counts: Any, backend: str) -> torch.Tensor:
    """Counts of any accepted form as int64 [R] on the CPU."""
    if isinstance(counts, str | bytes):
        return decompress_runs(counts, backend=backend)
    if isinstance(counts, bytearray):  # array() would take it for machine words
        raise TypeError("counts must be integers or COCO's string, got bytearray")
    try:
        values = np.frombuffer(array("q", counts), dtype=np.int64) if len(counts) else np.empty(0, dtype=np.int64)
    except TypeError as error:
        raise TypeError(f"counts must be integers or COCO's string: {error}") from error
    except OverflowError as error:
        raise ValueError(f"counts must be below 2**63: {error}") from error
    return torch.from_numpy(values)


def _check_runs(counts: torch.Tensor, offsets: torch.Tensor, height: int, width: int) -> None:
    """Raise ValueError where runs are no masks of this size; the native decoder makes the same checks as it goes."""
    if int(offsets[0]) < 0 or int(offsets[-1]) > len(counts) or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets must ascend from 0 to {len(counts)}, the length of counts")
    for n, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        mine = counts[begin:end]
        # Without the bound a sum could overflow and come out right.
        bad = bool(((mine < 0) | (mine > height * width)).any())
        if bad or int(mine.sum()) != height * width:
            raise ValueError(_bad_counts(n, mine, height, width))


def _bad_counts(n: int, counts: torch.Tensor, height: int, width: int) -> str:
    negative = "" if not bool((counts < 0).any()) else f" with {int(counts.min())} among them"
    total = sum(counts.tolist())
    return (
        f"counts of mask {n} add up to {total}{negative}, but a mask of {height} x {width} has {height * width} pixels"
    )


def _encode_rle(
    bits: torch.Tensor, width: int, canvas_height: int, canvas_width: int, x0: int, y0: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if choose_backend("rle", backend, bits) == "torch":
        return encode_runs_reference(bits, width, (canvas_height, canvas_width), (x0, y0))
    placement = (width, canvas_height, canvas_width, x0, y0)
    if native.uses_cuda(bits):
        return _encode_rle_cuda(bits, placement)
    bits = bits.contiguous()
    offsets = torch.empty(bits.shape[0] + 1, dtype=torch.int64, device="cpu")
    native.module().rle_offsets(offsets, bits, *placement, native.num_threads())
    counts = torch.empty(int(offsets[-1]), dtype=torch.int64, device="cpu")
    native.module().rle_encode(counts, offsets, bits, *placement, native.num_threads())
    return counts, offsets


def _encode_rle_cuda(bits: torch.Tensor, placement: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode_runs` on a GPU; waits for it once, for the number of runs."""
    bits = aligned(bits)
    module, stream = native.module(), native.cuda_stream(bits)
    n, width = bits.shape[0], placement[0]
    offsets = torch.empty(n + 1, dtype=torch.int64, device=bits.device)
    columns = torch.empty((n, width + 1), dtype=torch.int64, device=bits.device)  # where the codes of each one begin
    module.rle_offsets_cuda(offsets, columns, bits, *placement, stream)
    ends = torch.empty(int(offsets[-1]), dtype=torch.int64, device=bits.device)
    counts = torch.empty_like(ends)
    module.rle_ends_cuda(ends, offsets, columns, bits, *placement, stream)
    module.rle_counts_cuda(counts, ends, offsets, stream)
    return counts, offsets


def _encode_rle_fake(
    bits: torch.Tensor, width: int, canvas_height: int, canvas_width: int, x0: int, y0: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    runs = torch.library.get_ctx().new_dynamic_size()
    return bits.new_empty(runs, dtype=torch.int64), bits.new_empty(bits.shape[0] + 1, dtype=torch.int64)


def _decode_rle(counts: torch.Tensor, offsets: torch.Tensor, height: int, width: int, backend: str) -> torch.Tensor:
    if choose_backend("rle", backend, counts, offsets) == "torch":
        _check_runs(counts, offsets, height, width)
        return decode_runs_reference(counts, offsets, (height, width))
    if native.uses_cuda(counts):
        return _decode_rle_cuda(counts, offsets, height, width)
    counts, offsets = counts.contiguous(), offsets.contiguous()
    bits = torch.empty((offsets.shape[0] - 1, height, row_bytes(width)), dtype=torch.uint8, device="cpu")
    bad = native.module().rle_decode(bits, counts, offsets, width, native.num_threads())
    if bad >= 0:
        raise ValueError(_bad_counts(bad, counts[offsets[bad] : offsets[bad + 1]], height, width))
    return bits


def _decode_rle_cuda(counts: torch.Tensor, offsets: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`decode_runs` on a GPU; waits for it once, to learn whether the counts are those of masks."""
    pixels = height * width
    inside = offsets.clamp(0, len(counts))
    bounded = counts.clamp(0, pixels)  # so that sums do not overflow
    sums = F.pad(bounded.cumsum(0), (1, 0))
    position = torch.arange(len(counts), device=counts.device)
    outside = (position < inside[0]) | (position >= inside[-1])
    good = (inside == offsets).all() & (offsets.diff() >= 0).all() & ((bounded == counts) | outside).all()
    if not bool(good & (sums[inside].diff() == pixels).all()):
        _check_runs(counts.cpu(), offsets.cpu(), height, width)  # raises, and says what is wrong
        raise AssertionError("counts are those of masks on the CPU, but not on the GPU")
    bits = torch.empty((offsets.shape[0] - 1, height, row_bytes(width)), dtype=torch.uint8, device=counts.device)
    native.module().rle_decode_cuda(bits, sums, offsets.contiguous(), width, native.cuda_stream(counts))
    return bits


def _decode_rle_fake(
    counts: torch.Tensor, offsets: torch.Tensor, height: int, width: int, backend: str
) -> torch.Tensor:
    return counts.new_empty((offsets.shape[0] - 1, height, row_bytes(width)), dtype=torch.uint8)


register(
    "encode_rle(Tensor bits, int width, int canvas_height, int canvas_width, int x0, int y0, str backend)"
    " -> (Tensor, Tensor)",
    _encode_rle,
    _encode_rle_fake,
)
register(
    "decode_rle(Tensor counts, Tensor offsets, int height, int width, str backend) -> Tensor",
    _decode_rle,
    _decode_rle_fake,
)
