"""Read one scan, or a mask or map that lies on its grid; write results on that grid."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth import files
from lesionsynth.commands import optional
from lesionsynth.io import child, dicom
from lesionsynth.io.checks import Header, check_geometry, file_stamp, refuse
from lesionsynth.io.dicom import SeriesInfo, find_series
from lesionsynth.io.grid import Grid
from lesionsynth.io.metaimage import check_metaimage
from lesionsynth.io.names import SUFFIXES, case_name
from lesionsynth.io.nifti import check_nifti, write_nifti
from lesionsynth.io.nrrd import check_nrrd
from lesionsynth.strict import name_of

AIR_HU = -1024
"""Lowest value kept; scanners pad with -2000 or -3024 outside the field of view."""


@dataclass(frozen=True, eq=False)
class Scan:
    """A CT volume in LPS index order.

    Attributes
    ----------
    hu : (Z, Y, X) int16 array
        Hounsfield units, at least -1024.
    spacing : (3,) floats
        Voxel size in mm, axis order z, y, x.
    path : Path
        Where it was read from.
    grid : Grid
        The file's own geometry.
    series : str or None
        SeriesInstanceUID, of DICOM.
    files : tuple of Path
        What was read: the file, or the slices of the series from the first along its normal to the last.
    warnings : tuple of str
        What the reader decided and the user should know; warned of as well.
    """

    hu: npt.NDArray[np.int16]
    spacing: tuple[float, float, float]
    path: Path
    grid: Grid
    series: str | None = None
    files: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """File or folder name without the format's suffix."""
        return case_name(self.path)

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """Index (z, y, x) of `hu` to RAS mm (x, y, z) as a (4, 4) matrix: what nibabel and MONAI take."""
        corners = np.array([-1.0, -1.0, 1.0]) * self.grid.corners()
        ends = corners[[0, 4, 2, 1]]  # the first voxel, and the last along z, y and x
        out = np.eye(4)
        out[:3, 3] = ends[0]
        out[:3, :3] = (ends[1:] - ends[0]).T / (np.array(self.hu.shape) - 1)
        return out

    def index_of(self, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """LPS coordinates (n, 3: x, y, z) in mm to voxel positions (n, 3: z, y, x) in this volume.

        LUNA16's annotations are such coordinates.
        """
        cosines = np.array(self.grid.direction).reshape(3, 3)
        offset = np.atleast_2d(np.asarray(points, float)) - np.array(self.grid.origin)
        index = (offset @ np.linalg.inv(cosines).T) / np.array(self.grid.spacing)  # file order x, y, z
        out: npt.NDArray[np.float64] = np.empty_like(index)
        for place, (axis, flip) in enumerate(zip(self.grid.axes, self.grid.flips, strict=True)):
            along = index[:, 2 - axis]
            out[:, place] = self.grid.size[2 - axis] - 1 - along if flip else along
        return out

    def write_like(self, array: npt.NDArray[Any], path: str | os.PathLike[str]) -> Path:
        """Write an array of this volume's shape as NIfTI on the input file's own grid.

        Parameters
        ----------
        array : (Z, Y, X) bool, integer or float array
            In LPS order, as `hu`; stored as uint8 (bool), its own integer type, or float32.
        path : path
            Ends in ``.nii`` or ``.nii.gz``. Replaced atomically; folders are created. Of a process that is
            killed while it writes, nothing is left.

        Returns
        -------
        Path
            `path`.

        Raises
        ------
        ValueError
            Wrong shape or suffix.
        TypeError
            The array is neither bool, integer nor float.
        """
        array = np.asarray(array)
        target = Path(path)
        if array.shape != self.hu.shape:
            raise ValueError(f"array must have the volume's shape {self.hu.shape}, got {array.shape}")
        if not target.name.endswith((".nii", ".nii.gz")):
            raise ValueError(f"path must end in .nii or .nii.gz, got {name_of(target)}")
        stored = self.grid.from_lps(array.astype(_storage_type(array.dtype), copy=False))
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(target) as beside:
            write_nifti(beside, stored, self.grid.spacing, self.grid.origin, self.grid.direction)
        return target


def read_ct(path: str | os.PathLike[str], series: str | None = None) -> Scan:
    """Read a chest CT volume.

    Parameters
    ----------
    path : path
        ``.nii``, ``.nii.gz`` (NIfTI-1), ``.nrrd``, ``.nhdr``, ``.mhd``, ``.mha``, a folder with a DICOM
        series, or one ``.dcm`` file of a series.
    series : str, optional
        SeriesInstanceUID, for a folder with several; see `list_series`. Omitted: the largest that is a
        readable CT volume; a warning names it and the others.

    Returns
    -------
    Scan
        LPS index order, rescale slope and intercept applied, rounded to int16, padding raised to -1024 HU.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    ValueError
        Unreadable or truncated; not one 3-D scalar volume; NaN; values that are not Hounsfield units; a DICOM
        series with missing slices, irregular spacing or gantry tilt; no series of this UID (the error names
        those there), or a `series` for a file that is not DICOM.
    ImportError
        SimpleITK is not installed.

    Notes
    -----
    Values count as Hounsfield units where some are below -300 (lung, air) and some above -200 (tissue), and
    none above 65535. That catches images scaled to [0, 1] or [0, 255], and stored values without their
    intercept.

    Of NIfTI's two geometries, sform is taken where its code is set, else qform; a warning tells how far apart
    they lie, or that neither is set.
    """
    source = Path(path)
    image = _load(source, series)
    values = _scalar_array(source, image)
    low, high = float(values.min()), float(values.max())
    if low > -300 or high < -200 or high > 65535:
        raise ValueError(
            f"{name_of(source)}: not a CT in Hounsfield units: values must reach below -300 (air) and above "
            f"-200 (tissue), at most 65535; got {low:g} to {high:g}"
        )
    grid = _grid(image)
    hu = grid.to_lps(
        np.clip(np.rint(values) if values.dtype.kind == "f" else values, AIR_HU, 32767).astype(np.int16)
    )
    return Scan(hu, grid.lps_spacing, source, grid)


def list_series(path: str | os.PathLike[str]) -> list[SeriesInfo]:
    """List the DICOM series of a folder.

    Parameters
    ----------
    path : path
        A folder; folders inside it are not searched. Of one file, the folder it lies in.

    Returns
    -------
    list of SeriesInfo
        The one of most slices first, between equals by UID; empty where the folder holds no DICOM.
        `largest_series` chooses among them as `read_ct` does. A damaged file that does not tell its series
        keeps all of them from being read; where there is no other, it is a series without UID.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"{name_of(source)}: no such file or folder")
    return dicom.list_series(source if source.is_dir() else source.parent)


def read_mask(path: str | os.PathLike[str], like: Scan) -> npt.NDArray[np.bool_]:
    """Read a label map that belongs to a CT volume; what is above zero is in the mask.

    Parameters
    ----------
    path : path
        A file in one of the formats of `read_ct`, DICOM excepted. Its axes may be stored in another order
        than the CT's.
    like : Scan
        The CT it must lie on.

    Returns
    -------
    (Z, Y, X) bool array
        In the order of ``like.hu``.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_ct`; also where the grids differ by more than a tenth of a voxel at a corner of the volume.
    """
    return np.asarray(_read_on_grid(path, like, "mask") > 0)


def read_map(path: str | os.PathLike[str], like: Scan) -> npt.NDArray[np.float32]:
    """Read a map of numbers that belongs to a CT volume, such as a probability.

    Parameters
    ----------
    path, like
        See `read_mask`.

    Returns
    -------
    (Z, Y, X) float32 array
        In the order of ``like.hu``.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_mask`.
    """
    return _read_on_grid(path, like, "map").astype(np.float32)


def _read_on_grid(path: str | os.PathLike[str], like: Scan, what: str) -> npt.NDArray[Any]:
    """Values of a file that must lie on a CT's grid, in the CT's order; `what` names it in errors."""
    source = Path(path)
    if source.is_dir() or source.suffix.lower() == ".dcm":
        raise ValueError(f"{name_of(source)}: a {what} must be one file of {', '.join(SUFFIXES)}")
    image = _load(source)
    values = _scalar_array(source, image)
    grid = _grid(image)
    ordered = grid.to_lps(values)
    if ordered.shape != like.hu.shape:
        raise ValueError(
            f"{name_of(source)}: the {what}'s shape must be that of {name_of(like.path)}, {like.hu.shape}, "
            f"got {ordered.shape}"
        )
    apart = float(np.abs(grid.corners() - like.grid.corners()).max())
    if apart > 0.1 * min(like.spacing):
        raise ValueError(
            f"{name_of(source)}: the {what} must lie on the grid of {name_of(like.path)}; their corners are "
            f"{apart:.2f} mm apart (spacing {grid.lps_spacing} against {like.spacing})"
        )
    return ordered


def _simpleitk() -> ModuleType:
    return optional("SimpleITK", "reading CT needs SimpleITK: pip install 'lesionsynth[io]'")


def _load(path: Path, series: str | None = None) -> child.Image:
    """Check and read; the one way of a user's file to native code."""
    if importlib.util.find_spec("SimpleITK") is None:
        _simpleitk()  # says how to install it
    if not path.exists():
        raise FileNotFoundError(f"{name_of(path)}: no such file or folder")
    if path.is_dir() or path.suffix.lower() == ".dcm":
        return _load_series(path, series)
    if series is not None:
        raise ValueError(
            f"{name_of(path)}: series must be omitted for a file that is not DICOM, got {name_of(series)}"
        )
    if not path.name.lower().endswith(SUFFIXES):
        raise ValueError(
            f"{name_of(path)}: not a known CT format; read are {', '.join(SUFFIXES)} and DICOM folders"
        )
    stamps = {path: file_stamp(path)}
    header = check_volume(path)
    stamps.update((Path(name), stamp) for name, stamp in header.beside.items())
    image = _read(path, header.kind, [str(path)], header.voxel_bytes, stamps, list(header.beside))
    if header.geometry is None or len(image.size) != 3:
        return image
    spacing, origin, direction = header.geometry
    return replace(image, spacing=spacing, origin=origin, direction=direction)


def check_volume(path: Path) -> Header:
    """Check a NIfTI, NRRD or MetaImage file, told by its suffix, before native code sees it."""
    size = file_stamp(path)[2]
    name = path.name.lower()
    if not size:
        refuse(path, "an empty file")
    if name.endswith((".nii", ".nii.gz")):
        return check_nifti(path, size)
    return (check_nrrd if name.endswith((".nrrd", ".nhdr")) else check_metaimage)(path, size)


def _load_series(path: Path, series: str | None) -> child.Image:
    if not path.is_dir():
        file_stamp(path)
    found = find_series(path, series)
    image = _read(path, "GDCMImageIO", found.files, found.voxel_bytes, found.stamps, real=found.real)
    return replace(image, spacing=found.spacing, origin=found.origin, direction=found.direction)


def _read(
    path: Path,
    kind: str,
    files: Sequence[str],
    voxel_bytes: int,
    stamps: Mapping[Path, object],
    beside: Sequence[str] = (),
    real: bool = False,
) -> child.Image:
    """Read what was checked; `stamps` tell whether it still is what is there."""
    try:
        image = child.read(kind, files, voxel_bytes, beside, real)
    except RuntimeError as error:
        at = error.at if isinstance(error, child.Refused) else None
        where = path if at is None else files[at]
        raise ValueError(f"{name_of(where)}: unreadable: {name_of(str(error)[:400])}") from error
    for file, before in stamps.items():
        if file_stamp(file) != before:
            raise ValueError(f"{name_of(file)}: must not change while it is read")
    return image


def _scalar_array(path: Path, image: child.Image) -> npt.NDArray[Any]:
    if image.components != 1:
        raise ValueError(
            f"{name_of(path)}: a volume must have one value per voxel, got {image.components} "
            "(a colour picture?)"
        )
    if len(image.size) != 3 or min(image.size) < 2:
        raise ValueError(
            f"{name_of(path)}: a volume must be 3-D with at least two voxels along each axis, got size "
            f"{image.size} (x, y, z)"
        )
    check_geometry(path, image.spacing, image.origin, image.direction)
    values = np.frombuffer(image.voxels, image.dtype).reshape(image.size[::-1])
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{name_of(path)}: voxels must be integers or floats, got {values.dtype}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{name_of(path)}: voxels must be finite, found NaN or infinity")
    return values


def _grid(image: child.Image) -> Grid:
    return Grid.of(image.size, image.spacing, image.origin, image.direction)


def _storage_type(dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "b":
        return np.uint8
    if dtype.kind == "f":
        return np.float32
    if dtype.kind in "iu":
        return np.int32 if dtype.itemsize > 4 else dtype
    raise TypeError(f"array must be bool, integer or float, got {dtype}")
