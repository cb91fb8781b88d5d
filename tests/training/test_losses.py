"""The losses against a literal transcription of the papers' formulas in float64, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from sam_fast.training.losses import dice_loss, focal_loss, grouping_loss, mask_loss, prompt_loss, true_iou


def transcribed_focal(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Lin et al., eq. 5: FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t), alpha 0.25, gamma 2; the mean over pixels."""
    values = []
    for x, y in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        p_t = p if y == 1 else 1 - p
        alpha_t = 0.25 if y == 1 else 1 - 0.25
        values.append(-alpha_t * (1 - p_t) ** 2 * math.log(p_t))
    return sum(values) / len(values)


def transcribed_dice(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Milletari et al., section 3, with first powers in the denominator and 1 added above and below."""
    p = [1 / (1 + math.exp(-x)) for x in logits.flatten().tolist()]
    g = targets.flatten().tolist()
    return 1 - (2 * sum(a * b for a, b in zip(p, g, strict=True)) + 1) / (sum(p) + sum(g) + 1)


def transcribed_iou(logits: torch.Tensor, targets: torch.Tensor) -> float:
    predicted = {i for i, x in enumerate(logits.flatten().tolist()) if x > 0}
    true = {i for i, y in enumerate(targets.flatten().tolist()) if y == 1}
    return len(predicted & true) / len(predicted | true)


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, M, H, W] and targets [N, H, W], float64."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 3, 5, 7, generator=generator, dtype=torch.float64)
    targets = (torch.rand(4, 5, 7, generator=generator) < 0.4).double()
    return logits, targets


def test_each_loss_equals_its_formula(case):
    logits, targets = case
    for n in range(4):
        for m in range(3):
            x, y = logits[n, m], targets[n]
            assert focal_loss(x, y).item() == pytest.approx(transcribed_focal(x, y), rel=1e-12)
            assert dice_loss(x, y).item() == pytest.approx(transcribed_dice(x, y), rel=1e-12)
            expected = 20 * transcribed_focal(x, y) + transcribed_dice(x, y)
            assert mask_loss(x, y).item() == pytest.approx(expected, rel=1e-12)
            assert true_iou(x, y).item() == pytest.approx(transcribed_iou(x, y), rel=1e-6)


def test_prompt_loss_equals_the_formulas(case):
    logits, targets = case
    predicted = torch.rand(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = prompt_loss(logits, predicted, targets)
    for n in range(4):
        masks = [20 * transcribed_focal(x, targets[n]) + transcribed_dice(x, targets[n]) for x in logits[n]]
        errors = [(predicted[n, m].item() - transcribed_iou(logits[n, m], targets[n])) ** 2 for m in range(3)]
        # prompt_loss computes in float32, whatever it is given
        assert loss.mask[n].item() == pytest.approx(min(masks), rel=1e-5)
        assert loss.chosen[n].item() == masks.index(min(masks))
        assert loss.total[n].item() == pytest.approx(min(masks) + sum(errors) / 3, rel=1e-5)


def test_only_the_best_mask_gets_a_gradient(case):
    logits, targets = case
    logits = logits.float().requires_grad_()
    predicted = torch.full((4, 3), 0.5, requires_grad=True)
    loss = prompt_loss(logits, predicted, targets)
    loss.total.sum().backward()
    touched = logits.grad.flatten(2).abs().sum(2) > 0
    assert torch.equal(touched, torch.nn.functional.one_hot(loss.chosen, 3).bool())
    assert (predicted.grad != 0).all(), "the IoU head learns from every mask"


def test_blend_begins_with_cross_entropy(case):
    logits, targets = case
    x, y = logits[0, 0], targets[0]
    p = torch.sigmoid(x)
    cross_entropy = -(y * p.log() + (1 - y) * (1 - p).log()).mean().item()
    start = mask_loss(x, y, blend=0.0).item()
    assert start == pytest.approx(3 * cross_entropy + transcribed_dice(x, y), rel=1e-12)
    middle = mask_loss(x, y, blend=0.25).item()
    assert middle == pytest.approx(0.25 * mask_loss(x, y).item() + 0.75 * start, rel=1e-12)


@pytest.mark.parametrize("loss", [focal_loss, dice_loss, true_iou, mask_loss])
def test_padding_does_not_count(loss, case):
    logits, targets = case
    x, y = logits[0, 0], targets[0]
    valid = torch.zeros(9, 11)
    valid[:5, :7] = 1
    padded_x, padded_y = torch.full((9, 11), 5.0, dtype=torch.float64), torch.zeros(9, 11, dtype=torch.float64)
    padded_x[:5, :7], padded_y[:5, :7] = x, y
    assert loss(padded_x, padded_y, valid).item() == pytest.approx(loss(x, y).item(), rel=1e-6)
    assert loss(padded_x, padded_y).item() != pytest.approx(loss(x, y).item(), rel=1e-3)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4]], requires_grad=True)
    targets = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    loss = mask_loss(logits, targets)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_empty_masks():
    empty = torch.full((3, 3), -9.0)
    assert true_iou(empty, torch.zeros(3, 3)) == 1
    assert true_iou(empty, torch.ones(3, 3)) == 0


def test_grouping_loss_equals_its_formula():
    """Khosla et al., eq. 2, token by token in float64, over the first half of the channels."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(2, 8, 3, 4, generator=generator, dtype=torch.float64)
    segments = torch.tensor(
        [[[0, 0, 1, -1], [2, 0, 1, 1], [-1, 3, 3, 0]], [[5, -1, -1, 5], [5, 6, 6, 7], [6, 6, 6, 6]]]
    )
    values = []
    for image, labels in zip(embedding[:, :4], segments, strict=True):
        tokens = [(image[:, y, x], int(labels[y, x])) for y in range(3) for x in range(4) if labels[y, x] >= 0]

        def similarity(a, b):
            return math.exp((a @ b / a.norm() / b.norm()).item() / 0.1)

        for i, (anchor, label) in enumerate(tokens):
            others = [t for j, t in enumerate(tokens) if j != i]
            whole = sum(similarity(anchor, token) for token, _ in others)
            terms = [-math.log(similarity(anchor, token) / whole) for token, other in others if other == label]
            if terms:
                values.append(sum(terms) / len(terms))
    assert len(values) == 18, "tokens alone in their segment do not count"
    assert grouping_loss(embedding, segments).item() == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_grouping_loss_without_segments():
    embedding = torch.randn(1, 8, 2, 2, requires_grad=True)
    loss = grouping_loss(embedding, torch.full((1, 2, 2), -1))
    loss.backward()
    assert loss == 0 and torch.equal(embedding.grad, torch.zeros_like(embedding))
