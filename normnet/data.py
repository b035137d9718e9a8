"""Training pairs on the fly: healthy slabs of `normnet.volumes`, lesions of `lesionsynth`.

The batch of a step is a function of (seed, step) alone, so a resumed run sees what an uninterrupted one would
have, and two processes together see what one does. On CUDA a batch is synthesised there, by the training
thread itself; on a CPU a background thread makes it while the network trains.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

import lesionsynth as ls
from normnet.augment import Variation
from normnet.config import AugmentConfig
from normnet.thick import slice_profile, thicken
from normnet.volumes import Array, Volume, largest_slab, slab_starts, slab_voxels

SLAB_STREAM = 64
"""Philox stream of the choice of slabs; the generator's own streams are below 32."""
VALIDATION_INDEX = 2**31
"""First sample index of validation pairs; training stays below."""


@dataclass(frozen=True)
class ThickSlices:
    """How many slabs are shown as thick-slice scans, and how thick."""

    share: float = 0.0
    """In [0, 1]."""
    millimetres: tuple[float, float] = (3.0, 8.0)
    """Least and largest thickness in mm."""


@dataclass(frozen=True)
class Slabs:
    """Healthy slabs of one step, before there are lesions; (b, z, y, x)."""

    hu: Array
    """int16."""
    mask: Array
    """bool."""
    indices: list[int]
    """Sample indices."""
    fractions: list[float]
    """λ of each."""
    profiles: list[Any]
    """`slice_profile` of each that becomes thick, None for the others."""
    seconds: float
    """What reading took."""


@dataclass(frozen=True)
class Batch:
    """Pairs of one step, (b, 1, z, y, x)."""

    image: torch.Tensor
    """A, float32."""
    target: torch.Tensor
    """GT, bool."""
    _lesions: Callable[[], torch.Tensor] = field(repr=False)
    _clock: Callable[[], float] = field(repr=False)

    @cached_property
    def lesions(self) -> torch.Tensor:
        """Synthetic lesions, bool; painted when first asked for: training does not."""
        return self._lesions()

    @property
    def seconds(self) -> float:
        """What making it took; on CUDA once the device has come to it."""
        return self._clock()

    def part(self, number: int, parts: int) -> slice:
        """Return the samples of one of several equal parts."""
        size = len(self.image) // parts
        return slice(number * size, (number + 1) * size)


class Stream(Protocol):
    """Batches of a run, each a function of its step."""

    @property
    def device(self) -> torch.device:
        """Where they are made."""

    def batch(self, step: int) -> Batch:
        """Make the batch of a step."""


class PairStream:
    """Batches of synthetic pairs, each a function of its step.

    Parameters
    ----------
    volumes : sequence of Volume
        Healthy volumes.
    synthesizer : lesionsynth.LesionSynthesizer
        Makes the lesions; its seed also chooses the slabs.
    batch_size, slab : int
        Pairs of a batch, over all processes; slices of a slab.
    crop : int or None
        In-plane size of a crop around a lung voxel; None takes whole slices.
    multiple : int
        In-plane sizes are cut to a multiple of this.
    largest : int, optional
        Lung voxels of the largest slab of the data set, for λ; of `volumes` where omitted.
    mirror : bool
        Flip half of the slabs left to right.
    thick : ThickSlices
        Slabs shown as thick-slice scans.
    augment : AugmentConfig
        How healthy slabs vary.
    first_index : int
        Sample index of the first pair of step 0.
    rank, processes : int
        This process makes the part `rank` of `processes` equal parts of each batch.
    device : torch.device
        Where pairs are made.
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
        thick: ThickSlices | None = None,
        augment: AugmentConfig | None = None,
        first_index: int = 0,
        rank: int = 0,
        processes: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.largest = largest_slab(volumes, slab) if largest is None else largest
        self._synthesizer = synthesizer
        self._choices = [(v, z) for v in volumes for z in slab_starts(v, slab)]
        self._voxels = {id(v): slab_voxels(v, slab) for v in volumes}
        self._batch_size, self._slab, self._crop, self._multiple = batch_size, slab, crop, multiple
        self._mirror, self._thick = mirror, thick or ThickSlices()
        self._augment = augment or AugmentConfig()
        self._first_index = first_index
        self._share = range(rank * batch_size // processes, (rank + 1) * batch_size // processes)

    @property
    def resident(self) -> bool:
        """Whether the volumes lie on the device that makes the pairs."""
        return self.device.type == "cpu" or all(
            isinstance(v.slab(z, z + 1)[0], torch.Tensor) for v, z in self._choices[:1]
        )

    def batch(self, step: int) -> Batch:
        """Synthesise the pairs of a step."""
        return self.pairs(self.slabs(step))

    def slabs(self, step: int) -> Slabs:
        """Read the healthy slabs of a step."""
        start = time.perf_counter()
        first = self._first_index + step * self._batch_size
        indices = [first + k for k in self._share]
        parts = [self._healthy(index) for index in indices]
        hu, mask = (_stack([p[k] for p in parts]) for k in (0, 1))
        if self.device.type == "cuda" and not isinstance(hu, torch.Tensor):
            # a new thread begins on device 0, whichever trains: pinning would set that up in every process
            with torch.cuda.device(self.device):
                hu, mask = (torch.from_numpy(a).pin_memory() for a in (hu, mask))
        fractions, profiles = [p[2] for p in parts], [p[3] for p in parts]
        return Slabs(hu, mask, indices, fractions, profiles, time.perf_counter() - start)

    def pairs(self, slabs: Slabs) -> Batch:
        """Put lesions into healthy slabs, on the device that makes pairs."""
        stop = _clock(self.device)
        hu, mask = slabs.hu, slabs.mask
        if isinstance(hu, torch.Tensor):
            hu, mask = (a.to(self.device, non_blocking=True) for a in (hu, mask))
        healthy = ls.window_hu(hu)
        healthy *= mask
        pair = self._synthesizer(
            healthy, mask, index=slabs.indices, lung_fraction=slabs.fractions, allow_empty=True
        )
        image, target, thick = pair.image, pair.target, {}
        for k, profile in enumerate(slabs.profiles):
            if profile is not None:
                tau = ls.threshold(self._synthesizer.config.hu_threshold)
                thick[k] = thicken(hu[k], mask[k], image[k], pair.labels[k] > 0, profile=profile, tau=tau)
                image[k], target[k] = thick[k][:2]
        elapsed = stop()

        def lesions() -> torch.Tensor:
            found = _tensor(pair.labels > 0)
            for k, (_, _, ill) in thick.items():
                found[k, 0] = torch.as_tensor(ill)
            return found

        return Batch(_tensor(image), _tensor(target), lesions, lambda: slabs.seconds + elapsed())

    def _healthy(self, index: int) -> tuple[Array, Array, float, Any]:
        """HU and mask of a slab or crop, its λ, and how thick slices show it."""
        seed = self._synthesizer.seed
        u = ls.ops.philox_uniform((1, 1, 8), seed, stream=SLAB_STREAM, sample=index).ravel()
        volume, z = self._choices[min(int(u[0] * len(self._choices)), len(self._choices) - 1)]
        hu, mask = volume.slab(z, z + self._slab)
        sizes = [
            (n if self._crop is None else min(n, self._crop)) // self._multiple * self._multiple
            for n in mask.shape[1:]
        ]
        voxels = int(self._voxels[id(volume)][z])
        variation = Variation(self._augment, seed, index) if self._augment.active else None
        if list(mask.shape[1:]) != sizes or variation:
            window = self._window(mask, sizes, float(u[1]))
            hu, mask = _cut(hu, mask, window, variation)
            mask = variation.edge(mask) if variation else mask
            voxels = int(mask.sum())
        if variation:
            hu = variation.change(hu, mask)
        if self._mirror and u[2] < 0.5:
            flip: Any = torch.flip if isinstance(hu, torch.Tensor) else np.flip
            hu, mask = flip(hu, (2,)), flip(mask, (2,))
        fraction = min(1.0, max(voxels, 1) / self.largest)
        return hu, mask, fraction, self._profile(volume, u[3:6])

    def _profile(self, volume: Volume, u: Any) -> Any:
        if not u[0] < self._thick.share:
            return None
        thin, thick = self._thick.millimetres
        return slice_profile(self._slab, volume.spacing[0], thin + float(u[1]) * (thick - thin), float(u[2]))

    def _window(self, mask: Array, sizes: list[int], u: float) -> tuple[slice, slice]:
        """In-plane window around the voxel of rank u of the lung's projection, inside the slice.

        The middle, where there is no lung.
        """
        projection = mask.any(0)
        if isinstance(projection, torch.Tensor):
            projection = projection.cpu().numpy()
        lung = np.flatnonzero(projection)
        rank = min(int(u * len(lung)), len(lung) - 1)
        centre = divmod(int(lung[rank]), mask.shape[2]) if len(lung) else [n // 2 for n in mask.shape[1:]]
        y, x = (
            min(max(c - size // 2, 0), n - size)
            for c, size, n in zip(centre, sizes, mask.shape[1:], strict=True)
        )
        return slice(y, y + sizes[0]), slice(x, x + sizes[1])


def pair_device(device: torch.device) -> torch.device:
    """Return where pairs for a network on `device` are made: there, if `lesionsynth` has kernels for it."""
    kernels = device.type == "cuda" and importlib.util.find_spec("cupy") is not None
    return device if kernels else torch.device("cpu")


def _cut(
    hu: Array, mask: Array, window: tuple[slice, slice], variation: Variation | None
) -> tuple[Array, Array]:
    """Take a window of a slab, turned and scaled where there is lung left in it then."""
    if variation and variation.moves:
        moved = variation.move(hu, mask, window)
        if moved[1].any():
            return moved
    return hu[:, *window], mask[:, *window]


def _stack(arrays: Sequence[Array]) -> Array:
    stack: Any = torch.stack if isinstance(arrays[0], torch.Tensor) else np.stack
    return stack(arrays)


def _tensor(array: Array) -> torch.Tensor:
    """(b, z, y, x) to a torch (b, 1, z, y, x), without a copy."""
    return (array if isinstance(array, torch.Tensor) else from_dlpack(array))[:, None]


def _clock(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start a clock; calling it stops it, and calling what comes back reads the seconds between."""
    if device.type != "cuda":
        start = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - start
            return lambda: seconds

        return stop
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()

    def stop_event() -> Callable[[], float]:
        end.record()

        def elapsed() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000

        return elapsed

    return stop_event


class _Timed(Protocol):
    @property
    def seconds(self) -> float: ...


Item = TypeVar("Item", bound=_Timed)


class Prefetcher(Generic[Item]):
    """Make the items of steps in a background thread while the network trains; the kernels release the GIL.

    Parameters
    ----------
    make : callable
        Makes the item of a step.
    steps : range
        Which ones, in order.
    depth : int
        Items kept ready.
    """

    def __init__(self, make: Callable[[int], Item], steps: range, depth: int = 2) -> None:
        self.waited = 0.0
        """Seconds the consumer waited."""
        self._make, self._steps = make, steps
        self._ready: queue.Queue[Item | BaseException | None] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="normnet-pairs", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        """Yield the items; an error of the thread is raised here."""
        while True:
            start = time.perf_counter()
            item = self._ready.get()
            self.waited += time.perf_counter() - start
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
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
                self._ready.put(self._make(step))
            self._ready.put(None)
        except BaseException as error:  # handed to the consumer
            self._ready.put(error)


class Batches:
    """The batches of a run, made where they are made best.

    Pairs of the CPU come ready from a background thread. Pairs of a CUDA device are made in line, on the
    stream that trains; a background thread reads their slabs where the volumes are not on the device.

    Parameters
    ----------
    stream : Stream
        Makes them.
    steps : range
        Which ones, in order.
    """

    def __init__(self, stream: Stream, steps: range) -> None:
        self._stream, self._steps = stream, steps
        self._ready: Prefetcher[Any] | None = None
        self._finish: Callable[[Slabs], Batch] | None = None
        if stream.device.type == "cpu":
            self._ready = Prefetcher(stream.batch, steps)
        elif isinstance(stream, PairStream) and not stream.resident:
            self._ready, self._finish = Prefetcher(stream.slabs, steps), stream.pairs

    @property
    def waited(self) -> float:
        """Seconds spent waiting for the background thread."""
        return self._ready.waited if self._ready else 0.0

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in order."""
        if self._ready is None:
            yield from (self._stream.batch(step) for step in self._steps)
        elif self._finish is None:
            yield from self._ready
        else:
            yield from map(self._finish, self._ready)

    def close(self) -> None:
        """Stop the background thread, if there is one."""
        if self._ready:
            self._ready.close()
