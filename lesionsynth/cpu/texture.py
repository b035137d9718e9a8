"""Stage 3: lesion texture B_j on the tight bounding box of G_j (PAPER.md III-C.2, eq. 2-8).

    a1 ~ U[0, 1];  a2 = gaussian(a1, sigma_a);  a = rescale of a2 to [a_L, a_U] by its extremes on the box
    b1 = [v < a], v ~ U[0, 1];  b2 = gaussian(b1, sigma_b);  B = clip(beta b2, 0, 1)

The noise is Philox of the absolute voxel coordinate, so it depends on neither the box nor the order of
lesions.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.filters import gaussian_filter
from lesionsynth.cpu.philox import Stream, fill_uniform
from lesionsynth.plan import Blob, Component, LesionPlan

Float32 = npt.NDArray[np.float32]
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

FIXED_POINT = 2.0**26
"""A float32 of [0.125, 1] is a multiple of 2**-26, so sums in this unit are exact and know no order."""


def synthesize_texture(
    plan: LesionPlan,
    label: int,
    members: tuple[int, ...],
    labels: npt.NDArray[np.int32],
    box: Box,
    threads: int | None,
) -> tuple[Float32, Component]:
    """Synthesise the texture of one lesion.

    Parameters
    ----------
    plan : LesionPlan
        Holds the texture parameters; those of the lesion's first blob count.
    label : int
        The lesion's value in `labels`.
    members : tuple of int
        Its blobs.
    labels : (z, y, x) int32 array
        Merged lesions.
    box : three (start, stop) pairs
        Tight bounding box of the lesion.
    threads : int or None
        See `parallel_for`.

    Returns
    -------
    texture : float32 array
        B_j on the box, in [0, 1].
    component : Component
        The lesion as recorded in the rendered plan.
    """
    blob = plan.blobs[members[0]]
    probability = _probability(plan, blob, box, threads)
    salt = _field(plan, blob, Stream.SALT, box)
    _bernoulli(salt.ravel(), probability.ravel())
    b2 = gaussian_filter(salt, _sigmas(blob.sigma_b, plan), threads=threads)
    region = labels[tuple(slice(a, b) for a, b in box)]
    voxels, passing, total = _passing_sum(b2, region, label, np.float32(plan.mean_threshold))
    mean = total / FIXED_POINT / passing if passing else plan.mean_threshold
    beta = blob.mu0 / mean
    _scale_and_clip(b2.ravel(), np.float32(beta))
    record = Component(
        label=label, blobs=members, box=box, voxels=voxels, beta=beta, beta_fallback=passing == 0
    )
    return b2, record


def _probability(plan: LesionPlan, blob: Blob, box: Box, threads: int | None) -> Float32:
    """a(x), eq. 7-8. A field without range (one voxel, say) gives a_L everywhere.

    The rescale forgets the mean, so the noise is centred before filtering: a wide filter on a small box
    leaves a range near 1e-5, which float32 resolves around 0 but not around 1/2.
    """
    a1 = _field(plan, blob, Stream.PROBABILITY, box)
    a1 -= np.float32(0.5)
    a = gaussian_filter(a1, _sigmas(blob.sigma_a, plan), threads=threads)
    low, high = a.min(), a.max()
    slope = (
        np.float32((blob.a_high - blob.a_low) / (float(high) - float(low))) if high > low else np.float32(0)
    )
    a -= low
    a *= slope
    a += np.float32(blob.a_low)
    return a


def _field(plan: LesionPlan, blob: Blob, stream: Stream, box: Box) -> Float32:
    out = np.empty([b - a for a, b in box], dtype=np.float32)
    fill_uniform(out, plan.seed, int(stream), plan.index, blob.component, *(a for a, _ in box))
    return out


def _sigmas(sigma: float, plan: LesionPlan) -> tuple[float, float, float]:
    z, y, x = plan.scale
    return sigma / z, sigma / y, sigma / x


@numba.njit(nogil=True, cache=True)
def _bernoulli(v: Any, a: Any) -> None:
    """Eq. 2, in place: 1 with probability a, else 0."""
    for i in range(v.size):
        v[i] = np.float32(1.0) if v[i] < a[i] else np.float32(0.0)


@numba.njit(nogil=True, cache=True)
def _passing_sum(b2: Any, labels: Any, label: int, threshold: Any) -> tuple[int, int, int]:
    """Voxels of the lesion, those above the threshold, and the exact sum of these in units of 2**-26."""
    voxels, passing, total = 0, 0, np.int64(0)
    depth, height, width = b2.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                if labels[z, y, x] == label:
                    voxels += 1
                    if b2[z, y, x] > threshold:
                        passing += 1
                        total += np.int64(math.floor(np.float64(b2[z, y, x]) * FIXED_POINT + 0.5))
    return voxels, passing, int(total)


@numba.njit(nogil=True, cache=True)
def _scale_and_clip(b2: Any, beta: Any) -> None:
    """Eq. 5, in place."""
    for i in range(b2.size):
        b2[i] = min(max(b2[i] * beta, np.float32(0.0)), np.float32(1.0))
