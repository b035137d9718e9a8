"""Settings of the comparison methods (PAPER.md IV-C), with the paper's value as default where it has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

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


@settings
class BaselineConfig:
    """One training run of one method (PAPER.md IV-C)."""

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
