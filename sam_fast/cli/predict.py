"""`sam-fast predict`: masks for points, boxes or an earlier mask, as PNGs, JSON and a picture."""

from __future__ import annotations

import hashlib
import json
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from sam_fast.cli.console import escaped, out, report_note
from sam_fast.cli.model import (
    Backend,
    BackendOption,
    Checkpoint,
    Device,
    ModelType,
    Precision,
    PrecisionOption,
    choose_device,
    load_trained_model,
)

if TYPE_CHECKING:
    from sam_fast import ImageEmbedding, SamPredictor

_DIGEST_KEY = "image_sha256"


def predict(
    input: Annotated[Path, typer.Option("--input", help="An image.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the results; made if it is missing.")],
    model_type: ModelType,
    checkpoint: Checkpoint = None,
    point: Annotated[
        list[str] | None,
        typer.Option(
            "--point", metavar="X,Y[,LABEL]", help="Label 1 (default) is foreground, 0 background. Repeatable."
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option("--box", metavar="X0,Y0,X1,Y1", help="Repeatable; each box is an object of its own."),
    ] = None,
    mask_input: Annotated[
        Path | None, typer.Option("--mask-input", help=".npy of logits [1,256,256] from an earlier --save-logits.")
    ] = None,
    multimask: Annotated[bool, typer.Option("--multimask/--single", help="Three masks per object, or one.")] = True,
    save_logits: Annotated[
        bool, typer.Option("--save-logits", help="Also write each mask's low-resolution logits as .npy.")
    ] = False,
    embedding: Annotated[
        Path | None,
        typer.Option("--embedding", help="Image embedding (.safetensors): read if it fits, else written."),
    ] = None,
    device: Device = None,
    precision: PrecisionOption = Precision.auto,
    backend: BackendOption = Backend.auto,
) -> None:
    """Predict masks of an image from prompts, in pixels of the image.

    All points belong to one object, together with a box if one is given. Writes <image>_<i>.png for each mask,
    <image>.json (scores, boxes, COCO RLEs) and <image>_overlay.jpg with the best mask of each object, and removes
    what an earlier call wrote for this image.
    """
    prompts = parse_prompts(point or [], box or [], mask_input)
    _check_folder(input, output)

    from sam_fast import SamPredictor
    from sam_fast.preprocess import read_image
    from sam_fast.utils.overlay import save_picture

    image = read_image(input)
    device = choose_device(device)
    predictor = SamPredictor(load_trained_model(model_type, checkpoint, device), precision.value, backend.value)
    encoded = _encode(predictor, image, embedding)
    masks, scores, logits = predictor.predict(**prompts, multimask_output=multimask, embedding=encoded)
    if masks.ndim == 3:
        masks, scores, logits = masks[None], scores[None], logits[None]

    output.mkdir(parents=True, exist_ok=True)
    _remove_earlier(output, input.stem, mask_input)
    records = _write(output, input.stem, masks, scores, logits if save_logits else None)
    best = masks[np.arange(len(masks)), scores.argmax(axis=1)]
    document = {
        "image": input.name,
        "size": list(image.shape[:2]),
        "model_type": model_type,
        "points": _plain(prompts["point_coords"]),
        "point_labels": _plain(prompts["point_labels"]),
        "boxes": _plain(prompts["box"]),
        "masks": records,
    }
    (output / f"{input.stem}.json").write_text(json.dumps(document))
    save_picture(_draw(image, best, prompts), output / f"{input.stem}_overlay.jpg")
    for record in records:
        out().print(f"{escaped(record['file'])}: predicted IoU {record['predicted_iou']:.3f}, {record['area']} pixels")
    out().print(f"written to {escaped(output)}")


def _check_folder(image: Path, output: Path) -> None:
    """Results replace earlier ones, but nothing that may be the user's own.

    Raises:
        FileExistsError: `output` is the folder of the image, and a file there has a name of a result.
    """
    if output.resolve() != image.parent.resolve():
        return
    masks = output.glob(f"{escape(image.stem)}_*.png")
    for path in (output / f"{image.stem}.json", output / f"{image.stem}_overlay.jpg", *masks):
        if path.exists():
            raise FileExistsError(f"{path} exists beside the image; remove it, or choose another --output")


def _remove_earlier(output: Path, stem: str, keep: Path | None) -> None:
    """Remove the masks and logits of an earlier call, which its JSON counts: none may lie among those of this one.

    `keep`, the logits that this call was given, stays.
    """
    try:
        count = len(json.loads((output / f"{stem}.json").read_text())["masks"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or another program's
        return
    for i in range(count):
        for path in (output / f"{stem}_{i}.png", output / f"{stem}_{i}_logits.npy"):
            if path.exists() and not (keep is not None and path.samefile(keep)):
                path.unlink()


def parse_prompts(points: list[str], boxes: list[str], mask_input: Path | None) -> dict[str, Any]:
    """Turn the prompts of the command line into arguments of `SamPredictor.predict`.

    Raises:
        typer.BadParameter: a prompt cannot be read, there is none, or several boxes are combined with something else.
        FileNotFoundError, ValueError: the mask file is missing or not a .npy file of finite numbers [1,h,w].
    """
    if not points and not boxes and mask_input is None:
        raise typer.BadParameter("give at least one --point, --box or --mask-input")
    if len(boxes) > 1 and (points or mask_input is not None):
        raise typer.BadParameter("several --box are objects of their own and take no --point or --mask-input")
    spots = [_numbers("--point", text, (2, 3)) for text in points]
    for text, spot in zip(points, spots, strict=True):
        if len(spot) == 3 and spot[2] not in (0, 1):
            raise typer.BadParameter(f"--point {text}: the label is 1 (foreground) or 0 (background)")
    frames = np.array([_numbers("--box", text, (4,)) for text in boxes])
    for text, frame in zip(boxes, frames, strict=True):
        if (frame[2:] < frame[:2]).any():
            raise typer.BadParameter(f"--box {text}: X0,Y0 is the upper left corner, X1,Y1 the lower right one")
    logits = None
    if mask_input is not None:
        logits = _read_array(mask_input)
        if logits.ndim != 3 or len(logits) != 1 or logits.dtype.kind != "f":
            raise ValueError(f"{mask_input} must hold float logits [1,h,w], got {logits.dtype} {list(logits.shape)}")
        if not np.isfinite(logits).all():
            raise ValueError(f"{mask_input} must hold finite logits, got NaN or infinity")
    return {
        "point_coords": np.array([spot[:2] for spot in spots]) if spots else None,
        "point_labels": np.array([int((*spot, 1)[2]) for spot in spots]) if spots else None,
        "box": (frames[0] if len(frames) == 1 else frames) if boxes else None,
        "mask_input": logits,
    }


def _read_array(path: Path) -> np.ndarray:
    """The array of a .npy file."""
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} is not a readable .npy file: {' '.join(str(error).split())}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays, not a .npy file")
    return array


def _numbers(option: str, text: str, lengths: tuple[int, ...]) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in lengths or not np.isfinite(values).all():
        shape = " or ".join(str(length) for length in lengths)
        raise typer.BadParameter(f"{option} takes {shape} numbers separated by commas, got {text!r}")
    return values


def _encode(predictor: SamPredictor, image: np.ndarray, path: Path | None) -> ImageEmbedding:
    """Return the image's embedding, from the file at `path` if that was made of this image by this model.

    The file carries a hash of the image's pixels, as an embedding alone does not tell of which image it is.
    """
    if path is None:
        return predictor.set_image(image)
    digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
    if path.exists():
        known = _load_if_it_fits(predictor, path, digest)
        if known is not None:
            return known
    encoded = predictor.set_image(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded.metadata[_DIGEST_KEY] = digest
    encoded.save(path)
    return encoded


def _load_if_it_fits(predictor: SamPredictor, path: Path, digest: str) -> ImageEmbedding | None:
    """Raises ValueError where the file is not an embedding at all: then it is not ours to overwrite."""
    from sam_fast import ImageEmbedding

    known = ImageEmbedding.load(path, predictor.device)
    try:
        predictor.runtime.check(known)
    except ValueError as error:
        report_note(f"{path} is replaced: {error}")
        return None
    if known.metadata.get(_DIGEST_KEY) != digest:
        report_note(f"{path} is replaced: it is the embedding of another image")
        return None
    return known


def _write(
    output: Path, stem: str, masks: np.ndarray, scores: np.ndarray, logits: np.ndarray | None
) -> list[dict[str, Any]]:
    """Write masks [N,M,H,W] as numbered files; return what the JSON says about them."""
    import torch
    from PIL import Image

    from sam_fast.utils.amg import (
        area_from_rle,
        batched_mask_to_box,
        box_xyxy_to_xywh,
        coco_encode_rle,
        mask_to_rle_pytorch,
    )

    records: list[dict[str, Any]] = []
    for prompt, index in np.ndindex(masks.shape[:2]):
        name = f"{stem}_{len(records)}"
        mask = masks[prompt, index]
        Image.fromarray(mask).convert("L").save(output / f"{name}.png", compress_level=1)
        if logits is not None:
            np.save(output / f"{name}_logits.npy", logits[prompt, index][None])
        tensor = torch.from_numpy(mask)[None]
        rle = mask_to_rle_pytorch(tensor)[0]
        records.append(
            {
                "file": f"{name}.png",
                "prompt": prompt,
                "predicted_iou": float(scores[prompt, index]),
                "area": area_from_rle(rle),
                "bbox": box_xyxy_to_xywh(batched_mask_to_box(tensor)[0]).tolist(),
                "segmentation": coco_encode_rle(rle),
            }
        )
    return records


def _draw(image: np.ndarray, masks: np.ndarray, prompts: dict[str, Any]) -> Any:
    from sam_fast.utils.overlay import draw_masks, draw_prompts

    boxes = prompts["box"]
    return draw_prompts(
        draw_masks(image, masks),
        prompts["point_coords"],
        prompts["point_labels"],
        None if boxes is None else boxes.reshape(-1, 4),
    )


def _plain(array: np.ndarray | None) -> Any:
    return None if array is None else array.tolist()
