"""Who renders: the backend of the device that holds the image, chosen once, at the public boundary."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lesionsynth._dlpack import DLPACK_CUDA, device_kind
from lesionsynth.config import Range
from lesionsynth.cpu.backend import CpuBackend, CpuStages
from lesionsynth.cpu.engine import memory
from lesionsynth.plan import Component, LesionPlan


class Inputs(Protocol):
    """An image and its mask on a device, checked, and the buffers of results that the caller gave."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(z, y, x) or (b, z, y, x)."""


class Rendering(Protocol):
    """A pair on its device, in the caller's library; what is not always wanted is made when asked for."""

    @property
    def image(self) -> Any:
        """A."""

    @property
    def target(self) -> Any:
        """GT."""

    @property
    def finished(self) -> bool:
        """Whether `components` waits for nothing."""

    def components(self) -> tuple[tuple[Component, ...] | None, ...]:
        """Tell the lesions of each item; None where there was no lung."""

    def labels(self) -> Any:
        """Paint the lesions."""


class Backend(Protocol):
    """Takes arrays of one kind of device and renders on it."""

    def accept(self, image: Any, lung_mask: Any, out: Any) -> Any:
        """Check the arguments of a rendering; returns `Inputs`."""

    def host_mask(self, lung_mask: Any) -> npt.NDArray[np.bool_]:
        """Check a mask, and return it in the host's memory."""

    def count_organ(self, inputs: Any) -> list[int]:
        """Count the voxels of each item's mask; waits for them."""

    def render(
        self, plans: Sequence[LesionPlan], inputs: Any, hu_range: Range, *, allow_empty: bool = False
    ) -> Rendering:
        """Render one plan an item; an item without lung is an error, or gets no lesion."""


class Backends:
    """The backends of a synthesizer. CuPy is imported for the first CUDA array, and never before."""

    def __init__(self, threads: int | None = None) -> None:
        self._cpu = CpuBackend(threads)

    @property
    def stages(self) -> CpuStages:
        """The CPU twin's stages, which measure for whichever device renders."""
        return self._cpu.stages

    def of(self, image: Any) -> Backend:
        """Return the backend for an array."""
        if device_kind(image) == DLPACK_CUDA:
            from lesionsynth.cuda.backend import backend

            return backend()
        return self._cpu


def release_memory() -> None:
    """Give back the memory that is kept for later calls.

    On the CPU, results come from the memory of earlier results that nobody holds any more, and scratch arrays
    stay with the thread that used them: at most three results of the sizes used last, and 64 MiB for each
    purpose. This returns the free ones, and the scratch arrays of the calling thread, to the system. On GPUs
    it waits for the batches under way and returns the workspaces (`lesionsynth.cuda.memory_report`) to CuPy's
    memory pool.
    """
    memory.release()
    cuda = sys.modules.get("lesionsynth.cuda.backend")
    if cuda is not None:
        cuda.backend().release()
