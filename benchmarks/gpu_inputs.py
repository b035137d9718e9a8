"""What is rendered on a GPU: batches of one slab, in turn from different memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import lesionsynth as ls
from benchmarks import volumes

INPUT_SETS = 3
"""Different inputs in turn, so that no cache holds them: three batches of one are 126 MB."""


def synthesizer(backend: Any = None) -> ls.LesionSynthesizer:
    """Return the generator that is measured, on the backend of the process or on another."""
    synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)
    if backend is not None:
        synth._backends.of = lambda image: backend
    return synth


def batch_of(slab: volumes.Volume, n: int) -> tuple[Any, Any]:
    """Return a batch on the device, each item mirrored and scaled in its own way."""
    import cupy

    image, mask = cupy.asarray(slab.image), cupy.asarray(slab.mask)
    images = [image[:, :: (-1) ** k] * cupy.float32(1 - 0.01 * k) for k in range(n)]
    return cupy.stack(images), cupy.stack([mask[:, :: (-1) ** k] for k in range(n)])


def indices(n: int, number: int) -> list[int]:
    """Name the samples of a batch: every number has its own."""
    return list(range(n * number, n * (number + 1)))


@dataclass(frozen=True)
class Inputs:
    """A batch, and buffers for its pairs."""

    image: Any
    mask: Any
    out: tuple[Any, Any]

    def render(self, synth: ls.LesionSynthesizer, number: int) -> None:
        """Render batch `number` into the buffers."""
        synth(self.image, self.mask, index=indices(len(self.image), number), lung_fraction=1.0, out=self.out)

    def poison(self) -> None:
        """Fill the buffers with what no rendering writes: NaN, and a byte that is no bool."""
        image, target = self.out
        image.view(np.uint32).fill(0xFFFFFFFF)
        target.view(np.uint8).fill(0xA5)

    def copies(self) -> tuple[Any, Any]:
        """Return what the buffers hold."""
        image, target = self.out
        return image.copy(), target.copy()

    def holds(self, want: tuple[Any, Any]) -> bool:
        """Tell whether the buffers hold these bits."""
        pairs = zip(self.out, want, (np.uint32, np.uint8), strict=True)
        return all(bool((got.view(kind) == other.view(kind)).all()) for got, other, kind in pairs)


def inputs(slab: volumes.Volume, n: int) -> list[Inputs]:
    """Return `INPUT_SETS` batches of `n`."""
    import cupy

    batches = [batch_of(slab, n) for _ in range(INPUT_SETS)]
    return [Inputs(image, mask, (cupy.empty_like(image), cupy.empty_like(mask))) for image, mask in batches]
