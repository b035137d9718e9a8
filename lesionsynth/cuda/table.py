"""Fill the table that goes up: everything the host knows of a batch, and the room that its stages need.

The host knows the blobs, not where they will lie, so every size here is an upper bound that holds wherever
the blobs are placed. Nothing ever comes down to size anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.config import MODES
from lesionsynth.cpu.engine.lines import PAIRS, taps_of
from lesionsynth.cpu.shapes import SURFACE, work_out
from lesionsynth.cuda.records import AXES, BATCH, BLOB, ITEM, NOTHING, STAGES, STATE
from lesionsynth.plan import LesionPlan
from lesionsynth.sampling import BLOB as DRAWN
from lesionsynth.sampling import extend

FAR = 2**30
"""Reach beyond any volume."""
Levels = tuple[float, float, float]

WORD = 32
"""Voxels of a word."""


@dataclass(frozen=True)
class Room:
    """Bytes that a batch needs, by purpose."""

    bits: int
    weights: int
    tiles: int


@dataclass(frozen=True)
class Table:
    """Records of a batch, ready to be written one after another."""

    items: npt.NDArray[Any]
    blobs: npt.NDArray[Any]
    taps: npt.NDArray[np.float64]
    tasks: int
    """Slices that may hold a blob."""
    room: Room

    @property
    def offsets(self) -> tuple[int, int, int, int, int, int, int]:
        """Where items, blobs, states, parents, taps and a copy's header begin; last, the size of all."""
        n = len(self.blobs)
        sizes = (
            BATCH.itemsize,
            self.items.nbytes,
            self.blobs.nbytes,
            n * STATE.itemsize,
            4 * n,
            self.taps.nbytes,
            BATCH.itemsize,
        )
        starts: list[int] = np.cumsum([-(-size // 16) * 16 for size in sizes]).tolist()
        items, blobs, states, parents, taps, copied, end = starts
        return items, blobs, states, parents, taps, copied, end

    @property
    def size(self) -> int:
        """Bytes that go up."""
        return self.offsets[-1]

    @property
    def nbytes(self) -> int:
        """Bytes on the device, where the blobs' bits follow."""
        return self.size + self.room.bits

    @property
    def soft(self) -> bool:
        """Whether any lesion has a soft edge."""
        return self.tasks > 0 and bool(self.items["edge"].any())

    def write(self, out: npt.NDArray[np.uint8], header: npt.NDArray[Any], base: int, copy: int) -> None:
        """Write header, items, blobs, states as they begin, parents, taps, and the header of a copy.

        A header says where its records and bits are: in the table at `base`, or in its copy at `copy`.
        """
        copied = header.copy()
        for one, address in ((header, base), (copied, copy)):
            names = "items", "blobs", "states", "parents", "taps"
            for name, start in zip((*names, "bits"), (*self.offsets[:5], self.size), strict=True):
                one[name] = address + start
        n = len(self.blobs)
        states = np.zeros(n, dtype=STATE)
        for name in ("low", "lesion_low"):
            states[name] = NOTHING
        for name in ("high", "lesion_high"):
            states[name] = -1
        states["least"] = 0xFFFFFFFF
        parents = np.arange(n, dtype=np.int32)
        parts = header, self.items, self.blobs, states, parents, self.taps, copied
        for start, part in zip((0, *self.offsets), parts, strict=False):
            raw = np.ascontiguousarray(part).view(np.uint8).reshape(-1)
            out[start : start + raw.size] = raw


def build(plans: Sequence[LesionPlan], shape: tuple[int, int, int], levels: Sequence[Levels]) -> Table:
    """Build the table of a batch.

    Parameters
    ----------
    plans : sequence of LesionPlan
        One an item.
    shape : (3,) ints
        Volume (z, y, x) of an item.
    levels : sequence of (3,) floats
        Threshold of each item and the ends of its range, rounded to the type of the image.
    """
    counts = [len(plan.records) for plan in plans]
    # As bytes: NumPy takes its time to see that records of one dtype have one dtype.
    rows = [plan.records.view(np.uint8).reshape(-1, DRAWN.itemsize) for plan in plans]
    drawn = np.concatenate(rows).view(DRAWN).reshape(-1)
    item = np.repeat(np.arange(len(plans)), counts)
    scale = np.array([plan.scale for plan in plans])[item]
    blobs = _blobs(drawn, item, scale)
    slices = np.minimum(2 * blobs["reach"][:, 0].astype(np.int64) + 1, shape[0])
    tasks = _starts(blobs["first_task"], slices)
    words = _starts(blobs["bits"], slices * _row_words(blobs, shape))
    taps = _add_taps(blobs, drawn, scale)
    floats = _starts(blobs["weights"], _matrix_sizes(blobs, shape))
    tiles = STAGES * (len(blobs) + 1) * 8
    return Table(_items(plans, counts, levels), blobs, taps, tasks, Room(4 * words, 4 * floats, tiles))


def _items(plans: Sequence[LesionPlan], counts: Sequence[int], levels: Sequence[Levels]) -> npt.NDArray[Any]:
    items = np.zeros(len(plans), dtype=ITEM)
    items["seed"] = [plan.seed for plan in plans]
    items["sample"] = [plan.index for plan in plans]
    items["connectivity"] = [plan.connectivity for plan in plans]
    items["blobs"] = counts
    items["first_blob"] = np.cumsum([0, *counts[:-1]])
    items["mean_threshold"] = items["threshold"] = [plan.mean_threshold for plan in plans]
    items["scale"] = [plan.scale for plan in plans]
    items["tau"], items["least"], items["most"] = np.array(levels, dtype=np.float64).reshape(-1, 3).T
    items["mode"] = [MODES.index(plan.mode) for plan in plans]
    items["edge"] = [plan.edge for plan in plans]
    low, high = np.array([plan.value_range for plan in plans], dtype=np.float64).reshape(-1, 2).T
    items["low"], items["span"] = low, high - low
    return items


def _blobs(drawn: npt.NDArray[Any], item: Any, scale: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """Shapes and texture parameters; geometry as `lesionsynth.cpu.shapes` rounds it."""
    blobs = extend(drawn, BLOB)
    rotation, axes = work_out(blobs), blobs["semi_axes"]
    blobs["item"] = item
    blobs["center"] = np.minimum(drawn["center"], FAR)
    extent = np.zeros((len(drawn), AXES))
    for j in range(AXES):
        extent += (rotation[:, :, j] * axes[:, None, j]) ** 2
    half = np.sqrt(extent) + blobs["bound"][:, None]
    blobs["reach"] = np.minimum(np.floor(half * SURFACE / scale + 1e-9), FAR)
    return blobs


def _row_words(blobs: npt.NDArray[Any], shape: tuple[int, int, int]) -> npt.NDArray[np.int64]:
    """Words of a slice of each box, at most."""
    reach = blobs["reach"].astype(np.int64)
    rows = np.minimum(2 * reach[:, 1] + 1, shape[1])
    # 2 r + 1 voxels lie in at most this many words, wherever they begin.
    words = np.minimum((2 * reach[:, 2] + WORD - 1) // WORD + 1, -(-shape[2] // WORD))
    return np.asarray(rows * words, dtype=np.int64)


def _add_taps(blobs: npt.NDArray[Any], drawn: npt.NDArray[Any], scale: npt.NDArray[np.float64]) -> Any:
    """Compute the Gaussians of each blob, once where the voxels are cubes; returns all taps."""
    sigmas = np.stack([drawn["sigma_a"], drawn["sigma_b"]], axis=1)[:, :, None] / scale[:, None, :]
    if (scale == scale[:, :1]).all():
        sigmas = sigmas[:, :, :1]
    taps, ends = taps_of(np.ascontiguousarray(sigmas).reshape(-1))
    first = ends[:-1].reshape(sigmas.shape)
    blobs["taps"] = first
    blobs["radius"] = (ends[1:] - ends[:-1] - 1).reshape(first.shape)
    return taps


def _matrix_sizes(blobs: npt.NDArray[Any], shape: tuple[int, int, int]) -> npt.NDArray[np.int64]:
    """Floats of each folded matrix, at most: lines of n <= 2 r voxels, and no longer than the volume."""
    half = np.minimum((np.array(shape) + 1) // 2, blobs["radius"].astype(np.int64))
    return np.asarray(-(-half // PAIRS) * half * 2 * PAIRS, dtype=np.int64)


def _starts(out: npt.NDArray[Any], sizes: npt.NDArray[np.int64]) -> int:
    """Write where each part begins; returns the size of all."""
    ends = np.cumsum(sizes.reshape(-1))
    out[...] = (ends - sizes.reshape(-1)).reshape(out.shape)
    return int(ends[-1]) if len(ends) else 0
