"""Settings of the comparison methods (PAPER.md IV-C), with the paper's value as default where it has one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from lesionsynth.strict import check_fields, settle, shown
from normnet.config import MOST_LEVELS, MOST_THREADS, MOST_WEIGHTS, check_phantoms

Method = Literal[
    "ae",
    "vae",
    "spatial_vae",
    "context_vae",
    "constrained_vae",
    "gmvae",
    "bayesian_vae",
    "kl_gradient",
    "vae_restoration",
    "f_anogan",
]
METHODS: tuple[Method, ...] = get_args(Method)
"""The rows of Table III, in its order; its "VAE Original" is ``vae`` with ``lungs_only`` off."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """One training run of one method (PAPER.md IV-C)."""

    method: Method
    """Which of the ten detectors."""
    data: Path | None = None
    """Store written by `normnet.prepare`; the built-in phantom where omitted."""
    output: Path = Path("runs/baseline")
    """Run folder: weights, configuration, losses."""
    overwrite: bool = False
    """Replace a trained baseline in `output`."""
    size: int = 128
    """Pixels of a square slice. The paper prints 64 for f-AnoGAN alone; the others' 8 x 8 bottleneck (spatial
    VAE) under four halvings gives 128."""
    field_mm: float = 320.0
    """Side in mm of the square around the lungs that is shrunk to `size`; grows for lungs that are wider."""
    lungs_only: bool = True
    """Show the lungs alone (IV-C); off gives the paper's "VAE Original"."""
    min_lung_cm2: float = 20.0
    """Slices with less lung are not trained on."""
    channels: tuple[int, ...] = (32, 64, 128, 128)
    """Feature maps of each level; a level halves the image. The paper prints no widths."""
    latent: int = 128
    """Length of z (IV-C)."""
    spatial_channels: int = 128
    """Channels of z of the spatial VAE, 8 x 8 x 128 in the paper."""
    kl_weight: float = 1e-6
    """α of the KL terms (IV-C), against the mean absolute error of a pixel."""
    context_crop: int = 32
    """Side in pixels of the square cut out for the context VAE (IV-C)."""
    constraint_weight: float = 0.01
    """Weight of the constrained VAE's distance of codes. The paper prints none."""
    components: int = 9
    """Gaussians of the GMVAE's prior. The paper prints no number."""
    mixture_latent: int = 1
    """Length of the GMVAE's w."""
    dropout: float = 0.2
    """Rate of the Bayesian VAE (IV-C)."""
    dropout_samples: int = 20
    """Reconstructions whose mean is its consensus."""
    restoration_steps: int = 500
    """Descents of VAE restoration. The paper prints no number."""
    restoration_weight: float = 0.2
    """Weight of the total variation of what restoration changes."""
    critic_steps: int = 5
    """Critic updates for each update of the f-AnoGAN generator."""
    penalty_weight: float = 10.0
    """Weight of the critic's gradient penalty."""
    feature_weight: float = 1.0
    """κ: weight of the critic's features in the loss of the f-AnoGAN encoder."""
    residual: Literal["absolute", "positive"] = "absolute"
    """Difference map: its absolute value, or only what is brighter than normal, as lesions are."""
    iterations: int = 6000
    """Optimiser steps (IV-C); f-AnoGAN takes as many for its encoder again."""
    minutes: float | None = None
    """Stop after this much training time, should it come first."""
    batch_size: int = 16
    """Slices of a step (IV-C)."""
    learning_rate: float = 3e-4
    """Adam's (IV-C)."""
    false_positives: float = 0.01
    """Share of the lung voxels of held-out healthy volumes that the calibrated threshold calls lesions."""
    held_out: int = 1
    """Healthy volumes kept for that calibration."""
    calibration_slices: int = 64
    """Slices of theirs that are used, evenly spread."""
    device: str = "auto"
    """"auto" takes CUDA where there is some, else the CPU."""
    threads: int | None = None
    """CPU threads; all cores where omitted."""
    seed: int = 0
    """Of weights, slices and noise."""
    phantoms: int = 6
    """Phantom volumes, `held_out` among them, without `data`."""
    phantom_shape: tuple[int, int, int] = (64, 512, 512)
    """Their size (z, y, x)."""
    phantom_spacing: tuple[float, float, float] = (1.0, 0.8, 0.8)
    """Their voxel size (z, y, x) in mm."""

    def __post_init__(self) -> None:
        """Check ranges."""
        settle(self)
        _check("method", self.method, self.method in METHODS, f"one of {', '.join(METHODS)}")
        for name in _COUNTS:
            _check(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("field_mm", "learning_rate", *(("minutes",) if self.minutes is not None else ())):
            value = getattr(self, name)
            _check(name, value, math.isfinite(value) and value > 0, "> 0")
        for name in _WEIGHTS:
            value = getattr(self, name)
            _check(name, value, math.isfinite(value) and value >= 0, ">= 0")
        _check("channels", self.channels, len(self.channels) > 0 and min(self.channels) >= 1, "widths >= 1")
        multiple = 2 ** len(self.channels)
        rule = f"a multiple of {multiple} (a halving for each of {len(self.channels)} channels)"
        _check("size", self.size, self.size % multiple == 0, rule)
        if self.method == "context_vae":
            _check("context_crop", self.context_crop, self.context_crop < self.size, f"< size={self.size}")
        _check("dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")
        share = self.false_positives
        _check("false_positives", share, 0 < share < 1, "in (0, 1)")
        residuals = ("absolute", "positive")
        _check("residual", self.residual, self.residual in residuals, "absolute or positive")
        _check("seed", self.seed, 0 <= self.seed < 2**32, "in [0, 2**32)")
        _check("threads", self.threads, self.threads is None or self.threads >= 1, ">= 1")
        fits = self.data is not None or self.phantoms > self.held_out
        _check("phantoms", self.phantoms, fits, f"> held_out={self.held_out}")
        check_fields(self, _DOMAINS)
        _check("channels", self.channels, len(self.channels) <= MOST_LEVELS, f"at most {MOST_LEVELS} widths")
        check_phantoms(self.phantom_shape)
        features = self.channels[-1] * self.bottom**2
        codes = (self.latent, self.spatial_channels, self.mixture_latent, self.components * self.latent)
        weights = 64 * sum(a * b for a, b in pairwise((1, *self.channels))) + 4 * features * self.latent
        weights += 64 * max(codes) * self.channels[-1]
        rule = f"such that a network has at most {MOST_WEIGHTS} weights (channels, size, latent, components)"
        _check("channels", self.channels, weights <= MOST_WEIGHTS, rule)

    @property
    def bottom(self) -> int:
        """Side of the encoder's last feature map."""
        return int(self.size // 2 ** len(self.channels))


_DOMAINS: dict[str, tuple[float, float]] = {
    "size": (1, 2048),
    "field_mm": (1.0, 10_000.0),
    "min_lung_cm2": (0.0, 1e9),
    "channels": (1, 4096),
    "latent": (1, 65_536),
    "spatial_channels": (1, 4096),
    "kl_weight": (0.0, 1e300),
    "context_crop": (1, 2048),
    "constraint_weight": (0.0, 1e300),
    "components": (1, 1000),
    "mixture_latent": (1, 4096),
    "dropout_samples": (1, 10_000),
    "restoration_steps": (1, 10**6),
    "restoration_weight": (0.0, 1e300),
    "critic_steps": (1, 10_000),
    "penalty_weight": (0.0, 1e300),
    "feature_weight": (0.0, 1e300),
    "iterations": (1, 10**9),
    "minutes": (0.0, 1e6),
    "batch_size": (1, 4096),
    "learning_rate": (1e-12, 10.0),
    "held_out": (1, 100_000),
    "calibration_slices": (1, 10**6),
    "threads": (1, MOST_THREADS),
    "phantoms": (1, 1000),
    "phantom_spacing": (0.01, 100.0),
}
"""Domains, far beyond use, that bound work and memory."""
_COUNTS = (
    "size",
    "latent",
    "spatial_channels",
    "context_crop",
    "components",
    "mixture_latent",
    "dropout_samples",
    "restoration_steps",
    "critic_steps",
    "iterations",
    "batch_size",
    "held_out",
    "calibration_slices",
    "phantoms",
)
_WEIGHTS = (
    "min_lung_cm2",
    "kl_weight",
    "constraint_weight",
    "restoration_weight",
    "penalty_weight",
    "feature_weight",
)


def paper(method: Method) -> BaselineConfig:
    """Return the paper's settings: 64 x 64 for f-AnoGAN, 128 x 128 for the others."""
    return BaselineConfig(method=method, size=64 if method == "f_anogan" else 128)


def small(method: Method) -> BaselineConfig:
    """Return settings for minutes on a CPU: 64 x 64 slices, narrow networks, a few phantoms."""
    return replace(
        paper(method),
        size=64,
        channels=(16, 32, 64),
        latent=64,
        spatial_channels=16,
        context_crop=16,
        restoration_steps=100,
        iterations=1500,
        minutes=3.0,
        learning_rate=1e-3,
        phantoms=4,
        phantom_shape=(64, 320, 400),
    )


PRESETS: dict[str, Callable[[Method], BaselineConfig]] = {"small": small, "paper": paper}
"""Scales, by the name the command line uses."""


def _check(name: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        text = shown(value)
        raise ValueError(f"{name} must be {rule}, got {text[1:-1] if isinstance(value, str) else text}")
