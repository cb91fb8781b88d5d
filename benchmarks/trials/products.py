"""What memory and tensor cores reach, and the encoder's products: cuBLAS, in the encoder's ways and in others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.peers import CONFIGS
from benchmarks.trials.run import Run
from benchmarks.trials.timing import Call, randn
from benchmarks.trials.variants import Case, measure_cases

_E4M3 = torch.float8_e4m3fn


def try_ceilings(run: Run) -> None:
    """A copy, a sum, and square products; small ones on a CPU."""
    device = run.device
    large = device.type == "cuda"
    source = torch.zeros(1 << (29 if large else 12), dtype=torch.bfloat16, device=device)
    target, numbers = torch.empty_like(source), source[: len(source) // 2].view(torch.float32)
    side = 8192 if large else 64
    a, b = (randn(device, side, side, seed=seed) for seed in range(2))
    a8, b8 = a.to(_E4M3), b.to(_E4M3)
    rows, tensor = torch.full((side, 1), 0.5, device=device), torch.tensor(0.5, device=device)
    products: dict[str, Sequence[Call]] = {
        "bf16": [lambda: a @ b.t()],
        "e4m3, scales of rows": [lambda: _product_of_8_bits(a8, b8, rows, rows.t())],
        "e4m3, scales of tensors": [lambda: _product_of_8_bits(a8, b8, tensor, tensor)],
    }
    copy: dict[str, Sequence[Call]] = {"PyTorch": [lambda: target.copy_(source)]}
    cases = [
        Case(f"copy of {source.nbytes >> 20} MiB", 2 * source.nbytes, "TB/s", peers=copy),
        Case(f"sum of {numbers.nbytes >> 20} MiB", numbers.nbytes, "TB/s", peers={"PyTorch": [numbers.sum]}),
        Case(f"{side}^3", 2 * side**3, "TFLOP/s", peers=products),
    ]
    measure_cases(run, "ceilings", cases)


def try_products(run: Run) -> None:
    """The four of a transformer block, with what they do to their result on the way, and without."""
    cases = []
    for batch in run.batches:
        for name in run.models:
            config = CONFIGS[name]
            C, hidden = config.embed_dim, int(config.mlp_ratio * config.embed_dim)
            rows = batch * (config.image_size // config.patch_size) ** 2
            layers = {"qkv": (C, 3 * C), "proj": (C, C), "lin1": (C, hidden), "lin2": (hidden, C)}
            cases += [
                Case(
                    f"{name} {layer}, batch {batch}",
                    work=2 * rows * inputs * outputs,
                    unit="TFLOP/s",
                    peers=_products(run.device, layer, rows, inputs, outputs),
                )
                for layer, (inputs, outputs) in layers.items()
            ]
    measure_cases(run, "products", cases)


def _products(device: torch.device, layer: str, rows: int, inputs: int, outputs: int) -> dict[str, Sequence[Call]]:
    """Ways to multiply, the encoder's first; biases of proj and lin2 are in the LayerNorm after them."""
    x, w = (
        [randn(device, count, inputs, scale=scale, seed=seed) for seed in range(2)]
        for count, scale in ((rows, 1.0), (outputs, 0.02))
    )
    narrow = [(a.to(_E4M3), b.to(_E4M3)) for a, b in zip(x, w, strict=True)]
    bias = randn(device, outputs, seed=30) if layer in ("qkv", "lin1") else None
    of_rows, of_outputs = torch.full((rows, 1), 0.5, device=device), torch.full((1, outputs), 0.5, device=device)
    of_tensor = torch.tensor(0.5, device=device)

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        if bias is None:
            return a @ b.t()
        if layer == "lin1":
            return torch._addmm_activation(bias, a, b.t(), use_gelu=True)
        return torch.addmm(bias, a, b.t())

    ways: dict[str, Sequence[Call]] = {"bf16": [partial(multiply, a, b) for a, b in zip(x, w, strict=True)]}
    if bias is not None:
        ways["bf16, the product alone"] = [partial(torch.mm, a, b.t()) for a, b in zip(x, w, strict=True)]
    for name, scales in (("rows", (of_rows, of_outputs)), ("tensors", (of_tensor, of_tensor))):
        ways[f"e4m3, scales of {name}"] = [partial(_product_of_8_bits, a, b, *scales, bias) for a, b in narrow]
    return ways


def _product_of_8_bits(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T in bfloat16, summed as the encoder's are."""
    return torch._scaled_mm(a, b.t(), a_scales, b_scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=a.is_cuda)
