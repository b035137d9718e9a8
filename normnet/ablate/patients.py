"""Patients to score on: files of CT, truth and lungs, or phantoms with pneumonia; loaded one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import lesionsynth as ls
from lesionsynth.io import read_mask
from lesionsynth.strict import name_of
from normnet.ablate.config import SCALES, AblateConfig
from normnet.cases import Case, find_cases
from normnet.data import PHANTOM_SEED
from normnet.prepare import load_case
from normnet.prepare.case import check_lungs, method_record

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
    FileNotFoundError
        There is no such `truth` or `masks`.
    ValueError
        As `normnet.cases.find_cases`; a patient without truth, or whose files cannot be told; too many
        phantoms; no such method for lungs that must be segmented.
    ImportError
        They are to be segmented by lungmask, which is not installed.
    """
    if config.patients:
        return _listed(config)
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


def _listed(config: AblateConfig) -> list[Patient]:
    if lost := [path for path in config.patients if not path.exists()]:
        raise ValueError(f"patients must be files or folders that exist, got {lost[0]}")
    cases = find_cases(config.patients, truth=config.truth, masks=config.masks)
    for case in cases:
        lacking = "" if case.lesions else "lesions must be given: truth, or a column of the table"
        if problem := case.problem or lacking:
            raise ValueError(f"patient {name_of(case.case)}: {problem}")
        if Path(case.case).name != case.case:  # their scores go into files
            raise ValueError(f"{name_of(config.patients[0])}: case must be a file name, got {case.case!r}")
    # before anything is trained
    check_lungs(cases, config.lungs, config.lung_label)
    return [_scanned(case, config) for case in sorted(cases, key=lambda case: case.case)]


def _scanned(case: Case, config: AblateConfig) -> Patient:
    def load() -> Volumes:
        loaded = load_case(
            case.ct, case.lungs, series=case.series, lungs=config.lungs, label=config.lung_label
        )
        assert case.lesions is not None
        return Volumes(
            loaded.hu,
            loaded.mask,
            loaded.volume.hu,
            loaded.native_mask,
            read_mask(case.lesions, loaded.volume, config.label),
            loaded.volume.spacing,
            lambda array: np.asarray(loaded.to_native(array)),
        )

    paths = {"ct": case.ct, "lesion": case.lesions, "lung": case.lungs}
    identity: dict[str, Any] = {role: _stamp(path) for role, path in paths.items() if path is not None}
    chosen = {"series": case.series, "label": config.label, "lung_label": config.lung_label}
    identity |= {name: value for name, value in chosen.items() if value}
    if case.lungs is None:
        identity |= method_record(config.lungs)
    return Patient(case.case, identity, load)


def _stamp(path: Path) -> list[Any]:
    """Name, size and time of a file; of a DICOM folder, of the folder."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
