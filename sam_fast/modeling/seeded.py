"""Deterministic random weights with non-trivial masks, for tests, benchmarks and demos without a checkpoint."""

from __future__ import annotations

import functools
import zlib

import torch
from torch import Tensor, nn

# Factors on the plain 1/sqrt(fan_in) scale, found by looking at the masks (see `seed_weights`).
_POSITION_GAIN = 1.5  # absolute positions stay visible behind the whole encoder
_TEXTURE = 0.02  # share of a convolution kernel that differs between its taps
_ATTENTION_GAIN = 1.5  # q and k of the decoder's cross attentions: a prompt is noticed
_BACKGROUND = 12.0  # pulls logits below zero: masks cover a smaller part of the image
_IOU_CENTRE = 0.95
_GAINS = {
    "attn.proj.weight": 0.5,  # what an encoder block adds
    "mlp.lin2.weight": 0.5,
    "cross_attn_image_to_token.out_proj.weight": 2.0,  # what prompts write into the image stream
    "hypernetworks_mlps.0.layers.2.weight": 100.0,  # logits of hundreds, so that stability scores reach 0.95
    "hypernetworks_mlps.1.layers.2.weight": 100.0,
    "hypernetworks_mlps.2.layers.2.weight": 100.0,
    "hypernetworks_mlps.3.layers.2.weight": 100.0,
    "iou_prediction_head.layers.2.weight": 0.15,  # spread around _IOU_CENTRE
}


def _noise(shape: torch.Size, seed: int, key: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{key}".encode()))
    return torch.randn(shape, generator=generator)


def _smooth_positions(shape: torch.Size, seed: int, key: str) -> Tensor:
    """Absolute positions [1, H, W, C] that vary slowly: a coarse 6 x 6 grid of noise, interpolated."""
    coarse = _noise(torch.Size((1, shape[3], 6, 6)), seed, key)
    return nn.functional.interpolate(coarse, shape[1:3], mode="bicubic").permute(0, 2, 3, 1)


def _mirror(tensor: Tensor, dim: int, sign: float) -> Tensor:
    """Replace the second half of a dimension by the first, times `sign`."""
    first = tensor.narrow(dim, 0, tensor.shape[dim] // 2)
    return torch.cat([first, sign * first], dim)


def _balanced(name: str, tensor: Tensor) -> Tensor:
    """Pair the channels of the upscaling as a, -a, and what reads them as h, -h.

    As h (gelu(a) - gelu(-a)) = h a, the positive mean behind each GELU cancels and the mask is balanced around zero.
    """
    if name.endswith("output_upscaling.0.weight"):
        return _mirror(tensor, 1, -1)
    if name.endswith("output_upscaling.3.weight"):
        return _mirror(_mirror(tensor, 1, -1), 0, -1)
    if name.endswith("output_upscaling.1.weight"):
        return _mirror(tensor, 0, 1)
    if name.endswith(("output_upscaling.0.bias", "output_upscaling.1.bias", "output_upscaling.3.bias")):
        return _mirror(tensor, 0, -1)
    if "hypernetworks" in name and name.endswith("layers.2.weight"):
        return _mirror(tensor, 0, -1)
    return tensor


def _seeded_tensor(name: str, shape: torch.Size, seed: int) -> Tensor:
    noise = functools.partial(_noise, shape, seed)
    if name.endswith("pos_embed"):
        return _POSITION_GAIN * _smooth_positions(shape, seed, name)
    if "rel_pos" in name or name.endswith("no_mask_embed.weight"):
        return 0.1 * noise(name)
    if name.endswith(("gaussian_matrix", "_token.weight", "_tokens.weight", "_embed.weight")):
        return noise(name)
    if "point_embeddings" in name:
        return noise(name)
    if "hypernetworks" in name and name.endswith("layers.2.bias"):
        return noise(name) - _BACKGROUND  # no mirror here: it multiplies gelu(a) + gelu(-a) > 0
    if len(shape) == 1:  # biases, and the weights of normalisations
        is_iou = name.endswith("iou_prediction_head.layers.2.bias")
        centre = _IOU_CENTRE if is_iou else float(name.endswith("weight"))
        return centre + (0.02 if is_iou else 0.1) * noise(name)
    if len(shape) == 4:  # kernels nearly constant over their window smooth the picture: blobs rather than texture
        fan_in = shape[0] if "output_upscaling" in name else shape[1]  # transposed convolutions are [C_in, C_out, 2, 2]
        window = 1 if "output_upscaling" in name else shape[2] * shape[3]
        weight = _noise(torch.Size((*shape[:2], 1, 1)), seed, name + "mean") + _TEXTURE * noise(name)
        return weight / (fan_in**0.5 * window)
    weight = noise(name) / shape[1] ** 0.5
    if "cross_attn" in name and ("q_proj" in name or "k_proj" in name):
        # Queries and keys share most of their projection, so that a pixel attends to prompts near it: local masks.
        shared = noise(name.replace("k_proj", "q_proj") + "shared") / shape[1] ** 0.5
        return _ATTENTION_GAIN * (0.3 * weight + shared)
    for part, gain in _GAINS.items():
        if part in name:
            return gain * weight
    return weight


@torch.no_grad()
def seed_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a `Sam` (official or ours) with deterministic random weights whose masks are worth comparing.

    PyTorch's default initialisation gives masks that are all noise or all empty, and zero positions. Here every tensor
    is drawn by its name (two models with the same keys get the same values), no bias or position is zero, and
    scales are chosen such that on a photo the embedding follows the picture, masks are blobs that depend on the
    prompt and cover part of the image, logits reach hundreds (stability scores on both sides of 0.95), and the
    predicted IoU lies around 0.88 (the generator's filters keep some masks and drop others).

    Returns:
        the model.
    """
    for name, tensor in model.state_dict().items():
        tensor.copy_(_balanced(name, _seeded_tensor(name, tensor.shape, seed)))
    return model
