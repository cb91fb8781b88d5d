"""The official `segment_anything` 1.0 as the oracle of the tests.

Importing this module makes `segment_anything` importable even where torchvision is missing: while the package is being
imported, a stand-in with the five functions that it uses takes torchvision's place. The stand-in leaves `sys.modules`
right after, so that other libraries (transformers) do not mistake it for the real one.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import zlib
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sam_fast.build_sam import SamConfig

# 16 x 16 tokens in windows of 6: the last window of each row and column holds 4 real tokens and 2 rows of padding.
# Heads are 64 wide and the decoder has its real size, as in the published models.
TINY = SamConfig(image_size=256, embed_dim=128, depth=4, num_heads=2, window_size=6, global_attn_indexes=(1, 3))


def box_area(boxes: Tensor) -> Tensor:
    """(x2 - x1)(y2 - y1) of boxes [N, 4], XYXY."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: indices of the boxes kept, int64 [K], by descending score.

    Ties go by index, NaN scores come last; a box is suppressed when its float32 IoU with a kept
    one exceeds the threshold.
    """
    boxes, scores = boxes.float(), scores.float()
    nan = scores.isnan()
    order = torch.sort(scores.nan_to_num(nan=-torch.inf), descending=True, stable=True).indices
    order = torch.cat([order[~nan[order]], order[nan[order]]])
    boxes = boxes[order]
    areas = box_area(boxes)
    suppressed = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    kept = []
    for i in range(len(boxes)):
        if suppressed[i]:
            continue
        kept.append(i)
        rest = boxes[i + 1 :]
        size = (torch.minimum(boxes[i, 2:], rest[:, 2:]) - torch.maximum(boxes[i, :2], rest[:, :2])).clamp(min=0)
        intersection = size[:, 0] * size[:, 1]
        iou = intersection / (areas[i] + areas[i + 1 :] - intersection)
        suppressed[i + 1 :] |= iou > iou_threshold
    return order[torch.tensor(kept, dtype=torch.int64, device=boxes.device)]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`nms` within each group of equal `idxs`, the kept of all groups by descending score."""
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for group in idxs.unique():
        members = (idxs == group).nonzero()[:, 0]
        keep[members[nms(boxes[members], scores[members], iou_threshold)]] = True
    kept = keep.nonzero()[:, 0]
    return kept[torch.sort(scores[kept], descending=True, stable=True).indices]


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _to_pil_image(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image)


def _stand_in_modules() -> dict[str, ModuleType]:
    names = ["torchvision", "torchvision.ops", "torchvision.ops.boxes"]
    names += ["torchvision.transforms", "torchvision.transforms.functional"]
    modules = {name: ModuleType(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    vars(modules["torchvision.ops.boxes"]).update(nms=nms, batched_nms=batched_nms, box_area=box_area)
    vars(modules["torchvision.transforms.functional"]).update(resize=_resize, to_pil_image=_to_pil_image)
    return modules


def _import_official() -> ModuleType:
    modules = {} if importlib.util.find_spec("torchvision") else _stand_in_modules()
    sys.modules.update(modules)
    try:
        import segment_anything
        import segment_anything.automatic_mask_generator
        import segment_anything.utils.onnx
        import segment_anything.utils.transforms
    finally:
        for name in modules:
            del sys.modules[name]
    return segment_anything


official = _import_official()


def build_official(config: SamConfig) -> nn.Module:
    """The official `Sam` of any configuration, in eval mode."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    grid = config.image_size // config.patch_size
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            out_chans=config.prompt_embed_dim,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=config.window_size,
            global_attn_indexes=config.global_attn_indexes,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=config.prompt_embed_dim,
            image_embedding_size=(grid, grid),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=config.mask_in_chans,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=config.prompt_embed_dim,
            transformer=TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=config.prompt_embed_dim,
                num_heads=config.decoder_num_heads,
                mlp_dim=config.decoder_mlp_dim,
            ),
        ),
    )
    return sam.eval()


# Factors on the plain 1/sqrt(fan_in) scale, found by looking at the masks (see `seed_weights`).
_POSITION_GAIN = 1.5  # absolute positions stay visible behind the whole encoder
_TEXTURE = 0.02  # share of a convolution kernel that differs between its taps
_ATTENTION_GAIN = 1.5  # q and k of the decoder's cross attentions: a prompt is noticed
_BACKGROUND = 12.0  # pulls logits below zero: masks cover a smaller part of the image
_IOU_CENTRE = 0.95
_GAINS = {
    "attn.proj.weight": 0.5,  # what an encoder block adds
    "mlp.lin2.weight": 0.5,
    "cross_attn_image_to_token.out_proj.weight": 2.0,  # what prompts write into the image stream
    "hypernetworks_mlps.0.layers.2.weight": 100.0,  # logits of hundreds, so that stability scores reach 0.95
    "hypernetworks_mlps.1.layers.2.weight": 100.0,
    "hypernetworks_mlps.2.layers.2.weight": 100.0,
    "hypernetworks_mlps.3.layers.2.weight": 100.0,
    "iou_prediction_head.layers.2.weight": 0.15,  # spread around _IOU_CENTRE
}


def _noise(shape: torch.Size, seed: int, key: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{key}".encode()))
    return torch.randn(shape, generator=generator)


def _smooth_positions(shape: torch.Size, seed: int, key: str) -> Tensor:
    """Absolute positions [1, H, W, C] that vary slowly: a coarse 6 x 6 grid of noise, interpolated."""
    coarse = _noise(torch.Size((1, shape[3], 6, 6)), seed, key)
    return nn.functional.interpolate(coarse, shape[1:3], mode="bicubic").permute(0, 2, 3, 1)


def _mirror(tensor: Tensor, dim: int, sign: float) -> Tensor:
    """Replace the second half of a dimension by the first, times `sign`."""
    first = tensor.narrow(dim, 0, tensor.shape[dim] // 2)
    return torch.cat([first, sign * first], dim)


def _balanced(name: str, tensor: Tensor) -> Tensor:
    """Pair the channels of the upscaling as a, -a, and what reads them as h, -h.

    As h (gelu(a) - gelu(-a)) = h a, the positive mean behind each GELU cancels and the mask is balanced around zero.
    """
    if name.endswith("output_upscaling.0.weight"):
        return _mirror(tensor, 1, -1)
    if name.endswith("output_upscaling.3.weight"):
        return _mirror(_mirror(tensor, 1, -1), 0, -1)
    if name.endswith("output_upscaling.1.weight"):
        return _mirror(tensor, 0, 1)
    if name.endswith(("output_upscaling.0.bias", "output_upscaling.1.bias", "output_upscaling.3.bias")):
        return _mirror(tensor, 0, -1)
    if "hypernetworks" in name and name.endswith("layers.2.weight"):
        return _mirror(tensor, 0, -1)
    return tensor


def _seeded_tensor(name: str, shape: torch.Size, seed: int) -> Tensor:
    noise = functools.partial(_noise, shape, seed)
    if name.endswith("pos_embed"):
        return _POSITION_GAIN * _smooth_positions(shape, seed, name)
    if "rel_pos" in name or name.endswith("no_mask_embed.weight"):
        return 0.1 * noise(name)
    if name.endswith(("gaussian_matrix", "_token.weight", "_tokens.weight", "_embed.weight")):
        return noise(name)
    if "point_embeddings" in name:
        return noise(name)
    if "hypernetworks" in name and name.endswith("layers.2.bias"):
        return noise(name) - _BACKGROUND  # no mirror here: it multiplies gelu(a) + gelu(-a) > 0
    if len(shape) == 1:  # biases, and the weights of normalisations
        is_iou = name.endswith("iou_prediction_head.layers.2.bias")
        centre = _IOU_CENTRE if is_iou else float(name.endswith("weight"))
        return centre + (0.02 if is_iou else 0.1) * noise(name)
    if len(shape) == 4:  # kernels nearly constant over their window smooth the picture: blobs rather than texture
        fan_in = shape[0] if "output_upscaling" in name else shape[1]  # transposed convolutions are [C_in, C_out, 2, 2]
        window = 1 if "output_upscaling" in name else shape[2:].numel()
        weight = _noise(torch.Size((*shape[:2], 1, 1)), seed, name + "mean") + _TEXTURE * noise(name)
        return weight / (fan_in**0.5 * window)
    weight = noise(name) / shape[1] ** 0.5
    if "cross_attn" in name and ("q_proj" in name or "k_proj" in name):
        # Queries and keys share most of their projection, so that a pixel attends to prompts near it: local masks.
        shared = noise(name.replace("k_proj", "q_proj") + "shared") / shape[1] ** 0.5
        return _ATTENTION_GAIN * (0.3 * weight + shared)
    for part, gain in _GAINS.items():
        if part in name:
            return gain * weight
    return weight


@torch.no_grad()
def seed_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a `Sam` (official or ours) with deterministic random weights whose masks are worth comparing.

    PyTorch's default initialisation gives masks that are all noise or all empty, and zero positions. Here every tensor
    is drawn by its name (two models with the same keys get the same values), no bias or position is zero, and
    scales are chosen such that on a photo the embedding follows the picture, masks are blobs that depend on
    the prompt and cover part of the image, logits reach hundreds (stability scores on both sides of 0.95), and the
    predicted IoU lies around 0.88 (the generator's filters keep some masks and drop others).

    Returns:
        the model.
    """
    for name, tensor in model.state_dict().items():
        tensor.copy_(_balanced(name, _seeded_tensor(name, tensor.shape, seed)))
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, in the Euclidean norm over all elements (0 when both are empty)."""
    if expected.numel() == 0:
        return float(actual.shape != expected.shape)
    return ((actual - expected).norm() / expected.norm()).item()
