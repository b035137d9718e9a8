"""Run tasks in several processes, of which any may be killed without harm to the others.

A `concurrent.futures.ProcessPoolExecutor` gives every waiting task up when one of its processes dies; here
each process is a pool of its own, so that only the task of the dead one is lost.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

SLOT = "NORMNET_WORKER"
"""Environment variable of a worker: its number among those that run at once, from 0."""
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Died:
    """The process of a task ended before the task did.

    Attributes
    ----------
    exit_code : int
        As `subprocess` gives it: negative for a signal.
    """

    exit_code: int

    def __str__(self) -> str:
        """Say how it ended, and the likely cause."""
        if self.exit_code < 0:
            name = signal.Signals(-self.exit_code).name
            hint = " (out of memory? try fewer workers)" if name == "SIGKILL" else ""
            return f"the worker process was ended by {name}{hint}"
        return (
            f"the worker process ended with status {self.exit_code} (a script that uses workers must guard "
            "its main part by: if __name__ == '__main__')"
        )


def run_parallel(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[int, Result | Died]]:
    """Call a function on tasks in fresh processes (spawn context), each of which takes task after task.

    Parameters
    ----------
    function : callable
        Of a module, so that it can be pickled; must not raise. The cores are shared out among the processes,
        unless ``OMP_NUM_THREADS`` says how many threads each shall have.
    tasks : sequence
        Picklable arguments.
    workers : int
        Processes, at least 1.

    Yields
    ------
    index : int
        Of the task, in the order in which they end.
    result : object or Died
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    workers = min(workers, len(tasks))
    slots = [_Worker(slot, workers) for slot in range(workers)]
    waiting, running = iter(range(len(tasks))), dict[Future[Result], tuple[int, _Worker]]()

    def begin(worker: _Worker) -> None:
        if (index := next(waiting, None)) is not None:
            running[worker.call(function, tasks[index])] = index, worker

    try:
        for worker in slots:
            begin(worker)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index, worker = running.pop(future)
                result = worker.result(future)
                begin(worker)  # before whoever takes the result works with it
                yield index, result
    finally:
        for _, worker in running.values():
            worker.context.process.terminate()
        for worker in slots:
            worker.pool.shutdown()


class _Worker:
    """A process that takes one task at a time; another takes its place when it dies."""

    def __init__(self, slot: int, workers: int) -> None:
        self._place = slot, workers
        self._renew()

    def _renew(self) -> None:
        self.context = _Spawn()
        self.pool = ProcessPoolExecutor(1, self.context, _begin, self._place)

    def call(self, function: Callable[[Task], Result], task: Task) -> Future[Result]:
        with _unheard_interrupts():  # a process that starts inherits it, from before it can say so itself
            try:
                return self.pool.submit(function, task)
            except BrokenProcessPool:  # it died while it had nothing to do
                self._renew()
                return self.pool.submit(function, task)

    def result(self, future: Future[Result]) -> Result | Died:
        try:
            return future.result()
        except BrokenProcessPool:
            self.pool.shutdown()
            died = Died(self.context.process.exitcode or 0)
            self._renew()
            return died


class _Spawn(SpawnContext):
    """Starts fresh processes, and knows the last one."""

    process: SpawnProcess

    def Process(self, *args: Any, **options: Any) -> SpawnProcess:  # type: ignore[override]
        self.process = SpawnProcess(*args, **options)
        return self.process


@contextmanager
def _unheard_interrupts() -> Iterator[None]:
    """Keep SIGINT back until the block ends."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(slot: int, workers: int) -> None:
    """Make a worker of a process that has just started."""
    os.environ[SLOT] = str(slot)
    _share_cores(workers)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it as well, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _share_cores(workers: int) -> None:
    """Leave the other workers their share of the cores: torch would take all of them in each.

    It is not imported for that, as few tasks need it: when it is, it reads the variable, as `lesionsynth`
    does.
    """
    if os.environ.get("OMP_NUM_THREADS", "").strip():
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // workers)
    os.environ["OMP_NUM_THREADS"] = str(share)
    if (torch := sys.modules.get("torch")) is not None:  # the main part of a script imports it
        torch.set_num_threads(share)


def _end_with_parent() -> None:
    """End this worker when its parent is gone: nobody would clear away what it writes."""
    if (parent := multiprocessing.parent_process()) is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
