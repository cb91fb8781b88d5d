"""The image encoder: a Vision Transformer with window attention, a few global blocks, and a convolutional neck.

Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet), 2022, section 3;
Kirillov et al., "Segment Anything", 2023, appendix A.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_fast.modeling.layers import DropPath, LayerNorm2d, MLPBlock
from sam_fast.modeling.positions import (
    add_decomposed_rel_pos,  # noqa: F401  the official module has it
    attend_on_grid,
    get_rel_pos,
    resize_absolute_positions,
)

_FINE = 9  # layers of a `ConvStem` up to its second stage: three convolutions, each with norm and activation


class ImageEncoderViT(nn.Module):
    """Turns a normalised image [B, 3, S, S] into its embedding [B, out_chans, S/patch, S/patch].

    Other image sizes than `img_size` work too, square or not, as long as the patch size divides them: absolute
    positions are then interpolated (bicubic), and so are the relative positions of global blocks (linear).

    Args:
        img_size: S, side of the images that the positions are stored for, in pixels.
        patch_size: side of a patch, in pixels; one patch is one token.
        in_chans: channels of the image.
        embed_dim: channels of a token.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of a block's perceptron over `embed_dim`.
        out_chans: channels of the embedding.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        norm_layer: normalisation of tokens, called with the number of channels.
        act_layer: activation of the perceptrons.
        use_abs_pos: whether tokens get absolute positions.
        use_rel_pos: whether attention gets relative positions.
        rel_pos_zero_init: accepted for compatibility; relative positions always begin at zero.
        window_size: side of an attention window, in tokens; 0 makes every block global.
        global_attn_indexes: blocks that attend to the whole image.
        stem_channels: channels of the convolutions before the patches are projected, see `ConvStem`; none in the
            official models.
    """

    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        out_chans: int = 256,
        qkv_bias: bool = True,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        use_abs_pos: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        global_attn_indexes: tuple[int, ...] = (),
        stem_channels: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.in_chans = in_chans
        grid = img_size // patch_size
        self.patch_embed: PatchEmbed | ConvStem
        if stem_channels:
            self.patch_embed = ConvStem(patch_size, in_chans, stem_channels, embed_dim)
        else:
            sides = (patch_size, patch_size)
            self.patch_embed = PatchEmbed(sides, sides, (0, 0), in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, embed_dim)) if use_abs_pos else None
        windows = [0 if index in global_attn_indexes else window_size for index in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                norm_layer,
                act_layer,
                use_rel_pos,
                rel_pos_zero_init,
                window,
                (grid, grid),
            )
            for window in windows
        )
        if stem_channels:
            self.neck: nn.Module = FoldingNeck(stem_channels, patch_size, embed_dim, out_chans)
        else:
            self.neck = nn.Sequential(
                nn.Conv2d(embed_dim, out_chans, kernel_size=1, bias=False),
                LayerNorm2d(out_chans),
                nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
                LayerNorm2d(out_chans),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Encode images.

        Args:
            x: [B, in_chans, H, W], normalised and padded (`Sam.preprocess`).

        Returns:
            [B, out_chans, H/patch, W/patch].

        Raises:
            ValueError: not four dimensions, or the patch size does not divide H and W.
        """
        tokens, fine = self.to_tokens(x)
        for block in self.blocks:
            tokens = block(tokens)
        return self.to_embedding(tokens, fine)

    def to_tokens(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Before the blocks: tokens with their positions [B, H/patch, W/patch, C], and the stem's pixels, if any."""
        if x.dim() != 4 or x.shape[2] % self.patch_size or x.shape[3] % self.patch_size:
            raise ValueError(
                f"images must be [B, C, H, W] with H and W multiples of {self.patch_size}, got {tuple(x.shape)}"
            )
        if isinstance(self.patch_embed, ConvStem):
            tokens, fine = self.patch_embed.with_details(x)
        else:
            tokens, fine = self.patch_embed(x), None
        if self.pos_embed is not None:
            tokens = tokens + resize_absolute_positions(self.pos_embed, (tokens.shape[1], tokens.shape[2]))
        return tokens, fine

    def to_embedding(self, tokens: Tensor, fine: Tensor | None) -> Tensor:
        """After the blocks: tokens [B, h, w, C] and the stem's pixels to the embedding [B, out_chans, h, w]."""
        tokens = tokens.permute(0, 3, 1, 2)
        return self.neck(tokens) if fine is None else self.neck(tokens, fine)


class PatchEmbed(nn.Module):
    """Projects the patches of an image to tokens, [B, 3, H, W] -> [B, H/patch, W/patch, C]."""

    def __init__(
        self,
        kernel_size: tuple[int, int] = (16, 16),
        stride: tuple[int, int] = (16, 16),
        padding: tuple[int, int] = (0, 0),
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=kernel_size, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class ConvStem(nn.Module):
    """Turns an image into tokens by convolutions, [B, 3, H, W] -> [B, H/patch, W/patch, C].

    Each stage halves the sides by a 3x3 convolution; the patches that are left are projected to tokens. Where training
    is short, edges and textures are learnt far sooner so than by one projection of whole patches.
    Source: Xiao et al., "Early Convolutions Help Transformers See Better", 2021.

    Args:
        patch_size: side of a token in pixels.
        in_chans: channels of the image.
        stem_channels: channels of each stage; the stages after the first add a convolution that keeps the sides.
        embed_dim: C, channels of a token.

    Raises:
        ValueError: 2^stages does not divide `patch_size`.
    """

    def __init__(self, patch_size: int, in_chans: int, stem_channels: tuple[int, ...], embed_dim: int) -> None:
        super().__init__()
        side, rest = divmod(patch_size, 2 ** len(stem_channels))
        if side == 0 or rest:
            raise ValueError(f"{len(stem_channels)} halvings do not fit into patches of {patch_size} pixels")
        layers: list[nn.Module] = []
        before = in_chans
        for stage, channels in enumerate(stem_channels):
            for stride in (2, 1) if stage else (2,):
                layers += [
                    nn.Conv2d(before, channels, kernel_size=3, stride=stride, padding=1),
                    LayerNorm2d(channels),
                    nn.GELU(),
                ]
                before = channels
        self.layers = nn.Sequential(*layers)
        self.proj = nn.Conv2d(before, embed_dim, kernel_size=side, stride=side)

    def forward(self, x: Tensor) -> Tensor:
        return self.with_details(x)[0]

    def with_details(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens [B, H/patch, W/patch, C], and the pixels after the second stage [B, channels, H/4, W/4]."""
        # Channels last is what the normalisation between the convolutions wants.
        fine = self.layers[:_FINE](x.contiguous(memory_format=torch.channels_last))
        return self.proj(self.layers[_FINE:](fine)).permute(0, 2, 3, 1), fine


class FoldingNeck(nn.Module):
    """Makes the embedding of what can be told at a quarter of the image's resolution.

    What the stem saw there and what the blocks say of the tokens around (bilinear) are added up as in a feature
    pyramid (Lin et al., "Feature Pyramid Networks", 2017) and convolved. Each pixel then becomes a few channels of the
    token that it lies in (space to depth), for the upscaling of the mask decoder to unfold.

    Args:
        stem_channels: see `ConvStem`.
        patch_size: side of a token in pixels.
        embed_dim: channels of a token.
        out_chans: C, channels of the embedding.

    Raises:
        ValueError: patches are not of 16 pixels, there are fewer than two stages, or 16 does not divide `out_chans`.
    """

    def __init__(self, stem_channels: tuple[int, ...], patch_size: int, embed_dim: int, out_chans: int) -> None:
        super().__init__()
        side = 4  # the upscaling of the mask decoder makes 4 x 4 pixels of a token
        if patch_size != 4 * side or len(stem_channels) < 2 or out_chans % side**2:
            raise ValueError(
                f"folding needs patches of 16 pixels, a second stage, and channels in sixteenths; got {patch_size}, "
                f"{stem_channels} and {out_chans}"
            )
        channels = stem_channels[1]
        self.context = nn.Conv2d(embed_dim, channels, kernel_size=1)
        self.mix = nn.Sequential(
            LayerNorm2d(channels),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            LayerNorm2d(channels),
            nn.GELU(),
        )
        self.proj = nn.Conv2d(channels, out_chans // side**2, kernel_size=1)
        self.fold = nn.PixelUnshuffle(side)
        self.norm = LayerNorm2d(out_chans)

    def forward(self, tokens: Tensor, fine: Tensor) -> Tensor:
        """Tokens [B, embed_dim, h, w] and the stem's pixels [B, channels, 4h, 4w] -> embedding [B, C, h, w]."""
        context = F.interpolate(self.context(tokens), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.norm(self.fold(self.proj(self.mix(fine + context))))


class Block(nn.Module):
    """A pre-norm transformer block over tokens [B, H, W, C], in windows or global (`window_size` 0)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        attended = (window_size, window_size) if window_size > 0 else input_size
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, use_rel_pos, rel_pos_zero_init, attended)
        self.norm2 = norm_layer(dim)
        self.mlp = MLPBlock(dim, int(dim * mlp_ratio), act_layer)
        self.drop_path = DropPath()  # training sets its rate
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        if self.window_size == 0:
            return self.attn(x)
        # The padding of the last windows is zero after the normalisation, and takes part in the attention unmasked.
        windows, padded = window_partition(x, self.window_size)
        return window_unpartition(self.attn(windows), self.window_size, padded, (x.shape[1], x.shape[2]))


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, H, W, C] with decomposed relative positions.

    softmax(q k^T / sqrt(d) + bias) v, where bias = q.Rh[h_q - h_k] + q.Rw[w_q - w_k] with the unscaled q.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got {num_heads} and {dim}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            if input_size is None:
                raise ValueError("relative positions need input_size, the attended grid in tokens")
            height, width = input_size
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x).view(B, H * W, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, H*W, d]
        if self.use_rel_pos:
            x = attend_on_grid(q, k, v, *self._relative_terms(q, H, W), self.scale)
        else:
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))

    def _relative_terms(self, q: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
        """What relative positions add to the scores, by row and by column of the key: [B, heads, H, W, H], [..., W]."""
        B, heads, _, d = q.shape
        q = q.reshape(B, heads, H, W, d)
        bias_h = torch.einsum("bnhwd,hkd->bnhwk", q, get_rel_pos(H, H, self.rel_pos_h))
        bias_w = torch.einsum("bnhwd,wkd->bnhwk", q, get_rel_pos(W, W, self.rel_pos_w))
        return bias_h, bias_w


def window_partition(x: Tensor, window_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Cut tokens [B, H, W, C] into windows, with zeros at the bottom and right where they do not fit.

    Returns:
        windows [B * number of windows, window_size, window_size, C], and the padded (H, W).
    """
    B, H, W, C = x.shape
    rows, columns = -(-H // window_size), -(-W // window_size)
    x = F.pad(x, (0, 0, 0, columns * window_size - W, 0, rows * window_size - H))
    x = x.view(B, rows, window_size, columns, window_size, C).transpose(2, 3)
    return x.reshape(-1, window_size, window_size, C), (rows * window_size, columns * window_size)


def window_unpartition(windows: Tensor, window_size: int, pad_hw: tuple[int, int], hw: tuple[int, int]) -> Tensor:
    """Put windows back together and drop the padding: the inverse of `window_partition`, [B, H, W, C]."""
    rows, columns = pad_hw[0] // window_size, pad_hw[1] // window_size
    x = windows.view(-1, rows, columns, window_size, window_size, windows.shape[-1]).transpose(2, 3)
    x = x.reshape(-1, *pad_hw, windows.shape[-1])
    return x[:, : hw[0], : hw[1]]
