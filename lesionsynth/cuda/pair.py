"""What became of the blobs of a batch, in memory of its own: told and painted when asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.cuda.device import Buffer, Turns
from lesionsynth.cuda.records import ITEM, STATE
from lesionsynth.cuda.table import Table
from lesionsynth.cuda.workspace import Findings
from lesionsynth.plan import Component

FIXED_POINT = 2.0**26
"""Unit of the sums of b2, as in `lesionsynth.cpu.texture`."""


class DeviceLesions:
    """The lesions of a batch: told and painted when asked for.

    Parameters
    ----------
    turns : Turns
        On the device.
    table : Table
        What went up.
    copied : Buffer
        What it became, with the bits of its blobs; theirs alone.
    findings : Findings
        What the device finds wrong; behind its mark, `copied` is written.
    shape : (3,) ints
        Volume (z, y, x) of an item.
    kind : str
        Type of the image, whose kernels are loaded.
    """

    def __init__(
        self,
        turns: Turns,
        table: Table,
        copied: Buffer,
        findings: Findings,
        shape: tuple[int, int, int],
        kind: str,
    ) -> None:
        self._turns, self._table, self._copied, self._findings = turns, table, copied, findings
        self._shape, self._kind = shape, kind

    def check(self) -> None:
        """Wait for the device, and raise what it found wrong with the batch."""
        with self._turns.lock:
            self._turns.begin()
            self._findings.wait()
            self._turns.end()
        self._findings.check()

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
        with self._turns.lock:
            self._turns.begin()
            down = self._turns.device.download(self._copied.pointer + first, taps - first)
            self._turns.end()
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
        device = self._turns.device
        words = len(self._table.items) * int(np.prod(self._shape, dtype=np.int64))
        grid = device.processors * 8
        with self._turns.lock:
            self._turns.begin()
            self._turns.keep(self._copied)
            device.launch("generator", self._kind, "clear_words", grid, np.uint64(labels), np.int64(words))
            if self._table.tasks:
                table = np.uint64(self._copied.pointer + self._table.offsets[5])
                device.launch("generator", self._kind, "paint_labels", grid, table, np.uint64(labels))
            self._turns.mark()
            self._turns.end()


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
