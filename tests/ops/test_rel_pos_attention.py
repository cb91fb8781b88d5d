"""The image encoder's attention: native code against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relative_error
from torch import Tensor

from sam_fast.ops.rel_pos_attention import rel_pos_attention, rel_pos_attention_reference

TOLERANCE = 1e-5  # of float32 against float64; 1e-6 measured


def problem(
    size: tuple[int, int], window: tuple[int, int], images: int = 1, heads: int = 2, d: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """qkv [B, H, W, 3, heads, d], bias [3 heads d], relative positions."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(images, *size, 3, heads, d, generator=generator)
    bias = torch.randn(3 * heads * d, generator=generator)
    rel_h, rel_w = (0.5 * torch.randn(2 * side - 1, d, generator=generator) for side in window)
    return qkv, bias, (rel_h, rel_w)


def check(qkv: Tensor, bias: Tensor | None, rel_pos: tuple[Tensor, Tensor] | None, window: tuple[int, int]) -> None:
    got = rel_pos_attention(qkv, bias, rel_pos, window, backend="native")
    wide = None if rel_pos is None else (rel_pos[0].double(), rel_pos[1].double())
    expected = rel_pos_attention_reference(qkv.double(), None if bias is None else bias.double(), wide, window)
    assert got.shape == expected.shape
    assert relative_error(got.double(), expected) <= TOLERANCE


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
    check(*problem(size, window, heads=heads, d=d, seed=seed), window)


def test_padding_takes_part():
    """Without the bias of padding tokens the last windows come out differently, the others do not."""
    qkv, bias, rel_pos = problem((10, 10), (7, 7))
    with_bias = rel_pos_attention(qkv, bias, rel_pos, (7, 7), backend="native")
    without = rel_pos_attention(qkv, None, rel_pos, (7, 7), backend="native")
    assert torch.equal(with_bias[:, :7, :7], without[:, :7, :7])
    assert relative_error(with_bias[:, 7:], without[:, 7:]) > 0.1


def test_large_scores_do_not_overflow():
    qkv, bias, rel_pos = problem((20, 20), (20, 20))
    got = rel_pos_attention(100 * qkv, bias, rel_pos, (20, 20), backend="native")
    assert got.isfinite().all()
    wide = rel_pos[0].double(), rel_pos[1].double()
    expected = rel_pos_attention_reference(100 * qkv.double(), bias.double(), wide, (20, 20))
    assert relative_error(got.double(), expected) <= 1e-2  # scores of 10^5 are rounded to 1e-2 in float32


def test_not_a_number_stays_in_its_window_and_head():
    qkv, bias, rel_pos = problem((8, 16), (8, 8))
    clean = rel_pos_attention(qkv, bias, rel_pos, (8, 8), backend="native")
    qkv[0, 3, 4, 1, 0, 0] = torch.nan  # a key
    got = rel_pos_attention(qkv, bias, rel_pos, (8, 8), backend="native")
    assert got[:, :, :8, :16].isnan().all()
    assert torch.equal(got[:, :, 8:], clean[:, :, 8:]) and torch.equal(got[:, :, :8, 16:], clean[:, :, :8, 16:])


def test_bad_input():
    qkv, bias, rel_pos = problem((8, 8), (8, 8))
    with pytest.raises(ValueError, match="qkv must be"):
        rel_pos_attention(qkv[0], bias, rel_pos, (8, 8))
    with pytest.raises(ValueError, match="do not fit"):
        rel_pos_attention(qkv, bias, rel_pos, (7, 8))
    with pytest.raises(ValueError, match="float32"):
        rel_pos_attention(qkv.double(), bias.double(), None, (8, 8), backend="native")
    with pytest.raises(ValueError, match="wrong size"):
        rel_pos_attention(qkv, bias[:-1], rel_pos, (8, 8), backend="native")
    odd, bias, rel_pos = problem((8, 8), (8, 8), d=12)
    with pytest.raises(ValueError, match="multiple of 8"):
        rel_pos_attention(odd, bias, rel_pos, (8, 8), backend="native")
    assert rel_pos_attention(odd, bias, rel_pos, (8, 8)).shape == (1, 8, 8, 24)  # auto: PyTorch's


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_operator_is_registered_well(backend):
    qkv, bias, rel_pos = problem((5, 6), (4, 4))
    for arguments in ((qkv, bias, *rel_pos), (qkv, None, None, None)):
        torch.library.opcheck(torch.ops.sam_fast.rel_pos_attention.default, (*arguments, 4, 4, backend))


def test_compiles_as_one_graph():
    qkv, bias, rel_pos = problem((5, 6), (4, 4))
    compiled = torch.compile(
        lambda q, b, r: 2 * rel_pos_attention(q, b, r, (4, 4)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(qkv, bias, rel_pos), 2 * rel_pos_attention(qkv, bias, rel_pos, (4, 4)))
