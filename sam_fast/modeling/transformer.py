"""The two-way transformer of the mask decoder: tokens and image read from each other.

Source: Kirillov et al., "Segment Anything", 2023, appendix A, figure 14.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sam_fast.modeling.layers import MLPBlock


class TwoWayTransformer(nn.Module):
    """Updates tokens and the image embedding in turns.

    Args:
        depth: number of two-way blocks.
        embedding_dim: C, channels of tokens and image.
        num_heads: attention heads.
        mlp_dim: hidden width of the perceptron on tokens.
        activation: activation of that perceptron.
        attention_downsample_rate: C over the width of the cross attentions.
    """

    def __init__(
        self,
        depth: int,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        activation: type[nn.Module] = nn.ReLU,
        attention_downsample_rate: int = 2,
    ) -> None:
        super().__init__()
        self.depth = depth
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(
                embedding_dim,
                num_heads,
                mlp_dim,
                activation,
                attention_downsample_rate,
                skip_first_layer_pe=index == 0,
            )
            for index in range(depth)
        )
        self.final_attn_token_to_image = Attention(embedding_dim, num_heads, attention_downsample_rate)
        self.norm_final_attn = nn.LayerNorm(embedding_dim)

    def forward(self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Run all blocks and the last reading of the image.

        Args:
            image_embedding: [N, C, h, w], or [1, C, h, w] for all N prompts.
            image_pe: positional encoding of the image, shaped alike.
            point_embedding: tokens [N, T, C]; added again wherever tokens act as queries or keys.

        Returns:
            tokens [N, T, C] and image [N, h*w, C].
        """
        keys = image_embedding.flatten(2).transpose(1, 2)  # [N or 1, P, C]
        key_pe = image_pe.flatten(2).transpose(1, 2)
        queries = point_embedding
        for layer in self.layers:
            queries, keys = layer(queries=queries, keys=keys, query_pe=point_embedding, key_pe=key_pe)
        read = self.final_attn_token_to_image(q=queries + point_embedding, k=keys + key_pe, v=keys)
        return self.norm_final_attn(queries + read), keys


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of tokens, tokens read the image, perceptron on tokens, the image reads the tokens.

    Args:
        embedding_dim: C.
        num_heads: attention heads.
        mlp_dim: hidden width of the perceptron.
        activation: activation of the perceptron.
        attention_downsample_rate: C over the width of the cross attentions.
        skip_first_layer_pe: the first block's self-attention has neither positional encoding nor residual.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int = 2048,
        activation: type[nn.Module] = nn.ReLU,
        attention_downsample_rate: int = 2,
        skip_first_layer_pe: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(embedding_dim, num_heads)
        self.norm1 = nn.LayerNorm(embedding_dim)
        self.cross_attn_token_to_image = Attention(embedding_dim, num_heads, attention_downsample_rate)
        self.norm2 = nn.LayerNorm(embedding_dim)
        self.mlp = MLPBlock(embedding_dim, mlp_dim, activation)
        self.norm3 = nn.LayerNorm(embedding_dim)
        self.norm4 = nn.LayerNorm(embedding_dim)
        self.cross_attn_image_to_token = Attention(embedding_dim, num_heads, attention_downsample_rate)
        self.skip_first_layer_pe = skip_first_layer_pe

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Update tokens `queries` [N, T, C] and image `keys` [N or 1, P, C], with their positional encodings."""
        if self.skip_first_layer_pe:
            queries = self.self_attn(q=queries, k=queries, v=queries)
        else:
            placed = queries + query_pe
            queries = queries + self.self_attn(q=placed, k=placed, v=queries)
        queries = self.norm1(queries)

        placed_keys = keys + key_pe
        queries = self.norm2(queries + self.cross_attn_token_to_image(q=queries + query_pe, k=placed_keys, v=keys))
        queries = self.norm3(queries + self.mlp(queries))
        keys = self.norm4(keys + self.cross_attn_image_to_token(q=placed_keys, k=queries + query_pe, v=queries))
        return queries, keys


class Attention(nn.Module):
    """Multi-head attention with separate projections, optionally narrower than the embedding.

    Args:
        embedding_dim: C.
        num_heads: heads.
        downsample_rate: C over the width of the attention.

    Raises:
        ValueError: the heads do not divide that width.
    """

    def __init__(self, embedding_dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.internal_dim = embedding_dim // downsample_rate
        self.num_heads = num_heads
        if self.internal_dim % num_heads:
            raise ValueError(f"num_heads must divide the attention width, got {num_heads} and {self.internal_dim}")
        self.q_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.k_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.v_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.out_proj = nn.Linear(self.internal_dim, embedding_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from q [N, Tq, C] to k, v [N, Tk, C]; a batch of 1 serves all N of the other side."""
        q, k, v = self._heads(self.q_proj(q)), self._heads(self.k_proj(k)), self._heads(self.v_proj(v))
        N = len(k) if len(q) == 1 else len(q)
        q, k, v = (x.expand(N, -1, -1, -1) for x in (q, k, v))
        read = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(read.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[N, T, heads * d] -> [N, heads, T, d]."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
