"""What is kept, and that its memory outlasts the work of every stream, where CUDA does nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import TINY
from torch import Tensor, nn

from sam_fast.build_sam import build_sam_from_config
from sam_fast.runtime.kept import Kept, _tensors_in
from sam_fast.runtime.packed_decoder import PackedDecoder
from sam_fast.runtime.packed_encoder import PackedEncoder

GPU = torch.device("cuda", 0)


class Stream:
    device = GPU

    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.waits = 0

    def wait_event(self, event: Any) -> None:
        self.waits += 1


class Event:
    def record(self, stream: Stream) -> None:
        pass


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """Streams, of which the last one is the current one; and what is recorded for them is counted by `recorded`."""
    made = [Stream(1)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: made[-1])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(data_ptr, stream) of each call of `Tensor.record_stream`."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(
        Tensor, "record_stream", lambda self, stream: calls.append((self.data_ptr(), stream.cuda_stream))
    )
    return calls


def test_a_value_is_made_again_when_what_it_was_made_for_changes():
    kept, made = Kept(lambda: torch.device("cpu")), []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    found = [kept.of("one", make, *stamps) for stamps in ((1, "a"), (1, "a"), (2, "a"), (2, "a"), (1, "a"))]
    assert found == [0, 0, 1, 1, 2], "only the last one is kept"
    assert kept.of("another", make, 1, "a") == 3 and kept.of("one", make, 1, "a") == 2


def test_tensors_of_all_kinds_of_holders_are_found():
    one, two, three, four = (torch.zeros(size) for size in range(1, 5))
    module = nn.BatchNorm1d(2)
    found = list(_tensors_in([one, (two, {"a": three, "b": [four, one]}), module, "text", None], set()))
    sizes = sorted(tensor.numel() for tensor in found)
    assert sizes == sorted([1, 2, 3, 4, 2, 2, 2, 2, 1]), (
        "each once; weight, bias, mean, variance and count of the module"
    )


@pytest.mark.parametrize("part", ["image_encoder", "mask_decoder"])
def test_packed_weights_outlast_other_streams(part, streams, recorded):
    """Their memory belongs to the stream that packed them; any other one is told of, once."""
    model = copy.deepcopy(build_sam_from_config(TINY)).eval()
    pack = {
        "image_encoder": lambda: PackedEncoder(model.image_encoder, torch.bfloat16),
        "mask_decoder": lambda: PackedDecoder(model.mask_decoder, torch.bfloat16, "torch"),
    }[part]
    kept = Kept(lambda: GPU)
    packed = kept.of("packed", pack, 1)
    kept.of("packed", pack, 1)
    assert not recorded, "the stream that made it"
    streams.append(Stream(2))
    assert kept.of("packed", pack, 1) is packed
    once = list(recorded)
    assert kept.of("packed", pack, 1) is packed
    assert recorded == once and {stream for _, stream in recorded} == {2} and streams[-1].waits == 2
    held = {address for address, _ in recorded}
    own = {
        "image_encoder": lambda: [packed.neck1, packed.neck2],
        "mask_decoder": lambda: [packed._output_tokens, *packed.upscaling[:3], packed.decoder.iou_token.weight],
    }[part]()
    assert {tensor.data_ptr() for tensor in own} <= held
    assert len(held) > 20
