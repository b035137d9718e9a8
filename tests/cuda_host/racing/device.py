"""`HostDevice` with blocks that run at once, in programs that ThreadSanitizer watches."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lesionsynth.cuda.programs import THREADS, kernels_of, source
from tests.cuda_host import shim
from tests.cuda_host.device import HostDevice
from tests.cuda_host.racing.environment import is_watched
from tests.cuda_host.shim import FLAGS, HostProgram, ShimError

HERE = Path(__file__).parent
WATCHED = ("-fsanitize=thread", "--param=tsan-distinguish-volatile=1")
TICKET = "*last = atomicAdd(ticket, 1u) == blocks - 1u;"
"""Of ``is_last_block`` in prelude.cuh, between two fences: ThreadSanitizer knows no fences."""

PLANTS = {
    # A row of a margin may be read before another warp has written it.
    "barrier": (
        "reflect_rows(tile, first, margin, rows, n);\n    __syncthreads();",
        "reflect_rows(tile, first, margin, rows, n);",
    ),
    # The last block knows that it is, but not what the others have written.
    "ticket": ("racing::ticket(ticket, 1u)", "atomicAdd(ticket, 1u)"),
    # Steps along a row may be read before another warp has written them.
    "steps": (
        "reach_x);\n    __syncthreads();",
        "reach_x);",
    ),
    # Another thread may move `high` between the two.
    "union": (
        "int old = atomicMin(&parent[high], low);",
        "int old = parent[high];\n        if (low < old) parent[high] = low;",
    ),
}
"""Races by name: a text of the kernels, and what takes its place."""


def raced(text: str, plant: str | None = None) -> str:
    """Return a program as ThreadSanitizer is to see it, on demand with a race of `PLANTS` in it."""
    text = _replaced(text, TICKET, TICKET.replace("atomicAdd", "racing::ticket"))
    return text if plant is None else _replaced(text, *PLANTS[plant])


def _replaced(text: str, old: str, new: str) -> str:
    assert old in text, f"the kernels no longer say {old!r}"
    return text.replace(old, new)


class RacingProgram(HostProgram):
    """A program compiled for the host and for ThreadSanitizer.

    Parameters
    ----------
    text : str
        See `HostProgram`, and `raced`.

    Raises
    ------
    ShimError
        The text does not compile, or the process was not started in `racing_environment`.
    """

    def __init__(self, text: str) -> None:
        if not is_watched():
            raise ShimError("ThreadSanitizer must be loaded before Python: see racing_environment")
        _load_runtime()
        self.kernels = kernels_of(text)
        exports = "\n".join(f"SHIM_EXPORT({name})" for name in self.kernels)
        code = f'{_header()}#line 1 "program.cu"\n{text}\n{exports}\n'
        self._library = ctypes.CDLL(str(shim.compiled(code, [*_flags(), *WATCHED])))
        self._sizes = {name: self._parameter_sizes(name) for name in self.kernels}

    def launch(
        self,
        kernel: str,
        grid: int | tuple[int, ...],
        block: int,
        arguments: Sequence[Any],
        *,
        workers: int = 2,
        yield_percent: int = 0,
        seed: int = 1,
    ) -> None:
        """Run a kernel.

        Parameters
        ----------
        kernel, grid, block, arguments
            Of `HostProgram.launch`.
        workers : int
            Blocks that run at once.
        yield_percent : int
            Chance that a thread gives way before and after an atomic, in a fence and in a volatile access.
        seed : int
            Of the order of blocks and threads, and of the yields.

        Raises
        ------
        ShimError
            A deadlock or the like; it names the kernel.
        """
        pointers, blocks, function, _values = self.prepared(f"{kernel}__race", kernel, grid, arguments)
        function.argtypes = [
            *(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p),
            *(ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint),
        ]
        error = function(blocks, block, pointers, seed, workers, yield_percent)
        if error:
            raise ShimError(f"{kernel}: {error.decode()}")


class RacingDevice(HostDevice):
    """Runs every launch in another order.

    Parameters
    ----------
    processors : int
        See `HostDevice`.
    workers, yield_percent, seed : int
        See `RacingProgram.launch`.
    plant : str, optional
        A race of `PLANTS`.
    """

    def __init__(
        self,
        *,
        processors: int = 1,
        workers: int = 2,
        yield_percent: int = 0,
        seed: int = 1,
        plant: str | None = None,
    ) -> None:
        super().__init__(processors=processors, workers=workers, yield_percent=yield_percent)
        self.seed, self.plant = seed, plant

    def launch(self, program: str, image: str, kernel: str, grid: int, *arguments: Any) -> None:
        seed = self.seed + len(self.launches)
        self.launches.append(kernel)
        _program(program, image, self.plant).launch(
            kernel, grid, THREADS, arguments, seed=seed, **self.options
        )


@cache
def _program(program: str, image: str, plant: str | None) -> RacingProgram:
    return RacingProgram(raced(source(program, image), plant))


@cache
def _load_runtime() -> None:
    """Load what runs the blocks, where every program finds it."""
    code = f'{_header()}#line 1 "runtime.cpp"\n{(HERE / "runtime.cpp").read_text(encoding="utf-8")}'
    ctypes.CDLL(str(shim.compiled(code, _flags())), mode=ctypes.RTLD_GLOBAL)


def _header() -> str:
    """Text of racing.h: `shim.compiled` looks for changes in a program's text."""
    return f'#line 1 "racing.h"\n{(HERE / "racing.h").read_text(encoding="utf-8")}'


def _flags() -> list[str]:
    return [*FLAGS, *shim.instructions(), f"-I{shim.HERE}"]
