"""Positions of tokens in the image encoder: relative ones in its attention, absolute ones, and both at other sizes.

Source: decomposed relative positions: Li et al., "MViTv2", 2022, eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

grid_attention: ContextVar[Callable[..., Tensor | None] | None] = ContextVar("grid_attention", default=None)


def attend_on_grid(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor, scale: float) -> Tensor:
    """Attention over a grid of H x W tokens, with biases by the row and by the column of a key.

    Training may set `grid_attention` to what computes it without the sum of the biases, or says None where it does not.

    Args:
        q, k, v: [B, heads, H*W, d].
        by_row: [B, heads, H, W, H].
        by_column: [B, heads, H, W, W].
        scale: of the products of q and k.

    Returns:
        [B, heads, H*W, d].
    """
    instead = None if torch.compiler.is_compiling() else grid_attention.get()
    found = None if instead is None else instead(q, k, v, by_row, by_column, scale)
    if found is not None:
        return found
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_on_grid(by_row, by_column), scale=scale)


def bias_on_grid(by_row: Tensor, by_column: Tensor) -> Tensor:
    """The biases of `attend_on_grid` for each query and key: [B, heads, H*W, H*W]."""
    bias = by_row[..., :, None] + by_column[..., None, :]
    return bias.flatten(4, 5).flatten(2, 3)


def get_rel_pos(q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
    """Look up relative positions for each query and key of one axis.

    Args:
        q_size: number of query positions.
        k_size: number of key positions; the shorter of the two axes is stretched over the longer.
        rel_pos: [L, d], for distances -(L-1)/2 .. (L-1)/2; interpolated when L is not 2 max(q_size, k_size) - 1.

    Returns:
        [q_size, k_size, d].
    """
    rel_pos = resize_relative_positions(rel_pos, 2 * max(q_size, k_size) - 1)
    q_step, k_step = max(k_size / q_size, 1.0), max(q_size / k_size, 1.0)
    q_positions = torch.arange(q_size, device=rel_pos.device)[:, None] * q_step
    k_positions = torch.arange(k_size, device=rel_pos.device)[None, :] * k_step
    return rel_pos[(q_positions - k_positions + (k_size - 1) * k_step).long()]


def add_decomposed_rel_pos(
    attn: Tensor,
    q: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    q_size: tuple[int, int],
    k_size: tuple[int, int],
) -> Tensor:
    """Add to attention scores what the relative positions of rows and of columns contribute, for scripts that call it.

    out[y, x, v, u] = attn[y, x, v, u] + q[y, x] . R_h[y, v] + q[y, x] . R_w[x, u], with R of `get_rel_pos`.

    Args:
        attn: [B, qh*qw, kh*kw], scores before the softmax.
        q: [B, qh*qw, C], queries.
        rel_pos_h: [L, C], as `get_rel_pos` takes it, for rows.
        rel_pos_w: [L, C], for columns.
        q_size: (qh, qw), the grid of the queries.
        k_size: (kh, kw), the grid of the keys.

    Returns:
        [B, qh*qw, kh*kw].
    """
    (q_height, q_width), (k_height, k_width) = q_size, k_size
    grid = q.unflatten(1, q_size)  # [B, qh, qw, C]
    by_row = torch.einsum("byxc,yvc->byxv", grid, get_rel_pos(q_height, k_height, rel_pos_h))
    by_column = torch.einsum("byxc,xuc->byxu", grid, get_rel_pos(q_width, k_width, rel_pos_w))
    scores = attn.unflatten(1, q_size).unflatten(-1, k_size)  # [B, qh, qw, kh, kw]
    return (scores + by_row[..., :, None] + by_column[..., None, :]).reshape(attn.shape)


def resize_relative_positions(rel_pos: Tensor, length: int) -> Tensor:
    """Interpolate relative positions [L, d] linearly to [length, d]."""
    if rel_pos.shape[0] == length:
        return rel_pos
    return F.interpolate(rel_pos.T[None], size=length, mode="linear")[0].T


def resize_absolute_positions(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Interpolate absolute positions [1, H, W, C] bicubically to the `grid` (H, W), in tokens."""
    if pos_embed.shape[1:3] == grid:
        return pos_embed
    resized = F.interpolate(pos_embed.permute(0, 3, 1, 2), size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1)
