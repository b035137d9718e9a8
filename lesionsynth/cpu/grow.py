"""Region growing inside a mask: `scipy.ndimage.binary_dilation` with ``mask``.

A bit is a voxel, so a step treats 64 of them at once, and only rows near what the last step added.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.bits import pack, shifted, unpack
from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.engine.threads import parallel_for, team_for
from lesionsynth.cpu.label import check_connectivity

Mask = npt.NDArray[np.bool_]

LIVELY = 4096
"""Rows to look at below which a step is not worth waking threads for."""


def grow(
    seed: npt.NDArray[Any],
    mask: npt.NDArray[Any],
    iterations: int = 1,
    connectivity: int = 6,
    threads: int | None = None,
) -> Mask:
    """Grow a region step by step, only into a mask.

    A step adds the voxels of `mask` that have a neighbour in the region. The seed is kept whole: its voxels
    outside `mask` stay and have neighbours too, as in SciPy. What lies beyond the volume is not region.

    Parameters
    ----------
    seed, mask : (z, y, x) arrays of bytes or bool
        Any strides; 0 is outside. Not modified.
    iterations : int
        Steps; below 1, until a step adds nothing.
    connectivity : {6, 18, 26}
        Neighbours by faces; and edges; and corners.
    threads : int, optional
        See `parallel_for`.

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
    Needs three bits a voxel besides the result.
    """
    check_connectivity(connectivity)
    threads = team_for(seed.size, threads)
    region, room = pack(seed, threads), pack(mask, threads)
    depth, height, _ = region.shape
    added = np.zeros_like(region.bits)
    lively = region.bits.any(axis=1)  # rows that the last step changed
    step = 0
    while lively.any() and (iterations < 1 or step < iterations):
        rows = np.flatnonzero(_near(lively.reshape(depth, height), connectivity))
        lively = np.zeros_like(lively)
        team = threads if len(rows) >= LIVELY else 1
        parallel_for(
            len(rows),
            lambda lo, hi, rows=rows, lively=lively: _find(  # type: ignore[misc]
                region.bits, room.bits, added, rows, lively, depth, height, connectivity, lo, hi
            ),
            team,
        )
        _add(region.bits, added, rows, lively)
        step += 1
    return unpack(region, threads)


def _near(rows: Mask, connectivity: int) -> Mask:
    """Rows that have one of `rows`, (z, y), among themselves and their neighbours."""
    near = rows.copy()
    near[1:] |= rows[:-1]
    near[:-1] |= rows[1:]
    along_y = rows if connectivity == 6 else near.copy()
    near[:, 1:] |= along_y[:, :-1]
    near[:, :-1] |= along_y[:, 1:]
    return near


@kernel
def _add(region: Any, added: Any, rows: Any, lively: Any) -> None:
    for row in rows:
        if lively[row]:
            for w in range(region.shape[1]):
                region[row, w] |= added[row, w]


@kernel
def _find(
    region: Any, room: Any, added: Any, rows: Any, lively: Any, depth: int, height: int, connectivity: int,
    lo: int, hi: int,
) -> None:  # fmt: skip
    """Find what a step adds to each of some rows, and which of them it changes."""
    for r in range(lo, hi):
        row = rows[r]
        z, y = row // height, row % height
        for w in range(region.shape[1]):
            free = room[row, w] & ~region[row, w]
            if free == 0:
                added[row, w] = free
                continue
            reached = _spread(region[row], w)
            for dz in range(-1, 2):
                for dy in range(-1, 2):
                    apart = abs(dz) + abs(dy)
                    if apart == 0 or not (0 <= z + dz < depth and 0 <= y + dy < height):
                        continue
                    other = region[row + dz * height + dy]
                    # Voxels of that row are `apart` steps away, those beside them one more.
                    if connectivity == 26 or (connectivity == 18 and apart == 1):
                        reached |= _spread(other, w)
                    elif connectivity == 18 or apart == 1:
                        reached |= other[w]
            added[row, w] = reached & free
            lively[row] |= added[row, w] != 0


@inner
def _spread(row: Any, w: int) -> Any:
    """Word w of a row with the neighbours along x of its voxels."""
    return row[w] | shifted(row, w, 1) | shifted(row, w, -1)
