"""Stage 1: warped, rotated ellipsoids as an analytic inverse map, evaluated in each blob's bounding box.

With p = (voxel - centre) * scale, d the displacement and R the rotation, a voxel belongs to the blob where

    q = R^T (p + d(p)),    (q_0 / s_0)^2 + (q_1 / s_1)^2 + (q_2 / s_2)^2 <= 1 (to rounding, see `SURFACE`).

d is a cubic B-spline: d_i(p) = amplitude r sum_n B(p / h - n) c_i(n), with r the geometric mean of the
semi-axes, h = correlation r the lattice spacing, and c_i(n) = 2 u - 1 the Philox uniform of lattice node n
(stream WARP, component 3 * blob + i, node (0, 0, 0) at the centre, see `NODE_OFFSET`). The splines are a
partition of unity, so |d_i| never exceeds amplitude r, and the box of the rotated ellipsoid grown by that
bound contains the blob.

Float64 throughout: a boundary voxel must not depend on the device. A row of voxels shares the lattice summed
over z and y. The same property, that a spline lies between its least and its greatest node, bounds a row's
displacement, so most of the box, eight times the blob at amplitude 1, is never evaluated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.bits import BitMask, count_runs
from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.engine.lines import aligned
from lesionsynth.cpu.engine.memory import scratch
from lesionsynth.cpu.engine.simd import (
    bits_at_most,
    fma,
    greatest,
    greatest_lane,
    least,
    least_lane,
    load,
    splat,
)  # fmt: skip
from lesionsynth.cpu.engine.threads import done, group_of, take, wait_for, work_together
from lesionsynth.cpu.lattice import CHUNK, draw_lattice, reads_of_a_chunk, sum_nodes, tabulate
from lesionsynth.cpu.philox import Stream
from lesionsynth.plan import LesionPlan
from lesionsynth.sampling import extend, extended

SURFACE = 1.0 + 1e-9
"""Level of the surface. The points of a sphere of whole radius that lie on voxels (30 for radius 12) must not
hang on the rounding of a rotation, about 1e-15."""

MOST_NODES = 2**25
"""Largest control lattice, 1.2 GB; the paper's blobs need some thousands of nodes."""

LANE_OFFSETS = np.arange(8.0)

BLOB = extended(
    ("directions", np.float64, (3, 3)),  # of the semi-axes, in columns
    ("to_unit", np.float64, (3, 3)),  # q_j / s_j = sum_i v_i to_unit[i, j]
    ("bound", np.float64),  # amplitude r, of each displacement component
    ("spacing", np.float64),  # h
    ("start", np.int64, 3),  # box: first voxel and size
    ("size", np.int64, 3),
    ("word", np.int64),  # first word of the box's rows, and how many
    ("words", np.int64),
    ("bits", np.int64),  # where the box's rows begin in `Shapes.bits`
    ("first_node", np.int64, 3),  # lattice: first node and count
    ("nodes", np.int64, 3),
    ("pitch", np.int64),  # nodes along x, rounded up to whole vectors
    ("lattice", np.int64),  # where the nodes begin in the lattices
    ("chunks", np.int64),  # of eight voxels in a row of the box, aligned to the volume
    ("reads", np.int64),  # nodes along x that a chunk depends on
    ("weights", np.int64),  # where its splines begin in the weights, and its first nodes in the starts
    ("starts", np.int64),
)
"""A blob as the kernels see it, its `center` found; axis order (z, y, x)."""


@dataclass(frozen=True)
class Shapes:
    """The voxels of every blob, clipped to the mask."""

    blobs: npt.NDArray[Any]
    """(n,) `BLOB` records."""
    bits: npt.NDArray[np.uint64]
    """Rows of all boxes: words ``word ... word + words`` of a row of the volume, (z, y, word) for each."""
    runs: npt.NDArray[np.int64]
    """(n, depth): runs of each blob in each slice of the volume."""


class ShapeJob(NamedTuple):
    """What `_draw` reads and writes."""

    seed: Any
    stream: Any
    sample: Any
    scale: Any
    blobs: Any
    tasks: Any
    """(n + 1,): slice z of the box of blob b is task ``tasks[b] + z``."""
    mask: Any
    """Rows of the mask's bits, and how many a slice has."""
    height: int
    lattice: Any
    """Displacements of all nodes, and the splines along x that interpolate them."""
    weights: Any
    starts: Any
    bits: Any
    """Results, as in `Shapes`."""
    runs: Any


def draw_shapes(
    plan: LesionPlan, centers: npt.NDArray[np.int64], mask: BitMask, threads: int | None = None
) -> Shapes:
    """Evaluate every blob of a plan in its box.

    Parameters
    ----------
    plan : LesionPlan
        What to draw.
    centers : (n, 3) int64 array
        Centre voxel (z, y, x) of each blob.
    mask : BitMask
        Blobs are clipped to it.
    threads : int, optional
        See `parallel_for`.

    Returns
    -------
    Shapes
        Boxes are clipped to the volume and may be empty.

    Raises
    ------
    ValueError
        A warp needs a lattice of more than `MOST_NODES` nodes.
    """
    blobs = _records(plan, centers)
    scale = np.array(plan.scale)
    n_bits, n_nodes, n_weights, n_starts = _measure(blobs, scale, np.array(mask.shape))
    for number, record in enumerate(blobs):
        if math.prod(record["nodes"].tolist()) > MOST_NODES:
            blob = plan.blobs[number]
            raise ValueError(
                f"warp_correlation {blob.warp_correlation} with warp_amplitude {blob.warp_amplitude} and "
                f"semi_axes {blob.semi_axes} needs a lattice of {' x '.join(map(str, record['nodes']))} "
                f"nodes, more than {MOST_NODES}"
            )
    bits = scratch("shapes.bits", n_bits, np.uint64)
    runs = np.zeros((len(blobs), mask.shape[0]), dtype=np.int64)
    tasks = np.concatenate([[0], np.cumsum(blobs["size"][:, 0])])
    job = ShapeJob(
        np.uint32(plan.seed), np.uint32(Stream.WARP), np.uint32(plan.index),
        scale, blobs, tasks, mask.bits, mask.shape[1],
        lattice=scratch("shapes.lattice", n_nodes, np.float64),
        weights=scratch("shapes.weights", n_weights, np.float64),
        starts=scratch("shapes.starts", n_starts, np.int64),
        bits=bits, runs=runs,
    )  # fmt: skip
    work_together(_draw, [len(blobs), int(tasks[-1])], job, threads=threads)
    return Shapes(blobs, bits, runs)


def _records(plan: LesionPlan, centers: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    blobs = extend(plan.records, BLOB)
    blobs["center"] = centers
    blobs["directions"] = work_out(blobs)
    return blobs


def work_out(blobs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Work out `to_unit`, `bound` and `spacing` of blobs for either twin; returns the (n, 3, 3) rotations."""
    axes, rotation = blobs["semi_axes"], _matrices(blobs["rotation"])
    radius = np.prod(axes, axis=1) ** (1.0 / 3.0)  # geometric mean, the unit of the warp
    blobs["to_unit"] = rotation / axes[:, None, :]
    blobs["bound"] = radius * blobs["warp_amplitude"]
    blobs["spacing"] = radius * blobs["warp_correlation"]
    return rotation


def _matrices(quaternions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(n, 3, 3) matrices of unit quaternions (w, x, y, z), acting on (axis 0, axis 1, axis 2)."""
    w, x, y, z = quaternions.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


@kernel
def _measure(blobs: Any, scale: Any, shape: Any) -> tuple[int, int, int, int]:
    """Find each blob's box and lattice; returns the sizes of all rows, lattices, weights and starts."""
    n_bits, n_nodes, n_weights, n_starts = 0, 0, 0, 0
    for b in range(blobs.size):
        blob = blobs[b]
        for i in range(3):
            extent = 0.0
            for j in range(3):
                extent += (blob.directions[i, j] * blob.semi_axes[j]) ** 2
            half = math.sqrt(extent) + blob.bound
            # Grown by twice what `SURFACE` adds to the radius, and by the rounding of a whole number of
            # voxels; not by a voxel, over which the lattice of a far smaller blob would have nodes without
            # number.
            reach = int(min(math.floor(half * SURFACE / scale[i] + 1e-9), 2.0**40))
            blob.start[i] = max(blob.center[i] - reach, 0)
            blob.size[i] = max(min(blob.center[i] + reach + 1, shape[i]) - blob.start[i], 0)
        if blob.size[0] * blob.size[1] * blob.size[2] == 0:
            blob.size[:] = 0
            continue
        blob.word = blob.start[2] >> 6
        blob.words = ((blob.start[2] + blob.size[2] - 1) >> 6) - blob.word + 1
        blob.chunks = (blob.start[2] + blob.size[2] - 1) // CHUNK - blob.start[2] // CHUNK + 1
        for i in range(3):
            low, high = blob.start[i] - blob.center[i], blob.start[i] + blob.size[i] - 1 - blob.center[i]
            blob.first_node[i] = math.floor(low * scale[i] / blob.spacing) - 1
            blob.nodes[i] = math.floor(high * scale[i] / blob.spacing) + 2 - blob.first_node[i] + 1
        blob.pitch = -(-blob.nodes[2] // CHUNK) * CHUNK
        blob.reads = reads_of_a_chunk(blob, scale[2])
        blob.bits, blob.lattice, blob.weights, blob.starts = n_bits, n_nodes, n_weights, n_starts
        n_bits += blob.size[0] * blob.size[1] * blob.words
        # In floating point: a lattice too large to count is refused by the caller before it is used.
        if float(blob.nodes[0]) * float(blob.nodes[1]) * float(blob.nodes[2]) <= MOST_NODES:
            n_nodes += 3 * blob.nodes[0] * blob.nodes[1] * blob.pitch
            n_weights += blob.chunks * blob.reads * CHUNK
            n_starts += blob.chunks
    return n_bits, n_nodes, n_weights, n_starts


@kernel
def _draw(progress: Any, job: Any) -> None:
    """Prepare each blob, a task; then draw each slice of each blob."""
    blobs, tasks = job.blobs, job.tasks
    most_x, most_yx = 1, 1
    for b in range(blobs.size):
        most_x = max(most_x, blobs[b].pitch)
        most_yx = max(most_yx, blobs[b].nodes[1] * blobs[b].pitch)
    plane, row = aligned(6 * most_yx).view(np.float64), aligned(6 * most_x).view(np.float64)
    t = take(progress, 0)
    while t >= 0:
        if blobs[t].size[0] > 0:
            draw_lattice(blobs[t], job)
            tabulate(blobs[t], job)
        done(progress, 0)
        t = take(progress, 0)
    wait_for(progress, 0)
    t = take(progress, 1)
    while t >= 0:
        b = group_of(tasks, t)
        z = t - tasks[b]
        job.runs[b, blobs[b].start[0] + z] = _draw_slice(blobs[b], z, job, plane, row)
        done(progress, 1)
        t = take(progress, 1)
    wait_for(progress, 1)


@inner
def _draw_slice(blob: Any, z: int, job: Any, plane: Any, row: Any) -> int:
    """Evaluate slice z of a blob's box; returns its number of runs."""
    scale, layer, pitch = job.scale, blob.nodes[1] * blob.pitch, blob.pitch
    pz = (blob.start[0] + z - blob.center[0]) * scale[0]
    sum_nodes(
        job.lattice, blob.lattice, blob.nodes[0] * layer, layer, pz / blob.spacing, blob.first_node[0], plane
    )
    runs = 0
    for y in range(blob.size[1]):
        at = blob.bits + (z * blob.size[1] + y) * blob.words
        inside = job.bits[at : at + blob.words]
        inside[:] = np.uint64(0)
        py = (blob.start[1] + y - blob.center[1]) * scale[1]
        sum_nodes(plane, 0, layer, pitch, py / blob.spacing, blob.first_node[1], row)
        low, high = _possible(blob, pz, py, scale[2], row)
        if low <= high:
            line = (blob.start[0] + z) * job.height + blob.start[1] + y
            lungs = job.mask[line, blob.word : blob.word + blob.words]
            _draw_row(blob, pz, py, low, high, row, job, lungs, inside)
            runs += count_runs(inside)
    return runs


@inner
def _draw_row(
    blob: Any, pz: float, py: float, low: int, high: int, row: Any, job: Any, lungs: Any, inside: Any
) -> None:
    """Set the bits of voxels low ... high of a row; `row` holds the displacements at the nodes along x.

    The first and the last chunk reach beyond the box. There no displacement within the bound leads inside,
    and beyond the volume there are no lungs.
    """
    # Locals: the compiler cannot know that writing a bit leaves the record alone.
    u, center, first = blob.to_unit, blob.center[2], blob.start[2] // CHUNK * CHUNK
    n, reads, table, nodes, word0 = blob.pitch, blob.reads, blob.weights, blob.starts, blob.word
    scale, weights, starts = job.scale[2], job.weights, job.starts
    u00, u10, u20 = splat(u[0, 0]), splat(u[1, 0]), splat(u[2, 0])
    u01, u11, u21 = splat(u[0, 1]), splat(u[1, 1]), splat(u[2, 1])
    u02, u12, u22 = splat(u[0, 2]), splat(u[1, 2]), splat(u[2, 2])
    for c in range((low - first) // CHUNK, (high - first) // CHUNK + 1):
        x = first + c * CHUNK
        word, shift = (x >> 6) - word0, np.uint64(x & 63)
        lung = (lungs[word] >> shift) & np.uint64(0xFF)
        if lung == 0:
            continue
        at, node = table + c * reads * CHUNK, starts[nodes + c]
        vz, vy = splat(pz), splat(py)
        vx = (load(LANE_OFFSETS, 0) + splat(np.float64(x - center))) * splat(scale)
        for k in range(node, node + reads):
            w = load(weights, at)
            vz = fma(w, splat(row[k]), vz)
            vy = fma(w, splat(row[n + k]), vy)
            vx = fma(w, splat(row[2 * n + k]), vx)
            at += CHUNK
        q0 = fma(u20, vx, fma(u10, vy, u00 * vz))
        q1 = fma(u21, vx, fma(u11, vy, u01 * vz))
        q2 = fma(u22, vx, fma(u12, vy, u02 * vz))
        level = fma(q2, q2, fma(q1, q1, q0 * q0))
        inside[word] |= (bits_at_most(level, splat(SURFACE)) & lung) << shift


@inner
def _possible(blob: Any, pz: float, py: float, scale: float, row: Any) -> tuple[int, int]:
    """First and last voxel x of a row that can lie in the blob, given the range of its displacements.

    With the displacement in the middle of its range, q / s = A + B x. It is at most `reach` away from that,
    so |A + B x| <= 1 + reach where the voxel is inside: an interval of x.
    """
    n = blob.pitch
    m0, h0 = _range(row, 0, n)
    m1, h1 = _range(row, n, n)
    m2, h2 = _range(row, 2 * n, n)
    u = blob.to_unit
    aa, ab, bb, reach = 0.0, 0.0, 0.0, 0.0
    for j in range(3):
        a = u[0, j] * (pz + m0) + u[1, j] * (py + m1) + u[2, j] * m2
        b = u[2, j] * scale
        r = abs(u[0, j]) * h0 + abs(u[1, j]) * h1 + abs(u[2, j]) * h2
        aa, ab, bb, reach = aa + a * a, ab + a * b, bb + b * b, reach + r * r
    level = 1.0 + 1e-6 + math.sqrt(reach)  # rounding must not cut a voxel off
    discriminant = ab * ab - bb * (aa - level * level)
    if discriminant < 0.0:
        return 0, -1
    middle, half = blob.center[2] - ab / bb, math.sqrt(discriminant) / bb
    low, high = blob.start[2], blob.start[2] + blob.size[2] - 1
    return max(low, int(max(middle - half, -1.0))), min(high, int(min(middle + half + 1.0, 2.0**40)))


@inner
def _range(row: Any, at: int, n: int) -> tuple[float, float]:
    """Middle and half width of the range of n numbers, whole vectors of them."""
    low = high = load(row, at)
    for k in range(at + CHUNK, at + n, CHUNK):
        low, high = least(low, load(row, k)), greatest(high, load(row, k))
    bottom, top = least_lane(low), greatest_lane(high)
    return 0.5 * (top + bottom), 0.5 * (top - bottom)
