"""Slices to leave out of training: plain lists and LUNA16-style nodule annotations (PAPER.md IV-A).

LUNA16 is ten folders ``subset*`` of MetaImage files, with the nodules of all in ``annotations.csv``.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from lesionsynth.io import Scan, case_name
from lesionsynth.strict import name_of, rule_of, shown
from normnet.cases import Case
from normnet.prepare.grid import IsoGrid
from normnet.sheets import read_rows

Range = tuple[int, int]
Nodule = tuple[float, float, float, float]
Row = TypeVar("Row")
MOST_MM = 1e6
"""No coordinate and no nodule is as far or as large; NaN is not below it."""
MOST_SLICE = 2**31
"""No slice has such a number."""


def read_exclusions(path: Path) -> Mapping[str, list[Range]]:
    """Read a CSV of ``case,first_slice,last_slice``.

    Slices count from 0 at the feet in the file's own slices; both ends are left out. A header line may be
    there; lines that start with ``#`` are skipped.

    Raises
    ------
    ValueError
        A line does not hold a name and two integers ``0 <= first <= last``; names file and line.
    """

    def to_range(first: str, last: str) -> Range | None:
        a, b = int(first), int(last)
        return (a, b) if 0 <= a <= b < MOST_SLICE else None

    return _read(path, "case,first_slice,last_slice", " with 0 <= first <= last", to_range)


def read_annotations(path: Path) -> Mapping[str, list[Nodule]]:
    """Read LUNA16's ``seriesuid,coordX,coordY,coordZ,diameter_mm`` (world coordinates, LPS, mm).

    Raises
    ------
    ValueError
        A line does not hold a name and four numbers; names file and line.
    """

    def nodule(*cells: str) -> Nodule | None:
        x, y, z, diameter = map(float, cells)
        fits = 0 < diameter < MOST_MM and all(abs(v) < MOST_MM for v in (x, y, z))
        return (x, y, z, diameter) if fits else None

    return _read(path, "seriesuid,coordX,coordY,coordZ,diameter_mm", "", nodule)


def _read(path: Path, columns: str, rule: str, parse: Callable[..., Row | None]) -> Mapping[str, list[Row]]:
    """Read the rows of a CSV that say something, by their first cell; the others are parsed."""
    try:
        rows = read_rows(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name_of(path)}: unreadable CSV ({rule_of(error, path)})") from error
    found: dict[str, list[Row]] = defaultdict(list)
    for number, row in rows:
        key, *cells = [cell.strip() for cell in row] or [""]
        heading = number == 1 and key.lower() == columns.partition(",")[0]
        if heading or key.startswith("#") or not (key or any(cells)):
            continue
        try:
            parsed = parse(*cells)
        except (TypeError, ValueError):  # too few or too many cells, or no numbers
            parsed = None
        if parsed is None:
            got = shown(",".join([key, *cells]))
            raise ValueError(f"{name_of(path)}, line {number}: must be {columns}{rule}, got {got}")
        found[key].append(parsed)
    return found


def find_annotations(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Find the ``annotations.csv`` beside the ``subset*`` folders of LUNA16, or in the folder of these."""

    def is_subset(path: Path) -> bool:
        return re.fullmatch(r"subset\d+", path.name) is not None and path.is_dir() and any(path.glob("*.mhd"))

    roots = [
        given.resolve().parent if is_subset(given) else given.resolve()
        for given in map(Path, inputs)
        if is_subset(given) or (given.is_dir() and any(map(is_subset, given.iterdir())))
    ]
    files = dict.fromkeys(root / "annotations.csv" for root in roots)
    return [file for file in files if file.is_file()]


def match_annotations(files: Sequence[Path], cases: Sequence[Case]) -> Mapping[Case, list[Nodule]]:
    """Give each case the nodules whose ``seriesuid`` is its SeriesInstanceUID, file name or name.

    Raises
    ------
    ValueError
        An unreadable file; one of whose series none is among the cases. Where only some are missing, a
        warning says how many.
    """
    found: dict[Case, list[Nodule]] = defaultdict(list)
    for file in files:
        nodules, used = read_annotations(file), set[str]()
        for case in cases:
            for key in sorted({case.case, case_name(case.ct), case.series or case.case} & nodules.keys()):
                found[case] += nodules[key]
                used.add(key)
        missing = sorted(nodules.keys() - used)
        if nodules and not used:
            raise ValueError(
                f"{file}: annotations of another study: none of its {len(nodules)} series "
                f"({missing[0]}, ...) is among the inputs ({', '.join(case.case for case in cases[:3])}, ...)"
            )
        if missing:
            warnings.warn(
                f"{file}: {len(missing)} of {len(nodules)} annotated series are not among the inputs "
                f"({missing[0]}, ...)",
                stacklevel=3,
            )
    return found


def nodule_slices(volume: Scan, nodules: Sequence[Nodule]) -> list[Range]:
    """Slices of the file that nodules reach into, one more on each side."""
    ranges = []
    for x, y, z, diameter in nodules:
        centre = float(volume.index_of([(x, y, z)])[0, 0])
        half = diameter / 2 / volume.spacing[0] + 1
        first, last = math.floor(centre - half), math.ceil(centre + half)
        if last < 0 or first >= volume.hu.shape[0]:
            raise ValueError(
                f"{volume.path}: the annotation at ({x:g}, {y:g}, {z:g}) mm lies outside the volume"
            )
        ranges.append((max(first, 0), min(last, volume.hu.shape[0] - 1)))
    return ranges


def kept_slices(grid: IsoGrid, ranges: Sequence[Range]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Find the slices of the working grid that no left-out slice of the file contributes to.

    `ranges` are slices of the file, ends included.

    Raises
    ------
    ValueError
        A range ends beyond the file's last slice.
    """
    at = grid.source_positions(0)
    keep = np.ones(at.size, bool)
    for first, last in ranges:
        if last >= grid.source_shape[0]:
            raise ValueError(f"slices to leave out must be below {grid.source_shape[0]}, got {first}-{last}")
        # linear interpolation reaches one slice to each side
        keep &= ~((at > first - 1) & (at < last + 1))
    return keep


def runs(keep: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[Range]:
    """Find the runs ``(z0, z1)`` of True, ``z1`` excluded."""
    edges = np.flatnonzero(np.diff(keep.astype(np.int8), prepend=0, append=0))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
