"""Batches on several streams and threads, on a host device whose streams run as late as they may.

Whatever order the renderer relies on it must have asked for; see tests/cuda_host/streams.py.
"""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import lesionsynth as ls
from lesionsynth.cuda.render import Renderer
from lesionsynth.cuda.workspace import MOST_SLOTS
from tests.conftest import draw_lungs
from tests.cuda_host.pairs import begin
from tests.cuda_host.shim import compiler
from tests.cuda_host.streams import LateDevice
from tests.plans import renderer, small_config

pytestmark = pytest.mark.skipif(compiler() is None, reason="the shim needs g++, which is not installed")

SHAPE = (4, 24, 40)
PLANS = 12


class Samples:
    """Plans, and what the CPU twin makes of each."""

    def __init__(self) -> None:
        self.image, self.mask = draw_lungs(SHAPE)
        synth = ls.LesionSynthesizer(small_config(), seed=3)
        self.plans = [synth.sample(index=k, shape=SHAPE) for k in range(PLANS)]
        self.wanted = [renderer().render(one, self.image, self.mask) for one in self.plans]

    def begin(self, gpu: Renderer, numbers) -> Begun:
        n = len(numbers)
        arrays = np.stack([self.image] * n), np.stack([self.mask] * n)
        pair = begin(gpu, [self.plans[k] for k in numbers], *arrays)
        gpu.device.held.append((*arrays, pair.image, pair.target))
        return Begun(gpu, pair, [self.wanted[k] for k in numbers])


class Begun:
    """A batch under way, and what is to come of it."""

    def __init__(self, gpu, pair, wanted) -> None:
        self.gpu, self.pair, self.wanted = gpu, pair, wanted

    def check_plan(self) -> None:
        assert list(self.pair.components) == [w.plan.components for w in self.wanted]

    def paint(self) -> np.ndarray:
        """Begin to paint."""
        labels = np.full(self.pair.image.shape, -7, dtype=np.int32)
        self.gpu.device.held.append(labels)
        self.pair.lesions.paint(labels.ctypes.data)
        return labels

    def check_labels(self) -> None:
        labels = self.paint()
        self.gpu.device.mark().wait()
        assert_array_equal(labels, self.labels)

    @property
    def labels(self) -> np.ndarray:
        return np.stack([w.labels for w in self.wanted])

    def check_pair(self) -> None:
        """Once the device is done."""
        assert_array_equal(self.pair.image, np.stack([w.image for w in self.wanted]))
        assert_array_equal(self.pair.target, np.stack([w.target for w in self.wanted]))


@pytest.fixture(scope="module")
def samples() -> Samples:
    return Samples()


def late(**options) -> Renderer:
    return Renderer(LateDevice(**options))


@pytest.mark.parametrize("ask", ["check_plan", "check_labels"])
def test_asked_on_another_stream_after_the_workspace_moved_on(ask, samples) -> None:
    """Batches of stream b, which have not run when a asks, use the same workspace."""
    gpu = late()
    with gpu.device.on("a"):
        first = samples.begin(gpu, [0, 1])
    with gpu.device.on("b"):
        others = [samples.begin(gpu, [k]) for k in (2, 3)]
    with gpu.device.on("a"):
        getattr(first, ask)()
    gpu.device.finish()
    for begun in (first, *others):
        begun.check_pair()


def test_release_waits_for_what_pairs_copy(samples) -> None:
    """The copies read the memory that is given back, and whose next owner writes it at once."""
    gpu = late()
    with gpu.device.on("a"):
        begun = [samples.begin(gpu, [k]) for k in (0, 1)]
    with gpu.device.on("b"):
        gpu.release()
    assert gpu.workspace.report() == {}
    with gpu.device.on("a"):
        begun.append(samples.begin(gpu, [2]))
        for one in begun:
            one.check_plan()
            one.check_labels()


@pytest.mark.parametrize(("streams", "sizes"), [("ab", (1, 2, 4, 7, 12)), ("abc", (1, 1, 4, 4, 12))])
def test_a_workspace_grows_under_batches_that_are_under_way(streams, sizes, samples) -> None:
    """The smaller buffers are freed only behind the last batch that uses them, on whichever stream."""
    gpu = late()
    begun = []
    for number, size in enumerate(sizes):
        with gpu.device.on(streams[number % len(streams)]):
            begun.append(samples.begin(gpu, list(range(size))))
    gpu.device.finish()
    for one in begun:
        one.check_pair()
        one.check_plan()
    assert gpu.device.waits <= len(begun)  # each plan waits for its batch; growing does not


def test_the_host_runs_ahead_of_the_device(samples) -> None:
    """More batches than there are slots: the host waits for the oldest, and each keeps its own table."""
    gpu = late()
    begun = [samples.begin(gpu, [k % PLANS]) for k in range(2 * MOST_SLOTS + 3)]
    assert gpu.device.waits == MOST_SLOTS + 3
    gpu.device.finish()
    for one in begun:
        one.check_pair()
        one.check_plan()


def test_page_locked_memory_is_taken_once(samples) -> None:
    """Also when batches begin to pile up later: taking it could stop the device."""
    gpu = late()
    numbers = list(range(4))
    samples.begin(gpu, numbers)
    gpu.device.finish()
    assert gpu.device.pinned_taken == 1
    begun = [samples.begin(gpu, numbers) for _ in range(MOST_SLOTS + 2)]
    assert gpu.device.pinned_taken == 1
    begun += [samples.begin(gpu, list(range(12))) for _ in range(MOST_SLOTS + 2)]
    assert gpu.device.pinned_taken == 2
    gpu.device.finish()
    for one in begun:
        one.check_pair()


def test_two_host_threads_on_two_streams(samples) -> None:
    gpu = late(progress=20)
    failures: list[BaseException] = []

    def work(stream: str, first: int) -> None:
        try:
            with gpu.device.on(stream):
                begun = [samples.begin(gpu, [(first + k) % PLANS]) for k in range(6)]
                for one in begun:
                    one.check_plan()
                    one.check_labels()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name, 5 * k)) for k, name in enumerate("ab")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_batch_that_finds_no_memory_for_its_pair(samples, monkeypatch) -> None:
    """It fails; earlier pairs and later ones are whole."""
    gpu = late()
    first, second = samples.begin(gpu, [0]), samples.begin(gpu, [1])
    take = gpu.device.allocate

    def refuse(nbytes: int):
        raise MemoryError("full")

    monkeypatch.setattr(gpu.device, "allocate", refuse)
    for _ in range(2):
        with pytest.raises(MemoryError, match="full"):
            samples.begin(gpu, [2])
    monkeypatch.setattr(gpu.device, "allocate", take)
    third = samples.begin(gpu, [3])
    fourth = samples.begin(gpu, [4])
    for one in (first, second, third, fourth):
        one.check_plan()
        one.check_labels()


@pytest.mark.parametrize("batches", [2, 4])
def test_labels_under_way_when_their_pair_goes(batches, samples) -> None:
    """Later batches, and the next owner of the pair's memory, wait until they are painted."""
    gpu = late()
    with gpu.device.on("a"):
        first = samples.begin(gpu, [0, 1])
    with gpu.device.on("b"):
        others = [samples.begin(gpu, [k]) for k in range(2, batches)]
    wanted = first.labels
    with gpu.device.on("c"):
        labels = first.paint()
    del first
    gc.collect()
    with gpu.device.on("b"):
        others += [samples.begin(gpu, [k]) for k in (4, 5)]
    gpu.device.finish()
    assert_array_equal(labels, wanted)
    for one in others:
        one.check_pair()


@pytest.mark.parametrize("then", ["asked", "release"])
def test_pairs_before_a_batch_that_was_refused(then, samples) -> None:
    """The batch ends with the error of an earlier one, and leaves no mark."""
    gpu = late()
    with gpu.device.on("a"):
        strange = samples.image[None] + 2
        bad = begin(gpu, [samples.plans[0]], strange, samples.mask[None])
        gpu.device.held.append((strange, bad.image, bad.target))
        pairs = [samples.begin(gpu, [k]) for k in (1, 2)]
        del bad
        gpu.device.finish()
    with gpu.device.on("b"), pytest.raises(ValueError, match="in an earlier call"):
        samples.begin(gpu, [3])
    with gpu.device.on("a"):
        if then == "release":
            gpu.release()
        pairs[0].check_labels()
        pairs[0].check_plan()


def test_labels_under_way_at_release(samples) -> None:
    """Painted on a stream of their own: what they read is nobody else's before."""
    gpu = late()
    with gpu.device.on("a"):
        pair = samples.begin(gpu, [0, 1])
    wanted = pair.labels
    with gpu.device.on("b"):
        labels = pair.paint()
    del pair
    with gpu.device.on("a"):
        gpu.release()
        samples.begin(gpu, [2])
    gpu.device.finish()
    assert_array_equal(labels, wanted)


STREAMS = st.sampled_from("abc")
ACTIONS = st.one_of(
    st.tuples(st.just("begin"), STREAMS, st.lists(st.integers(0, PLANS - 1), min_size=1, max_size=3)),
    st.tuples(st.sampled_from(["check_plan", "check_labels", "drop"]), STREAMS, st.integers(0, 9)),
    st.tuples(st.just("release"), STREAMS, st.none()),
)


@given(actions=st.lists(ACTIONS, min_size=4, max_size=14), progress=st.sampled_from([0, 10, 60]))
@settings(max_examples=25)
def test_whatever_happens_in_whatever_order(actions, progress, samples) -> None:
    gpu = late(progress=progress, seed=len(actions))
    begun: list[Begun] = []
    for what, stream, which in actions:
        with gpu.device.on(stream):
            if what == "begin":
                begun.append(samples.begin(gpu, which))
            elif what == "release":
                gpu.release()
            elif begun and what == "drop":
                begun.pop(which % len(begun))
            elif begun:
                getattr(begun[which % len(begun)], what)()
    gpu.device.finish()
    for one in begun:
        one.check_pair()
        one.check_plan()
