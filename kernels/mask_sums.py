"""The loss of prompts (`training/losses.py`: `prompt_loss`) from sums over the pixels of masks, and its gradients.

Focal loss, dice loss and true IoU of a mask are made of a few sums. PyTorch makes and keeps a tensor of every term of
them, in float32; here a program takes a tile of all masks of a prompt and reads each logit and target once. A second
kernel adds up tiles, chooses the mask with the lowest loss, and leaves how the loss depends on that one's sums. The
others have no gradient: the third kernel writes their zeros without reading them. Everything is float32, counts are
exact up to 2^24 pixels, and nothing depends on the order of the programs.

Targets and validity are bytes of 0 or 1. A logit that is not finite does to the loss what it does in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from sam_fast.kernels.launch import TRITON_TYPES, Variant
from torch import Tensor

_TILE = 2048  # pixels
_WARPS = 8


class Weights(NamedTuple):
    """Of the terms of the loss; `alpha` is the focal loss's weight of pixels in the target."""

    alpha: float
    focal: float
    dice: float
    iou: float


class Losses(NamedTuple):
    """What `losses` writes.

    Attributes:
        total, lowest: float32 [N], the loss with the IoU head's error, and the lowest loss of a mask alone.
        chosen: int64 [N], which mask that is.
        iou: float32 [N, M], true IoU of every mask.
        slopes: float32 [N, 3], derivatives of `lowest` by the focal terms, the overlap and the probability, summed.
    """

    total: Tensor
    lowest: Tensor
    chosen: Tensor
    iou: Tensor
    slopes: Tensor


def losses(logits: Tensor, predicted: Tensor, targets: Tensor, valid: Tensor | None, weights: Weights) -> Losses:
    """The loss of N prompts.

    Args:
        logits: [N, M, H, W], each mask contiguous.
        predicted: [N, M], predicted IoU.
        targets, valid: uint8 [N, H, W], contiguous; without `valid` all pixels count.
        weights: of the terms.
    """
    (N, M), pixels = logits.shape[:2], logits.shape[2:].numel()
    tiles = triton.cdiv(pixels, _TILE)
    sums = logits.new_empty(N, 5 * M + 2, tiles, dtype=torch.float32)
    constants = {"M": M, "ALPHA": weights.alpha, "TILE": _TILE, "num_warps": _WARPS}
    sums_kernel[(N, tiles)](sums, logits, targets, valid, *logits.stride()[:2], pixels, **constants)
    total, lowest = sums.new_empty(N), sums.new_empty(N)
    chosen = torch.empty(N, dtype=torch.int64, device=logits.device)
    found = Losses(total, lowest, chosen, sums.new_empty(N, M), sums.new_empty(N, 3))
    losses_kernel[(N,)](*found, sums, predicted, *predicted.stride(), tiles, **_constants(M, tiles, weights))
    return found


def gradients(
    grad_logits: Tensor,
    grad_predicted: Tensor,
    grad_total: Tensor,
    grad_lowest: Tensor,
    chosen: Tensor,
    iou: Tensor,
    slopes: Tensor,
    logits: Tensor,
    predicted: Tensor,
    targets: Tensor,
    valid: Tensor | None,
    weights: Weights,
) -> None:
    """Write the gradients of `losses` to `grad_logits` and `grad_predicted`, contiguous (other arguments: there).

    Args:
        grad_total: float32 [N], contiguous, of `Losses.total` by way of the IoU head's error.
        grad_lowest: the same by way of the chosen mask, and of `Losses.lowest`.
        chosen, iou, slopes: of `Losses`.
    """
    (N, M), pixels = logits.shape[:2], logits.shape[2:].numel()
    gradients_kernel[(N, triton.cdiv(pixels, _TILE))](
        grad_logits,
        grad_predicted,
        grad_total,
        grad_lowest,
        chosen,
        iou,
        slopes,
        logits,
        predicted,
        targets,
        valid,
        *logits.stride()[:2],
        *predicted.stride(),
        pixels,
        M=M,
        LANES=triton.next_power_of_2(M),
        ALPHA=weights.alpha,
        IOU_WEIGHT=weights.iou,
        TILE=_TILE,
        num_warps=_WARPS,
    )


def _constants(M: int, tiles: int, weights: Weights) -> dict[str, Any]:
    constants = {"M": M, "LANES": triton.next_power_of_2(tiles), "num_warps": 1}
    return constants | {"FOCAL_WEIGHT": weights.focal, "DICE_WEIGHT": weights.dice, "IOU_WEIGHT": weights.iou}


@triton.jit
def _pixels(targets, valid, n, pixel, pixels):
    """Which pixels lie in the target, and which count: 0 or 1."""
    at = n * pixels + pixel
    inside = tl.load(targets + at, mask=pixel < pixels, other=0).to(tl.float32)
    if valid is not None:
        counted = tl.load(valid + at, mask=pixel < pixels, other=0).to(tl.float32)
    else:
        counted = (pixel < pixels).to(tl.float32)
    return inside, counted


@triton.jit
def _terms(x, inside):
    """Of logits: the probability that a pixel is inside, that of the wrong and the right answer, the cross entropy."""
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    larger = 1.0 / w
    smaller = u * larger
    probability = tl.where(x > 0, larger, smaller)
    complement = tl.where(x > 0, smaller, larger)
    wrong = tl.where(inside > 0, complement, probability)
    right = tl.where(inside > 0, probability, complement)
    logarithm = tl.log(w) + (u - (w - 1.0)) * larger  # of 1 + u, with what the sum in `w` lost of a small u
    return probability, wrong, right, (1.0 - inside) * x - tl.minimum(x, 0.0) + logarithm


@triton.jit
def sums_kernel(
    sums,  # [N, 5 M + 2, tiles]: five of each mask, then the pixels in the target, and those that count
    logits,  # [N, M, pixels]
    targets,  # [N, pixels]
    valid,  # [N, pixels] or None
    stride_n,
    stride_m,
    pixels,
    M: tl.constexpr,
    ALPHA: tl.constexpr,
    TILE: tl.constexpr,
):
    n, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    pixel = tile * TILE + tl.arange(0, TILE)
    inside, counted = _pixels(targets, valid, n, pixel, pixels)
    sums += n * (5 * M + 2) * tiles + tile
    tl.store(sums + 5 * M * tiles, tl.sum(inside * counted))
    tl.store(sums + (5 * M + 1) * tiles, tl.sum(counted))
    alpha = tl.where(inside > 0, ALPHA, 1.0 - ALPHA) * counted
    logits += n * stride_n
    for m in range(M):
        x = tl.load(logits + pixel, mask=pixel < pixels, other=0.0).to(tl.float32)
        probability, wrong, _, cross_entropy = _terms(x, inside)
        probability *= counted
        predicted = tl.where(x > 0, counted, 0.0)
        own = sums + 5 * m * tiles
        tl.store(own, tl.sum(alpha * wrong * wrong * cross_entropy))
        tl.store(own + tiles, tl.sum(probability * inside))
        tl.store(own + 2 * tiles, tl.sum(probability))
        tl.store(own + 3 * tiles, tl.sum(predicted * inside))
        tl.store(own + 4 * tiles, tl.sum(predicted))
        logits += stride_m


@triton.jit
def _sum(sums, row, tiles, LANES: tl.constexpr):
    tile = tl.arange(0, LANES)
    return tl.sum(tl.load(sums + row * tiles + tile, mask=tile < tiles, other=0.0))


@triton.jit
def losses_kernel(
    total,  # [N]
    lowest,  # [N]
    chosen,  # int64 [N]
    iou,  # [N, M]
    slopes,  # [N, 3]
    sums,  # [N, 5 M + 2, tiles]
    predicted,  # [N, M]
    stride_n,
    stride_m,
    tiles,
    M: tl.constexpr,
    LANES: tl.constexpr,  # tiles as a power of two
    FOCAL_WEIGHT: tl.constexpr,
    DICE_WEIGHT: tl.constexpr,
    IOU_WEIGHT: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    sums += n * (5 * M + 2) * tiles
    inside = _sum(sums, 5 * M, tiles, LANES)
    by_focal = FOCAL_WEIGHT / tl.maximum(_sum(sums, 5 * M + 1, tiles, LANES), 1.0)
    error = 0.0
    for m in tl.static_range(M):
        overlap, probability = _sum(sums, 5 * m + 1, tiles, LANES), _sum(sums, 5 * m + 2, tiles, LANES)
        both, guessed = _sum(sums, 5 * m + 3, tiles, LANES), _sum(sums, 5 * m + 4, tiles, LANES)
        size = probability + inside + 1.0
        dice = (2.0 * overlap + 1.0) / size
        loss = by_focal * _sum(sums, 5 * m, tiles, LANES) + DICE_WEIGHT * (1.0 - dice)
        union = guessed + inside - both
        own_iou = tl.where(union > 0, tl.div_rn(both, tl.maximum(union, 1.0)), 1.0)
        tl.store(iou + n * M + m, own_iou)
        difference = tl.load(predicted + n * stride_n + m * stride_m).to(tl.float32) - own_iou
        error += difference * difference
        by_overlap, by_probability = -2.0 * DICE_WEIGHT / size, DICE_WEIGHT * dice / size
        if m == 0:
            least, best, best_overlap, best_probability = loss, m, by_overlap, by_probability
        else:
            better = (loss < least) | ((loss != loss) & (least == least))  # NaN wins, the first of them
            least, best = tl.where(better, loss, least), tl.where(better, m, best)
            best_overlap = tl.where(better, by_overlap, best_overlap)
            best_probability = tl.where(better, by_probability, best_probability)
    tl.store(total + n, least + IOU_WEIGHT / M * error)
    tl.store(lowest + n, least)
    tl.store(chosen + n, best)
    tl.store(slopes + n * 3, by_focal)
    tl.store(slopes + n * 3 + 1, best_overlap)
    tl.store(slopes + n * 3 + 2, best_probability)


@triton.jit
def gradients_kernel(
    grad_logits,  # [N, M, pixels]
    grad_predicted,  # [N, M]
    grad_total,  # [N]
    grad_lowest,  # [N]
    chosen,  # int64 [N]
    iou,  # [N, M]
    slopes,  # [N, 3]
    logits,  # [N, M, pixels]
    predicted,  # [N, M]
    targets,  # [N, pixels]
    valid,  # [N, pixels] or None
    stride_n,
    stride_m,
    predicted_stride_n,
    predicted_stride_m,
    pixels,
    M: tl.constexpr,
    LANES: tl.constexpr,  # M as a power of two
    ALPHA: tl.constexpr,
    IOU_WEIGHT: tl.constexpr,
    TILE: tl.constexpr,
):
    n, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tile == 0:
        m = tl.arange(0, LANES)
        guess = tl.load(predicted + n * predicted_stride_n + m * predicted_stride_m, mask=m < M, other=0.0)
        difference = guess.to(tl.float32) - tl.load(iou + n * M + m, mask=m < M, other=0.0)
        grad = tl.load(grad_total + n) * (2.0 * IOU_WEIGHT / M)
        tl.store(grad_predicted + n * M + m, grad * difference, mask=m < M)
    factor, best = tl.load(grad_lowest + n), tl.load(chosen + n)
    by_focal = factor * tl.load(slopes + n * 3)
    by_overlap, by_probability = factor * tl.load(slopes + n * 3 + 1), factor * tl.load(slopes + n * 3 + 2)
    needed = (by_focal != 0) | (by_overlap != 0) | (by_probability != 0)
    pixel = tile * TILE + tl.arange(0, TILE)
    logits += n * stride_n
    for m in range(M):
        own = grad_logits + (n * M + m) * pixels + pixel
        if needed & (m == best):
            inside, counted = _pixels(targets, valid, n, pixel, pixels)
            x = tl.load(logits + pixel, mask=pixel < pixels, other=0.0).to(tl.float32)
            _, wrong, right, cross_entropy = _terms(x, inside)
            # Cross entropy grows by `wrong` with the logit turned against the target, and `wrong` by wrong * right.
            focal = wrong * wrong * (2.0 * right * cross_entropy + wrong)
            focal *= tl.where(inside > 0, -ALPHA, 1.0 - ALPHA)
            dice = wrong * right * (by_overlap * inside + by_probability)
            tl.store(own, (by_focal * focal + dice) * counted, mask=pixel < pixels)
        else:
            tl.store(own, tl.zeros([TILE], tl.float32), mask=pixel < pixels)
        logits += stride_m


def variants(architecture: int) -> Iterator[Variant]:
    """What training asks for: three masks of a prompt, or one, with padding or without, of few tiles and of many."""
    weights, options = Weights(0.25, 20.0, 1.0, 1.0), {"num_warps": _WARPS}
    for M in (1, 3):
        for tiles in (2, 32):
            constants = _constants(M, tiles, weights)
            few = {"num_warps": constants.pop("num_warps")}
            signature = {name: "*fp32:16" for name in ("total", "lowest", "iou", "slopes", "sums", "predicted")}
            signature |= {"chosen": "*i64:16", "stride_n": "i32", "stride_m": "i32", "tiles": "i32"}
            yield Variant(f"losses of {M} masks of {tiles} tiles", losses_kernel, signature, constants, few)
        for dtype, padded in (
            (torch.float32, True),
            (torch.float16, True),
            (torch.bfloat16, True),
            (torch.bfloat16, False),
        ):
            kind = TRITON_TYPES[dtype]
            name = f"of {M} masks {kind}" + ", padded" * padded
            inputs = {"logits": f"*{kind}:16", "targets": "*u8:16", "pixels": "i32:16"}
            inputs |= {"stride_n": "i32:16", "stride_m": "i32:16"} | ({"valid": "*u8:16"} if padded else {})
            constants = {"M": M, "ALPHA": weights.alpha, "TILE": _TILE} | ({} if padded else {"valid": None})
            yield Variant(f"sums {name}", sums_kernel, {"sums": "*fp32:16"} | inputs, constants, options)
            signature = {name: "*fp32:16" for name in ("grad_total", "grad_lowest", "iou", "slopes")} | inputs
            signature |= {name: f"*{kind}:16" for name in ("grad_logits", "grad_predicted", "predicted")}
            signature |= {"chosen": "*i64:16", "predicted_stride_n": "i32", "predicted_stride_m": "i32"}
            constants |= {"LANES": triton.next_power_of_2(M), "IOU_WEIGHT": weights.iou}
            yield Variant(f"gradients {name}", gradients_kernel, signature, constants, options)
