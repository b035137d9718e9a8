"""A plan as numbers: what the device needs of it, before anyone asks for the objects.

Drawing a batch and sending it up takes microseconds; making its dataclasses takes a millisecond, so they are
made when asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth._kept import kept
from lesionsynth.plan import Blob, Component, LesionPlan, Triple, check_work

DRAWN = np.dtype(
    [
        ("component", np.float64),  # a 32-bit word
        ("semi_axes", np.float64, 3),
        ("rotation", np.float64, 4),
        ("position", np.float64),
        ("center", np.float64, 3),  # -1: by position
        ("warp_amplitude", np.float64),
        ("warp_correlation", np.float64),
        ("sigma_a", np.float64),
        ("a_low", np.float64),
        ("a_high", np.float64),
        ("sigma_b", np.float64),
        ("mu0", np.float64),
    ]
)
"""A blob of `lesionsynth.Blob`, all float64, so that a kernel can write it as a row of numbers."""

_SCALARS = ("position", "warp_amplitude", "warp_correlation", "sigma_a", "a_low", "a_high", "sigma_b", "mu0")


@dataclass(frozen=True)
class Recipe:
    """A `LesionPlan` whose blobs are rows of numbers; fields as there."""

    seed: int
    index: int
    lung_fraction: float
    shape: tuple[int, int, int] | None
    scale: Triple
    connectivity: int
    tau: float
    mean_threshold: float
    blobs: npt.NDArray[Any]
    """(n,) `DRAWN` records."""

    @classmethod
    def of(cls, plan: LesionPlan) -> Recipe:
        """Take the numbers out of a plan."""
        blobs = np.zeros(len(plan.blobs), dtype=DRAWN)
        if plan.blobs:
            for name in ("component", "semi_axes", "rotation", *_SCALARS):
                blobs[name] = [getattr(blob, name) for blob in plan.blobs]
            blobs["center"] = [(-1, -1, -1) if b.center is None else b.center for b in plan.blobs]
        recipe = cls(
            plan.seed, plan.index, plan.lung_fraction, plan.shape, plan.scale, plan.connectivity, plan.tau,
            plan.mean_threshold, blobs,
        )  # fmt: skip
        recipe.__dict__["plan"] = plan  # what `plan` would give
        return recipe

    @kept
    def plan(self) -> LesionPlan:
        """The plan, without components."""  # noqa: D401
        return LesionPlan(
            seed=self.seed,
            index=self.index,
            lung_fraction=self.lung_fraction,
            shape=self.shape,
            scale=self.scale,
            connectivity=self.connectivity,
            tau=self.tau,
            mean_threshold=self.mean_threshold,
            blobs=tuple(_blob(row) for row in self.blobs.tolist()),
        )

    def check_work(self, shape: tuple[int, int, int]) -> None:
        """Check that it can be rendered in a volume (z, y, x); see `LesionPlan.check_work`."""
        columns = [self.blobs[n] for n in ("warp_amplitude", "warp_correlation", "sigma_a", "sigma_b")]
        check_work(np.column_stack([self.blobs["semi_axes"], *columns]), self.scale, shape)

    def rendered(self, components: tuple[Component, ...] | None) -> LesionPlan:
        """Return the plan with what it became; None says that there was no lung."""
        if components is None:
            return without_lesions(self.plan)
        return replace(self.plan, components=components)


def without_lesions(plan: LesionPlan) -> LesionPlan:
    """Return the plan of an item without lung: no blob, no lesion."""
    return replace(plan, blobs=(), components=())


def _blob(row: tuple[Any, ...]) -> Blob:
    component, axes, rotation, position, center, amplitude, correlation, sigma_a, low, high, sigma_b, mu0 = (
        row
    )
    return Blob(
        component=int(component),
        semi_axes=(axes[0], axes[1], axes[2]),
        rotation=(rotation[0], rotation[1], rotation[2], rotation[3]),
        position=position,
        center=None if center[0] < 0 else (int(center[0]), int(center[1]), int(center[2])),
        warp_amplitude=amplitude,
        warp_correlation=correlation,
        sigma_a=sigma_a,
        a_low=low,
        a_high=high,
        sigma_b=sigma_b,
        mu0=mu0,
    )
