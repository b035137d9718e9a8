"""The generator on the CPU, stage after stage: Numba kernels over threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth._arguments import accept_mask, accept_out, accept_pair, check_values
from lesionsynth._dlpack import Restore, accept
from lesionsynth.config import Range
from lesionsynth.cpu.engine.bits import BitMask, pack
from lesionsynth.cpu.engine.memory import output
from lesionsynth.cpu.engine.threads import Tickets, check_threads, settle, team_for, tickets_for
from lesionsynth.cpu.inject import base_pair, inject
from lesionsynth.cpu.merge import Lesions, merge
from lesionsynth.cpu.place import place
from lesionsynth.cpu.shapes import Shapes, draw_shapes
from lesionsynth.cpu.texture import synthesize_textures
from lesionsynth.plan import Component, LesionPlan

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

DTYPES = ("float32", "float64", "float16", "int16")
"""Images that a rendering takes; int16 holds Hounsfield units."""


@dataclass(frozen=True)
class CpuInputs:
    """NumPy views of the arguments, and where the results go."""

    image: Array
    mask: Mask
    out: Array
    target: Mask
    restore: Restore

    @property
    def shape(self) -> tuple[int, ...]:
        """(z, y, x) or (b, z, y, x)."""
        return self.image.shape


class CpuStages:
    """The stages of DESIGN.md section 2; what passes between them is their own affair.

    Parameters
    ----------
    threads : int, optional
        CPU threads.
    """

    def __init__(self, threads: int | None = None) -> None:
        check_threads(threads)
        self.threads = threads

    def output(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return uninitialised memory for a result."""
        return output(shape, dtype)

    def copy(
        self, image: Array, plan: LesionPlan, hu_range: Range, out: Array, target: Mask, tickets: Tickets
    ) -> Callable[[], None]:
        """Begin to write the pair without lesions, H and H >= threshold; the answer ends it."""
        return base_pair(image, plan, hu_range, out, target, team_for(out.size, self.threads), tickets)

    def place(
        self, plan: LesionPlan, lung_mask: Mask, allow_empty: bool = False
    ) -> tuple[LesionPlan, tuple[BitMask, npt.NDArray[np.int64]]]:
        """Find the centre voxel of each blob, and read the mask; the plan of an empty one loses its blobs."""
        counts = np.empty(lung_mask.shape[0] * lung_mask.shape[1], dtype=np.int64)
        mask = pack(lung_mask, 1, counts)  # the other threads copy the image meanwhile
        centers = place(plan, mask, counts, allow_empty=allow_empty)
        if counts.any():
            return plan, (mask, centers)
        return plan.without_lesions(), (mask, centers[:0])

    def draw(self, plan: LesionPlan, placed: tuple[BitMask, npt.NDArray[np.int64]]) -> Shapes:
        """Evaluate the blobs' voxels."""
        mask, centers = placed
        return draw_shapes(plan, centers, mask, team_for(math.prod(mask.shape), self.threads))

    def merge(
        self, plan: LesionPlan, placed: tuple[BitMask, npt.NDArray[np.int64]], shapes: Shapes
    ) -> Lesions:
        """Join blobs that touch into lesions."""
        shape = placed[0].shape
        return merge(shapes, shape, plan.connectivity, team_for(math.prod(shape), self.threads))

    def fill(self, plan: LesionPlan, lesions: Lesions, out: Array, target: Mask) -> tuple[Component, ...]:
        """Synthesise the texture of every lesion and inject it into the pair, in place."""
        components: list[Component] = []
        threads = team_for(out.size, self.threads)
        for textures in synthesize_textures(plan, lesions, threads):
            changed = inject(plan, textures, lesions, out, target, threads)
            components += map(lesions.component, textures.fields, changed.tolist())
        return tuple(sorted(components, key=lambda c: c.label))

    def paint(self, lesions: Lesions, out: npt.NDArray[np.int32]) -> None:
        """Write the labels of all lesions, and 0 elsewhere."""
        lesions.paint(out, team_for(out.size, self.threads))


@dataclass(frozen=True)
class CpuRendering:
    """The pair, and the lesions' runs; the inputs are let go."""

    image: Any
    """A."""
    target: Any
    """GT."""
    shape: tuple[int, ...]
    restore: Restore
    stages: CpuStages
    lesions: tuple[Lesions, ...]
    found: tuple[tuple[Component, ...] | None, ...]
    finished: bool = True

    def components(self) -> tuple[tuple[Component, ...] | None, ...]:
        """Tell the lesions of each item; None where there was no lung."""
        return self.found

    def labels(self) -> Any:
        """Paint the lesions."""
        labels = self.stages.output(self.shape, np.int32)
        for item, out in zip(self.lesions, labels if len(self.shape) == 4 else labels[None], strict=True):
            self.stages.paint(item, out)
        return self.restore(labels)


class CpuBackend:
    """Renders item after item.

    Parameters
    ----------
    threads : int, optional
        See `CpuStages`.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.stages = CpuStages(threads)

    def accept(self, image: Any, lung_mask: Any, out: Any) -> CpuInputs:
        """Check the arguments of a rendering."""
        healthy, mask, restore = accept_pair(image, lung_mask, ranks=(3, 4), dtypes=DTYPES)
        dtype = np.dtype(np.float32 if healthy.dtype == np.int16 else healthy.dtype)
        if out is None:
            a, target = (self.stages.output(healthy.shape, kind) for kind in (dtype, np.bool_))
        else:
            given, _ = accept(lung_mask, "lung_mask")  # `mask` may be a copy
            a, target = accept_out(out, healthy, dtype, given)
        return CpuInputs(healthy, mask, a, target, restore)

    def host_mask(self, lung_mask: Any) -> Mask:
        """Check a mask, and return it as NumPy's."""
        return accept_mask(lung_mask, ranks=(3, 4))

    def count_organ(self, inputs: CpuInputs) -> list[int]:
        """Count the voxels of each item's mask."""
        masks = inputs.mask if inputs.mask.ndim == 4 else inputs.mask[None]
        return [int(np.count_nonzero(mask)) for mask in masks]

    def render(
        self, plans: Sequence[LesionPlan], inputs: CpuInputs, hu_range: Range, *, allow_empty: bool = False
    ) -> CpuRendering:
        """Render one plan an item."""
        check_values(inputs.image.dtype.name, plans)
        arrays = [inputs.image, inputs.mask, inputs.out, inputs.target]
        items = [x if x.ndim == 4 else x[None] for x in arrays]
        rendered = [
            self._render_one(plan, hu_range, *item, allow_empty=allow_empty)
            for plan, *item in zip(plans, *items, strict=True)
        ]
        lesions, found = zip(*rendered, strict=True)
        restore = inputs.restore
        image, target = restore(inputs.out), restore(inputs.target)
        return CpuRendering(image, target, inputs.shape, restore, self.stages, lesions, found)

    def _render_one(
        self, plan: LesionPlan, hu_range: Range, image: Array, mask: Mask, out: Array, target: Mask,
        *, allow_empty: bool,
    ) -> tuple[Lesions, tuple[Component, ...] | None]:  # fmt: skip
        """Write one pair to `out` and `target`: read this downwards."""
        stages, tickets = self.stages, tickets_for(1)
        try:
            finish_copy = stages.copy(image, plan, hu_range, out, target, tickets)
            try:
                found, placed = stages.place(plan, mask, allow_empty)
                lesions = stages.merge(found, placed, stages.draw(found, placed))
            finally:
                finish_copy()
        finally:
            settle(tickets)  # whatever was raised, nobody writes the pair any more
        components = stages.fill(found, lesions, out, target)
        return lesions, components if found is plan else None
