"""What ``<case>.json`` beside maps says: how they were made, and what was measured on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.strict import build, check_fields, hints_of, name_of, read_json, rule_of, shown
from lesionsynth.window import HU_RANGE
from normnet.config import HEALTHY_HU, WEIGHTS, PredictConfig, to_json

Mask = npt.NDArray[np.bool_]
Record = dict[str, Any]

FILES: Mapping[str, str] = {
    "lesions": "_lesions.nii.gz",
    "lung": "_lung.nii.gz",
    "classical": "_classical.nii.gz",
    "core": "_core.nii.gz",
    "probability": "_probability.nii.gz",
    "healthy": "_healthy.nii.gz",
    "dicom_seg": "_lesions.dcm",
}
"""What a case may have, and how its files end."""
SETTINGS = "settings.json"
"""Settings and models of the last call, beside the cases."""
SAME = ("ct", "series", "lungs_from", "lungs_sha256", "label", "settings", "models")
"""Entries of a record that make it the result of the same call."""
STAMPS = {"ct_stamp": "the CT", "lungs_stamp": "the lung mask"}
"""Entries that tell whether a file was changed since; see `normnet.stamps`. Older records have none."""
VOLUMES = tuple(
    name.format(side)
    for side in ("", "right_", "left_")
    for name in ("{}lung_ml", "{}lesion_ml", "{}percent")
)
"""Volumes of a record, in the order of the table's columns."""
PREDICT = "normnet.predict"
"""Maker of maps whose record has models that voted."""


def read_record(path: Path) -> Record:
    """Read the ``<case>.json`` of a prediction.

    Raises
    ------
    FileNotFoundError
        There is none.
    ValueError
        It is something else.
    """
    try:
        record = read_json(path)
    except ValueError as error:
        raise ValueError(
            f"{name_of(path)}: not the record of a prediction: {rule_of(error, path)}"
        ) from error
    if wrong := _wrong(record):
        raise ValueError(f"{name_of(path)}: not the record of a prediction: {wrong}")
    # earlier versions knew of no labels, and of no weights for lungs, and called a method otherwise
    if record["lungs_from"] == "thresholds":
        record["lungs_from"] = "classical"
    return {"label": None, "lungs_sha256": None, **record}


def read_records(folder: Path) -> tuple[list[Record], dict[str, str]]:
    """Read the records of a folder by name, and tell what is wrong with damaged ones.

    Parameters
    ----------
    folder : Path
        Where maps are. JSON of other kinds without a map of its name is passed over.

    Returns
    -------
    records : list of dict
    failures : dict of str to str
        By case.
    """
    records, failures = [], {}
    for path in sorted(folder.glob("*.json")):
        if path.name == SETTINGS or path.name[0] == ".":
            continue
        try:
            records.append(read_record(path))
        except (ValueError, OSError) as error:
            if path.with_name(f"{path.stem}{FILES['lesions']}").exists():
                failures[path.stem] = str(error)
    return records, failures


def maker_of(record: Any) -> str | None:
    """Tell what wrote a record: `PREDICT`, or a baseline and its method; None where it is something else."""
    if _wrong(record) is None:
        return PREDICT
    if isinstance(record, dict) and isinstance(record.get("files"), dict):
        baseline = record.get("baseline")
        return baseline_maker(str(baseline.get("method"))) if isinstance(baseline, dict) else None
    return None


def baseline_maker(method: str) -> str:
    """Name the maker of the maps of a comparison method."""
    return f"normnet.baselines ({method})"


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What readers show of a model; records of earlier versions say less."""

    name: str = ""
    sha256: str = ""
    probability: float = 0.5
    calibrated: bool = False
    threshold_hu: float | None = None
    inflation_hu: float | None = None

    def __post_init__(self) -> None:
        domains = {"probability": (0.0, 1.0), "threshold_hu": HU_RANGE, "inflation_hu": HEALTHY_HU}
        check_fields(self, domains)


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What readers of a record rely on; it may say more."""

    case: str
    ct: str
    series: str | None
    lungs_from: Any
    settings: Any
    models: Any
    volumes: dict[str, float | None]
    files: dict[str, str | None]
    inflation: float = 1.0
    label: Any = None
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("case", "ct"):
            if not 0 < len(text := getattr(self, name)) <= 4096 or "\0" in text:
                raise ValueError(f"{name} must be a name, got {shown(text)}")
        if not isinstance(self.settings, dict):
            raise ValueError(f"settings must be a JSON object, got {shown(self.settings)}")
        if not isinstance(self.models, list) or not all(isinstance(m, dict) for m in self.models):
            raise ValueError(f"models must be a list of JSON objects, got {shown(self.models)}")
        known = hints_of(_Model)
        for place, model in enumerate(self.models):
            build(_Model, {k: v for k, v in model.items() if k in known}, f"models[{place}]")
        check_fields(self, {"inflation": (0.1, 10.0)})
        for name, value in self.volumes.items():
            if value is not None and not 0 <= value < 1e9:
                raise ValueError(f"volumes.{shown(name)} must be null or in [0, 1e9), got {shown(value)}")
        for name in ("lung_ml", "lesion_ml"):
            if self.volumes.get(name) is None:
                raise ValueError(f"volumes.{name} must be a number, got {shown(self.volumes.get(name))}")
        for kind in ("lesions", "lung"):
            if self.files.get(kind) is None:
                raise ValueError(f"files.{kind} must be a file's name, got {shown(self.files.get(kind))}")
        for kind, file in self.files.items():
            if file is not None and (Path(file).name != file or file[:1] in ("", ".") or "\0" in file):
                raise ValueError(f"files.{shown(kind)} must be a file's name, got {shown(file)}")


def _wrong(record: Any) -> str | None:
    """Tell what is wrong with a prediction's record; None where it may be read without further care."""
    if not isinstance(record, dict):
        return f"must be a JSON object, got {type(record).__name__}"
    try:
        build(_Made, {name: record[name] for name in hints_of(_Made) if name in record})
    except ValueError as error:
        return str(error)
    return None


def model_name(file: Path) -> str:
    """Name weights: by their run, or by their file."""
    return file.resolve().parent.name if file.name == WEIGHTS else file.stem


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def as_record(config: PredictConfig) -> Record:
    """Return a configuration as JSON reads it back."""
    record: Record = json.loads(to_json(config))
    return record


def volumes_of(
    lesions: Mask, lung: Mask, spacing: Sequence[float], sides: tuple[Mask, Mask] | None = None
) -> dict[str, float | None]:
    """Measure lungs and lesions.

    Parameters
    ----------
    lesions, lung : (z, y, x) bool arrays
        On one grid.
    spacing : (3,) floats
        Its voxel size in mm.
    sides : pair of (z, y, x) bool arrays, optional
        The patient's right and left lung.

    Returns
    -------
    dict
        `VOLUMES`: ml and percent of the lung, of both lungs and of each; None for a side that is not known
        and for the percentage of a lung without voxels.
    """
    ml = float(np.prod(spacing)) / 1000.0
    volumes: dict[str, float | None] = dict.fromkeys(VOLUMES)
    parts = {"": lung} if sides is None else {"": lung, "right_": sides[0], "left_": sides[1]}
    for side, part in parts.items():
        whole, ill = int(np.count_nonzero(part)), int(np.count_nonzero(lesions & part))
        volumes[f"{side}lung_ml"], volumes[f"{side}lesion_ml"] = whole * ml, ill * ml
        volumes[f"{side}percent"] = 100.0 * ill / whole if whole else None
    return volumes
