"""Scratch arrays that outlive a call.

A page that the system hands out fresh costs about a microsecond, more than the work done on its 4 kB. Each
calling thread keeps what it used last, up to `MOST_KEPT` bytes an array; larger ones live as long as their
caller.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_KEPT = 2**26
"""Bytes: an array of a 32 x 512 x 512 volume in float32 is half of it."""

_local = threading.local()


def borrow(name: str, size: int, dtype: Any) -> npt.NDArray[Any]:
    """Return an uninitialised array that is the caller's until the thread borrows `name` again.

    Parameters
    ----------
    name : str
        What for; one array is kept for each.
    size : int
        Elements.
    dtype : dtype
        Of the elements.

    Returns
    -------
    (size,) array
    """
    kind = np.dtype(dtype)
    needed = size * kind.itemsize
    if needed > MOST_KEPT:
        return np.empty(size, dtype=kind)
    kept: dict[str, npt.NDArray[np.uint8]] = _local.__dict__
    held = kept.get(name)
    if held is None or held.size < needed:
        held = kept[name] = np.empty(max(needed, 1) * 5 // 4, dtype=np.uint8)
    return held[:needed].view(kind)
