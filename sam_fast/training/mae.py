"""Masked autoencoding: how SAM's image encoder learns from images alone, before there are any masks.

Three quarters of an image's patches are dropped, the encoder's blocks see only the rest, and a light decoder predicts
the pixels of what was dropped. As for SAM itself, the plain ViT is what is pre-trained: the encoder's own blocks run
over the set of visible tokens with global attention and without relative positions, which keep their zeros. Windows,
relative positions and the neck come with the training on masks.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022, section 3; Li et al., "Exploring Plain
Vision Transformer Backbones for Object Detection" (ViTDet), 2022, section 3, on what becomes of the weights.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_fast.checkpoints import checkpoint_file, read_state_dict, write_tensors
from sam_fast.modeling import Sam
from sam_fast.modeling.image_encoder import Block, ConvStem, ImageEncoderViT
from sam_fast.modeling.positions import resize_absolute_positions
from sam_fast.training.initialise import sine_positions
from sam_fast.utils.files import replace_file

MAE_FORMAT = "sam_fast-mae"  # in the metadata of a checkpoint, under "format"

_EPSILON = 1e-6  # added to variances, of patches and of layer normalisations
_NAMES_SHOWN = 5  # of weights that do not fit, in an error

_layer_norm = functools.partial(nn.LayerNorm, eps=_EPSILON)


class Reconstruction(NamedTuple):
    """What `MaskedAutoencoder` returns.

    Attributes:
        loss: mean squared error over masked patches, float32 scalar.
        patches: [B, P, patch * patch * 3], predicted pixels in the units of the target (see `MaskedAutoencoder`).
        masked: bool [B, P], True for the patches that the encoder has not seen.
    """

    loss: Tensor
    patches: Tensor
    masked: Tensor


class MaskedAutoencoder(nn.Module):
    """Predicts the masked patches of images from the visible ones.

    loss = mean over masked patches of |prediction - target|^2 / (patch * patch * 3), where the target is the patch's
    pixels, (x - mean) / sqrt(variance + 1e-6) within each patch if `normalise_patches` (unbiased variance).

    The encoder's neck and its relative positions take no part and get no gradient. Differences from the published
    model: there is no class token (SAM has none), and the encoder's positions are trained along.

    Args:
        encoder: the encoder to train; its weights are used in place. A new one needs `initialise_weights` first.
        decoder_dim: channels of a decoder token, a multiple of `decoder_heads`.
        decoder_depth: number of decoder blocks.
        decoder_heads: attention heads per decoder block.
        mask_ratio: share of the patches that are masked; at least one patch is, and one is not.
        normalise_patches: whether the target is normalised within each patch.

    Raises:
        ValueError: the mask ratio is not between 0 and 1, the encoder has fewer than two patches, or a number of
            channels does not fit.
    """

    def __init__(
        self,
        encoder: ImageEncoderViT,
        decoder_dim: int = 128,
        decoder_depth: int = 2,
        decoder_heads: int = 4,
        mask_ratio: float = 0.75,
        normalise_patches: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie between 0 and 1, got {mask_ratio}")
        self.grid = encoder.img_size // encoder.patch_size
        if self.grid < 2:
            raise ValueError(f"an image of {encoder.img_size} px has one patch, nothing to predict it from")
        self.mask_ratio = mask_ratio
        self.normalise_patches = normalise_patches
        projection = encoder.patch_embed.proj
        pixels = encoder.patch_size**2 * encoder.in_chans
        self.encoder = encoder
        self.norm = _layer_norm(projection.out_channels)  # ViT ends with one, SAM's encoder does not
        self.decoder = PatchDecoder(
            projection.out_channels, decoder_dim, decoder_depth, decoder_heads, self.grid, pixels
        )

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """Mask patches at random, other ones in each image, and predict them.

        Args:
            images: [B, 3, S, S], normalised (`Sam.preprocess`).
            generator: draws the masks, on the CPU: one seed masks the same patches on every device.

        Returns:
            the loss, with gradients, and what was predicted.

        Raises:
            ValueError: not images of the encoder's size.
        """
        target = self.target(images)
        visible = self.draw_visible(images.shape[0], generator).to(images.device)
        prediction = self.decoder(self.encode(images, visible), visible).float()
        masked = torch.ones(target.shape[:2], dtype=torch.bool, device=images.device).scatter(1, visible, False)
        error = (prediction - target).square().mean(2)  # [B, P]
        return Reconstruction((error * masked).sum() / masked.sum(), prediction, masked)

    def draw_visible(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Choose the patches that stay visible in each of `count` images: int64 [count, V], each row without order."""
        patches = self.grid**2
        visible = min(max(round(patches * (1 - self.mask_ratio)), 1), patches - 1)
        return torch.rand(count, patches, generator=generator).argsort(1)[:, :visible]

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Run the encoder's blocks over the visible patches only, [B, V, C] from images [B, 3, S, S].

        Convolutions before the patches would look into their neighbours: they see an image whose masked patches are 0.
        """
        if isinstance(self.encoder.patch_embed, ConvStem):
            kept = torch.zeros(len(images), self.grid**2, device=images.device).scatter(1, visible, 1.0)
            images = images * F.interpolate(kept.view(-1, 1, self.grid, self.grid), size=images.shape[-2:])
        tokens = self.encoder.patch_embed(images)  # [B, H, W, C]
        if self.encoder.pos_embed is not None:
            tokens = tokens + self.encoder.pos_embed
        tokens = tokens.flatten(1, 2)
        tokens = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[2]))
        for block in self.encoder.blocks:
            assert isinstance(block, Block)
            tokens = run_globally(block, tokens)
        return self.norm(tokens)

    def target(self, images: Tensor) -> Tensor:
        """What is to be predicted, float32 [B, P, patch * patch * 3]; see `MaskedAutoencoder`.

        Raises:
            ValueError: not images of the encoder's size.
        """
        side = self.encoder.img_size
        if images.dim() != 4 or images.shape[2:] != (side, side):
            raise ValueError(f"images must be [B, C, {side}, {side}], got {tuple(images.shape)}")
        patches = self.patchify(images.float())
        if not self.normalise_patches:
            return patches
        mean, deviation = _patch_statistics(patches)
        return (patches - mean) / deviation

    @torch.no_grad()
    def paint(self, images: Tensor, reconstruction: Reconstruction) -> tuple[Tensor, Tensor]:
        """Draw what the encoder saw, and what it made of it.

        A prediction of normalised patches has neither brightness nor contrast; those of the true patch are used.

        Args:
            images: [B, 3, S, S], what the reconstruction was made of.
            reconstruction: of `forward`.

        Returns:
            images with zeros (the mean colour) in masked patches, and images with predictions there: [B, 3, S, S].
        """
        patches = self.patchify(images.float())
        prediction = reconstruction.patches
        if self.normalise_patches:
            mean, deviation = _patch_statistics(patches)
            prediction = prediction * deviation + mean
        masked = reconstruction.masked[..., None]
        return self.unpatchify(patches * ~masked), self.unpatchify(torch.where(masked, prediction, patches))

    def patchify(self, images: Tensor) -> Tensor:
        """Cut images [B, C, S, S] into patches [B, P, patch * patch * C], pixels by row, column and channel."""
        B, C = images.shape[:2]
        patch = self.encoder.patch_size
        cells = images.reshape(B, C, self.grid, patch, self.grid, patch)
        return cells.permute(0, 2, 4, 3, 5, 1).reshape(B, self.grid**2, patch * patch * C)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Put patches together again: the inverse of `patchify`."""
        patch = self.encoder.patch_size
        cells = patches.reshape(patches.shape[0], self.grid, self.grid, patch, patch, -1)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, self.grid * patch, self.grid * patch)


class PatchDecoder(nn.Module):
    """Predicts every patch of an image from the tokens of the visible ones: a narrow ViT, not used after pre-training.

    Args:
        encoder_dim: channels of the visible tokens.
        dim: channels of the decoder's tokens, a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads per block.
        grid: patches along a side of the image.
        pixels: values per patch, patch * patch * 3.
    """

    positions: Tensor

    def __init__(self, encoder_dim: int, dim: int, depth: int, num_heads: int, grid: int, pixels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sine_positions(grid, grid, dim).flatten(0, 1)[None], persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, norm_layer=_layer_norm)  # type: ignore[arg-type]
            for _ in range(depth)
        )
        self.norm = _layer_norm(dim)
        self.predict = nn.Linear(dim, pixels)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Predict all patches, [B, P, pixels], from visible tokens [B, V, encoder_dim] and their places [B, V]."""
        tokens = self.embed(tokens)
        everywhere = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], self.positions.shape[1], -1)
        tokens = everywhere.scatter(1, visible[..., None].expand_as(tokens), tokens) + self.positions
        for block in self.blocks:
            assert isinstance(block, Block)
            tokens = run_globally(block, tokens)
        return self.predict(self.norm(tokens))


def run_globally(block: Block, tokens: Tensor) -> Tensor:
    """Run a block over a set of tokens [B, V, C] of any places: all attend to all, without relative positions.

    With relative positions of zero and all tokens present it equals the block itself without windows.
    """
    attention = block.attn
    B, V, C = tokens.shape
    qkv = attention.qkv(block.norm1(tokens)).view(B, V, 3, attention.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, V, d]
    mixed = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    tokens = tokens + attention.proj(mixed.transpose(1, 2).reshape(B, V, C))
    return tokens + block.mlp(block.norm2(tokens))


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and root of the unbiased variance + 1e-6, of each patch [B, P, D]: both [B, P, 1]."""
    return patches.mean(2, keepdim=True), (patches.var(2, keepdim=True) + _EPSILON).sqrt()


def save_mae_checkpoint(encoder: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write what masked autoencoding has trained of an encoder; neck and relative positions stay out.

    The file is safetensors, its metadata say `format` = "sam_fast-mae"; it appears whole or not at all.

    Args:
        encoder: state dict of an `ImageEncoderViT`.
        path: the file.
    """
    state = {name: t.detach().float().cpu().contiguous() for name, t in encoder.items() if is_pretrained(name)}
    replace_file(Path(path), lambda part: write_tensors(part, state, {"format": MAE_FORMAT}))


def is_mae_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds an encoder from masked autoencoding: ours, or one in the layout of facebookresearch/mae.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a readable checkpoint.
    """
    path = checkpoint_file(path)
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    if not is_safetensors:
        return _is_plain_vit(read_state_dict(path))
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == MAE_FORMAT or _is_plain_vit(file.keys())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error


def initialise_from_mae(sam: Sam, path: str | os.PathLike[str]) -> None:
    """Start the image encoder of a `Sam` from a checkpoint of masked autoencoding.

    Patch projection, absolute positions and blocks are loaded; relative positions become zero, with which they were
    trained; neck, prompt encoder and mask decoder stay as they are. Positions are interpolated (bicubic) to the image
    size of the model, and the patch projection to its patch size (ViT-H of facebookresearch/mae has patches of 14).

    Args:
        sam: the model to start.
        path: a file of `save_mae_checkpoint`, or in the layout of facebookresearch/mae, with or without its decoder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a checkpoint, or not of this architecture; names the file and the weights.
    """
    encoder = sam.image_encoder
    state = read_state_dict(path)
    if _is_plain_vit(state):
        state = convert_plain_vit(state)
    expected = {name: tensor for name, tensor in encoder.state_dict().items() if is_pretrained(name)}
    state = _resize_to(state, expected)
    wrong = [name for name, tensor in expected.items() if name not in state or state[name].shape != tensor.shape]
    wrong += [name for name in state if name not in expected]
    if wrong:
        more = f" and {len(wrong) - _NAMES_SHOWN} more" if len(wrong) > _NAMES_SHOWN else ""
        names = ", ".join(wrong[:_NAMES_SHOWN]) + more
        raise ValueError(f"{path} does not fit this image encoder; missing, misshapen or unexpected: {names}")
    encoder.load_state_dict(state, strict=False)
    for name, parameter in encoder.named_parameters():
        if ".rel_pos_" in name:
            nn.init.zeros_(parameter)


def convert_plain_vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a state dict of facebookresearch/mae into one with the names of `ImageEncoderViT`.

    The positions [1, 1 + N, C] lose the class token's and become [1, sqrt(N), sqrt(N), C]; class token, last
    normalisation, classifier and decoder are dropped.

    Raises:
        ValueError: the positions are not those of a square grid.
    """
    converted = {}
    for name, tensor in state.items():
        if name.startswith(("patch_embed.", "blocks.")):
            converted[name.replace(".mlp.fc1.", ".mlp.lin1.").replace(".mlp.fc2.", ".mlp.lin2.")] = tensor
    if "pos_embed" in state:
        positions = state["pos_embed"]
        grid = math.isqrt(positions.shape[1] - 1)
        if positions.dim() != 3 or grid * grid != positions.shape[1] - 1:
            raise ValueError(f"pos_embed must be [1, 1 + N, C] with a square number N, got {tuple(positions.shape)}")
        converted["pos_embed"] = positions[:, 1:].reshape(1, grid, grid, -1)
    return converted


def _is_plain_vit(names: Collection[str]) -> bool:
    return "patch_embed.proj.weight" in names and "blocks.0.mlp.fc1.weight" in names


def is_pretrained(name: str) -> bool:
    """Whether masked autoencoding trains this weight of the encoder."""
    return not name.startswith("neck.") and ".rel_pos_" not in name


def _resize_to(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Interpolate positions and patch projection to the expected sizes."""
    state = dict(state)
    name = "pos_embed"
    if name in state and name in expected and state[name].dim() == 4:
        height, width = expected[name].shape[1:3]
        state[name] = resize_absolute_positions(state[name].float(), (height, width))
    name = "patch_embed.proj.weight"
    if name in state and state[name].dim() == 4 and state[name].shape[2:] != expected[name].shape[2:]:
        kernel, size = state[name].float(), expected[name].shape[2:]
        # A larger kernel adds up more pixels: scaled so, the same picture drawn larger gives about the same tokens.
        area = kernel.shape[2] * kernel.shape[3] / (size[0] * size[1])
        state[name] = area * F.interpolate(kernel, size=tuple(size), mode="bicubic", align_corners=False)
    return state
