"""One training step: encode images once, prompt every object, correct its mask click by click, learn from each pass.

Source: Kirillov et al., "Segment Anything", 2023, appendix A, "Training algorithm".
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from sam_fast.modeling import Sam
from sam_fast.runtime.streams import upload
from sam_fast.runtime.upscaling import upscale_by_products
from sam_fast.training.batches import TrainingBatch
from sam_fast.training.decoding import Prompts, TrainedDecoder
from sam_fast.training.layers import fast_layers
from sam_fast.training.losses import IOU_WEIGHT, PromptLoss, draw_anchors, grouping_loss, prompt_loss
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
        iou_weight: see `losses.prompt_loss`.
        grouping: weight of `losses.grouping_loss`.
        prompted: whether there are prompts at all; otherwise only the grouping is trained.
    """

    clicks: int = 8
    refined: int | None = None
    box_share: float = 0.5
    blend: float = 1.0
    correction_weight: float = 1.0
    iou_weight: float = IOU_WEIGHT
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


@dataclass(frozen=True)
class StepPlan:
    """What is drawn on the host before a step. All shapes follow from the settings, none from what was drawn.

    Attributes:
        boxed: bool [B, K], objects whose first prompt is a box.
        refined: int64 [B, k], ascending numbers of the objects that are corrected.
        passes: see `plan_passes`.
    """

    boxed: Tensor
    refined: Tensor
    passes: tuple[bool, ...]


@dataclass
class _Objects:
    """N = B K objects, K of each of B images, image by image, and every prompt given so far."""

    targets: Tensor  # [N, s, s]
    valid: Tensor  # [N, s, s], False in the padding
    boxed: Tensor  # bool [N], whether the first prompt is a box
    coords: Tensor  # [N, T, 2]
    labels: Tensor  # [N, T], see `decoding.Prompts`
    mask_input: Tensor | None = None  # [N, 1, s, s], logits of the last pass

    @property
    def single_prompt(self) -> bool:
        """Whether nothing but the first prompt was given, so that its meaning may be ambiguous."""
        return self.mask_input is None

    def select(self, rows: Tensor) -> _Objects:
        """The objects at indices `rows`, as many of each image, before any correction."""
        return _Objects(self.targets[rows], self.valid[rows], self.boxed[rows], self.coords[rows], self.labels[rows])


class InteractiveStep:
    """Computes the gradients of a step.

    Every pass of the decoder is back-propagated at once, into the parameters of the decoder and into the embedding;
    the encoder follows when all passes are done. Memory thus does not grow with the number of clicks.

    Image by image, prompts share the decoder's first layer, which suits a CPU. A GPU would wait for the launches of
    small operations: there as many images pass the decoder together as have 64 prompts at 64 x 64 tokens.
    """

    def __init__(
        self, model: Sam, *, train_encoder: bool, half: torch.dtype | None = None, together: int | None = None
    ) -> None:
        """
        Args:
            model: the Sam to train, in training mode.
            train_encoder: whether the image encoder gets gradients.
            half: 16-bit floats to compute in: the encoder by autocast, the decoder as `TrainedDecoder` says. None
                computes in the precision of the weights.
            together: images that pass the decoder together; by default 1 on a CPU, and what memory allows on a GPU.
        """
        self.model = model
        self.train_encoder = train_encoder
        self.half = half
        self.together = together
        self._decoder = TrainedDecoder(model, half)

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
        return self.follow(draw_plan(batch, settings, rng), batch, settings, generator, scale)

    def follow(
        self,
        plan: StepPlan,
        batch: TrainingBatch,
        settings: StepSettings,
        generator: torch.Generator | None,
        scale: float = 1.0,
    ) -> StepStatistics:
        """The step once it is planned (arguments: `__call__`): nothing waits for the device, or depends on its numbers.

        Args:
            generator: of clicks and anchors; PyTorch's own one without it.
        """
        with fast_layers(batch.images.device):
            return self._follow(plan, batch, settings, generator, scale)

    def _follow(
        self,
        plan: StepPlan,
        batch: TrainingBatch,
        settings: StepSettings,
        generator: torch.Generator | None,
        scale: float,
    ) -> StepStatistics:
        with self._autocast(batch), torch.set_grad_enabled(self.train_encoder):
            encoded = self.model.image_encoder(self.model.preprocess(batch.images.float()))
        # In float32 under autocast too: its gradient is a sum over all prompts and passes.
        wide = torch.promote_types(encoded.dtype, torch.float32)
        embeddings = encoded.detach().to(wide).requires_grad_(self.train_encoder)
        columns: dict[str, Tensor] = {}
        if settings.prompted:
            columns = self._prompt_all(embeddings, batch, plan, settings, generator, scale)
        if settings.grouping > 0:
            columns["grouping_iou"] = self._group(embeddings, batch, settings, generator, scale)
        if self.train_encoder:
            assert embeddings.grad is not None
            encoded.backward(embeddings.grad.to(encoded.dtype))
        nan = torch.full((), torch.nan, device=embeddings.device)
        return StepStatistics(**{field.name: columns.get(field.name, nan) for field in fields(StepStatistics)})

    def _autocast(self, batch: TrainingBatch) -> torch.autocast:
        return torch.autocast(batch.images.device.type, self.half or torch.bfloat16, enabled=self.half is not None)

    def _group(
        self,
        embeddings: Tensor,
        batch: TrainingBatch,
        settings: StepSettings,
        generator: torch.Generator | None,
        scale: float,
    ) -> Tensor:
        """Teach the encoder which pixels belong together, from all embeddings [B, C, h, w]: the IoU of the groups."""
        anchors = draw_anchors(batch.regions, _ANCHORS, generator)
        with self._autocast(batch):
            upscaled = upscale_by_products(self.model.mask_decoder.output_upscaling, embeddings)
        loss, iou = grouping_loss(upscaled, batch.regions, anchors)
        (gradient,) = torch.autograd.grad(scale * settings.grouping * loss, embeddings)  # of nothing in the decoder
        embeddings.grad = gradient if embeddings.grad is None else embeddings.grad + gradient
        return iou

    def _prompt_all(
        self,
        embeddings: Tensor,
        batch: TrainingBatch,
        plan: StepPlan,
        settings: StepSettings,
        generator: torch.Generator | None,
        scale: float,
    ) -> dict[str, Tensor]:
        """All passes over all objects, some images of embeddings [B, C, h, w] at a time: means over objects."""
        together = self.together or _images_together(batch, embeddings)
        self._decoder.begin()
        names: list[str] = []
        sums = torch.zeros((), device=embeddings.device)
        for first in range(0, len(embeddings), together):
            images = slice(first, min(first + together, len(embeddings)))
            share = (images.stop - images.start) / len(embeddings)
            found = self._prompt(embeddings[images], batch, images, plan, settings, generator, scale * share)
            names, sums = list(found), sums + share * torch.stack(list(found.values()))
        return dict(zip(names, sums, strict=True))

    def _prompt(
        self,
        embedding: Tensor,
        batch: TrainingBatch,
        images: slice,
        plan: StepPlan,
        settings: StepSettings,
        generator: torch.Generator | None,
        scale: float,
    ) -> dict[str, Tensor]:
        """All passes over the objects of some images, `embedding` [B, C, h, w]: the means over these objects."""
        objects = _first_prompts(batch, images, plan.boxed[images])
        loss, logits, predicted = self._learn(embedding, objects, settings, scale)
        confident = _gather(loss.iou, predicted.argmax(1))
        best, iou_error = loss.iou.max(1).values, (predicted - loss.iou).abs()
        total, last = loss.total.mean(), confident
        if plan.passes:
            refined = plan.refined[images]
            first_of_image = plan.boxed.shape[1] * torch.arange(len(refined), device=refined.device)
            chosen = (refined + first_of_image[:, None]).flatten()
            objects, logits, predicted = objects.select(chosen), logits[chosen], predicted[chosen]
        for new_click in plan.passes:
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
        """One pass of the decoder, back-propagated: its loss, logits [N, M, s, s] and predicted IoU [N, M].

        For several prompts the single mask is trained; for one prompt the three others, and if it is a box the single
        one too.
        """
        several, boxes = self.model.mask_decoder.num_multimask_outputs, settings.box_share > 0
        chosen = range(0 if boxes else 1, several + 1) if objects.single_prompt else range(1)
        logits, predicted = self._decode(embedding, objects, chosen)
        against = objects.targets, objects.valid, settings.blend, settings.iou_weight
        joint = torch.zeros((), device=logits.device)
        if objects.single_prompt and boxes:
            # A box is hardly ambiguous, and is used with the single mask: train that too, as the paper does not.
            (one, logits), (its_iou, predicted) = (x.split((1, several), 1) for x in (logits, predicted))
            single = prompt_loss(one, its_iou, *against)
            joint = (single.total * objects.boxed).mean()
        loss = prompt_loss(logits, predicted, *against)
        self._decoder.backward(scale * (joint + loss.total.mean()))
        return loss, logits.detach(), predicted.detach().float()

    def _decode(self, embedding: Tensor, objects: _Objects, chosen: range) -> tuple[Tensor, Tensor]:
        """Logits [N, M, s, s] and predicted IoU [N, M] of the M chosen masks, from the embedding of each image."""
        return self._decoder(embedding, Prompts(objects.coords, objects.labels, objects.mask_input), chosen)


def _feed_back(
    objects: _Objects,
    logits: Tensor,
    predicted: Tensor,
    new_click: bool,
    generator: torch.Generator | None,
    *,
    scale: int,
) -> None:
    """Give the mask with the highest predicted IoU back as a prompt, and maybe click where it is wrong."""
    best = _gather(logits, predicted.argmax(1)).float()  # [N, s, s]
    objects.mask_input = best[:, None]
    if new_click:
        coords, labels = error_clicks(best, objects.targets, scale, generator, objects.valid)
        objects.coords = torch.cat([objects.coords, coords[:, None]], dim=1)
        objects.labels = torch.cat([objects.labels, labels[:, None]], dim=1)


def draw_plan(batch: TrainingBatch, settings: StepSettings, rng: np.random.Generator) -> StepPlan:
    """Draw which objects of each image begin with a box, which are corrected, and when the masks alone are fed back."""
    B, K = batch.targets.shape[:2]
    passes = tuple(plan_passes(settings.clicks, rng))
    boxed = rng.random((B, K)) < settings.box_share
    every = np.broadcast_to(np.arange(K), (B, K))
    refined = np.sort(rng.permuted(every, axis=1)[:, : settings.refined], axis=1)
    device = batch.images.device
    return StepPlan(upload(boxed, device), upload(refined, device), passes)


def _first_prompts(batch: TrainingBatch, images: slice, boxed: Tensor) -> _Objects:
    """The objects of some images, with a box where `boxed`, bool [B, K], says so, the others with a point."""
    B, K, side = batch.targets[images].shape[:3]
    device = batch.images.device
    pixels = batch.scale * torch.arange(side, device=device)
    heights, widths = batch.sizes[images].unbind(1)
    valid = (pixels < heights[:, None])[:, :, None] & (pixels < widths[:, None])[:, None]
    box = boxed.flatten()
    corners = batch.boxes[images].reshape(-1, 2, 2)
    point = batch.points[images].reshape(-1, 1, 2)
    place = torch.arange(2, device=device)
    return _Objects(
        targets=batch.targets[images].flatten(0, 1),
        valid=valid[:, None].expand(B, K, side, side).flatten(0, 1),
        boxed=box,
        coords=torch.where(box[:, None, None], corners, point),
        labels=torch.where(box[:, None], 2 + place, 1 - 2 * place),  # two corners, or a point and padding
    )


def _images_together(batch: TrainingBatch, embeddings: Tensor) -> int:
    """How many images pass the decoder together where the caller does not say."""
    if embeddings.device.type == "cpu":
        return 1
    return max(1, _TOGETHER // (batch.targets.shape[1] * embeddings[0, 0].numel()))


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Entry index[n] of each row n, [N, M, ...] -> [N, ...]."""
    return values[torch.arange(len(values), device=values.device), index]
