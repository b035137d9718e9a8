"""What training changes: network, optimiser, average of weights, counters; stepped, saved and restored."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from normnet.config import TrainConfig
from normnet.data import Batch
from normnet.device import use_bf16
from normnet.distributed import ALONE, World, global_norms
from normnet.model import (
    MOST_FILE,
    Calibration,
    build_unet,
    check_calibration,
    fitted,
    read_header,
    read_tensors,
    write_tensors,
)
from normnet.settings import naming

PROGRESS = "progress"
"""Key of the safetensors metadata that holds the counters, as JSON."""
WARM_UP = 20
"""The average follows the weights closely at first: its decay is min(average, (1 + n) / (WARM_UP + n))."""


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
        for name, (least, most) in _DOMAINS.items():
            value = getattr(self, name)
            if not (least <= value <= most or (name == "best_auc" and math.isnan(value))):
                raise ValueError(f"progress.{name} must be in [{least:g}, {most:g}], got {value}")
        if self.validated > self.iteration:
            raise ValueError(
                f"progress.validated must be at most iteration={self.iteration}, got {self.validated}"
            )
        check_calibration(self.calibration, "progress.calibration")


_DOMAINS = {
    "iteration": (0, 10**9),
    "seconds": (0.0, 1e10),
    "waited": (0.0, 1e10),
    "synthesised": (0.0, 1e10),
    "best_auc": (-1.0, 1.0),
    "validated": (-1, 10**9),
}


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """Learning rate of a step, counted from 0."""
    if config.schedule == "constant":
        return config.learning_rate
    return 0.5 * config.learning_rate * (1 + math.cos(math.pi * min(iteration / config.iterations, 1.0)))


def dice_ce(
    logits: torch.Tensor, target: torch.Tensor, world: World = ALONE, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Dice plus cross-entropy of the global batch (PAPER.md III-A).

    Parameters
    ----------
    logits : (b, c, z, y, x) float tensor
        Of this process's part.
    target : (b, c, z, y, x) bool tensor
        Healthy bright tissue, or right and left lung.
    world : World
        The processes that share the batch in equal parts.
    weight : (b, 1, z, y, x) float tensor, optional
        Of the voxels in the cross-entropy, which stays a mean over voxels; 1 where omitted.

    Returns
    -------
    scalar float32 tensor
        The same on every process: 1 - Dice over the whole batch, plus the mean binary cross-entropy, as
        MONAI's ``DiceCELoss(sigmoid=True, batch=True)``. One Dice over the batch: a crop may hold next to no
        healthy bright tissue, where Dice is noise.
    """
    wanted = target.float()
    logits = logits.float()
    chance = torch.sigmoid(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, weight)
    sums = torch.stack([(chance * wanted).sum(), chance.sum(), wanted.sum(), entropy])
    both, found, there, entropies = world.sum(sums)
    smooth = 1e-5  # MONAI's: an empty batch has Dice 1
    loss: torch.Tensor = 1 - (2 * both + smooth) / (found + there + smooth) + entropies / world.size
    return loss


class Trainer:
    """Network, optimiser, running average and counters; saved and restored as one file.

    Parameters
    ----------
    config : TrainConfig
        Settings.
    device : torch.device
        Where to train.
    world : World
        The processes that train together.
    """

    def __init__(self, config: TrainConfig, device: torch.device, world: World = ALONE) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device, self.world = config, device, world
        self.bf16 = use_bf16(config.precision, device)
        self.model = global_norms(build_unet(config.model).to(device), world)
        if self.bf16:  # the layout bf16 convolutions are fastest in
            self.model = self.model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.average = build_unet(config.model).to(device).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)
        self._shared: torch.nn.Module = self.model
        if world.size > 1:  # its statistics are global already: nothing to broadcast
            self._shared = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.progress = Progress()

    def step(self, batch: Batch) -> float:
        """Train on one batch, in parts where so configured; return the loss.

        Raises
        ------
        FloatingPointError
            The loss is not finite; the weights are those of the step before.
        """
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.progress.iteration)
        self.optimizer.zero_grad(set_to_none=True)
        parts, total = self.config.accumulate, 0.0
        for number in range(parts):
            loss = self._backward(batch, batch.part(number, parts), last=number == parts - 1)
            total += loss / parts
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the loss became {total} at iteration {self.progress.iteration + 1}: lower learning_rate "
                f"({self.config.learning_rate}), or compute in fp32 (precision {self.config.precision!r})"
            )
        self.optimizer.step()
        self._follow()
        self.progress.iteration += 1
        return total

    @torch.inference_mode()
    def probability(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """Healthy probability of a batch by the averaged network, and its loss."""
        self.average.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.average(batch.image.to(self.device)).float()
        loss = dice_ce(logits, batch.target.to(self.device))
        return torch.sigmoid(logits).cpu(), loss.item()

    def save(self, path: Path) -> None:
        """Write everything a resumed run needs."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
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
        wanted = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        wanted |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        with naming(path):
            progress = read_header(metadata, PROGRESS, Progress)
            if progress.iteration:
                for number, weight in enumerate(self.model.parameters()):
                    wanted[f"adam.{number}.step"] = torch.empty((), dtype=torch.float32, device="meta")
                    wanted |= {f"adam.{number}.{k}": weight for k in ("exp_avg", "exp_avg_sq")}
            tensors = fitted(tensors, wanted)
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "average": {}, "adam": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.average.load_state_dict(parts["average"])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in parts["adam"].items():
            number_of, _, moment = name.partition(".")
            state.setdefault(int(number_of), {})[moment] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.progress = progress

    def _backward(self, batch: Batch, part: slice, *, last: bool) -> float:
        """Add a part's gradients; processes exchange them with the last part alone."""
        image, target, weight = batch.image[part], batch.target[part], None
        if self.config.task == "lungs":
            weight = 1 + (self.config.chest.emphasis - 1) * batch.lesions[part].to(self.device).float()
        alone = contextlib.nullcontext()
        shared = self._shared
        with shared.no_sync() if isinstance(shared, DistributedDataParallel) and not last else alone:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                logits = shared(image.to(self.device, non_blocking=True))
            loss = dice_ce(logits, target.to(self.device, non_blocking=True), self.world, weight)
            (loss / self.config.accumulate).backward()  # type: ignore[no-untyped-call]
        return loss.item()

    @torch.no_grad()
    def _follow(self) -> None:
        n = self.progress.iteration
        decay = min(self.config.average, (1 + n) / (WARM_UP + n)) if self.config.average else 0.0
        for mean, now in zip(
            self.average.state_dict().values(), self.model.state_dict().values(), strict=True
        ):
            if mean.is_floating_point():
                mean.lerp_(now, 1.0 - decay)
            else:
                mean.copy_(now)
