"""Times of whole batches, of each kernel and of a copy on a GPU, each named for what it is.

``device`` is a device time behind a gate (`benchmarks.device_time`), ``host`` what a call takes before it
returns, ``wall`` from the call until the device is done, one call at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks import volumes
from benchmarks.common import median_s, statistics
from benchmarks.device_time import Gate, GateError
from benchmarks.gpu_inputs import Inputs, batch_of, inputs, synthesizer

COPY_BYTES = 2**30
STAGE_CHUNK = 4
"""Batches behind one gate where every kernel has two events: about 180 commands, of the thousand or so that a
device takes before the host waits."""
BATCH = 8
"""The batch that goals speak of."""


def bandwidth(gate: Gate, rounds: int) -> dict[str, Any]:
    """Bytes read and written a second by a copy on the device."""
    import cupy

    source = cupy.arange(COPY_BYTES // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    target = cupy.empty_like(source)
    found = gate.times(lambda _: cupy.copyto(target, source), min(rounds, 30))
    seconds = median_s(found)
    return {"median": None if seconds is None else 2 * COPY_BYTES / seconds, "seconds": found}


def batches(slab: volumes.Volume, n: int, gate: Gate, rounds: int) -> dict[str, Any]:
    """Time batches of `n` into the caller's buffers: as graphs and as single launches, and replays alone.

    Returns
    -------
    dict
        ``graph``, ``graph, same input`` and ``launches`` with ``device``, ``host``, ``wall`` and
        ``pairs_per_second``, the last by the larger of device and host; ``replay`` without ``wall``.
    """
    from benchmarks import replay
    from lesionsynth.cuda.backend import CudaBackend

    sets = inputs(slab, n)
    found: dict[str, Any] = {}
    for name, graphs, turns in (("graph", True, len(sets)), ("graph, same input", True, 1),
                                ("launches", False, len(sets))):  # fmt: skip
        synth = synthesizer(CudaBackend(graphs=graphs))

        def run(number: int, synth: Any = synth, turns: int = turns) -> None:
            sets[number % turns].render(synth, number)

        found[name] = {"device": gate.times(run, rounds), "wall": wall(run, rounds)}
        found[name]["host"] = host(run, rounds)
    found["replay"] = replay.replays(sets, gate, rounds)
    for entry in found.values():
        device, call = median_s(entry["device"]), median_s(entry["host"])
        entry["pairs_per_second"] = None if device is None or call is None else n / max(device, call)
    return found


def tuned(slab: volumes.Volume, gate: Gate, rounds: int) -> dict[str, Any]:
    """Time replays of a batch of `BATCH` with other numbers of blocks."""
    from benchmarks import replay

    sets: list[Inputs] = inputs(slab, BATCH)
    want = replay.ordinary(sets, gate)
    return {"digest": replay.digest(*want[0]), **replay.tuning(sets, want, gate, rounds)}


def wall(run: Callable[[int], Any], rounds: int) -> dict[str, Any]:
    """Seconds from the call until the device is done, one call at a time."""
    return statistics(_clocked(run, number, waiting=True) for number in range(rounds))


def host(run: Callable[[int], Any], rounds: int) -> dict[str, Any]:
    """Seconds that the call itself takes, drawing the plans included; the device is idle before each."""
    return statistics(_clocked(run, number, waiting=False) for number in range(rounds))


def _clocked(run: Callable[[int], Any], number: int, *, waiting: bool) -> float:
    import cupy

    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    run(number)
    queued = time.perf_counter()
    cupy.cuda.Device().synchronize()
    return (time.perf_counter() if waiting else queued) - start


def stages(slab: volumes.Volume, gate: Gate, rounds: int) -> dict[str, Any]:
    """Time each kernel of a batch of `BATCH` by events around its launch, nothing beside anything."""
    import cupy

    from lesionsynth.cuda.backend import CudaBackend
    from lesionsynth.cuda.cupy_device import CupyDevice
    from lesionsynth.cuda.render import Renderer

    class Clocked(CupyDevice):
        """Puts events around every launch."""

        def __init__(self) -> None:
            super().__init__(0, graphs=False)
            self.marks: list[tuple[str, Any, Any]] = []

        @contextmanager
        def beside(self) -> Iterator[None]:
            yield

        def join(self) -> None:
            pass

        def launch(self, program: str, image: str, kernel: str, grid: int, *arguments: Any) -> None:
            start = gate.clock.mark()
            super().launch(program, image, kernel, grid, *arguments)
            self.marks.append((kernel, start, gate.clock.mark()))

    device, cuda = Clocked(), CudaBackend(graphs=False)
    cuda.renderers[0] = Renderer(device)
    synth, (image, mask) = synthesizer(cuda), batch_of(slab, BATCH)
    batch = Inputs(image, mask, (cupy.empty_like(image), cupy.empty_like(mask)))

    def queue(first: int) -> list[tuple[str, Any, Any]]:
        device.marks = []
        for number in range(first, first + STAGE_CHUNK):
            batch.render(synth, number)
        return device.marks

    samples: dict[str, list[float]] = {}
    try:
        expected = STAGE_CHUNK * gate.host_s(lambda number: batch.render(synth, number))
        for first in range(-STAGE_CHUNK, rounds, STAGE_CHUNK):  # the first is not counted
            marks, expected = gate.hold(lambda first=first: queue(max(first, 0)), expected)
            for kernel, start, stop in marks if first >= 0 else ():
                samples.setdefault(kernel, []).append(gate.clock.elapsed(start, stop))
    except GateError as error:
        return {"error": str(error)}
    return {kernel: statistics(values) for kernel, values in samples.items()}
