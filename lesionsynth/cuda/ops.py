"""Building blocks of `lesionsynth.ops` on a device, for C-contiguous (z, y, x) volumes by their addresses.

Every function launches on the caller's stream and returns buffers; none waits, except where it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lesionsynth.cpu.lines import gaussian_taps, kernel_of
from lesionsynth.cuda._device import Buffer, Bytes, Device, Mark, Pinned

Shape = tuple[int, int, int]

MOST_VOXELS = 2**31
"""Labels index voxels by int32."""
CHUNK_WORDS = 4096
"""As in kernels/label.cu."""
STEPS_AT_ONCE = 32
"""Steps of growing between two looks at whether anything still changes."""
BLOCKS = 8
"""Blocks a multiprocessor."""


class Launcher:
    """Launches kernels of the program ``ops`` on volumes of one shape."""

    def __init__(self, device: Device, shape: Shape) -> None:
        self.device, self.shape = device, shape
        self.extents = tuple(np.int32(n) for n in shape)
        self.voxels = int(np.prod(shape, dtype=np.int64))
        self.words = shape[0] * shape[1] * -(-shape[2] // 32)

    def __call__(self, kernel: str, *arguments: Any) -> None:
        """Launch; ``...`` stands for the three extents, buffers for their addresses."""
        values: list[Any] = []
        for argument in arguments:
            if argument is ...:
                values += self.extents
            else:
                values.append(np.uint64(argument.pointer) if hasattr(argument, "pointer") else argument)
        self.device.launch("ops", "float32", kernel, self.device.processors * BLOCKS, *values)

    def bits(self, mask: np.uint64) -> Buffer:
        """Pack a mask of bytes."""
        bits = self.device.allocate(4 * self.words)
        self("pack_bits", mask, ..., bits)
        return bits


def fill_uniform(device: Device, shape: Shape, words: Sequence[int], offset: Sequence[int], out: int) -> None:
    """Fill a float32 volume with the uniforms of its voxels; `words` are seed, stream, sample, component."""
    Launcher(device, shape)("fill_uniform", np.uint64(out), ..., *(np.uint32(w) for w in (*words, *offset)))


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
    """Smooth a float32 volume along x, then y, then z, as `lesionsynth.cpu.filters.gaussian_filter`."""
    launch = Launcher(device, shape)
    axes = [axis for axis in (2, 1, 0) if int(truncate * float(sigmas[axis]) + 0.5) > 0]
    if not axes:
        device.copy(out, source, 4 * launch.voxels)
        return
    scratch = device.allocate(4 * launch.voxels if len(axes) > 1 else 4)
    at: Any = np.uint64(source)
    for k, axis in enumerate(axes):
        last = (len(axes) - 1 - k) % 2 == 0  # back and forth, so that the last pass writes `out`
        to: Any = np.uint64(out) if last else scratch
        weights = _weights(device, shape[axis], float(sigmas[axis]), truncate)
        launch("gaussian_lines", at, to, ..., np.int32(axis), *weights, np.int32(plain))
        at = to


def uniform_filter(device: Device, source: int, kind: str, shape: Shape, sizes: Shape, out: int) -> None:
    """Average a volume of ``uint8``, ``float32`` or ``float64`` over a box into a float32 one."""
    launch = Launcher(device, shape)
    sums = [device.allocate(8 * launch.voxels) for _ in range(2)]
    none, count = np.uint64(0), np.float64(float(sizes[0]) * sizes[1] * sizes[2])
    name = {"uint8": "byte", "float32": "float", "float64": "double"}[kind]
    (z, y, x), axes = (np.int32(n) for n in sizes), [np.int32(axis) for axis in range(3)]
    launch(f"window_sums_{name}", np.uint64(source), sums[0], none, ..., axes[0], z, count)
    launch("window_sums_double", sums[0], sums[1], none, ..., axes[1], y, count)
    launch("window_sums_double", sums[1], none, np.uint64(out), ..., axes[2], x, count)


def label(
    device: Device, mask: int, shape: Shape, connectivity: int, out: int, *, plain: bool = False
) -> int:
    """Label the voxels of a mask of bytes that are not 0, into an int32 volume; waits, to return how many."""
    launch = Launcher(device, shape)
    bits = launch.bits(np.uint64(mask))
    parents, total = components(launch, bits, connectivity, np.uint64(mask) if plain else None)
    launch("write_labels", bits, ..., parents, np.uint64(out))
    return int(device.download(total.pointer, 4).view(np.uint32)[0])  # the one wait: a number for the caller


def components(
    launch: Launcher, bits: Buffer, connectivity: int, plain: np.uint64 | None = None
) -> tuple[Buffer, Buffer]:
    """Find and number the components of a volume of bits in C order.

    Parameters
    ----------
    launch : Launcher
        For the volume's shape.
    bits : Buffer
        Rows of words.
    connectivity : {6, 18, 26}
        Neighbourhood.
    plain : int, optional
        The same as bytes, to unite voxel by voxel.

    Returns
    -------
    parents : Buffer
        For ``number_at`` of kernels/label.cu.
    total : Buffer
        How many, uint32.

    Raises
    ------
    ValueError
        The volume has 2**31 voxels or more.
    """
    if launch.voxels >= MOST_VOXELS:
        raise ValueError(f"input must have fewer than 2**31 voxels to be labelled, got shape {launch.shape}")
    chunks = -(-launch.words // CHUNK_WORDS)
    device = launch.device
    parents, counts, total = (device.allocate(4 * n) for n in (launch.voxels, chunks, 1))
    launch("begin_runs", bits, ..., np.int32(plain is not None), parents)
    if plain is None:
        launch("join_runs", bits, ..., np.int32(connectivity), parents)
    else:
        launch("join_voxels", plain, ..., np.int32(connectivity), parents)
    launch("flatten_runs", bits, ..., parents, counts)
    device.launch(
        "ops",
        "float32",
        "number_chunks",
        1,
        np.uint64(counts.pointer),
        np.int32(chunks),
        np.uint64(total.pointer),
    )
    launch("number_roots", bits, ..., counts, parents)
    return parents, total


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
    """Grow a region of bytes inside another, as `lesionsynth.cpu.grow.grow`.

    Waits once for every `STEPS_AT_ONCE` steps, to learn whether the region still changes.
    """
    launch = Launcher(device, shape)
    if plain:
        size, kernel = launch.voxels, "grow_voxels"
        inside: Any = np.uint64(room)
        now = device.allocate(size)
        device.copy(now.pointer, region, size)
    else:
        size, kernel = 4 * launch.words, "grow_step"
        inside, now = launch.bits(np.uint64(room)), launch.bits(np.uint64(region))
    then = device.allocate(size)
    flags = device.pinned(4 * STEPS_AT_ONCE)
    left = iterations if iterations >= 1 else None
    while left is None or left > 0:
        steps = STEPS_AT_ONCE if left is None else min(left, STEPS_AT_ONCE)
        words = flags.array.view(np.uint32)
        words[:] = 0
        for step in range(steps):
            launch(kernel, now, inside, ..., np.int32(connectivity), np.int32(step), flags, then)
            now, then = then, now
        left = None if left is None else left - steps
        device.mark().wait()
        if not words[:steps].all():
            break
    if plain:
        device.copy(out, now.pointer, size)
    else:
        launch("unpack_bits", now, ..., np.uint64(out))


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
    """Take erroneous edges out of a mask of bytes and a float32 or float64 image.

    Parameters and errors as for `lesionsynth.cpu.edges.remove_edges`; waits, to know about the errors.
    """
    launch = Launcher(device, shape)
    name = "float" if kind == "float32" else "double"
    lungs = launch.bits(np.uint64(mask))
    bright, rows, shell = (device.allocate(4 * launch.words) for _ in range(3))
    status = device.pinned(8)
    status.array.view(np.uint32)[:] = 1, 0
    level = np.float64(threshold)
    launch(f"threshold_{name}", np.uint64(image), lungs, ..., level, bright, status)
    reach = np.int32(min(shell_width, max(shape[1:])))  # further than that everything is near the outside
    launch("erode_along_x", lungs, ..., reach, rows)
    launch("shell_of", lungs, rows, ..., reach, shell)
    parents, total = components(launch, bright, connectivity)
    count = int(device.download(total.pointer, 4).view(np.uint32)[0])  # waits: errors, and a size
    empty, outside = status.array.view(np.uint32).tolist()
    if empty:
        raise ValueError(f"lung_mask must have at least one voxel, got none in shape {shape}")
    if outside:
        raise ValueError("image must lie in [0, 1] inside lung_mask, got a voxel that does not")
    sizes, contacts = (device.allocate(4 * (count + 1)) for _ in range(2))
    for counts in (sizes, contacts):
        launch("clear_words", counts, np.int64(count + 1))
    launch("measure_runs", bright, shell, ..., parents, sizes, contacts)
    launch(
        f"keep_{name}", np.uint64(image), lungs, bright, ..., parents, sizes, contacts,
        np.float64(contact_fraction), np.uint64(out), np.uint64(out_mask),
    )  # fmt: skip


def _weights(device: Device, n: int, sigma: float, truncate: float) -> tuple[np.uint64, np.uint64, np.int32]:
    """Send up the taps, and the folded matrix where the kernel is longer than lines of `n` voxels."""
    taps = gaussian_taps(sigma, truncate)
    radius = len(taps) - 1
    matrix = kernel_of(n, sigma, truncate) if 2 * radius + 1 > n else np.zeros(4, dtype=np.float32)
    padded = np.zeros(-(-len(taps) // 2) * 2)  # the matrix is read sixteen bytes at a time
    padded[: len(taps)] = taps
    raw = np.concatenate([matrix.view(np.uint8), padded.view(np.uint8)])
    held = _send(device, raw)
    return np.uint64(held.pointer + matrix.nbytes), np.uint64(held.pointer), np.int32(radius)


_sent: list[tuple[Mark, Pinned, Buffer]] = []
"""Uploads under way: their memory must not be reused before the device has read it."""


def _send(device: Device, raw: Bytes) -> Buffer:
    """Copy bytes up without waiting."""
    _sent[:] = [sent for sent in _sent if not sent[0].done()]
    pinned, buffer = device.pinned(raw.size), device.allocate(raw.size)
    pinned.array[: raw.size] = raw
    device.upload(buffer.pointer, pinned.pointer, raw.size)
    _sent.append((device.mark(), pinned, buffer))
    return buffer
