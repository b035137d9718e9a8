"""Stage 1: warped, rotated ellipsoids as an analytic inverse map, evaluated in each blob's bounding box.

With p = (voxel - centre) * scale, d the displacement and R the rotation, a voxel belongs to the blob where

    q = R^T (p + d(p)),    (q_0 / s_0)^2 + (q_1 / s_1)^2 + (q_2 / s_2)^2 <= 1 (to rounding, see `SURFACE`).

d is a cubic B-spline: d_i(p) = amplitude r sum_n B(p / h - n) c_i(n), with r the geometric mean of the
semi-axes, h = correlation r the lattice spacing, and c_i(n) = 2 u - 1 the Philox uniform of lattice node n
(stream WARP, component 3 * blob + i, node (0, 0, 0) at the centre, see `NODE_OFFSET`). The splines are a
partition of unity, so |d_i| never exceeds amplitude r, and the box of the rotated ellipsoid grown by that
bound contains the blob.

Float64 throughout: a boundary voxel must not depend on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lesionsynth.cpu._threads import parallel_for
from lesionsynth.cpu.philox import Stream, fill_uniform
from lesionsynth.plan import Blob, LesionPlan

NODE_OFFSET = (32768, 32768, 1 << 20)
"""Added to a lattice node (z, y, x) to make the unsigned Philox counter."""

SURFACE = 1.0 + 1e-9
"""Level of the surface. The points of a sphere of whole radius that lie on voxels (30 for radius 12) must not
hang on the rounding of a rotation, about 1e-15."""

MOST_NODES = 2**25
"""Largest control lattice, 1.2 GB; the paper's blobs need some thousands of nodes."""

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """One blob's voxels, clipped to the mask."""

    start: tuple[int, int, int]
    """First voxel of the box in the volume."""
    inside: npt.NDArray[np.bool_]
    """(z, y, x) membership in the box."""


def rotation_matrix(quaternion: tuple[float, float, float, float]) -> Float64:
    """Return the 3 x 3 matrix of a unit quaternion (w, x, y, z), acting on (axis 0, axis 1, axis 2)."""
    w, x, y, z = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def mean_radius(blob: Blob) -> float:
    """Geometric mean of the semi-axes, the unit of the warp."""
    return math.prod(blob.semi_axes) ** (1.0 / 3.0)


def half_extents(blob: Blob) -> Float64:
    """Half widths (z, y, x), in length units, of a box around the centre that contains the warped blob."""
    ellipsoid = np.sqrt(((rotation_matrix(blob.rotation) * np.array(blob.semi_axes)) ** 2).sum(axis=1))
    return np.asarray(ellipsoid + blob.warp_amplitude * mean_radius(blob))


def draw_shapes(
    plan: LesionPlan,
    centers: list[tuple[int, int, int]],
    mask: npt.NDArray[np.bool_],
    threads: int | None = None,
) -> list[Shape]:
    """Evaluate every blob of a plan in its box.

    Parameters
    ----------
    plan : LesionPlan
        What to draw.
    centers : list of (z, y, x)
        Centre voxel of each blob.
    mask : (z, y, x) bool array
        Blobs are clipped to it.
    threads : int, optional
        See `parallel_for`.

    Returns
    -------
    list of Shape
        One for each blob; boxes are clipped to the volume and may be empty.
    """
    shapes = [
        _boxed(blob, center, plan.scale, mask.shape) for blob, center in zip(plan.blobs, centers, strict=True)
    ]

    def draw(lo: int, hi: int) -> None:
        for k in range(lo, hi):
            _draw(shapes[k], plan, plan.blobs[k], centers[k], mask)

    parallel_for(len(shapes), draw, threads)
    return shapes


def _boxed(
    blob: Blob, center: tuple[int, int, int], scale: tuple[float, ...], shape: tuple[int, ...]
) -> Shape:
    # Grown by twice what `SURFACE` adds to the radius, and by the rounding of a whole number of voxels; not
    # by a voxel, over which the lattice of a far smaller blob would have nodes without number.
    reach = np.floor(half_extents(blob) * SURFACE / np.array(scale) + 1e-9).astype(int)
    start = [max(c - int(r), 0) for c, r in zip(center, reach, strict=True)]
    stop = [min(c + int(r) + 1, n) for c, r, n in zip(center, reach, shape, strict=True)]
    size = [max(b - a, 0) for a, b in zip(start, stop, strict=True)]
    return Shape((start[0], start[1], start[2]), np.zeros(size, dtype=np.bool_))


def _draw(shape: Shape, plan: LesionPlan, blob: Blob, center: tuple[int, int, int], mask: Any) -> None:
    if shape.inside.size == 0:
        return
    radius = mean_radius(blob)
    spacing = blob.warp_correlation * radius
    scale = np.array(plan.scale)
    first, coefficients = _lattice(shape, plan, blob, center, spacing, scale)
    region = mask[tuple(slice(a, a + n) for a, n in zip(shape.start, shape.inside.shape, strict=True))]
    origin = (np.array(shape.start) - np.array(center)) * 1.0
    _inside(
        shape.inside, region, origin, scale, rotation_matrix(blob.rotation), np.array(blob.semi_axes),
        coefficients, first, spacing,
    )  # fmt: skip


def _lattice(
    shape: Shape, plan: LesionPlan, blob: Blob, center: tuple[int, int, int], spacing: float, scale: Float64
) -> tuple[npt.NDArray[np.int64], Float64]:
    """Coefficients amplitude * r * c_i(n), (3, z, y, x), of the nodes the box touches, and the first node."""
    low = (np.array(shape.start) - np.array(center)) * scale / spacing
    high = (np.array(shape.start) + np.array(shape.inside.shape) - 1 - np.array(center)) * scale / spacing
    first = np.floor(low).astype(np.int64) - 1
    count = np.floor(high).astype(np.int64) + 2 - first + 1
    if math.prod(count.tolist()) > MOST_NODES:
        raise ValueError(
            f"warp_correlation {blob.warp_correlation} with warp_amplitude {blob.warp_amplitude} and "
            f"semi_axes {blob.semi_axes} needs a lattice of {' x '.join(map(str, count))} nodes, more than "
            f"{MOST_NODES}"
        )
    uniform = np.empty((3, *count.tolist()), dtype=np.float32)
    origin = [int(f) + o for f, o in zip(first, NODE_OFFSET, strict=True)]
    for i in range(3):
        fill_uniform(uniform[i], plan.seed, int(Stream.WARP), plan.index, 3 * blob.component + i, *origin)
    bound = blob.warp_amplitude * mean_radius(blob)
    return first, bound * (2.0 * uniform.astype(np.float64) - 1.0)


@numba.njit(nogil=True, cache=True)
def _weights(f: float, w: Any) -> None:
    """Cubic B-spline at the nodes -1, 0, 1, 2 for the fraction f in [0, 1)."""
    g = 1.0 - f
    w[0] = g * g * g / 6.0
    w[1] = 2.0 / 3.0 - f * f * (1.0 - 0.5 * f)
    w[2] = 2.0 / 3.0 - g * g * (1.0 - 0.5 * g)
    w[3] = f * f * f / 6.0


@numba.njit(nogil=True, cache=True)
def _along_row(w: Any, row: Any, n: int) -> Any:
    """Displacement from the four nodes that begin at n."""
    return w[0] * row[n] + w[1] * row[n + 1] + w[2] * row[n + 2] + w[3] * row[n + 3]


@numba.njit(nogil=True, cache=True)
def _inside(
    out: Any,
    mask: Any,
    origin: Any,
    scale: Any,
    rotation: Any,
    semi_axes: Any,
    coefficients: Any,
    first: Any,
    h: float,
) -> None:
    nz, ny, nx = out.shape
    n_nodes = coefficients.shape[3]
    wz, wy, wx = np.empty(4), np.empty(4), np.empty(4)
    row = np.empty((3, n_nodes))  # the lattice summed over z and y: a row of voxels shares it
    inverse = np.empty(3)
    for i in range(3):
        inverse[i] = 1.0 / semi_axes[i]
    for z in range(nz):
        pz = (origin[0] + z) * scale[0]
        tz = pz / h
        kz = math.floor(tz)
        _weights(tz - kz, wz)
        for y in range(ny):
            py = (origin[1] + y) * scale[1]
            ty = py / h
            ky = math.floor(ty)
            _weights(ty - ky, wy)
            for i in range(3):
                for n in range(n_nodes):
                    total = 0.0
                    for a in range(4):
                        for b in range(4):
                            weight = wz[a] * wy[b]
                            total += weight * coefficients[i, kz - 1 - first[0] + a, ky - 1 - first[1] + b, n]
                    row[i, n] = total
            for x in range(nx):
                if not mask[z, y, x]:
                    out[z, y, x] = False
                    continue
                px = (origin[2] + x) * scale[2]
                tx = px / h
                kx = math.floor(tx)
                _weights(tx - kx, wx)
                n = kx - 1 - first[2]
                vz = pz + _along_row(wx, row[0], n)
                vy = py + _along_row(wx, row[1], n)
                vx = px + _along_row(wx, row[2], n)
                total = 0.0
                for j in range(3):  # column j of R is the direction of semi-axis j
                    q = (rotation[0, j] * vz + rotation[1, j] * vy + rotation[2, j] * vx) * inverse[j]
                    total += q * q
                out[z, y, x] = total <= SURFACE
