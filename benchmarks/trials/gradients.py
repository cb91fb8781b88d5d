"""Layers of training with their gradients: kernels made for them by launch parameters, and PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from sam_fast.kernels import few_tokens_attention as kernels
from sam_fast.kernels.training_rows import column_sums
from torch import Tensor
from torch.nn import functional as F

from benchmarks.trials.run import Run
from benchmarks.trials.timing import error_of, randn
from benchmarks.trials.variants import Case, launches, measure_cases, replaceable
from sam_fast.training.rows import FastRows

_PIXELS = 256  # of an embedding: images of 256 px
_HEADS, _CHANNELS = 8, 16
_TOKENS = 8  # the decoder's own five, and a box or two clicks, and one more
_SETS = 2  # of inputs, each too large for a cache


def try_gradients(run: Run) -> None:
    """Attention either way, LayerNorm of the decoder's pixels, and sums of gradients, of many prompts together."""
    N = run.prompts[-1]
    with replaceable((kernels, "read_launch"), (kernels, "write_launch")):
        cases = [
            _attention_case(run.device, N, "read_launch", kernels.read_launch()),
            _attention_case(run.device, N, "write_launch", kernels.write_launch()),
            _norm_case(run.device, 4 * N * _PIXELS, 64),
            _norm_case(run.device, N * _PIXELS, 256),
            _sums_case(run.device, N * _PIXELS, 256),
        ]
        measure_cases(run, "gradients", cases)


def _attention_case(device: torch.device, N: int, launch: str, present: kernels.Launch) -> Case:
    """Tokens that read pixels, or pixels that take from tokens."""
    reads = launch == "read_launch"
    lengths = (_TOKENS, _PIXELS, _PIXELS) if reads else (_PIXELS, _TOKENS, _TOKENS)
    shapes = [(N, length, _HEADS, _CHANNELS) for length in lengths]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    tensors = 6 if reads else 5  # of pixels, read or written: by the result, and by gradients
    return _case(
        device,
        f"{'tokens read' if reads else 'pixels take'}, {N} prompts",
        work=tensors * 2 * N * _PIXELS * _HEADS * _CHANNELS,
        function=attention,
        shapes=shapes,
        result=shapes[0],
        variants=launches(launch, present, *({"pixels": p, "warps": w} for p, w in ((64, 1), (64, 2), (128, 4)))),
    )


def _norm_case(device: torch.device, rows: int, C: int) -> Case:
    return _case(
        device,
        f"LayerNorm {rows} x {C}",
        work=5 * 2 * rows * C,
        function=lambda x, weight, bias: F.layer_norm(x, (C,), weight, bias),
        shapes=[(rows, C), (C,), (C,)],
        result=(rows, C),
    )


def _sums_case(device: torch.device, rows: int, C: int) -> Case:
    inputs = [randn(device, rows, C, seed=seed) for seed in range(_SETS)]
    return Case(
        f"sums of {rows} x {C}",
        work=2 * rows * C,
        unit="TB/s",
        calls=[partial(column_sums, x) for x in inputs],
        error=lambda got: error_of(got, inputs[0].double().sum(0)),
        peers={"PyTorch": [partial(x.sum, 0) for x in inputs]},
    )


def _case(
    device: torch.device,
    name: str,
    work: int,
    function: Callable[..., Tensor],
    shapes: Sequence[tuple[int, ...]],
    result: tuple[int, ...],
    variants: dict | None = None,
) -> Case:
    """A function of tensors of these shapes: the gradients of all of them for one of its result."""
    sets = [[randn(device, *shape, seed=10 * s + i) for i, shape in enumerate((*shapes, result))] for s in range(_SETS)]

    def differentiate(mode: Callable[[], AbstractContextManager[object]], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in tensors[:-1]]
            with mode():
                y = function(*inputs)
            return torch.autograd.grad(y, inputs, tensors[-1])

    def error(got: tuple[Tensor, ...]) -> float:
        expected = differentiate(nullcontext, [x.float() for x in sets[0]])
        return max(map(error_of, got, expected))

    return Case(
        f"{name}, with gradients",
        work=work,
        unit="TB/s",
        calls=[partial(differentiate, FastRows, tensors) for tensors in sets],
        error=error,
        variants=variants or {"present": {}},
        peers={"PyTorch": [partial(differentiate, nullcontext, tensors) for tensors in sets]},
    )
