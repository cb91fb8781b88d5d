"""Self-attention of few tokens: the Triton kernel and PyTorch against float64."""

from __future__ import annotations

import pytest
import torch
from oracle import relative_error
from torch import Tensor

from sam_fast.ops.token_attention import token_attention, token_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "torch"]
# Of the largest result, against float64 on the same rounded inputs: shares and results are rounded (2^-9, 2^-12).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
SHAPES = {  # prompts, tokens, heads, channels of a head
    "the decoder's": (3, 7, 8, 32),
    "one token": (2, 1, 2, 16),
    "most tokens": (1, 16, 3, 64),
    "one prompt": (1, 9, 1, 16),
}


def problem(prompts: int, tokens: int, heads: int, channels: int, dtype: torch.dtype, scale: float = 2.0) -> Tensor:
    """Queries, keys and values side by side."""
    generator = torch.Generator().manual_seed(prompts + tokens)
    return (scale * torch.randn(prompts, tokens, 3 * heads * channels, generator=generator)).to(DEVICE, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64(name, dtype, backend):
    shape = SHAPES[name]
    q, k, v = problem(*shape, dtype).chunk(3, dim=2)
    result = token_attention(q, k, v, shape[2], backend=backend)
    expected = token_attention_reference(q.double(), k.double(), v.double(), shape[2])
    assert result.dtype == dtype and result.shape == q.shape and result.is_contiguous()
    assert relative_error(result.double(), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_of_any_strides(backend):
    q, k, v = problem(3, 7, 2, 16, torch.float32).chunk(3, dim=2)
    expected = token_attention(*(x.contiguous() for x in (q, k, v)), 2, backend=backend)
    spread = torch.stack([k, k], -1)[..., 0]
    turned = v.transpose(0, 1).contiguous().transpose(0, 1)
    for given in ((q, k, v), (q, spread, v), (q, k, turned)):
        torch.testing.assert_close(token_attention(*given, 2, backend=backend), expected, rtol=1e-5, atol=1e-5)
    once = q[:1].expand(3, -1, -1)
    expected = token_attention(once.contiguous(), k, v, 2, backend=backend)
    torch.testing.assert_close(token_attention(once, k, v, 2, backend=backend), expected, rtol=1e-5, atol=1e-5)


def test_large_scores_and_not_a_number():
    qkv = problem(3, 7, 2, 16, torch.float32, scale=1e3)
    clean = token_attention(*qkv.chunk(3, dim=2), 2, backend="triton")
    assert clean.isfinite().all()
    qkv[1, 3, 32] = torch.nan  # a key of head 0 of prompt 1
    got = token_attention(*qkv.chunk(3, dim=2), 2, backend="triton")
    assert got[1, :, :16].isnan().all()
    assert torch.equal(got[1, :, 16:], clean[1, :, 16:]) and torch.equal(got[::2], clean[::2])


def test_what_triton_does_not_take_is_left_to_pytorch():
    for shape in ((2, 17, 2, 16), (2, 7, 2, 8)):
        q, k, v = problem(*shape, torch.float32).chunk(3, dim=2)
        with pytest.raises(ValueError, match="the triton token_attention takes 16 tokens"):
            token_attention(q, k, v, 2, backend="triton")
        expected = token_attention_reference(q.double(), k.double(), v.double(), 2)
        assert relative_error(token_attention(q, k, v, 2).double(), expected) <= 1e-5


def test_bad_shapes():
    x = torch.zeros(2, 3, 32)
    for q, k, heads in ((x[0], x[0], 2), (x, x[:, :2], 2), (x, x, 3), (x, x, 0)):
        with pytest.raises(ValueError, match="must be"):
            token_attention(q, k, k, heads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing(backend):
    for shape in ((0, 7, 32), (2, 0, 32)):
        x = torch.zeros(shape, device=DEVICE)
        assert token_attention(x, x, x, 2, backend=backend).shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    q, k, v = problem(2, 5, 2, 16, torch.float32).chunk(3, dim=2)
    torch.library.opcheck(torch.ops.sam_fast.token_attention.default, (q, k, v, 2, backend))


def test_fullgraph_compile():
    q, k, v = problem(2, 5, 2, 16, torch.float32).chunk(3, dim=2)
    compiled = torch.compile(lambda *x: token_attention(*x, 2) + 1, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), token_attention(q, k, v, 2) + 1)
