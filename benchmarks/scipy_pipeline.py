"""The generator with NumPy and SciPy, twice: as well as it is written by hand, and plainly.

`SciPy` is the one to beat. The displacement is a product of three thin B-spline matrices per component
(BLAS), the ellipsoid is evaluated in the blob's box, and `scipy.ndimage.gaussian_filter` smooths float32
boxes. `PlainSciPy` is what people write: `scipy.ndimage.map_coordinates` and float64. Filters run on one
thread, which is all SciPy has; NumPy's BLAS may use more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

import lesionsynth as ls
from benchmarks.geometry import Field, Mask, Site, radius_of, rotation_matrix
from benchmarks.pipeline import Generator, Noise, Philox, Stages

NODE_ORIGIN = (32768, 32768, 1 << 20)
"""Philox coordinates of control node (0, 0, 0), which keep those of its neighbours positive."""
SURFACE = 1e-9
"""A voxel on the surface to rounding is inside."""


class SciPy:
    """Blobs and filters.

    Parameters
    ----------
    real : float32 or float64
        Precision of the blobs' shape. float64 gives lesionsynth's labels exactly; float32 is faster and gives
        them but for voxels on a surface to its rounding.
    """

    def __init__(self, real: Any = np.float32) -> None:
        self._real = real

    def voxels(self, site: Site, noise: Noise) -> Mask:
        """See `benchmarks.pipeline.Library`."""
        axes = [
            (np.arange(s.start, s.stop) - c) * step
            for s, c, step in zip(site.box, site.center, site.plan.scale, strict=True)
        ]
        z, y, x = np.ix_(*(axis.astype(self._real) for axis in axes))
        # Rows of diag(1/s) R^T: the three terms of the ellipsoid's equation are products with them.
        turn = (rotation_matrix(site.blob.rotation) / np.array(site.blob.semi_axes)).T.astype(self._real)
        level: Any = 0.0
        if site.blob.warp_amplitude:
            z, y, x = (p + d for p, d in zip((z, y, x), self._displacement(site, axes, noise), strict=True))
        for row in turn:
            q = row[0] * z + row[1] * y + row[2] * x
            q *= q
            level = level + q if np.ndim(level) == 0 else np.add(level, q, out=level)
        inside: Mask = level <= self._real(1 + SURFACE)
        return inside

    def smooth(self, field: Field, sigma: tuple[float, ...]) -> Field:
        """See `benchmarks.pipeline.Library`."""
        result: Field = ndimage.gaussian_filter(field, sigma)
        return result

    def _displacement(self, site: Site, axes: list[Any], noise: Noise) -> list[npt.NDArray[Any]]:
        radius = radius_of(site.blob)
        spacing = site.blob.warp_correlation * radius
        nodes, weights = [], []
        for offsets in axes:
            t = offsets / spacing
            n = np.arange(np.floor(t.min()) - 1, np.floor(t.max()) + 3)
            nodes.append(n.astype(np.int64))
            weights.append(cubic_bspline(t[:, None] - n).astype(self._real))
        start = tuple(int(n[0]) + origin for n, origin in zip(nodes, NODE_ORIGIN, strict=True))
        shape = tuple(n.size for n in nodes)
        bound = self._real(site.blob.warp_amplitude * radius)
        parts = []
        for i in range(3):
            component = 3 * site.blob.component + i
            u = noise.uniform(site.plan, ls.ops.Stream.WARP, component, shape, start)
            c = (2 * u.astype(self._real) - 1) * bound
            # From the thinnest product to the widest: along z, then y, then x, each one a matrix product.
            c = np.tensordot(weights[0], c, axes=(1, 0))
            c = np.matmul(weights[1], c)
            parts.append(np.matmul(c, weights[2].T))
        return parts


class PlainSciPy(SciPy):
    """The same in SciPy's own words: `map_coordinates` for the displacement, float64 throughout."""

    def __init__(self) -> None:
        super().__init__(np.float64)

    def smooth(self, field: Field, sigma: tuple[float, ...]) -> Field:
        """See `benchmarks.pipeline.Library`."""
        result: Field = ndimage.gaussian_filter(field.astype(np.float64), sigma)
        return result

    def _displacement(self, site: Site, axes: list[Any], noise: Noise) -> list[npt.NDArray[Any]]:
        radius = radius_of(site.blob)
        places = [offsets / (site.blob.warp_correlation * radius) for offsets in axes]
        first = [int(np.floor(t.min())) - 2 for t in places]
        shape = tuple(int(np.floor(t.max())) + 4 - f for t, f in zip(places, first, strict=True))
        start = tuple(f + origin for f, origin in zip(first, NODE_ORIGIN, strict=True))
        bound = site.blob.warp_amplitude * radius
        grid = np.meshgrid(*(t - f for t, f in zip(places, first, strict=True)), indexing="ij")
        parts = []
        for i in range(3):
            component = 3 * site.blob.component + i
            u = noise.uniform(site.plan, ls.ops.Stream.WARP, component, shape, start)
            nodes = (2 * u.astype(np.float64) - 1) * bound
            parts.append(ndimage.map_coordinates(nodes, grid, order=3, mode="nearest", prefilter=False))
        return parts


def cubic_bspline(t: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Centred cardinal cubic B-spline."""
    t = np.abs(t)
    inner, outer = 2 / 3 - t * t * (1 - t / 2), np.clip(2 - t, 0, None) ** 3 / 6
    return np.where(t < 1, inner, outer)


def checked_stages() -> Stages:
    """Return what is compared with lesionsynth: its noise, shapes in float64, ties counted."""
    return Stages(SciPy(np.float64), Philox(), count_ties=True)


def timed_stages() -> Stages:
    """Return what is timed: NumPy's noise and float32 throughout."""
    return Stages(SciPy(), Generator())
