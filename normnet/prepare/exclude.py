"""Slices to leave out of training: plain lists and LUNA16-style nodule annotations (PAPER.md IV-A)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lesionsynth.io import Scan
from lesionsynth.strict import name_of, rule_of, shown
from normnet.prepare.grid import IsoGrid
from normnet.sheets import read_rows

Range = tuple[int, int]
Nodule = tuple[float, float, float, float]
MOST_MM = 1e6
"""No coordinate and no nodule is as far or as large; NaN is not below it."""
MOST_SLICE = 2**31
"""No slice has such a number."""


def read_exclusions(path: Path) -> dict[str, list[Range]]:
    """Read a CSV of ``case,first_slice,last_slice``.

    Slices count from 0 at the feet in the file's own slices; both ends are left out. A header line may be
    there; lines that start with ``#`` are skipped.

    Raises
    ------
    ValueError
        A line does not hold a name and two integers ``0 <= first <= last``; names file and line.
    """
    found: dict[str, list[Range]] = {}
    for number, row in _rows(path):
        if number == 1 and row[0].lower() == "case":
            continue
        try:
            case, first, last = row[0], int(row[1]), int(row[2])
            good = len(row) == 3 and 0 <= first <= last < MOST_SLICE
        except (IndexError, ValueError):
            good = False
        if not good:
            raise ValueError(
                f"{name_of(path)}, line {number}: must be case,first_slice,last_slice with "
                f"0 <= first <= last, got {shown(','.join(row))}"
            )
        found.setdefault(case, []).append((first, last))
    return found


def read_annotations(path: Path) -> dict[str, list[Nodule]]:
    """Read LUNA16's ``seriesuid,coordX,coordY,coordZ,diameter_mm`` (world coordinates, LPS, mm).

    Raises
    ------
    ValueError
        A line does not hold a name and four numbers; names file and line.
    """
    found: dict[str, list[Nodule]] = {}
    for number, row in _rows(path):
        if number == 1 and row[0].lower() == "seriesuid":
            continue
        try:
            x, y, z, diameter = (float(value) for value in row[1:])
            good = 0 < diameter < MOST_MM and all(abs(v) < MOST_MM for v in (x, y, z))
        except ValueError:
            good = False
        if not good:
            raise ValueError(
                f"{name_of(path)}, line {number}: must be seriesuid,coordX,coordY,coordZ,diameter_mm, "
                f"got {shown(','.join(row))}"
            )
        found.setdefault(row[0], []).append((x, y, z, diameter))
    return found


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """Read the rows of a CSV that say something."""
    try:
        rows = [(n, [cell.strip() for cell in row]) for n, row in read_rows(path)]
    except (OSError, ValueError) as error:
        raise ValueError(f"{name_of(path)}: unreadable CSV ({rule_of(error, path)})") from error
    return [(n, row) for n, row in rows if any(row) and not row[0].startswith("#")]


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
    edges = np.flatnonzero(np.diff(np.concatenate([[0], keep.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
