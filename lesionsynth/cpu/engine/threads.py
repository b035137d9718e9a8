"""Spread serial, GIL-free Numba kernels over threads.

Numba's own ``parallel=True`` is avoided on purpose: its OpenMP layer kills a forked ``DataLoader`` worker,
and it compiles several times longer. Threads belong to one process: a fork starts its own on first use. The
calling thread works too; a helper that has not begun when the work is done is not waited for, and a busy one
delays nobody.

No function here returns or raises while a helper is at its work, whatever raises and wherever: Ctrl-C, or any
handler of a signal. Python runs those after a call, at the start of a function and at the end of a loop's
turn, so Python code that waits can always be torn away from it. Compiled code cannot. Each helper has a
ticket, which whoever comes first takes; `settle` is one call of compiled code at the head of a ``finally``,
takes those that are left, and waits for the helpers that have theirs. All that a handler can do is to raise
after it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from lesionsynth._cache import torn_off
from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.engine.simd import fetch, fetch_add
from lesionsynth.strict import shown

give_way: Any = types.ExternalFunction("SwitchToThread" if os.name == "nt" else "sched_yield", types.int32())
"""Let another thread have the core."""

WORTHWHILE = 2**16
"""Voxels: below, waking a thread takes longer than its share of the work (measured: about 40,000)."""

MOST_THREADS = 256
"""Threads that a call uses at most, whatever number is asked for."""


def default_threads() -> int:
    """Threads where a call names none.

    ``NUMBA_NUM_THREADS`` where it is set; else one in a worker of a torch ``DataLoader``, beside which others
    work; else ``OMP_NUM_THREADS``, of a list such as ``4,2`` the first; else the cores that this process may
    use. An empty variable is not set.

    Raises
    ------
    ValueError
        A variable that counts holds anything but integers >= 1.
    """
    stated = _stated("NUMBA_NUM_THREADS")
    if stated is None:
        stated = 1 if _is_dataloader_worker() else _stated("OMP_NUM_THREADS", several=True)
    if stated is not None:
        return stated
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stated(name: str, *, several: bool = False) -> int | None:
    """Return the number of threads that a variable states, the first of several; None where it is not set."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    try:
        numbers = [int(entry) for entry in (text.split(",") if several else [text])]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {shown(text)}: correct or unset it")
    return numbers[0]


def check_threads(threads: Any) -> None:
    """Raise ValueError unless `threads` is None or an integer >= 1."""
    integer = isinstance(threads, int | np.integer) and not isinstance(threads, bool)
    if threads is not None and not (integer and threads >= 1):
        raise ValueError(f"threads must be an integer >= 1, got {shown(threads)}")


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
    own, *others = (partial(body, *part) for part in pairwise(n_items * i // count for i in range(count + 1)))
    tickets = tickets_for(len(others))
    tasks = [_Task(tickets, k, other) for k, other in enumerate(others)]
    try:
        _hand_over(tasks)
        own()
        for k, other in enumerate(others):
            if claim(tickets, k, True):  # nobody was free so far
                other()
        _wait(tasks)
    finally:
        settle(tickets)
    _dismiss(tasks)
    _raise_first(tasks)


def work_together(
    kernel: Callable[..., object], totals: Sequence[int], *arguments: Any, threads: int | None
) -> None:
    """Call ``kernel(progress, *arguments)`` on several threads, which share its tasks out themselves.

    To wake a thread takes longer than many a round of tasks, so a kernel goes through all its rounds in one
    call. No round waits for a thread: one that wakes late joins the round that is under way, or finds nothing
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
    if count == 1:
        kernel(progress, *arguments)
        return
    tickets = tickets_for(count - 1)
    tasks = [_Task(tickets, k, partial(kernel, progress, *arguments)) for k in range(count - 1)]
    try:
        _hand_over(tasks)
        kernel(progress, *arguments)
        _wait(tasks)
    finally:
        settle(tickets)
    _dismiss(tasks)  # one that found no memory has taken no task


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


def in_background(
    body: Callable[[], object], threads: int | None = None, tickets: Tickets | None = None
) -> Callable[[], None]:
    """Start ``body()`` beside what the caller does next, where there is a thread to spare.

    Parameters
    ----------
    body : callable
        It must release the GIL to gain anything.
    threads : int, optional
        See `parallel_for`. With one thread the work is done at once.
    tickets : (1, 2) int64 array, optional
        Of `tickets_for`. A caller that must not leave before the work is done makes it first, calls this
        inside a ``try``, and begins its ``finally`` with ``settle(tickets)``.

    Returns
    -------
    callable
        Call it once: it returns when the work is done, and raises what `body` raised.
    """
    count = _count(threads)
    if count == 1:
        body()
        return lambda: None
    tickets = tickets_for(1) if tickets is None else tickets
    tasks = [_Task(tickets, 0, body)]
    try:
        _hand_over(tasks)
    except BaseException:
        settle(tickets)
        raise

    def finish() -> None:
        try:
            if claim(tickets, 0, True):  # nobody was free so far
                body()
            _wait(tasks)
        finally:
            settle(tickets)
        _dismiss(tasks)
        _raise_first(tasks)

    return finish


Tickets = npt.NDArray[np.int64]
TAKEN, OVER = 0, 1
"""Columns of tickets: how often one was asked for, and whether what it was for is done."""
MOMENT = 100
"""Turns for others before a caller sleeps, which takes longer than most helpers need to end."""


def tickets_for(helpers: int) -> Tickets:
    """Return a ticket for each helper."""
    return np.zeros((helpers, 2), dtype=np.int64)


@kernel
def claim(tickets: Any, k: int, over: bool) -> bool:
    """Take ticket k where nobody has it; `over` says that nobody is to wait for the taker."""
    mine = fetch_add(tickets, 2 * k + TAKEN) == 0
    if mine and over:
        fetch_add(tickets, 2 * k + OVER)
    return bool(mine)


@kernel
def soon(tickets: Any) -> bool:
    """Take the tickets that are left; whether all that was begun is over within a moment."""
    turns = MOMENT
    for k in range(tickets.shape[0]):
        if fetch_add(tickets, 2 * k + TAKEN) == 0:
            fetch_add(tickets, 2 * k + OVER)
        while fetch(tickets, 2 * k + OVER) == 0:
            if turns == 0:
                return False
            turns -= 1
            give_way()
    return True


@kernel
def settle(tickets: Any) -> None:
    """Take the tickets that are left, so that no helper begins, and wait for the helpers that have begun.

    Compiled before anything is handed over, it runs no Python, so no handler of a signal comes in between.
    """
    for k in range(tickets.shape[0]):
        if fetch_add(tickets, 2 * k + TAKEN) == 0:
            fetch_add(tickets, 2 * k + OVER)
        while fetch(tickets, 2 * k + OVER) == 0:
            give_way()


class _Task:
    """Work for a helper, which holds all that it needs while it is at it."""

    __slots__ = ("body", "error", "number", "over", "tickets")

    def __init__(self, tickets: Tickets, number: int, body: Callable[[], object]) -> None:
        self.tickets, self.number = tickets, number
        self.body: Callable[[], object] | None = body
        self.error: BaseException | None = None
        self.over = threading.Lock()
        self.over.acquire()

    def run(self) -> None:
        """Do it, unless the caller has taken the ticket."""
        me = threading.get_ident()
        try:
            with _beginning:
                mine = claim(self.tickets, self.number, False)
                _at_work[me] = self
            if mine and self.body is not None:
                self.body()
        except BaseException as error:
            self.error = error
        finally:
            self.body = None  # first: what the work used is free for the caller's next call
            self.tickets[self.number, OVER] = 1  # the GIL orders this behind the work
            self.over.release()
            _at_work.pop(me, None)


_beginning = threading.RLock()
"""Whoever has it lets no helper begin."""
_at_work: dict[int, _Task] = {}
"""What each helper is at, by its thread."""
PATIENCE = 60.0
"""Seconds that a fork waits for helpers at most."""


def _pause() -> None:
    """Wait for the helpers at work, and let no other begin.

    A handler of a signal may fork in the middle of a call, and the child goes on with it: there it would wait
    for ever for a helper, which stays in the parent.
    """
    _beginning.acquire()
    me, until = threading.get_ident(), time.monotonic() + PATIENCE
    while any(helper != me for helper in list(_at_work)) and time.monotonic() < until:
        time.sleep(0.0002)


def _resume(child: bool) -> None:
    if child:
        _at_work.clear()
    with suppress(RuntimeError):  # a handler's exception kept `_pause` from taking it
        _beginning.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(  # before `lesionsynth.cpu.engine.jit` takes Numba's lock, which a helper may want
        before=_pause, after_in_parent=partial(_resume, False), after_in_child=partial(_resume, True)
    )


class _Pool:
    """The helpers of this process. They are daemons: none is at work when the interpreter ends."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[_Task] = SimpleQueue()
        self.threads = 0
        self.lock = threading.Lock()
        ready = tickets_for(1)
        claim(ready, 0, True)  # compiles, as the next lines
        soon(ready)
        settle(ready)

    def submit(self, task: _Task) -> None:
        """Leave a task to whoever is free first."""
        self.tasks.put(task)

    def grow(self, threads: int) -> None:
        """Start as many threads as there are not yet; go without those that the system refuses."""
        with self.lock:
            while self.threads < threads:
                try:
                    threading.Thread(target=self._serve, name="lesionsynth", daemon=True).start()
                except RuntimeError as error:
                    if torn := torn_off(error):
                        raise torn from None
                    return  # the caller does their work
                self.threads += 1  # not before: one too many does no harm, one too few would for good

    def _serve(self) -> None:
        while True:
            self.tasks.get().run()


_pools: dict[int, _Pool] = {}


def _pool(count: int) -> _Pool:
    """Return the pool of this process, with helpers for so many threads."""
    pool = _pools.get(os.getpid()) or _pools.setdefault(os.getpid(), _Pool())
    if pool.threads < count - 1:
        pool.grow(count - 1)
    return pool


def _hand_over(tasks: Sequence[_Task]) -> None:
    """Give tasks to helpers; the caller settles their tickets, whatever happens here."""
    for task in tasks:
        _pool(len(tasks) + 1).submit(task)


def _wait(tasks: Sequence[_Task]) -> None:
    """Wait for the helpers that have begun, asleep if it takes long; unlike `settle` it may be torn off."""
    if not soon(tasks[0].tickets):
        for task in tasks:
            if not task.tickets[task.number, OVER]:
                task.over.acquire()


def _dismiss(tasks: Sequence[_Task]) -> None:
    """Let go of what tasks hold that lie about until a helper wakes."""
    for task in tasks:
        task.body = None


def _raise_first(tasks: Sequence[_Task]) -> None:
    for task in tasks:
        if task.error is not None:
            raise task.error


def _count(threads: int | None) -> int:
    count = default_threads() if threads is None else threads
    if count < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    return min(count, MOST_THREADS)


def _is_dataloader_worker() -> bool:
    """Whether this process is a worker of a torch ``DataLoader``; never imports torch."""
    data = sys.modules.get("torch.utils.data")
    return data is not None and data.get_worker_info() is not None
