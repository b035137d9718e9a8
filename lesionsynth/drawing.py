"""From a configuration, (seed, index) and λ to plans; and how λ, or a wanted load, is met in an organ.

The laws are in `lesionsynth.sampling`, the words in `lesionsynth.cpu.philox`. A batch is drawn together,
since NumPy takes as long for the blobs of one sample as for those of ten.

**A load** is a wanted share of the organ (`LesionConfig.load`). Blobs overlap, leave the organ and merge, so
how much of it they fill is measured and not computed: a first guess of their number from their volumes, then
a common factor of all radii, found with the stages of the CPU twin. The plan that comes out is a plan like
any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lesionsynth.config import (
    MOST_BLOBS,
    MOST_LENGTH,
    PAPER_LUNG,
    PAPER_VOXEL,
    LesionConfig,
)
from lesionsynth.cpu.backend import CpuStages
from lesionsynth.cpu.philox import plan_uniforms
from lesionsynth.plan import LesionPlan, check_edge
from lesionsynth.sampling import (
    MOST_VOXELS,
    UNIFORMS_PER_BLOB,
    Floats,
    Triple,
    draw_blobs,
    draw_kinds,
    draw_load,
    draw_numbers,
    draw_part,
    least_fraction,
)

OF_SAMPLE = 2**32 - 1
"""Philox component of the draws that belong to the sample, not to a blob."""
NEAR = 0.03
"""Share of the wanted load within which a factor is good enough."""
TRIES = 20
"""Factors that are tried; five or so suffice where the organ allows."""


class Request(NamedTuple):
    """What is to be drawn, checked."""

    indices: Sequence[int]
    fractions: Sequence[float | None]
    """λ of each; None is the default."""
    volume: tuple[int, int, int] | None
    """(z, y, x)."""
    spacing: Triple
    batched: bool


def draw_plans(
    config: LesionConfig,
    seed: int,
    request: Request,
    organs: Sequence[int] | None,
    masks: npt.NDArray[np.bool_] | None,
    stages: CpuStages,
) -> list[LesionPlan]:
    """Draw each sample of a request.

    Parameters
    ----------
    config, seed, request
        What to draw.
    organs : sequence of int, optional
        Voxels of each mask, for samples without λ; 1 is taken where they are unknown.
    masks : (b, z, y, x) bool array, optional
        The masks, for a configuration with a `load`.
    stages : CpuStages
        What measures a load.
    """
    samples = [plan_uniforms(seed, index, OF_SAMPLE, 1, UNIFORMS_PER_BLOB)[0] for index in request.indices]
    kinds = [draw_part(config, u) for u in samples]
    fractions = [
        default_fraction(kinds[k], request.spacing, None if organs is None else organs[k], samples[k])
        if fraction is None
        else fraction
        for k, fraction in enumerate(request.fractions)
    ]

    def draw(
        part: LesionConfig, own: Sequence[int], of_numbers: Sequence[float], least: int = 0
    ) -> list[LesionPlan]:
        asked = request._replace(indices=[request.indices[k] for k in own])
        chosen = [samples[k] for k in own], [fractions[k] for k in own]
        return _draw(part, seed, asked, *chosen, of_numbers, least)

    plans: dict[int, LesionPlan] = {}
    for part in config.parts:  # the samples of a kind together
        own = [k for k, kind in enumerate(kinds) if kind is part]
        if config.mixture and not own:
            continue
        if part.load is None:
            plans.update(zip(own, draw(part, own, [fractions[k] for k in own]), strict=True))
        else:
            assert masks is not None
            plans |= {k: meet_load(part, partial(draw, part, [k], least=1), masks[k], stages) for k in own}
    return [plans[k] for k in range(len(samples))]


def default_fraction(config: LesionConfig, spacing: Triple, organ: int | None, u: Floats) -> float:
    """Return λ where nobody says it, of a sample with uniforms u; 1 for an organ that nobody has counted.

    The organ against the paper's largest slab, but no less than gives the sample a lesion: N = round(U[5λ,
    10λ]) is 0 below 0.05, and small patches would never have one.
    """
    if organ is None:
        return 1.0
    voxel = math.prod(spacing) / PAPER_VOXEL if config.lengths == "mm" else 1.0
    return min(1.0, max(least_fraction(config, u), organ * voxel / PAPER_LUNG, 1.0 / MOST_VOXELS))


def _draw(
    config: LesionConfig,
    seed: int,
    request: Request,
    samples: Sequence[Floats],
    fractions: Sequence[float],
    of_numbers: Sequence[float],
    least: int = 0,
) -> list[LesionPlan]:
    """Draw plans of uniforms, λ and the λ that their numbers follow; `least` blobs at least."""
    kinds, words = [], []
    for index, u, fraction in zip(request.indices, samples, of_numbers, strict=True):
        numbers = draw_numbers(config, u, fraction)
        if sum(numbers) < least:
            numbers[int(np.argmax([kind.mean_count for kind in config.blob_classes][: len(numbers)]))] = least
        words.append(plan_uniforms(seed, index, 0, sum(numbers), UNIFORMS_PER_BLOB))
        kinds.append(draw_kinds(config, numbers, words[-1]))
    records = draw_blobs(config, np.concatenate(kinds), np.concatenate(words))
    scale = request.spacing if config.lengths == "mm" else (1.0, 1.0, 1.0)
    check_edge(config.edge, scale)
    common = {
        "seed": seed,
        "shape": request.volume,
        "scale": scale,
        "connectivity": config.connectivity,
        "tau": config.tau,
        "mean_threshold": config.texture.mean_threshold,
        "mode": config.mode,
        "edge": config.edge,
        "value_range": (0.0, 1.0) if config.value_range is None else config.value_range,
    }
    plans, end = [], 0
    for index, fraction, u, own in zip(request.indices, fractions, samples, kinds, strict=True):
        first, end = end, end + len(own)
        records["component"][first:end] = np.arange(len(own))
        load = None if config.load is None else draw_load(config.load, u)
        own_fields = {"index": index, "lung_fraction": float(fraction), "load": load}
        plans.append(LesionPlan.of_records(records[first:end], **common, **own_fields))
    return plans


def meet_load(
    config: LesionConfig,
    draw: Callable[[Sequence[float]], list[LesionPlan]],
    mask: npt.NDArray[np.bool_],
    stages: CpuStages,
) -> LesionPlan:
    """Find the plan whose lesions fill its `load` of the organ, as nearly as its blobs can.

    Parameters
    ----------
    config : LesionConfig
        Whose classes the blobs are of.
    draw : callable
        Draws the sample for a λ, each of a sequence of one; a blob at least.
    mask : (z, y, x) bool array
        The organ; where it is empty, the plan is as drawn.
    stages : CpuStages
        What measures.
    """
    (plan,) = draw([1.0])
    organ = int(np.count_nonzero(mask))
    if organ == 0:
        return plan
    (plan,) = draw([_fraction(config, plan, organ)])
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
