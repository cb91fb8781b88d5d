"""The way of prompts through the mask decoder, the cheapest that gives what its modules would.

Three ways: a `PackedDecoder` on a GPU; a `CpuDecoder`, with the decoder's own weights, on a CPU; and the modules
themselves, wherever somebody listens, has put in something else, or asks for very many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from sam_fast import native
from sam_fast.embedding import ImageEmbedding
from sam_fast.modeling import MaskDecoder, PromptEncoder, Sam
from sam_fast.ops.backend import unavailable_reason
from sam_fast.runtime.cpu_decoder import CpuDecoder, can_narrow_pixels
from sam_fast.runtime.graphs import Graphs
from sam_fast.runtime.kept import Kept
from sam_fast.runtime.packed_decoder import MOST_PROMPTS, Chunks, PackedDecoder, comes_again
from sam_fast.runtime.packed_decoder import can_pack as can_pack_decoder
from sam_fast.runtime.plain import is_packed_on, is_untouched, is_untouched_throughout
from sam_fast.runtime.precision import autocast, format_beside, resolve_precision, weight_dtype
from sam_fast.runtime.threads import in_threads
from sam_fast.runtime.two_way import MOST_TOKENS, FirstLayer
from sam_fast.watch import stamp

_Made = TypeVar("_Made")

# Prompts that go through the mask decoder together. One prompt's image stream is 4 MB at 1024 px, several of which are
# in use at a time: on a CPU more prompts leave the cache and are slower each.
_MOST_PROMPTS_ON_CPU = 4


class Prompts(NamedTuple):
    """N prompts on one image, in the frame of the model's input (the resized image, in pixels).

    Attributes:
        points: [N, K, 2] XY, or None.
        labels: [N, K], 1 foreground, 0 background, -1 padding; None without points.
        boxes: [N, 4] XYXY, or None.
        masks: [N, 1, 4s, 4s] logits of an earlier prediction, or None.
        extra_tokens: [N, K', C] embeddings appended to the prompt's tokens, or None.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None
    extra_tokens: Tensor | None = None


class _Stamps(NamedTuple):
    """What two modules are at the moment: looked at once per call, for there are many layers to look at."""

    prompt_encoder: object
    mask_decoder: object


class _DecoderInputs(NamedTuple):
    """Image embedding [1, C, h, w], its encoding [1, C, h, w], sparse [N, T, C] and dense [N or 1, C, h, w] prompts."""

    features: Tensor
    pe: Tensor
    sparse: Tensor
    dense: Tensor
    no_masks: bool
    stamps: _Stamps
    cpu: CpuDecoder | None = None  # what decodes them on a CPU; with many tokens, only from the image to masks
    packed: PackedDecoder | None = None  # what decodes them on a GPU
    # What prompts without masks have in common: projections of the image, and the encoding as rows [1, P, C].
    shared: tuple[FirstLayer, Tensor] | None = None

    @property
    def size(self) -> torch.Size:
        """(h, w)."""
        return self.features.shape[-2:]

    def official(self) -> tuple[Tensor, ...]:
        """The arguments of a mask decoder."""
        return self[:4]


class Decoding:
    """The mask decoder of a model in one precision."""

    def __init__(self, model: Sam, precision: str, backend: str) -> None:
        """
        Args: as of `InferenceRuntime`.
        """
        self.model = model
        self.precision = precision
        self.backend = backend  # of operations inside the model, which formats or shapes may rule out
        self._kept = Kept(lambda: model.device)

    # -- stages

    def decode(self, embedding: ImageEmbedding, prompts: Prompts, multimask_output: bool) -> tuple[Tensor, Tensor]:
        """Low-resolution logits [N, M, 4s, 4s] and predicted IoUs [N, M], float32."""
        decoder, stamps = self.model.mask_decoder, self._stamps()
        given = self._packed_chunks(embedding, prompts, stamps)
        if given is not None:
            packed, chunks = given
            return packed.decode(chunks, _chosen(packed.decoder, multimask_output))

        def decode(inputs: _DecoderInputs) -> tuple[Tensor, Tensor]:
            if not _has_stages(decoder):
                return decoder(*inputs.official(), multimask_output=multimask_output)
            chosen = _chosen(decoder, multimask_output)
            mask_tokens, image, iou = self._predict_tokens(inputs)
            return self._masks_from(mask_tokens, image, chosen, inputs), iou[:, chosen.start : chosen.stop]

        parts = self._decode_each(embedding, prompts, stamps, decode)
        low_res, iou = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts, strict=True))
        return low_res.float(), iou.float()

    def decode_filtered(
        self, embedding: ImageEmbedding, prompts: Prompts, iou_threshold: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of three masks per prompt those above the threshold: logits [K, 4s, 4s], predicted IoUs [K], prompts [K].

        The IoU head reads tokens alone, so prompts without such a mask are never upscaled. On a GPU the host launches
        all prompts before it knows how many these are.
        """
        decoder, stamps = self.model.mask_decoder, self._stamps()
        given = self._packed_chunks(embedding, prompts, stamps)
        if given is not None:
            packed, chunks = given
            return packed.decode_filtered(chunks, iou_threshold)
        if not _has_stages(decoder):
            low_res, iou = self.decode(embedding, prompts, multimask_output=True)
            keep = _above(iou, iou_threshold)
            return low_res[keep], iou[keep], keep.nonzero()[:, 0]

        def decode(inputs: _DecoderInputs) -> tuple[Tensor, Tensor]:
            mask_tokens, image, iou = self._predict_tokens(inputs)
            scores = iou[:, 1:].float()
            keep = _above(scores, iou_threshold)
            rows = keep.any(dim=1)
            if not rows.all():  # else there is no need for a copy of the images
                mask_tokens, image = mask_tokens[rows], image[rows]
            logits = self._masks_from(mask_tokens, image, _chosen(decoder, True), inputs)
            return logits[keep[rows]].float(), scores

        logits, scores = map(torch.cat, zip(*self._decode_each(embedding, prompts, stamps, decode), strict=True))
        # How many there are the host knows by now, and need not ask a GPU for.
        prompt, mask = torch.nonzero_static(_above(scores, iou_threshold), size=len(logits)).unbind(1)
        return logits, scores[prompt, mask], prompt

    # -- prompts, a few at a time

    def _stamps(self) -> _Stamps:
        return _Stamps(stamp(self.model.prompt_encoder), stamp(self.model.mask_decoder))

    def _packed_chunks(
        self, embedding: ImageEmbedding, prompts: Prompts, stamps: _Stamps
    ) -> tuple[PackedDecoder, Chunks] | None:
        """The decoder for a GPU, and prompts as it reads them; None where it does not take them."""
        packed = self._packed_decoder(stamps)
        if packed is None or not _has_stages(self.model.mask_decoder):
            return None
        inputs = list(self._decoder_inputs(embedding, prompts, stamps, packed=packed))
        if not self._few_tokens(packed.decoder, inputs[0]):
            return None
        inputs = self._with_shared(embedding, inputs)
        each = ((*self._image_for(packed, some), some.sparse) for some in inputs)
        return packed, Chunks([len(some.sparse) for some in inputs], inputs[0].size, each)

    def _decode_each(
        self,
        embedding: ImageEmbedding,
        prompts: Prompts,
        stamps: _Stamps,
        decode: Callable[[_DecoderInputs], _Made],
    ) -> list[_Made]:
        """What `decode` returns for a few prompts at a time; on a CPU, where it can, for several of these at once."""
        cpu = self._cpu_decoder(stamps)
        with self._decoder_format(cpu):
            inputs = list(self._decoder_inputs(embedding, prompts, stamps, cpu))
            absorbs = self._absorbs(inputs[0])
            if absorbs:
                inputs = self._with_shared(embedding, inputs)
            if not absorbs or torch.is_autocast_enabled("cpu"):  # which is a property of the thread
                return [decode(some) for some in inputs]
            return in_threads(decode, inputs)

    def _with_shared(self, embedding: ImageEmbedding, inputs: list[_DecoderInputs]) -> list[_DecoderInputs]:
        """Inputs with what they share, looked up once and not for every few prompts."""
        encoder, stamp_of_it = self.model.prompt_encoder, inputs[0].stamps.prompt_encoder
        plain = self._kept.of("prompt encoder is plain", lambda: _is_plain(encoder), stamp_of_it)
        if not inputs[0].no_masks or not plain:  # others may say of the image what they like
            return inputs
        shared = self._first_layer(embedding, inputs[0]), self._rows_of_pe(inputs[0])
        return [some._replace(shared=shared) for some in inputs]

    def _packed_decoder(self, stamps: _Stamps) -> PackedDecoder | None:
        """The decoder for a GPU, made anew when a weight changes; None where this one must run as it is."""
        decoder, device_type = self.model.mask_decoder, self.model.device.type
        if not is_packed_on(device_type) or self.backend == "torch" or torch.is_autocast_enabled(device_type):
            return None
        if unavailable_reason("two_way_attention", "triton", device_type) is not None:
            return None

        def pack() -> PackedDecoder | None:
            weights = weight_dtype(decoder)
            dtype = format_beside(resolve_precision(self.precision, self.model.device))
            if weights != torch.float32:
                if self.precision != "auto" or weights not in (torch.bfloat16, torch.float16):
                    return None
                dtype = weights
            return PackedDecoder(decoder, dtype, self.backend) if can_pack_decoder(decoder) else None

        return self._kept.of("packed decoder", pack, self.precision, stamps.mask_decoder)

    def _cpu_decoder(self, stamps: _Stamps) -> CpuDecoder | None:
        """The decoder for a CPU, looked up anew when a weight changes; None where this one must run as it is."""
        decoder = self.model.mask_decoder
        if self.model.device.type != "cpu":
            return None

        def look_up() -> CpuDecoder | None:
            # somebody's subclass may do other things
            plain = type(decoder) is MaskDecoder and is_untouched_throughout(decoder)
            return CpuDecoder(decoder, self.backend, self._pixels_format(decoder)) if plain else None

        return self._kept.of("cpu decoder", look_up, self.precision, stamps.mask_decoder)

    def _pixels_format(self, decoder: MaskDecoder) -> torch.dtype | None:
        """Of a `CpuDecoder`: bfloat16 where that was asked for, or less, and is faster; None for the decoder's own."""
        dtype = resolve_precision(self.precision, self.model.device)
        narrow = dtype in (torch.bfloat16, torch.int8) and native.multiplies_bfloat16() and self.backend != "torch"
        return torch.bfloat16 if narrow and can_narrow_pixels(decoder) else None

    def _decoder_inputs(
        self,
        embedding: ImageEmbedding,
        prompts: Prompts,
        stamps: _Stamps,
        cpu: CpuDecoder | None = None,
        packed: PackedDecoder | None = None,
    ) -> Iterator[_DecoderInputs]:
        """What the mask decoder reads, for a few prompts at a time."""
        embedding.wait()
        model = self.model
        dtype = weight_dtype(model.mask_decoder)
        sparse, dense = self._encode_prompts(prompts, dtype, stamps, graphed=packed is not None)
        features, pe = embedding.features.to(dtype), self._image_pe(stamps)
        step = max(1, len(sparse))
        if packed is not None:
            step = min(MOST_PROMPTS, step)
        elif features.device.type == "cpu":
            step = min(_MOST_PROMPTS_ON_CPU, -(-step // torch.get_num_threads()))
        for start in range(0, max(1, len(sparse)), step):
            some = slice(start, start + step)
            dense_of_some = dense if len(dense) == 1 else dense[some]
            yield _DecoderInputs(features, pe, sparse[some], dense_of_some, prompts.masks is None, stamps, cpu, packed)

    def _encode_prompts(
        self, prompts: Prompts, dtype: torch.dtype, stamps: _Stamps, graphed: bool
    ) -> tuple[Tensor, Tensor]:
        """What the prompt encoder returns; for clicks, whose small operations keep a host busy, by a graph."""
        encoder = self.model.prompt_encoder
        points = None if prompts.points is None else (prompts.points, prompts.labels)
        masks = None if prompts.masks is None else prompts.masks.to(dtype)
        extra = {} if prompts.extra_tokens is None else {"extra_tokens": prompts.extra_tokens.to(dtype)}
        if graphed and prompts.points is not None and prompts.boxes is None and masks is None and not extra:
            assert prompts.labels is not None
            graphs = self._graphs_of_points(stamps)
            if graphs is not None and comes_again(len(prompts.points)):

                def embed(points: Tensor, labels: Tensor) -> tuple[Tensor]:
                    return (encoder(points=(points, labels), boxes=None, masks=None)[0],)

                dense = encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(1, -1, *encoder.image_embedding_size)
                return graphs("points", embed, prompts.points, prompts.labels)[0], dense
        with _places_in_full(self.model.device):
            return encoder(points=points, boxes=prompts.boxes, masks=masks, **extra)

    def _graphs_of_points(self, stamps: _Stamps) -> Graphs | None:
        """Those of the prompt encoder, anew when a weight changes; None where somebody listens to it."""
        encoder = self.model.prompt_encoder

        def make() -> Graphs | None:
            return Graphs(most=32) if _is_plain(encoder) else None  # small ones, of each number of clicks in use

        return self._kept.of("graphs of points", make, stamps.prompt_encoder)

    def _decoder_format(self, cpu: CpuDecoder | None) -> AbstractContextManager:
        """The number format of modules: on a CPU float32, where native operations take the weights as they are."""
        decoder = self.model.mask_decoder
        if cpu is not None and cpu.absorbs and weight_dtype(decoder) == torch.float32:
            return nullcontext()
        return autocast(self.precision, self.model.device, weight_dtype(decoder))

    # -- the ways

    def _predict_tokens(self, inputs: _DecoderInputs) -> tuple[Tensor, Tensor, Tensor]:
        """`MaskDecoder.predict_tokens`, the cheapest way for these prompts."""
        if inputs.cpu is None or not self._absorbs(inputs):
            decoder = self.model.mask_decoder
            assert isinstance(decoder, MaskDecoder)
            return decoder.predict_tokens(*inputs.official())
        mask_tokens, written, iou = inputs.cpu.predict_tokens(*self._image_for(inputs.cpu, inputs), inputs.sparse)
        return mask_tokens, written.transpose(1, 2).unflatten(2, inputs.size), iou

    def _image_for(self, way: PackedDecoder | CpuDecoder, inputs: _DecoderInputs) -> tuple[Tensor | FirstLayer, Tensor]:
        """The image that prompts read, X [N, P, C] or what they share of one, and its encoding [1, P, C]."""
        if inputs.shared is not None:
            return inputs.shared
        image, pe = _pixels(inputs.features + inputs.dense), self._rows_of_pe(inputs)
        if len(image) == len(inputs.sparse):
            return image, pe
        return way.project_first_layer(image, _pixels(inputs.pe)), pe

    def _absorbs(self, inputs: _DecoderInputs) -> bool:
        """Whether the CPU's decoder takes these prompts' tokens."""
        decoder = self.model.mask_decoder
        return inputs.cpu is not None and inputs.cpu.absorbs and self._few_tokens(decoder, inputs)

    def _few_tokens(self, decoder: MaskDecoder, inputs: _DecoderInputs) -> bool:
        """Whether tokens are so few that projecting the image would cost more."""
        return 1 + decoder.num_mask_tokens + inputs.sparse.shape[1] <= MOST_TOKENS

    def _masks_from(self, mask_tokens: Tensor, image: Tensor, chosen: range, inputs: _DecoderInputs) -> Tensor:
        """Upscale images [N, C, h, w] and classify their pixels by the chosen mask tokens: logits [N, M, 4h, 4w]."""
        if inputs.cpu is not None:
            pixels = image.flatten(2).transpose(1, 2)  # as they were
            return inputs.cpu.masks_from(mask_tokens, pixels, image.shape[2:], chosen)
        decoder = self.model.mask_decoder
        assert isinstance(decoder, MaskDecoder)
        return decoder.masks_from(mask_tokens, decoder.upscale(image), chosen)

    # -- what is made once

    def _image_pe(self, stamps: _Stamps) -> Tensor:
        """The positional encoding of the image's tokens; channels last, that `_pixels` copies nothing."""
        encoder = self.model.prompt_encoder

        def encode() -> Tensor:
            with _places_in_full(self.model.device):
                return encoder.get_dense_pe().contiguous(memory_format=torch.channels_last)

        return self._kept.of("image pe", encode, stamps.prompt_encoder)

    def _rows_of_pe(self, inputs: _DecoderInputs) -> Tensor:
        """The encoding as rows [1, P, C], in the format of the packed decoder if there is one."""
        packed = inputs.packed
        if packed is None:
            return _pixels(inputs.pe)
        stamp_of_pe = inputs.stamps.prompt_encoder
        return self._kept.of("packed pe", lambda: _pixels(inputs.pe).to(packed.dtype), stamp_of_pe, packed.dtype)

    def _first_layer(self, embedding: ImageEmbedding, inputs: _DecoderInputs) -> FirstLayer:
        """Projections of an image without mask prompts, kept with it for as long as its features are the same."""
        encoder = self.model.prompt_encoder
        way = inputs.packed or inputs.cpu
        assert way is not None

        def project() -> FirstLayer:
            image = inputs.features + encoder.no_mask_embed.weight.view(1, -1, 1, 1)
            return way.project_first_layer(_pixels(image), _pixels(inputs.pe))

        features, device = embedding.features, embedding.device  # alone: what is kept must not keep the embedding alive
        version = None if features.is_inference() else features._version
        stamps = _Same(features), version, inputs.stamps.mask_decoder, inputs.stamps.prompt_encoder
        autocast_to = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        kept = embedding.cache.setdefault("first layer", Kept(lambda: device))
        return kept.of((way.dtype, autocast_to), project, *stamps)


class _Same:
    """Equal to another one of the very same tensor."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.tensor is self.tensor


def _pixels(image: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, h * w, C], contiguous."""
    return image.flatten(2).transpose(1, 2).contiguous()


def _has_stages(decoder: nn.Module) -> TypeGuard[MaskDecoder]:
    """Whether the stages of a decoder may be called one by one: not of somebody's own, or where somebody listens."""
    if not isinstance(decoder, MaskDecoder) or not is_untouched(decoder):
        return False
    kind = type(decoder)
    return kind.forward is MaskDecoder.forward and kind.predict_masks is MaskDecoder.predict_masks


def _chosen(decoder: MaskDecoder, multimask_output: bool) -> range:
    """Indices of the mask tokens whose masks are returned."""
    return range(1, decoder.num_mask_tokens) if multimask_output else range(1)


def _is_plain(encoder: nn.Module) -> bool:
    """Whether a prompt encoder is the usual one, and nobody listens to it or to its parts."""
    return type(encoder) is PromptEncoder and is_untouched_throughout(encoder)


def _places_in_full(device: torch.device) -> AbstractContextManager:
    """Without autocast: places in bfloat16 are a pixel off."""
    return torch.autocast(device.type, enabled=False)


def _above(scores: Tensor, threshold: float | None) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool) if threshold is None else scores > threshold
