"""Dice of phantom pneumonia against the steps of region growing: ``python docs/growth_sweep.py RUN``.

RUN is a trained run folder, such as the one of ``make demo`` (demo-output/run). The paper prints no number of
steps; this sweep chose the default of `normnet.config.PostprocessConfig.growth_iterations`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import lesionsynth as ls
from normnet.config import PostprocessConfig, PredictConfig
from normnet.demo import DemoConfig, patients
from normnet.model import load_model
from normnet.postprocess import postprocess
from normnet.predict import predict_volume

STEPS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, -1)


def main(run: Path) -> None:
    """Print a row per number of steps: DSC of each patient, false positives (ml) of the healthy phantom."""
    model = load_model(run)
    cases = []
    for name, chest, truth in patients(DemoConfig()):
        found = predict_volume(chest.hu, chest.lung_mask, [model], PredictConfig())
        image = ls.window_hu(chest.hu) * chest.lung_mask
        ml = float(np.prod(chest.spacing)) / 1000
        cases.append((name, image, chest.lung_mask, found.healthy, truth, ml))
    print("steps", *(name for name, *_ in cases), sep="  ")
    for steps in STEPS:
        shown = []
        for _, image, lung, healthy, truth, ml in cases:
            lesions = postprocess(image, lung, healthy, PostprocessConfig(growth_iterations=steps)).final
            both = 2 * int((lesions & truth).sum()) / max(int(lesions.sum() + truth.sum()), 1)
            shown.append(f"{both:.3f}" if truth.any() else f"{lesions.sum() * ml:.2f} ml")
        print(steps, *shown, sep="  ")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
