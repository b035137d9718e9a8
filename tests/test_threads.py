"""Threads: every item once, errors not lost, results independent of the count, forked workers that live."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from types import SimpleNamespace

import numba
import numpy as np
import pytest

import lesionsynth as ls
from lesionsynth.cpu import _threads
from lesionsynth.cpu._threads import (
    default_threads,
    done,
    in_background,
    parallel_for,
    take,
    wait_for,
    work_together,
)  # fmt: skip

CONFIG = ls.LesionConfig(small=ls.BlobClass(count=(6.0, 6.0), radius=(3.0, 6.0)), medium=None, large=None)


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


def test_environment_names_the_default(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    assert default_threads() == 3


def test_result_does_not_depend_on_the_count():
    assert pair_bytes(1) == pair_bytes(2) == pair_bytes(5)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_pair(method):
    expected = pair_bytes(2)  # the parent's pool exists before the fork
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        assert pool.apply_async(pair_bytes, (2,)).get(timeout=120) == expected


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


def test_a_dataloader_worker_takes_its_share(monkeypatch):
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    cores = default_threads()
    loader = SimpleNamespace(get_worker_info=lambda: SimpleNamespace(num_workers=cores))
    monkeypatch.setitem(sys.modules, "torch.utils.data", loader)
    assert default_threads() == 1
    loader.get_worker_info = lambda: SimpleNamespace(num_workers=10 * cores)
    assert default_threads() == 1
    loader.get_worker_info = lambda: None
    assert default_threads() == cores
    assert _threads._dataloader_workers() == 1


class Pairs:
    """A map-style data set of (pair, threads that a call would take)."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return np.frombuffer(pair_bytes(), np.uint8).copy(), default_threads()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataloader_workers(context):
    data = pytest.importorskip("torch.utils.data")
    expected = pair_bytes(2)
    loader = data.DataLoader(Pairs(), batch_size=None, num_workers=2, multiprocessing_context=context)
    for found, threads in loader:
        assert bytes(found) == expected
        assert threads == max(1, _threads.default_threads() // 2)
