"""What the launches need of a GPU: memory, one way up, order, and kernels by name.

`lesionsynth.cuda.cupy_device` is the real one. The tests put the kernels' own source behind the same methods
on the host (tests/cuda_host), so everything above this module runs wherever there is a C++ compiler.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Buffer(Protocol):
    """Memory of a device, free again when the object goes."""

    @property
    def pointer(self) -> int:
        """Address."""

    @property
    def nbytes(self) -> int:
        """Size."""


class Pinned(Protocol):
    """Memory of the host that a device copies from, and may write to, while the host goes on."""

    @property
    def pointer(self) -> int:
        """Address, for host and device."""

    @property
    def array(self) -> Bytes:
        """The same memory."""


class Mark(Protocol):
    """A point in the order of a stream."""

    def done(self) -> bool:
        """Whether the device has passed it; does not wait."""

    def wait(self) -> None:
        """Hold the host until then."""


class Device(Protocol):
    """A GPU and the stream that its caller works on."""

    @property
    def processors(self) -> int:
        """Multiprocessors: grids are a few times this, and blocks take tasks until none is left."""

    def allocate(self, nbytes: int) -> Buffer:
        """Take uninitialised memory; in steady state from a pool, not from the driver."""

    def pinned(self, nbytes: int) -> Pinned:
        """Take page-locked memory, zeroed."""

    def upload(self, pointer: int, source: int, nbytes: int) -> None:
        """Copy up in the order of the caller's stream, without waiting."""

    def copy(self, pointer: int, source: int, nbytes: int) -> None:
        """Copy on the device in the order of the caller's stream, without waiting."""

    def download(self, pointer: int, nbytes: int) -> Bytes:
        """Wait for the caller's stream and copy down."""

    def mark(self) -> Mark:
        """Remember how far the caller's stream has come."""

    def follow(self, mark: Mark) -> None:
        """Let the caller's stream go on only after a mark, perhaps of another stream; does not wait."""

    def finish(self) -> None:
        """Hold the host until the device has done all that was launched, on whichever stream."""

    def beside(self) -> AbstractContextManager[None]:
        """Launch within beside what the caller's stream does from here on, until `join`."""

    def join(self) -> None:
        """Let the caller's stream go on only after what was launched beside it."""

    def replay(self, key: Any, launches: Callable[[], None]) -> None:
        """Do `launches`, as a graph captured when `key` was new; they may depend on nothing else."""

    def launch(self, program: str, image: str, kernel: str, grid: int, *arguments: Any) -> None:
        """Launch a kernel on `grid` blocks; arguments are NumPy scalars, pointers ``np.uint64``."""


class Turns:
    """Who launches on a device: one call at a time, in ``with turns.lock``, from `begin` to `end`."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.lock = threading.Lock()
        self._torn = False  # whether a call was, between `begin` and `end`
        self._kept: list[tuple[Mark | None, Buffer]] = []

    def begin(self) -> None:
        """Begin to use the device, with the lock held.

        A turn that was left by an exception, Ctrl-C or another, may have launched what no mark stands
        behind, so the next one first lets the device finish.
        """
        if self._torn:
            self.device.finish()
            self._kept.clear()
        self._torn = True

    def end(self) -> None:
        """Say that all that was launched has a mark behind it."""
        self._torn = False

    def keep(self, buffer: Buffer) -> None:
        """Hold a buffer until the device has passed this turn's `mark`, whatever stream uses it last.

        Freed memory goes to the stream that it was allocated on, which waits for no other.
        """
        self._kept.append((None, buffer))

    def mark(self) -> Mark:
        """Mark the end of what this turn launches."""
        mark = self.device.mark()
        self._kept = [(to or mark, buffer) for to, buffer in self._kept if to is None or not to.done()]
        return mark

    def drop(self) -> None:
        """Wait for all that buffers are held for, and let go of them."""
        for mark, _ in self._kept:
            if mark is not None:
                mark.wait()
        self._kept.clear()
