"""Healthy volumes to train on: of a store or the phantom; on the training device, in memory or on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

import lesionsynth as ls
from normnet.device import free_memory
from normnet.inflation import inflate, inflation_factor
from normnet.prepare.store import Case, Store

PHANTOM_SEED = 1000
"""First seed of training phantoms: run r takes PHANTOM_SEED + 100 r onwards. Below it are evaluation's."""
VOXEL_BYTES = 3
"""A kept voxel: HU in int16, and its mask."""
ROOM = 2
"""Volumes are kept where so many times their size is free: networks and pairs need the rest."""

Array = Any
"""A NumPy array, or a torch tensor on the training device."""
Place = Literal["device", "memory", "disk"]


class Volume(Protocol):
    """One healthy volume, read slab by slab."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size (z, y, x) in mm."""

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Runs of usable slices (first, after last)."""

    @property
    def mask_counts(self) -> npt.NDArray[np.int64]:
        """Lung voxels of every slice."""

    def slab(self, z0: int, z1: int) -> tuple[Array, Array]:
        """HU (int16) and lung mask (bool) of slices z0 <= z < z1."""


@dataclass(frozen=True, eq=False)
class KeptVolume:
    """A volume in main memory (NumPy) or on a device (torch)."""

    name: str
    hu: Array
    mask: Array
    spacing: tuple[float, float, float]
    segments: list[tuple[int, int]]
    mask_counts: npt.NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""
        z, y, x = self.hu.shape
        return int(z), int(y), int(x)

    def slab(self, z0: int, z1: int) -> tuple[Array, Array]:
        """Return views of slices z0 <= z < z1."""
        return self.hu[z0:z1], self.mask[z0:z1]


@dataclass(frozen=True, eq=False)
class StoreVolume:
    """A case of a store, read from disk slab by slab."""

    case: Case

    @property
    def name(self) -> str:
        """Case name."""
        return self.case.case_id

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""
        return self.case.shape

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size (z, y, x) in mm."""
        return self.case.spacing

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Runs of slices without exclusions."""
        return self.case.segments

    @property
    def mask_counts(self) -> npt.NDArray[np.int64]:
        """Lung voxels of every slice."""
        return self.case.mask_counts

    def slab(self, z0: int, z1: int) -> tuple[Array, Array]:
        """Read slices z0 <= z < z1."""
        return self.case.slab(z0, z1)


@dataclass(frozen=True, eq=False)
class InflatedVolume:
    """A volume whose lungs are scaled to another inflation as they are read."""

    volume: Volume
    factor: float
    """See `normnet.inflation.inflate`."""

    @property
    def name(self) -> str:
        """That of the volume."""
        return self.volume.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""
        return self.volume.shape

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size (z, y, x) in mm."""
        return self.volume.spacing

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Runs of usable slices (first, after last)."""
        return self.volume.segments

    @property
    def mask_counts(self) -> npt.NDArray[np.int64]:
        """Lung voxels of every slice."""
        return self.volume.mask_counts

    def slab(self, z0: int, z1: int) -> tuple[Array, Array]:
        """Read slices z0 <= z < z1."""
        hu, mask = self.volume.slab(z0, z1)
        return inflate(hu, mask, self.factor), mask


def inflated(volume: Volume, inflation_hu: float) -> Volume:
    """Return a volume whose healthy lung is brought to `inflation_hu`."""
    return InflatedVolume(volume, inflation_factor(*volume.slab(0, volume.shape[0]), inflation_hu))


def phantom_volumes(
    count: int, seed: int, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> list[Volume]:
    """Draw healthy phantoms for the training run `seed`."""
    volumes: list[Volume] = []
    for k in range(PHANTOM_SEED + 100 * seed, PHANTOM_SEED + 100 * seed + count):
        chest = ls.phantom.chest_ct(shape=shape, spacing=spacing, seed=k)
        counts = np.count_nonzero(chest.lung_mask, axis=(1, 2)).astype(np.int64)
        whole = [(0, shape[0])]
        volumes.append(KeptVolume(f"phantom{k}", chest.hu, chest.lung_mask, spacing, whole, counts))
    return volumes


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
    return [StoreVolume(store[name]) for name in store.case_ids]


def keep(volumes: Sequence[Volume], place: Place, device: torch.device) -> list[Volume]:
    """Copy volumes to where they shall be kept.

    Parameters
    ----------
    volumes : sequence of Volume
        As opened or drawn.
    place : {"device", "memory", "disk"}
        From `choose_place`; "disk" leaves them as they are.
    device : torch.device
        The training device.

    Returns
    -------
    list of Volume
    """
    if place == "disk":
        return list(volumes)
    kept: list[Volume] = []
    for volume in volumes:
        hu, mask = volume.slab(0, volume.shape[0])
        if place == "device":
            hu, mask = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (hu, mask))
        kept.append(KeptVolume(volume.name, hu, mask, volume.spacing, volume.segments, volume.mask_counts))
    return kept


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
    if cache == "disk" or (cache == "memory" and device.type == "cuda"):
        return "disk" if cache == "disk" else "memory"
    needed = ROOM * VOXEL_BYTES * sum(int(np.prod(v.shape)) for v in volumes)
    if device.type == "cuda" and (cache == "device" or needed < free_memory(device)):
        return "device"
    if cache != "auto" or needed < free_memory(torch.device("cpu")) // processes:
        return "memory"
    return "disk"


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
    total = _running(volume)
    return [
        z
        for first, stop in volume.segments
        for z in range(first, stop - slab + 1)
        if total[z + slab] > total[z]
    ]


def slab_voxels(volume: Volume, slab: int) -> npt.NDArray[np.int64]:
    """Lung voxels of the slab that starts at each slice, (Z - slab + 1,)."""
    total = _running(volume)
    return np.asarray(total[slab:] - total[:-slab])


def largest_slab(volumes: Sequence[Volume], slab: int) -> int:
    """Lung voxels of the largest slab: the denominator of λ (PAPER.md III-C.1)."""
    return max(
        (int(slab_voxels(v, slab)[starts].max()) for v in volumes if (starts := slab_starts(v, slab))),
        default=0,
    )


def _running(volume: Volume) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(volume.mask_counts)])
