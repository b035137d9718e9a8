"""What the launches need of a GPU: memory, one way up, order, and kernels by name.

`lesionsynth.cuda.cupy_device` is the real one. The tests put the kernels' own source behind the same methods
on the host (tests/cuda_host), so everything above this module runs wherever there is a C++ compiler.
"""

from __future__ import annotations

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
