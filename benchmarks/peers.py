"""The implementations that benchmarks/gpu.py compares, all with the same seeded weights.

Each is a `DevicePeer`: a table of what it can do. segment_anything is imported through `tests.oracle`, which does
without torchvision; its non-maximum suppression is then sam_fast's, as the stand-in of the tests is slow.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_fast import SamAutomaticMaskGenerator, SamPredictor
from sam_fast.build_sam import NANO, VIT_B, VIT_H, VIT_L, SamConfig, build_sam_from_config
from sam_fast.checkpoints import convert_hugging_face
from sam_fast.modeling import Sam
from sam_fast.modeling.seeded import seed_weights
from sam_fast.ops.nms import nms
from sam_fast.runtime.inference import Prompts

SEED = 3  # of 0 to 3, the seed whose masks are the most varied
# For trying things out: windows of 6 on 8 x 8 tokens.
TINY = SamConfig(image_size=128, embed_dim=64, depth=2, num_heads=1, window_size=6, global_attn_indexes=(1,))
CONFIGS = {"vit_b": VIT_B, "vit_l": VIT_L, "vit_h": VIT_H, "nano": NANO, "tiny": TINY}
OURS, OFFICIAL = "sam_fast", "segment_anything 1.0"
_FAST_BATCHES = 4  # of 64 prompts that segment-anything-fast decodes at once; all 16 hold 3072 masks at full size
_OFFICIAL_BATCH = 64  # prompts that the official generator decodes at a time; more do not fit everywhere


@dataclass(frozen=True)
class ImageState:
    """An image that is set: features [1, C, s, s] float32 of `image`, (H, W), and (h, w) of its resized form."""

    image: np.ndarray
    features: Tensor
    original_size: tuple[int, int]
    input_size: tuple[int, int]

    def give_to(self, predictor: Any) -> None:
        """Make it the image of a predictor, as scripts that keep embeddings do."""
        predictor.features, predictor.is_image_set = self.features, True
        predictor.original_size, predictor.input_size = self.original_size, self.input_size


@dataclass(frozen=True)
class DevicePeer:
    """One implementation in one precision, and what of it can be timed; None for what cannot.

    encode: normalised pixels [B, 3, S, S] -> features [B, C, s, s].
    decode: (state, points [N, 1, 2] in the model's frame, labels [N, 1]) -> logits [N, 3, 4s, 4s].
    click: (state, point [1, 2] in pixels of the image) -> masks [3, H, W], numpy.
    postprocess: (state, logits [N, 4s, 4s]) -> boxes [N, 4], stability scores [N].
    generator: (points per side, IoU threshold, stability threshold) -> image -> records.
    batches: the same -> images -> records of each.
    """

    name: str
    precision: str
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[ImageState, Tensor, Tensor], Tensor] | None = None
    click: Callable[[ImageState, np.ndarray], np.ndarray] | None = None
    postprocess: Callable[[ImageState, Tensor], tuple[Tensor, Tensor]] | None = None
    generator: Callable[[int, float, float], Callable[[np.ndarray], list[dict]]] | None = None
    batches: Callable[[int, float, float], Callable[[list[np.ndarray]], list[list[dict]]]] | None = None


def build_ours(name: str, device: torch.device) -> Sam:
    """Our model of that name, with seeded weights."""
    with device:  # initial values, which are replaced, are made faster there
        model = build_sam_from_config(CONFIGS[name])
    seed_weights(model, SEED)
    return model.eval().to(device)


def has_official() -> bool:
    return importlib.util.find_spec("segment_anything") is not None


def ours(model: Sam, precision: str) -> DevicePeer:
    """sam_fast in one precision.

    Raises:
        ValueError, RuntimeError: there is no such precision, or not on this device.
    """
    predictor = SamPredictor(model, precision=precision)
    side = model.image_encoder.img_size

    def encode(pixels: Tensor) -> Tensor:
        sizes = [(side, side)] * len(pixels)
        return torch.cat([e.features for e in predictor.runtime.encode_pixels(pixels, sizes, sizes)])

    def embedding(state: ImageState) -> Any:
        if predictor.features is not state.features:
            state.give_to(predictor)
        return predictor._current(None)

    def decode(state: ImageState, points: Tensor, labels: Tensor) -> Tensor:
        return predictor.runtime.decode(embedding(state), Prompts(points, labels))[0]

    def click(state: ImageState, point: np.ndarray) -> np.ndarray:
        embedding(state)
        return predictor.predict(point, np.ones(1))[0]

    def postprocess(state: ImageState, logits: Tensor) -> tuple[Tensor, Tensor]:
        done = predictor.runtime.postprocess(embedding(state), logits)
        return done.boxes, done.stability_score

    def generator(side: int, iou: float, stability: float) -> SamAutomaticMaskGenerator:
        return SamAutomaticMaskGenerator(
            model,
            points_per_side=side,
            pred_iou_thresh=iou,
            stability_score_thresh=stability,
            precision=precision,
        )

    def generate(*settings: Any) -> Callable[[np.ndarray], list[dict]]:
        return generator(*settings).generate

    def generate_batch(*settings: Any) -> Callable[[list[np.ndarray]], list[list[dict]]]:
        return generator(*settings).generate_batch  # type: ignore[return-value]

    return DevicePeer(OURS, precision, encode, decode, click, postprocess, generate, generate_batch)


def official(name: str, weights: dict[str, Tensor], device: torch.device, precision: str) -> DevicePeer:
    """segment_anything, in bf16 with converted weights and float32 between its stages.

    Args:
        weights: the state dict of our model.
        precision: fp32 or bf16, or "bf16 compiled" for an image encoder under torch.compile(mode="max-autotune").
    """
    from tests.oracle import build_official
    from tests.oracle import official as package

    with device:
        model: Any = build_official(CONFIGS[name])
    model.load_state_dict(weights)
    model.to(device)
    if precision != "fp32":
        _narrow(model.image_encoder, torch.bfloat16)
        _narrow(model.mask_decoder, torch.bfloat16)
    if precision.endswith("compiled"):
        model.image_encoder.forward = torch.compile(model.image_encoder.forward, mode="max-autotune")
    predictor = package.SamPredictor(model)
    if importlib.util.find_spec("torchvision") is None:
        package.automatic_mask_generator.batched_nms = _nms_of_one_group

    def decode(state: ImageState, points: Tensor, labels: Tensor) -> Tensor:
        parts = []
        for some in torch.arange(len(points), device=points.device).split(_OFFICIAL_BATCH):
            sparse, dense = model.prompt_encoder((points[some], labels[some]), None, None)
            pe = model.prompt_encoder.get_dense_pe()
            parts.append(
                model.mask_decoder(
                    image_embeddings=state.features,
                    image_pe=pe,
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=True,
                )[0]
            )
        return torch.cat(parts)

    def click(state: ImageState, point: np.ndarray) -> np.ndarray:
        if predictor.features is not state.features:
            state.give_to(predictor)
        return predictor.predict(point, np.ones(1))[0]

    def postprocess(state: ImageState, logits: Tensor) -> tuple[Tensor, Tensor]:
        full = model.postprocess_masks(logits[:, None], state.input_size, state.original_size)[:, 0]
        amg = package.utils.amg
        score = amg.calculate_stability_score(full, model.mask_threshold, 1.0)
        return amg.batched_mask_to_box(full > model.mask_threshold), score

    def generator(side: int, iou: float, stability: float) -> Callable[[np.ndarray], list[dict]]:
        return package.SamAutomaticMaskGenerator(
            model, points_per_side=side, pred_iou_thresh=iou, stability_score_thresh=stability
        ).generate

    return DevicePeer(OFFICIAL, precision, model.image_encoder, decode, click, postprocess, generator)


def reference(model: Sam) -> DevicePeer:
    """The model's own modules in float32, for the gate where segment_anything is missing."""

    def decode(state: ImageState, points: Tensor, labels: Tensor) -> Tensor:
        parts = []
        for some in torch.arange(len(points), device=points.device).split(_OFFICIAL_BATCH):
            sparse, dense = model.prompt_encoder((points[some], labels[some]), None, None)
            pe = model.prompt_encoder.get_dense_pe()
            parts.append(model.mask_decoder(state.features, pe, sparse, dense, multimask_output=True)[0])
        return torch.cat(parts)

    plain = ours(model, "fp32")
    return DevicePeer("modules", "fp32", model.image_encoder, decode, plain.click, plain.postprocess, plain.generator)


def transformers(name: str, weights: dict[str, Tensor], device: torch.device, precision: str) -> DevicePeer:
    """Hugging Face's SamModel with scaled_dot_product_attention: its image encoder."""
    from transformers import SamConfig as Config
    from transformers import SamModel

    wanted = CONFIGS[name]
    if wanted.stem_channels:
        raise ValueError("transformers has no encoder with a convolutional stem")
    vision = {
        "hidden_size": wanted.embed_dim,
        "num_hidden_layers": wanted.depth,
        "num_attention_heads": wanted.num_heads,
        "global_attn_indexes": list(wanted.global_attn_indexes),
        "window_size": wanted.window_size,
    }
    sizes = {"image_size": wanted.image_size, "patch_size": wanted.patch_size}
    config = Config(vision_config={**vision, **sizes}, prompt_encoder_config=sizes)
    with device:
        model = SamModel._from_config(config, attn_implementation="sdpa").eval()
    copied = 0
    for key, tensor in model.state_dict().items():
        converted = next(iter(convert_hugging_face({key: tensor})), None)
        if converted is not None:  # None: a copy of another weight
            tensor.copy_(weights[converted])
            copied += 1
    if copied < len(weights):
        raise RuntimeError(f"{len(weights) - copied} weights found no place in transformers.SamModel")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model.to(device, dtype)
    return DevicePeer(
        "transformers SDPA", precision, lambda pixels: model.get_image_embeddings(pixels.to(dtype)).float()
    )


def segment_anything_fast(name: str, weights: dict[str, Tensor], device: torch.device) -> DevicePeer:
    """segment-anything-fast: its image encoder in bf16, compiled, and its generator."""
    import segment_anything_fast as package

    model = package.sam_model_fast_registry[name]()
    for key, tensor in model.state_dict().items():
        tensor.copy_(weights[key.replace("_orig_mod.", "")])
    encoder = model.to(device).image_encoder

    def generator(side: int, iou: float, stability: float) -> Callable[[np.ndarray], list[dict]]:
        return package.SamAutomaticMaskGenerator(
            model,
            points_per_side=side,
            pred_iou_thresh=iou,
            stability_score_thresh=stability,
            process_batch_size=_FAST_BATCHES,
        ).generate

    def encode(pixels: Tensor) -> Tensor:
        return encoder(pixels.bfloat16()).float()

    return DevicePeer("segment-anything-fast", "bf16", encode, generator=generator)


def peers_of(name: str, model: Sam, precisions: list[str], compiled: bool) -> Iterator[Callable[[], DevicePeer]]:
    """What makes each of the peers of a model, the reference first."""
    device, weights = model.device, model.state_dict()
    if has_official():
        yield lambda: official(name, weights, device, "fp32")
    else:
        print("segment_anything is not importable (see --peers): the reference is sam_fast's own modules")
        yield lambda: reference(model)
    for precision in precisions:
        yield lambda precision=precision: ours(model, precision)  # type: ignore[misc]
    if has_official():
        yield lambda: official(name, weights, device, "bf16")
        if compiled:
            yield lambda: official(name, weights, device, "bf16 compiled")
    if importlib.util.find_spec("transformers") is not None:
        yield lambda: transformers(name, weights, device, "bf16")
    if compiled and importlib.util.find_spec("segment_anything_fast") is not None and name.startswith("vit_"):
        yield lambda: segment_anything_fast(name, weights, device)


def _narrow(module: nn.Module, dtype: torch.dtype) -> None:
    """Run a module in a narrower format, between float32 inputs and outputs."""

    def cast(value: Any, to: torch.dtype) -> Any:
        if isinstance(value, tuple):
            return tuple(cast(item, to) for item in value)
        return value.to(to) if isinstance(value, Tensor) and value.is_floating_point() else value

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return cast(args, dtype), {key: cast(value, dtype) for key, value in kwargs.items()}

    module.to(dtype)
    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(lambda _module, _args, output: cast(output, torch.float32))


def _nms_of_one_group(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """What torchvision's batched_nms does where all `idxs` are equal, as they are for a single crop."""
    return nms(boxes, scores, iou_threshold)
