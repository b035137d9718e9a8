"""The encoder and decoder that every method shares, so that methods differ and networks do not.

Baur et al. (2021) compare detectors in this manner. Sizes here are ours: the paper prints the code's alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from normnet.baselines.config import BaselineConfig

SLOPE = 0.2
"""Of the leaky ReLU on its negative side."""
Norm = Literal["batch", "none"]


class Encoder(nn.Module):
    """Image (b, 1, size, size) to features (b, channels[-1], bottom, bottom).

    Parameters
    ----------
    config : BaselineConfig
        ``channels``.
    dropout : float
        Rate after each level.
    norm : {"batch", "none"}
        A critic with a gradient penalty must have none: the penalty is one of each image by itself.
    """

    def __init__(self, config: BaselineConfig, *, dropout: float = 0.0, norm: Norm = "batch") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 1
        for channels in config.channels:
            layers.append(nn.Conv2d(width, channels, 4, stride=2, padding=1))
            layers += _after(channels, dropout, norm)
            width = channels
        self.layers = nn.Sequential(*layers)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the features."""
        features: torch.Tensor = self.layers(image)
        return features


class Decoder(nn.Module):
    """Features (b, channels[-1], bottom, bottom) to an image (b, 1, size, size) in [0, 1].

    Parameters
    ----------
    config : BaselineConfig
        ``channels``, used from the last to the first.
    dropout : float
        Rate after each level.
    """

    def __init__(self, config: BaselineConfig, *, dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = [*reversed(config.channels), config.channels[0]]
        for width, channels in pairwise(widths):
            layers.append(nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1))
            layers += _after(channels, dropout, "batch")
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1), nn.Sigmoid())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the image."""
        image: torch.Tensor = self.layers(features)
        return image


def dense_code(config: BaselineConfig, length: int) -> nn.Module:
    """Features to a code of `length` numbers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(_volume(config), length))


def dense_features(config: BaselineConfig) -> nn.Module:
    """Code z to features for the decoder."""
    shape = (config.channels[-1], config.bottom, config.bottom)
    return nn.Sequential(nn.Linear(config.latent, _volume(config)), nn.Unflatten(1, shape))


def _volume(config: BaselineConfig) -> int:
    return config.channels[-1] * config.bottom**2


def _after(channels: int, dropout: float, norm: Norm) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.BatchNorm2d(channels)] if norm == "batch" else []
    layers.append(nn.LeakyReLU(SLOPE))
    return [*layers, nn.Dropout2d(dropout)] if dropout else layers
