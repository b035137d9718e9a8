"""Spread serial, GIL-free Numba kernels over threads.

Numba's own ``parallel=True`` is avoided on purpose: its OpenMP layer kills a forked ``DataLoader`` worker,
and it compiles several times longer. A pool belongs to one process: a fork gets its own on first use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def default_threads() -> int:
    """Threads where a call names none: ``NUMBA_NUM_THREADS``, else the cores this process may use."""
    stated = os.environ.get("NUMBA_NUM_THREADS")
    if stated:
        return max(1, int(stated))
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parallel_for(n_items: int, body: Callable[[int, int], object], threads: int | None = None) -> None:
    """Call ``body(lo, hi)`` over a partition of ``range(n_items)``, in parallel.

    Parameters
    ----------
    n_items : int
        Number of independent items (rows, slices, components). Zero calls nothing.
    body : callable
        Handles items ``lo <= i < hi``; it must release the GIL to gain anything, and must not call
        `parallel_for`.
    threads : int, optional
        Number of threads; `default_threads` where omitted.

    Raises
    ------
    ValueError
        `threads` is below 1.
    """
    count = default_threads() if threads is None else threads
    if count < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    count = min(count, n_items)
    if count <= 1:
        if n_items > 0:
            body(0, n_items)
        return
    bounds = [n_items * i // count for i in range(count + 1)]
    pool = _pool(count)
    waiting = [pool.submit(body, lo, hi) for lo, hi in pairwise(bounds)]
    for future in waiting:
        future.result()


def _pool(count: int) -> ThreadPoolExecutor:
    key = (os.getpid(), count)
    pool = _pools.get(key)
    if pool is None:
        pool = _pools[key] = ThreadPoolExecutor(count, thread_name_prefix="lesionsynth")
    return pool
