"""Options about the model that several commands share, and what they lead to: a Sam on a device."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sam_fast.modeling import Sam


class Precision(str, Enum):
    """Number formats of inference."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp8 = "fp8"
    int8 = "int8"


class Backend(str, Enum):
    """Implementations of the operations."""

    auto = "auto"
    native = "native"
    torch = "torch"


ModelType = Annotated[str, typer.Option("--model-type", help="nano, vit_b, vit_l, vit_h or default (= vit_h).")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Weights of that model: .pth, .safetensors, or a Hugging Face folder.",
        show_default="nano's are in the package",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="Where to run, such as cpu or cuda:1.", show_default="cuda if there is one, else cpu"
    ),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        "--precision",
        help="Number format; auto is bf16 on GPUs that have it, else fp32; fp8 is for GPUs, int8 for CPUs.",
    ),
]
BackendOption = Annotated[
    Backend, typer.Option("--backend", help="Implementation of the operations; see `sam-fast doctor`.")
]


def choose_device(requested: str | None) -> str:
    """Return `requested`, or the best device of this machine.

    Raises:
        ValueError: the name is not one of a device.
        RuntimeError: that device is not here.
    """
    import torch

    if requested is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise ValueError(f"--device must be like cpu, cuda or cuda:1, got {requested!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"--device {requested}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA device(s); "
            "`sam-fast doctor` says why"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # in all these ways PyTorch says that it lacks one
        raise RuntimeError(f"--device {requested}: {str(error).splitlines()[0]}") from error
    return requested


def load_model(model_type: str, checkpoint: Path | None, device: str) -> Sam:
    """Build a model of the registry in eval mode on `device`; without a checkpoint its weights are random.

    Raises:
        ValueError: the registry has no such model, or the checkpoint does not fit it.
        FileNotFoundError: there is no such checkpoint.
    """
    from sam_fast import sam_model_registry

    if model_type not in sam_model_registry:
        raise ValueError(f"--model-type must be one of {', '.join(sorted(sam_model_registry))}, got {model_type!r}")
    if checkpoint is not None and not checkpoint.exists():
        raise FileNotFoundError(
            f"no checkpoint at {checkpoint}; `sam-fast download vit_b` (or vit_l, vit_h) fetches the official one"
        )
    model = sam_model_registry[model_type](checkpoint=None if checkpoint is None else str(checkpoint))
    return model.to(device=device).eval()


def load_trained_model(model_type: str, checkpoint: Path | None, device: str) -> Sam:
    """`load_model`, of which only nano's weights need not be given.

    Raises:
        ValueError: as there, or weights are missing.
        FileNotFoundError: there is no such checkpoint.
    """
    from sam_fast import sam_model_registry

    if checkpoint is None and model_type != "nano" and model_type in sam_model_registry:
        raise ValueError(f"--model-type {model_type} needs --checkpoint: only nano's weights are in the package")
    return load_model(model_type, checkpoint, device)
