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
from normnet import pairing
from normnet.ablate.config import SCALES, AblateConfig
from normnet.pairing import PatientFiles, read_patients
from normnet.prepare import load_case
from normnet.prepare.case import method_of, method_record
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
        No patient, a patient without CT, two files for one role, too many phantoms, a CSV with gaps, or no
        such method for lungs that must be segmented.
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
    paths = config.patients
    for path in paths:
        if not path.exists():
            raise ValueError(f"patients must be files or folders that exist, got {path}")
    tables = [path for path in paths if path.suffix.lower() == ".csv"]
    if tables and len(paths) > 1:
        raise ValueError(f"patients must be one CSV or files and folders, got {len(paths)} with {tables[0]}")
    cases = read_patients(tables[0]) if tables else pairing.find_patients(paths)
    for files in cases:
        if Path(files.case).name != files.case:  # their scores go into files
            raise ValueError(f"{tables[0]}: case must be a file name, got {files.case!r}")
    if any(files.lung is None for files in cases):
        method_of(config.lungs)  # before anything is trained
    return [_scanned(files, config) for files in sorted(cases, key=lambda files: files.case)]


def _scanned(files: PatientFiles, config: AblateConfig) -> Patient:
    def load() -> Volumes:
        loaded = load_case(
            files.ct, files.lung, series=files.series, lungs=config.lungs, label=config.lung_label
        )
        return Volumes(
            loaded.hu,
            loaded.mask,
            loaded.volume.hu,
            loaded.native_mask,
            read_mask(files.lesion, loaded.volume, config.label),
            loaded.volume.spacing,
            lambda array: np.asarray(loaded.to_native(array)),
        )

    paths = {"ct": files.ct, "lesion": files.lesion, "lung": files.lung}
    identity: dict[str, Any] = {role: _stamp(path) for role, path in paths.items() if path is not None}
    chosen = {"series": files.series, "label": config.label, "lung_label": config.lung_label}
    identity |= {name: value for name, value in chosen.items() if value}
    if files.lung is None:
        identity |= method_record(config.lungs)
    return Patient(files.case, identity, load)


def _stamp(path: Path) -> list[Any]:
    """Name, size and time of a file; of a DICOM folder, of the folder."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"patients must be files that exist: {error}") from error
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
