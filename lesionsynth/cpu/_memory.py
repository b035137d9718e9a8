"""Memory that outlives a call, because the system's fresh pages cost more than the work done on them.

A page costs about a microsecond to get and 4 kB of zeros to write. Outputs come from blocks of earlier
outputs that nobody holds any more; scratch arrays stay with the calling thread. What is kept is bounded:
`MOST_BLOCKS` outputs, and `MOST_SCRATCH` bytes for each purpose; `release` gives all of it back.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_BLOCKS = 3
"""Free blocks kept: image, target and labels of one pair."""
LEAST_BLOCK = 2**20
"""Bytes: smaller outputs are left to NumPy."""
MOST_SCRATCH = 2**26
"""Bytes kept for one purpose: two volumes of 32 x 512 x 512 in float32. A larger array lives as long as its
caller."""
ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector."""

_blocks: list[npt.NDArray[np.uint8]] = []
_lock = threading.Lock()
_local = threading.local()


def output(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Return an uninitialised C-contiguous array, aligned to `ALIGNMENT`, that the caller may give away."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if size < LEAST_BLOCK:
        return np.empty(shape, dtype=kind)
    block = _take(size)
    # Every view of the array holds this object, and it dies with the last. A view of `block` would not do:
    # NumPy shortens chains of arrays, and views would hold `block` itself.
    lease = (ctypes.c_char * size).from_buffer(_aligned(block))
    weakref.finalize(lease, _give_back, block).atexit = False
    return np.frombuffer(lease, dtype=kind).reshape(shape)


def scratch(purpose: str, size: int, dtype: Any) -> npt.NDArray[Any]:
    """Return an uninitialised (size,) array, the caller's until its thread asks for `purpose` again.

    It is aligned to `ALIGNMENT`: a vector that lies across two cache lines takes twice as long to load.
    """
    kind = np.dtype(dtype)
    needed = size * kind.itemsize + ALIGNMENT
    if needed > MOST_SCRATCH:
        return _aligned(np.empty(needed, dtype=np.uint8))[: size * kind.itemsize].view(kind)
    kept: dict[str, npt.NDArray[np.uint8]] = _local.__dict__
    held = kept.get(purpose)
    if held is None or held.size < needed:
        held = kept[purpose] = np.empty(min(needed * 5 // 4, MOST_SCRATCH), dtype=np.uint8)
    return _aligned(held)[: size * kind.itemsize].view(kind)


def _aligned(block: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return block[-block.ctypes.data % ALIGNMENT :]


def release() -> None:
    """Give back the memory that is kept for later calls.

    Results come from the memory of earlier results that nobody holds any more, and scratch arrays stay with
    the thread that used them: at most three results of the sizes used last, and 64 MiB for each purpose. This
    returns the free ones, and the scratch arrays of the calling thread, to the system.
    """
    with _lock:
        _blocks.clear()
    _local.__dict__.clear()


def _take(size: int) -> npt.NDArray[np.uint8]:
    """Return a block of at least `size` bytes and a cache line, and of at most half as much again."""
    needed = size + ALIGNMENT
    with _lock:
        for k, block in enumerate(_blocks):
            if needed <= block.size <= needed + needed // 2:
                return _blocks.pop(k)
    return np.empty(needed, dtype=np.uint8)


def _give_back(block: npt.NDArray[np.uint8]) -> None:
    # May run at any point of any thread, one that holds the lock too: then the block goes to the system.
    if _lock.acquire(blocking=False):
        try:
            _blocks.insert(0, block)
            del _blocks[MOST_BLOCKS:]
        finally:
            _lock.release()


def _forget_lock() -> None:
    """Another thread may have held the lock when this process was forked."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)
