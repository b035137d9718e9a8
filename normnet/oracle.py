"""The threshold that would have been best on the very set it is scored on: an upper bound, never a result.

The paper grants its baselines such a search (PAPER.md IV-C). Here it is made for every method alike, on the
network's map alone, and reported apart from what was scored at thresholds that were set beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from normnet.config import PAPER_THRESHOLD_HU
from normnet.metrics import SCORES, bright_voxels, mean_and_sd

Array = npt.NDArray[Any]


def threshold_counts(
    lesion_truth: Array,
    lung_mask: Array,
    hu: Array,
    healthy_probability: Array,
    *,
    threshold_hu: float | None = PAPER_THRESHOLD_HU,
) -> Array:
    """Tell what each threshold of the healthy probability would give.

    Parameters
    ----------
    lesion_truth, lung_mask, hu, healthy_probability
        See `evaluate_case`.
    threshold_hu : float or None
        Lesions among lung voxels at or above this T alone, which are what a NormNet of that T judges; None
        for anywhere in the lungs, as the methods it is compared with find them.

    Returns
    -------
    (101, 3) int64 array
        tp, fp and fn of "lesion where the probability is at most t", for t = 0, 0.01, ... 1.
    """
    judged = bright_voxels(hu, lung_mask, threshold_hu)
    thresholds = (np.arange(101) / 100).astype(healthy_probability.dtype)
    # a voxel is a lesion from the first t that reaches its probability
    first = np.searchsorted(thresholds, healthy_probability[judged], "left")
    truth = lesion_truth[judged]
    tp = np.cumsum(np.bincount(first[truth], minlength=101))
    fp = np.cumsum(np.bincount(first[~truth], minlength=101))
    return np.stack([tp, fp, np.count_nonzero(lesion_truth) - tp], axis=1)


def oracle_threshold(counts: Sequence[Array]) -> dict[str, float]:
    """Find the threshold with the best mean DSC over volumes: a search on the test set.

    Parameters
    ----------
    counts : sequence of (101, 3) arrays
        From `threshold_counts`, one per volume that is no control.

    Returns
    -------
    dict
        ``threshold`` of the healthy probability and ``mean_dsc``, without post-processing (PAPER.md IV-C
        grants the baselines such a search). Never to be mixed with scores at a fixed threshold.
    """
    if not counts:
        return {"threshold": float("nan"), "mean_dsc": float("nan")}
    dsc = np.mean([2 * c[:, 0] / np.maximum(2 * c[:, 0] + c[:, 1] + c[:, 2], 1) for c in counts], axis=0)
    best = int(dsc.argmax())
    return {"threshold": best / 100, "mean_dsc": float(dsc[best])}


def summary_at(counts: Sequence[Array], threshold: float) -> dict[str, dict[str, float]]:
    """Table III's scores at one of the thresholds of `threshold_counts`.

    Parameters
    ----------
    counts : sequence of (101, 3) arrays
        From `threshold_counts`, one per volume that is no control.
    threshold : float
        A multiple of 0.01 in [0, 1], such as that of `oracle_threshold`.

    Returns
    -------
    dict
        `SCORES`, each as in `summarise`.
    """
    rows = np.array([c[round(100 * threshold)] for c in counts], np.float64).reshape(-1, 3)
    tp, fp, fn = rows.T
    with np.errstate(invalid="ignore"):  # 0 / 0: undefined in this volume
        values = {"dsc": 2 * tp / (2 * tp + fp + fn), "psc": tp / (tp + fp), "sen": tp / (tp + fn)}
    return {name: mean_and_sd(values[name]) for name in SCORES}
