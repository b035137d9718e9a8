"""CUDA arrays in, the same kind of arrays out: without copies, on the stream of their library.

torch's tensors are taken by their address, others by DLPack: torch's ``__dlpack__`` makes the consumer's
stream wait for its own, so that its default stream would wait for a side stream, and a capture break. torch
is never imported: a tensor's library is found in ``sys.modules``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from lesionsynth._dlpack import DLPACK_CUDA, check_dense, device_kind, library_of
from lesionsynth.cuda.render import View

BFLOAT16 = "int16"
"""What stands for bfloat16, which CuPy lacks: bits of its size."""
NUMBERS = ("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64",
           "float16", "float32", "float64")  # fmt: skip
"""Types that torch and CuPy share, under one name."""


@dataclass(frozen=True)
class DeviceArray:
    """An array of any library, and CuPy's view of its memory."""

    view: Any
    kind: str
    """Name of the dtype in the caller's library."""
    library: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As the caller's."""
        return tuple(self.view.shape)

    @property
    def device(self) -> int:
        """Number of the CUDA device."""
        return int(self.view.device.id)

    def batch_view(self) -> View:
        """Describe it to the kernels, with a batch axis."""
        view = self.view if self.view.ndim == 4 else self.view[None]
        strides = tuple(n // view.itemsize for n in view.strides)
        return View(int(view.data.ptr), tuple(view.shape), strides, self.kind)


def accept(x: Any, name: str, *, bfloat16: bool = False) -> DeviceArray:
    """Take a CUDA array of any DLPack library.

    Parameters
    ----------
    x : array
        On a CUDA device.
    name : str
        The caller's argument, for messages.
    bfloat16 : bool
        Take torch's bfloat16 too, whose view holds bits and not numbers.

    Raises
    ------
    TypeError
        `x` is no array, not on a CUDA device, sparse, or of a type that is no number.
    ValueError
        `x` requires a gradient, is a lazy negation, or is of bfloat16 where that is not taken.
    """
    check_dense(x, name)
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{name} must be an array on a CUDA device, as the image is, got {type(x).__name__}")
    if device_kind(x) != DLPACK_CUDA:
        raise TypeError(f"{name} must be on a CUDA device, as the image is, got one in other memory")
    if getattr(x, "requires_grad", False):
        raise ValueError(f"{name} requires a gradient, which synthesis cannot give: pass {name}.detach()")
    kind, library = str(x.dtype).rpartition(".")[2], library_of(x)
    if kind == "bfloat16" and not bfloat16:
        raise ValueError(f"{name} must have a dtype NumPy knows, got {x.dtype}: pass float32")
    if isinstance(x, cupy.ndarray):
        return DeviceArray(x, kind, library)
    return DeviceArray(_view_of(x, name, kind) if library == "torch" else cupy.from_dlpack(x), kind, library)


def _view_of(tensor: Any, name: str, kind: str) -> Any:
    """View a torch tensor's memory as a CuPy array, which keeps the tensor; no stream waits for another."""
    if str(tensor.layout) != "torch.strided":
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.is_neg():
        raise ValueError(f"{name} must hold its values, got a lazy negation: pass {name}.resolve_neg()")
    if kind not in (*NUMBERS, "bfloat16"):
        raise TypeError(f"{name} must be bool, integer or float, got {tensor.dtype}")
    dtype = np.dtype(BFLOAT16 if kind == "bfloat16" else kind)
    shape = tuple(tensor.shape)
    strides = tuple(dtype.itemsize * step for step in tensor.stride())
    reach = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + dtype.itemsize
    number = int(tensor.__dlpack_device__()[1])
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), 0 if 0 in shape else reach, tensor, number)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def empty(like: DeviceArray, shape: tuple[int, ...], kind: str) -> tuple[Any, DeviceArray]:
    """Return a new, uninitialised array in the library of another, and the kernels' view of it."""
    if like.library == "torch":
        torch = sys.modules["torch"]
        array = torch.empty(shape, dtype=getattr(torch, kind), device=f"cuda:{like.device}")
        return array, accept(array, "out", bfloat16=True)
    own = cupy.empty(shape, dtype=BFLOAT16 if kind == "bfloat16" else kind)
    view = DeviceArray(own, kind, like.library)
    if like.library in ("cupy", "numpy"):
        return own, view
    from_dlpack: Callable[[Any], Any] = sys.modules[like.library].from_dlpack
    return from_dlpack(own), view


@contextmanager
def stream_of(array: Any) -> Iterator[None]:
    """Make the stream that the array's library works on CuPy's current one.

    Raises
    ------
    RuntimeError
        The stream is being captured into a graph.
    MemoryError
        See `remedied`.
    """
    number = int(array.__dlpack_device__()[1])
    with cupy.cuda.Device(number), remedied(number, array.shape):
        torch = sys.modules.get("torch") if library_of(array) == "torch" else None
        if torch is None:
            stream = cupy.cuda.get_current_stream()
        else:
            pointer = torch.cuda.current_stream(number).cuda_stream
            stream = cupy.cuda.Stream.from_external(_External(pointer)) if pointer else cupy.cuda.Stream.null
        with stream:
            if stream.is_capturing():
                raise RuntimeError(
                    "the current stream must not be capturing a graph: a rendering sends its plan up, "
                    "and a replay would send the same plan again"
                )
            yield


@contextmanager
def remedied(number: int, shape: Any) -> Iterator[None]:
    """Tell a lack of memory, whoever found it, as a `MemoryError` that says what to do.

    CuPy's pool and torch's allocator have an ``OutOfMemoryError`` each; CUDA's runtime and driver, asked for
    page-locked memory, code and graphs, have status 2.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError" and getattr(error, "status", None) != 2:
            raise
        raise MemoryError(
            f"work on shape {tuple(shape)} needs more memory than cuda:{number} has free: pass fewer items "
            "at once, or give back first what is held for later: lesionsynth.release_memory(), "
            "cupy.get_default_memory_pool().free_all_blocks(), torch.cuda.empty_cache(); "
            f"lesionsynth.cuda.memory_report() tells what lesionsynth holds: {error}"
        ) from error


@dataclass(frozen=True)
class _External:
    """A stream of another library, by the protocol that CuPy takes one."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        """Version 0, and the address."""
        return 0, self.pointer
