"""Threads: every item once, errors not lost, results independent of the count, forked workers that live."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from types import SimpleNamespace

import numba
import numpy as np
import pytest

import lesionsynth as ls
from lesionsynth.cpu.engine import threads as _threads
from lesionsynth.cpu.engine.threads import (
    default_threads,
    done,
    in_background,
    parallel_for,
    take,
    wait_for,
    work_together,
)  # fmt: skip
from tests.hostile.tally import trial

BALLS = ls.BlobClass(count=(6.0, 6.0), radius=(3.0, 6.0), scale_by_lung=False)
CONFIG = ls.LesionConfig(small=BALLS, medium=None, large=None)


def healthy_pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    mask = np.zeros((9, 40, 36), dtype=bool)
    mask[1:8, 3:37, 2:34] = True
    return rng.random(mask.shape, dtype=np.float32) * mask, mask


def pair_bytes(threads: int | None = None) -> bytes:
    image, mask = healthy_pair()
    pair = ls.LesionSynthesizer(CONFIG, seed=2, threads=threads)(image, mask, index=5)
    return pair.image.tobytes() + pair.labels.tobytes()


@pytest.mark.parametrize(("items", "threads"), [(0, 2), (1, 4), (7, 3), (100, 1), (5, 8)])
def test_every_item_once(items, threads):
    seen = np.zeros(items, dtype=int)

    def body(lo: int, hi: int) -> None:
        seen[lo:hi] += 1

    parallel_for(items, body, threads)
    assert (seen == 1).all()


def test_errors_reach_the_caller():
    def body(lo: int, hi: int) -> None:
        if lo > 0:
            raise RuntimeError("second half")

    with pytest.raises(RuntimeError, match="second half"):
        parallel_for(4, body, 2)


def test_threads_must_be_positive():
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"):
        parallel_for(4, lambda lo, hi: None, 0)
    with pytest.raises(ValueError, match="threads must be an integer >= 1, got 0"):
        ls.LesionSynthesizer(CONFIG, threads=0)


@pytest.fixture
def environment(monkeypatch):
    """An environment and a process without a word on threads."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_threads, "_is_dataloader_worker", lambda: False)
    return monkeypatch


VARIABLES = "NUMBA_NUM_THREADS", "OMP_NUM_THREADS"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize("worker", [False, True])
@pytest.mark.parametrize(
    ("numba_says", "alone"), [(None, None), ("", None), (" ", None), ("3", 3), (" 5 ", 5)]
)
@pytest.mark.parametrize(
    ("openmp_says", "then"), [(None, None), ("", None), ("7", 7), ("4,2", 4), (" 4 , 2,1", 4), ("1", 1)]
)
def test_environment_names_the_default(numba_says, alone, openmp_says, then, worker, environment):
    """NUMBA_NUM_THREADS before all; one in a DataLoader's worker; then OMP_NUM_THREADS; then the cores."""
    for name, value in zip(VARIABLES, (numba_says, openmp_says), strict=True):
        if value is not None:
            environment.setenv(name, value)
    environment.setattr(_threads, "_is_dataloader_worker", lambda: worker)
    with trial("threads"):
        assert default_threads() == (alone or (1 if worker else then or CORES))


NO_COUNTS = [
    "0",
    "-1",
    "two",
    "1.5",
    "1e2",
    "nan",
    "4;2",
    "0x2",
    "4 2",
    "None",
    "1/2",
    "²",
    "٣x",
    "-",
    "9" * 400 + "x",
]


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", [*NO_COUNTS, "4,", ",4", ",", "4,0", "4,x", "4,-2"])
def test_no_count_of_threads_is_told(name, value, environment):
    environment.setenv(name, value)
    with trial("threads"), pytest.raises(ValueError, match=f"^{name} must be an integer >= 1, got "):
        default_threads()


def test_only_a_list_of_openmp_has_a_first(environment):
    environment.setenv("NUMBA_NUM_THREADS", "4,2")
    with (
        trial("threads"),
        pytest.raises(ValueError, match="integer >= 1, got '4,2'"),
    ):
        default_threads()


def test_a_variable_that_says_nothing_is_told_by_the_call(environment):
    environment.setenv("OMP_NUM_THREADS", "many")
    image, mask = (np.tile(array, (1, 4, 4)) for array in healthy_pair())
    synth = ls.LesionSynthesizer(CONFIG, seed=2)
    with (
        trial("threads"),
        pytest.raises(ValueError, match=r"OMP_NUM_THREADS must be .* got 'many'"),
    ):
        synth(image, mask, index=0)
    with trial("threads"):
        assert (
            ls.LesionSynthesizer(CONFIG, seed=2, threads=1)(image, mask, index=0).image.shape == image.shape
        )


@pytest.mark.parametrize("threads", [10**4, 10**9])
def test_more_threads_than_anybody_has(threads, environment):
    """A call uses at most `MOST_THREADS`; those that the system refuses are not missed."""
    before = threading.active_count()
    with trial("threads"):
        seen = np.zeros(10**4, dtype=int)

        def body(lo: int, hi: int) -> None:
            seen[lo:hi] += 1

        parallel_for(len(seen), body, threads)
        assert (seen == 1).all()
        assert threading.active_count() - before <= _threads.MOST_THREADS


def test_a_system_that_refuses_threads(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    expected = pair_bytes(1)
    monkeypatch.setattr(_threads, "_pools", {})
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with trial("threads"):
        assert pair_bytes(3) == expected


def test_result_does_not_depend_on_the_count():
    assert pair_bytes(1) == pair_bytes(2) == pair_bytes(5)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_pair(method):
    expected = pair_bytes(2)  # the parent's pool exists before the fork
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        assert pool.apply_async(pair_bytes, (2,)).get(timeout=120) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_helpers_work():
    """The child has none of them, and starts its own."""
    expected, held = pair_bytes(2), threading.Event()
    finish = in_background(held.wait, 2)
    try:
        with trial("threads"), multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply_async(pair_bytes, (2,)).get(timeout=120) == expected
    finally:
        held.set()
        finish()


@numba.njit(nogil=True)
def two_rounds(progress, first, second, work):
    """Each task of the second round adds up the whole first round."""
    t = take(progress, 0)
    while t >= 0:
        x = np.uint64(t)
        for _ in range(work * (1 + t % 3)):  # tasks of unequal length, which no compiler can shorten
            x = x * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        first[t] = 1 if x != 5 else 2
        done(progress, 0)
        t = take(progress, 0)
    wait_for(progress, 0)
    t = take(progress, 1)
    while t >= 0:
        for k in range(first.size):
            second[t] += first[k]
        done(progress, 1)
        t = take(progress, 1)
    wait_for(progress, 1)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_rounds_follow_each_other(threads):
    """Tasks of some milliseconds: long enough for the helpers to wake and be at one when a round ends."""
    for _ in range(5):
        first, second = np.zeros(7, np.int64), np.zeros(3, np.int64)
        work_together(two_rounds, [7, 3], first, second, 2_000_000, threads=threads)
        assert first.tolist() == [1] * 7
        assert second.tolist() == [7] * 3


def test_a_busy_pool_delays_nobody():
    """The helper is held up; the caller does all of the work and returns."""
    held, first, second = threading.Event(), np.zeros(9, np.int64), np.zeros(9, np.int64)
    finish = in_background(held.wait, 2)
    try:
        work_together(two_rounds, [9, 9], first, second, 1, threads=2)
        assert second.tolist() == [9] * 9
    finally:
        held.set()
        finish()


@pytest.mark.parametrize("threads", [1, 3])
def test_background_work_is_done_once_and_its_error_raised(threads):
    calls = []
    in_background(lambda: calls.append(1), threads)()
    assert calls == [1]

    def fail():
        raise RuntimeError("in the background")

    with pytest.raises(RuntimeError, match="in the background"):
        in_background(fail, threads)()


def test_no_tasks_call_nothing():
    work_together(two_rounds, [0, 0], np.zeros(0, np.int64), np.zeros(0, np.int64), 1, threads=2)


def test_callers_on_several_threads_do_not_meet():
    """Scratch belongs to the calling thread."""
    expected, got = pair_bytes(2), {}

    def call(k):
        got[k] = [pair_bytes(2) for _ in range(3)]

    callers = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(found == expected for results in got.values() for found in results)
    assert len(got) == 4


def test_a_dataloader_worker_takes_one(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    loader = SimpleNamespace(get_worker_info=lambda: SimpleNamespace(num_workers=1))
    monkeypatch.setitem(sys.modules, "torch.utils.data", loader)
    with trial("threads"):
        assert default_threads() == 1
        loader.get_worker_info = lambda: None
        assert default_threads() == CORES
        monkeypatch.delitem(sys.modules, "torch.utils.data")
        assert default_threads() == CORES


class Pairs:
    """A map-style data set of (pair, threads that a call would take)."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return np.frombuffer(pair_bytes(), np.uint8).copy(), default_threads()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataloader_workers(context, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    data = pytest.importorskip("torch.utils.data")
    expected = pair_bytes(2)
    loader = data.DataLoader(Pairs(), batch_size=None, num_workers=2, multiprocessing_context=context)
    for found, threads in loader:
        with trial("threads"):
            assert bytes(found) == expected
            assert threads == 1
