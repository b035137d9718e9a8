"""What a hostile input may cost: memory, and no time without end."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

HANG_S = 120.0
"""Of this process, in seconds: what is refused takes a hundredth of one, what hangs takes for ever."""

RENDERED = 2048
"""Mebibytes of a pair: `LesionPlan.check_work` promises gigabytes at most; a long fine lattice takes 340."""


@contextmanager
def at_once(mebibytes: float) -> Iterator[None]:
    """Fail where a block needs more memory at a time, or hangs.

    Memory stands for work: what is refused too late has been read, drawn or built by then. It is the same on
    a busy machine, where seconds are not. Python's and NumPy's memory counts, torch's does not.
    """
    start = time.process_time()
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        assert peak < mebibytes
        assert time.process_time() - start < HANG_S
