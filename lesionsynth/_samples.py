"""A synthesised sample on disk: a folder with the pair, plan and record; written whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import lesionsynth
from lesionsynth import files
from lesionsynth._cases import Case, checksum
from lesionsynth.config import LEAST_HU, MOST_HU, LesionConfig, check_spacing
from lesionsynth.io import write_nifti
from lesionsynth.plan import LesionPlan, check_word
from lesionsynth.strict import build, name_of, read_json, read_text, shown
from lesionsynth.synthesizer import LesionPair

if TYPE_CHECKING:
    from lesionsynth.io import Grid

FORMAT = "lesionsynth.record"
VERSION = 1
FILES = ("pair.npz", "image.nii.gz", "target.nii.gz", "labels.nii.gz", "plan.json", "record.json")
"""What a sample may hold; its record, the proof that it is one, goes last."""

CHECKED = ("hu", "lung_mask", "image", "target", "labels")
"""What a record has checksums of."""
MOST_PLAN = 2**25
"""Longest plan in bytes; one of 1024 blobs, rendered, takes a thirtieth of it."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What a record says of the CT."""

    phantom_seed: int | None = None
    input: str | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        if self.phantom_seed is not None:
            check_word("source.phantom_seed", self.phantom_seed)
        for name in ("input", "mask"):
            value = getattr(self, name)
            if value is not None and (Path(value).name != value or not 0 < len(value) < 256):
                raise ValueError(f"source.{name} must be a file's name, got {shown(value)}")


@dataclass(frozen=True, kw_only=True)
class _Record:
    """Fields of a ``record.json``."""

    format: str
    version: int
    lesionsynth: str
    source: _Source
    slab: tuple[int, int]
    spacing: tuple[float, float, float]
    checksums: dict[str, str]
    preset: str = ""
    lengths: str = ""
    hu_range: tuple[float, float] = LesionConfig.hu_range

    def __post_init__(self) -> None:
        if not 0 <= self.slab[0] < self.slab[1] < 2**31:
            raise ValueError(f"slab must be two slices, 0 <= first < last, got {self.slab}")
        check_spacing(self.spacing)
        low, high = self.hu_range
        if not (-MOST_HU <= low <= high <= MOST_HU and high - low >= LEAST_HU):
            raise ValueError(
                f"hu_range must be (low, high) within {MOST_HU:g} HU, at least {LEAST_HU:g} wide, got "
                f"{self.hu_range}"
            )
        for name in ("preset", "lengths"):
            if not re.fullmatch("[A-Za-z0-9_]{0,60}", value := getattr(self, name)):
                raise ValueError(f"{name} must be a name, got {shown(value)}")
        for name, value in self.checksums.items():
            if name not in CHECKED or not re.fullmatch("[0-9a-f]{8}", value):
                raise ValueError(
                    f"checksums.{shown(name)} must be the CRC-32 of {', '.join(CHECKED)}, got {shown(value)}"
                )


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
        Replace an earlier sample.

    Raises
    ------
    FileExistsError, ValueError
        As `check_output`.
    """
    folder = Path(os.path.abspath(folder))
    check_output(folder, overwrite=overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing_folder(folder, FILES, lambda: check_output(folder, overwrite=overwrite)) as work:
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


def check_output(folder: Path, *, overwrite: bool, inputs: Iterable[str | Path | None] = ()) -> None:
    """Refuse a folder that is there, unless it is a sample that may be replaced.

    Parameters
    ----------
    folder : Path
        Where a sample shall go.
    overwrite : bool
        An earlier sample may be replaced: a folder with its record, and nothing but the files of one.
    inputs : iterable of path or None
        What is read; none of it may lie in a folder that is replaced.

    Raises
    ------
    FileExistsError
        The folder exists and `overwrite` is off.
    ValueError
        It is no sample, holds other files, or holds an input.
    """
    folder = Path(os.path.abspath(folder))
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists; use --overwrite to replace it")
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"--overwrite replaces samples only, and {folder} is no folder")
    try:
        read_record(folder / "record.json")
    except (ValueError, OSError) as error:
        raise ValueError(f"--overwrite replaces samples only, and {folder} is none: {error}") from error
    if other := files.others(folder, FILES):
        raise ValueError(
            f"--overwrite replaces samples only, and {folder} also holds {other[0]}: move that away"
        )
    for path in inputs:
        if path is not None and folder.resolve() in Path(path).resolve().parents:
            raise ValueError(f"--output must not hold an input, got {folder} with {path}")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(f"--output must not be the working folder, got {folder}")


def checksums(case: Case, pair: LesionPair) -> dict[str, str]:
    """Of what went in and what came out."""
    arrays = case.hu, case.lung_mask, pair.image, pair.target, pair.labels
    return {name: checksum(array) for name, array in zip(CHECKED, arrays, strict=True)}


def read_record(path: Path) -> dict[str, Any]:
    """Read a ``record.json``.

    Raises
    ------
    ValueError
        It is not one of ours.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
        raise ValueError(f"{name_of(path)}: must be a record of format {FORMAT!r}, version {VERSION}")
    try:
        build(_Record, record)
    except ValueError as error:
        raise ValueError(f"{name_of(path)}: {error}") from error
    return record


def read_plan(path: Path) -> LesionPlan:
    """Read a ``plan.json``.

    Raises
    ------
    ValueError
        It is not a plan; the message starts with the file's name.
    """
    text = read_text(path, MOST_PLAN)
    try:
        return LesionPlan.from_json(text)
    except ValueError as error:
        raise ValueError(f"{name_of(path)}: {error}") from error


def _write_nifti(path: Path, array: npt.NDArray[Any], case: Case) -> None:
    """Write a slab in LPS order where it lies in the file's space."""
    stored = array.astype(np.uint8) if array.dtype == np.bool_ else array
    origin, cosines = [0.0, 0.0, 0.0], np.eye(3).ravel().tolist()
    if case.volume is not None:
        origin, cosines = _lps_frame(case.volume.grid, np.array([case.slab[0], 0, 0]))
    write_nifti(path, stored, case.spacing[::-1], origin, cosines)


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
