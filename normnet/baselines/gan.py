"""f-AnoGAN: a Wasserstein GAN, then an encoder into its code (PAPER.md IV-C; Schlegl et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from normnet.baselines.base import Phase, Reconstruction, descend
from normnet.baselines.config import BaselineConfig
from normnet.baselines.networks import Decoder, Encoder, dense_code, dense_features

BETAS = (0.0, 0.9)
"""Adam's for a critic with gradient penalty (Gulrajani et al., 2017)."""


def gradient_penalty(
    critic: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor, fake: torch.Tensor, mix: torch.Tensor
) -> torch.Tensor:
    r"""Penalise a critic whose slope between real and fake images is not 1.

    Parameters
    ----------
    critic : callable
        Images (b, 1, y, x) to scores (b, 1), each image by itself.
    real, fake : (b, 1, y, x) tensors
    mix : (b, 1, 1, 1) tensor
        Share of the real image, in [0, 1].

    Returns
    -------
    scalar tensor
        Mean of :math:`(\|\nabla_{\hat x} D(\hat x)\|_2 - 1)^2` at
        :math:`\hat x = m x + (1 - m) \tilde x`; Gulrajani et al. (2017). Differentiable in the critic.
    """
    between = (mix * real + (1 - mix) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    steepness: torch.Tensor = torch.linalg.vector_norm(slope.flatten(1), dim=1)
    return (steepness - 1).square().mean()


class FAnoGAN(Reconstruction):
    r"""Generator and critic trained as WGAN-GP, then an encoder trained as "izi_f".

    Notes
    -----
    Critic: :math:`\overline{D(G(z))} - \overline{D(x)} + \lambda P`; generator: :math:`-\overline{D(G(z))}`;
    encoder: :math:`\overline{(x - G(E(x)))^2} + \kappa \overline{(f(x) - f(G(E(x))))^2}` with the critic's
    features f, and both networks kept. Map :math:`|x - G(E(x))|`.
    """

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.generator = nn.Sequential(dense_features(config), Decoder(config))
        self.critic_features = Encoder(config, norm="none")
        self.critic_score = dense_code(config, 1)
        self.encoder = nn.Sequential(Encoder(config), dense_code(config, config.latent))

    def critic(self, images: torch.Tensor) -> torch.Tensor:
        """Return the critic's scores, (b, 1)."""
        score: torch.Tensor = self.critic_score(self.critic_features(images))
        return score

    def generate(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """Return images of `count` random codes."""
        image: torch.Tensor = self.generator(torch.randn(count, self.config.latent, device=like.device))
        return image

    def critic_loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the critic's loss."""
        with torch.no_grad():
            fake = self.generate(len(batch), batch)
        mix = torch.rand(len(batch), 1, 1, 1, device=batch.device)
        penalty = gradient_penalty(self.critic, batch, fake, mix)
        distance = self.critic(fake).mean() - self.critic(batch).mean()
        return distance + self.config.penalty_weight * penalty

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Return G(E(x))."""
        normal: torch.Tensor = self.generator(self.encoder(images))
        return normal

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the encoder's loss."""
        normal = self.reconstruct(batch)
        features: torch.Tensor = self.critic_features(batch)
        apart: torch.Tensor = (features - self.critic_features(normal)).square().mean()
        error: torch.Tensor = (batch - normal).square().mean()
        return error + self.config.feature_weight * apart

    def phases(self) -> list[Phase]:
        """Return the GAN's training and the encoder's."""
        return [Phase("gan", self._gan_step()), Phase("encoder", self._encoder_step())]

    def _gan_step(self) -> Callable[[torch.Tensor], float]:
        judges = [*self.critic_features.parameters(), *self.critic_score.parameters()]
        critic, maker = self.adam(judges, BETAS), self.adam(self.generator.parameters(), BETAS)
        count = 0

        def step(batch: torch.Tensor) -> float:
            nonlocal count
            count += 1
            loss = descend(self.critic_loss(batch), critic)
            if count % self.config.critic_steps == 0:
                descend(-self.critic(self.generate(len(batch), batch)).mean(), maker)
            return loss

        return step

    def _encoder_step(self) -> Callable[[torch.Tensor], float]:
        optimizer = self.adam(self.encoder.parameters())

        def step(batch: torch.Tensor) -> float:
            self.generator.eval()  # keeps its normalisation, too
            return descend(self.loss(batch), optimizer)

        return step
