"""Beyond one pair: many blobs, several threads, DataLoader workers, cold starts, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import lesionsynth as ls
from benchmarks.common import interleaved, statistics
from benchmarks.volumes import Volume

try:
    from torch import from_numpy
    from torch.utils.data import Dataset
except ImportError:  # the loader's section then says so
    Dataset, from_numpy = object, None

BLOBS = (10, 30, 100, 300)
RADIUS = (4.0, 4.0)
TALL = (512, 512, 512)
LIMIT_S = 900.0


class Pairs(Dataset):
    """A map-style dataset of (image, target) tensors; each worker keeps its slab and synthesizer."""

    def __init__(self, shape: tuple[int, int, int], length: int) -> None:
        self._shape = shape
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, mask = self._slab
        pair = self._synth(image, mask, index=index, lung_fraction=1.0)
        return from_numpy(pair.image), from_numpy(pair.target)

    def __getstate__(self) -> dict[str, Any]:
        return {"_shape": self._shape, "_length": self._length}

    @cached_property
    def _slab(self) -> tuple[np.ndarray, np.ndarray]:
        from benchmarks.fresh import lungs

        return lungs(self._shape)

    @cached_property
    def _synth(self) -> ls.LesionSynthesizer:
        return ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0, threads=1)


def many_blobs(volume: Volume, threads: Sequence[int], rounds: int, *, quick: bool) -> dict[str, Any]:
    """Time pairs with a fixed number of small blobs, and divide by the voxels of their lesions."""
    results: dict[str, Any] = {}
    counts = BLOBS[:2] if quick else BLOBS
    for count in counts:
        blobs = ls.BlobClass(count=(count, count), radius=RADIUS, scale_by_lung=False)
        config = ls.LesionConfig(small=blobs, medium=None, large=None)
        synths = {_threads(t): ls.LesionSynthesizer(config, seed=0, threads=t) for t in threads}
        first = synths[_threads(threads[0])]
        pairs = (first(volume.image, volume.mask, index=i, lung_fraction=1.0) for i in range(rounds))
        voxels = [sum(c.voxels for c in pair.plan.components) for pair in pairs]

        def run(index: int, synth: ls.LesionSynthesizer) -> Any:
            return synth(volume.image, volume.mask, index=index, lung_fraction=1.0).labels

        contestants = {name: (lambda i, s=synth: run(i, s)) for name, synth in synths.items()}
        samples = interleaved(contestants, rounds)
        results[str(count)] = {
            name: statistics(values.values())
            | {
                "lesion_voxels": float(np.mean(voxels)),
                "ns_per_lesion_voxel": float(np.median([1e9 * s / voxels[i] for i, s in values.items()])),
            }
            for name, values in samples.items()
        }
    return results


def scaling(timings: dict[str, Any], threads: Sequence[int]) -> dict[str, float]:
    """Speed of n threads over one, from the whole pairs."""
    medians = {t: timings[f"lesionsynth, {_threads(t)}"]["median_s"] for t in threads}
    return {_threads(t): medians[threads[0]] / median for t, median in medians.items()}


def processes(shape: Sequence[int], *, quick: bool) -> dict[str, Any]:
    """Run everything that needs processes of its own; quick leaves out compiling and the tall volume."""
    threads = os.cpu_count() or 1
    small = {"shape": list(shape), "threads": threads}
    skipped = {"skipped": "left out by --quick"}
    results: dict[str, Any] = {
        "loader": loaders(shape, pairs=6 if quick else 60, most=1 if quick else 2),
        "start": {"warm_cache": _fresh("first", small, started=True)},
        "memory": {},
    }
    with tempfile.TemporaryDirectory() as empty:
        cold = (
            skipped if quick else _fresh("first", small, started=True, environment={"NUMBA_CACHE_DIR": empty})
        )
    results["start"]["empty_cache"] = cold
    for volume in (tuple(shape), TALL):
        for labels in (False, True):
            name = f"{'x'.join(map(str, volume))}, {'with' if labels else 'without'} labels"
            task = {"shape": list(volume), "threads": 1, "labels": labels}
            results["memory"][name] = skipped if quick and volume == TALL else _fresh("memory", task)
    return results


def loaders(shape: Sequence[int], pairs: int, most: int) -> dict[str, Any]:
    """Measure DataLoaders with 0 to `most` workers, forked and spawned."""
    if from_numpy is None:
        return {"skipped": "torch is not installed"}
    results = {"0 workers": _fresh("loader", _loader(shape, 0, None, pairs))}
    for workers in range(1, most + 1):
        for context in ("fork", "spawn"):
            name = f"{workers} worker{'s' * (workers > 1)}, {context}"
            results[name] = _fresh("loader", _loader(shape, workers, context, pairs))
    return results


def _loader(shape: Sequence[int], workers: int, context: str | None, pairs: int) -> dict[str, Any]:
    return {"shape": list(shape), "workers": workers, "context": context, "pairs": pairs}


def _fresh(
    task: str,
    arguments: dict[str, Any],
    *,
    started: bool = False,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run a task of `benchmarks.fresh`; a failure is a result, with its last line."""
    if started:
        arguments = arguments | {"started": time.time()}
    command = [sys.executable, "-m", "benchmarks.fresh", task, json.dumps(arguments)]
    try:
        run = subprocess.run(
            command,
            cwd=Path(__file__).parent.parent,
            env=os.environ | (environment or {}),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {LIMIT_S:g} s"}
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return {"failed": lines[-1]}
    result: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return result


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
