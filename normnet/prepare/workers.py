"""Run tasks in several processes, of which any may be killed without harm to the others.

`concurrent.futures.ProcessPoolExecutor` gives every waiting task up when one of its processes dies; here only
the task of the dead process is lost.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
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


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    task: int
    slot: int
    """Which of the processes that run at once; one that takes a dead one's place has its number."""


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
    waiting = iter(range(len(tasks)))
    running: list[_Worker] = []
    workers = min(workers, len(tasks))
    try:
        for index in itertools.islice(waiting, workers):
            running.append(_start(function, tasks[index], index, index, workers))
        while running:
            ready = wait([worker.connection for worker in running])
            for worker in [w for w in running if w.connection in ready]:
                done, result = worker.task, _receive(worker)
                following = next(waiting, None)
                if isinstance(result, Died) or following is None:
                    _stop(worker)
                    running.remove(worker)
                    if following is not None:
                        running.append(_start(function, tasks[following], following, worker.slot, workers))
                else:
                    worker.task = following
                    _send(worker, tasks[following])
                yield done, result
    finally:
        for worker in running:
            worker.process.terminate()
            _stop(worker)


def _start(function: Callable[[Task], Result], task: Task, index: int, slot: int, workers: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, function, slot, workers), daemon=True)
    with _unheard_interrupts():  # the child inherits it, from before it can say so itself
        process.start()
    there.close()  # so that the end of the process is the end of the pipe
    worker = _Worker(process, here, index, slot)
    _send(worker, task)
    return worker


def _send(worker: _Worker, task: object) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # it has just died: the next receive says so
        worker.connection.send(task)


def _receive(worker: _Worker) -> Any:
    try:
        return worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        return Died(worker.process.exitcode or 0)


def _stop(worker: _Worker) -> None:
    """End a worker that waits for a task, or that has ended."""
    worker.connection.close()
    worker.process.join()
    worker.process.close()


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


def _end_with_parent() -> None:
    """End this worker when its parent is gone: nobody would clear away what it writes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


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


def _serve(connection: Connection, function: Callable[[Task], Result], slot: int, workers: int) -> None:
    """Take tasks until the other end is closed."""
    os.environ[SLOT] = str(slot)
    _share_cores(workers)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it as well, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            connection.send(function(connection.recv()))
