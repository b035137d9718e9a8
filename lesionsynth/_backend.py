"""The stages of a rendering, and who provides them for an array.

A backend is chosen once, at the public boundary; `lesionsynth.synthesizer` calls stages and has no device
branches.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu import inject, merge, place, shapes, texture
from lesionsynth.plan import Component, LesionPlan

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int32]
Centers = list[tuple[int, int, int]]


class Backend(Protocol):
    """One method per stage of DESIGN.md section 2."""

    def place(self, plan: LesionPlan, mask: Mask) -> Centers:
        """Centre voxel of each blob."""

    def draw_and_merge(self, plan: LesionPlan, centers: Centers, mask: Mask) -> tuple[Labels, list[Lesion]]:
        """Return the merged lesions: labels, and what each consists of."""

    def base_pair(self, image: Array, labels: Labels, tau: float) -> tuple[Array, Mask]:
        """Copy the image and compute the target."""

    def fill(
        self, plan: LesionPlan, lesions: list[Lesion], labels: Labels, image: Array
    ) -> tuple[Component, ...]:
        """Texture of every lesion, injected into `image` in place."""


Lesion = tuple[int, tuple[int, ...], inject.Box]
"""Label, blobs, and tight bounding box."""


class CpuBackend:
    """Numba kernels over threads."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads

    def place(self, plan: LesionPlan, mask: Mask) -> Centers:
        """See `Backend`."""
        return place.place(plan, mask, self.threads)

    def draw_and_merge(self, plan: LesionPlan, centers: Centers, mask: Mask) -> tuple[Labels, list[Lesion]]:
        """See `Backend`."""
        drawn = shapes.draw_shapes(plan, centers, mask, self.threads)
        labels, members = merge.merge(drawn, mask.shape, plan.connectivity)
        return labels, [
            (label, blobs, inject.lesion_box(labels, label, _hull([drawn[k] for k in blobs])))
            for label, blobs in enumerate(members, start=1)
        ]

    def base_pair(self, image: Array, labels: Labels, tau: float) -> tuple[Array, Mask]:
        """See `Backend`."""
        return inject.base_pair(image, labels, tau, self.threads)

    def fill(
        self, plan: LesionPlan, lesions: list[Lesion], labels: Labels, image: Array
    ) -> tuple[Component, ...]:
        """See `Backend`."""
        records = []
        for label, blobs, box in lesions:
            b, record = texture.synthesize_texture(plan, label, blobs, labels, box, self.threads)
            inject.inject(image, b, labels, label, box)
            records.append(record)
        return tuple(records)


def _hull(drawn: list[shapes.Shape]) -> inject.Box:
    """Smallest box around the boxes of several blobs."""
    starts = [s.start for s in drawn]
    stops = [[a + n for a, n in zip(s.start, s.inside.shape, strict=True)] for s in drawn]
    low, high = np.min(starts, axis=0).tolist(), np.max(stops, axis=0).tolist()
    return (low[0], high[0]), (low[1], high[1]), (low[2], high[2])
