"""Device time behind a gate: a kernel that spins holds the device until the host has queued what is timed.

Without one, a call that takes the host longer than the device is timed at the host's pace.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np

from benchmarks.common import statistics

CHUNK = 12
"""Calls behind one gate: the generator lets sixteen batches be under way before the host waits."""
MARGIN = 2.0
"""Length of a gate over the time that the host should need."""
LEAST_S = 2e-3
LONGEST_S = 0.5
ATTEMPTS = 6
"""Gates that are tried, each at least twice as long as the last, before giving up."""
SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
}
"""

T = TypeVar("T")


class GateError(RuntimeError):
    """The device was not held for as long as the host queued."""


class Clock(Protocol):
    """What a gate needs of a device; work and marks follow each other in the order of one stream."""

    def now(self) -> float:
        """Seconds on the host."""

    def spin(self, nanoseconds: int) -> None:
        """Queue a kernel that takes so long."""

    def mark(self) -> Any:
        """Queue an event: its `done` says whether the device has passed it."""

    def elapsed(self, first: Any, last: Any) -> float:
        """Seconds on the device between two events that it has passed."""

    def synchronize(self) -> None:
        """Wait for the device."""


class CupyClock:
    """The current device, on CuPy's current stream."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._spin = cupy.RawKernel(SPIN, "spin")

    def now(self) -> float:
        """See `Clock`."""
        return time.perf_counter()

    def spin(self, nanoseconds: int) -> None:
        """See `Clock`."""
        self._spin((1,), (1,), (np.int64(nanoseconds),))

    def mark(self) -> Any:
        """See `Clock`."""
        event = self._cupy.cuda.Event()
        event.record()
        return event

    def elapsed(self, first: Any, last: Any) -> float:
        """See `Clock`."""
        return float(self._cupy.cuda.get_elapsed_time(first, last)) / 1e3

    def synchronize(self) -> None:
        """See `Clock`."""
        self._cupy.cuda.Device().synchronize()


class Gate:
    """Times work on a device that the host cannot slow down.

    Parameters
    ----------
    clock : Clock
        Of the device.
    chunk : int
        Calls behind one gate of `times`.
    """

    def __init__(self, clock: Clock, chunk: int = CHUNK) -> None:
        self.clock, self.chunk = clock, chunk
        self.longest_s = 0.0
        """The longest gate that held."""
        self.repeated = 0
        """Times that something was queued again, because the gate had ended too early."""

    def hold(self, queue: Callable[[], T], expected_s: float) -> tuple[T, float]:
        """Queue work while the device waits, and wait for it.

        Parameters
        ----------
        queue : callable
            Queues the work; called again, with a longer gate, where the gate ended before it returned.
        expected_s : float
            What it should take the host.

        Returns
        -------
        result, seconds
            What `queue` returned, and what it took the host.

        Raises
        ------
        GateError
            No gate held.
        """
        wanted = MARGIN * expected_s + LEAST_S
        for _ in range(ATTEMPTS):
            length = min(wanted, LONGEST_S)
            self.clock.synchronize()
            self.clock.spin(round(length * 1e9))
            gate = self.clock.mark()
            start = self.clock.now()
            found = queue()
            took = self.clock.now() - start
            held = not gate.done
            self.clock.synchronize()
            if held:
                self.longest_s = max(self.longest_s, length)
                return found, took
            self.repeated += 1
            wanted = max(2 * length, MARGIN * took)
        raise GateError(
            f"the device was not held: the host took {took * 1e3:.1f} ms to queue its calls and a gate of "
            f"{length * 1e3:.1f} ms ended before, after {ATTEMPTS} gates; does a call wait for the device?"
        )

    def times(self, run: Callable[[int], Any], rounds: int) -> dict[str, Any]:
        """Time calls on the device, by events between one call and the next.

        Parameters
        ----------
        run : callable
            Called with a number; queues work on the current stream and waits for nothing.
        rounds : int
            Timed calls. The first calls of all, and a whole chunk behind a gate, are not timed: they compile,
            and take the page-locked memory of all the batches that will be under way.

        Returns
        -------
        dict
            `benchmarks.common.statistics` of seconds, and ``gate``; or ``error`` where no gate held.
        """
        before = self.repeated
        try:
            samples = self._samples(run, rounds)
        except GateError as error:
            return {"error": str(error)}
        gate = {"calls": self.chunk, "longest_s": self.longest_s, "repeated": self.repeated - before}
        return {**statistics(samples), "gate": gate}

    def _samples(self, run: Callable[[int], Any], rounds: int) -> list[float]:
        def queue(numbers: Iterable[int]) -> list[Any]:
            marks = [self.clock.mark()]
            for number in numbers:
                run(number)
                marks.append(self.clock.mark())
            return marks

        expected = self.chunk * self.host_s(run)
        _, took = self.hold(lambda: queue(range(self.chunk)), expected)
        samples: list[float] = []
        for first in range(0, rounds, self.chunk):
            numbers = range(first, min(first + self.chunk, rounds))
            marks, took = self.hold(lambda numbers=numbers: queue(numbers), max(expected, took))
            samples.extend(self.clock.elapsed(*pair) for pair in pairwise(marks))
        return samples

    def host_s(self, run: Callable[[int], Any], calls: int = 6) -> float:
        """Return what a call takes the host, by the last of a few: until then it compiles and captures."""
        took = 0.0
        for number in range(calls):
            self.clock.synchronize()
            start = self.clock.now()
            run(number)
            took = self.clock.now() - start
        return took
