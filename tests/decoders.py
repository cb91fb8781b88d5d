"""Random inputs of mask decoders, and the packed decoder stage by stage."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_fast.runtime.packed_decoder import PackedDecoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rows_of(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2).contiguous()


def decoder_inputs(prompts: int, tokens: int, height: int, width: int, images: int = 1) -> tuple[Tensor, ...]:
    """Image embedding, its encoding, sparse and dense prompts."""
    generator = torch.Generator().manual_seed(prompts + tokens + height)
    shapes = (1, 256, height, width), (1, 256, height, width), (prompts, tokens, 256), (images, 256, height, width)
    features, pe, sparse, dense = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes)
    return features, pe, sparse, dense


def run(packed: PackedDecoder, features: Tensor, pe: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """What the decoder returns for multimask output, and predicted IoU."""
    image = rows_of(features + dense)
    start = packed.project_first_layer(image, rows_of(pe)) if len(image) == 1 else image
    mask_tokens, pixels, iou = packed.predict_tokens(start, rows_of(pe), sparse)
    assert pixels.dtype == packed.dtype and iou.dtype == torch.float32
    return packed.masks_from(mask_tokens, pixels, features.shape[2:], range(1, 4)), iou[:, 1:]
