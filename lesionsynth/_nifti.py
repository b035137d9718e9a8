"""Write NIfTI-1 without native code, which aborts on a file name that is no text."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.commands import optional
from lesionsynth.files import named_when_whole

_TO_RAS = np.array((-1.0, -1.0, 1.0))


def write_nifti(
    path: Path,
    array: npt.NDArray[Any],
    spacing: Sequence[float],
    origin: Sequence[float],
    direction: Sequence[float],
) -> None:
    """Write a volume; of a process that is killed meanwhile, no file stays.

    Parameters
    ----------
    path : Path
        Compressed where it ends in ``.gz``. Nothing is there yet.
    array : (Z, Y, X) array
        Integers of at most 32 bits, or floats.
    spacing, origin : (3,) floats
        mm, x first; LPS.
    direction : (9,) floats
        Row-major, its columns are the axes x, y and z in LPS.

    Raises
    ------
    ImportError
        nibabel is not installed.
    ValueError
        It is longer along an axis than NIfTI-1 can say.
    OSError
        It cannot be written.
    """
    nibabel: Any = optional("nibabel", "writing NIfTI needs nibabel: pip install 'lesionsynth[io]'")
    if max(array.shape) > 32767:
        raise ValueError(f"NIfTI holds at most 32767 voxels along an axis, got shape {array.shape}")
    kind = array.dtype.newbyteorder("<")
    affine = np.eye(4)
    affine[:3, :3] = (
        _TO_RAS[:, None] * np.asarray(direction, float).reshape(3, 3) * np.asarray(spacing, float)
    )
    affine[:3, 3] = _TO_RAS * np.asarray(origin, float)
    header = nibabel.Nifti1Header(endianness="<")
    header.set_data_dtype(kind)
    header.set_data_shape(array.shape[::-1])
    header.set_zooms(spacing)
    header.set_qform(affine, "scanner")
    header.set_sform(affine, "scanner")
    header.set_slope_inter(1, 0)
    header.set_xyzt_units("mm", "sec")
    with named_when_whole(path) as stream:
        if path.name.endswith(".gz"):
            # a third faster than the usual 6, and 2 % longer
            with gzip.GzipFile(filename="", fileobj=stream, mode="wb", compresslevel=5, mtime=0) as packed:
                _write(packed, header, array, kind)
        else:
            _write(stream, header, array, kind)


def _write(stream: Any, header: Any, array: npt.NDArray[Any], kind: np.dtype[Any]) -> None:
    header.write_to(stream)
    for plane in array:  # no whole copy
        stream.write(np.ascontiguousarray(plane, kind).data)
