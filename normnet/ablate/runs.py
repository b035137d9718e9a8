"""Training runs of an ablation: finished ones are reused, interrupted ones continued.

A run folder is one of `normnet.train`, with ``marks.json`` and the weights of every mark beside: a mark is a
number of iterations at which the run paused, as Table IV has six of.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lesionsynth.files import claimed, refuse_foreign, replacing, sha256, write_atomically
from lesionsynth.strict import read_json, shown
from normnet.config import WEIGHTS, Minutes, Seed, Steps, TrainConfig, read_config
from normnet.model import HEADER, read_tensors
from normnet.settings import check, from_record, settings
from normnet.train import CONFIG, RUN_FILES, STATE, train

MARKS = "marks.json"
"""Finished marks of a run folder; written last."""
FREE = ("output", "resume", "iterations", "minutes", "device", "threads", "cache")
"""Settings that say how far, where and how fast, not what."""
_PAST = "{run} must not be past what is asked for, {asked} iterations: it has {done}; name another output"


@dataclass(frozen=True)
class Mark:
    """Where a run pauses: after so many iterations, or so much training time."""

    iterations: int
    minutes: float | None = None

    @property
    def label(self) -> str:
        """File name of its weights."""
        return f"{self.iterations}" if self.minutes is None else f"{self.iterations}-{self.minutes:g}min"


@dataclass(frozen=True)
class Trained:
    """Weights of one model at one mark."""

    seed: int
    weights: str
    """File, safetensors."""
    iterations: int
    """Made; fewer than the mark's where time ran out."""
    seconds: float
    """Training time."""
    sha256: str


def train_to(config: TrainConfig, mark: Mark, *, progress_bar: bool = False) -> Trained:
    """Train to a mark, or return what an earlier call trained.

    Parameters
    ----------
    config : TrainConfig
        The run; `output` is its folder. `iterations`, `minutes` and `resume` are set here.
    mark : Mark
        Where to pause. Marks of a run are asked for in rising order.
    progress_bar : bool
        Show one.

    Returns
    -------
    Trained

    Raises
    ------
    ValueError
        The folder holds a run of other settings, one that is past the mark, or changed weights; see also
        `normnet.train.train`.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    with claimed(config.output, "runs"):
        return _train_to(config, mark, progress_bar)


def _train_to(config: TrainConfig, mark: Mark, progress_bar: bool) -> Trained:
    run = config.output
    wanted = replace(config, iterations=mark.iterations, minutes=mark.minutes, resume=False)
    _check_settings(run, wanted)
    marks = _marks(run)
    if mark.label in marks:
        return _finished(run, marks[mark.label])
    for label, done in marks.items():
        if done["iterations"] > mark.iterations or _time(done["minutes"]) > _time(mark.minutes):
            raise ValueError(_PAST.format(run=run, asked=mark.label, done=label))
    resume = (run / STATE).exists()
    if not resume:
        _clear(run)
    result = train(replace(wanted, resume=resume), progress_bar=progress_bar)
    if result.iterations > mark.iterations:
        raise ValueError(_PAST.format(run=run, asked=mark.label, done=result.iterations))
    weights = _copy(run / WEIGHTS, run / f"{mark.label}.safetensors")
    trained = Trained(config.seed, str(weights), result.iterations, round(result.seconds, 2), sha256(weights))
    marks[mark.label] = asdict(trained) | {"weights": weights.name, "minutes": mark.minutes}
    write_atomically(run / MARKS, json.dumps(marks, indent=2) + "\n")
    return trained


def _check_settings(run: Path, wanted: TrainConfig) -> None:
    file = run / CONFIG
    if not file.exists():
        return
    try:
        stored = read_config(TrainConfig, file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} must be as training left it; remove {run} to train again: {error}"
        ) from error
    free: dict[str, Any] = {name: getattr(wanted, name) for name in FREE}
    stored = replace(stored, **free)
    if stored != wanted:
        different = [name for name, value in vars(wanted).items() if getattr(stored, name) != value]
        raise ValueError(
            f"{run} must hold a run of the same settings; {', '.join(different)} differ: "
            "give the same ones, or name another output"
        )


def _marks(run: Path) -> dict[str, Any]:
    file = run / MARKS
    if not file.exists():
        return {}
    needed = [f.name for f in fields(_Finished)]
    rule = f"{file} must be a JSON object with {', '.join(sorted(needed))} for each mark; remove {run}"
    try:
        marks: dict[str, Any] = read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{rule}: {error}") from error
    if not isinstance(marks, dict):
        raise ValueError(rule)
    try:
        for label, mark in marks.items():
            from_record(_Finished, mark, shown(label))
    except ValueError as error:
        raise ValueError(f"{rule}: {error}") from error
    return marks


@settings
class _Finished:
    """A mark as its file tells it."""

    seed: Seed
    weights: str
    iterations: Steps
    seconds: Annotated[float, Field(ge=0, le=1e10)]
    sha256: str
    minutes: Minutes | None

    def __post_init__(self) -> None:
        named = Path(self.weights).name == self.weights and self.weights[:1] not in ("", ".")
        check("weights", self.weights, named, "a file's name")


def _time(minutes: float | None) -> float:
    return math.inf if minutes is None else minutes


def _finished(run: Path, record: dict[str, Any]) -> Trained:
    weights = run / record["weights"]
    if not weights.exists() or sha256(weights) != record["sha256"]:
        raise ValueError(f"{weights} must be as training left it (SHA-256); remove {run} to train again")
    told = {name: record[name] for name in ("seed", "iterations", "seconds", "sha256")}
    return Trained(weights=str(weights), **told)


def _clear(run: Path) -> None:
    """Remove a run that was interrupted before its first whole checkpoint: what its settings claim."""
    if (run / MARKS).exists():
        raise ValueError(f"{run} must hold {STATE}, to continue from; it has none")
    if (run / CONFIG).exists():
        refuse_foreign(run, RUN_FILES, ours=True, maker="training", argument="runs")
        for name in RUN_FILES:
            (run / name).unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> Path:
    """Copy so that a reader sees a whole file or none; nothing but weights of ours is replaced."""
    if os.path.lexists(target) and (target.is_symlink() or HEADER not in read_tensors(target)[1]):
        raise ValueError(f"{target} must be weights that training wrote, or nothing: move it away")
    with replacing(target) as beside:
        shutil.copyfile(source, beside)
    return target
