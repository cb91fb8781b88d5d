"""The prompt encoder, mask decoder and mask post-processing as one module that can be exported to ONNX."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_fast.modeling import Sam


class SamOnnxModel(nn.Module):
    """Everything of a `Sam` behind the image encoder, with tensors for inputs and no branches that depend on values.

    Args:
        model: the model.
        return_single_mask: return one mask per prompt, chosen by the number of points, rather than all of them.
        use_stability_score: give the masks' stability scores at low resolution in place of the predicted IoU.
        return_extra_metrics: also return stability scores and areas at full resolution.
    """

    def __init__(
        self,
        model: Sam,
        return_single_mask: bool,
        use_stability_score: bool = False,
        return_extra_metrics: bool = False,
    ) -> None:
        super().__init__()
        self.mask_decoder = model.mask_decoder
        self.model = model
        self.img_size = model.image_encoder.img_size
        self.return_single_mask = return_single_mask
        self.use_stability_score = use_stability_score
        self.stability_score_offset = 1.0
        self.return_extra_metrics = return_extra_metrics

    @torch.no_grad()
    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, ...]:
        """Predict masks for N prompts of K points each.

        Args:
            image_embeddings: [1,C,h,w], from the image encoder.
            point_coords: [N,K,2], XY in pixels of the resized image. A box is its two corners; without a box
                a padding point (0, 0) belongs at the end.
            point_labels: [N,K] float: 0 background, 1 foreground, 2 and 3 first and second corner of a box, -1 padding.
            mask_input: [1,1,4h,4w], logits of an earlier prediction; ignored unless `has_mask_input`.
            has_mask_input: [1], 1 or 0.
            orig_im_size: [2] float, (H, W) of the original image.

        Returns:
            masks [N,M,H,W] (logits), scores [N,M], low-resolution logits [N,M,4h,4w]; or masks, scores,
            stability scores [N,M], areas int64 [N,M], low-resolution logits.
        """
        low_res_masks, scores = self.mask_decoder.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=self._embed_points(point_coords, point_labels),
            dense_prompt_embeddings=self._embed_masks(mask_input, has_mask_input),
        )
        if self.use_stability_score:
            scores = self._stability_score(low_res_masks)
        if self.return_single_mask:
            low_res_masks, scores = self.select_masks(low_res_masks, scores, point_coords.shape[1])
        masks = self.mask_postprocessing(low_res_masks, orig_im_size)
        if self.return_extra_metrics:
            areas = (masks > self.model.mask_threshold).sum(-1).sum(-1)
            return masks, scores, self._stability_score(masks), areas, low_res_masks
        return masks, scores, low_res_masks

    @staticmethod
    def resize_longest_image_size(input_image_size: Tensor, longest_side: int) -> Tensor:
        """The (h, w) [2] int64 of an image of size (H, W) [2] once its longest side has `longest_side` pixels."""
        size = input_image_size.to(torch.float32)
        return torch.floor(longest_side / torch.maximum(size[0], size[1]) * size + 0.5).to(torch.int64).clamp(min=1)

    def mask_postprocessing(self, masks: Tensor, orig_im_size: Tensor) -> Tensor:
        """Upscale logits [N,M,4h,4w] to the padded input, drop the padding, and scale to the original [N,M,H,W]."""
        masks = F.interpolate(masks, (self.img_size, self.img_size), mode="bilinear", align_corners=False)
        height, width = _sizes(self.resize_longest_image_size(orig_im_size, self.img_size), self.img_size)
        masks = masks[..., :height, :width]
        return F.interpolate(masks, _sizes(orig_im_size.to(torch.int64)), mode="bilinear", align_corners=False)

    def select_masks(self, masks: Tensor, iou_preds: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
        """Choose one mask per prompt: the one for unambiguous prompts with 3 points or more, else the best other.

        A NaN score (the stability of an empty mask) counts as 0; the published code prefers it to any number, and
        runtimes do not agree on it.

        Args:
            masks: [N,M,H,W], the one for unambiguous prompts first.
            iou_preds: [N,M].
            num_points: K, padding point and box corners included.

        Returns:
            masks [N,1,H,W] and scores [N,1].
        """
        # a term in place of a branch: it outweighs every score
        reweight = torch.zeros_like(iou_preds[:1])
        reweight[:, 0] = 1000.0
        best = torch.argmax(torch.nan_to_num(iou_preds) + (num_points - 2.5) * reweight, dim=1)
        prompts = torch.arange(masks.shape[0], device=masks.device)
        return masks[prompts, best].unsqueeze(1), iou_preds[prompts, best].unsqueeze(1)

    def _embed_points(self, point_coords: Tensor, point_labels: Tensor) -> Tensor:
        """Tokens [N,K,C] of points [N,K,2] with labels [N,K]."""
        encoder = self.model.prompt_encoder
        encoding = encoder.pe_layer.forward_with_coords(point_coords + 0.5, (self.img_size, self.img_size))
        labels = point_labels.unsqueeze(-1)
        tokens = torch.where(labels == -1, encoder.not_a_point_embed.weight, encoding)
        for label, embedding in enumerate(encoder.point_embeddings):
            tokens = tokens + embedding.weight * (labels == label)  # type: ignore[operator]
        return tokens

    def _embed_masks(self, mask_input: Tensor, has_mask_input: Tensor) -> Tensor:
        """Dense embedding [1,C,h,w] of a mask [1,1,4h,4w], or the embedding of "no mask" where the flag is 0."""
        encoder = self.model.prompt_encoder
        no_mask = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return has_mask_input * encoder.mask_downscaling(mask_input) + (1 - has_mask_input) * no_mask

    def _stability_score(self, masks: Tensor) -> Tensor:
        # as `amg.calculate_stability_score`, whose choice of dtype would tie the exported graph to one width
        threshold, offset = self.model.mask_threshold, self.stability_score_offset
        return (masks > threshold + offset).sum((-2, -1)) / (masks > threshold - offset).sum((-2, -1))


def _sizes(size: Tensor, limit: int | None = None) -> tuple[int, int]:
    """The two integers of a size [2]; on export, symbols that are known to be at least 1 and at most `limit`."""
    height, width = size.tolist()
    for side in (height, width):
        torch._check(side >= 1)
        if limit is not None:
            torch._check(side <= limit)
    return height, width
