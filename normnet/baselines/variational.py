"""The VAE and what the paper derives from it: spatial, context, constrained, Bayesian, KL gradient (IV-C)."""

from __future__ import annotations

import torch
from torch import nn

from normnet.baselines.base import Reconstruction, absolute_error
from normnet.baselines.config import BaselineConfig
from normnet.baselines.networks import Decoder, Encoder, dense_code, dense_features

MAX_LOG_VARIANCE = 10.0
"""Log variances are kept within this on both sides: their exponential must stay a number."""


def gaussian_kl(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    r"""KL divergence of diagonal Gaussians from the standard normal law.

    Parameters
    ----------
    mean, log_variance : (b, ...) tensors

    Returns
    -------
    (b,) tensor
        :math:`\frac12 \sum_i (\mu_i^2 + \sigma_i^2 - \log \sigma_i^2 - 1)`; Kingma and Welling (2014),
        appendix B.
    """
    terms = mean.square() + log_variance.exp() - log_variance - 1
    return 0.5 * terms.flatten(1).sum(dim=1)


def sample(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Draw from N(mean, exp(log_variance)), differentiable in both."""
    return mean + (0.5 * log_variance).exp() * torch.randn_like(mean)


class VAE(Reconstruction):
    r"""Variational autoencoder with a dense bottleneck (Kingma and Welling, 2014).

    Notes
    -----
    :math:`L = \overline{|x - d(z)|} + \alpha\, KL(q(z|x) \| N(0, I))`, :math:`z \sim q(z|x)`; the map takes
    the mean of q.
    """

    def __init__(self, config: BaselineConfig, *, dropout: float = 0.0) -> None:
        super().__init__(config)
        self.encoder = Encoder(config, dropout=dropout)
        self.code = self._make_code()
        self.features = self._make_features()
        self.decoder = Decoder(config, dropout=dropout)

    def _make_code(self) -> nn.Module:
        return dense_code(self.config, 2 * self.config.latent)

    def _make_features(self) -> nn.Module:
        return dense_features(self.config)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log variance of q(z|x)."""
        mean, log_variance = self.code(self.encoder(images)).chunk(2, dim=1)
        return mean, log_variance.clamp(-MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """Return the image of a code."""
        image: torch.Tensor = self.decoder(self.features(code))
        return image

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Return the image of the mean of q(z|x)."""
        return self.decode(self.encode(images)[0])

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return reconstruction error and weighted KL."""
        return self.elbo_loss(batch)[0]

    def elbo_loss(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the loss of the plain VAE, the mean of q, and the reconstruction."""
        mean, log_variance = self.encode(batch)
        normal = self.decode(sample(mean, log_variance))
        kl = gaussian_kl(mean, log_variance).mean()
        return absolute_error(batch, normal) + self.config.kl_weight * kl, mean, normal


class SpatialVAE(VAE):
    """VAE whose code is a map, 8 x 8 x 128 in the paper (Baur et al., 2019)."""

    def _make_code(self) -> nn.Module:
        return nn.Conv2d(self.config.channels[-1], 2 * self.config.spatial_channels, 1)

    def _make_features(self) -> nn.Module:
        return nn.Conv2d(self.config.spatial_channels, self.config.channels[-1], 1)


class ContextVAE(VAE):
    r"""VAE that also fills in a square cut out of its input (Zimmerer et al., 2019, MIDL).

    Notes
    -----
    :math:`L = L_{VAE}(x) + \overline{|x - d(\mu(\tilde x))|}`, where :math:`\tilde x` is x with a square of
    zeros; no noise and no KL for that.
    """

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the loss of the VAE and of filling in."""
        filled = self.reconstruct(cut_square(batch, self.config.context_crop))
        return super().loss(batch) + absolute_error(batch, filled)


def cut_square(batch: torch.Tensor, side: int) -> torch.Tensor:
    """Return a copy of (b, 1, y, x) images with a square of zeros in each, inside it and anywhere."""
    count, _, height, width = batch.shape
    top = torch.randint(0, height - side + 1, (count, 1, 1, 1), device=batch.device)
    left = torch.randint(0, width - side + 1, (count, 1, 1, 1), device=batch.device)
    y = torch.arange(height, device=batch.device).view(1, 1, -1, 1) - top
    x = torch.arange(width, device=batch.device).view(1, 1, 1, -1) - left
    square = (y >= 0) & (y < side) & (x >= 0) & (x < side)
    return batch.masked_fill(square, 0.0)


class ConstrainedVAE(VAE):
    r"""VAE whose reconstruction shall have the code of its input (Chen and Konukoglu, 2018).

    Notes
    -----
    :math:`L = L_{VAE}(x) + \lambda \overline{(\mu(x) - \mu(d(z)))^2}`.
    """

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the loss of the VAE and the distance of codes."""
        loss, mean, normal = self.elbo_loss(batch)
        again, _ = self.encode(normal)
        return loss + self.config.constraint_weight * (mean - again).square().mean()


class BayesianVAE(VAE):
    """VAE with dropout in training and after: the mean of many reconstructions (Pawlowski et al., 2018)."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config, dropout=config.dropout)

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Return the mean image of as many draws of dropout as configured; normalisation stays as it is."""
        dropouts = [(layer, layer.training) for layer in self.modules() if isinstance(layer, nn.Dropout2d)]
        try:
            for layer, _ in dropouts:
                layer.train()
            total = torch.zeros_like(images)
            for _ in range(self.config.dropout_samples):
                total = total + super().reconstruct(images)
        finally:
            for layer, training in dropouts:
                layer.train(training)
        return total / self.config.dropout_samples


class KLGradient(VAE):
    r"""The VAE, read by the gradient of its KL term (Zimmerer et al., 2019, MICCAI).

    Notes
    -----
    Map :math:`|\partial KL(q(z|x) \| N(0, I)) / \partial x|`: where x would have to change to become likely.
    """

    bounded = False

    def anomaly(self, images: torch.Tensor) -> torch.Tensor:
        """Return the absolute gradient of each slice's own KL."""
        with torch.enable_grad():
            inputs = images.detach().clone().requires_grad_()
            total = gaussian_kl(*self.encode(inputs)).sum()
            (gradient,) = torch.autograd.grad(total, inputs)
        return gradient.abs()
