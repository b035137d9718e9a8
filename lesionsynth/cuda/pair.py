"""What became of the blobs of a batch: in the workspace, or in memory of its own once that moves on."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lesionsynth.config import Range
from lesionsynth.cuda.device import Buffer, Mark
from lesionsynth.cuda.records import ITEM, STATE
from lesionsynth.cuda.table import Table
from lesionsynth.cuda.workspace import Slot
from lesionsynth.plan import Component

if TYPE_CHECKING:
    from lesionsynth.cuda.render import Renderer

FIXED_POINT = 2.0**26
"""Unit of the sums of b2, as in `lesionsynth.cpu.texture`."""

RULES = {
    "empty_mask": "lung_mask must contain at least one voxel, got an empty mask",
    "mask_not_binary": "lung_mask must be binary (bool, or 0 and 1), got another value",
    "image_outside_range": "image must be finite and in {bounds}, got a voxel that is not",
    "lattice_too_large": "warp_correlation must need no lattice of more than 2**25 nodes, got one that does",
}
"""What the device finds wrong, in words."""


def explain(found: Sequence[str], samples: Sequence[int], ranges: Sequence[Range]) -> str:
    """Say what was wrong with a batch of images of these ranges of values."""
    bounds = " or ".join(f"[{low:.9g}, {high:.9g}]" for low, high in ranges)
    rules = [RULES[name].format(bounds=bounds) for name in found]
    return f"{'; '.join(rules)} (samples {', '.join(map(str, samples))})"


class Lesions:
    """The lesions of a batch: told and painted when asked for.

    Parameters
    ----------
    renderer : Renderer
        Whose workspace they are in.
    table : Table
        What went up.
    samples : sequence of int
        Sample indices of the items.
    shape : (3,) ints
        Volume (z, y, x) of an item.
    kind : str
        Type of the image, whose kernels are loaded.
    side : int
        Which of the workspace's tables and bits are theirs.
    slot : Slot
        Where the device tells what it finds wrong.
    """

    def __init__(
        self,
        renderer: Renderer,
        table: Table,
        samples: Sequence[int],
        shape: tuple[int, int, int],
        kind: str,
        side: int,
        slot: Slot,
    ) -> None:
        self._renderer, self._table, self._shape = renderer, table, shape
        self._samples, self._kind = tuple(samples), kind
        space = renderer.workspace
        self._buffers: tuple[Buffer, Buffer] = space.buffers[f"table {side}"], space.buffers[f"bits {side}"]
        self._slot: Slot | None = slot
        self._moved: Mark | None = None  # behind the copies of `move_out`
        self._own = False  # whether the buffers are
        self._found: tuple[str, ...] = ()
        slot.user, slot.samples = weakref.ref(self), self._samples
        self._ranges = slot.ranges

    def check(self) -> None:
        """Wait for the device, and raise what it found wrong with the batch."""
        with self._renderer.lock:
            self._renderer.begin()
            slot = self._slot
            if slot is not None:
                assert slot.mark is not None
                slot.mark.wait()
                self.leave_slot(slot.findings())  # not before: whose wait is torn off is asked again
                slot.forget()
            self._renderer.torn = False
        if self._found:
            raise ValueError(explain(self._found, self._samples, self._ranges))

    def components(self) -> tuple[tuple[Component, ...] | None, ...]:
        """Wait for the device, and tell the lesions of each item; None where there was no lung.

        Raises
        ------
        ValueError
            A mask was empty or not binary, or a voxel of an image was NaN, infinite or outside the plan's
            range of values.
        """
        self.check()
        first, _, states_at, parents, taps = self._table.offsets[:5]
        with self._renderer.lock:
            self._renderer.begin()
            if self._moved is not None:
                self._renderer.device.follow(self._moved)
            down = self._renderer.device.download(self._buffers[0].pointer + first, taps - first)
            self._renderer.torn = False
        n = len(self._table.blobs)
        items = down[: self._table.items.nbytes].view(ITEM)
        states = down[states_at - first :][: n * STATE.itemsize].view(STATE)
        roots = down[parents - first :][: 4 * n].view(np.int32)
        return tuple(
            _components(self._table, k, states, roots) if voxels else None
            for k, voxels in enumerate(items["lung_voxels"].tolist())
        )

    def paint(self, labels: int) -> None:
        """Write the labels of all items, int32, to device memory, in the order of the caller's stream."""
        self.check()
        renderer, device = self._renderer, self._renderer.device
        voxels, items = int(np.prod(self._shape, dtype=np.int64)), len(self._table.items)
        grid = device.processors * 8
        with renderer.lock:
            renderer.begin()
            if renderer.workspace.mark is not None:
                device.follow(renderer.workspace.mark)
            renderer.launch(self._kind, "clear_words", grid, np.uint64(labels), np.int64(items * voxels))
            if self._table.tasks:
                table = np.uint64(self._buffers[0].pointer)
                renderer.launch(self._kind, "paint_labels", grid, table, np.uint64(labels))
            renderer.workspace.mark = device.mark()
            renderer.workspace.keep(renderer.workspace.mark, *self._buffers)
            renderer.torn = False

    def leave_slot(self, found: tuple[str, ...]) -> None:
        """Remember what the device found wrong; the slot is another batch's from now on."""
        self._slot, self._found = None, found

    def move_out(self) -> None:
        """Copy what painting and telling need; the workspace is another batch's from now on."""
        if self._own:  # a call was torn off behind this
            return
        device, (table, bits) = self._renderer.device, self._buffers
        own = device.allocate(self._table.size), device.allocate(max(self._table.room.bits, 1))
        device.copy(own[0].pointer, table.pointer, self._table.size)
        device.copy(own[1].pointer, bits.pointer, self._table.room.bits)
        moved = np.uint64(own[0].pointer), np.int64(own[0].pointer - table.pointer), np.uint64(own[1].pointer)
        self._renderer.launch(self._kind, "move_table", 1, *moved)
        self._buffers, self._own = own, True
        # Of the workspace too: the batch that wants the place may still be refused, and leave no mark itself.
        self._moved = self._renderer.workspace.mark = device.mark()


def _components(
    table: Table, item: int, states: npt.NDArray[Any], roots: npt.NDArray[np.int32]
) -> tuple[Component, ...]:
    """Tell the lesions of one item, in the order of their labels."""
    record = table.items[item]
    first, n = int(record["first_blob"]), int(record["blobs"])
    found = []
    for root in range(first, first + n):
        state = states[root]
        if state["label"] == 0:
            continue
        blobs = [b for b in range(first, first + n) if roots[b] == root and states[b]["high"][0] >= 0]
        passing, total = int(state["passing"]), int(state["total"])
        mean = total / FIXED_POINT / passing if passing else float(record["threshold"])
        (z0, y0, x0), (z1, y1, x1) = state["lesion_low"].tolist(), (state["lesion_high"] + 1).tolist()
        found.append(
            Component(
                label=int(state["label"]),
                blobs=tuple(b - first for b in blobs),
                box=((z0, z1), (y0, y1), (x0, x1)),
                voxels=int(state["voxels"]),
                beta=float(table.blobs[root]["mu0"]) / mean,
                beta_fallback=passing == 0,
                changed=int(state["changed"]),
            )
        )
    return tuple(found)
