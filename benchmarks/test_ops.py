"""Micro-benchmarks of the operations against their references and the libraries they replace.

Run with `python -m pytest benchmarks/test_ops.py --benchmark-only`. Each group is one task on the same input; the
results of its contenders are compared before they are timed.
"""

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


@pytest.mark.benchmark(group="postprocess_masks")
@pytest.mark.parametrize("contender", ["native", "torch"])
@pytest.mark.parametrize("return_bits", [True, False], ids=["bits", "no bits"])
def test_postprocess_masks(benchmark, return_bits, contender):
    logits = make_logits("blurred", N)
    sizes = (input_size(HEIGHT, WIDTH), (HEIGHT, WIDTH), IMAGE_SIZE)
    out = benchmark(lambda: postprocess_masks(logits, *sizes, return_bits=return_bits, backend=contender))
    assert torch.equal(out.area, postprocess_masks(logits, *sizes, backend="torch").area)


@pytest.mark.benchmark(group="resize_logits")
@pytest.mark.parametrize("contender", ["native", "torch"])
def test_resize_logits(benchmark, contender):
    logits = make_logits("blurred", N)
    sizes = (input_size(HEIGHT, WIDTH), (HEIGHT, WIDTH), IMAGE_SIZE)
    image = benchmark(lambda: resize_logits(logits, *sizes, backend=contender))
    torch.testing.assert_close(image, resize_logits(logits, *sizes, backend="torch"))


def coco_encode(masks: torch.Tensor) -> list[dict]:
    return coco.encode(np.asfortranarray(masks.numpy().transpose(1, 2, 0).astype(np.uint8)))


@pytest.mark.benchmark(group="pack_masks")
@pytest.mark.parametrize("contender", ["native", "torch", "numpy"])
def test_pack_masks(benchmark, masks, bits, contender):
    if contender == "numpy":
        packed = benchmark(lambda: np.packbits(masks.numpy(), axis=-1, bitorder="little"))
        assert np.array_equal(packed, bits.numpy()[..., : packed.shape[-1]])
    else:
        assert torch.equal(benchmark(lambda: pack_masks(masks, backend=contender)), bits)


@pytest.mark.benchmark(group="unpack_masks")
@pytest.mark.parametrize("contender", ["native", "torch", "numpy"])
def test_unpack_masks(benchmark, masks, bits, contender):
    if contender == "numpy":
        array = bits.numpy()
        unpacked = benchmark(lambda: np.unpackbits(array, axis=-1, count=WIDTH, bitorder="little"))
        assert np.array_equal(unpacked, masks.numpy())
    else:
        assert torch.equal(benchmark(lambda: unpack_masks(bits, WIDTH, backend=contender)), masks)


@pytest.mark.benchmark(group="encode to COCO strings")
@pytest.mark.parametrize("contender", ["native", "torch", "pycocotools"])
def test_encode_coco_rle(benchmark, masks, bits, contender):
    if contender == "pycocotools":
        codes = benchmark(lambda: coco_encode(masks))
    else:
        codes = benchmark(lambda: encode_coco_rle(bits, WIDTH, backend=contender))
        codes = [{**code, "counts": code["counts"].encode()} for code in codes]
    assert codes == coco_encode(masks)


@pytest.mark.benchmark(group="encode to counts")
@pytest.mark.parametrize("contender", ["native", "torch"])
def test_encode_rle(benchmark, masks, bits, contender):
    codes = benchmark(lambda: encode_rle(bits, WIDTH, backend=contender))
    assert [compress_counts(code["counts"]).encode() for code in codes] == [c["counts"] for c in coco_encode(masks)]


@pytest.mark.benchmark(group="decode COCO strings")
@pytest.mark.parametrize("contender", ["native", "torch", "pycocotools"])
def test_decode_rle(benchmark, masks, bits, contender):
    codes = coco_encode(masks)
    if contender == "pycocotools":
        assert np.array_equal(benchmark(lambda: coco.decode(codes)), masks.numpy().transpose(1, 2, 0))
    else:
        assert torch.equal(benchmark(lambda: decode_rle(codes, backend=contender)), bits)


@pytest.mark.benchmark(group="compress counts")
@pytest.mark.parametrize("contender", ["native", "torch", "pycocotools"])
def test_compress_counts(benchmark, bits, contender):
    code = encode_rle(bits, WIDTH)[0]
    if contender == "pycocotools":
        text = benchmark(lambda: coco.frPyObjects(code, HEIGHT, WIDTH)["counts"].decode())
    else:
        text = benchmark(lambda: compress_counts(code["counts"], backend=contender))
    assert decompress_counts(text) == code["counts"]


@pytest.mark.benchmark(group="nms of 3072 boxes")
@pytest.mark.parametrize("threshold", [0.7, 0.3])
@pytest.mark.parametrize("contender", ["native", "torch"])
def test_nms(benchmark, boxes, threshold, contender):
    kept = benchmark(lambda: nms(*boxes, threshold, backend=contender))
    assert torch.equal(kept, nms(*boxes, threshold, backend="torch"))


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
        benchmark(lambda: [opencv_fill_holes(mask, 100) for mask in masks.numpy()])
    else:
        filled, changed = benchmark(lambda: remove_small_regions(bits, WIDTH, 100, "holes", backend=contender))
        assert changed.all()
        assert np.array_equal(unpack_masks(filled, WIDTH).numpy(), expected)
