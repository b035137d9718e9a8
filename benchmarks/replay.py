"""A batch by graph replay: its table goes up and its graph is launched, with nothing of Python in between.

What is replayed was captured from ordinary calls; its outputs must be theirs, or there is no figure.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from benchmarks.common import statistics
from benchmarks.device_time import Gate
from benchmarks.gpu_inputs import Inputs, synthesizer
from lesionsynth.cuda import render
from lesionsynth.cuda.backend import CudaBackend
from lesionsynth.cuda.cupy_device import CupyDevice
from lesionsynth.cuda.render import Renderer

Make = Callable[[], tuple[Any, Any]]
TURNS = 4
"""Ordinary calls of every input before the last is kept: buffers grow, then graphs are captured."""
TUNED = {"BLOCKS_OF_COPY": (1, 2, 3, 4)}
"""Constants of `lesionsynth.cuda.render` that are varied, one at a time."""


class NotCapturedError(RuntimeError):
    """Batches were launched kernel by kernel, though graphs were asked for."""


class Recording:
    """Makes a device remember what the last batch sent up, and which graph it was."""

    sent = (0, 0, 0)
    key: Any = None

    def upload(self, pointer: int, source: int, nbytes: int) -> None:
        """See `lesionsynth.cuda.device.Device`."""
        super().upload(pointer, source, nbytes)
        self.sent = pointer, source, nbytes

    def replay(self, key: Any, launches: Callable[[], None]) -> None:
        """See `lesionsynth.cuda.device.Device`."""
        super().replay(key, launches)
        self.key = key


class Recorder(Recording, CupyDevice):
    """The first CUDA device."""


def recorded() -> tuple[Any, Any]:
    """Return a device that records, and a backend that renders on it."""
    device, backend = Recorder(0), CudaBackend()
    backend.renderers[0] = Renderer(device)
    return device, backend


@dataclass(frozen=True)
class Kept:
    """A captured batch."""

    inputs: Inputs
    device: Any
    backend: Any
    """Owns the workspace that the graph works in."""
    graph: Any
    table: Any
    """Page-locked copy of what went up."""
    pointer: int
    """Where it goes."""
    nbytes: int

    def launch(self) -> None:
        """Send the table up, and replay."""
        self.device.upload(self.pointer, self.table.pointer, self.nbytes)
        self.graph.launch()


def keep(sets: Sequence[Inputs], gate: Gate, make: Make | None = None) -> list[Kept]:
    """Render batch k from input k until graphs are replayed, and keep the last of each.

    Raises
    ------
    NotCapturedError
        There are no graphs.
    """
    device, backend = (make or recorded)()
    synth = synthesizer(backend)
    for _ in range(TURNS):
        kept = []
        for number, batch in enumerate(sets):
            batch.render(synth, number)
            kept.append(_kept(batch, device, backend))
    gate.clock.synchronize()
    if not all(hasattr(one.graph, "launch") for one in kept):
        raise NotCapturedError(f"no graph was captured in {TURNS} calls of each batch")
    return kept


def _kept(batch: Inputs, device: Any, backend: Any) -> Kept:
    pointer, source, nbytes = device.sent
    table = device.pinned(nbytes)
    ctypes.memmove(table.pointer, source, nbytes)
    return Kept(batch, device, backend, device._graphs.get(device.key), table, pointer, nbytes)


def ordinary(sets: Sequence[Inputs], gate: Gate, backend: Any = None) -> list[tuple[Any, Any]]:
    """Render batch k from input k by single launches, and return the pairs."""
    synth = synthesizer(backend or CudaBackend(graphs=False))
    found = []
    for number, batch in enumerate(sets):
        batch.poison()
        batch.render(synth, number)
        found.append(batch.copies())
    gate.clock.synchronize()  # the workspace, with memory that the device reads, goes
    return found


def replay_times(kept: Sequence[Kept], want: Sequence[tuple[Any, Any]], gate: Gate, rounds: int) -> Any:
    """Time replays of the batches in turn, and refuse the figure where their outputs are not `want`.

    Returns
    -------
    dict
        As `Gate.times`, and ``digest`` of the first batch's pairs; or ``error``.
    """
    for one in kept:
        one.inputs.poison()
    found = gate.times(lambda number: kept[number % len(kept)].launch(), rounds)
    wrong = [k for k, (one, pair) in enumerate(zip(kept, want, strict=True)) if not one.inputs.holds(pair)]
    seen = {"digest": digest(*kept[0].inputs.out)}
    if wrong:
        return seen | {"error": f"refused: replays of batches {wrong} differ from the ordinary call"}
    return seen | found


def replays(sets: Sequence[Inputs], gate: Gate, rounds: int) -> dict[str, Any]:
    """Time replays of batches on the device, and what launching one takes the host."""
    want = ordinary(sets, gate)
    try:
        kept = keep(sets, gate)
    except NotCapturedError as error:
        return {"device": {"error": str(error)}, "host": {}}
    device = replay_times(kept, want, gate, rounds)
    host = [gate.host_s(lambda k: kept[k % len(kept)].launch(), 1) for _ in range(rounds)]
    gate.clock.synchronize()
    return {"device": device, "host": statistics(host)}


def tuning(
    sets: Sequence[Inputs],
    want: Sequence[tuple[Any, Any]],
    gate: Gate,
    rounds: int,
    make: Make | None = None,
) -> dict[str, Any]:
    """Time replays with other numbers of blocks; the digest of each must be the same.

    Returns
    -------
    dict
        ``constants`` as they are, and an entry of `replay_times` for every other value, such as
        ``BLOCKS_OF_COPY=3``.
    """
    found: dict[str, Any] = {"constants": {name: getattr(render, name) for name in TUNED}, "variants": {}}
    for name, values in TUNED.items():
        usual = getattr(render, name)
        for value in values:
            setattr(render, name, value)
            try:
                entry = replay_times(keep(sets, gate, make), want, gate, rounds)
            except NotCapturedError as error:
                entry = {"error": str(error)}
            finally:
                setattr(render, name, usual)
            found["variants"][f"{name}={value}"] = entry
    return found


def digest(image: Any, target: Any) -> str:
    """Hash the bits of a pair, position by position; the same for NumPy and CuPy arrays."""
    total = 0
    for array, kind in ((image, np.uint32), (target, np.uint8)):
        for item in array:
            xp = np if isinstance(item, np.ndarray) else cupy
            bits = xp.ascontiguousarray(item).view(kind).reshape(-1).astype(np.uint64)
            weights = xp.arange(bits.size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            total = (31 * total + int((bits * weights).sum(dtype=np.uint64))) % 2**64
    return f"{total:016x}"
