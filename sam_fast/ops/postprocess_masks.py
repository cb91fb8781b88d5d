"""Low-resolution mask logits to masks of the original image, without ever making the float image.

Per mask, the official chain is: bilinear to the model's square input, crop of the padding, bilinear to the original
size, threshold, stability score, box. `postprocess_masks` computes all of it in one pass into packed bits;
`resize_logits` returns the float image, for those who ask for it.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_fast import native
from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register
from sam_fast.ops.packed_masks import pack_masks_reference, row_bytes

_REFERENCE_BYTES = 64 << 20  # of float image that the reference makes at a time


class PostprocessedMasks(NamedTuple):
    """What `postprocess_masks` returns, per mask.

    area: [N] int64, pixels above the mask threshold.
    stability_score: [N] float32, pixels above threshold + offset over pixels above threshold - offset; NaN if there
        are none of the latter.
    boxes: [N, 4] int64, inclusive XYXY in pixels of the original image; zeros for an empty mask.
    bits: [N, H, 8 * ceil(W / 64)] uint8, packed rows (see `sam_fast.ops.packed_masks`), or None if not wanted.
    """

    area: Tensor
    stability_score: Tensor
    boxes: Tensor
    bits: Tensor | None


def postprocess_masks(
    logits: Tensor,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    image_size: int,
    *,
    mask_threshold: float = 0.0,
    stability_offset: float = 1.0,
    return_bits: bool = True,
    backend: str = "auto",
) -> PostprocessedMasks:
    """Upscale, threshold and measure mask logits: bilinear to S x S, crop, bilinear to the original, strict `>`.

    Args:
        logits: [N, h, w] floating point, low-resolution mask logits; computed in float32.
        input_size: (height, width) of the resized image inside the model's square input, in pixels.
        original_size: (H, W) of the original image, in pixels.
        image_size: S, side of the model's square input, in pixels.
        mask_threshold: logit above which a pixel belongs to the mask.
        stability_offset: shift of the threshold for the two masks of the stability score.
        return_bits: whether to store the masks, or only to measure them.
        backend: "auto", "native" or "torch".

    Raises:
        TypeError: logits are not a floating-point tensor.
        ValueError: wrong shape or size.
        RuntimeError: the backend is not available here.

    Source: Kirillov et al., Segment Anything (2023), appendix B (automatic mask generation).
    """
    logits, sizes = _validate("postprocess_masks", logits, input_size, original_size, image_size)
    thresholds = (float(mask_threshold), float(stability_offset))
    if torch.compiler.is_compiling():
        area, score, boxes, bits = torch.ops.sam_fast.postprocess_masks(
            logits, *sizes, *thresholds, return_bits, backend
        )
    else:
        area, score, boxes, bits = _postprocess(logits, *sizes, *thresholds, return_bits, backend)
    return PostprocessedMasks(area, score, boxes, bits if return_bits else None)


def resize_logits(
    logits: Tensor,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    image_size: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Upscale mask logits to the original image: bilinear to S x S, crop, bilinear.

    Args:
        logits, input_size, original_size, image_size, backend: as in `postprocess_masks`.

    Returns:
        [N, H, W] float32 logits in pixels of the original image.

    Raises:
        TypeError, ValueError, RuntimeError: as `postprocess_masks`.
    """
    logits, sizes = _validate("resize_logits", logits, input_size, original_size, image_size)
    if torch.compiler.is_compiling():
        return torch.ops.sam_fast.resize_logits(logits, *sizes, backend)
    return _resize(logits, *sizes, backend)


def postprocess_masks_reference(
    logits: Tensor,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    image_size: int,
    *,
    mask_threshold: float = 0.0,
    stability_offset: float = 1.0,
    return_bits: bool = True,
) -> PostprocessedMasks:
    """`postprocess_masks` in plain PyTorch, a bounded number of masks at a time; validated arguments."""
    height, width = original_size
    device = logits.device
    n = logits.shape[0]
    area = torch.empty(n, dtype=torch.int64, device=device)
    score = torch.empty(n, dtype=torch.float32, device=device)
    boxes = torch.empty((n, 4), dtype=torch.int64, device=device)
    bits = torch.empty((n if return_bits else 0, height, row_bytes(width)), dtype=torch.uint8, device=device)
    for chunk in _chunks(n, original_size, image_size):
        image = resize_logits_reference(logits[chunk], input_size, original_size, image_size)
        masks = image > mask_threshold
        area[chunk] = masks.sum((-2, -1))
        inner = (image > mask_threshold + stability_offset).sum((-2, -1))
        outer = (image > mask_threshold - stability_offset).sum((-2, -1))
        score[chunk] = inner.float() / outer.float()
        boxes[chunk] = _boxes(masks)
        if return_bits:
            bits[chunk] = pack_masks_reference(masks)
    return PostprocessedMasks(area, score, boxes, bits if return_bits else None)


def resize_logits_reference(
    logits: Tensor, input_size: tuple[int, int], original_size: tuple[int, int], image_size: int
) -> Tensor:
    """`resize_logits` in plain PyTorch; differentiable."""
    if logits.shape[0] == 0:
        return logits.new_empty((0, *original_size))
    grid = F.interpolate(logits[:, None], (image_size, image_size), mode="bilinear", align_corners=False)
    cropped = grid[..., : input_size[0], : input_size[1]]
    return F.interpolate(cropped, tuple(original_size), mode="bilinear", align_corners=False)[:, 0]


def _chunks(n: int, original_size: tuple[int, int], image_size: int) -> list[slice]:
    bytes_per_mask = 4 * max(math.prod(original_size), image_size * image_size)
    step = max(1, _REFERENCE_BYTES // bytes_per_mask)
    return [slice(i, i + step) for i in range(0, n, step)]


def _boxes(masks: Tensor) -> Tensor:
    """Inclusive XYXY boxes [N, 4] int64 of masks [N, H, W] bool, zeros where empty."""
    sides = []
    for occupied in (masks.any(-2), masks.any(-1)):  # [N, W], [N, H]
        length = occupied.shape[-1]
        first = occupied.int().argmax(-1)
        last = length - 1 - occupied.flip(-1).int().argmax(-1)
        sides.append((first, last))
    (left, right), (top, bottom) = sides
    boxes = torch.stack([left, top, right, bottom], dim=-1)
    return boxes * masks.any(-1).any(-1)[:, None]


def _validate(
    name: str, logits: Tensor, input_size: tuple[int, int], original_size: tuple[int, int], image_size: int
) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """Check the arguments; return the logits and (input height, width, original height, width, S)."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: logits must be a torch.Tensor, got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"{name}: logits must be floating point, got {logits.dtype}")
    if logits.dim() != 3 or logits.shape[1] == 0 or logits.shape[2] == 0:
        raise ValueError(f"{name}: logits must be [N, h, w] with h, w > 0, got {tuple(logits.shape)}")
    if len(input_size) != 2 or len(original_size) != 2:
        raise ValueError(f"{name}: sizes must be (height, width), got {tuple(input_size)} and {tuple(original_size)}")
    if not all(isinstance(side, (Integral, torch.SymInt)) for side in (*input_size, *original_size, image_size)):
        raise TypeError(f"{name}: sizes must be integers, got {input_size}, {original_size} and {image_size}")
    (h_in, w_in), (height, width) = input_size, original_size
    if not (0 < h_in <= image_size and 0 < w_in <= image_size):
        raise ValueError(
            f"{name}: input_size must lie within 1..image_size={image_size} on both sides, got {tuple(input_size)}"
        )
    if not (0 < height < 1 << 24 and 0 < width < 1 << 24 and image_size < 1 << 24):
        raise ValueError(
            f"{name}: original_size and image_size must be in 1..2**24-1, got {tuple(original_size)} and {image_size}"
        )
    return logits, (int(h_in), int(w_in), int(height), int(width), int(image_size))


def _readable(logits: Tensor) -> Tensor:
    """Logits as the native operation reads them: contiguous, float32 on the CPU, and also 16 bits wide on a GPU."""
    if not (native.uses_cuda(logits) and logits.dtype in (torch.float16, torch.bfloat16)):
        logits = logits.float()
    return logits.detach().contiguous()


def _postprocess(
    logits: Tensor,
    h_in: int,
    w_in: int,
    height: int,
    width: int,
    image_size: int,
    mask_threshold: float,
    stability_offset: float,
    return_bits: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The implementation behind function and operator; bits are empty [0, H, row_bytes] if not wanted."""
    if choose_backend("postprocess_masks", backend, logits) == "torch":
        result = postprocess_masks_reference(
            logits.float(),
            (h_in, w_in),
            (height, width),
            image_size,
            mask_threshold=mask_threshold,
            stability_offset=stability_offset,
            return_bits=return_bits,
        )
        bits = result.bits
        if bits is None:
            bits = logits.new_empty((0, height, row_bytes(width)), dtype=torch.uint8)
        return result.area, result.stability_score, result.boxes, bits
    outputs = _outputs(logits, height, width, return_bits)
    area, score, boxes, bits = outputs
    results = (area, score, boxes, bits if return_bits else None)
    thresholds = (mask_threshold, mask_threshold + stability_offset, mask_threshold - stability_offset)
    sizes = ((h_in, w_in), (height, width), image_size)
    if native.uses_cuda(logits):
        workspace = logits.new_empty((len(area), native.module().mask_workspace), dtype=torch.int64)
        native.module().postprocess_masks_cuda(
            *results, workspace, _readable(logits), *sizes, *thresholds, native.cuda_stream(logits)
        )
    else:
        native.module().postprocess_masks(*results, _readable(logits), *sizes, *thresholds, native.num_threads())
    return outputs


def _outputs(logits: Tensor, height: int, width: int, return_bits: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    return (
        logits.new_empty(n, dtype=torch.int64),
        logits.new_empty(n, dtype=torch.float32),
        logits.new_empty((n, 4), dtype=torch.int64),
        logits.new_empty((n if return_bits else 0, height, row_bytes(width)), dtype=torch.uint8),
    )


def _resize(logits: Tensor, h_in: int, w_in: int, height: int, width: int, image_size: int, backend: str) -> Tensor:
    if choose_backend("postprocess_masks", backend, logits) == "torch":
        return resize_logits_reference(logits.float(), (h_in, w_in), (height, width), image_size)
    output = logits.new_empty((logits.shape[0], height, width), dtype=torch.float32)
    sizes = ((h_in, w_in), (height, width), image_size)
    if native.uses_cuda(logits):
        native.module().resize_logits_cuda(output, _readable(logits), *sizes, native.cuda_stream(logits))
    else:
        native.module().resize_logits(output, _readable(logits), *sizes, native.num_threads())
    return output


def _fake_postprocess(logits, h_in, w_in, height, width, image_size, threshold, offset, return_bits, backend):  # type: ignore[no-untyped-def]
    return _outputs(logits, height, width, return_bits)


def _fake_resize(logits, h_in, w_in, height, width, image_size, backend):  # type: ignore[no-untyped-def]
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.float32)


_SIZES = "SymInt input_height, SymInt input_width, SymInt height, SymInt width, SymInt image_size"
register(
    f"postprocess_masks(Tensor logits, {_SIZES}, float mask_threshold, float stability_offset, bool return_bits, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _postprocess,
    _fake_postprocess,
)
register(f"resize_logits(Tensor logits, {_SIZES}, str backend) -> Tensor", _resize, _fake_resize)
