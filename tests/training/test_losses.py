"""The losses against a literal transcription of the papers' formulas in float64, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from sam_fast.training.losses import (
    balanced_cross_entropy,
    dice_loss,
    draw_anchors,
    focal_loss,
    grouping_loss,
    mask_loss,
    prompt_loss,
    true_iou,
)


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


def transcribed_balanced(p: list[float], inside: list[float]) -> float:
    """Mean cross entropy of the pixels inside plus that of those outside."""
    kinds = [[-math.log(a if g else 1 - a) for a, g in zip(p, inside, strict=True) if g == kind] for kind in (1, 0)]
    return sum(sum(kind) / len(kind) for kind in kinds)


def test_blend_begins_with_balanced_cross_entropy(case):
    logits, targets = case
    x, y = logits[0, 0], targets[0]
    expected = transcribed_balanced(torch.sigmoid(x).flatten().tolist(), y.flatten().tolist())
    start = mask_loss(x, y, blend=0.0).item()
    assert start == pytest.approx(expected + transcribed_dice(x, y), rel=1e-12)
    middle = mask_loss(x, y, blend=0.25).item()
    assert middle == pytest.approx(0.25 * mask_loss(x, y).item() + 0.75 * start, rel=1e-12)


@pytest.mark.parametrize("whole", [0.0, 1.0])
def test_balanced_cross_entropy_of_a_mask_without_one_side(whole):
    logits = torch.randn(5, 7, requires_grad=True)
    loss = balanced_cross_entropy(logits, torch.full((5, 7), whole))
    loss.backward()
    expected = torch.nn.functional.softplus(logits if whole == 0 else -logits).mean()
    assert loss.item() == pytest.approx(expected.item()) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", [focal_loss, dice_loss, true_iou, mask_loss, balanced_cross_entropy])
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
    """Dice + balanced cross entropy of 10 (cos - 1/2), anchor by anchor and pixel by pixel in float64."""
    generator = torch.Generator().manual_seed(0)
    upscaled = torch.randn(2, 5, 2, 3, generator=generator, dtype=torch.float64)
    regions = torch.tensor([[[0, 0, 1], [2, 1, -1]], [[4, 4, 4], [4, 5, 5]]])
    anchors = torch.tensor([[0, 4], [5, 2]])
    losses, ious = [], []
    for image, labels, chosen in zip(upscaled, regions, anchors, strict=True):
        centred = image - image.mean((1, 2), keepdim=True)
        pixels = [(centred[:, y, x], int(labels[y, x])) for y in range(2) for x in range(3)]
        for anchor, label in (pixels[i] for i in chosen.tolist()):
            known = [(pixel, other == label) for pixel, other in pixels if other >= 0]
            logits = [10 * ((anchor @ p / anchor.norm() / p.norm()).item() - 0.5) for p, _ in known]
            probabilities = [1 / (1 + math.exp(-logit)) for logit in logits]
            same = [inside for _, inside in known]
            overlap = sum(p for p, inside in zip(probabilities, same, strict=True) if inside)
            dice = 1 - (2 * overlap + 1) / (sum(probabilities) + sum(same) + 1)
            losses.append(dice + transcribed_balanced(probabilities, same))
            both = sum(logit > 0 and inside for logit, inside in zip(logits, same, strict=True))
            ious.append(both / sum(logit > 0 or inside for logit, inside in zip(logits, same, strict=True)))
    loss, iou = grouping_loss(upscaled, regions, anchors)
    assert loss.item() == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert iou.item() == pytest.approx(sum(ious) / 4, rel=1e-5)


def test_anchors_are_drawn_by_the_roots_of_areas():
    regions = torch.full((2, 10, 10), 7)
    regions[0, :, 8:] = -1  # 80 pixels of region 7 but for
    regions[0, :5, 0] = 3  # 5 of region 3
    regions[1, 2, 2] = 0
    anchors = draw_anchors(regions, 20_000, torch.Generator().manual_seed(0))
    drawn = regions.flatten(1).gather(1, anchors)
    assert (drawn[0] >= 0).all(), "never in the padding"
    assert (drawn[0] == 3).float().mean().item() == pytest.approx(5**0.5 / (5**0.5 + 75**0.5), abs=0.01)
    assert (drawn[1] == 0).float().mean().item() == pytest.approx(1 / (1 + 99**0.5), abs=0.01)
    assert len(anchors[0][drawn[0] == 3].unique()) == 5
