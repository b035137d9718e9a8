"""One pair by other means: CuPy's filters, MONAI on the device, the CPU twin, SciPy; and a process's first.

Every contestant first renders untimed whatever will be timed: CuPy compiles a kernel for every length of a
Gaussian, which would otherwise lie inside the samples. That takes a second or two each: as many plans are
timed as the slowest has got ready within a limit, and one at least.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import pipeline, scipy_pipeline, volumes
from benchmarks.common import timed
from benchmarks.gpu_inputs import synthesizer

PLANS = 4
"""Plans in turn, at most."""
READY_S = 60.0
"""No contestant begins another plan after so long."""
MOST_ROUNDS = 20
LESIONS = 12
"""A pair has about so many."""
OURS = "lesionsynth, GPU"
FIRST_PAIR = """
import time; start = time.perf_counter()
import cupy, lesionsynth as ls
image = cupy.zeros({shape}, cupy.float32)
pair = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)(image, image == 0, index=0)
pair.plan; print(time.perf_counter() - start)
"""


def others(slab: volumes.Volume, rounds: int) -> dict[str, Any]:
    """Time one pair by every means, in turns; ``left_out`` says who failed before, and why."""
    import cupy
    from cupyx.scipy import ndimage

    from benchmarks.cupyx_pipeline import Pipeline

    synth, image, mask = synthesizer(), cupy.asarray(slab.image), cupy.asarray(slab.mask)
    plans = [synth.sample(index=k, shape=slab.image.shape) for k in range(PLANS)]
    plain = pipeline.Stages(scipy_pipeline.PlainSciPy(), pipeline.Generator())

    def finished(result: Any) -> Any:
        cupy.cuda.Device().synchronize()
        return result

    contestants: dict[str, Callable[[int], Any]] = {
        OURS: lambda k: finished(synth.render(plans[k], image, mask)),
        "cupyx.scipy.ndimage": lambda k: finished(Pipeline(cupy, ndimage).render(plans[k], image, mask)),
        "lesionsynth, CPU": lambda k: synth.render(plans[k], slab.image, slab.mask),
        "SciPy, plainly": lambda k: pipeline.render(plain, plans[k], slab.image, slab.mask),
    }
    ready, count, left_out = prepared(contestants | _monai(), PLANS, READY_S)
    turns = {name: lambda k, run=run: run(k % count) for name, run in ready.items()}
    return {"plans": count, "left_out": left_out, "times": timed(turns, min(rounds, MOST_ROUNDS))}


def prepared(
    contestants: dict[str, Callable[[int], Any]], plans: int, limit_s: float
) -> tuple[dict[str, Callable[[int], Any]], int, dict[str, str]]:
    """Let every contestant render the plans once.

    Returns those that can, how many plans all of them have rendered within the limit, and why others cannot.
    """
    left_out: dict[str, str] = {}
    for name, run in contestants.items():
        start = time.perf_counter()
        try:
            for k in range(plans):
                run(k)
                if time.perf_counter() - start > limit_s:
                    plans = k + 1
                    break
        except Exception as error:  # cuBLAS or cuRAND may not be installed, say
            if name == OURS:
                raise
            left_out[name] = f"{type(error).__name__}: {error}"
    return {name: run for name, run in contestants.items() if name not in left_out}, plans, left_out


def _monai() -> dict[str, Callable[[int], Any]]:
    """MONAI's warp and filter on the device, on boxes of a pair's size; TorchIO has no GPU."""
    try:
        import torch
        from monai.transforms import GaussianSmooth, Rand3DElastic
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    box = torch.rand(1, 32, 96, 96, device="cuda")
    warp = Rand3DElastic(
        (8.0, 8.0), (100.0, 100.0), prob=1.0, spatial_size=(32, 96, 96), device=torch.device("cuda")
    )
    filters = [GaussianSmooth([sigma] * 3, approx="sampled") for sigma in (11.0, 2.0)]

    def run(k: int) -> Any:
        for _ in range(LESIONS):
            warp(box)
            for smooth in filters:
                smooth(box)
        torch.cuda.synchronize()

    return {f"MONAI's warp and filters of {LESIONS} boxes, GPU": run}


def first_pair(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Seconds from the start of a process to its first pair, with kernels compiled before."""
    command = [sys.executable, "-c", FIRST_PAIR.format(shape=shape)]
    seconds = []
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            return {"error": done.stderr.strip()[-500:]}
        seconds.append(float(done.stdout))
    return {"median_s": float(np.median(seconds)), "samples_s": seconds}
