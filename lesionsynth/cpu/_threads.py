"""Spread serial, GIL-free Numba kernels over threads.

Numba's own ``parallel=True`` is avoided on purpose: its OpenMP layer kills a forked ``DataLoader`` worker,
and it compiles several times longer. A pool belongs to one process: a fork gets its own on first use. The
calling thread works too, so a pool has one thread less; a helper that has not begun when the work is done is
not waited for, and a busy pool delays nobody.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numba import types

from lesionsynth.cpu._jit import inner
from lesionsynth.cpu.simd import fetch, fetch_add

give_way: Any = types.ExternalFunction("SwitchToThread" if os.name == "nt" else "sched_yield", types.int32())
"""Let another thread have the core."""

WORTHWHILE = 2**16
"""Voxels: below, waking a thread takes longer than its share of the work (measured: about 40,000)."""

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def default_threads() -> int:
    """Threads where a call names none.

    ``NUMBA_NUM_THREADS``, else the cores this process may use; a torch ``DataLoader`` worker takes its share
    of them, at least one.
    """
    stated = os.environ.get("NUMBA_NUM_THREADS")
    if stated:
        return max(1, int(stated))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // _dataloader_workers())


def check_threads(threads: Any) -> None:
    """Raise ValueError unless `threads` is None or an integer >= 1."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads must be an integer >= 1, got {threads!r}")


def team_for(voxels: int, threads: int | None) -> int | None:
    """Return `threads`, or 1 where a volume of so many voxels is not worth waking anybody."""
    return 1 if voxels < WORTHWHILE else threads


def parallel_for(n_items: int, body: Callable[[int, int], object], threads: int | None = None) -> None:
    """Call ``body(lo, hi)`` over a partition of ``range(n_items)``, in parallel.

    Parameters
    ----------
    n_items : int
        Number of independent items of about the same cost (rows, slices). Zero calls nothing.
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
    count = min(_count(threads), n_items)
    if count <= 1:
        if n_items > 0:
            body(0, n_items)
        return
    parts = list(pairwise(n_items * i // count for i in range(count + 1)))
    waiting = [_pool(count).submit(body, lo, hi) for lo, hi in parts[1:]]
    try:
        body(*parts[0])
    finally:
        for future in waiting:
            future.exception()  # arrays must outlive their kernels, even where one of them fails
    for future in waiting:
        future.result()


def work_together(
    kernel: Callable[..., object], totals: Sequence[int], *arguments: Any, threads: int | None
) -> None:
    """Call ``kernel(progress, *arguments)`` on several threads, which share its tasks out themselves.

    To wake a thread takes longer than many a round of tasks, so a kernel goes through all its rounds in one
    call. Nobody waits for a thread: one that wakes late joins the round that is under way, or finds nothing
    left to do.

    Parameters
    ----------
    kernel : callable
        GIL-free Numba function. For each round p it takes tasks with ``take(progress, p)`` until there are
        none, reports each with ``done(progress, p)``, and ends the round with ``wait_for(progress, p)``. It
        allocates before its first task, and must not fail after.
    totals : sequence of int
        Number of tasks of each round.
    *arguments
        Passed on.
    threads : int or None
        See `parallel_for`.

    Raises
    ------
    ValueError
        `threads` is below 1.
    """
    count = min(_count(threads), max(totals))
    if count < 1:
        return
    progress = np.zeros((len(totals), 3), dtype=np.int64)
    progress[:, TOTAL] = totals
    helpers = [_pool(count).submit(kernel, progress, *arguments) for _ in range(count - 1)]
    kernel(progress, *arguments)
    for helper in helpers:
        helper.cancel()


NEXT, DONE, TOTAL = 0, 1, 2
"""Columns of the progress of each round."""


@inner
def take(progress: Any, p: int) -> int:
    """Return the next task of round p, or -1 where there is none left."""
    task = fetch_add(progress, p * 3 + NEXT)
    return task if task < progress[p, TOTAL] else -1


@inner
def group_of(firsts: Any, task: int) -> int:
    """Group of a task where group k has the tasks ``firsts[k] ... firsts[k + 1]``."""
    low, high = 0, firsts.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        if firsts[middle] <= task:
            low = middle
        else:
            high = middle
    return low


@inner
def done(progress: Any, p: int) -> None:
    """Report a task of round p."""
    fetch_add(progress, p * 3 + DONE)


@inner
def wait_for(progress: Any, p: int) -> None:
    """Return when every task of round p has been reported; another thread may still be at its last one."""
    while fetch(progress, p * 3 + DONE) < progress[p, TOTAL]:
        give_way()


def in_background(body: Callable[[], object], threads: int | None = None) -> Callable[[], None]:
    """Start ``body()`` beside what the caller does next, where there is a thread to spare.

    Parameters
    ----------
    body : callable
        It must release the GIL to gain anything.
    threads : int, optional
        See `parallel_for`. With one thread the work is done at once.

    Returns
    -------
    callable
        Call it once: it returns when the work is done, and raises what `body` raised.
    """
    count = _count(threads)
    if count == 1:
        body()
        return lambda: None
    future = _pool(count).submit(body)

    def finish() -> None:
        if future.cancel():  # nobody was free so far
            body()
        else:
            future.result()

    return finish


def _count(threads: int | None) -> int:
    count = default_threads() if threads is None else threads
    if count < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    return count


def _pool(count: int) -> ThreadPoolExecutor:
    key = (os.getpid(), count)
    pool = _pools.get(key)
    if pool is None:
        pool = _pools[key] = ThreadPoolExecutor(count - 1, thread_name_prefix="lesionsynth")
    return pool


def _dataloader_workers() -> int:
    """Workers of the torch ``DataLoader`` this process belongs to, 1 elsewhere; never imports torch."""
    data = sys.modules.get("torch.utils.data")
    worker = data.get_worker_info() if data is not None else None
    return 1 if worker is None else int(worker.num_workers)
