"""Writes a model without its image encoder as an ONNX file."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sam_fast.modeling import Sam
from sam_fast.utils.onnx import SamOnnxModel

DEFAULT_OPSET = 18
_OLDEST_OPSET = 17  # has LayerNormalization; the exporter writes 18 or newer and converts down
_REQUIRED = ("onnx", "onnxscript")


class _InputSide(nn.Module):
    """What is left of the image encoder in the exported module: the size of its input."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.img_size = img_size


def export_onnx(
    model: Sam,
    path: str | os.PathLike[str],
    *,
    return_single_mask: bool = False,
    opset: int = DEFAULT_OPSET,
    quantize_out: str | os.PathLike[str] | None = None,
    gelu_approximate: bool = False,
    use_stability_score: bool = False,
    return_extra_metrics: bool = False,
) -> list[Path]:
    """Export prompt encoder, mask decoder and mask post-processing; inputs and outputs are those of `SamOnnxModel`.

    The number of prompts, the number of points and the size of the original image are free in the file, in float32
    and for the input size of `model`, which stays as it is.

    Args:
        model: the model, on any device and of any dtype.
        path: the file to write.
        return_single_mask: return the best mask of each prompt rather than all of them.
        opset: version of the ONNX operators, 17 or newer.
        quantize_out: where to write a second file with weights in 8 bits; none by default.
        gelu_approximate: use the tanh form of GELU, for runtimes without erf; changes the masks slightly.
        use_stability_score: give stability scores in place of the predicted IoU.
        return_extra_metrics: also return stability scores and areas at full resolution.

    Returns:
        The files written.

    Raises:
        RuntimeError: a package that the export needs is not installed, or it does not know the opset.
        ValueError: the opset is too old.
    """
    _require(*_REQUIRED, *(["onnxruntime"] if quantize_out else []))
    if opset < _OLDEST_OPSET:
        raise ValueError(f"opset must be {_OLDEST_OPSET} or newer, got {opset}")
    onnx_model = SamOnnxModel(_without_encoder(model), return_single_mask, use_stability_score, return_extra_metrics)
    if gelu_approximate:
        for module in onnx_model.modules():
            if isinstance(module, nn.GELU):
                module.approximate = "tanh"
    extra = ["stability_scores", "areas"] if return_extra_metrics else []
    _write(onnx_model, Path(path), opset, ["masks", "iou_predictions", *extra, "low_res_masks"])
    if quantize_out is None:
        return [Path(path)]
    _quantize(Path(path), Path(quantize_out))
    return [Path(path), Path(quantize_out)]


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"the export to ONNX needs {', '.join(missing)}: pip install 'sam_fast[onnx]'")


def _without_encoder(model: Sam) -> Sam:
    """A float32 copy on the CPU that leaves out the image encoder, by far the largest part."""
    encoder: nn.Module = _InputSide(model.image_encoder.img_size)
    prompt_encoder, mask_decoder = copy.deepcopy(model.prompt_encoder), copy.deepcopy(model.mask_decoder)
    light = Sam(encoder, prompt_encoder, mask_decoder)  # type: ignore[arg-type]
    light.mask_threshold = model.mask_threshold
    return light.to(device="cpu", dtype=torch.float32).eval()


def _example_inputs(model: SamOnnxModel) -> dict[str, Tensor]:
    encoder = model.model.prompt_encoder
    height, width = encoder.image_embedding_size
    # Sizes of 1 would be taken for constants, so there are two prompts.
    return {
        "image_embeddings": torch.zeros(1, encoder.embed_dim, height, width),
        "point_coords": torch.zeros(2, 5, 2),
        "point_labels": torch.ones(2, 5),
        "mask_input": torch.zeros(1, 1, 4 * height, 4 * width),
        "has_mask_input": torch.ones(1),
        "orig_im_size": torch.tensor([150.0, 225.0]),
    }


def _write(model: SamOnnxModel, path: Path, opset: int, output_names: list[str]) -> None:
    import onnx

    inputs = _example_inputs(model)
    prompts, points = torch.export.Dim("num_prompts"), torch.export.Dim("num_points")
    free: dict[str, dict[int, object] | None] = dict.fromkeys(inputs)
    free["point_coords"] = free["point_labels"] = {0: prompts, 1: points}
    with _quiet():
        # Strict, that is by Dynamo: running the Python code would turn len(tensor) into a constant.
        program = torch.export.export(model, (), inputs, dynamic_shapes=free, strict=True)
        torch.onnx.export(
            program,
            (),
            path,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=output_names,
            opset_version=opset,
            external_data=False,
            verbose=False,
        )
    written = {entry.domain: entry.version for entry in onnx.load(str(path), load_external_data=False).opset_import}
    if written.get("") != opset:
        raise RuntimeError(f"the installed exporter cannot write opset {opset}; {path} has opset {written.get('')}")
    onnx.checker.check_model(str(path), full_check=True)


def _quantize(source: Path, target: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(source))
    del model.graph.value_info[:]  # the quantizer infers the shapes again and stumbles over the exporter's
    with _quiet():
        quantize_dynamic(model, str(target), per_channel=False, reduce_range=False, weight_type=QuantType.QUInt8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporters say about their own internals (deprecations, optional packages, versions)."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
