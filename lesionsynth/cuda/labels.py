"""Labels and growth of `lesionsynth.ops`, and erroneous edges of `lesionsynth.lungs`, on a device.

Memory as in `lesionsynth.cuda.filters`. Nothing waits but what has a number or an error to tell, where a
comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lesionsynth.cuda.device import Buffer, Device
from lesionsynth.cuda.grid import Grid, Shape
from lesionsynth.cuda.programs import THREADS

MOST_VOXELS = 2**31
"""Nodes are voxels by int32."""
BUNDLE = 64
"""Steps of growth that are launched before the host asks whether the last one changed anything."""
SECTOR = 8
"""Words of a thread of ``edges_measure``, as in kernels/edges.cu."""


# --- Labels ---


def label(
    device: Device, mask: int, shape: Shape, connectivity: int, out: int, *, plain: bool = False
) -> int:
    """Find the connected components of a mask, as `lesionsynth.ops.label`.

    Parameters
    ----------
    device : Device
    mask : int
        Address of bytes; 0 is background.
    shape : (3,) ints
        (z, y, x).
    connectivity : {6, 18, 26}
        Neighbours by faces; and edges; and corners.
    out : int
        Address of int32: 0 background, 1..n in C order of the components' first voxels.
    plain : bool
        Unite voxels one by one: slow, for tests.

    Returns
    -------
    int
        Number of components, n.

    Raises
    ------
    ValueError
        There are 2**31 voxels or more.

    Notes
    -----
    Six launches. Needs a bit for every voxel besides the result.
    """
    grid = Grid(device, shape)
    _check_voxels("input", grid)
    found = _find(grid, grid.pack(mask), connectivity, out, mask if plain else None)
    found.number()
    grid.by_warps("label_paint", grid.words, found.bits, out, grid.rows, grid.width)
    return found.count()  # the one wait


@dataclass(frozen=True)
class _Components:
    """What kernels/label.cu knows of a packed mask."""

    grid: Grid
    bits: Buffer
    table: int
    """Address of an int32 a voxel; see kernels/label.cu."""
    state: Buffer
    """The ticket of the last block, and how many components there are."""
    before: Buffer
    """Roots before each chunk of words."""

    def number(self) -> None:
        """Turn roots into numbers."""
        grid = self.grid
        sums = self.before, grid.rows, grid.width
        grid.by_threads("label_number", grid.words, self.bits, self.table, *sums)

    def count(self) -> int:
        """Wait for the number of components."""
        return self.grid.word(self.state, 1)


def _check_voxels(name: str, grid: Grid) -> None:
    if grid.voxels >= MOST_VOXELS:
        raise ValueError(f"{name} must have fewer than 2**31 voxels, got shape {grid.shape}")


def _find(grid: Grid, bits: Buffer, connectivity: int, table: int, plain: int | None = None) -> _Components:
    """Find the root of every run; `plain` is the same mask in bytes, to unite voxel by voxel."""
    chunks = -(-grid.words // THREADS)
    state, before = grid.device.allocate(8), grid.device.allocate(4 * chunks)
    neighbours = *grid.axes, np.int32(connectivity)
    if plain is None:
        grid.by_threads("label_runs", grid.words, bits, table, state, grid.rows, grid.width)
        grid.by_threads("label_unite", grid.words, bits, table, *neighbours)
    else:
        grid.by_threads("label_voxels_plain", grid.voxels, table, state, np.int64(grid.voxels))
        grid.by_threads("label_unite_plain", grid.voxels, plain, table, *neighbours)
    grid.launch("label_count", chunks, bits, table, before, state, grid.rows, grid.width)
    return _Components(grid, bits, table, state, before)


# --- Growth ---


def grow(
    device: Device,
    region: int,
    room: int,
    shape: Shape,
    iterations: int,
    connectivity: int,
    out: int,
    *,
    plain: bool = False,
) -> None:
    """Grow a region step by step, only into a mask, as `lesionsynth.ops.grow`.

    Parameters
    ----------
    device : Device
    region, room : int
        Addresses of bytes; 0 is outside.
    shape : (3,) ints
        (z, y, x).
    iterations : int
        Steps; below 1, until a step adds nothing.
    connectivity : {6, 18, 26}
        Neighbours by faces; and edges; and corners.
    out : int
        Address of bytes 0 and 1.
    plain : bool
        Step by step on voxels, a wait each: slow, for tests.

    Notes
    -----
    A launch a step, with a wait every 64. Without end there are no steps and no wait: what a region reaches
    in a mask are the components of both that hold a voxel of the region.
    """
    grid = Grid(device, shape)
    if plain:
        _grow_plain(grid, region, room, iterations, connectivity, out)
        return
    bits = grid.pack(region)
    steps = iterations if iterations >= 1 else grid.voxels
    if steps >= grid.voxels and grid.voxels < MOST_VOXELS:  # every step but the last adds a voxel
        grid.unpack(_flood(grid, bits, room, connectivity), out)
    else:
        grid.unpack(_steps(grid, bits, grid.pack(room), steps, connectivity), out)


def _flood(grid: Grid, region: Buffer, room: int, connectivity: int) -> Buffer:
    both, table = grid.pack(room, also=region), grid.device.allocate(4 * grid.voxels)
    _find(grid, both, connectivity, table.pointer)
    grid.by_threads("grow_mark", grid.words, region, both, table, grid.rows, grid.width)
    grid.by_threads("grow_select", grid.words, both, table, grid.rows, grid.width)
    return both


def _steps(grid: Grid, region: Buffer, room: Buffer, iterations: int, connectivity: int) -> Buffer:
    """Grow between two buffers; each step tells the next on the device whether it changed anything."""
    grown = grid.bits()
    neighbours = *grid.axes, np.int32(connectivity)
    while iterations > 0:
        steps = min(iterations, BUNDLE)
        changed = grid.zeros(steps)
        for step in range(steps):
            flags = changed.pointer + 4 * (step - 1) if step else 0, changed.pointer + 4 * step
            grid.by_threads("grow_step", grid.words, region, room, grown, *flags, *neighbours)
            region, grown = grown, region
        iterations -= steps
        if iterations and not grid.word(changed, steps - 1):  # waits, once a bundle
            break
    return region


def _grow_plain(grid: Grid, region: int, room: int, iterations: int, connectivity: int, out: int) -> None:
    neighbours = *grid.axes, np.int32(connectivity)
    now, then = (grid.device.allocate(grid.voxels) for _ in range(2))
    grid.device.copy(now.pointer, region, grid.voxels)
    step, moving = 0, True
    while moving and (iterations < 1 or step < iterations):
        changed = grid.zeros(1)
        grid.by_threads("grow_step_plain", grid.voxels, now, room, then, changed, *neighbours)
        now, then, step, moving = then, now, step + 1, bool(grid.word(changed))
    grid.device.copy(out, now.pointer, grid.voxels)


# --- Erroneous edges ---


def remove_edges(
    device: Device,
    image: int,
    kind: str,
    mask: int,
    shape: Shape,
    threshold: float,
    contact_fraction: float,
    shell_width: int,
    connectivity: int,
    out: int,
    out_mask: int,
) -> None:
    """Take bright rims out of a lung mask, and out of the image, as `lesionsynth.remove_erroneous_edges`.

    Parameters
    ----------
    device : Device
    image : int
        Address of H'.
    kind : {"float32", "float64"}
        Type of the image.
    mask : int
        Address of M', bytes; 0 is outside.
    shape : (3,) ints
        (z, y, x).
    threshold, contact_fraction, shell_width, connectivity
        See `lesionsynth.remove_erroneous_edges`; checked there.
    out : int
        Address of H, of the type of the image.
    out_mask : int
        Address of M, bytes 0 and 1.

    Raises
    ------
    ValueError
        The mask is empty, a voxel inside it is NaN or outside [0, 1], or there are 2**31 voxels or more.
    """
    grid = Grid(device, shape)
    _check_voxels("image", grid)
    name, where = "float" if kind == "float32" else "double", (grid.rows, grid.width)
    lungs, bright, seen = grid.pack(mask), grid.bits(), grid.zeros(2)
    level = np.dtype(kind).type(threshold)
    grid.by_warps(f"edges_bright_{name}", grid.words, image, lungs, bright, seen, *where, level)
    table = device.allocate(4 * grid.voxels)
    found = _find(grid, bright, connectivity, table.pointer)
    found.number()
    shell = _shell(grid, lungs, shell_width)
    _check_lungs(grid, seen, image, kind, mask)  # waits: an error needs to be told, and the tallies need n
    tallies = grid.zeros(2 * (found.count() + 1))
    grid.by_threads("edges_measure", -(-grid.words // SECTOR), bright, shell, table, tallies, *where)
    fraction = np.float64(contact_fraction)
    grid.by_threads("edges_clear", grid.words, bright, table, tallies, lungs, *where, fraction)
    end = np.int64(grid.voxels), grid.width
    grid.by_threads(f"edges_keep_{name}", -(-grid.voxels // 4), image, lungs, out, out_mask, *end)


def _shell(grid: Grid, lungs: Buffer, width: int) -> Buffer:
    """Mark the voxels of a mask within `width` steps of the outside, in plane."""
    reach = np.int32(min(width, max(grid.shape[1:])))  # further than that everything is near the outside
    columns, shell = grid.bits(), grid.bits()
    grid.by_threads("edges_erode_y", grid.words, lungs, columns, *grid.axes, reach)
    grid.by_threads("edges_shell", grid.words, lungs, columns, shell, grid.rows, grid.width, reach)
    return shell


def _check_lungs(grid: Grid, seen: Buffer, image: int, kind: str, mask: int) -> None:
    any_voxel, strange = grid.device.download(seen.pointer, 8).view(np.uint32)
    if not any_voxel:
        raise ValueError(f"lung_mask must have at least one voxel, got none in shape {grid.shape}")
    if strange:
        dtype = np.dtype(kind)
        values = grid.device.download(image, grid.voxels * dtype.itemsize).view(dtype)
        tissue = values[grid.device.download(mask, grid.voxels) != 0]
        raise ValueError(
            f"image must lie in [0, 1] inside lung_mask, got values from {tissue.min()} to {tissue.max()}"
        )
