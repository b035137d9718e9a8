"""What every detector is: losses to train on, and an anomaly map of a slice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from normnet.baselines.config import BaselineConfig


@dataclass(frozen=True)
class Phase:
    """A part of training."""

    name: str
    """For ``metrics.csv``."""
    step: Callable[[torch.Tensor], float]
    """Takes a batch (b, 1, size, size), changes the weights and returns the loss."""


class Baseline(nn.Module, ABC):
    """An unsupervised detector of anomalies in slices.

    Parameters
    ----------
    config : BaselineConfig
        Its settings.

    Attributes
    ----------
    calibration : dict of str to float
        From healthy held-out slices: ``scale`` and ``threshold`` (see `normnet.baselines.score`). Empty
        before training.
    """

    bounded = True
    """Whether anomalies lie in [0, 1] by themselves; otherwise a map a becomes a / (a + scale)."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.config = config
        self.calibration: dict[str, float] = {}

    @abstractmethod
    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the training loss of slices (b, 1, size, size): a scalar."""

    @abstractmethod
    def anomaly(self, images: torch.Tensor) -> torch.Tensor:
        """Return a map >= 0 of the shape of `images`, (b, 1, size, size); in evaluation mode."""

    def phases(self) -> list[Phase]:
        """Return the parts of training, in order: here one, that descends `loss`."""
        optimizer = self.adam(self.parameters())

        def step(batch: torch.Tensor) -> float:
            return descend(self.loss(batch), optimizer)

        return [Phase("train", step)]

    def adam(
        self, parameters: Iterable[nn.Parameter], betas: tuple[float, float] = (0.9, 0.999)
    ) -> torch.optim.Adam:
        """Return an optimiser with the learning rate of the configuration."""
        return torch.optim.Adam(parameters, lr=self.config.learning_rate, betas=betas)

    def difference(self, images: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        """Return the difference map of images and what they would be if healthy, in [0, 1]."""
        change = images - normal
        return (change.abs() if self.config.residual == "absolute" else change).clamp(0, 1)


class Reconstruction(Baseline):
    """A detector whose map is the difference of a slice and its reconstruction."""

    @abstractmethod
    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the model makes of `images`; no noise, but where the method is noise."""

    def anomaly(self, images: torch.Tensor) -> torch.Tensor:
        """Return the difference of `images` and their reconstruction."""
        with torch.no_grad():
            return self.difference(images, self.reconstruct(images))


def descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    """Do one step of `optimizer` and return the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    cast("Callable[[], None]", loss.backward)()
    optimizer.step()
    return float(loss.detach())


def absolute_error(images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference over pixels and slices."""
    return (images - reconstruction).abs().mean()
