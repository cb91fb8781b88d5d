"""Run-length codes: every backend against pycocotools, the definition, and each other."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sam_fast.ops import rle, rle_string
from sam_fast.ops.packed_masks import pack_masks, row_bytes, unpack_masks
from sam_fast.ops.rle import (
    compress_counts,
    decode_rle,
    decode_runs,
    decompress_counts,
    encode_coco_rle,
    encode_rle,
    encode_runs,
    measure_runs,
    rle_area,
)

try:
    from pycocotools import mask as coco
except ImportError:  # as on a machine that was set up to run this on its GPU
    coco = None

BACKENDS = ["native", "torch"]
SHAPES = [(1, 1, 1), (2, 1, 9), (2, 9, 1), (3, 5, 7), (2, 64, 64), (2, 33, 65), (1, 70, 1023), (1, 2, 64 * 1024 + 1)]


def random_masks(n: int, height: int, width: int, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    return torch.rand((n, height, width), generator=torch.Generator().manual_seed(seed)) < density


def coco_strings(masks: torch.Tensor) -> list[str]:
    """Compressed counts of pycocotools or, where that is not installed, of the reference, which is compared with it."""
    if coco is None:
        return [code["counts"] for code in encode_coco_rle(pack_masks(masks), masks.shape[2], backend="torch")]
    codes = [coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]
    return [code["counts"].decode() for code in codes]


def counts_by_definition(mask: torch.Tensor) -> list[int]:
    """Walk the mask column by column and count."""
    counts, colour = [0], False
    for pixel in mask.T.flatten().tolist():
        if pixel != colour:
            counts.append(0)
            colour = pixel
        counts[-1] += 1
    return counts


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty in the operation returns memory full of 0xAA, so that an unwritten byte shows."""

    def empty(*args, **kwargs):
        tensor = torch.full([*args] if isinstance(args[0], int) else args[0], 0, **kwargs)
        tensor.view(torch.uint8).fill_(0xAA)
        return tensor

    class PoisonedTorch:
        def __getattr__(self, name):
            return empty if name == "empty" else getattr(torch, name)

    monkeypatch.setattr(rle, "torch", PoisonedTorch())
    monkeypatch.setattr(rle_string, "torch", PoisonedTorch())


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_encode_and_decode(backend, shape, density, poisoned_empty):
    masks = random_masks(*shape, density)
    bits = pack_masks(masks)
    codes = encode_rle(bits, shape[2], backend=backend)
    assert [code["size"] for code in codes] == [list(shape[1:])] * shape[0]
    assert [code["counts"] for code in codes] == [counts_by_definition(mask) for mask in masks]
    assert [rle_area(code) for code in codes] == masks.flatten(1).sum(1).tolist()
    assert torch.equal(decode_rle(codes, backend=backend), bits)


@pytest.mark.skipif(coco is None, reason="needs pycocotools")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside of pycocotools
@pytest.mark.parametrize("shape", [(4, 37, 53), (2, 120, 200), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compressed_string_equals_pycocotools(backend, shape, poisoned_empty):
    masks = torch.cat([random_masks(*shape, density, seed=3) for density in (0.0, 0.001, 0.3, 0.99, 1.0)])
    # Blobs give the long runs whose differences take several digits of either sign.
    masks[0, shape[1] // 4 :, shape[2] // 3 :] = True
    bits = pack_masks(masks)
    theirs = [coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]
    ours = encode_coco_rle(bits, shape[2], backend=backend)
    assert [code["counts"].encode() for code in ours] == [code["counts"] for code in theirs]
    assert torch.equal(decode_rle(theirs, backend=backend), bits)
    assert torch.equal(torch.from_numpy(coco.decode(ours)).permute(2, 0, 1).bool(), masks)
    assert [rle_area(code) for code in ours] == coco.area(theirs).tolist()
    for code, uncompressed in zip(theirs, encode_rle(bits, shape[2]), strict=True):
        assert compress_counts(uncompressed["counts"], backend=backend).encode() == code["counts"]
        assert coco.frPyObjects(uncompressed, *shape[1:])["counts"] == code["counts"]
        assert decompress_counts(code["counts"], backend=backend) == uncompressed["counts"]
        assert decompress_counts(code["counts"].decode(), backend=backend) == uncompressed["counts"]


# a mask of 6 x 66 in a canvas: in the middle, in each corner, as wide or as high as the canvas
PLACEMENTS = [
    ((9, 80), (3, 2)),
    ((9, 80), (0, 0)),
    ((9, 80), (14, 0)),
    ((9, 80), (0, 3)),
    ((9, 80), (14, 3)),
    ((6, 80), (5, 0)),
    ((6, 80), (14, 0)),
    ((9, 66), (0, 1)),
    ((9, 66), (0, 3)),
    ((6, 66), (0, 0)),
]


@pytest.mark.parametrize("width", [64, 66])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize(("canvas_size", "offset"), PLACEMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_placed_in_a_canvas(backend, canvas_size, offset, density, width):
    masks = random_masks(3, 6, 66, density)
    height, x0, y0 = 6, *offset
    canvas = torch.zeros(3, *canvas_size, dtype=torch.bool)
    canvas[:, y0 : y0 + height, x0 : x0 + width] = masks[..., :width]
    bits = pack_masks(masks[..., :width])
    codes = encode_rle(bits, width, canvas_size=canvas_size, offset=offset, backend=backend)
    assert codes == [{"size": list(canvas_size), "counts": counts_by_definition(mask)} for mask in canvas]
    assert encode_coco_rle(bits, width, canvas_size=canvas_size, offset=offset, backend=backend) == [
        {"size": list(canvas_size), "counts": string} for string in coco_strings(canvas)
    ]


# ---- CUDA.


@pytest.mark.parametrize("shape", [*SHAPES[:-2], (2, 70, 191), (1, 2, 2049), (40, 9, 33)], ids=str)
def test_gpu_codes_are_those_of_the_definition(gpu, shape, poisoned_memory):
    for density in (0.0, 0.02, 0.5, 1.0):
        masks = random_masks(*shape, density)
        bits = pack_masks(masks, backend="torch")
        codes = encode_rle(bits.to(gpu), shape[2], backend="native")
        assert [code["counts"] for code in codes] == [counts_by_definition(mask) for mask in masks]
        strings = encode_coco_rle(bits.to(gpu), shape[2], backend="native")
        assert [code["counts"] for code in strings] == coco_strings(masks)
        counts, offsets = encode_runs(bits.to(gpu), shape[2], backend="native")
        assert counts.device.type == offsets.device.type == gpu.type
        assert torch.equal(decode_runs(counts, offsets, shape[1:], backend="native").cpu(), bits)


def test_gpu_masks_placed_in_a_canvas(gpu):
    for canvas_size, offset in PLACEMENTS:
        for width, density in ((31, 0.3), (64, 0.3), (64, 1.0), (66, 0.3), (66, 1.0)):
            masks = random_masks(3, 6, width, density)
            x0, y0 = offset
            canvas = torch.zeros(3, canvas_size[0], canvas_size[1] - 66 + width, dtype=torch.bool)
            canvas[:, y0 : y0 + 6, x0 : x0 + width] = masks
            bits = pack_masks(masks, backend="torch").to(gpu)
            place = {"canvas_size": tuple(canvas.shape[1:]), "offset": offset}
            codes = encode_rle(bits, width, **place, backend="native")
            assert [code["counts"] for code in codes] == [counts_by_definition(mask) for mask in canvas]
            strings = encode_coco_rle(bits, width, **place, backend="native")
            assert [code["counts"] for code in strings] == coco_strings(canvas)


@pytest.mark.parametrize("largest", [3, 15, 16, 511, 512, 2**63 - 1])
def test_gpu_strings_of_any_counts_fit(gpu, largest, poisoned_memory):
    """Differences of either sign, as large as they can be: a digit more from 16 and from 512 on."""
    lists = [[largest, 0, 0, largest, largest, 0, 0], [], [0], [largest], [0, 0, 0, 0, 0, largest] * 60]
    counts = torch.tensor([*itertools.chain(*lists)], device=gpu)
    offsets = torch.tensor([0, *itertools.accumulate(map(len, lists))], device=gpu)
    text, string_offsets = rle_string.encode_strings(counts, offsets, largest=largest, backend="native")
    assert rle_string.split_strings(text, string_offsets) == list(map(rle_string.compress_reference, lists))
    slow = rle_string.encode_strings(counts, offsets, backend="torch")
    assert torch.equal(slow[1], string_offsets) and torch.equal(slow[0], text[: len(slow[0])])


def test_gpu_edges(gpu):
    for height, width in [(5, 9), (0, 9), (5, 0), (0, 0)]:
        bits = torch.empty(0, height, row_bytes(width), dtype=torch.uint8, device=gpu)
        assert encode_rle(bits, width, backend="native") == encode_coco_rle(bits, width, backend="native") == []
    for height, width in [(0, 9), (5, 0)]:
        bits = torch.empty(2, height, row_bytes(width), dtype=torch.uint8, device=gpu)
        assert encode_rle(bits, width, backend="native") == [{"size": [height, width], "counts": [0]}] * 2
        placed = encode_coco_rle(bits, width, canvas_size=(6, 10), offset=(1, 1), backend="native")
        assert placed == [{"size": [6, 10], "counts": compress_counts([60], backend="torch")}] * 2
        back = decode_runs(*encode_runs(bits, width, backend="native"), (height, width), backend="native")
        assert back.shape == bits.shape
    huge = torch.zeros(1, 4, 8, dtype=torch.uint8)
    huge[0, :, 0] = 1
    place = {"canvas_size": (70_000, 70_000), "offset": (69_990, 69_000)}
    expected = [69_990 * 70_000 + 69_000, 4, 9 * 70_000 + 996]
    assert encode_rle(huge.to(gpu), 3, **place, backend="native")[0]["counts"] == expected
    text = encode_coco_rle(huge.to(gpu), 3, **place, backend="native")[0]["counts"]
    assert decompress_counts(text, backend="torch") == expected


def test_gpu_dirty_padding_and_odd_addresses(gpu):
    masks = random_masks(4, 12, 67)
    bits = pack_masks(masks, backend="torch")
    expected = encode_rle(bits, 67, backend="torch")
    bits[..., 9:] = 0xFF
    bits[..., 8] |= 0xF8
    odd = torch.empty(bits.numel() + 1, dtype=torch.uint8, device=gpu)[1:].view_as(bits).copy_(bits)
    assert encode_rle(odd, 67, backend="native") == expected
    assert encode_rle(odd[::2, ::3], 67, backend="native") == encode_rle(bits[::2, ::3], 67, backend="torch")


def test_gpu_refuses_counts_that_are_no_masks(gpu):
    for counts in ([3], [5], [], [-1, 5], [2**63 - 1, 2**63 - 1, 6], [1, -1, 4]):
        runs = torch.tensor([1, 3, *counts, 1, 3], device=gpu)
        offsets = torch.tensor([0, 2, 2 + len(counts), 4 + len(counts)], device=gpu)
        with pytest.raises(ValueError, match=r"mask 1 add up to .* has 4 pixels"):
            decode_runs(runs, offsets, (2, 2), backend="native")
    for bad in ([0, 2], [-1, 1], [0, 1, 0]):
        with pytest.raises(ValueError, match="offsets must ascend"):
            decode_runs(torch.tensor([4], device=gpu), torch.tensor(bad, device=gpu), (2, 2), backend="native")
    partial = decode_runs(torch.tensor([-7, 4, -9], device=gpu), torch.tensor([1, 2], device=gpu), (2, 2))
    assert not partial.any()
    zeros = torch.tensor([0, 2, 0, 2, 0, 1, 3, 0, 2, 2, 0], device=gpu)
    bits = decode_runs(zeros, torch.tensor([0, 11], device=gpu), (4, 3), backend="native").cpu()
    expected = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool).view(3, 4).T
    assert torch.equal(unpack_masks(bits, 3, backend="torch")[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches_and_sides(backend):
    for height, width in [(5, 9), (0, 9), (5, 0), (0, 0)]:
        bits = pack_masks(random_masks(0, height, width))
        assert encode_rle(bits, width, backend=backend) == []
        assert encode_coco_rle(bits, width, backend=backend) == []
    for height, width in [(0, 9), (5, 0)]:
        bits = pack_masks(random_masks(2, height, width))
        codes = encode_rle(bits, width, backend=backend)
        assert codes == [{"size": [height, width], "counts": [0]}] * 2
        assert torch.equal(decode_rle(codes, backend=backend), bits)
        placed = encode_rle(bits, width, canvas_size=(6, 10), offset=(1, 1), backend=backend)
        assert placed == [{"size": [6, 10], "counts": [60]}] * 2
    assert decode_rle([], backend=backend).shape == (0, 0, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_bits_and_dirty_padding(backend):
    masks = random_masks(4, 12, 67)
    bits = pack_masks(masks)
    expected = encode_rle(bits, 67)
    bits[..., 9:] = 0xFF
    bits[..., 8] |= 0xF8
    assert encode_rle(bits, 67, backend=backend) == expected
    assert encode_rle(bits[::2, ::3], 67, backend=backend) == encode_rle(pack_masks(masks[::2, ::3]), 67)


def test_more_pixels_than_32_bits_count():
    bits = torch.zeros(1, 4, 8, dtype=torch.uint8)
    bits[0, :, 0] = 1
    size = (70_000, 70_000)
    (code,) = encode_rle(bits, 3, canvas_size=size, offset=(69_990, 69_000))
    assert code["counts"] == [69_990 * 70_000 + 69_000, 4, 9 * 70_000 + 996]
    assert sum(code["counts"]) == 70_000**2
    for backend in BACKENDS:
        text = compress_counts(code["counts"], backend=backend)
        assert decompress_counts(text, backend=backend) == code["counts"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_counts_inside_a_code(backend):
    # Legal though no encoder writes it: runs of one colour that touch, also across a column end.
    code = {"size": [4, 3], "counts": [0, 2, 0, 2, 0, 1, 3, 0, 2, 2, 0]}
    expected = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool).view(3, 4).T
    assert torch.equal(unpack_masks(decode_rle([code], backend=backend), 3)[0], expected)


def test_large_batches_use_threads():
    masks = random_masks(11, 700, 601, density=0.05)  # above the sizes from which threads are used
    bits = pack_masks(masks)
    codes = encode_coco_rle(bits, 601, backend="native")
    assert [code["counts"] for code in codes] == coco_strings(masks)
    assert torch.equal(decode_rle(codes, backend="native"), bits)
    codes[7] = {"size": [700, 601], "counts": [5]}
    with pytest.raises(ValueError, match="mask 7 add up to 5,"):
        decode_rle(codes, backend="native")


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 200)),
    margins=st.tuples(*[st.integers(0, 3)] * 4),
    density=st.sampled_from([0.01, 0.3, 0.5, 0.97]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=80)
def test_random_shapes_and_placements(shape, margins, density, seed):
    _, height, width = shape
    left, right, top, bottom = margins
    bits = pack_masks(random_masks(*shape, density, seed))
    place = {"canvas_size": (height + top + bottom, width + left + right), "offset": (left, top)}
    native, reference = (encode_rle(bits, width, **place, backend=backend) for backend in BACKENDS)
    assert native == reference
    if shape[0]:
        whole = unpack_masks(decode_rle(native), width + left + right)
        assert torch.equal(pack_masks(whole[:, top : top + height, left : left + width]), bits)
        assert int(whole.sum()) == int(unpack_masks(bits, width).sum())


@given(st.lists(st.integers(0, 2**63 - 1), max_size=20))
@settings(deadline=None)
def test_strings_of_any_counts(counts):
    texts = {compress_counts(counts, backend=backend) for backend in BACKENDS}
    assert len(texts) == 1
    text = texts.pop()
    for backend in BACKENDS:
        assert decompress_counts(text, backend=backend) == counts


@given(st.binary(max_size=30) | st.text(st.characters(min_codepoint=46, max_codepoint=113), max_size=40))
@settings(deadline=None, max_examples=300)
def test_backends_agree_on_any_string(text):
    outcomes = []
    for backend in BACKENDS:
        try:
            outcomes.append(decompress_counts(text, backend=backend))
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12P", "end inside a number, after 3"),
        ("1/", "position 1"),
        ("1p", "position 1"),
        ("1é", "position 1"),
        ("11O", "position 2"),  # 'O' is -1
        ("n" * 13 + "0", "position 13"),
    ],
)
def test_malformed_strings(backend, text, message):
    with pytest.raises(ValueError, match=message):
        decompress_counts(text, backend=backend)
    with pytest.raises(ValueError, match=message):
        decode_rle([{"size": [2, 2], "counts": text}], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "counts", [[3], [5], [], [-1, 5], [2**63 - 1, 2**63 - 1, 6], [1, -1, 4]], ids=["short", "long", "none", *"abc"]
)
def test_counts_that_do_not_fill_the_mask(backend, counts):
    good = {"size": [2, 2], "counts": [1, 3]}
    with pytest.raises(ValueError, match=r"mask 1 add up to .* has 4 pixels"):
        decode_rle([good, {"size": [2, 2], "counts": counts}, good], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    bits = torch.zeros(1, 4, 8, dtype=torch.uint8)
    with pytest.raises(TypeError, match="uint8 tensor, got"):
        encode_rle(bits.bool(), 5, backend=backend)
    with pytest.raises(ValueError, match=r"\[N, H, 16\], got \[1, 4, 8\]"):
        encode_rle(bits, 65, backend=backend)
    with pytest.raises(ValueError, match=r"\[N, H, 8\], got \[4, 8\]"):
        encode_rle(bits[0], 5, backend=backend)
    for canvas_size, offset in [((4, 5), (1, 0)), ((3, 5), (0, 0)), ((9, 9), (-1, 0)), ((9, 9), (0, 6))]:
        with pytest.raises(ValueError, match="not inside a canvas"):
            encode_rle(bits, 5, canvas_size=canvas_size, offset=offset, backend=backend)
    with pytest.raises(ValueError, match="must be of one size"):
        decode_rle([{"size": [1, 2], "counts": [2]}, {"size": [2, 1], "counts": [2]}], backend=backend)
    with pytest.raises(ValueError, match="size must be"):
        decode_rle([{"size": [-1, 2], "counts": [2]}], backend=backend)
    with pytest.raises(TypeError, match="counts must be integers"):
        decode_rle([{"size": [2, 2], "counts": [1.5, 2.5]}], backend=backend)
    with pytest.raises(TypeError, match="counts must be integers"):
        compress_counts([[1], [2]], backend=backend)
    assert compress_counts(np.array([1, 3], dtype=np.int32), backend=backend) == compress_counts([1, 3])
    with pytest.raises(TypeError, match="str or bytes, got int"):
        decompress_counts(3, backend=backend)
    with pytest.raises(ValueError, match="not be negative, got -2"):
        compress_counts([3, -2], backend=backend)
    with pytest.raises(ValueError, match="below 2"):
        compress_counts([2**64], backend=backend)
    with pytest.raises(TypeError, match="offsets must be an int64 tensor"):
        decode_runs(torch.tensor([4]), torch.tensor([0.0, 1.0]), (2, 2), backend=backend)
    for offsets in ([0, 2], [-1, 1], [0, 1, 0]):
        with pytest.raises(ValueError, match="offsets must ascend"):
            decode_runs(torch.tensor([4]), torch.tensor(offsets), (2, 2), backend=backend)
    with pytest.raises(ValueError, match="backend must be"):
        encode_rle(bits, 5, backend="fast")


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_are_registered_well(backend):
    bits = pack_masks(random_masks(2, 5, 70))
    torch.library.opcheck(torch.ops.sam_fast.encode_rle.default, (bits, 70, 9, 80, 4, 3, backend))
    torch.library.opcheck(torch.ops.sam_fast.decode_rle.default, (*encode_runs(bits, 70), 5, 70, backend))


def test_compiles_as_one_graph():
    def round_trip(bits):
        counts, offsets = encode_runs(bits, 70)
        return decode_runs(counts, offsets, (5, 70)), counts

    bits = pack_masks(random_masks(2, 5, 70))
    back, counts = torch.compile(round_trip, fullgraph=True, backend="aot_eager")(bits)
    assert torch.equal(back, bits)
    assert torch.equal(counts, encode_runs(bits, 70)[0])


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_areas_and_boxes_of_runs(density):
    masks = torch.rand(30, 9, 13, generator=torch.Generator().manual_seed(0)) < density
    areas, boxes = measure_runs(*encode_runs(pack_masks(masks), 13), 9)
    for mask, area, box in zip(masks, areas, boxes, strict=True):
        y, x = mask.nonzero(as_tuple=True)
        expected = [int(x.min()), int(y.min()), int(x.max()), int(y.max())] if len(x) else [0, 0, 0, 0]
        assert box.tolist() == expected and int(area) == len(x)


def test_areas_and_boxes_of_unusual_runs():
    """No masks at all, and runs of no length inside of a code."""
    areas, boxes = measure_runs(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 9)
    assert areas.shape == (0,) and boxes.shape == (0, 4)
    counts, offsets = torch.tensor([12, 0, 2, 0, 2, 0, 1, 3, 0, 2, 2, 0]), torch.tensor([0, 1, 12])
    areas, boxes = measure_runs(counts, offsets, 4)
    assert areas.tolist() == [0, 7] and boxes.tolist() == [[0, 0, 0, 0], [0, 0, 2, 3]]
