"""The ten detectors that PAPER.md IV-C compares with, their networks and their settings.

All share one encoder and one decoder, so that methods differ and networks do not (Baur et al., 2021).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import torch
from monai.networks.blocks import Convolution
from pydantic import Field
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import l1_loss, mse_loss

from normnet.config import (
    MOST_WEIGHTS,
    Count,
    LearningRate,
    Levels,
    Minutes,
    Phantoms,
    Seed,
    Shape,
    Size,
    Spacing,
    Steps,
    Threads,
    check_phantoms,
)
from normnet.settings import File, check, settings

Method = Literal[
    "ae", "vae", "spatial_vae", "context_vae", "constrained_vae", "gmvae", "bayesian_vae", "kl_gradient",
    "vae_restoration", "f_anogan",
]  # fmt: skip
METHODS: tuple[Method, ...] = get_args(Method)
"""The rows of Table III, in its order; its "VAE Original" is ``vae`` with ``lungs_only`` off."""
Pixels = Annotated[int, Field(ge=1, le=2048)]
Repeats = Annotated[int, Field(ge=1, le=10_000)]
Weight = Annotated[float, Field(ge=0, le=1e300)]
Step = Callable[[torch.Tensor], float]
"""Takes a batch (b, 1, size, size), changes the weights and returns the loss before."""


# ---- settings


@settings
class BaselineConfig:
    """One training run of one method; the paper's value (IV-C) is the default where it has one."""

    method: Method
    """Which of the ten detectors."""
    data: File | None = None
    """Store written by `normnet.prepare`; the built-in phantom where omitted."""
    output: File = Path("runs/baseline")
    """Run folder: weights, configuration, losses."""
    overwrite: bool = False
    """Replace a trained baseline in `output`."""
    size: Pixels = 128
    """Pixels of a square slice. The paper prints 64 for f-AnoGAN alone; the others' 8 x 8 bottleneck (spatial
    VAE) under four halvings gives 128."""
    field_mm: Annotated[float, Field(ge=1, le=10_000)] = 320.0
    """Side in mm of the square around the lungs that is shrunk to `size`; grows for lungs that are wider."""
    lungs_only: bool = True
    """Show the lungs alone (IV-C); off gives the paper's "VAE Original"."""
    min_lung_cm2: Annotated[float, Field(ge=0, le=1e9)] = 20.0
    """Slices with less lung are not trained on."""
    channels: Levels = (32, 64, 128, 128)
    """Feature maps of each level; a level halves the image. The paper prints no widths."""
    latent: Annotated[int, Field(ge=1, le=65_536)] = 128
    """Length of z (IV-C)."""
    spatial_channels: Size = 128
    """Channels of z of the spatial VAE, 8 x 8 x 128 in the paper."""
    kl_weight: Weight = 1e-6
    """α of the KL terms (IV-C), against the mean absolute error of a pixel."""
    context_crop: Pixels = 32
    """Side in pixels of the square cut out for the context VAE (IV-C)."""
    constraint_weight: Weight = 0.01
    """Weight of the constrained VAE's distance of codes. The paper prints none."""
    components: Annotated[int, Field(ge=1, le=1000)] = 9
    """Gaussians of the GMVAE's prior. The paper prints no number."""
    mixture_latent: Size = 1
    """Length of the GMVAE's w."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Rate of the Bayesian VAE (IV-C)."""
    dropout_samples: Repeats = 20
    """Reconstructions whose mean is its consensus."""
    restoration_steps: Annotated[int, Field(ge=1, le=10**6)] = 500
    """Descents of VAE restoration. The paper prints no number."""
    restoration_weight: Weight = 0.2
    """Weight of the total variation of what restoration changes."""
    critic_steps: Repeats = 5
    """Critic updates for each update of the f-AnoGAN generator."""
    penalty_weight: Weight = 10.0
    """Weight of the critic's gradient penalty."""
    feature_weight: Weight = 1.0
    """κ: weight of the critic's features in the loss of the f-AnoGAN encoder."""
    residual: Literal["absolute", "positive"] = "absolute"
    """Difference map: its absolute value, or only what is brighter than normal, as lesions are."""
    iterations: Steps = 6000
    """Optimiser steps (IV-C); f-AnoGAN takes as many for its encoder again."""
    minutes: Minutes | None = None
    """Stop after this much training time, should it come first."""
    batch_size: Size = 16
    """Slices of a step (IV-C)."""
    learning_rate: LearningRate = 3e-4
    """Adam's (IV-C)."""
    false_positives: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the lung voxels of held-out healthy volumes that the calibrated threshold calls lesions."""
    held_out: Count = 1
    """Healthy volumes kept for that calibration."""
    calibration_slices: Annotated[int, Field(ge=1, le=10**6)] = 64
    """Slices of theirs that are used, evenly spread."""
    device: str = "auto"
    """"auto" takes CUDA where there is some, else the CPU."""
    threads: Threads | None = None
    """CPU threads; all cores where omitted."""
    seed: Seed = 0
    """Of weights, slices and noise."""
    phantoms: Phantoms = 6
    """Phantom volumes, `held_out` among them, without `data`."""
    phantom_shape: Shape = (64, 512, 512)
    """Their size (z, y, x)."""
    phantom_spacing: Spacing = (1.0, 0.8, 0.8)
    """Their voxel size (z, y, x) in mm."""

    def __post_init__(self) -> None:
        """Check what fields ask of each other."""
        multiple = 2 ** len(self.channels)
        rule = f"a multiple of {multiple} (a halving for each of {len(self.channels)} channels)"
        check("size", self.size, self.size % multiple == 0, rule)
        if self.method == "context_vae":
            check("context_crop", self.context_crop, self.context_crop < self.size, f"< size={self.size}")
        fits = self.data is not None or self.phantoms > self.held_out
        check("phantoms", self.phantoms, fits, f"> held_out={self.held_out}")
        check_phantoms(self.phantom_shape)
        features = self.channels[-1] * self.bottom**2
        codes = (self.latent, self.spatial_channels, self.mixture_latent, self.components * self.latent)
        weights = 64 * sum(a * b for a, b in pairwise((1, *self.channels))) + 4 * features * self.latent
        weights += 64 * max(codes) * self.channels[-1]
        rule = f"such that a network has at most {MOST_WEIGHTS} weights (channels, size, latent, components)"
        check("channels", self.channels, weights <= MOST_WEIGHTS, rule)

    @property
    def bottom(self) -> int:
        """Side of the encoder's last feature map."""
        return int(self.size // 2 ** len(self.channels))


def paper(method: Method) -> BaselineConfig:
    """Return the paper's settings: 64 x 64 for f-AnoGAN, 128 x 128 for the others."""
    return BaselineConfig(method=method, size=64 if method == "f_anogan" else 128)


def small(method: Method) -> BaselineConfig:
    """Return settings for minutes on a CPU: 64 x 64 slices, narrow networks, a few phantoms."""
    return replace(
        paper(method),
        size=64, channels=(16, 32, 64), latent=64, spatial_channels=16, context_crop=16,
        restoration_steps=100, iterations=1500, minutes=3.0, learning_rate=1e-3,
        phantoms=4, phantom_shape=(64, 320, 400),
    )  # fmt: skip


PRESETS: dict[str, Callable[[Method], BaselineConfig]] = {"small": small, "paper": paper}
"""Scales, by the name the command line uses."""


# ---- what every detector is


def build_baseline(config: BaselineConfig) -> Baseline:
    """Build an untrained detector; weights from torch's global generator."""
    return BY_NAME[config.method](config)


class Baseline(nn.Module):
    """An unsupervised detector of anomalies in slices; yours has a `loss`, and `normal` or `anomaly`.

    Parameters
    ----------
    config : BaselineConfig
        Its settings.

    Attributes
    ----------
    calibration : dict of str to float
        From healthy held-out slices: ``scale`` and ``threshold`` (see `normnet.baselines.train.calibrate`).
        Empty before training.
    """

    bounded = True
    """Whether anomalies lie in [0, 1] by themselves; otherwise a map a becomes a / (a + scale)."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.config = config
        self.calibration: dict[str, float] = {}

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the training loss of slices (b, 1, size, size): a scalar."""
        raise NotImplementedError

    def normal(self, images: torch.Tensor) -> torch.Tensor:
        """Return what `images` would be if healthy; with noise only where noise is the method."""
        raise NotImplementedError

    def anomaly(self, images: torch.Tensor) -> torch.Tensor:
        """Return a map >= 0 for images (b, 1, size, size): here their difference from normal."""
        with torch.no_grad():
            change = images - self.normal(images)
        return (change.abs() if self.config.residual == "absolute" else change).clamp(0, 1)

    def phases(self) -> dict[str, Step]:
        """Return the parts of training by name, in order: here one, that descends `loss`."""
        return {"train": self.descent(self.loss, self.parameters())}

    def descent(
        self,
        loss: Callable[[torch.Tensor], torch.Tensor],
        parameters: Iterable[nn.Parameter],
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> Step:
        """Return a step of Adam down a loss, with the learning rate of the configuration."""
        optimizer = torch.optim.Adam(parameters, lr=self.config.learning_rate, betas=betas)

        def step(batch: torch.Tensor) -> float:
            optimizer.zero_grad()
            value = loss(batch)
            torch.autograd.backward(value)
            optimizer.step()
            return float(value.detach())

        return step


# ---- the methods


class AE(Baseline):
    r"""Autoencoder with a dense bottleneck: :math:`L = \overline{|x - d(e(x))|}`."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.encoder = encoder(config, config.latent)
        self.decoder = decoder(config, config.latent)

    def normal(self, images: torch.Tensor) -> torch.Tensor:
        """Return d(e(x))."""
        image: torch.Tensor = self.decoder(self.encoder(images))
        return image

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the mean absolute error."""
        return l1_loss(batch, self.normal(batch))


class VAE(Baseline):
    r"""Variational autoencoder with a dense bottleneck (Kingma and Welling, 2014).

    :math:`L = \overline{|x - d(z)|} + \alpha\, KL(q(z|x) \| N(0, I))`, :math:`z \sim q(z|x)`; the map takes
    the mean of q.
    """

    spatial = False
    """Whether the code is a map."""

    def __init__(self, config: BaselineConfig, *, dropout: float = 0.0) -> None:
        super().__init__(config)
        length = config.spatial_channels if self.spatial else config.latent
        self.encoder = encoder(config, 2 * length, dropout=dropout, spatial=self.spatial)
        self.decoder = decoder(config, length, dropout=dropout, spatial=self.spatial)

    def encode(self, images: torch.Tensor) -> Normal:
        """Return q(z|x)."""
        return gaussian(*self.encoder(images).chunk(2, dim=1))

    def normal(self, images: torch.Tensor) -> torch.Tensor:
        """Return the image of the mean of q(z|x)."""
        image: torch.Tensor = self.decoder(self.encode(images).mean)
        return image

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return reconstruction error and weighted KL."""
        return self.elbo_loss(batch)[0]

    def elbo_loss(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the loss of the plain VAE, the mean of q, and the reconstruction."""
        q = self.encode(batch)
        image = self.decoder(q.rsample())
        loss = l1_loss(batch, image) + self.config.kl_weight * standard_kl(q).mean()
        return loss, q.mean, image


class SpatialVAE(VAE):
    """VAE with a map as code, 8 x 8 x 128 in the paper (Baur et al., 2019)."""

    spatial = True


class ContextVAE(VAE):
    r"""VAE that also fills in a square cut out of its input (Zimmerer et al., 2019, MIDL).

    :math:`L = L_{VAE}(x) + \overline{|x - d(\mu(\tilde x))|}`, where :math:`\tilde x` is x with a square of
    zeros; no noise and no KL for that.
    """

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the loss of the VAE and of filling in."""
        filled = self.normal(cut_square(batch, self.config.context_crop))
        return super().loss(batch) + l1_loss(batch, filled)


class ConstrainedVAE(VAE):
    r"""VAE whose reconstruction shall have the code of its input (Chen and Konukoglu, 2018).

    :math:`L = L_{VAE}(x) + \lambda \overline{(\mu(x) - \mu(d(z)))^2}`.
    """

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the loss of the VAE and the distance of codes."""
        loss, mean, image = self.elbo_loss(batch)
        return loss + self.config.constraint_weight * mse_loss(mean, self.encode(image).mean)


class GMVAE(Baseline):
    r"""VAE with a mixture as prior, whose Gaussians a second code w shapes (Dilokthanakul et al., 2016).

    :math:`w \sim N(0, I)`, :math:`c` uniform, :math:`z \sim N(\mu_c(w), \sigma_c^2(w))`;
    :math:`L = \overline{|x - d(z)|} + \alpha (T_z + T_w + T_c)` with the terms of `mixture_terms`. Without
    the floor under the last term that the authors also try.
    """

    HIDDEN = 64
    """Width of the network from w to the mixture."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.encoder = encoder(config, 2 * (config.latent + config.mixture_latent))
        self.decoder = decoder(config, config.latent)
        self.mixture = nn.Sequential(
            nn.Linear(config.mixture_latent, self.HIDDEN),
            nn.Tanh(),
            nn.Linear(self.HIDDEN, 2 * config.components * config.latent),
            nn.Unflatten(1, (config.components, 2 * config.latent)),
        )

    def encode(self, images: torch.Tensor) -> tuple[Normal, Normal]:
        """Return q(z|x) and q(w|x)."""
        lengths = [self.config.latent] * 2 + [self.config.mixture_latent] * 2
        z_mean, z_spread, w_mean, w_spread = self.encoder(images).split(lengths, dim=1)
        return gaussian(z_mean, z_spread), gaussian(w_mean, w_spread)

    def normal(self, images: torch.Tensor) -> torch.Tensor:
        """Return the image of the mean of q(z|x)."""
        image: torch.Tensor = self.decoder(self.encode(images)[0].mean)
        return image

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return reconstruction error and the weighted divergences."""
        q_z, q_w = self.encode(batch)
        z, w = q_z.rsample(), q_w.rsample()
        of_z, of_w, of_c = mixture_terms(z, q_z, q_w, gaussian(*self.mixture(w).chunk(2, dim=2)))
        return l1_loss(batch, self.decoder(z)) + self.config.kl_weight * (of_z + of_w + of_c).mean()


class BayesianVAE(VAE):
    """VAE with dropout in training and after: the mean of many reconstructions (Pawlowski et al., 2018)."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config, dropout=config.dropout)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but dropout, which stays on."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, nn.Dropout2d):
                layer.training = True
        return self

    def normal(self, images: torch.Tensor) -> torch.Tensor:
        """Return the mean image of as many draws of dropout as configured."""
        total = torch.zeros_like(images)
        for _ in range(self.config.dropout_samples):
            total = total + super().normal(images)
        return total / self.config.dropout_samples


class KLGradient(VAE):
    r"""The VAE, read by the gradient of its KL term (Zimmerer et al., 2019, MICCAI).

    Map :math:`|\partial KL(q(z|x) \| N(0, I)) / \partial x|`: where x would have to change to become likely.
    """

    bounded = False

    def anomaly(self, images: torch.Tensor) -> torch.Tensor:
        """Return the absolute gradient of each slice's own KL."""
        with torch.enable_grad():
            inputs = images.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(standard_kl(self.encode(inputs)).sum(), inputs)
        return gradient.abs()


class VAERestoration(VAE):
    r"""The VAE, read by what has to be changed to make a slice likely (You et al., 2019).

    :math:`\min_x \sum|x - d(\mu(x))| + \alpha N\, KL(q(z|x) \| N(0, I)) + \lambda TV(x - y)` for the slice y
    with N pixels: the negative bound of the VAE, and a total variation that keeps changes together. Descent
    takes a step only where it lowers the objective, so that it never rises.
    """

    FIRST_STEP = 0.01
    """Of the descent, per unit of gradient; each slice finds its own from there."""
    GROWTH, SHRINKAGE = 1.2, 0.5
    """Of that step, after one that helped and after one that did not."""

    def objective(self, images: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Return the objective of each slice, (b,)."""
        q = self.encode(images)
        error: torch.Tensor = (images - self.decoder(q.mean)).abs().flatten(1).sum(dim=1)
        prior = self.config.kl_weight * images[0].numel() * standard_kl(q)
        return error + prior + self.config.restoration_weight * total_variation(images - given)

    def normal(self, images: torch.Tensor) -> torch.Tensor:
        """Return the restored slices, in [0, 1]."""
        current = images.detach().clone()
        pace = torch.full((len(images), 1, 1, 1), self.FIRST_STEP, device=images.device, dtype=images.dtype)
        for _ in range(self.config.restoration_steps):
            with torch.enable_grad():
                inputs = current.requires_grad_()
                value = self.objective(inputs, images)
                (gradient,) = torch.autograd.grad(value.sum(), inputs)
            with torch.no_grad():
                tried = (inputs - pace * gradient).clamp(0, 1)
                better = (self.objective(tried, images) < value).view(-1, 1, 1, 1)
                current = torch.where(better, tried, inputs)
                pace = pace * torch.where(better, self.GROWTH, self.SHRINKAGE)
        return current.detach()


class FAnoGAN(Baseline):
    r"""A Wasserstein GAN with gradient penalty, then an encoder trained as "izi_f" (Schlegl et al., 2019).

    Critic: :math:`\overline{D(G(z))} - \overline{D(x)} + \lambda P`; generator: :math:`-\overline{D(G(z))}`;
    encoder: :math:`\overline{(x - G(E(x)))^2} + \kappa \overline{(f(x) - f(G(E(x))))^2}` with the critic's
    features f, and both networks kept. Map :math:`|x - G(E(x))|`.
    """

    BETAS = (0.0, 0.9)
    """Adam's for a critic with gradient penalty (Gulrajani et al., 2017)."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.generator = decoder(config, config.latent)
        self.critic = encoder(config, 1, norm=None)  # the penalty is one of each image by itself
        self.encoder = encoder(config, config.latent)

    def critic_loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the critic's loss."""
        with torch.no_grad():
            fake = self._draw(batch)
        mix = torch.rand(len(batch), 1, 1, 1, device=batch.device)
        penalty = gradient_penalty(self.critic, batch, fake, mix)
        distance: torch.Tensor = self.critic(fake).mean() - self.critic(batch).mean()
        return distance + self.config.penalty_weight * penalty

    def generator_loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the generator's loss, for as many images as there are in the batch."""
        return torch.neg(self.critic(self._draw(batch)).mean())

    def normal(self, images: torch.Tensor) -> torch.Tensor:
        """Return G(E(x))."""
        image: torch.Tensor = self.generator(self.encoder(images))
        return image

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the encoder's loss."""
        image, features = self.normal(batch), self.critic[:-1]
        apart = mse_loss(features(image), features(batch))
        return mse_loss(image, batch) + self.config.feature_weight * apart

    def phases(self) -> dict[str, Step]:
        """Return the GAN's training and the encoder's."""
        critic = self.descent(self.critic_loss, self.critic.parameters(), self.BETAS)
        generator = self.descent(self.generator_loss, self.generator.parameters(), self.BETAS)
        inverse = self.descent(self.loss, self.encoder.parameters())
        count = itertools.count(1)

        def gan_step(batch: torch.Tensor) -> float:
            loss = critic(batch)
            if next(count) % self.config.critic_steps == 0:
                generator(batch)
            return loss

        def encoder_step(batch: torch.Tensor) -> float:
            self.generator.eval()  # keeps its normalisation, too
            return inverse(batch)

        return {"gan": gan_step, "encoder": encoder_step}

    def _draw(self, batch: torch.Tensor) -> torch.Tensor:
        """Return images of random codes, as many as in the batch."""
        image: torch.Tensor = self.generator(torch.randn(len(batch), self.config.latent, device=batch.device))
        return image


BY_NAME: dict[Method, type[Baseline]] = {
    "ae": AE,
    "vae": VAE,
    "spatial_vae": SpatialVAE,
    "context_vae": ContextVAE,
    "constrained_vae": ConstrainedVAE,
    "gmvae": GMVAE,
    "bayesian_vae": BayesianVAE,
    "kl_gradient": KLGradient,
    "vae_restoration": VAERestoration,
    "f_anogan": FAnoGAN,
}


# ---- networks; their sizes are ours: the paper prints the code's alone


def encoder(
    config: BaselineConfig,
    length: int,
    *,
    dropout: float = 0.0,
    norm: Literal["batch"] | None = "batch",
    spatial: bool = False,
) -> nn.Sequential:
    """Build a network from images (b, 1, size, size) to codes (b, length); `spatial`: (b, length, y, x)."""
    levels, width = _levels((1, *config.channels), dropout, norm=norm), config.channels[-1]
    if spatial:
        return nn.Sequential(*levels, nn.Conv2d(width, length, 1))
    return nn.Sequential(*levels, nn.Flatten(), nn.Linear(width * config.bottom**2, length))


def decoder(
    config: BaselineConfig, length: int, *, dropout: float = 0.0, spatial: bool = False
) -> nn.Sequential:
    """Build a network from codes, as of `encoder`, to images in [0, 1]."""
    shape = (config.channels[-1], config.bottom, config.bottom)
    if spatial:
        first = nn.Sequential(nn.Conv2d(length, shape[0], 1))
    else:
        first = nn.Sequential(nn.Linear(length, math.prod(shape)), nn.Unflatten(1, shape))
    widths = (*reversed(config.channels), config.channels[0])
    levels = _levels(widths, dropout, norm="batch", is_transposed=True)
    return nn.Sequential(*first, *levels, nn.Conv2d(widths[-1], 1, 3, padding=1), nn.Sigmoid())


def _levels(widths: Iterable[int], dropout: float, **kind: Any) -> list[nn.Module]:
    """Halve or double the image at each level, then normalise, activate and drop whole channels."""
    return [
        Convolution(
            2, a, b, strides=2, kernel_size=4, padding=1, output_padding=0, adn_ordering="NAD",
            act=("leakyrelu", {"negative_slope": 0.2}), dropout=dropout or None, dropout_dim=2, **kind,
        )
        for a, b in pairwise(widths)
    ]  # fmt: skip


# ---- terms of the losses


def gaussian(mean: torch.Tensor, log_variance: torch.Tensor) -> Normal:
    """Return diagonal Gaussians; variances are kept within exp(±10), so that they stay numbers."""
    return Normal(mean, (0.5 * log_variance.clamp(-10, 10)).exp(), validate_args=False)


def standard_kl(q: Normal) -> torch.Tensor:
    """KL divergence of diagonal Gaussians (b, ...) from the standard normal law, (b,)."""
    return kl_divergence(q, Normal(0.0, 1.0)).flatten(1).sum(dim=1)


def mixture_terms(
    z: torch.Tensor, q_z: Normal, q_w: Normal, prior: Normal
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""Compute the three divergences of the GMVAE's bound, (b,) each, for one draw of z and w.

    :math:`\sum_c p(c|z,w) KL(q(z|x) \| p(z|w,c))`, :math:`KL(q(w|x) \| N(0, I))` and
    :math:`KL(p(c|z,w) \| \text{uniform})` of q(z|x), q(w|x) and the `prior` p(z|w,c), (b, components,
    latent); p(c|z,w) follows from Bayes' rule with a uniform p(c).
    """
    log_weights = prior.log_prob(z[:, None]).sum(dim=-1).log_softmax(dim=1)  # type: ignore[no-untyped-call]
    weights = log_weights.exp()
    q = Normal(q_z.mean[:, None], q_z.stddev[:, None], validate_args=False)
    apart = (weights * kl_divergence(q, prior).sum(dim=-1)).sum(dim=1)
    return apart, standard_kl(q_w), (weights * (log_weights + math.log(weights.shape[1]))).sum(dim=1)


def cut_square(batch: torch.Tensor, side: int) -> torch.Tensor:
    """Return a copy of (b, 1, y, x) images with a square of zeros in each, inside it and anywhere."""
    count, _, height, width = batch.shape
    top = torch.randint(0, height - side + 1, (count, 1, 1, 1), device=batch.device)
    left = torch.randint(0, width - side + 1, (count, 1, 1, 1), device=batch.device)
    y = torch.arange(height, device=batch.device).view(1, 1, -1, 1) - top
    x = torch.arange(width, device=batch.device).view(1, 1, 1, -1) - left
    return batch.masked_fill((y >= 0) & (y < side) & (x >= 0) & (x < side), 0.0)


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """Sum of absolute differences between neighbours, (b, 1, y, x) to (b,)."""
    down, across = (images.diff(dim=axis).abs().flatten(1).sum(dim=1) for axis in (2, 3))
    return down + across


def gradient_penalty(
    critic: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor, fake: torch.Tensor, mix: torch.Tensor
) -> torch.Tensor:
    r"""Penalise a critic, (b, 1, y, x) images to (b, 1) scores, whose slope from fake to real is not 1.

    Mean of :math:`(\|\nabla_{\hat x} D(\hat x)\|_2 - 1)^2` at :math:`\hat x = m x + (1 - m) \tilde x` with
    the shares m (b, 1, 1, 1) of the real image (Gulrajani et al., 2017). Differentiable in the critic.
    """
    between = (mix * real + (1 - mix) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    steepness: torch.Tensor = torch.linalg.vector_norm(slope.flatten(1), dim=1)
    return (steepness - 1).square().mean()
