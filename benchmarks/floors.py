"""What the machine allows: counted bytes and operations of each stage over measured rates.

A floor counts only what any implementation of the same algorithm must move or compute, at the rate of a
simple loop measured on the same machine in the same run. The rates are no limits of the hardware: a stage
whose loop is better than `numpy.copyto` or the BLAS can come out below its floor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import lesionsynth as ls
from benchmarks.common import WAITING, installed
from benchmarks.geometry import blob_box
from benchmarks.volumes import Volume

COPY_MIB = (16, 32, 64, 256)
"""Within and beyond the caches: the best of them is the rate."""
MATRIX = 1024
PHILOX_SHAPE = (32, 256, 256)
REPEATS = 5
SHAPE_FMA = 3 * 4 + 9 + 3
"""Per voxel of a blob's box: three displacements by a 4-tap spline along x (the taps along z and y are shared
by whole rows), a 3 x 3 matrix, three squares."""


def rates(threads: Sequence[int], *, quick: bool) -> dict[str, Any]:
    """Measure copy bandwidth, float32 multiply-adds and Philox numbers per second."""
    sizes = COPY_MIB[:2] if quick else COPY_MIB
    copying = {t: max(_copy_rate(t, mib << 20) for mib in sizes) for t in threads}
    return {
        "copy_bytes_per_s": {str(t): max(copying[k] for k in threads if k <= t) for t in threads},
        "fma_per_s": {str(t): _fma_rate(t) for t in threads},
        "philox_per_s": _philox_rate(),
        "how": {
            "copy": f"numpy.copyto of {sizes} MiB by n threads, read and written, best of {REPEATS}",
            "fma": f"float32 product of {MATRIX} x {MATRIX} matrices, side^3 of them, best of {REPEATS}",
            "philox": f"lesionsynth.ops.philox_uniform, threads as it chooses, best of {REPEATS}",
        },
    }


def floors(
    volume: Volume, threads: Sequence[int], plans: int, machine: dict[str, Any], stages: dict[str, Any]
) -> dict[str, Any]:
    """Count the work of `plans` pairs, turn it into milliseconds, and put the measured stages beside it."""
    synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0, threads=1)
    counted = [
        count(synth(volume.image, volume.mask, index=i, lung_fraction=1.0).plan, volume) for i in range(plans)
    ]
    work = {
        stage: {kind: float(np.median([c[stage][kind] for c in counted])) for kind in counted[0][stage]}
        for stage in counted[0]
    }
    return {"work": work, "stages": {_threads(t): _beside(work, machine, stages, t) for t in threads}}


def count(plan: ls.LesionPlan, volume: Volume) -> dict[str, dict[str, float]]:
    """Bytes moved, multiply-adds and random numbers of each stage of one rendered plan."""
    voxels = volume.image.size
    centers = _centers(plan, volume)
    blob_boxes = sum(
        math.prod(s.stop - s.start for s in blob_box(plan, b, c, volume.image.shape))
        for b, c in zip(plan.blobs, centers, strict=True)
    )
    components = plan.components or ()
    boxes = sum(math.prod(b - a for a, b in c.box) for c in components)
    lesions = sum(c.voxels for c in components)
    taps = sum(_taps(plan, c) for c in components)
    return {
        # reads the mask, a byte a voxel
        "place": {"bytes": voxels},
        # reads H, writes A, 4 bytes each, and GT, a byte
        "copy": {"bytes": 9 * voxels},
        # computes in the boxes of the blobs, writes one bit a voxel
        "draw": {"fma": SHAPE_FMA * blob_boxes, "bytes": blob_boxes / 8},
        # reads the bits of the blobs and writes those of the lesions
        "merge": {"bytes": (blob_boxes + boxes) / 8},
        # two fields of noise, two filters; in the lesions reads and writes A, 4 bytes each, and writes GT
        "fill": {"philox": 2 * boxes, "fma": taps, "bytes": 9 * lesions},
        # zeros of 4 bytes a voxel, then the lesions'
        "paint": {"bytes": 4 * voxels + 4 * lesions},
    }


def _taps(plan: ls.LesionPlan, component: ls.Component) -> int:
    """Multiply-adds of both Gaussians: box voxels x the taps of each axis that meet different voxels.

    A kernel of radius r has 2 r + 1 taps; where a box is thinner, n, its reflections fold onto n voxels.
    """
    blob = plan.blobs[component.blobs[0]]
    size = [b - a for a, b in component.box]
    radii = [int(4 * sigma / s + 0.5) for sigma in (blob.sigma_a, blob.sigma_b) for s in plan.scale]
    return math.prod(size) * sum(min(2 * r + 1, n) for r, n in zip(radii, size * 2, strict=True))


def _centers(plan: ls.LesionPlan, volume: Volume) -> list[tuple[int, int, int]]:
    inside = np.flatnonzero(volume.mask)
    at = [inside[int(b.position * inside.size)] for b in plan.blobs]
    return [tuple(int(i) for i in np.unravel_index(k, volume.mask.shape)) for k in at]


def _beside(
    work: dict[str, dict[str, float]], machine: dict[str, Any], stages: dict[str, Any], threads: int
) -> dict[str, Any]:
    """Floor and measured time of each stage, and of all together, which counts stages without a floor too."""
    ours = stages.get(f"lesionsynth, {_threads(threads)}", {})
    measured = {stage: 1e3 * entry["median_s"] for stage, entry in ours.items()}
    rows: dict[str, Any] = {
        stage: {
            "floor_ms": _milliseconds(amounts, machine, threads),
            # None where the stage bears another name, or runs beside others and has no time of its own.
            "measured_ms": measured.get(stage) if threads == 1 or stage + WAITING not in measured else None,
        }
        for stage, amounts in work.items()
    }
    total = sum(row["floor_ms"] for row in rows.values())
    return rows | {"all": {"floor_ms": total, "measured_ms": sum(measured.values()) or None}}


def _milliseconds(amounts: dict[str, float], machine: dict[str, Any], threads: int) -> float:
    """Memory and arithmetic may overlap, arithmetic and random numbers may not."""
    moving = amounts.get("bytes", 0.0) / machine["copy_bytes_per_s"][str(threads)]
    computing = amounts.get("fma", 0.0) / machine["fma_per_s"][str(threads)]
    computing += amounts.get("philox", 0.0) / machine["philox_per_s"]
    return 1e3 * max(moving, computing)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _best(run: Any) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _copy_rate(threads: int, size: int) -> float:
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best(lambda: list(pool.map(lambda part: np.copyto(*part), parts)))
    return 2 * size / seconds


def _fma_rate(threads: int) -> float:
    """By torch, whose threads can be set; NumPy, with the threads of its BLAS, where torch is missing."""
    a = np.random.default_rng(0).random((MATRIX, MATRIX), dtype=np.float32)
    if torch := installed("torch"):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        b = torch.from_numpy(a)
        seconds = _best(lambda: b @ b)
        torch.set_num_threads(before)
    else:
        seconds = _best(lambda: a @ a)
    return MATRIX**3 / seconds


def _philox_rate() -> float:
    return math.prod(PHILOX_SHAPE) / _best(lambda: ls.ops.philox_uniform(PHILOX_SHAPE, 1))
