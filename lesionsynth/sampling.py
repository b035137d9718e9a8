"""Draw a plan: the paper's distributions from Philox words, the same on every machine and NumPy version.

Each blob owns the counters of its component number, so the draws of one blob depend on nothing but (seed,
index, number). NumPy's generators are not used: their streams may change between releases.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth._recipe import DRAWN, Recipe
from lesionsynth.config import BlobClass, LesionConfig, Texture
from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.philox import Stream, philox4x32_10
from lesionsynth.plan import Triple, check_lung_fraction, check_word, too_much

UNIFORMS_PER_BLOB = 16
"""Draws reserved for a blob: adding a parameter must not shift the others."""
COUNTS = 2**32 - 1
"""Philox component of the draws that belong to the sample, not to a blob."""


def sample_recipe(
    config: LesionConfig,
    seed: int,
    index: int,
    lung_fraction: float,
    shape: tuple[int, int, int] | None,
    spacing: Triple,
) -> Recipe:
    """Draw the numbers of sample `index` (PAPER.md III-C).

    Raises
    ------
    TypeError, ValueError
        `index` or `lung_fraction` is of the wrong kind or out of range.
    """
    check_word("index", index)
    check_lung_fraction(lung_fraction)
    counts = [
        _count(kind, u, lung_fraction)
        for kind, u in zip(config.blob_classes, uniforms(seed, index, COUNTS, 1)[0], strict=False)
    ]
    kinds = [(*kind.radius, float(kind.spherical)) for kind in config.blob_classes]
    blobs = np.empty(sum(counts), dtype=DRAWN)
    _draw(
        blobs.view(np.float64).reshape(len(blobs), DRAWN.itemsize // 8),
        uniforms(seed, index, 0, len(blobs)),
        np.repeat(np.array(kinds, dtype=np.float64).reshape(-1, 3), counts, axis=0),
        np.array([*config.warp.amplitude, *config.warp.correlation]),
        _laws(config.texture),
    )
    return Recipe(
        seed=seed,
        index=index,
        lung_fraction=float(lung_fraction),
        shape=shape,
        scale=spacing if config.lengths == "mm" else (1.0, 1.0, 1.0),
        connectivity=config.connectivity,
        tau=config.tau,
        mean_threshold=config.texture.mean_threshold,
        blobs=blobs,
    )


def is_light(config: LesionConfig, scale: Triple, shape: tuple[int, int, int]) -> bool:
    """Tell whether even the most and largest lesions of a configuration can be rendered in a volume."""
    kinds, warp = config.blob_classes, config.warp
    counts = [1 if kind.count is None else math.ceil(kind.count[1]) for kind in kinds]
    low, high = (np.repeat([kind.radius[side] for kind in kinds], counts) for side in (0, 1))
    sigma_b = max(config.texture.sigma_b_low[1], config.texture.sigma_b_high[1])
    sigmas = np.full((len(low), 2), (config.texture.sigma_a[1], sigma_b))
    extents = 2.0 * high * (1.0 + warp.amplitude[1])
    return not len(low) or too_much(extents, low * warp.correlation[0], sigmas, scale, shape) is None


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
    low, high = low * factor, high * factor
    return math.floor(min(low + (high - low) * u, high) + 0.5)


def _laws(texture: Texture) -> npt.NDArray[np.float64]:
    """Bounds of the texture's distributions, in the order that `_draw` reads them."""
    bounds = texture.sigma_a, texture.a_range, texture.sigma_b_low, texture.sigma_b_high, texture.mu0
    return np.array([*sum(bounds, ()), texture.a_min_gap, texture.p_sigma_b_low], dtype=np.float64)


@kernel
def _draw(out: Any, uniforms: Any, kinds: Any, warp: Any, laws: Any) -> None:
    """Turn the uniforms of each blob into a row of `DRAWN`."""
    for b in range(out.shape[0]):
        u, row, (low, high, spherical) = uniforms[b], out[b], kinds[b]
        row[0] = b
        for i in range(3):
            row[1 + i] = _within(low, high, u[0] if spherical else u[i])
        _quaternion(u[3], u[4], u[5], row[4:8])
        row[8] = u[6]
        row[9:12] = -1.0
        row[12] = _within(warp[0], warp[1], u[7])
        row[13] = _within(warp[2], warp[3], u[8])
        row[14] = _within(laws[0], laws[1], u[9])
        # (a_L, a_U): independent uniforms given that a_U - a_L exceeds the gap. Redrawing until the gap is
        # met leaves the uniform law on a triangle; sorting two uniforms gives the same law at once.
        gap, slack = laws[10], laws[3] - laws[2] - laws[10]
        row[15] = laws[2] + slack * min(u[10], u[11])
        row[16] = min(laws[2] + gap + slack * max(u[10], u[11]), laws[3])
        common = u[12] < laws[11]
        row[17] = _within(laws[4] if common else laws[6], laws[5] if common else laws[7], u[13])
        row[18] = _within(laws[8], laws[9], u[14])


@inner
def _within(low: float, high: float, u: float) -> float:
    return min(low + (high - low) * u, high)  # rounding must not leave the range


@inner
def _quaternion(u: float, v: float, w: float, out: Any) -> None:
    """Uniform random rotation as a unit quaternion (Shoemake, Graphics Gems III, 1992)."""
    a, b = math.sqrt(1.0 - u), math.sqrt(u)
    s, t = 2.0 * math.pi * v, 2.0 * math.pi * w
    out[0], out[1] = a * math.sin(s), a * math.cos(s)
    out[2], out[3] = b * math.sin(t), b * math.cos(t)
