"""Separable filters on the CPU, SciPy's definitions with reflecting edges.

Gaussian: acc = w_0 x_0, then acc = fma(w_k, x_{-k} + x_{+k}, acc) for k = 1, 2, ..., in float32. The order is
fixed so that another device can repeat the bits. Box mean: running sums in float64, divided once. Oracle of
both: `scipy.ndimage` in float64.
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
    source: Float32 = np.ascontiguousarray(volume, dtype=np.float32)
    filtered = False
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
        source, filtered = result, True
    return source if filtered else source.copy()


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


STRIP = 32
"""Rows of the output handled together. Fixed, so that the number of threads cannot change the rounding."""


def uniform_filter(
    volume: npt.NDArray[Any], size: int | Sequence[int], threads: int | None = None
) -> Float32:
    """Average over a box, as ``scipy.ndimage.uniform_filter`` with ``mode="reflect"``.

    Parameters
    ----------
    volume : (z, y, x) array
        Finite numbers; not modified.
    size : int or (3,) ints
        Voxels of the box, from ``i - size // 2`` on.
    threads : int, optional
        See `parallel_for`.

    Returns
    -------
    (z, y, x) float32 array

    Notes
    -----
    Running sums in float64, divided once: six additions a voxel whatever the size. Sums of a mask, or of an
    image whose voxels are multiples of 2**-40 below 1, are exact, so their order does not matter.
    """
    sizes = (size,) * 3 if isinstance(size, int) else tuple(size)
    result = np.empty(volume.shape, dtype=np.float32)
    strips = -(-volume.shape[1] // STRIP)
    parallel_for(strips, lambda lo, hi: _box_means(volume, result, *sizes, lo, hi), threads)
    return result


@numba.njit(nogil=True, cache=True)
def _box_means(volume: Any, result: Any, nz: int, ny: int, nx: int, lo: int, hi: int) -> None:
    """Average the strips lo ... hi - 1; sums along z move with the slice, those along y with the row."""
    depth, height, width = volume.shape
    sums_z = np.empty((STRIP + ny - 1, width), dtype=np.float64)
    sums_zy = np.empty(width, dtype=np.float64)
    line = np.empty(width + nx - 1, dtype=np.float64)
    for strip in range(lo, hi):
        first = strip * STRIP
        rows = min(STRIP, height - first)
        for z in range(depth):
            after, before = reflect(z - nz // 2 + nz - 1, depth), reflect(z - nz // 2 - 1, depth)
            for r in range(rows + ny - 1):
                y = reflect(first + r - ny // 2, height)
                if z == 0:
                    sums_z[r] = 0.0
                    for k in range(nz):
                        _add(sums_z[r], volume[reflect(k - nz // 2, depth), y])
                else:
                    _replace(sums_z[r], volume[after, y], volume[before, y])
            sums_zy[:] = 0.0
            for r in range(ny):
                _add(sums_zy, sums_z[r])
            for r in range(rows):
                if r:
                    _replace(sums_zy, sums_z[r + ny - 1], sums_z[r - 1])
                _means_along(sums_zy, line, nx, np.float64(nz) * ny * nx, result[z, first + r])


@numba.njit(nogil=True, cache=True)
def _add(sums: Any, row: Any) -> None:
    for x in range(sums.size):
        sums[x] += row[x]


@numba.njit(nogil=True, cache=True)
def _replace(sums: Any, new: Any, old: Any) -> None:
    for x in range(sums.size):
        sums[x] += np.float64(new[x]) - np.float64(old[x])


@numba.njit(nogil=True, cache=True)
def _means_along(row: Any, line: Any, size: int, count: float, out: Any) -> None:
    """Average along a row with its reflections, in windows of `size`; `line` is scratch."""
    width, left = row.size, size // 2
    for j in range(left):
        line[j] = row[reflect(j - left, width)]
    for j in range(width):
        line[left + j] = row[j]
    for j in range(left + width, line.size):
        line[j] = row[reflect(j - left, width)]
    total = 0.0
    for j in range(size):
        total += line[j]
    for x in range(width):
        out[x] = total / count
        if x + 1 < width:
            total += line[x + size] - line[x]
