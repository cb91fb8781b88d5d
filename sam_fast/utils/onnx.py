"""All of a model behind its image encoder as one module, and the ONNX file of that module."""

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
import torch.nn.functional as F
from torch import Tensor, nn

from sam_fast.modeling import Sam
from sam_fast.utils.files import replace_file

DEFAULT_OPSET = 18
_OLDEST_OPSET = 17  # has LayerNormalization; the exporter writes 18 or newer and converts down


class SamOnnxModel(nn.Module):
    """Everything of a `Sam` behind the image encoder, with tensors for inputs and no branches that depend on values.

    Args:
        model: the model.
        return_single_mask: return one mask per prompt, chosen by the number of points, rather than all of them.
        use_stability_score: give the masks' stability scores at low resolution in place of the predicted IoU.
        return_extra_metrics: also return stability scores and areas at full resolution.
    """

    def __init__(
        self,
        model: Sam,
        return_single_mask: bool,
        use_stability_score: bool = False,
        return_extra_metrics: bool = False,
    ) -> None:
        super().__init__()
        self.mask_decoder = model.mask_decoder
        self.model = model
        self.img_size = model.image_encoder.img_size
        self.return_single_mask = return_single_mask
        self.use_stability_score = use_stability_score
        self.stability_score_offset = 1.0
        self.return_extra_metrics = return_extra_metrics

    @torch.no_grad()
    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, ...]:
        """Predict masks for N prompts of K points each.

        Args:
            image_embeddings: [1,C,h,w], from the image encoder.
            point_coords: [N,K,2], XY in pixels of the resized image. A box is its two corners; without a box
                a padding point (0, 0) belongs at the end.
            point_labels: [N,K] float: 0 background, 1 foreground, 2 and 3 first and second corner of a box, -1 padding.
            mask_input: [1,1,4h,4w], logits of an earlier prediction; ignored unless `has_mask_input`.
            has_mask_input: [1], 1 or 0.
            orig_im_size: [2] float, (H, W) of the original image.

        Returns:
            masks [N,M,H,W] (logits), scores [N,M], low-resolution logits [N,M,4h,4w]; or masks, scores,
            stability scores [N,M], areas int64 [N,M], low-resolution logits.
        """
        low_res_masks, scores = self.mask_decoder.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=self._embed_points(point_coords, point_labels),
            dense_prompt_embeddings=self._embed_masks(mask_input, has_mask_input),
        )
        if self.use_stability_score:
            scores = self._stability_score(low_res_masks)
        if self.return_single_mask:
            low_res_masks, scores = self.select_masks(low_res_masks, scores, point_coords.shape[1])
        masks = self.mask_postprocessing(low_res_masks, orig_im_size)
        if self.return_extra_metrics:
            areas = (masks > self.model.mask_threshold).sum(-1).sum(-1)
            return masks, scores, self._stability_score(masks), areas, low_res_masks
        return masks, scores, low_res_masks

    @staticmethod
    def resize_longest_image_size(input_image_size: Tensor, longest_side: int) -> Tensor:
        """The (h, w) [2] int64 of an image of size (H, W) [2] once its longest side has `longest_side` pixels."""
        size = input_image_size.to(torch.float32)
        return torch.floor(longest_side / torch.maximum(size[0], size[1]) * size + 0.5).to(torch.int64).clamp(min=1)

    def mask_postprocessing(self, masks: Tensor, orig_im_size: Tensor) -> Tensor:
        """Upscale logits [N,M,4h,4w] to the padded input, drop the padding, and scale to the original [N,M,H,W]."""
        masks = F.interpolate(masks, (self.img_size, self.img_size), mode="bilinear", align_corners=False)
        height, width = _sizes(self.resize_longest_image_size(orig_im_size, self.img_size), self.img_size)
        masks = masks[..., :height, :width]
        return F.interpolate(masks, _sizes(orig_im_size.to(torch.int64)), mode="bilinear", align_corners=False)

    def select_masks(self, masks: Tensor, iou_preds: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
        """Choose one mask per prompt: the one for unambiguous prompts with 3 points or more, else the best other.

        A NaN score (the stability of an empty mask) counts as 0; the published code prefers it to any number, and
        runtimes do not agree on it.

        Args:
            masks: [N,M,H,W], the one for unambiguous prompts first.
            iou_preds: [N,M].
            num_points: K, padding point and box corners included.

        Returns:
            masks [N,1,H,W] and scores [N,1].
        """
        # a term in place of a branch: it outweighs every score
        reweight = torch.zeros_like(iou_preds[:1])
        reweight[:, 0] = 1000.0
        best = torch.argmax(torch.nan_to_num(iou_preds) + (num_points - 2.5) * reweight, dim=1)
        prompts = torch.arange(masks.shape[0], device=masks.device)
        return masks[prompts, best].unsqueeze(1), iou_preds[prompts, best].unsqueeze(1)

    def _embed_points(self, point_coords: Tensor, point_labels: Tensor) -> Tensor:
        """Tokens [N,K,C] of points [N,K,2] with labels [N,K]."""
        encoder = self.model.prompt_encoder
        encoding = encoder.pe_layer.forward_with_coords(point_coords + 0.5, (self.img_size, self.img_size))
        labels = point_labels.unsqueeze(-1)
        tokens = torch.where(labels == -1, encoder.not_a_point_embed.weight, encoding)
        for label, embedding in enumerate(encoder.point_embeddings):
            tokens = tokens + embedding.weight * (labels == label)  # type: ignore[operator]
        return tokens

    def _embed_masks(self, mask_input: Tensor, has_mask_input: Tensor) -> Tensor:
        """Dense embedding [1,C,h,w] of a mask [1,1,4h,4w], or the embedding of "no mask" where the flag is 0."""
        encoder = self.model.prompt_encoder
        no_mask = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return has_mask_input * encoder.mask_downscaling(mask_input) + (1 - has_mask_input) * no_mask

    def _stability_score(self, masks: Tensor) -> Tensor:
        # as `amg.calculate_stability_score`, whose choice of dtype would tie the exported graph to one width
        threshold, offset = self.model.mask_threshold, self.stability_score_offset
        return (masks > threshold + offset).sum((-2, -1)) / (masks > threshold - offset).sum((-2, -1))


def _sizes(size: Tensor, limit: int | None = None) -> tuple[int, int]:
    """The two integers of a size [2]; on export, symbols that are known to be at least 1 and at most `limit`."""
    height, width = size.tolist()
    for side in (height, width):
        torch._check(side >= 1)
        if limit is not None:
            torch._check(side <= limit)
    return height, width


class _InputSide(nn.Module):
    """What is left of the image encoder in the exported module: the size of its input."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.img_size = img_size


def export_onnx_model(
    model: Sam,
    path: str | os.PathLike[str],
    *,
    return_single_mask: bool = False,
    opset: int = DEFAULT_OPSET,
    gelu_approximate: bool = False,
    use_stability_score: bool = False,
    return_extra_metrics: bool = False,
) -> None:
    """Export prompt encoder, mask decoder and mask post-processing; inputs and outputs are those of `SamOnnxModel`.

    The number of prompts, the number of points and the size of the original image are free in the file, in float32
    and for the input size of `model`, which stays as it is.

    Args:
        model: the model, on any device and of any dtype.
        path: the file to write.
        return_single_mask: return the best mask of each prompt rather than all of them.
        opset: version of the ONNX operators, 17 or newer.
        gelu_approximate: use the tanh form of GELU, for runtimes without erf; changes the masks slightly.
        use_stability_score: give stability scores in place of the predicted IoU.
        return_extra_metrics: also return stability scores and areas at full resolution.

    Raises:
        RuntimeError: a package that the export needs is not installed, or it does not know the opset.
        ValueError: the opset is too old.
        FileNotFoundError: the folder of `path` does not exist.
    """
    _require("onnx", "onnxscript")
    if opset < _OLDEST_OPSET:
        raise ValueError(f"opset must be {_OLDEST_OPSET} or newer, got {opset}")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"the folder of {os.fspath(path)} does not exist")
    onnx_model = SamOnnxModel(_without_encoder(model), return_single_mask, use_stability_score, return_extra_metrics)
    if gelu_approximate:
        for module in onnx_model.modules():
            if isinstance(module, nn.GELU):
                module.approximate = "tanh"
    extra = ["stability_scores", "areas"] if return_extra_metrics else []
    names = ["masks", "iou_predictions", *extra, "low_res_masks"]
    replace_file(Path(path), lambda part: _write(onnx_model, part, opset, names))


def quantize_onnx_model(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write the ONNX file `source` again as `target`, with its weights in 8 bits.

    Raises:
        RuntimeError: a package that this needs is not installed.
    """
    _require("onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(os.fspath(source))
    del model.graph.value_info[:]  # the quantizer infers the shapes again and stumbles over the exporter's
    with _quiet():
        # A scale for each output channel: with one for all, masks of random weights change twice as many pixels.
        quantize_dynamic(model, os.fspath(target), per_channel=True, reduce_range=False, weight_type=QuantType.QUInt8)


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
        raise RuntimeError(f"the installed exporter cannot write opset {opset}; it writes opset {written.get('')}")
    onnx.checker.check_model(str(path), full_check=True)


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
