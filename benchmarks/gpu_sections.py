"""What benchmarks/gpu.py times, section by section: a case, its inputs, its gate, and the peers that have it.

A gate compares a peer's result with the first peer's before any time is taken. Errors:
    encoder  relative, in the Euclidean norm, of embeddings
    decode   the same, of low-resolution logits, from one and the same embedding
    click    1 - IoU of the masks, all three together
    post     share of masks with another box
    amg      share of the reference's boxes for which there is none of IoU 0.9
    batch    share of images with other records: one after the other, and by one call
    cold     none: a new process that makes a first mask; wall time is that of the process, "device" time begins when
             Python has started, and "auto" is sam_fast's precision on that device
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.device_timing import DeviceRow, Measurement, measure, row
from benchmarks.peers import CONFIGS, OFFICIAL, OURS, DevicePeer, ImageState, build_ours, has_official, peers_of
from benchmarks.timing import WrongResult, append_rows
from sam_fast import SamPredictor
from sam_fast.modeling import Sam
from sam_fast.runtime.inference import Prompts
from sam_fast.utils.transforms import ResizeLongestSide

STABILITY = 0.8
# The largest error of a result that is timed, by section and precision. fp32: rounding of sums in another order, and
# a mask's edge that falls on the other side of a pixel. Narrower formats: seeded weights make logits of hundreds out of
# differences, more than trained ones do (the official ViT-B in bf16: 0.02 of the logits, 0.16 of a click's masks), and
# many records lie next to a threshold that half of them pass.
TOLERANCES = {
    "encoder": {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.02, "fp8": 0.15, "int8": 0.15},
    "decode": {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05, "fp8": 0.2, "int8": 0.2},
    "click": {"fp32": 0.01, "bf16": 0.35, "fp16": 0.15, "fp8": 0.35, "int8": 0.35},
    "post": {"fp32": 0.02, "bf16": 0.02, "fp16": 0.02, "fp8": 0.02, "int8": 0.02},
    "amg": {"fp32": 0.03, "bf16": 0.6, "fp16": 0.6, "fp8": 0.7, "int8": 0.7},
    "batch": {"fp32": 0.0, "bf16": 0.0, "fp16": 0.0, "fp8": 0.0, "int8": 0.0},  # the same operations in the same order
}
_IN_BATCH = 8  # images
_FEWEST_RECORDS = 20  # to judge a narrow format by the share of them that differ
_ROTATED = 4  # inputs that take turns


@dataclass
class Run:
    """One run of the benchmark: what to measure, how long, and where rows go."""

    device: torch.device
    output: Path
    origin: dict[str, str]
    seconds: float  # per series of repetitions
    deadline: float  # by time.monotonic(): no measurement begins after it
    sections: Sequence[str]
    precisions: list[str]
    batches: list[int]
    prompts: list[int]
    sizes: list[tuple[int, int]]  # of images for automatic masks; the first one is that of clicks
    points_per_side: int
    compiled: bool = False
    rows: list[DeviceRow] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, new: DeviceRow) -> None:
        """Keep a row, and write it at once: what comes later may fail."""
        self.rows.append(new)
        append_rows(self.output, [new])
        print(f"  {new.case} {new.shape} | {new.peer} {new.precision}: {new.device_ms} ms", flush=True)

    def is_late(self, what: str) -> bool:
        """Whether time is over, and `what` is left out."""
        if time.monotonic() < self.deadline:
            return False
        self.left_out.append(what)
        return True


def photo(size: tuple[int, int]) -> np.ndarray:
    """The packaged coffee.jpg as uint8 [H, W, 3]."""
    with resources.as_file(resources.files("sam_fast") / "assets" / "photos" / "coffee.jpg") as path:
        return np.array(Image.open(path).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC))


def run_model(run: Run, name: str) -> None:
    """All sections but "cold" for one model."""
    print(f"{name}:", flush=True)
    model = build_ours(name, run.device)
    state = set_image(model, run.sizes[0])
    first: dict[str, Any] = {}  # (section, shape) -> the first peer's result and time
    threshold = median_iou(model, state)
    for make in peers_of(name, model, run.precisions, run.compiled):
        if run.is_late(f"peers of {name}"):
            return
        try:
            peer = make()
        except Exception as error:  # whatever stops another's package must not stop the others
            run.left_out.append(f"a peer of {name}: {_reason(error)}")
            continue
        for section, shape, call in cases_of(run, peer, model, state, name, threshold):
            _measure_case(run, peer, section, shape, call, first)
        for way, shape, call in batch_cases(run, peer, name, threshold):
            _measure_case(run, way, "batch", shape, call, first)
        del peer
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def set_image(model: Sam, size: tuple[int, int]) -> ImageState:
    """The photo, encoded in float32 by the model's own modules."""
    image = photo(size)
    resize = ResizeLongestSide(model.image_encoder.img_size)
    resized = torch.from_numpy(resize.apply_image(image)).permute(2, 0, 1)[None].to(model.device)
    features = model.image_encoder(model.preprocess(resized))
    return ImageState(image, features, size, (resized.shape[2], resized.shape[3]))


def median_iou(model: Sam, state: ImageState) -> float:
    """The predicted IoU that half of the masks of a grid of clicks are above, as benchmarks/cpu.py has it."""
    runtime = SamPredictor(model, precision="fp32", backend="torch").runtime
    embedding = runtime.adopt(state.features, state.original_size, state.input_size)
    points, labels = clicks(state, 64, model.device)
    return runtime.decode(embedding, Prompts(points, labels))[1].median().item()


def clicks(state: ImageState, count: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points [N, 1, 2] XY in the model's frame, and labels [N, 1]."""
    share = torch.rand(count, 1, 2, generator=torch.Generator().manual_seed(seed))
    frame = torch.tensor([state.input_size[1], state.input_size[0]])
    return (share * frame).to(device), torch.ones(count, 1, device=device)


def cases_of(
    run: Run, peer: DevicePeer, model: Sam, state: ImageState, name: str, threshold: float
) -> list[tuple[str, str, Callable[[int], Any]]]:
    """(section, shape, call of the i-th input) of what this peer can do and is asked for."""
    cases: list[tuple[str, str, Callable[[int], Any]]] = []
    if "encoder" in run.sections:
        cases += [("encoder", f"{name}, batch {b}", _encoding(peer, model, b)) for b in run.batches]
    if "click" in run.sections and peer.click is not None:
        cases.append(("click", f"{name}, {_text(state.original_size)}", _clicking(peer, state)))
    if "decode" in run.sections and peer.decode is not None:
        cases += [("decode", f"{name}, {n} prompts", _decoding(peer, model, state, n)) for n in run.prompts]
    # One pass over float32 logits, whatever the model's precision: once for us, once for the reference.
    once = peer.precision == (run.precisions[0] if peer.name == OURS else "fp32")
    if "post" in run.sections and peer.postprocess is not None and once:
        shape = f"{3 * run.prompts[0]} masks, {_text(state.original_size)}"
        cases.append(("post", shape, _postprocessing(peer, model, state, run.prompts[0])))
    if "amg" in run.sections and peer.generator is not None:
        generate = peer.generator(run.points_per_side, threshold, STABILITY)
        for size in run.sizes:
            shape = f"{name}, {_text(size)}, {run.points_per_side}x{run.points_per_side}"
            cases.append(("amg", shape, _generating(generate, size)))
    return cases


def batch_cases(run: Run, peer: DevicePeer, name: str, threshold: float) -> Iterator[tuple[DevicePeer, str, Callable]]:
    """Several images by `generate`, one after the other, and by one call: who does it, the shape, the call."""
    if "batch" not in run.sections or peer.batches is None or peer.generator is None:
        return
    settings = run.points_per_side, threshold, STABILITY
    image = photo(run.sizes[0])
    images = [image, np.ascontiguousarray(image[:, ::-1])] * (_IN_BATCH // 2)
    side = run.points_per_side
    shape = f"{name}, {peer.precision}, {_IN_BATCH} x {_text(run.sizes[0])}, {side}x{side}"
    one_by_one = replace(peer, name=f"{peer.name}, one by one")
    generate, generate_batch = peer.generator(*settings), peer.batches(*settings)
    yield one_by_one, shape, lambda _: [generate(image) for image in images]
    yield peer, shape, lambda _: generate_batch(images)


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _encoding(peer: DevicePeer, model: Sam, batch: int) -> Callable[[int], Tensor]:
    side = model.image_encoder.img_size
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, 3, side, side, generator=generator) for _ in range(_ROTATED)]
    picture = model.preprocess(torch.from_numpy(photo((side, side))).permute(2, 0, 1).to(model.device))
    inputs = [(picture + 0.1 * n.to(model.device)).expand(batch, -1, -1, -1).contiguous() for n in noise]
    return lambda i: peer.encode(inputs[i % _ROTATED])


def _clicking(peer: DevicePeer, state: ImageState) -> Callable[[int], np.ndarray]:
    assert peer.click is not None
    run_click = peer.click
    height, width = state.original_size
    points = np.random.default_rng(0).random((64, 1, 2)) * [width, height]
    return lambda i: run_click(state, points[i % len(points)])


def _decoding(peer: DevicePeer, model: Sam, state: ImageState, count: int) -> Callable[[int], Tensor]:
    assert peer.decode is not None
    run_decode = peer.decode
    prompts = [clicks(state, count, model.device, seed) for seed in range(_ROTATED)]
    return lambda i: run_decode(state, *prompts[i % _ROTATED])


def _postprocessing(peer: DevicePeer, model: Sam, state: ImageState, prompts: int) -> Callable[[int], Any]:
    assert peer.postprocess is not None
    run_postprocess = peer.postprocess
    runtime = SamPredictor(model, precision="fp32", backend="torch").runtime
    embedding = runtime.adopt(state.features, state.original_size, state.input_size)
    logits = [
        runtime.decode(embedding, Prompts(*clicks(state, prompts, model.device, seed)))[0].flatten(0, 1)
        for seed in range(_ROTATED)
    ]
    return lambda i: run_postprocess(state, logits[i % _ROTATED])


def _generating(generate: Callable[[np.ndarray], list[dict]], size: tuple[int, int]) -> Callable[[int], list[dict]]:
    image = photo(size)
    images = [image, np.ascontiguousarray(image[:, ::-1])]
    return lambda i: generate(images[i % 2])


def _measure_case(
    run: Run, peer: DevicePeer, section: str, shape: str, call: Callable[[int], Any], first: dict[str, Any]
) -> None:
    """Gate one case of one peer, then time it; what fails is named and left out."""
    key, who = f"{section} {shape}", f"{section} {shape} | {peer.name} {peer.precision}"
    if run.is_late(who):
        return
    try:
        result = call(0)
        error = None
        if key in first:
            error = error_of(section, first[key][0], result)
            most = TOLERANCES[section][peer.precision.split()[0]]
            if section == "amg" and peer.precision != "fp32" and len(first[key][0]) < _FEWEST_RECORDS:
                most = 1.0
            if not error <= most:  # NaN is refused, too
                raise WrongResult(f"error {error:.2e}, at most {most:.0e} is allowed")
        fewest = 2 if section in ("amg", "batch") else 3
        measured = measure(call, run.device, seconds=run.seconds, fewest=fewest)
    except WrongResult as wrong:
        run.refused.append(f"{who}: {wrong}")
        print(f"  {who}: REFUSED, {wrong}", flush=True)
        return
    except Exception as failed:  # of compilers, drivers, memory
        (run.refused if peer.name == OURS else run.left_out).append(f"{who}: {_reason(failed)}")
        print(f"  {who}: failed, {failed}", flush=True)
        return
    if key not in first:
        first[key] = result, statistics.median(measured.device)
        run.add(row(section, shape, peer.precision, peer.name, measured, None, None, run.origin))
    else:
        run.add(row(section, shape, peer.precision, peer.name, measured, first[key][1], error, run.origin))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# -- gates


def error_of(section: str, expected: Any, got: Any) -> float:
    """How far a result is from the first peer's; see the head of this file."""
    if section in ("encoder", "decode"):
        if got.shape != expected.shape:
            raise WrongResult(f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
        return ((got.float() - expected).norm() / expected.norm()).item()
    if section == "click":
        union = np.logical_or(got, expected).sum()
        return 1 - float(np.logical_and(got, expected).sum() / union) if union else 0.0
    if section == "post":
        (boxes, scores), (their_boxes, their_scores) = got, expected
        if not torch.allclose(scores.float(), their_scores.float(), atol=0.01, equal_nan=True):
            raise WrongResult("stability scores differ by more than 0.01")
        return (boxes != their_boxes).any(dim=1).float().mean().item()
    if section == "batch":
        if len(got) != len(expected):
            raise WrongResult(f"records of {len(got)} images instead of {len(expected)}")
        return sum(not _are_same(*pair) for pair in zip(expected, got, strict=True)) / len(expected)
    return _unmatched(expected, got)


def _are_same(expected: list[dict], got: list[dict]) -> bool:
    """Whether records are the same, in the same order."""
    return len(expected) == len(got) and all(
        mine["bbox"] == other["bbox"] and np.array_equal(mine["segmentation"], other["segmentation"])
        for mine, other in zip(got, expected, strict=True)
    )


def _unmatched(expected: list[dict], got: list[dict]) -> float:
    """The share of boxes of either list that have no partner of IoU 0.9 in the other, whichever share is larger."""
    if not expected or not got:
        return float(len(expected) != len(got))
    a, b = (torch.tensor([r["bbox"] for r in records], dtype=torch.float64) for records in (expected, got))
    a, b = (torch.cat([x[:, :2], x[:, :2] + x[:, 2:] + 1], dim=1) for x in (a, b))
    size = (torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])).clamp(min=0)
    shared = size.prod(dim=2)
    areas = [(x[:, 2:] - x[:, :2]).prod(dim=1) for x in (a, b)]
    iou = shared / (areas[0][:, None] + areas[1][None] - shared)
    return max((iou.amax(dim=dim) < 0.9).double().mean().item() for dim in (0, 1))


# -- cold start


def run_cold(run: Run, name: str, peers_folder: str | None) -> None:
    """From the start of a process to the first mask, with nothing compiled yet, and then with what the first left.

    The official code, whose processes leave each other nothing, is started once.
    """
    model = build_ours(name, torch.device("cpu"))
    starts = [(OFFICIAL, "fp32", "no cache")] if has_official() else []
    starts += [(OURS, "auto", "empty cache"), (OURS, "auto", "filled cache")]
    first_ms: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / f"{name}.pth"
        torch.save(model.state_dict(), checkpoint)
        del model
        for peer, precision, cache in starts:
            shape = f"{name}, {_text(run.sizes[0])}, {cache}"
            if run.is_late(f"cold {shape} | {peer}"):
                continue
            command = [sys.executable, "-m", "benchmarks.cold_start", name, str(checkpoint), peer]
            command += [str(run.device), *map(str, run.sizes[0])]
            environment = {**os.environ, "TRITON_CACHE_DIR": f"{folder}/triton"}
            if peers_folder:
                environment["PYTHONPATH"] = os.pathsep.join([peers_folder, os.environ.get("PYTHONPATH", "")])
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            wall = 1e3 * (time.perf_counter() - start)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                (run.refused if peer == OURS else run.left_out).append(f"cold {shape} | {peer}: {reason}")
                continue
            stages = json.loads(done.stdout.splitlines()[-1])
            print("  " + ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in stages.items()))
            measured = Measurement((1e3 * sum(stages.values()),), (wall,), None)
            run.add(row("cold", shape, precision, peer, measured, first_ms, None, run.origin))
            first_ms = first_ms or measured.device[0]


def known_models() -> list[str]:
    return list(CONFIGS)
