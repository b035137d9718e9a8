"""Scores on synthetic pairs of held-out volumes, and the threshold that suits them best: no annotation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from normnet.data import Batch
from normnet.metrics import roc_auc
from normnet.model import Calibration
from normnet.trainer import Trainer

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
