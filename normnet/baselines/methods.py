"""The ten methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from normnet.baselines.autoencoders import AE
from normnet.baselines.base import Baseline
from normnet.baselines.config import BaselineConfig, Method
from normnet.baselines.gan import FAnoGAN
from normnet.baselines.mixture import GMVAE
from normnet.baselines.restoration import VAERestoration
from normnet.baselines.variational import VAE, BayesianVAE, ConstrainedVAE, ContextVAE, KLGradient, SpatialVAE

BY_NAME: Mapping[Method, type[Baseline]] = MappingProxyType(
    {
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
)


def build_baseline(config: BaselineConfig) -> Baseline:
    """Build an untrained detector; weights from torch's global generator."""
    return BY_NAME[config.method](config)
