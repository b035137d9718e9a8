"""Erroneous edges on the CPU (PAPER.md III-B): bright components of which most lies in the shell of the mask.

The image is read once and written once; everything between works on bits and on runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.bits import BitMask, pack, unpack
from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.engine.memory import output
from lesionsynth.cpu.engine.rows import row_of
from lesionsynth.cpu.engine.simd import bits_at_least, load, ones, outside, splat, store, where
from lesionsynth.cpu.engine.threads import parallel_for, team_for
from lesionsynth.cpu.label import number_runs, runs_of
from lesionsynth.cpu.shell import shell_of


def remove_edges(
    image: npt.NDArray[Any],
    mask: npt.NDArray[np.bool_],
    level: Any,
    contact_fraction: float,
    shell_width: int,
    connectivity: int,
    threads: int | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Take erroneous edges out of a mask and an image.

    Parameters
    ----------
    image : (z, y, x) float32 or float64 array
        H', of any strides.
    mask : (z, y, x) bool array
        M', of any strides.
    level : float of the dtype of `image`
        Brightness from which a voxel counts.
    contact_fraction, shell_width, connectivity
        See `lesionsynth.remove_erroneous_edges`.
    threads : int, optional
        See `parallel_for`.

    Returns
    -------
    image : (z, y, x) array
        H.
    mask : (z, y, x) bool array
        M.

    Raises
    ------
    ValueError
        The mask is empty, or a voxel inside it is NaN or outside [0, 1].
    """
    threads = team_for(mask.size, threads)
    lungs = pack(mask, threads)
    if not lungs.bits.any():
        raise ValueError(f"lung_mask must have at least one voxel, got none in shape {mask.shape}")
    runs = runs_of(_bright(image, lungs, level, threads), threads)
    number, count = number_runs(runs, connectivity, threads)
    shell = shell_of(lungs, shell_width, threads)
    size, contact = (np.zeros(count + 1, dtype=np.int64) for _ in range(2))
    _measure(runs.first, runs.start, runs.stop, number, shell.bits, size, contact)
    erroneous = contact > contact_fraction * size
    _clear(runs.first, runs.start, runs.stop, number, erroneous, lungs.bits)
    return _inside(image, lungs, threads), unpack(lungs, threads)


def _bright(image: npt.NDArray[Any], lungs: BitMask, level: Any, threads: int | None) -> BitMask:
    """Voxels of the mask at or above the level."""
    depth, height, width = image.shape
    bits = np.empty_like(lungs.bits)
    sane = np.ones(depth * height, dtype=np.bool_)
    where, like = (image.ctypes.data, *image.strides, height), np.empty(width, dtype=image.dtype)
    parallel_for(
        len(bits),
        lambda lo, hi: _threshold_rows(*where, like, lungs.bits, level, bits, sane, lo, hi),
        threads,
    )
    if not sane.all():
        tissue = image[unpack(lungs, threads)]
        raise ValueError(
            f"image must lie in [0, 1] inside lung_mask, got values from {tissue.min()} to {tissue.max()}"
        )
    return BitMask(bits, lungs.shape)


def _inside(image: npt.NDArray[Any], lungs: BitMask, threads: int | None) -> npt.NDArray[Any]:
    """Return the image, 0 outside the mask."""
    depth, height, width = image.shape
    out = output(image.shape, image.dtype)
    lines = out.reshape(-1, width)
    where = image.ctypes.data, *image.strides, height
    parallel_for(depth * height, lambda lo, hi: _keep_rows(*where, lungs.bits, lines, lo, hi), threads)
    return out


@kernel
def _threshold_rows(
    base: int, dz: int, dy: int, dx: int, height: int, like: Any, lungs: Any, level: Any, bits: Any,
    sane: Any, lo: int, hi: int,
) -> None:  # fmt: skip
    scratch = np.empty_like(like)
    lanes = np.int64(64 // scratch.itemsize)  # of a vector of 64 bytes
    number = scratch.dtype.type
    levels, zeros, units = splat(level), splat(number(0.0)), splat(number(1.0))
    for r in range(lo, hi):
        row = row_of(base, dz, dy, dx, height, r, scratch)
        strange = np.uint64(0)
        for w in range(bits.shape[1]):
            lung, bright = lungs[r, w], np.uint64(0)
            if lung == 0:
                bits[r, w] = lung
                continue
            if 64 * w + 64 <= row.size:
                for k in range(0, 64, lanes):
                    values = load(row, 64 * w + k)
                    bright |= bits_at_least(values, levels) << np.uint64(k)
                    strange |= (outside(values, zeros, units) << np.uint64(k)) & lung
            else:
                for x in range(64 * w, row.size):
                    bit = np.uint64(x - 64 * w)
                    bright |= np.uint64(row[x] >= level) << bit
                    strange |= (np.uint64(not ((row[x] >= 0) & (row[x] <= 1))) << bit) & lung
            bits[r, w] = bright & lung
        sane[r] = strange == 0


@kernel
def _keep_rows(
    base: int, dz: int, dy: int, dx: int, height: int, lungs: Any, lines: Any, lo: int, hi: int
) -> None:
    scratch = np.empty_like(lines[0])
    lanes = np.int64(64 // scratch.itemsize)  # of a vector of 64 bytes
    zeros = splat(scratch.dtype.type(0))
    for r in range(lo, hi):
        out = lines[r]
        empty = True
        for w in range(lungs.shape[1]):
            empty &= lungs[r, w] == 0
        if empty:
            out[:] = 0
            continue
        row = row_of(base, dz, dy, dx, height, r, scratch)
        for w in range(lungs.shape[1]):
            lung = lungs[r, w]
            if 64 * w + 64 <= row.size:
                for k in range(0, 64, lanes):
                    values = load(row, 64 * w + k)
                    store(out, 64 * w + k, where(lung >> np.uint64(k), values, zeros))
            else:
                for x in range(64 * w, row.size):
                    out[x] = row[x] if (lung >> np.uint64(x - 64 * w)) & np.uint64(1) else 0


@kernel
def _measure(first: Any, start: Any, stop: Any, number: Any, shell: Any, size: Any, contact: Any) -> None:
    """Count the voxels of each component, and those in the shell."""
    for row in range(shell.shape[0]):
        for k in range(first[row], first[row + 1]):
            size[number[k]] += stop[k] - start[k]
            for w in range(start[k] >> 6, ((stop[k] - 1) >> 6) + 1):
                contact[number[k]] += ones(shell[row, w] & _between(start[k] - 64 * w, stop[k] - 64 * w))


@kernel
def _clear(first: Any, start: Any, stop: Any, number: Any, erroneous: Any, bits: Any) -> None:
    """Take the runs of erroneous components out of the mask."""
    for row in range(bits.shape[0]):
        for k in range(first[row], first[row + 1]):
            if erroneous[number[k]]:
                for w in range(start[k] >> 6, ((stop[k] - 1) >> 6) + 1):
                    bits[row, w] &= ~_between(start[k] - 64 * w, stop[k] - 64 * w)


@inner
def _between(low: int, high: int) -> Any:
    """Bits max(low, 0) ... min(high, 64) - 1 of a word."""
    all_ones = np.uint64(0xFFFFFFFFFFFFFFFF)
    above = all_ones << np.uint64(max(low, 0)) if low < 64 else np.uint64(0)
    below = all_ones >> np.uint64(64 - high) if high < 64 else all_ones
    return above & below
