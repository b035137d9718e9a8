"""Results on disk: table.csv, table.md, results.json and one HTML page, each replaced as a whole."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lesionsynth.files import write_atomically
from normnet.ablate.config import AblateConfig
from normnet.ablate.patients import Patient
from normnet.ablate.scoring import Cell, Scores
from normnet.ablate.tables import AblationTable, mean_dice
from normnet.config import PAPER_THRESHOLD_HU, TrainConfig, to_json
from normnet.draw import curve
from normnet.metrics import summarise
from normnet.output import dumps
from normnet.paper import ITERATIONS, TABLE_IV, TABLE_V, TABLE_VI
from normnet.report import Page

FILES = ("table.csv", "table.md", "report.html", "results.json")
"""What a table is written as; the last proves that the others are its own."""
RECORDED = ("table", "title", "scale", "header", "rows", "paper_dice_percent", "cells", "failures", "notes")
"""Fields that every record has had."""
PAPER_NUMBERS: dict[str, Any] = {
    "voting": {"iterations": ITERATIONS, **TABLE_IV},
    "modules": {row: values[-1] for row, values in TABLE_V.items()},
    "threshold": TABLE_VI,
}


def write(
    table: AblationTable, config: AblateConfig, base: TrainConfig, seeds: int, patients: Sequence[Patient]
) -> None:
    """Write a table's files into `config.output`.

    Parameters
    ----------
    table : AblationTable
        What is done so far.
    config : AblateConfig
        What was asked for.
    base : TrainConfig
        Settings of every run.
    seeds : int
        Models of an ensemble.
    patients : sequence of Patient
        On whom it was scored.
    """
    notes = caveats(config, base, seeds, patients)
    folder = config.output
    settings: dict[str, Any] = json.loads(to_json(base))
    for name in ("output", "resume", "seed"):
        del settings[name]
    document = {
        "table": table.table,
        "title": table.title,
        "scale": config.scale,
        "header": table.header,
        "rows": table.rows,
        "paper_dice_percent": PAPER_NUMBERS[table.table],
        "cells": {name: _cell(cell) for name, cell in table.cells.items()},
        "failures": table.failures,
        "notes": notes,
        "seeds": list(range(seeds)),
        "train": settings,
        "predict": json.loads(to_json(config.predict)),
        "files": list(FILES),
        "patients": {p.name: p.identity for p in patients},
    }
    write_atomically(folder / "results.json", dumps(document))  # first: it claims the others
    write_atomically(folder / "table.csv", table.csv())
    lines = "\n".join(f"- {note}" for note in (*table.failures, *notes))
    write_atomically(folder / "table.md", f"{table.markdown()}\n{lines}\n")
    _report(table, notes).write(folder / "report.html")


def caveats(config: AblateConfig, base: TrainConfig, seeds: int, patients: Sequence[Patient]) -> list[str]:
    """Return what a reader must know before comparing with the paper."""
    trained = "phantoms" if base.data is None else f"the store {base.data.name}"
    scored = "given patients" if config.patients else "phantom patients with pneumonia"
    size = "whole slices" if base.crop is None else f"crops of {base.crop} x {base.crop}"
    ours = (
        f"Ours: {seeds} models a row, {base.iterations} iterations of {base.batch_size} slabs of {base.slab} "
        f"slices ({size}), trained on {trained}, scored on {len(patients)} {scored}; mean±SD over patients "
        "(sample SD). Fewer than 100 lesion voxels make a control, which has no part in the means."
    )
    paper = (
        "Paper: five models, 3500 iterations of 8 slabs of 32 x 512 x 512, 453 LUNA16 volumes, scored on the "
        "ten Coronacases volumes; it prints means only."
    )
    notes = [ours, paper]
    if config.table != "threshold" and base.threshold_hu != PAPER_THRESHOLD_HU:
        usual = f"the paper's is {PAPER_THRESHOLD_HU:g} HU"
        notes.append(f"T is {base.threshold_hu:g} HU in every row, in training and prediction; {usual}.")
    if base.minutes is not None:
        notes.append(f"Training stopped after {base.minutes:g} minutes where that came first.")
    if base.data is None or not config.patients:
        notes.append("Phantom data shows that the switch works; it is no statement about patients.")
    return notes


def _report(table: AblationTable, notes: Sequence[str]) -> Page:
    report = Page(table.title)
    report.table(table.frame)
    for line in table.failures:
        report.paragraph(f"Failed: {line}")
    for picture, caption in _pictures(table):
        report.picture(picture, caption)
    for title, frame, note in table.details:
        report.heading(title)
        report.table(frame)
        if note:
            report.paragraph(note, note=True)
    for note in notes:
        report.paragraph(note, note=True)
    return report


def _pictures(table: AblationTable) -> list[tuple[bytes, str]]:
    if table.table == "threshold":
        x = np.array([float(name) for name in table.cells])
        ours = np.array([_voted(cell) for cell in table.cells.values()])
        theirs = np.array([TABLE_VI[name] for name in table.cells])
        lines = {"ours": (x, ours), "paper": (x, theirs)}
        return [(curve(lines, xlabel="T (HU)", ylabel="Dice (%)"), "Dice over the threshold")]
    if table.table == "voting":
        x = np.array([float(name) for name in table.cells])
        lines = {"vote": (x, np.array([_voted(cell) for cell in table.cells.values()]))}
        for seed in sorted({seed for cell in table.cells.values() for seed in cell.single}):
            alone = [_percent(cell.single.get(seed)) for cell in table.cells.values()]
            lines[f"model_{seed + 1}"] = (x, np.array(alone))
        lines["vote (paper)"] = (np.array(ITERATIONS, float), np.array(TABLE_IV["voting"]))
        caption = "Dice over iterations, as a share of the paper's"
        return [(curve(lines, xlabel="the paper's iterations", ylabel="Dice (%)"), caption)]
    return []


def _voted(cell: Cell) -> float:
    """Dice of all models' vote in percent, NaN where one is missing."""
    if cell.error or cell.failures or not cell.votes:
        return math.nan
    return _percent(cell.votes[max(cell.votes)])


def _percent(scores: Scores | None) -> float:
    return 100 * mean_dice(scores) if scores else math.nan


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "models": {seed: asdict(model) for seed, model in cell.models.items()},
        "single": {seed: _scored(scores) for seed, scores in cell.single.items()},
        "votes": {count: _scored(scores) for count, scores in cell.votes.items()},
        "without_network": _scored(cell.without),
        "failures": cell.failures,
        "error": cell.error,
    }


def _scored(scores: Scores) -> dict[str, Any]:
    return {"summary": summarise(list(scores.values())), "patients": scores}
