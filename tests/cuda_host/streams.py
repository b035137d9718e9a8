"""A host device with streams that run as late as they may, and memory that another owns once it is freed.

What is launched waits in its stream until something needs it: a download, or a host that waits for a mark.
Only what comes before in that stream, and what it was told to follow, runs then. So whatever relies on an
order that nobody asked for sees memory that is not written yet. With `progress`, chance runs more.

Freed memory goes where CuPy's pool would give it: to the stream it was allocated on, whose next work may
write it without waiting for any other stream. Here that comes at once. A copy up reads the host's memory when
it runs.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tests.cuda_host.device import HostBuffer, HostDevice

SIDE = "side"
POISON = 0xEE


class Work:
    """Something a stream is to do, and what must be done before."""

    def __init__(self, run: Callable[[], Any] | None, after: list[Work]) -> None:
        self.run, self.after, self.done = run, after, False


class LateMark:
    """A point in the order of a stream."""

    def __init__(self, device: LateDevice, work: Work) -> None:
        self.device, self.work = device, work

    def done(self) -> bool:
        return self.work.done

    def wait(self) -> None:
        self.device.waits += 1
        self.device.finish(self.work)


class LateBuffer(HostBuffer):
    """Memory that the next owner writes over, on the stream that it was allocated on."""

    def __init__(self, device: LateDevice, nbytes: int) -> None:
        super().__init__(nbytes, 0xFF)
        self._device, self._stream = device, device.stream

    def __del__(self) -> None:
        self._device.give_away(self.array, self._stream)


class LateDevice(HostDevice):
    """`HostDevice` whose calls return before their work is done.

    Parameters
    ----------
    progress : int
        Chance in percent that something more runs after each call.
    seed : int
        Of the chance.
    """

    def __init__(self, *, progress: int = 0, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._progress, self._random = progress, random.Random(seed)
        self._last: dict[str, Work] = {}
        self._pending: list[Work] = []
        self._lock = threading.RLock()
        self._of_thread = threading.local()
        self._forked = Work(None, [])
        self.pinned_taken = 0
        self.held: list[Any] = []
        """What must live as long as work may use it: the caller's arrays."""

    @property
    def stream(self) -> str:
        """The stream that the calling thread works on."""
        return getattr(self._of_thread, "stream", "default")

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before, self._of_thread.stream = self.stream, stream
        try:
            yield
        finally:
            self._of_thread.stream = before

    def finish(self, work: Work | None = None) -> None:
        """Run some work and what it waits for; everything where none is named."""
        with self._lock:
            stack = [work] if work else list(self._pending)
            while stack:
                now = stack[-1]
                waiting = [w for w in now.after if not w.done]
                if now.done or not waiting:
                    stack.pop()
                    self._run(now)
                else:
                    self._random.shuffle(waiting)
                    stack.extend(waiting)

    def give_away(self, array: np.ndarray, stream: str) -> None:
        """Let the next owner of freed memory write it."""
        with self._lock:
            self.finish(self._queue(lambda: array.fill(POISON), stream))

    # --- lesionsynth.cuda.device.Device ---

    def allocate(self, nbytes: int) -> LateBuffer:
        self.allocations += 1
        return LateBuffer(self, nbytes)

    def pinned(self, nbytes: int) -> HostBuffer:
        self.pinned_taken += 1
        return super().pinned(nbytes)

    def upload(self, pointer: int, source: int, nbytes: int) -> None:
        self._queue(lambda: super(LateDevice, self).upload(pointer, source, nbytes))

    def copy(self, pointer: int, source: int, nbytes: int) -> None:
        self._queue(lambda: super(LateDevice, self).copy(pointer, source, nbytes))

    def download(self, pointer: int, nbytes: int) -> np.ndarray:
        self.finish(self._queue(None))
        return super().download(pointer, nbytes)

    def mark(self) -> LateMark:
        return LateMark(self, self._queue(None))

    def follow(self, mark: LateMark) -> None:
        self._queue(None, after=mark.work)

    @contextmanager
    def beside(self) -> Iterator[None]:
        forked = self._queue(None)
        with self.on(SIDE):
            self._queue(None, after=forked)
            yield
            self._forked = self._queue(None)

    def join(self) -> None:
        self._queue(None, after=self._forked)

    def launch(self, program: str, image: str, kernel: str, grid: int, *arguments: Any) -> None:
        self._queue(lambda: super(LateDevice, self).launch(program, image, kernel, grid, *arguments))

    def _queue(self, run: Callable[[], Any] | None, stream: str = "", after: Work | None = None) -> Work:
        with self._lock:
            name = stream or self.stream
            before = [w for w in (self._last.get(name), after) if w and not w.done]
            work = self._last[name] = Work(run, before)
            self._pending.append(work)
            if self._random.random() * 100 < self._progress:
                self.finish(self._random.choice(self._pending))
            return work

    def _run(self, work: Work) -> None:
        if work.done:
            return
        if work.run:
            work.run()
        work.done, work.run, work.after = True, None, []
        self._pending.remove(work)
