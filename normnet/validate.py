"""Scores on samples of held-out volumes, and the threshold that suits lesions best there: no annotation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from normnet.data import Batch
from normnet.metrics import roc_auc
from normnet.model import Calibration
from normnet.trainer import Trainer

BEST = {"lesions": "val_auc", "lungs": "val_dice"}
"""The score that the best network of a run has most of, by task."""
THRESHOLDS = np.arange(1, 100) / 100
"""Those tried."""


def validate(
    trainer: Trainer, batches: Sequence[Batch], tau: float
) -> tuple[dict[str, float], Calibration | None]:
    """Score the averaged network over bright voxels (A >= τ) of fixed pairs.

    Parameters
    ----------
    trainer : Trainer
        Has the network.
    batches : sequence of Batch
        Pairs of held-out volumes.
    tau : float
        Bright voxels are at or above it.

    Returns
    -------
    scores : dict
        ``val_loss``; ``val_dice`` of the healthy voxels at a probability of 0.5; ``val_auc`` of healthy
        against lesion voxels. Empty without pairs.
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
    if not losses:
        return {}, None
    well, ill = np.concatenate(healthy), np.concatenate(diseased)
    hit = float((well > 0.5).sum())
    dice = 2 * hit / max(hit + float((ill > 0.5).sum()) + len(well), 1.0)
    scores = {"val_loss": float(np.mean(losses)), "val_dice": dice, "val_auc": roc_auc(well, ill)}
    return scores, calibrate(well, ill)


def validate_lungs(trainer: Trainer, batches: Sequence[Batch]) -> dict[str, float]:
    """Score the averaged lung network on fixed samples.

    Parameters
    ----------
    trainer : Trainer
        Has the network.
    batches : sequence of Batch
        Samples of held-out chests.

    Returns
    -------
    dict
        ``val_loss``; ``val_dice``, the mean of right and left lung over all samples; ``val_recall``, the
        share of painted disease that is found to be lung of its side, NaN where none is painted. Empty
        without samples.
    """
    losses, sums, ill = [], np.zeros((2, 2)), np.zeros(2)
    for batch in batches:
        probability, loss = trainer.probability(batch)
        found, lungs, disease = (probability > 0.5).numpy(), batch.target.numpy(), batch.lesions.numpy()
        losses.append(loss)
        hit = found & lungs
        axes = (0, 2, 3, 4)
        sums += np.stack([2 * hit.sum(axes), found.sum(axes) + lungs.sum(axes)])
        ill += ((hit.any(1, keepdims=True) & disease).sum(), disease.sum())
    if not losses:
        return {}
    dice = float((sums[0] / np.maximum(sums[1], 1)).mean())
    recall = float(ill[0] / ill[1]) if ill[1] else float("nan")
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
