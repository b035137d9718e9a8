"""Memory of a device between renderings: taken once, grown when a batch needs more, given back on request."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lesionsynth.cuda._device import Buffer, Device, Mark, Pinned
from lesionsynth.cuda.records import STATUS

MOST_SLOTS = 16
"""Batches under way on a device before the host waits for the first."""
STATUS_BYTES = 64
"""Bytes for `STATUS`, a cache line."""
GENEROUS = 2**25
"""Bytes from which a first request is taken at its word."""


@dataclass
class Slot:
    """Page-locked memory of one batch under way: what the device found wrong, then what goes up."""

    pinned: Pinned
    mark: Mark | None = None
    """Behind its last use."""
    user: weakref.ref[Any] | None = None
    """The `Lesions` of that batch."""
    samples: tuple[int, ...] = ()
    """Its sample indices."""

    def findings(self) -> tuple[str, ...]:
        """Names of what the device found wrong, told once."""
        status = self.pinned.array[: 4 * len(STATUS)].view(np.uint32)
        found = tuple(name for name, word in zip(STATUS, status.tolist(), strict=True) if word)
        status[:] = 0
        return found


@dataclass
class Workspace:
    """Buffers of one device by purpose, and its slots."""

    device: Device
    buffers: dict[str, Buffer] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    mark: Mark | None = None
    """Behind the last rendering."""
    kept: list[tuple[Mark, tuple[Buffer, ...]]] = field(default_factory=list)
    """See `keep`."""

    def reserve(self, purpose: str, nbytes: int) -> Buffer:
        """Return a buffer of at least `nbytes`, the one from last time where it is large enough."""
        held = self.buffers.get(purpose)
        if held is None or held.nbytes < nbytes:
            if held is not None and self.mark is not None:
                self.mark.wait()  # the old buffer may go to another stream once it is let go
            # Half as much again, so that slightly larger batches do not move it.
            spare = nbytes // 2 if held is not None or nbytes < GENEROUS else 0
            held = self.buffers[purpose] = self.device.allocate(max(nbytes + spare, 256))
        return held

    def slot(self, nbytes: int) -> Slot:
        """Return page-locked memory that no batch under way uses; a new one has room for `nbytes`."""
        slot = next((s for s in self.slots if s.mark is None or s.mark.done()), None)
        if slot is None and len(self.slots) == MOST_SLOTS:
            slot = self.slots[0]
            assert slot.mark is not None
            slot.mark.wait()  # the host is sixteen batches ahead
        if slot is None:
            slot = Slot(self.device.pinned(STATUS_BYTES + nbytes * 3 // 2))
        else:
            self.slots.remove(slot)
        self.slots.append(slot)
        return slot

    def widen(self, slot: Slot, nbytes: int) -> None:
        """Make room for `nbytes` behind the status of a slot."""
        if slot.pinned.array.size < STATUS_BYTES + nbytes:
            slot.pinned = self.device.pinned(STATUS_BYTES + nbytes * 3 // 2)

    def keep(self, mark: Mark, *buffers: Buffer) -> None:
        """Hold buffers until the device has passed a mark: a stream other than theirs may use them last."""
        self.kept = [held for held in self.kept if not held[0].done()]
        self.kept.append((mark, buffers))

    def report(self) -> dict[str, int]:
        """Bytes of the device that are held, by purpose."""
        return {purpose: buffer.nbytes for purpose, buffer in self.buffers.items()}
