"""The mask decoder as it runs on a GPU: a copy of its weights in one number format, and an image never projected.

Products have operands of that format; what tokens carry from layer to layer, their LayerNorms and the predicted IoU are
float32. The image side is `ops.two_way_attention` and `ops.upscale_masks`, the token side PyTorch's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_fast.modeling import MaskDecoder, TwoWayTransformer
from sam_fast.modeling.layers import MLP, LayerNorm2d, MLPBlock
from sam_fast.modeling.transformer import Attention, TwoWayAttentionBlock
from sam_fast.ops.two_way_attention import HEADS
from sam_fast.ops.upscale_masks import Upscaling, upscale_masks
from sam_fast.runtime.graphs import Function, Graphs
from sam_fast.runtime.perceptrons import SumLayerNorm
from sam_fast.runtime.plain import is_untouched
from sam_fast.runtime.ranges import fits_float16
from sam_fast.runtime.streams import Number
from sam_fast.runtime.two_way import FirstLayer, StackedSharing, can_absorb, project_first_layer, token_layers, two_way
from sam_fast.runtime.upscaling import can_upscale_by_products, upscaling_weights

_PARTS = {MaskDecoder, TwoWayTransformer, TwoWayAttentionBlock, Attention, MLPBlock, MLP, LayerNorm2d}
_PARTS |= {nn.Linear, nn.LayerNorm, nn.Embedding, nn.ConvTranspose2d, nn.ReLU, nn.GELU, nn.ModuleList, nn.Sequential}
_CHANNELS = (64, 128, 256)  # that kernels take
# Prompts at a time on a GPU: the token side's many small operations take nearly as long for few as for these, and that
# counts for more than the 2 MB per prompt at 1024 px that no longer stay in the cache between one kernel and the next.
MOST_PROMPTS = 256
# Of the room for all masks, that the wanted ones must fill to stay in it: fewer are copied, and it is given back.
_LEAST_SHARE = 0.25
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


class Chunks(NamedTuple):
    """Prompts on one image, a few at a time.

    Attributes:
        counts: how many prompts each chunk has.
        size: (h, w) of the image's tokens.
        each: of each chunk image, encoding and prompts, as for `PackedDecoder.predict_tokens`. To be taken one by one
            and not held: a chunk's images, where it has its own, are made when its turn comes.
    """

    counts: list[int]
    size: torch.Size
    each: Iterator[tuple[Tensor | FirstLayer, Tensor, Tensor]]


class PackedDecoder:
    """Two stages: tokens and pixels, then masks. Weights are copied, and do not follow those of the decoder."""

    def __init__(self, decoder: MaskDecoder, dtype: torch.dtype, backend: str = "auto") -> None:
        """
        Args:
            decoder: one that `can_pack`.
            dtype: of products: float32, bfloat16 or float16. Instead of bfloat16 it is float16 where that is as safe:
                its rounding is an eighth.
            backend: of the operations.
        """
        if dtype == torch.bfloat16 and fits_float16(decoder):
            dtype = torch.float16
        self.dtype = dtype
        self.backend = backend
        # Of each number of tokens in use: of a click, with one mask or three, and of many prompts, which hold on to
        # these prompts' images.
        self._of_a_click, self._of_many = Graphs(most=24), Graphs(most=6)
        self.decoder = copy.deepcopy(decoder).float().requires_grad_(False)
        self.transformer = cast(TwoWayTransformer, self.decoder.transformer)
        for part in self.transformer.modules():
            if type(part) is nn.Linear:
                part.to(dtype).__class__ = _RoundingLinear
            elif type(part) is nn.LayerNorm:
                part.__class__ = SumLayerNorm
                cast(SumLayerNorm, part).backend = backend
        self.layers = token_layers(self.transformer, backend)
        for index, layer in enumerate(cast(list[TwoWayAttentionBlock], list(self.transformer.layers))):
            if StackedSharing.fits(layer):
                self.layers.blocks[index] = self.layers.blocks[index]._replace(share=StackedSharing(layer, backend))
        self._output_tokens = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])
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

    def decode(self, chunks: Chunks, chosen: range) -> tuple[Tensor, Tensor]:
        """Chosen masks of all prompts. Their logits are written once, to where they stay.

        Args:
            chunks: the prompts.
            chosen: M indices of mask tokens.

        Returns:
            logits [N, M, 4h, 4w] and predicted IoU [N, M], float32.
        """
        logits = self._room((sum(chunks.counts), len(chosen)), chunks.size)
        places = logits.split(chunks.counts)
        iou = [self._decode(*next(chunks.each), chosen, place) for place in places]
        return logits, iou[0] if len(iou) == 1 else torch.cat(iou)

    def decode_filtered(self, chunks: Chunks, threshold: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Masks for ambiguous prompts whose predicted IoU is above the threshold (None: all).

        They are written one after the other into room for all. Nobody waits for their number before all is launched.

        Returns:
            logits [K, 4h, 4w], predicted IoU [K] and prompts [K].
        """
        prompts = sum(chunks.counts)
        wanted = _Wanted(prompts, threshold)
        logits = self._room((prompts * (self.decoder.num_mask_tokens - 1),), chunks.size)

        def upscale(classifiers: Tensor, pixels: Tensor, iou: Tensor) -> tuple[()]:
            rows = wanted.rows(iou[:, 1:].clone())
            self._upscale(pixels, chunks.size, classifiers[:, 1:], rows, logits)
            return ()

        for _ in chunks.counts:
            self._read(*next(chunks.each), upscale)
        scores = torch.cat(wanted.scores)
        above = wanted.above(scores)
        assert wanted.count is not None
        count = int(wanted.count)  # here the host waits, but not for the last prompts' masks
        prompt, mask = torch.nonzero_static(above, size=count).unbind(1)
        some = logits[:count]
        return some.clone() if count < _LEAST_SHARE * len(logits) else some, scores[prompt, mask], prompt

    def _decode(self, image: Tensor | FirstLayer, pe: Tensor, sparse: Tensor, chosen: range, logits: Tensor) -> Tensor:
        """Write logits [N, M, 4h, 4w] of a few prompts, and return their predicted IoU [N, M]."""
        size = torch.Size(side // 4 for side in logits.shape[2:])
        which = slice(chosen.start, chosen.stop)
        if len(sparse) == 1 and isinstance(image, FirstLayer):
            # A single launch for all of it: the host cannot run ahead of one prompt, whose logits are soon copied.
            def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
                mask_tokens, pixels, iou = self.predict_tokens(FirstLayer(*tensors[:4]), *tensors[4:])
                return self.masks_from(mask_tokens, pixels, size, chosen), iou[:, which]

            def keep(made: Tensor, iou: Tensor) -> tuple[Tensor]:
                logits.copy_(made)
                return (iou.clone(),)

            return self._of_a_click((size, chosen), run, *image, pe, sparse, finish=keep)[0]

        def upscale(classifiers: Tensor, pixels: Tensor, iou: Tensor) -> tuple[Tensor]:
            self._upscale(pixels, size, classifiers[:, which], None, logits)
            return (iou[:, which].clone(),)

        return self._read(image, pe, sparse, upscale)[0]

    def _read(self, image: Tensor | FirstLayer, pe: Tensor, sparse: Tensor, finish: Function) -> tuple[Tensor, ...]:
        """What `finish` returns of classifiers [N, num_mask_tokens, C2], pixels and IoU, in memory that is not its own.

        These come from a graph for numbers of prompts that are met again. The upscaling is left out of it: its logits
        are large, and go straight to where they are wanted.
        """

        def run(image: Tensor | FirstLayer, pe: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mask_tokens, pixels, iou = self.predict_tokens(image, pe, sparse)
            return self._classifiers(mask_tokens, slice(None)), pixels, iou

        if not isinstance(image, FirstLayer) or not comes_again(len(sparse)):
            return finish(*run(image, pe, sparse))
        return self._of_many(
            "read", lambda *tensors: run(FirstLayer(*tensors[:4]), *tensors[4:]), *image, pe, sparse, finish=finish
        )

    def _room(self, masks: tuple[int, ...], size: torch.Size) -> Tensor:
        """Where logits of masks are to be written."""
        device = self.upscaling.norm_weight.device
        return torch.empty(*masks, 4 * size[0], 4 * size[1], dtype=torch.float32, device=device)

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
        tokens = torch.cat([self._output_tokens.expand(len(sparse), -1, -1), sparse.float()], dim=1)
        results = 1 + self.decoder.num_mask_tokens
        pe = pe.to(self.dtype)
        tokens, pixels = two_way(
            self.transformer, image, pe, tokens, results=results, backend=self.backend, layers=self.layers
        )
        mask_tokens, iou = self.decoder.read_tokens(tokens)
        return mask_tokens, pixels, iou

    def masks_from(self, mask_tokens: Tensor, pixels: Tensor, size: torch.Size, chosen: range) -> Tensor:
        """Logits of masks, float32.

        Args:
            mask_tokens: [N, num_mask_tokens, C].
            pixels: [N, h w, C].
            size: (h, w).
            chosen: M indices of mask tokens.

        Returns:
            [N, M, 4h, 4w].
        """
        classifiers = self._classifiers(mask_tokens, slice(chosen.start, chosen.stop))
        return self._upscale(pixels, size, classifiers)

    def _classifiers(self, mask_tokens: Tensor, which: slice) -> Tensor:
        """Those that mask tokens [N, num_mask_tokens, C] make of pixels, [N, M, C2]."""
        x = mask_tokens[:, which].transpose(0, 1).float()  # [M, N, C]
        for index, (weights, bias) in enumerate(self.perceptrons):
            x = torch.baddbmm(bias[which], F.relu(x) if index else x, weights[which])
        return x.transpose(0, 1)

    def _upscale(
        self,
        pixels: Tensor,
        size: torch.Size,
        classifiers: Tensor,
        rows: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        """See `ops.upscale_masks`."""
        image = pixels.unflatten(1, size)
        return upscale_masks(image, self.upscaling, classifiers, rows, out=logits, backend=self.backend)


class _Wanted:
    """Which masks of all prompts are wanted, a few prompts at a time, and in which rows of their logits they go.

    Attributes:
        scores: predicted IoU [N, M] of those prompts that were seen.
        count: of wanted masks, once all prompts were seen.
    """

    def __init__(self, prompts: int, threshold: float | None) -> None:
        """
        Args:
            prompts: that there are in all.
            threshold: what is wanted has a predicted IoU above it; None for all masks.
        """
        self.scores: list[Tensor] = []
        self.count: Number | None = None
        self._left = prompts
        self._threshold = threshold
        self._end: Tensor | None = None  # of the rows that are taken

    def rows(self, scores: Tensor) -> Tensor:
        """Rows of the next prompts' masks, int32 [N, M], -1 where a mask is not wanted."""
        self.scores.append(scores)
        wanted = self.above(scores)
        taken = wanted.flatten().cumsum(0)
        if self._end is not None:
            taken = taken + self._end
        self._left -= len(scores)
        if len(scores) > 0:
            self._end = taken[-1]
        if self._left == 0:  # before these are upscaled, that the host need not wait for that
            self.count = Number(wanted.sum() if self._end is None else self._end)
        return torch.where(wanted, taken.view_as(wanted) - 1, -1).int()

    def above(self, scores: Tensor) -> Tensor:
        """Which masks are wanted."""
        return torch.ones_like(scores, dtype=torch.bool) if self._threshold is None else scores > self._threshold


class _RoundingLinear(nn.Linear):
    """A linear layer in the format of its weight, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)
