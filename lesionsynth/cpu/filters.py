"""Separable filters on the CPU, SciPy's definitions with reflecting edges.

Gaussian: float32, along x, then y, then z; sixteen lines at once, see `lesionsynth.cpu.engine.lines`.
Box mean: running sums in float64, divided once. Oracle of both: `scipy.ndimage` in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.engine.lines import aligned, kernel_of, margin_of, pitch_of, rows_of, smooth
from lesionsynth.cpu.engine.memory import output
from lesionsynth.cpu.engine.simd import LANES, load, store, transpose
from lesionsynth.cpu.engine.threads import parallel_for, team_for

Float32 = npt.NDArray[np.float32]


def gaussian_filter(
    volume: npt.NDArray[Any], sigmas: Sequence[float], truncate: float = 4.0, threads: int | None = None
) -> Float32:
    """Smooth a volume, as ``scipy.ndimage.gaussian_filter`` with ``mode="reflect"``: along x, then y, then z.

    Parameters
    ----------
    volume : (z, y, x) array
        Any strides, read as float32; not modified.
    sigmas : (3,) floats
        Standard deviations along z, y, x in voxels; an axis with 0 is left alone.
    truncate : float
        Radius in standard deviations.
    threads : int, optional
        See `parallel_for`.

    Returns
    -------
    (z, y, x) float32 array

    Notes
    -----
    Filters in place in the result, whose rows are padded to whole vectors where their length is no multiple
    of 16. A voxel costs at most min(r, n / 2) multiply-adds along an axis of n voxels, r = truncate sigma;
    see `lesionsynth.cpu.engine.lines`.
    """
    depth, height, width = volume.shape
    threads = team_for(volume.size, threads)
    pitch = pitch_of(width)
    field = output(((depth * height + LANES) * pitch,), np.float32)  # `transpose` reads up to 15 rows on
    padded = field[: depth * height * pitch].reshape(depth, height, pitch)
    sizes = zip(volume.shape, sigmas, strict=True)
    weights_z, weights_y, weights_x = (kernel_of(n, float(sigma), float(truncate)) for n, sigma in sizes)

    def planes(lo: int, hi: int) -> None:
        padded[lo:hi, :, :width] = volume[lo:hi]
        padded[lo:hi, :, width:] = 0
        _smooth_planes(field, height, width, weights_y, weights_x, lo, hi)

    parallel_for(depth, planes, threads)
    if weights_z.size > 1:
        parallel_for(
            height, lambda lo, hi: _smooth_depth(field, depth, height, width, weights_z, lo, hi), threads
        )
    return np.ascontiguousarray(padded[:, :, :width])


@inner
def scratch_for(weights: Any, n: int) -> int:
    """Elements of the scratch lines for `smooth`, with four rows to spare on either side."""
    return (rows_of(weights, n) + 8) * LANES


@kernel
def _smooth_planes(
    field: Any, height: int, width: int, weights_y: Any, weights_x: Any, lo: int, hi: int
) -> None:
    pitch = pitch_of(width)
    lines = aligned(max(scratch_for(weights_x, width), scratch_for(weights_y, height)))
    out = aligned(pitch_of(max(width, height)) * LANES)
    margin = margin_of(weights_x, width)
    for z in range(lo, hi):
        at = z * height * pitch
        if weights_x.size > 1:
            for y in range(0, height, LANES):
                gather_rows(field, at + y * pitch, pitch, lines, margin)
                smooth(lines, margin, width, weights_x, out)
                scatter_rows(out, width, field, at + y * pitch, pitch, min(LANES, height - y), lines)
        if weights_y.size > 1:
            smooth_columns(field, at, height, pitch, pitch, weights_y, lines, out)


@kernel
def _smooth_depth(field: Any, depth: int, height: int, width: int, weights: Any, lo: int, hi: int) -> None:
    pitch = pitch_of(width)
    lines = aligned(scratch_for(weights, depth))
    out = aligned(pitch_of(depth) * LANES)
    for y in range(lo, hi):
        smooth_columns(field, y * pitch, depth, height * pitch, pitch, weights, lines, out)


@inner
def gather_rows(field: Any, at: int, pitch: int, lines: Any, margin: int) -> None:
    """Stand sixteen rows of a field side by side; the field must reach as far."""
    for x in range(0, pitch, LANES):
        transpose(field, at + x, pitch, lines, (margin + x) * LANES, LANES)


@inner
def scatter_rows(lines: Any, width: int, field: Any, at: int, pitch: int, rows: int, scratch: Any) -> None:
    """Write the first `rows` of sixteen lines back as rows; their padding repeats the last voxel."""
    last = load(lines, (width - 1) * LANES)
    for x in range(width, pitch):
        store(lines, x * LANES, last)
    for x in range(0, pitch, LANES):
        if rows == LANES:
            transpose(lines, x * LANES, LANES, field, at + x, pitch)
        else:
            transpose(lines, x * LANES, LANES, scratch, 0, LANES)
            for j in range(rows):
                store(field, at + j * pitch + x, load(scratch, j * LANES))


@inner
def smooth_columns(
    field: Any, at: int, n: int, stride: int, width: int, weights: Any, lines: Any, out: Any
) -> None:
    """Filter `width` neighbouring lines of n voxels that lie `stride` apart, in place."""
    margin = margin_of(weights, n)
    for x in range(at, at + width, LANES):
        for i in range(n):
            store(lines, (margin + i) * LANES, load(field, x + i * stride))
        smooth(lines, margin, n, weights, out)
        for i in range(n):
            store(field, x + i * stride, load(out, i * LANES))


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
    threads = team_for(volume.size, threads)
    parallel_for(strips, lambda lo, hi: _box_means(volume, result, *sizes, lo, hi), threads)
    return result


@inner
def reflect(i: int, n: int) -> int:
    """Index of SciPy's "reflect" edge, d c b a | a b c d | d c b a, at any distance."""
    i %= 2 * n
    return i if i < n else 2 * n - 1 - i


@kernel
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


@inner
def _add(sums: Any, row: Any) -> None:
    for x in range(sums.size):
        sums[x] += row[x]


@inner
def _replace(sums: Any, new: Any, old: Any) -> None:
    for x in range(sums.size):
        sums[x] += np.float64(new[x]) - np.float64(old[x])


@inner
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
