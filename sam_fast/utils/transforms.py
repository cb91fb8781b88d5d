"""Resizing of images, and of the prompts that go with them, to the input side of the model."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

_PILLOW_MODES = {2: "LA", 3: "RGB", 4: "RGBA"}


def _pillow_image(image: np.ndarray) -> Image.Image:
    """Wrap uint8 [H,W] or [H,W,1..4], or one channel of int16, int32 or float32, as the Pillow image of its mode."""
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image must be a numpy array, got {type(image).__name__}")
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.ndim not in (2, 3) or not 1 <= channels <= 4:
        raise ValueError(f"image must be [H,W] or [H,W,C] with 1 to 4 channels, got {image.shape}")
    if image.dtype != np.uint8 and (channels > 1 or image.dtype not in (np.int16, np.int32, np.float32)):
        raise ValueError(f"image must be uint8, got {image.dtype} of shape {image.shape}")
    if channels == 1:
        return Image.fromarray(np.ascontiguousarray(image.reshape(image.shape[:2])))
    # Pillow reads two channels from an array only when the mode is spelled out
    mode = _PILLOW_MODES[channels]
    return Image.frombuffer(mode, (image.shape[1], image.shape[0]), np.ascontiguousarray(image), "raw", mode, 0, 1)


class ResizeLongestSide:
    """Scales images, points and boxes so that the longest side of the image has `target_length` pixels."""

    def __init__(self, target_length: int) -> None:
        self.target_length = target_length

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Resize an image with Pillow's antialiased bilinear filter, which is what the model was trained on.

        Args:
            image: [H,W] or [H,W,C], uint8.

        Returns:
            A new array [h,w] or [h,w,C], uint8, max(h,w) = target_length; [H,W,1] comes back as [h,w].

        Raises:
            TypeError, ValueError: not such an array.
        """
        pillow_image = _pillow_image(image)
        height, width = self.get_preprocess_shape(image.shape[0], image.shape[1], self.target_length)
        return np.array(pillow_image.resize((width, height), Image.Resampling.BILINEAR))

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        """Move points from the original image to the resized one.

        Args:
            coords: [..., 2], XY in pixels of the original image.
            original_size: (H, W) of the original image.

        Returns:
            A new array [..., 2], float64, XY in pixels of the resized image.

        Raises:
            ValueError: the last dimension is not 2.
        """
        if coords.shape[-1:] != (2,):
            raise ValueError(f"coords must be [..., 2], got {coords.shape}")
        return coords.astype(np.float64) * np.array(self._scale_xy(original_size))

    def apply_boxes(self, boxes: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        """Move boxes [B,4] (XYXY, pixels of the original image of size (H, W)) to the resized image, as float64."""
        return self.apply_coords(boxes.reshape(-1, 2, 2), original_size).reshape(-1, 4)

    def apply_image_torch(self, image: torch.Tensor) -> torch.Tensor:
        """Resize a batch with torch's antialiased bilinear filter; some pixels differ from `apply_image` by rounding.

        The published 1.0 takes batch and channel count for the image size here; this takes height and width.

        Args:
            image: [B,C,H,W], floating point (uint8 where torch resizes it).

        Returns:
            [B,C,h,w] of the same dtype, max(h,w) = target_length.

        Raises:
            ValueError: not four dimensions.
        """
        if image.ndim != 4:
            raise ValueError(f"image must be [B,C,H,W], got {tuple(image.shape)}")
        size = self.get_preprocess_shape(image.shape[2], image.shape[3], self.target_length)
        return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)

    def apply_coords_torch(self, coords: torch.Tensor, original_size: tuple[int, ...]) -> torch.Tensor:
        """Move points as `apply_coords` does: [..., 2] -> a new float32 tensor [..., 2] on the same device.

        Raises:
            ValueError: the last dimension is not 2.
        """
        if coords.shape[-1:] != (2,):
            raise ValueError(f"coords must be [..., 2], got {tuple(coords.shape)}")
        scale = torch.tensor(self._scale_xy(original_size), dtype=torch.float32, device=coords.device)
        return coords.to(torch.float32) * scale

    def apply_boxes_torch(self, boxes: torch.Tensor, original_size: tuple[int, ...]) -> torch.Tensor:
        """Move boxes [B,4] (XYXY, pixels of the original image of size (H, W)) to the resized image, as float32."""
        return self.apply_coords_torch(boxes.reshape(-1, 2, 2), original_size).reshape(-1, 4)

    def _scale_xy(self, original_size: tuple[int, ...]) -> tuple[float, float]:
        height, width = original_size
        new_height, new_width = self.get_preprocess_shape(height, width, self.target_length)
        return new_width / width, new_height / height

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """The (height, width) after scaling the longest side of an oldh x oldw image to `long_side_length` pixels.

        Rounds half up, and never below 1 pixel: of a 20000 x 5 image 1024 x 1 pixels remain, where the published code
        asks for 1024 x 0 and fails.

        Raises:
            ValueError: a side is smaller than 1 pixel.
        """
        if min(oldh, oldw, long_side_length) < 1:
            raise ValueError(f"sides must be at least 1 pixel, got {oldh} x {oldw} to be scaled to {long_side_length}")
        scale = long_side_length * 1.0 / max(oldh, oldw)
        return max(1, int(oldh * scale + 0.5)), max(1, int(oldw * scale + 0.5))
