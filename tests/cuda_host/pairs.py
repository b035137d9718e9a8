"""Render pairs with the kernels on the host, through the code that a GPU runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lesionsynth.cuda.render import Job, Renderer, View

HU_RANGE = (-800.0, 100.0)


@dataclass
class HostPair:
    """What a GPU would have made."""

    image: np.ndarray
    target: np.ndarray
    lesions: Any

    @property
    def components(self) -> tuple[Any, ...]:
        return self.lesions.components()

    @property
    def labels(self) -> np.ndarray:
        labels = np.full(self.image.shape, -7, dtype=np.int32)
        self.lesions.paint(labels.ctypes.data)
        return labels


def volume(array: np.ndarray, kind: str | None = None) -> View:
    """Describe a (b, z, y, x) array to the kernels."""
    strides = tuple(n // array.itemsize for n in array.strides)
    return View(array.ctypes.data, array.shape, strides, kind or array.dtype.name)


def begin(
    renderer: Renderer, plans: Sequence[Any], images: np.ndarray, masks: np.ndarray, kind: str | None = None
) -> HostPair:
    """Launch plans on (b, z, y, x) arrays; `kind` names what NumPy lacks, by its bits."""
    kind = kind or images.dtype.name
    dtype = np.float32 if kind == "int16" else images.dtype
    out, target = np.full(images.shape, 77, dtype=dtype), np.full(images.shape, 77, dtype=np.uint8)
    job = Job(volume(images, kind), volume(masks.view(np.uint8)), volume(out), volume(target))
    return HostPair(out, target, renderer.render(plans, job, HU_RANGE))


def render(
    renderer: Renderer, plans: Sequence[Any], images: np.ndarray, masks: np.ndarray, kind: str | None = None
) -> HostPair:
    """`begin`, on a device that is done when a call returns."""
    pair = begin(renderer, plans, images, masks, kind)
    assert set(np.unique(pair.target)) <= {0, 1}
    pair.target = pair.target.astype(bool)
    return pair
