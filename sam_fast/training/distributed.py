"""Several processes, one model: what `torchrun` started, and the average of gradients over it.

Gradients are averaged once per step, after the last of a step's several backward passes (`training/step.py`), which is
why this is not `DistributedDataParallel`: that reduces after each backward pass.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 1 << 25  # elements of one all-reduce


@dataclass(frozen=True)
class World:
    """This process among all that train together."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def broadcast_(self, model: nn.Module) -> None:
        """Give all processes the weights of the first."""
        if self.size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes.item())

    def agree(self, value: float) -> float:
        """The first process's number."""
        if self.size == 1:
            return value
        agreed = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(agreed, 0)
        return float(agreed.item())

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes; one that no process has stays None."""
        if self.size == 1:
            return
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=self.device)
        dist.all_reduce(present, dist.ReduceOp.MAX)
        for bucket in _buckets([p for p, used in zip(parameters, present.tolist(), strict=True) if used]):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
            dist.all_reduce(flat)
            flat /= self.size
            for parameter, grad in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = grad.view_as(parameter)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


@contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """Enter the group of processes that `torchrun` started, or a world of one without it.

    Args:
        device: "cuda", "cpu" or a device such as "cuda:1"; by default CUDA where there is one. Under `torchrun` each
            process takes the GPU of its local rank.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "WORLD_SIZE" not in os.environ:
        yield World(device=torch.device(kind))
        return
    cuda = torch.device(kind).type == "cuda"
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), own)
        # gloo's threads may not have let go of the last tensors. They need Python for it, which a process that ends at
        # once takes from them ("terminate called without an active exception"): while this one waits, they have it.
        dist.barrier()
        time.sleep(0.05)
    finally:
        dist.destroy_process_group()
