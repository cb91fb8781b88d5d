"""The image encoder for GPUs, its arithmetic on the CPU: by PyTorch, and a small one by Triton's interpreter."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import needs_8_bits
from oracle import TINY, relative_error, seed_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sam_fast
from sam_fast import SamPredictor
from sam_fast.build_sam import build_sam_from_config
from sam_fast.modeling import Sam
from sam_fast.runtime import packed_encoder, plain
from sam_fast.runtime.graphs import Graphs
from sam_fast.runtime.packed_encoder import PackedEncoder, can_pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")


def pixels_of(encoder: nn.Module, images: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, encoder.img_size, encoder.img_size, generator=generator)


@pytest.fixture(scope="module")
def smallest() -> Sam:
    """Two blocks over 4 x 4 tokens: one in padded windows of 3, one over the whole image."""
    config = dataclasses.replace(TINY, image_size=64, depth=2, embed_dim=64, global_attn_indexes=(1,), window_size=3)
    model = build_sam_from_config(config)
    seed_weights(model)
    return model.eval()


@torch.no_grad()
def test_float32_equals_the_official_encoder(official_tiny, tiny):
    images = pixels_of(tiny.image_encoder, 2)
    expected = official_tiny.image_encoder(images)
    got = PackedEncoder(tiny.image_encoder, torch.float32)(images)
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert relative_error(got, expected) <= 1e-5  # 1e-6 measured


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 272), (272, 64), (48, 48)])
def test_other_sizes_of_image(tiny, size):
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    got = PackedEncoder(tiny.image_encoder, torch.float32)(images)
    assert relative_error(got, tiny.image_encoder(images)) <= 1e-5
    with pytest.raises(ValueError, match="multiples of 16"):
        PackedEncoder(tiny.image_encoder, torch.float32)(images[..., :-1])


@torch.no_grad()
def test_bfloat16_is_no_worse_than_the_official_encoder_in_bfloat16(official_tiny, tiny):
    images = pixels_of(tiny.image_encoder, 2)
    expected = official_tiny.image_encoder(images)
    official = copy.deepcopy(official_tiny.image_encoder).bfloat16()(images.bfloat16())
    got = PackedEncoder(tiny.image_encoder, torch.bfloat16)(images)
    assert relative_error(got, expected) <= relative_error(official.float(), expected)


@torch.no_grad()
@pytest.mark.parametrize("e4m3", [False, pytest.param(True, marks=needs_8_bits)], ids=["fp16", "e4m3"])
def test_narrower_formats(e4m3, tiny):
    """float16 has 3 bits more than bfloat16, e4m3 4 bits less; errors of 5e-4, 4e-3 and 2e-2 were measured."""
    images = pixels_of(tiny.image_encoder)
    encoder = copy.deepcopy(tiny.image_encoder).to(DEVICE)
    packed = PackedEncoder(encoder, torch.bfloat16 if e4m3 else torch.float16, e4m3=e4m3)
    assert relative_error(packed(images.to(DEVICE)).cpu(), tiny.image_encoder(images)) <= (4e-2 if e4m3 else 1e-3)
    assert all((block.lin1.values.dtype == torch.float8_e4m3fn) == e4m3 for block in packed.blocks)


@torch.no_grad()
@needs_8_bits
def test_biases_of_norms_are_not_rounded(tiny):
    """Rows would be three times as large with these; then the error was 3.0e-2, and now it is 1.6e-2."""
    encoder, generator = copy.deepcopy(tiny.image_encoder), torch.Generator().manual_seed(1)
    for block in encoder.blocks:
        for norm in (block.norm1, block.norm2):
            norm.bias.normal_(0, 3, generator=generator)
    images = pixels_of(encoder)
    expected = encoder(images)
    assert relative_error(PackedEncoder(encoder, torch.float32)(images), expected) <= 1e-5
    packed = PackedEncoder(encoder.to(DEVICE), torch.bfloat16, e4m3=True)
    assert relative_error(packed(images.to(DEVICE)).cpu(), expected) <= 2.2e-2


@torch.no_grad()
def test_stem_and_folding_neck():
    """nano has its own ends: they run as they are."""
    encoder = sam_fast.sam_model_registry["nano"]().image_encoder
    images = pixels_of(encoder)
    expected = encoder(images)
    assert can_pack(encoder)
    assert relative_error(PackedEncoder(encoder, torch.float32)(images), expected) <= 1e-5
    assert relative_error(PackedEncoder(encoder, torch.bfloat16)(images), expected) <= 4e-3


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_by_triton_kernels(smallest, dtype, tolerance, monkeypatch):
    """Windows with padding, long rows, odd tokens; convolutions of float32 are exact whatever cuDNN is allowed."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    encoder = smallest.image_encoder
    for images in (pixels_of(encoder), torch.randn(1, 3, 16, 17 * 16)):
        got = PackedEncoder(copy.deepcopy(encoder).to(DEVICE), dtype)(images.to(DEVICE), backend="triton").cpu()
        assert relative_error(got, encoder(images)) <= tolerance


@torch.no_grad()
@needs_8_bits
def test_8_bits_by_triton_kernels(smallest):
    encoder = copy.deepcopy(smallest.image_encoder).to(DEVICE)
    images = pixels_of(encoder).to(DEVICE)
    packed = PackedEncoder(encoder, torch.bfloat16, e4m3=True)
    by_torch, by_triton = (packed(images, backend=backend) for backend in ("torch", "triton"))
    assert relative_error(by_triton, by_torch) <= 6e-2  # the interpreter cuts 8-bit numbers off


@torch.no_grad()
@pytest.mark.parametrize("model", ["nano", "tiny"])
def test_convolutions_are_exact_and_leave_settings_alone(model, tiny):
    """All of them are called without TF32, and give what PyTorch's own give on a CPU."""
    encoder = tiny.image_encoder if model == "tiny" else sam_fast.sam_model_registry["nano"]().image_encoder
    images, packed = pixels_of(encoder), PackedEncoder(encoder, torch.float32)
    seen: list[tuple[str, bool]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "convolution" in func.name():
                seen.append((func.name(), args[-1]))
            return func(*args, **(kwargs or {}))

    with Watch():
        watched = packed(images)
    assert seen and set(seen) == {("aten::_convolution", False)}
    assert relative_error(watched, encoder(images)) <= 1e-5
    image, weight, bias = torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 3), torch.randn(6)
    with packed_encoder._ExactConvolutions():
        got = nn.functional.conv2d(image, weight, bias, stride=(2, 1), padding=1, groups=2)
    assert torch.equal(got, nn.functional.conv2d(image, weight, bias, stride=(2, 1), padding=1, groups=2))


def test_only_the_usual_encoder_is_packed(tiny):
    assert can_pack(tiny.image_encoder)
    other_norm = copy.deepcopy(tiny.image_encoder)
    other_norm.blocks[0].norm1 = nn.Identity()
    other_neck = copy.deepcopy(tiny.image_encoder)
    other_neck.neck = nn.Sequential(*other_neck.neck[:2])
    assert not can_pack(other_norm) and not can_pack(other_neck)


class TestRuntime:
    """The runtime takes the packed encoder on a GPU; here it is told to take it on a CPU."""

    @pytest.fixture(autouse=True)
    def packs_on_a_cpu(self, monkeypatch):
        monkeypatch.setattr(plain, "PACKED_ON", {"cuda", "cpu"})
        self.encoded: list[torch.dtype] = []
        call = PackedEncoder.__call__

        def counted(packed: PackedEncoder, images: torch.Tensor, **options: str) -> torch.Tensor:
            self.encoded.append(packed.dtype)
            return call(packed, images, **options)

        monkeypatch.setattr(PackedEncoder, "__call__", counted)

    def test_predictor_gives_the_same_masks(self, tiny, photo):
        given = dict(point_coords=np.array([[250.0, 200.0]]), point_labels=np.array([1]), return_logits=True)
        plain, packed = SamPredictor(tiny, backend="torch"), SamPredictor(tiny, precision="fp32")
        for predictor in (plain, packed):
            predictor.set_image(photo)
        assert self.encoded == [torch.float32]
        for got, expected in zip(packed.predict(**given), plain.predict(**given), strict=True):
            assert relative_error(torch.from_numpy(got), torch.from_numpy(expected)) <= 1e-4

    def test_weights_that_change_are_packed_again(self, photo):
        model = build_sam_from_config(TINY)
        seed_weights(model)
        predictor = SamPredictor(model, precision="fp32")
        before = predictor.set_image(photo).features
        with torch.no_grad():
            model.image_encoder.blocks[1].mlp.lin2.weight.mul_(1.5)
        after = predictor.set_image(photo).features
        assert relative_error(after, before) > 1e-3
        fresh = SamPredictor(model, backend="torch").set_image(photo).features
        assert relative_error(after, fresh) <= 1e-5

    def test_a_hook_is_called(self, tiny, photo):
        model = copy.deepcopy(tiny)
        seen = []
        model.image_encoder.blocks[0].register_forward_hook(lambda *arguments: seen.append(1))
        SamPredictor(model).set_image(photo)
        assert seen == [1] and self.encoded == []

    def test_a_model_in_half_precision_runs_in_its_own_format(self, tiny, photo):
        SamPredictor(copy.deepcopy(tiny).bfloat16()).set_image(photo)
        assert self.encoded == [torch.bfloat16]


def test_fp8_needs_a_gpu_that_has_it(tiny):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        SamPredictor(copy.deepcopy(tiny).cuda(), precision="fp8")
    else:
        with pytest.raises(RuntimeError, match=r"8\.9"):
            SamPredictor(copy.deepcopy(tiny).to(DEVICE), precision="fp8")


def test_on_a_cpu_a_function_is_called():
    calls = []

    def double(x: torch.Tensor) -> tuple[torch.Tensor]:
        calls.append(x.shape)
        return (2 * x,)

    graphs = Graphs()
    for size in (3, 2, 3):
        assert torch.equal(graphs("double", double, torch.ones(size))[0], 2 * torch.ones(size))
    assert calls == [(3,), (2,), (3,)]


def graphed_by(packed: PackedEncoder) -> Callable[[torch.Tensor], torch.Tensor]:
    graphs = Graphs()
    return lambda x: graphs("encode", lambda *inputs: (packed(*inputs),), x)[0]


@needs_cuda
class TestGraphs:
    """Replays equal calls, whatever shapes, threads and streams do."""

    @pytest.fixture(autouse=True)
    def without_gradients(self):
        with torch.no_grad():
            yield

    @pytest.fixture(scope="class")
    def packed(self, smallest) -> PackedEncoder:
        return PackedEncoder(copy.deepcopy(smallest.image_encoder).cuda(), torch.float32)

    def test_results_stay_the_callers(self, packed):
        graphed = graphed_by(packed)
        images = [pixels_of(packed.encoder, seed=seed).cuda() for seed in range(3)]
        results = [graphed(image) for image in 3 * images]
        for image, result in zip(3 * images, results, strict=True):
            assert relative_error(result, packed(image)) <= 1e-6

    def test_shapes_in_any_order_and_more_than_are_kept(self, packed):
        graphed = graphed_by(packed)
        sizes = [(16 * (1 + i % 5), 16 * (1 + i % 3)) for i in range(60)]
        for i, size in enumerate(sizes):
            image = torch.randn(1 + i % 2, 3, *size, device="cuda")
            assert relative_error(graphed(image), packed(image)) <= 1e-6

    def test_threads_and_streams(self, packed):
        from concurrent.futures import ThreadPoolExecutor

        graphed = graphed_by(packed)
        images = [pixels_of(packed.encoder, seed=seed).cuda() for seed in range(32)]
        expected = [packed(image) for image in images]
        assert relative_error(packed(images[0]), expected[0]) <= 1e-6
        torch.cuda.synchronize()

        def run(image: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                result = graphed(image)
                torch.cuda.current_stream().synchronize()
            return result

        with ThreadPoolExecutor(16) as pool:
            for result, reference in zip(pool.map(run, images), expected, strict=True):
                assert relative_error(result, reference) <= 1e-6

    def test_recorded_in_another_thread(self, packed):
        """Which has no handles of cuBLAS and cuDNN yet."""
        graphed = graphed_by(packed)
        image = pixels_of(packed.encoder).cuda()
        results = [graphed(image)]

        def run() -> None:
            with torch.no_grad():
                results.append(graphed(image))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert relative_error(results[1], results[0]) <= 1e-6

    def test_a_recording_that_fails_leaves_nothing_behind(self):
        graphs, x, fails = Graphs(), torch.ones(5, device="cuda"), True

        def double(x: torch.Tensor) -> tuple[torch.Tensor]:
            doubled = 2 * x
            if fails and torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream().synchronize()  # which no recording may
            return (doubled,)

        stream = torch.cuda.current_stream()
        graphs("double", double, x)
        for _ in range(2):
            with pytest.warns(UserWarning, match="no CUDA graph"):
                assert torch.equal(graphs("double", double, x)[0], 2 * x)
        assert not graphs._recordings and torch.cuda.current_stream() == stream
        fails = False
        for _ in range(3):
            assert torch.equal(graphs("double", double, x)[0], 2 * x)
        assert len(graphs._recordings) == 1
