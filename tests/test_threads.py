"""Threads: every item once, errors not lost, results independent of the count, forked workers that live."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

import lesionsynth as ls
from lesionsynth.cpu._threads import default_threads, parallel_for

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
