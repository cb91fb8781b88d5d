"""The image encoder's attention: native code and Triton kernels against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relative_error
from torch import Tensor

from sam_fast.ops.rel_pos_attention import rel_pos_attention, rel_pos_attention_reference

TOLERANCE = 1e-5  # of float32 against float64; 1e-6 measured
# Weights of the softmax and output are rounded, each by 2^-9 at most. 2e-3 measured, of single tokens 3e-3.
NATIVE_BF16_TOLERANCE = 4e-3
# Of half precision: weights of the softmax, relative terms and output are rounded to it; 8e-3 and 1e-3 measured.
HALF_TOLERANCE = {torch.float32: TOLERANCE, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton kernels run; on a CPU they are interpreted


def problem(
    size: tuple[int, int], window: tuple[int, int], images: int = 1, heads: int = 2, d: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """qkv [B, H, W, 3, heads, d], bias [3 heads d], relative positions."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(images, *size, 3, heads, d, generator=generator)
    bias = torch.randn(3 * heads * d, generator=generator)
    rel_h, rel_w = (0.5 * torch.randn(2 * side - 1, d, generator=generator) for side in window)
    return qkv, bias, (rel_h, rel_w)


def problem_on(
    device: str, size: tuple[int, int], window: tuple[int, int], d: int = 16
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    qkv, bias, (rel_h, rel_w) = problem(size, window, d=d)
    return qkv.to(device), bias.to(device), (rel_h.to(device), rel_w.to(device))


def check(
    qkv: Tensor,
    bias: Tensor | None,
    rel_pos: tuple[Tensor, Tensor] | None,
    window: tuple[int, int],
    tolerance: float = TOLERANCE,
) -> None:
    got = rel_pos_attention(qkv, bias, rel_pos, window, backend="native")
    wide = None if rel_pos is None else (rel_pos[0].double(), rel_pos[1].double())
    expected = rel_pos_attention_reference(qkv.double(), None if bias is None else bias.double(), wide, window)
    assert got.shape == expected.shape and got.dtype == qkv.dtype
    assert relative_error(got.double(), expected) <= tolerance


CASES = {
    "windows of SAM, padded": dict(size=(20, 30), window=(14, 14), d=64),
    "windows that fit": dict(size=(16, 24), window=(8, 8), images=2),
    "whole image": dict(size=(24, 20), window=(24, 20), images=2, heads=3),
    "whole image, several tiles of keys and queries": dict(size=(64, 64), window=(64, 64), heads=1, d=8),
    "heads of 80": dict(size=(15, 9), window=(14, 14), d=80),
    "window larger than the image": dict(size=(3, 2), window=(14, 14)),
    "one token": dict(size=(1, 1), window=(1, 1)),
    "a row": dict(size=(1, 300), window=(1, 300), d=8),
    "a column": dict(size=(300, 1), window=(300, 1), d=8),
    "windows that are not square": dict(size=(9, 22), window=(4, 9)),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_native_equals_reference(name, threads, monkeypatch):
    monkeypatch.setattr("sam_fast.native.num_threads", lambda: threads)
    case = CASES[name]
    check(*problem(**case), case["window"])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_native_in_bfloat16(name, threads, monkeypatch):
    monkeypatch.setattr("sam_fast.native.num_threads", lambda: threads)
    case = CASES[name]
    qkv, bias, rel_pos = (x.bfloat16() if isinstance(x, Tensor) else x for x in problem(**case))
    rel_pos = tuple(table.bfloat16() for table in rel_pos)
    check(qkv, bias, rel_pos, case["window"], NATIVE_BF16_TOLERANCE)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_positions", [True, False])
def test_bias_and_positions_are_optional(with_bias, with_positions):
    qkv, bias, rel_pos = problem((9, 10), (7, 7))
    check(qkv, bias if with_bias else None, rel_pos if with_positions else None, (7, 7))


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    window=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    heads=st.integers(1, 3),
    d=st.sampled_from([8, 16, 24, 40]),
    seed=st.integers(0, 1000),
)
def test_any_shape(size, window, heads, d, seed):
    qkv, bias, (rel_h, rel_w) = problem(size, window, heads=heads, d=d, seed=seed)
    check(qkv, bias, (rel_h, rel_w), window)
    rel_pos = rel_h.bfloat16(), rel_w.bfloat16()
    check(qkv.bfloat16(), bias.bfloat16(), rel_pos, window, NATIVE_BF16_TOLERANCE)


def test_padding_takes_part():
    """Without the bias of padding tokens the last windows come out differently, the others do not."""
    qkv, bias, rel_pos = problem((10, 10), (7, 7))
    with_bias = rel_pos_attention(qkv, bias, rel_pos, (7, 7), backend="native")
    without = rel_pos_attention(qkv, None, rel_pos, (7, 7), backend="native")
    assert torch.equal(with_bias[:, :7, :7], without[:, :7, :7])
    assert relative_error(with_bias[:, 7:], without[:, 7:]) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_not_a_number_stays_in_its_window_and_head(dtype):
    qkv, bias, (rel_h, rel_w) = (x.to(dtype) if isinstance(x, Tensor) else x for x in problem((8, 16), (8, 8)))
    rel_pos = rel_h.to(dtype), rel_w.to(dtype)
    clean = rel_pos_attention(qkv, bias, rel_pos, (8, 8), backend="native")
    qkv[0, 3, 4, 1, 0, 0] = torch.nan  # a key
    got = rel_pos_attention(qkv, bias, rel_pos, (8, 8), backend="native")
    assert got[:, :, :8, :16].isnan().all()
    assert torch.equal(got[:, :, 8:], clean[:, :, 8:]) and torch.equal(got[:, :, :8, 16:], clean[:, :, :8, 16:])


def test_large_scores_do_not_overflow():
    qkv, bias, rel_pos = problem((20, 20), (20, 20))
    got = rel_pos_attention(100 * qkv, bias, rel_pos, (20, 20), backend="native")
    assert got.isfinite().all()
    wide = rel_pos[0].double(), rel_pos[1].double()
    expected = rel_pos_attention_reference(100 * qkv.double(), bias.double(), wide, (20, 20))
    assert relative_error(got.double(), expected) <= 1e-2  # scores of 10^5 are rounded to 1e-2 in float32


TRITON_CASES = {
    "windows of SAM, padded": dict(size=(15, 17), window=(14, 14), heads=1, d=16),
    "windows of SAM, heads of 80": dict(size=(9, 15), window=(14, 14), heads=2, d=80),
    "windows that fit": dict(size=(8, 16), window=(8, 8), images=2, d=32),
    "windows of 16": dict(size=(16, 18), window=(16, 16), heads=1),
    "windows of 16 rows": dict(size=(16, 9), window=(16, 5), heads=1),
    "windows of 16 columns": dict(size=(7, 20), window=(3, 16), heads=1),
    "one token": dict(size=(1, 1), window=(1, 1), heads=1),
    "heads of 48": dict(size=(3, 4), window=(2, 3), d=48),
    "heads of 96": dict(size=(3, 4), window=(3, 3), d=96),
    "heads of 128": dict(size=(3, 2), window=(3, 3), heads=1, d=128),
    "whole image": dict(size=(3, 20), window=(3, 20), images=2),
    "whole image, heads of 80": dict(size=(2, 32), window=(2, 32), heads=1, d=80),
    "whole image, wide": dict(size=(2, 70), window=(2, 70), heads=1),
    "whole image, tall": dict(size=(40, 2), window=(40, 2), heads=1),
    "large windows, padded": dict(size=(3, 22), window=(2, 17), heads=1),
}


def check_triton(name: str, dtype: torch.dtype, *, with_positions: bool = True, scale: float | None = None) -> None:
    case = TRITON_CASES[name]
    qkv, _, tables = (x.to(dtype) if isinstance(x, Tensor) else x for x in problem(**case))
    rel_pos = tuple(table.to(dtype) for table in tables) if with_positions else None
    on_device = None if rel_pos is None else tuple(table.to(DEVICE) for table in rel_pos)
    got = rel_pos_attention(qkv.to(DEVICE), None, on_device, case["window"], scale=scale, backend="triton").cpu()
    wide = None if rel_pos is None else (rel_pos[0].double(), rel_pos[1].double())
    expected = rel_pos_attention_reference(qkv.double(), None, wide, case["window"], scale)
    assert got.dtype == dtype and got.shape == expected.shape
    assert relative_error(got.double(), expected) <= HALF_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TRITON_CASES)
def test_triton_equals_reference(name, dtype):
    check_triton(name, dtype)


@pytest.mark.parametrize("name", ["windows of SAM, padded", "windows of 16", "whole image", "large windows, padded"])
def test_triton_in_fp16_without_positions_and_with_a_scale(name):
    check_triton(name, torch.float16, with_positions=False)
    check_triton(name, torch.float16, scale=0.6931471805599453)  # ln 2, as the packed encoder asks for


@pytest.mark.parametrize("name", ["windows of SAM, padded", "whole image"])
def test_triton_writes_all_and_nothing_else(name, monkeypatch):
    """The output begins as NaN; what lies beside the input is never read into it."""
    from sam_fast.ops import rel_pos_attention as module

    fake = module._rel_pos_attention_fake
    monkeypatch.setattr(module, "_rel_pos_attention_fake", lambda qkv: fake(qkv).fill_(torch.nan))
    check_triton(name, torch.float32)
    check_triton(name, torch.bfloat16)


@pytest.mark.parametrize("window", [(4, 4), (3, 20)])
def test_triton_keeps_not_a_number_in_its_window_and_head(window):
    size = (window[0], 2 * window[1])
    qkv, _, rel_pos = problem(size, window)
    arguments = None, tuple(table.to(DEVICE) for table in rel_pos), window
    clean = rel_pos_attention(qkv.to(DEVICE), *arguments, backend="triton")
    qkv[0, 1, 2, 1, 0, 0] = torch.nan  # a key
    got = rel_pos_attention(qkv.to(DEVICE), *arguments, backend="triton")
    assert got[:, :, : window[1], :16].isnan().all()
    assert torch.equal(got[:, :, window[1] :], clean[:, :, window[1] :])
    assert torch.equal(got[:, :, : window[1], 16:], clean[:, :, : window[1], 16:])


def test_triton_refuses_what_it_cannot_do():
    qkv, bias, rel_pos = problem_on(DEVICE, (3, 4), (2, 2))
    with pytest.raises(ValueError, match="no qkv_bias"):
        rel_pos_attention(qkv, bias, rel_pos, (2, 2), backend="triton")
    with pytest.raises(ValueError, match="heads as wide as"):
        rel_pos_attention(problem_on(DEVICE, (4, 4), (2, 2), d=24)[0], None, None, (2, 2), backend="triton")
    with pytest.raises(ValueError, match="one type"):
        rel_pos_attention(qkv.half(), None, rel_pos, (2, 2), backend="triton")


def test_bad_input():
    qkv, bias, rel_pos = problem((8, 8), (8, 8))
    with pytest.raises(ValueError, match="qkv must be"):
        rel_pos_attention(qkv[0], bias, rel_pos, (8, 8))
    with pytest.raises(ValueError, match="do not fit"):
        rel_pos_attention(qkv, bias, rel_pos, (7, 8))
    for backend in ("native", "triton", "torch"):
        for width in (1, 2 * qkv.shape[5]):
            with pytest.raises(ValueError, match="do not fit"):
                tables = tuple(table[:, :1].repeat(1, width) for table in rel_pos)
                rel_pos_attention(qkv, None, tables, (8, 8), backend=backend)
    with pytest.raises(ValueError, match="float32"):
        rel_pos_attention(qkv.double(), bias.double(), None, (8, 8), backend="native")
    with pytest.raises(ValueError, match="wrong size"):
        rel_pos_attention(qkv, bias[:-1], rel_pos, (8, 8), backend="native")
    odd, bias, rel_pos = problem((8, 8), (8, 8), d=12)
    with pytest.raises(ValueError, match="multiple of 8"):
        rel_pos_attention(odd, bias, rel_pos, (8, 8), backend="native")
    assert rel_pos_attention(odd, bias, rel_pos, (8, 8)).shape == (1, 8, 8, 24)  # auto: PyTorch's


@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_operator_is_registered_well(backend):
    qkv, bias, rel_pos = problem_on(DEVICE if backend == "triton" else "cpu", (4, 8), (4, 4))
    for arguments in ((qkv, bias, *rel_pos), (qkv, None, None, None)):
        torch.library.opcheck(torch.ops.sam_fast.rel_pos_attention.default, (*arguments, 4, 4, 0.25, backend))


def test_compiles_as_one_graph():
    qkv, bias, rel_pos = problem((5, 6), (4, 4))
    compiled = torch.compile(
        lambda q, b, r: 2 * rel_pos_attention(q, b, r, (4, 4)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(qkv, bias, rel_pos), 2 * rel_pos_attention(qkv, bias, rel_pos, (4, 4)))
