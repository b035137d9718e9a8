"""Connected components of a volume, numbered as `scipy.ndimage.label` numbers them.

A row is a handful of runs, so the union-find works on runs and not on voxels: find the runs, join each with
those of the rows before it, number the roots, paint. A root is always the earliest run of its component, so
roots in ascending order are components in C order of their first voxel. Blocks of slices are joined in
parallel, then the seams between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.bits import BitMask, count_runs, next_clear, next_set, pack
from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.engine.memory import output
from lesionsynth.cpu.engine.simd import LANES, STREAMED, fence, splat, store_stream
from lesionsynth.cpu.engine.threads import done, parallel_for, take, team_for, wait_for, work_together
from lesionsynth.strict import shown

Labels = npt.NDArray[np.int32]

REACH = {6: (0, -1), 18: (1, 0), 26: (1, 1)}
"""How far apart in x two voxels may be whose rows touch by a face or by an edge; -1: such rows never join."""

BLOCKS = 16
"""Parts of a volume that are joined on their own."""


@dataclass(frozen=True)
class Runs:
    """A mask as runs of voxels along x."""

    shape: tuple[int, int, int]
    """(z, y, x)."""
    first: npt.NDArray[np.int64]
    """(z y + 1,): the runs of row r are ``first[r] ... first[r + 1]``, ascending and apart."""
    start: npt.NDArray[np.int32]
    """First voxel of each run."""
    stop: npt.NDArray[np.int32]
    """Voxel after the last."""


def check_connectivity(connectivity: Any) -> None:
    """Raise ValueError unless `connectivity` is 6, 18 or 26."""
    integer = isinstance(connectivity, int | np.integer) and not isinstance(connectivity, bool)
    if not integer or connectivity not in REACH:
        raise ValueError(f"connectivity must be 6, 18 or 26, got {shown(connectivity)}")


def label(mask: npt.NDArray[Any], connectivity: int = 6, threads: int | None = None) -> tuple[Labels, int]:
    """Find the connected components of a mask.

    Parameters
    ----------
    mask : (z, y, x) array of bytes or bool
        Any strides; 0 is background. Not modified.
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
    Needs a bit for every voxel and 12 bytes for every run of voxels along x besides the result.
    """
    check_connectivity(connectivity)
    threads = team_for(mask.size, threads)
    runs = runs_of(pack(mask, threads), threads)
    number, count = number_runs(runs, connectivity, threads)
    labels = output(runs.shape, np.int32)
    paint(runs, number, labels, threads)
    return labels, count


def paint(runs: Runs, number: Labels, labels: Labels, threads: int | None = None) -> None:
    """Write the number of each run to its voxels of a C-contiguous volume, and 0 to the others."""
    width = labels.shape[2]
    lines = labels.reshape(-1, width)
    clear = lines.view(np.float32)  # 0 has the same bits, and vectors are of floats
    stream = labels.nbytes >= STREAMED and width % LANES == 0 and labels.ctypes.data % 64 == 0
    parallel_for(
        len(lines),
        lambda lo, hi: _paint_rows(lines, clear, runs.first, runs.start, runs.stop, number, stream, lo, hi),
        threads,
    )


def runs_of(mask: BitMask, threads: int | None = None) -> Runs:
    """Find the runs of a mask."""
    bits = mask.bits
    first = np.zeros(len(bits) + 1, dtype=np.int64)
    parallel_for(len(bits), lambda lo, hi: _count_runs(bits, first, lo, hi), threads)
    np.cumsum(first, out=first)
    start, stop = (np.empty(first[-1], dtype=np.int32) for _ in range(2))
    parallel_for(len(bits), lambda lo, hi: _find_runs(bits, first, start, stop, lo, hi), threads)
    return Runs(mask.shape, first, start, stop)


def number_runs(runs: Runs, connectivity: int, threads: int | None = None) -> tuple[Labels, int]:
    """Return the component of each run, 1..n in C order of their first voxels, and n."""
    depth, height, _ = runs.shape
    parent = np.arange(len(runs.start), dtype=np.int32)
    blocks = min(BLOCKS, depth)
    bounds = np.arange(blocks + 1) * depth // blocks
    work_together(
        _join_blocks, [blocks, 1], bounds, runs.first, runs.start, runs.stop, parent, height,
        *REACH[connectivity], threads=threads,
    )  # fmt: skip
    return parent, int(_number(parent))


@kernel
def _count_runs(bits: Any, first: Any, lo: int, hi: int) -> None:
    """Write the number of runs of row r to first[r + 1]."""
    for r in range(lo, hi):
        first[r + 1] = count_runs(bits[r])


@kernel
def _find_runs(bits: Any, first: Any, start: Any, stop: Any, lo: int, hi: int) -> None:
    for r in range(lo, hi):
        row, x = bits[r], 0
        for k in range(first[r], first[r + 1]):
            x = next_set(row, x)
            start[k] = x
            x = next_clear(row, x)
            stop[k] = x


@inner
def root_of(parent: Any, k: int) -> int:
    """Return the root of a member: the lowest number of its set."""
    while parent[k] != k:
        parent[k] = parent[parent[k]]  # halves the path for the next search
        k = parent[k]
    return k


@inner
def unite(parent: Any, a: int, b: int) -> None:
    """Make one set of those of two members; the lower root stays the root."""
    if a == b:
        return
    a, b = root_of(parent, a), root_of(parent, b)
    if a < b:
        parent[b] = a
    elif b < a:
        parent[a] = b


@inner
def _join_rows(first: Any, start: Any, stop: Any, parent: Any, row: int, other: int, reach: int) -> None:
    """Unite the runs of two rows that lie within `reach` of each other, walking both rows once."""
    a, b = first[row], first[other]
    while a < first[row + 1] and b < first[other + 1]:
        if start[a] < stop[b] + reach and start[b] < stop[a] + reach:
            unite(parent, a, b)
        if stop[a] < stop[b]:
            a += 1
        else:
            b += 1


@inner
def _join_slice(
    first: Any, start: Any, stop: Any, parent: Any, z: int, height: int, face: int, edge: int, inside: bool
) -> None:
    """Join the rows of a slice with each other, or, not `inside`, with those of the slice before."""
    for y in range(height):
        row = z * height + y
        if first[row] == first[row + 1]:
            continue
        if inside:
            if y > 0:
                _join_rows(first, start, stop, parent, row, row - 1, face)
            continue
        _join_rows(first, start, stop, parent, row, row - height, face)
        if edge >= 0 and y > 0:
            _join_rows(first, start, stop, parent, row, row - height - 1, edge)
        if edge >= 0 and y + 1 < height:
            _join_rows(first, start, stop, parent, row, row - height + 1, edge)


@kernel
def _join_blocks(
    progress: Any, bounds: Any, first: Any, start: Any, stop: Any, parent: Any, height: int, face: int,
    edge: int,
) -> None:  # fmt: skip
    """Join each block of slices, a task; then, in one task, each block with the one before."""
    t = take(progress, 0)
    while t >= 0:
        for z in range(bounds[t], bounds[t + 1]):
            _join_slice(first, start, stop, parent, z, height, face, edge, True)
            if z > bounds[t]:
                _join_slice(first, start, stop, parent, z, height, face, edge, False)
        done(progress, 0)
        t = take(progress, 0)
    wait_for(progress, 0)
    if take(progress, 1) >= 0:
        for k in range(1, bounds.size - 1):
            _join_slice(first, start, stop, parent, bounds[k], height, face, edge, False)
        done(progress, 1)
    wait_for(progress, 1)


@kernel
def _number(parent: Any) -> int:
    """Replace each run's parent by its component's number; roots come before what hangs on them."""
    count = 0
    for k in range(parent.size):
        if parent[k] == k:
            count += 1
            parent[k] = -count
        else:
            parent[k] = parent[parent[k]]
    for k in range(parent.size):
        parent[k] = -parent[k]
    return count


@kernel
def _paint_rows(
    lines: Any, clear: Any, first: Any, start: Any, stop: Any, number: Any, stream: bool, lo: int, hi: int
) -> None:
    zero = splat(np.float32(0.0))
    for row in range(lo, hi):
        if stream:
            line = clear[row]
            for x in range(0, line.size, LANES):
                store_stream(line, x, zero)
        else:
            lines[row] = 0
    fence()
    for row in range(lo, hi):
        for k in range(first[row], first[row + 1]):
            lines[row, start[k] : stop[k]] = number[k]
