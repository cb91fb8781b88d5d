"""SAM on a CPU against other implementations, ViT-B at 1024 px, the same weights: `python -m benchmarks.cpu`.

Weights are seeded, so masks are arbitrary. The photo is the packaged coffee.jpg, enlarged to 1200 x 1800.

Cases:
    encode            `set_image`
    decode 64         the mask decoder, 64 points of the image set, three masks each: low-resolution logits
    decode 1          the same for one point
    masks 64          `predict_torch`: boolean masks at full size
    logits 64         `predict_torch(return_logits=True)`: float masks at full size
    click             `predict`: one point, image set, three boolean masks at full size
    automatic masks   `generate` with encoding, thresholds such that half of the masks pass the IoU filter

Errors are relative, in the Euclidean norm, against segment_anything 1.0: of embeddings in "encode", of logits in
"decode" and "logits"; in "masks" and "click" the share of differing pixels. Automatic masks must have the same boxes in
the same order in float32; their error is the share of records more or less.

Where the CPU multiplies bfloat16, the decoder's cases are run in bf16, too; int8 decodes in the same way. Elsewhere it
is float32 in every precision.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import Peer, WrongResult, compare, peak_extra_memory, print_rows, rows, write_rows
from sam_fast import SamAutomaticMaskGenerator, SamPredictor, native
from sam_fast.build_sam import VIT_B, build_sam_from_config
from sam_fast.checkpoints import convert_hugging_face
from sam_fast.modeling import Sam
from sam_fast.modeling.seeded import seed_weights
from sam_fast.runtime.inference import Prompts

OFFICIAL = "segment_anything 1.0"
TRANSFORMERS, ONNXRUNTIME = "transformers", "onnxruntime"
OURS = {"sam_fast": "fp32", "sam_fast bf16": "bf16", "sam_fast int8": "int8"}
SIZE, INPUT_SIZE = (1200, 1800), (683, 1024)
SEED = 3  # of 0 to 3, the seed whose masks are the most varied
STABILITY = 0.8
CASES = ("encode", "decode 64", "decode 1", "masks 64", "logits 64", "click", "automatic masks")
# The largest error that a peer may have in embeddings and logits, and the largest share of differing pixels in masks.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.1}


def photo() -> np.ndarray:
    """uint8 [1200, 1800, 3]."""
    with resources.as_file(resources.files("sam_fast") / "assets" / "photos" / "coffee.jpg") as path:
        return np.asarray(Image.open(path).convert("RGB").resize(SIZE[::-1], Image.Resampling.BICUBIC))


def our_model() -> Sam:
    """ViT-B with seeded weights."""
    return seed_weights(build_sam_from_config(VIT_B), SEED).eval()


def official_model() -> Any:
    """The official ViT-B with the same weights."""
    from tests.oracle import build_official

    return seed_weights(build_official(VIT_B), SEED).eval()


def points(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clicks in the model's input frame: [N, 1, 2] XY in pixels, and labels [N, 1]."""
    share = torch.rand(count, 1, 2, generator=torch.Generator().manual_seed(0))
    return share * torch.tensor([INPUT_SIZE[1], INPUT_SIZE[0]]), torch.ones(count, 1)


# -- peers: each makes a table of case -> call


def official_calls(features: torch.Tensor | None, iou_threshold: float, points_per_side: int) -> dict[str, Callable]:
    """segment_anything; `features` is the embedding of the photo, or None where only encoding is asked for."""
    from tests.oracle import official

    model, image = official_model(), photo()
    predictor = official.SamPredictor(model)
    if features is not None:
        predictor.features, predictor.is_image_set = features, True
        predictor.original_size, predictor.input_size = SIZE, INPUT_SIZE

    def decode(count: int) -> torch.Tensor:
        sparse, dense = model.prompt_encoder(points=points(count), boxes=None, masks=None)
        masks, _ = model.mask_decoder(
            image_embeddings=features,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        return masks

    generator = official.SamAutomaticMaskGenerator(
        model, points_per_side=points_per_side, pred_iou_thresh=iou_threshold, stability_score_thresh=STABILITY
    )
    return _calls(predictor, generator, image, decode)


def our_calls(
    model: Sam, precision: str, features: torch.Tensor | None, iou_threshold: float, points_per_side: int
) -> dict[str, Callable]:
    """sam_fast in one precision; see `official_calls`."""
    predictor = SamPredictor(model, precision=precision)
    embedding = None
    if features is not None:
        embedding = predictor.runtime.adopt(features, SIZE, INPUT_SIZE)
        predictor.features, predictor.original_size, predictor.input_size = features, SIZE, INPUT_SIZE
        predictor.is_image_set = True

    def decode(count: int) -> torch.Tensor:
        assert embedding is not None
        return predictor.runtime.decode(embedding, Prompts(*points(count)))[0]

    generator = SamAutomaticMaskGenerator(
        model,
        points_per_side=points_per_side,
        pred_iou_thresh=iou_threshold,
        stability_score_thresh=STABILITY,
        precision=precision,
    )
    return _calls(predictor, generator, photo(), decode)


def _calls(predictor: Any, generator: Any, image: np.ndarray, decode: Callable) -> dict[str, Callable]:
    def encode() -> torch.Tensor:
        features = predictor.features if predictor.is_image_set else None
        predictor.set_image(image)
        result = predictor.get_image_embedding()
        if features is not None:
            predictor.features = features
        return result

    return {
        "encode": encode,
        "decode 64": lambda: decode(64),
        "decode 1": lambda: decode(1),
        "masks 64": lambda: predictor.predict_torch(*points(64))[0],
        "logits 64": lambda: predictor.predict_torch(*points(64), return_logits=True)[0],
        "click": lambda: predictor.predict(np.array([[900, 600]]), np.array([1]))[0],
        "automatic masks": lambda: generator.generate(image),
    }


def transformers_calls(model: Sam, features: torch.Tensor | None) -> dict[str, Callable]:
    """Hugging Face's SamModel: encoding with the official preprocessing, and the decoder."""
    import transformers

    theirs = transformers.SamModel(transformers.SamConfig()).eval()
    ours = model.state_dict()
    state = {}
    for name, tensor in theirs.state_dict().items():
        converted = next(iter(convert_hugging_face({name: tensor})), None)
        if converted is not None:  # None: a copy of another weight
            state[name] = ours[converted]
    theirs.load_state_dict(state, strict=False)
    pixels = _pixels(model)

    def decode(count: int) -> torch.Tensor:
        where, labels = points(count)
        output = theirs(image_embeddings=features, input_points=where[None], input_labels=labels[None].int())
        return output.pred_masks[0]

    return {
        "encode": lambda: theirs.get_image_embeddings(pixels()),
        "decode 64": lambda: decode(64),
        "decode 1": lambda: decode(1),
    }


def onnxruntime_calls(model: Sam, folder: Path) -> dict[str, Callable]:
    """ONNX Runtime with the official image encoder as `torch.onnx` exports it."""
    import onnxruntime

    path = folder / "encoder.onnx"
    pixels = _pixels(model)
    encoder = official_model().image_encoder
    torch.onnx.export(encoder, (pixels(),), str(path), dynamo=True, external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return {"encode": lambda: torch.from_numpy(session.run(None, {name: pixels().numpy()})[0])}


def _pixels(model: Sam) -> Callable[[], torch.Tensor]:
    """The photo as `set_image` prepares it, resize included, for peers without a predictor of that kind."""
    predictor, image = SamPredictor(model), photo()

    def prepare() -> torch.Tensor:
        resized = torch.from_numpy(predictor.transform.apply_image(image)).permute(2, 0, 1)[None].float()
        return model.preprocess(resized)

    return prepare


# -- gates


def gate_of(case: str, precisions: Sequence[str]) -> Callable[[Any, Any], float]:
    """What may differ, for peers in these precisions, in the order in which their results come."""
    order = iter(precisions)

    def gate(expected: Any, got: Any) -> float:
        precision = next(order)
        if isinstance(got, list):
            if precision == "fp32" and [r["bbox"] for r in got] != [r["bbox"] for r in expected]:
                raise WrongResult(f"{len(got)} records against {len(expected)}, or other boxes")
            return abs(len(got) - len(expected)) / max(1, len(expected))
        got, expected = torch.as_tensor(got), torch.as_tensor(expected)
        if got.dtype == torch.bool:
            error = (got != expected).float().mean().item()
            if error > TOLERANCES[precision]:
                raise WrongResult(f"{error:.1e} of the pixels differ")
            return error
        error = ((got - expected).norm() / expected.norm()).item()
        if error > TOLERANCES[precision]:
            raise WrongResult(f"{case} differs by {error:.1e}")
        return error

    return gate


def prepare_memory(peer: str, case: str, iou_threshold: float, points_per_side: int) -> Callable[[], Any]:
    """For the peak of "encode" and "automatic masks": everything but the call."""
    torch.set_grad_enabled(False)
    if peer == OFFICIAL:
        return official_calls(None, iou_threshold, points_per_side)[case]
    return our_calls(our_model(), OURS[peer], None, iou_threshold, points_per_side)[case]


def median_iou(model: Sam, features: torch.Tensor) -> float:
    """The predicted IoU that half of the masks of a 16 x 16 grid of clicks are above."""
    runtime = SamPredictor(model).runtime
    embedding = runtime.adopt(features, SIZE, INPUT_SIZE)
    x, y = (torch.arange(16).add(0.5) / 16 * side for side in INPUT_SIZE[::-1])
    grid = torch.cartesian_prod(x, y)[:, None]
    return runtime.decode(embedding, Prompts(grid, torch.ones(256, 1)))[1].median().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[TRANSFORMERS, ONNXRUNTIME, *OURS],
        choices=[TRANSFORMERS, ONNXRUNTIME, *OURS],
        help="beside the official one",
    )
    parser.add_argument("--repetitions", type=int, default=3, help="one prompt: five times as many; automatic: once")
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--no-write", action="store_true", help="print only, leave benchmarks/results alone")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    side = arguments.points_per_side
    model = our_model()
    predictor = SamPredictor(model)
    predictor.set_image(photo())
    features = predictor.get_image_embedding()
    threshold = median_iou(model, features)
    with tempfile.TemporaryDirectory() as folder:
        tables = {OFFICIAL: official_calls(features, threshold, side)}
        for peer in arguments.peers:
            if peer == TRANSFORMERS:
                tables[peer] = transformers_calls(model, features)
            elif peer == ONNXRUNTIME:
                tables[peer] = onnxruntime_calls(model, Path(folder)) if "encode" in arguments.cases else {}
            else:
                tables[peer] = our_calls(model, OURS[peer], features, threshold, side)
        for case in arguments.cases:
            names = [name for name in tables if case in tables[name]]
            if not _encodes(case):
                names = [name for name in names if OURS.get(name, "fp32") in _decoder_precisions()]
            precisions = [OURS.get(name, "fp32") for name in names[1:]]
            repetitions = {
                "automatic masks": 0,
                "decode 1": 5 * arguments.repetitions,
                "click": 5 * arguments.repetitions,
            }
            timings = compare(
                [Peer(name, tables[name][case]) for name in names],
                gate_of(case, precisions),
                repetitions=repetitions.get(case, arguments.repetitions),
            )
            peaks = None
            if _encodes(case):
                measured = [name for name in names if name in (OFFICIAL, *OURS)]
                peaks = {name: peak_extra_memory(prepare_memory, name, case, threshold, side) for name in measured}
            shape = f"vit_b, {SIZE[0]}x{SIZE[1]}" + (f", {side}x{side} points" if case == "automatic masks" else "")
            table = rows("cpu", case, shape, "float32 unless named", timings, peaks)
            print_rows(table)
            if not arguments.no_write:
                write_rows("cpu", table)


def _decoder_precisions() -> tuple[str, ...]:
    """Those in which the decoder differs."""
    return ("fp32", "bf16") if native.multiplies_bfloat16() else ("fp32",)


def _encodes(case: str) -> bool:
    return case in ("encode", "automatic masks")


if __name__ == "__main__":
    main()
