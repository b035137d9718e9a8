"""The shell of a mask: its voxels near the outside, slice by slice (PAPER.md III-B)."""

from __future__ import annotations

from typing import Any

import numpy as np

from lesionsynth.cpu.engine.bits import BitMask, shifted
from lesionsynth.cpu.engine.jit import kernel
from lesionsynth.cpu.engine.threads import parallel_for


def shell_of(mask: BitMask, width: int, threads: int | None = None) -> BitMask:
    """Mark the voxels of a mask within `width` steps of the outside, in plane.

    Parameters
    ----------
    mask : BitMask
        What lies beyond the array is outside; not modified.
    width : int
        Steps, diagonal ones included: the complement of `width` erosions with a 3 x 3 square.
    threads : int, optional
        See `parallel_for`.

    Returns
    -------
    BitMask
    """
    depth, height, n = mask.shape
    reach = min(width, max(height, n))  # further than that everything is near the outside
    out = np.empty_like(mask.bits)
    parallel_for(depth, lambda lo, hi: _shell(mask.bits, height, reach, out, lo, hi), threads)
    return BitMask(out, mask.shape)


@kernel
def _shell(bits: Any, height: int, reach: int, out: Any, lo: int, hi: int) -> None:
    """Keep what is not deep: a voxel is, where the mask holds the whole square around it."""
    words = bits.shape[1]
    column = np.empty(words, dtype=np.uint64)
    for row in range(lo * height, hi * height):
        y = row % height
        whole = y - reach >= 0 and y + reach < height
        for w in range(words):
            column[w] = bits[row, w] if whole else np.uint64(0)
        if whole:
            for other in range(row - reach, row + reach + 1):
                for w in range(words):
                    column[w] &= bits[other, w]
        for w in range(words):
            deep = column[w]
            for x in range(1, reach + 1):
                if deep == 0:
                    break
                deep &= shifted(column, w, x) & shifted(column, w, -x)
            out[row, w] = bits[row, w] & ~deep
