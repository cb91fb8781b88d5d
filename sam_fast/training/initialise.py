"""The random weights that training from nothing begins with."""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
from torch import Tensor, nn

from sam_fast.modeling import MaskDecoder, Sam
from sam_fast.modeling.image_encoder import FoldingNeck, ImageEncoderViT
from sam_fast.modeling.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer

_NOISE = 0.03  # share of random weights that layers with a purpose keep


@torch.no_grad()
def initialise_weights(model: Sam) -> None:
    """Draw the weights of the image encoder's transformer as MAE does, from torch's global generator.

    Uniform Xavier matrices with zero biases, the patch embedding as the matrix it is (the convolutions of a stem as
    He et al., "Delving Deep into Rectifiers", 2015), and absolute positions that begin as sines and cosines of row and
    column (He et al., "Masked Autoencoders", 2022, appendix A). Relative positions stay zero.

    What is behind the blocks keeps PyTorch's initialisation, as in the official code, with these exceptions: any mask
    prompt begins as "no mask", and that as zero, lest random ones drown the image when corrections begin; the mask
    decoder begins by looking at the image (`_look_at_prompts`, `_unfold_pixels`).
    """
    nn.init.zeros_(model.prompt_encoder.no_mask_embed.weight)
    branch = model.prompt_encoder.mask_downscaling[-1]
    assert isinstance(branch, nn.Conv2d) and branch.bias is not None
    nn.init.zeros_(branch.weight)
    nn.init.zeros_(branch.bias)
    if isinstance(model.mask_decoder.transformer, TwoWayTransformer):
        _look_at_prompts(model.mask_decoder, model.prompt_encoder.get_dense_pe())
    encoder = model.image_encoder
    if not isinstance(encoder, ImageEncoderViT):
        return
    if isinstance(encoder.neck, FoldingNeck):
        _unfold_pixels(model.mask_decoder, encoder.neck.proj.out_channels)
    patches = encoder.patch_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))
    for module in [*encoder.patch_embed.modules(), *encoder.neck.modules()]:
        if isinstance(module, nn.Conv2d) and module.bias is not None and module is not patches:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in encoder.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if encoder.pos_embed is not None:
        _, height, width, channels = encoder.pos_embed.shape
        encoder.pos_embed.copy_(sine_positions(height, width, channels)[None])


def _look_at_prompts(decoder: MaskDecoder, image_pe: Tensor) -> None:
    """Let prompts begin by reading the image where they are, tokens by sharing it, pixels by comparing themselves.

    From random weights a decoder learns within minutes that masks surround their prompt, and then takes very long to
    look at the image at all: too many random layers lie between a pixel, the prompt on it, and the classifier of the
    other pixels. So queries and keys between tokens and image begin as the same random projection, which scores
    likeness: of position when tokens read (in directions in which encodings vary much), of everything when the image
    reads. Values pass through, and classifiers begin at a scale that passes on what differs between prompts.

    Args:
        decoder: with a `TwoWayTransformer`.
        image_pe: [1, C, h, w], `PromptEncoder.get_dense_pe`.
    """
    transformer = decoder.transformer
    assert isinstance(transformer, TwoWayTransformer)
    places = image_pe[0].flatten(1)  # [C, P]
    anything = torch.eye(len(places))
    layers = cast(list[TwoWayAttentionBlock], list(transformer.layers))
    readings = [layer.cross_attn_token_to_image for layer in layers]
    for attention in [*readings, transformer.final_attn_token_to_image]:
        _score_likeness(attention, places)
        _pass_through(attention, gain=math.sqrt(2))
    for layer in layers:
        _score_likeness(layer.cross_attn_image_to_token, anything)
        _pass_through(layer.cross_attn_image_to_token, gain=1)
        _pass_through(layer.self_attn, gain=4)
    for classifier in decoder.output_hypernetworks_mlps:
        linears = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
        for linear in linears:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="linear" if linear is linears[-1] else "relu")
            nn.init.zeros_(linear.bias)
        linears[-1].weight.mul_(0.3)


def _score_likeness(attention: Attention, vectors: Tensor) -> None:
    """Make the scores of an attention the likeness of its inputs, in random directions of the columns of `vectors`."""
    width = attention.internal_dim // attention.num_heads
    for head in range(attention.num_heads):
        # Sums of random columns lie where columns vary most.
        projection = torch.linalg.qr(vectors @ torch.randn(vectors.shape[1], width)).Q.T  # [width, C]
        rows = slice(head * width, (head + 1) * width)
        attention.q_proj.weight[rows] = projection
        attention.k_proj.weight[rows] = projection
    nn.init.zeros_(attention.q_proj.bias)
    nn.init.zeros_(attention.k_proj.bias)


def _pass_through(attention: Attention, gain: float) -> None:
    """Make the output of an attention `gain` times the projection of its values to a random subspace."""
    nn.init.orthogonal_(attention.v_proj.weight)
    attention.out_proj.weight.copy_(gain * attention.v_proj.weight.T)
    nn.init.zeros_(attention.v_proj.bias)
    nn.init.zeros_(attention.out_proj.bias)


def _unfold_pixels(decoder: MaskDecoder, channels: int) -> None:
    """Let the upscaling begin as the inverse of `image_encoder.FoldingNeck`, `channels` for each pixel, and some noise.

    Prompts, too, begin by saying the same to all pixels of a token.

    The last layer treats all pixels alike, as in Aitken et al., "Checkerboard artifact free sub-pixel convolution",
    2017: random weights would make neighbours incomparable.
    """
    first, second = (layer for layer in decoder.output_upscaling if isinstance(layer, nn.ConvTranspose2d))
    first.weight.mul_(_NOISE)  # [C, C/4, 2, 2]
    second.weight.mul_(_NOISE)  # [C/4, C/8, 2, 2]
    mixing = nn.init.orthogonal_(torch.empty(second.out_channels, channels), gain=math.sqrt(2))
    for channel in range(channels):
        for y, x in itertools.product(range(4), repeat=2):
            between = 4 * channel + 2 * (y % 2) + x % 2
            first.weight[16 * channel + 4 * y + x, between, y // 2, x // 2] += 1
            if y < 2 and x < 2:
                second.weight[between, :, y, x] += mixing[:, channel]
    for layer in (first, second):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for block in decoder.transformer.modules():
        if not isinstance(block, TwoWayAttentionBlock):
            continue
        written = block.cross_attn_image_to_token.out_proj.weight  # [C, width]
        said = nn.init.orthogonal_(torch.empty(channels, written.shape[1]))
        written.copy_(said.repeat_interleave(len(written) // channels, 0))


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
