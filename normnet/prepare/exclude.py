"""Slices to leave out of training: plain lists and LUNA16-style nodule annotations (PAPER.md IV-A)."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lesionsynth.io import CTVolume
from normnet.prepare.read import IsoGrid

Range = tuple[int, int]
Nodule = tuple[float, float, float, float]


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
            good = len(row) == 3 and 0 <= first <= last
        except (IndexError, ValueError):
            good = False
        if not good:
            raise ValueError(
                f"{path}, line {number}: must be case,first_slice,last_slice with 0 <= first <= last, "
                f"got {','.join(row)}"
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
            good = diameter > 0 and all(math.isfinite(v) for v in (x, y, z, diameter))
        except ValueError:
            good = False
        if not good:
            raise ValueError(
                f"{path}, line {number}: must be seriesuid,coordX,coordY,coordZ,diameter_mm, "
                f"got {','.join(row)}"
            )
        found.setdefault(row[0], []).append((x, y, z, diameter))
    return found


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: unreadable CSV ({error})") from error
    rows = [
        (n, [cell.strip() for cell in row]) for n, row in enumerate(csv.reader(text.splitlines()), start=1)
    ]
    return [(n, row) for n, row in rows if row and any(row) and not row[0].startswith("#")]


def nodule_slices(volume: CTVolume, nodules: Sequence[Nodule]) -> list[Range]:
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
