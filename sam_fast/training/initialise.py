"""The random weights that training from nothing begins with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sam_fast.modeling import Sam
from sam_fast.modeling.image_encoder import ImageEncoderViT


@torch.no_grad()
def initialise_weights(model: Sam) -> None:
    """Draw the weights of the image encoder's transformer as MAE does, from torch's global generator.

    Uniform Xavier matrices with zero biases, the patch embedding as the matrix it is, and absolute positions that begin
    as sines and cosines of row and column (He et al., "Masked Autoencoders", 2022, appendix A). Relative positions stay
    zero; everything behind the blocks keeps PyTorch's initialisation, as in the official code, but the last layer of
    the mask prompt's branch: any mask begins as "no mask", lest a random one drown the image when corrections begin.
    """
    branch = model.prompt_encoder.mask_downscaling[-1]
    assert isinstance(branch, nn.Conv2d) and branch.bias is not None
    nn.init.zeros_(branch.weight)
    branch.bias.copy_(model.prompt_encoder.no_mask_embed.weight[0])
    encoder = model.image_encoder
    if not isinstance(encoder, ImageEncoderViT):
        return
    patches = encoder.patch_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)
    for module in encoder.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if encoder.pos_embed is not None:
        _, height, width, channels = encoder.pos_embed.shape
        encoder.pos_embed.copy_(sine_positions(height, width, channels)[None])


def sine_positions(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of the columns, then of the rows, at geometric frequencies: [height, width, channels].

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.5, for each axis.
    """
    half = channels // 2
    count = math.ceil(half / 2)
    frequencies = 10_000.0 ** (-torch.arange(count) / count)
    rows = torch.arange(height)[:, None] * frequencies
    columns = torch.arange(width)[:, None] * frequencies
    by_row = torch.cat([rows.sin(), rows.cos()], 1)[:, None, :half].expand(height, width, -1)
    by_column = torch.cat([columns.sin(), columns.cos()], 1)[None, :, : channels - half].expand(height, width, -1)
    return torch.cat([by_column, by_row], dim=2)[..., :channels]
