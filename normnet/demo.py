"""The whole method on the built-in phantom: ``python -m normnet.demo`` trains, predicts, evaluates, reports.

Training sees healthy phantoms and synthetic lesions only. The patients are phantoms of other seeds with a
pneumonia that shares no code with the lesion generator; one healthy chest among them shows what is marked
where there is nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import tyro

import lesionsynth as ls
from lesionsynth.commands import run
from lesionsynth.files import claimed, others, remove_folder, sweep, write_atomically
from lesionsynth.strict import name_of
from normnet.config import WEIGHTS, PredictConfig, TrainConfig, phantom
from normnet.data import PATIENT_SEED, PHANTOM_SEED, phantom_patient
from normnet.draw import curve, grey, lung_box, png, side_by_side
from normnet.evaluate import CaseVolumes, Evaluation, Origin, check_output, evaluate_volumes, tissue
from normnet.metrics import HEALTHY_THRESHOLD, percent
from normnet.model import Model
from normnet.output import dumps, load
from normnet.paper import as_text
from normnet.predict import predict_volume
from normnet.report import Page
from normnet.train import BEST, CONFIG, METRICS, STATE, TrainResult, train

Array = npt.NDArray[Any]

RUN, MARKER, FORMAT = "run", "demo.json", "normnet.demo"
"""Folder of the training run, and the file in it that says that it may be replaced."""
FILES = (WEIGHTS, BEST, STATE, METRICS, "events.out.tfevents.*", CONFIG, MARKER)
"""What that folder may hold then."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train on the built-in phantom, predict pneumonia never seen, write a report."""

    output: Path = Path("demo-output")
    """Folder for the run, results.json, cases.csv and report.html; an earlier demo in it is replaced, files
    of others are not."""
    minutes: float = 4.0
    """Training time."""
    seed: int = 0
    """Of initial weights, training phantoms and lesions."""
    patients: int = 3
    """Phantoms with pneumonia to evaluate, beside one healthy one."""
    shape: tuple[int, int, int] = (48, 320, 400)
    """Their size (z, y, x), in voxels of 1.0 x 0.8 x 0.8 mm."""
    train: TrainConfig = field(default_factory=phantom)
    """Other training settings; its output, minutes and seed are those above."""

    def __post_init__(self) -> None:
        """Check ranges; `TrainConfig` checks its own."""
        if not self.minutes > 0:
            raise ValueError(f"minutes must be > 0, got {self.minutes}")
        most = PHANTOM_SEED - PATIENT_SEED - 1  # beyond it they would be training phantoms
        if not 1 <= self.patients <= most:
            raise ValueError(f"patients must be in [1, {most}], got {self.patients}")
        if self.train.task != "lesions":
            raise ValueError(f"train.task must be lesions, got {self.train.task}")


def run_demo(config: DemoConfig, *, say: Callable[[str], None] | None = None) -> Evaluation:
    """Train, predict, evaluate and write the report.

    Parameters
    ----------
    config : DemoConfig
        Settings.
    say : callable, optional
        Receives a line per step; also turns the progress bar on.

    Returns
    -------
    Evaluation
        Of the phantom patients.

    Raises
    ------
    ValueError
        See `normnet.train.train`; or the folder holds what no demo wrote.
    """
    start, tell, folder = time.perf_counter(), say or (lambda line: None), config.output / RUN
    _check_output(config.output)  # before anything is computed
    config.output.mkdir(parents=True, exist_ok=True)
    with claimed(config.output):
        _check_output(config.output)  # again: another process may have been faster
        sweep(config.output)
        if folder.exists():
            remove_folder(folder, FILES)  # an earlier demo's
        folder.mkdir()
        write_atomically(folder / MARKER, dumps({"format": FORMAT, "files": FILES}))
        tell(f"1/3 training on healthy phantoms with synthetic lesions, {config.minutes:g} min")
        own: dict[str, Any] = {"data": None, "minutes": config.minutes, "seed": config.seed, "resume": False}
        result = train(replace(config.train, output=folder, **own), progress_bar=say is not None)
        tell(f"    {result.iterations} iterations, {result.waiting_share:.0%} of the time waiting for pairs")
        tell(f"2/3 predicting {config.patients} phantoms with pneumonia and a healthy one")
        evaluation = evaluate_volumes(_predicted(config, folder), pictures=2)
        tell("3/3 writing the report")
        evaluation.write(config.output)
        _write_report(config, result, evaluation, time.perf_counter() - start)
    return evaluation


def _check_output(output: Path) -> None:
    """Refuse a folder with files or a run that no demo wrote: a ValueError names the first."""
    check_output(output)
    folder = output / RUN
    if not os.path.lexists(folder):
        return
    rule = f"output holds {RUN}, which no demo wrote: name another folder, or move it away, got {folder}"
    marker = load(folder / MARKER)
    marked = isinstance(marker, dict) and marker.get("format") == FORMAT
    if folder.is_symlink() or not folder.is_dir() or (any(folder.iterdir()) and not marked):
        raise ValueError(rule)
    if other := others(folder, FILES):
        raise ValueError(f"{rule}: {other[0]} in it is none of its files")


def patients(config: DemoConfig) -> Iterator[tuple[str, ls.phantom.ChestCT, Array]]:
    """Phantoms that training never sees: name, chest, lesion mask; the last one is healthy."""
    for k in range(config.patients):
        yield f"phantom {k + 1}", *phantom_patient(k, config.shape)
    chest = ls.phantom.chest_ct(shape=config.shape, seed=PATIENT_SEED + config.patients)
    yield "healthy phantom", chest, np.zeros(chest.hu.shape, np.bool_)


def training_example(settings: TrainConfig, seed: int, shape: tuple[int, int, int]) -> bytes:
    """Picture of one training pair: input, with lesions, target (PNG)."""
    chest = ls.phantom.chest_ct(shape=(32, *shape[1:]), seed=PATIENT_SEED)
    image = ls.window_hu(chest.hu) * chest.lung_mask
    lesions = replace(ls.presets.get(settings.lesions), hu_threshold=settings.threshold_hu)
    pair = ls.LesionSynthesizer(lesions, seed=seed)(image, chest.lung_mask, index=0, lung_fraction=1.0)
    z = int(np.count_nonzero(pair.labels, axis=(1, 2)).argmax())
    rows, columns = lung_box(chest.lung_mask)
    slices = [volume[z, rows, columns] for volume in (image, pair.image, pair.target)]
    return png(side_by_side([grey(s, (0.0, 1.0)) for s in slices]))


def _predicted(config: DemoConfig, folder: Path) -> Iterator[CaseVolumes]:
    model, level = Model.load(folder), config.train.threshold_hu
    settings = PredictConfig(probability=HEALTHY_THRESHOLD)
    for name, chest, truth in patients(config):
        found = predict_volume(chest.hu, chest.lung_mask, [model], settings)
        yield CaseVolumes(
            case=name,
            hu=chest.hu,
            prediction=found.lesions,
            truth=truth,
            lung_mask=chest.lung_mask,
            probability=found.probability,
            healthy=found.healthy,
            core=found.lesions_without_growing,
            origin=Origin(f"fixed at {HEALTHY_THRESHOLD:g}{tissue(level)}", level),
            spacing=chest.spacing,
        )


def _write_report(config: DemoConfig, result: TrainResult, evaluation: Evaluation, seconds: float) -> None:
    auc = evaluation.summary["bright_auc"]
    report = Page("NormNet on the built-in phantom")
    report.paragraph(
        f"Trained label-free for {config.minutes:g} minutes ({result.iterations} iterations) on healthy "
        f"phantom chests with synthetic lesions, then shown {auc['n']} phantoms with a pneumonia of another "
        "origin. Healthy and diseased bright voxels are told apart with an AUC of "
        f"{percent(auc['mean'], auc['sd'])} %. "
        f"Everything took {seconds / 60:.1f} minutes."
    )
    report.heading("What it was trained on")
    report.picture(
        training_example(config.train, config.seed, config.shape),
        "healthy phantom; with synthetic lesions (the network's input); healthy bright tissue (its target)",
    )
    evaluation.add_to(report, paper=False)  # a phantom says nothing beside patients
    report.heading("Training")
    metrics = pd.read_csv(result.output / METRICS, index_col="iteration")
    loss, found = metrics["loss"].dropna(), metrics["val_auc"].dropna()
    width = max(1, min(25, len(loss)))
    lines = {"each step": loss, f"mean of {width}": loss.rolling(width).mean().dropna()}
    report.picture(_curve(lines, "loss"), "training loss (Dice + cross-entropy)")
    if len(found) > 1:
        report.picture(_curve({"AUC": found}, "AUC"), "AUC on synthetic lesions in a held-out phantom")
    report.paragraph("Phantom data; no statement about patients. Not a medical device.", note=True)
    report.write(config.output / "report.html")


def _curve(lines: dict[str, pd.Series[float]], label: str) -> bytes:
    series = {name: (line.index.to_numpy(), line.to_numpy()) for name, line in lines.items()}
    return curve(series, xlabel="iteration", ylabel=label)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m normnet.demo``; 2 where a setting does not fit."""
    start = time.perf_counter()

    def body() -> int:
        config = tyro.cli(DemoConfig, args=arguments, prog="python -m normnet.demo")
        evaluation = run_demo(config, say=lambda line: print(line, flush=True))
        print(as_text(evaluation.table()))
        auc = evaluation.summary["bright_auc"]["mean"]
        print(f"bright-voxel AUC {auc:.3f}, {time.perf_counter() - start:.0f} s in all")
        print(f"report: {name_of(config.output / 'report.html')}")
        return 0

    return run("error", body)


if __name__ == "__main__":
    raise SystemExit(main())
