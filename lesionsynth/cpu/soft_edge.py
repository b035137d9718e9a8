"""The soft edge of modes "add" and "blend": e = min(1, depth / edge).

The depth of a voxel of a lesion is its distance from the nearest voxel of the volume that is not in the
lesion; what lies beyond the volume does not count. Squared distances are taken axis by axis: along x from the
ends of the runs, then along y, then along z. Rounding is monotone, so

    d2 = min over dz, dy, dx of term_z(dz) + (term_y(dy) + term_x(dx)),    term_i(k) = (k s_i) (k s_i)

in float32 is the same whether the minima are taken together or one after the other. Whatever is as far away
as the edge is wide makes e = 1 and need not be looked at.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.engine.lines import aligned
from lesionsynth.cpu.engine.memory import scratch
from lesionsynth.cpu.engine.simd import LANES, least, load, splat, store
from lesionsynth.cpu.engine.threads import done, group_of, take, wait_for, work_together
from lesionsynth.cpu.merge import LesionRows, Lesions
from lesionsynth.cpu.texture import Textures
from lesionsynth.plan import LesionPlan

INFINITE = np.float32(np.inf)


class EdgeJob(NamedTuple):
    """What `_soften` reads and writes."""

    width: Any
    """Of the edge, in the unit of the steps."""
    reach: Any
    """(3,): voxels along z, y, x that are nearer than that."""
    terms: Any
    """(3, n): squared length of k steps along each axis."""
    lesions: LesionRows
    fields: Any
    """As in `Textures`; slice z of the box of field k is task ``slices[k] + z``."""
    slices: Any
    squares: Any
    """Squared distances within slices, laid out as the fields' values."""
    shares: Any
    """e, laid out likewise."""


def soft_edges(
    plan: LesionPlan, textures: Textures, lesions: Lesions, threads: int | None = None
) -> npt.NDArray[np.float32]:
    """Measure e of some lesions, in the boxes of their textures and laid out as those.

    Parameters
    ----------
    plan : LesionPlan
        Holds the edge.
    textures : Textures
        Some of the lesions.
    lesions : Lesions
        All of them.
    threads : int, optional
        See `parallel_for`.
    """
    width = np.float32(plan.edge)
    lengths = np.arange(int(width / min(plan.scale)) + 2, dtype=np.float32)
    lengths = lengths * np.array(plan.scale, dtype=np.float32)[:, None]
    reach = np.count_nonzero(lengths < width, axis=1) - 1
    size = len(textures.values)
    squares, shares = (scratch(f"soft_edge.{name}", size, np.float32) for name in ("squares", "shares"))
    job = EdgeJob(
        width, reach, lengths * lengths, lesions.rows, textures.fields, textures.slices, squares, shares
    )
    work_together(_soften, [int(textures.slices[-1])] * 2, job, threads=threads)
    return shares


@kernel
def _soften(progress: Any, job: Any) -> None:
    """Measure distances within slices, then along z; a task is a slice of a box."""
    largest = 0
    for k in range(job.fields.size):
        largest = max(largest, job.fields[k].size[1] * job.fields[k].pitch)
    plane = aligned(largest)
    t = take(progress, 0)
    while t >= 0:
        k = group_of(job.slices, t)
        _measure_slice(job.fields[k], t - job.slices[k], job, plane)
        done(progress, 0)
        t = take(progress, 0)
    wait_for(progress, 0)
    t = take(progress, 1)
    while t >= 0:
        k = group_of(job.slices, t)
        _soften_slice(job.fields[k], t - job.slices[k], job)
        done(progress, 1)
        t = take(progress, 1)
    wait_for(progress, 1)


@inner
def _measure_slice(field: Any, z: int, job: Any, plane: Any) -> None:
    """Find the distances within a slice of a lesion's box; they are 0 out of the lesion."""
    height, pitch, lesions = field.size[1], field.pitch, job.lesions
    for y in range(height):
        _measure_row(field, z, y, job, plane[y * pitch : (y + 1) * pitch])
    for y in range(height):
        before, behind = field.start[1] + y, lesions.height - 1 - field.start[1] - y
        for x in range(0, pitch, LANES):
            d2 = load(plane, y * pitch + x)
            for k in range(1, job.reach[1] + 1):
                term = splat(job.terms[1, k])
                if k <= y:
                    d2 = least(d2, load(plane, (y - k) * pitch + x) + term)
                elif k <= before:
                    d2 = least(d2, term)
                if k < height - y:
                    d2 = least(d2, load(plane, (y + k) * pitch + x) + term)
                elif k <= behind:
                    d2 = least(d2, term)
            store(job.squares, field.at + (z * height + y) * pitch + x, d2)


@inner
def _measure_row(field: Any, z: int, y: int, job: Any, line: Any) -> None:
    """Find the distances along a row: runs of one lesion do not touch, so either end is a way out."""
    lesions = job.lesions
    line[:] = np.float32(0.0)
    row = (field.start[0] + z) * lesions.height + field.start[1] + y
    for run in range(lesions.first[row], lesions.first[row + 1]):
        if lesions.label[run] == field.label:
            start, stop = lesions.start[run], lesions.stop[run]
            for x in range(start, stop):
                k = job.reach[2] + 1
                if start > 0:
                    k = min(k, x - start + 1)
                if stop < lesions.width:
                    k = min(k, stop - x)
                line[x - field.start[2]] = job.terms[2, k] if k <= job.reach[2] else INFINITE


@inner
def _soften_slice(field: Any, z: int, job: Any) -> None:
    """Find the distances along z, too, and turn them into e; out of the lesion it is 0."""
    depth, step = field.size[0], field.size[1] * field.pitch
    before, behind = field.start[0] + z, job.lesions.depth - 1 - field.start[0] - z
    first = field.at + z * step
    for at in range(first, first + step, LANES):
        d2 = load(job.squares, at)
        for k in range(1, job.reach[0] + 1):
            term = splat(job.terms[0, k])
            if k <= z:
                d2 = least(d2, load(job.squares, at - k * step) + term)
            elif k <= before:
                d2 = least(d2, term)
            if k < depth - z:
                d2 = least(d2, load(job.squares, at + k * step) + term)
            elif k <= behind:
                d2 = least(d2, term)
        store(job.shares, at, d2)
    for at in range(first, first + step):
        job.shares[at] = min(np.float32(1.0), np.float32(math.sqrt(job.shares[at])) / job.width)
