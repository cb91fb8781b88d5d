"""The mask decoder as training runs it: many prompts of many images at once, its weights cast once per step.

Autocast would cast every weight again in every pass, keep the residual streams in float32, and add up gradients weight
by weight: of a step of nano on a GPU most launches were that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_fast.modeling import MaskDecoder, PromptEncoder, Sam
from sam_fast.modeling.prompt_encoder import PositionEmbeddingRandom
from sam_fast.runtime.plain import is_untouched_throughout
from sam_fast.runtime.upscaling import masks_by_products
from sam_fast.training.optim import add_gradients


@dataclass(frozen=True)
class Prompts:
    """N = B K prompts, K of each of B images, image by image.

    Attributes:
        coords: float32 [N, T, 2], (x, y) in pixels of the model input.
        labels: int64 [N, T]: 1 foreground, 0 background, 2 and 3 the corners of a box, -1 padding.
        mask_input: logits [N, 1, 4h, 4w] of an earlier pass, or None.
    """

    coords: Tensor
    labels: Tensor
    mask_input: Tensor | None


class TrainedDecoder:
    """Prompt encoder and mask decoder of a Sam, to be back-propagated pass by pass.

    In half precision the weights are cast when a step begins, all of them by a few launches, and activations are in
    half precision throughout, also those that `runtime/packed_decoder.py` keeps in float32; gradients of a pass are in
    half precision, their sum over passes in that of the weights. Coordinates are always encoded in float32.

    Modules of somebody's own are called as they are, under autocast.
    """

    def __init__(self, model: Sam, dtype: torch.dtype | None = None) -> None:
        """
        Args:
            model: the Sam.
            dtype: of weights and activations in the decoder; None is that of the weights.
        """
        self._encoder, self._decoder = model.prompt_encoder, model.mask_decoder
        self._plain = True
        self._pass = _Pass(model)
        self._weights = dict(self._pass.named_parameters())
        self._dtype = dtype
        self._cast: dict[str, Tensor] = {}
        self._places: Tensor | None = None

    def begin(self) -> None:
        """Take the weights as they are now, for all passes of a step."""
        self._cast, self._plain = {}, _is_plain(self._encoder, self._decoder)
        if not self._plain:
            return
        with torch.no_grad():
            self._places = self._encoder.get_dense_pe()
            if self._dtype is None:
                return
            self._places = self._places.to(self._dtype)
            weights: list[Tensor] = list(self._weights.values())
            halves = [torch.empty_like(weight, dtype=self._dtype) for weight in weights]
            torch._foreach_copy_(halves, weights)
        self._cast = {
            name: half.requires_grad_(weight.requires_grad)
            for (name, weight), half in zip(self._weights.items(), halves, strict=True)
        }

    def __call__(self, embedding: Tensor, prompts: Prompts, chosen: range) -> tuple[Tensor, Tensor]:
        """Decode prompts.

        Args:
            embedding: [B, C, h, w].
            prompts: K of each image.
            chosen: indices of the mask tokens to use.

        Returns:
            logits [N, len(chosen), 4h, 4w] and predicted IoU [N, len(chosen)].
        """
        if not self._plain:
            return self._by_modules(embedding, prompts, chosen)
        assert self._places is not None, "begin() comes first"
        encoder, dtype = self._encoder, self._places.dtype
        tokens = embed_points(encoder, prompts.coords, prompts.labels)
        arguments = (
            embedding.to(dtype),
            self._places,
            tokens.to(dtype),
            encoder.no_mask_embed.weight.to(dtype),
            None if prompts.mask_input is None else prompts.mask_input.to(dtype),
            chosen,
        )
        if not self._cast:
            return self._pass(*arguments)
        return torch.func.functional_call(self._pass, self._cast, arguments)

    def _by_modules(self, embedding: Tensor, prompts: Prompts, chosen: range) -> tuple[Tensor, Tensor]:
        """The same by modules of which nothing is known but how they are called."""
        encoder, kind = self._encoder, embedding.device.type
        with torch.autocast(kind, enabled=False):  # bfloat16 would move points by a pixel
            sparse, places = _encode_points(encoder, prompts.coords, prompts.labels), encoder.get_dense_pe()
        with torch.autocast(kind, self._dtype or torch.bfloat16, enabled=self._dtype is not None):
            tokens, image, iou = self._decoder.predict_tokens(
                image_embeddings=_repeated(embedding, len(sparse)),
                image_pe=places,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=encoder(points=None, boxes=None, masks=prompts.mask_input)[1],
            )
            return masks_by_products(self._decoder, tokens, image, chosen), iou[:, chosen.start : chosen.stop]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss of one pass to those of the parameters."""
        loss.backward()
        if not self._cast:
            return
        found = [(self._weights[name], half) for name, half in self._cast.items() if half.grad is not None]
        add_gradients([weight for weight, _ in found], [half.grad for _, half in found if half.grad is not None])
        for _, half in found:
            half.grad = None


class _Pass(nn.Module):
    """One pass, as a module whose weights can be replaced in a call."""

    def __init__(self, model: Sam) -> None:
        super().__init__()
        self.decoder = model.mask_decoder
        self.downscaling = getattr(model.prompt_encoder, "mask_downscaling", nn.Sequential())  # or one's own encoder's

    def forward(
        self,
        embedding: Tensor,
        places: Tensor,
        sparse: Tensor,
        no_mask: Tensor,
        mask_input: Tensor | None,
        chosen: range,
    ) -> tuple[Tensor, Tensor]:
        B, _, h, w = embedding.shape
        pixels = embedding.flatten(2).transpose(1, 2).contiguous()  # rows of channels, as all products read them
        if mask_input is None:
            pixels = _repeated(pixels + no_mask, len(sparse))
        else:
            dense = self._downscale(mask_input).unflatten(0, (B, -1))
            pixels = (pixels[:, None] + dense).flatten(0, 1)
        decoder = self.decoder
        image = pixels.transpose(1, 2).unflatten(2, (h, w))
        tokens, image = decoder.transformer(image, places, decoder.prompt_tokens(sparse))
        mask_tokens, iou = decoder.read_tokens(tokens)
        image = image.transpose(1, 2).unflatten(2, (h, w))
        return masks_by_products(decoder, mask_tokens, image, chosen), iou[:, chosen.start : chosen.stop]

    def _downscale(self, masks: Tensor) -> Tensor:
        """Dense embedding of logits [N, 1, 4h, 4w] as rows of channels [N, hw, C]; the last convolution is 1 x 1."""
        masks = self.downscaling[:-1](masks)
        last = self.downscaling[-1]
        assert isinstance(last, nn.Conv2d)
        return F.linear(masks.flatten(2).transpose(1, 2), last.weight.flatten(1), last.bias)


def embed_points(encoder: PromptEncoder, coords: Tensor, labels: Tensor) -> Tensor:
    """The tokens [N, T, C] that a prompt encoder gives to points, padding and corners of boxes (see `Prompts`).

    Tokens of all kinds in one tensor, so that shapes do not depend on how many prompts are boxes. `utils/onnx.py` adds
    the vectors label by label instead: more launches, but no product, whose weights a quantizer would round.
    """
    kinds = [encoder.not_a_point_embed, *encoder.point_embeddings]
    vectors = torch.cat([kind.get_parameter("weight") for kind in kinds])  # of the labels -1, 0, 1, 2, 3
    encoding = encoder.pe_layer.forward_with_coords(coords + 0.5, encoder.input_image_size)  # centres of the pixels
    hot = labels[..., None] == torch.arange(-1, 4, device=labels.device)
    return torch.where(labels[..., None] == -1, 0.0, encoding) + hot.to(vectors.dtype) @ vectors


def _encode_points(encoder: PromptEncoder, coords: Tensor, labels: Tensor) -> Tensor:
    """`embed_points` by calling the encoder: each prompt as a box, and as a point (see `Prompts`)."""
    clicks = (coords[:, 2:], labels[:, 2:]) if coords.shape[1] > 2 else None
    boxes = encoder(points=clicks, boxes=coords[:, :2].flatten(1), masks=None)[0]
    # Without the padding, which it adds itself.
    given = torch.cat([coords[:, :1], coords[:, 2:]], dim=1), torch.cat([labels[:, :1], labels[:, 2:]], dim=1)
    points = encoder(points=given, boxes=None, masks=None)[0]
    return torch.where((labels[:, :1] == 2)[..., None], boxes, points)


def _repeated(images: Tensor, prompts: int) -> Tensor:
    """Images [B, ...] once for each of their prompts, [N, ...]; a single one as it is, to be shared."""
    if len(images) == 1:
        return images
    return images[:, None].expand(-1, prompts // len(images), *images.shape[1:]).flatten(0, 1)


def _is_plain(encoder: PromptEncoder, decoder: MaskDecoder) -> bool:
    """Whether the modules compute what their weights say, so that others than their methods may, with cast weights."""
    if type(encoder) is not PromptEncoder or type(encoder.mask_downscaling) is not nn.Sequential:
        return False
    last = encoder.mask_downscaling[-1]
    return (
        type(encoder.pe_layer) is PositionEmbeddingRandom
        and is_untouched_throughout(encoder)
        and type(last) is nn.Conv2d
        and last.kernel_size == (1, 1)
        and type(decoder) is MaskDecoder
        # Of quantised layers they are neither, and are not to be cast.
        and all(weight.is_floating_point() for weight in decoder.parameters())
        and not any(True for _ in decoder.buffers())
    )
