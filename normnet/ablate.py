"""Ablations: Tables IV, V and VI of the paper, as one command each.

``python -m normnet.ablate voting|modules|threshold --output FOLDER`` trains, predicts, scores, and lays the
result out as the paper prints it, with the paper's numbers beside. A *cell* is a setting of the generator at
a number of iterations, with all its models; what is finished of one is not done again:

- ``runs/<setting>/seed<k>/`` is a run of `normnet.train`, with ``marks.json`` and the weights of every *mark*
  beside: a mark is a number of iterations at which the run paused, as Table IV has six of;
- ``scores/<setting>/<mark>/<patient>.json`` holds scores, and the SHA-256 of the weights.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast, get_type_hints

import numpy as np
import numpy.typing as npt
import pandas as pd
import tyro
from pydantic import ConfigDict, Field, create_model

from lesionsynth.commands import plainly, printable, run
from lesionsynth.files import claimed, refuse_foreign, replacing, sha256, write_atomically
from lesionsynth.io import read_mask
from lesionsynth.strict import name_of, read_json, shown
from normnet.cases import Case, find_cases, hear
from normnet.config import (
    PAPER_THRESHOLD_HU,
    WEIGHTS,
    Count,
    Minutes,
    ModelConfig,
    PredictConfig,
    Seed,
    Shape,
    Steps,
    Threads,
    TrainConfig,
    check_phantoms,
    paper,
    phantom,
    read_config,
    to_json,
)
from normnet.data import PATIENT_SEED, PHANTOM_SEED, phantom_patient
from normnet.device import choose_device, cpu_settings
from normnet.draw import curve
from normnet.inflation import windowed_lungs
from normnet.metrics import BRIGHT, SCORES, CaseScores, evaluate_case, mean_and_sd, percent, summarise
from normnet.model import HEADER, Model, read_tensors
from normnet.output import dumps, without_nan
from normnet.paper import ITERATIONS, NOMINAL, TABLE_IV, TABLE_V, TABLE_VI, Table, as_text
from normnet.postprocess import postprocess
from normnet.predict import predict_volume
from normnet.prepare import load_case
from normnet.prepare.case import LungMethod, check_lungs, method_record
from normnet.prepare.store import Store
from normnet.report import Page
from normnet.settings import File, check, from_record, settings
from normnet.sheets import sheet
from normnet.train import CONFIG, STATE, train

__all__ = ["PAPER", "SCALES", "SMALL", "AblateConfig", "AblationTable", "Scale", "ablate"]

Array = npt.NDArray[Any]
TableName = Literal["voting", "modules", "threshold"]
TITLES: dict[TableName, str] = {
    "voting": "Table IV: Dice of the models and of their vote, by iterations (%)",
    "modules": "Table V: Dice with modules of the generator switched on and off (%)",
    "threshold": "Table VI: Dice under different HU thresholds (%)",
}
FAILED, PENDING = "failed", "pending"
FILES = ("table.csv", "table.md", "report.html", "results.json")
"""What a table is written as; the last proves that the others are its own."""
RECORDED = ("table", "title", "scale", "header", "rows", "paper_dice_percent", "cells", "failures", "notes")
"""Fields that every record has had."""
MOST_RESULTS = 2**26
"""Longest results.json in bytes."""
FAILURES = (ArithmeticError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
"""What ends a row, not the ablation: a broken file, a device without memory, a loss that is NaN."""


# ---- what is asked for

OWN = ("output", "resume", "seed")
"""Training settings that belong to the ablation, whatever the table; and those that a table varies:"""
VARIED: dict[TableName, str] = {"voting": "schedule", "modules": "lesions", "threshold": "threshold_hu"}
Members = Annotated[int, Field(ge=1, le=1000)]
Labels = Annotated[tuple[Annotated[int, Field(ge=-(2**63), lt=2**63)], ...], Field(fail_fast=True)]


@settings
class Scale:
    """How large an ablation is."""

    train: TrainConfig
    """Every run, but for what a table varies."""
    seeds: Members
    """Models that vote."""
    patients: Count
    """Phantoms with pneumonia, where no patients are given."""
    patient_shape: Shape
    """Their size (z, y, x), in voxels of 1.0 x 0.8 x 0.8 mm."""


SMALL = Scale(
    train=replace(
        phantom(),
        model=ModelConfig(channels=(8, 16, 32), strides=(2, 2)), crop=96, iterations=300, minutes=None,
        phantoms=2, phantom_shape=(48, 192, 240),
    ),
    seeds=3, patients=3, patient_shape=(48, 192, 240),
)  # fmt: skip
"""A CPU's work."""
PAPER = Scale(train=paper(), seeds=5, patients=10, patient_shape=(64, 512, 512))
"""The paper's sizes (IV-B.3): a GPU's work."""
SCALES: dict[str, Scale] = {"small": SMALL, "paper": PAPER}
"""Every scale, by the name the command line uses."""


@settings
class AblateConfig:
    """Reproduce Table IV (voting), V (modules) or VI (threshold) of the paper."""

    table: Annotated[TableName, tyro.conf.Positional]
    """voting: number of models and of iterations; modules: parts of the lesion generator switched off;
    threshold: HU above which the network answers."""
    output: File
    """Folder of one table: table.csv, table.md, results.json, report.html; what is finished in it is kept."""
    scale: Literal["small", "paper"] = "small"
    """small: three small networks a row on crops of phantoms, for a CPU; paper: five large ones, 3,500
    iterations of 8 x 32 x 512 x 512, for a GPU."""
    data: File | None = None
    """Store written by `normnet.prepare`, to train on; phantoms where omitted."""
    patients: tuple[File, ...] = ()
    """CT: files, DICOM folders, and folders of these; or one CSV with the columns case, ct, lesions and, if
    any, lungs. Phantoms with pneumonia where omitted."""
    truth: File | None = None
    """Folder with the annotated lesions of the CT: <case>.nii.gz, or the only <case>_*.nii.gz."""
    masks: File | None = None
    """Folder with their lung masks, named alike; the lungs are segmented where omitted."""
    label: Labels = ()
    """Labels of the truth that are lesions; all above zero where omitted."""
    lung_label: Labels = ()
    """Labels of the lung masks that are lungs; all above zero where omitted."""
    lungs: LungMethod = "network"
    """How the lungs of patients without a lung mask are segmented; see `normnet.predict`."""
    rows: tuple[str, ...] = ()
    """Only these: voting, model_1, ...; covid_lung, no_shapes, ...; or thresholds in HU; all by default."""
    config: File | None = None
    """JSON file with fields of `TrainConfig` that replace the scale's."""
    runs: File | None = None
    """Folder of the training runs, which tables may share; OUTPUT/runs where omitted."""
    seeds: Members | None = None
    """Models that vote; the scale's where omitted."""
    iterations: Steps | None = None
    """Optimiser steps of a run (what the paper has 3,500 of); the scale's where omitted."""
    minutes: Minutes | None = None
    """Stop each run after this much training time, should it come first."""
    device: str | None = None
    """Where to train and predict: auto, cpu, cuda, ...; the scale's where omitted."""
    threads: Threads | None = None
    """CPU threads; all cores where omitted."""
    phantom_patients: Count | None = None
    """Phantoms with pneumonia, without `patients`; the scale's where omitted."""
    phantom_shape: Shape | None = None
    """Their size (z, y, x); the scale's where omitted."""
    predict: PredictConfig = PredictConfig()
    """Thresholds and post-processing; T and slab are those of training."""

    def __post_init__(self) -> None:
        """Check what excludes each other."""
        if self.phantom_shape is not None:
            check_phantoms(self.phantom_shape)
        if self.patients and (self.phantom_patients or self.phantom_shape):
            raise ValueError("patients replaces phantom_patients and phantom_shape: give one or the other")
        files = (self.truth, self.masks, *self.label, *self.lung_label)
        if any(given is not None for given in files) and not self.patients:
            raise ValueError(
                "truth, masks, label and lung_label must be omitted without patients: phantoms have none"
            )
        level, rule = self.predict.postprocess.threshold_hu, "left to the training settings"
        check("predict.slab", self.predict.slab, self.predict.slab == PredictConfig.slab, rule)
        check("predict.postprocess.threshold_hu", level, level is None, rule)
        check("rows", self.rows, len(set(self.rows)) == len(self.rows), "named once each")


def training(config: AblateConfig) -> TrainConfig:
    """Return the settings of every run: the scale's, then the file's, then the command line's.

    ValueError where the file is no JSON object, names a field that is unknown or not free here, or a value is
    out of its range.
    """
    base, path = SCALES[config.scale].train, config.config
    if path is not None:
        try:
            changes = read_json(path)
        except OSError as error:
            raise ValueError(f"config must be a readable file: {error}") from error
        except ValueError as error:
            raise ValueError(f"config must be JSON, got {error}") from error
        if not isinstance(changes, dict):
            raise ValueError(f"config must be a JSON object, got {type(changes).__name__} in {path}")
        for name in (*OWN, VARIED[config.table]):
            if name in changes:
                raise ValueError(f"config must leave {name} to the ablation, got it in {path}")
        record = asdict(base)
        if isinstance(changes.get("model"), dict):
            changes["model"] = record["model"] | changes["model"]
        try:
            base = from_record(TrainConfig, record | changes)
            if base.task != "lesions":
                raise ValueError(f"task must be lesions, got {base.task}")
        except ValueError as error:
            raise ValueError(f"{name_of(path)}: {error}") from error
    given = {name: getattr(config, name) for name in ("data", "iterations", "minutes", "device", "threads")}
    return replace(base, **{name: value for name, value in given.items() if value is not None})


# ---- a table: train, predict, evaluate

Scores = dict[str, CaseScores]
"""By patient."""


@settings
class Trained:
    """Weights of one model at one mark, as `MARKS` lists them."""

    seed: Seed
    weights: str
    """File, safetensors; in `MARKS` its name."""
    iterations: Steps
    """Made; fewer than the mark's where time ran out."""
    seconds: Annotated[float, Field(ge=0, le=1e10)]
    """Training time."""
    sha256: str
    minutes: Minutes | None
    """The mark's."""


@dataclass
class Cell:
    """What one setting came to, at one number of iterations."""

    models: dict[int, Trained] = field(default_factory=dict)
    """By seed."""
    single: dict[int, Scores] = field(default_factory=dict)
    """Each model alone, by seed."""
    votes: dict[int, Scores] = field(default_factory=dict)
    """The first n models' majority, by n; n = 1 is the first model alone."""
    without: Scores = field(default_factory=dict)
    """No network: every bright voxel is a lesion, before post-processing. What an untrained network that is
    sure of nothing gets; a network is worth what it has beyond this."""
    failures: dict[int, str] = field(default_factory=dict)
    """Seeds that did not train, and why."""
    error: str | None = None
    """Why the models could not be scored."""

    def dice(self) -> dict[str, list[float]]:
        """Return the Dice of patients by ``model_<k>``, ``vote_<n>`` of the first n models, and ``nothing``.

        By ``models`` there is the mean of each model. What failed is left out, and so are controls.
        """
        found = {"nothing": self.without}
        if not self.error:
            found |= {f"model_{seed + 1}": scores for seed, scores in self.single.items()}
            whole = min(self.failures, default=math.inf)
            found |= {f"vote_{n}": scores for n, scores in self.votes.items() if n <= whole}
        dice = {
            who: [one["dsc"] for one in scores.values() if not one["control"]]
            for who, scores in found.items()
            if scores
        }
        means = [mean_and_sd(values)["mean"] for who, values in dice.items() if who.startswith("model_")]
        return dice | {"models": means} if means and not self.failures else dice


@dataclass(frozen=True)
class AblationTable:
    """One table of the paper, measured."""

    table: TableName
    title: str
    header: list[str]
    rows: list[list[str]]
    """As the paper prints them, its numbers labelled "(paper)"; Dice of the vote as mean±SD over patients, in
    percent; "failed" or "pending" where there is none."""
    details: list[Table] = field(default_factory=list)
    """What the paper does not print: single models, patients, training."""
    cells: dict[str, Cell] = field(default_factory=dict)
    """All scores, by row, or by column of Table IV."""
    failures: list[str] = field(default_factory=list)
    """What went wrong."""

    @property
    def frame(self) -> pd.DataFrame:
        """Rows under their header."""
        return pd.DataFrame(self.rows, columns=self.header, dtype=object)

    def csv(self) -> str:
        """Return the table as CSV."""
        return sheet([self.header, *self.rows])

    def markdown(self) -> str:
        """Return the table and its details as Markdown."""
        return "\n".join(table.markdown() for table in (Table(self.title, self.frame), *self.details))


def ablate(config: AblateConfig, *, say: Callable[[str], None] | None = None) -> AblationTable:
    """Reproduce one table.

    Parameters
    ----------
    config : AblateConfig
        Which table, its size and its data.
    say : callable, optional
        Receives a line per step; also turns progress bars on.

    Returns
    -------
    AblationTable
        Also written into `config.output`, after every step. Rows that failed say so, and `failures` why.

    Raises
    ------
    FileNotFoundError, ValueError
        A setting, the store or the list of patients does not fit, or `output` holds another table.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("ablate runs in one process; under a launcher, give each process its own rows")
    base = training(config)
    count = config.seeds or SCALES[config.scale].seeds
    rows = _rows(config, count)
    seeds = list(range(count))
    if config.table == "voting" and "voting" not in rows:  # nobody asks for the vote of all
        seeds = [int(row.removeprefix("model_")) - 1 for row in rows]
    steps = _steps(config.table, base, rows)
    patients = find_patients(config)
    choose_device(base.device)
    if base.data is not None:
        Store.open(base.data)
    _claim(config)
    cells: dict[str, Cell] = {}
    with claimed(config.output):
        for number, (name, step) in enumerate(steps.items(), start=1):
            if say:
                what = f"{len(seeds)} models, {_mark(step)} iterations"
                say(f"{number}/{len(steps)} {config.table} {name}: {what}")
            cells[name] = _compute(config, step, seeds, patients, say)
            table = _lay_out(config.table, cells, rows, steps, count)
            _claim(config)  # again: something may have come meanwhile
            _write(table, config, base, count, patients)
    return table


def _rows(config: AblateConfig, count: int) -> list[str]:
    voting = ["voting", *(f"model_{k + 1}" for k in range(count))]
    known = {"voting": voting, "modules": list(TABLE_V), "threshold": list(TABLE_VI)}[config.table]
    if unknown := [row for row in config.rows if row not in known]:
        raise ValueError(f"rows must be among {', '.join(known)}, got {unknown[0]}")
    return [row for row in known if row in config.rows or not config.rows]


def _steps(table: TableName, base: TrainConfig, rows: Sequence[str]) -> dict[str, TrainConfig]:
    """Return the settings of every cell: by row; or by column of Table IV, with so much of the training."""
    if table == "modules":
        return {row: replace(base, lesions=row) for row in rows}
    if table == "threshold":
        return {row: replace(base, threshold_hu=float(row)) for row in rows}
    shares = {str(n): n / NOMINAL for n in ITERATIONS}
    return {
        n: replace(
            base,
            iterations=max(1, round(base.iterations * share)),
            minutes=None if base.minutes is None else base.minutes * share,
        )
        for n, share in shares.items()
    }


def _mark(step: TrainConfig) -> str:
    """Name of a mark: after so many iterations, or so much training time."""
    return f"{step.iterations}" if step.minutes is None else f"{step.iterations}-{step.minutes:g}min"


def _claim(config: AblateConfig) -> None:
    """Refuse a folder that holds another table."""
    file = config.output / "results.json"
    if file.exists():
        try:
            record = read_json(file, MOST_RESULTS)
            other, _ = record["table"], [record[name] for name in RECORDED]
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(
                f"output: {file} must be the results of an ablation, a JSON object with its table; name "
                "another folder, or remove the file"
            ) from error
        if other != config.table:
            raise ValueError(
                f"output: {config.output} already holds the table {other!r}; name another folder "
                "(--runs shares the training runs)"
            )
    refuse_foreign(config.output, FILES, ours=file.exists(), maker="an ablation")
    config.output.mkdir(parents=True, exist_ok=True)


def _compute(
    config: AblateConfig,
    step: TrainConfig,
    seeds: Sequence[int],
    patients: Sequence[Patient],
    say: Callable[[str], None] | None,
) -> Cell:
    """Train, predict and evaluate the models of one cell."""
    cell, level, tell = Cell(), step.threshold_hu, say or (lambda line: None)
    setting = step.lesions if level == PAPER_THRESHOLD_HU else f"{step.lesions}_T{level:g}"
    for seed in seeds:
        folder = (config.runs or config.output / "runs") / setting / f"seed{seed}"
        try:
            own = replace(step, seed=seed, output=folder)
            cell.models[seed] = _train(own, progress_bar=say is not None)
        except FAILURES as error:
            cell.failures[seed] = f"{type(error).__name__}: {error}"
            tell(f"    seed {seed} failed: {error}")
    smooth = replace(config.predict.postprocess, threshold_hu=level)
    predict = replace(config.predict, slab=step.slab, postprocess=smooth)
    try:
        with cpu_settings(step.threads):
            _score(cell, patients, predict, config.output / "scores" / setting / _mark(step), step.device)
    except FAILURES as error:
        cell.error = f"{type(error).__name__}: {error}"
        tell(f"    failed: {cell.error}")
    return cell


# ---- train: finished runs are reused, interrupted ones continued

MARKS = "marks.json"
"""Finished marks of a run folder; written last."""
FREE = ("output", "resume", "iterations", "minutes", "device", "threads", "cache")
"""Settings that say how far, where and how fast, not what."""


def _train(config: TrainConfig, *, progress_bar: bool) -> Trained:
    """Train up to the mark of these settings, or return what an earlier call trained.

    ValueError where the folder holds a run of other settings, one that is past the mark, or changed weights.
    """
    folder, mark = config.output, _mark(config)
    past = f"{folder} must not be past what is asked for, {mark} iterations: it has {{}}; name another output"
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder, "runs"):
        _check_settings(folder, config)
        marks = _read_marks(folder)
        if found := marks.get(mark):
            if not Path(found.weights).exists() or sha256(Path(found.weights)) != found.sha256:
                rule = "must be as training left it (SHA-256); remove"
                raise ValueError(f"{found.weights} {rule} {folder} to train again")
            return found
        for name, other in marks.items():
            later = (other.minutes or math.inf) > (config.minutes or math.inf)
            if later or other.iterations > config.iterations:
                raise ValueError(past.format(name))
        if marks and not (folder / STATE).exists():
            raise ValueError(f"{folder} must hold {STATE}, to continue from; it has none")
        resume = any((folder / name).exists() for name in (CONFIG, STATE))
        result = train(replace(config, resume=resume), progress_bar=progress_bar)
        if result.iterations > config.iterations:
            raise ValueError(past.format(result.iterations))
        weights = folder / f"{mark}.safetensors"
        _copy(folder / WEIGHTS, weights)
        marks[mark] = Trained(
            seed=config.seed,
            weights=str(weights),
            iterations=result.iterations,
            seconds=round(result.seconds, 2),
            sha256=sha256(weights),
            minutes=config.minutes,
        )
        named = {name: asdict(one) | {"weights": Path(one.weights).name} for name, one in marks.items()}
        write_atomically(folder / MARKS, json.dumps(named, indent=2) + "\n")
    return marks[mark]


def _check_settings(folder: Path, wanted: TrainConfig) -> None:
    file = folder / CONFIG
    if not file.exists():
        return
    try:
        stored = read_config(TrainConfig, file)
    except (OSError, ValueError) as error:
        told = f"{file} must be as training left it; remove {folder} to train again: {error}"
        raise ValueError(told) from error
    values = {name: value for name, value in vars(wanted).items() if name not in FREE}
    if different := [name for name, value in values.items() if getattr(stored, name) != value]:
        told = f"{folder} must hold a run of the same settings; {', '.join(different)} differ"
        raise ValueError(f"{told}: give the same ones, or name another output")


def _read_marks(folder: Path) -> dict[str, Trained]:
    file = folder / MARKS
    if not file.exists():
        return {}
    try:
        record = read_json(file)
        if not isinstance(record, dict):
            raise ValueError(f"got {shown(record)}")
        marks = {name: from_record(Trained, mark, shown(name)) for name, mark in record.items()}
        for name, mark in marks.items():
            named = Path(mark.weights).name == mark.weights and mark.weights[:1] not in ("", ".")
            check(f"{shown(name)}.weights", mark.weights, named, "a file's name")
    except (OSError, ValueError) as error:
        needed = ", ".join(sorted(one.name for one in fields(Trained)))
        rule = f"{file} must be a JSON object with {needed} for each mark; remove {folder}"
        raise ValueError(f"{rule}: {error}") from error
    return {name: replace(mark, weights=str(folder / mark.weights)) for name, mark in marks.items()}


def _copy(source: Path, target: Path) -> None:
    """Copy so that a reader sees a whole file or none; nothing but weights of ours is replaced."""
    if os.path.lexists(target) and (target.is_symlink() or HEADER not in read_tensors(target)[1]):
        raise ValueError(f"{target} must be weights that training wrote, or nothing: move it away")
    with replacing(target) as beside:
        shutil.copyfile(source, beside)


# ---- predict: patients, loaded one at a time


class Volumes(NamedTuple):
    """One patient in memory, (z, y, x)."""

    hu: Array
    """On the training grid, 1.0 x 0.8 x 0.8 mm, as is `lung_mask`: what the network sees."""
    lung_mask: Array
    native_hu: Array
    """On the scan's own grid, as are the next ones: what is scored."""
    native_lung: Array
    truth: Array
    spacing: tuple[float, float, float]
    """Of the scan's own grid, in mm."""
    to_native: Callable[[Array], Array]
    """Brings a mask (nearest voxel) or floats (linear) from the one grid to the other."""


class Patient(NamedTuple):
    """One patient, not loaded yet."""

    name: str
    identity: dict[str, Any]
    """What the scores depend on; a cached score of another identity does not count."""
    load: Callable[[], Volumes]


def find_patients(config: AblateConfig) -> list[Patient]:
    """Return the patients of an ablation, nothing loaded yet.

    Raises as `normnet.cases.find_cases` and `normnet.prepare.case.check_lungs`; ValueError also for a patient
    without truth, or whose files cannot be told, and for too many phantoms.
    """
    if not config.patients:
        count = config.phantom_patients or SCALES[config.scale].patients
        most = PHANTOM_SEED - PATIENT_SEED
        if count > most:
            raise ValueError(f"phantom_patients must be <= {most}, got {count}")
        shape = config.phantom_shape or SCALES[config.scale].patient_shape
        return [_phantom(k, shape) for k in range(count)]
    if lost := [path for path in config.patients if not path.exists()]:
        raise ValueError(f"patients must be files or folders that exist, got {lost[0]}")
    cases = find_cases(config.patients, truth=config.truth, masks=config.masks)
    for case in cases:
        lacking = "" if case.lesions else "lesions must be given: truth, or a column of the table"
        if problem := case.problem or lacking:
            raise ValueError(f"patient {name_of(case.case)}: {problem}")
        if Path(case.case).name != case.case:  # their scores go into files
            raise ValueError(f"{name_of(config.patients[0])}: case must be a file name, got {case.case!r}")
    check_lungs(cases, config.lungs, config.lung_label)  # before anything is trained
    return [_scanned(case, config) for case in sorted(cases, key=lambda case: case.case)]


def _phantom(number: int, shape: tuple[int, int, int]) -> Patient:
    def load() -> Volumes:
        chest, lesions = phantom_patient(number, shape)
        both = chest.hu, chest.lung_mask
        return Volumes(*both, *both, lesions, chest.spacing, lambda array: array)

    return Patient(f"phantom_{number + 1}", {"phantom": PATIENT_SEED + number, "shape": list(shape)}, load)


def _scanned(case: Case, config: AblateConfig) -> Patient:
    lesions = case.lesions
    assert lesions is not None

    def load() -> Volumes:
        loaded = load_case(
            case.ct, case.lungs, series=case.series, lungs=config.lungs, label=config.lung_label
        )
        ct, lungs = loaded.volume, loaded.native_mask
        truth = read_mask(lesions, ct, config.label)
        return Volumes(loaded.hu, loaded.mask, ct.hu, lungs, truth, ct.spacing, loaded.to_native)

    identity: dict[str, Any] = {}
    for role, path in (("ct", case.ct), ("lesion", lesions), ("lung", case.lungs)):
        if path is not None:  # of a DICOM folder size and time are the folder's
            status = path.stat()
            identity[role] = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    chosen = {"series": case.series, "label": [*config.label], "lung_label": [*config.lung_label]}
    identity |= {name: value for name, value in chosen.items() if value}
    return Patient(case.case, identity | ({} if case.lungs else method_record(config.lungs)), load)


# ---- evaluate: single models, and votes of the first 2, 3, ... of them


def _score(cell: Cell, patients: Sequence[Patient], config: PredictConfig, cache: Path, device: str) -> None:
    """Fill in the scores of a cell's models; those that are finished are in the folder `cache`."""
    seeds = sorted(cell.models)
    if not seeds:
        return
    key = {"weights": [cell.models[seed].sha256 for seed in seeds], "predict": json.loads(to_json(config))}
    models: list[Model] = []
    for patient in patients:
        file, own = cache / f"{patient.name}.json", key | {"patient": patient.identity}
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
        cell.without[patient.name] = _with_nan(scores["without"])
        for seed, one in zip(seeds, scores["single"], strict=True):
            cell.single.setdefault(seed, {})[patient.name] = _with_nan(one)
        for count, one in enumerate(scores["votes"], start=1):
            cell.votes.setdefault(count, {})[patient.name] = _with_nan(one)


def _score_patient(
    volumes: Volumes, models: Sequence[Model], config: PredictConfig, device: str
) -> dict[str, Any]:
    """Every network sees the patient once: a vote needs only what each model calls healthy."""
    healthy: list[Array] = []
    mean: Array = np.zeros(volumes.hu.shape, np.float32)
    single, votes = [], []
    for model in models:
        found = predict_volume(volumes.hu, volumes.lung_mask, [model], config, device=device)
        healthy.append(found.healthy)
        mean += found.probability
        single.append(_compare(volumes, found.lesions, found.healthy, found.probability))
    image = windowed_lungs(volumes.hu, volumes.lung_mask, found.inflation)

    def judge(called: Array, probability: Array | None) -> dict[str, Any]:
        lesions = postprocess(image, volumes.lung_mask, called, config.postprocess).final
        return _compare(volumes, lesions, called, probability)

    votes.append(single[0])
    for count in range(2, len(models) + 1):
        # an AUC of all models, not of each subset
        votes.append(judge(majority(healthy[:count]), mean / count if count == len(models) else None))
    return {"single": single, "votes": votes, "without": judge(np.zeros(image.shape, np.bool_), None)}


def majority(healthy: Sequence[npt.NDArray[np.bool_]]) -> npt.NDArray[np.bool_]:
    """Voxels that more than half of the models call healthy (PAPER.md III-A), each in a (z, y, x) bool array.

    A tie is not healthy.
    """
    votes = reduce(np.add, healthy, np.zeros(healthy[0].shape, np.uint16))
    return np.asarray(votes > len(healthy) // 2)


def _compare(volumes: Volumes, lesions: Array, healthy: Array, probability: Array | None) -> dict[str, Any]:
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
    return cast("dict[str, Any]", without_nan(scores))


_SHARE, _STRICT = Annotated[float, Field(ge=0, le=1)] | None, ConfigDict(extra="forbid", strict=True)
_KINDS: dict[Any, Any] = {float: Annotated[float, Field(ge=0)] | None, int: Annotated[int, Field(ge=0)]}
_FIELDS: Any = {
    name: (_SHARE if name in (*SCORES, *BRIGHT) else _KINDS.get(kind, kind), ...)
    for name, kind in get_type_hints(CaseScores).items()
}
_ROW: Any = create_model("_ROW", __config__=_STRICT, **_FIELDS)
_ROWS = (list[_ROW], ...)
_CACHED: Any = create_model(
    "_CACHED", __config__=_STRICT, key=(Any, ...), single=_ROWS, votes=_ROWS, without=(_ROW, ...)
)
"""What a file of scores holds; NaN is null there."""


def _cached(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """Read scores; None where there are none, of other weights, settings or files, or damaged ones."""
    try:
        record: dict[str, Any] = read_json(file)
        _CACHED.model_validate(record)
    except (OSError, ValueError):
        return None
    whole = len(record["single"]) == len(record["votes"]) == len(key["weights"])
    return record if whole and record["key"] == key else None


def _with_nan(record: dict[str, Any]) -> CaseScores:
    return cast("CaseScores", {k: math.nan if value is None else value for k, value in record.items()})


# ---- lay out: our numbers like the paper's, with these beside them (PAPER.md IV-E)


def _lay_out(
    table: TableName,
    cells: Mapping[str, Cell],
    rows: Sequence[str],
    steps: Mapping[str, TrainConfig],
    count: int,
) -> AblationTable:
    """Lay out what is done of a table of `rows`, each with the vote of `count` models."""
    found = {name: cell.dice() for name, cell in cells.items()}

    def dice(who: str) -> list[str]:
        return [_text(found[name].get(who)) if name in found else PENDING for name in steps]

    vote = dice(f"vote_{count}")
    if table == "voting":
        columns = [n if n == f"{s.iterations}" else f"{s.iterations} (paper {n})" for n, s in steps.items()]
        header, body, details = ["Iterations", *columns], [], []
        for row in rows:
            body.append([row, *(vote if row == "voting" else dice(row))])
            if row in TABLE_IV:
                body.append([f"{row} (paper)", *(f"{v:.1f}" for v in TABLE_IV[row])])
        if "voting" in rows:
            details.append(_by_count(dice, columns, count))
    else:
        if table == "modules":
            header, label = ["Shapes", "Probability Maps", "Salt Noises", "Dice", "Dice (paper)"], "modules"
            printed = [TABLE_V[row] for row in rows]
            body = [[*p[:3], ours, f"{p[3]:.1f}"] for p, ours in zip(printed, vote, strict=True)]
        else:
            header, label = ["HU threshold T", *rows], "HU threshold T"
            body = [["Dice", *vote], ["Dice (paper)", *(f"{TABLE_VI[row]:.1f}" for row in rows)]]
        title = (
            "Dice without a vote, mean±SD over models of their mean over patients; and without a network, "
            "every bright voxel a lesion, mean±SD over patients (%)"
        )
        alone = list(zip(rows, dice("models"), dice("nothing"), strict=True))
        details = [Table.of(title, [label, "single models", "no network"], alone)]
    trained = [
        [name, str(seed), str(model.iterations), f"{model.seconds:.0f}"]
        for name, cell in cells.items()
        for seed, model in sorted(cell.models.items())
    ]
    details.append(_by_patient(cells, count))
    details.append(Table.of("Training", ["", "seed", "iterations", "seconds"], trained))
    failures = [
        f"{name}: {why}"
        for name, cell in cells.items()
        for why in (*(f"seed {seed}: {told}" for seed, told in cell.failures.items()), cell.error)
        if why
    ]
    return AblationTable(table, TITLES[table], header, body, details, dict(cells), failures)


def _by_count(dice: Callable[[str], list[str]], columns: Sequence[str], count: int) -> Table:
    singles = zip(*(values for row, values in TABLE_IV.items() if row != "voting"), strict=True)
    body = [
        ["1, mean±SD over models", *dice("models")],
        *([f"{n}", *dice(f"vote_{n}")] for n in range(2, count + 1)),
        ["0, every bright voxel a lesion", *dice("nothing")],
        ["1, mean±SD over models (paper)", *(_text([v / 100 for v in five]) for five in singles)],
        ["5 (paper)", *(f"{v:.1f}" for v in TABLE_IV["voting"])],
    ]
    title = "Dice by number of models that vote, the first n; more than half must call a voxel healthy (%)"
    return Table.of(title, ["models", *columns], body)


def _text(dice: Sequence[float] | None) -> str:
    """Mean±SD in percent."""
    if dice is None:
        return FAILED
    found = mean_and_sd(dice)
    return percent(found["mean"], found["sd"])


def _by_patient(cells: Mapping[str, Cell], count: int) -> Table:
    voted = {name: cell.votes.get(count, {}) for name, cell in cells.items()}
    texts = {
        name: {
            f"{patient} (control)" if s["control"] else patient: "–" if s["control"] else percent(s["dsc"])
            for patient, s in scores.items()
        }
        for name, scores in voted.items()
    }
    frame = pd.DataFrame(texts, dtype=object).fillna("–").reset_index(names="patient")
    notes = [f"{p}: {note}." for scores in voted.values() for p, s in scores.items() for note in s["notes"]]
    return Table("Dice of the vote by patient (%)", frame, " ".join(dict.fromkeys(notes)))


# ---- write: each file is replaced as a whole


def _write(
    table: AblationTable, config: AblateConfig, base: TrainConfig, count: int, patients: Sequence[Patient]
) -> None:
    notes, folder = caveats(config, base, count, patients), config.output
    printed: dict[TableName, Any] = {
        "voting": {"iterations": ITERATIONS, **TABLE_IV},
        "modules": {row: values[-1] for row, values in TABLE_V.items()},
        "threshold": TABLE_VI,
    }
    document = {
        "table": table.table,
        "title": table.title,
        "scale": config.scale,
        "header": table.header,
        "rows": table.rows,
        "paper_dice_percent": printed[table.table],
        "cells": {name: _document(cell) for name, cell in table.cells.items()},
        "failures": table.failures,
        "notes": notes,
        "seeds": list(range(count)),
        "train": {name: v for name, v in json.loads(to_json(base)).items() if name not in OWN},
        "predict": json.loads(to_json(config.predict)),
        "files": list(FILES),
        "patients": {patient.name: patient.identity for patient in patients},
    }
    write_atomically(folder / "results.json", dumps(document))  # first: it claims the others
    write_atomically(folder / "table.csv", table.csv())
    lines = "\n".join(f"- {note}" for note in (*table.failures, *notes))
    write_atomically(folder / "table.md", f"{table.markdown()}\n{lines}\n")
    page = Page(table.title)
    page.table(table.frame)
    for line in table.failures:
        page.paragraph(f"Failed: {line}")
    _draw(page, table, count)
    for title, frame, note in table.details:
        page.heading(title)
        page.table(frame)
        if note:
            page.paragraph(note, note=True)
    for note in notes:
        page.paragraph(note, note=True)
    page.write(folder / "report.html")


def _document(cell: Cell) -> dict[str, Any]:
    def scored(scores: Scores) -> dict[str, Any]:
        return {"summary": summarise(list(scores.values())), "patients": scores}

    models = {seed: asdict(model) for seed, model in cell.models.items()}
    return {
        "models": {seed: {k: v for k, v in m.items() if k != "minutes"} for seed, m in models.items()},
        "single": {seed: scored(scores) for seed, scores in cell.single.items()},
        "votes": {count: scored(scores) for count, scores in cell.votes.items()},
        "without_network": scored(cell.without),
        "failures": cell.failures,
        "error": cell.error,
    }


def _draw(page: Page, table: AblationTable, count: int) -> None:
    """Add the curve of Table IV or VI."""
    if table.table == "modules":
        return
    dice = {float(name): cell.dice() for name, cell in table.cells.items()}
    means = {x: {who: 100 * mean_and_sd(v)["mean"] for who, v in found.items()} for x, found in dice.items()}
    frame = pd.DataFrame(means, dtype=float).T
    x, vote = frame.index.to_numpy(), f"vote_{count}"
    if table.table == "threshold":
        ours = frame.reindex(columns=[vote])[vote].to_numpy()
        lines = {"ours": (x, ours), "paper": (x, np.array([TABLE_VI[name] for name in table.cells]))}
        page.picture(curve(lines, xlabel="T (HU)", ylabel="Dice (%)"), "Dice over the threshold")
        return
    known = [who for who in (vote, *(f"model_{k + 1}" for k in range(count))) if who in frame]
    lines = {who.replace(vote, "vote"): (x, frame[who].to_numpy()) for who in known}
    lines["vote (paper)"] = np.array(ITERATIONS, float), np.array(TABLE_IV["voting"])
    caption = "Dice over iterations, as a share of the paper's"
    page.picture(curve(lines, xlabel="the paper's iterations", ylabel="Dice (%)"), caption)


def caveats(config: AblateConfig, base: TrainConfig, count: int, patients: Sequence[Patient]) -> list[str]:
    """Return what a reader must know before comparing with the paper."""
    trained = "phantoms" if base.data is None else f"the store {base.data.name}"
    scored = "given patients" if config.patients else "phantom patients with pneumonia"
    size = "whole slices" if base.crop is None else f"crops of {base.crop} x {base.crop}"
    ours = (
        f"Ours: {count} models a row, {base.iterations} iterations of {base.batch_size} slabs of {base.slab} "
        f"slices ({size}), trained on {trained}, scored on {len(patients)} {scored}; mean±SD over patients "
        "(sample SD). Fewer than 100 lesion voxels make a control, which has no part in the means."
    )
    theirs = (
        "Paper: five models, 3500 iterations of 8 slabs of 32 x 512 x 512, 453 LUNA16 volumes, scored on the "
        "ten Coronacases volumes; it prints means only."
    )
    notes = [ours, theirs]
    if config.table != "threshold" and base.threshold_hu != PAPER_THRESHOLD_HU:
        usual = f"the paper's is {PAPER_THRESHOLD_HU:g} HU"
        notes.append(f"T is {base.threshold_hu:g} HU in every row, in training and prediction; {usual}.")
    if base.minutes is not None:
        notes.append(f"Training stopped after {base.minutes:g} minutes where that came first.")
    if base.data is None or not config.patients:
        notes.append("Phantom data shows that the switch works; it is no statement about patients.")
    return notes


# ---- the command

HELP = """Reproduce Table IV (voting), V (modules) or VI (threshold) of the paper, its numbers beside ours.

--scale small took 7 minutes of one CPU core for modules; threshold takes about 9, voting less than either. It
shows that everything works, not who is right. --scale paper has 22,500 to 87,500 steps of the paper's size:
a GPU's work.

Killed and started again with the same settings, it goes on where it was. Exit status: 0 when every row is
there, 1 when one failed (the others are written), 2 for a wrong call."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""

    def body() -> int:
        config = tyro.cli(AblateConfig, args=arguments, prog="python -m normnet.ablate", description=HELP)
        with plainly():
            table = ablate(config, say=lambda line: print(printable(line), flush=True))
        print(table.title)
        print(as_text(table.frame))
        for line in table.failures:
            print(f"failed: {printable(line)}", file=sys.stderr)
        print(f"report: {name_of(config.output / 'report.html')}")
        return 1 if table.failures else 0

    return run("error", body)


if __name__ == "__main__":
    sys.exit(main())
