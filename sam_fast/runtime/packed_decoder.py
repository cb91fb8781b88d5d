"""The mask decoder as it runs on a GPU: a copy of its weights in one number format, and an image never projected.

Products have operands of that format; what tokens carry from layer to layer, their LayerNorms and the predicted IoU are
float32. The image side is `ops.two_way_attention` and `ops.upscale_masks`, the token side PyTorch's.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_fast.modeling import MaskDecoder, TwoWayTransformer
from sam_fast.modeling.layers import MLP, LayerNorm2d, MLPBlock
from sam_fast.modeling.transformer import Attention, TwoWayAttentionBlock
from sam_fast.ops.two_way_attention import HEADS
from sam_fast.ops.upscale_masks import Upscaling, upscale_masks
from sam_fast.runtime.graphs import Function, Graphs
from sam_fast.runtime.plain import is_untouched
from sam_fast.runtime.two_way import FirstLayer, can_absorb, project_first_layer, token_layers, two_way
from sam_fast.runtime.upscaling import can_upscale_by_products, upscaling_weights

_PARTS = {MaskDecoder, TwoWayTransformer, TwoWayAttentionBlock, Attention, MLPBlock, MLP, LayerNorm2d}
_PARTS |= {nn.Linear, nn.LayerNorm, nn.Embedding, nn.ConvTranspose2d, nn.ReLU, nn.GELU, nn.ModuleList, nn.Sequential}
_CHANNELS = (64, 128, 256)  # that kernels take
# Prompts at a time on a GPU: the token side's many small operations take nearly as long for few as for these, and that
# counts for more than the 2 MB per prompt at 1024 px that no longer stay in the cache between one kernel and the next.
MOST_PROMPTS = 256
_GRAPHED = 64  # of whose multiples graphs are made, as callers come back with the same numbers of prompts


def comes_again(prompts: int) -> bool:
    """Whether so many prompts are likely to be given more than once: one, or a batch of a round number."""
    return prompts == 1 or (prompts > 0 and prompts % _GRAPHED == 0)


def can_pack(decoder: nn.Module) -> bool:
    """Whether a decoder is the plain one, of a size that kernels take: no subclass in it, no hooks."""
    if type(decoder) is not MaskDecoder or not can_absorb(decoder.transformer):
        return False
    transformer = cast(TwoWayTransformer, decoder.transformer)
    classifiers = cast(list[MLP], list(decoder.output_hypernetworks_mlps))
    return (
        all(type(part) in _PARTS and is_untouched(part) for part in decoder.modules())
        and can_upscale_by_products(decoder.output_upscaling)
        and transformer.num_heads == HEADS
        and transformer.embedding_dim in _CHANNELS
        and not any(mlp.sigmoid_output for mlp in classifiers)
        and len({len(mlp.layers) for mlp in classifiers}) == 1
    )


class PackedDecoder:
    """Two stages: tokens and pixels, then masks. Weights are copied, and do not follow those of the decoder."""

    def __init__(self, decoder: MaskDecoder, dtype: torch.dtype, backend: str = "auto") -> None:
        """
        Args:
            decoder: one that `can_pack`.
            dtype: of products: float32, bfloat16 or float16.
            backend: of the operations.
        """
        self.dtype = dtype
        self.backend = backend
        self._graphs = Graphs(most=24)  # of each number of tokens in use, with one mask or three
        self.decoder = copy.deepcopy(decoder).float().requires_grad_(False)
        self.transformer = cast(TwoWayTransformer, self.decoder.transformer)
        for part in self.transformer.modules():
            if type(part) is nn.Linear:
                part.to(dtype).__class__ = _RoundingLinear
            elif type(part) is nn.LayerNorm:
                part.__class__ = _Float32LayerNorm
        self.layers = token_layers(self.transformer, backend)
        upscaling = upscaling_weights(self.decoder.output_upscaling)
        in_dtype = [x.to(dtype).contiguous() if isinstance(x, Tensor) else x for x in upscaling]
        self.upscaling = Upscaling(*in_dtype)._replace(  # type: ignore[arg-type]
            norm_weight=upscaling.norm_weight, norm_bias=upscaling.norm_bias
        )
        # The perceptrons that make classifiers of mask tokens, all at once: [M, C_in, C_out] and [M, 1, C_out]. In
        # float32, of which there is little: a rounded classifier is wrong for all pixels alike.
        mlps = cast(list[MLP], list(self.decoder.output_hypernetworks_mlps))
        self.perceptrons = []
        for layers in zip(*(cast(list[nn.Linear], list(mlp.layers)) for mlp in mlps), strict=True):
            weights = torch.stack([layer.weight.T for layer in layers])
            self.perceptrons.append((weights, torch.stack([layer.bias[None] for layer in layers])))

    def decode(
        self, first: FirstLayer, pe: Tensor, sparse: Tensor, size: torch.Size, chosen: range
    ) -> tuple[Tensor, Tensor]:
        """All chosen masks of prompts on an image that they share, and their predicted IoU.

        Args:
            first, pe, sparse: as for `predict_tokens`.
            size, chosen: as for `masks_from`.

        Returns:
            logits [N, M, 4h, 4w] and IoU [N, M], float32.
        """

        def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            mask_tokens, pixels, iou = self.predict_tokens(FirstLayer(*tensors[:4]), *tensors[4:])
            return self.masks_from(mask_tokens, pixels, size, chosen), iou[:, chosen.start : chosen.stop]

        logits, iou = self._replayed((size, chosen), run, *first, pe, sparse)
        return logits, iou

    def decode_filtered(
        self, first: FirstLayer, pe: Tensor, sparse: Tensor, size: torch.Size, threshold: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks for ambiguous prompts whose predicted IoU is above the threshold (None: all); nobody waits for it.

        Args: as for `decode`.

        Returns:
            logits [N M, 4h, 4w], first those that are wanted, by prompt and mask, and then what is undefined;
            predicted IoU of all [N, M]; and the number of those that are wanted.
        """
        chosen = range(1, self.decoder.num_mask_tokens)

        def run(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mask_tokens, pixels, iou = self.predict_tokens(FirstLayer(*tensors[:4]), *tensors[4:])
            scores = iou[:, 1:]
            wanted = torch.ones_like(scores, dtype=torch.bool) if threshold is None else scores > threshold
            rows = torch.where(wanted, wanted.flatten().cumsum(0).view_as(wanted) - 1, -1).int()
            return self.masks_from(mask_tokens, pixels, size, chosen, rows), scores, wanted.sum()

        logits, scores, count = self._replayed((size, threshold), run, *first, pe, sparse)
        return logits, scores, count

    def _replayed(self, key: Hashable, run: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What `run` returns, by a graph for numbers of prompts that are met again."""
        return self._graphs(key, run, *tensors) if comes_again(len(tensors[-1])) else run(*tensors)

    def project_first_layer(self, image: Tensor, pe: Tensor) -> FirstLayer:
        """What the first layer makes of an image X [1, P, C] that all prompts share; pe is [1, P, C]."""
        first = project_first_layer(self.transformer, image.float(), pe.float())
        return first._replace(image=first.image.to(self.dtype))

    def predict_tokens(self, image: Tensor | FirstLayer, pe: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`MaskDecoder.predict_tokens`, with pixels as rows.

        Args:
            image: X [N, P, C], or what `project_first_layer` made.
            pe: [1, P, C].
            sparse: prompts [N, T, C], so few that nothing is gained by projecting the image.

        Returns:
            mask tokens [N, num_mask_tokens, C], pixels [N, P, C], and predicted IoU [N, num_mask_tokens], float32.
        """
        if isinstance(image, Tensor):
            image = image.to(self.dtype)
        tokens = self.decoder.prompt_tokens(sparse.float())
        results = 1 + self.decoder.num_mask_tokens
        pe = pe.to(self.dtype)
        tokens, pixels = two_way(
            self.transformer, image, pe, tokens, results=results, backend=self.backend, layers=self.layers
        )
        mask_tokens, iou = self.decoder.read_tokens(tokens)
        return mask_tokens, pixels, iou

    def masks_from(
        self, mask_tokens: Tensor, pixels: Tensor, size: torch.Size, chosen: range, rows: Tensor | None = None
    ) -> Tensor:
        """Logits of masks, float32.

        Args:
            mask_tokens: [N, num_mask_tokens, C].
            pixels: [N, h w, C].
            size: (h, w).
            chosen: M indices of mask tokens.
            rows: int32 [N, M], see `upscale_masks`; None for all.

        Returns:
            [N, M, 4h, 4w], or with rows [N M, 4h, 4w].
        """
        which = slice(chosen.start, chosen.stop)
        x = mask_tokens[:, which].transpose(0, 1).float()  # [M, N, C]
        for index, (weights, bias) in enumerate(self.perceptrons):
            x = torch.baddbmm(bias[which], F.relu(x) if index else x, weights[which])
        image = pixels.unflatten(1, size)
        return upscale_masks(image, self.upscaling, x.transpose(0, 1), rows, backend=self.backend)


class _RoundingLinear(nn.Linear):
    """A linear layer in the format of its weight, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class _Float32LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())
