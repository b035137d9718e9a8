"""Plans for tests: written by hand, or sampled from the paper's distributions shrunk to small volumes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import lesionsynth as ls

SHAPE = (12, 40, 44)
"""Volume of the `lungs` fixture."""

IDENTITY = (1.0, 0.0, 0.0, 0.0)


def small_config(**changes: Any) -> ls.LesionConfig:
    """Return the paper's configuration with radii, and sigmas to match, about a third of the paper's.

    Its numbers do not follow λ, whose default leaves volumes as small as the tests' next to no lesion.
    """
    config = ls.LesionConfig(
        small=ls.BlobClass(count=(3.0, 6.0), radius=(1.0, 3.0), scale_by_lung=False),
        medium=ls.BlobClass(count=(2.0, 4.0), radius=(2.5, 6.0), scale_by_lung=False),
        large=ls.BlobClass(probability=0.5, radius=(6.0, 10.0), scale_by_lung=False),
        texture=ls.Texture(sigma_a=(1.0, 6.0)),
    )
    return replace(config, **changes)


def blob(component: int = 0, **changes: Any) -> ls.Blob:
    """Return an undeformed sphere of radius 3 in the middle of the `lungs` fixture's left lung."""
    values: dict[str, Any] = {
        "component": component,
        "semi_axes": (3.2, 3.2, 3.2),
        "rotation": IDENTITY,
        "position": 0.0,
        "center": (6, 20, 12),
        "warp_amplitude": 0.0,
        "warp_correlation": 1.0,
        "sigma_a": 2.0,
        "a_low": 0.05,
        "a_high": 0.28,
        "sigma_b": 1.0,
        "mu0": 0.6,
    }
    return ls.Blob(**(values | changes))


def voxel(component: int, center: tuple[int, int, int], **changes: Any) -> ls.Blob:
    """Return a blob of the one voxel `center`."""
    return blob(component, semi_axes=(0.5, 0.5, 0.5), center=center, **changes)


def sheets() -> list[ls.Blob]:
    """Return three tilted sheets across all slices, one above the other: their boxes fill the volume each."""
    tilted = (math.cos(0.15), 0.0, math.sin(0.15), 0.0)
    return [
        blob(k, semi_axes=(0.8, 40.0, 40.0), rotation=tilted, center=(2 + 4 * k, 20, 22)) for k in range(3)
    ]


def plan(*blobs: ls.Blob, **changes: Any) -> ls.LesionPlan:
    """Return a plan of these blobs that fits the `lungs` fixture."""
    values: dict[str, Any] = {
        "seed": 5,
        "index": 9,
        "lung_fraction": 1.0,
        "shape": SHAPE,
        "scale": (1.0, 1.0, 1.0),
        "connectivity": 26,
        "tau": 1 / 3,
        "mean_threshold": 0.2,
        "blobs": blobs,
    }
    return ls.LesionPlan(**(values | changes))


def renderer(**options: Any) -> ls.LesionSynthesizer:
    """Return a synthesizer for rendering plans; its own distributions play no part."""
    return ls.LesionSynthesizer(small_config(), seed=0, **options)
