"""The mask decoder: from an image embedding and prompt tokens to mask logits and predicted IoU.

Source: Kirillov et al., "Segment Anything", 2023, appendix A, figure 14.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sam_fast.modeling.layers import MLP, LayerNorm2d


class MaskDecoder(nn.Module):
    """Predicts `num_multimask_outputs` + 1 masks per prompt; the first answers unambiguous prompts.

    `predict_tokens`, `upscale` and `masks_from` are its stages; `forward` composes them.

    Args:
        transformer_dim: C, channels of tokens and image embedding.
        transformer: the `TwoWayTransformer`, or another module with its signature.
        num_multimask_outputs: masks for an ambiguous prompt.
        activation: activation of the upscaling.
        iou_head_depth: linear layers of the IoU head.
        iou_head_hidden_dim: hidden width of the IoU head.
    """

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: nn.Module,
        num_multimask_outputs: int = 3,
        activation: type[nn.Module] = nn.GELU,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
    ) -> None:
        super().__init__()
        self.transformer_dim = transformer_dim
        self.transformer = transformer
        self.num_multimask_outputs = num_multimask_outputs
        self.num_mask_tokens = num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, transformer_dim)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, transformer_dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(transformer_dim, transformer_dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(transformer_dim // 4),
            activation(),
            nn.ConvTranspose2d(transformer_dim // 4, transformer_dim // 8, kernel_size=2, stride=2),
            activation(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(transformer_dim, transformer_dim, transformer_dim // 8, 3) for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = MLP(transformer_dim, iou_head_hidden_dim, self.num_mask_tokens, iou_head_depth)

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
        extra_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict masks for N prompts.

        Args:
            image_embeddings: [1, C, h, w] for all prompts, or [N, C, h, w], one for each.
            image_pe: [1, C, h, w], `PromptEncoder.get_dense_pe`.
            sparse_prompt_embeddings: [N, T, C].
            dense_prompt_embeddings: [N, C, h, w], or [1, C, h, w] for all prompts.
            multimask_output: return the masks for ambiguous prompts rather than the single one.
            extra_tokens: [N, L, C], appended to the sparse prompts.

        Returns:
            logits [N, M, 4h, 4w] and predicted IoU [N, M], M being `num_multimask_outputs` or 1.
        """
        if extra_tokens is not None:
            sparse_prompt_embeddings = torch.cat([sparse_prompt_embeddings, extra_tokens], dim=1)
        chosen = range(1, self.num_mask_tokens) if multimask_output else range(1)
        if type(self).predict_masks is not MaskDecoder.predict_masks:  # somebody's own, which the official code calls
            masks, iou = self.predict_masks(
                image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings
            )
            return masks[:, chosen.start : chosen.stop], iou[:, chosen.start : chosen.stop]
        mask_tokens, image, iou = self.predict_tokens(
            image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings
        )
        masks = self.masks_from(mask_tokens, self.upscale(image), chosen)
        return masks, iou[:, chosen.start : chosen.stop]

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Like `forward`, but all masks: logits [N, num_mask_tokens, 4h, 4w], IoU [N, num_mask_tokens]."""
        mask_tokens, image, iou = self.predict_tokens(
            image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings
        )
        return self.masks_from(mask_tokens, self.upscale(image), range(self.num_mask_tokens)), iou

    def predict_tokens(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """First stage: everything at the resolution of the embedding (arguments as in `forward`).

        Returns:
            mask tokens [N, num_mask_tokens, C], the updated image [N, C, h, w], predicted IoU [N, num_mask_tokens].
        """
        tokens = self.prompt_tokens(sparse_prompt_embeddings)
        if dense_prompt_embeddings.stride(0) == 0:
            # One embedding expanded over the prompts: keep the image shared until prompts have written into it.
            dense_prompt_embeddings = dense_prompt_embeddings[:1]
        h, w = image_embeddings.shape[-2:]
        tokens, image = self.transformer(image_embeddings + dense_prompt_embeddings, image_pe, tokens)
        mask_tokens, iou = self.read_tokens(tokens)
        return mask_tokens, image.transpose(1, 2).unflatten(2, (h, w)), iou

    def prompt_tokens(self, sparse_prompt_embeddings: Tensor) -> Tensor:
        """Put the IoU token and the mask tokens before prompts [N, T, C]: [N, 1 + num_mask_tokens + T, C]."""
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        output_tokens = output_tokens.expand(len(sparse_prompt_embeddings), -1, -1)
        return torch.cat([output_tokens, sparse_prompt_embeddings], dim=1)

    def read_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of the transformer's tokens [N, T, C] the mask tokens [N, num_mask_tokens, C], and the predicted IoU."""
        return tokens[:, 1 : 1 + self.num_mask_tokens], self.iou_prediction_head(tokens[:, 0])

    def upscale(self, image: Tensor) -> Tensor:
        """Second stage: [N, C, h, w] -> [N, C/8, 4h, 4w]."""
        return self.output_upscaling(image)

    def masks_from(self, mask_tokens: Tensor, upscaled: Tensor, chosen: range) -> Tensor:
        """Last stage: each chosen token becomes a linear classifier of the upscaled pixels.

        Args:
            mask_tokens: [N, num_mask_tokens, C].
            upscaled: [N, C/8, H, W].
            chosen: indices of the mask tokens to use.

        Returns:
            logits [N, len(chosen), H, W].
        """
        classifiers = [self.output_hypernetworks_mlps[index](mask_tokens[:, index]) for index in chosen]
        logits = torch.stack(classifiers, dim=1) @ upscaled.flatten(2)
        return logits.unflatten(2, upscaled.shape[-2:])
