"""The image side of two-way attention: native code against PyTorch, and PyTorch against attention as it is written."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from oracle import relative_error
from torch import Tensor

from sam_fast.modeling.transformer import Attention
from sam_fast.ops.two_way_attention import Write, two_way_attention, two_way_attention_reference

two_way = sys.modules[Write.__module__]  # whose name in the package is that of its function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton kernels run; on a CPU they are interpreted
TOLERANCE = 1e-5  # of float32 against float64; 1e-6 measured
# Of a bfloat16 image: what is written is rounded to it (1.7e-3), what is multiplied before that; 5e-3 measured.
BF16_TOLERANCE = 8e-3


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def problem(
    prompts: int,
    pixels: int,
    channels: int,
    tokens: int,
    readers: int,
    *,
    shared: bool,
    projected: bool,
    heads: int = 8,
) -> tuple[Tensor, Tensor, Write | None, Tensor | None]:
    """Random arguments; without tokens there is no write, without readers no read."""
    image = random(1 if shared else prompts, pixels, channels, seed=1)
    pe = random(pixels, channels, seed=2)
    write = None
    if tokens:
        R, width = heads * tokens, 16
        rest = (
            random(prompts, R, channels, seed=3),
            random(channels, seed=4),
            1 + random(channels, seed=5, scale=0.1),
            random(channels, seed=6),
            1e-5,
        )
        if projected:
            keys = random(prompts, tokens, width, heads, seed=7, scale=0.5)
            write = Write(*rest, queries=random(pixels, width, heads, seed=8), keys=keys)
        else:
            absorbed = random(prompts, channels, R, seed=9, scale=channels**-0.5)
            write = Write(*rest, absorbed_keys=absorbed, constant=random(prompts, R, seed=10))
    queries = random(prompts, channels, heads * readers, seed=11, scale=3 * channels**-0.5) if readers else None
    return image, pe, write, queries


def converted(arguments: tuple, to: torch.dtype | str) -> tuple:
    image, pe, write, queries = arguments
    write = None if write is None else Write(*(x.to(to) if isinstance(x, Tensor) else x for x in write))
    return image.to(to), pe.to(to), write, None if queries is None else queries.to(to)


def in_float64(arguments: tuple) -> tuple:
    return converted(arguments, torch.float64)


def for_backend(backend: str, arguments: tuple) -> tuple:
    """Arguments where that backend runs."""
    return converted(arguments, DEVICE if backend == "triton" else "cpu")


CASES = {
    "many prompts": ((9, 100, 64, 7, 5), {}),
    "one prompt, shared out": ((1, 1000, 256, 7, 7), {}),
    "one image each": ((3, 97, 256, 7, 5), {"shared": False}),
    "projected queries": ((3, 130, 256, 7, 7), {"projected": True}),
    "one token, one pixel": ((2, 1, 8, 1, 1), {}),
    "many tokens": ((1, 49, 24, 16, 16), {}),
    "more readers than tokens": ((2, 60, 32, 2, 9), {}),
    "nobody reads": ((2, 60, 32, 3, 0), {}),
    "nobody writes": ((2, 60, 40, 0, 3), {"shared": False}),
    "nobody writes into one image": ((4, 60, 40, 0, 3), {}),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_native_equals_reference(name, threads, monkeypatch):
    shape, options = CASES[name]
    arguments = problem(*shape, **{"shared": True, "projected": False, **options})
    monkeypatch.setattr("sam_fast.native.num_threads", lambda: threads)
    written, read = two_way_attention(*arguments, 8, backend="native")
    expected, expected_read = two_way_attention_reference(*in_float64(arguments), 8)
    assert written.shape == expected.shape and relative_error(written.double(), expected) <= TOLERANCE
    if expected_read is None:
        assert read is None
    else:
        assert read is not None and read.shape == expected_read.shape
        assert relative_error(read.double(), expected_read) <= TOLERANCE


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_native_with_an_image_in_bfloat16(name, threads, monkeypatch):
    shape, options = CASES[name]
    image, *rest = problem(*shape, **{"shared": True, "projected": False, **options})
    arguments = image.bfloat16(), *rest
    monkeypatch.setattr("sam_fast.native.num_threads", lambda: threads)
    written, read = two_way_attention(*arguments, 8, backend="native")
    expected, expected_read = two_way_attention_reference(*in_float64(arguments), 8)
    assert written.dtype == torch.bfloat16 and written.shape == expected.shape
    assert relative_error(written.double(), expected) <= BF16_TOLERANCE
    if read is not None and expected_read is not None:
        assert read.dtype == torch.float32 and read.shape == expected_read.shape
        assert relative_error(read.double(), expected_read) <= BF16_TOLERANCE
    reference = two_way_attention(*arguments, 8, backend="torch")
    assert [x if x is None else x.dtype for x in reference] == [x if x is None else x.dtype for x in (written, read)]


def test_large_scores_do_not_overflow():
    image, pe, write, queries = problem(2, 200, 64, 7, 7, shared=True, projected=False)
    assert write is not None and queries is not None and write.absorbed_keys is not None
    write = write._replace(absorbed_keys=300 * write.absorbed_keys)
    arguments = (image, pe, write, 300 * queries)
    got = two_way_attention(*arguments, 8, backend="native")
    expected = two_way_attention_reference(*in_float64(arguments), 8)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours is not None and theirs is not None and ours.isfinite().all()
        assert relative_error(ours.double(), theirs) <= 1e-3  # scores of some thousands, rounded to 1e-4, are exponents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_image_is_left_alone_and_not_a_number_stays_in_its_prompt(dtype):
    image, pe, write, queries = problem(2, 60, 32, 3, 3, shared=False, projected=False)
    image = image.to(dtype)
    image[1, 5] = torch.nan
    before = image.clone()
    written, read = two_way_attention(image, pe, write, queries, 8, backend="native")
    assert torch.equal(image.nan_to_num(7), before.nan_to_num(7))
    assert read is not None and written[0].isfinite().all() and read[0].isfinite().all()
    assert written[1, 5].isnan().all() and written[1, 6].isfinite().all()
    assert read[1].isnan().all()


@torch.no_grad()
def test_reference_is_attention():
    """Absorbed products against an attention that projects the image."""
    torch.manual_seed(0)
    attention = Attention(64, 8, 2).double()
    image, pe = random(2, 30, 64).double(), random(1, 30, 64, seed=1).double()
    tokens = random(2, 5, 64, seed=2).double()
    q = attention._heads(attention.q_proj(tokens)) * 4**-0.5
    absorbed = (q @ attention.k_proj.weight.unflatten(0, (8, -1))).transpose(1, 2).flatten(1, 2).transpose(1, 2)
    _, read = two_way_attention_reference(image, pe[0], None, absorbed, 8)
    assert read is not None
    values = read.unflatten(1, (5, 8)).transpose(1, 2) @ attention.v_proj.weight.unflatten(0, (8, -1)).transpose(1, 2)
    got = attention.out_proj(values.transpose(1, 2).flatten(2) + attention.v_proj.bias)
    assert relative_error(got, attention(tokens, image + pe, image)) <= 1e-12


def test_bad_input():
    image, pe, write, queries = problem(2, 60, 32, 3, 3, shared=True, projected=False)
    with pytest.raises(ValueError, match="pe must be"):
        two_way_attention(image, pe[:-1], write, queries, 8)
    with pytest.raises(ValueError, match="must have pixels"):
        two_way_attention(image[:, :0], pe[:0], write, queries, 8)
    with pytest.raises(ValueError, match="8 heads"):
        two_way_attention(image, pe, write, queries, 4, backend="native")
    with pytest.raises(ValueError, match="float32"):
        two_way_attention(*in_float64((image, pe, write, queries)), 8, backend="native")
    assert write is not None
    with pytest.raises(ValueError, match="wrong size"):
        two_way_attention(image, pe, write._replace(bias=write.bias[:-8]), queries, 8, backend="native")
    written, _ = two_way_attention(*in_float64((image, pe, write, queries)), 8)  # auto: float64 is PyTorch's
    assert written.dtype == torch.float64


def test_bad_input_of_triton():
    arguments = for_backend("triton", problem(2, 60, 32, 3, 3, shared=True, projected=False))
    image, pe, write, queries = arguments
    assert write is not None and queries is not None and write.constant is not None

    def run(*changed, heads=8):
        return two_way_attention(*changed, heads, backend="triton")

    with pytest.raises(ValueError, match=r"8 heads.*got 4"):
        run(*arguments, heads=4)
    with pytest.raises(ValueError, match="float64"):
        run(*in_float64(arguments))
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):  # what is multiplied has one type
        run(image, pe, write, queries.bfloat16())
    with pytest.raises(ValueError, match="16 tokens"):
        run(*for_backend("triton", problem(2, 60, 32, 17, 3, shared=True, projected=False)))
    for name in ("offered", "bias", "norm_weight", "norm_bias", "absorbed_keys", "constant"):
        with pytest.raises(ValueError, match=f"{name} has the wrong size"):
            run(image, pe, write._replace(**{name: getattr(write, name)[..., :-1]}), queries)
    for name in ("queries", "keys"):
        projected = for_backend("triton", problem(2, 60, 32, 3, 3, shared=True, projected=True))[2]
        with pytest.raises(ValueError, match=f"{name} has the wrong size"):
            run(image, pe, projected._replace(**{name: getattr(projected, name)[:-1]}), queries)
    with pytest.raises(ValueError, match="prompts"):
        run(image, pe, write, queries[:1])
    with pytest.raises(ValueError, match="prompts"):
        run(image.repeat(3, 1, 1), pe, write, queries)


def test_auto_leaves_many_rows_to_pytorch_where_shared_memory_is_small(monkeypatch):
    """More than 8 tokens in half precision, on GPUs with 99 KiB a program; 163 KiB and float32 take all 16."""
    sizes = {"small": 99 * 1024, "large": 163 * 1024}
    monkeypatch.setattr(two_way, "_shared_memory", sizes.__getitem__)
    for device, dtype, rows in [
        ("small", torch.bfloat16, 64),
        ("small", torch.float32, 128),
        ("large", torch.bfloat16, 128),
    ]:
        image = SimpleNamespace(is_cuda=True, device=device, dtype=dtype)
        assert two_way._triton_rows(image) == rows
    assert two_way._triton_rows(torch.zeros(1, 4, 32)) == 128


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_no_prompts(backend):
    image, pe, write, queries = for_backend(backend, problem(0, 60, 32, 3, 3, shared=True, projected=False))
    written, read = two_way_attention(image, pe, write, queries, 8, backend=backend)
    assert read is not None and written.shape == (0, 60, 32) and read.shape == (0, 24, 32)


@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_operator_is_registered_well(backend):
    for projected in (False, True):
        arguments = problem(2, 20, 32, 3, 2, shared=True, projected=projected)
        image, pe, write, queries = for_backend(backend, arguments)
        assert write is not None
        arguments = (image, pe, *write, queries, 8, backend)
        torch.library.opcheck(torch.ops.sam_fast.two_way_attention.default, arguments)
    nothing = (None, None, None, None, 0.0, None, None, None, None)
    torch.library.opcheck(torch.ops.sam_fast.two_way_attention.default, (image, pe, *nothing, queries, 8, backend))
    torch.library.opcheck(torch.ops.sam_fast.two_way_attention.default, (image, pe, *write, None, 8, backend))


def test_compiles_as_one_graph():
    image, pe, write, queries = problem(2, 20, 32, 3, 2, shared=True, projected=False)
    compiled = torch.compile(
        lambda i, p, w, q: two_way_attention(i, p, w, q, 8)[1], fullgraph=True, backend="aot_eager"
    )
    expected = two_way_attention(image, pe, write, queries, 8)[1]
    torch.testing.assert_close(compiled(image, pe, write, queries), expected)
