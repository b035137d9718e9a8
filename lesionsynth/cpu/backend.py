"""The generator on the CPU, stage after stage: Numba kernels over threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth._arguments import accept_out, accept_pair
from lesionsynth._dlpack import Restore
from lesionsynth._recipe import Recipe
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


@dataclass(frozen=True)
class CpuRendering:
    """The pair, and the lesions' runs; the inputs are let go."""

    image: Any
    """A."""
    target: Any
    """GT."""
    shape: tuple[int, ...]
    restore: Restore
    lesions: tuple[Lesions, ...]
    found: tuple[tuple[Component, ...], ...]
    threads: int | None

    def components(self) -> tuple[tuple[Component, ...], ...]:
        """Tell the lesions of each item."""
        return self.found

    def labels(self) -> Any:
        """Paint the lesions."""
        labels = output(self.shape, np.int32)
        for item, out in zip(self.lesions, labels if len(self.shape) == 4 else labels[None], strict=True):
            item.paint(out, team_for(out.size, self.threads))
        return self.restore(labels)


class CpuBackend:
    """Renders item after item."""

    def __init__(self, threads: int | None = None) -> None:
        check_threads(threads)
        self.threads = threads

    def accept(self, image: Any, lung_mask: Any, out: Any) -> CpuInputs:
        """Check the arguments of a rendering."""
        healthy, mask, restore = accept_pair(image, lung_mask, ranks=(3, 4), dtypes=DTYPES)
        dtype = np.dtype(np.float32 if healthy.dtype == np.int16 else healthy.dtype)
        if out is None:
            return CpuInputs(
                healthy, mask, output(healthy.shape, dtype), output(healthy.shape, np.bool_), restore
            )
        return CpuInputs(healthy, mask, *accept_out(out, healthy, dtype, mask), restore)

    def render(self, recipes: Sequence[Recipe], inputs: CpuInputs, hu_range: Range) -> CpuRendering:
        """Render one recipe an item."""
        arrays = [inputs.image, inputs.mask, inputs.out, inputs.target]
        items = [x if x.ndim == 4 else x[None] for x in arrays]
        rendered = [
            self._render_one(recipe.plan, hu_range, *item)
            for recipe, *item in zip(recipes, *items, strict=True)
        ]
        lesions, components = zip(*rendered, strict=True)
        restore = inputs.restore
        return CpuRendering(
            restore(inputs.out),
            restore(inputs.target),
            inputs.shape,
            restore,
            lesions,
            components,
            self.threads,
        )

    def _render_one(
        self, plan: LesionPlan, hu_range: Range, image: Array, mask: Mask, out: Array, target: Mask
    ) -> tuple[Lesions, tuple[Component, ...]]:
        """Write one pair to `out` and `target`: read this downwards."""
        finish_copy = base_pair(image, plan.tau, hu_range, out, target, team_for(out.size, self.threads))
        try:
            placed = self.place(plan, mask)
            lesions = self.merge(plan, placed, self.draw(plan, placed))
        finally:
            finish_copy()
        return lesions, self.fill(plan, lesions, out, target)

    def place(self, plan: LesionPlan, lung_mask: Mask) -> tuple[BitMask, npt.NDArray[np.int64]]:
        """Find the centre voxel of each blob, and read the mask."""
        counts = np.empty(lung_mask.shape[0] * lung_mask.shape[1], dtype=np.int64)
        mask = pack(lung_mask, 1, counts)  # the other threads copy the image meanwhile
        return mask, place(plan, mask, counts)

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
            inject(textures, lesions, out, target, threads)
            components += textures.components
        return tuple(sorted(components, key=lambda c: c.label))
