"""What an ablation is asked for, and its two sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field

from lesionsynth.strict import name_of, read_json
from normnet.config import (
    Count,
    Minutes,
    ModelConfig,
    PredictConfig,
    Shape,
    Steps,
    Threads,
    TrainConfig,
    check_phantoms,
    paper,
    phantom,
)
from normnet.prepare.case import LungMethod
from normnet.settings import File, check, from_record, settings

TableName = Literal["voting", "modules", "threshold"]
OWN = ("output", "resume", "seed")
"""Training settings that belong to the ablation, whatever the table."""
VARIED: dict[str, tuple[str, ...]] = {
    "voting": ("schedule",),
    "modules": ("lesions",),
    "threshold": ("threshold_hu",),
}
"""Training settings that a table varies."""
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
        model=ModelConfig(channels=(8, 16, 32), strides=(2, 2)),
        minutes=None,
        iterations=300,
        crop=96,
        phantoms=2,
        phantom_shape=(48, 192, 240),
    ),
    seeds=3,
    patients=3,
    patient_shape=(48, 192, 240),
)
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
        usual, level = PredictConfig(), self.predict.postprocess.threshold_hu
        rule = "left to the training settings"
        check("predict.slab", self.predict.slab, self.predict.slab == usual.slab, rule)
        check("predict.postprocess.threshold_hu", level, level is None, rule)
        check("rows", self.rows, len(set(self.rows)) == len(self.rows), "named once each")


def training(config: AblateConfig) -> TrainConfig:
    """Return the settings of every run: the scale's, then the file's, then the command line's.

    Raises
    ------
    ValueError
        The file is no JSON object, names an unknown field or one that is not free here, or a value is out of
        its range.
    """
    base = SCALES[config.scale].train
    if config.config is not None:
        record = _merged(config, base)
        try:
            base = from_record(TrainConfig, record)
        except ValueError as error:
            raise ValueError(f"{name_of(config.config)}: {error}") from error
        if base.task != "lesions":
            raise ValueError(f"{name_of(config.config)}: task must be lesions, got {base.task}")
    given = {name: getattr(config, name) for name in ("data", "iterations", "minutes", "device", "threads")}
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def _merged(config: AblateConfig, base: TrainConfig) -> dict[str, Any]:
    path = config.config
    assert path is not None
    try:
        changes = read_json(path)
    except OSError as error:
        raise ValueError(f"config must be a readable file: {error}") from error
    except ValueError as error:
        raise ValueError(f"config must be JSON, got {error}") from error
    if not isinstance(changes, dict):
        raise ValueError(f"config must be a JSON object, got {type(changes).__name__} in {path}")
    for name in (*OWN, *VARIED[config.table]):
        if name in changes:
            raise ValueError(f"config must leave {name} to the ablation, got it in {path}")
    record = dataclasses.asdict(base)
    if isinstance(changes.get("model"), dict):
        changes["model"] = record["model"] | changes["model"]
    return record | changes
