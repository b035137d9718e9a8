"""Stage 0: where blobs go.

The centre is the floor(u |M|)-th voxel of the mask in C order: uniform, no rejection.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lesionsynth.cpu._threads import parallel_for
from lesionsynth.plan import LesionPlan


def place(
    plan: LesionPlan, mask: npt.NDArray[np.bool_], threads: int | None = None
) -> list[tuple[int, int, int]]:
    """Return the centre voxel (z, y, x) of every blob of a plan.

    Parameters
    ----------
    plan : LesionPlan
        Its blobs say where: by `position`, or by `center` where a user set one.
    mask : (z, y, x) bool array
        Lung mask M.
    threads : int, optional
        See `parallel_for`.

    Raises
    ------
    ValueError
        The mask is empty, or a `center` lies outside the volume.
    """
    rows = mask.reshape(-1, mask.shape[2])
    counts = np.empty(len(rows), dtype=np.int64)
    parallel_for(len(rows), lambda lo, hi: _count_rows(rows, counts, lo, hi), threads)
    ends = np.cumsum(counts)
    total = int(ends[-1])
    if total == 0:
        raise ValueError("lung_mask must contain at least one voxel, got an empty mask")
    centers = []
    for number, blob in enumerate(plan.blobs):
        if blob.center is not None:
            if any(c >= n for c, n in zip(blob.center, mask.shape, strict=True)):
                raise ValueError(
                    f"blobs[{number}].center must lie in the volume {mask.shape}, got {blob.center}"
                )
            centers.append(blob.center)
            continue
        rank = min(int(blob.position * total), total - 1)  # the product may round up to |M|
        row = int(np.searchsorted(ends, rank, side="right"))
        x = int(np.flatnonzero(rows[row])[rank - int(ends[row] - counts[row])])
        z, y = divmod(row, mask.shape[1])
        centers.append((z, y, x))
    return centers


@numba.njit(nogil=True, cache=True)
def _count_rows(rows: Any, counts: Any, lo: int, hi: int) -> None:
    for r in range(lo, hi):
        total = 0
        for x in range(rows.shape[1]):
            total += rows[r, x]
        counts[r] = total
