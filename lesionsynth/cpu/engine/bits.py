"""Masks of one bit a voxel: a row of 512 voxels is eight words, and a run is found in a few instructions.

Bit x & 63 of word x >> 6 of a row is voxel x; bits beyond the row are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.engine.memory import output
from lesionsynth.cpu.engine.simd import nonzero_bits, ones, pointer, store_bits, trailing_zeros
from lesionsynth.cpu.engine.threads import parallel_for

ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class BitMask:
    """A (z, y, x) mask, packed."""

    bits: npt.NDArray[np.uint64]
    """(z y, words): rows in C order."""
    shape: tuple[int, int, int]
    """(z, y, x)."""


def words_of(width: int) -> int:
    """Words of a row of `width` voxels."""
    return -(-width // 64)


def pack(
    mask: npt.NDArray[Any], threads: int | None = None, counts: npt.NDArray[np.int64] | None = None
) -> BitMask:
    """Pack a mask.

    Parameters
    ----------
    mask : (z, y, x) array of bytes or bool
        Any strides; 0 is outside. Not modified.
    threads : int, optional
        See `parallel_for`.
    counts : (z y,) int64 array, optional
        Receives the number of voxels of each row.

    Returns
    -------
    BitMask
    """
    depth, height, width = mask.shape
    bits = np.empty((depth * height, words_of(width)), dtype=np.uint64)
    numbers = np.empty(len(bits), dtype=np.int64) if counts is None else counts
    base, strides = mask.ctypes.data, mask.strides
    parallel_for(
        len(bits), lambda lo, hi: _pack(base, *strides, height, width, bits, numbers, lo, hi), threads
    )
    return BitMask(bits, (depth, height, width))


@kernel
def _pack(
    base: int, dz: int, dy: int, dx: int, height: int, width: int, bits: Any, counts: Any, lo: int, hi: int
) -> None:
    scratch = np.zeros(64, dtype=np.uint8)
    whole = width // 64 if dx == 1 else 0  # words that lie in memory as a vector
    for r in range(lo, hi):
        at = base + (r // height) * dz + (r % height) * dy
        total = 0
        row = numba.carray(pointer(np.uint64(at)), 64 * whole, np.uint8)
        for w in range(whole):
            word = nonzero_bits(row, 64 * w)
            bits[r, w] = word
            total += ones(word)
        for w in range(whole, bits.shape[1]):
            scratch[:] = 0
            for k in range(min(64, width - 64 * w)):
                scratch[k] = numba.carray(pointer(np.uint64(at + (64 * w + k) * dx)), 1, np.uint8)[0]
            bits[r, w] = nonzero_bits(scratch, 0)
            total += ones(bits[r, w])
        counts[r] = total


def unpack(mask: BitMask, threads: int | None = None) -> npt.NDArray[np.bool_]:
    """Return a mask as a (z, y, x) bool array."""
    out = output(mask.shape, np.bool_)
    flat = out.view(np.uint8).reshape(-1, mask.shape[2])
    parallel_for(len(flat), lambda lo, hi: _unpack(mask.bits, flat, lo, hi), threads)
    return out


@kernel
def _unpack(bits: Any, out: Any, lo: int, hi: int) -> None:
    whole = out.shape[1] // 64
    for r in range(lo, hi):
        row = out[r]
        for w in range(whole):
            store_bits(row, 64 * w, bits[r, w])
        for x in range(64 * whole, row.size):
            row[x] = (bits[r, x >> 6] >> np.uint64(x & 63)) & np.uint64(1)


@inner
def shifted(row: Any, w: int, by: int) -> Any:
    """Word w of a row moved by `by` voxels: its bit x is the row's voxel x - by, 0 beyond the ends."""
    far, near = abs(by) >> 6, np.uint64(abs(by) & 63)
    step = 1 if by < 0 else -1
    here, next_one = w + step * far, w + step * (far + 1)
    word = row[here] if 0 <= here < row.size else np.uint64(0)
    beyond = row[next_one] if 0 <= next_one < row.size and near > 0 else np.uint64(0)
    back = np.uint64(64) - near if near > 0 else np.uint64(0)
    return (word >> near) | (beyond << back) if by < 0 else (word << near) | (beyond >> back)


@inner
def next_set(row: Any, x: int) -> int:
    """First voxel of a row at or after x that is in the mask; 64 times the words where there is none."""
    w = x >> 6
    if w >= row.size:
        return 64 * row.size
    word = row[w] & (ALL << np.uint64(x & 63))
    while word == 0:
        w += 1
        if w == row.size:
            return 64 * row.size
        word = row[w]
    return 64 * w + trailing_zeros(word)


@inner
def next_clear(row: Any, x: int) -> int:
    """First voxel of a row at or after x that is not in the mask; 64 times the words where there is none."""
    w = x >> 6
    if w >= row.size:
        return 64 * row.size
    word = ~row[w] & (ALL << np.uint64(x & 63))
    while word == 0:
        w += 1
        if w == row.size:
            return 64 * row.size
        word = ~row[w]
    return 64 * w + trailing_zeros(word)


@inner
def count_runs(row: Any) -> int:
    """Count the runs of a row: the bits that follow a 0."""
    total = 0
    before = np.uint64(0)
    for w in range(row.size):
        word = row[w]
        total += ones(word & ~((word << np.uint64(1)) | before))
        before = word >> np.uint64(63)
    return total
