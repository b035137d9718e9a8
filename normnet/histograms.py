"""Voxels counted by healthy probability and by HU, case after case, for the report's histograms.

Counts are kept and not voxels: a test set has gigabytes of those.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from normnet.config import PAPER_THRESHOLD_HU
from normnet.metrics import bright_voxels
from normnet.report import LUNG_WINDOW, histogram

Array = npt.NDArray[Any]

BINS = 60
"""Of the probability: 0.95, the paper's threshold, is an edge."""
LOWEST, HIGHEST = -1024, 3071
"""HU counted one by one; what lies beyond counts as these."""
DRAWN = 100_000
"""Values that stand for all voxels of a class; no share is off by more than one in so many."""
TISSUE = ("healthy", "lesion")
OUTCOMES = ("found", "missed", "wrongly marked")


class VoxelCounts:
    """Histograms over cases.

    Attributes
    ----------
    probability : dict of str to (60,) int64 array
        Lung voxels that the method judges by healthy probability, for `TISSUE`.
    hu : dict of str to (4096,) int64 array
        Voxels by HU, from -1024 up, for `OUTCOMES`.
    judged : set of float or None
        Every T that `probability` was counted with.
    """

    def __init__(self) -> None:
        self.probability = {name: np.zeros(BINS, np.int64) for name in TISSUE}
        self.hu = {name: np.zeros(HIGHEST - LOWEST + 1, np.int64) for name in OUTCOMES}
        self.judged: set[float | None] = set()

    def add(
        self,
        hu: Array,
        prediction: Array,
        truth: Array,
        lung_mask: Array,
        probability: Array | None,
        *,
        threshold_hu: float | None = PAPER_THRESHOLD_HU,
    ) -> None:
        """Count a case.

        Parameters
        ----------
        hu : (Z, Y, X) array
            Hounsfield units.
        prediction, truth, lung_mask : (Z, Y, X) bool arrays
            Lesions and lungs.
        probability : (Z, Y, X) float array, optional
            Healthy probability, in [0, 1].
        threshold_hu : float or None
            The method judges lung voxels at or above this; None for all of them.
        """
        regions = (prediction & truth, ~prediction & truth, prediction & ~truth)
        for name, region in zip(OUTCOMES, regions, strict=True):
            steps = np.clip(np.rint(hu[region]), LOWEST, HIGHEST).astype(np.int64) - LOWEST
            self.hu[name] += np.bincount(steps, minlength=HIGHEST - LOWEST + 1)
        if probability is None:
            return
        self.judged.add(threshold_hu)
        judged = bright_voxels(hu, lung_mask, threshold_hu)
        for name, region in zip(TISSUE, (judged & ~truth, judged & truth), strict=True):
            self.probability[name] += np.histogram(probability[region], BINS, (0.0, 1.0))[0]

    def pictures(self) -> dict[str, bytes]:
        """Draw what was counted as PNG, by caption; a histogram without a voxel is left out."""
        drawn = {}
        if any(counts.any() for counts in self.probability.values()):
            centres = (np.arange(BINS) + 0.5) / BINS
            series = {name: values_of(c, centres) for name, c in self.probability.items()}
            caption = f"{self._judged()} by healthy probability"
            drawn[caption] = histogram(series, xlabel="healthy probability", bins=BINS, range=(0.0, 1.0))
        if any(counts.any() for counts in self.hu.values()):
            values = np.arange(LOWEST, HIGHEST + 1)
            series = {name: values_of(counts, values) for name, counts in self.hu.items()}
            caption = "lesion voxels that were found or missed, and voxels that were wrongly marked, by HU"
            drawn[caption] = histogram(series, xlabel="HU", bins=65, range=LUNG_WINDOW)
        return drawn

    def _judged(self) -> str:
        """Say what was counted by probability."""
        levels = sorted({round(level) for level in self.judged if level is not None})
        parts = [f"lung voxels of at least {level} HU" for level in levels]
        if len(levels) > 2:
            parts = [f"lung voxels of at least {levels[0]} to {levels[-1]} HU, by case,"]
        return " or ".join([*parts, *(["all lung voxels"] if None in self.judged else [])])


def values_of(counts: Array, values: Array) -> Array:
    """Stand-ins for counted voxels: each value so often as its share of `DRAWN`, or of all where fewer.

    Parameters
    ----------
    counts : (n,) integer array
        How often each value occurs.
    values : (n,) array
        Increasing.

    Returns
    -------
    (m,) array
    """
    total = int(counts.sum())
    scale = min(1.0, DRAWN / total) if total else 0.0
    # rounding the running sum keeps the total, however many values are rare
    ends = np.rint(np.cumsum(counts) * scale).astype(np.int64)
    return np.repeat(values, ends - np.concatenate([[0], ends[:-1]]))
