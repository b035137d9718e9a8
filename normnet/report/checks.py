"""What a result without known truth can be doubted for: limits, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

LUNG_ML = (1500.0, 10_500.0)
"""Both lungs of an adult, ml, by the reference values of Hall et al., Eur Respir J 2021;57:2000289. Above:
the 95th percentile of total lung capacity in men of 2.0 m, 10.5 l (median 8.8 l). Below: the 5th of what
women of 1.5 m keep after breathing out at rest, 1.5 l (median 2.1 l); a chest CT is taken breathed in."""
SMALLER_SIDE = 1 / 3
"""Share of the smaller lung. The left one holds about 45 %; with less than half of the other's volume a lung
is collapsed, displaced or cut off, or its mask has a hole."""
THICK_MM = 5.0
"""Slice distance. The network was trained on 1 mm: thicker slices are interpolated (docs/limits.md)."""
LARGE_PERCENT = 50.0
"""Lesions in percent of both lungs: 47 of the 1,110 patients of MosMedData, suspected of COVID-19, have more
(its grades CT-3 and CT-4; Morozov et al., arXiv:2005.06465)."""
CUT_SHARE = 0.1
"""Lung in the first or last slice, as a share of the slice with most lung. Apex and recess taper to nothing
within the scan; a lung that ends wider is cut off by it."""
DENSE_HU = -500.0
"""Median of the lung outside the lesions. Inflated lung lies near -850 HU; from this value on the paper calls
a voxel bright (III-D)."""
CHANGED = 1e-3
"""Relative difference of volumes in a record and its maps: float32 spacings in files differ by 1e-7."""

DIFFER = "lungs differ"
"""Tag of a concern: thresholds find other lungs than the lung network."""


class Concern(NamedTuple):
    """Something that must be looked at."""

    tag: str
    """Two or three words, for a table."""
    text: str
    """A sentence with the value and the limit."""


def told(warnings: Iterable[str]) -> list[Concern]:
    """Make concerns of what was warned of when a case was made or read."""
    return [Concern(DIFFER if w.startswith("the lung network has ") else "warned of", w) for w in warnings]


def doubt_numbers(volumes: Mapping[str, float | None], slice_mm: float | None) -> list[Concern]:
    """Check what a record says.

    Parameters
    ----------
    volumes : mapping
        See `normnet.output.VOLUMES`: ml and percent.
    slice_mm : float, optional
        Distance of the slices in mm.

    Returns
    -------
    list of Concern
    """
    found = []
    both, percent = volumes.get("lung_ml"), volumes.get("percent")
    low, high = LUNG_ML
    if both is not None and not low <= both <= high:
        found.append(
            Concern(
                "lung volume",
                f"The lungs measure {both:,.0f} ml; an adult's hold {low:,.0f} to {high:,.0f} ml. Is the "
                "whole chest in the scan, and does the outline follow the lungs?",
            )
        )
    found.extend(_doubt_sides(volumes.get("right_lung_ml"), volumes.get("left_lung_ml")))
    if percent is not None and percent > LARGE_PERCENT:
        found.append(
            Concern(
                "large share",
                f"{percent:.0f} % of the lungs are marked, more than {LARGE_PERCENT:.0f} %. Shallow breath, "
                "motion or an unusual reconstruction may look like haze to the models.",
            )
        )
    if slice_mm is not None and slice_mm > THICK_MM:
        found.append(
            Concern(
                "thick slices",
                f"The slices lie {slice_mm:.1f} mm apart, more than {THICK_MM:.0f} mm: small lesions blur "
                "away, and vessels and the diaphragm may look like haze.",
            )
        )
    return found


def _doubt_sides(right: float | None, left: float | None) -> list[Concern]:
    if right is None or left is None:
        return [Concern("sides unknown", "The right and the left lung could not be told apart.")]
    if not right or not left:
        side = "right" if not right else "left"
        return [
            Concern(
                f"no {side} lung", f"No {side} lung was found; if there is one, nothing was searched in it."
            )
        ]
    if min(right, left) < SMALLER_SIDE * (right + left):
        return [
            Concern(
                "unequal lungs",
                f"The right lung measures {right:,.0f} ml, the left {left:,.0f} ml: one has less than half "
                "of the other. Is part of it missing from the outline?",
            )
        ]
    return []


def doubt_maps(
    volumes: Mapping[str, float | None],
    lung_areas: npt.NDArray[Any],
    lesion_areas: npt.NDArray[Any],
    slice_mm: float,
    outside_hu: npt.NDArray[Any],
) -> list[Concern]:
    """Check what maps and CT show.

    Parameters
    ----------
    volumes : mapping
        See `doubt_numbers`.
    lung_areas, lesion_areas : (Z,) arrays
        cm² per slice, from the feet.
    slice_mm : float
        Distance of the slices in mm.
    outside_hu : (n,) array
        HU of the lung voxels outside the lesions.

    Returns
    -------
    list of Concern
    """
    found = []
    ends = [
        name
        for name, area in (("lower", lung_areas[0]), ("upper", lung_areas[-1]))
        if _wide(area, lung_areas)
    ]
    if ends:
        found.append(
            Concern(
                "cut off",
                f"The lungs reach the {' and the '.join(ends)} end of the scan: it does not cover them, and "
                "what lies beyond is not counted.",
            )
        )
    if outside_hu.size and (median := float(np.median(outside_hu))) > DENSE_HU:
        found.append(
            Concern(
                "dense lungs",
                f"Half of the lung outside the lesions is above {median:.0f} HU; inflated lung lies near "
                "-850 HU. Does the outline follow the lungs?",
            )
        )
    measured = {"lung_ml": lung_areas, "lesion_ml": lesion_areas}
    for name, areas in measured.items():
        recorded, now = volumes.get(name), float(areas.sum()) * slice_mm / 10.0
        if recorded is not None and abs(now - recorded) > CHANGED * max(now, recorded):
            found.append(
                Concern(
                    "maps changed",
                    f"The {name.removesuffix('_ml')} map holds {now:.2f} ml, but {recorded:.2f} ml were "
                    "measured when it was written: it was changed since, and the numbers here were not.",
                )
            )
    return found


def doubt_lungs(lung: npt.NDArray[Any], classical: npt.NDArray[Any], voxel_ml: float) -> Concern:
    """Tell how the lungs of the network and those by thresholds differ.

    Parameters
    ----------
    lung, classical : (Z, Y, X) bool arrays
        By the network, which were searched; by thresholds, empty where these find none.
    voxel_ml : float
        Volume of a voxel.

    Returns
    -------
    Concern
    """
    shared = int(np.count_nonzero(lung & classical))
    more, less = ((int(np.count_nonzero(m)) - shared) * voxel_ml for m in (lung, classical))
    if not classical.any():
        found = f"Thresholds find no lung where the lung network has {more:,.0f} ml"
    else:
        found = (
            f"The lung network and thresholds differ by {more + less:,.0f} ml: {more:,.0f} ml belong to the "
            f"network's lungs alone, {less:,.0f} ml to those by thresholds"
        )
    return Concern(
        DIFFER,
        f"{found}. Thresholds lose dense disease at the pleura, a network may be wrong: the pictures show "
        "both outlines.",
    )


def _wide(area: float, areas: Sequence[float] | npt.NDArray[Any]) -> bool:
    return bool(area > CUT_SHARE * max(areas))
