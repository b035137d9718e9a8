"""Dice of phantom pneumonia against the healthy threshold: ``python docs/threshold_sweep.py [MODELS...]``.

MODELS are run folders or weights; those that ship with the package where omitted. No patient has a part in
it. It bounds the threshold from one side alone: a healthy phantom has no dependent density, and no hilum or
diaphragm at thick slices, that could be marked wrongly.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import lesionsynth as ls
from normnet.config import PostprocessConfig, PredictConfig
from normnet.demo import DemoConfig, patients
from normnet.device import choose_device
from normnet.model import bundled_models, find_models, load_model
from normnet.postprocess import postprocess
from normnet.predict import bright_threshold, slab_probabilities

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


def main(paths: list[Path]) -> None:
    """Print a row per threshold: DSC of each patient, false positives (ml) of the healthy phantom."""
    models = [load_model(file) for file in (find_models(paths) if paths else bundled_models())]
    level = bright_threshold(models, PredictConfig())
    device, settings = choose_device("auto"), PredictConfig()
    cases = []
    for name, chest, truth in patients(DemoConfig()):
        image = ls.window_hu(chest.hu) * chest.lung_mask
        maps = [slab_probabilities(image, model, settings, device) for model in models]
        cases.append((name, image, chest.lung_mask, maps, truth, float(np.prod(chest.spacing)) / 1000))
    print("threshold", *(name for name, *_ in cases), sep="  ")
    for threshold in THRESHOLDS:
        shown = []
        for _, image, lung, maps, truth, ml in cases:
            votes = sum((chances > np.float32(threshold)).astype(int) for chances in maps)
            healthy = (2 * votes > len(maps)) & lung & (image >= np.float32(ls.threshold(level)))
            lesions = postprocess(image, lung, healthy, PostprocessConfig(threshold_hu=level)).final
            both = 2 * int((lesions & truth).sum()) / max(int(lesions.sum() + truth.sum()), 1)
            shown.append(f"{both:.3f}" if truth.any() else f"{lesions.sum() * ml:.2f} ml")
        print(threshold, *shown, sep="  ", flush=True)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
