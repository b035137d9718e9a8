"""Arrays in, the same kind of arrays out: the public boundary, by DLPack and without copies.

Libraries are found in ``sys.modules`` through the type of the argument and are never imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Restore = Callable[[Array], Any]

DLPACK_CPU = 1
DLPACK_CUDA = 2


def accept(x: Any, name: str) -> tuple[Array, Restore]:
    """Take a CPU array of any DLPack library as a NumPy view.

    Parameters
    ----------
    x : array
        NumPy array, or an object with ``__dlpack__`` in CPU memory (a torch tensor, say).
    name : str
        The caller's argument, for messages.

    Returns
    -------
    array : numpy.ndarray
        Shares memory with `x`.
    restore : callable
        Turns a NumPy array into an array of the library of `x`, without a copy.

    Raises
    ------
    TypeError
        `x` is not an array.
    ValueError
        `x` is on another device, requires a gradient, or has a dtype NumPy lacks.
    """
    if isinstance(x, np.ndarray):
        return x, _identity
    if not hasattr(x, "__dlpack__"):
        raise TypeError(
            f"{name} must be a NumPy array or a DLPack array such as a torch tensor, got {type(x).__name__}"
        )
    try:
        kind = int(x.__dlpack_device__()[0])
    except (BufferError, TypeError, ValueError) as error:  # torch's meta tensors have no memory to speak of
        device = getattr(x, "device", "unknown")
        raise ValueError(f"{name} must be in CPU or CUDA memory, got device {device}: {error}") from error
    if kind == DLPACK_CUDA:
        raise ValueError(f"{name} must be in CPU memory, as the other arrays are, got a CUDA array")
    if kind != DLPACK_CPU:
        raise ValueError(f"{name} must be in CPU memory, got DLPack device type {kind}")
    if getattr(x, "requires_grad", False):
        raise ValueError(f"{name} requires a gradient, which synthesis cannot give: pass {name}.detach()")
    try:
        view = np.from_dlpack(x)
    except (BufferError, TypeError, RuntimeError) as error:
        dtype = getattr(x, "dtype", "unknown")
        raise ValueError(f"{name} must have a dtype NumPy knows, got {dtype}: {error}") from error
    from_dlpack = getattr(sys.modules.get(library_of(x)), "from_dlpack", None)
    return view, _identity if from_dlpack is None else from_dlpack


def device_kind(x: Any) -> int | None:
    """Return the DLPack device type of an array; None where it has none, or will not tell."""
    try:
        return int(x.__dlpack_device__()[0])
    except (AttributeError, BufferError, TypeError, ValueError):
        return None


def library_of(x: Any) -> str:
    """Name the library of `x`: the first class of its MRO whose package can take DLPack objects."""
    for cls in type(x).__mro__:
        root = cls.__module__.partition(".")[0]
        if hasattr(sys.modules.get(root), "from_dlpack"):
            return root
    return "numpy"


def _identity(x: Array) -> Array:
    return x
