"""Train NormNet: ``python -m normnet.train [--data STORE] [--output RUN]`` (PAPER.md III-A, IV-B.3).

Label-free: the network sees healthy CT with synthetic lesions and learns to recover the healthy bright
tissue; with ``--task lungs`` it sees healthy chests with dense disease and learns where the lungs are. A run
folder holds ``config.json``, ``model.safetensors`` (what is used), ``best.safetensors`` (best on synthetic
validation pairs), ``state.safetensors`` (to resume from), ``metrics.csv`` and TensorBoard events. Weights are
replaced as a whole, so a killed run leaves none half-written.

Several GPUs: ``torchrun --nproc-per-node 4 -m normnet.train ...`` shares each batch; ``--ensemble 5`` trains
five seeds, one after another or spread over ``--devices``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from pydantic import Field
from tqdm import tqdm

import lesionsynth as ls
from lesionsynth.commands import run
from lesionsynth.files import claimed, refuse_foreign, sweep, write_atomically
from normnet.chests import lung_streams
from normnet.config import PRESETS, WEIGHTS, TrainConfig, read_config, to_json
from normnet.data import Batch, Batches, Stream, pair_streams
from normnet.device import choose_device, cpu_settings
from normnet.distributed import World, join, launched_first
from normnet.model import Model
from normnet.runlog import METRICS, RunLog
from normnet.settings import File, settings
from normnet.trainer import Trainer
from normnet.validate import BEST as BEST_SCORE
from normnet.validate import validate, validate_lungs

__all__ = ["BEST", "CONFIG", "METRICS", "STATE", "TrainResult", "main", "parse", "train"]

CONFIG, STATE, BEST = "config.json", "state.safetensors", "best.safetensors"
RUN_FILES = (WEIGHTS, BEST, STATE, METRICS, CONFIG)
"""Files of a run, its settings last: they claim the others."""
FREE = ("resume", "output", "iterations", "minutes", "device", "threads", "data", "cache")
"""Settings that a resumed run may change: they say how far and where, not what. Under a schedule the number
of iterations says what."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    output: Path
    """Run folder."""
    iterations: int
    """Optimiser steps, earlier ones of a resumed run included."""
    seconds: float
    """Training time without validation, likewise."""
    waiting_share: float
    """Share of the training time spent waiting for pairs."""
    synthesis_share: float
    """Time synthesising over the training time: in the background on a CPU, in line on CUDA."""
    validation: dict[str, float]
    """Last scores on synthetic pairs of held-out volumes: val_loss, val_dice, val_auc, and the threshold of
    the healthy probability found best there, calibrated."""


def train(config: TrainConfig, *, progress_bar: bool = False) -> TrainResult:
    """Train a network.

    Under `torchrun`, `accelerate launch`, or in an initialised `torch.distributed` group, every process calls
    this with the same settings; together they train as one would.

    Parameters
    ----------
    config : TrainConfig
        Settings; see `normnet.config` for presets.
    progress_bar : bool
        Show one on standard error.

    Returns
    -------
    TrainResult

    Raises
    ------
    ValueError
        `output` holds a run and `resume` is off, or `resume` is on and it holds none or one with other
        settings; the data set has too few volumes; a batch does not divide among the processes; CUDA is asked
        for where there is none.
    FloatingPointError
        The loss became NaN or infinite.
    """
    with join(config.device) as world:
        device = choose_device(config.device)
        if world.size > 1 and device.type == "cuda":
            device = choose_device(f"cuda:{world.local_rank}")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        share = world.size * config.accumulate
        if config.batch_size % share:
            raise ValueError(
                f"batch_size must be a multiple of processes x accumulate, {world.size} x "
                f"{config.accumulate}, got {config.batch_size}"
            )
        refused = world.agree(_refusal(config) if world.leads else None)
        if refused:
            raise ValueError(refused)
        with cpu_settings(config.threads, world.local_size):
            return _train(config, device, world, progress_bar and world.leads)


def _train(config: TrainConfig, device: torch.device, world: World, progress_bar: bool) -> TrainResult:
    make = lung_streams if config.task == "lungs" else pair_streams
    stream, checks = make(config, device, rank=world.rank, processes=world.size, local=world.local_size)
    with contextlib.ExitStack() as held:
        refused = world.agree(_claim(config, held) if world.leads else None)
        if refused:
            raise ValueError(refused)
        return _trained(config, device, world, stream, checks, progress_bar)


def _trained(
    config: TrainConfig,
    device: torch.device,
    world: World,
    stream: Stream,
    checks: list[Batch],
    progress_bar: bool,
) -> TrainResult:
    trainer = Trainer(config, device, world)
    if config.resume and (config.output / STATE).exists():  # killed before its first save it starts anew
        trainer.restore(config.output / STATE)
    log = RunLog(config.output, trainer.progress) if world.leads else None
    _loop(config, trainer, stream, checks, log, progress_bar)
    done = trainer.progress
    time_spent = max(done.seconds, 1e-9)
    return TrainResult(
        config.output,
        done.iteration,
        done.seconds,
        done.waited / time_spent,
        done.synthesised / time_spent,
        done.scores,
    )


def _loop(
    config: TrainConfig,
    trainer: Trainer,
    stream: Stream,
    checks: list[Batch],
    log: RunLog | None,
    progress_bar: bool,
) -> None:
    progress, world = trainer.progress, trainer.world
    before = replace(progress)
    limit = None if config.minutes is None else 60.0 * config.minutes
    batches = Batches(stream, range(progress.iteration, config.iterations))
    counts = (config.iterations, progress.iteration, "it")
    total, initial, unit = counts if limit is None else (round(limit), round(progress.seconds), "s")
    bar = tqdm(
        total=total,
        initial=initial,
        unit=unit,
        disable=not progress_bar,
        desc=config.output.name,
        mininterval=1.0,
    )
    try:
        start = time.perf_counter()
        for batch in batches:
            if limit is not None and world.agree(progress.seconds >= limit):
                break
            loss = trainer.step(batch)
            progress.waited = before.waited + batches.waited
            progress.synthesised += batch.seconds
            now = time.perf_counter()
            bar.update(1 if limit is None else round(progress.seconds + now - start) - bar.n)
            progress.seconds += now - start
            if log:
                log.step(progress, loss)
            wait = f"{progress.waited / progress.seconds:.0%}"
            shown = {"loss": f"{loss:.3f}", "it": progress.iteration, "wait": wait, **progress.scores}
            bar.set_postfix(shown, refresh=False)
            if config.validate_every and progress.iteration % config.validate_every == 0:
                _validate(config, trainer, checks, log)
            if log and progress.iteration % config.checkpoint_every == 0:
                _save(config, trainer, log)
            start = time.perf_counter()
        if progress.validated != progress.iteration:
            _validate(config, trainer, checks, log)
        if log:
            _save(config, trainer, log)
    finally:
        batches.close()
        bar.close()
        if log:
            log.close()
    world.agree(None)  # nobody returns before the files are there


def _validate(config: TrainConfig, trainer: Trainer, checks: list[Batch], log: RunLog | None) -> None:
    """Score on synthetic pairs of held-out volumes, and keep the best network."""
    progress = trainer.progress
    progress.validated = progress.iteration
    if not log or not checks:
        return
    if config.task == "lungs":
        scores = validate_lungs(trainer, checks)
    else:
        scores, progress.calibration = validate(trainer, checks, ls.threshold(config.threshold_hu))
    if progress.calibration:
        scores["calibrated"] = progress.calibration["probability"]
    log.scores(progress, scores)
    progress.scores = {k: round(v, 4) for k, v in scores.items()}
    score = scores[BEST_SCORE[config.task]]
    if not score <= progress.best_auc:  # NaN, without bright healthy tissue: the last
        progress.best_auc = score
        _save_model(config, trainer, BEST)


def _save(config: TrainConfig, trainer: Trainer, log: RunLog) -> None:
    log.flush()
    _save_model(config, trainer, WEIGHTS)
    trainer.save(config.output / STATE)


def _save_model(config: TrainConfig, trainer: Trainer, name: str) -> None:
    model = Model(
        trainer.average,
        config.model,
        config.task,
        config.threshold_hu,
        config.inflation_hu,
        trainer.progress.calibration,
        config.probability,
    )
    model.save(config.output / name)


def _claim(config: TrainConfig, held: contextlib.ExitStack) -> str | None:
    """Take the run folder, or say why that failed. Nothing is written for settings that fail."""
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        held.enter_context(claimed(config.output))
        if refused := _refusal(config):  # again: another process may have been faster
            return refused
        if not config.resume:
            write_atomically(config.output / CONFIG, to_json(config))
    except OSError as error:
        return f"output: cannot write {config.output}: {error}"
    except ValueError as error:
        return str(error)
    sweep(config.output)
    return None


def _refusal(config: TrainConfig) -> str | None:
    """Say what is wrong with the run folder."""
    file = config.output / CONFIG
    if not config.resume:
        if os.path.lexists(file):
            return f"output: {config.output} already holds a run; resume it, or name another folder"
        try:
            refuse_foreign(config.output, RUN_FILES[:-1], ours=False, maker="a run that can be resumed")
        except ValueError as error:
            return str(error)
        return None
    if not os.path.lexists(file):
        return f"resume: {config.output} holds no state to continue from ({CONFIG} is missing)"
    try:
        stored = read_config(TrainConfig, file)
        refuse_foreign(config.output, RUN_FILES, ours=True, maker="a run")
    except (OSError, ValueError) as error:
        return f"resume: {error}"
    free: dict[str, Any] = {name: getattr(config, name) for name in FREE}
    if config.schedule != "constant":
        del free["iterations"]  # the learning rate of every step depends on them
    if replace(stored, **free) != config:
        return f"resume: the settings differ from those in {file}; give the same ones, or a new output"
    return None


@settings
class TrainArgs(TrainConfig):
    """Settings of the command line."""

    preset: str | None = None
    """paper, laptop, few, lungs or phantom: the defaults below; lungs with --task lungs, else phantom without
    --data and laptop with it."""
    config: File | None = None
    """JSON as a run writes it (config.json): the defaults below, in place of a preset."""
    ensemble: Annotated[int, Field(ge=1, le=1000)] = 1
    """Train so many seeds, from `seed` up, in folders seed<k> of output; the paper votes with 5 (IV-B.3)."""
    devices: tuple[str, ...] = ()
    """Devices that the members of an ensemble are spread over, such as cuda:0 cuda:1; one after another on
    `device` where omitted."""


class Command(NamedTuple):
    """What a command line asks for."""

    config: TrainConfig
    """Settings of the run, or of the first member."""
    ensemble: int
    """Members."""
    devices: tuple[str, ...]
    """Where they train."""


def parse(argv: Sequence[str]) -> Command:
    """Read the command line: ``--preset`` or ``--config`` gives the defaults that the other flags change.

    Raises
    ------
    ValueError
        Both are given, the preset is unknown, or the file holds no such settings.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--config", "--data", "--task"):
        early.add_argument(flag)
    first, _ = early.parse_known_args(list(argv))
    if first.preset and first.config:
        raise ValueError(f"preset and config exclude each other, got {first.preset} and {first.config}")
    usual = "lungs" if first.task == "lungs" else "laptop" if first.data else "phantom"
    name = first.preset or usual
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    base = PRESETS[name]()
    if first.config:
        try:
            base = read_config(TrainConfig, Path(first.config))
        except (OSError, ValueError) as error:
            raise ValueError(f"config: {error}") from error
    given = {f.name: getattr(base, f.name) for f in fields(base)}
    default = TrainArgs(**given, preset=None if first.config else name)
    args = tyro.cli(TrainArgs, args=list(argv), default=default, prog="normnet.train", description=__doc__)
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    return Command(config, args.ensemble, args.devices)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when done, 1 when training failed on the way, 2 for bad input."""
    from normnet.ensemble import train_ensemble

    def body() -> int:
        config, members, devices = parse(sys.argv[1:] if argv is None else argv)
        if members == 1 and not devices:
            results = [train(config, progress_bar=True)]
        else:
            results = train_ensemble(config, members, devices, progress_bar=True)
        for result in results if launched_first() else []:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in result.validation.items())
            print(f"{result.iterations} iterations in {result.seconds:.0f} s; {shown}")
            waiting, making = f"{result.waiting_share:.1%}", f"{result.synthesis_share:.1%}"
            print(f"{waiting} of it waiting for pairs, {making} making them")
            print(f"weights: {result.output / WEIGHTS}")
        return 0

    return run("normnet.train", body, failed=(FloatingPointError, OSError))


if __name__ == "__main__":
    sys.exit(main())
