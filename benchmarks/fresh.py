"""What must be measured in a process of its own: ``python -m benchmarks.fresh TASK JSON`` prints JSON.

Tasks: `first` (time from the start of the process to its first pair), `memory` (peak of one rendering),
`loader` (pairs per second of a torch DataLoader).
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import lesionsynth as ls


def lungs(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two ellipses of dark noise in every slice: inputs without the phantom, whose kernels would count."""
    y, x = np.ogrid[: shape[1], : shape[2]]
    plane = np.zeros(shape[1:], np.bool_)
    for middle in (0.3, 0.7):
        plane |= (y / shape[1] / 0.4 - 1.25) ** 2 + ((x / shape[2] - middle) / 0.16) ** 2 <= 1
    mask = np.repeat(plane[None], shape[0], axis=0)
    image = np.empty(shape, np.float32)
    rng = np.random.default_rng(0)
    for z in range(shape[0]):
        image[z] = rng.random(shape[1:], dtype=np.float32) * np.float32(0.4) * plane
    return image, mask


def first(shape: list[int], threads: int, started: float) -> dict[str, float]:
    """Time the first pair, and the second for comparison; `started` is `time.time()` before the process."""
    imported = time.time()
    image, mask = lungs((shape[0], shape[1], shape[2]))
    synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0, threads=threads)
    begun = time.time()
    _ = synth(image, mask, index=0, lung_fraction=1.0).labels
    done = time.time()
    _ = synth(image, mask, index=0, lung_fraction=1.0).labels
    return {
        "import_s": imported - started,
        "first_pair_s": done - begun,
        "second_pair_s": time.time() - done,
        "start_to_first_pair_s": (done - started) - (begun - imported),
    }


def memory(shape: list[int], threads: int, labels: bool) -> dict[str, Any]:
    """Measure the peak of resident memory that one rendering adds to its inputs, its outputs included.

    Kernels are loaded beforehand, on a small volume. On Linux the high-water mark is set back before the
    rendering; elsewhere it is the whole process's, and the answer too small where the inputs took more.
    """
    synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0, threads=threads)
    small = lungs((8, 64, 64))
    _ = synth(*small, index=0, lung_fraction=1.0).labels
    image, mask = lungs((shape[0], shape[1], shape[2]))
    method = "VmHWM after resetting it" if _reset_peak() else "ru_maxrss"
    before = _status("VmRSS") if method != "ru_maxrss" else _peak()
    pair = synth(image, mask, index=0, lung_fraction=1.0)
    if labels:
        _ = pair.labels
    after = _status("VmHWM") if method != "ru_maxrss" else _peak()
    outputs = pair.image.nbytes + pair.target.nbytes + (pair.labels.nbytes if labels else 0)
    return {
        "method": method,
        "extra_bytes": after - before,
        "output_bytes": outputs,
        "extra_volumes": (after - before) / image.nbytes,
        "beyond_outputs_volumes": (after - before - outputs) / image.nbytes,
    }


def loader(shape: list[int], workers: int, context: str | None, pairs: int) -> dict[str, Any]:
    """Measure a DataLoader of pairs, one thread per worker, batches of one, after its first batches."""
    from torch.utils.data import DataLoader

    from benchmarks.workers import Pairs

    warm = 2 * max(workers, 1)
    data = Pairs((shape[0], shape[1], shape[2]), pairs + 2 * warm)
    batches = iter(
        DataLoader(
            data, batch_size=1, num_workers=workers, multiprocessing_context=context if workers else None
        )
    )
    for _ in range(warm):
        next(batches)
    start = time.perf_counter()
    # Not to the end: that is where workers are shut down.
    voxels = sum(image.numel() + target.numel() for image, target in itertools.islice(batches, pairs))
    seconds = time.perf_counter() - start
    assert voxels == 2 * pairs * int(np.prod(shape))
    return {"pairs_per_s": pairs / seconds, "seconds": seconds, "pairs": pairs}


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    task = {"first": first, "memory": memory, "loader": loader}[sys.argv[1]]
    print(json.dumps(task(**json.loads(sys.argv[2]))))
