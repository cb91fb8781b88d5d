"""SamPredictor: set an image once, then ask for masks by points, boxes and earlier masks.

The way of the data, from top to bottom: read_image and prepare_image (preprocess.py), on a GPU preprocess_images;
encode (runtime), prompts to tensors (prompts.py) on the device (transfers.py), decode and postprocess (runtime), to the
host and unpacked (transfers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sam_fast.embedding import ImageEmbedding
from sam_fast.modeling import Sam
from sam_fast.ops.backend import unavailable_reason
from sam_fast.preprocess import (
    ImageLike,
    postprocesses_plainly,
    prepare_image,
    preprocess_images,
    preprocesses_plainly,
    read_image,
)
from sam_fast.prompts import group_prompts, single_prompt_shape
from sam_fast.runtime import InferenceRuntime
from sam_fast.runtime.inference import Prompts
from sam_fast.transfers import Results, prompts_to, to_host
from sam_fast.utils.transforms import ResizeLongestSide

Prediction = tuple[np.ndarray, np.ndarray, np.ndarray]

# Images encoded together; on a CPU one at a time is as fast and needs less memory.
_ENCODE_BATCH = {"cuda": 8}


class SamPredictor:
    """Masks for prompts on an image, with the interface of `segment_anything.SamPredictor`.

    Attributes:
        model: the Sam that is run.
        transform: ResizeLongestSide of the model's input size.
        is_image_set: whether `predict` has an image to work on.
        features: [1, C, s, s] embedding of the image that is set, or None.
        original_size, input_size: (H, W) of that image and (h, w) of its resized form, or None.
    """

    def __init__(self, sam_model: Sam, precision: str = "auto", backend: str = "auto") -> None:
        """
        Args:
            sam_model: the model, on the device where it shall run.
            precision: auto, fp32, bf16, fp16, fp8 or int8; auto is bf16 on CUDA devices that have it, fp32 elsewhere.
                See `runtime.resolve_precision`.
            backend: implementation of the operations: auto, native or torch.
        """
        self.model = sam_model
        self.transform = ResizeLongestSide(sam_model.image_encoder.img_size)
        self.runtime = InferenceRuntime(sam_model, precision, backend)
        self._batch: list[ImageEmbedding] = []
        self.reset_image()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    # -- image -> embedding

    def set_image(self, image: ImageLike, image_format: str = "RGB") -> ImageEmbedding:
        """Encode an image; later calls of `predict` without an embedding are about it.

        Args:
            image: uint8 array [H, W, 3] (or gray, RGBA, [H, W]), CHW uint8 tensor, PIL image, or path.
            image_format: channel order of an array, "RGB" or "BGR".

        Returns:
            The embedding, which `predict(..., embedding=...)` takes from any thread.

        Raises:
            TypeError, ValueError: the image cannot be read as one.
        """
        return self._remember(self.encode_images([image], image_format)[0])

    def set_torch_image(self, transformed_image: torch.Tensor, original_image_size: tuple[int, ...]) -> ImageEmbedding:
        """Encode an image that was resized before.

        Args:
            transformed_image: [1, 3, h, w], values 0..255, longest side equal to the model's input size.
            original_image_size: (H, W) before the resize.

        Raises:
            ValueError: the shape is another.
        """
        side = self.model.image_encoder.img_size
        shape = tuple(transformed_image.shape)
        if len(shape) != 4 or shape[:2] != (1, 3) or max(shape[2:]) != side:
            raise ValueError(f"transformed_image must be [1, 3, h, w] with longest side {side}, got {shape}")
        height, width = original_image_size
        images = transformed_image.to(self.device)
        return self._remember(self.runtime.encode(images, [(int(height), int(width))])[0])

    def set_image_batch(self, image_list: Sequence[ImageLike], image_format: str = "RGB") -> list[ImageEmbedding]:
        """Encode several images, which `predict_batch` is then about. Sizes may differ."""
        self.reset_image()
        self._batch = self.encode_images(image_list, image_format)
        return list(self._batch)

    def encode_images(self, images: Sequence[ImageLike], image_format: str = "RGB") -> list[ImageEmbedding]:
        """Return the embeddings of images without changing the predictor; safe to call from many threads."""
        if self.device.type == "cuda" and self._preprocesses_by_kernels():
            return self._encode_originals(images, image_format)
        prepared = []
        for image in images:
            pixels = read_image(image, image_format)
            if self.model.image_format == "BGR":
                pixels = np.ascontiguousarray(pixels[..., ::-1])
            prepared.append(prepare_image(pixels, self.model.image_encoder.img_size))

        # Images whose resized form has one size go through the encoder together.
        embeddings: dict[int, ImageEmbedding] = {}
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, (_, input_size, _) in enumerate(prepared):
            by_size.setdefault(input_size, []).append(i)
        step = _ENCODE_BATCH.get(self.device.type, 1)
        for indices in by_size.values():
            for start in range(0, len(indices), step):
                chunk = indices[start : start + step]
                tensor = torch.cat([prepared[i][0] for i in chunk]).to(self.device)
                sizes = [prepared[i][2] for i in chunk]
                embeddings.update(zip(chunk, self.runtime.encode(tensor, sizes), strict=True))
        return [embeddings[i] for i in range(len(prepared))]

    def _preprocesses_by_kernels(self) -> bool:
        """Whether kernels resize and normalise images, rather than Pillow and the model."""
        if self.runtime.backend == "torch" or unavailable_reason("resize", "triton", self.device.type) is not None:
            return False
        # a model of other formats, float64 say, goes its own way
        plain = preprocesses_plainly(self.model)
        return plain and self.runtime.pixel_dtype in (torch.float32, torch.bfloat16, torch.float16)

    def _encode_originals(self, images: Sequence[ImageLike], image_format: str) -> list[ImageEmbedding]:
        """`encode_images` with everything on the device; images of all sizes go through the encoder together."""
        step = _ENCODE_BATCH.get(self.device.type, 1)
        embeddings: list[ImageEmbedding] = []
        for start in range(0, len(images), step):
            chunk = images[start : start + step]
            given = preprocess_images(chunk, self.model, image_format, dtype=self.runtime.pixel_dtype)
            embeddings += self.runtime.encode_pixels(*given)
        return embeddings

    def get_image_embedding(self) -> torch.Tensor:
        """Return the features [1, C, s, s] of the image that is set.

        Raises:
            RuntimeError: no image is set.
        """
        return self._current(None).features

    def reset_image(self) -> None:
        """Forget the image."""
        self._embedding: ImageEmbedding | None = None
        self._batch = []
        self.is_image_set = False
        self.features: torch.Tensor | None = None
        self.original_size: tuple[int, int] | None = None
        self.input_size: tuple[int, int] | None = None

    def warmup(self, batch_sizes: Sequence[int] = (1,)) -> None:
        """Do once what first calls would wait for: compile kernels, pack weights, record graphs. No image is set by it.

        Args:
            batch_sizes: numbers of images that will be encoded together.
        """
        side = self.model.image_encoder.img_size
        image = np.zeros((side // 2, side, 3), dtype=np.uint8)
        for size in 2 * tuple(batch_sizes):  # the first time compiles, the second records
            embedding = self.encode_images([image] * size)[0]
            for multimask_output in (True, False):
                for points in (1, 2):
                    given = np.zeros((points, 2)), np.ones(points, dtype=np.int64)
                    self.predict(*given, multimask_output=multimask_output, embedding=embedding)

    # -- prompts -> masks

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        *,
        embedding: ImageEmbedding | None = None,
    ) -> Prediction:
        """Predict masks for one prompt, or for N prompts at once.

        Args:
            point_coords: [K, 2] or [N, K, 2] XY, pixels of the original image.
            point_labels: [K] or [N, K], 1 foreground, 0 background.
            box: [4] or [N, 4] XYXY, pixels of the original image.
            mask_input: [1, 4s, 4s] or [N, 1, 4s, 4s], logits of an earlier prediction (256 x 256 at 1024 px).
            multimask_output: three masks per prompt rather than one; better for ambiguous prompts such as one point.
            return_logits: full-size float32 logits instead of bool masks.
            embedding: an image other than the one that is set.

        Returns:
            masks [M, H, W] bool (or float32), predicted IoU [M] float32, low-resolution logits [M, 4s, 4s] float32;
            each with a leading N where N > 1 prompts were given or any prompt was given with an N of its own
            other than 1 (a box [1, 4] gives [M, H, W], as in the official code).

        Raises:
            RuntimeError: no image is set.
            ValueError: a prompt has a wrong shape, or the embedding belongs to another model.
        """
        current = self._current(embedding)
        arrays = {"points": point_coords, "labels": point_labels, "boxes": box, "masks": mask_input}
        results = self._predict(current, prompts_to(self.device, arrays, current), multimask_output, return_logits)
        ((masks, iou, low_res),) = to_host([results])
        if single_prompt_shape(arrays, masks.shape[0]):
            masks, iou, low_res = masks[0], iou[0], low_res[0]
        return masks.numpy(), iou.numpy(), low_res.numpy()

    def predict_batch(
        self,
        point_coords_batch: Sequence[Any] | None = None,
        point_labels_batch: Sequence[Any] | None = None,
        box_batch: Sequence[Any] | None = None,
        mask_input_batch: Sequence[Any] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        *,
        embeddings: Sequence[ImageEmbedding] | None = None,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """Predict masks on every image of `set_image_batch`, after sam2's `predict_batch`.

        Args:
            point_coords_batch, point_labels_batch, box_batch, mask_input_batch: one entry per image, each None or what
                `predict` takes. An image's points may also be a list of N arrays [K_i, 2] with their labels [K_i]
                (ragged prompts); the result has a leading N then.
            embeddings: images other than those that are set.

        Returns:
            Lists, one entry per image, of masks, predicted IoUs and low-resolution logits as `predict` returns them.
        """
        images = list(embeddings) if embeddings is not None else self._batch
        if not images:
            raise RuntimeError("Images must be set with .set_image_batch(...) before mask prediction.")
        columns = (point_coords_batch, point_labels_batch, box_batch, mask_input_batch)
        names = ("point_coords_batch", "point_labels_batch", "box_batch", "mask_input_batch")
        for name, column in zip(names, columns, strict=True):
            if column is not None and len(column) != len(images):
                raise ValueError(f"{name} must have one entry per image ({len(images)}), got {len(column)}")
        results = []
        for i, current in enumerate(images):
            coords, labels, boxes, masks = (None if column is None else column[i] for column in columns)
            results.append(self._predict_ragged(current, coords, labels, boxes, masks, multimask_output, return_logits))
        return [r[0] for r in results], [r[1] for r in results], [r[2] for r in results]

    def predict_torch(
        self,
        point_coords: torch.Tensor | None,
        point_labels: torch.Tensor | None,
        boxes: torch.Tensor | None = None,
        mask_input: torch.Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        *,
        embedding: ImageEmbedding | None = None,
        extra_tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict masks for N prompts that were transformed to the model's frame (`transform.apply_coords_torch`).

        Args:
            point_coords: [N, K, 2] XY, pixels of the resized image.
            point_labels: [N, K].
            boxes: [N, 4] XYXY, pixels of the resized image.
            mask_input: [N, 1, 4s, 4s] logits.
            extra_tokens: [N, K', C], appended to each prompt's tokens.

        Returns:
            masks [N, M, H, W] bool (float32 with `return_logits`), predicted IoU [N, M], logits [N, M, 4s, 4s].

        Raises:
            RuntimeError: no image is set.
            TypeError: a prompt is not a tensor.
            ValueError: a prompt has a wrong shape, or the embedding belongs to another model.
        """
        given = {"point_coords": point_coords, "point_labels": point_labels, "boxes": boxes, "mask_input": mask_input}
        for name, value in given.items():
            if value is not None and not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; `predict` takes arrays")
        if point_coords is not None and point_labels is None:
            raise ValueError("point_labels must be supplied if point_coords is supplied.")
        current = self._current(embedding)
        prompts = Prompts(point_coords, point_labels, boxes, mask_input, extra_tokens)
        return self._predict(current, prompts, multimask_output, return_logits).unpacked()

    # -- inside

    def _predict(
        self, embedding: ImageEmbedding, prompts: Prompts, multimask_output: bool, return_logits: bool
    ) -> Results:
        low_res, iou = self.runtime.decode(embedding, prompts, multimask_output)
        if not postprocesses_plainly(self.model):
            masks = self.model.postprocess_masks(low_res, embedding.input_size, embedding.original_size)
            return Results(masks if return_logits else masks > self.model.mask_threshold, iou, low_res)
        if return_logits:
            masks = self.runtime.full_size_logits(embedding, low_res.flatten(0, 1))
            return Results(masks.view(low_res.shape[:2] + masks.shape[1:]), iou, low_res)
        bits = self.runtime.postprocess(embedding, low_res.flatten(0, 1)).bits
        assert bits is not None
        return Results(bits.view(low_res.shape[:2] + bits.shape[1:]), iou, low_res, embedding.original_size[1])

    def _predict_ragged(
        self,
        embedding: ImageEmbedding,
        coords: Any,
        labels: Any,
        boxes: Any,
        masks: Any,
        multimask_output: bool,
        return_logits: bool,
    ) -> Prediction:
        groups = group_prompts(coords, labels, boxes, masks)
        if groups is None:
            return self.predict(coords, labels, boxes, masks, multimask_output, return_logits, embedding=embedding)
        current = self._current(embedding)
        results = [
            self._predict(current, prompts_to(self.device, arrays, current), multimask_output, return_logits)
            for _, arrays in groups
        ]
        rows: dict[int, tuple[torch.Tensor, ...]] = {}
        for (indices, _), arrived in zip(groups, to_host(results), strict=True):
            for row, index in enumerate(indices):
                rows[index] = tuple(column[row] for column in arrived)
        columns = zip(*(rows[i] for i in range(len(rows))), strict=True)
        stacked = [torch.stack(column).numpy() for column in columns]
        return stacked[0], stacked[1], stacked[2]

    def _remember(self, embedding: ImageEmbedding) -> ImageEmbedding:
        self.reset_image()
        self._embedding = embedding
        self.features = embedding.features
        self.original_size = embedding.original_size
        self.input_size = embedding.input_size
        self.is_image_set = True
        return embedding

    def _current(self, embedding: ImageEmbedding | None) -> ImageEmbedding:
        """The embedding that a call is about, checked and on the model's device."""
        if embedding is not None:
            self.runtime.check(embedding)
            return embedding.to(self.device)
        if not self.is_image_set or self.features is None or self.original_size is None or self.input_size is None:
            raise RuntimeError("An image must be set with .set_image(...) before mask prediction.")
        known = self._embedding
        if (
            known is None
            or known.features is not self.features
            or known.original_size != tuple(self.original_size)
            or known.input_size != tuple(self.input_size)
        ):
            # Scripts written for segment_anything restore a cached image by assigning these attributes.
            known = self.runtime.adopt(self.features, self.original_size, self.input_size)
            self._embedding = known
        return known.to(self.device)
