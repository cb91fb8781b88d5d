"""One model, made ready for inference in one precision; it holds no image and may be shared by threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from sam_fast.embedding import ImageEmbedding, model_fingerprint
from sam_fast.modeling import MaskDecoder, Sam
from sam_fast.ops.postprocess_masks import PostprocessedMasks, postprocess_masks, resize_logits
from sam_fast.runtime.precision import resolve_precision

# Prompts that go through the mask decoder together. One prompt's image stream is 4 MB at 1024 px, several of which are
# in use at a time: on a CPU more prompts leave the cache and are slower each.
_PROMPTS_AT_ONCE = {"cpu": 4}


class Prompts(NamedTuple):
    """N prompts on one image, in the frame of the model's input (the resized image, in pixels).

    Attributes:
        points: [N, K, 2] XY, or None.
        labels: [N, K], 1 foreground, 0 background, -1 padding; None without points.
        boxes: [N, 4] XYXY, or None.
        masks: [N, 1, 4s, 4s] logits of an earlier prediction, or None.
        extra_tokens: [N, K', C] embeddings appended to the prompt's tokens, or None.
    """

    points: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    extra_tokens: torch.Tensor | None = None


class InferenceRuntime:
    """The stages of SAM: encode an image once, decode prompts, post-process masks."""

    def __init__(self, model: Sam, precision: str = "auto", backend: str = "auto") -> None:
        """
        Args:
            model: the Sam to run; its weights are read at every call, so they may change in between.
            precision: auto, fp32, bf16 or fp16 (see `resolve_precision`). A model that was converted (`half()`,
                `bfloat16()`, `double()`) runs in its own format with auto, and cannot run in fp32 if that is narrower.
            backend: which implementation of the operations runs: auto, native or torch.

        Raises:
            ValueError: unknown precision or backend.
            RuntimeError: the device cannot run that precision.
        """
        self.model = model
        self.precision = precision
        self.backend = backend
        resolve_precision(precision, model.device)
        if backend not in ("auto", "native", "torch"):
            raise ValueError(f"backend must be auto, native or torch, got {backend!r}")

    def _autocast(self) -> AbstractContextManager:
        dtype = resolve_precision(self.precision, self.model.device)
        weights = _weight_dtype(self.model.mask_decoder)
        if self.precision == "auto" and weights != torch.float32:
            return nullcontext()
        if dtype != torch.float32:
            return torch.autocast(self.model.device.type, dtype)
        if weights.itemsize < dtype.itemsize:
            raise RuntimeError(f"precision 'fp32' needs float32 weights, got {weights}; use 'auto' or model.float()")
        return nullcontext()

    @torch.no_grad()
    def encode(self, images: torch.Tensor, original_sizes: list[tuple[int, int]]) -> list[ImageEmbedding]:
        """Encode resized images of one size.

        Args:
            images: [B, 3, h, w], values 0..255, longest side S, in the model's channel order.
            original_sizes: (H, W) of each image before the resize.
        """
        fingerprint = model_fingerprint(self.model.image_encoder)
        input_size = (images.shape[-2], images.shape[-1])
        with self._autocast():
            pixels = self.model.preprocess(images).to(_weight_dtype(self.model.image_encoder))
            features = self.model.image_encoder(pixels).float().contiguous()
        return [
            ImageEmbedding(
                features[i : i + 1],
                original_size,
                input_size,
                self.model.image_encoder.img_size,
                self.model.image_format,
                fingerprint,
            )
            for i, original_size in enumerate(original_sizes)
        ]

    def adopt(
        self, features: torch.Tensor, original_size: tuple[int, int], input_size: tuple[int, int]
    ) -> ImageEmbedding:
        """Wrap features [1, C, s, s] that the caller vouches for as an embedding of this model.

        Raises:
            ValueError: the features have another shape.
        """
        expected = (1, self.model.prompt_encoder.embed_dim, *self.model.prompt_encoder.image_embedding_size)
        if tuple(features.shape) != expected:
            raise ValueError(f"features of this model must be {list(expected)}, got {list(features.shape)}")
        return ImageEmbedding(
            features,
            (int(original_size[0]), int(original_size[1])),
            (int(input_size[0]), int(input_size[1])),
            self.model.image_encoder.img_size,
            self.model.image_format,
            model_fingerprint(self.model.image_encoder),
        )

    def check(self, embedding: ImageEmbedding) -> None:
        """Raise ValueError if `embedding` was made by other weights or for another input than this model's."""
        fingerprint = model_fingerprint(self.model.image_encoder)
        if embedding.fingerprint != fingerprint:
            raise ValueError(
                f"the image embedding was made by another model (fingerprint {embedding.fingerprint}, "
                f"this model has {fingerprint}); encode the image again"
            )
        if embedding.image_size != self.model.image_encoder.img_size:
            raise ValueError(
                f"the image embedding was made for inputs of {embedding.image_size} px, "
                f"this model takes {self.model.image_encoder.img_size} px"
            )
        if embedding.image_format != self.model.image_format:
            raise ValueError(
                f"the image embedding was made from {embedding.image_format} channels, "
                f"this model takes {self.model.image_format}"
            )

    @torch.no_grad()
    def decode(
        self, embedding: ImageEmbedding, prompts: Prompts, multimask_output: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return low-resolution logits [N, M, 4s, 4s] and predicted IoUs [N, M], both float32.

        M is 3 with `multimask_output`, otherwise 1.
        """
        with self._autocast():
            parts = [
                self.model.mask_decoder(*inputs, multimask_output=multimask_output)
                for inputs in self._decoder_inputs(embedding, prompts)
            ]
        low_res, iou = (torch.cat(column) for column in zip(*parts, strict=True))
        return low_res.float(), iou.float()

    @torch.no_grad()
    def decode_filtered(
        self, embedding: ImageEmbedding, prompts: Prompts, iou_threshold: float | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode with multimask output, but only masks whose predicted IoU is above the threshold (None: all).

        The IoU head reads tokens alone, so prompts without such a mask are never upscaled.

        Returns:
            logits [K, 4s, 4s], predicted IoUs [K], and the prompt of each mask [K] int64; ordered by prompt, then mask.
        """
        decoder = self.model.mask_decoder
        if not isinstance(decoder, MaskDecoder):  # somebody's own decoder has no stages
            low_res, iou = self.decode(embedding, prompts)
            keep = _above(iou, iou_threshold)
            return low_res[keep], iou[keep], keep.nonzero()[:, 0]
        logits, scores = [], []
        with self._autocast():
            for inputs in self._decoder_inputs(embedding, prompts):
                mask_tokens, image, iou = decoder.predict_tokens(*inputs)
                scores.append(iou[:, 1:].float())
                keep = _above(scores[-1], iou_threshold)
                rows = keep.any(dim=1)
                masks = decoder.masks_from(
                    mask_tokens[rows], decoder.upscale(image[rows]), range(1, decoder.num_mask_tokens)
                )
                logits.append(masks[keep[rows]].float())
        all_scores = torch.cat(scores)
        keep = _above(all_scores, iou_threshold)
        return torch.cat(logits), all_scores[keep], keep.nonzero()[:, 0]

    def _decoder_inputs(self, embedding: ImageEmbedding, prompts: Prompts) -> Iterator[tuple[torch.Tensor, ...]]:
        """The mask decoder's image embedding, image PE, sparse and dense prompts, for a few prompts at a time."""
        embedding.wait()
        model = self.model
        dtype = _weight_dtype(model.mask_decoder)
        points = None if prompts.points is None else (prompts.points, prompts.labels)
        masks = None if prompts.masks is None else prompts.masks.to(dtype)
        extra = {} if prompts.extra_tokens is None else {"extra_tokens": prompts.extra_tokens.to(dtype)}
        sparse, dense = model.prompt_encoder(points=points, boxes=prompts.boxes, masks=masks, **extra)
        features, pe = embedding.features.to(dtype), model.prompt_encoder.get_dense_pe()
        step = _PROMPTS_AT_ONCE.get(features.device.type, max(1, len(sparse)))
        for start in range(0, max(1, len(sparse)), step):
            yield features, pe, sparse[start : start + step], dense if len(dense) == 1 else dense[start : start + step]

    def postprocess(
        self,
        embedding: ImageEmbedding,
        low_res: torch.Tensor,
        *,
        stability_offset: float = 1.0,
        return_bits: bool = True,
    ) -> PostprocessedMasks:
        """Threshold logits [N, 4s, 4s] at the original image's size: packed bits, areas, boxes, stability scores."""
        return postprocess_masks(
            low_res,
            embedding.input_size,
            embedding.original_size,
            embedding.image_size,
            mask_threshold=self.model.mask_threshold,
            stability_offset=stability_offset,
            return_bits=return_bits,
            backend=self.backend,
        )

    def full_size_logits(self, embedding: ImageEmbedding, low_res: torch.Tensor) -> torch.Tensor:
        """Interpolate logits [N, 4s, 4s] to the original image, [N, H, W] float32."""
        return resize_logits(
            low_res, embedding.input_size, embedding.original_size, embedding.image_size, backend=self.backend
        )


def _above(scores: torch.Tensor, threshold: float | None) -> torch.Tensor:
    return torch.ones_like(scores, dtype=torch.bool) if threshold is None else scores > threshold


def _weight_dtype(stage: nn.Module) -> torch.dtype:
    """The number format of a stage's weights; float32 if it has none."""
    return next((p.dtype for p in stage.parameters() if p.is_floating_point()), torch.float32)
