"""Gaussian of sixteen lines at once: the inner loops of `lesionsynth.cpu.filters`.

Sixteen parallel lines stand side by side, one in each lane of a vector, so that a line's neighbours are the
rows above and below: row i of the scratch holds voxel i of every line. Two ways, both in float32:

Taps, where the kernel is no longer than the line (2 r + 1 <= n)
    acc = w_0 x_i, then acc = fma(w_k, x_{i-k} + x_{i+k}, acc) for k = 1 ... r.

Matrix, where it is longer
    With the reflections folded in, the filter is a matrix that commutes with reversal, so it falls into two
    of half the size, E for the even part u_j = x_j + x_{n-1-j} of a line and O for the odd part
    v_j = x_j - x_{n-1-j} (a middle voxel is its own even part):
    e = E_i0 u_0, then e = fma(E_ij, u_j, e) for j = 1 ... (n - 1) / 2, the same for o, and
    y_i = e + o, y_{n-1-i} = e - o.

So a voxel costs at most n / 2 multiply-adds whatever sigma, and reversing a line reverses the result exactly.
Order and rounding are fixed: another device can repeat the bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.jit import inner, kernel, maker
from lesionsynth.cpu.engine.simd import LANES, fma, load, splat, store

BLOCK = 8
"""Outputs of a line that are accumulated together, in registers."""
PAIRS = 4
"""The same for the matrix: outputs i and n - 1 - i of four i."""


def gaussian_taps(sigma: float, truncate: float = 4.0) -> npt.NDArray[np.float64]:
    """Weights w_0 ... w_r of a Gaussian, r = int(truncate * sigma + 0.5), normalised over -r ... r.

    Parameters
    ----------
    sigma : float
        Standard deviation in voxels; 0 gives the identity.
    truncate : float
        Radius in standard deviations.

    Returns
    -------
    (r + 1,) float64 array
    """
    return taps_of(np.array([sigma], dtype=np.float64), truncate)[0]


# No kernel returns an array to Python. Numba makes one with the help of Python code, in which a handler of a
# signal may run, and turns what that raises into SystemError.


def taps_of(
    sigmas: npt.NDArray[np.float64], truncate: float = 4.0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Taps of several Gaussians in one array; those of sigma k are ``taps[ends[k] : ends[k + 1]]``."""
    ends = _ends(_radii(sigmas, truncate) + 1)
    taps = np.empty(ends[-1])
    _fill_taps(taps, ends, sigmas)
    return taps, ends


def kernel_of(n: int, sigma: float, truncate: float = 4.0) -> npt.NDArray[np.float32]:
    """Weights for lines of `n` voxels: taps w_0 ... w_r where 2 r + 1 <= n, else the folded matrix.

    Parameters
    ----------
    n : int
        Length of the lines.
    sigma, truncate : float
        See `gaussian_taps`.

    Returns
    -------
    (k,) float32 array
        r + 1 taps, or the halves of the matrix, h = ceil(n / 2), in blocks of four rows: (ceil(h / 4), h, 8)
        with E_ij at ``[i // 4, j, i % 4]`` and O_ij at ``[i // 4, j, 4 + i % 4]``. The matrix is never as
        short as taps would be, which is how `smooth` knows it.
    """
    return kernels_of(np.array([n], dtype=np.int64), np.array([sigma], dtype=np.float64), truncate)[0]


def kernels_of(
    lengths: npt.NDArray[np.int64], sigmas: npt.NDArray[np.float64], truncate: float = 4.0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Weights of several lines in one array; those of line k are ``weights[ends[k] : ends[k + 1]]``."""
    taps, ends_of_taps = taps_of(sigmas, truncate)
    reach, half = np.diff(ends_of_taps), (lengths + 1) // 2
    ends = _ends(np.where(2 * reach - 1 <= lengths, reach, -(-half // PAIRS) * half * 2 * PAIRS))
    weights = np.empty(ends[-1], dtype=np.float32)
    _fill_kernels(weights, ends, lengths, taps, ends_of_taps)
    return weights, ends


def _radii(sigmas: npt.NDArray[np.float64], truncate: float) -> npt.NDArray[np.int64]:
    """Radius r of `gaussian_taps`."""
    return (truncate * sigmas + 0.5).astype(np.int64)


def _ends(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each of several parts begins, and the last ends."""
    return np.concatenate([[0], np.cumsum(sizes)])


@kernel
def _fill_taps(taps: Any, ends: Any, sigmas: Any) -> None:
    for g in range(sigmas.size):
        weights = taps[ends[g] : ends[g + 1]]
        weights[0] = total = 1.0
        for k in range(1, weights.size):
            weights[k] = math.exp(-0.5 * (k / sigmas[g]) ** 2)
            total += 2.0 * weights[k]
        for k in range(weights.size):
            weights[k] /= total


@kernel
def _fill_kernels(weights: Any, ends: Any, lengths: Any, taps: Any, ends_of_taps: Any) -> None:
    for k in range(lengths.size):
        _fill_kernel(weights[ends[k] : ends[k + 1]], lengths[k], taps[ends_of_taps[k] : ends_of_taps[k + 1]])


@maker
def _fill_kernel(out: Any, n: int, taps: Any) -> None:
    if 2 * taps.size - 1 <= n:
        for k in range(taps.size):
            out[k] = taps[k]
        return
    # Reflecting edges make a line periodic with period 2n and symmetric about its ends.
    period = np.zeros(2 * n)
    period[0] = taps[0]
    for k in range(1, taps.size):
        period[k % (2 * n)] += taps[k]
        period[-k % (2 * n)] += taps[k]
    half = (n + 1) // 2
    out[:] = 0.0
    for i in range(half):
        for j in range(half):
            here = period[(i - j) % (2 * n)] + period[(i + j + 1) % (2 * n)]
            there = period[(i + j + 1 - n) % (2 * n)] + period[(i - j + n) % (2 * n)]  # for n - 1 - j
            at = (i // PAIRS * half + j) * 2 * PAIRS + i % PAIRS
            out[at], out[at + PAIRS] = 0.5 * (here + there), 0.5 * (here - there)


@inner
def is_matrix(weights: Any, n: int) -> bool:
    """Whether `kernel_of` gave the matrix for lines of `n` voxels: 8 h >= 4 n weights, not r + 1 <= n."""
    return bool(2 * weights.size - 1 > n)


@kernel
def pitch_of(width: int) -> int:
    """Row length of a padded field: whole vectors."""
    return (width + LANES - 1) // LANES * LANES


@maker
def aligned(size: int) -> Any:
    """Return uninitialised float32 for vectors, on a cache line: a load across two takes twice as long."""
    block = np.empty(size + LANES, dtype=np.float32)
    skip = (-(block.ctypes.data // 4)) % LANES
    return block[skip : skip + size]


@inner
def margin_of(weights: Any, n: int) -> int:
    """Rows that `smooth` needs before the first and after the last row of a line."""
    return 0 if is_matrix(weights, n) else weights.size - 1


@inner
def rows_of(weights: Any, n: int) -> int:
    """Rows of a source for `smooth`, outputs rounded up to whole blocks."""
    return pitch_of(n) + 2 * margin_of(weights, n)


@inner
def smooth(source: Any, margin: int, n: int, weights: Any, out: Any) -> None:
    """Filter sixteen lines of `n` voxels.

    Row i of the lines is ``source[(margin + i) * 16 :]``; `margin` is at least `margin_of`. The margins are
    written, and the lines may be. Rows of `out` from n up to the next multiple of eight may be written too.
    """
    if is_matrix(weights, n):
        _multiply(source, margin, n, weights, out)
        return
    reflect_margins(source, margin, n, weights.size - 1)
    _convolve(source, margin, n, weights, out)


@inner
def reflect_margins(source: Any, margin: int, n: int, radius: int) -> None:
    """Write `radius` reflected rows on either side, d c b a | a b c d | d c b a; the radius is below n."""
    first, last = margin * LANES, (margin + n - 1) * LANES
    for k in range(radius):
        store(source, first - (k + 1) * LANES, load(source, first + k * LANES))
        store(source, last + (k + 1) * LANES, load(source, last - k * LANES))


@inner
def _convolve(source: Any, margin: int, n: int, taps: Any, out: Any) -> None:
    radius = taps.size - 1
    for i in range(0, n, BLOCK):
        at = (margin + i) * LANES
        w = splat(taps[0])
        a0, a1 = w * load(source, at), w * load(source, at + LANES)
        a2, a3 = w * load(source, at + 2 * LANES), w * load(source, at + 3 * LANES)
        a4, a5 = w * load(source, at + 4 * LANES), w * load(source, at + 5 * LANES)
        a6, a7 = w * load(source, at + 6 * LANES), w * load(source, at + 7 * LANES)
        for k in range(1, radius + 1):
            w = splat(taps[k])
            b, f = at - k * LANES, at + k * LANES
            a0 = fma(w, load(source, b) + load(source, f), a0)
            a1 = fma(w, load(source, b + LANES) + load(source, f + LANES), a1)
            a2 = fma(w, load(source, b + 2 * LANES) + load(source, f + 2 * LANES), a2)
            a3 = fma(w, load(source, b + 3 * LANES) + load(source, f + 3 * LANES), a3)
            a4 = fma(w, load(source, b + 4 * LANES) + load(source, f + 4 * LANES), a4)
            a5 = fma(w, load(source, b + 5 * LANES) + load(source, f + 5 * LANES), a5)
            a6 = fma(w, load(source, b + 6 * LANES) + load(source, f + 6 * LANES), a6)
            a7 = fma(w, load(source, b + 7 * LANES) + load(source, f + 7 * LANES), a7)
        _store_block(out, i * LANES, a0, a1, a2, a3, a4, a5, a6, a7)


@inner
def _multiply(source: Any, margin: int, n: int, matrix: Any, out: Any) -> None:
    half, first, last = (n + 1) // 2, margin * LANES, (margin + n - 1) * LANES
    for j in range(n // 2):
        a, b = load(source, first + j * LANES), load(source, last - j * LANES)
        store(source, first + j * LANES, a + b)
        store(source, last - j * LANES, a - b)
    for i in range(0, half, PAIRS):
        at = i * 2 * half
        u, v = load(source, first), load(source, last)
        e0, e1, e2, e3 = _times(matrix, at, u)
        o0, o1, o2, o3 = _times(matrix, at + PAIRS, v)
        for j in range(1, half):
            at += 2 * PAIRS
            u, v = load(source, first + j * LANES), load(source, last - j * LANES)
            e0, e1 = fma(splat(matrix[at]), u, e0), fma(splat(matrix[at + 1]), u, e1)
            e2, e3 = fma(splat(matrix[at + 2]), u, e2), fma(splat(matrix[at + 3]), u, e3)
            o0, o1 = fma(splat(matrix[at + 4]), v, o0), fma(splat(matrix[at + 5]), v, o1)
            o2, o3 = fma(splat(matrix[at + 6]), v, o2), fma(splat(matrix[at + 7]), v, o3)
        _store_pair(out, i, n, e0, o0)
        _store_pair(out, i + 1, n, e1, o1)
        _store_pair(out, i + 2, n, e2, o2)
        _store_pair(out, i + 3, n, e3, o3)


@inner
def _times(matrix: Any, at: int, x: Any) -> Any:
    return (
        splat(matrix[at]) * x,
        splat(matrix[at + 1]) * x,
        splat(matrix[at + 2]) * x,
        splat(matrix[at + 3]) * x,
    )


@inner
def _store_pair(out: Any, i: int, n: int, even: Any, odd: Any) -> None:
    if 2 * i < n:
        store(out, i * LANES, even + odd)
        store(out, (n - 1 - i) * LANES, even - odd)


@inner
def _store_block(
    out: Any, at: int, a0: Any, a1: Any, a2: Any, a3: Any, a4: Any, a5: Any, a6: Any, a7: Any
) -> None:
    store(out, at, a0)
    store(out, at + LANES, a1)
    store(out, at + 2 * LANES, a2)
    store(out, at + 3 * LANES, a3)
    store(out, at + 4 * LANES, a4)
    store(out, at + 5 * LANES, a5)
    store(out, at + 6 * LANES, a6)
    store(out, at + 7 * LANES, a7)
