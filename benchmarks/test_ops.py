"""Micro-benchmarks of the operations against their references and the libraries they replace.

Run with `python -m pytest benchmarks/test_ops.py --benchmark-only`. Each group is one task on the same input; the
result of a contender is checked before it is timed, and a wrong one has no time.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from benchmarks.postprocess import IMAGE_SIZE, input_size, make_logits
from sam_fast.ops.connected_components import remove_small_regions
from sam_fast.ops.nms import nms
from sam_fast.ops.packed_masks import pack_masks, unpack_masks
from sam_fast.ops.postprocess_masks import postprocess_masks, resize_logits
from sam_fast.ops.rle import compress_counts, decode_rle, decompress_counts, encode_coco_rle, encode_rle

N, HEIGHT, WIDTH = 3, 1200, 1800  # the masks of one prompt on a photo


@pytest.fixture(scope="module")
def masks() -> torch.Tensor:
    """Smooth blobs as a decoder makes them, with a few specks. [N, HEIGHT, WIDTH] bool."""
    rng = np.random.default_rng(0)
    smooth = [cv2.GaussianBlur(rng.standard_normal((HEIGHT, WIDTH)), (0, 0), 40) for _ in range(N)]
    blobs = np.stack([field > field.std() for field in smooth])
    return torch.from_numpy(blobs ^ (rng.random(blobs.shape) < 1e-4))


@pytest.fixture(scope="module")
def bits(masks) -> torch.Tensor:
    return pack_masks(masks)


@pytest.fixture(scope="module")
def boxes() -> tuple[torch.Tensor, torch.Tensor]:
    """3072 boxes of all sizes in an image, of which about half survive, as in automatic mask generation."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(3072, 2, generator=generator) * 1000
    size = torch.rand(3072, 2, generator=generator) * 500 + 10
    return torch.cat([centre - size / 2, centre + size / 2], dim=1), torch.rand(3072, generator=generator)


def check_and_time(benchmark: Any, call: Callable[[], Any], check: Callable[[Any], bool]) -> None:
    """Time a call whose result passes."""
    assert check(call())
    benchmark(call)


@pytest.mark.parametrize("contender", ["native", "torch"])
@pytest.mark.parametrize("return_bits", [True, False], ids=["bits", "no bits"])
def test_postprocess_masks(benchmark, return_bits, contender):
    benchmark.group = f"postprocess_masks{'' if return_bits else ', no bits'}"
    logits = make_logits("blurred", N)
    sizes = (input_size(HEIGHT, WIDTH), (HEIGHT, WIDTH), IMAGE_SIZE)
    expected = postprocess_masks(logits, *sizes, backend="torch")
    check_and_time(
        benchmark,
        lambda: postprocess_masks(logits, *sizes, return_bits=return_bits, backend=contender),
        lambda out: torch.equal(out.area, expected.area) and (out.bits is not None) == return_bits,
    )


@pytest.mark.benchmark(group="resize_logits")
@pytest.mark.parametrize("contender", ["native", "torch"])
def test_resize_logits(benchmark, contender):
    logits = make_logits("blurred", N)
    sizes = (input_size(HEIGHT, WIDTH), (HEIGHT, WIDTH), IMAGE_SIZE)
    expected = resize_logits(logits, *sizes, backend="torch")
    check_and_time(
        benchmark,
        lambda: resize_logits(logits, *sizes, backend=contender),
        lambda image: torch.allclose(image, expected, rtol=1.3e-6, atol=1e-5),
    )


def coco_encode(masks: torch.Tensor) -> list[dict]:
    return coco.encode(np.asfortranarray(masks.numpy().transpose(1, 2, 0).astype(np.uint8)))


@pytest.mark.benchmark(group="pack_masks")
@pytest.mark.parametrize("contender", ["native", "torch", "numpy"])
def test_pack_masks(benchmark, masks, bits, contender):
    if contender == "numpy":
        check_and_time(
            benchmark,
            lambda: np.packbits(masks.numpy(), axis=-1, bitorder="little"),
            lambda packed: np.array_equal(packed, bits.numpy()[..., : packed.shape[-1]]),
        )
    else:
        check_and_time(
            benchmark, lambda: pack_masks(masks, backend=contender), lambda packed: torch.equal(packed, bits)
        )


@pytest.mark.benchmark(group="unpack_masks")
@pytest.mark.parametrize("contender", ["native", "torch", "numpy"])
def test_unpack_masks(benchmark, masks, bits, contender):
    if contender == "numpy":
        array = bits.numpy()
        check_and_time(
            benchmark,
            lambda: np.unpackbits(array, axis=-1, count=WIDTH, bitorder="little"),
            lambda unpacked: np.array_equal(unpacked, masks.numpy()),
        )
    else:
        check_and_time(
            benchmark,
            lambda: unpack_masks(bits, WIDTH, backend=contender),
            lambda unpacked: torch.equal(unpacked, masks),
        )


@pytest.mark.benchmark(group="encode to COCO strings")
@pytest.mark.parametrize("contender", ["native", "torch", "pycocotools"])
def test_encode_coco_rle(benchmark, masks, bits, contender):
    expected = coco_encode(masks)
    if contender == "pycocotools":
        check_and_time(benchmark, lambda: coco_encode(masks), lambda codes: codes == expected)
    else:
        check_and_time(
            benchmark,
            lambda: encode_coco_rle(bits, WIDTH, backend=contender),
            lambda codes: [{**code, "counts": code["counts"].encode()} for code in codes] == expected,
        )


@pytest.mark.benchmark(group="encode to counts")
@pytest.mark.parametrize("contender", ["native", "torch"])
def test_encode_rle(benchmark, masks, bits, contender):
    expected = [code["counts"] for code in coco_encode(masks)]
    check_and_time(
        benchmark,
        lambda: encode_rle(bits, WIDTH, backend=contender),
        lambda codes: [compress_counts(code["counts"]).encode() for code in codes] == expected,
    )


@pytest.mark.benchmark(group="decode COCO strings")
@pytest.mark.parametrize("contender", ["native", "torch", "pycocotools"])
def test_decode_rle(benchmark, masks, bits, contender):
    codes = coco_encode(masks)
    if contender == "pycocotools":
        check_and_time(
            benchmark,
            lambda: coco.decode(codes),
            lambda decoded: np.array_equal(decoded, masks.numpy().transpose(1, 2, 0)),
        )
    else:
        check_and_time(
            benchmark, lambda: decode_rle(codes, backend=contender), lambda decoded: torch.equal(decoded, bits)
        )


@pytest.mark.benchmark(group="compress counts")
@pytest.mark.parametrize("contender", ["native", "torch", "pycocotools"])
def test_compress_counts(benchmark, bits, contender):
    code = encode_rle(bits, WIDTH)[0]

    def compress() -> str:
        if contender == "pycocotools":
            return coco.frPyObjects(code, HEIGHT, WIDTH)["counts"].decode()
        return compress_counts(code["counts"], backend=contender)

    check_and_time(benchmark, compress, lambda text: decompress_counts(text) == code["counts"])


@pytest.mark.parametrize("threshold", [0.7, 0.3])
@pytest.mark.parametrize("contender", ["native", "torch"])
def test_nms(benchmark, boxes, threshold, contender):
    benchmark.group = f"nms of 3072 boxes at {threshold}"
    expected = nms(*boxes, threshold, backend="torch")
    check_and_time(
        benchmark,
        lambda: nms(*boxes, threshold, backend=contender),
        lambda kept: torch.equal(kept, expected),
    )


def opencv_fill_holes(mask: np.ndarray, area_threshold: int) -> np.ndarray:
    """The usual way with OpenCV: label the background, look up the small labels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=8)
    small = stats[:, cv2.CC_STAT_AREA] < area_threshold
    small[0] = False
    return mask | small[labels]


# The torch reference passes over the mask once per pixel of distance inside a region, so it is not timed at this size.
@pytest.mark.benchmark(group="fill small holes")
@pytest.mark.parametrize("contender", ["native", "opencv"])
def test_remove_small_regions(benchmark, masks, bits, contender):
    expected = np.stack([opencv_fill_holes(mask, 100) for mask in masks.numpy()])
    if contender == "opencv":
        check_and_time(
            benchmark,
            lambda: [opencv_fill_holes(mask, 100) for mask in masks.numpy()],
            lambda filled: np.array_equal(filled, expected),
        )
    else:
        check_and_time(
            benchmark,
            lambda: remove_small_regions(bits, WIDTH, 100, "holes", backend=contender),
            lambda out: out[1].all() and np.array_equal(unpack_masks(out[0], WIDTH).numpy(), expected),
        )
