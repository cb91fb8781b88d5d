"""`Sam.forward` for inference: the records of a batch through the runtime, as `SamPredictor` runs single images."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from sam_fast.modeling import Sam
from sam_fast.ops.packed_masks import unpack_masks
from sam_fast.runtime.inference import InferenceRuntime, Prompts

_runtimes: weakref.WeakKeyDictionary[Sam, InferenceRuntime] = weakref.WeakKeyDictionary()


def run(model: Sam, batched_input: list[dict[str, Any]], multimask_output: bool) -> list[dict[str, Tensor]] | None:
    """What `Sam.forward` returns, or None where the model's own modules must run.

    They must where anything is overridden, in other formats than float32, whose results they return in these formats,
    and under autocast.
    """
    weights = {p.dtype for p in model.parameters() if p.is_floating_point()}
    replaced = type(model) is not Sam or "postprocess_masks" in model.__dict__
    if replaced or weights != {torch.float32} or torch.is_autocast_enabled(model.device.type):
        return None
    runtime = _runtimes.get(model)
    if runtime is None:
        # The reference to the model is weak there as well, lest the entry keep it alive.
        runtime = _runtimes[model] = InferenceRuntime(weakref.proxy(model))  # type: ignore[arg-type]
    pixels = torch.stack([model.preprocess(record["image"]) for record in batched_input])
    input_sizes = [tuple(record["image"].shape[-2:]) for record in batched_input]
    original_sizes = [_two_numbers(record["original_size"]) for record in batched_input]
    embeddings = runtime.encode_pixels(pixels, input_sizes, original_sizes)
    results = []
    for record, embedding in zip(batched_input, embeddings, strict=True):
        prompts = Prompts(
            record.get("point_coords"),
            record.get("point_labels"),
            record.get("boxes"),
            record.get("mask_inputs"),
            record.get("extra_tokens"),
        )
        logits, iou = runtime.decode(embedding, prompts, multimask_output)
        bits = runtime.postprocess(embedding, logits.flatten(0, 1)).bits
        assert bits is not None
        height, width = embedding.original_size
        masks = unpack_masks(bits, width).view(*logits.shape[:2], height, width)
        results.append({"masks": masks, "iou_predictions": iou, "low_res_logits": logits})
    return results


def _two_numbers(size: Any) -> tuple[int, int]:
    """(H, W) of numbers or of tensors, as a loader collates them."""
    height, width = size
    return int(height), int(width)
