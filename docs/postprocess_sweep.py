"""Choose threshold and post-processing without a patient: ``python docs/postprocess_sweep.py [MODELS]``.

One setting at a time moves away from the defaults, and the Dice of final lesion maps is printed for

- phantom pneumonia (`normnet.demo.patients`), beside what is marked in a healthy phantom;
- with ``--data``, synthetic lesions in the held-out volume of a store: whole slabs, half of them at thick
  slices, varied as in training. A lesion is its whole shape here, its faint parts too.

Each model votes at its own threshold unless ``--probability`` gives one, which is also the first setting that
moves. MODELS are run folders or weights; those that ship with the package where omitted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import lesionsynth as ls
from normnet.ablate import majority
from normnet.config import PostprocessConfig, PredictConfig, few
from normnet.data import VALIDATION_INDEX, PairStream, split, store_volumes
from normnet.demo import DemoConfig, patients
from normnet.inflation import inflation_factor, windowed_lungs
from normnet.metrics import overlap_scores
from normnet.model import Model, bundled_models, find_models
from normnet.postprocess import postprocess
from normnet.predict import bright_threshold, inflation_of, slide

SWEEPS: dict[str, tuple[Any, ...]] = {
    "probability": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    "bright_threshold": (0.1, 0.2, 0.3, 0.4, 0.5),
    "bright_size": (5, 7, 9, 11, 13),
    "full_threshold": (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15),
    "full_size": (3, 5, 7, 9, 11),
    "growth_iterations": (0, 1, 2, 4, 8, 16, -1),
}
PAIRS = 12
"""Synthetic pairs."""


class Case(NamedTuple):
    """A volume with known lesions, and what the models say about it."""

    image: Any
    lungs: Any
    truth: Any
    chances: list[Any]
    spacing: tuple[float, float, float]


def phantoms(models: list[Model]) -> Iterator[Case]:
    """Phantom patients, the healthy one last."""
    for _, chest, truth in patients(DemoConfig()):
        factor = inflation_factor(chest.hu, chest.lung_mask, inflation_of(models))
        image = windowed_lungs(chest.hu, chest.lung_mask, factor)
        yield Case(image, chest.lung_mask, truth, _chances(image, models), chest.spacing)


def pairs(store: Path, models: list[Model]) -> Iterator[Case]:
    """Synthetic lesions in what training held out."""
    config = replace(few(), batch_size=1, crop=None, mirror=False)
    volumes = store_volumes(store)
    if (level := inflation_of(models)) is not None:
        volumes = [volume.inflated(level) for volume in volumes]
    held = split(volumes, config.held_out, config.slab)[1]
    lesions = replace(ls.presets.get(config.lesions), hu_threshold=bright_threshold(models, PredictConfig()))
    stream = PairStream(held, ls.LesionSynthesizer(lesions, seed=1), config, first_index=VALIDATION_INDEX)
    for step in range(PAIRS):
        slabs = stream.slabs(step)
        batch = stream.pairs(slabs)
        profile = slabs.profiles[0]
        lungs = np.asarray(slabs.mask)[0]
        lungs = lungs if profile is None else lungs[profile.nearest]
        image = batch.image[0, 0].numpy()
        yield Case(
            image, lungs, batch.lesions[0, 0].numpy() & lungs, _chances(image, models), held[0].spacing
        )


def score(cases: list[Case], levels: list[float], tau: float, settings: PostprocessConfig) -> list[float]:
    """Dice of each case; ml where there is no lesion."""
    found = []
    for case in cases:
        vote = majority([p > np.float32(level) for p, level in zip(case.chances, levels, strict=True)])
        healthy = vote & case.lungs & (case.image >= np.float32(tau))
        lesions = postprocess(case.image, case.lungs, healthy, settings).final
        scores = overlap_scores(lesions, case.truth, case.spacing)
        found.append(scores["dsc"] if case.truth.any() else scores["false_positive_ml"])
    return found


def main() -> None:
    """Print a table per setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--probability", type=float)
    args = parser.parse_args()
    models = [Model.load(f) for f in (find_models(args.models) if args.models else bundled_models())]
    usual = PredictConfig(probability=args.probability)
    level = bright_threshold(models, usual)
    base, tau = PostprocessConfig(threshold_hu=level), ls.threshold(level)
    levels = [model.threshold(usual.probability) for model in models]
    ill = list(phantoms(models))
    synthetic = list(pairs(args.data, models)) if args.data else []
    print(f"T {level:g} HU, thresholds {levels}; defaults {base}\n")
    for name, values in SWEEPS.items():
        print(f"| {name} | phantom pneumonia | healthy phantom (ml) | synthetic lesions |\n|---|---|---|---|")
        for value in values:
            vote = [value] * len(models) if name == "probability" else levels
            settings = base if name == "probability" else replace(base, **{name: value})
            *sick, well = score(ill, vote, tau, settings)
            pooled = score(synthetic, vote, tau, settings)
            shown = [f"{np.mean(sick):.3f}", f"{well:.2f}", f"{np.mean(pooled):.3f}" if pooled else "–"]
            print(f"| {value} | {' | '.join(shown)} |", flush=True)
        print()


def _chances(image: Any, models: list[Model]) -> list[Any]:
    device = torch.device("cpu")
    everywhere = np.ones(image.shape, bool)
    blocks = slide(lambda a, b: image[a:b], everywhere, models, PredictConfig(), device)
    return list(np.concatenate([chances.cpu().numpy() for _, chances in blocks], axis=1))


if __name__ == "__main__":
    main()
