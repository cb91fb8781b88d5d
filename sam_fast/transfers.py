"""What a prediction brings to the device and back to the host: on a GPU without waiting, and in one copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sam_fast.embedding import ImageEmbedding
from sam_fast.ops.packed_masks import unpack_masks
from sam_fast.prompts import to_prompts
from sam_fast.runtime.inference import Prompts
from sam_fast.runtime.streams import Download, upload

# Bytes that go to or from a GPU by way of pinned memory, which PyTorch keeps. Of more, the copy takes longest anyway.
_MOST_PINNED = 64 << 20


def prompts_to(device: torch.device, arrays: Mapping[str, Any], embedding: ImageEmbedding) -> Prompts:
    """`prompts.to_prompts` on a device; the host does not wait for a GPU to take them."""
    if device.type != "cuda":
        return to_prompts(arrays, embedding, device)
    prompts = to_prompts(arrays, embedding, torch.device("cpu"))
    if _nbytes(x for x in prompts if x is not None) > _MOST_PINNED:
        return Prompts(*(x if x is None else x.to(device) for x in prompts))
    return Prompts(*(x if x is None else upload(x, device) for x in prompts))


class Results(NamedTuple):
    """What N prompts gave, where the model is.

    Attributes:
        masks: [N, M, H, W], bool or float32 logits; of `width`, bits [N, M, H, row_bytes(W)] uint8.
        iou: [N, M] float32.
        low_res: [N, M, 4s, 4s] float32 logits.
        width: W of masks that are packed, in pixels, or None.
    """

    masks: Tensor
    iou: Tensor
    low_res: Tensor
    width: int | None = None

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Masks [N, M, H, W], predicted IoUs and logits, where they are."""
        masks = self.masks if self.width is None else unpack_masks(self.masks, self.width)
        return masks, self.iou, self.low_res


def to_host(results: Sequence[Results]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`unpacked` on the host; all that a GPU computed comes in one copy, which is waited for once."""
    tensors = [x for result in results for x in result[:3]]
    # Somebody's own `postprocess_masks` may leave its masks anywhere.
    together = all(x.is_cuda and x.device == tensors[0].device for x in tensors)
    if not together or _nbytes(tensors) > _MOST_PINNED:
        return [Results(r.masks.cpu(), r.iou.cpu(), r.low_res.cpu(), r.width).unpacked() for r in results]
    arrived = []

    def receive(*staged: Tensor) -> None:
        """Copy or unpack what lies in memory that the next copy uses again."""
        columns = staged[::3], staged[1::3], staged[2::3]
        for result, masks, iou, low_res in zip(results, *columns, strict=True):
            own = masks.clone() if result.width is None else masks
            arrived.append(Results(own, iou.clone(), low_res.clone(), result.width).unpacked())

    download = Download(tensors[0].device)
    download.add(tensors, receive)
    download.finish()
    return arrived


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)
