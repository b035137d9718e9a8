"""Train one method on healthy slices, calibrate it, write and load it, and map anomalies of a volume with it.

The paper searches each baseline's threshold on the test set (IV-C). Here the default is one that is set on
healthy volumes alone; ``normnet.evaluate --oracle`` does the paper's search, under that name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch.nn.functional import interpolate, pad
from torch.utils.data import BatchSampler, RandomSampler
from tqdm import tqdm

import lesionsynth as ls
from lesionsynth.files import claimed, refuse_foreign, sweep, write_atomically
from lesionsynth.strict import shown
from normnet.baselines.methods import Baseline, BaselineConfig, build_baseline
from normnet.config import read_config, to_json
from normnet.data import Volume, phantom_volumes, split, store_volumes
from normnet.device import choose_device, cpu_settings
from normnet.model import fitted, read_header, read_tensors, write_tensors
from normnet.predict import checked_volume
from normnet.prepare.case import ISO_SPACING
from normnet.settings import naming
from normnet.sheets import Sheet, sheet

WEIGHTS, CONFIG, METRICS = "baseline.safetensors", "config.json", "metrics.csv"
"""Names in a run folder."""
COLUMNS = ("phase", "iteration", "seconds", "loss")
"""Of the table of losses."""
HEADER = "normnet_baseline"
"""Key of the safetensors header that holds settings and calibration, as JSON."""
FORMAT = 2
"""Of weights files; 1 had networks with other names of layers, and did not say its number."""
CHUNK = 32
"""Slices that a network sees at once."""
MIDDLE = 0.95
"""Share of healthy voxels below the anomaly that becomes 1/2, for methods without a bound."""

Mask = npt.NDArray[np.bool_]
FloatMap = npt.NDArray[np.float32]


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
    if config.data is not None:
        volumes = store_volumes(config.data)
    else:
        volumes = phantom_volumes(config.phantoms, config.seed, config.phantom_shape, config.phantom_spacing)
    train_volumes, held_out = split(volumes, config.held_out, slab=1)
    with (
        cpu_settings(config.threads),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        slices = training_slices(train_volumes, config)
        config.output.mkdir(parents=True, exist_ok=True)
        with claimed(config.output):
            _check_output(config.output)
            sweep(config.output)
            write_atomically(config.output / CONFIG, to_json(config))
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


def _descend(
    baseline: Baseline, slices: torch.Tensor, device: torch.device, *, progress_bar: bool
) -> tuple[dict[str, list[float]], float]:
    """Go through the phases; losses go to metrics.csv as they come."""
    config, phases = baseline.config, baseline.phases()
    most = math.inf if config.minutes is None else 60 * config.minutes / len(phases)
    losses: dict[str, list[float]] = {name: [] for name in phases}
    start = time.perf_counter()
    # a new file: an earlier one may have other names, as in a backup of links
    metrics = write_atomically(config.output / METRICS, sheet([COLUMNS]))
    with metrics.open("a", newline="", encoding="utf-8") as stream:
        table = Sheet(stream)
        for name, step in phases.items():
            baseline.train()
            begun = time.perf_counter()
            bar = tqdm(
                batches(slices, config, device),
                total=config.iterations,
                disable=not progress_bar,
                desc=f"{config.method} {name}",
            )
            for iteration, batch in enumerate(bar, start=1):
                loss, now = step(batch), time.perf_counter()
                table.row([name, iteration, f"{now - start:.2f}", f"{loss:.6g}"])
                if not math.isfinite(loss):
                    raise FloatingPointError(f"loss must be finite, got {loss} in step {iteration} of {name}")
                losses[name].append(loss)
                if now - begun >= most:
                    break
    return losses, time.perf_counter() - start


def batches(slices: torch.Tensor, config: BaselineConfig, device: torch.device) -> Iterator[torch.Tensor]:
    """Draw batches: all slices in a new order, again and again."""
    count = config.iterations * config.batch_size
    generator = torch.Generator().manual_seed(config.seed)
    order = RandomSampler(range(len(slices)), num_samples=count, generator=generator)
    for chosen in BatchSampler(order, config.batch_size, drop_last=True):
        yield slices[chosen].to(device).float()


# ---- the file


def save_baseline(path: Path, baseline: Baseline) -> None:
    """Write weights, settings and calibration into one file, atomically."""
    config = json.loads(to_json(baseline.config))
    header = {"config": config, "calibration": baseline.calibration, "format": FORMAT}
    write_tensors(path, baseline.state_dict(), {HEADER: json.dumps(header)})


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What the header of a weights file says."""

    config: BaselineConfig
    calibration: dict[str, float]
    format: int = 1

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            command = f"python -m normnet.baselines {self.config.method} --output RUN --overwrite"
            raise ValueError(
                f"format must be {FORMAT}, got {self.format}, which another version wrote: train it anew, "
                f"`{command}` with the settings in RUN/{CONFIG}"
            )
        domains = {"scale": (1e-30, 1e9), "threshold": (0.0, 1.0), "slices": (0.0, 1e9)}
        found = self.calibration  # nothing before training
        known = not found or {"scale", "threshold"} <= found.keys() <= domains.keys()
        if not known or not all(domains[k][0] <= value <= domains[k][1] for k, value in found.items()):
            rule = "have a scale in [1e-30, 1e9] and a threshold in [0, 1]"
            raise ValueError(f"calibration must {rule}, got {shown(found)}")


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
        There is none at `run`, it is not ours or of another version, or `device` is not there.
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


# ---- from a volume to an anomaly map and lesions, and the threshold between them


def score_volume(
    baseline: Baseline, hu: Any, lung_mask: Any, *, spacing: Sequence[float] = ISO_SPACING
) -> FloatMap:
    """Compute the anomaly map of a volume.

    Parameters
    ----------
    baseline : Baseline
        From `load_baseline` or `train_baseline`.
    hu : (z, y, x) array
        Hounsfield units.
    lung_mask : (z, y, x) bool array
        Lungs, lesions included.
    spacing : (3,) floats
        Voxel size (z, y, x) in mm.

    Returns
    -------
    (z, y, x) float32 array
        In [0, 1], 0 outside the lung; 1 minus it stands for the healthy probability of `normnet.predict`.
        The same for the same input: noise is seeded.

    Raises
    ------
    ValueError
        Shapes differ, the mask is empty, `spacing` is not three lengths > 0, or the baseline is not trained.
    """
    volume, mask = checked_volume(hu, lung_mask)
    if len(spacing) != 3 or not min(spacing) > 0:
        raise ValueError(f"spacing must be three lengths > 0 in mm (z, y, x), got {tuple(spacing)}")
    if "scale" not in baseline.calibration:
        raise ValueError("baseline must be trained and calibrated, got one that is not")
    frame = Frame.around(mask, spacing, baseline.config.field_mm)
    result = np.zeros(mask.shape, np.float32)
    chosen = np.flatnonzero(mask.any(axis=(1, 2)))
    anomalies = raw_anomaly(baseline, volume[chosen], mask[chosen], frame)
    result[chosen] = squash(baseline, anomalies, baseline.calibration["scale"])
    result[~mask] = 0
    return result


def find_lesions(baseline: Baseline, anomaly: FloatMap, threshold: float | None = None) -> Mask:
    """Call lesions where an anomaly map exceeds a threshold; the calibrated one where it is omitted.

    `ValueError` where it is not in [0, 1], or omitted for a baseline that is not trained.
    """
    if threshold is None:
        if "threshold" not in baseline.calibration:
            raise ValueError("threshold must be given for a baseline that is not calibrated, got None")
        threshold = baseline.calibration["threshold"]
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    return np.asarray(anomaly > np.float32(threshold))


def calibrate(baseline: Baseline, volumes: Sequence[Volume]) -> dict[str, float]:
    """Find the threshold that calls the configured share of lung voxels of healthy volumes lesions.

    Parameters
    ----------
    baseline : Baseline
        Trained.
    volumes : sequence of Volume
        Not trained on; `ValueError` where no slice of theirs has enough lung.

    Returns
    -------
    dict
        ``threshold`` of the map in [0, 1]; ``scale``, the anomaly that becomes 1/2 for a method without a
        bound (`MIDDLE`), 1 for others; ``slices`` used.
    """
    config = baseline.config
    places = [(n, z) for n, v in enumerate(volumes) for z in usable_slices(v, config.min_lung_cm2)]
    if not places:
        raise ValueError(
            f"held_out volumes must show at least min_lung_cm2={config.min_lung_cm2:g} of lung, got none"
        )
    count = min(config.calibration_slices, len(places))
    picked = [places[k] for k in np.linspace(0, len(places) - 1, count).round().astype(int)]
    values = []
    for number, volume in enumerate(volumes):
        if chosen := [z for n, z in picked if n == number]:
            hu, mask, frame = _framed(volume, config)
            values.append(raw_anomaly(baseline, hu[chosen], mask[chosen], frame)[mask[chosen]])
    anomalies = np.concatenate(values)
    scale = 1.0 if baseline.bounded else max(float(np.quantile(anomalies, MIDDLE)), 1e-30)
    level = np.quantile(squash(baseline, anomalies, scale), 1 - config.false_positives)
    return {"threshold": float(level), "scale": scale, "slices": float(count)}


def raw_anomaly(baseline: Baseline, hu: Any, mask: Mask, frame: Frame) -> FloatMap:
    """Return the method's own map of (n, Y, X) slices, on their grid; noise is drawn from its seed."""
    config = baseline.config
    device = choose_device(config.device)
    baseline.to(device).eval()
    maps = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        for first in range(0, len(hu), CHUNK):
            part = slice(first, first + CHUNK)
            images = _images(hu[part], mask[part], frame, config).to(device)
            maps.append(frame.enlarge(baseline.anomaly(images).detach()))
    return np.concatenate(maps)


def squash(baseline: Baseline, anomaly: FloatMap, scale: float) -> FloatMap:
    """Bring anomalies into [0, 1] without changing their order: a / (a + scale) where they have no bound."""
    if baseline.bounded:
        return np.clip(anomaly, 0, 1)
    anomaly = np.maximum(anomaly, 0).astype(np.float64)
    return np.asarray(anomaly / (anomaly + scale), np.float32)


# ---- slices as the methods see them: windowed, the lungs alone, a square around them, shrunk (IV-C)


def training_slices(volumes: Sequence[Volume], config: BaselineConfig) -> torch.Tensor:
    """Return all usable slices, (n, 1, size, size) in half precision: half a HU, and half the memory.

    `ValueError` where there is none.
    """
    parts = []
    for volume in volumes:
        if chosen := usable_slices(volume, config.min_lung_cm2):
            hu, mask, frame = _framed(volume, config)
            parts.append(_images(hu[chosen], mask[chosen], frame, config).half())
    if not parts:
        raise ValueError(
            f"data must hold slices with at least min_lung_cm2={config.min_lung_cm2:g} of lung, got none"
        )
    return torch.cat(parts)


def usable_slices(volume: Volume, min_lung_cm2: float) -> list[int]:
    """Return the slices within a volume's segments that show enough lung, at least one voxel."""
    _, height, width = volume.spacing
    area = volume.mask_counts * (height * width / 100)  # cm²
    inside = [z for first, last in volume.segments for z in range(first, last)]
    return [z for z in inside if area[z] >= min_lung_cm2 and area[z] > 0]


def _framed(volume: Volume, config: BaselineConfig) -> tuple[npt.NDArray[Any], Mask, Frame]:
    hu, mask = (np.asarray(array) for array in volume.slab(0, volume.shape[0]))
    return hu, mask, Frame.around(mask, volume.spacing, config.field_mm)


def _images(hu: Any, mask: Mask, frame: Frame, config: BaselineConfig) -> torch.Tensor:
    """Window slices (IV-B.2), keep the lungs or everything, and cut and shrink them to the frame."""
    image = ls.window_hu(hu)
    return frame.reduce(image * mask if config.lungs_only else image, config.size)


@dataclass(frozen=True)
class Frame:
    """The square of a volume's slices that a method sees; the same in all of them."""

    rows: tuple[int, int]
    """First and after last; may reach beyond the slice, where it is 0."""
    columns: tuple[int, int]
    """As `rows`."""
    shape: tuple[int, int]
    """Of a slice (Y, X)."""

    @classmethod
    def around(cls, mask: Mask, spacing: Sequence[float], field_mm: float) -> Frame:
        """Centre a square of side `field_mm` on the box of the lungs; the box's side where that is longer."""
        _, *box = ndimage.find_objects(mask.view(np.uint8))[0]
        pixels = [float(spacing[1]), float(spacing[2])]
        side = max(field_mm, *((b.stop - b.start) * p for b, p in zip(box, pixels, strict=True)))
        rows, columns = (_centred(b, round(side / p)) for b, p in zip(box, pixels, strict=True))
        return cls(rows, columns, (mask.shape[1], mask.shape[2]))

    def reduce(self, slices: FloatMap, size: int) -> torch.Tensor:
        """Cut (n, Y, X) slices to the square and shrink them to (n, 1, size, size), smoothing as needed."""
        square = pad(torch.from_numpy(slices)[:, None], self._margins())
        return interpolate(square, (size, size), mode="bilinear", antialias=True, align_corners=False)

    def enlarge(self, maps: torch.Tensor) -> FloatMap:
        """Bring (n, 1, size, size) maps back to (n, Y, X), linearly; 0 outside the square."""
        shape = (self.rows[1] - self.rows[0], self.columns[1] - self.columns[0])
        square = interpolate(maps.cpu().float(), shape, mode="bilinear", align_corners=False)
        whole: FloatMap = pad(square, [-margin for margin in self._margins()])[:, 0].numpy()
        return whole

    def _margins(self) -> list[int]:
        """Return what the square adds to a slice left, right, above, below; negative where it cuts."""
        (top, bottom), (left, right), (height, width) = self.rows, self.columns, self.shape
        return [-left, right - width, -top, bottom - height]


def _centred(extent: slice, length: int) -> tuple[int, int]:
    side = max(1, length, extent.stop - extent.start)
    first = (extent.start + extent.stop - side) // 2
    return first, first + side
