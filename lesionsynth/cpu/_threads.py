"""Spread serial, GIL-free Numba kernels over threads.

Numba's own ``parallel=True`` is avoided on purpose: its OpenMP layer kills a forked ``DataLoader`` worker,
and it compiles several times longer. A pool belongs to one process: a fork gets its own on first use. The
calling thread works too, and a helper that has not begun when the work is done is not waited for, so a busy
pool delays nobody.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np

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


def parallel_tasks(n_tasks: int, kernel: Callable[..., object], *arguments: Any, threads: int | None) -> None:
    """Call ``kernel(counter, n_tasks, *arguments)`` on several threads, which share the tasks out themselves.

    Parameters
    ----------
    n_tasks : int
        Number of independent tasks of any cost. Zero calls nothing.
    kernel : callable
        GIL-free Numba function that takes tasks ``fetch_add(counter)`` until these reach `n_tasks`.
    *arguments
        Passed on.
    threads : int or None
        See `parallel_for`.

    Raises
    ------
    ValueError
        `threads` is below 1.
    """
    count = min(_count(threads), n_tasks)
    if count < 1:
        return
    counter = np.zeros(1, dtype=np.int64)
    helpers = [_pool(count).submit(kernel, counter, n_tasks, *arguments) for _ in range(count - 1)]
    try:
        kernel(counter, n_tasks, *arguments)
    finally:
        running = [helper for helper in helpers if not helper.cancel()]
        for helper in running:
            helper.exception()
    for helper in running:
        helper.result()


def _count(threads: int | None) -> int:
    count = default_threads() if threads is None else threads
    if count < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    return count


def _pool(count: int) -> ThreadPoolExecutor:
    key = (os.getpid(), count)
    pool = _pools.get(key)
    if pool is None:
        pool = _pools[key] = ThreadPoolExecutor(count, thread_name_prefix="lesionsynth")
    return pool


def _dataloader_workers() -> int:
    """Workers of the torch ``DataLoader`` this process belongs to, 1 elsewhere; never imports torch."""
    data = sys.modules.get("torch.utils.data")
    worker = data.get_worker_info() if data is not None else None
    return 1 if worker is None else int(worker.num_workers)
