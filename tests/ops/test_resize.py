"""Resize and preprocessing of images: bytes against Pillow, the model's input against `Sam.preprocess`."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from sam_fast.modeling import Sam
from sam_fast.ops.backend import unavailable_reason
from sam_fast.ops.resize import preprocess_image_, resize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
MEAN = torch.tensor([123.675, 116.28, 103.53], device=DEVICE).view(-1, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375], device=DEVICE).view(-1, 1, 1)

sides = st.integers(1, 300)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pillow(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def assert_equals_pillow(image: np.ndarray, size: tuple[int, int], backend: str) -> None:
    got = resize(torch.tensor(image, device=DEVICE), size, backend=backend)
    assert got.dtype == torch.uint8 and got.is_contiguous()
    np.testing.assert_array_equal(got.cpu().numpy(), by_pillow(image, size))


@settings(max_examples=150, deadline=None)
@given(sides, sides, sides, sides)
def test_reference_equals_pillow(height, width, new_height, new_width):
    assert_equals_pillow(noise(height, width, height * width), (new_height, new_width), "torch")


@settings(max_examples=40, deadline=None)
@given(sides, sides, sides)
def test_reference_equals_pillow_at_one_scale(height, width, longest):
    scale = longest / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    assert_equals_pillow(noise(height, width), size, "torch")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((1, 1), (1, 1)),
        ((1, 1), (5, 7)),
        ((9, 5), (1, 1)),
        ((1, 50), (1, 13)),
        ((9, 1), (13, 1)),
        ((5, 30), (5, 10)),  # one pass, horizontal
        ((30, 5), (10, 5)),  # one pass, vertical
        ((6, 9), (6, 9)),  # none
        ((24, 11), (8, 19)),  # vertical first, since Pillow 13
        ((303, 3), (20, 2)),  # vertical first, since Pillow 12.2
        ((13, 20), (9, 14)),
        ((160, 4), (4, 1)),
        ((4, 160), (1, 4)),
        ((3, 5), (5, 100)),  # several tiles of columns
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_pillow(source, target, backend):
    assert_equals_pillow(noise(*source), target, backend)
    assert_equals_pillow(np.full((*source, 3), 255, np.uint8), target, backend)


@pytest.mark.parametrize(
    ("source", "target"), [((1200, 1800), (683, 1024)), ((1080, 1920), (576, 1024)), ((20000, 50), (1024, 3))], ids=str
)
def test_large_images_equal_pillow(source, target):
    backend = "triton" if DEVICE == "cuda" else "torch"  # the interpreter takes minutes
    assert_equals_pillow(noise(*source), target, backend)
    assert_equals_pillow(noise(*source[::-1]), target[::-1], backend)


def test_photo_equals_pillow(photo):
    assert_equals_pillow(photo[:400], (800, 1024), "torch")


@pytest.mark.parametrize(
    ("version", "source", "target", "vertical_first"),
    [
        ((12, 1), (604, 6), (20, 9), False),
        ((12, 2), (604, 6), (20, 9), True),
        ((12, 2), (600, 6), (20, 9), False),  # not taller than 100 times its width
        ((12, 2), (604, 6), (610, 9), False),
        ((13, 0), (60, 31), (20, 90), True),
        ((12, 2), (60, 31), (20, 90), False),
        ((13, 0), (60, 55), (20, 35), False),
        ((13, 0), (60, 54), (20, 35), True),
    ],
    ids=str,
)
def test_passes_follow_the_version_of_pillow(version, source, target, vertical_first, monkeypatch):
    """The order in which Pillow of that version was seen to work, as two calls of the Pillow that is here."""
    monkeypatch.setattr("sam_fast.ops.resize._PILLOW", version)
    image = noise(*source)
    between = (target[0], source[1]) if vertical_first else (source[0], target[1])
    expected = by_pillow(by_pillow(image, between), target)
    np.testing.assert_array_equal(resize(torch.tensor(image), target, backend="torch").numpy(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_is_read_and_none_is_changed(backend):
    image = torch.tensor(noise(8, 12), device=DEVICE)
    before = image.clone()
    for view in (image.transpose(0, 1), image[1::2, ::3], image.flip(2)):
        expected = by_pillow(view.cpu().contiguous().numpy(), (3, 5))
        np.testing.assert_array_equal(resize(view, (3, 5), backend=backend).cpu().numpy(), expected)
    same = resize(image, (8, 12), backend=backend)
    assert torch.equal(image, before) and same.data_ptr() != image.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["RGB", "BGR"])
@pytest.mark.parametrize(
    ("source", "size", "side"),
    [
        ((10, 15), (5, 8), 8),
        ((15, 5), (8, 3), 8),
        ((30, 2), (8, 1), 9),
        ((3, 5), (5, 8), 8),
        ((8, 5), (8, 5), 8),
        ((8, 10), (8, 5), 8),
        ((10, 8), (5, 8), 8),
        ((1, 1), (7, 7), 7),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_preprocess_equals_the_model(source, size, side, reverse, dtype, backend, tiny):
    image = noise(*source)
    pixels = torch.full((3, side, side), torch.nan, dtype=dtype, device=DEVICE)
    got = preprocess_image_(
        pixels, torch.tensor(image, device=DEVICE), size, MEAN, STD, reverse=reverse, backend=backend
    )
    resized = torch.tensor(by_pillow(image, size)).permute(2, 0, 1)
    expected = by_the_model(tiny, resized.flip(0) if reverse else resized, side)
    assert got is pixels
    # float32 subtracts and divides as PyTorch does, and narrower formats round that once; the interpreter cuts bfloat16
    cuts = backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16
    torch.testing.assert_close(got.cpu(), expected.to(dtype), rtol=2**-7 if cuts else 0, atol=0)


def by_the_model(model: Sam, resized: torch.Tensor, side: int) -> torch.Tensor:
    """`Sam.preprocess` for another input side."""
    padded = torch.zeros(3, side, side)
    normalised = (resized - model.pixel_mean.cpu()) / model.pixel_std.cpu()
    padded[:, : resized.shape[1], : resized.shape[2]] = normalised
    return padded


def test_preprocess_is_that_of_the_model(tiny, photo):
    """What `by_the_model` says is what the model does."""
    resized = torch.tensor(by_pillow(photo[:384], (192, 256))).permute(2, 0, 1)
    assert torch.equal(by_the_model(tiny, resized, 256), tiny.preprocess(resized).cpu())


def test_preprocess_writes_into_a_batch():
    """Offsets count from the tensor that is given, and neighbours stay as they are."""
    batch = torch.full((3, 3, 16, 16), torch.nan, device=DEVICE)
    image = torch.tensor(noise(12, 9), device=DEVICE)
    preprocess_image_(batch[1], image, (16, 12), MEAN, STD, backend="triton")
    assert batch[0].isnan().all() and batch[2].isnan().all() and batch[1].isfinite().all()


@pytest.mark.parametrize(
    ("image", "size", "error", "message"),
    [
        (np.zeros((4, 5, 3), np.uint8), (2, 2), TypeError, "ndarray"),
        (torch.zeros(4, 5, 3), (2, 2), ValueError, "uint8"),
        (torch.zeros(4, 5, dtype=torch.uint8), (2, 2), ValueError, r"\(4, 5\)"),
        (torch.zeros(3, 4, 5, dtype=torch.uint8), (2, 2), ValueError, r"\(3, 4, 5\)"),
        (torch.zeros(0, 5, 3, dtype=torch.uint8), (2, 2), ValueError, r"2\*\*24"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), (0, 2), ValueError, r"2\*\*24"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), (1 << 24, 2), ValueError, r"2\*\*24"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), (2, 2, 3), ValueError, "height, width"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), (2.5, 2), TypeError, "integer"),
    ],
)
def test_bad_input(image, size, error, message):
    with pytest.raises(error, match=message):
        resize(image, size)


def test_bad_pixels_and_statistics():
    image = torch.zeros(4, 5, 3, dtype=torch.uint8, device=DEVICE)
    good = torch.empty(3, 8, 8, device=DEVICE)
    for pixels, message in (
        (good[:, :, :7], "contiguous"),
        (torch.empty(3, 4, 4, device=DEVICE), "S >= 8"),
        (good.double(), "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            preprocess_image_(pixels, image, (6, 8), MEAN, STD)
    with pytest.raises(ValueError, match="mean must be"):
        preprocess_image_(good, image, (6, 8), MEAN[:1], STD)
    with pytest.raises(ValueError, match="std must be"):
        preprocess_image_(good, image, (6, 8), MEAN, STD.half())


def test_there_is_no_native_backend():
    image = torch.zeros(4, 5, 3, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(RuntimeError, match="no 'native' backend"):
        resize(image, (2, 2), backend="native")
    assert unavailable_reason("resize", "torch", DEVICE) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_are_registered_well(backend):
    image = torch.tensor(noise(6, 7), device=DEVICE)
    torch.library.opcheck(torch.ops.sam_fast.resize.default, (image, 3, 9, backend))
    pixels = torch.zeros(3, 8, 8, device=DEVICE)
    torch.library.opcheck(
        torch.ops.sam_fast.preprocess_image_.default, (pixels, image, 3, 8, MEAN, STD, False, backend)
    )


def test_compiles_as_one_graph():
    image = torch.tensor(noise(12, 9), device=DEVICE)

    def call(image: torch.Tensor) -> torch.Tensor:
        resized = resize(image, (10, 8))
        return preprocess_image_(torch.empty(3, 8, 8, device=DEVICE), resized, (8, 7), MEAN, STD) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), call(image), rtol=0, atol=0)
