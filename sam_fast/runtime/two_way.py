"""The two-way transformer of the mask decoder without projections of the image: exact algebra, and far fewer products.

What happens to the image's pixels is `ops.two_way_attention`, whose docstring has the algebra; the token side is here.
Before prompts have written into it, the image is the same for all of them, unless they bring masks: its projections in
the first layer are computed once per image (`FirstLayer`).

Up to rounding (relative 1e-6 in float32) the numbers are those of `modeling.TwoWayTransformer`, which stays the
reference and is what training uses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_fast.modeling.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer
from sam_fast.ops.token_attention import token_attention
from sam_fast.ops.two_way_attention import Write, two_way_attention
from sam_fast.runtime.perceptrons import Perceptron, perceptron_of
from sam_fast.runtime.plain import is_packed_on

MOST_TOKENS = 16  # of a prompt; with more of them it is cheaper to project the image


class FirstLayer(NamedTuple):
    """What the first layer makes of an image that no prompt has written into.

    Attributes:
        image: X [1, P, C], the image embedding with the dense prompt "no mask".
        keys, values: [1, h, P, d], for tokens that read the image.
        queries: [P, d, h], of pixels that read tokens.
    """

    image: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor


class _AttentionLayers(NamedTuple):
    """An attention with its projections, and the normalisation that follows."""

    attention: Attention
    q_proj: Perceptron
    k_proj: Perceptron
    v_proj: Perceptron
    out_proj: Perceptron  # then residual and LayerNorm


class _BlockLayers(NamedTuple):
    share: Callable[[Tensor, Tensor], Tensor]  # queries and tokens -> queries
    reading: _AttentionLayers
    mlp: Perceptron  # then residual and LayerNorm
    writing: _AttentionLayers
    norm: nn.LayerNorm  # of pixels that were written


class TokenLayers(NamedTuple):
    """What the tokens of a two-way transformer go through."""

    blocks: list[_BlockLayers]
    final: _AttentionLayers


def token_layers(transformer: TwoWayTransformer, backend: str = "auto") -> TokenLayers:
    """Look up the layers of a transformer that `can_absorb`; what is returned is good until one is replaced.

    Args:
        transformer: of the mask decoder.
        backend: of the operations.
    """

    def of(attention: Attention, norm: nn.Module | None = None) -> _AttentionLayers:
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = (Perceptron((projection,), backend=backend) for projection in projections)
        return _AttentionLayers(attention, q, k, v, Perceptron((attention.out_proj,), norm, backend))

    blocks = [
        _BlockLayers(
            _sharing(layer, of) if _is_plain(layer.self_attn) else partial(_share, layer),
            of(layer.cross_attn_token_to_image, layer.norm2),
            perceptron_of(layer.mlp, layer.norm3, backend),
            of(layer.cross_attn_image_to_token),
            layer.norm4,
        )
        for layer in _layers(transformer)
    ]
    return TokenLayers(blocks, of(transformer.final_attn_token_to_image, transformer.norm_final_attn))


def can_absorb(transformer: nn.Module) -> bool:
    """Whether a transformer is the plain one, whose weights may be read: no subclass, and no other kind of layer in it.

    Quantised, adapted or parametrised layers compute what their `weight` does not say.
    """
    if type(transformer) is not TwoWayTransformer:
        return False
    attentions: list[nn.Module] = [transformer.final_attn_token_to_image]
    for layer in _layers(transformer):
        if type(layer) is not TwoWayAttentionBlock or type(layer.norm4) is not nn.LayerNorm:
            return False
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    return all(map(_is_plain, attentions))


def project_first_layer(transformer: TwoWayTransformer, image: Tensor, pe: Tensor) -> FirstLayer:
    """Project the image X [1, P, C] with encoding `pe` [1, P, C] for the first layer of all its prompts."""
    layer = _layers(transformer)[0]
    reading, writing = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    placed = image + pe
    keys, values = _heads(reading, reading.k_proj(placed)), _heads(reading, reading.v_proj(image))
    queries = writing.q_proj(placed)[0].unflatten(1, (writing.num_heads, -1)).transpose(1, 2)
    return FirstLayer(image, keys.contiguous(), values.contiguous(), queries.contiguous())


def two_way(
    transformer: TwoWayTransformer,
    image: Tensor | FirstLayer,
    pe: Tensor,
    tokens: Tensor,
    *,
    results: int | None = None,
    backend: str = "auto",
    layers: TokenLayers | None = None,
) -> tuple[Tensor, Tensor]:
    """What `transformer` returns for N prompts.

    Args:
        transformer: of the mask decoder.
        image: X [N, P, C], or what `project_first_layer` made of an image that all prompts share.
        pe: [1, P, C].
        tokens: [N, T, C], output tokens and prompt.
        results: how many of the tokens, the first ones, are wanted; the others need not read the image at last.
        backend: of the operations.
        layers: what `token_layers` looked up; None looks it up here.

    Returns:
        tokens [N, results, C] and image [N, P, C].
    """
    layers = layers or token_layers(transformer, backend)
    queries, write, own = tokens, None, False  # whether `pixels` is made here
    first, pixels = (image, image.image) if isinstance(image, FirstLayer) else (None, image)
    for block in layers.blocks:
        queries = block.share(queries, tokens)
        if first is not None:
            read = _read_projected(block.reading, _placed(block.reading, queries, tokens), first)
        else:
            placed = _placed(block.reading, queries, tokens)
            pixels, read = _sweep(block.reading, placed, pixels, pe, write, backend, own)
            own = write is not None
        queries = block.reading.out_proj(read, queries)
        queries = block.mlp(queries, queries)
        write = _offer(block.writing, block.norm, _placed(block.writing, queries, tokens), queries, first)
        first = None
    queries, tokens = queries[:, :results], tokens[:, :results]
    pixels, read = _sweep(layers.final, _placed(layers.final, queries, tokens), pixels, pe, write, backend, own)
    return layers.final.out_proj(read, queries), pixels


def _layers(transformer: TwoWayTransformer) -> list[TwoWayAttentionBlock]:
    return cast(list[TwoWayAttentionBlock], list(transformer.layers))


def _is_plain(attention: nn.Module) -> bool:
    """Whether an attention is the official one, and its projections are what their weights say."""
    if type(attention) is not Attention:
        return False
    projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
    return all(type(projection) is nn.Linear for projection in projections)


def _share(layer: TwoWayAttentionBlock, queries: Tensor, tokens: Tensor) -> Tensor:
    """Self-attention of the tokens."""
    if layer.skip_first_layer_pe:
        return layer.norm1(layer.self_attn(q=queries, k=queries, v=queries))
    placed = queries + tokens
    return layer.norm1(queries + layer.self_attn(q=placed, k=placed, v=queries))


def _sharing(
    layer: TwoWayAttentionBlock, of: Callable[[Attention, nn.Module], _AttentionLayers]
) -> Callable[[Tensor, Tensor], Tensor]:
    """`_share` of a plain attention."""
    layers, first = of(layer.self_attn, layer.norm1), layer.skip_first_layer_pe

    def share(queries: Tensor, tokens: Tensor) -> Tensor:
        placed = queries if first else queries + tokens
        given = layers.q_proj(placed), layers.k_proj(placed), layers.v_proj(queries)
        q, k, v = (_heads(layers.attention, x) for x in given)
        read = F.scaled_dot_product_attention(q, k, v)
        return layers.out_proj(_side_by_side(read), None if first else queries)

    return share


class StackedSharing:
    """Self-attention of the tokens, with one product for all projections that read the same; weights are copied."""

    def __init__(self, layer: TwoWayAttentionBlock, backend: str = "auto") -> None:
        """
        Args:
            layer: one that `fits`.
            backend: of the operations.
        """
        self._layer, self._backend = layer, backend
        self._out_proj = Perceptron((layer.self_attn.out_proj,), layer.norm1, backend)
        attention = layer.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        stacked = [projections] if layer.skip_first_layer_pe else [projections[:2], projections[2:]]
        self._weights = [torch.cat([one.weight for one in some]) for some in stacked]
        self._biases = [torch.cat([one.bias for one in some]) for some in stacked]

    @staticmethod
    def fits(layer: TwoWayAttentionBlock) -> bool:
        """Whether a layer's self-attention is the official one, with projections that are what their weights say."""
        attention = layer.self_attn
        if type(attention) is not Attention:
            return False
        return all(one.bias is not None for one in (attention.q_proj, attention.k_proj, attention.v_proj))

    def __call__(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """[N, T, C] -> [N, T, C]."""
        layer, attention, dtype = self._layer, self._layer.self_attn, self._weights[0].dtype
        alone = layer.skip_first_layer_pe
        given = [queries.to(dtype)] if alone else [_sum(queries, tokens, dtype).to(dtype), queries.to(dtype)]
        products = map(F.linear, given, self._weights, self._biases)
        q, k, v = (x for product in products for x in product.split(attention.internal_dim, dim=2))
        read = token_attention(q, k, v, attention.num_heads, backend=self._backend)
        return self._out_proj(read, None if alone else queries)


def _placed(layers: _AttentionLayers, queries: Tensor, tokens: Tensor) -> Tensor:
    """Queries with the encoding of their places, as the attention's projections read them."""
    return _sum(queries, tokens, layers.attention.q_proj.weight.dtype)


def _sum(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a + b, by the same kernel rounded to `dtype` where it `_writes_into` what it is told."""
    if a.dtype == dtype or not _writes_into(a):
        return a + b
    return torch.add(a, b, out=a.new_empty(a.shape, dtype=dtype))


def _writes_into(x: Tensor) -> bool:
    """Whether operations on x are told where to write, which neither gradients nor autocast allow.

    On a CPU it would make products of few tokens slower.
    """
    kind = x.device.type
    return is_packed_on(kind) and not torch.is_grad_enabled() and not torch.is_autocast_enabled(kind)


def _sweep(
    layers: _AttentionLayers,
    queries: Tensor,
    image: Tensor,
    pe: Tensor,
    write: Write | None,
    backend: str,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """Write into images [N or 1, P, C], then let tokens [N, T, C] read them: images [N, P, C], values [N, T, h d]."""
    N, T, _ = queries.shape
    attention = layers.attention
    q = layers.q_proj(queries) * _scale(attention)
    absorbed = _absorb(attention, q, attention.k_proj.weight).transpose(1, 2)  # [N, C, R]
    image, read = two_way_attention(
        image, pe[0], write, absorbed, attention.num_heads, backend=backend, overwrite=overwrite
    )
    assert read is not None
    by_head = read.reshape(N * T, attention.num_heads, read.shape[2])
    values = _times(by_head, _by_head(attention, attention.v_proj.weight).transpose(1, 2))  # [N T, h, d]
    return image, values.reshape(N, T, attention.internal_dim) + attention.v_proj.bias


def _read_projected(layers: _AttentionLayers, queries: Tensor, first: FirstLayer) -> Tensor:
    """Tokens [N, T, C] read one image through its keys and values: [N, T, h d]."""
    N, T, _ = queries.shape
    q = _heads(layers.attention, layers.q_proj(queries)).transpose(0, 1).flatten(1, 2)  # [h, N T, d]: all prompts'
    read = F.scaled_dot_product_attention(q[None], first.keys, first.values)[0]
    return _side_by_side(read.unflatten(1, (N, T)).transpose(0, 1))


def _offer(
    layers: _AttentionLayers, norm: nn.LayerNorm, placed_tokens: Tensor, tokens: Tensor, first: FirstLayer | None
) -> Write:
    """What tokens [N, T, C], with and without their encoding, offer to the image."""
    attention = layers.attention
    k = layers.k_proj(placed_tokens) * _scale(attention)  # [N, T, h d]
    offered = _absorb(attention, layers.v_proj(tokens), attention.out_proj.weight.T)
    rest = offered, attention.out_proj.bias, norm.weight, norm.bias, norm.eps
    by_head = k.unflatten(2, (attention.num_heads, -1))  # [N, T, h, d]
    if first is not None:
        return Write(*rest, queries=first.queries, keys=by_head.transpose(2, 3))
    absorbed = _absorb(attention, k, attention.q_proj.weight).transpose(1, 2)
    dtype = torch.promote_types(k.dtype, torch.float32)
    constant = (by_head.to(dtype) * attention.q_proj.bias.view(attention.num_heads, -1)).sum(3).flatten(1)
    return Write(*rest, absorbed_keys=absorbed, constant=constant)


def _scale(attention: Attention) -> float:
    return (attention.internal_dim // attention.num_heads) ** -0.5


def _absorb(attention: Attention, x: Tensor, weight: Tensor) -> Tensor:
    """Tokens [N, T, h d] times a weight [h d, C], head by head: [N, T h, C]."""
    N, T, width = x.shape
    heads = attention.num_heads
    by_head = x.reshape(N * T, heads, width // heads)
    return _times(by_head, _by_head(attention, weight)).reshape(N, T * heads, weight.shape[1])


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x [N T, h, i] times a weight [h, i, o], head by head: [N T, h, o], on a GPU contiguous."""
    if not _writes_into(x):
        return (x.transpose(0, 1) @ weight).transpose(0, 1)
    result = x.new_empty(*x.shape[:2], weight.shape[2])
    torch.bmm(x.transpose(0, 1), weight, out=result.transpose(0, 1))
    return result


def _heads(attention: Attention, x: Tensor) -> Tensor:
    """[N, T, h d] -> [N, h, T, d]."""
    return x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def _side_by_side(x: Tensor) -> Tensor:
    """[N, h, T, d] -> [N, T, h d]."""
    return x.transpose(1, 2).flatten(2)


def _by_head(attention: Attention, weight: Tensor) -> Tensor:
    """The weight [h d, C] of a projection as [h, d, C]."""
    return weight.unflatten(0, (attention.num_heads, -1))
