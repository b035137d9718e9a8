"""From settings to a table: train, score, lay out, write; what is finished is not done again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lesionsynth.files import claimed, refuse_foreign
from lesionsynth.strict import read_json
from normnet.ablate.config import SCALES, AblateConfig, training
from normnet.ablate.output import FILES, RECORDED, write
from normnet.ablate.patients import Patient, find_patients
from normnet.ablate.runs import Mark, train_to
from normnet.ablate.scoring import Cell, score_cell
from normnet.ablate.tables import AblationTable, lay_out, row_names
from normnet.config import PredictConfig, TrainConfig
from normnet.device import choose_device, cpu_settings
from normnet.paper import ITERATIONS, NOMINAL
from normnet.prepare.store import Store

MOST_RESULTS = 2**26
"""Longest results.json in bytes."""
FAILURES = (ArithmeticError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
"""What ends a row, not the ablation: a broken file, a device without memory, a loss that is NaN."""


@dataclass(frozen=True)
class Step:
    """One cell to compute."""

    name: str
    """Row, or column of Table IV."""
    train: TrainConfig
    mark: Mark

    @property
    def setting(self) -> str:
        """Folder of its runs: steps of one setting share them."""
        preset, level = self.train.lesions, self.train.threshold_hu
        return preset if level == TrainConfig.threshold_hu else f"{preset}_T{level:g}"


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
    seeds = config.seeds or SCALES[config.scale].seeds
    rows = _rows(config, seeds)
    patients = find_patients(config)
    choose_device(base.device)
    if base.data is not None:
        Store.open(base.data)
    _claim(config)
    with claimed(config.output):
        return _tabulate(config, base, rows, seeds, patients, say)


def _tabulate(
    config: AblateConfig,
    base: TrainConfig,
    rows: Sequence[str],
    seeds: int,
    patients: Sequence[Patient],
    say: Callable[[str], None] | None,
) -> AblationTable:
    wanted = _seeds(config, rows, seeds)
    steps = _steps(config, base, rows)
    columns = [_column(base, n) for n in ITERATIONS]
    cells: dict[str, Cell] = {}
    table = lay_out(config.table, cells, rows, seeds, columns)
    for k, step in enumerate(steps, start=1):
        if say:
            what = f"{len(wanted)} models, {step.mark.label} iterations"
            say(f"{k}/{len(steps)} {config.table} {step.name}: {what}")
        cells[step.name] = _compute(config, step, wanted, patients, say)
        table = lay_out(config.table, cells, rows, seeds, columns)
        _claim(config)  # again: something may have come meanwhile
        write(table, config, base, seeds, patients)
    return table


def _compute(
    config: AblateConfig,
    step: Step,
    seeds: Sequence[int],
    patients: Sequence[Patient],
    say: Callable[[str], None] | None,
) -> Cell:
    cell = Cell()
    runs = config.runs or config.output / "runs"
    for seed in seeds:
        run = replace(step.train, seed=seed, output=runs / step.setting / f"seed{seed}")
        try:
            cell.models[seed] = train_to(run, step.mark, progress_bar=say is not None)
        except FAILURES as error:
            cell.failures[seed] = f"{type(error).__name__}: {error}"
            if say:
                say(f"    seed {seed} failed: {error}")
    predict = replace(
        config.predict,
        slab=step.train.slab,
        postprocess=replace(config.predict.postprocess, threshold_hu=step.train.threshold_hu),
    )
    _score(cell, config, step, patients, predict)
    if say and cell.error:
        say(f"    failed: {cell.error}")
    return cell


def _score(
    cell: Cell, config: AblateConfig, step: Step, patients: Sequence[Patient], predict: PredictConfig
) -> None:
    cache = config.output / "scores" / step.setting / step.mark.label
    try:
        with cpu_settings(step.train.threads):
            score_cell(cell, patients, predict, cache, device=step.train.device)
    except FAILURES as error:
        cell.error = f"{type(error).__name__}: {error}"


def _steps(config: AblateConfig, base: TrainConfig, rows: Sequence[str]) -> list[Step]:
    whole = Mark(base.iterations, base.minutes)
    if config.table == "voting":
        return [Step(str(n), base, _mark(base, n)) for n in ITERATIONS]
    if config.table == "modules":
        return [Step(row, replace(base, lesions=row), whole) for row in rows]
    return [Step(row, replace(base, threshold_hu=float(row)), whole) for row in rows]


def _mark(base: TrainConfig, iterations: int) -> Mark:
    """Return the share of training that `iterations` are of the paper's 3,500."""
    share = iterations / NOMINAL
    minutes = None if base.minutes is None else base.minutes * share
    return Mark(max(1, round(base.iterations * share)), minutes)


def _column(base: TrainConfig, iterations: int) -> str:
    ours = _mark(base, iterations).iterations
    return str(ours) if ours == iterations else f"{ours} (paper {iterations})"


def _rows(config: AblateConfig, seeds: int) -> list[str]:
    known = row_names(config.table, seeds)
    if unknown := [row for row in config.rows if row not in known]:
        raise ValueError(f"rows must be among {', '.join(known)}, got {unknown[0]}")
    return [row for row in known if row in config.rows or not config.rows]


def _seeds(config: AblateConfig, rows: Sequence[str], seeds: int) -> list[int]:
    """Every model for a vote; only those asked for where Table IV is shown without it."""
    if config.table != "voting" or "voting" in rows:
        return list(range(seeds))
    return [int(row.removeprefix("model_")) - 1 for row in rows]


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
