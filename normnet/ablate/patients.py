"""Patients to score on: files of CT, truth and lungs, or phantoms with pneumonia; loaded one at a time."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import lesionsynth as ls
from lesionsynth.io import read_mask
from normnet.ablate.config import SCALES, AblateConfig
from normnet.pairing import split_name
from normnet.prepare import load_case
from normnet.volumes import PHANTOM_SEED

Array = npt.NDArray[Any]

PATIENT_SEED = 1
"""First phantom; training phantoms have seeds from `PHANTOM_SEED` up."""


@dataclass(frozen=True, eq=False)
class Volumes:
    """One patient in memory, (z, y, x).

    Attributes
    ----------
    hu, lung_mask : int16 and bool arrays
        On the training grid, 1.0 x 0.8 x 0.8 mm: what the network sees.
    native_hu, native_lung, truth : int16 and bool arrays
        On the scan's own grid: what is scored.
    spacing : (3,) floats
        Of the scan's own grid, in mm.
    to_native : callable
        Brings a mask (nearest voxel) or floats (linear) from the one grid to the other.
    """

    hu: Array
    lung_mask: Array
    native_hu: Array
    native_lung: Array
    truth: Array
    spacing: tuple[float, float, float]
    to_native: Callable[[Array], Array]


@dataclass(frozen=True)
class Patient:
    """One patient.

    Attributes
    ----------
    name : str
    identity : dict
        What the scores depend on; a cached score of another identity does not count.
    load : callable
        Gives the `Volumes`.
    """

    name: str
    identity: dict[str, Any]
    load: Callable[[], Volumes]


def find_patients(config: AblateConfig) -> list[Patient]:
    """Return the patients of an ablation, nothing loaded yet.

    Raises
    ------
    ValueError
        No patient, a patient without CT, two files for one role, too many phantoms, or a CSV with gaps.
    """
    if config.patients:
        return _listed(config.patients)
    scale = SCALES[config.scale]
    count = config.phantom_patients or scale.patients
    most = PHANTOM_SEED - PATIENT_SEED
    if count > most:
        raise ValueError(f"phantom_patients must be <= {most}, got {count}")
    shape = config.phantom_shape or scale.patient_shape
    return [_phantom(f"phantom_{k + 1}", PATIENT_SEED + k, shape) for k in range(count)]


def _phantom(name: str, seed: int, shape: tuple[int, int, int]) -> Patient:
    def load() -> Volumes:
        chest = ls.phantom.chest_ct(shape=shape, seed=seed)
        ill = ls.phantom.add_pneumonia(chest.hu, chest.lung_mask, chest.spacing, seed=seed)
        lungs, z_y_x = chest.lung_mask, chest.spacing
        return Volumes(ill.hu, lungs, ill.hu, lungs, ill.lesion_mask, z_y_x, lambda array: array)

    return Patient(name, {"phantom": seed, "shape": list(shape)}, load)


def _listed(paths: Sequence[Path]) -> list[Patient]:
    for path in paths:
        if not path.exists():
            raise ValueError(f"patients must be files or folders that exist, got {path}")
    tables = [path for path in paths if path.suffix.lower() == ".csv"]
    if tables and len(paths) > 1:
        raise ValueError(f"patients must be one CSV or files and folders, got {len(paths)} with {tables[0]}")
    cases = _from_csv(tables[0]) if tables else _from_names(paths)
    return [
        _scanned(case, files["ct"], files["lesion"], files.get("lung"))
        for case, files in sorted(cases.items())
    ]


def _from_names(paths: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Files by case and role, where a truth says that the case is a patient."""
    inside = [sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path] for path in paths]
    cases: dict[str, dict[str, Path]] = {}
    for path in (p for files in inside for p in files if not p.name.startswith(".")):
        case, role = split_name(path)
        roles = cases.setdefault(case, {})
        other = roles.setdefault(role or "plain", path)
        if other != path and role in ("ct", "lesion", "lung"):
            raise ValueError(f"patients must have one {role} each, got {other} and {path}")
    known = {}
    for case, roles in cases.items():
        if "lesion" not in roles:
            continue
        ct = roles.get("ct", roles.get("plain"))
        if ct is None:
            raise ValueError(f"patients must have a CT for each truth, got none for {roles['lesion']}")
        known[case] = roles | {"ct": ct}
    if not known:
        names = ", ".join(map(str, paths))
        raise ValueError(
            f"patients must hold at least one lesion truth (NAME_lesion...), found none in {names}"
        )
    return known


def _from_csv(path: Path) -> dict[str, dict[str, Path]]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    cases: dict[str, dict[str, Path]] = {}
    for number, row in enumerate(rows, start=2):
        lacking = [name for name in ("case", "ct", "lesion") if not row.get(name)]
        if lacking:
            raise ValueError(
                f"{path}, line {number}: columns case, ct, lesion must be filled, missing {lacking}"
            )
        if Path(row["case"]).name != row["case"]:
            raise ValueError(f"{path}, line {number}: case must be a file name, got {row['case']!r}")
        if row["case"] in cases:
            raise ValueError(f"{path}, line {number}: cases must differ, got {row['case']!r} twice")
        cases[row["case"]] = {
            role: path.parent / value for role in ("ct", "lesion", "lung") if (value := row.get(role))
        }
    if not cases:
        raise ValueError(f"{path} must have at least one row below its header")
    return cases


def _scanned(case: str, ct: Path, lesion: Path, lung: Path | None) -> Patient:
    def load() -> Volumes:
        loaded = load_case(ct, lung)
        return Volumes(
            loaded.hu,
            loaded.mask,
            loaded.volume.hu,
            loaded.native_mask,
            read_mask(lesion, loaded.volume),
            loaded.volume.spacing,
            lambda array: np.asarray(loaded.to_native(array)),
        )

    files = {"ct": ct, "lesion": lesion, "lung": lung}
    return Patient(case, {role: _stamp(path) for role, path in files.items() if path is not None}, load)


def _stamp(path: Path) -> list[Any]:
    """Name, size and time of a file; of a DICOM folder, of the folder."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"patients must be files that exist: {error}") from error
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
