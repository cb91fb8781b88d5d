"""One training step: encode images once, prompt every object, correct its mask click by click, learn from each pass.

Source: Kirillov et al., "Segment Anything", 2023, appendix A, "Training algorithm".
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from sam_fast.modeling import Sam
from sam_fast.runtime.upscaling import masks_by_products, upscale_by_products
from sam_fast.training.batches import TrainingBatch
from sam_fast.training.losses import PromptLoss, draw_anchors, grouping_loss, prompt_loss
from sam_fast.training.prompts import error_clicks, plan_passes

_ANCHORS = 48  # pixels of an image that others are compared with
_TOGETHER = 64 * 64 * 64  # tokens of the embeddings of all prompts that pass the decoder at once on a GPU


@dataclass(frozen=True)
class StepSettings:
    """How the objects of a batch are prompted.

    Attributes:
        clicks: corrections after the first prompt; 8 in the paper.
        refined: objects per image that are corrected, of those that are prompted; None is all of them.
        box_share: share of objects whose first prompt is a box rather than a point.
        blend: see `losses.mask_loss`.
        correction_weight: weight of the passes after the first; 1 in the paper. Less, while they are new to a model,
            keeps their large gradients from undoing what it knows.
        grouping: weight of `losses.grouping_loss`.
        prompted: whether there are prompts at all; otherwise only the grouping is trained.
    """

    clicks: int = 8
    refined: int | None = None
    box_share: float = 0.5
    blend: float = 1.0
    correction_weight: float = 1.0
    grouping: float = 0.0
    prompted: bool = True


@dataclass(frozen=True)
class StepStatistics:
    """Means over the objects of a step, tensors without dimensions on the device; NaN for what a step does not do.

    Attributes:
        loss: of all prompts, as back-propagated.
        first_iou: true IoU of the mask with the highest predicted IoU after the first prompt.
        best_iou: the highest true IoU among the masks after the first prompt.
        last_iou: true IoU after all corrections, of the objects that were corrected.
        iou_error: mean absolute error of the IoU head after the first prompt.
        grouping_iou: see `losses.grouping_loss`.
    """

    loss: Tensor
    first_iou: Tensor
    best_iou: Tensor
    last_iou: Tensor
    iou_error: Tensor
    grouping_iou: Tensor


@dataclass
class _Objects:
    """N objects of one or several images, and every prompt given so far. Those with a box come first."""

    image: Tensor | None  # [N], which image of several each lies in; None if there is one
    targets: Tensor  # [N, s, s]
    valid: Tensor  # [1, s, s] of the one image, or [N, s, s]; False in the padding
    boxes: Tensor  # [n, 4], of the first n objects
    coords: Tensor  # [N, K, 2]
    labels: Tensor  # [N, K]
    mask_input: Tensor | None = None  # [N, 1, s, s], logits of the last pass

    @property
    def single_prompt(self) -> bool:
        """Whether nothing but the first prompt was given, so that its meaning may be ambiguous."""
        return self.mask_input is None

    def select(self, rows: Tensor, boxed: int) -> _Objects:
        """The objects at ascending indices `rows`, of which the first `boxed` have a box, before any correction."""
        image = None if self.image is None else self.image[rows]
        valid = self.valid if self.image is None else self.valid[rows]
        boxes = self.boxes[rows[:boxed]]
        return _Objects(image, self.targets[rows], valid, boxes, self.coords[rows], self.labels[rows])


class InteractiveStep:
    """Computes the gradients of a step.

    Every pass of the decoder is back-propagated at once, into the parameters of the decoder and into the embedding;
    the encoder follows when all passes are done. Memory thus does not grow with the number of clicks.

    Image by image, prompts share the decoder's first layer, which suits a CPU. A GPU would wait for the launches of
    small operations: there as many images pass the decoder together as have 64 prompts at 64 x 64 tokens.
    """

    def __init__(
        self,
        model: Sam,
        *,
        train_encoder: bool,
        autocast: AbstractContextManager[object],
        together: int | None = None,
    ) -> None:
        """
        Args:
            model: the Sam to train, in training mode.
            train_encoder: whether the image encoder gets gradients.
            autocast: context in which the model is run.
            together: images that pass the decoder together; by default 1 on a CPU, and what memory allows on a GPU.
        """
        self.model = model
        self.train_encoder = train_encoder
        self.autocast = autocast
        self.together = together

    def __call__(
        self, batch: TrainingBatch, settings: StepSettings, rng: np.random.Generator, scale: float = 1.0
    ) -> StepStatistics:
        """Add the gradients of `scale` times the loss of a batch to the parameters.

        Args:
            batch: on the device of the model.
            settings: how to prompt.
            rng: of everything random in the step but drop path.
            scale: factor of the gradients, 1 / number of accumulated batches.
        """
        generator = torch.Generator(batch.images.device).manual_seed(int(rng.integers(2**62)))
        with self.autocast, torch.set_grad_enabled(self.train_encoder):
            encoded = self.model.image_encoder(self.model.preprocess(batch.images.float()))
        # In float32 under autocast too: its gradient is a sum over all prompts and passes.
        wide = torch.promote_types(encoded.dtype, torch.float32)
        embeddings = encoded.detach().to(wide).requires_grad_(self.train_encoder)
        passes = plan_passes(settings.clicks, rng)
        columns: dict[str, Tensor] = {}
        if settings.prompted:
            together = self.together or _images_together(batch, embeddings)
            shares = []
            for first in range(0, len(embeddings), together):
                images = range(first, min(first + together, len(embeddings)))
                share = len(images) / len(embeddings)
                found = self._prompt(embeddings, batch, images, passes, settings, rng, generator, scale * share)
                shares.append(share * torch.stack(list(found.values())))
            columns = dict(zip(found, torch.stack(shares).sum(0), strict=True))
        if settings.grouping > 0:
            columns["grouping_iou"] = self._group(embeddings, batch, settings, generator, scale)
        if self.train_encoder:
            assert embeddings.grad is not None
            encoded.backward(embeddings.grad.to(encoded.dtype))
        nan = torch.full((), torch.nan, device=embeddings.device)
        return StepStatistics(**{field.name: columns.get(field.name, nan) for field in fields(StepStatistics)})

    def _group(
        self, embeddings: Tensor, batch: TrainingBatch, settings: StepSettings, generator: torch.Generator, scale: float
    ) -> Tensor:
        """Teach the encoder which pixels belong together, from all embeddings [B, C, h, w]: the IoU of the groups."""
        anchors = draw_anchors(batch.regions, _ANCHORS, generator)
        with self.autocast:
            upscaled = upscale_by_products(self.model.mask_decoder.output_upscaling, embeddings)
        loss, iou = grouping_loss(upscaled, batch.regions, anchors)
        (gradient,) = torch.autograd.grad(scale * settings.grouping * loss, embeddings)  # of nothing in the decoder
        embeddings.grad = gradient if embeddings.grad is None else embeddings.grad + gradient
        return iou

    def _prompt(
        self,
        embeddings: Tensor,
        batch: TrainingBatch,
        images: range,
        passes: list[bool],
        settings: StepSettings,
        rng: np.random.Generator,
        generator: torch.Generator,
        scale: float,
    ) -> dict[str, Tensor]:
        """All passes over the objects of some images of embeddings [B, C, h, w]: the means over these objects."""
        embedding = embeddings[images.start : images.stop]
        objects, order = _first_prompts(batch, images, settings, rng)
        loss, logits, predicted = self._learn(embedding, objects, settings, scale)
        confident = _gather(loss.iou, predicted.argmax(1))
        best, iou_error = loss.iou.max(1).values, (predicted - loss.iou).abs()
        total, last = loss.total.mean(), confident
        if passes:
            rows = _draw_refined(order, len(images), settings.refined, rng)
            boxed = int((rows < len(objects.boxes)).sum())
            chosen = _to_device(rows, predicted.device)
            objects, logits, predicted = objects.select(chosen, boxed), logits[chosen], predicted[chosen]
        for new_click in passes:
            _feed_back(objects, logits, predicted, new_click, generator, scale=batch.scale)
            loss, logits, predicted = self._learn(embedding, objects, settings, scale * settings.correction_weight)
            total, last = total + settings.correction_weight * loss.total.mean(), loss.iou[:, 0]
        return {
            "loss": total.detach(),
            "first_iou": confident.mean(),
            "best_iou": best.mean(),
            "last_iou": last.mean(),
            "iou_error": iou_error.mean(),
        }

    def _learn(
        self, embedding: Tensor, objects: _Objects, settings: StepSettings, scale: float
    ) -> tuple[PromptLoss, Tensor, Tensor]:
        """One pass of the decoder, back-propagated: its loss, logits [N, M, s, s] and predicted IoU [N, M]."""
        with self.autocast:
            logits, predicted = self._decode(embedding, objects)
        joint, boxed = torch.zeros((), device=logits.device), len(objects.boxes)
        valid = objects.valid
        if objects.single_prompt:
            if boxed:
                # A box is hardly ambiguous, and is used with the single mask: train that too, as the paper does not.
                single = prompt_loss(
                    logits[:boxed, :1], predicted[:boxed, :1], objects.targets[:boxed], valid[:boxed], settings.blend
                )
                joint = single.total.sum() / len(logits)
            several = self.model.mask_decoder.num_multimask_outputs
            logits, predicted = logits[:, -several:], predicted[:, -several:]
        loss = prompt_loss(logits, predicted, objects.targets, valid, settings.blend)
        (scale * (joint + loss.total.mean())).backward()
        return loss, logits.detach().float(), predicted.detach().float()

    def _decode(self, embedding: Tensor, objects: _Objects) -> tuple[Tensor, Tensor]:
        """The masks to train, logits [N, M, s, s] and predicted IoU [N, M], from the embedding of each image.

        For several prompts the single one; for one prompt the three others, behind the single one if there are boxes.
        """
        encoder, decoder, boxed = self.model.prompt_encoder, self.model.mask_decoder, len(objects.boxes)
        sparse = []
        with torch.autocast(embedding.device.type, enabled=False):  # bfloat16 would move points by a pixel
            if boxed:
                points = None if objects.single_prompt else (objects.coords[:boxed, 1:], objects.labels[:boxed, 1:])
                sparse.append(encoder(points=points, boxes=objects.boxes, masks=None)[0])
            if boxed < len(objects.targets):
                points = objects.coords[boxed:], objects.labels[boxed:]
                sparse.append(encoder(points=points, boxes=None, masks=None)[0])
            places = encoder.get_dense_pe()
        dense = encoder(points=None, boxes=None, masks=objects.mask_input)[1]
        tokens, image, iou = decoder.predict_tokens(
            image_embeddings=embedding if objects.image is None else embedding[objects.image],
            image_pe=places,
            sparse_prompt_embeddings=torch.cat(sparse),
            dense_prompt_embeddings=dense,
        )
        start = 1 if objects.single_prompt and not boxed else 0
        chosen = range(start, decoder.num_mask_tokens if objects.single_prompt else 1)
        return masks_by_products(decoder, tokens, image, chosen), iou[:, chosen.start : chosen.stop]


def _feed_back(
    objects: _Objects,
    logits: Tensor,
    predicted: Tensor,
    new_click: bool,
    generator: torch.Generator,
    *,
    scale: int,
) -> None:
    """Give the mask with the highest predicted IoU back as a prompt, and maybe click where it is wrong."""
    best = _gather(logits, predicted.argmax(1))  # [N, s, s]
    objects.mask_input = best[:, None]
    if new_click:
        coords, labels = error_clicks(best, objects.targets, scale, generator, objects.valid)
        objects.coords = torch.cat([objects.coords, coords[:, None]], dim=1)
        objects.labels = torch.cat([objects.labels, labels[:, None]], dim=1)


def _first_prompts(
    batch: TrainingBatch, images: range, settings: StepSettings, rng: np.random.Generator
) -> tuple[_Objects, np.ndarray]:
    """The objects of some images, a random share of them with a box, the others with a point.

    Returns:
        the objects, and where each stood before those with a box came first: image by image, K of each.
    """
    K, side = batch.targets.shape[1:3]
    device = batch.images.device
    with_box = rng.random(len(images) * K) < settings.box_share
    boxed, order = int(with_box.sum()), np.argsort(~with_box, kind="stable")
    rows = _to_device(images.start * K + order, device)
    pixels = batch.scale * torch.arange(side, device=device)
    heights, widths = batch.sizes[images.start : images.stop].unbind(1)
    valid = (pixels < heights[:, None])[:, :, None] & (pixels < widths[:, None])[:, None]
    image = None if len(images) == 1 else rows // K - images.start
    objects = _Objects(
        image=image,
        targets=batch.targets.flatten(0, 1)[rows],
        valid=valid if image is None else valid[image],
        boxes=batch.boxes.flatten(0, 1)[rows[:boxed]],
        # An object with a box has no first point: its column is there, and left out when prompts are encoded.
        coords=batch.points.flatten(0, 1)[rows][:, None],
        labels=torch.ones(len(order), 1, dtype=torch.int64, device=device),
    )
    return objects, order


def _draw_refined(order: np.ndarray, images: int, refined: int | None, rng: np.random.Generator) -> np.ndarray:
    """Draw `refined` objects of each image to correct (None: all): ascending rows, see `_first_prompts` for `order`."""
    K = len(order) // images
    rows_of = np.argsort(order // K, kind="stable").reshape(images, K)
    return np.sort(np.concatenate([rng.permutation(rows)[:refined] for rows in rows_of]))


def _images_together(batch: TrainingBatch, embeddings: Tensor) -> int:
    """How many images pass the decoder together where the caller does not say."""
    if embeddings.device.type == "cpu":
        return 1
    return max(1, _TOGETHER // (batch.targets.shape[1] * embeddings[0, 0].numel()))


def _to_device(indices: np.ndarray, device: torch.device) -> Tensor:
    """The same indices as a tensor, without waiting for the device."""
    return torch.from_numpy(indices).to(device, non_blocking=True)


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Entry index[n] of each row n, [N, M, ...] -> [N, ...]."""
    return values[torch.arange(len(values), device=values.device), index]
