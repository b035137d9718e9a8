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

from lesionsynth.cpu.engine.jit import inner
from lesionsynth.cpu.engine.memory import scratch
from lesionsynth.cpu.engine.simd import LANES, least, load, splat, store
from lesionsynth.plan import LesionPlan

INFINITE = np.float32(np.inf)


class Edge(NamedTuple):
    """A soft edge, and what is measured for it."""

    width: Any
    """In the unit of the steps; 0 for none."""
    reach: Any
    """(3,): voxels along z, y, x that are nearer than that."""
    terms: Any
    """(3, n): squared length of k steps along each axis."""
    squares: Any
    """Squared distances within slices, laid out as the fields' values."""


def edge_of(plan: LesionPlan, size: int) -> Edge:
    """Prepare the edge of a plan for fields of `size` values together; little where it has none."""
    width = np.float32(plan.edge)
    longest = int(width / min(plan.scale)) + 2 if width > 0 else 1
    lengths = np.arange(longest, dtype=np.float32) * np.array(plan.scale, dtype=np.float32)[:, None]
    reach = np.count_nonzero(lengths < width, axis=1) - 1
    # vectors are read from where a run begins
    squares = scratch("soft_edge.squares", size + LANES if width > 0 else 0, np.float32)
    return Edge(width, reach, lengths * lengths, squares)


@inner
def measure_slice(field: Any, z: int, lesions: Any, edge: Any, plane: Any) -> None:
    """Find the distances within a slice of a lesion's box; they are 0 out of the lesion."""
    height, pitch = field.size[1], field.pitch
    for y in range(height):
        _measure_row(field, z, y, lesions, edge, plane[y * pitch : (y + 1) * pitch])
    for y in range(height):
        before, behind = field.start[1] + y, lesions.height - 1 - field.start[1] - y
        for x in range(0, pitch, LANES):
            d2 = load(plane, y * pitch + x)
            for k in range(1, edge.reach[1] + 1):
                term = splat(edge.terms[1, k])
                if k <= y:
                    d2 = least(d2, load(plane, (y - k) * pitch + x) + term)
                elif k <= before:
                    d2 = least(d2, term)
                if k < height - y:
                    d2 = least(d2, load(plane, (y + k) * pitch + x) + term)
                elif k <= behind:
                    d2 = least(d2, term)
            store(edge.squares, field.at + (z * height + y) * pitch + x, d2)


@inner
def _measure_row(field: Any, z: int, y: int, lesions: Any, edge: Any, line: Any) -> None:
    """Find the distances along a row: runs of one lesion do not touch, so either end is a way out."""
    line[:] = np.float32(0.0)
    row = (field.start[0] + z) * lesions.height + field.start[1] + y
    for run in range(lesions.first[row], lesions.first[row + 1]):
        if lesions.label[run] == field.label:
            start, stop = lesions.start[run], lesions.stop[run]
            for x in range(start, stop):
                k = edge.reach[2] + 1
                if start > 0:
                    k = min(k, x - start + 1)
                if stop < lesions.width:
                    k = min(k, stop - x)
                line[x - field.start[2]] = edge.terms[2, k] if k <= edge.reach[2] else INFINITE


@inner
def soften(field: Any, z: int, at: int, n: int, lesions: Any, edge: Any, soft: Any) -> None:
    """Write e of the n voxels whose values begin at `at`, in slice z of the box."""
    depth, step = field.size[0], field.size[1] * field.pitch
    before, behind = field.start[0] + z, lesions.depth - 1 - field.start[0] - z
    for x in range(0, n, LANES):
        d2 = load(edge.squares, at + x)
        for k in range(1, edge.reach[0] + 1):
            term = splat(edge.terms[0, k])
            if k <= z:
                d2 = least(d2, load(edge.squares, at + x - k * step) + term)
            elif k <= before:
                d2 = least(d2, term)
            if k < depth - z:
                d2 = least(d2, load(edge.squares, at + x + k * step) + term)
            elif k <= behind:
                d2 = least(d2, term)
        store(soft, x, d2)
    for x in range(n):
        soft[x] = min(np.float32(1.0), np.float32(math.sqrt(soft[x])) / edge.width)
