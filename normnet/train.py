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
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from monai.losses import DiceCELoss, DiceLoss
from pydantic import Field
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import lesionsynth as ls
from lesionsynth.commands import run
from lesionsynth.files import claimed, refuse_foreign, sweep, write_atomically
from lesionsynth.strict import name_of, shown
from normnet.chests import lung_streams
from normnet.config import PRESETS, WEIGHTS, TrainConfig, read_config, to_json
from normnet.data import Batch, Batches, Stream, pair_streams
from normnet.device import available_cores, choose_device, cpu_settings, use_bf16
from normnet.metrics import roc_auc
from normnet.model import (
    MOST_FILE,
    Calibration,
    Model,
    build_unet,
    check_calibration,
    fitted,
    read_header,
    read_tensors,
    write_tensors,
)
from normnet.settings import File, naming, settings
from normnet.sheets import Sheet, read_rows, sheet
from normnet.workers import SLOT, Died, run_parallel

CONFIG, STATE, BEST, METRICS = "config.json", "state.safetensors", "best.safetensors", "metrics.csv"
RUN_FILES = (WEIGHTS, BEST, STATE, METRICS, CONFIG)
"""Files of a run, its settings last: they claim the others."""
FREE = ("resume", "output", "iterations", "minutes", "device", "threads", "data", "folds", "cache")
"""Settings that a resumed run may change: they say how far and where, not what. Under a schedule the number
of iterations says what."""
BEST_SCORE = {"lesions": "val_auc", "lungs": "val_dice"}
"""The score that the best network of a run has most of, by task."""
WARM_UP = 20
"""The average of weights follows them closely at first: after n steps its decay is at most
(1 + n) / (WARM_UP + n)."""
THRESHOLDS = np.arange(1, 100) / 100
"""Of the healthy probability, tried in calibration."""
PROGRESS = "progress"
"""Key of the state's safetensors metadata that holds the counters, as JSON."""


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
    this with the same settings and computes its part of each batch.

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
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(join(config.device))
        device = choose_device(config.device)
        if world.size > 1 and device.type == "cuda":
            device = choose_device(f"cuda:{world.local_rank}")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if config.batch_size % (world.size * config.accumulate):
            raise ValueError(
                f"batch_size must be a multiple of processes x accumulate, {world.size} x "
                f"{config.accumulate}, got {config.batch_size}"
            )
        world.refuse(_refusal(config) if world.leads else None)  # before the data are read
        stack.enter_context(cpu_settings(config.threads, world.local_size))
        streams = lung_streams if config.task == "lungs" else pair_streams
        stream, checks = streams(
            config, device, rank=world.rank, processes=world.size, local=world.local_size
        )
        world.refuse(_claim(config, stack) if world.leads else None)
        trainer = Trainer(config, device, world)
        if config.resume and (config.output / STATE).exists():  # killed before its first save it starts anew
            trainer.restore(config.output / STATE)
        log = stack.enter_context(RunLog(config.output, trainer.progress)) if world.leads else None
        _loop(trainer, stream, checks, log, progress_bar and world.leads)
        world.agree(None)  # nobody returns before the files are there
    done, spent = trainer.progress, max(trainer.progress.seconds, 1e-9)
    shares = done.waited / spent, done.synthesised / spent
    return TrainResult(config.output, done.iteration, done.seconds, *shares, done.scores)


def _loop(
    trainer: Trainer, stream: Stream, checks: Sequence[Batch], log: RunLog | None, progress_bar: bool
) -> None:
    """Step by step: train, validate, save."""
    config, progress = trainer.config, trainer.progress
    limit = None if config.minutes is None else 60.0 * config.minutes
    seen = (config.iterations, progress.iteration, "it")
    total, initial, unit = seen if limit is None else (round(limit), round(progress.seconds), "s")
    waited = progress.waited
    with (
        contextlib.closing(Batches(stream, range(progress.iteration, config.iterations))) as batches,
        tqdm(
            total=total,
            initial=initial,
            unit=unit,
            disable=not progress_bar,
            desc=config.output.name,
            mininterval=1.0,
        ) as bar,
    ):
        start = time.perf_counter()
        for batch in batches:
            if limit is not None and trainer.world.agree(progress.seconds >= limit):
                break
            loss = trainer.step(batch)
            progress.waited = waited + batches.waited
            progress.synthesised += batch.seconds
            now = time.perf_counter()
            progress.seconds += now - start
            if log:
                log.step(progress, loss)
            bar.update(1 if limit is None else round(progress.seconds) - bar.n)
            wait = f"{progress.waited / progress.seconds:.0%}"
            told = {"loss": f"{loss:.3f}", "it": progress.iteration, "wait": wait, **progress.scores}
            bar.set_postfix(told, refresh=False)
            if config.validate_every and progress.iteration % config.validate_every == 0:
                _validate(trainer, checks, log)
            if log and progress.iteration % config.checkpoint_every == 0:
                _save(trainer, log)
            start = time.perf_counter()
        if progress.validated != progress.iteration:
            _validate(trainer, checks, log)
        if log:
            _save(trainer, log)


def _validate(trainer: Trainer, checks: Sequence[Batch], log: RunLog | None) -> None:
    """Score on synthetic pairs of held-out volumes, and keep the best network."""
    config, progress = trainer.config, trainer.progress
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
        trainer.as_model().save(config.output / BEST)


def _save(trainer: Trainer, log: RunLog) -> None:
    log.flush()  # before the state that a killed run resumes from
    trainer.as_model().save(trainer.config.output / WEIGHTS)
    trainer.save(trainer.config.output / STATE)


def _claim(config: TrainConfig, stack: contextlib.ExitStack) -> str | None:
    """Take the run folder, or say why that failed. Nothing is written for settings that fail."""
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        stack.enter_context(claimed(config.output))
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


# ---- several processes


@dataclass(frozen=True)
class World:
    """One process among those that train together."""

    rank: int = 0
    """Its number; process 0 writes."""
    size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Its number on this machine: its GPU."""
    local_size: int = 1
    """Processes on this machine."""

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def agree(self, value: Any) -> Any:
        """Give every process the value of process 0."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def refuse(self, reason: str | None) -> None:
        """Raise `ValueError` in every process where process 0 has a reason."""
        if reason := self.agree(reason):
            raise ValueError(reason)


ALONE = World()
"""A single process."""


@contextlib.contextmanager
def join(device: str) -> Iterator[World]:
    """Join the processes that a launcher started; alone where there is none."""
    theirs = dist.is_available() and dist.is_initialized()  # the caller's group stays the caller's
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not theirs and not launched:
        yield ALONE
        return
    if not theirs:
        cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        local = (int(os.environ.get(k, v)) for k, v in (("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", size)))
        yield World(rank, size, *local)
    finally:
        if not theirs:
            dist.destroy_process_group()


# ---- one step, and what it changes


@dataclass
class Progress:
    """Counters that a resumed run continues."""

    iteration: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    synthesised: float = 0.0
    best_auc: float = -1.0
    validated: int = -1
    """Iteration of the last validation, its scores, and the calibration it gave."""
    scores: dict[str, float] = field(default_factory=dict)
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        """Check what a file may say; scores and the best of them may be NaN: nothing bright was healthy."""
        domains = dict.fromkeys(("seconds", "waited", "synthesised"), (0.0, 1e10))
        domains |= {"iteration": (0, 10**9), "best_auc": (-1, 1), "validated": (-1, self.iteration)}
        for name, (least, most) in domains.items():
            value = getattr(self, name)
            if not (least <= value <= most or (name == "best_auc" and math.isnan(value))):
                raise ValueError(f"progress.{name} must be in [{least:g}, {most:g}], got {value}")
        check_calibration(self.calibration, "progress.calibration")


class Trainer:
    """Network, optimiser, running average and counters; saved and restored as one file.

    Parameters
    ----------
    config : TrainConfig
        Settings.
    device : torch.device
        Where to train.
    world : World
        The processes that train together. Each computes its part of a batch as `accumulate` does: Dice is
        that of a part, and so is normalisation on a CPU; GPUs share theirs.
    """

    def __init__(self, config: TrainConfig, device: torch.device, world: World = ALONE) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device, self.world = config, device, world
        self.bf16 = use_bf16(config.precision, device)
        self.model = build_unet(config.model).to(device)
        if self.bf16:  # the layout bf16 convolutions are fastest in
            self.model = self.model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        follow: Any = lambda means, weights, _: self._follow(means, weights)  # noqa: E731
        self.average = AveragedModel(self.model, multi_avg_fn=follow, use_buffers=True).requires_grad_(False)
        self.average.n_averaged += 1  # the initial weights
        self._shared: torch.nn.Module = self.model
        if world.size > 1:
            if device.type == "cuda":
                sync: Any = torch.nn.SyncBatchNorm.convert_sync_batchnorm
                self.model = sync(self.model)
            self._shared = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)
        self.progress = Progress()
        self.schedule = self._schedule()

    def _schedule(self) -> LambdaLR:
        """Learning rate, from the present step on."""
        config, step = self.config, self.progress.iteration

        def rate(step: int) -> float:
            if config.schedule == "constant":
                return 1.0
            return 0.5 * (1 + math.cos(math.pi * min(step / config.iterations, 1.0)))

        for group in self.optimizer.param_groups:
            group["initial_lr"] = config.learning_rate
        return LambdaLR(self.optimizer, rate, last_epoch=step - 1)

    def step(self, batch: Batch) -> float:
        """Train on one batch, in parts where so configured; return the loss.

        Raises
        ------
        FloatingPointError
            The loss is not finite; the weights are those of the step before.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.config.accumulate
        losses = [self._backward(batch, batch.part(k, parts), last=k == parts - 1) for k in range(parts)]
        loss = self._mean(sum(losses) / parts)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss} at iteration {self.progress.iteration + 1}: lower learning_rate "
                f"({self.config.learning_rate}), or compute in fp32 (precision {self.config.precision!r})"
            )
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.schedule.step()
        self.progress.iteration += 1
        return loss

    def _backward(self, batch: Batch, part: slice, *, last: bool) -> float:
        """Add a part's gradients; processes exchange them with the last part alone."""
        image, target = (a[part].to(self.device, non_blocking=True) for a in (batch.image, batch.target))
        weight = None
        if self.config.task == "lungs":
            weight = 1 + (self.config.chest.emphasis - 1) * batch.lesions[part].to(self.device).float()
        shared = self._shared
        with contextlib.ExitStack() as stack:
            if isinstance(shared, DistributedDataParallel) and not last:
                stack.enter_context(shared.no_sync())
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                logits = shared(image)
            found = dice_ce(logits, target, weight)
            (found / self.config.accumulate).backward()  # type: ignore[no-untyped-call]
        return found.item()

    def _mean(self, loss: float) -> float:
        """Mean over the processes, which raise together where one loss is not finite."""
        if self.world.size == 1:
            return loss
        total = torch.tensor(loss, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item() / self.world.size

    @torch.no_grad()
    def _follow(self, means: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
        """Take the average along; `weights` are all of one type."""
        n = self.progress.iteration
        decay = min(self.config.average, (1 + n) / (WARM_UP + n)) if self.config.average else 0.0
        if means[0].is_floating_point():
            torch._foreach_lerp_(means, weights, 1.0 - decay)
        else:
            torch._foreach_copy_(means, weights)

    @torch.inference_mode()
    def probability(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """Healthy probability of a batch by the averaged network, and its loss."""
        self.average.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.average(batch.image.to(self.device)).float()
        loss = dice_ce(logits, batch.target.to(self.device))
        return torch.sigmoid(logits).cpu(), loss.item()

    def as_model(self) -> Model:
        """Return what is used: the averaged network, and how."""
        config, network = self.config, self.average.module
        settled = (config.threshold_hu, config.inflation_hu, self.progress.calibration, config.probability)
        return Model(network, config.model, config.task, *settled)

    def save(self, path: Path) -> None:
        """Write everything a resumed run needs."""
        tensors = self._weights()
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{k}": v for k, v in moments.items()}
        write_tensors(path, tensors, {PROGRESS: json.dumps(asdict(self.progress))})

    def restore(self, path: Path) -> None:
        """Continue from `save`.

        Raises
        ------
        ValueError
            The file is none of this run's: other tensors, or numbers that are none; it is named. Nothing has
            changed then.
        """
        tensors, metadata = read_tensors(path, 4 * MOST_FILE)  # weights, their average and two moments
        wanted = self._weights()
        with naming(path):
            progress = read_header(metadata, PROGRESS, Progress)
            for number, weight in enumerate(self.model.parameters() if progress.iteration else ()):
                wanted[f"adam.{number}.step"] = torch.empty((), dtype=torch.float32, device="meta")
                wanted |= {f"adam.{number}.{k}": weight for k in ("exp_avg", "exp_avg_sq")}
            tensors = fitted(tensors, wanted)
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "average": {}}
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part == "adam":
                number_of, _, rest = rest.partition(".")
                moments.setdefault(int(number_of), {})[rest] = tensor
            else:
                parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.average.module.load_state_dict(parts["average"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.progress = progress
        self.schedule = self._schedule()

    def _weights(self) -> dict[str, torch.Tensor]:
        networks = {"model": self.model, "average": self.average.module}
        return {f"{part}.{k}": v for part, net in networks.items() for k, v in net.state_dict().items()}


def dice_ce(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Dice plus cross-entropy (PAPER.md III-A).

    One Dice over the batch: a crop may hold next to no healthy bright tissue, where its own would be noise.

    Parameters
    ----------
    logits : (b, c, z, y, x) float tensor
        Of one or several structures, each of which counts as a sample.
    target : (b, c, z, y, x) bool tensor
        Healthy bright tissue, or right and left lung.
    weight : (b, 1, z, y, x) float tensor, optional
        Of the voxels in the cross-entropy, which stays a mean over voxels; 1 where omitted.

    Returns
    -------
    scalar float32 tensor
    """
    channels = logits.shape[1]
    logits, wanted = (a.float().flatten(0, 1)[:, None] for a in (logits, target))
    if weight is None:
        loss: torch.Tensor = DiceCELoss(sigmoid=True, batch=True)(logits, wanted)
        return loss
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, weight.repeat_interleave(channels, 0))
    weighted: torch.Tensor = DiceLoss(sigmoid=True, batch=True)(logits, wanted) + entropy
    return weighted


# ---- validation: no annotation


def validate(
    trainer: Trainer, batches: Sequence[Batch], tau: float
) -> tuple[dict[str, float], Calibration | None]:
    """Score the averaged network over bright voxels (A >= τ) of fixed pairs.

    Parameters
    ----------
    trainer : Trainer
        Has the network.
    batches : sequence of Batch
        Pairs of held-out volumes, at least one.
    tau : float
        Bright voxels are at or above it.

    Returns
    -------
    scores : dict
        ``val_loss``; ``val_dice`` of the healthy voxels at a probability of 0.5; ``val_auc`` of healthy
        against lesion voxels.
    calibration : Calibration or None
        See `calibrate`.
    """
    losses, healthy, diseased = [], [], []
    for batch in batches:
        probability, loss = trainer.probability(batch)
        bright, lesions = (batch.image >= tau).cpu(), batch.lesions.cpu()
        losses.append(loss)
        healthy.append(probability[bright & ~lesions].numpy())
        diseased.append(probability[bright & lesions].numpy())
    well, ill = np.concatenate(healthy), np.concatenate(diseased)
    hit = float((well > 0.5).sum())
    dice = 2 * hit / max(hit + float((ill > 0.5).sum()) + len(well), 1.0)
    scores = {"val_loss": float(np.mean(losses)), "val_dice": dice, "val_auc": roc_auc(well, ill)}
    return scores, calibrate(well, ill)


def validate_lungs(trainer: Trainer, batches: Sequence[Batch]) -> dict[str, float]:
    """Score the averaged lung network on fixed samples of held-out chests, at least one.

    Returns
    -------
    dict
        ``val_loss``; ``val_dice``, the mean of right and left lung over all samples; ``val_recall``, the
        share of painted disease that is found to be lung of its side, NaN where none is painted.
    """
    losses, sums, ill = [], np.zeros((2, 2)), np.zeros(2)
    for batch in batches:
        probability, loss = trainer.probability(batch)
        found, lungs, disease = (probability > 0.5).numpy(), batch.target.numpy(), batch.lesions.numpy()
        losses.append(loss)
        hit, axes = found & lungs, (0, 2, 3, 4)
        sums += np.stack([2 * hit.sum(axes), found.sum(axes) + lungs.sum(axes)])
        ill += ((hit.any(1, keepdims=True) & disease).sum(), disease.sum())
    dice = float((sums[0] / np.maximum(sums[1], 1)).mean())
    recall = float(ill[0] / ill[1]) if ill[1] else math.nan
    return {"val_loss": float(np.mean(losses)), "val_dice": dice, "val_recall": recall}


def calibrate(well: npt.NDArray[np.float32], ill: npt.NDArray[np.float32]) -> Calibration | None:
    """Find the threshold of the healthy probability at which what does not exceed it matches lesions best.

    Parameters
    ----------
    well, ill : float32 arrays
        Healthy probabilities of bright healthy and of bright lesion voxels.

    Returns
    -------
    Calibration or None
        ``probability``, of `THRESHOLDS`, the smallest of equals, and the ``dice`` it gives; None where there
        is no lesion.
    """
    if not len(ill):
        return None
    missed_healthy, found = (np.searchsorted(np.sort(p), THRESHOLDS, "right") for p in (well, ill))
    dice = 2 * found / (missed_healthy + found + len(ill))
    best = int(dice.argmax())
    return {"probability": float(THRESHOLDS[best]), "dice": float(dice[best])}


# ---- metrics.csv and TensorBoard


class RunLog:
    """metrics.csv and TensorBoard; a resumed run drops the rows after its last state and writes them anew."""

    FIELDS = (
        "iteration", "seconds", "loss", "waiting", "synthesis", "val_loss", "val_dice", "val_auc",
        "val_recall", "calibrated",
    )  # fmt: skip

    def __init__(self, output: Path, progress: Progress) -> None:
        self._file = output / METRICS
        kept = self._kept(progress) if progress.iteration and self._file.exists() else []
        rows = ([row.get(name) for name in self.FIELDS] for row in kept)
        write_atomically(self._file, sheet([self.FIELDS, *rows]))
        self._stream = self._file.open("a", newline="")
        self._rows = Sheet(self._stream)
        self._board = SummaryWriter(str(output), purge_step=progress.iteration + 1)

    def _kept(self, progress: Progress) -> list[dict[str, str]]:
        (_, head), *rows = read_rows(self._file) or [(0, [])]
        if set(head) - set(self.FIELDS):
            raise ValueError(f"{name_of(self._file)}: must be the table of a run, got {shown(head)}")
        kept = []
        for number, cells in rows:
            row = dict(zip(head, cells, strict=False))
            last = progress.iteration if row.get("loss") else progress.validated
            if not re.fullmatch("[0-9]{1,10}", row.get("iteration", "")):
                raise ValueError(
                    f"{name_of(self._file)}, line {number}: iteration must be a number, got "
                    f"{shown(row.get('iteration'))}: move the table away to resume without it"
                )
            if int(row["iteration"]) <= last:
                kept.append(row)
        return kept

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._board.close()

    def step(self, progress: Progress, loss: float) -> None:
        """One line a training step."""
        waiting, synthesis = (t / progress.seconds for t in (progress.waited, progress.synthesised))
        self.scores(progress, {"loss": loss, "waiting": waiting, "synthesis": synthesis})

    def scores(self, progress: Progress, values: Mapping[str, float]) -> None:
        """One line a validation."""
        told = {name: f"{value:.5g}" for name, value in values.items()}
        row = {"iteration": progress.iteration, "seconds": f"{progress.seconds:.2f}", **told}
        self._rows.row(row.get(name) for name in self.FIELDS)
        for name, value in values.items():
            self._board.add_scalar(name, value, progress.iteration)

    def flush(self) -> None:
        """Write what is held back."""
        self._stream.flush()
        self._board.flush()


# ---- ensembles


def train_ensemble(
    config: TrainConfig, members: int = 5, devices: Sequence[str] = (), *, progress_bar: bool = False
) -> list[TrainResult]:
    """Train several networks that differ by their seed and vote (PAPER.md III-A, IV-B.3).

    Parameters
    ----------
    config : TrainConfig
        Settings of the first member; member k has seed ``config.seed + k`` and the folder
        ``config.output / "seed<seed>"``. With `resume` finished members are kept, begun ones continued and
        missing ones begun.
    members : int
        How many; the paper votes with 5.
    devices : sequence of str, optional
        Spread over these, a process each; one may occur twice. One after another, in this process and on
        ``config.device``, where omitted.
    progress_bar : bool
        Show one on standard error, for members that train one after another.

    Returns
    -------
    list of TrainResult
        By seed; ``normnet.predict --models <output>`` lets them vote.

    Raises
    ------
    ValueError
        `members` is below 1, a device is not there, or a member is refused as by `train`.
    FloatingPointError
        A member's loss became NaN or infinite; the others are kept.
    OSError
        A member's process was killed; the others are kept.
    """
    if members < 1:
        raise ValueError(f"members must be >= 1, got {members}")
    if "WORLD_SIZE" in os.environ and devices:
        raise ValueError("devices: a launcher has shared the devices out already; leave it out")
    for device in devices:
        choose_device(device)
    configs = []
    for seed in range(config.seed, config.seed + members):
        output = config.output / f"seed{seed}"
        begun = (output / CONFIG).exists()
        if begun and not config.resume:  # before the first one trains for hours
            raise ValueError(f"output: {output} already holds a run; resume it, or name another folder")
        configs.append(replace(config, seed=seed, output=output, resume=begun))
    if not devices:
        return [train(member, progress_bar=progress_bar) for member in configs]
    cpus = sum(device.startswith("cpu") for device in devices)
    if config.threads is None and cpus:
        configs = [replace(member, threads=max(1, available_cores() // cpus)) for member in configs]
    # fresh processes: CUDA does not survive a fork
    ended = dict(run_parallel(partial(_train_on, tuple(devices)), configs, min(len(devices), members)))
    results: list[TrainResult] = []
    for index, member in enumerate(configs):  # all have come to their ends
        result = ended[index]
        if isinstance(result, Died):
            raise ChildProcessError(f"{member.output}: {result}")
        if isinstance(result, Exception):
            raise result
        results.append(result)
    return results


def _train_on(devices: Sequence[str], config: TrainConfig) -> TrainResult | Exception:
    """Train in a worker, on its device."""
    try:
        return train(replace(config, device=devices[int(os.environ[SLOT])]))
    except Exception as error:  # the other members go on
        return error


# ---- the command


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

    def body() -> int:
        config, members, devices = parse(sys.argv[1:] if argv is None else argv)
        if members == 1 and not devices:
            results = [train(config, progress_bar=True)]
        else:
            results = train_ensemble(config, members, devices, progress_bar=True)
        for result in results if os.environ.get("RANK", "0") == "0" else []:  # one of several processes talks
            scores = ", ".join(f"{k} {v:.4f}" for k, v in result.validation.items())
            print(f"{result.iterations} iterations in {result.seconds:.0f} s; {scores}")
            waiting, making = f"{result.waiting_share:.1%}", f"{result.synthesis_share:.1%}"
            print(f"{waiting} of it waiting for pairs, {making} making them")
            print(f"weights: {result.output / WEIGHTS}")
        return 0

    return run("normnet.train", body, failed=(FloatingPointError, OSError))


if __name__ == "__main__":
    sys.exit(main())
