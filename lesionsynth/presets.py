"""Ready-made configurations: the paper's generator, the ablations of its Table V, and fainter lesions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lesionsynth.config import BlobClass, LesionConfig, Texture, Warp


def covid_lung() -> LesionConfig:
    """Return the paper's generator (PAPER.md III-C), for voxels of 0.8 x 0.8 x 1 mm."""
    return LesionConfig()


def no_shapes() -> LesionConfig:
    """Table V without shape diversity: five undeformed spheres of radius 12 in any lung."""
    spheres = BlobClass(count=(5.0, 5.0), radius=(12.0, 12.0), scale_by_lung=False, spherical=True)
    still = Warp(amplitude=(0.0, 0.0), correlation=(1.0, 1.0))
    return replace(covid_lung(), small=None, medium=spheres, large=None, warp=still)


def no_probability_map() -> LesionConfig:
    """Table V without probability maps: a(x) = 0.2 everywhere (the paper prints "2")."""
    return replace(covid_lung(), texture=Texture(a_range=(0.2, 0.2), a_min_gap=0.0))


def no_salt_noise() -> LesionConfig:
    """Table V without salt-noise diversity: σ_b = 2 and μ0 = 150/255 (the paper prints "150")."""
    grey = 150.0 / 255.0
    return replace(
        covid_lung(), texture=Texture(sigma_b_low=(2.0, 2.0), sigma_b_high=(2.0, 2.0), mu0=(grey, grey))
    )


def faint() -> LesionConfig:
    """Return the paper's generator with lesions down to -665 HU in the mean: μ0 ~ U[0.15, 0.8].

    The paper's U[0.4, 0.8] ends at -440 HU, so that fainter ground glass is never shown to a network; its
    third kind of failure (V). For a threshold T below the paper's -500 HU.
    """
    return replace(covid_lung(), texture=Texture(mu0=(0.15, 0.8)))


BY_NAME: dict[str, Callable[[], LesionConfig]] = {
    "covid_lung": covid_lung,
    "no_shapes": no_shapes,
    "no_probability_map": no_probability_map,
    "no_salt_noise": no_salt_noise,
    "faint": faint,
}
"""Every preset, by the name a command line uses."""


def get(name: str) -> LesionConfig:
    """Return the preset called `name`.

    Raises
    ------
    ValueError
        There is no such preset; the message lists them.
    """
    if name not in BY_NAME:
        raise ValueError(f"preset must be one of {', '.join(BY_NAME)}, got {name!r}")
    return BY_NAME[name]()
