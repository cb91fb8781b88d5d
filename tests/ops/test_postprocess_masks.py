"""postprocess_masks and resize_logits against the official chain, on every instruction set that this CPU has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sam_fast import native
from sam_fast.ops.postprocess_masks import PostprocessedMasks, postprocess_masks, resize_logits
from tests.oracle import official

amg = official.utils.amg

# torch contracts products to fused multiply-adds exactly where its own AVX2 or AVX-512 code runs, and so do our
# variants: with both fused or neither, nothing may differ. Else the interpolated logits differ by rounding.
EXACT = (torch.backends.cpu.get_cpu_capability() == "DEFAULT") == (native.cpu_level() == "base")
FUSED = torch.backends.cpu.get_cpu_capability() != "DEFAULT"  # torch's, as our CUDA kernels always are
ROUNDING = 1e-4  # of logits up to some tens: far above float32 rounding of six blends, far below a visible change

# (h, w) of the logits, (h, w) inside the square input, (H, W) of the original, S
GEOMETRIES = {
    "landscape": ((256, 256), (683, 1024), (1200, 1800), 1024),
    "portrait": ((256, 256), (1024, 683), (901, 601), 1024),
    "downscale": ((256, 256), (1024, 1024), (333, 500), 1024),
    "original equals input": ((256, 256), (1024, 768), (1024, 768), 1024),
    "low equals model side": ((128, 128), (128, 97), (300, 227), 128),
    "low above model side": ((300, 310), (100, 87), (211, 190), 100),
    "small square input": ((16, 16), (64, 40), (200, 300), 64),
    "tiny square input": ((3, 5), (20, 32), (77, 130), 32),
    "small original": ((64, 64), (256, 200), (70, 58), 256),
    "small both": ((16, 16), (60, 64), (30, 40), 64),
    "original 1x1": ((256, 256), (1024, 1024), (1, 1), 1024),
    "original 1x200": ((64, 64), (5, 256), (1, 200), 256),
    "original 200x1": ((64, 64), (256, 5), (200, 1), 256),
    "logits 1x1": ((1, 1), (100, 100), (150, 150), 100),
    "logits 1x300": ((1, 300), (99, 100), (65, 64), 100),
    "logits 300x1": ((300, 1), (100, 99), (129, 63), 100),
    "input 1x1": ((64, 64), (1, 1), (200, 129), 256),
    "word edge 63": ((64, 64), (256, 250), (120, 63), 256),
    "word edge 128": ((64, 64), (256, 250), (120, 128), 256),
    "word edge 129": ((64, 64), (256, 250), (120, 129), 256),
    "much smaller": ((256, 256), (1024, 1024), (130, 9), 1024),
    "tall 20000x50": ((256, 256), (1024, 3), (20000, 50), 1024),
    "wide 50x20000": ((256, 256), (3, 1024), (50, 20000), 1024),
}
KINDS = ("noise", "blobs", "constant", "edges", "special")


def make_logits(kind: str, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Logits [N, h, w]: noise; blobs (certain regions and boundaries); constant; steps that lie within a few units in
    the last place of the thresholds -1, 0 and 1; blobs with NaN, infinities and values that overflow."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator) * 6 - 3
    n, height, width = shape
    if kind in ("blobs", "special"):
        coarse = torch.randn((n, 1, 3 + height // 16, 3 + width // 16), generator=generator) * 8
        noise = F.interpolate(coarse, (height, width), mode="bicubic")[:, 0]
    if kind == "constant":
        values = torch.tensor([-5.0, 0.0, 1.0, 0.5, -0.5, 5.0])
        return values[torch.arange(n) % 6, None, None].expand(shape).contiguous()
    if kind == "edges":
        near = [np.float32(t) for t in (-1.0, 0.0, 1.0)]
        near += [np.nextafter(t, np.float32(side)) for t in near for side in (-9, 9)]
        near += [np.float32(t + d) for t in (-1.0, 0.0, 1.0) for d in (-2e-5, -1e-5, -1e-6, 1e-6, 1e-5, 2e-5)]
        values = torch.tensor(np.array(near, dtype=np.float32))
        steps = torch.randint(len(near), (n, 2 + height // 8, 2 + width // 8), generator=generator)
        steps = steps.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width]
        return values[steps]
    if kind == "special":
        for value in (torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-42):
            noise[torch.rand(shape, generator=generator) < 0.001] = value
    return noise


def official_image(logits: Tensor, inner: tuple[int, int], original: tuple[int, int], side: int) -> Tensor:
    grid = F.interpolate(logits[:, None], (side, side), mode="bilinear", align_corners=False)
    return F.interpolate(grid[..., : inner[0], : inner[1]], original, mode="bilinear", align_corners=False)[:, 0]


def unpack(bits: Tensor, width: int) -> Tensor:
    pixels = np.unpackbits(bits.numpy(), axis=-1, bitorder="little")
    assert not pixels[..., width:].any(), "padding bits must be zero"
    return torch.from_numpy(pixels[..., :width].astype(bool))


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def check_against_official(
    got: PostprocessedMasks, image: Tensor, threshold: float = 0.0, offset: float = 1.0, exact: bool = EXACT
) -> None:
    """Masks, boxes and scores of the official functions on the official float image [N, H, W]."""
    masks = image > threshold
    assert got.bits is not None
    bits = unpack(got.bits, image.shape[-1])
    if exact:
        assert torch.equal(bits, masks)
        assert same(got.stability_score, amg.calculate_stability_score(image, threshold, offset))
    else:
        assert bool(((image - threshold).abs()[bits != masks] < ROUNDING).all())
        masks = bits
    assert torch.equal(got.area, masks.sum((-2, -1)))
    assert torch.equal(got.boxes, amg.batched_mask_to_box(masks))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_native_equals_official_chain(geometry, kind, poisoned_memory):
    low, inner, original, side = geometry
    logits = make_logits(kind, (3, *low))
    image = official_image(logits, inner, original, side)
    got = postprocess_masks(logits, inner, original, side, backend="native")
    check_against_official(got, image)
    measured = postprocess_masks(logits, inner, original, side, return_bits=False, backend="native")
    assert measured.bits is None
    assert torch.equal(measured.area, got.area)
    assert torch.equal(measured.boxes, got.boxes)
    assert same(measured.stability_score, got.stability_score)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_native_resize_equals_official_chain(geometry, kind, poisoned_memory):
    low, inner, original, side = geometry
    logits = make_logits(kind, (2, *low))
    image = official_image(logits, inner, original, side)
    got = resize_logits(logits, inner, original, side, backend="native")
    if EXACT:
        assert same(got, image)
    elif kind != "special":
        torch.testing.assert_close(got, image, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("width", [1600, 1601])
def test_outputs_above_32_mib(width):
    """Their pages are taken from the system part by part."""
    logits = make_logits("noise", (9, 64, 64))
    geometry = (192, 256), (600, width), 256
    got = resize_logits(logits, *geometry, backend="native")
    assert got.nbytes > 32 << 20
    for mask, expected in zip(logits, got, strict=True):
        assert torch.equal(resize_logits(mask[None], *geometry, backend="native")[0], expected)


SUBSET = "native and official_chain and (blobs or special) and not tall and not wide"


@pytest.mark.parametrize("level", ["base", "avx2", "avx512"])
def test_every_instruction_set(level):
    """Part of the tests above, with torch on the matching instruction set: the choice is made once per process."""
    levels = ["base", "avx2", "avx512", "avx512bf16"]
    environment = os.environ | {"SAM_FAST_CPU": "", "ATEN_CPU_CAPABILITY": {"base": "default"}.get(level, level)}
    probe = [sys.executable, "-c", "from sam_fast import native; print(native.cpu_level())"]
    best = subprocess.run(probe, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    if levels.index(level) > levels.index(best):
        pytest.skip(f"this CPU has {best}, not {level}")
    environment["SAM_FAST_CPU"] = level
    check = "from sam_fast import native; import tests.ops.test_postprocess_masks as t; "
    check += f"assert t.EXACT and native.cpu_level() == {level!r}; import pytest, sys; "
    check += f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {str(Path(__file__))!r}, '-k', {SUBSET!r}]))"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", check], env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


@pytest.mark.parametrize("kind", ["noise", "blobs", "special"])
@pytest.mark.parametrize("name", ["landscape", "small both", "small square input", "original 1x200"])
def test_reference_equals_official_chain(name, kind):
    low, inner, original, side = GEOMETRIES[name]
    logits = make_logits(kind, (2, *low))
    got = postprocess_masks(logits, inner, original, side, backend="torch")
    image = official_image(logits, inner, original, side)
    assert got.bits is not None
    assert torch.equal(unpack(got.bits, original[1]), image > 0)
    assert same(got.stability_score, amg.calculate_stability_score(image, 0.0, 1.0))
    assert torch.equal(got.boxes, amg.batched_mask_to_box(image > 0))
    assert same(resize_logits(logits, inner, original, side, backend="torch"), image)


@settings(max_examples=60, deadline=None)
@given(
    low=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    side=st.integers(1, 200),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    original=st.tuples(st.integers(1, 260), st.integers(1, 260)),
    kind=st.sampled_from(KINDS),
    threshold=st.sampled_from([0.0, 1.0, -3.5, 1e-3]),
    offset=st.sampled_from([1.0, 0.0, 0.25, -1.0]),
    threads=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_any_geometry(low, side, share, original, kind, threshold, offset, threads, seed):
    inner = tuple(1 + round(s * (side - 1)) for s in share)
    logits = make_logits(kind, (2, *low), seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = postprocess_masks(
            logits, inner, original, side, mask_threshold=threshold, stability_offset=offset, backend="native"
        )
        floats = resize_logits(logits, inner, original, side, backend="native")
    finally:
        torch.set_num_threads(before)
    image = official_image(logits, inner, original, side)
    check_against_official(got, image, threshold, offset)
    if EXACT:
        assert same(floats, image)


def test_certain_regions_keep_thresholds_apart():
    """A plane through all thresholds and plateaus between them: words that are certain for one threshold only."""
    ramp = torch.linspace(-3, 3, 128)[None, None].expand(1, 128, 128)
    plateaus = torch.tensor([-2.0, -0.5, 0.5, 2.0]).repeat_interleave(32)[None, None].expand(1, 128, 128)
    logits = torch.cat([ramp, plateaus, ramp.mT, plateaus.mT])
    got = postprocess_masks(logits, (512, 512), (700, 900), 512, backend="native")
    check_against_official(got, official_image(logits, (512, 512), (700, 900), 512))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3.4e38])
def test_one_special_sample_in_a_certain_region(value):
    """A region that is certain but for one sample must be computed around it, wherever the sample lies."""
    for background in (-20.0, 20.0):
        for row, column in ((0, 0), (0, 63), (63, 63), (17, 31), (32, 32)):
            logits = torch.full((1, 64, 64), background)
            logits[0, row, column] = value
            got = postprocess_masks(logits, (256, 256), (300, 517), 256, backend="native")
            check_against_official(got, official_image(logits, (256, 256), (300, 517), 256))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("masks", [1, 5])
def test_results_do_not_depend_on_threads(threads, masks):
    logits = make_logits("blobs", (masks, 64, 64))
    expected = postprocess_masks(logits, (256, 171), (901, 601), 256)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = postprocess_masks(logits, (256, 171), (901, 601), 256)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_empty_mask(backend):
    got = postprocess_masks(torch.full((1, 64, 64), -9.0), (256, 256), (200, 300), 256, backend=backend)
    assert got.area.tolist() == [0]
    assert got.boxes.tolist() == [[0, 0, 0, 0]]
    assert got.stability_score.isnan().all()
    assert not got.bits.any()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_no_masks(backend):
    got = postprocess_masks(torch.empty(0, 64, 64), (256, 256), (200, 300), 256, backend=backend)
    assert [tuple(t.shape) for t in got] == [(0,), (0,), (0, 4), (0, 200, 40)]
    assert resize_logits(torch.empty(0, 64, 64), (256, 256), (200, 300), 256, backend=backend).shape == (0, 200, 300)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floats_are_computed_in_float32(dtype, backend):
    logits = make_logits("blobs", (2, 64, 64)).to(dtype)
    got = postprocess_masks(logits, (256, 256), (200, 300), 256, backend=backend)
    expected = postprocess_masks(logits.float(), (256, 256), (200, 300), 256, backend=backend)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_strided_logits():
    logits = make_logits("blobs", (4, 64, 80))
    view = logits.mT[::2]  # [2, 80, 64]
    got = postprocess_masks(view, (256, 256), (200, 300), 256)
    for a, b in zip(got, postprocess_masks(view.contiguous(), (256, 256), (200, 300), 256), strict=True):
        assert torch.equal(a, b)
    floats = resize_logits(view, (256, 256), (200, 300), 256)
    assert torch.equal(floats, resize_logits(view.contiguous(), (256, 256), (200, 300), 256))


# ---- CUDA: exactly the CPU's roundings.


def on_cpu(result: PostprocessedMasks) -> PostprocessedMasks:
    return PostprocessedMasks(*(None if tensor is None else tensor.cpu() for tensor in result))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_gpu_equals_official_chain(gpu, geometry, poisoned_memory):
    low, inner, original, side = geometry
    slow = gpu.type == "cpu" and original[0] * original[1] > 200_000
    logits = torch.cat([make_logits(kind, (1, *low)) for kind in (["special"] if slow else KINDS)])
    image = official_image(logits, inner, original, side)
    logits = logits.to(gpu)
    got = on_cpu(postprocess_masks(logits, inner, original, side, backend="native"))
    check_against_official(got, image, exact=FUSED)
    measured = on_cpu(postprocess_masks(logits, inner, original, side, return_bits=False, backend="native"))
    for a, b in zip(measured[:3], got[:3], strict=True):
        assert same(a, b)
    floats = resize_logits(logits, inner, original, side, backend="native").cpu()
    if FUSED:
        assert same(floats, image)
    else:
        finite = image.abs() < 1e3
        torch.testing.assert_close(floats[finite], image[finite], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gpu_widens_16_bits_exactly(gpu, dtype):
    every = torch.arange(2**16).to(torch.uint16).view(dtype).view(1, 256, 256).to(gpu)
    copy = resize_logits(every, (256, 256), (256, 256), 256, backend="native")  # weights 1 and 0: infinities give NaN
    assert same(copy, every.float().where(every.isfinite(), torch.nan))
    for kind in ("blobs", "special"):
        logits = make_logits(kind, (2, 64, 64)).to(gpu, dtype)
        got = postprocess_masks(logits, (256, 171), (300, 200), 256, backend="native")
        wide = postprocess_masks(logits.float(), (256, 171), (300, 200), 256, backend="native")
        for a, b in zip(got, wide, strict=True):
            assert same(a, b)


def test_gpu_agrees_with_the_reference_there(gpu):
    for name in ("portrait", "downscale", "small both", "original 1x1", "logits 1x1"):
        low, inner, original, side = GEOMETRIES[name]
        logits = make_logits("noise", (1, *low)).to(gpu)
        image = resize_logits(logits, inner, original, side, backend="torch")
        torch.testing.assert_close(
            resize_logits(logits, inner, original, side, backend="native"), image, atol=ROUNDING, rtol=0
        )
        got = postprocess_masks(logits, inner, original, side, backend="native")
        check_against_official(on_cpu(got), image.cpu(), exact=False)


def test_gpu_skips_a_tile_only_if_every_sample_allows_it(gpu):
    """One sample of another kind, anywhere in a region that is certain otherwise."""
    for value in (torch.nan, torch.inf, -torch.inf, 3.4e38, 0.0, 1.0, -1.0):
        for background in (-20.0, 20.0):
            logits = torch.full((5, 64, 64), background)
            for mask, (row, column) in enumerate([(0, 0), (0, 63), (63, 63), (17, 31), (32, 32)]):
                logits[mask, row, column] = value
            image = official_image(logits, (256, 256), (300, 517), 256)
            got = postprocess_masks(logits.to(gpu), (256, 256), (300, 517), 256, backend="native")
            check_against_official(on_cpu(got), image, exact=FUSED)


def test_gpu_takes_no_masks_strided_logits_and_many_masks(gpu):
    none = postprocess_masks(torch.empty(0, 64, 64, device=gpu), (256, 256), (200, 300), 256, backend="native")
    assert [tuple(t.shape) for t in none] == [(0,), (0,), (0, 4), (0, 200, 40)]
    assert resize_logits(torch.empty(0, 8, 8, device=gpu), (32, 32), (9, 9), 32, backend="native").shape == (0, 9, 9)
    logits = make_logits("noise", (301, 8, 6)).mT[::2]  # [151, 6, 8]
    got = postprocess_masks(logits.to(gpu), (99, 100), (70, 66), 100, backend="native")
    check_against_official(on_cpu(got), official_image(logits, (99, 100), (70, 66), 100), exact=FUSED)


@pytest.mark.parametrize(
    ("masks", "original"), [(1, (70, 66)), (3, (70, 140)), (2, (130, 517)), (9, (300, 130))], ids=str
)
@pytest.mark.parametrize("with_bits", [True, False], ids=["bits", "counts alone"])
def test_gpu_takes_runs_of_tiles(gpu, masks, original, with_bits):
    """Of one tile, of a few that warps look at together, and of more than a row of them."""
    logits = make_logits("blobs", (masks, 64, 64))
    logits[0] = 5.0  # certain throughout
    got = postprocess_masks(logits.to(gpu), (256, 200), original, 256, return_bits=with_bits, backend="native")
    expected = postprocess_masks(logits, (256, 200), original, 256, return_bits=with_bits, backend="native")
    for ours, theirs in zip(on_cpu(got), expected, strict=True):
        assert (ours is None and theirs is None) or not FUSED or same(ours, theirs)
    assert got.area[0] == original[0] * original[1]


VALID = ((2, 8, 8), (32, 20), (50, 60), 32)


@pytest.mark.parametrize(
    ("logits", "inner", "original", "side", "error", "text"),
    [
        (np.zeros((2, 8, 8), np.float32), *VALID[1:], TypeError, "torch.Tensor"),
        (torch.zeros(2, 8, 8, dtype=torch.int32), *VALID[1:], TypeError, "int32"),
        (torch.zeros(8, 8), *VALID[1:], ValueError, "[N, h, w]"),
        (torch.zeros(2, 0, 8), *VALID[1:], ValueError, "[N, h, w]"),
        (torch.zeros(VALID[0]), (33, 20), (50, 60), 32, ValueError, "(33, 20)"),
        (torch.zeros(VALID[0]), (32, 0), (50, 60), 32, ValueError, "(32, 0)"),
        (torch.zeros(VALID[0]), (32, 20), (50, 0), 32, ValueError, "(50, 0)"),
        (torch.zeros(VALID[0]), (32, 20), (-1, 9), 32, ValueError, "(-1, 9)"),
        (torch.zeros(VALID[0]), (32, 20), (1 << 24, 9), 32, ValueError, "2**24"),
        (torch.zeros(VALID[0]), (32, 20, 3), (50, 60), 32, ValueError, "(height, width)"),
        (torch.zeros(VALID[0]), (32.5, 20), (50, 60), 32, TypeError, "integers"),
    ],
)
@pytest.mark.parametrize("operation", [postprocess_masks, resize_logits])
def test_bad_input(operation, logits, inner, original, side, error, text):
    with pytest.raises(error) as raised:
        operation(logits, inner, original, side)
    assert text in str(raised.value)


def test_unknown_backend_and_gradients():
    logits = torch.zeros(VALID[0], requires_grad=True)
    with pytest.raises(ValueError, match="backend"):
        postprocess_masks(logits.detach(), *VALID[1:], backend="cuda")
    with pytest.raises(RuntimeError, match="inference-only"):
        resize_logits(logits, *VALID[1:], backend="native")
    resize_logits(logits, *VALID[1:], backend="torch").sum().backward()
    assert logits.grad is not None and float(logits.grad.sum()) > 0


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("return_bits", [True, False], ids=["bits", "no-bits"])
def test_opcheck(return_bits, backend):
    logits = make_logits("blobs", (2, 16, 16))
    sizes = (64, 40, 150, 70, 64)
    torch.library.opcheck(
        torch.ops.sam_fast.postprocess_masks.default, (logits, *sizes, 0.0, 1.0, return_bits, backend)
    )
    torch.library.opcheck(torch.ops.sam_fast.resize_logits.default, (logits, *sizes, backend))


def test_fullgraph_compile():
    def call(logits: Tensor) -> tuple[Tensor, ...]:
        masks = postprocess_masks(logits * 2, (64, 40), (150, 70), 64)
        image = resize_logits(logits, (64, 40), (9, 7), 64)
        return masks.area + 1, masks.stability_score, masks.boxes, masks.bits, image

    logits = make_logits("blobs", (2, 16, 16))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(logits), call(logits), strict=True):
        assert torch.equal(a, b)
