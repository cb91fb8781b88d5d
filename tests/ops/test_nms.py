"""Non-maximum suppression: every backend against the rule, written out in numpy."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sam_fast.ops import nms as nms_module
from sam_fast.ops.nms import nms

BACKENDS = ["native", "torch"]
INF, NAN = math.inf, math.nan


def nms_by_the_rule(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> list[int]:
    """Compare each box with all that were kept before it, in float32; with the threshold in float64."""
    box, score = boxes.numpy(), scores.tolist()
    order = sorted(range(len(box)), key=lambda i: (math.isnan(score[i]), 0 if math.isnan(score[i]) else -score[i]))
    kept: list[int] = []
    with np.errstate(all="ignore"):
        area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
        for j in order:
            sides = np.minimum(box[kept, 2:], box[j, 2:]) - np.maximum(box[kept, :2], box[j, :2])
            sides = np.maximum(sides, np.float32(0))
            inter = sides[:, 0] * sides[:, 1]
            iou = inter / (area[kept] + area[j] - inter)
            if not (iou.astype(np.float64) > iou_threshold).any():
                kept.append(j)
    return kept


def random_boxes(n: int, seed: int = 0, extent: float = 100.0, side: float = 40.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * extent
    size = torch.rand(n, 2, generator=generator) * side
    return torch.cat([corner, corner + size], dim=1), torch.rand(n, generator=generator)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty in the operation returns indices that are far out of range, so that an unwritten one shows."""

    def empty(n, **options):
        return torch.full((n,), -(2**60), **options)

    class PoisonedTorch:
        def __getattr__(self, name):
            return empty if name == "empty" else getattr(torch, name)

    monkeypatch.setattr(nms_module, "torch", PoisonedTorch())


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.7, 1.0, -0.5])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 64, 257])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_rule(backend, n, threshold, poisoned_empty):
    boxes, scores = random_boxes(n, seed=n)
    kept = nms(boxes, scores, threshold, backend=backend)
    assert kept.dtype == torch.int64
    assert kept.tolist() == nms_by_the_rule(boxes, scores, threshold)


@pytest.mark.parametrize(("side", "threshold"), [(600.0, 0.3), (600.0, 0.7), (30.0, 0.7)])
def test_3072_boxes_equal_the_rule(side, threshold):
    boxes, scores = random_boxes(3072, extent=1000.0, side=side)
    boxes, scores = boxes.round(), (scores * 500).round() / 500  # whole pixels, and about six boxes to a score
    kept = nms(boxes, scores, threshold, backend="native")
    assert 300 < len(kept) < 3072
    assert torch.equal(kept, nms(boxes, scores, threshold, backend="torch"))
    assert kept.tolist() == nms_by_the_rule(boxes, scores, threshold)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_by_index_and_nan_goes_last(backend):
    apart = torch.arange(8.0)[:, None] * 10 + torch.tensor([0.0, 0.0, 5.0, 5.0])
    scores = torch.tensor([NAN, 0.0, 1.0, -0.0, -INF, 1.0, NAN, INF])
    assert nms(apart, scores, 0.5, backend=backend).tolist() == [7, 2, 5, 1, 3, 4, 0, 6]
    same = torch.tensor([[0.0, 0.0, 5.0, 5.0]]).expand(8, 4)
    assert nms(same, scores, 0.5, backend=backend).tolist() == [7]
    assert nms(same[:3], torch.tensor([NAN, 1.0, 1.0]), 0.5, backend=backend).tolist() == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold_is_exclusive_and_compared_in_double(backend):
    boxes = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0], [20.0, 0.0, 30.0, 10.0], [20.0, 0.0, 30.0, 1.0]]
    )
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert nms(boxes, scores, 0.5, backend=backend).tolist() == [0, 1, 2, 3]  # IoU 0.5 is not above 0.5
    assert nms(boxes, scores, 0.4999, backend=backend).tolist() == [0, 2, 3]
    # float32(0.1) is above 0.1, so the fourth box is dropped; compared in float32 it would stay.
    assert nms(boxes[2:], scores[2:], 0.1, backend=backend).tolist() == [0]
    assert nms(boxes[2:], scores[2:], float(np.float32(0.1)), backend=backend).tolist() == [0, 1]


DEGENERATE = {
    "points": [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 4, 4]],  # 0 / 0
    "lines": [[0, 1, 9, 1], [0, 1, 9, 1], [0, 0, 9, 9]],
    "inverted": [[9, 9, 0, 0], [0, 0, 9, 9], [9, 0, 0, 9], [9, 9, 0, 0]],
    "negative_area_around": [[5, 0, 1, 9], [0, 0, 9, 9], [1, 2, 5, 4]],
    "zero_union": [[0, 0, 2, 2], [0, 0, 2, 2], [4, 0, 0, 1], [0, 1, 1, 3]],
    "infinite": [[-INF, 0, INF, 1], [0, 0, 1, 1], [0, 0, INF, INF], [-INF, -INF, INF, INF], [INF, INF, INF, INF]],
    "nan": [[NAN, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, NAN], [0, 0, 1, 1]],
    "huge": [[-3e38, -3e38, 3e38, 3e38], [0, 0, 1e30, 1e30], [0, 0, 1e30, 1e30]],
    "tiny": [[0, 0, 1e-23, 1e-22], [0, 0, 1e-23, 1e-22], [0, 0, 1e-23, 6e-23]],
}


@pytest.mark.parametrize("threshold", [0.0, 0.5, -0.5])
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_boxes_follow_the_formula(backend, name, threshold):
    boxes = torch.tensor(DEGENERATE[name], dtype=torch.float32)
    scores = torch.linspace(1, 0, len(boxes))
    assert nms(boxes, scores, threshold, backend=backend).tolist() == nms_by_the_rule(boxes, scores, threshold)


def test_gpu_equals_the_rule(gpu, poisoned_memory):
    for threshold in (0.0, 0.5, 0.7, 1.0, -0.5, 1e-50, -1e-50):
        for n in (0, 1, 2, 63, 64, 65, 257):
            boxes, scores = random_boxes(n, seed=n)
            kept = nms(boxes.to(gpu), scores.to(gpu), threshold, backend="native")
            assert kept.dtype == torch.int64 and kept.device.type == gpu.type
            assert kept.tolist() == nms_by_the_rule(boxes, scores, threshold), (n, threshold)
        for name, corners in DEGENERATE.items():
            boxes = torch.tensor(corners, dtype=torch.float32)
            scores = torch.linspace(1, 0, len(boxes))
            kept = nms(boxes.to(gpu), scores.to(gpu), threshold, backend="native")
            assert kept.tolist() == nms_by_the_rule(boxes, scores, threshold), (name, threshold)


def test_gpu_equals_torchvision(gpu):
    ops = pytest.importorskip("torchvision.ops", reason="torchvision, which has a non-maximum suppression, is missing")
    for n in (1, 63, 1000, 3072):
        boxes, scores = (
            random_boxes(n, seed=n)[0],
            torch.randperm(n, generator=torch.Generator().manual_seed(n)).float(),
        )
        kept = nms(boxes.to(gpu), scores.to(gpu), 0.5, backend="native")
        assert n == 1 or len(kept) < n
        assert torch.equal(kept, ops.nms(boxes.to(gpu), scores.to(gpu), 0.5))


def test_gpu_orders_scores_as_the_cpu_does(gpu):
    scores = torch.tensor([NAN, 0.0, 1.0, -0.0, -INF, 1.0, NAN, INF, 1e-42, -1e-42, 3e38, -3e38])
    apart = torch.arange(float(len(scores)))[:, None] * 10 + torch.tensor([0.0, 0.0, 5.0, 5.0])
    kept = nms(apart.to(gpu), scores.to(gpu), 0.5, backend="native")
    assert kept.tolist() == [7, 10, 2, 5, 8, 1, 3, 9, 11, 4, 0, 6]


@pytest.mark.parametrize(("n", "side"), [(3072, 600.0), (4096, 30.0), (5000, 60.0)])
def test_gpu_takes_many_boxes(gpu, n, side):
    """Up to 4096 boxes are one chunk; 5000 are five."""
    boxes, scores = random_boxes(n, extent=1000.0, side=side)
    boxes, scores = boxes.round(), (scores * 500).round() / 500
    kept = nms(boxes.to(gpu), scores.to(gpu), 0.3, backend="native").cpu()
    assert n / 50 < len(kept) < n
    assert kept.tolist() == nms_by_the_rule(boxes, scores, 0.3)


def test_gpu_strided_boxes(gpu):
    boxes, scores = random_boxes(200)
    kept = nms(boxes.to(gpu).T.contiguous().T[::2], scores.to(gpu)[::2], 0.3, backend="native")
    assert kept.tolist() == nms_by_the_rule(boxes[::2], scores[::2], 0.3)


@given(
    boxes=st.lists(st.tuples(*[st.integers(-2, 6)] * 4, st.sampled_from([0.0, 0.25, 0.5, NAN, -INF])), max_size=30),
    threshold=st.sampled_from([-1.0, 0.0, 0.1, 1 / 3, 0.5, 1.0]),
)
@settings(deadline=None, max_examples=150)
def test_small_integer_boxes(boxes, threshold):
    rows = torch.tensor(boxes, dtype=torch.float32).view(-1, 5)
    expected = nms_by_the_rule(rows[:, :4], rows[:, 4], threshold)
    for backend in BACKENDS:
        assert nms(rows[:, :4], rows[:, 4], threshold, backend=backend).tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_is_registered_well(backend):
    torch.library.opcheck(torch.ops.sam_fast.nms.default, (*random_boxes(20), 0.5, backend))


def test_compiles_as_one_graph():
    boxes, scores = random_boxes(50)
    compiled = torch.compile(lambda b, s: b[nms(b, s, 0.3)], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(boxes, scores), boxes[nms_by_the_rule(boxes, scores, 0.3)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    boxes, scores = random_boxes(5)
    with pytest.raises(TypeError, match="boxes must be a float32 tensor, got torch"):
        nms(boxes.double(), scores, 0.5, backend=backend)
    with pytest.raises(TypeError, match="scores must be a float32 tensor, got list"):
        nms(boxes, [1.0] * 5, 0.5, backend=backend)
    with pytest.raises(ValueError, match=r"boxes must be \[N, 4\], got \[5, 3\]"):
        nms(boxes[:, :3], scores, 0.5, backend=backend)
    with pytest.raises(ValueError, match=r"scores must be \[5\], got \[4\]"):
        nms(boxes, scores[:4], 0.5, backend=backend)
    with pytest.raises(ValueError, match="got nan"):
        nms(boxes, scores, NAN, backend=backend)


def test_native_backend_refuses_gradients():
    boxes, scores = random_boxes(5)
    with pytest.raises(RuntimeError, match="inference-only"):
        nms(boxes.requires_grad_(), scores, 0.5, backend="native")
