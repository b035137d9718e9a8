"""`lesionsynth.cuda.device.Device` on the host: NumPy memory, and kernels behind the shim."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from lesionsynth.cuda.programs import THREADS, source
from tests.cuda_host.shim import HostProgram

ALIGNMENT = 16
"""Of device memory: CUDA's is 256, the kernels ask for this much."""


class HostBuffer:
    """Memory filled with a byte: 0xFF is NaN to floats, so that what nobody wrote shows."""

    def __init__(self, nbytes: int, fill: int) -> None:
        # Ends where the block does, as nearly as its alignment allows: AddressSanitizer sees the end.
        block = np.full(nbytes + ALIGNMENT, fill, dtype=np.uint8)
        skip = (block.ctypes.data + ALIGNMENT) // ALIGNMENT * ALIGNMENT - block.ctypes.data
        self.array = block[skip : skip + nbytes]
        self.pointer = self.array.ctypes.data
        self.nbytes = nbytes


class HostMark:
    """Everything has happened when a call returns."""

    def __init__(self, device: HostDevice) -> None:
        self.device = device

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        self.device.waits += 1


class HostDevice:
    """Runs kernels as they are launched.

    Parameters
    ----------
    processors : int
        Multiprocessors: grids are a few times this.
    sanitize : bool
        See `HostProgram`.
    options
        Of `HostProgram.launch`: order, yield_percent, seed.
    """

    def __init__(self, *, processors: int = 1, sanitize: bool = False, **options: Any) -> None:
        self.processors, self.sanitize, self.options = processors, sanitize, options
        self.launches: list[str] = []
        self.allocations = self.uploads = self.downloads = self.waits = 0

    def allocate(self, nbytes: int) -> HostBuffer:
        self.allocations += 1
        return HostBuffer(nbytes, 0xFF)

    def pinned(self, nbytes: int) -> HostBuffer:
        self.allocations += 1
        return HostBuffer(nbytes, 0)

    def upload(self, pointer: int, source: int, nbytes: int) -> None:
        self.uploads += 1
        ctypes.memmove(pointer, source, nbytes)

    def copy(self, pointer: int, source: int, nbytes: int) -> None:
        ctypes.memmove(pointer, source, nbytes)

    def download(self, pointer: int, nbytes: int) -> np.ndarray:
        self.downloads += 1
        return np.frombuffer(ctypes.string_at(pointer, nbytes), dtype=np.uint8).copy()

    def mark(self) -> HostMark:
        return HostMark(self)

    def finish(self) -> None:
        pass

    def follow(self, mark: Any) -> None:
        pass

    @contextmanager
    def beside(self) -> Iterator[None]:
        yield

    def join(self) -> None:
        pass

    def replay(self, key: Any, launches: Callable[[], None]) -> None:
        launches()

    def launch(self, program: str, image: str, kernel: str, grid: int, *arguments: Any) -> None:
        self.launches.append(kernel)
        _program(program, image, self.sanitize).launch(kernel, grid, THREADS, arguments, **self.options)


@cache
def _program(program: str, image: str, sanitize: bool) -> HostProgram:
    return HostProgram(source(program, image), sanitize=sanitize)
