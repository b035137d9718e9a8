"""Train one method on healthy slices, calibrate it and write it, as safetensors and JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from lesionsynth.files import claimed, refuse_foreign, sweep, write_atomically
from lesionsynth.strict import shown
from normnet.baselines.base import Baseline, Phase
from normnet.baselines.config import BaselineConfig
from normnet.baselines.methods import build_baseline
from normnet.baselines.score import calibrate
from normnet.baselines.slices import training_slices
from normnet.config import read_config, to_json
from normnet.data import Volume, phantom_volumes, split, store_volumes
from normnet.device import choose_device, cpu_settings
from normnet.model import fitted, read_header, read_tensors, write_tensors
from normnet.settings import naming
from normnet.sheets import Sheet, sheet

WEIGHTS = "baseline.safetensors"
CONFIG = "config.json"
METRICS = "metrics.csv"
COLUMNS = ("phase", "iteration", "seconds", "loss")
"""Names in a run folder."""
HEADER = "normnet_baseline"
"""Key of the safetensors header that holds settings and calibration, as JSON."""


@dataclass(frozen=True)
class BaselineResult:
    """What a training run made."""

    baseline: Baseline
    """Trained and calibrated, in evaluation mode, on the CPU."""
    weights: Path
    """Its file; `load_baseline` reads it."""
    losses: Mapping[str, list[float]]
    """Loss of every step, by phase."""
    seconds: float
    """Training time, data and calibration not counted."""


def train_baseline(config: BaselineConfig, *, progress_bar: bool = False) -> BaselineResult:
    """Train, calibrate and write one baseline.

    Parameters
    ----------
    config : BaselineConfig
        All settings.
    progress_bar : bool
        Show one on standard error.

    Returns
    -------
    BaselineResult
        The same for the same settings, on a CPU with as many threads, where `minutes` did not cut it short.

    Raises
    ------
    ValueError
        No such store or device, too few volumes, no slice with enough lung, or a trained baseline in
        `output` without `overwrite`.
    FloatingPointError
        The loss is no longer a number; nothing but the losses was written.
    """
    device = choose_device(config.device)
    weights = config.output / WEIGHTS
    if weights.exists() and not config.overwrite:
        raise ValueError(f"output must hold no trained baseline unless overwrite is given, got {weights}")
    _check_output(config.output)
    train_volumes, held_out = split(_volumes(config), config.held_out, slab=1)
    with (
        contextlib.ExitStack() as held,
        cpu_settings(config.threads),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        slices = training_slices(train_volumes, config)
        held.enter_context(_claimed(config))
        torch.manual_seed(config.seed)
        baseline = build_baseline(config).to(device)
        losses, seconds = _descend(baseline, slices, device, progress_bar=progress_bar)
        baseline.eval()
        baseline.calibration = calibrate(baseline, held_out)
        save_baseline(weights, baseline)
    return BaselineResult(baseline.cpu(), weights, losses, seconds)


def _check_output(output: Path) -> None:
    """Refuse a folder with files of these names that no baseline's training wrote; its settings prove it."""
    file = output / CONFIG
    try:
        ours = file.is_file() and bool(read_config(BaselineConfig, file))
    except (OSError, ValueError):
        ours = False
    refuse_foreign(output, (WEIGHTS, METRICS, CONFIG), ours=ours, maker="training a baseline")


@contextlib.contextmanager
def _claimed(config: BaselineConfig) -> Iterator[None]:
    """Take the run folder."""
    config.output.mkdir(parents=True, exist_ok=True)
    with claimed(config.output):
        _check_output(config.output)
        sweep(config.output)
        write_atomically(config.output / CONFIG, to_json(config))
        yield


def save_baseline(path: Path, baseline: Baseline) -> None:
    """Write weights, settings and calibration into one file, atomically."""
    header = {"config": json.loads(to_json(baseline.config)), "calibration": baseline.calibration}
    write_tensors(path, baseline.state_dict(), {HEADER: json.dumps(header)})


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What the header of a weights file says."""

    config: BaselineConfig
    calibration: dict[str, float]

    def __post_init__(self) -> None:
        domains = {"scale": (1e-30, 1e9), "threshold": (0.0, 1.0), "slices": (0.0, 1e9)}
        names = self.calibration.keys()  # none before training
        good = (not names or {"scale", "threshold"} <= names <= domains.keys()) and all(
            domains[name][0] <= value <= domains[name][1] for name, value in self.calibration.items()
        )
        if not good:
            raise ValueError(
                "calibration must have a scale in [1e-30, 1e9] and a threshold in [0, 1], got "
                f"{shown(self.calibration)}"
            )


def load_baseline(run: str | os.PathLike[str], *, device: str = "auto") -> Baseline:
    """Load a trained baseline; no code is run.

    Parameters
    ----------
    run : path
        A run folder of `train_baseline`, or the weights file in it.
    device : str
        Where it shall compute; "auto" takes CUDA where there is some.

    Returns
    -------
    Baseline
        In evaluation mode.

    Raises
    ------
    ValueError
        There is none at `run`, it is not ours, or `device` is not there.
    """
    file = baseline_file(run)
    tensors, metadata = read_tensors(file)
    with naming(file):
        header = read_header(metadata, HEADER, _Header)
        with torch.device("meta"):  # no memory before all is known to fit
            baseline = build_baseline(dataclasses.replace(header.config, device=device))
        baseline.load_state_dict(fitted(tensors, baseline.state_dict()), assign=True)
    baseline.calibration = dict(header.calibration)
    return baseline.to(choose_device(device)).eval()


def baseline_file(run: str | os.PathLike[str]) -> Path:
    """Return the weights file of a run folder, or `run` itself; `ValueError` where there is none."""
    path = Path(run)
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"run must be a folder with {WEIGHTS} or such a file, got {path}")
    return file


def _volumes(config: BaselineConfig) -> list[Volume]:
    if config.data is not None:
        return store_volumes(config.data)
    return phantom_volumes(config.phantoms, config.seed, config.phantom_shape, config.phantom_spacing)


def _descend(
    baseline: Baseline, slices: torch.Tensor, device: torch.device, *, progress_bar: bool
) -> tuple[dict[str, list[float]], float]:
    """Go through the phases; losses go to metrics.csv as they come."""
    config = baseline.config
    baseline.train()
    phases = baseline.phases()
    seconds = None if config.minutes is None else 60 * config.minutes / len(phases)
    losses: dict[str, list[float]] = {}
    start = time.perf_counter()
    # a new file: an earlier one may have other names, as in a backup of links
    metrics = write_atomically(config.output / METRICS, sheet([COLUMNS]))
    with metrics.open("a", newline="", encoding="utf-8") as stream:
        rows = _Rows(stream, start)
        for phase in phases:
            baseline.train()
            batches = tqdm(
                _batches(slices, config, device),
                total=config.iterations,
                disable=not progress_bar,
                desc=f"{config.method} {phase.name}",
            )
            losses[phase.name] = _run(phase, batches, seconds, rows)
    return losses, time.perf_counter() - start


class _Rows:
    """The table of losses."""

    def __init__(self, stream: TextIO, start: float) -> None:
        self._sheet = Sheet(stream)
        self._start = start

    def add(self, phase: str, iteration: int, loss: float) -> None:
        elapsed = time.perf_counter() - self._start
        self._sheet.row([phase, iteration, f"{elapsed:.2f}", f"{loss:.6g}"])


def _run(phase: Phase, batches: Iterator[torch.Tensor], seconds: float | None, rows: _Rows) -> list[float]:
    losses: list[float] = []
    start = time.perf_counter()
    for iteration, batch in enumerate(batches, start=1):
        loss = phase.step(batch)
        rows.add(phase.name, iteration, loss)
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss must be finite, got {loss} in step {iteration} of {phase.name}")
        losses.append(loss)
        if seconds is not None and time.perf_counter() - start >= seconds:
            break
    return losses


def _batches(slices: torch.Tensor, config: BaselineConfig, device: torch.device) -> Iterator[torch.Tensor]:
    """Draw batches: all slices in a new order, again and again."""
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(config.iterations):
        while len(order) < config.batch_size:
            order = torch.cat([order, torch.randperm(len(slices), generator=generator)])
        chosen, order = order[: config.batch_size], order[config.batch_size :]
        yield slices[chosen].to(device).float()
