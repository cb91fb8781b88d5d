"""ImageEmbedding: what the image encoder computed for one image, apart from any predictor."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sam_fast.checkpoints import write_tensors
from sam_fast.watch import Derived

FORMAT_VERSION = 1
_SAMPLES_PER_TENSOR = 16


@dataclass(eq=False)
class ImageEmbedding:
    """The image encoder's output for one image, with all that a prompt needs to be answered.

    It may be kept, saved, and used by any number of threads and predictors at once, as long as they hold the model
    that made it.

    Attributes:
        features: [1, C, s, s], the encoder's output.
        original_size: (H, W) of the image, in pixels.
        input_size: (h, w) of the resized image before padding, in pixels.
        image_size: S, the side of the padded square that the encoder saw.
        image_format: channel order the model was given, "RGB" or "BGR".
        fingerprint: identifies the encoder's weights (see `model_fingerprint`).
        metadata: notes of the caller (where the image is, its hash), saved and loaded with the embedding.
        cache: what a runtime derives from the features once per image (10 MB at 1024 px); neither saved nor copied.
    """

    features: torch.Tensor
    original_size: tuple[int, int]
    input_size: tuple[int, int]
    image_size: int
    image_format: str
    fingerprint: str
    metadata: dict[str, str] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict, repr=False)
    _ready: torch.cuda.Event | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.features.is_cuda:
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(self.features.device))

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: no CUDA event, which cannot be copied, and no cache."""
        self.wait()
        return {**self.__dict__, "cache": {}, "_ready": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return self.features.device

    def to(self, device: torch.device | str) -> ImageEmbedding:
        """Return this embedding on `device`, or itself if it is there ("cuda" is any CUDA device)."""
        device = torch.device(device)
        if device == self.device or (device.index is None and device.type == self.device.type):
            return self
        self.wait()
        return ImageEmbedding(
            self.features.to(device),
            self.original_size,
            self.input_size,
            self.image_size,
            self.image_format,
            self.fingerprint,
            dict(self.metadata),
        )

    def wait(self) -> None:
        """Make the current CUDA stream wait until the features are computed; nothing on a CPU, or amid a recording.

        A CUDA graph cannot wait for what happened before its recording.
        """
        if self._ready is not None and not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._ready)
            self.features.record_stream(stream)

    def save(self, path: str | Path) -> None:
        """Write the embedding as a safetensors file that holds the tensor `features` and its sizes as metadata.

        Raises:
            OSError: the file cannot be written.
        """
        metadata = {
            "format": "sam_fast.ImageEmbedding",
            "version": str(FORMAT_VERSION),
            "original_size": json.dumps(self.original_size),
            "input_size": json.dumps(self.input_size),
            "image_size": str(self.image_size),
            "image_format": self.image_format,
            "fingerprint": self.fingerprint,
            "metadata": json.dumps(self.metadata),
        }
        self.wait()
        write_tensors(path, {"features": self.features.detach().contiguous().cpu()}, metadata)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> ImageEmbedding:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not an embedding, is damaged, or has a format version that this release cannot read.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no image embedding at {path}")
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                problem = _format_problem(metadata)
                if problem is None:
                    height, width = json.loads(metadata["original_size"])
                    input_height, input_width = json.loads(metadata["input_size"])
                    return cls(
                        file.get_tensor("features"),
                        (int(height), int(width)),
                        (int(input_height), int(input_width)),
                        int(metadata["image_size"]),
                        metadata["image_format"],
                        metadata["fingerprint"],
                        dict(json.loads(metadata["metadata"])),
                    )
        except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is not a readable image embedding: {error!r}") from error
        raise ValueError(f"{path} {problem}")


def _format_problem(metadata: dict[str, str]) -> str | None:
    """Why a safetensors file with this metadata is no embedding that can be read, or None."""
    if metadata.get("format") != "sam_fast.ImageEmbedding":
        return "is a safetensors file, but not an image embedding of sam_fast"
    if metadata["version"] != str(FORMAT_VERSION):
        return f"has embedding format {metadata['version']}, this release reads {FORMAT_VERSION}"
    return None


_fingerprints = Derived()


def model_fingerprint(encoder: nn.Module) -> str:
    """Return a short hash of an image encoder's weights.

    It covers every tensor's name, shape and about 16 evenly spaced values in float32: it tells trainings apart in
    milliseconds, and does not notice an edit of single values between those. It is remembered until a parameter is
    replaced or changed in place. `torch.compile` does not change it.
    """
    return _fingerprints.of(encoder, "fingerprint", lambda: _fingerprint(_named_weights(encoder)))


def _fingerprint(weights: list[tuple[str, torch.Tensor]]) -> str:
    samples = [torch.zeros(0, device="cpu")]
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = (tensor.dequantize() if tensor.is_quantized else tensor).detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // _SAMPLES_PER_TENSOR)][:_SAMPLES_PER_TENSOR].float())
    digest.update(torch.cat([sample.to(samples[-1].device) for sample in samples]).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _named_weights(encoder: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a state dict, also those that quantised layers keep in tuples."""
    weights = []
    for name, value in encoder.state_dict(keep_vars=True).items():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, torch.Tensor):
                weights.append((name.replace("_orig_mod.", ""), item))
    return weights
