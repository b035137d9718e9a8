"""A wanted share of the organ: how many blobs, and how large (`LesionConfig.load`).

Blobs overlap, leave the organ and merge, so how much of it they fill is measured and not computed: a first
guess of their number from their volumes, then a common factor of all radii, found with the stages of the CPU
twin. The plan that comes out is a plan like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.config import MOST_BLOBS, MOST_LENGTH, LesionConfig
from lesionsynth.cpu.backend import CpuStages
from lesionsynth.plan import LesionPlan

NEAR = 0.03
"""Share of the wanted load within which a factor is good enough."""
TRIES = 20
"""Factors that are tried; five or so suffice where the organ allows."""


def meet_load(
    config: LesionConfig,
    draw: Callable[[float], LesionPlan],
    mask: npt.NDArray[np.bool_],
    stages: CpuStages,
) -> LesionPlan:
    """Find the plan whose lesions fill its `load` of the organ, as nearly as its blobs can.

    Parameters
    ----------
    config : LesionConfig
        Whose classes the blobs are of.
    draw : callable
        Draws the sample for a λ, of at least one blob.
    mask : (z, y, x) bool array
        The organ; where it is empty, the plan is as drawn.
    stages : CpuStages
        What measures.
    """
    plan = draw(1.0)
    organ = int(np.count_nonzero(mask))
    if organ == 0:
        return plan
    plan = draw(_fraction(config, plan, organ))
    assert plan.load is not None
    _, placed = stages.place(plan, mask)

    def filled(factor: float) -> float:
        """Share of the organ with all radii multiplied; more than all where that would be too much work."""
        scaled = _scaled(plan, factor)
        try:
            scaled.check_work(mask.shape)
        except ValueError:
            return 2.0
        lesions = stages.merge(scaled, placed, stages.draw(scaled, placed))
        return int(lesions.voxels.sum()) / organ

    return _scaled(plan, _factor(filled, plan.load, _most_factor(plan)))


def _fraction(config: LesionConfig, plan: LesionPlan, organ: int) -> float:
    """Guess the λ whose blobs fill the load: strewn at random, volumes V leave exp(-V / organ) empty."""
    assert plan.load is not None
    volume = 4.0 / 3.0 * math.pi * float(plan.records["semi_axes"].prod(axis=1).sum()) / math.prod(plan.scale)
    most = MOST_BLOBS / max(1.0, sum(kind.most_count for kind in config.blob_classes))
    return min(-math.log1p(-plan.load) * organ / volume, most)


def _factor(filled: Callable[[float], float], wanted: float, most: float) -> float:
    """Find a factor by cube roots, and between factors that are known to be too small and too large."""
    small, large, best, nearest = 0.0, most, 1.0, math.inf
    factor = min(1.0, most)
    for _ in range(TRIES):
        share = filled(factor)
        error = abs(share / wanted - 1.0)
        if error < nearest:
            best, nearest = factor, error
        if error <= NEAR or factor in (small, large):
            break
        if share < wanted:
            small = factor
        else:
            large = factor
        guess = factor * min(4.0, max(0.25, (wanted / share) ** (1.0 / 3.0) if share else 2.0))
        if not small < guess < large:
            guess = math.sqrt(small * large) if small else large / 2.0
        factor = min(guess, most)
    return best


def _most_factor(plan: LesionPlan) -> float:
    return MOST_LENGTH / float(plan.records["semi_axes"].max())


def _scaled(plan: LesionPlan, factor: float) -> LesionPlan:
    """Multiply all radii: the warp is in units of the radius, so shapes stay what they are."""
    records: npt.NDArray[Any] = plan.records.copy()
    records["semi_axes"] *= factor
    return plan.with_records(records)
