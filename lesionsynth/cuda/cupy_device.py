"""The real device: CuPy for memory, streams, graphs and modules.

CuPy is imported here, in `lesionsynth.cuda.arrays` and in `lesionsynth.cuda.ops`;
`lesionsynth.cuda.backend` loads them for the first CUDA array.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from lesionsynth.cuda.compiling import compiled
from lesionsynth.cuda.device import Buffer, Bytes, Pinned
from lesionsynth.cuda.programs import THREADS

MOST_GRAPHS = 16
"""Captured batches that are kept: one for each image type and batch size in use."""
CARVEOUT = 100
"""Percent of a multiprocessor's first-level cache that kernels ask for as shared memory."""

_forked = False


@dataclass
class CupyBuffer:
    """Memory of CuPy's pool."""

    memory: Any
    nbytes: int

    @property
    def pointer(self) -> int:
        """Address."""
        return int(self.memory.ptr)


@dataclass
class CupyPinned:
    """Page-locked memory, which the device sees at the same address."""

    memory: Any
    array: Bytes

    @property
    def pointer(self) -> int:
        """Address."""
        return int(self.memory.ptr)


class CupyMark:
    """An event."""

    def __init__(self) -> None:
        self.event = cupy.cuda.Event(disable_timing=True)
        self.event.record()

    def done(self) -> bool:
        """Whether the device has passed it."""
        return bool(self.event.done)

    def wait(self) -> None:
        """Hold the host until then."""
        self.event.synchronize()


class CupyDevice:
    """A CUDA device; the caller's stream is CuPy's current one.

    Parameters
    ----------
    number : int
        Of the device.
    graphs : bool
        Replay a batch as a CUDA graph from its third time on; the first compiles, the second is captured.

    Raises
    ------
    RuntimeError
        There is no such device, the driver is too old for this CuPy, or the process was forked.
    """

    def __init__(self, number: int, *, graphs: bool = True) -> None:
        check_usable()
        self.number = number
        self.graphs = graphs
        with cupy.cuda.Device(number) as device:
            self.processors = int(device.attributes["MultiProcessorCount"])
            self._side = cupy.cuda.Stream(non_blocking=True)
            self._capture = cupy.cuda.Stream(non_blocking=True)
            self._fork, self._join = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
        self._kernels: dict[tuple[str, str, str], Any] = {}
        self._graphs: OrderedDict[Any, Any] = OrderedDict()

    def allocate(self, nbytes: int) -> Buffer:
        """Take uninitialised memory from CuPy's pool."""
        return CupyBuffer(cupy.cuda.alloc(nbytes), nbytes)

    def pinned(self, nbytes: int) -> Pinned:
        """Take page-locked memory, zeroed."""
        memory = cupy.cuda.alloc_pinned_memory(nbytes)
        array = np.frombuffer(memory, dtype=np.uint8, count=nbytes)
        array[:] = 0
        return CupyPinned(memory, array)

    def upload(self, pointer: int, source: int, nbytes: int) -> None:
        """Copy up from page-locked memory."""
        self._copy(pointer, source, nbytes, cupy.cuda.runtime.memcpyHostToDevice)

    def copy(self, pointer: int, source: int, nbytes: int) -> None:
        """Copy on the device."""
        self._copy(pointer, source, nbytes, cupy.cuda.runtime.memcpyDeviceToDevice)

    def download(self, pointer: int, nbytes: int) -> Bytes:
        """Wait for the caller's stream and copy down."""
        out = np.empty(nbytes, dtype=np.uint8)
        self._copy(out.ctypes.data, pointer, nbytes, cupy.cuda.runtime.memcpyDeviceToHost)
        cupy.cuda.get_current_stream().synchronize()
        return out

    def mark(self) -> CupyMark:
        """Remember how far the caller's stream has come."""
        return CupyMark()

    def follow(self, mark: Any) -> None:
        """Let the caller's stream go on only after a mark."""
        cupy.cuda.get_current_stream().wait_event(mark.event)

    def finish(self) -> None:
        """Hold the host until the device has done all that was launched, on whichever stream."""
        cupy.cuda.Device(self.number).synchronize()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Launch beside what the caller's stream does from here on."""
        self._fork.record()
        self._side.wait_event(self._fork)
        with self._side:
            yield
            self._join.record()

    def join(self) -> None:
        """Let the caller's stream wait for what was launched beside it."""
        cupy.cuda.get_current_stream().wait_event(self._join)

    def replay(self, key: Any, launches: Callable[[], None]) -> None:
        """Launch one by one the first time, which compiles; then capture a graph, and replay it."""
        if not self.graphs:
            launches()
            return
        graph = self._graphs.pop(key, None)
        if graph is None:
            launches()
            graph = _SEEN
        else:
            if graph is _SEEN:
                graph = self._captured(launches)
            graph.launch()
        self._graphs[key] = graph
        while len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)

    def launch(self, program: str, image: str, kernel: str, grid: int, *arguments: Any) -> None:
        """Launch a kernel on the current stream."""
        function = self._kernels.get((program, image, kernel))
        if function is None:
            function = _module(self.number, program, image).get_function(kernel)
            # All of the first-level cache: a multiprocessor that had to divide it anew for the next kernel
            # could not run the two side by side.
            attribute = cupy.cuda.driver.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            cupy.cuda.driver.funcSetAttribute(function.ptr, attribute, CARVEOUT)
            self._kernels[program, image, kernel] = function
        function((grid,), (THREADS,), arguments)

    def _captured(self, launches: Callable[[], None]) -> Any:
        with self._capture as stream:
            try:
                stream.begin_capture()
                launches()
            except BaseException:  # torn off, say; what was captured is of no use, and may not be whole
                with suppress(cupy.cuda.runtime.CUDARuntimeError):
                    stream.end_capture()
                raise
            return stream.end_capture()

    @staticmethod
    def _copy(target: int, source: int, nbytes: int, kind: int) -> None:
        stream = cupy.cuda.get_current_stream().ptr
        cupy.cuda.runtime.memcpyAsync(target, source, nbytes, kind, stream)


_SEEN = object()
"""Stands for a batch that was launched once and not captured yet."""

_modules: dict[tuple[int, str, str], Any] = {}


def _module(device: int, program: str, image: str) -> Any:
    """Load a program, compiled where no earlier process has; once per image type and device."""
    key = device, program, image
    if key not in _modules:
        capability = int(cupy.cuda.Device(device).compute_capability)
        module = cupy.cuda.Module()
        try:
            module.load(compiled(program, image, capability))
            _modules[key] = module
        except (ImportError, OSError) as error:
            raise RuntimeError(
                "the CUDA kernels could not be compiled: NVRTC must be installed for the CUDA version of "
                f"CuPy, {cuda_version()}, as by pip install 'lesionsynth[cuda13]' or 'lesionsynth[cuda12]': "
                f"{error}"
            ) from error
    return _modules[key]


def cuda_version() -> str:
    """CUDA version that CuPy was built for, as in "13.0"."""
    version = int(cupy.cuda.runtime.runtimeGetVersion())
    return f"{version // 1000}.{version % 1000 // 10}"


def check_usable() -> None:
    """Raise `RuntimeError`, with the remedy, where CUDA cannot work."""
    if _forked:
        raise RuntimeError(
            "CUDA cannot be used in a process forked from one that has used it: render in the main process, "
            "or start DataLoader workers with multiprocessing_context='spawn'"
        )
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        text = str(error)
        if "InsufficientDriver" in text:
            remedy = (
                f"there is no NVIDIA driver, or it is older than CUDA {cuda_version()}, which CuPy was built "
                "for; update it or install the extra of lesionsynth for an older CUDA ('lesionsynth[cuda12]')"
            )
        else:
            remedy = "is an NVIDIA driver installed, and CUDA_VISIBLE_DEVICES not empty?"
        raise RuntimeError(f"CUDA is not available: {text.strip()}; {remedy}") from error
    if count == 0:
        raise RuntimeError("CUDA is not available: no device; is CUDA_VISIBLE_DEVICES empty?")


def _mark_forked() -> None:
    global _forked
    _forked = bool(_modules)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)
