"""What SamPredictor moves to and from a GPU, and how often the host waits for it: on a stand-in, and on a real GPU."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sam_fast import SamPredictor, native, transfers
from sam_fast.ops.postprocess_masks import PostprocessedMasks
from sam_fast.runtime.inference import Prompts

SIZE = (90, 131)  # a width of odd bits
READS = {"cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "nonzero"}
SINGLE = {"point_coords": np.array([[50.0, 40.0]]), "point_labels": np.array([1])}
PROMPTS: dict[str, dict[str, Any]] = {
    "a click": SINGLE,
    "one mask": {**SINGLE, "multimask_output": False},
    "logits": {**SINGLE, "return_logits": True},
    "boxes": {"box": np.array([[20, 30, 120, 80], [100, 20, 130, 60], [5, 5, 60, 60]])},
    "all": {**SINGLE, "box": np.array([20, 30, 120, 80]), "mask_input": np.ones((1, 64, 64))},
    "no prompts": {"box": np.zeros((0, 4))},
    "nothing": {},
}


class OnGpu(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def onto(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnGpu)


def off(tensor: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor) if isinstance(tensor, OnGpu) else tensor


class Gpu(TorchFunctionMode):
    """Stands in for a GPU and for CUDA's part of PyTorch.

    What is copied without waiting arrives when the host waits for an event; until then there is poison. Pinned memory
    is poisoned as soon as the call is over, as if the next copy had used it.

    Attributes:
        waits: what the host waited for, in order.
        copies, uploads: bytes of each copy to the host, and to the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies: list[int] = []
        self.uploads: list[int] = []
        self._under_way: list[Callable[[], Any]] = []
        self._pinned: list[Tensor] = []

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for memory in self._pinned:
            memory.view(torch.uint8).fill_(0x5A)

    def synchronize(self) -> None:
        self.waits.append("event")
        while self._under_way:
            self._under_way.pop(0)()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        if name in ("empty", "pin_memory"):
            pinned = name == "pin_memory" or kwargs.pop("pin_memory", False)
            memory = args[0].clone() if name == "pin_memory" else func(*args, **kwargs)
            if pinned:
                self._pinned.append(memory if name == "pin_memory" else memory.fill_(0x5A))
            return memory
        target = args[1] if name == "to" and isinstance(args[1], (str, torch.device)) else kwargs.get("device")
        if isinstance(first, OnGpu) and (name in READS or (target is not None and torch.device(target).type == "cpu")):
            self.waits.append(name)
            self.copies.append(args[0].nbytes)
            return func(*map(off, args), **kwargs)
        if name == "copy_" and isinstance(args[1], OnGpu) and not isinstance(args[0], OnGpu):
            return self._copy(args[0], off(args[1]), kwargs.get("non_blocking", False))
        if target is None or torch.device(target).type != "cuda":
            return func(*args, **kwargs)
        if name == "to":
            return args[0] if isinstance(args[0], OnGpu) else self._upload(args[0], kwargs.get("non_blocking", False))
        assert not any(isinstance(x, (np.ndarray, Tensor)) for x in args), f"{name} copies from the host, and waits"
        return onto(func(*args, **{**kwargs, "device": "cpu"}))

    def _copy(self, host: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        self.copies.append(source.nbytes)
        if non_blocking and any(host.data_ptr() == memory.data_ptr() for memory in self._pinned):
            self._under_way.append(lambda: host.copy_(source))
        else:
            self.waits.append("copy_")
            host.copy_(source)
        return host

    def _upload(self, source: Tensor, non_blocking: bool) -> Tensor:
        self.uploads.append(source.nbytes)
        if not (non_blocking and any(source is memory for memory in self._pinned)):
            self.waits.append("to")
        return onto(source.clone())


@pytest.fixture(scope="module")
def ours(tiny, photo) -> SamPredictor:
    predictor = SamPredictor(tiny)
    predictor.set_image(photo[: SIZE[0], : SIZE[1]])
    return predictor


@pytest.fixture
def on_gpu(ours, monkeypatch) -> Callable[..., tuple[Any, Gpu]]:
    """Calls a method of a predictor whose model is on a stand-in for a GPU: the result, and what was moved."""
    moving = threading.local()

    class Event:
        def record(self, stream: Any = None) -> None:
            pass

        def synchronize(self) -> None:
            moving.gpu.synchronize()

    class OnGpuRuntime:
        """The runtime of `ours`, as if it computed on a GPU."""

        def decode(self, embedding: Any, prompts: Prompts, multimask_output: bool) -> tuple[Tensor, ...]:
            assert all(x is None or isinstance(x, OnGpu) for x in prompts)
            with torch._C.DisableTorchFunction():
                plain = Prompts(*(None if x is None else x.as_subclass(Tensor) for x in prompts))
                return tuple(x.as_subclass(OnGpu) for x in ours.runtime.decode(embedding, plain, multimask_output))

        def postprocess(self, embedding: Any, low_res: Tensor) -> PostprocessedMasks:
            with torch._C.DisableTorchFunction():
                got = ours.runtime.postprocess(embedding, low_res.as_subclass(Tensor))
                return PostprocessedMasks(*(x.as_subclass(OnGpu) for x in got))

        def full_size_logits(self, embedding: Any, low_res: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():
                return ours.runtime.full_size_logits(embedding, low_res.as_subclass(Tensor)).as_subclass(OnGpu)

    class OnGpuPredictor(SamPredictor):
        device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]

        def _current(self, embedding: Any) -> Any:
            return embedding or self._embedding

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(native, "cuda_unavailable_reason", lambda: "it is a stand-in")
    there = copy.copy(ours)
    there.__class__ = OnGpuPredictor
    there.runtime = OnGpuRuntime()  # type: ignore[assignment]

    def call(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Gpu]:
        with Gpu() as moving.gpu:
            result = getattr(there, name)(*args, **kwargs)
        return result, moving.gpu

    return call


def assert_same(got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert type(a) is type(b) is np.ndarray and a.dtype == b.dtype and a.flags.writeable
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kwargs", PROMPTS.values(), ids=PROMPTS.keys())
def test_results_come_in_one_copy_and_are_waited_for_once(kwargs, ours, on_gpu):
    got, gpu = on_gpu("predict", **kwargs)
    assert gpu.waits == ["event"] and len(gpu.copies) == 1
    expected = ours.predict(**kwargs)
    assert_same(got, expected)
    masks, iou, low_res = expected
    pixels = masks.size if masks.dtype != bool else masks.size // SIZE[1] * 3  # of 131 bits, three words of 8 bytes
    assert gpu.copies == [(4 if masks.dtype != bool else 8) * pixels + iou.nbytes + low_res.nbytes]
    assert len(gpu.uploads) == 2 * ("point_coords" in kwargs) + ("box" in kwargs) + ("mask_input" in kwargs)


def test_results_are_the_callers_own(ours, on_gpu):
    first, _ = on_gpu("predict", **SINGLE)
    kept = [a.copy() for a in first]
    on_gpu("predict", np.array([[9.0, 80.0]]), np.array([0]))
    assert_same(first, tuple(kept))
    for i, one in enumerate(first):
        assert not any(np.shares_memory(one, other) for other in first[i + 1 :])
        one[...] = 0
    assert_same(on_gpu("predict", **SINGLE)[0], tuple(kept))


def test_threads_do_not_disturb_each_other(ours, on_gpu):
    points = [np.array([[10.0 * i + 5, 7.0 * i + 3]]) for i in range(8)]

    def work(i: int) -> list[Any]:
        return [on_gpu("predict", points[i], np.array([1])) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(work, range(8)))
    for i in range(8):
        expected = ours.predict(points[i], np.array([1]))
        for result, gpu in got[i]:
            assert_same(result, expected)
            assert gpu.waits == ["event"]


def test_ragged_prompts_come_together(ours, on_gpu):
    points = [np.array([[40.0, 50.0]]), np.array([[100.0, 9.0], [20.0, 70.0]]), np.array([[10.0, 10.0]])]
    labels = [np.array([1]), np.array([1, 0]), np.array([0])]
    arguments = {"embeddings": [ours._embedding]}
    got, gpu = on_gpu("predict_batch", [points], [labels], **arguments)
    assert gpu.waits == ["event"] and len(gpu.copies) == 1
    assert_same(tuple(x[0] for x in got), tuple(x[0] for x in ours.predict_batch([points], [labels], **arguments)))


def test_tensors_stay_on_the_gpu(ours, on_gpu):
    coords, labels = torch.tensor([[[50.0, 40.0]]]), torch.ones(1, 1)
    expected = ours.predict_torch(coords, labels)
    got, gpu = on_gpu("predict_torch", onto(coords), onto(labels))
    assert not gpu.waits and not gpu.copies and not gpu.uploads
    for a, b in zip(got, expected, strict=True):
        assert isinstance(a, OnGpu) and torch.equal(off(a), b)


@pytest.mark.parametrize("most", [2**11, 0])
def test_more_than_fits_is_not_pinned(most, ours, on_gpu, monkeypatch):
    """PyTorch keeps pinned memory for as long as the process lives."""
    monkeypatch.setattr(transfers, "_MOST_PINNED", most)
    got, gpu = on_gpu("predict", **SINGLE)
    assert gpu.waits == (["cpu"] * 3 if most else ["to"] * 2 + ["cpu"] * 3) and not gpu._pinned[2:]
    assert_same(got, ours.predict(**SINGLE))


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_somebodys_own_masks(device, ours, on_gpu, monkeypatch):
    """They may lie anywhere, and are copied as they are."""
    made = torch.linspace(-1, 1, 3 * 90 * 131).view(1, 3, 90, 131)
    place = onto if device == "gpu" else off
    expected = ours.predict(**SINGLE)
    monkeypatch.setitem(ours.model.__dict__, "postprocess_masks", lambda *_: place(made))
    for options in ({}, {"return_logits": True}):
        (masks, iou, low_res), gpu = on_gpu("predict", **SINGLE, **options)
        assert gpu.waits == (["event"] if device == "gpu" else ["cpu"] * 2)
        np.testing.assert_array_equal(masks, made[0] if options else made[0] > 0)
        assert_same((iou, low_res), expected[1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["a click", "one mask", "logits", "boxes", "all"])
def test_pytorch_knows_of_no_wait(kind, tiny, photo):
    """It raises at copies that wait; of the event that `predict` waits for it does not know."""
    there = SamPredictor(copy.deepcopy(tiny).cuda())
    there.set_image(photo)
    expected = [there.predict(**PROMPTS[kind]) for _ in range(3)][-1]  # compiled, then recorded
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks, iou, low_res = there.predict(**PROMPTS[kind])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert masks.dtype == expected[0].dtype and np.mean((masks > 0) != (expected[0] > 0)) <= 1e-4
    for a, b in zip((iou, low_res), expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
