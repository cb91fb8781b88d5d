"""What only a real GPU shows of the native operations: streams, waiting, graphs, devices."""

from __future__ import annotations

import pytest
import torch

from sam_fast import native
from sam_fast.ops.backend import choose_backend
from sam_fast.ops.connected_components import connected_components, remove_small_regions
from sam_fast.ops.nms import nms
from sam_fast.ops.packed_masks import pack_masks, unpack_masks
from sam_fast.ops.postprocess_masks import postprocess_masks, resize_logits
from sam_fast.ops.rle import encode_coco_rle, encode_runs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SIZES = ((256, 171), (300, 200), 256)
# name -> (operation on logits [N, 64, 64], whether it returns without waiting for the GPU)
OPERATIONS = {
    "postprocess_masks": (lambda x: postprocess_masks(x, *SIZES, backend="native"), True),
    "resize_logits": (lambda x: (resize_logits(x, *SIZES, backend="native"),), True),
    "pack_masks": (lambda x: (pack_masks(x > 0, backend="native"),), True),
    "unpack_masks": (lambda x: (unpack_masks((x.abs() * 16).to(torch.uint8)[..., :8], 61, backend="native"),), True),
    "connected_components": (lambda x: connected_components(pack_masks(x > 0), 64, backend="native"), True),
    "remove_small_regions": (lambda x: remove_small_regions(pack_masks(x > 0), 64, 9, "holes", backend="native"), True),
    "nms": (lambda x: (nms(x[:, :4, 0] * 9, x[:, 0, 0].contiguous(), 0.1, backend="native"),), False),
    "encode_runs": (lambda x: encode_runs(pack_masks(x > 0), 64, backend="native"), False),
}


def make_logits() -> torch.Tensor:
    coarse = torch.randn(5, 1, 9, 9, generator=torch.Generator().manual_seed(0)) * 8
    return torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic")[:, 0].cuda()


def assert_same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", OPERATIONS)
def test_runs_on_the_current_stream(name):
    operation, _ = OPERATIONS[name]
    values = make_logits()
    expected = operation(values)
    late = torch.zeros_like(values)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(values)
        got = operation(late)
    side.synchronize()
    assert_same(got, expected)


@pytest.mark.parametrize("name", [name for name, (_, asynchronous) in OPERATIONS.items() if asynchronous])
def test_waits_for_nothing_and_can_be_captured(name):
    operation, _ = OPERATIONS[name]
    values = make_logits()
    expected = [tensor.clone() for tensor in operation(values)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        operation(values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static = torch.zeros_like(values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = operation(static)
    static.copy_(values)
    graph.replay()
    assert_same(got, expected)


def test_is_the_first_choice():
    for operation in ("postprocess_masks", "packed_masks", "nms", "rle", "connected_components"):
        assert choose_backend(operation, "auto", torch.zeros(1, device="cuda")) == "native"


def test_refuses_mixed_devices():
    logits, output = torch.zeros(1, 8, 8, device="cuda"), torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match="output is on the CPU, but logits is on device 0"):
        native.module().resize_logits_cuda(output, logits, (8, 8), (4, 4), 8, 0)
    with pytest.raises(ValueError, match="tensors are on different devices"):
        nms(torch.zeros(1, 4, device="cuda"), torch.zeros(1), 0.5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_the_tensors_are():
    values = make_logits()
    for name, (operation, _) in OPERATIONS.items():
        got = operation(values.to("cuda:1"))
        assert all(tensor.device.index == 1 for tensor in got), name
        assert_same([tensor.to("cuda:0") for tensor in got], operation(values))
    assert torch.cuda.current_device() == 0


def test_large_masks_equal_the_cpu():
    """The sizes that the emulated GPU is too slow for: masks of photographs, hundreds of them."""
    logits = make_logits().repeat(40, 4, 4) + 0.1 * torch.randn(200, 256, 256, device="cuda")
    sizes = ((683, 1024), (1200, 1800), 1024)
    ours = postprocess_masks(logits, *sizes, backend="native")
    theirs = postprocess_masks(logits.cpu(), *sizes, backend="native")
    if native.cpu_level() != "base":  # which does not fuse products and sums
        assert_same([tensor.cpu() for tensor in ours], theirs)
    bits, host = ours.bits[:20], ours.bits[:20].cpu()
    assert encode_coco_rle(bits, 1800, backend="native") == encode_coco_rle(host, 1800, backend="native")
    for mode in ("holes", "islands"):
        cleaned = remove_small_regions(bits, 1800, 100, mode, backend="native")
        assert_same([tensor.cpu() for tensor in cleaned], remove_small_regions(host, 1800, 100, mode, backend="native"))
    labels = connected_components(bits, 1800, backend="native")
    assert_same([tensor.cpu() for tensor in labels], connected_components(host, 1800, backend="native"))
