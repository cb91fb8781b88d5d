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
    """N objects of one image, and every prompt given so far. Those with a box come first."""

    targets: Tensor  # [N, s, s]
    boxes: Tensor  # [n, 4], of the first n objects
    coords: Tensor  # [N, K, 2]
    labels: Tensor  # [N, K]
    mask_input: Tensor | None = None  # [N, 1, s, s], logits of the last pass

    @property
    def single_prompt(self) -> bool:
        """Whether nothing but the first prompt was given, so that its meaning may be ambiguous."""
        return self.mask_input is None

    def select(self, rows: Tensor) -> _Objects:
        """The objects at ascending indices `rows`, before any correction."""
        boxes = self.boxes[rows[rows < len(self.boxes)]]
        return _Objects(self.targets[rows], boxes, self.coords[rows], self.labels[rows])


class InteractiveStep:
    """Computes the gradients of a step.

    Every pass of the decoder is back-propagated at once, into the parameters of the decoder and into the embedding;
    the encoder follows when all passes are done. Memory thus does not grow with the number of clicks.
    """

    def __init__(self, model: Sam, *, train_encoder: bool, autocast: AbstractContextManager[object]) -> None:
        """
        Args:
            model: the Sam to train, in training mode.
            train_encoder: whether the image encoder gets gradients.
            autocast: context in which the model is run.
        """
        self.model = model
        self.train_encoder = train_encoder
        self.autocast = autocast

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
        embeddings = encoded.detach().requires_grad_(self.train_encoder)
        passes = plan_passes(settings.clicks, rng)
        columns: dict[str, Tensor] = {}
        if settings.prompted:
            # Image by image: the decoder's first layer is shared by all prompts of an image.
            images = [
                self._image(embeddings[i : i + 1], batch, i, passes, settings, rng, generator, scale / len(embeddings))
                for i in range(len(embeddings))
            ]
            columns = {name: torch.stack([image[name] for image in images]).mean() for name in images[0]}
        if settings.grouping > 0:
            columns["grouping_iou"] = self._group(embeddings, batch, settings, generator, scale)
        if self.train_encoder:
            encoded.backward(embeddings.grad)
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

    def _image(
        self,
        embedding: Tensor,
        batch: TrainingBatch,
        index: int,
        passes: list[bool],
        settings: StepSettings,
        rng: np.random.Generator,
        generator: torch.Generator,
        scale: float,
    ) -> dict[str, Tensor]:
        """All passes over the objects of one image, embedding [1, C, h, w]: its part of the statistics."""
        objects, valid = _first_prompts(batch, index, settings, rng)
        loss, logits, predicted = self._learn(embedding, objects, valid, settings, scale)
        confident = _gather(loss.iou, predicted.argmax(1))
        best, iou_error = loss.iou.max(1).values, (predicted - loss.iou).abs()
        total, last = loss.total.mean(), confident
        if passes:
            count = len(predicted) if settings.refined is None else min(settings.refined, len(predicted))
            rows = torch.from_numpy(np.sort(rng.permutation(len(predicted))[:count])).to(predicted.device)
            objects, logits, predicted = objects.select(rows), logits[rows], predicted[rows]
        for new_click in passes:
            _feed_back(objects, logits, predicted, new_click, generator, valid, scale=batch.scale)
            loss, logits, predicted = self._learn(
                embedding, objects, valid, settings, scale * settings.correction_weight
            )
            total, last = total + settings.correction_weight * loss.total.mean(), loss.iou[:, 0]
        return {
            "loss": total.detach(),
            "first_iou": confident.mean(),
            "best_iou": best.mean(),
            "last_iou": last.mean(),
            "iou_error": iou_error.mean(),
        }

    def _learn(
        self, embedding: Tensor, objects: _Objects, valid: Tensor, settings: StepSettings, scale: float
    ) -> tuple[PromptLoss, Tensor, Tensor]:
        """One pass of the decoder, back-propagated: its loss, logits [N, M, s, s] and predicted IoU [N, M]."""
        with self.autocast:
            logits, predicted = self._decode(embedding, objects)
        joint, boxed = torch.zeros((), device=logits.device), len(objects.boxes)
        if objects.single_prompt:
            if boxed:
                # A box is hardly ambiguous, and is used with the single mask: train that too, as the paper does not.
                single = prompt_loss(
                    logits[:boxed, :1], predicted[:boxed, :1], objects.targets[:boxed], valid, settings.blend
                )
                joint = single.total.sum() / len(logits)
            several = self.model.mask_decoder.num_multimask_outputs
            logits, predicted = logits[:, -several:], predicted[:, -several:]
        loss = prompt_loss(logits, predicted, objects.targets, valid, settings.blend)
        (scale * (joint + loss.total.mean())).backward()
        return loss, logits.detach().float(), predicted.detach().float()

    def _decode(self, embedding: Tensor, objects: _Objects) -> tuple[Tensor, Tensor]:
        """The masks to train, logits [N, M, s, s] and predicted IoU [N, M].

        For several prompts the single one; for one prompt the three others, behind the single one if there are boxes.
        """
        encoder, decoder, boxed = self.model.prompt_encoder, self.model.mask_decoder, len(objects.boxes)
        sparse = []
        if boxed:
            points = None if objects.single_prompt else (objects.coords[:boxed, 1:], objects.labels[:boxed, 1:])
            sparse.append(encoder(points=points, boxes=objects.boxes, masks=None)[0])
        if boxed < len(objects.targets):
            points = objects.coords[boxed:], objects.labels[boxed:]
            sparse.append(encoder(points=points, boxes=None, masks=None)[0])
        dense = encoder(points=None, boxes=None, masks=objects.mask_input)[1]
        tokens, image, iou = decoder.predict_tokens(
            image_embeddings=embedding,
            image_pe=encoder.get_dense_pe(),
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
    valid: Tensor,
    *,
    scale: int,
) -> None:
    """Give the mask with the highest predicted IoU back as a prompt, and maybe click where it is wrong."""
    best = _gather(logits, predicted.argmax(1))  # [N, s, s]
    objects.mask_input = best[:, None]
    if new_click:
        coords, labels = error_clicks(best, objects.targets, scale, generator, valid)
        objects.coords = torch.cat([objects.coords, coords[:, None]], dim=1)
        objects.labels = torch.cat([objects.labels, labels[:, None]], dim=1)


def _first_prompts(
    batch: TrainingBatch, index: int, settings: StepSettings, rng: np.random.Generator
) -> tuple[_Objects, Tensor]:
    """The objects of image `index`, a random share of them with a box, the others with a point.

    Returns:
        the objects, and [1, s, s], False in the padding of the image.
    """
    K, side = batch.targets.shape[1:3]
    device = batch.images.device
    with_box = torch.from_numpy(rng.random(K) < settings.box_share)
    order = torch.argsort(with_box, descending=True, stable=True).to(device)
    boxed = int(with_box.sum())
    pixels = batch.scale * torch.arange(side, device=device)
    height, width = batch.sizes[index]
    objects = _Objects(
        targets=batch.targets[index, order],
        boxes=batch.boxes[index, order[:boxed]],
        # An object with a box has no first point: its column is there, and left out when prompts are encoded.
        coords=batch.points[index, order][:, None],
        labels=torch.ones(K, 1, dtype=torch.int64, device=device),
    )
    return objects, ((pixels < height)[:, None] & (pixels < width))[None]


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Entry index[n] of each row n, [N, M, ...] -> [N, ...]."""
    return values[torch.arange(len(values), device=values.device), index]
