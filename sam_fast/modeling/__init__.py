"""The Segment Anything Model as plain, differentiable PyTorch modules with the official state-dict keys."""

from sam_fast.modeling.image_encoder import ImageEncoderViT
from sam_fast.modeling.mask_decoder import MaskDecoder
from sam_fast.modeling.prompt_encoder import PromptEncoder
from sam_fast.modeling.sam import Sam
from sam_fast.modeling.transformer import TwoWayTransformer

__all__ = ["ImageEncoderViT", "MaskDecoder", "PromptEncoder", "Sam", "TwoWayTransformer"]
