"""Segmentation without learning, to compare with: OpenCV's GrabCut and scikit-image's random walker.

They need the packages of the extra `eval`, which are imported at first use.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from sam_fast.evaluation.methods import BOX, CLICKS, Answer, Method
from sam_fast.evaluation.protocol import Click

_FOREGROUND, _BACKGROUND = 1, 2


class GrabCut(Method):
    """OpenCV's GrabCut (Rother et al., 2004) from a box: what is outside of the box is background, for sure.

    Where it finds nothing, or the box leaves no background, the answer is the box itself.
    """

    name = "grabcut"
    prompts = frozenset((BOX,))

    def __init__(self, iterations: int = 5) -> None:
        """
        Args:
            iterations: rounds of colour models and cut.

        Raises:
            RuntimeError: OpenCV is not installed.
        """
        self._cv2 = _extra("cv2", "opencv-python-headless")
        self._cv2.setNumThreads(torch.get_num_threads())
        self.iterations = iterations
        self.settings = {"iterations": iterations, "version": self._cv2.__version__}
        self._image = np.zeros((0, 0, 3), np.uint8)

    def set_image(self, image: np.ndarray) -> None:
        self._image = np.ascontiguousarray(image[..., ::-1])

    def box(self, box: np.ndarray) -> Answer:
        x0, y0, x1, y1 = (int(side) for side in box)
        mask = np.zeros(self._image.shape[:2], dtype=bool)
        mask[y0 : y1 + 1, x0 : x1 + 1] = True
        if not mask.all():
            labels = np.zeros(mask.shape, np.uint8)
            models = np.zeros((1, 65)), np.zeros((1, 65))
            rectangle = (x0, y0, x1 - x0 + 1, y1 - y0 + 1)
            self._cv2.setRNGSeed(0)
            self._cv2.grabCut(self._image, labels, rectangle, *models, self.iterations, self._cv2.GC_INIT_WITH_RECT)
            found = (labels & 1).astype(bool)  # GC_FGD is 1 and GC_PR_FGD is 3
            mask = found if found.any() else mask
        return Answer(mask, mask[None])


class RandomWalker(Method):
    """scikit-image's random walker (Grady, 2006) from clicks: a pixel belongs to the seeds that a walker meets first.

    Seeds are discs around the clicks; the frame of the image is background unless a foreground click lies on it. It
    runs on an image made smaller, and its mask is enlarged.
    """

    name = "random_walker"
    prompts = frozenset((CLICKS,))

    def __init__(self, longest_side: int = 128, beta: float = 8000.0, radius: int = 1) -> None:
        """
        Args:
            longest_side: of the image that it works on, in pixels.
            beta: how much a difference in colour hinders the walker.
            radius: of the seeds, in pixels of that image.

        Raises:
            RuntimeError: scikit-image is not installed.
        """
        self._walk = _extra("skimage.segmentation", "scikit-image").random_walker
        self.longest_side, self.beta, self.radius = longest_side, beta, radius
        self.settings = {
            "longest_side": longest_side,
            "beta": beta,
            "radius": radius,
            "version": _extra("skimage", "scikit-image").__version__,
        }
        self._size = (0, 0)
        self._small = np.zeros((0, 0, 3))

    def set_image(self, image: np.ndarray) -> None:
        self._size = (image.shape[0], image.shape[1])
        scale = min(1.0, self.longest_side / max(self._size))
        width, height = (max(1, round(side * scale)) for side in self._size[::-1])
        picture = Image.fromarray(image).resize((width, height), Image.Resampling.BOX)
        self._small = np.asarray(picture) / 255.0

    def click(self, clicks: Sequence[Click], previous: Answer | None) -> Answer:
        height, width = self._small.shape[:2]
        seeds = np.zeros((height, width), np.int32)
        seeds[[0, -1]] = _BACKGROUND
        seeds[:, [0, -1]] = _BACKGROUND
        rows, columns = np.mgrid[:height, :width]
        for click in clicks:
            x = (click.x + 0.5) * width / self._size[1] - 0.5
            y = (click.y + 0.5) * height / self._size[0] - 0.5
            disc = (rows - round(y)) ** 2 + (columns - round(x)) ** 2 <= self.radius**2
            seeds[disc] = _FOREGROUND if click.label else _BACKGROUND
        mask = seeds == _FOREGROUND
        if (seeds == 0).any() and mask.any() and (seeds == _BACKGROUND).any():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about probabilities a little outside of 0..1
                mask = self._walk(self._small, seeds, beta=self.beta, mode="bf", channel_axis=-1) == _FOREGROUND
        enlarged = Image.fromarray(mask).convert("L").resize(self._size[::-1], Image.Resampling.BILINEAR)
        full = np.asarray(enlarged) > 127
        return Answer(full, full[None])


def _extra(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(f"{package} is missing; pip install 'sam_fast[eval]' brings it ({error})") from error
