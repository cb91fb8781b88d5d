"""Mask post-processing against segment_anything 1.0 on the same logits: `python -m benchmarks.postprocess`.

Cases:
* "blurred": half of the masks Gaussian-blurred noise of sigma 24 px, half of sigma 8 px (at 256 px), std 6, mean -3:
  blobs with as much boundary as real masks and more, so that skipping of certain words is not flattered;
* "noise": unblurred noise of the same std and mean, in which nothing can be skipped;
* "click": one prompt's three masks, as a predictor makes them: resize, threshold, boolean masks;
* "records": the last step of a generator on a GPU, image after image: bits of 50 masks to boolean ones, those of the
  image before dropped; in memory that is used again, and fresh from the system. The official masks are boolean before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import (
    Peer,
    Row,
    WrongResult,
    compare,
    peak_extra_memory,
    positive,
    print_rows,
    rows,
    write_rows,
)
from sam_fast import recycling
from sam_fast.ops.packed_masks import unpack_masks, unpack_masks_apart
from sam_fast.ops.postprocess_masks import postprocess_masks
from sam_fast.ops.rle import decode_rle, encode_rle
from sam_fast.recycling import MOST_BYTES, Recycler

LOW, IMAGE_SIZE = 256, 1024
THRESHOLD, OFFSET = 0.0, 1.0
EXACT_CAPABILITIES = ("AVX2", "AVX512")  # where torch contracts to fused multiply-adds, as the native kernels do


class Result(NamedTuple):
    masks: Tensor  # [N, H, W] bool
    stability_score: Tensor  # [N]
    boxes: Tensor  # [N, 4]
    rles: list[dict[str, Any]]


class Codes(NamedTuple):
    """What is kept of the masks: run-length codes instead of pixels."""

    stability_score: Tensor
    boxes: Tensor
    rles: list[dict[str, Any]]


def make_logits(case: str, masks: int) -> Tensor:
    """Seeded logits [masks, 256, 256] of std 6 and mean -3 (see the module's docstring)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((masks, LOW, LOW), generator=generator)
    if case != "noise":
        half = (masks + 1) // 2
        logits = torch.cat([_blur(logits[:half], 24.0), _blur(logits[half:], 8.0)])
    logits = logits - logits.mean((1, 2), keepdim=True)
    return 6 * logits / logits.std((1, 2), keepdim=True) - 3


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [N, h, w], kernel cut at 4 sigma, wrapping around."""
    radius = int(4 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(images[:, None], (radius, radius, radius, radius), mode="circular")
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None, :])[:, 0]


def input_size(height: int, width: int) -> tuple[int, int]:
    """The size to which an image is resized before the model pads it: longest side 1024."""
    scale = IMAGE_SIZE / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def _official_resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """As `Sam.postprocess_masks`: [N, 1, h, w] -> [N, 1, H, W]."""
    grid = F.interpolate(logits, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    height, width = input_size(*size)
    return F.interpolate(grid[..., :height, :width], size, mode="bilinear", align_corners=False)


def official(logits: Tensor, size: tuple[int, int]) -> Result:
    """What `SamAutomaticMaskGenerator` does with a batch's logits: float image, stability, masks, boxes, RLE."""
    from tests.oracle import official as segment_anything

    amg = segment_anything.utils.amg
    image = _official_resize(logits[:, None], size).flatten(0, 1)
    score = amg.calculate_stability_score(image, THRESHOLD, OFFSET)
    masks = image > THRESHOLD
    boxes = amg.batched_mask_to_box(masks)
    return Result(masks, score, boxes, amg.mask_to_rle_pytorch(masks))


def ours(logits: Tensor, size: tuple[int, int]) -> Codes:
    """The same with `postprocess_masks` and `encode_rle`, 64 masks at a time, so that memory is reused."""
    scores, boxes, rles = [], [], []
    for chunk in logits.split(64):
        out = postprocess_masks(
            chunk, input_size(*size), size, IMAGE_SIZE, mask_threshold=THRESHOLD, stability_offset=OFFSET
        )
        assert out.bits is not None
        scores.append(out.stability_score)
        boxes.append(out.boxes)
        rles += encode_rle(out.bits, size[1])
    return Codes(torch.cat(scores), torch.cat(boxes), rles)


def ours_measured(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Stability and boxes without storing masks, as before non-maximum suppression."""
    out = postprocess_masks(logits, input_size(*size), size, IMAGE_SIZE, return_bits=False)
    return out.stability_score, out.boxes


def official_click(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """As `SamPredictor.predict`: boolean masks."""
    return _official_resize(logits[:, None], size)[:, 0] > THRESHOLD


def ours_click(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The same with packed bits in between."""
    bits = postprocess_masks(logits, input_size(*size), size, IMAGE_SIZE).bits
    assert bits is not None
    return unpack_masks(bits, size[1])


def make_gate(logits: Tensor, size: tuple[int, int]) -> Callable[[Any, Any], None]:
    """A gate for identical results; without fused arithmetic in torch, masks may differ at the threshold."""
    exact = torch.backends.cpu.get_cpu_capability() in EXACT_CAPABILITIES

    def check_masks(expected: Tensor, got: Tensor) -> None:
        different = expected != got
        if not different.any():
            return
        if exact:
            raise WrongResult(f"{int(different.sum())} of {got.numel()} mask pixels differ")
        image = _official_resize(logits[:, None], size)[:, 0]
        if bool(((image - THRESHOLD).abs()[different] >= 1e-4).any()):
            raise WrongResult("mask pixels differ where the logit is not within 1e-4 of the threshold")

    def check_same(name: str, expected: Tensor, got: Tensor) -> None:
        if exact and not torch.equal(expected.nan_to_num(-1), got.nan_to_num(-1)):
            raise WrongResult(f"{name} differ: {int((expected != got).sum())} of {got.numel()} values")

    def gate(expected: Any, got: Any) -> None:
        if isinstance(got, Codes):
            if expected.rles != got.rles:
                check_masks(expected.masks, unpack_masks(decode_rle(got.rles), size[1]))
                if exact:
                    raise WrongResult("run-length codes of identical masks differ")
            got = got[:2]
        if isinstance(got, tuple):
            check_same("stability scores", expected.stability_score, got[0])
            check_same("boxes", expected.boxes, got[1])
        else:
            check_masks(expected, got)

    return gate


CHAINS = {"segment_anything 1.0": official, "sam_fast": ours, "sam_fast, no bits or RLE": ours_measured}
CLICK_CHAINS = {"segment_anything 1.0": official_click, "sam_fast": ours_click}


def prepare(case: str, peer: str, masks: int, size: tuple[int, int]) -> Callable[[], Any]:
    """A call to measure the memory of: inputs made, libraries warm."""
    chains = CLICK_CHAINS if case == "click" else CHAINS
    logits = make_logits(case, masks)
    chains[peer](logits[:1].clone(), (64, 96))
    return lambda: chains[peer](logits, size)


def records_peer(name: str, most_bytes: int, bits: Tensor, width: int) -> Peer:
    """Unpacks masks and drops those of the call before; keeps up to so many bytes between calls."""
    recycler, held = Recycler(most_bytes), []

    def run() -> list[Tensor]:
        recycling.masks = recycler
        held[:] = unpack_masks_apart(bits, width)
        return held

    return Peer(name, run)


def measure_records(masks: int, size: tuple[int, int], repetitions: int) -> list[Row]:
    """Gate and times of "records"."""
    bits = postprocess_masks(make_logits("blurred", masks), input_size(*size), size, IMAGE_SIZE).bits
    assert bits is not None
    expected = unpack_masks(bits, size[1], backend="torch")

    def gate(_: Any, got: list[Tensor]) -> None:
        if not all(map(torch.equal, expected, got)):
            raise WrongResult("masks differ from their bits")

    before = recycling.masks
    try:
        peers = [records_peer("sam_fast, fresh memory", 0, bits, size[1])]
        peers.append(records_peer("sam_fast", MOST_BYTES, bits, size[1]))
        timings = compare(peers, gate, repetitions=repetitions, warmup=3)
    finally:
        recycling.masks = before
    return rows("postprocess", "records", f"{masks}x{size[0]}x{size[1]}", "bool", timings)


def measure(case: str, masks: int, size: tuple[int, int], repetitions: int) -> list[Row]:
    """Gate, times and memory of one case."""
    chains = CLICK_CHAINS if case == "click" else CHAINS
    logits = make_logits(case, masks)
    peers = [Peer(name, lambda chain=chain: chain(logits, size)) for name, chain in chains.items()]  # type: ignore[misc]
    timings = compare(peers, make_gate(logits, size), repetitions=repetitions)
    peaks = {name: peak_extra_memory(prepare, case, name, masks, size) for name in chains}
    shape = f"{masks}x{LOW}x{LOW} -> {size[0]}x{size[1]}"
    return rows("postprocess", case, shape, "float32", timings, peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=positive, default=192, help="masks of the cases blurred and noise")
    parser.add_argument("--height", type=positive, default=1200)
    parser.add_argument("--width", type=positive, default=1800)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    cases = ["blurred", "noise", "click", "records"]
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases)
    parser.add_argument("--no-write", action="store_true", help="print only, leave benchmarks/results alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for case in arguments.cases:
        size = arguments.height, arguments.width
        if case == "records":
            measured = measure_records(50, size, 5 * arguments.repetitions)
        elif case == "click":
            measured = measure(case, 3, size, 10 * arguments.repetitions)
        else:
            measured = measure(case, arguments.masks, size, arguments.repetitions)
        print_rows(measured)
        if not arguments.no_write:
            write_rows("postprocess", measured)


if __name__ == "__main__":
    main()
