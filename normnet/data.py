"""Training pairs on the fly: healthy slabs of a store or of the phantom, lesions of `lesionsynth`.

The batch of a step is a function of (seed, step) alone, so a resumed run sees what an uninterrupted one would
have, and two processes together see what one does. On CUDA a batch is synthesised there, by the training
thread itself; on a CPU a background thread makes it while the network trains.
"""

from __future__ import annotations

import importlib.util
import re
import time
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

import lesionsynth as ls
from lesionsynth.strict import name_of, shown
from normnet.augment import Variation
from normnet.config import Shape, Spacing, TrainConfig
from normnet.device import free_memory
from normnet.inflation import healthy_density, inflate
from normnet.prepare.store import Store
from normnet.sheets import read_rows
from normnet.thick import Profile, draw_profile, thicken

SLAB_STREAM = 64
"""Philox stream of the choice of slabs; the generator's own streams are below 32."""
VALIDATION_INDEX = 2**31
"""First sample index of validation pairs; training stays below."""
PHANTOM_SEED = 1000
"""First seed of training phantoms: run r takes PHANTOM_SEED + 100 r onwards. Below it are evaluation's."""
PATIENT_SEED = 1
"""First seed of phantoms that are evaluated on, whatever the run's seed."""
VOXEL_BYTES = 3
"""A kept voxel: HU in int16, and its mask."""
ROOM = 2
"""Volumes are kept where so many times their size is free: networks and pairs need the rest."""
AHEAD = 3
"""Steps that a background thread is ahead: two are ready, one is in the making."""

CPU = torch.device("cpu")
Place = Literal["device", "memory", "disk"]
Item = TypeVar("Item")


def pair_streams(
    config: TrainConfig, device: torch.device, *, rank: int = 0, processes: int = 1, local: int = 1
) -> tuple[PairStream, list[Batch]]:
    """Return the training stream of the task lesions and the fixed validation batches.

    Parameters
    ----------
    config : TrainConfig
        Of the run.
    device : torch.device
        Where the network trains.
    rank, processes : int
        This process makes the part `rank` of `processes` equal parts of each batch; process 0 alone has
        validation batches.
    local : int
        Processes that share this machine's memory.

    Raises
    ------
    ValueError
        `config.data` is no store for lesions, `config.folds` are none of it, or nothing would be left to
        train on.
    """
    if config.data is None and config.folds is not None:
        raise ValueError(f"folds must be None without data, which they name, got {config.folds}")
    if config.data is None:
        count = config.phantoms + config.held_out
        volumes = phantom_volumes(count, config.seed, config.phantom_shape, config.phantom_spacing)
    else:
        volumes = store_volumes(config.data)
    if config.inflation_hu is not None:
        volumes = [volume.inflated(config.inflation_hu) for volume in volumes]
    if config.folds is None:
        training, held = split(volumes, config.held_out, config.slab)
    else:
        training, held = split_by_fold(volumes, read_folds(config.folds), config.seed, config.slab)
    makes = pair_device(device)
    if makes.type != device.type:
        warnings.warn(
            "pairs are synthesised on the CPU: CuPy is not installed (pip install 'lesionsynth[cuda13]')",
            stacklevel=1,
        )
    place = choose_place(volumes, config.cache, makes, processes=local)
    lesions = replace(ls.presets.get(config.lesions), hu_threshold=config.threshold_hu)
    # one thread: on a CPU synthesis runs beside the network, which has the others
    synthesizer = ls.LesionSynthesizer(lesions, seed=config.seed, threads=1)
    training = [volume.kept(place, makes) for volume in training]
    stream = PairStream(training, synthesizer, config, rank=rank, processes=processes, device=makes)
    if rank or not held:
        return stream, []
    one = replace(config, batch_size=1, accumulate=1, mirror=False)
    checks = PairStream(
        held, synthesizer, one, largest=stream.largest, first_index=VALIDATION_INDEX, device=makes
    )
    return stream, [checks.batch(k) for k in range(config.validation_pairs)]


# ---- healthy volumes


@dataclass(frozen=True, eq=False)
class Volume:
    """One healthy volume, read slab by slab.

    Attributes
    ----------
    name : str
        For messages.
    shape : (3,) ints
        (Z, Y, X).
    spacing : (3,) floats
        Voxel size (z, y, x) in mm.
    segments : list of (first, after last)
        Runs of usable slices.
    mask_counts : (Z,) int array
        Lung voxels of every slice.
    read : callable
        Gives HU (int16) and lung mask (bool) of slices z0 <= z < z1.
    density : float, optional
        `normnet.inflation.healthy_density`; "unknown" where it has yet to be found.
    factor : float
        What HU in the lungs are multiplied with as slices are read (`normnet.inflation.inflate`).
    """

    name: str
    shape: Shape
    spacing: Spacing
    segments: list[tuple[int, int]]
    mask_counts: npt.NDArray[np.int64]
    read: Callable[[int, int], tuple[Any, Any]] = field(repr=False)
    density: float | Literal["unknown"] | None = "unknown"
    factor: float = 1.0

    @classmethod
    def of(
        cls,
        name: str,
        hu: npt.NDArray[np.int16],
        mask: npt.NDArray[np.bool_],
        spacing: Spacing,
        segments: Sequence[tuple[int, int]] = (),
    ) -> Volume:
        """Make a volume of arrays; all slices are usable where `segments` are omitted."""
        depth, height, width = hu.shape
        counts = np.count_nonzero(mask, axis=(1, 2)).astype(np.int64)
        whole = list(segments) or [(0, depth)]
        return cls(name, (depth, height, width), spacing, whole, counts, lambda a, b: (hu[a:b], mask[a:b]))

    def slab(self, z0: int, z1: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return HU (int16) and lung mask (bool) of slices z0 <= z < z1, where they are kept."""
        hu, mask = self.read(z0, z1)
        return torch.as_tensor(inflate(hu, mask, self.factor)), torch.as_tensor(mask)

    def slabs(self, depth: int) -> list[tuple[int, int]]:
        """List first slice and lung voxels of all slabs that lie within a segment and show lung."""
        total = np.concatenate([[0], np.cumsum(self.mask_counts)])
        starts = [z for first, stop in self.segments for z in range(first, stop - depth + 1)]
        return [(z, int(total[z + depth] - total[z])) for z in starts if total[z + depth] > total[z]]

    def inflated(self, inflation_hu: float) -> Volume:
        """Return the volume with its healthy lung brought to `inflation_hu`, if it has any."""
        density = self.density
        if density == "unknown":
            density = healthy_density(*self.read(0, self.shape[0]))
        return self if density is None else replace(self, factor=inflation_hu / density)

    def kept(self, place: Place, device: torch.device) -> Volume:
        """Copy the volume to where it shall be kept, in main memory or on `device`."""
        if place == "disk":
            return self
        hu, mask = self.slab(0, self.shape[0])
        if place == "device":
            hu, mask = hu.to(device), mask.to(device)
        return replace(self, read=lambda z0, z1: (hu[z0:z1], mask[z0:z1]), factor=1.0)


def phantoms(
    count: int, seed: int, shape: Shape, spacing: Spacing
) -> Iterator[tuple[str, ls.phantom.ChestCT]]:
    """Draw healthy phantoms, and their names, for the training run `seed`."""
    for k in range(PHANTOM_SEED + 100 * seed, PHANTOM_SEED + 100 * seed + count):
        yield f"phantom{k}", ls.phantom.chest_ct(shape=shape, spacing=spacing, seed=k)


def phantom_patient(number: int, shape: Shape) -> tuple[ls.phantom.ChestCT, npt.NDArray[np.bool_]]:
    """Draw a phantom that is evaluated on, from 0 up: a chest with pneumonia, and its lesions."""
    chest = ls.phantom.chest_ct(shape=shape, seed=PATIENT_SEED + number)
    ill = ls.phantom.add_pneumonia(chest.hu, chest.lung_mask, chest.spacing, seed=PATIENT_SEED + number)
    return chest._replace(hu=ill.hu), ill.lesion_mask


def phantom_volumes(count: int, seed: int, shape: Shape, spacing: Spacing) -> list[Volume]:
    """Draw healthy phantoms for the training run `seed`."""
    drawn = phantoms(count, seed, shape, spacing)
    return [Volume.of(name, chest.hu, chest.lung_mask, spacing) for name, chest in drawn]


def store_volumes(path: Path) -> list[Volume]:
    """Open every case of a store.

    Raises
    ------
    ValueError
        It was prepared for another task.
    """
    store = Store.open(path)
    if (task := store.meta.get("task", "lesions")) != "lesions":
        raise ValueError(f"data must be a store prepared for lesions, got {path} for --task {task}")
    return [
        Volume(
            case.case_id,
            case.shape,
            case.spacing,
            case.segments,
            case.mask_counts,
            case.slab,
            case.meta.get("density_hu", "unknown"),  # stores of before have none
        )
        for case in map(store.__getitem__, store.case_ids)
    ]


def split(volumes: Sequence[Volume], held_out: int, slab: int) -> tuple[list[Volume], list[Volume]]:
    """Keep the volumes with the fewest slabs for validation, the others for training.

    Raises
    ------
    ValueError
        Nothing would be left to train on.
    """
    usable = [v for v in volumes if v.slabs(slab)]
    if len(usable) <= held_out:
        raise ValueError(
            f"data must hold more than held_out={held_out} volumes with {slab} usable slices in a row, "
            f"got {len(usable)} of {len(volumes)}"
        )
    held = sorted(usable, key=lambda v: (len(v.slabs(slab)), v.name))[:held_out]
    return [v for v in usable if v not in held], [v for v in usable if v in held]


def read_folds(path: Path) -> dict[str, int]:
    """Read a CSV of ``case,fold``: folds count from 0, and lines that start with ``#`` are skipped.

    Raises
    ------
    ValueError
        A line does not hold a name, given once, and an integer >= 0; there are fewer than two folds, or a
        number is left out.
    """
    folds: dict[str, int] = {}
    for number, row in read_rows(path):
        cells = [cell.strip() for cell in row]
        if not any(cells) or cells[0].startswith("#") or (number == 1 and cells[0] == "case"):
            continue
        if len(cells) != 2 or not cells[0] or cells[0] in folds or not re.fullmatch("[0-9]{1,6}", cells[1]):
            rule = "case,fold, each case once and folds integers >= 0"
            raise ValueError(f"{name_of(path)}, line {number}: must be {rule}, got {shown(','.join(row))}")
        folds[cells[0]] = int(cells[1])
    found = sorted(set(folds.values()))
    if len(found) < 2 or found != list(range(len(found))):
        raise ValueError(f"{name_of(path)}: folds must be 0, 1 and so on, two at least, got {shown(found)}")
    return folds


def fold_of(folds: Mapping[str, int], seed: int) -> int:
    """Return the fold that the run of a seed holds out: ``seed`` modulo their number."""
    return seed % (max(folds.values()) + 1)


def split_by_fold(
    volumes: Sequence[Volume], folds: Mapping[str, int], seed: int, slab: int
) -> tuple[list[Volume], list[Volume]]:
    """Keep the volumes of one fold for validation, the others for training.

    Parameters
    ----------
    volumes : sequence of Volume
        All of a store.
    folds : mapping
        Fold of each case; names that the store does not have are of no account.
    seed : int
        Of the run; see `fold_of`.
    slab : int
        Volumes without so many usable slices in a row are left out.

    Raises
    ------
    ValueError
        A volume is in no fold, or nothing would be left on one of the two sides.
    """
    if missing := sorted(v.name for v in volumes if v.name not in folds):
        raise ValueError(f"folds must name every case of the store, got none for {shown(missing)}")
    wanted = fold_of(folds, seed)
    usable = [v for v in volumes if v.slabs(slab)]
    held = [v for v in usable if folds[v.name] == wanted]
    training = [v for v in usable if folds[v.name] != wanted]
    if not held or not training:
        raise ValueError(
            f"folds must leave volumes with {slab} usable slices in a row on both sides, got "
            f"{len(held)} in fold {wanted} and {len(training)} in the others"
        )
    return training, held


def choose_place(volumes: Sequence[Volume], cache: str, device: torch.device, *, processes: int = 1) -> Place:
    """Choose where volumes are kept.

    Parameters
    ----------
    volumes : sequence of Volume
        All of a run.
    cache : {"auto", "device", "memory", "disk"}
        As configured; "auto" takes the first that has `ROOM` times their size free.
    device : torch.device
        The training device; the CPU's memory is main memory.
    processes : int
        Training processes that share this machine's main memory.
    """
    needed = ROOM * VOXEL_BYTES * sum(int(np.prod(v.shape)) for v in volumes)
    if device.type == "cuda" and (cache == "device" or (cache == "auto" and needed < free_memory(device))):
        return "device"
    if cache in ("device", "memory") or (cache == "auto" and needed < free_memory(CPU) // processes):
        return "memory"
    return "disk"


def pair_device(device: torch.device) -> torch.device:
    """Return where pairs for a network on `device` are made: there, if `lesionsynth` has kernels for it."""
    kernels = device.type == "cuda" and importlib.util.find_spec("cupy") is not None
    return device if kernels else CPU


# ---- pairs


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


class Stream(ABC):
    """Batches of a run, each a function of its step.

    Parameters
    ----------
    config : TrainConfig
        Sizes of batch and sample, and how samples vary.
    first_index : int
        Sample index of the first sample of step 0.
    rank, processes : int
        This process makes the part `rank` of `processes` equal parts of each batch.
    device : torch.device
        Where samples are made.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        first_index: int = 0,
        rank: int = 0,
        processes: int = 1,
        device: torch.device = CPU,
    ) -> None:
        self.config, self.device, self._first = config, device, first_index
        self._share = [part * config.batch_size // processes for part in (rank, rank + 1)]

    def indices(self, step: int) -> range:
        """Return the sample indices of this process's part of a batch."""
        first = self._first + step * self.config.batch_size
        return range(first + self._share[0], first + self._share[1])

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """Make the batch of a step."""


class Slabs(NamedTuple):
    """Healthy slabs of one step, before there are lesions."""

    hu: torch.Tensor  # (b, z, y, x) int16
    mask: torch.Tensor  # bool
    indices: list[int]
    fractions: list[float]  # λ of each
    profiles: list[Profile | None]  # of those that become thick
    seconds: float  # what reading took


class PairStream(Stream):
    """Batches of synthetic pairs.

    Parameters
    ----------
    volumes : sequence of Volume
        Healthy volumes.
    synthesizer : lesionsynth.LesionSynthesizer
        Makes the lesions; its seed also chooses the slabs.
    config : TrainConfig
        Sizes of batch and sample, mirroring, thick slices, variation.
    largest : int, optional
        Lung voxels of the largest slab of the data set, for λ (PAPER.md III-C.1); of `volumes` where omitted.
    **part
        As of `Stream`.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        synthesizer: ls.LesionSynthesizer,
        config: TrainConfig,
        *,
        largest: int | None = None,
        **part: Any,
    ) -> None:
        super().__init__(config, **part)
        self._synthesizer = synthesizer
        self._choices = [(v, z, voxels) for v in volumes for z, voxels in v.slabs(config.slab)]
        self.largest = max((n for *_, n in self._choices), default=0) if largest is None else largest

    @property
    def resident(self) -> bool:
        """Whether the volumes lie on the device that makes the pairs."""
        volume, z, _ = self._choices[0]
        return volume.slab(z, z + 1)[0].device.type == self.device.type

    def batch(self, step: int) -> Batch:
        """Synthesise the pairs of a step."""
        return self.pairs(self.slabs(step))

    def slabs(self, step: int) -> Slabs:
        """Read the healthy slabs of a step."""
        start = time.perf_counter()
        indices = list(self.indices(step))
        hus, masks, fractions, profiles = zip(*map(self._healthy, indices), strict=True)
        hu, mask = _stacked(hus), _stacked(masks)
        if self.device.type == "cuda" and not hu.is_cuda:
            # a new thread begins on device 0, whichever trains: pinning would set that up in every process
            with torch.cuda.device(self.device):
                hu, mask = hu.pin_memory(), mask.pin_memory()
        return Slabs(hu, mask, indices, list(fractions), list(profiles), time.perf_counter() - start)

    def pairs(self, slabs: Slabs) -> Batch:
        """Put lesions into healthy slabs, on the device that makes pairs."""
        start = self._now()
        hu, mask = (array.to(self.device, non_blocking=True) for array in (slabs.hu, slabs.mask))
        # views of NumPy on a CPU: several times as fast here as torch
        seen, inside = (hu, mask) if self.device.type == "cuda" else (hu.numpy(), mask.numpy())
        healthy = ls.window_hu(seen)
        healthy *= inside
        pair = self._synthesizer(
            torch.as_tensor(healthy),
            mask,
            index=slabs.indices,
            lung_fraction=slabs.fractions,
            allow_empty=True,
        )
        tau = ls.threshold(self._synthesizer.config.hu_threshold)
        thick: dict[int, torch.Tensor] = {}
        for k, profile in enumerate(slabs.profiles):
            if profile is not None:
                pair.image[k], pair.target[k], thick[k] = thicken(
                    hu[k], mask[k], pair.image[k], pair.labels[k] > 0, profile=profile, tau=tau
                )
        stop = self._now()

        def lesions() -> torch.Tensor:
            found: torch.Tensor = pair.labels > 0
            for k, ill in thick.items():
                found[k] = ill
            return found[:, None]

        def seconds() -> float:
            if self.device.type != "cuda":
                return slabs.seconds + float(stop - start)
            stop.synchronize()
            return slabs.seconds + float(start.elapsed_time(stop)) / 1000

        return Batch(pair.image[:, None], pair.target[:, None], lesions, seconds)

    def _now(self) -> Any:
        """Time in seconds, or the event when the device will have come so far."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _healthy(self, index: int) -> tuple[torch.Tensor, torch.Tensor, float, Profile | None]:
        """HU and mask of a slab or crop, its λ, and how thick slices show it."""
        config, seed = self.config, self._synthesizer.seed
        u = ls.ops.philox_uniform((1, 1, 8), seed, stream=SLAB_STREAM, sample=index).ravel()
        volume, z, voxels = self._choices[min(int(u[0] * len(self._choices)), len(self._choices) - 1)]
        hu, mask = volume.slab(z, z + config.slab)
        multiple = config.model.multiple
        sizes = [min(n, config.crop or n) // multiple * multiple for n in mask.shape[1:]]
        if sizes != list(mask.shape[1:]) or config.augment.active:
            window = _window(mask, sizes, float(u[1]))
            if config.augment.active:
                hu, mask = Variation(config.augment, seed, index).apply(hu, mask, window)
            else:
                hu, mask = hu[:, *window], mask[:, *window]
            voxels = int(mask.sum())
        if config.mirror and u[2] < 0.5:
            hu, mask = hu.flip(2), mask.flip(2)
        thick = draw_profile(config, config.slab, volume.spacing[0], *map(float, u[3:6]))
        return hu, mask, min(1.0, max(voxels, 1) / self.largest), thick


def _stacked(slabs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack; on a CPU with NumPy, whose large pages take a sixth of the time."""
    if slabs[0].is_cuda:
        return torch.stack(list(slabs))
    return torch.from_numpy(np.stack([slab.numpy() for slab in slabs]))


def _window(mask: torch.Tensor, sizes: Sequence[int], u: float) -> tuple[slice, slice]:
    """In-plane window around the voxel of rank u of the lung's projection, inside the slice.

    The middle, where there is no lung.
    """
    lung = np.flatnonzero(mask.any(0).cpu().numpy())
    rank = min(int(u * len(lung)), len(lung) - 1)
    centre = divmod(int(lung[rank]), mask.shape[2]) if len(lung) else [n // 2 for n in mask.shape[1:]]
    y, x = (
        min(max(c - size // 2, 0), n - size) for c, size, n in zip(centre, sizes, mask.shape[1:], strict=True)
    )
    return slice(y, y + sizes[0]), slice(x, x + sizes[1])


class Batches:
    """The batches of a run, made where they are made best.

    Pairs of the CPU come ready from a background thread, while the network trains: the kernels release the
    GIL. Pairs of a CUDA device are made in line, on the stream that trains; a background thread reads their
    slabs where the volumes are not on the device.

    Parameters
    ----------
    stream : Stream
        Makes them.
    steps : range
        Which ones, in order.
    """

    def __init__(self, stream: Stream, steps: range) -> None:
        self.waited = 0.0
        """Seconds spent waiting for the background thread."""
        self._stream, self._steps = stream, steps
        self._thread = ThreadPoolExecutor(1, "normnet-pairs")

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in order; an error of the thread is raised here."""
        stream = self._stream
        if stream.device.type == "cpu":
            yield from self._ahead(stream.batch)
        elif isinstance(stream, PairStream) and not stream.resident:
            yield from map(stream.pairs, self._ahead(stream.slabs))
        else:
            yield from map(stream.batch, self._steps)

    def close(self) -> None:
        """Stop the background thread, if there is one."""
        self._thread.shutdown(cancel_futures=True)

    def _ahead(self, make: Callable[[int], Item]) -> Iterator[Item]:
        """Yield what a background thread makes of each step."""
        steps = iter(self._steps)
        waiting: deque[Future[Item]] = deque(self._thread.submit(make, step) for step in islice(steps, AHEAD))
        while waiting:
            start = time.perf_counter()
            item = waiting.popleft().result()
            self.waited += time.perf_counter() - start
            waiting.extend(self._thread.submit(make, step) for step in islice(steps, 1))
            yield item
