"""Which recordings are kept, and what is copied, where CUDA does nothing; on a GPU, see test_packed_encoder.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from copies import Copies
from oracle import relative_error
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sam_fast import SamPredictor
from sam_fast.embedding import ImageEmbedding
from sam_fast.modeling import Sam
from sam_fast.runtime import decoding, packed_decoder, plain
from sam_fast.runtime.graphs import Function, Graphs, _Recording
from sam_fast.runtime.inference import InferenceRuntime, Prompts

MODES = [torch.inference_mode, torch.no_grad, torch.enable_grad]
TOLERANCE = 1e-5  # of float32: products in another order, see test_gpu_decoder.py
AT_A_TIME = 4  # prompts
LOGITS = 4 * 64 * 64  # bytes of a mask's


class OnCuda(Tensor):
    """A tensor on the CPU that says otherwise."""

    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]


class Nothing:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


@pytest.fixture(autouse=True)
def cuda_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDAGraph", "Event", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    for name in ("graph", "device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


class Replayed(Graphs):
    """Graphs of tensors on the CPU, whose replays compute anew and write over the results of the one before."""

    replays = 0

    def __call__(
        self, key: Any, function: Function, *inputs: Tensor, finish: Function | None = None
    ) -> tuple[Tensor, ...]:
        def on_cpu(*inputs: Tensor) -> tuple[Tensor, ...]:
            return function(*(x.as_subclass(Tensor) for x in inputs))

        return super().__call__(key, on_cpu, *(x.as_subclass(OnCuda) for x in inputs), finish=finish)

    def _record(self, function: Function, inputs: tuple[Tensor, ...]) -> _Recording:
        recording = super()._record(function, inputs)

        class Replay:
            @staticmethod
            def replay() -> None:
                Replayed.replays += 1
                with _disable_current_modes(), torch.inference_mode():  # a replay is in no mode
                    for output, new in zip(recording.outputs, function(*recording.inputs), strict=True):
                        output.copy_(new)

        for output in recording.outputs:
            with torch.inference_mode():
                output.fill_(7)  # a recording computes nothing
        return recording._replace(graph=Replay())  # type: ignore[arg-type]


def double(x: Tensor) -> tuple[Tensor]:
    return (2 * x,)


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("then", MODES)
def test_recordings_serve_all_modes(first, then):
    graphs, x = Graphs(), torch.ones(3).as_subclass(OnCuda)
    with first():
        for _ in range(2):
            graphs("double", double, x)
    assert len(graphs._recordings) == 1
    with then():
        graphs("double", double, x)
    assert len(graphs._recordings) == 1


def test_what_was_used_longest_ago_is_dropped():
    graphs = Graphs(most=3)
    for size in (1, 2, 3, 1, 4):
        for _ in range(2):
            graphs("double", double, torch.ones(size).as_subclass(OnCuda))
    assert [key[2][0] for key in graphs._recordings] == [(3,), (1,), (4,)]


@pytest.mark.parametrize("finish", [None, lambda doubled: (doubled + 1,)], ids=["copied", "finished"])
def test_results_stay_the_callers(finish):
    graphs, copies = Replayed(), Copies(3)
    with copies:
        results = [graphs("double", double, torch.full((3,), float(i)), finish=finish)[0] for i in range(5)]
    assert [float(result[0]) for result in results] == [2 * i + (finish is not None) for i in range(5)]
    # Each of the four replays copies what goes in, and the recording copies it once more.
    assert copies.nbytes == 12 * (5 + (4 if finish is None else 0))


def test_a_finish_that_fails_is_waited_for_too(monkeypatch):
    events = []

    class Event(Nothing):
        def record(self, stream: Any) -> None:
            events.append("record")

    def fails(_: Tensor) -> tuple[Tensor]:
        events.append("finish")
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    graphs, x = Replayed(), torch.ones(3)
    graphs("double", double, x)
    with pytest.raises(torch.OutOfMemoryError):
        graphs("double", double, x, finish=fails)
    assert events == ["finish", "record"]
    assert torch.equal(graphs("double", double, x)[0], 2 * x)


# -- the mask decoder


@pytest.fixture(scope="module")
def embedding(tiny: Sam, photo) -> ImageEmbedding:
    return SamPredictor(tiny, precision="fp32").set_image(photo)


@pytest.fixture(scope="module")
def expected(tiny: Sam, embedding) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """What the plain decoder makes of `clicks`: logits [N, 4, 64, 64] and predicted IoU [N, 4]."""

    @cache
    def predict(count: int, seed: int) -> tuple[Tensor, Tensor]:
        prompts = clicks(count, seed)
        with torch.no_grad():
            sparse, dense = tiny.prompt_encoder((prompts.points, prompts.labels), None, None)
            pe = tiny.prompt_encoder.get_dense_pe()
            return tiny.mask_decoder.predict_masks(embedding.features, pe, sparse, dense)

    return predict


@pytest.fixture
def runtime(tiny: Sam, embedding, monkeypatch: pytest.MonkeyPatch) -> InferenceRuntime:
    """The decoder for GPUs on the CPU, four prompts at a time, by graphs."""
    monkeypatch.setattr(plain, "PACKED_ON", {"cpu"})
    monkeypatch.setattr(decoding, "unavailable_reason", lambda *_: None)
    monkeypatch.setattr(decoding, "MOST_PROMPTS", AT_A_TIME)
    monkeypatch.setattr(packed_decoder, "_GRAPHED", AT_A_TIME)
    monkeypatch.setattr(packed_decoder, "Graphs", Replayed)
    monkeypatch.setattr(Replayed, "replays", 0)
    return InferenceRuntime(tiny, "fp32")


def clicks(count: int, seed: int) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    return Prompts(250 * torch.rand(count, 1, 2, generator=generator), torch.ones(count, 1))


@pytest.mark.parametrize("modes", [(0, 0, 0), (1, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize(("count", "masks"), [(1, 3), (9, 3), (9, 1), (10, 3)])
def test_logits_are_written_where_they_stay(count, masks, modes, runtime, embedding, expected):
    results = []
    for seed, mode in enumerate(modes):
        with MODES[mode](), Copies(64, 64) as copies:
            results.append(runtime.decode(embedding, clicks(count, seed), masks == 3))
        assert copies.nbytes == masks * LOGITS * (count % AT_A_TIME == 1)  # a click's are copied from its graph
    assert Replayed.replays >= len(modes) - 1
    assert len({low_res.data_ptr() for low_res, _ in results}) == len(modes)
    for seed, (low_res, iou) in enumerate(results):  # unchanged by the calls after it
        logits, scores = (x[:, slice(1, 4) if masks == 3 else slice(1)] for x in expected(count, seed))
        assert low_res.shape == logits.shape and relative_error(low_res, logits) <= TOLERANCE
        torch.testing.assert_close(iou.clone(), scores, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_one_graph_serves_all_masks_of_many_prompts(runtime, embedding, expected):
    prompts = clicks(8, 0)
    several, _ = runtime.decode(embedding, prompts, True)
    single, _ = runtime.decode(embedding, prompts, False)
    filtered, _, _ = runtime.decode_filtered(embedding, prompts, None)
    assert Replayed.replays == 5  # of six chunks the first is a plain call
    logits, _ = expected(8, 0)
    for got, wanted in (
        (several, logits[:, 1:]),
        (single, logits[:, :1]),
        (filtered.unflatten(0, (8, 3)), logits[:, 1:]),
    ):
        assert relative_error(got, wanted) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(("count", "share"), [(10, 0.0), (10, 0.1), (10, 0.6), (10, 1.0), (1, 0.0), (1, 0.7), (1, 1.0)])
def test_wanted_masks_are_written_one_after_the_other(share, count, runtime, embedding, expected, monkeypatch):
    """A few of them are copied once, and the room for all is given back."""
    copies, upscale = Copies(64, 64), packed_decoder.upscale_masks
    done: list[str] = []

    def quiet(*arguments: Any, **options: Any) -> Tensor:
        done.append("upscale")
        with copies.paused():  # without Triton the operation has to copy
            return upscale(*arguments, **options)

    class Number(packed_decoder.Number):
        def __init__(self, number: Tensor) -> None:
            done.append("count")
            super().__init__(number)

        def __int__(self) -> int:
            done.append("wait")
            return super().__int__()

    monkeypatch.setattr(packed_decoder, "upscale_masks", quiet)
    monkeypatch.setattr(packed_decoder, "Number", Number)
    results = []
    for seed in range(3):
        logits, scores = (x[:, 1:] for x in expected(count, seed))
        threshold = _between(scores, round(share * scores.numel()))
        done.clear()
        copies.nbytes = 0
        with copies:
            got = runtime.decode_filtered(embedding, clicks(count, seed), threshold)
        chunks = -(-count // AT_A_TIME)
        # The number is on its way before the last prompts are upscaled, and nobody waits before these are launched.
        assert done == ["upscale"] * (chunks - 1) + ["count", "upscale", "wait"]
        keep = torch.ones_like(scores, dtype=torch.bool) if threshold is None else scores > threshold
        few = len(got[0]) < keep.numel() / 4
        assert copies.nbytes == (len(got[0]) * LOGITS if few else 0)
        assert got[0].untyped_storage().nbytes() == LOGITS * (len(got[0]) if few else keep.numel())
        results.append((got, logits[keep], scores[keep], keep.nonzero()[:, 0]))
    for (got, iou, prompt), logits, scores, prompts in results:
        assert torch.equal(prompt, prompts)
        torch.testing.assert_close(iou, scores, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(
            got, logits, rtol=0, atol=TOLERANCE * float(logits.abs().max()) if len(logits) else 0
        )


def _between(scores: Tensor, above: int) -> float | None:
    """A threshold that so many scores are above, or a few more or less, and none is near."""
    if above == scores.numel():
        return None
    ends = torch.cat([scores.flatten(), scores.max()[None] + 1]).sort(descending=True).values
    gaps = ends[:-1] - ends[1:]
    place = above + int(gaps[above : above + 3].argmax())
    assert gaps[place] > 2 * TOLERANCE
    return float(ends[place : place + 2].mean())
