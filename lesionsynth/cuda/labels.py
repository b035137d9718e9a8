"""Labels and growth of `lesionsynth.ops`, and erroneous edges of `lesionsynth.lungs`, on a device.

Memory as in `lesionsynth.cuda.filters`. Nothing waits but what has a number or an error to tell, where a
comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lesionsynth.cuda.device import Buffer, Device
from lesionsynth.cuda.grid import Shape, Volume
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
    volume = Volume(device, shape)
    _check_voxels("input", volume)
    found = _find(volume, volume.pack(mask), connectivity, out, mask if plain else None)
    found.number()
    volume.by_warps("label_paint", volume.words, found.bits, out, volume.rows, volume.width)
    return found.count()  # the one wait


@dataclass(frozen=True)
class _Components:
    """What kernels/label.cu knows of a packed mask."""

    volume: Volume
    bits: Buffer
    table: int
    """Address of an int32 a voxel; see kernels/label.cu."""
    state: Buffer
    """The ticket of the last block, and how many components there are."""
    before: Buffer
    """Roots before each chunk of words."""

    def number(self) -> None:
        """Turn roots into numbers."""
        volume = self.volume
        sums = self.before, volume.rows, volume.width
        volume.by_threads("label_number", volume.words, self.bits, self.table, *sums)

    def count(self) -> int:
        """Wait for the number of components."""
        return self.volume.word(self.state, 1)


def _check_voxels(name: str, volume: Volume) -> None:
    if volume.voxels >= MOST_VOXELS:
        raise ValueError(f"{name} must have fewer than 2**31 voxels, got shape {volume.shape}")


def _find(
    volume: Volume, bits: Buffer, connectivity: int, table: int, plain: int | None = None
) -> _Components:
    """Find the root of every run; `plain` is the same mask in bytes, to unite voxel by voxel."""
    chunks = -(-volume.words // THREADS)
    state, before = volume.device.allocate(8), volume.device.allocate(4 * chunks)
    neighbours = *volume.axes, np.int32(connectivity)
    if plain is None:
        volume.by_threads("label_runs", volume.words, bits, table, state, volume.rows, volume.width)
        volume.by_threads("label_unite", volume.words, bits, table, *neighbours)
    else:
        volume.by_threads("label_voxels_plain", volume.voxels, table, state, np.int64(volume.voxels))
        volume.by_threads("label_unite_plain", volume.voxels, plain, table, *neighbours)
    volume.launch("label_count", chunks, bits, table, before, state, volume.rows, volume.width)
    return _Components(volume, bits, table, state, before)


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
    volume = Volume(device, shape)
    if plain:
        _grow_plain(volume, region, room, iterations, connectivity, out)
        return
    bits = volume.pack(region)
    steps = iterations if iterations >= 1 else volume.voxels
    if steps >= volume.voxels and volume.voxels < MOST_VOXELS:  # every step but the last adds a voxel
        volume.unpack(_flood(volume, bits, room, connectivity), out)
    else:
        volume.unpack(_steps(volume, bits, volume.pack(room), steps, connectivity), out)


def _flood(volume: Volume, region: Buffer, room: int, connectivity: int) -> Buffer:
    both, table = volume.pack(room, also=region), volume.device.allocate(4 * volume.voxels)
    _find(volume, both, connectivity, table.pointer)
    volume.by_threads("grow_mark", volume.words, region, both, table, volume.rows, volume.width)
    volume.by_threads("grow_select", volume.words, both, table, volume.rows, volume.width)
    return both


def _steps(volume: Volume, region: Buffer, room: Buffer, iterations: int, connectivity: int) -> Buffer:
    """Grow between two buffers; each step tells the next on the device whether it changed anything."""
    grown = volume.bits()
    neighbours = *volume.axes, np.int32(connectivity)
    while iterations > 0:
        steps = min(iterations, BUNDLE)
        changed = volume.zeros(steps)
        for step in range(steps):
            flags = changed.pointer + 4 * (step - 1) if step else 0, changed.pointer + 4 * step
            volume.by_threads("grow_step", volume.words, region, room, grown, *flags, *neighbours)
            region, grown = grown, region
        iterations -= steps
        if iterations and not volume.word(changed, steps - 1):  # waits, once a bundle
            break
    return region


def _grow_plain(volume: Volume, region: int, room: int, iterations: int, connectivity: int, out: int) -> None:
    neighbours = *volume.axes, np.int32(connectivity)
    now, then = (volume.device.allocate(volume.voxels) for _ in range(2))
    volume.device.copy(now.pointer, region, volume.voxels)
    step, moving = 0, True
    while moving and (iterations < 1 or step < iterations):
        changed = volume.zeros(1)
        volume.by_threads("grow_step_plain", volume.voxels, now, room, then, changed, *neighbours)
        now, then, step, moving = then, now, step + 1, bool(volume.word(changed))
    volume.device.copy(out, now.pointer, volume.voxels)


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
    volume = Volume(device, shape)
    _check_voxels("image", volume)
    name, where = "float" if kind == "float32" else "double", (volume.rows, volume.width)
    lungs, bright, seen = volume.pack(mask), volume.bits(), volume.zeros(2)
    level = np.dtype(kind).type(threshold)
    volume.by_warps(f"edges_bright_{name}", volume.words, image, lungs, bright, seen, *where, level)
    table = device.allocate(4 * volume.voxels)
    found = _find(volume, bright, connectivity, table.pointer)
    found.number()
    shell = _shell(volume, lungs, shell_width)
    _check_lungs(volume, seen, image, kind, mask)  # waits: an error needs to be told, and the tallies need n
    tallies = volume.zeros(2 * (found.count() + 1))
    volume.by_threads("edges_measure", -(-volume.words // SECTOR), bright, shell, table, tallies, *where)
    fraction = np.float64(contact_fraction)
    volume.by_threads("edges_clear", volume.words, bright, table, tallies, lungs, *where, fraction)
    end = np.int64(volume.voxels), volume.width
    volume.by_threads(f"edges_keep_{name}", -(-volume.voxels // 4), image, lungs, out, out_mask, *end)


def _shell(volume: Volume, lungs: Buffer, width: int) -> Buffer:
    """Mark the voxels of a mask within `width` steps of the outside, in plane."""
    reach = np.int32(min(width, max(volume.shape[1:])))  # further than that everything is near the outside
    columns, shell = volume.bits(), volume.bits()
    volume.by_threads("edges_erode_y", volume.words, lungs, columns, *volume.axes, reach)
    volume.by_threads("edges_shell", volume.words, lungs, columns, shell, volume.rows, volume.width, reach)
    return shell


def _check_lungs(volume: Volume, seen: Buffer, image: int, kind: str, mask: int) -> None:
    any_voxel, strange = volume.device.download(seen.pointer, 8).view(np.uint32)
    if not any_voxel:
        raise ValueError(f"lung_mask must have at least one voxel, got none in shape {volume.shape}")
    if strange:
        dtype = np.dtype(kind)
        values = volume.device.download(image, volume.voxels * dtype.itemsize).view(dtype)
        tissue = values[volume.device.download(mask, volume.voxels) != 0]
        raise ValueError(
            f"image must lie in [0, 1] inside lung_mask, got values from {tissue.min()} to {tissue.max()}"
        )
