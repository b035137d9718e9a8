"""Training pairs on the fly: healthy slabs from a store or the phantom, lesions from `lesionsynth`.

The batch of a step is a function of (seed, step) alone, so a resumed run sees what an uninterrupted one would
have.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack

import lesionsynth as ls
from normnet.prepare.store import Store

HU = npt.NDArray[np.int16]
Mask = npt.NDArray[np.bool_]

SLAB_STREAM = 64
"""Philox stream of the choice of slabs; the generator's own streams are below 32."""
VALIDATION_INDEX = 2**31
"""First sample index of validation pairs; training stays below."""
PHANTOM_SEED = 1000
"""First seed of training phantoms: run r takes PHANTOM_SEED + 100 r onwards. Below it are evaluation's."""


class Volume(Protocol):
    """One healthy volume, read slab by slab."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Runs of usable slices (first, after last)."""

    @property
    def mask_counts(self) -> npt.NDArray[np.int64]:
        """Lung voxels of every slice."""

    def slab(self, z0: int, z1: int) -> tuple[HU, Mask]:
        """HU and lung mask of slices z0 <= z < z1."""


@dataclass(frozen=True)
class PhantomVolume:
    """A healthy chest of `lesionsynth.phantom`, in memory."""

    name: str
    hu: HU
    mask: Mask

    @property
    def segments(self) -> list[tuple[int, int]]:
        """All of it."""
        return [(0, len(self.hu))]

    @property
    def mask_counts(self) -> npt.NDArray[np.int64]:
        """Lung voxels of every slice."""
        return np.asarray(np.count_nonzero(self.mask, axis=(1, 2)), np.int64)

    def slab(self, z0: int, z1: int) -> tuple[HU, Mask]:
        """Return views of slices z0 <= z < z1."""
        return self.hu[z0:z1], self.mask[z0:z1]


@dataclass(frozen=True)
class StoreVolume:
    """A case of a store, read from disk."""

    name: str
    case: Any

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Runs of slices without exclusions."""
        return list(self.case.segments)

    @property
    def mask_counts(self) -> npt.NDArray[np.int64]:
        """Lung voxels of every slice."""
        return np.asarray(self.case.mask_counts)

    def slab(self, z0: int, z1: int) -> tuple[HU, Mask]:
        """Read slices z0 <= z < z1."""
        hu, mask = self.case.slab(z0, z1)
        return hu, mask


def phantom_volumes(
    count: int, seed: int, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> list[Volume]:
    """Draw healthy phantoms for the training run `seed`."""
    volumes: list[Volume] = []
    for k in range(count):
        name = f"phantom{PHANTOM_SEED + 100 * seed + k}"
        chest = ls.phantom.chest_ct(shape=shape, spacing=spacing, seed=PHANTOM_SEED + 100 * seed + k)
        volumes.append(PhantomVolume(name, chest.hu, chest.lung_mask))
    return volumes


def store_volumes(path: Path) -> list[Volume]:
    """Open every case of a store."""
    store = Store.open(path)
    return [StoreVolume(name, store[name]) for name in store.case_ids]


def split(volumes: Sequence[Volume], held_out: int, slab: int) -> tuple[list[Volume], list[Volume]]:
    """Keep the volumes with the fewest slabs for validation, the others for training.

    Raises
    ------
    ValueError
        Nothing would be left to train on.
    """
    usable = [v for v in volumes if slab_starts(v, slab)]
    if len(usable) <= held_out:
        raise ValueError(
            f"data must hold more than held_out={held_out} volumes with {slab} usable slices in a row, "
            f"got {len(usable)} of {len(volumes)}"
        )
    by_size = sorted(usable, key=lambda v: (len(slab_starts(v, slab)), v.name))
    kept = {v.name for v in by_size[:held_out]}
    return [v for v in usable if v.name not in kept], [v for v in usable if v.name in kept]


def slab_starts(volume: Volume, slab: int) -> list[int]:
    """First slices of all slabs that lie within a segment and hold lung."""
    total = np.concatenate([[0], np.cumsum(volume.mask_counts)])
    return [
        z
        for first, stop in volume.segments
        for z in range(first, stop - slab + 1)
        if total[z + slab] > total[z]
    ]


@dataclass(frozen=True)
class Batch:
    """Pairs of one step, (b, 1, z, y, x)."""

    image: torch.Tensor
    """A, float32."""
    target: torch.Tensor
    """GT, bool."""
    lesions: torch.Tensor
    """Synthetic lesions, bool."""
    seconds: float
    """What making it took."""


class PairStream:
    """Batches of synthetic pairs, each a function of its step.

    Parameters
    ----------
    volumes : sequence of Volume
        Healthy volumes.
    synthesizer : lesionsynth.LesionSynthesizer
        Makes the lesions; its seed also chooses the slabs.
    batch_size, slab : int
        Pairs of a batch; slices of a slab.
    crop : int or None
        In-plane size of a crop around a lung voxel; None takes whole slices.
    multiple : int
        In-plane sizes are cut to a multiple of this.
    largest : int, optional
        Lung voxels of the largest slab of the data set, for λ; of `volumes` where omitted.
    mirror : bool
        Flip half of the slabs left to right.
    first_index : int
        Sample index of the first pair of step 0.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        synthesizer: ls.LesionSynthesizer,
        *,
        batch_size: int,
        slab: int,
        crop: int | None,
        multiple: int,
        largest: int | None = None,
        mirror: bool = False,
        first_index: int = 0,
    ) -> None:
        self._synthesizer = synthesizer
        self._choices = [(v, z) for v in volumes for z in slab_starts(v, slab)]
        self._batch_size, self._slab, self._crop, self._multiple = batch_size, slab, crop, multiple
        self._mirror, self._first_index = mirror, first_index
        self.largest = largest_slab(volumes, slab) if largest is None else largest

    def batch(self, step: int) -> Batch:
        """Synthesise the pairs of a step."""
        start = time.perf_counter()
        first = self._first_index + step * self._batch_size
        indices = list(range(first, first + self._batch_size))
        slabs = [self._healthy(index) for index in indices]
        images, masks = np.stack([h for h, _ in slabs]), np.stack([m for _, m in slabs])
        fractions = [min(1.0, max(int(m.sum()), 1) / self.largest) for m in masks]
        pair = self._synthesizer(images, masks, index=indices, lung_fraction=fractions)
        image, target, labels = (from_dlpack(a)[:, None] for a in (pair.image, pair.target, pair.labels))
        return Batch(image, target, labels > 0, time.perf_counter() - start)

    def _healthy(self, index: int) -> tuple[npt.NDArray[np.float32], Mask]:
        """Healthy crop H = window(HU) * M, and M."""
        u = ls.ops.philox_uniform((1, 1, 4), self._synthesizer.seed, stream=SLAB_STREAM, sample=index).ravel()
        volume, z = self._choices[min(int(u[0] * len(self._choices)), len(self._choices) - 1)]
        hu, mask = volume.slab(z, z + self._slab)
        window = self._window(mask, float(u[1]))
        hu, mask = hu[window], mask[window]
        if self._mirror and u[2] < 0.5:
            hu, mask = hu[:, :, ::-1], mask[:, :, ::-1]
        return ls.window_hu(hu) * mask, np.ascontiguousarray(mask)

    def _window(self, mask: Mask, u: float) -> tuple[slice, slice, slice]:
        """In-plane window around the voxel of rank u of the lung's projection, inside the slice."""
        sizes = [
            (n if self._crop is None else min(n, self._crop)) // self._multiple * self._multiple
            for n in mask.shape[1:]
        ]
        lung = np.flatnonzero(mask.any(axis=0))
        centre = divmod(int(lung[min(int(u * len(lung)), len(lung) - 1)]), mask.shape[2])
        y, x = (
            min(max(c - size // 2, 0), n - size)
            for c, size, n in zip(centre, sizes, mask.shape[1:], strict=True)
        )
        return slice(None), slice(y, y + sizes[0]), slice(x, x + sizes[1])


def largest_slab(volumes: Sequence[Volume], slab: int) -> int:
    """Lung voxels of the largest slab: the denominator of λ (III-C.1)."""
    most = 0
    for volume in volumes:
        total = np.concatenate([[0], np.cumsum(volume.mask_counts)])
        most = max([most, *(int(total[z + slab] - total[z]) for z in slab_starts(volume, slab))])
    return most


class Prefetcher:
    """Make batches in a background thread while the network trains; the kernels release the GIL.

    Parameters
    ----------
    stream : PairStream
        Makes the batches.
    steps : range
        Which ones, in order.
    depth : int
        Batches kept ready.
    """

    def __init__(self, stream: PairStream, steps: range, depth: int = 2) -> None:
        self.waited = 0.0
        """Seconds the consumer waited."""
        self.synthesised = 0.0
        """Seconds of background work."""
        self._stream, self._steps = stream, steps
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="normnet-pairs", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; an error of the thread is raised here."""
        while True:
            start = time.perf_counter()
            item = self._ready.get()
            self.waited += time.perf_counter() - start
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            self.synthesised += item.seconds
            yield item

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)

    def _work(self) -> None:
        try:
            for step in self._steps:
                if self._stop.is_set():
                    return
                self._ready.put(self._stream.batch(step))
            self._ready.put(None)
        except BaseException as error:  # handed to the consumer
            self._ready.put(error)
