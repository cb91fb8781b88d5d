"""What moves the weights: parameter groups with layer-wise decay, learning rate, drop path, moving average."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sam_fast.modeling.image_encoder import Block, FoldingNeck, ImageEncoderViT

_UPSCALING_LR = 0.1


def parameter_groups(
    model: nn.Module, encoder: ImageEncoderViT, *, weight_decay: float, layer_decay: float
) -> list[dict[str, object]]:
    """Groups for AdamW of the parameters that require gradients.

    Weight decay goes to matrices and kernels only, not to biases, normalisations, positions and tokens. Each group has
    `lr_scale`: layer_decay ^ (layers above it), where the patch embedding is the lowest layer of the encoder and
    everything behind its blocks has 1 (Bao et al., "BEiT", 2022; Li et al., "ViTDet", 2022). The upscaling behind a
    `FoldingNeck` has 0.1: it begins as the inverse of the folding, each weight alone, which steps of the usual size
    would drown in the sum of the others.

    Args:
        model: the model to train; `encoder` is part of it.
        encoder: the image encoder.
        weight_decay: of AdamW.
        layer_decay: 0.8 in SAM's paper, 1 for no layer-wise decay.
    """
    depth = len(encoder.blocks)
    layer = {id(p): 0 for p in encoder.patch_embed.parameters()}
    if encoder.pos_embed is not None:
        layer[id(encoder.pos_embed)] = 0
    for index, block in enumerate(encoder.blocks):
        layer.update({id(p): index + 1 for p in block.parameters()})
    groups: dict[tuple[float, float], dict[str, object]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr_scale = layer_decay ** (depth + 1 - layer.get(id(parameter), depth + 1))
        if "output_upscaling." in name and isinstance(encoder.neck, FoldingNeck):
            lr_scale = _UPSCALING_LR
        decay = weight_decay if parameter.dim() >= 2 and not _is_embedding(name) else 0.0
        group = groups.setdefault((lr_scale, decay), {"params": [], "lr_scale": lr_scale, "weight_decay": decay})
        parameters = group["params"]
        assert isinstance(parameters, list)
        parameters.append(parameter)
    return list(groups.values())


def _is_embedding(name: str) -> bool:
    return "pos" in name or "embed.weight" in name or "embeddings." in name or "token" in name.split(".")[-2:][0]


def learning_rate(
    step: int, *, base: float, warmup: int, steps: int, schedule: str, elapsed: float = 0.0, final: float = 0.01
) -> float:
    """The learning rate of step `step` (from 0), before the scale of a group.

    Linear warm-up over `warmup` steps, then one of: "cosine" to `final` * base at the last step; "linear" likewise;
    "step", the paper's, divided by 10 at 2/3 and again at 0.963 of all steps (60k and 86,666 of 90k); "constant".
    Of a run that ends by the clock, `elapsed` is the share of its time that is over: it counts where it is more than
    the share of the steps, in the warm-up too.

    Raises:
        ValueError: unknown schedule.
    """
    done = min(1.0, max(elapsed, (step - warmup) / max(1, steps - warmup), 0.0))
    if schedule == "cosine":
        rate = base * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))
    elif schedule == "linear":
        rate = base * (1 - (1 - final) * done)
    elif schedule == "step":
        done = max(elapsed, step / steps)
        rate = base * 0.1 ** ((done >= 2 / 3) + (done >= 86_666 / 90_000))
    elif schedule == "constant":
        rate = base
    else:
        raise ValueError(f"schedule must be cosine, linear, step or constant, got {schedule!r}")
    return rate * (step + 1) / warmup if step < warmup else rate


def set_drop_path(encoder: ImageEncoderViT, rate: float) -> None:
    """Give block i of n the drop rate i / (n - 1) * rate, see `modeling.layers.DropPath`."""
    last = max(1, len(encoder.blocks) - 1)
    for index, block in enumerate(encoder.blocks):
        assert isinstance(block, Block)
        block.drop_path.rate = rate * index / last


class MovingAverage:
    """Exponential moving average of a model's parameters and buffers, in float32.

    The decay grows as (1 + step) / (10 + step) up to `decay`, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after step `step` (from 0)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        names = list(self.tensors)
        torch._foreach_lerp_([self.tensors[n] for n in names], [current[n].float() for n in names], weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the model's names."""
        return self.tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved averages."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


@torch.no_grad()
def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add copies of gradients, of whatever precision, to those of the parameters, by a few launches for all."""
    if not parameters:
        return  # which the operations on lists refuse
    own = [torch.empty_like(parameter) for parameter in parameters]
    torch._foreach_copy_(own, list(gradients))
    pairs = list(zip(parameters, own, strict=True))
    there = [(parameter.grad, gradient) for parameter, gradient in pairs if parameter.grad is not None]
    if there:
        torch._foreach_add_([grad for grad, _ in there], [gradient for _, gradient in there])
    for parameter, gradient in pairs:
        if parameter.grad is None:
            parameter.grad = gradient


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients down to a joint norm of at most `limit` (0 leaves them alone); returns the norm before."""
    return nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf, foreach=True)
