"""Render a batch: one table up, twelve launches around a copy, nothing down. Read `_launch_all` downwards.

What one kernel leaves for the next is described in `lesionsynth.cuda.records`; which module of
`lesionsynth.cpu` each is the twin of, at the head of its file in ``kernels/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.config import Range
from lesionsynth.cuda.device import Device, Turns
from lesionsynth.cuda.pair import DeviceLesions
from lesionsynth.cuda.records import BATCH
from lesionsynth.cuda.table import WORD, Levels, Table, build
from lesionsynth.cuda.workspace import STATUS_BYTES, Findings, Workspace
from lesionsynth.plan import LesionPlan

FIELD_SHARE = 8
"""The fields of a batch get a volume for every so many items. With the paper's settings the boxes of a pair's
lesions fill 6 % of a volume on average and 15 % at most in 2,000 pairs (32 x 512 x 512, phantom lungs)."""
LEAST_FIELD = 2**20
"""Voxels of a field, at least, for small volumes that lesions fill many times over."""
BLOCKS_OF_TILES = 4
"""Blocks a multiprocessor for kernels that filter: what 228 KiB of shared memory hold."""
BLOCKS_OF_ROWS = 8
"""The same for kernels that hold little: 2048 threads."""
BLOCKS_OF_COPY = 2
"""The same for the copy, which leaves room for the kernels that it runs beside: 512 threads with four reads
of sixteen bytes each under way are 32 KiB, what a multiprocessor needs at 3 TB/s and 1 µs of latency."""


@dataclass(frozen=True)
class View:
    """An image, a mask or a result on the device."""

    pointer: int
    shape: tuple[int, ...]
    """(b, z, y, x)."""
    strides: tuple[int, ...]
    """Elements."""
    kind: str
    """Name of the dtype."""


@dataclass(frozen=True)
class Job:
    """The arguments of a rendering; results are C-contiguous."""

    image: View
    mask: View
    out: View
    target: View

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x)."""
        _, z, y, x = self.image.shape
        return z, y, x

    @property
    def padded(self) -> int:
        """Voxels of a field as large as an item: rows are whole eights."""
        z, y, x = self.shape
        return z * y * (-(-x // 8) * 8)


class Renderer:
    """Renders on one device; batches follow each other, whatever streams they come from.

    Parameters
    ----------
    device : Device
        Where.
    plain : bool
        Use the slow kernels, for tests: the same bits.
    """

    def __init__(self, device: Device, *, plain: bool = False) -> None:
        self.device = device
        self.plain = plain
        self.turns = Turns(device)
        self.workspace = Workspace(self.turns)

    def render(
        self, plans: Sequence[LesionPlan], job: Job, hu_range: Range, *, allow_empty: bool = False
    ) -> DeviceLesions:
        """Launch a batch on the caller's stream; nothing is waited for.

        An item without lung is wrong, unless `allow_empty`: it then gets no lesion.

        Raises
        ------
        ValueError
            An earlier batch, of which nobody asked for the plan or the labels, was wrong.
        """
        levels = [levels_of(plan, job.image.kind) for plan in plans]
        table = build(plans, job.shape, levels)
        with self.turns.lock:
            self.turns.begin()
            space, kind = self.workspace, job.image.kind
            if space.mark is not None:
                self.device.follow(space.mark)
            slot = space.slot()
            space.widen(slot, table.size)
            base = space.reserve("table", table.nbytes).pointer
            own = self.device.allocate(table.nbytes)
            header = self._header(table, job, hu_range, slot.pointer)
            table.write(slot.array[STATUS_BYTES:], header, base, own.pointer)
            self.device.upload(base, slot.pointer + STATUS_BYTES, table.size)
            self._launch_batch(base, kind, len(plans), table.tasks > 0, table.soft)
            self.device.copy(own.pointer, base, table.nbytes)  # the workspace is the next batch's
            space.mark = mark = self.turns.mark()
            samples = tuple(plan.index for plan in plans)
            ranges = tuple(dict.fromkeys(plan.value_range for plan in plans))
            slot.findings = Findings(mark, samples, ranges, allow_empty, slot.status)
            lesions = DeviceLesions(self.turns, table, own, slot.findings, job.shape, kind)
            self.turns.end()
        return lesions

    def release(self) -> None:
        """Give all memory back; pairs have their own."""
        with self.turns.lock:
            self.turns.begin()
            if self.workspace.mark is not None:
                self.workspace.mark.wait()
            self.turns.drop()
            self.workspace.buffers.clear()
            self.turns.end()

    def _launch_batch(self, table: int, kind: str, items: int, blobs: bool, soft: bool) -> None:
        """Launch it all, as a graph once the same has been launched before.

        The address of the table, the type and these counts are all that a graph may depend on.
        """
        key = (table, kind, items, blobs, soft)
        self.device.replay(key, lambda: self._launch_all(np.uint64(table), *key[1:]))

    def _launch_all(self, table: np.uint64, kind: str, items: int, blobs: bool, soft: bool) -> None:
        launch = partial(self.device.launch, "generator")
        tiles, rows = (self.device.processors * n for n in (BLOCKS_OF_TILES, BLOCKS_OF_ROWS))
        launch(kind, "read_mask", -(-rows // items) * items, table)
        with self.device.beside():
            launch(kind, "copy_pair", self.device.processors * BLOCKS_OF_COPY, table)
        if blobs:
            launch(kind, "draw_blobs", tiles, table)
            launch(kind, "join_blobs", rows, table)
            launch(kind, "fold_matrices", rows, table)
            for noise in ("noise", "salt"):
                for axis in ("x", "y", "z"):
                    launch(kind, f"{noise}_along_{axis}", tiles, table)
        if soft:
            launch(kind, "edge_in_plane", tiles, table)
        self.device.join()
        if blobs:
            launch(kind, "inject_soft" if soft else "inject", tiles, table)
            launch(kind, "inject_crowded", 1, table)

    def _header(self, table: Table, job: Job, hu_range: Range, status: int) -> npt.NDArray[Any]:
        """Reserve what the batch needs, and fill in where everything is but the table and its bits."""
        z, y, x = job.shape
        items, words, n = job.image.shape[0], -(-x // WORD), len(table.blobs)
        capacity = max(job.padded * max(1, items // FIELD_SHARE), min(job.padded * n, LEAST_FIELD))
        header = np.zeros((), dtype=BATCH)
        for name in ("image", "mask", "out", "target"):
            header[name] = getattr(job, name).pointer
        header["status"] = status
        for name, nbytes in (
            ("lungs", 4 * items * z * y * words), ("rows", 4 * items * z * y), ("field0", 4 * capacity),
            ("field1", 4 * capacity), ("weights", table.room.weights), ("tiles", table.room.tiles),
        ):  # fmt: skip
            header[name] = self.workspace.reserve(name, nbytes).pointer
        header["image_strides"], header["mask_strides"] = job.image.strides, job.mask.strides
        header["capacity"] = capacity
        header["n_items"], header["n_blobs"], header["n_tasks"] = items, n, table.tasks
        header["depth"], header["height"], header["width"], header["row_words"] = z, y, x, words
        header["plain"] = self.plain
        header["hu_low"], header["hu_high"] = hu_range
        return header


def levels_of(plan: LesionPlan, kind: str) -> Levels:
    """Return what a plan compares an image of a type with: the threshold, and the ends of its range."""
    return rounded(plan.threshold, kind), *plan.ends(lambda value: rounded(value, kind))


def rounded(value: float, kind: str) -> float:
    """Return a number as the type of an image holds it; int16 is compared in float32."""
    if kind == "bfloat16":
        bits = int(np.float32(value).view(np.uint32))
        return float(np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32))
    return float(np.dtype("float32" if kind == "int16" else kind).type(value))
