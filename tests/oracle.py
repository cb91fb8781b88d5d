"""The official `segment_anything` 1.0 as the oracle of the tests.

Importing this module makes `segment_anything` importable even where torchvision is missing: while the package is being
imported, a stand-in with the five functions that it uses takes torchvision's place. The stand-in leaves `sys.modules`
right after, so that other libraries (transformers) do not mistake it for the real one.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sam_fast.build_sam import SamConfig, build_sam_from_config
from sam_fast.modeling.seeded import seed_weights

__all__ = ["TINY", "build_official", "official", "relative_error", "seed_weights"]

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
    """The official `Sam` of any configuration, in eval mode.

    The official code has no encoder with a convolutional stem: where the configuration asks for one, it is ours.
    """
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
    if config.stem_channels:
        sam.image_encoder = build_sam_from_config(config).image_encoder
    return sam.eval()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, in the Euclidean norm over all elements (0 when both are empty)."""
    if expected.numel() == 0:
        return float(actual.shape != expected.shape)
    return ((actual - expected).norm() / expected.norm()).item()
