"""Train NormNet: ``python -m normnet.train [--data STORE] [--output RUN]`` (PAPER.md III-A, IV-B.3).

Label-free: the network sees healthy CT with synthetic lesions and learns to recover the healthy bright
tissue. A run folder holds ``config.json``, ``model.safetensors`` (what is used), ``best.safetensors`` (best
on synthetic validation pairs), ``state.safetensors`` (to resume from), ``metrics.csv`` and TensorBoard
events. Weights are replaced as a whole, so a killed run leaves none half-written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

import lesionsynth as ls
from normnet.config import PRESETS, TrainConfig, from_json, to_json
from normnet.data import (
    VALIDATION_INDEX,
    Batch,
    PairStream,
    Prefetcher,
    Volume,
    phantom_volumes,
    split,
    store_volumes,
)
from normnet.device import choose_device, cpu_settings
from normnet.metrics import roc_auc
from normnet.model import WEIGHTS, save_model
from normnet.prepare.store import write_atomically
from normnet.runlog import METRICS, RunLog
from normnet.trainer import Trainer

__all__ = ["BEST", "CONFIG", "METRICS", "STATE", "TrainResult", "main", "parse", "train"]

CONFIG, STATE, BEST = "config.json", "state.safetensors", "best.safetensors"
FREE = ("resume", "output", "iterations", "minutes", "device", "threads", "data")
"""Settings that a resumed run may change: they say how far and where, not what."""


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
    """Time synthesising, in the background, over the training time."""
    validation: dict[str, float]
    """Last scores on synthetic pairs of held-out volumes: loss, dice, auc."""


def train(config: TrainConfig, *, progress_bar: bool = False) -> TrainResult:
    """Train a network.

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
        settings; the data set has too few volumes; CUDA is asked for where there is none.
    """
    device = choose_device(config.device)
    _claim(config)
    with cpu_settings(config.threads):
        return _train(config, device, progress_bar)


def _train(config: TrainConfig, device: torch.device, progress_bar: bool) -> TrainResult:
    training, validation = _volumes(config)
    trainer = Trainer(config, device)
    if config.resume:
        trainer.restore(config.output / STATE)
    stream, checks = _streams(config, training, validation)
    log = RunLog(config.output, trainer.progress.iteration)
    scores = _loop(config, trainer, stream, checks, log, progress_bar)
    done = trainer.progress
    time_spent = max(done.seconds, 1e-9)
    return TrainResult(
        config.output,
        done.iteration,
        done.seconds,
        done.waited / time_spent,
        done.synthesised / time_spent,
        scores,
    )


def _loop(
    config: TrainConfig,
    trainer: Trainer,
    stream: PairStream,
    checks: list[Batch],
    log: RunLog,
    progress_bar: bool,
) -> dict[str, float]:
    progress = trainer.progress
    before = replace(progress)
    limit = None if config.minutes is None else 60.0 * config.minutes
    batches = Prefetcher(stream, range(progress.iteration, config.iterations))
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
    scores: dict[str, float] = {}
    validated = -1
    try:
        start = time.perf_counter()
        for batch in batches:
            if limit is not None and progress.seconds >= limit:
                break
            loss = trainer.step(batch)
            progress.waited = before.waited + batches.waited
            progress.synthesised = before.synthesised + batches.synthesised
            now = time.perf_counter()
            bar.update(1 if limit is None else round(progress.seconds + now - start) - bar.n)
            progress.seconds += now - start
            log.step(progress, loss)
            wait = f"{progress.waited / progress.seconds:.0%}"
            bar.set_postfix(refresh=False, loss=f"{loss:.3f}", it=progress.iteration, wait=wait, **scores)
            if config.validate_every and progress.iteration % config.validate_every == 0:
                scores, validated = _validate(config, trainer, checks, log), progress.iteration
            if progress.iteration % config.checkpoint_every == 0:
                _save(config, trainer)
            start = time.perf_counter()
        if validated != progress.iteration:
            scores = _validate(config, trainer, checks, log)
        _save(config, trainer)
    finally:
        batches.close()
        bar.close()
        log.close()
    return scores


def _validate(config: TrainConfig, trainer: Trainer, checks: list[Batch], log: RunLog) -> dict[str, float]:
    """Scores of the averaged network on synthetic pairs of held-out volumes, over bright voxels (A >= τ)."""
    tau = ls.threshold()
    losses, healthy, diseased = [], [], []
    for batch in checks:
        probability, loss = trainer.probability(batch)
        bright = batch.image >= tau
        losses.append(loss)
        healthy.append(probability[bright & ~batch.lesions].numpy())
        diseased.append(probability[bright & batch.lesions].numpy())
    if not losses:
        return {}
    well, ill = np.concatenate(healthy), np.concatenate(diseased)
    auc = roc_auc(well, ill)
    hit = float((well > 0.5).sum())
    dice = 2 * hit / max(hit + float((ill > 0.5).sum()) + len(well), 1.0)
    scores = {"val_loss": float(np.mean(losses)), "val_dice": dice, "val_auc": auc}
    log.scores(trainer.progress, scores)
    if auc > trainer.progress.best_auc:
        trainer.progress.best_auc = auc
        save_model(config.output / BEST, trainer.average, config.model)
    return {k: round(v, 4) for k, v in scores.items()}


def _save(config: TrainConfig, trainer: Trainer) -> None:
    save_model(config.output / WEIGHTS, trainer.average, config.model)
    trainer.save(config.output / STATE)


def _claim(config: TrainConfig) -> None:
    """Take the run folder, or refuse what is in it."""
    file = config.output / CONFIG
    if config.resume:
        if not (config.output / STATE).exists():
            raise ValueError(f"resume: {config.output} holds no state to continue from ({STATE} is missing)")
        stored = from_json(TrainConfig, file.read_text())
        free: dict[str, Any] = {name: getattr(config, name) for name in FREE}
        if replace(stored, **free) != config:
            raise ValueError(
                f"resume: the settings differ from those in {file}; give the same ones, or a new output"
            )
        return
    if file.exists():
        raise ValueError(f"output: {config.output} already holds a run; resume it, or name another folder")
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(file, to_json(config))


def _volumes(config: TrainConfig) -> tuple[list[Volume], list[Volume]]:
    if config.data is None:
        count = config.phantoms + config.held_out
        volumes = phantom_volumes(count, config.seed, config.phantom_shape, config.phantom_spacing)
    else:
        volumes = store_volumes(config.data)
    return split(volumes, config.held_out, config.slab)


def _streams(
    config: TrainConfig, training: Sequence[Volume], validation: Sequence[Volume]
) -> tuple[PairStream, list[Batch]]:
    """Return the training stream and the fixed validation batches."""
    # One thread: synthesis runs beside the network, which has the others.
    synthesizer = ls.LesionSynthesizer(ls.presets.get(config.lesions), seed=config.seed, threads=1)
    common: dict[str, Any] = {"slab": config.slab, "crop": config.crop, "multiple": config.model.multiple}
    stream = PairStream(training, synthesizer, batch_size=config.batch_size, mirror=config.mirror, **common)
    if not validation:
        return stream, []
    held = PairStream(
        validation, synthesizer, batch_size=1, largest=stream.largest, first_index=VALIDATION_INDEX, **common
    )
    return stream, [held.batch(k) for k in range(config.validation_pairs)]


def parse(argv: Sequence[str]) -> TrainConfig:
    """Read the command line: ``--preset`` names the defaults that the other flags change."""
    arguments = list(argv)
    data_given = any(a == "--data" or a.startswith("--data=") for a in arguments)
    name = "laptop" if data_given else "phantom"
    for k, argument in enumerate(arguments):
        if argument == "--preset" or argument.startswith("--preset="):
            inline = argument.partition("=")[2]
            name = inline or (arguments[k + 1] if k + 1 < len(arguments) else "")
            del arguments[k : k + (1 if inline else 2)]
            break
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    description = (
        f"{__doc__}\n\n--preset {{{','.join(PRESETS)}}} chooses the defaults below (here: {name}); "
        "phantom without --data, laptop with it."
    )
    return tyro.cli(
        TrainConfig, args=arguments, default=PRESETS[name](), prog="normnet.train", description=description
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when done, 2 for bad input."""
    try:
        result = train(parse(sys.argv[1:] if argv is None else argv), progress_bar=True)
    except ValueError as error:
        print(f"normnet.train: {error}", file=sys.stderr)
        return 2
    shown = ", ".join(f"{k} {v:.4f}" for k, v in result.validation.items())
    print(f"{result.iterations} iterations in {result.seconds:.0f} s; {shown}")
    print(
        f"{result.waiting_share:.1%} of it waiting for pairs, {result.synthesis_share:.1%} making them beside"
    )
    print(f"weights: {result.output / WEIGHTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
