"""Processes that take tasks: one that dies, one whose parent dies, and what each may use."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from normnet.workers import SLOT, Died, _share_cores, _Worker, run_parallel


def double_or_die(task: int) -> int:
    """What the workers of the test below do: the task -1 kills them, -2 exits."""
    if task == -1:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == -2:
        os._exit(3)
    return 2 * task


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dead_worker_costs_one_task(workers: int) -> None:
    found = dict(run_parallel(double_or_die, [-1, 1, 2, -2, 3], workers))
    assert {n: found[n] for n in (1, 2, 4)} == {1: 2, 2: 4, 4: 6}
    assert isinstance(found[0], Died)
    assert "ended by SIGKILL (out of memory? try fewer workers)" in str(found[0])
    assert "ended with status 3" in str(found[3])
    assert multiprocessing.active_children() == []


def torch_threads(task: int) -> int:
    """Threads that torch takes in a worker, where nothing has loaded it before."""
    import torch

    return torch.get_num_threads()


@pytest.mark.parametrize("given", [False, True])
def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch, given: bool) -> None:
    """A lung network in each must not take all of them, unless it is told to."""
    torch = pytest.importorskip("torch")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores) if given else "")
    share = cores if given else max(1, cores // 2)
    assert dict(run_parallel(torch_threads, [0, 1], 2)) == {0: share, 1: share}
    # where the main part of a script has loaded it
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    _share_cores(2)
    assert asked == ([] if given else [share])


def slot_of(task: int) -> tuple[int, str]:
    return os.getpid(), os.environ[SLOT]


def test_a_process_takes_task_after_task_and_has_a_number() -> None:
    found = dict(run_parallel(slot_of, range(6), 2))
    assert {slot for _, slot in found.values()} <= {"0", "1"}
    assert len({pid for pid, _ in found.values()}) <= 2
    assert list(run_parallel(slot_of, [], 2)) == []
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        next(run_parallel(slot_of, [1], 0))


def test_a_process_that_died_while_it_waited_is_replaced() -> None:
    worker = _Worker(0, 1)
    try:
        first, slot = worker.call(slot_of, 0).result()
        os.kill(first, signal.SIGKILL)
        worker.context.process.join()
        until = time.monotonic() + 60
        while not worker.pool._broken:  # until its pool knows
            assert time.monotonic() < until
            time.sleep(0.01)
        second, again = worker.call(slot_of, 0).result()
    finally:
        worker.pool.shutdown()
    assert (slot, again) == ("0", "0")
    assert first != second


def test_who_stops_taking_results_ends_the_workers() -> None:
    """As an interrupt does."""
    results = run_parallel(time.sleep, [0.0, 600.0, 600.0], 2)
    assert next(results) == (0, None)
    results.close()
    assert multiprocessing.active_children() == []


def leave_a_note(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """However it ends: nobody would clear away what they write."""
    code = "from tests.normnet.test_workers import *\nif __name__ == '__main__':\n"
    code += f"    list(run_parallel(leave_a_note, ['{tmp_path}'] * 2, 2))\n"
    (tmp_path / "script.py").write_text(code)
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], env=here)

    def notes() -> list[int]:
        return [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]

    while len(notes()) < 2:
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in notes()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
