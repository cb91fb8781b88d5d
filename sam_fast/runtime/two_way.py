"""The two-way transformer of the mask decoder without projections of the image: exact algebra, and far fewer products.

Notation: X [P, C] are the image's tokens, `pe` their positional encoding, T the prompt's tokens, and Wq, Wk, Wv, Wo the
projections of an attention with h heads of width d.

* A token that reads the image scores (q Wk) (X + pe)^T / sqrt(d), head by head: the few queries go through Wk instead
  of the image, and q . bk, the same for every pixel, cancels in the softmax. What it reads is (softmax X) Wv^T + bv.
* A pixel that reads tokens scores (X + pe) (Wq^T k) / sqrt(d) + bq . k / sqrt(d), and adds softmax (v Wo^T) + bo: again
  it is the tokens that are projected.
* Before prompts have written into it, the image is the same for all of them, unless they bring masks: its projections
  in the first layer are computed once per image (`FirstLayer`).

Up to rounding (relative 1e-6 in float32) the numbers are those of `modeling.TwoWayTransformer`, which stays the
reference and is what training uses.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_fast.modeling.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer

MOST_TOKENS = 16  # of a prompt; with more of them it is cheaper to project the image


class FirstLayer(NamedTuple):
    """What the first layer makes of an image that no prompt has written into.

    Attributes:
        image: X [1, P, C], the image embedding with the dense prompt "no mask".
        keys, values: [1, h, P, d], for tokens that read the image.
        queries: [P, h * d], of pixels that read tokens.
    """

    image: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor


def can_absorb(transformer: nn.Module) -> bool:
    """Whether a transformer is the plain one, whose weights may be read: no subclass, and no other kind of layer in it.

    Quantised, adapted or parametrised layers compute what their `weight` does not say.
    """
    if type(transformer) is not TwoWayTransformer:
        return False
    attentions = [module for module in transformer.modules() if isinstance(module, Attention)]
    layers = (getattr(a, name) for a in attentions for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    return all(type(layer) is nn.Linear for layer in layers)


def project_first_layer(transformer: TwoWayTransformer, image: Tensor, pe: Tensor) -> FirstLayer:
    """Project the image X [1, P, C] with encoding `pe` [1, P, C] for the first layer of all its prompts."""
    layer = _layers(transformer)[0]
    reading, writing = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    placed = image + pe
    keys, values = _heads(reading, reading.k_proj(placed)), _heads(reading, reading.v_proj(image))
    return FirstLayer(image, keys.contiguous(), values.contiguous(), writing.q_proj(placed)[0])


def two_way(
    transformer: TwoWayTransformer, image: Tensor | FirstLayer, pe: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """What `transformer` returns for N prompts.

    Args:
        transformer: of the mask decoder.
        image: X [N, P, C], or what `project_first_layer` made of an image that all prompts share.
        pe: [1, P, C].
        tokens: [N, T, C], output tokens and prompt.

    Returns:
        tokens [N, T, C] and image [N, P, C].
    """
    layers = _layers(transformer)
    if isinstance(image, FirstLayer):
        layer = layers.pop(0)
        queries = _share(layer, tokens, tokens)
        queries = _digest(layer, queries, _read_projected(layer.cross_attn_token_to_image, queries + tokens, image))
        written = _write_projected(layer.cross_attn_image_to_token, queries + tokens, queries, image)
        keys = layer.norm4(image.image + written)
    else:
        queries, keys = tokens, image
    for layer in layers:
        placed = keys + pe
        queries = _share(layer, queries, tokens)
        queries = _digest(layer, queries, _read(layer.cross_attn_token_to_image, queries + tokens, keys, placed))
        written = _write(layer.cross_attn_image_to_token, queries + tokens, queries, placed)
        keys = layer.norm4(keys + written)
    read = _read(transformer.final_attn_token_to_image, queries + tokens, keys, keys + pe)
    return transformer.norm_final_attn(queries + read), keys


def _layers(transformer: TwoWayTransformer) -> list[TwoWayAttentionBlock]:
    return cast(list[TwoWayAttentionBlock], list(transformer.layers))


def _share(layer: TwoWayAttentionBlock, queries: Tensor, tokens: Tensor) -> Tensor:
    """Self-attention of the tokens."""
    if layer.skip_first_layer_pe:
        return layer.norm1(layer.self_attn(q=queries, k=queries, v=queries))
    placed = queries + tokens
    return layer.norm1(queries + layer.self_attn(q=placed, k=placed, v=queries))


def _digest(layer: TwoWayAttentionBlock, queries: Tensor, read: Tensor) -> Tensor:
    """What tokens make of what they read."""
    queries = layer.norm2(queries + read)
    return layer.norm3(queries + layer.mlp(queries))


def _read(attention: Attention, queries: Tensor, image: Tensor, placed: Tensor) -> Tensor:
    """Tokens [N, T, C] read images [N, P, C], `placed` with their encoding: [N, T, C]."""
    T = queries.shape[1]
    q = _heads(attention, attention.q_proj(queries))  # [N, h, T, d]
    absorbed = (q @ _by_head(attention, attention.k_proj.weight)).flatten(1, 2)  # [N, h T, C]
    scores = absorbed @ placed.transpose(1, 2) * q.shape[3] ** -0.5  # [N, h T, P]
    read = (scores.softmax(2) @ image).unflatten(1, (attention.num_heads, T))
    values = read @ _by_head(attention, attention.v_proj.weight).transpose(1, 2)  # [N, h, T, d]
    return attention.out_proj(_side_by_side(values) + attention.v_proj.bias)


def _read_projected(attention: Attention, queries: Tensor, first: FirstLayer) -> Tensor:
    """Tokens [N, T, C] read one image through its keys and values: [N, T, C]."""
    N, T, _ = queries.shape
    q = _heads(attention, attention.q_proj(queries)).transpose(0, 1).flatten(1, 2)  # [h, N T, d]: all prompts at once
    read = F.scaled_dot_product_attention(q[None], first.keys, first.values)[0]
    return attention.out_proj(_side_by_side(read.unflatten(1, (N, T)).transpose(0, 1)))


def _write(attention: Attention, placed_tokens: Tensor, tokens: Tensor, placed: Tensor) -> Tensor:
    """What images [N, P, C], with their encoding, take from tokens [N, T, C], with and without theirs: [N, P, C]."""
    width = attention.internal_dim // attention.num_heads
    k = _heads(attention, attention.k_proj(placed_tokens)) * width**-0.5
    absorbed = (k @ _by_head(attention, attention.q_proj.weight)).flatten(1, 2)  # [N, h T, C]
    constant = (k * attention.q_proj.bias.view(attention.num_heads, 1, width)).sum(3).flatten(1)[:, None]
    return _take(attention, torch.baddbmm(constant, placed, absorbed.transpose(1, 2)), tokens)


def _write_projected(attention: Attention, placed_tokens: Tensor, tokens: Tensor, first: FirstLayer) -> Tensor:
    """What one image takes from the tokens [N, T, C] of each prompt, through its queries: [N, P, C]."""
    N, T, _ = tokens.shape
    width = attention.internal_dim // attention.num_heads
    k = _heads(attention, attention.k_proj(placed_tokens)) * width**-0.5  # [N, h, T, d]
    # Keys of a head stand against the channels of that head alone, so that one product serves all prompts and heads.
    blocks = k.new_zeros(N, attention.num_heads, T, attention.num_heads, width)
    blocks.diagonal(dim1=1, dim2=3).copy_(k.permute(0, 2, 3, 1))
    scores = first.queries @ blocks.view(N * attention.num_heads * T, attention.internal_dim).T  # [P, N h T]
    return _take(attention, scores.unflatten(1, (N, attention.num_heads * T)).transpose(0, 1), tokens)


def _take(attention: Attention, scores: Tensor, tokens: Tensor) -> Tensor:
    """Pixels with scores [N, P, h T] take from tokens [N, T, C]: [N, P, C]."""
    v = _heads(attention, attention.v_proj(tokens))
    offered = (v @ _by_head(attention, attention.out_proj.weight.T)).flatten(1, 2)  # [N, h T, C]
    shares = scores.unflatten(2, (attention.num_heads, tokens.shape[1])).softmax(3).flatten(2)
    return torch.baddbmm(attention.out_proj.bias, shares, offered)


def _heads(attention: Attention, x: Tensor) -> Tensor:
    """[N, T, h d] -> [N, h, T, d]."""
    return x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def _side_by_side(x: Tensor) -> Tensor:
    """[N, h, T, d] -> [N, T, h d]."""
    return x.transpose(1, 2).flatten(2)


def _by_head(attention: Attention, weight: Tensor) -> Tensor:
    """The weight [h d, C] of a projection as [h, d, C]."""
    return weight.unflatten(0, (attention.num_heads, -1))
