"""SAM's trained mask decoder, ours against the official code: `python -m benchmarks.mobile_sam FOLDER`.

FOLDER is a checkout of https://github.com/ChaoningZhang/MobileSAM. In its weights/mobile_sam.pt are the prompt encoder
and the mask decoder of the official ViT-H, and a small image encoder that was taught to go before them (Zhang et al.,
"Faster Segment Anything", 2023). Seeded weights, with which the other benchmarks run, make arbitrary masks; these make
real ones. The image encoder is the checkout's own module, in float32 in all peers.

Cases, on each of the packaged photos:
    clicks            `predict_torch`, 16 x 16 points, boolean masks at full size; the error is 1 - IoU with the
                      official code's masks in float32, on average over all masks
    clicks, 0.88      the same over those whose predicted IoU is above the generator's filter; times are those of all
    automatic masks   `generate` as it comes, 32 x 32 points, with encoding; the error is the share of records that have
                      no partner of mask IoU 0.9 among the other's, of both; one run

In float32 masks must be the official ones (IoU 0.9999) and records the same in number, in the same order.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.peers import OFFICIAL, OURS, ImageState
from benchmarks.timing import Peer, Row, Timing, WrongResult, compare, print_rows, rows, write_rows
from sam_fast import SamAutomaticMaskGenerator, SamPredictor
from sam_fast.build_sam import VIT_B, build_sam_from_config
from sam_fast.runtime.ranges import fits_float16

SHA256 = "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"
# The configuration of MobileSAM's image encoder.
TINY_VIT: dict[str, Any] = {
    "img_size": 1024,
    "embed_dims": [64, 128, 160, 320],
    "depths": [2, 2, 6, 2],
    "num_heads": [2, 4, 5, 10],
    "window_sizes": [7, 7, 14, 7],
    "drop_path_rate": 0.0,
}
IOU_FILTER = 0.88  # the generator's
SAME_MASKS = 1e-4  # that masks in float32 may be off on average, 1 - IoU
_PARTNERS = 0.9
_BATCH = 32  # prompts that the official code decodes at a time


def build_models(folder: Path) -> tuple[Any, Any]:
    """The official and our model with MobileSAM's weights, in eval mode.

    Raises:
        WrongResult: the checkpoint is another one.
    """
    from tests.oracle import build_official

    content = (folder / "weights" / "mobile_sam.pt").read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise WrongResult(f"weights/mobile_sam.pt of {folder} is not the published file")
    state = torch.load(folder / "weights" / "mobile_sam.pt", map_location="cpu", weights_only=True)

    class Encoder(_module(folder / "mobile_sam" / "modeling" / "tiny_vit_sam.py").TinyViT):  # type: ignore[misc]
        def forward(self, pixels: Tensor) -> Tensor:
            with torch.autocast(pixels.device.type, enabled=False):
                return super().forward(pixels.float())

    models = build_official(VIT_B), build_sam_from_config(VIT_B)
    for model in models:
        model.image_encoder = Encoder(**TINY_VIT)
        model.load_state_dict(state)
        model.eval()
    return models


def _module(path: Path) -> ModuleType:
    """A file as a module. Of timm, where it is missing, there is what this file takes from it."""
    stand_ins = {}
    if importlib.util.find_spec("timm") is None:
        names = "timm", "timm.models", "timm.models.layers", "timm.models.registry"
        stand_ins = {name: ModuleType(name) for name in names}
        layers = {"DropPath": nn.Identity, "trunc_normal_": nn.init.trunc_normal_, "to_2tuple": lambda x: (x, x)}
        vars(stand_ins["timm.models.layers"]).update(layers)
        vars(stand_ins["timm.models.registry"]).update(register_model=lambda function: function)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.update(stand_ins)
    try:
        spec.loader.exec_module(module)
    finally:
        for name in stand_ins:
            del sys.modules[name]
    return module


def photos() -> dict[str, np.ndarray]:
    """The packaged ones, by name: uint8 [H, W, 3]."""
    with resources.as_file(resources.files("sam_fast") / "assets" / "photos") as folder:
        paths = sorted(folder.glob("*.jpg"))
        return {path.stem: np.asarray(Image.open(path).convert("RGB")) for path in paths}


Masks = tuple[Tensor, Tensor]  # bool [N, 3, H, W], predicted IoU [N, 3]


def clicks(predictor: Any, image: ImageState, side: int, half: nn.Module | None = None) -> Callable[[], Masks]:
    """Masks of a grid of `side` x `side` points; with `half`, a mask decoder in bfloat16, the official code's by it."""
    image.give_to(predictor)
    height, width = image.original_size
    x, y = (torch.arange(side).add(0.5) / side * length for length in (width, height))
    points = predictor.transform.apply_coords_torch(torch.cartesian_prod(x, y)[:, None], (height, width))
    points, labels = points.to(predictor.device), torch.ones(side * side, 1, device=predictor.device)

    def predict(some: slice) -> tuple[Tensor, ...]:
        if half is None:
            return predictor.predict_torch(points[some], labels[some])
        model = predictor.model
        sparse, dense = model.prompt_encoder(points=(points[some], labels[some]), boxes=None, masks=None)
        pe = model.prompt_encoder.get_dense_pe()
        given = (x.bfloat16() for x in (predictor.features, pe, sparse, dense))
        logits, iou = half(*given, multimask_output=True)
        full_size = model.postprocess_masks(logits.float(), predictor.input_size, predictor.original_size)
        return full_size > model.mask_threshold, iou.float()

    batch = side * side if isinstance(predictor, SamPredictor) else _BATCH

    def run() -> Masks:
        parts = [predict(slice(start, start + batch)) for start in range(0, side * side, batch)]
        masks, iou = (torch.cat(column).cpu() for column in list(zip(*parts, strict=True))[:2])
        return masks, iou

    return run


def differences(masks: Tensor, expected: Tensor) -> Tensor:
    """1 - IoU of masks [..., H, W] with the expected ones: [...]; nothing where both are empty."""
    both, either = (masks & expected).sum((-2, -1)), (masks | expected).sum((-2, -1))
    return torch.where(either > 0, 1 - both / either, 0.0)


def alone(records: list[dict], others: list[dict]) -> int:
    """How many records have no partner among others."""
    if not records or not others:
        return len(records)
    masks, theirs = (torch.from_numpy(np.stack([r["segmentation"] for r in some])) for some in (records, others))
    return sum(bool((differences(theirs, mask) > 1 - _PARTNERS).all()) for mask in masks)


def measure_clicks(shape: str, peers: dict[str, Callable[[], Masks]], repetitions: int) -> list[Row]:
    """Rows of both cases of clicks; the first peer is the official one in float32."""
    found: list[tuple[float, float]] = []

    def gate(expected: Masks, got: Masks) -> float:
        each = differences(got[0], expected[0])
        error = float(each.mean())
        if len(found) == 0 and error > SAME_MASKS:  # the second peer is ours in float32
            raise WrongResult(f"masks have an IoU of {1 - error} with the official ones")
        above = each[expected[1] > IOU_FILTER]
        found.append((error, float(above.mean()) if len(above) else 0.0))
        return error

    timings = compare([Peer(*peer) for peer in peers.items()], gate, repetitions=repetitions)
    above = [
        timing if timing.error is None else Timing(timing.name, timing.seconds, found[index - 1][1])
        for index, timing in enumerate(timings)
    ]
    table = rows("mobile_sam", "clicks", shape, "float32 unless named", timings)
    return table + rows("mobile_sam", f"clicks, {IOU_FILTER}", shape, "float32 unless named", above)


def measure_automatic(shape: str, peers: dict[str, Callable[[], list[dict]]]) -> list[Row]:
    """Rows of automatic masks; the first peers are the official one and ours in float32."""
    order = iter(peers)
    next(order)

    def gate(expected: list[dict], got: list[dict]) -> float:
        name = next(order)
        print(f"{shape}: {len(expected)} records, {name} {len(got)}", flush=True)
        if name == OURS and [r["bbox"] for r in got] != [r["bbox"] for r in expected]:
            raise WrongResult(f"{len(got)} records for {len(expected)}, or other boxes")
        without = alone(expected, got) + alone(got, expected)
        if name == OURS and without > 0:
            raise WrongResult(f"{without} records without a partner")
        return without / max(1, len(expected) + len(got))

    timings = compare([Peer(*peer) for peer in peers.items()], gate, repetitions=0)
    return rows("mobile_sam", "automatic masks", shape, "float32 unless named", timings)


def measure(
    theirs: Any, ours: Any, name: str, image: np.ndarray, cases: list[str], side: int, repetitions: int
) -> list[Row]:
    """Rows of one photo."""
    from tests.oracle import official

    shape = f"{name}, {image.shape[0]}x{image.shape[1]}"
    table = []
    if "clicks" in cases:
        half = copy.deepcopy(theirs.mask_decoder).bfloat16()
        predictor = official.SamPredictor(theirs)
        predictor.set_image(image)
        state = ImageState(image, predictor.features, predictor.original_size, predictor.input_size)
        peers = {
            OFFICIAL: clicks(predictor, state, side // 2),
            OURS: clicks(SamPredictor(ours, precision="fp32"), state, side // 2),
            f"{OFFICIAL} bf16": clicks(predictor, state, side // 2, half),
            f"{OURS} bf16": clicks(SamPredictor(ours, precision="bf16"), state, side // 2),
        }
        table += measure_clicks(f"{shape}, {side // 2}x{side // 2} points", peers, repetitions)
    if "automatic masks" in cases:
        generators = {OFFICIAL: official.SamAutomaticMaskGenerator(theirs, points_per_side=side)}
        for peer, precision in ((OURS, "fp32"), (f"{OURS} bf16", "bf16")):
            generators[peer] = SamAutomaticMaskGenerator(ours, points_per_side=side, precision=precision)
        calls = {peer: partial(generator.generate, image) for peer, generator in generators.items()}
        table += measure_automatic(f"{shape}, {side}x{side} points", calls)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkout of MobileSAM")
    parser.add_argument("--cases", nargs="+", default=["clicks", "automatic masks"])
    parser.add_argument("--photos", nargs="+", default=list(photos()), choices=list(photos()))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--points-per-side", type=int, default=32, help="of automatic masks; clicks have half of them")
    parser.add_argument("--repetitions", type=int, default=1, help="of clicks")
    parser.add_argument("--no-write", action="store_true", help="print only, leave benchmarks/results alone")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    theirs, ours = (model.to(arguments.device) for model in build_models(arguments.folder))
    print(f"float16 holds all that the decoder multiplies: {fits_float16(ours.mask_decoder)}")
    for name in arguments.photos:
        side, cases = arguments.points_per_side, arguments.cases
        table = measure(theirs, ours, name, photos()[name], cases, side, arguments.repetitions)
        print_rows(table)
        if not arguments.no_write:
            write_rows("mobile_sam", table)


if __name__ == "__main__":
    main()
