"""Several training processes as one: their batches, losses and statistics are those of the global batch.

`torchrun` and `accelerate launch` start the processes and tell each its place in the environment. Dice and
batch normalisation see the global batch, so the loss curve does not depend on the number of processes beyond
rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """One process among those that train together."""

    rank: int = 0
    """Its number; process 0 writes."""
    size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Its number on this machine: its GPU."""
    local_size: int = 1
    """Processes on this machine."""

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over processes, through which gradients flow."""
        return _Sum.apply(tensor) if self.size > 1 else tensor  # type: ignore[no-untyped-call]

    def agree(self, value: Any) -> Any:
        """Give every process the value of process 0."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


ALONE = World()
"""A single process."""


def launched_first() -> bool:
    """Whether this is process 0 of a launcher's, or the only one: the one that talks."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the processes that a launcher started; alone where there is none.

    Parameters
    ----------
    device : str
        As configured; "cpu" takes the gloo backend, CUDA takes NCCL.

    Yields
    ------
    World
    """
    if dist.is_available() and dist.is_initialized():  # the caller's group stays the caller's
        yield _world(dist.get_rank(), dist.get_world_size())
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield _world(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def _world(rank: int, size: int) -> World:
    return World(
        rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    )


class _Sum(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too: the derivative of the sum of all processes' losses.

    Every process computes the same global loss, and data-parallel training averages gradients: mean over
    processes of d(sum of losses) = d(loss).
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm(torch.nn.BatchNorm3d):
    """Batch normalisation over all processes, on any device; `torch.nn.SyncBatchNorm` knows CUDA alone."""

    world: World = ALONE

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (torch's name)
        """Normalise (b, c, z, y, x) by the mean and variance over all processes, as `BatchNorm3d` does."""
        if not self.training or self.world.size == 1:
            return super().forward(input)
        axes = (0, 2, 3, 4)
        own = torch.tensor([float(input.numel() // input.shape[1])], device=input.device)
        sums = self.world.sum(torch.cat([input.float().sum(axes), own]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = input.float() - mean[:, None, None, None]
        variance = self.world.sum(centred.square().sum(axes)) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        normal = centred * scale[:, None, None, None] + self.bias[:, None, None, None]
        return normal.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        momentum = 0.1 if self.momentum is None else self.momentum
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            if running is not None:
                running.lerp_(now, momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


def global_norms(model: torch.nn.Module, world: World) -> torch.nn.Module:
    """Make a network's batch normalisation see all processes; parameters keep their names."""
    if world.size == 1:
        return model
    if any(parameter.is_cuda for parameter in model.parameters()):
        convert: Any = torch.nn.SyncBatchNorm.convert_sync_batchnorm
        return convert(model)  # type: ignore[no-any-return]
    for name, child in model.named_children():
        if isinstance(child, torch.nn.BatchNorm3d):
            norm = GlobalBatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
            norm.load_state_dict(child.state_dict())
            norm.world = world
            setattr(model, name, norm)
        else:
            global_norms(child, world)
    return model
