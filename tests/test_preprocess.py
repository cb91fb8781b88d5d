"""Every kind of image a user may pass, and its way to the model's input."""

import copy
import io
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from sam_fast import SamPredictor
from sam_fast.preprocess import prepare_image, preprocess_images, preprocesses_plainly, read_image
from tests.oracle import TINY, official

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OfficialResize = official.utils.transforms.ResizeLongestSide


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (13, 21, 3), dtype=np.uint8)


def assert_is_rgb(result: np.ndarray, expected: np.ndarray) -> None:
    assert result.dtype == np.uint8 and result.flags.c_contiguous
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("layout", ["plain", "read_only", "negative_strides", "strided", "fortran", "transposed"])
def test_arrays_of_any_layout(rgb, layout):
    image = {
        "plain": lambda: rgb,
        "read_only": lambda: np.frombuffer(rgb.tobytes(), np.uint8).reshape(rgb.shape),
        "negative_strides": lambda: rgb[::-1, ::-1],
        "strided": lambda: rgb[::2, 1::3],
        "fortran": lambda: np.asfortranarray(rgb),
        "transposed": lambda: rgb.transpose(1, 0, 2),
    }[layout]()
    before = image.copy()
    assert_is_rgb(read_image(image), image)
    np.testing.assert_array_equal(image, before)


def test_contiguous_rgb_is_not_copied(rgb):
    assert np.shares_memory(read_image(rgb), rgb)


def test_bgr_arrays_are_turned(rgb):
    assert_is_rgb(read_image(rgb, "BGR"), rgb[:, :, ::-1])


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_alpha_is_dropped(rgb, image_format):
    alpha = np.full((*rgb.shape[:2], 1), 7, np.uint8)
    ordered = rgb if image_format == "RGB" else rgb[:, :, ::-1]
    assert_is_rgb(read_image(np.concatenate([ordered, alpha], axis=2), image_format), rgb)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_gray_becomes_three_equal_channels(rgb, image_format):
    gray = rgb[:, :, 0]
    expected = np.stack([gray] * 3, axis=2)
    for image in [gray, gray[:, :, None], torch.from_numpy(gray.copy()), torch.from_numpy(gray.copy())[None]]:
        assert_is_rgb(read_image(image, image_format), expected)


def test_tensors_have_channels_first(rgb):
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)
    assert_is_rgb(read_image(tensor), rgb)
    assert_is_rgb(read_image(tensor.contiguous()), rgb)
    assert_is_rgb(read_image(tensor.flip(0), "BGR"), rgb)
    with_alpha = torch.cat([tensor, torch.full((1, *tensor.shape[1:]), 9, dtype=torch.uint8)])
    assert_is_rgb(read_image(with_alpha), rgb)


def test_pillow_modes_with_colour(rgb):
    image = Image.fromarray(rgb)
    assert_is_rgb(read_image(image), rgb)
    assert_is_rgb(read_image(image, "BGR"), rgb)  # a Pillow image knows its order
    transparent = image.copy()
    transparent.putalpha(Image.new("L", image.size, 3))
    assert_is_rgb(read_image(transparent), rgb)
    for mode in ["P", "CMYK", "YCbCr", "HSV"]:
        converted = image.convert(mode)
        assert_is_rgb(read_image(converted), np.asarray(converted.convert("RGB")))


def test_pillow_modes_without_colour(rgb):
    gray = rgb[:, :, 0]
    expected = np.stack([gray] * 3, axis=2)
    image = Image.fromarray(gray)
    assert_is_rgb(read_image(image), expected)
    assert_is_rgb(read_image(Image.merge("LA", [image, Image.new("L", image.size, 5)])), expected)
    bits = image.point(lambda value: 255 * (value > 127)).convert("1", dither=Image.Dither.NONE)
    assert_is_rgb(read_image(bits), np.where(expected > 127, 255, 0).astype(np.uint8))


@pytest.mark.parametrize("dtype", [np.uint16, ">u2", np.int32], ids=["I;16", "I;16B", "I"])
def test_sixteen_bit_gray_is_scaled(dtype):
    levels = np.array([[0, 128, 129, 257, 32768, 65535]])
    image = Image.fromarray(levels.astype(dtype))
    expected = np.round(levels / 257).astype(np.uint8)
    assert_is_rgb(read_image(image), np.stack([expected] * 3, axis=2))


def test_sixteen_bit_png_is_scaled(tmp_path):
    levels = np.linspace(0, 65535, 256 * 4).round().astype(np.uint16).reshape(32, 32)
    Image.fromarray(levels).save(tmp_path / "gray.png")
    result = read_image(tmp_path / "gray.png")
    np.testing.assert_array_equal(result[:, :, 0], np.round(levels / 257).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright(tmp_path, rgb, orientation):
    stored = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: rgb.transpose(1, 0, 2)[::-1],
        7: rgb.transpose(1, 0, 2)[::-1, ::-1],
        8: rgb.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert_is_rgb(read_image(path), rgb)
    assert_is_rgb(read_image(str(path), "BGR"), rgb)  # a file knows its order
    with Image.open(path) as opened:
        assert_is_rgb(read_image(opened), stored)  # Pillow images are taken as they are


@pytest.mark.parametrize("form", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_files_are_turned_as_by_pillow(tmp_path, rgb, orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{form}"
    Image.fromarray(rgb).save(path, exif=exif)
    with Image.open(path) as opened:
        assert_is_rgb(read_image(path), np.asarray(ImageOps.exif_transpose(opened)))


@pytest.mark.parametrize(
    ("tag", "kind", "count", "value"),
    [
        (0x011A, 2, 3, b"72\0"),
        (0x0132, 5, 1, struct.pack("<II", 1, 2)),
        (0x0100, 9, 1, struct.pack("<i", -5)),
        (0x011A, 11, 1, struct.pack("<f", np.nan)),
        (0x0111, 2, 3, b"ab\0"),
    ],
    ids=["text-resolution", "rational-date", "negative-width", "nan-resolution", "text-offset"],
)
def test_odd_exif_does_not_matter(tmp_path, rgb, tag, kind, count, value):
    """A JPEG to be turned by a quarter, with one more tag of a wrong type or value."""
    rest = value if len(value) > 4 else b""
    entry = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", 38)  # behind header, two entries, end
    tags = struct.pack("<HHHIHHHHI", 2, 0x0112, 3, 1, 6, 0, tag, kind, count) + entry
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags + bytes(4) + rest
    Image.fromarray(rgb).save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as opened:
        assert_is_rgb(read_image(tmp_path / "photo.jpg"), np.rot90(np.asarray(opened), -1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5, 3), np.float32), "uint8.*float32"),
        (np.full((4, 5, 3), np.nan), "uint8.*float64"),
        (np.zeros((4, 5, 3), np.uint16), "uint8.*uint16"),
        (np.zeros((4, 5), bool), "uint8.*bool"),
        (np.zeros((3, 4, 5), np.uint8), r"\(3, 4, 5\).*transpose"),
        (np.zeros((4, 5, 2), np.uint8), r"\(4, 5, 2\)"),
        (np.zeros((1, 4, 5, 3), np.uint8), r"\(1, 4, 5, 3\)"),
        (np.zeros(5, np.uint8), r"\(5,\)"),
        (np.zeros((0, 5, 3), np.uint8), r"empty.*\(0, 5, 3\)"),
        (np.zeros((5, 0), np.uint8), "empty"),
        (torch.zeros(3, 4, 5), "uint8.*float32"),
        (torch.zeros(6, 5, 3, dtype=torch.uint8), r"\(6, 5, 3\).*permute"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), r"\(1, 3, 4, 5\)"),
        (torch.zeros(3, 0, 5, dtype=torch.uint8), "empty"),
        (Image.new("F", (4, 5)), "mode F"),
        (Image.new("I", (4, 5), -1), "mode I"),
        (Image.new("La", (4, 5)), "mode La"),
        (Image.new("RGB", (0, 5)), "empty"),
    ],
)
def test_wrong_values_raise(image, message):
    with pytest.raises(ValueError, match=message):
        read_image(image)


@pytest.mark.parametrize("image", [None, [[1, 2], [3, 4]], b"png", io.BytesIO()])
def test_wrong_types_raise(image):
    with pytest.raises(TypeError, match=type(image).__name__):
        read_image(image)


def test_wrong_format_raises(rgb):
    with pytest.raises(ValueError, match="GBR"):
        read_image(rgb, "GBR")


def test_bad_files_raise_with_their_name(tmp_path, rgb):
    with pytest.raises(FileNotFoundError, match="missing"):
        read_image(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("not a picture")
    encoded = io.BytesIO()
    Image.fromarray(np.tile(rgb, (20, 20, 1))).save(encoded, "PNG")
    (tmp_path / "cut.png").write_bytes(encoded.getvalue()[: len(encoded.getvalue()) // 2])
    for name in ["text.png", "cut.png"]:
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match=tmp_path.name):
        read_image(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, MemoryError])
def test_whatever_a_decoder_raises_is_a_bad_file(tmp_path, rgb, monkeypatch, error):
    """But for a lack of memory, of which the file is innocent."""
    Image.fromarray(rgb).save(tmp_path / "photo.png")

    def fail(self):
        raise error("failed to decode")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError if error is MemoryError else ValueError, match="failed to decode") as caught:
        read_image(tmp_path / "photo.png")
    assert ("photo.png is not a readable image" in str(caught.value)) == (error is not MemoryError)


@pytest.mark.parametrize("size", [(13, 21), (64, 64), (1, 1), (63, 2), (700, 31)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_prepare_image_equals_official_resize(size):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    image.flags.writeable = False
    tensor, input_size, original_size = prepare_image(image, 64)
    expected = OfficialResize(64).apply_image(image)
    assert tensor.dtype == torch.uint8 and tensor.is_contiguous()
    np.testing.assert_array_equal(tensor[0].permute(1, 2, 0).numpy(), expected)
    assert (input_size, original_size) == (expected.shape[:2], size)


@pytest.mark.parametrize("size", [(20000, 50), (50, 20000), (20000, 3)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_prepare_image_keeps_thin_images(size):
    tensor, input_size, original_size = prepare_image(np.full((*size, 3), 200, np.uint8), 1024)
    assert tuple(tensor.shape[2:]) == input_size and max(input_size) == 1024 and min(input_size) >= 1
    assert original_size == size and (tensor == 200).all()


def test_prepare_image_refuses_what_read_image_did_not_make(rgb):
    for image in [rgb[:, :, :2], rgb.astype(np.float32), rgb[:, :, 0], rgb[:0]]:
        with pytest.raises(ValueError, match="uint8"):
            prepare_image(image, 64)


# -- on the device


@pytest.fixture(params=["RGB", "BGR"])
def model(tiny, request):
    """The tiny model, one that wants its channels in this order."""
    model = copy.deepcopy(tiny).to(DEVICE)
    model.image_format = request.param
    return model


def by_prepare_image(model, image, image_format):
    array = read_image(image, image_format)
    ordered = array if model.image_format == "RGB" else np.ascontiguousarray(array[..., ::-1])
    tensor, input_size, original_size = prepare_image(ordered, model.image_encoder.img_size)
    return model.preprocess(tensor.to(model.device))[0], input_size, original_size


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_device_equals_pillow_and_model(model, rgb, photo, image_format, tmp_path):
    Image.fromarray(rgb).save(tmp_path / "file.png")
    images = [
        photo[:300],
        rgb,
        rgb[::-1, ::2],
        rgb[..., 0],
        np.dstack([rgb, rgb[..., :1]]),
        torch.from_numpy(rgb).permute(2, 0, 1),
        torch.from_numpy(rgb).permute(2, 0, 1).to(DEVICE),
        torch.from_numpy(rgb[..., 0].copy()).to(DEVICE),
        Image.fromarray(rgb),
        str(tmp_path / "file.png"),
        np.zeros((700, 2, 3), np.uint8),
    ]
    got = preprocess_images(images, model, image_format)
    assert got.pixels.shape == (len(images), 3, TINY.image_size, TINY.image_size)
    for i, image in enumerate(images):
        pixels, input_size, original_size = by_prepare_image(model, image, image_format)
        assert (got.input_sizes[i], got.original_sizes[i]) == (input_size, original_size)
        torch.testing.assert_close(got.pixels[i], pixels, rtol=0, atol=0)


def test_device_by_kernels(tiny, rgb):
    """A model of a small input, as kernels are interpreted where there is no GPU."""
    model = copy.deepcopy(tiny).to(DEVICE)
    model.image_encoder.img_size = 16
    images = [rgb, rgb.transpose(1, 0, 2), rgb[:1, :1]]
    for dtype in (torch.float32, torch.float16):
        got = preprocess_images(images, model, "BGR", dtype=dtype, backend="triton")
        for i, image in enumerate(images):
            expected = by_prepare_image(model, image, "BGR")[0].to(dtype)
            torch.testing.assert_close(got.pixels[i], expected, rtol=0, atol=0)


@pytest.mark.parametrize("image", [torch.zeros(3, 4, 5), torch.zeros(3, 0, 5, dtype=torch.uint8), "nothing.png", 3])
def test_device_refuses_what_read_image_refuses(model, image):
    image = image.to(DEVICE) if isinstance(image, torch.Tensor) else image
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as expected:
        read_image(image)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        preprocess_images([image], model)
    with pytest.raises(ValueError, match="GBR"):
        preprocess_images([image], model, "GBR")


def test_predictor_encodes_originals(model, rgb, photo):
    predictor = SamPredictor(model, precision="fp32")
    images = [photo[:100, :90], rgb]
    embeddings = predictor._encode_originals(images, "BGR")
    for image, got in zip(images, embeddings, strict=True):
        tensor, input_size, original_size = prepare_image(read_image(image, "BGR"), TINY.image_size)
        ordered = tensor if model.image_format == "RGB" else tensor.flip(1)
        expected = predictor.runtime.encode(ordered.to(DEVICE), [original_size])[0]
        assert (got.input_size, got.original_size) == (input_size, original_size)
        assert (got.image_size, got.image_format) == (expected.image_size, model.image_format)
        torch.testing.assert_close(got.features, expected.features, rtol=1e-4, atol=1e-4)
    assert predictor._encode_originals([], "RGB") == []


def test_a_replaced_preprocess_is_called(tiny):
    assert preprocesses_plainly(tiny)

    class Whitened(type(tiny)):
        def preprocess(self, x):
            return x

    models = [copy.deepcopy(tiny) for _ in range(5)]
    models[0].__class__ = Whitened
    models[1].preprocess = lambda x: x
    models[2].half()
    models[3].pixel_std = torch.ones(1)
    models[4].image_format = "YUV"
    for model in models:
        assert not preprocesses_plainly(model)


def test_which_predictors_use_kernels(tiny):
    ours = copy.deepcopy(tiny).to(DEVICE)
    assert SamPredictor(ours)._preprocesses_by_kernels()
    assert not SamPredictor(ours, backend="torch")._preprocesses_by_kernels()
    ours.image_encoder.double()
    assert not SamPredictor(ours)._preprocesses_by_kernels()
