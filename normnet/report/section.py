"""What the page shows of one case: its CT and maps read, measured, doubted and drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.io import Scan, read_ct, read_mask
from normnet.cases import FORESEEN, hear, reason
from normnet.output import Record
from normnet.report.cases import Place
from normnet.report.checks import DIFFER, Concern, doubt_lungs, doubt_maps, doubt_numbers, told
from normnet.report.pictures import curve, histogram
from normnet.report.slices import LESION, finding_pictures, most_apart

HU_RANGE, HU_BINS = (-1024.0, 296.0), 60
"""Of the histogram: from air to muscle, 22 HU a bin. Bins of whole HU hold equally many values each."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Section:
    """What the page says about a case beside its record."""

    concerns: list[Concern] = field(default_factory=list)
    """What must be looked at."""
    facts: str = ""
    """Size of the CT."""
    pictures: list[tuple[str, bytes]] = field(default_factory=list)
    """Captions and PNG of slices, most lesion first."""
    charts: list[tuple[str, bytes]] = field(default_factory=list)
    """Captions and PNG of histogram and curve."""
    compared: bool = False
    """Whether the pictures show the lungs by thresholds, too."""
    failure: str | None = None
    """Why there is nothing but volumes."""


def look(folder: Path, record: Record, place: Place, count: int) -> Section:
    """Look at a case; whatever is wrong with it, the others are not to wait.

    Parameters
    ----------
    folder : Path
        Where the maps are.
    record : dict
        From `finished_cases`.
    place : Place
        Where the CT is.
    count : int
        Slices to show at most; with 0 nothing is read.

    Returns
    -------
    Section
        With `failure` set where CT or maps are missing, damaged, or do not fit each other. Of the lungs by
        thresholds that is a concern: the others can be shown without them.
    """
    warned = record.get("warnings", ())
    concerns = [*doubt_numbers(record["volumes"], _slice_mm(record)), *told(warned)]
    if not count:
        return Section(concerns)
    try:
        if not place.path.exists():
            raise FileNotFoundError(f"{place.path}: no such file or folder; {place.hint}")
        with hear() as said:
            ct = read_ct(place.path, place.series)
            lung, lesions = (read_mask(folder / record["files"][kind], ct) for kind in ("lung", "lesions"))
            classical, problems = _classical(folder, record, ct)
        concerns += [*told(text for text in said if text not in warned), *problems]
        if not lung.any():
            raise ValueError(f"{folder / record['files']['lung']}: the lung map must not be empty")
        return _drawn(record, concerns, ct, lesions, lung, count, classical)
    except Exception as error:
        return Section(concerns, failure=reason(None if isinstance(error, FORESEEN) else place.path, error))


def _classical(folder: Path, record: Record, ct: Scan) -> tuple[Mask | None, list[Concern]]:
    """Read the lungs by thresholds, where a case has them; or tell why they cannot be drawn."""
    name = record["files"].get("classical")
    if name is None:
        return None, []
    try:
        return read_mask(folder / name, ct), []
    except Exception as error:
        why = reason(None if isinstance(error, FORESEEN) else folder / name, error)
        return None, [Concern("no second outline", f"The lungs by thresholds are not drawn: {why}")]


def _drawn(
    record: Record,
    concerns: Sequence[Concern],
    ct: Scan,
    lesions: Mask,
    lung: Mask,
    count: int,
    classical: Mask | None,
) -> Section:
    """Measure and draw a case; arrays are (Z, Y, X) on the CT's grid."""
    z_mm, y_mm, x_mm = ct.spacing
    slices, rows, columns = ct.hu.shape
    lung_cm2, cm2 = (_areas(mask, ct) for mask in (lung, lesions))
    outside = ct.hu[lung & ~lesions]
    pictures = _slices(ct, lesions, lung, count, classical)
    values = {"lungs outside lesions": outside, "lesions": ct.hu[lesions]}
    drawn = histogram(values, xlabel="HU", ylabel="share of voxels", bins=HU_BINS, range=HU_RANGE)
    each = "lungs and lesions, as shares of the voxels of each" if cm2.any() else "lungs"
    charts = [(f"CT numbers of {each}", drawn)]
    if cm2.any():
        inside = np.flatnonzero(lung_cm2 + cm2)
        shown = slice(inside[0], inside[-1] + 1)
        line = {"lesions": (_positions(ct)[shown], cm2[shown])}
        labels = {"xlabel": "z of the slice (mm), feet to head", "ylabel": "lesion area (cm²)"}
        drawn = curve(line, **labels, colours=[LESION])
        charts.append(("Area of the lesions in every slice of the lungs", drawn))
    facts = f"{slices} slices, {z_mm:.2f} mm apart, {rows} × {columns} pixels of {y_mm:.2f} × {x_mm:.2f} mm"
    more = doubt_maps(record["volumes"], lung_cm2, cm2, z_mm, outside)
    if classical is not None:
        # in place of what the record tells of the same
        concerns = [concern for concern in concerns if concern.tag != DIFFER]
        more.append(doubt_lungs(lung, classical, z_mm * y_mm * x_mm / 1000))
    return Section([*concerns, *more], facts, pictures, charts, classical is not None)


def _slices(
    ct: Scan, lesions: Mask, lung: Mask, count: int, classical: Mask | None
) -> list[tuple[str, bytes]]:
    """Draw slices of a case; captions and PNG."""
    lung_cm2, cm2 = (_areas(mask, ct) for mask in (lung, lesions))
    positions = _positions(ct)
    apart = None if classical is None else most_apart(lung, classical)
    drawn = []
    for z, picture in finding_pictures(ct.hu, lesions, lung, ct.spacing, count=count, classical=classical):
        caption = f"slice {z} of 0–{len(cm2) - 1} from the feet, z = {positions[z]:.1f} mm: "
        caption += (
            f"lesions {cm2[z]:.1f} cm², {_percent(cm2[z], lung_cm2[z])} of the lungs in it"
            if cm2.any()
            else "no lesions in this case"
        )
        if classical is not None and z == apart:
            at = slice(z, z + 1)
            one, other = _areas(lung[at] & ~classical[at], ct)[0], _areas(classical[at] & ~lung[at], ct)[0]
            caption += (
                f"; here the outlines differ most: {one:.1f} cm² lie within the blue one alone, "
                f"{other:.1f} cm² within the dashed one alone"
            )
        drawn.append((caption, picture))
    return drawn


def _areas(mask: Mask, ct: Scan) -> npt.NDArray[np.float64]:
    """Area of every slice of a mask, cm²."""
    _, y_mm, x_mm = ct.spacing
    return np.asarray(np.count_nonzero(mask, axis=(1, 2)) * (y_mm * x_mm / 100), np.float64)


def _positions(ct: Scan) -> npt.NDArray[np.float64]:
    """Z coordinate (LPS, mm) of the middle of every slice: what viewers show as its location."""
    corners = ct.grid.corners()[:, 2]  # the lowest slice's four, then the highest's
    return np.linspace(corners[:4].mean(), corners[4:].mean(), ct.hu.shape[0])


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _slice_mm(record: Record) -> float | None:
    grid: Any = record.get("grid")
    with contextlib.suppress(TypeError, ValueError, LookupError):  # no part of every record
        return float(grid["spacing"][0])
    return None
