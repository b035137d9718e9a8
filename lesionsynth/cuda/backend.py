"""The CUDA backend: arguments checked, memory found, a batch launched."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lesionsynth._arguments import (
    accept_mask,
    check_buffer,
    check_pair,
    check_same_library,
    check_values,
    pair_of,
)
from lesionsynth.config import Range
from lesionsynth.plan import Component, LesionPlan

if TYPE_CHECKING:
    from lesionsynth.cuda.arrays import DeviceArray
    from lesionsynth.cuda.pair import DeviceLesions
    from lesionsynth.cuda.render import Renderer

DTYPES = ("float32", "float16", "bfloat16", "float64", "int16")
"""Images that a rendering takes; int16 holds Hounsfield units."""


@dataclass(frozen=True)
class CudaInputs:
    """Views of the arguments; results are made when the batch is launched, unless the caller gave buffers."""

    given: Any
    """The caller's image."""
    image: DeviceArray
    mask: DeviceArray
    out: tuple[Any, Any] | None
    views: tuple[DeviceArray, DeviceArray] | None
    """Of `out`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(z, y, x) or (b, z, y, x)."""
        return self.image.shape

    @property
    def kinds(self) -> tuple[str, str]:
        """Types of the results."""
        return ("float32" if self.image.kind == "int16" else self.image.kind), "bool"


@dataclass(frozen=True)
class CudaRendering:
    """The pair, under way on its device."""

    image: Any
    """A."""
    target: Any
    """GT."""
    like: DeviceArray
    lesions: DeviceLesions = field(repr=False)
    finished: bool = False

    def components(self) -> tuple[tuple[Component, ...] | None, ...]:
        """Wait, and tell the lesions of each item; None where there was no lung."""
        from lesionsynth.cuda.arrays import stream_of

        with stream_of(self.image):
            return self.lesions.components()

    def labels(self) -> Any:
        """Paint the lesions."""
        from lesionsynth.cuda.arrays import empty, stream_of

        with stream_of(self.image):
            labels, view = empty(self.like, tuple(self.image.shape), "int32")
            self.lesions.paint(view.batch_view().pointer)
        return labels


class CudaBackend:
    """Renders batches on whichever device holds them.

    Parameters
    ----------
    plain : bool
        Use the slow kernels, for tests.
    graphs : bool
        Replay batches as CUDA graphs.
    """

    def __init__(self, *, plain: bool = False, graphs: bool = True) -> None:
        self.plain, self.graphs = plain, graphs
        self.renderers: dict[int, Renderer] = {}
        self._lock = threading.Lock()

    def accept(self, image: Any, lung_mask: Any, out: Any) -> CudaInputs:
        """Check the arguments of a rendering."""
        check_cupy("image and lung_mask are on a CUDA device")
        from lesionsynth.cuda import arrays

        check_same_library(image, lung_mask)
        healthy, mask = arrays.accept(image, "image", bfloat16=True), arrays.accept(lung_mask, "lung_mask")
        check_pair(healthy.shape, healthy.kind, mask.shape, ranks=(3, 4), dtypes=DTYPES)
        if mask.device != healthy.device:
            raise ValueError(
                f"lung_mask must be on the device of image, cuda:{healthy.device}, got cuda:{mask.device}"
            )
        with arrays.stream_of(image):
            inputs = CudaInputs(image, healthy, byte_mask(mask), None, None)
        if out is None:
            return inputs
        buffers = pair_of(out)
        views = arrays.accept(buffers[0], "out image", bfloat16=True), arrays.accept(buffers[1], "out target")
        for name, view, kind in zip(("out image", "out target"), views, inputs.kinds, strict=True):
            check_buffer(name, view.shape, view.kind, bool(view.view.flags.c_contiguous), healthy.shape, kind)
            for other in (healthy, mask):
                _check_apart(name, view, other)
        _check_apart("out image", views[0], views[1], "out target")
        return CudaInputs(image, healthy, inputs.mask, buffers, views)

    def host_mask(self, lung_mask: Any) -> npt.NDArray[np.bool_]:
        """Check a mask, wait for it and copy it down."""
        check_cupy("lung_mask is on a CUDA device")
        from lesionsynth.cuda import arrays

        mask = arrays.accept(lung_mask, "lung_mask")
        with arrays.stream_of(lung_mask):
            return accept_mask(byte_mask(mask).view.get(), ranks=(3, 4))

    def count_organ(self, inputs: CudaInputs) -> list[int]:
        """Count the voxels of each item's mask, and wait for the numbers."""
        from lesionsynth.cuda import arrays

        with arrays.stream_of(inputs.given):
            view = inputs.mask.view
            counts = (view != 0).reshape(-1, math.prod(view.shape[-3:])).sum(axis=1)
            return [int(n) for n in counts.get()]

    def render(
        self, plans: Sequence[LesionPlan], inputs: CudaInputs, hu_range: Range, *, allow_empty: bool = False
    ) -> CudaRendering:
        """Launch one plan an item; nothing is waited for.

        Raises
        ------
        MemoryError
            The device has too little memory for the results or the workspace: `arrays.remedied`.
        TypeError
            Hounsfield units meet a plan with a `value_range`.
        ValueError
            A blob's centre lies outside the volume; or an earlier batch was wrong.
        """
        from lesionsynth.cuda.arrays import empty, stream_of
        from lesionsynth.cuda.render import Job

        check_values(inputs.image.kind, plans)
        for plan in plans:
            plan.check_centers(inputs.shape[-3:])
        with stream_of(inputs.given):
            renderer = self.renderer(inputs.image.device)
            made = (
                [empty(inputs.image, inputs.shape, kind) for kind in inputs.kinds]
                if inputs.out is None
                else []
            )
            results = inputs.out or (made[0][0], made[1][0])
            views = inputs.views or (made[0][1], made[1][1])
            arrays = inputs.image, inputs.mask, *views
            job = Job(*(array.batch_view() for array in arrays))
            lesions = renderer.render(plans, job, hu_range, allow_empty=allow_empty)
        return CudaRendering(*results, inputs.image, lesions)

    def release(self) -> None:
        """Give the memory of all workspaces back to CuPy's pool."""
        if not self.renderers:
            return
        import cupy

        for number, renderer in self.renderers.items():
            with cupy.cuda.Device(number):
                renderer.release()

    def renderer(self, number: int) -> Renderer:
        """Return the renderer of a device; the same one each time."""
        from lesionsynth.cuda.cupy_device import CupyDevice, check_usable
        from lesionsynth.cuda.render import Renderer

        check_usable()
        with self._lock:
            if number not in self.renderers:
                self.renderers[number] = Renderer(CupyDevice(number, graphs=self.graphs), plain=self.plain)
            return self.renderers[number]


@cache
def backend() -> CudaBackend:
    """Return the backend of this process."""
    return CudaBackend()


def check_cupy(reason: str) -> None:
    """Raise `RuntimeError` unless CuPy is installed and a device is there; `reason` says who needs them."""
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"{reason}, which takes CuPy: pip install 'lesionsynth[cuda13]' or 'lesionsynth[cuda12]': {error}"
        ) from error
    from lesionsynth.cuda.cupy_device import check_usable

    try:
        check_usable()
    except RuntimeError as error:
        raise RuntimeError(f"{reason}, but {error}") from error


def byte_mask(mask: DeviceArray) -> DeviceArray:
    """Return a mask of bytes: as it is where its type has one, else 0, 1, and 2 for what is neither."""
    from lesionsynth.cuda.arrays import DeviceArray

    if mask.view.itemsize == 1:
        return mask
    if mask.view.dtype.kind not in "iuf":
        raise TypeError(f"lung_mask must be bool or numbers 0 and 1, got {mask.kind}")
    ones, others = mask.view == 1, (mask.view != 1) & (mask.view != 0)
    return DeviceArray(ones.view("uint8") + 2 * others.view("uint8"), "uint8", mask.library)


def _check_apart(
    name: str,
    buffer: DeviceArray,
    other: DeviceArray,
    what: str = "image or lung_mask, which are never written",
) -> None:
    """Raise where two arrays may share memory."""
    spans = []
    for view in (buffer.view, other.view):
        reach = sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True) if step > 0)
        back = sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True) if step < 0)
        spans.append((view.data.ptr + back, view.data.ptr + reach + view.itemsize))
    (a0, a1), (b0, b1) = spans
    if a0 < b1 and b0 < a1:
        raise ValueError(f"{name} must not share memory with {what}")
