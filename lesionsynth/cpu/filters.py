"""Separable filters on the CPU, SciPy's definitions with reflecting edges.

Gaussian: acc = w_0 x_0, then acc = fma(w_k, x_{-k} + x_{+k}, acc) for k = 1, 2, ..., in float32. The order is fixed so
that another device can repeat the bits. Oracle: `scipy.ndimage` in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lesionsynth.cpu._threads import parallel_for
from lesionsynth.cpu.fma import fma

Float32 = npt.NDArray[np.float32]


def gaussian_taps(sigma: float, truncate: float = 4.0) -> Float32:
    """Weights w_0 ... w_r of a Gaussian, r = int(truncate * sigma + 0.5), normalised over -r ... r.

    Parameters
    ----------
    sigma : float
        Standard deviation in voxels; 0 gives the identity.
    truncate : float
        Radius in standard deviations.

    Returns
    -------
    (r + 1,) float32 array
        Normalised in float64, then rounded.
    """
    radius = int(truncate * sigma + 0.5)
    if sigma == 0 or radius == 0:
        return np.ones(1, dtype=np.float32)
    k = np.arange(radius + 1, dtype=np.float64)
    weights = np.exp(-0.5 * (k / sigma) ** 2)
    return np.asarray(weights / (weights[0] + 2.0 * weights[1:].sum()), dtype=np.float32)


def gaussian_filter(
    volume: Float32, sigmas: Sequence[float], truncate: float = 4.0, threads: int | None = None
) -> Float32:
    """Smooth a volume, as ``scipy.ndimage.gaussian_filter`` with ``mode="reflect"``.

    Parameters
    ----------
    volume : (z, y, x) float32 array
        C-contiguous; not modified.
    sigmas : (3,) floats
        Standard deviations along z, y, x in voxels; an axis with 0 is left alone.
    truncate : float
        Radius in standard deviations.
    threads : int, optional
        See `parallel_for`.

    Returns
    -------
    (z, y, x) float32 array
    """
    depth, height, width = volume.shape
    source = np.ascontiguousarray(volume, dtype=np.float32)
    for axis, sigma in enumerate(sigmas):
        taps = gaussian_taps(sigma, truncate)
        if len(taps) == 1:
            continue
        result = np.empty_like(source)
        if axis == 2:
            x, y = source.reshape(-1, width), result.reshape(-1, width)
            parallel_for(len(x), _rows_body(x, y, taps), threads)
        else:
            lines = (1, depth, height * width) if axis == 0 else (depth, height, width)
            x3, y3 = source.reshape(lines), result.reshape(lines)
            parallel_for(lines[0] * lines[1], _planes_body(x3, y3, taps), threads)
        source = result
    return source.copy() if source is volume else source


def _rows_body(x: Float32, y: Float32, taps: Float32) -> Any:
    return lambda lo, hi: _along_rows(x, y, taps, lo, hi)


def _planes_body(x: Float32, y: Float32, taps: Float32) -> Any:
    return lambda lo, hi: _across_rows(x, y, taps, lo, hi)


@numba.njit(nogil=True, cache=True)
def reflect(i: int, n: int) -> int:
    """Index of SciPy's "reflect" edge, d c b a | a b c d | d c b a, at any distance."""
    i %= 2 * n
    return i if i < n else 2 * n - 1 - i


BLOCK = 512
"""Voxels of a row summed together: accumulators and two source rows stay in the first-level cache."""


@numba.njit(nogil=True, cache=True)
def _across_rows(x: Any, y: Any, taps: Any, lo: int, hi: int) -> None:
    """Filter (outer, n, inner) along n, for the outputs lo <= outer * n + i < hi."""
    n, inner = x.shape[1], x.shape[2]
    acc = np.empty(BLOCK, dtype=np.float32)
    for line in range(lo, hi):
        o, i = line // n, line % n
        for start in range(0, inner, BLOCK):
            width = min(BLOCK, inner - start)
            centre = x[o, i, start : start + width]
            for j in range(width):
                acc[j] = taps[0] * centre[j]
            for k in range(1, taps.size):
                before = x[o, reflect(i - k, n), start : start + width]
                after = x[o, reflect(i + k, n), start : start + width]
                w = taps[k]
                for j in range(width):
                    acc[j] = fma(w, before[j] + after[j], acc[j])
            out = y[o, i, start : start + width]
            for j in range(width):
                out[j] = acc[j]


@numba.njit(nogil=True, cache=True)
def _along_rows(x: Any, y: Any, taps: Any, lo: int, hi: int) -> None:
    """Filter (rows, n) along n; each row is unfolded with its reflections first."""
    n, radius = x.shape[1], taps.size - 1
    row = np.empty(n + 2 * radius, dtype=np.float32)
    acc = np.empty(n, dtype=np.float32)
    for r in range(lo, hi):
        for j in range(radius):
            row[j] = x[r, reflect(j - radius, n)]
            row[n + radius + j] = x[r, reflect(n + j, n)]
        for j in range(n):
            row[radius + j] = x[r, j]
            acc[j] = taps[0] * x[r, j]
        for k in range(1, radius + 1):
            before, after = row[radius - k : radius - k + n], row[radius + k : radius + k + n]
            w = taps[k]
            for j in range(n):
                acc[j] = fma(w, before[j] + after[j], acc[j])
        for j in range(n):
            y[r, j] = acc[j]
