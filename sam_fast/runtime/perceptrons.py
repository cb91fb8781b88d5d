"""Linear layers on tokens, by `ops.perceptron` where that computes what they do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_fast.modeling.layers import MLP, MLPBlock
from sam_fast.ops.layer_norm import layer_norm
from sam_fast.ops.perceptron import perceptron


class Perceptron:
    """Linear layers with ReLU between them, then a residual and a LayerNorm, as these modules compute it.

    The weights are the modules' own, as they were when this was made. Where the modules are of other classes, or run in
    another format than float32, under autocast, with gradients or not on a CPU, they are called one by one.
    """

    def __init__(self, layers: Iterable[nn.Module], norm: nn.Module | None = None, backend: str = "auto") -> None:
        """
        Args:
            layers: at least one.
            norm: the LayerNorm, or None.
            backend: of the operations; "auto" or "native" let `ops.perceptron` run.
        """
        self._layers, self._norm = list(layers), norm
        plain = all(type(layer) is nn.Linear and layer.bias is not None for layer in self._layers)
        plain = plain and (norm is None or (type(norm) is nn.LayerNorm and norm.bias is not None))
        self._plain = plain and backend in ("auto", "native")
        if self._plain:
            linears = cast(list[nn.Linear], self._layers)
            self._weights = [layer.weight.detach() for layer in linears]
            self._biases = [layer.bias.detach() for layer in linears]
            self._norm_weights = None if norm is None else _norm_weights(cast(nn.LayerNorm, norm))
            self._plain = {weight.dtype for weight in self._weights} == {torch.float32}

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., inputs of the first layer] -> [..., outputs of the last one], like the residual."""
        on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
        if self._plain and on_cpu and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            return perceptron(x, self._weights, self._biases, residual, self._norm_weights)
        for index, layer in enumerate(self._layers):
            x = layer(F.relu(x) if index else x)
        if isinstance(self._norm, SumLayerNorm):
            return self._norm(x, residual)
        x = x if residual is None else residual + x
        return x if self._norm is None else self._norm(x)


class SumLayerNorm(nn.LayerNorm):
    """A LayerNorm of x, or of residual + x, by `ops.layer_norm`: float32, whatever comes in."""

    backend = "auto"  # of the operation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        first, delta = (x, None) if residual is None else (residual, x)
        if self.weight is None or self.bias is None:
            return super().forward(first.float() if delta is None else first.float() + delta)
        more = None if delta is None else delta.reshape(-1, delta.shape[-1])
        rows = first.reshape(-1, first.shape[-1])
        weight, bias, of_rows = self.weight, self.bias, self.backend
        y, _ = layer_norm(rows, weight, bias, self.eps, delta=more, dtype=torch.float32, backend=of_rows)
        return y.view(first.shape)


def perceptron_of(module: nn.Module, norm: nn.Module | None = None, backend: str = "auto") -> Perceptron:
    """What a `MLP` or `MLPBlock`, or whatever is in its place, computes."""
    if type(module) is MLP and not module.sigmoid_output:
        return Perceptron(module.layers, norm, backend)
    if type(module) is MLPBlock and type(module.act) is nn.ReLU:
        return Perceptron((module.lin1, module.lin2), norm, backend)
    return Perceptron((module,), norm, backend)


def _norm_weights(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach(), norm.bias.detach(), norm.eps
