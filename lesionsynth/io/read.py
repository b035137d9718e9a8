"""Read one scan, or a mask or map that lies on its grid; write results on that grid."""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth import files
from lesionsynth.commands import optional
from lesionsynth.io import child, dicom
from lesionsynth.io.checks import PAIR, check_geometry, check_shape, file_stamp, refuse
from lesionsynth.io.dicom import SeriesInfo, find_series
from lesionsynth.io.grid import Grid
from lesionsynth.io.labels import mask_of
from lesionsynth.io.metaimage import check_metaimage
from lesionsynth.io.names import SUFFIXES, case_name
from lesionsynth.io.nifti import read_nifti, write_nifti
from lesionsynth.io.nrrd import check_nrrd
from lesionsynth.io.outside import find_padding, is_outside
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
        affine = self.affine
        ras = np.atleast_2d(np.asarray(points, float)) * (-1, -1, 1)
        out: npt.NDArray[np.float64] = (ras - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
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
        series in it or in folders below, or one ``.dcm`` file of a series in its own folder.
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
        Unreadable or truncated; not one 3-D scalar volume; NaN or infinity; values that are not Hounsfield
        units; sheared axes; a DICOM series with missing slices, irregular spacing or gantry tilt; no series
        of this UID (the error names those there), or a `series` for a file that is not DICOM.
    ImportError
        nibabel, for NIfTI, or SimpleITK, for the others, is not installed.

    Notes
    -----
    Values count as Hounsfield units where some are below -300 (lung, air) and some above -200 (tissue), and
    none above 65535. That catches images scaled to [0, 1] or [0, 255], and stored values without their
    intercept.

    Of NIfTI's two geometries, sform is taken where its code is set, else qform; a warning tells how far apart
    they lie, or that neither is set. Axes that rounding has sheared are made orthogonal, with a warning.

    What surrounds a convex field of view and is NaN, or of one value that is no air, as registration and
    resampling leave it, is read as air, with a warning. Any other NaN, and infinity, are refused.
    """
    source = Path(path)
    image = _load(source, series)
    hu, told = _hounsfield(source, _values(source, image), grid := _grid(image))
    texts = (*image.warnings, *told)
    for text in texts:
        warnings.warn(text, stacklevel=2)
    return Scan(hu, grid.lps_spacing, source, grid, image.series, image.files or (source,), texts)


def _hounsfield(
    path: Path, values: npt.NDArray[Any], grid: Grid
) -> tuple[npt.NDArray[np.int16], tuple[str, ...]]:
    """HU in LPS order, air outside the field of view, and what the user should know."""
    told: list[str] = []
    count, found = _not_finite(values)
    if count and (np.isinf(values).any() or not is_outside(grid.to_lps(np.isnan(values)))):
        raise ValueError(
            f"{name_of(path)}: voxels must be finite, or NaN outside a convex field of view alone; {found}"
        )
    if count:
        told.append(f"{name_of(path)}: {count} voxels outside the field of view are NaN; reading them as air")
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low > -300 or high < -200 or high > 65535:
        raise ValueError(
            f"{name_of(path)}: not a CT in Hounsfield units: values must reach below -300 (air) and above "
            f"-200 (tissue), at most 65535; got {low:g} to {high:g}"
        )
    hu = np.empty([values.shape[axis] for axis in grid.axes], np.int16)
    for plane, out in zip(values, grid.as_stored(hu), strict=True):  # no copies of the whole
        numbers = np.rint(np.nan_to_num(plane, nan=AIR_HU)) if plane.dtype.kind == "f" else plane
        out[...] = np.clip(numbers, AIR_HU, 32767)
    if padding := find_padding(hu):
        hu[padding[1]] = AIR_HU
        told.append(
            f"{name_of(path)}: {', '.join(map(str, padding[0]))} HU fills the outside of the field of view "
            f"({padding[1].mean():.1%} of the voxels); reading it as air"
        )
    return hu, tuple(told)


def _not_finite(values: npt.NDArray[Any]) -> tuple[int, str]:
    """Count NaN and infinity, and tell where the first is."""
    counts = [int((~np.isfinite(plane)).sum()) if values.dtype.kind == "f" else 0 for plane in values]
    if not (count := sum(counts)):
        return 0, ""
    z = next(z for z, bad in enumerate(counts) if bad)
    at = (z, *(int(n[0]) for n in np.nonzero(~np.isfinite(values[z]))))
    return count, f"found {count} NaN or infinite voxels, the first at {at} (z, y, x as stored)"


def list_series(path: str | os.PathLike[str]) -> list[SeriesInfo]:
    """List the DICOM series of a folder.

    Parameters
    ----------
    path : path
        A folder, searched with those below it, as `read_ct` does. Of one file, the folder it lies in.

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
    return dicom.list_series(*(dicom.folders_below(source) if source.is_dir() else [source.parent]))


def read_mask(
    path: str | os.PathLike[str], like: Scan, label: int | Sequence[int] | None = None
) -> npt.NDArray[np.bool_]:
    """Read a label map that belongs to a CT volume.

    Parameters
    ----------
    path : path
        A file in one of the formats of `read_ct`, DICOM excepted. Its axes may be stored in another order
        than the CT's. Its values are labels: whole numbers, at most 200 different ones.
    like : Scan
        The CT it must lie on.
    label : int or sequence of int, optional
        What is in the mask. Where omitted or empty, all that is above zero; of a file with several labels, a
        warning then tells them and their volumes.

    Returns
    -------
    (Z, Y, X) bool array
        In the order of ``like.hu``. A file of zeros is an empty mask, whatever `label` is.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_ct`; also where the grids differ by more than a tenth of a voxel at a corner of the volume,
        where values are no labels, or some below zero and `label` is omitted, and where a file with labels
        has none of those chosen; a warning tells if it lacks some.
    TypeError
        `label` is no integer.
    """
    values = _read_on_grid(path, like, "mask")
    mask, warning = mask_of(Path(path), values, math.prod(like.spacing) / 1000, label)
    if warning:
        warnings.warn(warning, stacklevel=2)
    return mask


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
    layers = image.components * math.prod(image.size[3:])
    if layers > 1:
        raise ValueError(
            f"{name_of(source)}: a {what} must have one value per voxel, got {layers} (a colour picture, or "
            "segments in layers, as 3-D Slicer stores those that overlap? Export a label map)"
        )
    values = _values(source, image)
    count, found = _not_finite(values)
    if count:
        raise ValueError(f"{name_of(source)}: voxels must be finite; {found}")
    for text in image.warnings:
        warnings.warn(text, stacklevel=3)
    grid = _grid(image)
    ordered = grid.to_lps(values)
    if ordered.shape != like.hu.shape:
        raise ValueError(
            f"{name_of(source)}: the {what}'s shape must be that of {name_of(like.path)}, {like.hu.shape} "
            f"(z, y, x), got {ordered.shape}"
        )
    mine, theirs = grid.corners(), like.grid.corners()
    if np.abs(like.index_of(mine) - like.index_of(theirs)).max() > 0.1:
        far = int(np.abs(mine - theirs).max(1).argmax())
        ends = [f"({', '.join(f'{mm:.2f}' for mm in corner)})" for corner in (mine[far], theirs[far])]
        raise ValueError(
            f"{name_of(source)}: the {what} must lie on the grid of {name_of(like.path)}; their corners are "
            f"{np.abs(mine - theirs).max():.2f} mm apart, at {ends[0]} against {ends[1]} (x, y, z)"
        )
    return ordered


def _load(path: Path, series: str | None = None) -> child.Image:
    """Check and read; where a volume lies is checked here for every format."""
    image = _stored(path, series)
    while len(image.size) > 3 and image.size[-1] == 1:  # a series of one volume
        axes = len(image.size) - 1
        cosines = np.reshape(image.direction, (axes + 1, axes + 1))[:axes, :axes]
        parts = {n: getattr(image, n)[:axes] for n in ("size", "spacing", "origin")}
        image = replace(image, **parts, direction=tuple(cosines.ravel().tolist()))
    if len(image.size) != 3:
        return image  # of which the size is told
    direction, told = check_geometry(path, image.size, image.spacing, image.origin, image.direction)
    return replace(image, direction=direction, warnings=(*image.warnings, *told))


def _stored(path: Path, series: str | None) -> child.Image:
    if not path.exists():
        raise FileNotFoundError(f"{name_of(path)}: no such file or folder")
    if path.is_dir() or path.suffix.lower() == ".dcm":
        return _load_series(path, series)
    if series is not None:
        raise ValueError(
            f"{name_of(path)}: series must be omitted for a file that is not DICOM, got {name_of(series)}"
        )
    if path.name.lower().endswith((".hdr", ".img", ".hdr.gz", ".img.gz")):
        raise ValueError(f"{name_of(path)}: {PAIR}")
    if not path.name.lower().endswith(SUFFIXES):
        raise ValueError(
            f"{name_of(path)}: not a known CT format; read are {', '.join(SUFFIXES)} and DICOM folders"
        )
    stamps = {path: file_stamp(path)}
    size = stamps[path][2]
    name = path.name.lower()
    if not size:
        refuse(path, "an empty file")
    if name.endswith((".nii", ".nii.gz")):
        image = read_nifti(path, size)
        _check_stamps(stamps)
        return image
    header = (check_nrrd if name.endswith((".nrrd", ".nhdr")) else check_metaimage)(path, size)
    stamps.update((Path(name), stamp) for name, stamp in header.beside.items())
    image = _read(path, header.kind, [str(path)], header.voxel_bytes, stamps, list(header.beside))
    return replace(image, warnings=header.warnings)


def _load_series(path: Path, series: str | None) -> child.Image:
    if not path.is_dir():
        file_stamp(path)
    found = find_series(path, series)
    image = _read(path, "GDCMImageIO", found.files, found.voxel_bytes, found.stamps, real=found.real)
    return replace(
        image,
        spacing=found.spacing,
        origin=found.origin,
        direction=found.direction,
        series=found.uid,
        files=tuple(map(Path, found.files)),
        warnings=found.warnings,
    )


def _read(
    path: Path,
    kind: str,
    files: Sequence[str],
    voxel_bytes: int,
    stamps: Mapping[Path, object],
    beside: Sequence[str] = (),
    real: bool = False,
) -> child.Image:
    """Let native code read what was checked; `stamps` tell whether it still is what is there."""
    if importlib.util.find_spec("SimpleITK") is None:
        optional("SimpleITK", "NRRD, MetaImage and DICOM need SimpleITK: pip install 'lesionsynth[io]'")
    try:
        image = child.read(kind, files, voxel_bytes, beside, real)
    except RuntimeError as error:
        at = error.at if isinstance(error, child.Refused) else None
        where = path if at is None else files[at]
        rule = str(error) if at is None else dicom.why_unread(files[at], str(error))
        raise ValueError(f"{name_of(where)}: unreadable: {name_of(rule[:400])}") from error
    _check_stamps(stamps)
    return image


def _check_stamps(stamps: Mapping[Path, object]) -> None:
    for file, before in stamps.items():
        if file_stamp(file) != before:
            raise ValueError(f"{name_of(file)}: must not change while it is read")


def _values(path: Path, image: child.Image) -> npt.NDArray[Any]:
    """Voxels in file order (z, y, x) of what must be one volume."""
    check_shape(path, image.size, image.components)
    values = np.frombuffer(image.voxels, image.dtype).reshape(image.size[::-1])
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{name_of(path)}: voxels must be integers or floats, got {values.dtype}")
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
