"""Unsupervised detectors that PAPER.md IV-C compares with (Table III): one interface, same data and metrics.

``train_baseline(config)``, ``load_baseline(run)`` and ``score_volume(baseline, hu, lung_mask)``;
``python -m normnet.baselines`` on the command line.
"""

from normnet.baselines.base import Baseline
from normnet.baselines.config import METHODS, PRESETS, BaselineConfig, Method
from normnet.baselines.score import find_lesions, score_volume
from normnet.baselines.train import BaselineResult, load_baseline, save_baseline, train_baseline

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
