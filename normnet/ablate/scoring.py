"""Scores of one trained setting on every patient: single models, and votes of the first 2, 3, ... of them."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from types import GenericAlias
from typing import Any, cast, get_type_hints

import numpy as np
import numpy.typing as npt

from lesionsynth.files import write_atomically
from lesionsynth.strict import build, read_json
from normnet.ablate.patients import Patient, Volumes
from normnet.ablate.runs import Trained
from normnet.cases import hear
from normnet.config import PredictConfig, to_json
from normnet.inflation import windowed_lungs
from normnet.metrics import BRIGHT, SCORES, CaseScores, evaluate_case
from normnet.model import Model
from normnet.output import without_nan
from normnet.postprocess import postprocess
from normnet.predict import predict_volume

Array = npt.NDArray[Any]
Scores = dict[str, CaseScores]
"""By patient."""


_ROW: Any = make_dataclass(
    "_ROW", [(n, kind | None if kind is float else kind) for n, kind in get_type_hints(CaseScores).items()]
)
_ROWS = GenericAlias(list, (_ROW,))
_CACHED: Any = make_dataclass(
    "_CACHED", [("key", Any), ("single", _ROWS), ("votes", _ROWS), ("without", _ROW)]
)
"""What a file of scores holds; NaN is null there."""


@dataclass
class Cell:
    """What one setting came to, at one number of iterations.

    Attributes
    ----------
    models : dict of int to Trained
        By seed.
    single : dict of int to Scores
        Each model alone, by seed.
    votes : dict of int to Scores
        The first n models' majority, by n; n = 1 is the first model alone.
    without : Scores
        No network: every bright voxel is a lesion, before post-processing. What an untrained network that is
        sure of nothing gets; a network is worth what it has beyond this.
    failures : dict of int to str
        Seeds that did not train, and why.
    error : str or None
        Why the models could not be scored.
    """

    models: dict[int, Trained] = field(default_factory=dict)
    single: dict[int, Scores] = field(default_factory=dict)
    votes: dict[int, Scores] = field(default_factory=dict)
    without: Scores = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    error: str | None = None


def majority(healthy: Sequence[npt.NDArray[np.bool_]]) -> npt.NDArray[np.bool_]:
    """Voxels that more than half of the models call healthy (PAPER.md III-A); a tie is not healthy.

    Parameters
    ----------
    healthy : sequence of (z, y, x) bool arrays
        Each model's.

    Returns
    -------
    (z, y, x) bool array
    """
    votes = np.zeros(healthy[0].shape, np.uint16)
    for one in healthy:
        votes += one
    return votes > len(healthy) // 2


def score_cell(
    cell: Cell,
    patients: Sequence[Patient],
    config: PredictConfig,
    cache: Path,
    *,
    device: str = "auto",
) -> None:
    """Fill in the scores of a cell's models.

    Parameters
    ----------
    cell : Cell
        With its models.
    patients : sequence of Patient
        Loaded one at a time, unless their scores are cached.
    config : PredictConfig
        Thresholds and post-processing.
    cache : Path
        Folder of one JSON file a patient, written when all its scores are there.
    device : str
        Where the networks run.

    Raises
    ------
    OSError, ValueError
        A patient cannot be read or does not fit; the message names it.
    """
    seeds = sorted(cell.models)
    if not seeds:
        return
    key = {
        "weights": [cell.models[seed].sha256 for seed in seeds],
        "predict": json.loads(to_json(config)),
    }
    models: list[Model] = []
    for patient in patients:
        file = cache / f"{patient.name}.json"
        own = key | {"patient": patient.identity}
        scores = _cached(file, own)
        if scores is None:
            models = models or [Model.load(cell.models[seed].weights) for seed in seeds]
            try:
                with hear() as texts:
                    scores = _score_patient(patient.load(), models, config, device)
            except (OSError, TypeError, ValueError) as error:
                raise ValueError(f"patient {patient.name}: {error}") from error
            for one in scores["votes"]:  # the first of them is the first model alone, too
                one["notes"] += texts
            for text in texts:
                warnings.warn(f"{patient.name}: {text}", stacklevel=2)
            cache.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps({"key": own, **scores}, indent=1) + "\n")
        cell.without[patient.name] = _scores(scores["without"])
        for seed, one in zip(seeds, scores["single"], strict=True):
            cell.single.setdefault(seed, {})[patient.name] = _scores(one)
        for count, one in enumerate(scores["votes"], start=1):
            cell.votes.setdefault(count, {})[patient.name] = _scores(one)


def _score_patient(
    volumes: Volumes, models: Sequence[Model], config: PredictConfig, device: str
) -> dict[str, Any]:
    """Every network sees the patient once: a vote needs only what each model calls healthy."""
    healthy: list[npt.NDArray[np.bool_]] = []
    mean: Array = np.zeros(volumes.hu.shape, np.float32)
    single, votes = [], []
    for model in models:
        found = predict_volume(volumes.hu, volumes.lung_mask, [model], config, device=device)
        healthy.append(found.healthy)
        mean += found.probability
        single.append(_score(volumes, found.lesions, found.healthy, found.probability))
    image = windowed_lungs(volumes.hu, volumes.lung_mask, found.inflation)
    votes.append(single[0])
    for count in range(2, len(models) + 1):
        called = majority(healthy[:count])
        lesions = postprocess(image, volumes.lung_mask, called, config.postprocess).final
        whole = mean / count if count == len(models) else None  # an AUC of all models, not of each subset
        votes.append(_score(volumes, lesions, called, whole))
    nothing = np.zeros(image.shape, np.bool_)
    lesions = postprocess(image, volumes.lung_mask, nothing, config.postprocess).final
    return {"single": single, "votes": votes, "without": _score(volumes, lesions, nothing, None)}


def _score(volumes: Volumes, lesions: Array, healthy: Array, probability: Array | None) -> dict[str, Any]:
    """Compare with the truth on the scan's own grid, as `normnet.predict` and `normnet.evaluate` would."""
    if probability is not None:
        # interpolation rounds; outside the lung a voxel has no probability
        probability = np.clip(volumes.to_native(probability), 0, 1)
    scores = evaluate_case(
        volumes.to_native(lesions) & volumes.native_lung,
        volumes.truth,
        volumes.native_lung,
        volumes.native_hu,
        probability,
        healthy=volumes.to_native(healthy),
        spacing=volumes.spacing,
    )
    found: dict[str, Any] = without_nan(scores)
    return found


def _cached(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    try:
        record = read_json(file)
    except (OSError, ValueError):  # of no use, whatever it holds
        return None
    if not isinstance(record, dict) or record.get("key") != key:
        return None
    try:
        build(_CACHED, record)
    except ValueError:
        return None
    rows = [record["without"], *record["single"], *record["votes"]]
    bounds = {**dict.fromkeys(_ROW.__annotations__, math.inf), **dict.fromkeys((*SCORES, *BRIGHT), 1.0)}
    whole = len(record["single"]) == len(record["votes"]) == len(key["weights"]) and all(
        isinstance(v, list) or v is None or 0 <= v <= bounds[name] for row in rows for name, v in row.items()
    )
    return record if whole else None


def _scores(record: dict[str, Any]) -> CaseScores:
    return cast("CaseScores", {k: math.nan if value is None else value for k, value in record.items()})
