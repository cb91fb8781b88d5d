"""Layers that more than one stage of the model uses."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of [B, C, H, W], separately at each pixel."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        channels_last = x.movedim(1, -1)  # [B, H, W, C]
        return F.layer_norm(channels_last, self.weight.shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class MLPBlock(nn.Module):
    """The two-layer perceptron of a transformer block, [..., C] -> [..., C]."""

    def __init__(self, embedding_dim: int, mlp_dim: int, act: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.lin1 = nn.Linear(embedding_dim, mlp_dim)
        self.act = act()
        self.lin2 = nn.Linear(mlp_dim, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.act(self.lin1(x)))


class MLP(nn.Module):
    """A perceptron of `num_layers` linear layers with ReLU between them, [..., input_dim] -> [..., output_dim]."""

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int, sigmoid_output: bool = False
    ) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.sigmoid_output = sigmoid_output

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        x = self.layers[-1](x)
        return x.sigmoid() if self.sigmoid_output else x


class DropPath(nn.Module):
    """Stochastic depth: while training, leaves a residual branch [B, ...] out of a sample with probability `rate`.

    Kept branches are divided by 1 - rate, so that their expectation stays. Source: Huang et al., "Deep Networks with
    Stochastic Depth", 2016.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        kept = torch.rand(len(branch), *[1] * (branch.dim() - 1), device=branch.device) >= self.rate
        return branch * kept / (1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
