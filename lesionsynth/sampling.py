"""Draw a plan: the paper's distributions from Philox words, the same on every machine and NumPy version.

Each blob owns the counters of its component number, so the draws of one blob depend on nothing but (seed,
index, number). NumPy's generators are not used: their streams may change between releases.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.config import BlobClass, LesionConfig, Range, Texture
from lesionsynth.cpu._jit import kernel
from lesionsynth.cpu.philox import Stream, philox4x32_10
from lesionsynth.plan import Blob, LesionPlan, Triple

UNIFORMS_PER_BLOB = 16
"""Draws reserved for a blob: adding a parameter must not shift the others."""
COUNTS = 2**32 - 1
"""Philox component of the draws that belong to the sample, not to a blob."""


def sample_plan(
    config: LesionConfig,
    seed: int,
    index: int,
    lung_fraction: float,
    shape: tuple[int, int, int] | None,
    spacing: Triple,
) -> LesionPlan:
    """Draw the plan of sample `index` (PAPER.md III-C); arguments are checked by `LesionPlan`."""
    counts = [
        _count(kind, u, lung_fraction)
        for kind, u in zip(config.blob_classes, uniforms(seed, index, COUNTS, 1)[0], strict=False)
    ]
    kinds = [kind for kind, n in zip(config.blob_classes, counts, strict=True) for _ in range(n)]
    draws = uniforms(seed, index, 0, len(kinds))
    return LesionPlan(
        seed=seed,
        index=index,
        lung_fraction=lung_fraction,
        shape=shape,
        scale=spacing if config.lengths == "mm" else (1.0, 1.0, 1.0),
        connectivity=config.connectivity,
        tau=config.tau,
        mean_threshold=config.texture.mean_threshold,
        blobs=tuple(_blob(i, kind, config, draws[i].tolist()) for i, kind in enumerate(kinds)),
    )


def uniforms(seed: int, index: int, first: int, count: int) -> npt.NDArray[np.float64]:
    """Return (count, UNIFORMS_PER_BLOB) uniforms in [0, 1) of 53 bits for components ``first ...``."""
    out = np.empty((count, UNIFORMS_PER_BLOB))
    _fill(out, *(np.uint32(w) for w in (seed, Stream.PLAN, index, first)))
    return out


@kernel
def _fill(out: Any, seed: Any, stream: Any, index: Any, first: Any) -> None:
    """Two words make a uniform: 27 bits of one above 26 of the other."""
    for k in range(out.shape[0]):
        for block in range(out.shape[1] // 2):
            a, b, c, d = philox4x32_10(block, np.uint32(0), index, np.uint32(first + k), seed, stream)
            out[k, 2 * block] = (float(a >> 5) * 2.0**26 + float(b >> 6)) * 2.0**-53
            out[k, 2 * block + 1] = (float(c >> 5) * 2.0**26 + float(d >> 6)) * 2.0**-53


def _count(kind: BlobClass, u: float, lung_fraction: float) -> int:
    factor = lung_fraction if kind.scale_by_lung else 1.0
    if kind.probability is not None:
        return int(u < kind.probability * factor)
    assert kind.count is not None  # BlobClass holds exactly one of the two
    low, high = kind.count
    return math.floor(_within((low * factor, high * factor), u) + 0.5)


def _blob(number: int, kind: BlobClass, config: LesionConfig, u: list[float]) -> Blob:
    axes = [_within(kind.radius, u[0])] * 3 if kind.spherical else [_within(kind.radius, v) for v in u[0:3]]
    texture = config.texture
    a_low, a_high = _probability_bounds(texture, u[10], u[11])
    sigma_b = texture.sigma_b_low if u[12] < texture.p_sigma_b_low else texture.sigma_b_high
    return Blob(
        component=number,
        semi_axes=(axes[0], axes[1], axes[2]),
        rotation=_quaternion(u[3], u[4], u[5]),
        position=u[6],
        warp_amplitude=_within(config.warp.amplitude, u[7]),
        warp_correlation=_within(config.warp.correlation, u[8]),
        sigma_a=_within(texture.sigma_a, u[9]),
        a_low=a_low,
        a_high=a_high,
        sigma_b=_within(sigma_b, u[13]),
        mu0=_within(texture.mu0, u[14]),
    )


def _within(bounds: Range, u: float) -> float:
    low, high = bounds
    return min(low + (high - low) * u, high)  # rounding must not leave the range


def _probability_bounds(texture: Texture, u: float, v: float) -> Range:
    """Draw (a_L, a_U), independent uniforms given that a_U - a_L exceeds the gap.

    Redrawing until the gap is met leaves the uniform law on a triangle; sorting two uniforms gives the same
    law at once.
    """
    low, high = texture.a_range
    slack = high - low - texture.a_min_gap
    return low + slack * min(u, v), min(low + texture.a_min_gap + slack * max(u, v), high)


def _quaternion(u: float, v: float, w: float) -> tuple[float, float, float, float]:
    """Uniform random rotation as a unit quaternion (Shoemake, Graphics Gems III, 1992)."""
    a, b = math.sqrt(1.0 - u), math.sqrt(u)
    s, t = 2.0 * math.pi * v, 2.0 * math.pi * w
    return a * math.sin(s), a * math.cos(s), b * math.sin(t), b * math.cos(t)
