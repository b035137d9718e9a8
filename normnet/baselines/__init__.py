"""Unsupervised detectors that PAPER.md IV-C compares with (Table III): one interface, same data and metrics.

``train_baseline(config)``, ``load_baseline(run)`` and ``score_volume(baseline, hu, lung_mask)``;
``python -m normnet.baselines`` on the command line.
"""

from normnet.baselines.methods import METHODS, PRESETS, Baseline, BaselineConfig, Method
from normnet.baselines.train import (
    BaselineResult,
    find_lesions,
    load_baseline,
    save_baseline,
    score_volume,
    train_baseline,
)

__all__ = [
    "METHODS",
    "PRESETS",
    "Baseline",
    "BaselineConfig",
    "BaselineResult",
    "Method",
    "find_lesions",
    "load_baseline",
    "save_baseline",
    "score_volume",
    "train_baseline",
]
