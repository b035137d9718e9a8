"""Rows of a volume of any strides, by address.

Numba compiles a kernel anew for each memory layout, and for arrays that may not be written. An address and
three strides are the same for all of them.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from lesionsynth.cpu.engine.jit import maker
from lesionsynth.cpu.engine.simd import pointer


@maker
def row_of(base: int, dz: int, dy: int, dx: int, height: int, row: int, scratch: Any) -> Any:
    """Row of a strided volume at an address: a view where it is contiguous, else copied to `scratch`."""
    at = base + (row // height) * dz + (row % height) * dy
    if dx == scratch.itemsize:
        return numba.carray(pointer(np.uint64(at)), scratch.size, scratch.dtype)
    for x in range(scratch.size):
        scratch[x] = numba.carray(pointer(np.uint64(at + x * dx)), 1, scratch.dtype)[0]
    return scratch
