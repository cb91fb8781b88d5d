"""The whole model: image encoder, prompt encoder and mask decoder, from pixels to masks.

Source: Kirillov et al., "Segment Anything", 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_fast.modeling.image_encoder import ImageEncoderViT
from sam_fast.modeling.mask_decoder import MaskDecoder
from sam_fast.modeling.prompt_encoder import PromptEncoder


class Sam(nn.Module):
    """Predicts masks of objects from images and prompts.

    Args:
        image_encoder: image -> embedding.
        prompt_encoder: prompts -> tokens and dense embedding.
        mask_decoder: both -> logits and predicted IoU.
        pixel_mean: mean of each channel of an image, values in 0..255.
        pixel_std: standard deviation of each channel.
    """

    mask_threshold: float = 0.0
    image_format: str = "RGB"
    pixel_mean: Tensor
    pixel_std: Tensor
    # What `forward` asks first: (model, batched_input, multimask_output) -> its results, or None where the modules
    # themselves must run. `build_sam` sets it.
    runner: Callable[[Sam, list[dict[str, Any]], bool], list[dict[str, Tensor]] | None] | None = None

    def __init__(
        self,
        image_encoder: ImageEncoderViT,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            statistics = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, statistics, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @torch.no_grad()
    def forward(self, batched_input: list[dict[str, Any]], multimask_output: bool) -> list[dict[str, Tensor]]:
        """Predict masks of several images, without gradients.

        Args:
            batched_input: one dictionary per image, with coordinates in pixels of the resized image:
                `image` [3, H, W], resized so that its longest side is that of the model, not normalised;
                `original_size` (H, W) before resizing; and optionally
                `point_coords` [N, K, 2] with `point_labels` [N, K], `boxes` [N, 4] XYXY,
                `mask_inputs` logits [N, 1, 4h, 4w], `extra_tokens` [N, L, C].
            multimask_output: three masks per prompt rather than one.

        Returns:
            one dictionary per image: `masks` bool [N, M, H, W] at the original size, `iou_predictions` [N, M],
            `low_res_logits` [N, M, 4h, 4w].
        """
        if self.runner is not None and not torch.compiler.is_compiling():
            results = self.runner(self, batched_input, multimask_output)
            if results is not None:
                return results
        images = torch.stack([self.preprocess(record["image"]) for record in batched_input])
        embeddings = self.image_encoder(images)
        image_pe = self.prompt_encoder.get_dense_pe()
        return [
            self._predict(record, embedding.unsqueeze(0), image_pe, multimask_output)
            for record, embedding in zip(batched_input, embeddings, strict=True)
        ]

    def _predict(
        self, record: dict[str, Any], embedding: Tensor, image_pe: Tensor, multimask_output: bool
    ) -> dict[str, Tensor]:
        """Masks of one image from its embedding [1, C, h, w]."""
        has_points = "point_coords" in record
        sparse, dense = self.prompt_encoder(
            points=(record["point_coords"], record["point_labels"]) if has_points else None,
            boxes=record.get("boxes"),
            masks=record.get("mask_inputs"),
            extra_tokens=record.get("extra_tokens"),
        )
        logits, iou = self.mask_decoder(
            image_embeddings=embedding,
            image_pe=image_pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
        )
        full_size = self.postprocess_masks(logits, record["image"].shape[-2:], record["original_size"])
        return {"masks": full_size > self.mask_threshold, "iou_predictions": iou, "low_res_logits": logits}

    def postprocess_masks(self, masks: Tensor, input_size: tuple[int, ...], original_size: tuple[int, ...]) -> Tensor:
        """Upscale logits to the original image and drop what belongs to its padding.

        Args:
            masks: [N, M, h, w], logits of the padded model input.
            input_size: (H, W) of the resized image without padding.
            original_size: (H, W) of the image before resizing.

        Returns:
            logits [N, M, H, W] at the original size.
        """
        side = self.image_encoder.img_size
        masks = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)
        masks = masks[..., : input_size[0], : input_size[1]]
        return F.interpolate(masks, tuple(original_size), mode="bilinear", align_corners=False)

    def preprocess(self, x: Tensor) -> Tensor:
        """Normalise pixels [..., 3, H, W] (0..255), then pad with zeros, bottom and right, to the model's square."""
        x = (x - self.pixel_mean) / self.pixel_std
        side = self.image_encoder.img_size
        return F.pad(x, (0, side - x.shape[-1], 0, side - x.shape[-2]))
