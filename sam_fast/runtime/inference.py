"""One model, made ready for inference in one precision; it holds no image and may be shared by threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sam_fast.embedding import ImageEmbedding, model_fingerprint
from sam_fast.modeling import Sam
from sam_fast.ops.postprocess_masks import PostprocessedMasks, postprocess_masks, resize_logits
from sam_fast.runtime.decoding import Decoding, Prompts
from sam_fast.runtime.graphs import Graphs
from sam_fast.runtime.image_encoder import can_encode, encode, linears_of
from sam_fast.runtime.kept import Kept
from sam_fast.runtime.linears import BlockLinears
from sam_fast.runtime.packed_encoder import PackedEncoder, can_pack
from sam_fast.runtime.plain import is_packed_on
from sam_fast.runtime.precision import autocast, format_beside, resolve_precision, weight_dtype
from sam_fast.watch import stamp

__all__ = ["Frame", "InferenceRuntime", "Prompts"]


class Frame(NamedTuple):
    """Where an image lies in what a model sees of it, as an `ImageEmbedding` knows it; enough to post-process masks.

    Attributes:
        original_size: (H, W) of the image.
        input_size: (h, w) of the resized image before padding.
        image_size: S, the side of the padded square.
    """

    original_size: tuple[int, int]
    input_size: tuple[int, int]
    image_size: int


class InferenceRuntime:
    """The stages of SAM: encode an image once, decode prompts, post-process masks."""

    def __init__(self, model: Sam, precision: str = "auto", backend: str = "auto") -> None:
        """
        Args:
            model: the Sam to run; its weights may change between calls, by optimisers and `with torch.no_grad():
                weight.copy_(...)`, but not through `weight.data`, which nobody can notice.
            precision: auto, fp32, bf16, fp16, fp8 or int8 (see `resolve_precision`). A model that was converted
                (`half()`, `bfloat16()`, `double()`) runs in its own format with auto (`bfloat16()` as by bf16), and
                cannot run in fp32 if that is narrower.
            backend: which implementation of the operations runs: auto, native or torch. With native, the model's own
                operations are native where they can be, that is for float32 and bfloat16 on a CPU.

        Raises:
            ValueError: unknown precision or backend.
            RuntimeError: the device cannot run that precision.
        """
        self.model = model
        self.precision = precision
        self.backend = backend
        resolve_precision(precision, model.device)
        if backend not in ("auto", "native", "torch"):
            raise ValueError(f"backend must be auto, native or torch, got {backend!r}")
        self._kept = Kept(lambda: model.device)
        self._decoding = Decoding(model, precision, self._model_backend)

    @property
    def _model_backend(self) -> str:
        """Of operations inside the model, which formats or shapes may rule out."""
        return "torch" if self.backend == "torch" else "auto"

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: not what was derived from the weights."""
        return {"model": self.model, "precision": self.precision, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @torch.no_grad()
    def encode(self, images: torch.Tensor, original_sizes: list[tuple[int, int]]) -> list[ImageEmbedding]:
        """Encode resized images of one size.

        Args:
            images: [B, 3, h, w], values 0..255, longest side S, in the model's channel order.
            original_sizes: (H, W) of each image before the resize.
        """
        input_size = (images.shape[-2], images.shape[-1])
        return self.encode_pixels(self.model.preprocess(images), [input_size] * len(images), original_sizes)

    @property
    def pixel_dtype(self) -> torch.dtype:
        """The number format that the image encoder's weights take."""
        return weight_dtype(self.model.image_encoder)

    @torch.no_grad()
    def encode_pixels(
        self, pixels: torch.Tensor, input_sizes: list[tuple[int, int]], original_sizes: list[tuple[int, int]]
    ) -> list[ImageEmbedding]:
        """Encode images that were normalised and padded before.

        Args:
            pixels: [B, 3, S, S], as `Sam.preprocess` returns them.
            input_sizes: (h, w) of each image inside of its padding.
            original_sizes: (H, W) of each image before the resize.
        """
        fingerprint = model_fingerprint(self.model.image_encoder)
        features = self._features(pixels.to(self.pixel_dtype)).float().contiguous()
        return [
            ImageEmbedding(
                features[i : i + 1],
                original_size,
                input_size,
                self.model.image_encoder.img_size,
                self.model.image_format,
                fingerprint,
            )
            for i, (input_size, original_size) in enumerate(zip(input_sizes, original_sizes, strict=True))
        ]

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The image encoder's output, the cheapest way for these weights."""
        encoder = self.model.image_encoder
        dtype = resolve_precision(self.precision, self.model.device)
        device_type = pixels.device.type
        if not torch.is_autocast_enabled(device_type) and not encoder.training:
            if is_packed_on(device_type) and self.backend != "torch":
                narrow = pixels.dtype in (torch.bfloat16, torch.float16) and self.precision == "auto"
                packed = self._packed_encoder(pixels.dtype if narrow else dtype)
                if packed is not None and (narrow or pixels.dtype == torch.float32):
                    return packed(pixels)
            elif device_type == "cpu" and pixels.dtype == torch.float32:
                linears = self._linears(dtype)
                if linears is not None:
                    return encode(encoder, pixels, linears, backend=self._model_backend)
        if format_beside(dtype) != dtype:
            raise RuntimeError(
                f"precision {self.precision!r} needs the plain image encoder with float32 weights, and no autocast"
            )
        with autocast(self.precision, self.model.device, weight_dtype(self.model.mask_decoder)):
            return encoder(pixels)

    def _packed_encoder(self, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The encoder for a GPU, with its graphs; None where it must run as it is."""
        encoder = self.model.image_encoder

        def pack() -> Callable[[torch.Tensor], torch.Tensor] | None:
            if not can_encode(encoder) or not can_pack(encoder):
                return None
            packed = PackedEncoder(encoder, format_beside(dtype), e4m3=dtype == torch.float8_e4m3fn)
            graphs = Graphs()

            def run(pixels: torch.Tensor) -> tuple[torch.Tensor]:
                return (packed(pixels, backend=self._model_backend),)

            return lambda pixels: graphs("encode", run, pixels)[0]

        return self._kept.of("packed encoder", pack, dtype, stamp(encoder))

    def _linears(self, dtype: torch.dtype) -> list[BlockLinears] | None:
        """The linear layers of the CPU's way through the encoder; None where it must run as it is."""
        encoder = self.model.image_encoder

        def prepare() -> list[BlockLinears] | None:
            return linears_of(encoder, dtype, self._model_backend) if can_encode(encoder) else None

        return self._kept.of("linears", prepare, dtype, stamp(encoder))

    def adopt(
        self, features: torch.Tensor, original_size: tuple[int, int], input_size: tuple[int, int]
    ) -> ImageEmbedding:
        """Wrap features [1, C, s, s] that the caller vouches for as an embedding of this model.

        Raises:
            ValueError: the features have another shape.
        """
        expected = (1, self.model.prompt_encoder.embed_dim, *self.model.prompt_encoder.image_embedding_size)
        if tuple(features.shape) != expected:
            raise ValueError(f"features of this model must be {list(expected)}, got {list(features.shape)}")
        return ImageEmbedding(
            features,
            (int(original_size[0]), int(original_size[1])),
            (int(input_size[0]), int(input_size[1])),
            self.model.image_encoder.img_size,
            self.model.image_format,
            model_fingerprint(self.model.image_encoder),
        )

    def check(self, embedding: ImageEmbedding) -> None:
        """Raise ValueError if `embedding` was made by other weights or for another input than this model's."""
        fingerprint = model_fingerprint(self.model.image_encoder)
        if embedding.fingerprint != fingerprint:
            raise ValueError(
                f"the image embedding was made by another model (fingerprint {embedding.fingerprint}, "
                f"this model has {fingerprint}); encode the image again"
            )
        if embedding.image_size != self.model.image_encoder.img_size:
            raise ValueError(
                f"the image embedding was made for inputs of {embedding.image_size} px, "
                f"this model takes {self.model.image_encoder.img_size} px"
            )
        if embedding.image_format != self.model.image_format:
            raise ValueError(
                f"the image embedding was made from {embedding.image_format} channels, "
                f"this model takes {self.model.image_format}"
            )

    @torch.no_grad()
    def decode(
        self, embedding: ImageEmbedding, prompts: Prompts, multimask_output: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return low-resolution logits [N, M, 4s, 4s] and predicted IoUs [N, M], both float32.

        M is 3 with `multimask_output`, otherwise 1.
        """
        return self._decoding.decode(embedding, prompts, multimask_output)

    @torch.no_grad()
    def decode_filtered(
        self, embedding: ImageEmbedding, prompts: Prompts, iou_threshold: float | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode with multimask output, but only masks whose predicted IoU is above the threshold (None: all).

        Returns:
            logits [K, 4s, 4s], predicted IoUs [K], and the prompt of each mask [K] int64; ordered by prompt, then mask.
        """
        return self._decoding.decode_filtered(embedding, prompts, iou_threshold)

    def postprocess(
        self,
        embedding: ImageEmbedding | Frame,
        low_res: torch.Tensor,
        *,
        stability_offset: float = 1.0,
        return_bits: bool = True,
    ) -> PostprocessedMasks:
        """Threshold logits [N, 4s, 4s] at the original image's size: packed bits, areas, boxes, stability scores."""
        return postprocess_masks(
            low_res,
            embedding.input_size,
            embedding.original_size,
            embedding.image_size,
            mask_threshold=self.model.mask_threshold,
            stability_offset=stability_offset,
            return_bits=return_bits,
            backend=self.backend,
        )

    def full_size_logits(self, embedding: ImageEmbedding, low_res: torch.Tensor) -> torch.Tensor:
        """Interpolate logits [N, 4s, 4s] to the original image, [N, H, W] float32."""
        return resize_logits(
            low_res, embedding.input_size, embedding.original_size, embedding.image_size, backend=self.backend
        )
