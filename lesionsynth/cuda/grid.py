"""A volume's shape on a device: launches of the program ``ops`` for it, packed masks, and uploads."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.cuda.device import Buffer, Device, Mark, Pinned
from lesionsynth.cuda.programs import THREADS

Shape = tuple[int, int, int]

WORD = 32
"""Voxels of a word of a packed mask."""
WARPS = THREADS // WORD
BLOCKS = 8
"""Blocks a multiprocessor: 2048 threads, all it holds."""


@dataclass(frozen=True)
class Grid:
    """A shape on a device.

    Parameters
    ----------
    device : Device
    shape : (3,) ints
        (z, y, x).
    """

    device: Device
    shape: Shape

    @property
    def voxels(self) -> int:
        """Voxels of the volume."""
        z, y, x = self.shape
        return z * y * x

    @property
    def rows(self) -> np.int64:
        """Rows along x."""
        return np.int64(self.shape[0] * self.shape[1])

    @property
    def width(self) -> np.int32:
        """Voxels of a row."""
        return np.int32(self.shape[2])

    @property
    def words(self) -> int:
        """Words of a packed mask."""
        return int(self.rows) * -(-self.shape[2] // WORD)

    @property
    def axes(self) -> tuple[np.int32, np.int32, np.int32]:
        """Extents, as arguments of a kernel."""
        z, y, x = self.shape
        return np.int32(z), np.int32(y), np.int32(x)

    def launch(self, kernel: str, tasks: int, *arguments: Any) -> None:
        """Launch for tasks of a block each; buffers and integers of Python are passed as addresses."""
        blocks = max(1, min(tasks, BLOCKS * self.device.processors))
        values = [_address(a) if isinstance(a, int) or hasattr(a, "pointer") else a for a in arguments]
        self.device.launch("ops", "float32", kernel, blocks, *values)

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

    def unpack(self, bits: Buffer, out: int) -> None:
        """Write a packed mask as bytes 0 and 1."""
        self.by_threads("unpack_mask", -(-self.voxels // 4), bits, out, np.int64(self.voxels), self.width)

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


@dataclass(eq=False)
class _Upload:
    """Page-locked memory that a device may still be copying from."""

    pinned: Pinned
    mark: Mark | None = None
    """Behind the copy; None, for good, where the call was torn off before it could say."""


_under_way: deque[_Upload] = deque()


def upload(device: Device, arrays: Sequence[npt.NDArray[Any]]) -> tuple[Buffer, list[np.uint64]]:
    """Copy small arrays up in one go, without waiting; returns what holds them and where each lies."""
    _forget_done()
    ends = np.cumsum([0] + [-(-array.nbytes // 16) * 16 for array in arrays])  # the kernels read float4
    pinned = device.pinned(int(ends[-1]))
    for first, array in zip(ends, arrays, strict=False):
        pinned.array[first : first + array.nbytes] = array.view(np.uint8).reshape(-1)
    buffer = device.allocate(int(ends[-1]))
    under_way = _Upload(pinned)
    _under_way.append(under_way)
    device.upload(buffer.pointer, pinned.pointer, int(ends[-1]))
    under_way.mark = device.mark()
    return buffer, [np.uint64(buffer.pointer + int(first)) for first in ends[:-1]]


def _forget_done() -> None:
    for upload in list(_under_way):
        if upload.mark is not None and upload.mark.done():
            with suppress(ValueError):  # another thread came first
                _under_way.remove(upload)
