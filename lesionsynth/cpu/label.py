"""Connected components of a volume, numbered as `scipy.ndimage.label` numbers them.

A row is a handful of runs, so the union-find works on runs and not on voxels: find the runs, join each with
those of the rows before it, number the roots, paint. A root is always the earliest run of its component, so
roots in ascending order are components in C order of their first voxel. Finding and painting are parallel,
joining is serial.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lesionsynth.cpu._threads import parallel_for

Labels = npt.NDArray[np.int32]

REACH = {6: (0, -1), 18: (1, 0), 26: (1, 1)}
"""How far apart in x two voxels may be whose rows touch by a face or by an edge; -1: such rows never join."""


def check_connectivity(connectivity: Any) -> None:
    """Raise ValueError unless `connectivity` is 6, 18 or 26."""
    if isinstance(connectivity, bool) or connectivity not in REACH:
        raise ValueError(f"connectivity must be 6, 18 or 26, got {connectivity!r}")


def label(
    mask: npt.NDArray[np.bool_], connectivity: int = 6, threads: int | None = None
) -> tuple[Labels, int]:
    """Find the connected components of a mask.

    Parameters
    ----------
    mask : (z, y, x) bool array
        Any strides; not modified.
    connectivity : {6, 18, 26}
        Neighbours by faces; and edges; and corners.
    threads : int, optional
        See `parallel_for`.

    Returns
    -------
    labels : (z, y, x) int32 array
        0 background, 1..n in C order of the components' first voxels.
    n : int
        Number of components.

    Raises
    ------
    ValueError
        `connectivity` is another number.

    Notes
    -----
    Needs 16 bytes for every run of voxels along x besides the result.
    """
    check_connectivity(connectivity)
    labels = np.zeros(mask.shape, dtype=np.int32)
    depth, height, width = mask.shape
    rows = depth * height
    first = np.zeros(rows + 1, dtype=np.int64)
    parallel_for(rows, lambda lo, hi: _count_runs(mask, first, lo, hi), threads)
    np.cumsum(first, out=first)
    start, stop = np.empty(first[-1], dtype=np.int32), np.empty(first[-1], dtype=np.int32)
    parallel_for(rows, lambda lo, hi: _find_runs(mask, first, start, stop, lo, hi), threads)
    parent = np.arange(first[-1], dtype=np.int64)
    face, edge = REACH[connectivity]
    _join(first, start, stop, parent, depth, height, face, edge)
    count = int(_number(parent))
    lines = labels.reshape(rows, width)
    parallel_for(rows, lambda lo, hi: _paint(lines, first, start, stop, parent, lo, hi), threads)
    return labels, count


@numba.njit(nogil=True, cache=True)
def _count_runs(mask: Any, first: Any, lo: int, hi: int) -> None:
    """Write the number of runs of row r to first[r + 1]."""
    height, width = mask.shape[1], mask.shape[2]
    for r in range(lo, hi):
        z, y = r // height, r % height
        runs = 0
        before = False
        for x in range(width):
            here = mask[z, y, x]
            runs += here and not before
            before = here
        first[r + 1] = runs


@numba.njit(nogil=True, cache=True)
def _find_runs(mask: Any, first: Any, start: Any, stop: Any, lo: int, hi: int) -> None:
    height, width = mask.shape[1], mask.shape[2]
    for r in range(lo, hi):
        if first[r] == first[r + 1]:
            continue
        z, y = r // height, r % height
        k = first[r]
        before = False
        for x in range(width):
            here = mask[z, y, x]
            if here and not before:
                start[k] = x
            elif before and not here:
                stop[k] = x
                k += 1
            before = here
        if before:
            stop[k] = width


@numba.njit(nogil=True, cache=True)
def _root(parent: Any, k: int) -> int:
    while parent[k] != k:
        parent[k] = parent[parent[k]]  # halves the path for the next search
        k = parent[k]
    return k


@numba.njit(nogil=True, cache=True)
def _join_rows(first: Any, start: Any, stop: Any, parent: Any, row: int, other: int, reach: int) -> None:
    """Unite the runs of two rows that lie within `reach` of each other, walking both rows once."""
    a, b = first[row], first[other]
    while a < first[row + 1] and b < first[other + 1]:
        if start[a] < stop[b] + reach and start[b] < stop[a] + reach:
            ra, rb = _root(parent, a), _root(parent, b)
            if ra < rb:
                parent[rb] = ra
            elif rb < ra:
                parent[ra] = rb
        if stop[a] < stop[b]:
            a += 1
        else:
            b += 1


@numba.njit(nogil=True, cache=True)
def _join(
    first: Any, start: Any, stop: Any, parent: Any, depth: int, height: int, face: int, edge: int
) -> None:
    for z in range(depth):
        for y in range(height):
            row = z * height + y
            if first[row] == first[row + 1]:
                continue
            if y > 0:
                _join_rows(first, start, stop, parent, row, row - 1, face)
            if z > 0:
                _join_rows(first, start, stop, parent, row, row - height, face)
            if z > 0 and edge >= 0:
                if y > 0:
                    _join_rows(first, start, stop, parent, row, row - height - 1, edge)
                if y + 1 < height:
                    _join_rows(first, start, stop, parent, row, row - height + 1, edge)


@numba.njit(nogil=True, cache=True)
def _number(parent: Any) -> int:
    """Replace each run's parent by minus its component's number; roots come before what hangs on them."""
    count = 0
    for k in range(parent.size):
        if parent[k] == k:
            count += 1
            parent[k] = -count
        else:
            parent[k] = parent[parent[k]]
    return count


@numba.njit(nogil=True, cache=True)
def _paint(lines: Any, first: Any, start: Any, stop: Any, parent: Any, lo: int, hi: int) -> None:
    for r in range(lo, hi):
        for k in range(first[r], first[r + 1]):
            number = np.int32(-parent[k])
            for x in range(start[k], stop[k]):
                lines[r, x] = number
