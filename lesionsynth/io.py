"""Read chest CT in the formats it comes in, in one orientation, and write results on the file's own grid.

NIfTI, NRRD and MetaImage files and DICOM folders all become (z, y, x) arrays of Hounsfield units in LPS index
order: z from feet to head, y from front to back, x from the patient's right to left. Reading needs SimpleITK
(``pip install lesionsynth[io]``); importing this module does not.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth import _dicom
from lesionsynth._dicom import SeriesInfo, find_series, largest_series
from lesionsynth._grid import Grid

__all__ = [
    "AIR_HU",
    "SUFFIXES",
    "CTVolume",
    "Grid",
    "SeriesInfo",
    "case_name",
    "largest_series",
    "list_series",
    "read_ct",
    "read_map",
    "read_mask",
]

AIR_HU = -1024
"""Lowest value kept; scanners pad with -2000 or -3024 outside the field of view."""
SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mhd", ".mha")
"""Ends of the names of volume files that are read, in lower case."""
_NIFTI_HEADER = 348


@dataclass(frozen=True, eq=False)
class CTVolume:
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
    """

    hu: npt.NDArray[np.int16]
    spacing: tuple[float, float, float]
    path: Path
    grid: Grid

    @property
    def name(self) -> str:
        """File or folder name without the format's suffix."""
        return case_name(self.path)

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
            Ends in ``.nii`` or ``.nii.gz``. Replaced atomically; folders are created.

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
        sitk = _simpleitk()
        array = np.asarray(array)
        target = Path(path)
        if array.shape != self.hu.shape:
            raise ValueError(f"array must have the volume's shape {self.hu.shape}, got {array.shape}")
        if not target.name.endswith((".nii", ".nii.gz")):
            raise ValueError(f"path must end in .nii or .nii.gz, got {target}")
        image = sitk.GetImageFromArray(
            self.grid.from_lps(array.astype(_storage_type(array.dtype), copy=False))
        )
        image.SetSpacing(self.grid.spacing)
        image.SetOrigin(self.grid.origin)
        image.SetDirection(self.grid.direction)
        target.parent.mkdir(parents=True, exist_ok=True)
        suffix = ".nii.gz" if target.name.endswith(".gz") else ".nii"
        # the temporary lies in the target's folder: os.replace is atomic only within a file system
        handle, temporary = tempfile.mkstemp(suffix=suffix, prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        try:
            sitk.WriteImage(image, temporary)
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp made it private
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return target


def read_ct(path: str | os.PathLike[str], series: str | None = None) -> CTVolume:
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
    CTVolume
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
    """
    sitk = _simpleitk()
    source = Path(path)
    image = _load(source, sitk, series)
    values = _scalar_array(source, image, sitk)
    low, high = float(values.min()), float(values.max())
    if low > -300 or high < -200 or high > 65535:
        raise ValueError(
            f"{source}: not a CT in Hounsfield units: values must reach below -300 (air) and above -200 "
            f"(tissue), at most 65535; got {low:g} to {high:g}"
        )
    grid = _grid(image)
    hu = grid.to_lps(
        np.clip(np.rint(values) if values.dtype.kind == "f" else values, AIR_HU, 32767).astype(np.int16)
    )
    return CTVolume(hu, grid.lps_spacing, source, grid)


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
        `largest_series` chooses among them as `read_ct` does.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    ImportError
        SimpleITK is not installed.
    """
    sitk = _simpleitk()
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    folder = source if source.is_dir() else source.parent
    # asked about a folder without DICOM, GDCM writes to the terminal
    return _dicom.list_series(folder, sitk) if any(_is_dicom(file) for file in folder.iterdir()) else []


def _is_dicom(path: Path) -> bool:
    """Tell a DICOM file by its first bytes; files without preamble begin with group 0002 or 0008."""
    if path.name[0] == "." or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    with path.open("rb") as stream:
        head = stream.read(132)
    return head[128:] == b"DICM" or head[:2] in (b"\x02\x00", b"\x08\x00")


def read_mask(path: str | os.PathLike[str], like: CTVolume) -> npt.NDArray[np.bool_]:
    """Read a label map that belongs to a CT volume; what is above zero is in the mask.

    Parameters
    ----------
    path : path
        A file in one of the formats of `read_ct`, DICOM excepted. Its axes may be stored in another order
        than the CT's.
    like : CTVolume
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


def read_map(path: str | os.PathLike[str], like: CTVolume) -> npt.NDArray[np.float32]:
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


def _read_on_grid(path: str | os.PathLike[str], like: CTVolume, what: str) -> npt.NDArray[Any]:
    """Values of a file that must lie on a CT's grid, in the CT's order; `what` names it in errors."""
    sitk = _simpleitk()
    source = Path(path)
    if source.is_dir() or source.suffix.lower() == ".dcm":
        raise ValueError(f"{source}: a {what} must be one file of {', '.join(SUFFIXES)}")
    image = _load(source, sitk)
    values = _scalar_array(source, image, sitk)
    grid = _grid(image)
    ordered = grid.to_lps(values)
    if ordered.shape != like.hu.shape:
        raise ValueError(
            f"{source}: the {what}'s shape must be that of {like.path}, {like.hu.shape}, got {ordered.shape}"
        )
    apart = float(np.abs(grid.corners() - like.grid.corners()).max())
    if apart > 0.1 * min(like.spacing):
        raise ValueError(
            f"{source}: the {what} must lie on the grid of {like.path}; their corners are {apart:.2f} mm "
            f"apart (spacing {grid.lps_spacing} against {like.spacing})"
        )
    return ordered


def case_name(path: Path) -> str:
    """Name of a case: the file or folder name without the suffix of its format."""
    name = path.name or path.resolve().name
    for suffix in sorted((*SUFFIXES, ".dcm"), key=len, reverse=True):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def _simpleitk() -> ModuleType:
    try:
        import SimpleITK
    except ImportError as error:
        raise ImportError("reading and writing CT needs SimpleITK: pip install 'lesionsynth[io]'") from error
    module: ModuleType = SimpleITK
    return module


def _load(path: Path, sitk: Any, series: str | None = None) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        if path.is_dir() or path.suffix.lower() == ".dcm":
            return _load_series(path, sitk, series)
        if series is not None:
            raise ValueError(f"{path}: series must be omitted for a file that is not DICOM, got {series}")
        if not path.name.lower().endswith(SUFFIXES):
            raise ValueError(
                f"{path}: not a known CT format; read are {', '.join(SUFFIXES)} and DICOM folders"
            )
        _check_nifti(path)
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{path}: unreadable: {lines[-1] if lines else error}") from error


def _load_series(path: Path, sitk: Any, series: str | None) -> Any:
    found = find_series(path, sitk, series)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(found.files)
    image = reader.Execute()
    image.SetSpacing((*image.GetSpacing()[:2], found.slice_distance))
    image.SetDirection(found.direction)
    return image


def _check_nifti(path: Path) -> None:
    """Refuse a damaged NIfTI file: the reader fills what is missing with zeros (which are soft tissue)."""
    packed = path.name.lower().endswith(".gz")
    if not packed and not path.name.lower().endswith(".nii"):
        return
    length = 0
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            head = stream.read(_NIFTI_HEADER)
            if packed:
                length = len(head)
                while block := stream.read(1 << 22):
                    length += len(block)
            else:
                length = path.stat().st_size
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated gzip file ({error})") from error
    needed = _nifti_length(head)
    if length < needed:
        raise ValueError(f"{path}: truncated: {length} bytes of the {needed} that its header announces")


def _nifti_length(head: bytes) -> int:
    """Bytes of a NIfTI-1 file (uncompressed) by its header; 0 where it is none."""
    for order in "<>":
        if len(head) == _NIFTI_HEADER and struct.unpack_from(f"{order}i", head)[0] == _NIFTI_HEADER:
            dim = [int(n) for n in struct.unpack_from(f"{order}8h", head, 40)]
            bits = int(struct.unpack_from(f"{order}h", head, 72)[0])
            offset = int(struct.unpack_from(f"{order}f", head, 108)[0])
            return offset + math.prod(dim[1 : 1 + max(0, min(dim[0], 7))]) * bits // 8
    return 0


def _scalar_array(path: Path, image: Any, sitk: Any) -> npt.NDArray[Any]:
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(
            f"{path}: a volume must have one value per voxel, got {image.GetNumberOfComponentsPerPixel()}"
            " (a colour picture?)"
        )
    if image.GetDimension() != 3 or min(image.GetSize()) < 2:
        raise ValueError(
            f"{path}: a volume must be 3-D with at least two voxels along each axis, got size "
            f"{image.GetSize()} (x, y, z)"
        )
    values: npt.NDArray[Any] = sitk.GetArrayViewFromImage(image)
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{path}: voxels must be integers or floats, got {values.dtype}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{path}: voxels must be finite, found NaN or infinity")
    return values


def _grid(image: Any) -> Grid:
    return Grid.of(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())


def _storage_type(dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "b":
        return np.uint8
    if dtype.kind == "f":
        return np.float32
    if dtype.kind in "iu":
        return np.int32 if dtype.itemsize > 4 else dtype
    raise TypeError(f"array must be bool, integer or float, got {dtype}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
