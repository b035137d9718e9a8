"""From a volume to an anomaly map and lesions, and the threshold between them.

The paper searches each baseline's threshold on the test set (IV-C). Here the default is one that is set on
healthy volumes alone; ``normnet.evaluate --oracle`` does the paper's search, under that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from normnet.baselines.base import Baseline
from normnet.baselines.slices import Frame, Mask, usable_slices, windowed
from normnet.data import Volume
from normnet.device import choose_device
from normnet.predict import checked_volume
from normnet.prepare.case import ISO_SPACING

CHUNK = 32
"""Slices that a network sees at once."""
MIDDLE = 0.95
"""Share of healthy voxels below the anomaly that becomes 1/2, for methods without a bound."""

FloatMap = npt.NDArray[np.float32]


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

    Raises
    ------
    ValueError
        `threshold` is not in [0, 1], or omitted for a baseline that is not trained.
    """
    if threshold is None:
        if "threshold" not in baseline.calibration:
            raise ValueError("threshold must be given for a baseline that is not calibrated, got None")
        threshold = baseline.calibration["threshold"]
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    return np.asarray(anomaly > np.float32(threshold))


def calibrate(baseline: Baseline, volumes: Sequence[Volume]) -> dict[str, float]:
    """Find the threshold that calls the configured share of healthy lung voxels lesions.

    Parameters
    ----------
    baseline : Baseline
        Trained.
    volumes : sequence of Volume
        Healthy, and not trained on.

    Returns
    -------
    dict
        ``threshold`` of the map in [0, 1]; ``scale``, the anomaly that becomes 1/2 for a method without a
        bound (`MIDDLE`), 1 for others; ``slices`` used.

    Raises
    ------
    ValueError
        No slice has enough lung.
    """
    config = baseline.config
    places = [(v, z) for v in volumes for z in usable_slices(v, config.min_lung_cm2)]
    if not places:
        raise ValueError(
            f"held_out volumes must show at least min_lung_cm2={config.min_lung_cm2:g} of lung, got none"
        )
    count = min(config.calibration_slices, len(places))
    picked = [places[k] for k in np.linspace(0, len(places) - 1, count).round().astype(int)]
    values = []
    for volume in volumes:
        chosen = [z for v, z in picked if v is volume]
        if chosen:
            hu, mask = (np.asarray(array) for array in volume.slab(0, volume.shape[0]))
            frame = Frame.around(mask, volume.spacing, config.field_mm)
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
            images = windowed(hu[part], mask[part], lungs_only=config.lungs_only)
            reduced = frame.reduce(images, config.size).to(device)
            maps.append(frame.enlarge(baseline.anomaly(reduced).detach()))
    return np.concatenate(maps)


def squash(baseline: Baseline, anomaly: FloatMap, scale: float) -> FloatMap:
    """Bring anomalies into [0, 1] without changing their order: a / (a + scale) where they have no bound."""
    if baseline.bounded:
        return np.clip(anomaly, 0, 1)
    anomaly = np.maximum(anomaly, 0).astype(np.float64)
    return np.asarray(anomaly / (anomaly + scale), np.float32)
