"""Train NormNet: ``python -m normnet.train [--data STORE] [--output RUN] [--preset NAME]`` (PAPER.md III-A, IV-B.3).

Label-free: the network sees healthy CT with synthetic lesions and learns to recover the healthy bright tissue.
A run folder holds ``config.json``, ``model.safetensors`` (what is used), ``best.safetensors`` (best on synthetic
validation pairs), ``state.safetensors`` (to resume from), ``metrics.csv`` and TensorBoard events. Each file is replaced
as a whole, so a killed run leaves nothing half-written.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from monai.losses import DiceCELoss
from torch.utils.tensorboard import SummaryWriter
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
from normnet.metrics import roc_auc
from normnet.model import WEIGHTS, build_unet, read_tensors, save_model, write_tensors

CONFIG, STATE, BEST, METRICS = "config.json", "state.safetensors", "best.safetensors", "metrics.csv"
WARM_UP = 20
"""The average of the weights follows them closely at first: its decay is min(average, (1 + n) / (WARM_UP + n))."""


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


@dataclass
class Progress:
    """Counters that a resumed run continues."""

    iteration: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    synthesised: float = 0.0
    best_auc: float = -1.0


class Trainer:
    """Network, optimiser, running average and counters; saved and restored as one file."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.bf16 = use_bf16(config.precision, device)
        self.model = build_unet(config.model).to(device)
        if self.bf16:  # the layout bf16 convolutions are fastest in
            self.model = self.model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.average = build_unet(config.model).to(device).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)
        # One Dice over the batch: a crop may hold next to no healthy bright tissue, where Dice is noise.
        self.loss = DiceCELoss(sigmoid=True, batch=True)
        self.progress = Progress()

    def step(self, batch: Batch) -> float:
        """Train on one batch; return the loss."""
        self.model.train()
        loss = self._loss(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self._follow()
        self.progress.iteration += 1
        return loss.item()

    @torch.inference_mode()
    def probability(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """Healthy probability of a batch by the averaged network, and its loss."""
        self.average.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.average(batch.image.to(self.device))
        loss = self.loss(logits.float(), batch.target.to(self.device).float())
        return torch.sigmoid(logits.float()).cpu(), loss.item()

    def save(self, path: Path) -> None:
        """Write everything a resumed run needs."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{k}": v for k, v in moments.items()}
        write_tensors(path, tensors, {"progress": json.dumps(asdict(self.progress))})

    def restore(self, path: Path) -> None:
        """Continue from `save`."""
        tensors, metadata = read_tensors(path)
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "average": {}, "adam": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.average.load_state_dict(parts["average"])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in parts["adam"].items():
            number, _, moment = name.partition(".")
            state.setdefault(int(number), {})[moment] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.progress = Progress(**json.loads(metadata["progress"]))

    def _loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        image = batch.image.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = model(image)
        loss: torch.Tensor = self.loss(logits.float(), batch.target.to(self.device).float())
        return loss

    @torch.no_grad()
    def _follow(self) -> None:
        n = self.progress.iteration
        decay = min(self.config.average, (1 + n) / (WARM_UP + n)) if self.config.average else 0.0
        for mean, now in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(now, 1.0 - decay)
            else:
                mean.copy_(now)


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
        `output` holds a run and `resume` is off, or `resume` is on and it holds none or one with other settings;
        the data set has too few volumes; CUDA is asked for where there is none.
    """
    device = choose_device(config.device)
    torch.set_num_threads(config.threads or available_cores())
    torch.set_flush_denormal(True)  # denormals of a converged network slow a CPU several times
    _claim(config)
    training, validation = _volumes(config)
    trainer = Trainer(config, device)
    if config.resume:
        trainer.restore(config.output / STATE)
    stream, checks = _streams(config, training, validation)
    log = _Log(config.output, trainer.progress.iteration)
    scores = _loop(config, trainer, stream, checks, log, progress_bar)
    done = trainer.progress
    time_spent = max(done.seconds, 1e-9)
    return TrainResult(
        config.output, done.iteration, done.seconds, done.waited / time_spent, done.synthesised / time_spent, scores
    )


def _loop(
    config: TrainConfig,
    trainer: Trainer,
    stream: PairStream,
    checks: list[Batch],
    log: _Log,
    progress_bar: bool,
) -> dict[str, float]:
    progress = trainer.progress
    before = replace(progress)
    limit = None if config.minutes is None else 60.0 * config.minutes
    batches = Prefetcher(stream, range(progress.iteration, config.iterations))
    bar = tqdm(
        total=config.iterations if limit is None else round(limit), initial=progress.iteration if limit is None else round(progress.seconds),
        unit="it" if limit is None else "s", disable=not progress_bar, desc=config.output.name, mininterval=1.0,
    )  # fmt: skip
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
            bar.set_postfix(loss=f"{loss:.3f}", it=progress.iteration, wait=f"{progress.waited / progress.seconds:.0%}", **scores)
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


def _validate(config: TrainConfig, trainer: Trainer, checks: list[Batch], log: _Log) -> dict[str, float]:
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
        free = {"resume": True, "output": config.output, "iterations": config.iterations, "minutes": config.minutes,
                "device": config.device, "threads": config.threads, "data": config.data}  # fmt: skip
        if replace(stored, **free) != config:
            raise ValueError(f"resume: the settings differ from those in {file}; give the same ones, or a new output")
        return
    if file.exists():
        raise ValueError(f"output: {config.output} already holds a run; resume it, or name another folder")
    config.output.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(to_json(config))
    os.replace(temporary, file)


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
    """The training stream, and the fixed validation batches."""
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


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" takes CUDA where there is some.

    Raises
    ------
    ValueError
        `name` is no device, or CUDA is asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be available, got {name!r}, and torch sees no CUDA; use --device cpu")
    return device


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: as told, or where the hardware multiplies it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    native: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return native is not None and native()


def available_cores() -> int:
    """Threads for torch: the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Log:
    """metrics.csv and TensorBoard; a resumed run drops the rows after its starting point."""

    FIELDS = ("iteration", "seconds", "loss", "waiting", "synthesis", "val_loss", "val_dice", "val_auc")

    def __init__(self, output: Path, iteration: int) -> None:
        self._file = output / METRICS
        kept = []
        if iteration and self._file.exists():
            with self._file.open(newline="") as old:
                kept = [row for row in csv.DictReader(old) if int(row["iteration"]) <= iteration]
        text = io.StringIO()
        writer = csv.DictWriter(text, self.FIELDS)
        writer.writeheader()
        writer.writerows(kept)
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(text.getvalue())
        os.replace(temporary, self._file)
        self._stream = self._file.open("a", newline="")
        self._rows = csv.DictWriter(self._stream, self.FIELDS)
        self._board = SummaryWriter(str(output), purge_step=iteration + 1)

    def step(self, progress: Progress, loss: float) -> None:
        """One line a training step."""
        shares = {
            "waiting": progress.waited / progress.seconds, "synthesis": progress.synthesised / progress.seconds,
        }  # fmt: skip
        self._write(progress, {"loss": loss, **shares})

    def scores(self, progress: Progress, scores: Mapping[str, float]) -> None:
        """One line a validation."""
        self._write(progress, scores)
        self._stream.flush()

    def close(self) -> None:
        """Flush and close."""
        self._stream.close()
        self._board.close()

    def _write(self, progress: Progress, values: Mapping[str, float]) -> None:
        shown = {name: f"{value:.5g}" for name, value in values.items()}
        self._rows.writerow({"iteration": progress.iteration, "seconds": f"{progress.seconds:.2f}", **shown})
        for name, value in values.items():
            self._board.add_scalar(name, value, progress.iteration)


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
    return tyro.cli(TrainConfig, args=arguments, default=PRESETS[name](), prog="normnet.train", description=description)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when done, 2 for bad input."""
    try:
        result = train(parse(sys.argv[1:] if argv is None else argv), progress_bar=True)
    except ValueError as error:
        print(f"normnet.train: {error}", file=sys.stderr)
        return 2
    shown = ", ".join(f"{k} {v:.4f}" for k, v in result.validation.items())
    print(
        f"{result.iterations} iterations in {result.seconds:.0f} s, {result.waiting_share:.1%} waiting for pairs "
        f"({result.synthesis_share:.1%} synthesising beside it); {shown}; weights in {result.output / WEIGHTS}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
