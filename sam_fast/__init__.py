"""The Segment Anything Model made fast: a drop-in replacement for `segment_anything`."""

from sam_fast.automatic_mask_generator import SamAutomaticMaskGenerator
from sam_fast.build_sam import (
    SamConfig,
    build_sam,
    build_sam_from_config,
    build_sam_nano,
    build_sam_vit_b,
    build_sam_vit_h,
    build_sam_vit_l,
    sam_model_registry,
)
from sam_fast.compat import install_as_segment_anything
from sam_fast.embedding import ImageEmbedding
from sam_fast.predictor import SamPredictor

__version__ = "0.1.0"

__all__ = [
    "ImageEmbedding",
    "SamAutomaticMaskGenerator",
    "SamConfig",
    "SamPredictor",
    "build_sam",
    "build_sam_from_config",
    "build_sam_nano",
    "build_sam_vit_b",
    "build_sam_vit_h",
    "build_sam_vit_l",
    "install_as_segment_anything",
    "sam_model_registry",
]
