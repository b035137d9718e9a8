"""List the DICOM series of a folder; find, check and order the slices of one, before any pixel is read.

Readers return a volume even where a slice is missing, the spacing jumps or the gantry was tilted; everything
that counts millimetres afterwards would be wrong without a word. So the headers are checked first.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lesionsynth.io.checks import FARTHEST_MM, MAX_VOXELS, SPACING_MM, Stamp, number_of
from lesionsynth.io.elements import Damage, Elements, check_slice, read_elements
from lesionsynth.strict import name_of, rule_of, shown, some_of

_ORIENTATION, _POSITION, _PIXEL_SPACING = "0020|0037", "0020|0032", "0028|0030"
_MODALITY, _FRAMES, _SAMPLES, _TILT, _SERIES = "0008|0060", "0028|0008", "0028|0002", "0018|1120", "0020|000e"
_IMAGE_TYPE, _DESCRIPTION = "0008|0008", "0008|103e"
_ROWS, _COLUMNS = "0028|0010", "0028|0011"
_SCALE = ("0028|0100", "0028|0101", "0028|0103", "0028|1052", "0028|1053")
_RESCALE = {"0028|1052": "RescaleIntercept", "0028|1053": "RescaleSlope"}
_SAME_DIRECTION = 1e-3  # headers carry six decimals or so; a degree of tilt is 1.7e-2
_SPACING_TOLERANCE = (
    0.02  # of the slice distance: rounding of positions to 0.01 mm passes, a missing slice never
)


@dataclass(frozen=True)
class Series:
    """Slices of one series, ordered along the slice normal.

    Attributes
    ----------
    files : tuple of str
        One file per slice, ascending along the normal.
    spacing : tuple of 3 floats
        mm between neighbouring voxels, x first.
    origin : tuple of 3 floats
        Position of the first voxel.
    direction : tuple of 9 floats
        ITK direction matrix, row-major.
    voxel_bytes : int
        Memory that its voxels take at most.
    real : bool
        Slices are scaled differently: only real numbers hold all.
    stamps : mapping of Path to Stamp
        Of the files, before they were checked.
    """

    files: tuple[str, ...]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]
    voxel_bytes: int = 0
    real: bool = False
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)


@dataclass(frozen=True)
class SeriesInfo:
    """What one DICOM series of a folder is, from its headers.

    Attributes
    ----------
    uid : str
        SeriesInstanceUID.
    description : str
        SeriesDescription; empty where the scanner wrote none.
    modality : str
        CT, MR, SEG, ...; empty where no header could be read.
    slices : int
        Files of the series.
    localizer : bool
        A scout image by its ImageType.
    problem : str
        Why it cannot be read as a CT volume; empty where it can.
    files : tuple of str
        Paths of its files.
    """

    uid: str
    description: str
    modality: str
    slices: int
    localizer: bool
    problem: str
    files: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def usable(self) -> bool:
        """It can be read as a CT volume."""
        return not self.problem

    def __str__(self) -> str:
        """One line: UID, modality, slices, description and what is wrong with it."""
        parts = [self.modality[:20] or "no modality", f"{self.slices} slices"]
        if self.description:
            parts.append(repr(self.description[:64]))
        return f"{_short(self.uid)} ({', '.join(parts)}{'; ' + self.problem if self.problem else ''})"


def find_series(path: Path, series: str | None = None) -> Series:
    """Choose the series that `path` means and check that it is a regular, untilted CT volume.

    Parameters
    ----------
    path : Path
        A folder, or one DICOM file (the series it belongs to).
    series : str, optional
        SeriesInstanceUID. Omitted: the one that `largest_series` chooses; a warning names it where there are
        several.

    Raises
    ------
    ValueError
        No DICOM, no series of this UID, not CT, a localizer, multi-frame, colour, fewer than two slices,
        differing orientation, missing or repeated slices, irregular spacing, gantry tilt; a file that is
        damaged and belongs to the series, or may belong to it.
    """
    folder = path if path.is_dir() else path.parent
    found = _files_by_series(folder)
    if path.is_dir() and not found:
        raise ValueError(f"{name_of(path)}: a folder must hold the files of a DICOM series, found none")
    if not path.is_dir():
        own = next((uid for uid, group in found.items() if str(path) in group.names and uid), None)
        if own is None:
            told = next(
                (text for group in found.values() for name, text in group.damaged if name == str(path)), ""
            )
            raise ValueError(f"{name_of(path)}: {told or 'not a readable DICOM slice of a series'}")
        if series is not None and series != own:
            raise ValueError(
                f"{name_of(path)}: series must be that of the file, {_short(own)}, got "
                f"{_short(name_of(series))}"
            )
        series = own
    if series is None and len(found) == 1:
        (series,) = found
    elif series is None:
        infos = [_info(folder, uid, group) for uid, group in found.items()]
        series = largest_series(infos).uid
        there = some_of("; ", [str(info) for info in _largest_first(infos)])
        warnings.warn(
            f"{name_of(path)}: several DICOM series: {there}; reading {_short(series)}", stacklevel=5
        )
    elif series not in found:
        names = some_of(", ", [_short(uid) for uid in sorted(found)])
        raise ValueError(f"{name_of(path)}: series must be one of {names}, got {_short(name_of(series))}")
    return _check_series(path, found[series])


def list_series(folder: Path) -> list[SeriesInfo]:
    """List the series of a folder, the one of most files first, between equals by UID."""
    return _largest_first([_info(folder, uid, group) for uid, group in _files_by_series(folder).items()])


def largest_series(infos: Sequence[SeriesInfo]) -> SeriesInfo:
    """Choose the series that is read where none is named.

    Parameters
    ----------
    infos : sequence of SeriesInfo
        At least one, in any order.

    Returns
    -------
    SeriesInfo
        The usable one of most slices; without any, the largest CT that is no localizer, or else the largest.
        Between equals, the one of the smaller UID.

    Raises
    ------
    ValueError
        `infos` is empty.
    """
    for candidates in (
        [info for info in infos if info.usable],
        [info for info in infos if info.modality == "CT" and not info.localizer],
        infos,
    ):
        if candidates:
            return _largest_first(candidates)[0]
    raise ValueError("infos must hold at least one series, got none")


def _short(uid: str) -> str:
    return uid if len(uid) <= 64 else f"{uid[:64]}..."


def _largest_first(infos: Sequence[SeriesInfo]) -> list[SeriesInfo]:
    # between equals the smaller UID, so that the choice does not depend on the file system
    return sorted(infos, key=lambda info: (-info.slices, info.uid))


@dataclass
class _Group:
    """Files of one series."""

    slices: list[tuple[str, Elements]] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Name, and what is wrong."""

    @property
    def names(self) -> list[str]:
        return [name for name, _ in (*self.slices, *self.damaged)]


def _files_by_series(folder: Path) -> dict[str, _Group]:
    """Walk through every file of a folder. One that is damaged before it tells its series may be of any."""
    groups: dict[str, _Group] = {}
    homeless: list[tuple[str, str]] = []
    # macOS leaves a ._NAME beside every file that it copies
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name[0] != "." and _is_regular(entry))
    for name in names:
        if name.upper() == "DICOMDIR":
            continue
        file = folder / name
        try:
            elements = read_elements(file)
        except Damage as damage:
            if damage.series:
                groups.setdefault(damage.series, _Group()).damaged.append((str(file), str(damage)))
            else:
                homeless.append((str(file), f"{damage}; it may be a slice of any series in the folder"))
        except (OSError, ValueError) as error:
            homeless.append((str(file), getattr(error, "strerror", None) or str(error)))
        else:
            # without a series: what lists the files of a disk
            if elements is not None and (uid := elements.values.get(_SERIES, "")):
                groups.setdefault(uid, _Group()).slices.append((str(file), elements))
    if homeless and not groups:
        groups[""] = _Group()
    for group in groups.values():
        group.damaged.extend(homeless)
    return groups


def _is_regular(entry: os.DirEntry[str]) -> bool:
    """Leave out what leads nowhere, too: a link to itself, or to what may not be looked at."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _info(folder: Path, uid: str, group: _Group) -> SeriesInfo:
    problem = ""
    try:
        _check_series(folder, group)
    except ValueError as error:
        problem = rule_of(error, folder).removeprefix(f"{name_of(folder)}{os.sep}")
    head = group.slices[0][1].values if group.slices else {}
    return SeriesInfo(
        uid,
        head.get(_DESCRIPTION, ""),
        head.get(_MODALITY, ""),
        len(group.slices),
        _is_localizer(head),
        problem,
        tuple(name for name, _ in group.slices) or tuple(group.names),
    )


def _is_localizer(header: Mapping[str, str]) -> bool:
    return "LOCALIZER" in header.get(_IMAGE_TYPE, "").upper().split("\\")


def _check_series(path: Path, group: _Group) -> Series:
    for name, elements in group.slices:
        _check_slice(name, elements.values)
    if group.damaged:
        name, rule = group.damaged[0]
        more = f"; {len(group.damaged) - 1} more such files" if len(group.damaged) > 1 else ""
        raise ValueError(f"{name_of(name)}: {rule}{more}")
    for tag, what in _RESCALE.items():
        lacking = [name for name, elements in group.slices if tag not in elements.values]
        if 0 < len(lacking) < len(group.slices):
            raise ValueError(f"{name_of(lacking[0])}: {what} must be there, as in other slices of the series")
    total = 0
    for name, elements in group.slices:
        try:
            if elements.encapsulated:
                elements = read_elements(Path(name), frame=True) or elements
            total += check_slice(elements)
        except Damage as damage:
            raise ValueError(f"{name_of(name)}: {damage}") from None
    if total > 8 * MAX_VOXELS:
        raise ValueError(f"{name_of(path)}: a volume must have at most {MAX_VOXELS} voxels, got {total // 8}")
    found = _order(path, [(name, elements.values) for name, elements in group.slices])
    scales = {tuple(e.values.get(tag, "") for tag in _SCALE) for _, e in group.slices}
    stamps = {Path(name): elements.stamp for name, elements in group.slices}
    return replace(found, voxel_bytes=total, real=len(scales) > 1, stamps=stamps)


def _numbers(header: Mapping[str, str], tag: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    values = np.array([number_of(part) for part in header.get(tag, "").split("\\")])
    return values if values.size == count and bool((np.abs(values) <= FARTHEST_MM).all()) else None


def _check_slice(name: str, header: Mapping[str, str]) -> None:
    modality = header.get(_MODALITY, "")
    if modality != "CT":
        raise ValueError(f"{name_of(name)}: the DICOM modality must be CT, got {modality[:20] or 'none'}")
    if _is_localizer(header):
        raise ValueError(
            f"{name_of(name)}: a CT volume must be of axial slices, got a localizer (scout image)"
        )
    frames = header.get(_FRAMES, "1")
    if frames not in ("", "1"):
        raise ValueError(
            f"{name_of(name)}: NumberOfFrames must be 1, got {shown(frames)}: multi-frame DICOM is not read; "
            "convert it to NIfTI first"
        )
    if header.get(_SAMPLES, "1") not in ("", "1"):
        raise ValueError(f"{name_of(name)}: a CT slice has one sample per pixel, got {header[_SAMPLES]}")


def _order(path: Path, headers: list[tuple[str, Mapping[str, str]]]) -> Series:
    if len(headers) < 2:
        raise ValueError(
            f"{name_of(path)}: a CT volume needs at least two slices, the series has {len(headers)}"
        )
    placed = []
    for name, header in headers:
        orientation, position = _numbers(header, _ORIENTATION, 6), _numbers(header, _POSITION, 3)
        if orientation is None or position is None:
            tag = _ORIENTATION if orientation is None else _POSITION
            what = "six numbers" if orientation is None else f"three numbers up to {FARTHEST_MM:g}"
            raise ValueError(
                f"{name_of(name)}: Image{'Orientation' if orientation is None else 'Position'}Patient "
                f"must be {what}, got {shown(header.get(tag) or 'none')}"
            )
        spacing = _numbers(header, _PIXEL_SPACING, 2)
        if spacing is None or spacing.min() < SPACING_MM[0] or spacing.max() > SPACING_MM[1]:
            low, high = SPACING_MM
            got = shown(header.get(_PIXEL_SPACING) or "none")
            raise ValueError(
                f"{name_of(name)}: PixelSpacing must be two numbers from {low:g} to {high:g} mm, got {got}"
            )
        placed.append((name, orientation, position, (*spacing, header[_ROWS], header[_COLUMNS])))
    orientation, pixels = placed[0][1], placed[0][3]
    for name, other, _, other_pixels in placed:
        if np.abs(other - orientation).max() > _SAME_DIRECTION or other_pixels != pixels:
            raise ValueError(
                f"{name_of(name)}: all slices must share one orientation, size and pixel spacing; "
                "this one differs"
            )
    row, column = orientation[:3], orientation[3:]
    normal = np.cross(row, column)
    lengths = [float(np.linalg.norm(axis)) for axis in (row, column, normal)]
    if max(abs(length - 1) for length in lengths) > 1e-2:  # cosines with three decimals stay below this
        raise ValueError(
            f"{name_of(path)}: ImageOrientationPatient must be two orthogonal unit vectors, got "
            f"{', '.join(f'{v:g}' for v in orientation)}"
        )
    placed.sort(key=lambda item: float(item[2] @ normal))
    positions = np.array([item[2] for item in placed])
    distance = _regular_distance(path, positions @ normal)
    drift = positions[-1] - positions[0]
    sideways = drift - (drift @ normal) * normal
    tilt = _numbers(headers[0][1], _TILT, 1)
    # a real tilt of one degree moves the last slice sideways by 1.7 % of the length
    if np.linalg.norm(sideways) > 0.01 * abs(drift @ normal):
        raise ValueError(
            f"{name_of(path)}: gantry tilt (slices shift sideways by {np.linalg.norm(sideways):.1f} mm, "
            f"header tilt {0 if tilt is None else tilt[0]:g} degrees) is not supported; resample the series "
            "to upright slices first"
        )
    direction = np.stack([row, column, normal], axis=1)
    # PixelSpacing is of rows first; a reader may look elsewhere, by the class of the slices
    x, y, z = (float(v) for v in placed[0][2])
    return Series(
        tuple(item[0] for item in placed),
        (float(pixels[1]), float(pixels[0]), distance),
        (x, y, z),
        tuple(float(v) for v in direction.ravel()),
    )


def _regular_distance(path: Path, along: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    steps = np.diff(along)
    distance = float(np.median(steps))
    if float(steps.min()) <= 1e-3:  # mm
        at = int(np.argmin(steps))
        raise ValueError(
            f"{name_of(path)}: two slices lie at the same position ({along[at]:.2f} mm along the normal)"
        )
    # against the smallest step: with most slices missing in turn, the median would be the hole
    base = float(steps.min())
    wrong = np.flatnonzero(np.abs(steps - base) > max(_SPACING_TOLERANCE * base, 0.011))
    if wrong.size:
        at = int(wrong[0])
        ratio = steps[at] / base
        kind = "missing slices" if abs(ratio - round(ratio)) < 0.1 else "irregular slice spacing"
        raise ValueError(
            f"{name_of(path)}: {kind}: {steps[at]:.2f} mm between slices {at} and {at + 1}, {base:.2f} mm "
            "elsewhere"
        )
    return distance
