"""The generator's building blocks on a GPU: what `lesionsynth.ops` and `lesionsynth.lungs` do on the CPU.

Volumes are memory of the device in C order, (z, y, x), by pointer, and are never written. Results are new
buffers. Nothing waits for the device but what has a number or an error to tell, where a comment says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.label import check_connectivity
from lesionsynth.cpu.lines import gaussian_taps, kernel_of
from lesionsynth.cuda._device import Buffer, Device, Mark, Pinned
from lesionsynth.cuda._source import THREADS

WORD = 32
"""Voxels of a word of a packed mask."""
WARPS = THREADS // WORD
BLOCKS = 8
"""Blocks a multiprocessor: 2048 threads, all it holds."""
BUNDLE = 64
"""Steps of growth that are launched before the host asks whether the last one changed anything."""
SLAB = 2**23
"""Voxels of the slices averaged together: the sums take 64 MiB twice, whatever the volume."""
LEAST_RUN = 32
"""Outputs of a running sum, at least; twice the window where that is more: starting it must not dominate."""


@dataclass(frozen=True)
class _Volume:
    """A shape on a device, and launches for it."""

    device: Device
    shape: tuple[int, int, int]
    image: str = "float32"

    @property
    def voxels(self) -> int:
        z, y, x = self.shape
        return z * y * x

    @property
    def rows(self) -> np.int64:
        return np.int64(self.shape[0] * self.shape[1])

    @property
    def width(self) -> np.int32:
        return np.int32(self.shape[2])

    @property
    def words(self) -> int:
        """Words of a packed mask."""
        return int(self.rows) * -(-self.shape[2] // WORD)

    @property
    def axes(self) -> tuple[np.int32, np.int32, np.int32]:
        z, y, x = self.shape
        return np.int32(z), np.int32(y), np.int32(x)

    def launch(self, kernel: str, tasks: int, *arguments: Any) -> None:
        """Launch for a number of blocks' worth of tasks; buffers and pointers are passed as addresses."""
        grid = max(1, min(tasks, BLOCKS * self.device.processors))
        values = [_address(a) if isinstance(a, int) or hasattr(a, "pointer") else a for a in arguments]
        self.device.launch("ops", self.image, kernel, grid, *values)

    def by_threads(self, kernel: str, tasks: int, *arguments: Any) -> None:
        """Launch for tasks of a thread each."""
        self.launch(kernel, -(-tasks // THREADS), *arguments)

    def by_warps(self, kernel: str, tasks: int, *arguments: Any) -> None:
        """Launch for tasks of a warp each."""
        self.launch(kernel, -(-tasks // WARPS), *arguments)

    def bits(self) -> Buffer:
        """Take memory for a packed mask."""
        return self.device.allocate(4 * self.words)

    def pack(self, mask: int, also: Buffer | None = None) -> Buffer:
        """Pack a mask of bytes, united with another that is packed."""
        bits = self.bits()
        self.by_warps("pack_mask", int(self.rows), mask, also or 0, bits, self.rows, self.width)
        return bits

    def unpack(self, bits: Buffer) -> Buffer:
        """Return a packed mask as bytes 0 and 1."""
        out = self.device.allocate(self.voxels)
        self.by_threads("unpack_mask", -(-self.voxels // 4), bits, out, np.int64(self.voxels), self.width)
        return out

    def zeros(self, words: int) -> Buffer:
        """Take memory of 32-bit words and clear it."""
        buffer = self.device.allocate(4 * words)
        self.by_threads("clear_words", words, buffer, np.int64(words))
        return buffer

    def word(self, buffer: Buffer, index: int = 0) -> int:
        """Wait for the device and read a 32-bit word."""
        return int(self.device.download(buffer.pointer + 4 * index, 4).view(np.uint32)[0])


def _address(value: Any) -> np.uint64:
    return np.uint64(value if isinstance(value, int) else value.pointer)


# --- Labels ---


def label(
    device: Device, mask: int, shape: Sequence[int], connectivity: int = 6, *, plain: bool = False
) -> tuple[Buffer, int]:
    """Find the connected components of a mask, as `lesionsynth.ops.label`.

    Parameters
    ----------
    device : Device
    mask : int
        Pointer to bytes; 0 is background.
    shape : (3,) ints
        (z, y, x).
    connectivity : {6, 18, 26}
        Neighbours by faces; and edges; and corners.
    plain : bool
        Unite voxels one by one: slow, for tests.

    Returns
    -------
    labels : Buffer
        int32; 0 background, 1..n in C order of the components' first voxels.
    n : int
        Number of components.

    Raises
    ------
    ValueError
        Another connectivity, or 2**31 voxels or more, which int32 cannot count.

    Notes
    -----
    Six launches. Needs a bit for every voxel besides the result.
    """
    volume = _labelled(device, shape, connectivity)
    bits = volume.pack(mask)
    table, state, counts = _find_components(volume, bits, connectivity, mask if plain else None)
    _number(volume, bits, table, counts)
    volume.by_warps("label_paint", volume.words, bits, table, volume.rows, volume.width)
    return table, volume.word(state, 1)  # the one wait: n


def _labelled(device: Device, shape: Sequence[int], connectivity: int, image: str = "float32") -> _Volume:
    check_connectivity(connectivity)
    volume = _Volume(device, _three(shape), image)
    if volume.voxels >= 2**31:
        raise ValueError(f"shape must have fewer than 2**31 voxels, got {volume.shape}")
    return volume


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    z, y, x = (int(n) for n in values)
    return z, y, x


def _find_components(
    volume: _Volume, bits: Buffer, connectivity: int, plain: int | None = None
) -> tuple[Buffer, Buffer, Buffer]:
    """Return the table of roots, the state (ticket, n) and the roots before each chunk; see label.cu."""
    chunks = -(-volume.words // THREADS)
    table = volume.device.allocate(4 * volume.voxels)
    state, counts = volume.device.allocate(8), volume.device.allocate(4 * chunks)
    neighbours = *volume.axes, np.int32(connectivity)
    if plain is None:
        volume.by_threads("label_runs", volume.words, bits, table, state, volume.rows, volume.width)
        volume.by_threads("label_unite", volume.words, bits, table, *neighbours)
    else:
        volume.by_threads("label_voxels_plain", volume.voxels, table, state, np.int64(volume.voxels))
        volume.by_threads("label_unite_plain", volume.voxels, plain, table, *neighbours)
    volume.launch("label_count", chunks, bits, table, counts, state, volume.rows, volume.width)
    return table, state, counts


def _number(volume: _Volume, bits: Buffer, table: Buffer, counts: Buffer) -> None:
    volume.by_threads("label_number", volume.words, bits, table, counts, volume.rows, volume.width)


# --- Growth ---


def grow(
    device: Device,
    seed: int,
    mask: int,
    shape: Sequence[int],
    iterations: int = 1,
    connectivity: int = 6,
    *,
    plain: bool = False,
) -> Buffer:
    """Grow a region step by step, only into a mask, as `lesionsynth.ops.grow`.

    Parameters
    ----------
    device : Device
    seed, mask : int
        Pointers to bytes; 0 is outside.
    shape : (3,) ints
        (z, y, x).
    iterations : int
        Steps; below 1, until a step adds nothing.
    connectivity : {6, 18, 26}
        Neighbours by faces; and edges; and corners.
    plain : bool
        Step by step on voxels, a wait each: slow, for tests.

    Returns
    -------
    Buffer
        Bytes 0 and 1.

    Raises
    ------
    ValueError
        Another connectivity, or 2**31 voxels or more.

    Notes
    -----
    A launch a step, with a wait every 64. Without end there are no steps and no wait: what a region reaches
    in a mask are the components of both that hold a voxel of the region.
    """
    volume = _labelled(device, shape, connectivity)
    if plain:
        return _grow_plain(volume, seed, mask, iterations, connectivity)
    region = volume.pack(seed)
    if iterations < 1 or iterations >= volume.voxels:  # a step that changes something adds a voxel
        return volume.unpack(_flood(volume, region, mask, connectivity))
    return volume.unpack(_steps(volume, region, volume.pack(mask), iterations, connectivity))


def _flood(volume: _Volume, region: Buffer, mask: int, connectivity: int) -> Buffer:
    both = volume.pack(mask, also=region)
    table, *_ = _find_components(volume, both, connectivity)
    volume.by_threads("grow_mark", volume.words, region, both, table, volume.rows, volume.width)
    volume.by_threads("grow_select", volume.words, both, table, volume.rows, volume.width)
    return both


def _steps(volume: _Volume, region: Buffer, room: Buffer, iterations: int, connectivity: int) -> Buffer:
    """Grow between two buffers; each step tells the next on the device whether it changed anything."""
    grown = volume.bits()
    while iterations > 0:
        steps = min(iterations, BUNDLE)
        changed = volume.zeros(steps)
        for step in range(steps):
            before = changed.pointer + 4 * (step - 1) if step else 0
            flags = before, changed.pointer + 4 * step
            neighbours = *volume.axes, np.int32(connectivity)
            volume.by_threads("grow_step", volume.words, region, room, grown, *flags, *neighbours)
            region, grown = grown, region
        iterations -= steps
        if iterations and not volume.word(changed, steps - 1):  # waits, once a bundle
            break
    return region


def _grow_plain(volume: _Volume, seed: int, mask: int, iterations: int, connectivity: int) -> Buffer:
    region: int | Buffer = seed
    step = 0
    while True:
        grown, changed = volume.device.allocate(volume.voxels), volume.zeros(1)
        neighbours = *volume.axes, np.int32(connectivity)
        volume.by_threads("grow_step_plain", volume.voxels, region, mask, grown, changed, *neighbours)
        region, step = grown, step + 1
        if step == iterations or not volume.word(changed):
            return grown


# --- Erroneous edges ---


def remove_edges(
    device: Device,
    image: int,
    kind: str,
    mask: int,
    shape: Sequence[int],
    threshold: float = 1 / 3,
    contact_fraction: float = 0.5,
    shell_width: int = 2,
    connectivity: int = 26,
) -> tuple[Buffer, Buffer]:
    """Take bright rims out of a lung mask, and out of the image, as `lesionsynth.remove_erroneous_edges`.

    Parameters
    ----------
    device : Device
    image : int
        Pointer to H'.
    kind : {"float32", "float64"}
        Type of the image.
    mask : int
        Pointer to M', bytes; 0 is outside.
    shape : (3,) ints
        (z, y, x).
    threshold, contact_fraction, shell_width, connectivity
        See `lesionsynth.remove_erroneous_edges`; checked there.

    Returns
    -------
    image : Buffer
        H, of the type of the image.
    mask : Buffer
        M, bytes 0 and 1.

    Raises
    ------
    ValueError
        The mask is empty, a voxel inside it is NaN or outside [0, 1], or there are 2**31 voxels or more.
    """
    volume = _labelled(device, shape, connectivity, kind)
    where = volume.rows, volume.width
    lungs, bright, found = volume.pack(mask), volume.bits(), volume.zeros(2)
    level = np.dtype(kind).type(threshold)
    volume.by_warps("edges_bright", volume.words, image, lungs, bright, found, *where, level)
    table, state, counts = _find_components(volume, bright, connectivity)
    _number(volume, bright, table, counts)
    shell = _shell(volume, lungs, shell_width)
    # The one wait: the tallies need n, and an error needs to be told.
    components = volume.word(state, 1)
    _check_lungs(volume, found, image, mask)
    tallies = volume.zeros(2 * (components + 1))
    volume.by_threads("edges_measure", -(-volume.words // 8), bright, shell, table, tallies, *where)
    fraction = np.float64(contact_fraction)
    volume.by_threads("edges_clear", volume.words, bright, table, tallies, lungs, *where, fraction)
    return _keep(volume, image, lungs)


def _shell(volume: _Volume, lungs: Buffer, width: int) -> Buffer:
    """Mark the voxels of a mask within `width` steps of the outside, in plane."""
    reach = np.int32(min(width, max(volume.shape[1:])))
    columns, shell = volume.bits(), volume.bits()
    volume.by_threads("edges_erode_y", volume.words, lungs, columns, *volume.axes, reach)
    volume.by_threads("edges_shell", volume.words, lungs, columns, shell, volume.rows, volume.width, reach)
    return shell


def _check_lungs(volume: _Volume, found: Buffer, image: int, mask: int) -> None:
    any_voxel, strange = volume.device.download(found.pointer, 8).view(np.uint32)
    if not any_voxel:
        raise ValueError(f"lung_mask must have at least one voxel, got none in shape {volume.shape}")
    if strange:
        kind = np.dtype(volume.image)
        values = volume.device.download(image, volume.voxels * kind.itemsize).view(kind)
        tissue = values[volume.device.download(mask, volume.voxels) != 0]
        raise ValueError(
            f"image must lie in [0, 1] inside lung_mask, got values from {tissue.min()} to {tissue.max()}"
        )


def _keep(volume: _Volume, image: int, lungs: Buffer) -> tuple[Buffer, Buffer]:
    out = volume.device.allocate(volume.voxels * np.dtype(volume.image).itemsize)
    kept, voxels = volume.device.allocate(volume.voxels), np.int64(volume.voxels)
    volume.by_threads("edges_keep", -(-volume.voxels // 4), image, lungs, out, kept, voxels, volume.width)
    return out, kept


# --- Filters and noise ---


def uniform_filter(
    device: Device, volume: int, kind: str, shape: Sequence[int], sizes: Sequence[int]
) -> Buffer:
    """Average over a box, as `lesionsynth.ops.uniform_filter`.

    Parameters
    ----------
    device : Device
    volume : int
        Pointer to finite numbers.
    kind : {"float32", "float64", "uint8"}
        Type of the volume.
    shape, sizes : (3,) ints
        (z, y, x).

    Returns
    -------
    Buffer
        float32.

    Notes
    -----
    Running sums in float64, divided once: equal to the CPU's where sums are exact, as of masks and of
    multiples of 2**-40 below 1. Three launches for every 2**23 voxels; the cost does not depend on the sizes.
    """
    depth, height, width = _three(shape)
    nz, ny, nx = (np.int32(n) for n in _three(sizes))
    all_slices = min(depth, max(1, SLAB // (height * width)))
    result = device.allocate(4 * depth * height * width)
    sums, more = (device.allocate(8 * all_slices * height * width) for _ in range(2))
    image, kernel = ("float32", "box_z_bytes") if kind == "uint8" else (kind, "box_z_image")
    for first in range(0, depth, all_slices):
        slab = _Volume(device, (min(all_slices, depth - first), height, width), image)
        slices, rows, columns = slab.axes
        plane, count = np.int64(height * width), np.float64(nz) * ny * nx
        run = _run_of(int(nz))
        tasks = height * width * -(-int(slices) // int(run))
        slab.by_threads(kernel, tasks, volume, sums, np.int32(depth), plane, np.int32(first), slices, nz, run)
        run = _run_of(int(ny))
        tasks = int(slices) * width * -(-height // int(run))
        slab.by_threads("box_y", tasks, sums, more, slices, rows, columns, ny, run)
        out = result.pointer + 4 * first * height * width
        slab.by_warps("box_x", int(slab.rows), more, out, slab.rows, columns, nx, count)
    return result


def _run_of(size: int) -> np.int32:
    return np.int32(max(LEAST_RUN, 2 * size))


def fill_uniform(
    device: Device,
    shape: Sequence[int],
    seed: int,
    stream: int,
    sample: int = 0,
    component: int = 0,
    offset: Sequence[int] = (0, 0, 0),
) -> Buffer:
    """Draw uniform noise in [0, 1), bit for bit that of `lesionsynth.ops.philox_uniform`.

    Parameters
    ----------
    device : Device
    shape : (3,) ints
        (z, y, x).
    seed, stream, sample, component : int
        Key and counter words in [0, 2**32).
    offset : (3,) ints
        Coordinate of the first voxel.

    Returns
    -------
    Buffer
        float32.
    """
    volume = _Volume(device, _three(shape))
    out = device.allocate(4 * volume.voxels)
    words = (np.uint32(word) for word in (seed, stream, sample, component, *_three(offset)))
    quads = int(volume.rows) * (volume.shape[2] // 4 + 1)
    volume.by_threads("fill_uniform", quads, out, *volume.axes, *words)
    return out


def gaussian_filter(
    device: Device,
    volume: int,
    shape: Sequence[int],
    sigmas: Sequence[float],
    truncate: float = 4.0,
    *,
    plain: bool = False,
) -> Buffer:
    """Smooth a volume, bit for bit as `lesionsynth.ops.gaussian_filter`: along x, then y, then z.

    Parameters
    ----------
    device : Device
    volume : int
        Pointer to float32.
    shape : (3,) ints
        (z, y, x).
    sigmas : (3,) floats
        Standard deviations along z, y, x in voxels; an axis with 0 is left alone.
    truncate : float
        Radius in standard deviations.
    plain : bool
        One output at a time, without shared memory: slow, for tests.

    Returns
    -------
    Buffer
        float32.

    Notes
    -----
    A copy of the weights up and a launch an axis; no wait.
    """
    box = _Volume(device, _three(shape))
    weights = [_weights_of(n, float(s), float(truncate)) for n, s in zip(box.shape, sigmas, strict=True)]
    held, places = _upload(device, [array for _, array in weights])
    source: int | Buffer = volume
    out, spare = (device.allocate(4 * box.voxels) for _ in range(2))
    for axis in (2, 1, 0):
        radius = weights[axis][0]
        if radius > 0:
            taps_and_matrix = places[axis], places[axis]  # the kernel reads the one that its lines need
            _smooth(box, axis, source, out, *taps_and_matrix, np.int32(radius), np.int32(plain))
            source, out, spare = out, spare, out
    if isinstance(source, int):
        device.copy(out.pointer, source, 4 * box.voxels)
        source = out
    del held  # the weights may go once everything that reads them is in the stream
    return source


def _smooth(box: _Volume, axis: int, source: int | Buffer, out: Buffer, *weights: Any) -> None:
    depth, height, width = box.axes
    if axis == 2:
        box.launch("gauss_rows", -(-int(box.rows) // WORD), source, out, box.rows, width, *weights)
        return
    lines = (depth, height, np.int64(width)) if axis == 1 else (np.int32(1), depth, np.int64(height) * width)
    tasks = int(lines[0]) * -(-int(lines[2]) // WORD)
    box.launch("gauss_columns", tasks, source, out, *lines, *weights)


def _weights_of(n: int, sigma: float, truncate: float) -> tuple[int, npt.NDArray[Any]]:
    """Radius, and float64 taps where the kernel is no longer than lines of `n`, else the folded matrix."""
    taps = gaussian_taps(sigma, truncate)
    radius = taps.size - 1
    return radius, taps if 2 * radius + 1 <= n else kernel_of(n, sigma, truncate)


_under_way: deque[tuple[Mark, Pinned]] = deque()
"""Page-locked memory that a device may still be copying from."""


def _upload(device: Device, arrays: Sequence[npt.NDArray[Any]]) -> tuple[Buffer, list[np.uint64]]:
    """Copy small arrays up in one go; returns what holds them and where each lies."""
    for _ in range(len(_under_way)):
        mark, pinned = _under_way.popleft()
        if not mark.done():
            _under_way.append((mark, pinned))
    ends = np.cumsum([0] + [-(-array.nbytes // 16) * 16 for array in arrays])  # the kernels read float4
    pinned = device.pinned(int(ends[-1]))
    for first, array in zip(ends, arrays, strict=False):
        pinned.array[first : first + array.nbytes] = array.view(np.uint8)
    buffer = device.allocate(int(ends[-1]))
    device.upload(buffer.pointer, pinned.pointer, int(ends[-1]))
    _under_way.append((device.mark(), pinned))
    return buffer, [np.uint64(buffer.pointer + int(first)) for first in ends[:-1]]
