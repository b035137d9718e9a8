"""The displacement of a blob: a cubic B-spline over a lattice of random nodes, see `lesionsynth.cpu.shapes`.

Along z and y the lattice is summed for whole slices and rows; along x the splines are tabulated for chunks of
eight voxels, a vector of float64, which all rows of a blob share.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lesionsynth.cpu.engine.jit import inner, maker
from lesionsynth.cpu.engine.simd import fma, load, splat, store
from lesionsynth.cpu.philox import blocks_of, fill_blocks

NODE_OFFSET = (32768, 32768, 1 << 20)
"""Added to a lattice node (z, y, x) to make the unsigned Philox counter."""

CHUNK = 8
"""Voxels of a row evaluated together, a vector of float64; chunks start at multiples of eight."""


@maker
def draw_lattice(blob: Any, job: Any) -> None:
    """Displacement of the nodes, (3, z, y, pitch), in length units; a row's padding repeats its last node."""
    nz, ny, nx = blob.nodes
    z0 = np.uint32(blob.first_node[0] + NODE_OFFSET[0])
    y0 = np.uint32(blob.first_node[1] + NODE_OFFSET[1])
    x0 = np.uint32(blob.first_node[2] + NODE_OFFSET[2])
    uniform = np.empty((nz, ny, nx), dtype=np.float32)
    at = blob.lattice
    for i in range(3):
        component = np.uint32(3 * blob.component + i)
        words = job.seed, job.stream, job.sample, component
        fill_blocks(uniform, *words, z0, y0, x0, 0, blocks_of(nz, ny))
        for r in range(nz * ny):
            for k in range(blob.pitch):
                job.lattice[at + k] = blob.bound * (
                    2.0 * np.float64(uniform[r // ny, r % ny, min(k, nx - 1)]) - 1.0
                )
            at += blob.pitch


@inner
def reads_of_a_chunk(blob: Any, scale: float) -> int:
    """Count the nodes along x that a chunk depends on, at most."""
    most = 0
    first = blob.start[2] // CHUNK * CHUNK
    for x in range(first, first + blob.chunks * CHUNK, CHUNK):
        most = max(most, _node_before(blob, scale, x + CHUNK - 1) - _node_before(blob, scale, x) + 4)
    return most


@inner
def tabulate(blob: Any, job: Any) -> None:
    """Splines of each chunk, (chunk, node, voxel), and the node that each begins with."""
    scale, first = job.scale[2], blob.start[2] // CHUNK * CHUNK
    table = job.weights[blob.weights : blob.weights + blob.chunks * blob.reads * CHUNK]
    table[:] = 0.0
    for c in range(blob.chunks):
        node = min(_node_before(blob, scale, first + c * CHUNK), blob.nodes[2] - blob.reads)
        job.starts[blob.starts + c] = node
        for lane in range(CHUNK):
            x = max(blob.start[2], min(first + c * CHUNK + lane, blob.start[2] + blob.size[2] - 1))
            t = (x - blob.center[2]) * scale / blob.spacing
            w = _spline(t - math.floor(t))
            for a in range(4):
                at = c * blob.reads + _node_before(blob, scale, x) + a - node
                table[at * CHUNK + lane] = w[a]


@inner
def _node_before(blob: Any, scale: float, x: int) -> int:
    """First of the four nodes that voxel x depends on, counted from the lattice's first.

    A chunk may begin before the box and end after it; there the nearest voxel stands in.
    """
    inside = max(blob.start[2], min(x, blob.start[2] + blob.size[2] - 1))
    return math.floor((inside - blob.center[2]) * scale / blob.spacing) - 1 - blob.first_node[2]


@inner
def sum_nodes(source: Any, at: int, stride: int, step: int, t: float, first: int, out: Any) -> None:
    """Sum four layers of `step` nodes with the spline weights of t, for each of the three components."""
    k = math.floor(t)
    s0, s1, s2, s3 = _spline(t - k)
    w0, w1, w2, w3 = splat(s0), splat(s1), splat(s2), splat(s3)
    for i in range(3):
        base = at + i * stride + (k - 1 - first) * step
        for m in range(0, step, CHUNK):
            total = w0 * load(source, base + m)
            total = fma(w1, load(source, base + step + m), total)
            total = fma(w2, load(source, base + 2 * step + m), total)
            store(out, i * step + m, fma(w3, load(source, base + 3 * step + m), total))


@inner
def _spline(f: float) -> tuple[float, float, float, float]:
    """Cubic B-spline at the nodes -1, 0, 1, 2 for the fraction f in [0, 1)."""
    g = 1.0 - f
    return (
        g * g * g / 6.0,
        2.0 / 3.0 - f * f * (1.0 - 0.5 * f),
        2.0 / 3.0 - g * g * (1.0 - 0.5 * g),
        f * f * f / 6.0,
    )
