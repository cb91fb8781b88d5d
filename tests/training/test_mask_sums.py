"""The loss of prompts by Triton kernels, interpreted where there is no GPU, against formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import relative_error
from rectangles import batch_of, error_of, gradients, tiny_sam
from sam_fast.kernels import mask_sums
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sam_fast.training import losses as module
from sam_fast.training.losses import PromptLoss, prompt_loss
from sam_fast.training.step import InteractiveStep, StepSettings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of gradients, which are rounded once: by half of their last place, 2^-8 or 2^-11 at most.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [(2, 3, 5, 7), (3, 1, 16, 16), (1, 3, 50, 90), (2, 2, 64, 64)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Kernels run wherever the tests do; PyTorch's operations never take their place."""
    monkeypatch.setattr(module, "_KERNEL_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(module, "mask_loss", None)
    return monkeypatch


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(module, "_KERNEL_DEVICES", ())
    return monkeypatch


def case(*shape: int, dtype: torch.dtype = torch.float32, padded: bool = True) -> tuple[Tensor, ...]:
    """Logits, predicted IoU, targets and `valid` (or None) of `prompt_loss`."""
    N, M, H, W = shape
    generator = torch.Generator().manual_seed(sum(shape))
    logits = 4 * torch.randn(shape, generator=generator)
    targets = torch.rand(N, H, W, generator=generator) < 0.3
    predicted = torch.rand(N, M, generator=generator)
    valid = torch.ones(N, H, W, dtype=torch.bool)
    valid[0, :, W // 2 + 1 :] = False
    valid[-1, H // 3 + 1 :] = False
    given = logits.to(dtype), predicted.to(dtype), targets, valid if padded else None
    return tuple(x if x is None else x.to(DEVICE) for x in given)


def transcribed(logits: Tensor, predicted: Tensor, targets: Tensor, valid: Tensor | None) -> PromptLoss:
    """The formulas of the papers (see test_losses.py) over the pixels that count, in float64."""
    x, guess = logits.double(), predicted.double()
    masks, ious = [], []
    for n in range(len(x)):
        counted = torch.ones_like(targets[n]) if valid is None else valid[n]
        t = targets[n][counted]
        for m in range(x.shape[1]):
            y = x[n, m][counted]
            log_p_t = F.logsigmoid(torch.where(t, y, -y))
            wrong = torch.sigmoid(torch.where(t, -y, y))
            focal = -(torch.where(t, 0.25, 0.75).double() * wrong**2 * log_p_t).sum() / max(1, t.numel())
            p = torch.sigmoid(y)
            masks.append(20 * focal + 1 - (2 * p[t].sum() + 1) / (p.sum() + t.sum() + 1))
            union = ((y > 0) | t).sum().item()
            ious.append(((y > 0) & t).sum().item() / union if union else 1.0)
    costs = torch.stack(masks).view(x.shape[:2])
    iou = torch.tensor(ious, dtype=torch.float64, device=x.device).view(x.shape[:2])
    lowest, chosen = costs.min(1)
    return PromptLoss(lowest + ((guess - iou) ** 2).mean(1), lowest, chosen, iou)


def check(logits: Tensor, predicted: Tensor, targets: Tensor, valid: Tensor | None) -> None:
    """Values, and gradients of both losses by logits and predicted IoU."""
    found, grads = [], []
    for function, wide in ((prompt_loss, False), (transcribed, True)):
        inputs = [(x.double() if wide else x).detach().requires_grad_() for x in (logits, predicted)]
        loss = function(*inputs, targets, valid)
        upstream = torch.arange(1, len(logits) + 1, device=DEVICE)
        grads.append(torch.autograd.grad(((loss.total + 0.5 * loss.mask) * upstream).sum(), inputs))
        found.append(loss)
    own, expected = found
    assert {own.total.dtype, own.mask.dtype, own.iou.dtype} == {torch.float32} and not own.iou.requires_grad
    assert torch.equal(own.chosen, expected.chosen)
    for name in ("total", "mask", "iou"):
        torch.testing.assert_close(getattr(own, name).double(), getattr(expected, name), rtol=5e-6, atol=5e-7)
    for name, one, other, given in zip(("logits", "predicted"), *grads, (logits, predicted), strict=True):
        assert one.dtype == given.dtype and one.shape == given.shape
        assert relative_error(one.double(), other) <= TOLERANCE[given.dtype], name


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formulas(shape, dtype, padded, kernels):
    check(*case(*shape, dtype=dtype, padded=padded))


def test_sizes_are_no_multiples_of_a_tile():
    tiles = [H * W / mask_sums._TILE for _, _, H, W in SHAPES]
    assert any(tile < 1 for tile in tiles) and any(tile > 1 and tile % 1 for tile in tiles) and 2 in tiles


@pytest.mark.parametrize("scale", [1e-3, 25.0])
def test_small_and_extreme_logits(scale, kernels):
    logits, *rest = case(2, 3, 9, 11)
    check((scale * logits).clamp(-100, 100), *rest)


def test_confident_logits(kernels):
    """All right but for one pixel: terms of focal loss as small as they get."""
    logits, predicted, targets, valid = case(2, 3, 9, 11)
    logits = torch.where(targets[:, None], 12.0, -12.0).expand(2, 3, 9, 11).clone()
    check(logits, predicted, targets, valid)
    logits[:, :, 4, 4] *= -100 / 12
    check(logits, predicted, targets, valid)


def test_precision_of_every_pixel(kernels):
    """A gradient is right to its last places also where it is small: 1 + exp(-|x|) is not rounded away."""
    x = torch.linspace(-25, 25, 601, device=DEVICE)
    logits = x.repeat(2, 1)[:, None, None].requires_grad_()
    targets = torch.tensor([True, False], device=DEVICE)[:, None, None].expand(2, 1, 601)
    kernels.setattr(module, "DICE_WEIGHT", 0.0)
    (grad,) = torch.autograd.grad(prompt_loss(logits, torch.zeros(2, 1, device=DEVICE), targets).total.sum(), logits)
    turned = torch.stack([-x, x]).double()
    wrong, right, entropy = turned.sigmoid(), (-turned).sigmoid(), F.softplus(turned)
    alpha = torch.tensor([[-0.25], [0.75]], device=DEVICE)
    expected = 20 / 601 * alpha * wrong**2 * (2 * right * entropy + wrong)
    torch.testing.assert_close(grad[:, 0, 0].double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("logit", [-3.0, 3.0])
def test_nothing_in_the_target_and_no_pixel_that_counts(logit, kernels):
    logits, predicted, targets, valid = case(2, 3, 9, 11)
    targets[:], valid[1] = False, False
    logits = logit + 0.1 * logits
    check(logits, predicted, targets, valid)
    ious = prompt_loss(logits, predicted, targets, valid).iou
    assert (ious[1] == 1).all() and (ious[0] == float(logit < 0)).all()


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_weight_of_the_iou_head(weight, kernels):
    logits, predicted, targets, valid = case(2, 3, 9, 11)
    plain = prompt_loss(logits, predicted, targets, valid)
    loss = prompt_loss(logits, predicted.requires_grad_(), targets, valid, iou_weight=weight)
    torch.testing.assert_close(loss.total, plain.mask + weight * (plain.total - plain.mask))
    (gradient,) = torch.autograd.grad(loss.total.sum(), predicted)
    torch.testing.assert_close(gradient, weight * 2 / 3 * (predicted - plain.iou).detach())


@pytest.mark.parametrize("first, last", [(0, 1), (1, 4), (3, 4)])
def test_some_masks_of_more(first, last, kernels):
    logits, predicted, *rest = case(2, 4, 9, 11)
    check(logits[:, first:last], predicted[:, first:last], *rest)
    logits.requires_grad_()
    prompt_loss(logits[:, first:last], predicted[:, first:last], *rest).total.sum().backward()
    others = [m for m in range(4) if not first <= m < last]
    assert not logits.grad[:, others].any() and logits.grad[:, first:last].any()


def test_inputs_that_do_not_lie_together(kernels):
    logits, predicted, targets, valid = case(2, 3, 9, 11)
    check(logits.transpose(2, 3), predicted, targets.transpose(1, 2), valid.transpose(1, 2))
    check(logits.transpose(0, 1).contiguous().transpose(0, 1), predicted.t().contiguous().t(), targets, valid)
    check(logits, predicted, targets[:1].expand(2, 9, 11), valid[:1].expand(2, 9, 11))


def test_gradients_that_are_zero_are_exactly_zero(kernels):
    logits, predicted, *rest = case(3, 3, 50, 60)
    logits.requires_grad_()
    loss = prompt_loss(logits, predicted.requires_grad_(), *rest)
    (loss.total * torch.tensor([0, 1, 1], device=DEVICE)).sum().backward()
    touched = logits.grad.flatten(2).ne(0).any(2)
    expected = F.one_hot(loss.chosen, 3).bool()
    expected[0] = False
    assert torch.equal(touched, expected)
    assert not logits.grad[-1, :, 50 // 3 + 1 :].any(), "padding has no gradient"
    assert not predicted.grad[0].any() and (predicted.grad[1:] != 0).all()


def test_masks_without_gradients_are_not_read(kernels):
    """What is read here is NaN, and what is written was: only one mask of the second prompt is needed."""
    logits, predicted, targets, _ = case(3, 3, 50, 60)
    found = mask_sums.losses(logits, predicted, targets.view(torch.uint8), None, module._weights(module.IOU_WEIGHT))
    chosen = F.one_hot(found.chosen, 3).bool()
    chosen[[0, 2]] = False
    logits[~chosen] = float("nan")
    grads = torch.full_like(logits, float("nan")), torch.full_like(predicted, float("nan"))
    upstream = torch.tensor([0.0, 1.0, 0.0], device=DEVICE)
    inputs = logits, predicted, targets.view(torch.uint8), None, module._weights(module.IOU_WEIGHT)
    mask_sums.gradients(*grads, upstream, upstream, *found[2:], *inputs)
    assert torch.equal(grads[0].ne(0).flatten(2).any(2), chosen) and all(grad.isfinite().all() for grad in grads)


def test_gradients_of_one_loss_alone(kernels):
    given = case(2, 3, 9, 11)
    for field in ("total", "mask"):
        found = []
        for function in (prompt_loss, transcribed):
            inputs = [x.double() if function is transcribed else x for x in given[:2]]
            inputs = [x.detach().requires_grad_() for x in inputs]
            getattr(function(*inputs, *given[2:]), field).sum().backward()
            found.append([torch.zeros_like(x) if x.grad is None else x.grad for x in inputs])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("padded", [True, False])
def test_equals_the_reference(padded, reference):
    logits, predicted, *rest = case(4, 3, 20, 30, padded=padded)
    logits[1, 2] = logits[1, 0] = logits[1, 1]  # the first of equals
    expected = prompt_loss(logits, predicted, *rest)
    reference.setattr(module, "_KERNEL_DEVICES", ("cuda", "cpu"))
    found = prompt_loss(logits, predicted, *rest)
    for name in ("total", "mask", "chosen", "iou"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=5e-6, atol=1e-6)
    assert torch.equal(found.iou, expected.iou)


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "padding"])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite(value, inside, counted, reference):
    """Of one mask of three, and of the only one."""
    logits, predicted, targets, valid = case(2, 3, 9, 11)
    y, x = ((targets[1] == inside) & (valid[1] == counted)).nonzero()[-1]
    logits[1, 1, y, x] = value
    for masks in (slice(0, 3), slice(1, 2)):
        found = []
        for devices in ((), ("cuda", "cpu")):
            reference.setattr(module, "_KERNEL_DEVICES", devices)
            given = logits[:, masks].clone().requires_grad_()
            loss = prompt_loss(given, predicted[:, masks], targets, valid)
            loss.total.sum().backward()
            found.append((loss.total, loss.chosen, loss.iou, given.grad[0]))
        torch.testing.assert_close(found[1], found[0], equal_nan=True, rtol=1e-4, atol=1e-7)
        assert loss.total[0].isfinite() and (loss.total[1].isnan() or value == float("inf"))
        if loss.total[1].isnan():
            assert not given.grad[1, loss.chosen[1], y, x].isfinite()


def test_results_can_be_changed_in_place(kernels):
    logits, *others = case(2, 3, 5, 7)
    logits.requires_grad_()
    loss = prompt_loss(logits, *others)
    expected = torch.autograd.grad((2 * loss.total + 3 * loss.mask).sum(), logits, retain_graph=True)
    found = torch.autograd.grad((loss.total.mul_(2) + loss.mask.mul_(3)).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_runs_repeat_exactly(kernels):
    logits, *rest = case(2, 3, 60, 70, dtype=torch.bfloat16)
    found = []
    for _ in range(2):
        x = logits.clone().requires_grad_()
        loss = prompt_loss(x, *rest)
        loss.total.sum().backward()
        found.append([loss.total, loss.mask, loss.chosen, loss.iou, x.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_is_left_to_pytorch(monkeypatch):
    given = logits, predicted, targets, valid = case(2, 3, 6, 7)
    monkeypatch.delattr(module, "_PromptLoss")
    if DEVICE.type == "cpu":
        prompt_loss(*given)  # where kernels would be interpreted
    monkeypatch.setattr(module, "_KERNEL_DEVICES", ("cuda", "cpu"))
    with pytest.raises(NameError):
        prompt_loss(*given)
    prompt_loss(*given, blend=0.5)
    prompt_loss(logits, predicted, targets.float(), valid)
    prompt_loss(logits, predicted, targets, valid.float())
    prompt_loss(logits, predicted, targets[:1], valid[:1])
    prompt_loss(logits.double(), predicted, targets)
    prompt_loss(logits[:0], predicted[:0], targets[:0])
    prompt_loss(logits.repeat(1, 3, 1, 1), predicted.repeat(1, 3), targets)
    torch.vmap(lambda x: prompt_loss(x, predicted, targets).total)(logits[None])

    def total(x: Tensor) -> Tensor:
        return prompt_loss(x, predicted, targets, valid).total

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)(logits)
    torch.testing.assert_close(compiled, prompt_loss(logits, predicted, targets, valid.float()).total)
    checkpoint(total, logits.requires_grad_(), use_reentrant=False).sum().backward()


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_step_has_the_gradients_that_it_had(half, reference):
    model = tiny_sam().to(DEVICE).train()
    batch, settings = batch_of().to(DEVICE), StepSettings(clicks=1, refined=1, grouping=0.3)
    calls, original, found = [], mask_sums.losses, []
    reference.setattr(mask_sums, "losses", lambda *args: calls.append(args[0].dtype) or original(*args))
    for devices in ((), ("cuda", "cpu")):
        reference.setattr(module, "_KERNEL_DEVICES", devices)
        model.zero_grad()
        InteractiveStep(model, train_encoder=True, half=half)(batch, settings, np.random.default_rng(0))
        found.append(gradients(model))
    assert len(calls) >= 3 and set(calls) == {half or torch.float32}, "logits are read as the decoder leaves them"
    assert found[0].keys() == found[1].keys()
    assert error_of(*found) < (1e-4 if half is None else 0.15)
