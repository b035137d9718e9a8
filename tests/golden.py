"""Golden pairs: plans, and the hashes of what the CPU twin made of them, for any device to replay.

``python -m tests.golden`` records those that ``tests/golden_pairs.json`` lacks, and never one anew: the bits
of a plan are meant to stay. Those of the paper's mode are plans of version 1. The inputs are Philox noise in
ellipsoids, the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import lesionsynth as ls
from tests.plans import small_config

FILE = Path(__file__).parent / "golden_pairs.json"
KINDS = ("float32", "float16", "float64", "int16")


def inputs(shape: tuple[int, int, int], kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a noisy image, dark but for every eighth voxel or so, and two ellipsoids of lung."""
    z, y, x = (np.arange(n) * 2 - (n - 1) for n in shape)
    mask = np.zeros(shape, dtype=bool)
    for side in (-1, 1):
        middle = side * shape[2] // 2
        mask |= (
            (z[:, None, None] ** 2 * (shape[1] * shape[2]) ** 2 * 16)
            + (y[None, :, None] ** 2 * (shape[0] * shape[2]) ** 2 * 25)
            + ((x[None, None, :] - middle) ** 2 * (shape[0] * shape[1]) ** 2 * 100)
        ) <= 16 * (shape[0] * shape[1] * shape[2]) ** 2
    noise = ls.ops.philox_uniform(shape, seed, stream=99)
    image = np.where(noise > 0.875, noise, noise / 4).astype(np.float32) * mask
    if kind == "int16":
        return np.rint(image * 900 - 800).astype(np.int16), mask
    return image.astype(kind), mask


def cases() -> dict[str, tuple[ls.LesionPlan, str]]:
    """Plans and image types by name."""
    found: dict[str, tuple[ls.LesionPlan, str]] = {}
    small = {"drawn": {}, "mm": {"lengths": "mm", "spacing": (2.0, 0.7, 0.9)}, "faces": {"connectivity": 6}}
    for number, (name, changes) in enumerate(small.items()):
        synth = ls.LesionSynthesizer(small_config(**changes), seed=40 + number)
        for index, kind in enumerate(KINDS):
            found[f"{name}-{kind}"] = synth.sample(index=index, shape=(12, 61, 83)), kind
    for name in ("covid_lung", "no_shapes", "no_probability_map", "no_salt_noise", "faint"):
        synth = ls.LesionSynthesizer(ls.presets.get(name), seed=7)
        found[f"slab-{name}"] = synth.sample(index=3, shape=(32, 512, 512)), "float32"
    places = iter(("surface", "depth", "surface", "depth"))
    for number, (mode, kind) in enumerate(zip(("min", "add", "blend", "blend"), KINDS, strict=True)):
        soft = {"edge": 2.5} if mode != "min" else {}
        alpha = {"alpha": (0.3, 0.9)} if mode == "blend" else {}
        config = small_config(mode=mode, **soft, **alpha)
        config = replace(config, medium=replace(config.medium, placement=next(places)))
        synth = ls.LesionSynthesizer(config, seed=60 + number)
        found[f"{mode}-{kind}"] = synth.sample(index=number, shape=(12, 61, 83)), kind
    return found


def hashes(image: Any, target: Any, labels: Any) -> dict[str, str]:
    """Hash the bytes of a pair."""
    arrays = {"image": image, "target": np.asarray(target).astype(np.uint8), "labels": labels}
    return {k: hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:32] for k, a in arrays.items()}


def load() -> dict[str, Any]:
    """Read the recorded pairs: name to plan, image type and hashes."""
    record: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return record


def main() -> None:
    """Record what is missing."""
    record = load()
    for name, (plan, kind) in cases().items():
        if name in record:
            continue
        assert plan.shape is not None
        pair = ls.LesionSynthesizer(small_config(), seed=0).render(plan, *inputs(plan.shape, kind, plan.seed))
        bare = replace(plan, components=None)
        record[name] = {
            "kind": kind,
            "plan": json.loads(bare.to_json()),
            "lesions": len(pair.plan.components),
            **hashes(pair.image, pair.target, pair.labels),
        }
    FILE.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
