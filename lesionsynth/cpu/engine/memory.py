"""Memory that outlives a call, because the system's fresh pages cost more than the work done on them.

A page costs about a microsecond to get and 4 kB of zeros to write. Outputs come from blocks of earlier
outputs that nobody holds any more; scratch arrays stay with the calling thread. What is kept is bounded:
`MOST_BLOCKS` outputs, and `MOST_SCRATCH` bytes for each purpose; `release` gives all of it back.

A block is free again when the last view of its array goes, and not before: so what a call that was torn off
left to a traceback, or a handler of a signal finds in use, is nobody else's. No Python runs then, no lock is
taken, and every step leaves all as it must be: a handler may raise at any point.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections import deque
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


class _Lease(weakref.ref[Any]):
    """Watches who holds a block."""

    block: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
    """None yet, until it is put there: a call may be torn off before."""


_blocks: deque[_Lease] = deque(maxlen=MOST_BLOCKS)
"""Free ones; the latest comes last, and the earliest makes way."""
_local = threading.local()


def output(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Return an uninitialised C-contiguous array, aligned to `ALIGNMENT`, that the caller may give away."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if size < LEAST_BLOCK:
        return np.empty(shape, dtype=kind)
    return _leased(_take(size), size, _blocks).view(kind).reshape(shape)


def scratch(purpose: str, size: int, dtype: Any) -> npt.NDArray[Any]:
    """Return an uninitialised (size,) array, the caller's as long as a view of it is held.

    The memory is that of the last array for `purpose` on this thread, where nobody holds it any more. It is
    aligned to `ALIGNMENT`: a vector that lies across two cache lines takes twice as long to load.
    """
    kind = np.dtype(dtype)
    nbytes = size * kind.itemsize
    needed = nbytes + ALIGNMENT
    if needed > MOST_SCRATCH:
        return _aligned(np.empty(needed, dtype=np.uint8))[:nbytes].view(kind)
    kept: dict[str, deque[_Lease]] = _local.__dict__
    free = kept.get(purpose)
    if free is None:
        free = kept[purpose] = deque(maxlen=1)
    try:
        block = free.pop().block
    except IndexError:  # the first time; or somebody holds it
        block = np.empty(0, dtype=np.uint8)
    if block.size < needed:
        block = np.empty(min(needed * 5 // 4, MOST_SCRATCH), dtype=np.uint8)
    return _leased(block, nbytes, free).view(kind)


def _leased(block: npt.NDArray[np.uint8], size: int, free: deque[_Lease]) -> npt.NDArray[np.uint8]:
    """Return `size` bytes of a block, which is in `free` again when nobody holds a view of them."""
    # Every view of the array holds this object, and it dies with the last. A view of `block` would not do:
    # NumPy shortens chains of arrays, and views would hold `block` itself.
    kind: Any = ctypes.c_char * block.size  # a type for each size of blocks, which are few
    holder = kind.from_buffer(block)
    lease = _Lease(holder, free.append)
    lease.block = block
    holder.lease = lease  # a reference that has gone watches nothing
    return _aligned(np.frombuffer(holder, dtype=np.uint8))[:size]


def _aligned(block: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return block[-block.ctypes.data % ALIGNMENT :]


def release() -> None:
    """Give back the memory that is kept for later calls.

    Results come from the memory of earlier results that nobody holds any more, and scratch arrays stay with
    the thread that used them: at most three results of the sizes used last, and 64 MiB for each purpose. This
    returns the free ones, and the scratch arrays of the calling thread, to the system.
    """
    _blocks.clear()
    _local.__dict__.clear()


def _take(size: int) -> npt.NDArray[np.uint8]:
    """Return a block of at least `size` bytes and a cache line, and of at most half as much again."""
    needed = size + ALIGNMENT
    for k in range(1, MOST_BLOCKS + 1):
        try:
            lease = _blocks[-k]
            if needed <= lease.block.size <= needed + needed // 2:
                _blocks.remove(lease)
                return lease.block
        except (IndexError, ValueError):  # there are fewer, or another thread came first
            continue
    return np.empty(needed, dtype=np.uint8)
