"""Stage 0: where blobs go.

The centre is the floor(u |M|)-th voxel of the mask in C order: uniform, no rejection.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.bits import BitMask
from lesionsynth.cpu.engine.jit import kernel
from lesionsynth.cpu.engine.simd import ones
from lesionsynth.cpu.engine.threads import group_of
from lesionsynth.plan import LesionPlan


def place(
    plan: LesionPlan, mask: BitMask, counts: npt.NDArray[np.int64], *, allow_empty: bool = False
) -> npt.NDArray[np.int64]:
    """Return the centre voxel of every blob of a plan.

    Parameters
    ----------
    plan : LesionPlan
        Its blobs say where: by `position`, or by `center` where a user set one.
    mask : BitMask
        Lung mask M.
    counts : (z y,) int64 array
        Its voxels in each row.
    allow_empty : bool
        Whether the mask may be empty; blobs without a `center` then have (0, 0, 0).

    Returns
    -------
    (n, 3) int64 array
        (z, y, x) of each blob.

    Raises
    ------
    ValueError
        The mask is empty, or a `center` lies outside the volume.
    """
    ends = np.cumsum(counts)
    total = int(ends[-1])
    if total == 0 and not allow_empty:
        raise ValueError("lung_mask must contain at least one voxel, got an empty mask")
    plan.check_centers(mask.shape)
    given = plan.records["center"]
    by_position = given[:, 0] < 0
    # the product may round up to |M|
    ranks = np.minimum((plan.records["position"] * total).astype(np.int64), total - 1)
    ranks[~by_position] = -1
    centers = np.where(by_position[:, None], 0, given)
    _find(ranks, ends, counts, mask.bits, mask.shape[1], centers)
    return centers


@kernel
def _find(ranks: Any, ends: Any, counts: Any, bits: Any, height: int, centers: Any) -> None:
    """Write the voxel of each rank >= 0."""
    for b in range(ranks.size):
        if ranks[b] < 0:
            continue
        row = group_of(ends, ranks[b]) + 1 if ranks[b] >= ends[0] else 0
        left = ranks[b] - (ends[row] - counts[row])
        w = 0
        while left >= ones(bits[row, w]):
            left -= ones(bits[row, w])
            w += 1
        word = bits[row, w]
        for _ in range(left):
            word &= word - np.uint64(1)  # takes the lowest voxel off
        x = 64 * w + ones((word & (~word + np.uint64(1))) - np.uint64(1))
        centers[b, 0], centers[b, 1], centers[b, 2] = row // height, row % height, x
