"""A synthesised sample on disk: a folder with the pair, plan and record; written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import lesionsynth
from lesionsynth._cases import Case, checksum
from lesionsynth.plan import LesionPlan
from lesionsynth.synthesizer import LesionPair

if TYPE_CHECKING:
    from lesionsynth.io import Grid

FORMAT = "lesionsynth.record"
VERSION = 1


def write_sample(
    folder: Path, case: Case, pair: LesionPair, *, file_format: str, settings: dict[str, Any], overwrite: bool
) -> None:
    """Write a pair into a new folder.

    Parameters
    ----------
    folder : Path
        Created; it appears under this name only when it is complete.
    case, pair
        What was rendered, on what.
    file_format : {"npz", "nifti"}
        One ``pair.npz``, or ``image.nii.gz``, ``target.nii.gz`` and ``labels.nii.gz`` on the slab's grid.
    settings : dict
        What `replay` needs besides the plan; goes into ``record.json``.
    overwrite : bool
        Replace an existing folder.

    Raises
    ------
    FileExistsError
        The folder exists and `overwrite` is off.
    """
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; use --overwrite to replace it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        arrays = {"image": pair.image, "target": pair.target, "labels": pair.labels}
        if file_format == "npz":
            np.savez_compressed(work / "pair.npz", **arrays)
        else:
            for name, array in arrays.items():
                _write_nifti(work / f"{name}.nii.gz", array, case)
        assert isinstance(pair.plan, LesionPlan)  # one volume went in
        (work / "plan.json").write_text(pair.plan.to_json() + "\n", encoding="utf-8")
        record = {
            "format": FORMAT,
            "version": VERSION,
            "lesionsynth": lesionsynth.__version__,
            "source": case.source,
            "slab": list(case.slab),
            "spacing": list(case.spacing),
            **settings,
            "checksums": checksums(case, pair),
        }
        (work / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        work.chmod(0o777 & ~_umask())
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def checksums(case: Case, pair: LesionPair) -> dict[str, str]:
    """Of what went in and what came out."""
    arrays = {
        "hu": case.hu,
        "lung_mask": case.lung_mask,
        "image": pair.image,
        "target": pair.target,
        "labels": pair.labels,
    }
    return {name: checksum(array) for name, array in arrays.items()}


def read_record(path: Path) -> dict[str, Any]:
    """Read a ``record.json``.

    Raises
    ------
    ValueError
        It is not one of ours.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
        raise ValueError(f"{path}: must be a record of format {FORMAT!r}, version {VERSION}")
    return record


def read_plan(path: Path) -> LesionPlan:
    """Read a ``plan.json``.

    Raises
    ------
    ValueError
        It is not a plan; the message starts with the file's name.
    """
    try:
        return LesionPlan.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:  # a field of a wrong kind is bad input here
        raise ValueError(f"{path}: {error}") from error


def _write_nifti(path: Path, array: npt.NDArray[Any], case: Case) -> None:
    """Write a slab in LPS order where it lies in the file's space."""
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise ImportError(
            "--format nifti needs SimpleITK: pip install 'lesionsynth[io]', or use --format npz"
        ) from error

    stored = array.astype(np.uint8) if array.dtype == np.bool_ else array
    image = sitk.GetImageFromArray(stored)
    image.SetSpacing(case.spacing[::-1])
    if case.volume is not None:
        origin, cosines = _lps_frame(case.volume.grid, np.array([case.slab[0], 0, 0]))
        image.SetOrigin(origin)
        image.SetDirection(cosines)
    sitk.WriteImage(image, str(path))


def _lps_frame(grid: Grid, first: npt.NDArray[Any]) -> tuple[list[float], list[float]]:
    """World position of the slab's first voxel, and the direction cosines of its axes x, y, z."""
    cosines = np.array(grid.direction).reshape(3, 3)
    index, columns = np.zeros(3), np.zeros((3, 3))
    for place, (axis, flip) in enumerate(zip(grid.axes, grid.flips, strict=True)):
        along = 2 - axis  # file axis in x, y, z order
        index[along] = grid.size[along] - 1 - first[place] if flip else first[place]
        columns[:, 2 - place] = -cosines[:, along] if flip else cosines[:, along]
    origin = np.array(grid.origin) + cosines @ (index * np.array(grid.spacing))
    return origin.tolist(), columns.ravel().tolist()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
