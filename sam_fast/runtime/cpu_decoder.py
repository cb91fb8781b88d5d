"""The mask decoder as it runs on a CPU: its own weights, looked up once."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sam_fast.modeling import MaskDecoder, TwoWayTransformer
from sam_fast.modeling.transformer import TwoWayAttentionBlock
from sam_fast.ops.two_way_attention import HEADS
from sam_fast.ops.upscale_masks import upscale_masks
from sam_fast.runtime.perceptrons import perceptron_of
from sam_fast.runtime.precision import weight_dtype
from sam_fast.runtime.two_way import FirstLayer, can_absorb, project_first_layer, token_layers, two_way
from sam_fast.runtime.upscaling import can_upscale_by_products, upscaling_weights


def can_narrow_pixels(decoder: MaskDecoder) -> bool:
    """Whether native operations take pixels in bfloat16 beside the other numbers of a plain decoder."""
    transformer = decoder.transformer
    if not can_absorb(transformer) or weight_dtype(decoder) != torch.float32 or decoder.transformer_dim % 16:
        return False
    assert isinstance(transformer, TwoWayTransformer)
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        assert isinstance(layer, TwoWayAttentionBlock)
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    return all(attention.num_heads == HEADS for attention in attentions)


class CpuDecoder:
    """Two stages, like those of `PackedDecoder`: tokens and pixels, then masks. Good until a weight changes."""

    def __init__(self, decoder: MaskDecoder, backend: str = "auto", dtype: torch.dtype | None = None) -> None:
        """
        Args:
            decoder: the plain one, with nobody listening.
            backend: of the operations.
            dtype: of pixels, and of what is multiplied with them; None for the decoder's own. Tokens and logits are
                in the decoder's own.
        """
        self._decoder, self._backend, self.dtype = decoder, backend, dtype
        self._transformer = cast(TwoWayTransformer, decoder.transformer)
        self.absorbs = can_absorb(self._transformer)
        self._layers = token_layers(self._transformer, backend) if self.absorbs else None
        self._iou_head = perceptron_of(decoder.iou_prediction_head, backend=backend)
        self._classifiers = [perceptron_of(mlp, backend=backend) for mlp in decoder.output_hypernetworks_mlps]
        upscaling = cast(nn.Sequential, decoder.output_upscaling)
        self._upscaling = upscaling_weights(upscaling) if can_upscale_by_products(upscaling) else None
        if self._upscaling is not None and dtype is not None:
            first, second = self._upscaling.first_weight.to(dtype), self._upscaling.second_weight.to(dtype)
            self._upscaling = self._upscaling._replace(first_weight=first, second_weight=second)

    def project_first_layer(self, image: Tensor, pe: Tensor) -> FirstLayer:
        """What the first layer makes of an image X [1, P, C] that all prompts share; pe is [1, P, C]."""
        first = project_first_layer(self._transformer, image, pe)
        return first._replace(image=self._pixels(first.image))

    def predict_tokens(self, image: Tensor | FirstLayer, pe: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`MaskDecoder.predict_tokens`, with pixels as rows; arguments as of `PackedDecoder.predict_tokens`."""
        decoder = self._decoder
        if isinstance(image, Tensor):
            image = self._pixels(image)
        tokens, results = decoder.prompt_tokens(sparse), 1 + decoder.num_mask_tokens
        tokens, pixels = two_way(
            self._transformer, image, pe, tokens, results=results, backend=self._backend, layers=self._layers
        )
        return tokens[:, 1:results], pixels, self._iou_head(tokens[:, 0])

    def masks_from(self, mask_tokens: Tensor, pixels: Tensor, size: torch.Size, chosen: range) -> Tensor:
        """Logits of masks [N, M, 4h, 4w]; arguments as of `PackedDecoder.masks_from`."""
        if self._upscaling is None:
            image = pixels.to(mask_tokens.dtype).transpose(1, 2).unflatten(2, size)
            return self._decoder.masks_from(mask_tokens, self._decoder.upscale(image), chosen)
        classifiers = torch.stack([self._classifiers[index](mask_tokens[:, index]) for index in chosen], dim=1)
        return upscale_masks(
            self._pixels(pixels).unflatten(1, size), self._upscaling, classifiers, backend=self._backend
        )

    def _pixels(self, image: Tensor) -> Tensor:
        return image if self.dtype is None else image.to(self.dtype)
