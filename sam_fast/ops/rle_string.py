"""COCO's compressed string of run lengths (format: pycocotools, `common/maskApi.c`).

From the fourth count on, the difference to the count two before it (of the same colour) is stored. A number is written
in digits of five bits, the lowest first; a digit is the character 48 + value, plus 32 if more digits follow, and the
top bit of the last digit is the sign.
"""

from __future__ import annotations

import itertools

import torch

from sam_fast import native
from sam_fast.ops.backend import choose_backend

_MAX_DIGITS = 13  # of a 64-bit number


def compress_runs(counts: torch.Tensor, offsets: torch.Tensor, *, backend: str = "auto") -> list[str]:
    """The strings of the runs counts[offsets[n]:offsets[n+1]].

    Args: as of `encode_strings`.
    """
    return split_strings(*encode_strings(counts, offsets, backend=backend))


def encode_strings(
    counts: torch.Tensor, offsets: torch.Tensor, *, largest: int = 2**63 - 1, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `compress_runs`, with the strings in tensors. Nobody waits for a GPU.

    Args:
        counts: [R] int64, not negative.
        offsets: [N+1] int64, ascending from 0 to R.
        largest: no count is above it.
        backend: "native", "torch" or "auto".

    Returns:
        text: [T] uint8, ASCII, the strings one behind the other, and on a GPU some more memory.
        string_offsets: [N+1] int64, where each string begins and ends.
    """
    if choose_backend("rle", backend, counts, offsets) == "torch":
        ends = offsets.tolist()
        strings = [compress_reference(counts[b:e].tolist()) for b, e in itertools.pairwise(ends)]
        text = torch.tensor(list("".join(strings).encode()), dtype=torch.uint8, device=counts.device)
        return text, torch.tensor([0, *itertools.accumulate(map(len, strings))], device=counts.device)
    string_offsets = torch.empty_like(offsets)
    if native.uses_cuda(counts):
        # A number of b bits and a sign takes ceil((b + 1) / 5) digits.
        text = counts.new_empty(len(counts) * ((largest.bit_length() + 5) // 5), dtype=torch.uint8)
        native.module().rle_strings_cuda(text, string_offsets, counts, offsets, native.cuda_stream(counts))
        return text, string_offsets
    native.module().rle_compressed_offsets(string_offsets, counts, offsets)
    text = torch.empty(int(string_offsets[-1]), dtype=torch.uint8, device="cpu")
    native.module().rle_compress(text, string_offsets, counts, offsets, native.num_threads())
    return text, string_offsets


def split_strings(text: torch.Tensor, string_offsets: torch.Tensor) -> list[str]:
    """The strings that `encode_strings` made."""
    ends = string_offsets.tolist()
    joined = text[: ends[-1]].cpu().numpy().tobytes().decode("ascii")
    return [joined[b:e] for b, e in itertools.pairwise(ends)]


def decompress_runs(text: str | bytes, *, backend: str = "auto") -> torch.Tensor:
    """The run lengths of one string.

    Returns:
        counts: [R] int64.

    Raises:
        TypeError: `text` is neither str nor bytes.
        ValueError: it holds a character outside of the code, ends inside a number, or gives a negative count.
    """
    if not isinstance(text, str | bytes):
        raise TypeError(f"compressed counts must be str or bytes, got {type(text).__name__}")
    data = text.encode() if isinstance(text, str) else text
    if not data:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    if choose_backend("rle", backend) == "torch":
        return torch.tensor(decompress_reference(data), dtype=torch.int64)
    counts = torch.empty(len(data), dtype=torch.int64, device="cpu")
    size = native.module().rle_decompress(counts, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if size < 0:
        raise ValueError(_malformed(data, -1 - size))
    return counts[:size].clone()


def compress_reference(counts: list[int]) -> str:
    """The string of one list of counts, in Python."""
    characters = []
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            digit = rest & 0x1F
            rest >>= 5
            more = rest != (-1 if digit & 0x10 else 0)
            characters.append(chr(48 + digit + 0x20 * more))
    return "".join(characters)


def decompress_reference(data: bytes) -> list[int]:
    """The counts of one string, in Python."""
    counts: list[int] = []
    value = digits = 0
    for at, character in enumerate(data):
        digit = character - 48
        if not 0 <= digit <= 0x3F or digits == _MAX_DIGITS:
            raise ValueError(_malformed(data, at))
        value |= (digit & 0x1F) << (5 * digits)
        digits += 1
        if digit & 0x20:
            continue
        if digit & 0x10:
            value -= 1 << (5 * digits)
        count = value + counts[-2] if len(counts) > 2 else value
        if not 0 <= count < 2**63:
            raise ValueError(_malformed(data, at))
        counts.append(count)
        value = digits = 0
    if digits:
        raise ValueError(_malformed(data, len(data)))
    return counts


def _malformed(data: bytes, at: int) -> str:
    if at == len(data):
        return f"compressed counts end inside a number, after {at} characters"
    return (
        f"compressed counts are malformed at position {at} ({chr(data[at])!r}): "
        "no character of the code, a number of more than 64 bits, or a negative count"
    )
