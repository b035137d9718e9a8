"""GMVAE: a VAE whose prior is a mixture of Gaussians (PAPER.md IV-C; Dilokthanakul et al., 2016)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from normnet.baselines.base import Reconstruction, absolute_error
from normnet.baselines.config import BaselineConfig
from normnet.baselines.networks import Decoder, Encoder, dense_code, dense_features
from normnet.baselines.variational import MAX_LOG_VARIANCE, gaussian_kl, sample

HIDDEN = 64
"""Width of the network from w to the mixture."""


@dataclass(frozen=True)
class MixtureTerms:
    """The three divergences of the GMVAE's bound, (b,) each, and what they are made of."""

    z: torch.Tensor
    """Conditional prior term: sum over c of p(c|z,w) KL(q(z|x) || p(z|w,c))."""
    w: torch.Tensor
    """KL(q(w|x) || N(0, I))."""
    c: torch.Tensor
    """KL(p(c|z,w) || uniform)."""
    weights: torch.Tensor
    """p(c|z,w), (b, components)."""


def gaussian_kl_between(
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    other_mean: torch.Tensor,
    other_log_variance: torch.Tensor,
) -> torch.Tensor:
    r"""KL divergence between diagonal Gaussians, summed over the last axis.

    Notes
    -----
    :math:`\frac12 \sum_i \big(\log\frac{s_i^2}{\sigma_i^2} + \frac{\sigma_i^2 + (\mu_i - m_i)^2}{s_i^2}
    - 1\big)`.
    """
    distance = (log_variance.exp() + (mean - other_mean).square()) / other_log_variance.exp()
    return 0.5 * (other_log_variance - log_variance + distance - 1).sum(dim=-1)


def mixture_terms(
    z: torch.Tensor,
    q_z: tuple[torch.Tensor, torch.Tensor],
    q_w: tuple[torch.Tensor, torch.Tensor],
    prior: tuple[torch.Tensor, torch.Tensor],
) -> MixtureTerms:
    """Compute the divergences of the bound for one draw of z and w.

    Parameters
    ----------
    z : (b, latent) tensor
        Drawn from q(z|x).
    q_z, q_w : pairs of (b, latent) and (b, mixture_latent) tensors
        Mean and log variance of q(z|x) and q(w|x).
    prior : pair of (b, components, latent) tensors
        Mean and log variance of p(z|w,c), for the w drawn from q(w|x).

    Returns
    -------
    MixtureTerms
        p(c|z,w) follows from Bayes' rule with a uniform p(c).
    """
    mean, log_variance = prior
    apart = (z[:, None] - mean).square() / log_variance.exp()
    log_density = -0.5 * (apart + log_variance + math.log(2 * math.pi)).sum(dim=-1)
    log_weights = log_density.log_softmax(dim=1)
    weights = log_weights.exp()
    each = gaussian_kl_between(q_z[0][:, None], q_z[1][:, None], mean, log_variance)
    return MixtureTerms(
        z=(weights * each).sum(dim=1),
        w=gaussian_kl(*q_w),
        c=(weights * (log_weights + math.log(weights.shape[1]))).sum(dim=1),
        weights=weights,
    )


class GMVAE(Reconstruction):
    r"""VAE with a mixture as prior, whose Gaussians a second code w shapes.

    Notes
    -----
    :math:`w \sim N(0, I)`, :math:`c` uniform, :math:`z \sim N(\mu_c(w), \sigma_c^2(w))`;
    :math:`L = \overline{|x - d(z)|} + \alpha (T_z + T_w + T_c)` with the terms of `mixture_terms`. Without
    the floor under the last term that the authors also try.
    """

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.code = dense_code(config, 2 * (config.latent + config.mixture_latent))
        self.features = dense_features(config)
        self.decoder = Decoder(config)
        self.mixture = nn.Sequential(
            nn.Linear(config.mixture_latent, HIDDEN),
            nn.Tanh(),
            nn.Linear(HIDDEN, 2 * config.components * config.latent),
            nn.Unflatten(1, (config.components, 2 * config.latent)),
        )

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return means and log variances of q(z|x) and q(w|x)."""
        lengths = [self.config.latent, self.config.latent, *2 * [self.config.mixture_latent]]
        mean, spread, w_mean, w_spread = self.code(self.encoder(images)).split(lengths, dim=1)
        return mean, _clamped(spread), w_mean, _clamped(w_spread)

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Return the image of the mean of q(z|x)."""
        normal: torch.Tensor = self.decoder(self.features(self.encode(images)[0]))
        return normal

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return reconstruction error and the weighted divergences."""
        mean, spread, w_mean, w_spread = self.encode(batch)
        z, w = sample(mean, spread), sample(w_mean, w_spread)
        prior_mean, prior_spread = self.mixture(w).chunk(2, dim=2)
        prior = (prior_mean, _clamped(prior_spread))
        terms = mixture_terms(z, (mean, spread), (w_mean, w_spread), prior)
        error = absolute_error(batch, self.decoder(self.features(z)))
        return error + self.config.kl_weight * (terms.z + terms.w + terms.c).mean()


def _clamped(log_variance: torch.Tensor) -> torch.Tensor:
    return log_variance.clamp(-MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)
