"""Memory of a device between renderings: taken once, grown when a batch needs more, given back on request."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lesionsynth.config import Range
from lesionsynth.cuda.device import Buffer, Bytes, Mark, Turns
from lesionsynth.cuda.records import STATUS

MOST_SLOTS = 16
"""Batches under way on a device before the host waits for the first."""
STATUS_BYTES = 64
"""Bytes for `STATUS`, a cache line."""
GENEROUS = 2**25
"""Bytes from which a first request is taken at its word."""


RULES = {
    "empty_mask": "lung_mask must contain at least one voxel, got an empty mask",
    "mask_not_binary": "lung_mask must be binary (bool, or 0 and 1), got another value",
    "image_outside_range": "image must be finite and in {bounds}, got a voxel that is not",
    "lattice_too_large": "warp_correlation must need no lattice of more than 2**25 nodes, got one that does",
}
"""What the device finds wrong, in words."""


@dataclass(eq=False)
class Findings:
    """What the device found wrong with a batch, which its slot and its pair share; told by either."""

    mark: Mark
    """Behind the batch."""
    samples: tuple[int, ...]
    """Its sample indices."""
    ranges: tuple[Range, ...]
    """Ranges of values of its images, each once."""
    allow_empty: bool
    """Whether an item without lung is no error."""
    status: npt.NDArray[np.uint32] | None
    """Where the device tells it, another batch's once it was read."""
    found: tuple[str, ...] | None = None
    """Names; None until they are read."""

    def wait(self) -> None:
        """Wait for the device, and read what it found; a wait that was torn off is done again."""
        if self.found is not None:
            return
        assert self.status is not None
        if not self.mark.done():
            self.mark.wait()
        found = (name for name, word in zip(STATUS, self.status.tolist(), strict=True) if word)
        self.found = tuple(name for name in found if not (self.allow_empty and name == "empty_mask"))
        self.status = None

    def check(self, when: str = "") -> None:
        """Raise what was found wrong."""
        if self.found:
            bounds = " or ".join(f"[{low:.9g}, {high:.9g}]" for low, high in self.ranges)
            rules = "; ".join(RULES[name].format(bounds=bounds) for name in self.found)
            raise ValueError(f"{rules} (samples {', '.join(map(str, self.samples))}){when}")


@dataclass(eq=False)
class Slot:
    """Page-locked memory of one batch under way: what the device found wrong, then what goes up."""

    pointer: int
    array: Bytes
    findings: Findings | None = None
    """Of the last batch, if it was launched."""

    @property
    def status(self) -> npt.NDArray[np.uint32]:
        """Words that the device writes."""
        return self.array[: 4 * len(STATUS)].view(np.uint32)


@dataclass
class Workspace:
    """Buffers of one device by purpose, and its slots."""

    turns: Turns
    buffers: dict[str, Buffer] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    """The one that was used longest ago comes first."""
    mark: Mark | None = None
    """Behind all that uses the buffers."""
    _parts: list[tuple[int, Bytes]] = field(default_factory=list)
    """Page-locked memory that no slot has yet, all of one size."""

    def reserve(self, purpose: str, nbytes: int) -> Buffer:
        """Return a buffer of at least `nbytes`, the one from last time where it is large enough."""
        held = self.buffers.get(purpose)
        if held is None or held.nbytes < nbytes:
            if held is not None:  # what was launched up to here, on whichever stream, may still use it
                self.turns.keep(held)
            # Half as much again, so that slightly larger batches do not move it.
            spare = nbytes // 2 if held is not None or nbytes < GENEROUS else 0
            held = self.buffers[purpose] = self.turns.device.allocate(max(nbytes + spare, 256))
        return held

    def slot(self) -> Slot:
        """Return a slot that no batch under way uses; `widen` gives it room.

        Raises
        ------
        ValueError
            Its last batch was wrong, and nobody asked.
        """
        if not self.slots:
            self.slots = [Slot(0, np.zeros(STATUS_BYTES, dtype=np.uint8)) for _ in range(MOST_SLOTS)]
        # Those that were used come first, so that what was found wrong is told soon.
        slot = next((s for s in self.slots if s.findings and s.findings.mark.done()), None)
        slot = slot or next((s for s in self.slots if s.findings is None), self.slots[0])
        self.slots[:] = [*(s for s in self.slots if s is not slot), slot]  # at once: a call may be torn off
        last = slot.findings
        if last is not None and last.found is None:
            last.wait()  # where the host is sixteen batches ahead
            last.check(", in an earlier call")
        slot.findings = None
        slot.status[:] = 0
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
            pinned = self.turns.device.pinned(MOST_SLOTS * room)
            starts = range(0, MOST_SLOTS * room, room)
            self._parts = [(pinned.pointer + at, pinned.array[at : at + room]) for at in starts]
        slot.pointer, slot.array = self._parts.pop()

    def report(self) -> dict[str, int]:
        """Bytes of the device that are held, by purpose."""
        return {purpose: buffer.nbytes for purpose, buffer in self.buffers.items()}
