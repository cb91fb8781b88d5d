"""The encoder's kernels by launch parameters: attention in windows and over the whole image, and kernels of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from sam_fast.kernels import layer_norm as layer_norm_kernels
from sam_fast.kernels import quantise as quantise_kernels
from sam_fast.kernels import rel_pos_attention as kernels
from sam_fast.kernels.launch import architecture
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import CONFIGS
from benchmarks.trials.run import Run
from benchmarks.trials.timing import Call, error_of, randn, turns
from benchmarks.trials.variants import PRESENT, Case, Functions, launches, measure_cases, replaceable
from sam_fast.ops.layer_norm import layer_norm, layer_norm_e4m3, layer_norm_reference
from sam_fast.ops.quantise import quantise
from sam_fast.ops.rel_pos_attention import rel_pos_attention, rel_pos_attention_reference

_SCALE = math.log(2)  # of scores, with weights packed as the encoder's are
_rel_terms = kernels._rel_terms


def try_attention(run: Run) -> None:
    """Windows and global blocks of each model, with relative positions' terms made beforehand and timed apart."""
    cases = []
    for name in run.models:
        config = CONFIGS[name]
        side = config.image_size // config.patch_size
        for kind, window in (("windows", config.window_size), ("global", side)):
            for batch in run.batches:
                d = config.embed_dim // config.num_heads
                shape = batch, side, side, 3, config.num_heads, d
                cases += _attention_cases(run.device, f"{name} {kind}, batch {batch}", shape, window)
    functions = [(kernels, name) for name in ("_rel_terms", "window_launch", "long_launch")]
    with replaceable(*functions):
        measure_cases(run, "attention", cases)


def _attention_cases(device: torch.device, name: str, shape: tuple[int, ...], window: int) -> list[Case]:
    """Attention and its terms for qkv of a shape [B, H, W, 3, heads, d]."""
    batch, side, _, _, heads, d = shape
    square, small = (window, window), window <= kernels.LARGEST_SIDE
    inputs = [randn(device, *shape, scale=0.7, seed=seed) for seed in range(4 if batch == 1 else 2)]
    rel_h, rel_w = (randn(device, 2 * window - 1, d, scale=0.2, seed=10 + i) for i in range(2))
    tables = rel_h, rel_w
    made = {qkv.data_ptr(): _rel_terms(qkv, tables, square, small) for qkv in inputs}

    def attend(qkv: Tensor) -> Tensor:
        return rel_pos_attention(qkv, None, tables, square, scale=_SCALE, backend="triton")

    def error(got: Tensor) -> float:
        wide = rel_h.float(), rel_w.float()
        return error_of(got[:1], rel_pos_attention_reference(inputs[0][:1].float(), None, wide, square, _SCALE))

    if small:
        rows, columns = kernels._padded(square)
        present = kernels.window_launch(architecture(device), torch.bfloat16, rows * columns, d)
        variants = launches("window_launch", present, {"blocks": 2}, {"stages": 3 - present.stages}, {"boxes": False})
    else:
        present = kernels.long_launch(architecture(device), torch.bfloat16, window, d)
        variants = launches("long_launch", present, {"stages": 2}, {"stages": 4}, {"boxes": False})
    given: Functions = {"_rel_terms": lambda qkv, *_: made[qkv.data_ptr()]}
    windows = batch * math.ceil(side / window) ** 2
    attention = Case(
        name,
        work=4 * windows * window**4 * heads * d,
        unit="TFLOP/s",
        calls=[partial(attend, qkv) for qkv in inputs],
        error=error,
        variants={variant: {**given, **functions} for variant, functions in variants.items()},
        peers=_pytorch_attention(device, windows, heads, window * window, d) if batch == 1 else {},
    )
    terms = made[inputs[0].data_ptr()]
    written = sum(tensor.nbytes for tensor in ((terms,) if small else terms))
    terms_case = Case(
        f"{name}, terms",
        work=inputs[0].nbytes // 3 + written,
        unit="TB/s",
        calls=[partial(_rel_terms, qkv, tables, square, small) for qkv in inputs],
    )
    return [attention, terms_case]


def _pytorch_attention(
    device: torch.device, windows: int, heads: int, tokens: int, d: int
) -> dict[str, Sequence[Call]]:
    """scaled_dot_product_attention, with windows that were cut out and a bias that was made beforehand."""
    q, k, v = (randn(device, windows, heads, tokens, d, seed=seed) for seed in range(3))
    bias = torch.zeros(windows, heads, tokens, tokens, device=device, dtype=q.dtype)
    return {
        "PyTorch, no bias": [lambda: F.scaled_dot_product_attention(q, k, v)],
        "PyTorch, bias given": [lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)],
    }


def try_rows(run: Run) -> None:
    """LayerNorm of the residual stream and GELU with rounding to 8 bits, by warps."""
    cases = []
    for name in run.models:
        config = CONFIGS[name]
        rows = (config.image_size // config.patch_size) ** 2
        hidden = int(config.mlp_ratio * config.embed_dim)
        cases += _norm_cases(run.device, rows, config.embed_dim)
        cases.append(_rounding_case(run.device, rows, hidden))
    with replaceable((layer_norm_kernels, "row_options"), (quantise_kernels, "_options")):
        measure_cases(run, "rows", cases)


def _norm_cases(device: torch.device, rows: int, C: int) -> list[Case]:
    """To bfloat16 and to 8 bits, as the encoder has them, and beside PyTorch without a residual."""
    weight, bias, shift = (randn(device, C, dtype=torch.float32, seed=i) for i in range(3))
    streams = [randn(device, rows, C, dtype=torch.float32, seed=seed) for seed in turns(12 * rows * C)]
    deltas = [randn(device, rows, C, seed=100 + i) for i in range(len(streams))]
    narrow = [randn(device, rows, C, seed=seed) for seed in turns(4 * rows * C)]
    norm = weight, bias, 1e-6

    def of_stream(i: int) -> tuple[Tensor, Tensor]:
        return layer_norm(streams[i], *norm, shift=shift, delta=deltas[i], dtype=torch.bfloat16, backend="triton")

    def of_stream_e4m3(i: int) -> tuple[Tensor, Tensor, Tensor]:
        return layer_norm_e4m3(streams[i], *norm, shift=shift, delta=deltas[i], backend="triton")

    def of_rows(x: Tensor) -> Tensor:
        return layer_norm(x, *norm, backend="triton")[0]

    expected = cache(lambda: layer_norm_reference(streams[0], *norm, shift, deltas[0])[0])
    half_norm = weight.bfloat16(), bias.bfloat16(), 1e-6
    variants = _warps("row_options", layer_norm_kernels.row_options(C)["num_warps"])
    name = f"LayerNorm {rows} x {C}"
    return [
        Case(
            f"{name}, adds",
            work=12 * rows * C,
            unit="TB/s",
            calls=[partial(of_stream, i) for i in range(len(streams))],
            error=lambda got: error_of(got[0], expected()),
            variants=variants,
        ),
        Case(
            f"{name}, adds, to e4m3",
            work=11 * rows * C,
            unit="TB/s",
            calls=[partial(of_stream_e4m3, i) for i in range(len(streams))],
            error=lambda got: error_of(got[0].float() * got[1], expected()),
            variants=variants,
        ),
        Case(
            f"{name}, alone",
            work=4 * rows * C,
            unit="TB/s",
            calls=[partial(of_rows, x) for x in narrow],
            error=lambda got: error_of(got, layer_norm_reference(narrow[0], *norm)[0]),
            peers={"PyTorch": [partial(F.layer_norm, x, (C,), *half_norm) for x in narrow]},
        ),
    ]


def _rounding_case(device: torch.device, rows: int, C: int) -> Case:
    inputs = [randn(device, rows, C, seed=seed) for seed in turns(3 * rows * C)]
    return Case(
        f"GELU {rows} x {C}, to e4m3",
        work=3 * rows * C,
        unit="TB/s",
        calls=[partial(quantise, x, gelu=True, backend="triton") for x in inputs],
        error=lambda got: error_of(got[0].float() * got[1], F.gelu(inputs[0].float())),
        variants=_warps("_options", quantise_kernels._options(C)["num_warps"]),
    )


def _warps(function: str, present: int) -> dict[str, Functions]:
    """The present number of warps, half of it and twice as many."""

    def options(warps: int) -> Callable[[int], dict[str, int]]:
        return lambda _: {"num_warps": warps}

    others = {f"warps {warps}": {function: options(warps)} for warps in (present // 2, 2 * present)}
    return {PRESENT: {}, **others}
