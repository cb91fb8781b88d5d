"""One model, made ready for inference in one precision; it holds no image and may be shared by threads."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import nn

from sam_fast.embedding import ImageEmbedding, model_fingerprint
from sam_fast.modeling import MaskDecoder, Sam, TwoWayTransformer
from sam_fast.modeling.image_encoder import ImageEncoderViT
from sam_fast.ops.backend import unavailable_reason
from sam_fast.ops.postprocess_masks import PostprocessedMasks, postprocess_masks, resize_logits
from sam_fast.runtime.graphs import Graphed
from sam_fast.runtime.image_encoder import can_encode, encode, linears_of
from sam_fast.runtime.linears import BlockLinears
from sam_fast.runtime.packed_decoder import PackedDecoder
from sam_fast.runtime.packed_decoder import can_pack as can_pack_decoder
from sam_fast.runtime.packed_encoder import PackedEncoder, can_pack
from sam_fast.runtime.plain import is_untouched, is_untouched_throughout
from sam_fast.runtime.precision import format_beside, resolve_precision
from sam_fast.runtime.streams import FirstRows, Ready
from sam_fast.runtime.threads import in_threads
from sam_fast.runtime.two_way import MOST_TOKENS, FirstLayer, can_absorb, project_first_layer, two_way
from sam_fast.runtime.upscaling import can_upscale_by_products, masks_by_products

_Made = TypeVar("_Made")

# Prompts that go through the mask decoder together. One prompt's image stream is 4 MB at 1024 px, several of which are
# in use at a time: on a CPU more prompts leave the cache and are slower each.
_MOST_PROMPTS_AT_ONCE = 4
# The same on a GPU, whose second-level cache (50 MB on Hopper) then holds the 2 MB per prompt that one kernel leaves to
# the next.
_MOST_PROMPTS_ON_GPU = 16
_PACKS_ON = {"cuda"}  # device types whose encoder is `PackedEncoder`, and whose decoder `PackedDecoder`


class Prompts(NamedTuple):
    """N prompts on one image, in the frame of the model's input (the resized image, in pixels).

    Attributes:
        points: [N, K, 2] XY, or None.
        labels: [N, K], 1 foreground, 0 background, -1 padding; None without points.
        boxes: [N, 4] XYXY, or None.
        masks: [N, 1, 4s, 4s] logits of an earlier prediction, or None.
        extra_tokens: [N, K', C] embeddings appended to the prompt's tokens, or None.
    """

    points: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    extra_tokens: torch.Tensor | None = None


class _DecoderInputs(NamedTuple):
    """Image embedding [1, C, h, w], its encoding [1, C, h, w], sparse [N, T, C] and dense [N or 1, C, h, w] prompts."""

    features: torch.Tensor
    pe: torch.Tensor
    sparse: torch.Tensor
    dense: torch.Tensor
    no_masks: bool
    plain: bool  # the decoder is, and on a CPU
    packed: PackedDecoder | None = None  # what decodes them on a GPU

    def official(self) -> tuple[torch.Tensor, ...]:
        """The arguments of a mask decoder."""
        return self[:4]


class InferenceRuntime:
    """The stages of SAM: encode an image once, decode prompts, post-process masks."""

    def __init__(self, model: Sam, precision: str = "auto", backend: str = "auto") -> None:
        """
        Args:
            model: the Sam to run; its weights are read at every call, so they may change in between.
            precision: auto, fp32, bf16, fp16, fp8 or int8 (see `resolve_precision`). A model that was converted
                (`half()`, `bfloat16()`, `double()`) runs in its own format with auto, and cannot run in fp32 if that is
                narrower.
            backend: which implementation of the operations runs: auto, native or torch. With native, the model's own
                operations are native where they can be, that is for float32 on a CPU.

        Raises:
            ValueError: unknown precision or backend.
            RuntimeError: the device cannot run that precision.
        """
        self.model = model
        self.precision = precision
        self.backend = backend
        self._kept: dict[str, Any] = {}
        resolve_precision(precision, model.device)
        if backend not in ("auto", "native", "torch"):
            raise ValueError(f"backend must be auto, native or torch, got {backend!r}")

    @property
    def _model_backend(self) -> str:
        """Of operations inside the model, which formats or shapes may rule out."""
        return "torch" if self.backend == "torch" else "auto"

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: not what was derived from the weights."""
        return {**self.__dict__, "_kept": {}}

    def _autocast(self) -> AbstractContextManager:
        """The number format of a stage that PyTorch's own layers run."""
        dtype = format_beside(resolve_precision(self.precision, self.model.device))
        weights = _weight_dtype(self.model.mask_decoder)
        if self.precision == "auto" and weights != torch.float32:
            return nullcontext()
        if dtype in (torch.bfloat16, torch.float16):
            return torch.autocast(self.model.device.type, dtype)
        if weights.itemsize < 4:
            raise RuntimeError(
                f"precision {self.precision!r} needs float32 weights, got {weights}; use 'auto' or model.float()"
            )
        return nullcontext()

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
        return _weight_dtype(self.model.image_encoder)

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
        if not torch.is_autocast_enabled(device_type) and can_encode(encoder):
            if device_type in _PACKS_ON and self.backend != "torch" and can_pack(encoder):
                if pixels.dtype == torch.float32:
                    return self._packed(encoder, dtype)(pixels)
                if pixels.dtype in (torch.bfloat16, torch.float16) and self.precision == "auto":
                    return self._packed(encoder, pixels.dtype)(pixels)
            elif device_type == "cpu" and pixels.dtype == torch.float32:
                linears = None if dtype == torch.float32 else self._linears(encoder, dtype)
                return encode(encoder, pixels, linears, backend=self._model_backend)
        if format_beside(dtype) != dtype:
            raise RuntimeError(
                f"precision {self.precision!r} needs the plain image encoder with float32 weights, and no autocast"
            )
        with self._autocast():
            return encoder(pixels)

    def _packed(self, encoder: ImageEncoderViT, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        """The encoder for a GPU, with its graphs; made anew when a weight changes."""

        def pack() -> Graphed:
            packed = PackedEncoder(encoder, format_beside(dtype), e4m3=dtype == torch.float8_e4m3fn)
            return Graphed(partial(packed, backend=self._model_backend))

        return self._once(self._kept, "packed encoder", encoder, list(encoder.parameters()), pack)

    def _linears(self, encoder: ImageEncoderViT, dtype: torch.dtype) -> list[BlockLinears]:
        def prepare() -> list[BlockLinears]:
            return linears_of(encoder, dtype)

        return self._once(self._kept, "linears", encoder, list(encoder.blocks.parameters()), prepare)

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

    def _decoder_format(self, plain: bool) -> AbstractContextManager:
        """The number format of prompts and masks: on a CPU float32, for which there are native operations."""
        decoder = self.model.mask_decoder
        if plain and can_absorb(decoder.transformer) and _weight_dtype(decoder) == torch.float32:
            return nullcontext()
        return self._autocast()

    @torch.no_grad()
    def decode(
        self, embedding: ImageEmbedding, prompts: Prompts, multimask_output: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return low-resolution logits [N, M, 4s, 4s] and predicted IoUs [N, M], both float32.

        M is 3 with `multimask_output`, otherwise 1.
        """
        decoder = self.model.mask_decoder

        def decode(inputs: _DecoderInputs) -> tuple[torch.Tensor, torch.Tensor]:
            if not _has_stages(decoder):
                return decoder(*inputs.official(), multimask_output=multimask_output)
            mask_tokens, image, iou = self._predict_tokens(embedding, inputs)
            chosen = range(1, decoder.num_mask_tokens) if multimask_output else range(1)
            return self._masks_from(mask_tokens, image, chosen, inputs), iou[:, chosen.start : chosen.stop]

        parts = self._decode_each(embedding, prompts, decode)
        low_res, iou = (torch.cat(column) for column in zip(*parts, strict=True))
        return low_res.float(), iou.float()

    @torch.no_grad()
    def decode_filtered(
        self, embedding: ImageEmbedding, prompts: Prompts, iou_threshold: float | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode with multimask output, but only masks whose predicted IoU is above the threshold (None: all).

        The IoU head reads tokens alone, so prompts without such a mask are never upscaled. On a GPU the host launches
        the next prompts before it knows how many these are.

        Returns:
            logits [K, 4s, 4s], predicted IoUs [K], and the prompt of each mask [K] int64; ordered by prompt, then mask.
        """
        decoder = self.model.mask_decoder
        if not _has_stages(decoder):
            low_res, iou = self.decode(embedding, prompts)
            keep = _above(iou, iou_threshold)
            return low_res[keep], iou[keep], keep.nonzero()[:, 0]

        kept = FirstRows()

        def decode(inputs: _DecoderInputs) -> tuple[torch.Tensor | None, torch.Tensor]:
            mask_tokens, image, iou = self._predict_tokens(embedding, inputs)
            scores = iou[:, 1:].float()
            keep = _above(scores, iou_threshold)
            chosen = range(1, decoder.num_mask_tokens)
            if inputs.packed is not None:
                kept.add(self._masks_from(mask_tokens, image, chosen, inputs, _rows_in_order(keep)), keep.sum())
                return None, scores
            rows = keep.any(dim=1)
            if not rows.all():  # else there is no need for a copy of the images
                mask_tokens, image = mask_tokens[rows], image[rows]
            return self._masks_from(mask_tokens, image, chosen, inputs)[keep[rows]].float(), scores

        logits, scores = zip(*self._decode_each(embedding, prompts, decode), strict=True)
        all_logits = kept.concatenated() if logits[0] is None else torch.cat(logits)
        all_scores = torch.cat(scores)
        keep = _above(all_scores, iou_threshold)
        return all_logits, all_scores[keep], keep.nonzero()[:, 0]

    def _decode_each(
        self, embedding: ImageEmbedding, prompts: Prompts, decode: Callable[[_DecoderInputs], _Made]
    ) -> list[_Made]:
        """What `decode` returns for a few prompts at a time; on a CPU, where it can, for several of these at once."""
        decoder = self.model.mask_decoder
        packed = self._packed_decoder()
        if packed is not None:
            inputs = list(self._decoder_inputs(embedding, prompts, packed=packed))
            if self._few_tokens(packed.decoder, inputs[0]):
                return [decode(some) for some in inputs]
        plain = _has_stages(decoder) and self._plain_on_cpu(decoder)
        with self._decoder_format(plain):
            inputs = list(self._decoder_inputs(embedding, prompts, plain))
            absorbs = _has_stages(decoder) and self._absorbs(decoder, inputs[0])
            if not absorbs or torch.is_autocast_enabled("cpu"):  # which is a property of the thread
                return [decode(some) for some in inputs]
            if inputs[0].no_masks:
                self._first_layer(embedding, inputs[0])  # once, before several threads find it missing
            return in_threads(decode, inputs)

    def _packed_decoder(self) -> PackedDecoder | None:
        """The decoder for a GPU, made anew when a weight changes; None where this one must run as it is."""
        decoder, device_type = self.model.mask_decoder, self.model.device.type
        if device_type not in _PACKS_ON or self.backend == "torch" or torch.is_autocast_enabled(device_type):
            return None
        if not can_pack_decoder(decoder) or unavailable_reason("two_way_attention", "triton", device_type) is not None:
            return None
        weights = _weight_dtype(decoder)
        dtype = format_beside(resolve_precision(self.precision, self.model.device))
        if weights != torch.float32:
            if self.precision != "auto" or weights not in (torch.bfloat16, torch.float16):
                return None
            dtype = weights

        def pack() -> PackedDecoder:
            assert isinstance(decoder, MaskDecoder)
            return PackedDecoder(decoder, dtype, self._model_backend)

        return self._once(self._kept, "packed decoder", decoder, list(decoder.parameters()), pack)

    def _decoder_inputs(
        self, embedding: ImageEmbedding, prompts: Prompts, plain: bool = False, packed: PackedDecoder | None = None
    ) -> Iterator[_DecoderInputs]:
        """What the mask decoder reads, for a few prompts at a time."""
        embedding.wait()
        model = self.model
        dtype = _weight_dtype(model.mask_decoder)
        points = None if prompts.points is None else (prompts.points, prompts.labels)
        masks = None if prompts.masks is None else prompts.masks.to(dtype)
        extra = {} if prompts.extra_tokens is None else {"extra_tokens": prompts.extra_tokens.to(dtype)}
        sparse, dense = model.prompt_encoder(points=points, boxes=prompts.boxes, masks=masks, **extra)
        features, pe = embedding.features.to(dtype), self._image_pe()
        step = max(1, len(sparse))
        if packed is not None:
            step = min(_MOST_PROMPTS_ON_GPU, step)
        elif features.device.type == "cpu":
            step = min(_MOST_PROMPTS_AT_ONCE, -(-step // torch.get_num_threads()))
        for start in range(0, max(1, len(sparse)), step):
            some = slice(start, start + step)
            dense_of_some = dense if len(dense) == 1 else dense[some]
            yield _DecoderInputs(features, pe, sparse[some], dense_of_some, masks is None, plain, packed)

    def _predict_tokens(
        self, embedding: ImageEmbedding, inputs: _DecoderInputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`MaskDecoder.predict_tokens`, the cheapest way for these prompts."""
        decoder = self.model.mask_decoder
        assert isinstance(decoder, MaskDecoder)
        if inputs.packed is None and not self._absorbs(decoder, inputs):
            return decoder.predict_tokens(*inputs.official())
        pe = _pixels(inputs.pe)
        image: torch.Tensor | FirstLayer
        if inputs.no_masks:
            image = self._first_layer(embedding, inputs)
        else:
            image = _pixels(inputs.features + inputs.dense)
            if len(image) != len(inputs.sparse):
                image = _project(decoder, inputs.packed, image, pe)
        if inputs.packed is not None:
            mask_tokens, written, iou = inputs.packed.predict_tokens(image, self._packed_pe(inputs), inputs.sparse)
        else:
            tokens, results = decoder.prompt_tokens(inputs.sparse), 1 + decoder.num_mask_tokens
            assert isinstance(decoder.transformer, TwoWayTransformer)
            tokens, written = two_way(
                decoder.transformer, image, pe, tokens, results=results, backend=self._model_backend
            )
            mask_tokens, iou = decoder.read_tokens(tokens)
        return mask_tokens, written.transpose(1, 2).unflatten(2, tuple(inputs.features.shape[-2:])), iou

    def _absorbs(self, decoder: MaskDecoder, inputs: _DecoderInputs) -> bool:
        """Whether `two_way` runs these prompts on a CPU."""
        return inputs.plain and self._few_tokens(decoder, inputs) and can_absorb(decoder.transformer)

    def _few_tokens(self, decoder: MaskDecoder, inputs: _DecoderInputs) -> bool:
        """Whether tokens are so few that projecting the image would cost more."""
        return 1 + decoder.num_mask_tokens + inputs.sparse.shape[1] <= MOST_TOKENS

    def _masks_from(
        self,
        mask_tokens: torch.Tensor,
        image: torch.Tensor,
        chosen: range,
        inputs: _DecoderInputs,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Upscale images [N, C, h, w] and classify their pixels by the chosen mask tokens: logits [N, M, 4h, 4w].

        A packed decoder may be told in which `rows` of [N M, 4h, 4w] to put them.
        """
        decoder = self.model.mask_decoder
        assert isinstance(decoder, MaskDecoder)
        if inputs.packed is not None:
            pixels = image.flatten(2).transpose(1, 2)  # as they were
            return inputs.packed.masks_from(mask_tokens, pixels, image.shape[2:], chosen, rows)
        if inputs.plain and can_upscale_by_products(decoder.output_upscaling):
            return masks_by_products(decoder, mask_tokens, image, chosen, self._model_backend)
        return decoder.masks_from(mask_tokens, decoder.upscale(image), chosen)

    def _plain_on_cpu(self, decoder: MaskDecoder) -> bool:
        """Whether the CPU's ways through a decoder are its own: somebody's subclass may do other things."""
        on_cpu = decoder.iou_token.weight.device.type == "cpu"
        return on_cpu and type(decoder) is MaskDecoder and is_untouched_throughout(decoder)

    def _image_pe(self) -> torch.Tensor:
        """The positional encoding of the image's tokens, made once; channels last, that `_pixels` copies nothing."""
        encoder = self.model.prompt_encoder
        weights = [*encoder.buffers(), *encoder.parameters()]

        def encode() -> torch.Tensor:
            return encoder.get_dense_pe().contiguous(memory_format=torch.channels_last)

        return self._once(self._kept, "image pe", encoder, weights, encode)

    def _packed_pe(self, inputs: _DecoderInputs) -> torch.Tensor:
        """The encoding as rows [1, P, C] in the format of the packed decoder, made once."""
        encoder, packed = self.model.prompt_encoder, inputs.packed
        assert packed is not None
        weights = [*encoder.buffers(), *encoder.parameters()]
        return self._once(self._kept, "packed pe", encoder, weights, lambda: _pixels(inputs.pe).to(packed.dtype))

    def _first_layer(self, embedding: ImageEmbedding, inputs: _DecoderInputs) -> FirstLayer:
        """Projections of an image without mask prompts, made once per image."""
        decoder = self.model.mask_decoder
        assert isinstance(decoder, MaskDecoder)
        transformer = decoder.transformer
        assert isinstance(transformer, TwoWayTransformer)
        no_mask = self.model.prompt_encoder.no_mask_embed.weight
        weights = [*transformer.layers[0].parameters(), no_mask, *self.model.prompt_encoder.buffers()]

        def project() -> FirstLayer:
            image = inputs.features + no_mask.view(1, -1, 1, 1)
            return _project(decoder, inputs.packed, _pixels(image), _pixels(inputs.pe))

        name = "first layer" if inputs.packed is None else "packed first layer"
        return self._once(embedding.cache, name, transformer, weights, project)

    def _once(
        self,
        store: dict[str, Any],
        name: str,
        owner: nn.Module,
        weights: Sequence[torch.Tensor],
        make: Callable[[], _Made],
    ) -> _Made:
        """What `make` returns, kept in `store` until a weight of `owner` that it depends on changes.

        On a GPU it may be used in any stream.
        """
        key = self.precision, *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in weights)
        kept = store.get(name)
        if kept is None or kept[0]() is not owner or kept[1] != key:
            kept = weakref.ref(owner), key, make(), Ready(self.model.device)
            store[name] = kept
        made, ready = kept[2:]
        ready.wait([made] if isinstance(made, torch.Tensor) else made if isinstance(made, FirstLayer) else ())
        return made

    def postprocess(
        self,
        embedding: ImageEmbedding,
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


def _pixels(image: torch.Tensor) -> torch.Tensor:
    """[N, C, h, w] -> [N, h * w, C], contiguous."""
    return image.flatten(2).transpose(1, 2).contiguous()


def _project(decoder: MaskDecoder, packed: PackedDecoder | None, image: torch.Tensor, pe: torch.Tensor) -> FirstLayer:
    """What the first layer makes of an image X [1, P, C] with encoding [1, P, C]."""
    if packed is not None:
        return packed.project_first_layer(image, pe)
    assert isinstance(decoder.transformer, TwoWayTransformer)
    return project_first_layer(decoder.transformer, image, pe)


def _rows_in_order(keep: torch.Tensor) -> torch.Tensor:
    """For `upscale_masks`: the masks that are kept, bool [N, M], one after the other; int32."""
    places = keep.flatten().cumsum(0).view_as(keep) - 1
    return torch.where(keep, places, -1).int()


def _has_stages(decoder: nn.Module) -> TypeGuard[MaskDecoder]:
    """Whether the stages of a decoder may be called one by one: not of somebody's own, or where somebody listens."""
    return isinstance(decoder, MaskDecoder) and is_untouched(decoder)


def _above(scores: torch.Tensor, threshold: float | None) -> torch.Tensor:
    return torch.ones_like(scores, dtype=torch.bool) if threshold is None else scores > threshold


def _weight_dtype(stage: nn.Module) -> torch.dtype:
    """The number format of a stage's weights; float32 if it has none."""
    return next((p.dtype for p in stage.parameters() if p.is_floating_point()), torch.float32)
