"""Region growing inside a mask: `scipy.ndimage.binary_dilation` with ``mask``.

SciPy visits the whole volume at every step. Here a step looks at the neighbours of the voxels that the last
one added, and at nothing else: a breadth-first search whose levels are the steps.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.label import check_connectivity

Mask = npt.NDArray[np.bool_]

DIRECTIONS = {6: 1, 18: 2, 26: 3}
"""Axes along which two neighbours may differ."""


def grow(seed: Mask, mask: Mask, iterations: int = 1, connectivity: int = 6) -> Mask:
    """Grow a region step by step, only into a mask.

    A step adds the voxels of `mask` that have a neighbour in the region. The seed is kept whole: its voxels
    outside `mask` stay and have neighbours too, as in SciPy. What lies beyond the volume is not region.

    Parameters
    ----------
    seed, mask : (z, y, x) bool arrays
        Any strides; not modified.
    iterations : int
        Steps; below 1, until a step adds nothing.
    connectivity : {6, 18, 26}
        Neighbours by faces; and edges; and corners.

    Returns
    -------
    (z, y, x) bool array
        New, between `seed` and ``seed | mask``.

    Raises
    ------
    ValueError
        `connectivity` is another number.

    Notes
    -----
    Needs two bytes a voxel and eight for every voxel that could be added.
    """
    check_connectivity(connectivity)
    # A margin that is never free saves every check of bounds.
    free = np.zeros([n + 2 for n in mask.shape], dtype=np.bool_)
    inner = free[1:-1, 1:-1, 1:-1]
    np.logical_and(mask, ~seed, out=inner)
    start = np.pad(seed, 1)
    reached = np.empty(np.count_nonzero(free), dtype=np.int64)
    _grow(start.ravel(), free.ravel(), reached, _steps(connectivity, free.shape), max(iterations, 0))
    return mask & ~inner | seed


def _steps(connectivity: int, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Distances to a voxel's neighbours in C order of an array of `shape`."""
    around = np.indices((3, 3, 3)).reshape(3, -1) - 1
    axes = np.abs(around).sum(axis=0)
    near = around[:, (axes > 0) & (axes <= DIRECTIONS[connectivity])]
    return np.asarray(np.array([shape[1] * shape[2], shape[2], 1]) @ near, dtype=np.int64)


@numba.njit(nogil=True, cache=True)
def _grow(start: Any, free: Any, reached: Any, steps: Any, iterations: int) -> None:
    """Take the voxels reached out of `free`; those of one iteration stand together in `reached`."""
    first, last = 0, 0
    for at in range(start.size):
        if start[at]:
            for step in steps:
                if free[at + step]:
                    free[at + step] = False
                    reached[last] = at + step
                    last += 1
    done = 1
    while first < last and done != iterations:
        stop = last
        for k in range(first, stop):
            for step in steps:
                at = reached[k] + step
                if free[at]:
                    free[at] = False
                    reached[last] = at
                    last += 1
        first = stop
        done += 1
