"""``python -m benchmarks.profiled``: one batch of eight by single launches, for a profiler to look at.

It lies between cudaProfilerStart and cudaProfilerStop: with ``--profile-from-start off``, ncu sees every
kernel once, and nothing else.
"""

from __future__ import annotations

import sys

from benchmarks import volumes
from benchmarks.gpu_batches import BATCH
from benchmarks.gpu_inputs import batch_of, indices, synthesizer

WARMUP = 3


def main() -> int:
    """Render."""
    import cupy

    from lesionsynth.cuda.backend import CudaBackend

    synth, (image, mask) = (
        synthesizer(CudaBackend(graphs=False)),
        batch_of(volumes.phantom(volumes.SHAPE), BATCH),
    )
    out = cupy.empty_like(image), cupy.empty_like(mask)
    for number in range(WARMUP):
        synth(image, mask, index=indices(BATCH, number), lung_fraction=1.0, out=out)
    cupy.cuda.Device().synchronize()
    cupy.cuda.runtime.profilerStart()
    synth(image, mask, index=indices(BATCH, WARMUP), lung_fraction=1.0, out=out)
    cupy.cuda.Device().synchronize()
    cupy.cuda.runtime.profilerStop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
