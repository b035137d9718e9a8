"""Memory of a device between renderings: taken once, grown when a batch needs more, given back on request."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lesionsynth.config import Range
from lesionsynth.cuda.device import Buffer, Bytes, Device, Mark
from lesionsynth.cuda.records import STATUS

MOST_SLOTS = 16
"""Batches under way on a device before the host waits for the first."""
STATUS_BYTES = 64
"""Bytes for `STATUS`, a cache line."""
GENEROUS = 2**25
"""Bytes from which a first request is taken at its word."""


@dataclass(eq=False)
class Slot:
    """Page-locked memory of one batch under way: what the device found wrong, then what goes up."""

    pointer: int
    array: Bytes
    mark: Mark | None = None
    """Behind its last use."""
    user: weakref.ref[Any] | None = None
    """The `Lesions` of that batch."""
    samples: tuple[int, ...] = ()
    """Its sample indices."""
    ranges: tuple[Range, ...] = ()
    """Ranges of values of its images, each once."""
    allow_empty: bool = False
    """Whether an item without lung is no error."""

    def findings(self) -> tuple[str, ...]:
        """Names of what the device found wrong, until `forget`."""
        status = self.array[: 4 * len(STATUS)].view(np.uint32)
        found = tuple(name for name, word in zip(STATUS, status.tolist(), strict=True) if word)
        return tuple(name for name in found if not (self.allow_empty and name == "empty_mask"))

    def forget(self) -> None:
        """Forget what the device found wrong, and for whom: it was told."""
        self.user = None
        self.array[: 4 * len(STATUS)] = 0


@dataclass
class Workspace:
    """Buffers of one device by purpose, and its slots."""

    device: Device
    buffers: dict[str, Buffer] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    """The one that was used longest ago comes first."""
    mark: Mark | None = None
    """Behind all that uses the buffers: rendering, painting, moving out."""
    kept: list[tuple[Mark, tuple[Buffer, ...]]] = field(default_factory=list)
    """See `keep`."""
    _parts: list[tuple[int, Bytes]] = field(default_factory=list)
    """Page-locked memory that no slot has yet, all of one size."""

    def reserve(self, purpose: str, nbytes: int) -> Buffer:
        """Return a buffer of at least `nbytes`, the one from last time where it is large enough."""
        held = self.buffers.get(purpose)
        if held is None or held.nbytes < nbytes:
            if held is not None:  # what was launched up to here, on whichever stream, may still use it
                self.keep(self.device.mark(), held)
            # Half as much again, so that slightly larger batches do not move it.
            spare = nbytes // 2 if held is not None or nbytes < GENEROUS else 0
            held = self.buffers[purpose] = self.device.allocate(max(nbytes + spare, 256))
        return held

    def slot(self) -> Slot:
        """Return a slot that no batch under way uses; `widen` gives it room."""
        if not self.slots:
            self.slots = [Slot(0, np.zeros(STATUS_BYTES, dtype=np.uint8)) for _ in range(MOST_SLOTS)]
        # Those that were used come first, so that what was found wrong is told soon.
        slot = next((s for s in self.slots if s.mark is not None and s.mark.done()), None)
        slot = slot or next((s for s in self.slots if s.mark is None), None)
        if slot is None:
            slot = self.slots[0]
            assert slot.mark is not None
            slot.mark.wait()  # the host is sixteen batches ahead
        self.slots[:] = [*(s for s in self.slots if s is not slot), slot]  # at once: a call may be torn off
        return slot

    def widen(self, slot: Slot, nbytes: int) -> None:
        """Make room for `nbytes` behind the status of a slot, whose findings were told.

        Page-locked memory takes long to get, and may stop the device: it is taken at once for all slots. A
        slot moves there when it is next used.
        """
        nbytes = -(-(STATUS_BYTES + nbytes) // STATUS_BYTES) * STATUS_BYTES
        if slot.array.size >= nbytes:
            return
        if not self._parts or self._parts[0][1].size < nbytes:
            room = -(-nbytes * 3 // 2 // STATUS_BYTES) * STATUS_BYTES
            pinned = self.device.pinned(MOST_SLOTS * room)
            starts = range(0, MOST_SLOTS * room, room)
            self._parts = [(pinned.pointer + at, pinned.array[at : at + room]) for at in starts]
        slot.pointer, slot.array = self._parts.pop()

    def keep(self, mark: Mark, *buffers: Buffer) -> None:
        """Hold buffers until the device has passed a mark: a stream other than theirs may use them last."""
        self.kept = [held for held in self.kept if not held[0].done()]
        self.kept.append((mark, buffers))

    def report(self) -> dict[str, int]:
        """Bytes of the device that are held, by purpose."""
        return {purpose: buffer.nbytes for purpose, buffer in self.buffers.items()}
