"""Stage 0: where blobs go.

A blob starts at the floor(u |M|)-th voxel of the mask in C order: uniform, no rejection. There it stays, or
goes from there to the mask's border in the slice ("surface") or half way between two borders ("depth").
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.bits import BitMask
from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.engine.simd import ones
from lesionsynth.cpu.engine.threads import group_of
from lesionsynth.plan import LesionPlan

SURFACE, DEPTH = 1, 2
"""Placements of the record of a blob; 0 is uniform."""
STEPS = np.array([[0, 1], [1, 0], [0, -1], [-1, 0]])
"""(y, x) of the directions in which a surface is looked for: +x, +y, -x, -y."""


class PlaceJob(NamedTuple):
    """What `_find` reads and writes."""

    bits: Any
    shape: tuple[int, int, int]
    ends: Any
    """(z y,): voxels of the mask in all rows up to this one."""
    counts: Any
    ranks: Any
    """(n,): number of the voxel that a blob starts at; -1 where nothing is to be found."""
    turns: Any
    """(n,): the direction that is tried first."""
    placement: Any
    centers: Any


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
    number = plan.records["position"] * total
    whole = np.floor(number)
    job = PlaceJob(
        mask.bits, mask.shape, ends, counts,
        # the product may round up to |M|
        ranks=np.where(by_position, np.minimum(whole.astype(np.int64), total - 1), -1),
        turns=np.minimum((4.0 * (number - whole)).astype(np.int64), 3),
        placement=np.ascontiguousarray(plan.records["placement"]),
        centers=np.where(by_position[:, None], 0, given),
    )  # fmt: skip
    _find(job)
    return job.centers


@kernel
def _find(job: Any) -> None:
    """Write the centre of each blob that has a rank."""
    height = job.shape[1]
    for b in range(job.ranks.size):
        if job.ranks[b] < 0:
            continue
        row, x = _start(job, job.ranks[b])
        z, y = row // height, row % height
        if job.placement[b] == SURFACE:
            y, x = _surface(job, z, y, x, job.turns[b])
        elif job.placement[b] == DEPTH:
            x = (_walk(job, z, y, x, 0, -1)[1] + _walk(job, z, y, x, 0, 1)[1]) // 2
            y = (_walk(job, z, y, x, -1, 0)[0] + _walk(job, z, y, x, 1, 0)[0]) // 2
        job.centers[b, 0], job.centers[b, 1], job.centers[b, 2] = z, y, x


@inner
def _start(job: Any, rank: int) -> tuple[int, int]:
    """Row and x of a voxel by its number in the mask."""
    ends, bits = job.ends, job.bits
    row = group_of(ends, rank) + 1 if rank >= ends[0] else 0
    left = rank - (ends[row] - job.counts[row])
    w = 0
    while left >= ones(bits[row, w]):
        left -= ones(bits[row, w])
        w += 1
    word = bits[row, w]
    for _ in range(left):
        word &= word - np.uint64(1)  # takes the lowest voxel off
    return row, 64 * w + ones((word & (~word + np.uint64(1))) - np.uint64(1))


@inner
def _surface(job: Any, z: int, y: int, x: int, turn: int) -> tuple[int, int]:
    """Walk to the mask's border, in the first direction that does not end at the volume's."""
    for k in range(4):
        dy, dx = STEPS[(turn + k) % 4]
        to_y, to_x = _walk(job, z, y, x, dy, dx)
        if 0 <= to_y + dy < job.shape[1] and 0 <= to_x + dx < job.shape[2]:
            return to_y, to_x
    return y, x


@inner
def _walk(job: Any, z: int, y: int, x: int, dy: int, dx: int) -> tuple[int, int]:
    """Last voxel of the mask that is met before one that is not, or before the end of the volume."""
    bits, height, width = job.bits, job.shape[1], job.shape[2]
    while 0 <= y + dy < height and 0 <= x + dx < width:
        word = bits[z * height + y + dy, (x + dx) >> 6]
        if (word >> np.uint64((x + dx) & 63)) & np.uint64(1) == 0:
            break
        y, x = y + dy, x + dx
    return y, x
