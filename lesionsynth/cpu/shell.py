"""The shell of a mask: its voxels near the outside, slice by slice (PAPER.md III-B)."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lesionsynth.cpu._threads import parallel_for

Mask = npt.NDArray[np.bool_]


def in_shell(mask: Mask, width: int, threads: int | None = None) -> Mask:
    """Mark the voxels of a mask within `width` steps of the outside, in plane.

    Parameters
    ----------
    mask : (z, y, x) bool array
        What lies beyond the array is outside; not modified.
    width : int
        Steps, diagonal ones included: the complement of `width` erosions with a 3 x 3 square.
    threads : int, optional
        See `parallel_for`.

    Returns
    -------
    (z, y, x) bool array
    """
    out = np.empty(mask.shape, dtype=np.bool_)
    parallel_for(len(mask), lambda lo, hi: _in_shell(mask, width, out, lo, hi), threads)
    return out


@numba.njit(nogil=True, cache=True)
def _in_shell(mask: Any, width: int, out: Any, lo: int, hi: int) -> None:
    """Chessboard distance to the outside, exact after one pass down and one up; the frame is outside."""
    height, n = mask.shape[1], mask.shape[2]
    distance = np.zeros((height + 2, n + 2), dtype=np.int32)
    for z in range(lo, hi):
        for y in range(1, height + 1):
            for x in range(1, n + 1):
                if mask[z, y - 1, x - 1]:
                    above = min(distance[y - 1, x - 1], distance[y - 1, x], distance[y - 1, x + 1])
                    distance[y, x] = 1 + min(above, distance[y, x - 1])
                else:
                    distance[y, x] = 0
        for y in range(height, 0, -1):
            for x in range(n, 0, -1):
                below = min(distance[y + 1, x - 1], distance[y + 1, x], distance[y + 1, x + 1])
                distance[y, x] = min(distance[y, x], 1 + min(below, distance[y, x + 1]))
                out[z, y - 1, x - 1] = 0 < distance[y, x] <= width
