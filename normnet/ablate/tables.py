"""Tables IV, V and VI: our numbers laid out like the paper's, with these beside them (PAPER.md IV-E)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from normnet.ablate.config import TableName
from normnet.ablate.scoring import Cell, Scores
from normnet.metrics import percent, summarise
from normnet.paper import ITERATIONS, TABLE_IV, TABLE_V, TABLE_VI, Table
from normnet.sheets import sheet

TITLES: dict[str, str] = {
    "voting": "Table IV: Dice of the models and of their vote, by iterations (%)",
    "modules": "Table V: Dice with modules of the generator switched on and off (%)",
    "threshold": "Table VI: Dice under different HU thresholds (%)",
}
FAILED, PENDING = "failed", "pending"


@dataclass(frozen=True)
class AblationTable:
    """One table of the paper, measured.

    Attributes
    ----------
    table : {"voting", "modules", "threshold"}
    title : str
    header : list of str
    rows : list of list of str
        As the paper prints them, its numbers labelled "(paper)"; Dice of the vote as mean±SD over patients,
        in percent; "failed" or "pending" where there is none.
    details : list of Table
        What the paper does not print: single models, patients, training.
    cells : dict of str to Cell
        All scores, by row, or by column of Table IV.
    failures : list of str
        What went wrong.
    """

    table: TableName
    title: str
    header: list[str]
    rows: list[list[str]]
    details: list[Table] = field(default_factory=list)
    cells: dict[str, Cell] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

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


def row_names(table: TableName, seeds: int) -> list[str]:
    """Rows of a table (columns, for Table VI) by the names `--rows` takes."""
    if table == "voting":
        return ["voting", *(f"model_{k + 1}" for k in range(seeds))]
    return list(TABLE_V if table == "modules" else TABLE_VI)


def lay_out(
    table: TableName, cells: Mapping[str, Cell], rows: Sequence[str], seeds: int, columns: Sequence[str] = ()
) -> AblationTable:
    """Lay scores out as the paper does.

    Parameters
    ----------
    table : {"voting", "modules", "threshold"}
        Which.
    cells : mapping of str to Cell
        What is done: by row, or by column ("2000", ...) for voting.
    rows : sequence of str
        Rows to show, of `row_names`.
    seeds : int
        Models of an ensemble.
    columns : sequence of str
        Headers of the six columns of Table IV.

    Returns
    -------
    AblationTable
    """
    if table == "voting":
        header, body, details = _voting(cells, rows, seeds, columns)
    elif table == "modules":
        header, body = ["Shapes", "Probability Maps", "Salt Noises", "Dice", "Dice (paper)"], []
        for row in rows:
            *switches, paper = TABLE_V[row]
            body.append([*switches, vote_text(cells.get(row), seeds), f"{paper:.1f}"])
        details = [_single_models("modules", cells, rows)]
    else:
        header = ["HU threshold T", *rows]
        ours = [vote_text(cells.get(row), seeds) for row in rows]
        body = [["Dice", *ours], ["Dice (paper)", *(f"{TABLE_VI[row]:.1f}" for row in rows)]]
        details = [_single_models("HU threshold T", cells, rows)]
    details += [_patients(cells, seeds), _training(cells)]
    failures = [f"{name}: {reason}" for name, cell in cells.items() for reason in _reasons(cell)]
    return AblationTable(table, TITLES[table], header, body, details, dict(cells), failures)


def vote_text(cell: Cell | None, count: int) -> str:
    """Dice of the vote of `count` models: mean±SD over patients, in percent."""
    if cell is None:
        return PENDING
    if cell.error or any(seed < count for seed in cell.failures) or count not in cell.votes:
        return FAILED
    return _dice(cell.votes[count])


def model_text(cell: Cell | None, seed: int) -> str:
    """Dice of one model: mean±SD over patients, in percent."""
    if cell is None:
        return PENDING
    return FAILED if cell.error or seed not in cell.single else _dice(cell.single[seed])


def models_text(cell: Cell | None) -> str:
    """Mean±SD over models of their mean Dice, in percent."""
    if cell is None:
        return PENDING
    if cell.error or cell.failures or not cell.single:
        return FAILED
    return _spread([mean_dice(scores) for scores in cell.single.values()])


def without_text(cell: Cell | None) -> str:
    """Dice where every bright voxel is a lesion: mean±SD over patients, in percent."""
    if cell is None:
        return PENDING
    return _dice(cell.without) if cell.without else FAILED


def mean_dice(scores: Scores) -> float:
    """Mean Dice over patients; controls do not count."""
    return summarise(list(scores.values()))["dsc"]["mean"]


def _voting(
    cells: Mapping[str, Cell], rows: Sequence[str], seeds: int, columns: Sequence[str]
) -> tuple[list[str], list[list[str]], list[Table]]:
    done = [cells.get(str(n)) for n in ITERATIONS]
    header, body = ["Iterations", *columns], []
    for row in rows:
        if row == "voting":
            body.append([row, *(vote_text(cell, seeds) for cell in done)])
        else:
            seed = int(row.removeprefix("model_")) - 1
            body.append([row, *(model_text(cell, seed) for cell in done)])
        if row in TABLE_IV:
            body.append([f"{row} (paper)", *(f"{v:.1f}" for v in TABLE_IV[row])])
    if "voting" not in rows:
        return header, body, []
    paper = np.array([v for row, v in TABLE_IV.items() if row != "voting"]) / 100
    counts = [["1, mean±SD over models", *(models_text(cell) for cell in done)]]
    counts += [[str(n), *(vote_text(cell, n) for cell in done)] for n in range(2, seeds + 1)]
    counts.append(["0, every bright voxel a lesion", *(without_text(cell) for cell in done)])
    counts.append(["1, mean±SD over models (paper)", *(_spread(list(column)) for column in paper.T)])
    counts.append(["5 (paper)", *(f"{v:.1f}" for v in TABLE_IV["voting"])])
    title = "Dice by number of models that vote, the first n; more than half must call a voxel healthy (%)"
    return header, body, [Table.of(title, ["models", *columns], counts)]


def _single_models(label: str, cells: Mapping[str, Cell], rows: Sequence[str]) -> Table:
    title = (
        "Dice without a vote, mean±SD over models of their mean over patients; and without a network, every "
        "bright voxel a lesion, mean±SD over patients (%)"
    )
    body = [[row, models_text(cells.get(row)), without_text(cells.get(row))] for row in rows]
    return Table.of(title, [label, "single models", "no network"], body)


def _patients(cells: Mapping[str, Cell], seeds: int) -> Table:
    """Table of the vote's Dice for every patient."""
    voted = {name: cell.votes.get(seeds, {}) for name, cell in cells.items()}
    names = list(dict.fromkeys(p for scores in voted.values() for p in scores))
    body = []
    for patient in names:
        found = [scores.get(patient) for scores in voted.values()]
        control = any(s is not None and s["control"] for s in found)
        values = ["–" if s is None or s["control"] else percent(s["dsc"]) for s in found]
        body.append([f"{patient} (control)" if control else patient, *values])
    notes = [f"{p}: {note}." for scores in voted.values() for p, s in scores.items() for note in s["notes"]]
    note = " ".join(dict.fromkeys(notes))
    return Table.of("Dice of the vote by patient (%)", ["patient", *voted], body, note)


def _training(cells: Mapping[str, Cell]) -> Table:
    body = [
        [name, str(seed), str(model.iterations), f"{model.seconds:.0f}"]
        for name, cell in cells.items()
        for seed, model in sorted(cell.models.items())
    ]
    return Table.of("Training", ["", "seed", "iterations", "seconds"], body)


def _reasons(cell: Cell) -> list[str]:
    lines = [f"seed {seed}: {reason}" for seed, reason in cell.failures.items()]
    return [*lines, cell.error] if cell.error else lines


def _dice(scores: Scores) -> str:
    summary = summarise(list(scores.values()))["dsc"]
    return percent(summary["mean"], summary["sd"])


def _spread(values: Sequence[float]) -> str:
    """Mean and sample SD; NaN where a model has no score."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return percent(float(np.mean(values)), sd)
