"""What is evaluated: anything that answers clicks, boxes, or the request for all masks of an image."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sam_fast.automatic_mask_generator import SamAutomaticMaskGenerator
from sam_fast.embedding import ImageEmbedding
from sam_fast.evaluation.protocol import Click
from sam_fast.modeling import Sam
from sam_fast.ops.packed_masks import unpack_masks
from sam_fast.ops.rle import decode_rle
from sam_fast.predictor import SamPredictor
from sam_fast.runtime.precision import resolve_precision

CLICKS, BOX, EVERYTHING = "clicks", "box", "everything"
_RANKING = "predicted_iou + stability_score"  # of automatic masks, as results say it


@dataclass(frozen=True)
class Answer:
    """A method's answer to the prompts of one object.

    Attributes:
        mask: bool [H, W], the answer.
        candidates: bool [M, H, W], masks among which the method chose, or the answer alone.
        scores: float [M], the IoU that the method predicts for each candidate; None if it predicts none.
        state: what the method wants to see again at the next click.
    """

    mask: np.ndarray
    candidates: np.ndarray
    scores: np.ndarray | None = None
    state: Any = None


@dataclass(frozen=True)
class Proposals:
    """Masks of everything in an image, best first, made one by one: all of them may not fit into memory.

    Attributes:
        count: D.
        masks: D masks, bool [H, W]; it can be gone through once.
    """

    count: int
    masks: Iterator[np.ndarray]


class Method(ABC):
    """A way to segment images; it answers the kinds of prompts that it names.

    Attributes:
        name: what it is called in tables and file names.
        prompts: which of "clicks", "box" and "everything" it answers; other calls are never made.
        settings: what its results depend on, as JSON values.
    """

    name: str
    prompts: frozenset[str] = frozenset()
    settings: Mapping[str, Any]

    @abstractmethod
    def set_image(self, image: np.ndarray) -> None:
        """Begin an image, uint8 [H, W, 3] RGB; all calls until the next one are about it."""

    def click(self, clicks: Sequence[Click], previous: Answer | None) -> Answer:
        """Answer all clicks on an object so far; `previous` is the answer before the last one, None at the first."""
        raise TypeError(f"{self.name} does not answer prompts of this kind")

    def box(self, box: np.ndarray) -> Answer:
        """Answer a box, [4] XYXY of pixel indices, the last ones included."""
        raise TypeError(f"{self.name} does not answer prompts of this kind")

    def box_candidates(self, box: np.ndarray) -> Answer | None:
        """Answer a box with several candidates; None where the method does not know several."""
        return None

    def everything(self, limit: int) -> Proposals:
        """Propose masks of the whole image, at most `limit`."""
        raise TypeError(f"{self.name} does not answer prompts of this kind")


class SamMethod(Method):
    """A Sam as its paper uses it.

    One click gives three candidates, of which the one with the highest predicted IoU is the answer. Later clicks ask
    for a single mask and hand in the logits of the answer before. A box asks for a single mask, too.
    """

    prompts = frozenset((CLICKS, BOX, EVERYTHING))

    def __init__(
        self,
        model: Sam,
        name: str = "sam",
        *,
        generator: Mapping[str, Any] | None = None,
        precision: str = "auto",
        backend: str = "auto",
    ) -> None:
        """
        Args:
            model: the model, on the device where it shall run.
            name: what it is called in tables.
            generator: settings of `SamAutomaticMaskGenerator`.
            precision, backend: see `SamPredictor`.
        """
        self.name = name
        self.predictor = SamPredictor(model, precision, backend)
        generator = dict(generator or {})
        dtype = resolve_precision(precision, model.device)
        self.settings = {
            "weights": weights_digest(model),
            "generator": {**generator, "ranking": _RANKING} if generator else {},
            "precision": str(dtype).removeprefix("torch."),
        }
        self._generator = SamAutomaticMaskGenerator(
            model, **{**generator, "output_mode": "uncompressed_rle"}, precision=precision, backend=backend
        )
        self._image: np.ndarray | None = None
        self._embedding: ImageEmbedding | None = None

    def set_image(self, image: np.ndarray) -> None:
        self._image, self._embedding = image, None

    def click(self, clicks: Sequence[Click], previous: Answer | None) -> Answer:
        coords = np.array([[click.x, click.y] for click in clicks], dtype=np.float64)
        labels = np.array([click.label for click in clicks])
        return self._ask(
            point_coords=coords,
            point_labels=labels,
            mask_input=None if previous is None else previous.state,
            multimask_output=previous is None,
        )

    def box(self, box: np.ndarray) -> Answer:
        return self._ask(box=box, multimask_output=False)

    def box_candidates(self, box: np.ndarray) -> Answer | None:
        return self._ask(box=box, multimask_output=True)

    def everything(self, limit: int) -> Proposals:
        assert self._image is not None
        records = sorted(self._generator.generate(self._image), key=_rank)[:limit]
        width = self._image.shape[1]

        def masks() -> Iterator[np.ndarray]:
            for record in records:
                yield unpack_masks(decode_rle([record["segmentation"]]), width)[0].numpy()

        return Proposals(len(records), masks())

    def _ask(self, **prompts: Any) -> Answer:
        if self._embedding is None:
            assert self._image is not None
            self._embedding = self.predictor.encode_images([self._image])[0]
        masks, scores, logits = self.predictor.predict(**prompts, embedding=self._embedding)
        best = int(scores.argmax())
        return Answer(masks[best], masks, scores, logits[best : best + 1])


def _rank(record: Mapping[str, Any]) -> float:
    """Lowest for the mask of the generator that counts first: by the mean of its two scores (paper, appendix D.3)."""
    stability = record["stability_score"]  # NaN of a mask without a pixel that is sure
    return -(record["predicted_iou"] + (0.0 if math.isnan(stability) else stability)) / 2


def weights_digest(model: torch.nn.Module) -> str:
    """A short hash of all weights of a model, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
