"""The stages of a rendering, and who provides them for an array.

A backend is chosen once, at the public boundary; `lesionsynth.synthesizer` calls stages and has no device
branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lesionsynth.config import Range
from lesionsynth.cpu._memory import output
from lesionsynth.cpu._threads import check_threads, team_for
from lesionsynth.cpu.bits import BitMask, pack
from lesionsynth.cpu.inject import base_pair, inject
from lesionsynth.cpu.merge import Lesions, merge
from lesionsynth.cpu.place import place
from lesionsynth.cpu.shapes import Shapes, draw_shapes
from lesionsynth.cpu.texture import synthesize_textures
from lesionsynth.plan import Component, LesionPlan

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int32]


class Backend(Protocol):
    """One method per stage of DESIGN.md section 2. What passes between stages is the backend's own affair."""

    def copy(self, image: Array, tau: float, hu_range: Range, out: Array, target: Mask) -> Callable[[], None]:
        """Begin to write the pair without lesions, H to `out`, H >= tau to `target`; the answer ends it."""

    def output(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return uninitialised memory for a result."""

    def place(self, plan: LesionPlan, lung_mask: Mask) -> Any:
        """Find the centre voxel of each blob, and read the mask."""

    def draw(self, plan: LesionPlan, placed: Any) -> Any:
        """Evaluate the blobs' voxels."""

    def merge(self, plan: LesionPlan, placed: Any, shapes: Any) -> Any:
        """Join blobs that touch into lesions."""

    def fill(self, plan: LesionPlan, lesions: Any, out: Array, target: Mask) -> tuple[Component, ...]:
        """Synthesise the texture of every lesion and inject it into the pair, in place."""

    def paint(self, lesions: Any, out: Labels) -> None:
        """Write the labels of all lesions, and 0 elsewhere."""


class CpuBackend:
    """Numba kernels over threads."""

    def __init__(self, threads: int | None = None) -> None:
        check_threads(threads)
        self.threads = threads

    def output(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """See `Backend`."""
        return output(shape, dtype)

    def copy(self, image: Array, tau: float, hu_range: Range, out: Array, target: Mask) -> Callable[[], None]:
        """See `Backend`."""
        return base_pair(image, tau, hu_range, out, target, team_for(out.size, self.threads))

    def place(self, plan: LesionPlan, lung_mask: Mask) -> tuple[BitMask, npt.NDArray[np.int64]]:
        """See `Backend`."""
        counts = np.empty(lung_mask.shape[0] * lung_mask.shape[1], dtype=np.int64)
        mask = pack(lung_mask, 1, counts)  # the other threads copy the image meanwhile
        return mask, place(plan, mask, counts)

    def draw(self, plan: LesionPlan, placed: tuple[BitMask, npt.NDArray[np.int64]]) -> Shapes:
        """See `Backend`."""
        mask, centers = placed
        return draw_shapes(plan, centers, mask, team_for(math.prod(mask.shape), self.threads))

    def merge(
        self, plan: LesionPlan, placed: tuple[BitMask, npt.NDArray[np.int64]], shapes: Shapes
    ) -> Lesions:
        """See `Backend`."""
        shape = placed[0].shape
        return merge(shapes, shape, plan.connectivity, team_for(math.prod(shape), self.threads))

    def fill(self, plan: LesionPlan, lesions: Lesions, out: Array, target: Mask) -> tuple[Component, ...]:
        """See `Backend`."""
        components: list[Component] = []
        threads = team_for(out.size, self.threads)
        for textures in synthesize_textures(plan, lesions, threads):
            inject(textures, lesions, out, target, threads)
            components += textures.components
        return tuple(sorted(components, key=lambda c: c.label))

    def paint(self, lesions: Lesions, out: Labels) -> None:
        """See `Backend`."""
        lesions.paint(out, team_for(out.size, self.threads))
