"""Filters and noise of `lesionsynth.ops` on a device.

Volumes are memory of the device in C order, (z, y, x), by address. Inputs are never written; results go to
memory of the caller, which begins on sixteen bytes as all allocators' does. Nothing here waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.lines import gaussian_taps, kernel_of
from lesionsynth.cuda.device import Device
from lesionsynth.cuda.grid import WORD, Grid, Shape, upload

SLAB = 2**23
"""Voxels of the slices averaged together: the sums take 64 MiB twice, whatever the volume."""
LEAST_RUN = 32
"""Outputs of a running sum, at least; twice the window where that is more: starting it must not dominate."""


def fill_uniform(device: Device, shape: Shape, words: Sequence[int], offset: Sequence[int], out: int) -> None:
    """Draw uniform noise in [0, 1), bit for bit that of `lesionsynth.ops.philox_uniform`.

    Parameters
    ----------
    device : Device
    shape : (3,) ints
        (z, y, x).
    words : (4,) ints
        Seed, stream, sample and component, in [0, 2**32).
    offset : (3,) ints
        Coordinate of the first voxel.
    out : int
        Address of float32.
    """
    grid = Grid(device, shape)
    quads = int(grid.rows) * (shape[2] // 4 + 1)
    grid.by_threads("fill_uniform", quads, out, *grid.axes, *(np.uint32(w) for w in (*words, *offset)))


def gaussian_filter(
    device: Device,
    source: int,
    shape: Shape,
    sigmas: Sequence[float],
    truncate: float,
    out: int,
    *,
    plain: bool = False,
) -> None:
    """Smooth a volume, bit for bit as `lesionsynth.ops.gaussian_filter`: along x, then y, then z.

    Parameters
    ----------
    device : Device
    source : int
        Address of float32.
    shape : (3,) ints
        (z, y, x).
    sigmas : (3,) floats
        Standard deviations along z, y, x in voxels; an axis with 0 is left alone.
    truncate : float
        Radius in standard deviations.
    out : int
        Address of float32.
    plain : bool
        One output at a time, without shared memory: slow, for tests.

    Notes
    -----
    A copy of the weights up and a launch an axis.
    """
    grid = Grid(device, shape)
    found = [_weights_of(n, float(s), truncate) for n, s in zip(shape, sigmas, strict=True)]
    axes = [axis for axis in (2, 1, 0) if found[axis][0] > 0]
    if not axes:
        device.copy(out, source, 4 * grid.voxels)
        return
    held, places = upload(device, [found[axis][1] for axis in axes])
    scratch = device.allocate(4 * grid.voxels) if len(axes) > 1 else None
    at: Any = source
    for k, (axis, place) in enumerate(zip(axes, places, strict=True)):
        last = (len(axes) - 1 - k) % 2 == 0  # back and forth, so that the last pass writes `out`
        to: Any = out if last else scratch
        # The taps or the matrix: the kernel reads what its lines need.
        _smooth(grid, axis, at, to, place, place, np.int32(found[axis][0]), np.int32(plain))
        at = to
    del held  # the weights may go once everything that reads them is in the stream


def _smooth(grid: Grid, axis: int, source: Any, out: Any, *weights: Any) -> None:
    depth, height, width = grid.axes
    if axis == 2:
        grid.launch("gauss_rows", -(-int(grid.rows) // WORD), source, out, grid.rows, width, *weights)
        return
    lines = (depth, height, np.int64(width)) if axis == 1 else (np.int32(1), depth, np.int64(height) * width)
    tasks = int(lines[0]) * -(-int(lines[2]) // WORD)
    grid.launch("gauss_columns", tasks, source, out, *lines, *weights)


def _weights_of(n: int, sigma: float, truncate: float) -> tuple[int, npt.NDArray[Any]]:
    """Radius, and float64 taps where the kernel is no longer than lines of `n`, else the folded matrix."""
    taps = gaussian_taps(sigma, truncate)
    radius = taps.size - 1
    return radius, taps if 2 * radius + 1 <= n else kernel_of(n, sigma, truncate)


def uniform_filter(device: Device, source: int, kind: str, shape: Shape, sizes: Shape, out: int) -> None:
    """Average over a box, as `lesionsynth.ops.uniform_filter`.

    Parameters
    ----------
    device : Device
    source : int
        Address of finite numbers.
    kind : {"uint8", "float32", "float64"}
        Type of the volume.
    shape, sizes : (3,) ints
        (z, y, x).
    out : int
        Address of float32.

    Notes
    -----
    Running sums in float64, divided once: equal to the CPU's where sums are exact, as of masks and of
    multiples of 2**-40 below 1. Three launches for every 2**23 voxels; the cost does not depend on the sizes.
    """
    depth, height, width = shape
    plane = height * width
    most = min(depth, max(1, SLAB // plane))
    scratch = [device.allocate(8 * most * plane) for _ in range(2)]
    along_z = {"uint8": "box_z_byte", "float32": "box_z_float", "float64": "box_z_double"}[kind]
    for first in range(0, depth, most):
        slab = Grid(device, (min(most, depth - first), height, width))
        _average(slab, along_z, source, (depth, first), sizes, scratch, out + 4 * first * plane)


def _average(
    slab: Grid, along_z: str, source: int, place: tuple[int, int], sizes: Shape, scratch: Any, out: int
) -> None:
    """Average the slices of a slab; `place` is the depth of the volume and the first of them."""
    (nz, ny, nx), (sums, more) = (np.int32(n) for n in sizes), scratch
    depth, first = (np.int32(n) for n in place)
    slices, height, width = slab.axes
    plane = np.int64(height) * width
    run = _run_of(nz)
    tasks = int(plane) * -(-int(slices) // int(run))
    slab.by_threads(along_z, tasks, source, sums, depth, plane, first, slices, nz, run)
    run = _run_of(ny)
    tasks = int(slices) * int(width) * -(-int(height) // int(run))
    slab.by_threads("box_y", tasks, sums, more, slices, height, width, ny, run)
    slab.by_warps("box_x", int(slab.rows), more, out, slab.rows, width, nx, np.float64(nz) * ny * nx)


def _run_of(size: np.int32) -> np.int32:
    return np.int32(max(LEAST_RUN, 2 * int(size)))
