"""The end of the mask decoder: pixels of an image, upscaled four times, and the masks that tokens make of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_fast import native
from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register


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


def upscale_masks(image: Tensor, upscaling: Upscaling, classifiers: Tensor, *, backend: str = "auto") -> Tensor:
    """Logits of masks: convolution, LayerNorm, GELU, convolution, GELU, and a linear classifier per mask.

    Args:
        image: [N, h, w, C].
        upscaling: the weights.
        classifiers: [N, M, C2].
        backend: "native", "torch" or "auto", which takes the native one for float32 and channels in eights.

    Returns:
        [N, M, 4h, 4w].

    Raises:
        ValueError: shapes do not fit, or the native backend cannot take these.
    """
    weights = [x for x in upscaling if isinstance(x, Tensor)]
    if len(image) != len(classifiers) or image.shape[3] != upscaling.first_weight.shape[1]:
        raise ValueError(f"got images {list(image.shape)} and classifiers {list(classifiers.shape)} of other weights")
    fits = image.shape[3] % 8 == 0 and all(x.dtype == torch.float32 for x in (image, classifiers, *weights))
    if backend == "native" and not fits:
        raise ValueError("the native upscale_masks takes float32 and channels in eights")
    backend = backend if fits else "torch"
    if torch.compiler.is_compiling():
        return torch.ops.sam_fast.upscale_masks(image, *upscaling, classifiers, backend)
    return _upscale_masks(image, *upscaling, classifiers, backend)


def upscale_masks_reference(image: Tensor, upscaling: Upscaling, classifiers: Tensor) -> Tensor:
    """`upscale_masks` in PyTorch: pixels stay rows of channels up to the masks, and only those are rearranged."""
    pixels = upscaled_squares(image, upscaling)
    return from_squares(pixels @ classifiers.transpose(1, 2), image.shape[1:3])


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


def _upscale_masks(image: Tensor, *rest: Any) -> Tensor:
    *weights, classifiers, backend = rest
    upscaling = Upscaling(*weights)
    tensors = [x for x in upscaling if isinstance(x, Tensor)]
    if choose_backend("upscale_masks", backend, image, classifiers, *tensors) == "torch":
        return upscale_masks_reference(image, upscaling, classifiers)
    logits = _upscale_masks_fake(image, *rest)
    native.module().upscale_masks(
        logits,
        image.contiguous(),
        *(x.contiguous() if isinstance(x, Tensor) else x for x in upscaling),
        classifiers.contiguous(),
        native.num_threads(),
    )
    return logits


def _upscale_masks_fake(image: Tensor, *rest: Any) -> Tensor:
    N, h, w, _ = image.shape
    return image.new_empty(N, rest[-2].shape[1], 4 * h, 4 * w)


register(
    "upscale_masks(Tensor image, Tensor first_weight, Tensor first_bias, Tensor norm_weight, Tensor norm_bias, "
    "float eps, Tensor second_weight, Tensor second_bias, Tensor classifiers, str backend) -> Tensor",
    _upscale_masks,
    _upscale_masks_fake,
)
