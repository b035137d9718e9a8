"""List the DICOM series of a folder; find, check and order the slices of one, before any pixel is read.

Readers return a volume even where a slice is missing, the spacing jumps or the gantry was tilted; everything
that counts millimetres afterwards would be wrong without a word. So the headers are checked first.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_ORIENTATION, _POSITION, _PIXEL_SPACING = "0020|0037", "0020|0032", "0028|0030"
_MODALITY, _FRAMES, _SAMPLES, _TILT, _SERIES = "0008|0060", "0028|0008", "0028|0002", "0018|1120", "0020|000e"
_IMAGE_TYPE, _DESCRIPTION = "0008|0008", "0008|103e"
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
    slice_distance : float
        mm between neighbouring slices.
    direction : tuple of 9 floats
        ITK direction matrix, row-major.
    """

    files: tuple[str, ...]
    slice_distance: float
    direction: tuple[float, ...]


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
        parts = [self.modality or "no modality", f"{self.slices} slices"]
        if self.description:
            parts.append(repr(self.description))
        return f"{self.uid} ({', '.join(parts)}{'; ' + self.problem if self.problem else ''})"


def find_series(path: Path, sitk: Any, series: str | None = None) -> Series:
    """Choose the series that `path` means and check that it is a regular, untilted CT volume.

    Parameters
    ----------
    path : Path
        A folder, or one DICOM file (the series it belongs to).
    sitk : module
        SimpleITK.
    series : str, optional
        SeriesInstanceUID. Omitted: the one that `largest_series` chooses; a warning names it where there are
        several.

    Raises
    ------
    ValueError
        No DICOM, no series of this UID, not CT, a localizer, multi-frame, colour, fewer than two slices,
        differing orientation, missing or repeated slices, irregular spacing, gantry tilt.
    """
    folder = path if path.is_dir() else path.parent
    names = _files_by_series(folder, sitk)
    if path.is_dir() and not names:
        raise ValueError(f"{path}: a folder must hold the files of a DICOM series, found none")
    if not path.is_dir():
        own = _header(path, sitk).get(_SERIES, "")
        if own not in names:
            raise ValueError(f"{path}: not a readable DICOM slice of a series")
        if series is not None and series != own:
            raise ValueError(f"{path}: series must be that of the file, {own}, got {series}")
        series = own
    if series is None and len(names) == 1:
        (series,) = names
    elif series is None:
        infos = [_info(folder, uid, files, sitk) for uid, files in names.items()]
        series = largest_series(infos).uid
        there = "; ".join(str(info) for info in _largest_first(infos))
        warnings.warn(f"{path}: several DICOM series: {there}; reading {series}", stacklevel=5)
    elif series not in names:
        raise ValueError(f"{path}: series must be one of {', '.join(sorted(names))}, got {series}")
    return _check_series(path, names[series], sitk)


def list_series(folder: Path, sitk: Any) -> list[SeriesInfo]:
    """List the series of a folder, the one of most files first, between equals by UID."""
    return _largest_first(
        [_info(folder, uid, files, sitk) for uid, files in _files_by_series(folder, sitk).items()]
    )


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


def _largest_first(infos: Sequence[SeriesInfo]) -> list[SeriesInfo]:
    # between equals the smaller UID, so that the choice does not depend on the file system
    return sorted(infos, key=lambda info: (-info.slices, info.uid))


def _files_by_series(folder: Path, sitk: Any) -> dict[str, list[str]]:
    reader = sitk.ImageSeriesReader
    # macOS leaves a ._NAME beside every file that it copies
    names = {
        uid: [name for name in reader.GetGDCMSeriesFileNames(str(folder), uid) if Path(name).name[0] != "."]
        for uid in reader.GetGDCMSeriesIDs(str(folder))
    }
    return {uid: files for uid, files in names.items() if files}


def _info(folder: Path, uid: str, files: list[str], sitk: Any) -> SeriesInfo:
    head: dict[str, str] = {}
    problem = ""
    try:
        head = _header(Path(files[0]), sitk)
        _check_series(folder, files, sitk)
    except ValueError as error:
        problem = str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}{os.sep}")
    # old headers are in Latin-1, which arrives as lone surrogates
    description = head.get(_DESCRIPTION, "").encode("utf-8", "replace").decode()
    return SeriesInfo(
        uid,
        description,
        head.get(_MODALITY, ""),
        len(files),
        _is_localizer(head),
        problem,
        tuple(files),
    )


def _is_localizer(header: dict[str, str]) -> bool:
    return "LOCALIZER" in header.get(_IMAGE_TYPE, "").upper().split("\\")


def _check_series(path: Path, files: list[str], sitk: Any) -> Series:
    headers = [(name, _header(Path(name), sitk)) for name in files]
    for name, header in headers:
        _check_slice(name, header)
    return _order(path, headers)


def _header(path: Path, sitk: Any) -> dict[str, str]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{path}: not a readable DICOM file ({_last_line(error)})") from error
    return {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _numbers(header: dict[str, str], tag: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    try:
        values = np.array([float(part) for part in header.get(tag, "").split("\\")])
    except ValueError:
        return None
    return values if values.size == count and bool(np.isfinite(values).all()) else None


def _check_slice(name: str, header: dict[str, str]) -> None:
    modality = header.get(_MODALITY, "")
    if modality != "CT":
        raise ValueError(f"{name}: the DICOM modality must be CT, got {modality or 'none'}")
    if _is_localizer(header):
        raise ValueError(f"{name}: a CT volume must be of axial slices, got a localizer (scout image)")
    if int(header.get(_FRAMES, "1") or 1) > 1:
        raise ValueError(f"{name}: multi-frame DICOM is not read; convert it to NIfTI first")
    if header.get(_SAMPLES, "1") not in ("", "1"):
        raise ValueError(f"{name}: a CT slice has one sample per pixel, got {header[_SAMPLES]}")


def _order(path: Path, headers: list[tuple[str, dict[str, str]]]) -> Series:
    if len(headers) < 2:
        raise ValueError(f"{path}: a CT volume needs at least two slices, the series has {len(headers)}")
    placed = []
    for name, header in headers:
        orientation, position = _numbers(header, _ORIENTATION, 6), _numbers(header, _POSITION, 3)
        if orientation is None or position is None:
            raise ValueError(f"{name}: ImagePositionPatient and ImageOrientationPatient must be present")
        placed.append((name, orientation, position, header.get(_PIXEL_SPACING, "")))
    orientation, pixel = placed[0][1], placed[0][3]
    for name, other, _, other_pixel in placed:
        if np.abs(other - orientation).max() > _SAME_DIRECTION or other_pixel != pixel:
            raise ValueError(
                f"{name}: all slices must share one orientation and pixel spacing; this one differs"
            )
    row, column = orientation[:3], orientation[3:]
    normal = np.cross(row, column)
    if abs(np.linalg.norm(normal) - 1) > 1e-2:  # cosines with three decimals stay below this
        raise ValueError(
            f"{path}: ImageOrientationPatient must be two orthogonal unit vectors, got {orientation}"
        )
    placed.sort(key=lambda item: float(item[2] @ normal))
    positions = np.array([item[2] for item in placed])
    distance = _regular_distance(path, positions @ normal)
    drift = positions[-1] - positions[0]
    sideways = drift - (drift @ normal) * normal
    tilt = float(headers[0][1].get(_TILT) or 0)
    # a real tilt of one degree moves the last slice sideways by 1.7 % of the length
    if np.linalg.norm(sideways) > 0.01 * abs(drift @ normal):
        raise ValueError(
            f"{path}: gantry tilt (slices shift sideways by {np.linalg.norm(sideways):.1f} mm, header "
            f"tilt {tilt:g} degrees) is not supported; resample the series to upright slices first"
        )
    direction = np.stack([row, column, normal], axis=1)
    return Series(tuple(item[0] for item in placed), distance, tuple(float(v) for v in direction.ravel()))


def _regular_distance(path: Path, along: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    steps = np.diff(along)
    distance = float(np.median(steps))
    if float(steps.min()) <= 1e-3:  # mm
        at = int(np.argmin(steps))
        raise ValueError(f"{path}: two slices lie at the same position ({along[at]:.2f} mm along the normal)")
    # against the smallest step: with most slices missing in turn, the median would be the hole
    base = float(steps.min())
    wrong = np.flatnonzero(np.abs(steps - base) > max(_SPACING_TOLERANCE * base, 0.011))
    if wrong.size:
        at = int(wrong[0])
        ratio = steps[at] / base
        kind = "missing slices" if abs(ratio - round(ratio)) < 0.1 else "irregular slice spacing"
        raise ValueError(
            f"{path}: {kind}: {steps[at]:.2f} mm between slices {at} and {at + 1}, {base:.2f} mm elsewhere"
        )
    return distance
