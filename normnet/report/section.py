"""What the page shows of one case: its CT and maps read, measured, doubted and drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.io import Scan, read_ct, read_mask
from normnet.reasons import FORESEEN, hear, reason
from normnet.records import Record
from normnet.report.cases import Place
from normnet.report.checks import Concern, doubt_maps, doubt_numbers
from normnet.report.pictures import curve, histogram
from normnet.report.slices import LESION, finding_pictures

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
        With `failure` set where CT or maps are missing, damaged, or do not fit each other.
    """
    warned = record.get("warnings", ())
    concerns = [*doubt_numbers(record["volumes"], _slice_mm(record)), *_told(warned)]
    if not count:
        return Section(concerns)
    try:
        if not place.path.exists():
            raise FileNotFoundError(f"{place.path}: no such file or folder; {place.hint}")
        with hear() as said:
            ct = read_ct(place.path, place.series)
            lung, lesions = (read_mask(folder / record["files"][kind], ct) for kind in ("lung", "lesions"))
        concerns += _told(text for text in said if text not in warned)
        if not lung.any():
            raise ValueError(f"{folder / record['files']['lung']}: the lung map must not be empty")
        return _drawn(record, concerns, ct, lesions, lung, count)
    except Exception as error:
        return Section(concerns, failure=reason(None if isinstance(error, FORESEEN) else place.path, error))


def _told(warnings: Iterable[str]) -> list[Concern]:
    return [Concern("warned of", text) for text in warnings]


def _drawn(
    record: Record, concerns: Sequence[Concern], ct: Scan, lesions: Mask, lung: Mask, count: int
) -> Section:
    """Measure and draw a case; arrays are (Z, Y, X) on the CT's grid."""
    z_mm, y_mm, x_mm = ct.spacing
    slices, rows, columns = ct.hu.shape
    lung_cm2, cm2 = (np.count_nonzero(m, axis=(1, 2)) * (y_mm * x_mm / 100) for m in (lung, lesions))
    outside = ct.hu[lung & ~lesions]
    positions = _positions(ct)
    pictures = []
    for z, picture in finding_pictures(ct.hu, lesions, lung, ct.spacing, count=count):
        found = f"lesions {cm2[z]:.1f} cm², {_percent(cm2[z], lung_cm2[z])} of the lungs in it"
        where = f"slice {z} of 0–{slices - 1} from the feet, z = {positions[z]:.1f} mm"
        pictures.append((f"{where}: {found if cm2.any() else 'no lesions in this case'}", picture))
    values = {"lungs outside lesions": outside, "lesions": ct.hu[lesions]}
    drawn = histogram(values, xlabel="HU", ylabel="share of voxels", bins=HU_BINS, range=HU_RANGE)
    each = "lungs and lesions, as shares of the voxels of each" if cm2.any() else "lungs"
    charts = [(f"CT numbers of {each}", drawn)]
    if cm2.any():
        inside = np.flatnonzero(lung_cm2 + cm2)
        shown = slice(inside[0], inside[-1] + 1)
        line = {"lesions": (positions[shown], cm2[shown])}
        labels = {"xlabel": "z of the slice (mm), feet to head", "ylabel": "lesion area (cm²)"}
        drawn = curve(line, **labels, colours=[LESION])
        charts.append(("Area of the lesions in every slice of the lungs", drawn))
    facts = f"{slices} slices, {z_mm:.2f} mm apart, {rows} × {columns} pixels of {y_mm:.2f} × {x_mm:.2f} mm"
    more = doubt_maps(record["volumes"], lung_cm2, cm2, z_mm, outside)
    return Section([*concerns, *more], facts, pictures, charts)


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
