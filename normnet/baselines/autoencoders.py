"""AE: a code without a prior (PAPER.md IV-C)."""

from __future__ import annotations

import torch

from normnet.baselines.base import Reconstruction, absolute_error
from normnet.baselines.config import BaselineConfig
from normnet.baselines.networks import Decoder, Encoder, dense_code, dense_features


class AE(Reconstruction):
    r"""Autoencoder with a dense bottleneck.

    Notes
    -----
    :math:`L = \overline{|x - d(e(x))|}`, map :math:`|x - d(e(x))|`.
    """

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.code = dense_code(config, config.latent)
        self.features = dense_features(config)
        self.decoder = Decoder(config)

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Return d(e(x))."""
        normal: torch.Tensor = self.decoder(self.features(self.code(self.encoder(images))))
        return normal

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the mean absolute error."""
        return absolute_error(batch, self.reconstruct(batch))
