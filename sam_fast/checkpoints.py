"""Weights: official `.pth` files and their download, safetensors, and Hugging Face `SamModel` checkpoints."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sam_fast.modeling import Sam
from sam_fast.modeling.image_encoder import Block, ImageEncoderViT
from sam_fast.modeling.positions import resize_absolute_positions, resize_relative_positions

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

# The end of each name is the beginning of the file's SHA-256.
OFFICIAL_FILES = {
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_h": "sam_vit_h_4b8939.pth",
}
OFFICIAL_URL = "https://dl.fbaipublicfiles.com/segment_anything/"

_DIRECTORY_FILES = ("model.safetensors", "pytorch_model.bin")  # what Hugging Face calls them
_NAMES_SHOWN = 5  # of missing, unexpected or misshapen keys, in an error
_CHUNK = 1 << 20  # bytes

_Path = str | os.PathLike[str]


def load_checkpoint(model: Sam, path: _Path) -> None:
    """Load the weights of a file into a `Sam`, converting names, dtype and the size of positions.

    Absolute positions and the relative positions of global blocks are interpolated where the checkpoint was made for
    another image size. Parameters on the meta device are replaced by tensors on the device of the model.

    Args:
        model: the model to fill.
        path: an official `.pth`, a `.safetensors`, a Hugging Face file, or a directory with one of
            `model.safetensors` and `pytorch_model.bin`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a readable checkpoint, or not one of this architecture; names the file and the keys.
    """
    path = checkpoint_file(path)
    state = resize_positions(model, read_state_dict(path))
    expected = model.state_dict()
    _check_state(path, state, expected)
    on_meta = any(tensor.is_meta for tensor in expected.values())
    if on_meta:  # the tensors become the parameters: take copies, for they may be a view of the mapped file
        device = torch.device("cpu") if model.device.type == "meta" else model.device
        state = {name: state[name].to(device, expected[name].dtype, copy=True) for name in expected}
    model.load_state_dict(state, assign=on_meta)


def read_state_dict(path: _Path) -> dict[str, Tensor]:
    """Read a checkpoint as tensors under the official names, without running any code in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a readable checkpoint.
    """
    path = checkpoint_file(path)
    with open(path, "rb") as file:
        head = file.read(9)
    if not head:
        raise ValueError(f"{path} is empty, not a checkpoint")
    try:
        state: Any
        if head[8:] == b"{":  # a safetensors file: length of the header in 8 bytes, then JSON
            state = safetensors.torch.load_file(path)
        else:  # mapping needs PyTorch's zip format; files from before version 1.6 lack it
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=head[:4] == b"PK\x03\x04")
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is not a readable checkpoint (truncated, damaged, or with other objects than tensors): {reason}"
        ) from error
    for wrapper in ("model", "state_dict"):  # as training scripts save it
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a non-empty dictionary of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} holds a {type(value).__name__} under {name!r}, expected only tensors")
    return convert_hugging_face(state) if is_hugging_face(state) else dict(state)


def save_checkpoint(model: Sam, path: _Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the weights of a model as safetensors under the official names.

    Args:
        model: what to save.
        path: of the file; its folder must exist.
        dtype: number format of the floating-point tensors in the file; that of the model by default.

    Raises:
        OSError: the file cannot be written.
    """
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }
    write_tensors(path, state)


def write_tensors(path: _Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any new file; safetensors 0.8 lets its owner alone read it.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    new = not path.exists()
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except SafetensorError as error:
        if new:
            path.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from error
    path.chmod(mode)


def checkpoint_file(path: _Path) -> Path:
    """The file that `path` means: itself, or the one of Hugging Face's names that a directory holds.

    Raises:
        FileNotFoundError: neither is there.
    """
    path = Path(path)
    if path.is_dir():
        for name in _DIRECTORY_FILES:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"the directory {path} holds none of {', '.join(_DIRECTORY_FILES)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    return path


def resize_positions(model: Sam, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Interpolate the positions in `state` to the image size of `model`; other tensors are passed on.

    So are all tensors of an image encoder other than `ImageEncoderViT`.
    """
    encoder = model.image_encoder
    state = dict(state)
    if not isinstance(encoder, ImageEncoderViT):
        return state
    name = "image_encoder.pos_embed"
    if encoder.pos_embed is not None and name in state and _differ_in_size(state[name], encoder.pos_embed, (1, 2)):
        height, width = encoder.pos_embed.shape[1:3]
        state[name] = resize_absolute_positions(state[name].float(), (height, width))
    for index, block in enumerate(encoder.blocks):
        assert isinstance(block, Block)
        if block.window_size or not block.attn.use_rel_pos:
            continue
        for axis in ("rel_pos_h", "rel_pos_w"):
            name, expected = f"image_encoder.blocks.{index}.attn.{axis}", getattr(block.attn, axis)
            if name in state and _differ_in_size(state[name], expected, (0,)):
                state[name] = resize_relative_positions(state[name].float(), expected.shape[0])
    return state


def _differ_in_size(tensor: Tensor, expected: Tensor, dims: tuple[int, ...]) -> bool:
    """Whether two shapes differ, and only in `dims`."""
    if tensor.dim() != expected.dim() or tensor.numel() == 0:
        return False
    different = [dim for dim in range(tensor.dim()) if tensor.shape[dim] != expected.shape[dim]]
    return bool(different) and set(different) <= set(dims)


def _check_state(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = [
        _shorten(what, names)
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if names
    ]
    if problems:
        other = _model_type_of(state)
        hint = "" if other is None or other == _model_type_of(expected) else f": it is of {other}"
        raise ValueError(f"{path} does not fit this model{hint}; {'; '.join(problems)}")


def _model_type_of(state: Mapping[str, Tensor]) -> str | None:
    """The model of the registry whose image encoder has as many blocks and channels; None if none has."""
    from sam_fast.build_sam import model_configs  # which imports this module

    norms = [
        tensor for name, tensor in state.items() if re.fullmatch(r"image_encoder\.blocks\.\d+\.norm1\.weight", name)
    ]
    for name, config in model_configs.items():
        if len(norms) == config.depth and all(norm.shape == (config.embed_dim,) for norm in norms):
            return name
    return None


def _shorten(what: str, names: list[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return f"{what}: {', '.join(names[:_NAMES_SHOWN])}" + (f" and {rest} more" if rest > 0 else "")


# Names of Hugging Face's SamModel, and ours; applied in this order to every key.
_HUGGING_FACE_NAMES = [
    (r"^shared_image_embedding\.positional_embedding$", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^vision_encoder\.layers\.(\d+)\.layer_norm([12])\.", r"image_encoder.blocks.\1.norm\2."),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^mask_decoder\.transformer\.layers\.(\d+)\.layer_norm(\d)\.", r"mask_decoder.transformer.layers.\1.norm\2."),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    # The three layers of each head; the middle one before the first, which takes its name.
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.0\.", r"\1.layers.1."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.proj_in\.", r"\1.layers.0."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.proj_out\.", r"\1.layers.2."),
]
_HUGGING_FACE_COPY = "prompt_encoder.shared_embedding.positional_embedding"  # of shared_image_embedding


def is_hugging_face(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of Hugging Face's `SamModel`."""
    return any(name.startswith("vision_encoder.") for name in state)


def convert_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of Hugging Face's `SamModel` to the official ones; unknown keys are kept as they are."""
    converted = {}
    for name, tensor in state.items():
        if name == _HUGGING_FACE_COPY:
            continue
        for pattern, replacement in _HUGGING_FACE_NAMES:
            name, hits = re.subn(pattern, replacement, name)
            if hits:
                break
        converted[name] = tensor
    return converted


def default_directory() -> Path:
    """Where downloaded checkpoints are kept: `sam_fast` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "sam_fast"


def download_checkpoint(
    model_type: str,
    directory: _Path | None = None,
    base_url: str = OFFICIAL_URL,
    progress: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Download an official checkpoint, or find that it is there, and check its SHA-256.

    The file grows under a name that ends in `.part`, and an interrupted download goes on where it stopped. Of several
    calls at a time, also in other processes, one downloads and the others wait (not on Windows).

    Args:
        model_type: vit_b, vit_l or vit_h.
        directory: where to keep it; `default_directory()` if missing.
        base_url: what the file's name is appended to.
        progress: called with the bytes that are there and their final number (None where the server does not say).

    Returns:
        path of the complete, checked file.

    Raises:
        ValueError: unknown model type.
        RuntimeError: the server refused, the connection broke (call again to go on), or the hash is wrong.
    """
    if model_type not in OFFICIAL_FILES:
        raise ValueError(f"model_type must be one of {', '.join(OFFICIAL_FILES)}, got {model_type!r}")
    name = OFFICIAL_FILES[model_type]
    target = Path(directory) / name if directory is not None else default_directory() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.with_name(name + ".lock")):
            if not target.exists():
                _download(base_url.rstrip("/") + "/" + name, target, progress)
                return target
    _check_hash(target, "delete it to download it again")
    return target


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other holds the file `lock`, and hold it; it exists only so long."""
    if fcntl is None:
        yield
        return
    while True:
        with open(lock, "ab") as file:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(lock, file):  # its last holder removed it
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether `file` is what now lies at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _download(url: str, target: Path, progress: Callable[[int, int | None], None] | None) -> None:
    """Download or complete `target`, and check it before it gets its name."""
    part = target.with_name(target.name + ".part")
    try:
        _fetch(url, part, progress)
    except (OSError, HTTPException) as error:  # urllib's errors are OSErrors
        raise RuntimeError(f"could not download {url}: {error}") from error
    try:
        _check_hash(part, "it is deleted, the next call begins anew", target.name)
    except RuntimeError:
        part.unlink()
        raise
    part.replace(target)


def _fetch(url: str, part: Path, progress: Callable[[int, int | None], None] | None) -> None:
    """Append to `part` what it lacks of `url`; a server that ignores the range sends, and we write, all of it."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:
            raise
        if error.headers.get("Content-Range") == f"bytes */{done}":  # nothing is lacking
            return
        part.unlink()
        return _fetch(url, part, progress)
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            raise OSError(f"asked for the bytes from {done} on, got {response.headers.get('Content-Range')!r}")
        done = done if resumed else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length is not None else None
        with open(part, "ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
    if total is not None and done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes; call again to go on from there")


def _check_hash(path: Path, advice: str, name: str | None = None) -> None:
    """Raise RuntimeError unless the SHA-256 of `path` begins as its official `name` says."""
    expected = Path(name or path.name).stem.rpartition("_")[2]
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if not digest.hexdigest().startswith(expected):
        raise RuntimeError(
            f"the SHA-256 of {path} is {digest.hexdigest()}, expected it to begin with {expected}; {advice}"
        )
