"""CUDA arrays in, the same kind of arrays out: by DLPack, without copies, on the stream of their library.

torch is never imported: a tensor's library is found in ``sys.modules``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cupy

from lesionsynth._dlpack import DLPACK_CUDA, device_kind, library_of
from lesionsynth.cuda.render import Volume

_AS_BYTES = {"bool": "uint8", "bfloat16": "int16"}
"""Types that not every DLPack consumer knows, and types of their size that all do."""


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

    def volume(self) -> Volume:
        """Describe it to the kernels, with a batch axis."""
        view = self.view if self.view.ndim == 4 else self.view[None]
        strides = tuple(n // view.itemsize for n in view.strides)
        return Volume(int(view.data.ptr), tuple(view.shape), strides, self.kind)


def accept(x: Any, name: str) -> DeviceArray:
    """Take a CUDA array of any DLPack library.

    Raises
    ------
    TypeError
        `x` is no array, or not on a CUDA device.
    ValueError
        `x` requires a gradient.
    """
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{name} must be an array on a CUDA device, as the image is, got {type(x).__name__}")
    if device_kind(x) != DLPACK_CUDA:
        raise TypeError(f"{name} must be on a CUDA device, as the image is, got one in other memory")
    if getattr(x, "requires_grad", False):
        raise ValueError(f"{name} requires a gradient, which synthesis cannot give: pass {name}.detach()")
    kind, library = str(x.dtype).rpartition(".")[2], library_of(x)
    if library == "torch" and kind in _AS_BYTES:
        x = x.view(getattr(sys.modules["torch"], _AS_BYTES[kind]))
    return DeviceArray(x if isinstance(x, cupy.ndarray) else cupy.from_dlpack(x), kind, library)


def empty(like: DeviceArray, shape: tuple[int, ...], kind: str) -> tuple[Any, DeviceArray]:
    """Return a new, uninitialised array in the library of another, and the kernels' view of it."""
    if like.library == "torch":
        torch = sys.modules["torch"]
        array = torch.empty(shape, dtype=getattr(torch, kind), device=f"cuda:{like.device}")
        return array, accept(array, "out")
    own = cupy.empty(shape, dtype=_AS_BYTES[kind] if kind == "bfloat16" else kind)
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
    """
    number = int(array.__dlpack_device__()[1])
    with cupy.cuda.Device(number):
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


@dataclass(frozen=True)
class _External:
    """A stream of another library, by the protocol that CuPy takes one."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        """Version 0, and the address."""
        return 0, self.pointer
