"""The prompt encoder: points, boxes and masks become tokens and a dense embedding.

Source: Kirillov et al., "Segment Anything", 2023, appendix A; the positional encoding is Tancik et al., "Fourier
Features Let Networks Learn High Frequency Functions in Low Dimensional Domains", 2020.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sam_fast.modeling.layers import LayerNorm2d


class PromptEncoder(nn.Module):
    """Embeds prompts for the mask decoder.

    Args:
        embed_dim: C, channels of a token.
        image_embedding_size: (h, w) of the image embedding, in tokens.
        input_image_size: (H, W) of the padded model input, in pixels.
        mask_in_chans: hidden channels of the mask branch.
        activation: activation of the mask branch.
    """

    def __init__(
        self,
        embed_dim: int,
        image_embedding_size: tuple[int, int],
        input_image_size: tuple[int, int],
        mask_in_chans: int,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.image_embedding_size = image_embedding_size
        self.input_image_size = input_image_size
        self.mask_input_size = (4 * image_embedding_size[0], 4 * image_embedding_size[1])
        self.pe_layer = PositionEmbeddingRandom(embed_dim // 2)
        self.num_point_embeddings = 4  # negative point, positive point, first box corner, second box corner
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(self.num_point_embeddings))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_chans // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans // 4),
            activation(),
            nn.Conv2d(mask_in_chans // 4, mask_in_chans, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans),
            activation(),
            nn.Conv2d(mask_in_chans, embed_dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    def get_dense_pe(self) -> Tensor:
        """Positional encoding of every token of the image embedding, [1, C, h, w]."""
        return self.pe_layer(self.image_embedding_size).unsqueeze(0)

    def forward(
        self,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        extra_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed N prompts; all coordinates are in pixels of the model input.

        Args:
            points: coordinates [N, K, 2] as (x, y), and labels [N, K]: 1 foreground, 0 background, -1 padding.
            boxes: [N, 4], XYXY.
            masks: logits [N, 1, 4h, 4w], or [1, 1, 4h, 4w] for all prompts.
            extra_tokens: [N, L, C], appended as they are.

        Returns:
            tokens [N, T, C]: points, a padding point when there are points but no boxes, box corners, extra tokens;
            and the dense embedding [N, C, h, w] (not stored N times when there are no masks).

        Raises:
            ValueError: a shape is not as above.
        """
        _check_prompts(points, boxes, masks, extra_tokens, self.embed_dim, self.mask_input_size)
        tokens = []
        if points is not None:
            tokens.append(self._embed_points(*points, pad=boxes is None))
        if boxes is not None:
            tokens.append(self._embed_boxes(boxes))
        if extra_tokens is not None:
            tokens.append(extra_tokens)
        N = tokens[0].shape[0] if tokens else masks.shape[0] if masks is not None else 1
        no_mask = self.no_mask_embed.weight
        sparse = torch.cat(tokens, dim=1) if tokens else no_mask.new_empty(N, 0, self.embed_dim)
        if masks is not None:
            return sparse, self._embed_masks(masks)
        return sparse, no_mask.view(1, -1, 1, 1).expand(N, -1, *self.image_embedding_size)

    def _embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
        """Tokens [N, K (+ 1), C] of points [N, K, 2] with labels [N, K]."""
        encoding = self.pe_layer.forward_with_coords(points + 0.5, self.input_image_size)  # centres of the pixels
        labels = labels.unsqueeze(-1)
        not_a_point = self.not_a_point_embed.weight
        tokens = torch.where(labels == -1, not_a_point, encoding)
        for label in (0, 1):
            tokens = torch.where(labels == label, tokens + self._point_embedding(label), tokens)
        if pad:
            tokens = torch.cat([tokens, not_a_point.expand(len(tokens), 1, -1)], dim=1)
        return tokens

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        """Tokens [N, 2, C] of the corners of boxes [N, 4]."""
        corners = boxes.reshape(-1, 2, 2) + 0.5
        encoding = self.pe_layer.forward_with_coords(corners, self.input_image_size)
        return encoding + torch.stack([self._point_embedding(2), self._point_embedding(3)], dim=1)

    def _point_embedding(self, index: int) -> Tensor:
        """[1, C]."""
        return self.point_embeddings[index].get_parameter("weight")

    def _embed_masks(self, masks: Tensor) -> Tensor:
        """Dense embedding [N, C, h, w] of mask logits [N, 1, 4h, 4w]."""
        return self.mask_downscaling(masks)


class PositionEmbeddingRandom(nn.Module):
    """Fourier features of positions: [sin(2 pi p G), cos(2 pi p G)] with p in [-1, 1]^2 and a fixed Gaussian G.

    Args:
        num_pos_feats: half the number of channels.
        scale: standard deviation of G; 1 where it is missing or not positive.
    """

    positional_encoding_gaussian_matrix: Tensor  # [2, num_pos_feats]

    def __init__(self, num_pos_feats: int = 64, scale: float | None = None) -> None:
        super().__init__()
        scale = 1.0 if scale is None or scale <= 0.0 else scale
        self.register_buffer("positional_encoding_gaussian_matrix", scale * torch.randn(2, num_pos_feats))

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Encode the centres of a grid of `size` (h, w): [C, h, w]."""
        h, w = size
        matrix = self.positional_encoding_gaussian_matrix
        y = (torch.arange(h, device=matrix.device, dtype=_compute_dtype(matrix)) + 0.5) / h
        x = (torch.arange(w, device=matrix.device, dtype=_compute_dtype(matrix)) + 0.5) / w
        positions = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)
        return self._pe_encoding(positions).permute(2, 0, 1)

    def forward_with_coords(self, coords_input: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Encode points [N, K, 2], (x, y) in pixels of an image of `image_size` (H, W): [N, K, C]."""
        height, width = image_size
        # Divide in the precision of the coordinates (float64 in automatic mask generation), only then round.
        positions = torch.stack([coords_input[..., 0] / width, coords_input[..., 1] / height], dim=-1)
        return self._pe_encoding(positions)

    def _pe_encoding(self, positions: Tensor) -> Tensor:
        """Encode positions [..., 2] in [0, 1]^2: [..., C]. Exporters of others call it by this name."""
        matrix = self.positional_encoding_gaussian_matrix
        dtype = _compute_dtype(matrix)
        phases = 2 * math.pi * ((2 * positions.to(dtype) - 1) @ matrix.to(dtype))
        return torch.cat([phases.sin(), phases.cos()], dim=-1).to(matrix.dtype)


def _compute_dtype(matrix: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 model: half precision would move points by pixels."""
    return torch.promote_types(matrix.dtype, torch.float32)


def _check_prompts(
    points: tuple[Tensor, Tensor] | None,
    boxes: Tensor | None,
    masks: Tensor | None,
    extra_tokens: Tensor | None,
    embed_dim: int,
    mask_size: tuple[int, int],
) -> None:
    """Raise ValueError unless all shapes are as `PromptEncoder.forward` says."""
    counts = {}
    if points is not None:
        coords, labels = points
        if coords.dim() != 3 or coords.shape[2] != 2 or labels.shape != coords.shape[:2]:
            raise ValueError(
                "points must be coordinates [N, K, 2] and labels [N, K], "
                f"got {tuple(coords.shape)} and {tuple(labels.shape)}"
            )
        counts["points"] = len(coords)
    if boxes is not None:
        if boxes.dim() < 2 or boxes.shape[1:].numel() != 4:
            raise ValueError(f"boxes must be [N, 4], got {tuple(boxes.shape)}")
        counts["boxes"] = len(boxes)
    if masks is not None and (masks.dim() != 4 or masks.shape[1:] != (1, *mask_size)):
        raise ValueError(f"masks must be [N, 1, {mask_size[0]}, {mask_size[1]}], got {tuple(masks.shape)}")
    if extra_tokens is not None:
        if extra_tokens.dim() != 3 or extra_tokens.shape[2] != embed_dim:
            raise ValueError(f"extra_tokens must be [N, L, {embed_dim}], got {tuple(extra_tokens.shape)}")
        counts["extra_tokens"] = len(extra_tokens)
    if len(set(counts.values())) > 1:
        raise ValueError(f"all kinds of prompts must have the same number N, got {counts}")
