"""A perceptron on few rows, such as a prompt's tokens: for these, PyTorch's linear layers are several times slower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_fast import native
from sam_fast.ops.backend import choose_backend
from sam_fast.ops.library import register

_LANES = 8  # widths that are multiplied or normalised come in eights


def perceptron(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm(residual + Ln(relu(... relu(L1(x))))), with Li(x) = x Wi^T + bi.

    Args:
        x: [..., K].
        weights: of each layer, [outputs, inputs]; at least one.
        biases: of each layer, [outputs].
        residual: [..., outputs of the last layer], or None.
        norm: weight, bias and epsilon of the LayerNorm, or None.
        backend: "native", "torch" or "auto". Native takes float32 and widths in eights, of inputs and of what is
            normalised; what it does not take, auto leaves to PyTorch.

    Returns:
        [..., outputs of the last layer].

    Raises:
        ValueError: there is no layer, a residual has another shape than the result, or the backend that was asked for
            cannot take these.
    """
    if not weights or len(weights) != len(biases):
        raise ValueError(f"got {len(weights)} weights and {len(biases)} biases")
    if residual is not None and residual.shape != (*x.shape[:-1], len(weights[-1])):
        raise ValueError(f"residual must be {[*x.shape[:-1], len(weights[-1])]}, got {list(residual.shape)}")
    arguments = x, list(weights), list(biases), residual, *(norm or (None, None, 0.0)), backend
    if torch.compiler.is_compiling():
        return torch.ops.sam_fast.perceptron(*arguments)
    return _perceptron(*arguments)


def perceptron_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """`perceptron` in PyTorch."""
    for index, layer in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(F.relu(x) if index else x, *layer)
    if residual is not None:
        x = residual + x
    return x if norm is None else F.layer_norm(x, norm[0].shape, *norm)


def _perceptron(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    rest = [t for t in (residual, norm_weight, norm_bias) if t is not None]
    tensors = [x, *weights, *biases, *rest]
    widths = [x.shape[-1], *map(len, weights[:-1]), *([] if norm_weight is None else [len(weights[-1])])]
    fits = all(t.dtype == torch.float32 for t in tensors) and not any(width % _LANES for width in widths)
    takes = {"native": None if fits else "float32 and widths in eights"}
    if choose_backend("perceptron", backend, *tensors, takes=takes) == "torch":
        norm = None if norm_weight is None or norm_bias is None else (norm_weight, norm_bias, eps)
        return perceptron_reference(x, weights, biases, residual, norm)
    output = x.new_empty(*x.shape[:-1], len(weights[-1]))
    native.module().perceptron(
        output.view(-1, output.shape[-1]),
        x.contiguous().view(-1, x.shape[-1]),
        [weight.contiguous() for weight in weights],
        [bias.contiguous() for bias in biases],
        None if residual is None else residual.contiguous().view(-1, residual.shape[-1]),
        norm_weight,
        norm_bias,
        eps,
        native.num_threads(),
    )
    return output


def _perceptron_fake(x: Tensor, weights: list[Tensor], biases: list[Tensor], *rest: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weights[-1]))


register(
    "perceptron(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, str backend) -> Tensor",
    _perceptron,
    _perceptron_fake,
)
