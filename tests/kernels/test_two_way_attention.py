"""The decoder's image side as Triton kernels, interpreted where there is no GPU, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from oracle import relative_error
from sam_fast.kernels import two_way_attention as kernels
from sam_fast.kernels import two_way_read
from torch import Tensor

from sam_fast.ops.two_way_attention import Write, two_way_attention, two_way_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest value, against float64 on the same rounded inputs: the result is rounded once (2^-9, 2^-12), shares of
# the softmax and, for what is read, the written image before. Float32 differs by the order of sums.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
# Formats, and on Hopper the copy engine, elsewhere addresses; a GPU runs its own way only.
WAYS = {"float32": (torch.float32, 90), "bfloat16": (torch.bfloat16, 90), "float16": (torch.float16, 90)}
if DEVICE == "cpu":
    WAYS["bfloat16 by addresses"] = torch.bfloat16, 80


def problem(
    prompts: int,
    pixels: int,
    channels: int,
    tokens: int,
    readers: int,
    dtype: torch.dtype,
    shared=True,
    projected=False,
) -> tuple[Tensor, Tensor, Write | None, Tensor | None]:
    """Random arguments of the operation; without tokens there is no write, without readers no read."""
    generator = torch.Generator().manual_seed(prompts + pixels + channels + tokens + readers)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)

    image, pe = random(1 if shared else prompts, pixels, channels), random(pixels, channels)
    write, R = None, 8 * tokens
    if tokens:
        norm = 1 + random(channels, scale=0.1).float(), random(channels).float()
        write = Write(random(prompts, R, channels), random(channels), *norm, 1e-5)
        if projected:
            keys = random(prompts, tokens, 16, 8, scale=0.5)
            write = write._replace(queries=random(pixels, 16, 8), keys=keys)
        else:
            absorbed = random(prompts, channels, R, scale=channels**-0.5)
            write = write._replace(absorbed_keys=absorbed, constant=random(prompts, R).float())
    queries = random(prompts, channels, 8 * readers, scale=3 * channels**-0.5) if readers else None
    return image, pe, write, queries


def in_float64(arguments: tuple) -> tuple:
    image, pe, write, queries = arguments
    wide = None if write is None else Write(*(x.double() if isinstance(x, Tensor) else x for x in write))
    return image.double(), pe.double(), wide, None if queries is None else queries.double()


@pytest.fixture(params=WAYS)
def dtype(request, monkeypatch) -> torch.dtype:
    """Each way to run; and outputs and workspaces that are not a number until they are written."""
    dtype, architecture = WAYS[request.param]
    if DEVICE == "cpu":
        for module in (kernels, two_way_read):
            monkeypatch.setattr(module, "architecture", lambda _: architecture)
    empty = Tensor.new_empty

    def poisoned(self, *shape, **kind):
        made = empty(self, *shape, **kind)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    return dtype


CASES = {
    "7 tokens": ((3, 130, 32, 7, 5), {}),
    "5 tokens, projected": ((3, 70, 32, 5, 5), {"projected": True}),
    "13 tokens, an image each": ((2, 70, 32, 13, 13), {"shared": False}),
    "16 tokens, projected": ((1, 65, 32, 16, 2), {"projected": True}),
    "one prompt": ((1, 200, 32, 7, 7), {}),
    "one token, one pixel": ((3, 1, 32, 1, 1), {}),
    "nobody reads": ((1, 70, 64, 2, 0), {}),
    "nobody writes": ((3, 70, 64, 0, 5), {}),
    "nobody writes into an image each": ((3, 70, 32, 0, 3), {"shared": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, dtype):
    shape, options = CASES[name]
    check(problem(*shape, dtype, **options), dtype)


def check(arguments: tuple, dtype: torch.dtype) -> None:
    written, read = two_way_attention(*arguments, 8, backend="triton")
    expected, expected_read = two_way_attention_reference(*in_float64(arguments), 8)
    assert written.dtype == dtype and written.shape == expected.shape
    assert relative_error(written.double(), expected) <= TOLERANCE[dtype]
    if expected_read is None:
        assert read is None
    else:
        assert read is not None and read.dtype == dtype and read.shape == expected_read.shape
        assert relative_error(read.double(), expected_read) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["13 tokens, an image each", "nobody writes into an image each"])
def test_writes_over_an_image_that_is_not_needed(name, dtype):
    shape, options = CASES[name]
    arguments = problem(*shape, dtype, **options)
    expected = two_way_attention(*arguments, 8, backend="triton")
    image = arguments[0].clone()
    written, read = two_way_attention(image, *arguments[1:], 8, backend="triton", overwrite=True)
    assert written.data_ptr() == image.data_ptr()
    for ours, theirs in zip((written, read), expected, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_size_of_the_decoder():
    check(problem(1, 70, 256, 7, 5, torch.bfloat16, projected=True), torch.bfloat16)


def test_more_runs_than_are_combined_at_a_time(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "programs_at_a_time", lambda _: 1000)
    arguments = problem(1, 2210, 32, 0, 1, dtype)
    assert two_way_read.read_runs(arguments[0], 1, 8) > two_way_read._RUNS
    check(arguments, dtype)


@pytest.mark.parametrize("programs", [1, 6], ids=["one run", "three runs"])
def test_runs(programs, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "programs_at_a_time", lambda _: programs)
    arguments = problem(2, 330, 32, 0, 2, dtype)
    runs = two_way_read.read_runs(arguments[0], 2, 16)
    assert runs == 1 if programs == 1 else runs > 2
    check(arguments, dtype)


@pytest.mark.parametrize(("prompts", "runs"), [(1, 32), (64, 4), (150, 2), (226, 2), (227, 1), (256, 1), (300, 1)])
def test_a_run_is_not_left_for_a_tile_or_two(prompts, runs, monkeypatch):
    """For pixels of SAM's decoder, on the 132 processors of an H100."""
    monkeypatch.setattr(kernels, "programs_at_a_time", lambda _: 264)
    monkeypatch.setattr(two_way_read, "architecture", lambda _: 90)
    image = torch.empty(1, 4096, 256, dtype=torch.bfloat16, device=DEVICE)
    assert two_way_read.read_runs(image, prompts, 56) == runs
    each = kernels.tiles_each(64, prompts, image.device)
    assert -(-64 // each) == (64 if prompts == 1 else runs)  # where there is little to write, programs of one tile


def test_large_scores_do_not_overflow(dtype):
    image, pe, write, queries = problem(1, 70, 32, 3, 3, dtype)
    assert write is not None and queries is not None and write.absorbed_keys is not None
    write = write._replace(absorbed_keys=100 * write.absorbed_keys)
    for x in two_way_attention(image, pe, write, 100 * queries, 8, backend="triton"):
        assert x is not None and x.isfinite().all()


def test_scores_of_minus_infinity_weigh_nothing(dtype):
    """Of the first token, and of the first tile of pixels and a few more."""
    image, pe, write, queries = problem(1, 130, 32, 3, 1, dtype)
    assert write is not None and write.constant is not None and queries is not None
    write.constant[:, :8] = -torch.inf
    check((image, pe, write, None), dtype)
    pe[:70], queries[:, 0] = 0, 1
    pe[:70, 0] = -torch.inf
    check((image, pe, None, queries), dtype)


def test_not_a_number_stays_in_its_prompt_and_pixel(dtype):
    image, pe, write, queries = problem(3, 70, 32, 3, 3, dtype, shared=False)
    assert write is not None
    image[1, 5, 3] = torch.nan
    write.offered[2, 4] = torch.nan
    before = image.clone()
    written, read = two_way_attention(image, pe, write, queries, 8, backend="triton")
    assert torch.equal(image.nan_to_num(7), before.nan_to_num(7))
    assert read is not None and written[0].isfinite().all() and read[0].isfinite().all()
    assert written[1, 5].isnan().all() and written[1, 6:].isfinite().all() and written[1, :5].isfinite().all()
    assert written[2].isnan().all() and read[1:].isnan().all()


def test_tensors_of_any_strides(dtype):
    arguments = problem(3, 70, 32, 3, 2, dtype, shared=False)
    image, pe, write, queries = arguments
    expected = two_way_attention(*arguments, 8, backend="triton")
    assert write is not None and queries is not None
    strided = Write(*(spread(x) if isinstance(x, Tensor) else x for x in write))
    got = two_way_attention(spread(image), spread(pe), strided, spread(queries), 8, backend="triton")
    for ours, theirs in zip(got, expected, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def spread(x: Tensor) -> Tensor:
    """The same numbers, with one between each two of them."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
