"""A call that is torn off, by Ctrl-C or any handler that raises, leaves nobody at work and nothing wrong.

Python runs the handlers of signals on the main thread: at the start of a function, at the end of a loop's
turn, and after a call. The sweeps raise there one after the other, the stress test at random moments.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numba import njit
from numba.core.compiler_lock import global_compiler_lock

import lesionsynth as ls
from lesionsynth._cache import _apart
from lesionsynth.cpu.engine import memory as _memory
from lesionsynth.cpu.engine import threads as _threads
from lesionsynth.cpu.engine.threads import in_background, parallel_for, settle, tickets_for, work_together
from lesionsynth.cuda.render import Job, Renderer
from tests.conftest import REPOSITORY, draw_lungs
from tests.cuda_host.pairs import HU_RANGE, HostPair, volume
from tests.cuda_host.pairs import begin as begin_on_host
from tests.cuda_host.shim import compiler
from tests.cuda_host.streams import LateDevice, LateMark
from tests.hostile.tally import trial
from tests.plans import renderer, small_config
from tests.test_threads import two_rounds

KIND = "interrupts"
BALLS = ls.BlobClass(count=(6.0, 6.0), radius=(3.0, 6.0), scale_by_lung=False)
CONFIG = ls.LesionConfig(small=BALLS, medium=None, large=None)
SHAPE = (16, 128, 144)
"""Large enough for two threads, and for memory that is used again."""
MOST_TRIES = 20_000
"""Tries until a timer has met enough calls; a machine that does other work too needs more."""


class Torn(BaseException):
    """What a handler raises."""


def make_input() -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[1:15, 4:120, 3:140] = True
    return np.random.default_rng(1).random(SHAPE, dtype=np.float32) * mask, mask


INPUT = make_input()


def contents(pair: ls.LesionPair) -> tuple[bytes, ...]:
    return tuple(array.tobytes() for array in (pair.image, pair.target, pair.labels))


@pytest.fixture(scope="module")
def synth() -> ls.LesionSynthesizer:
    return ls.LesionSynthesizer(CONFIG, seed=2, threads=2)


@pytest.fixture(scope="module")
def wanted() -> list[tuple[bytes, ...]]:
    one = ls.LesionSynthesizer(CONFIG, seed=2, threads=1)
    return [contents(one(*INPUT, index=k)) for k in range(3)]


@pytest.fixture(autouse=True)
def idle(monkeypatch) -> Callable[[], int]:
    """Count the helpers at work, in the work itself."""
    working, run = [], _threads._Task.run

    def watched(task: Any) -> None:
        body = task.body

        def watched_body() -> None:
            working.append(task)
            try:
                body()
            finally:
                working.remove(task)

        if body is not None:
            task.body = watched_body
        run(task)

    monkeypatch.setattr(_threads._Task, "run", watched)
    return lambda: len(working)


def check_next(synth, wanted, held, k: int) -> None:
    """After a call that was torn off: the pairs that are held, and the next one."""
    assert contents(held[0]) == held[1]
    assert contents(synth(*INPUT, index=k % 3)) == wanted[k % 3]


# --- one point after the other ---


POINTS = {
    "hand over": (_threads._Pool, "submit"),
    "claim": (_threads, "claim"),
    "wait": (_threads, "settle"),
    "scratch": ("lesionsynth.cpu.shapes", "scratch"),
    "memory": (_memory, "_take"),
    "lease": (_memory, "_leased"),
    "rounds": ("lesionsynth.cpu.merge", "work_together"),
    "begin to copy": ("lesionsynth.cpu.inject", "in_background"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", POINTS)
def test_a_raise_at_every_call_of(point, when, synth, wanted, idle, monkeypatch) -> None:
    """Sweep over the calls of one function; behind the wait only, which is one call of compiled code."""
    after = when == "after" or point == "wait"
    owner, name = POINTS[point]
    owner = sys.modules[owner] if isinstance(owner, str) else owner
    real, state = getattr(owner, name), {"left": -1}
    main = threading.get_ident()

    def torn(*arguments: Any, **named: Any) -> Any:
        if threading.get_ident() != main:
            return real(*arguments, **named)
        now, state["left"] = state["left"] == 0, state["left"] - 1
        if now and not after:
            raise Torn
        result = real(*arguments, **named)
        if now:
            raise Torn
        return result

    held = synth(*INPUT, index=0)
    held = held, contents(held)
    monkeypatch.setattr(owner, name, torn)
    for k in range(200):
        state["left"] = k
        with trial(KIND):
            try:
                _ = synth(*INPUT, index=k % 3).labels
            except Torn:
                assert idle() == 0
                ended = False
            else:
                ended = True
            state["left"] = -1
            check_next(synth, wanted, held, k)
        if ended:
            break
    assert ended
    assert k > 0


def tear(call: Callable[[], Any], number: int) -> bool:
    """Raise `Torn` at the n-th point of a call where Python would run a handler; whether there was one."""
    left = [number]

    def watch(frame: Any, event: str, argument: Any) -> None:
        # `settle` is compiled: Python runs no handler before it. Numba tells of its calls all the same.
        if event in ("c_call", "c_exception") or frame.f_code.co_name in (
            "settle",
            "claim",
            "soon",
            "watched",
        ):
            return
        left[0] -= 1
        if left[0] < 0:
            sys.setprofile(None)
            raise Torn

    sys.setprofile(watch)
    try:
        call()
    except Torn:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torn within a finaliser
def test_a_raise_wherever_python_runs_handlers(step, synth, wanted, idle) -> None:
    held = synth(*INPUT, index=0)
    held = held, contents(held)
    _ = synth(*INPUT, index=1).labels
    for k in range(0, 1_000_000, step):
        with trial(KIND):
            torn = tear(lambda k=k: synth(*INPUT, index=k % 3).labels, k)
            assert idle() == 0
            check_next(synth, wanted, held, k)
        if not torn:
            break
    assert k > 400


MEMORY = os.path.join("lesionsynth", "cpu", "engine", "memory.py")


def tear_line(call: Callable[[], Any], number: int, file: str) -> bool:
    """Raise `Torn` at the n-th line of a file that a call runs, as want of memory may; whether there was."""
    left = [number]

    def watch(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(file):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] < 0:
                sys.settrace(None)
                raise Torn
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        call()
    except Torn:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torn within a finaliser
def test_a_raise_at_every_line_of_the_memory(synth, wanted, idle) -> None:
    """A block that was being lent is nobody's, or free; the calls to come find it so."""
    for k in range(10_000):
        with trial(KIND):
            torn = tear_line(lambda k=k: synth(*INPUT, index=k % 3).labels, k, MEMORY)
            assert idle() == 0
            assert contents(synth(*INPUT, index=k % 3)) == wanted[k % 3]
        if not torn:
            break
    assert k > 100


def test_labels_asked_for_again(synth, wanted) -> None:
    """They are painted when first asked for; what a torn painting leaves is not taken for them."""
    for k in range(10_000):
        pair = synth(*INPUT, index=k % 3)
        with trial(KIND):
            torn = tear(lambda pair=pair: (pair.labels, pair.plan), k)
            assert contents(pair) == wanted[k % 3]
            assert pair.plan.components
        if not torn:
            break
    assert k > 20


@pytest.mark.parametrize(
    "call",
    [
        lambda: ls.ops.gaussian_filter(INPUT[0], 1.5, threads=2),
        lambda: ls.ops.label(INPUT[1], threads=2)[0],
        lambda: ls.ops.grow(INPUT[0] > 0.99, INPUT[1], iterations=3, threads=2),
        lambda: ls.remove_erroneous_edges(INPUT[0], INPUT[1], threads=2)[0],
    ],
    ids=["gaussian_filter", "label", "grow", "remove_erroneous_edges"],
)
def test_operations_torn_off(call, idle) -> None:
    want = call()
    for k in range(0, 10_000, 5):
        with trial(KIND):
            torn = tear(call, k)
            assert idle() == 0
            np.testing.assert_array_equal(call(), want)
        if not torn:
            break
    assert k > 0


# --- handlers that raise again and again ---


@contextmanager
def alarms(first: float, every: float) -> Iterator[list[float]]:
    """Raise `Torn` now and then; yields the times."""
    times: list[float] = []

    def handler(*_: Any) -> None:
        times.append(time.perf_counter())
        raise Torn

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, first, every)
    try:
        yield times
    finally:
        while True:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
                break
            except Torn:
                continue
        signal.signal(signal.SIGALRM, before)


def begin_and_sleep(body: Callable[[], None]) -> None:
    tickets = tickets_for(1)
    try:
        finish = in_background(body, 2, tickets)
        time.sleep(1.0)
        finish()
    finally:
        settle(tickets)


def begin_and_finish(body: Callable[[], None]) -> None:
    finish = in_background(body, 2)
    time.sleep(0.02)  # or the caller would do it
    finish()


CALLS: dict[str, Callable[[Callable[[], None]], None]] = {
    "parallel_for": lambda body: parallel_for(2, lambda lo, hi: body() if lo else time.sleep(1.0), 2),
    "in_background": begin_and_sleep,
    "finish": begin_and_finish,
}


@pytest.mark.parametrize("name", CALLS)
def test_many_raises_while_a_helper_is_at_work(name, idle) -> None:
    """The second and the third Ctrl-C, too, find a call that waits."""
    main = threading.get_ident()
    parallel_for(2, lambda *_: None, 2)  # there are helpers
    for _ in range(100):
        begun, ended = threading.Event(), threading.Event()

        def body(begun: threading.Event = begun, ended: threading.Event = ended) -> None:
            if threading.get_ident() != main:
                begun.set()
            time.sleep(0.25)  # in Python: nothing can be waited for in a kernel of ours
            ended.set()

        with trial(KIND), alarms(0.05, 0.01) as times:
            try:
                CALLS[name](body)
            except Torn:
                assert idle() == 0
                assert ended.is_set() or not begun.is_set()
            assert times
        if begun.is_set():
            break
    assert begun.is_set()


def test_the_callers_share_fails_while_a_helper_works(idle) -> None:
    """An error of the caller's share, here for want of memory, waits as well; so does one of a helper."""
    for who in (0, 1):
        ended: list[int] = []

        def body(lo: int, hi: int, who: int = who, ended: list[int] = ended) -> None:
            if lo == who:
                raise MemoryError
            time.sleep(0.05)
            ended.append(lo)

        with trial(KIND):
            with pytest.raises(MemoryError):
                parallel_for(2, body, 2)
            assert idle() == 0
            assert len(ended) <= 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_that_raises_in_a_helper(when, monkeypatch) -> None:
    """A debugger's, say: the caller gets its error or does the work itself, and waits for nobody for ever."""
    real, main = _threads.claim, threading.get_ident()

    def torn(tickets: Any, number: int, over: bool) -> bool:
        if threading.get_ident() == main:
            return real(tickets, number, over)
        if when == "after":
            real(tickets, number, over)
        raise Torn

    parallel_for(2, lambda *_: None, 2)
    monkeypatch.setattr(_threads, "claim", torn)
    for _ in range(20):
        done: list[int] = []
        with trial(KIND):
            try:
                parallel_for(2, lambda lo, hi, done=done: (time.sleep(0.002), done.append(lo)), 2)
            except Torn:
                assert 0 in done
            else:
                assert sorted(done) == [0, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("busy", ["compiling", "painting"])
def test_a_fork_while_another_thread_is(busy, synth) -> None:
    """The child has none of the locks that the other thread held, and need not wait for it."""
    begun, pair = threading.Event(), synth(*INPUT, index=0)

    def paint() -> int:
        begun.set()
        time.sleep(0.3)
        return 0

    def compile_slowly() -> None:
        with global_compiler_lock:
            paint()

    other = ls.LesionPair(pair.image, pair.target, pair._plan, paint)
    thread = threading.Thread(target=compile_slowly if busy == "compiling" else lambda: other.labels)
    thread.start()
    begun.wait()
    with trial(KIND):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            good = njit(lambda x: x + 1)(1) == 2 and bool(pair.labels.any())
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
    thread.join()


FORK = """
import os, signal, sys, zlib
import lesionsynth as ls
from tests.hostile.test_interrupts import CONFIG, INPUT
synth, children = ls.LesionSynthesizer(CONFIG, seed=2, threads=2), []
def sums(pair): return [zlib.crc32(array.tobytes()) for array in (pair.image, pair.target, pair.labels)]
def handler(*_):
    child = os.fork()
    if child:
        children.append(child)
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(30)
    children[:] = [0]
ended, number, *wanted = [], *map(int, sys.argv[1:])
_ = synth(*INPUT, index=0).labels  # loads the kernels
signal.signal(signal.SIGALRM, handler)
for k in range(4000):
    signal.setitimer(signal.ITIMER_REAL, 0.0002 + 0.00013 * (k % 60))
    found = [sums(synth(*INPUT, index=0))]
    if children == [0]:
        found.append(sums(synth(*INPUT, index=0)))  # with helpers of its own
    signal.setitimer(signal.ITIMER_REAL, 0)
    if children == [0]:
        os._exit(0 if found == [wanted] * 2 else 1)
    ended += [os.waitpid(child, 0)[1] + 1000 * (found != [wanted]) for child in children]
    children.clear()
    if len(ended) >= number:
        break
print(ended)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_handler_that_forks(wanted) -> None:
    """In the middle of a call, with which the child goes on: it has no helper, and waits for none."""
    number = 60
    command = [sys.executable, "-c", FORK, str(number), *(str(zlib.crc32(part)) for part in wanted[0])]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    ended = json.loads(run.stdout)
    assert len(ended) >= number
    for status in ended:
        with trial(KIND):
            assert status == 0  # 14 is SIGALRM


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_handler_that_forks_while_a_kernel_is_compiled() -> None:
    """The thread that compiles stays in the parent; the child compiles itself."""
    main, children = os.getpid(), []

    def handler(*_: Any) -> None:
        children.append(os.fork())
        if children == [0]:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)

    def compile_slowly() -> int:
        if os.getpid() == main:
            os.kill(main, signal.SIGALRM)
            time.sleep(0.5)
        return os.getpid()

    before = signal.signal(signal.SIGALRM, handler)
    with trial(KIND):
        try:
            maker = _apart(compile_slowly)()
        finally:
            if children == [0]:
                os._exit(0 if maker == os.getpid() else 1)
            signal.signal(signal.SIGALRM, before)
        assert maker == main
        assert os.waitpid(children[0], 0)[1] == 0


@pytest.mark.parametrize("why", ["can't start new thread", "can't create new thread at interpreter shutdown"])
def test_a_kernel_is_compiled_where_no_thread_is_to_be_had(why, monkeypatch) -> None:
    """At the limit of processes, and for what is asked for first in `atexit` or a finaliser."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(why)

    monkeypatch.setattr("threading._start_new_thread", refuse)
    monkeypatch.setattr("concurrent.futures.thread._shutdown", True)
    with trial(KIND):
        assert _apart(lambda x: x + 1)(1) == 2


def test_rounds_torn_off(idle) -> None:
    """A kernel cannot be torn off; its caller can, before and behind it."""
    work_together(two_rounds, [1, 1], np.zeros(1, np.int64), np.zeros(1, np.int64), 1, threads=2)  # compiles
    torn = 0
    for k in range(MOST_TRIES):
        first, second = np.zeros(7, np.int64), np.zeros(3, np.int64)
        with trial(KIND):
            try:
                with alarms(0.00005 + 0.000005 * (k % 300), 0.0):
                    work_together(two_rounds, [7, 3], first, second, 20_000, threads=2)
            except Torn:
                torn += 1
            assert idle() == 0
            before = first.tolist(), second.tolist()
            time.sleep(0.0001)
            assert before == (first.tolist(), second.tolist())
        if torn == 50:
            break
    assert torn == 50


def test_a_pool_is_not_left_half_made(monkeypatch, synth, wanted) -> None:
    """The first call of a process is torn off while it starts its threads."""
    for k in range(30):
        monkeypatch.setattr(_threads, "_pools", {})
        with trial(KIND):
            torn = tear(lambda: _threads._pool(2), k)
            assert contents(synth(*INPUT, index=k % 3)) == wanted[k % 3]
        if not torn:
            break


# --- handlers that synthesise ---


def test_a_handler_that_makes_a_pair_itself(synth, wanted) -> None:
    """It runs in the middle of another call on the same thread, whose scratch is in use."""
    depth, failures, made = [0], [], [0]

    def handler(*_: Any) -> None:
        if depth[0] == 0:
            depth[0] += 1
            if contents(synth(*INPUT, index=1)) != wanted[1]:
                failures.append(1)
            made[0] += 1
            depth[0] -= 1

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for k in range(MOST_TRIES):
            with trial(KIND):
                signal.setitimer(signal.ITIMER_REAL, 0.0001 + 0.00004 * (k % 150))
                pair = synth(*INPUT, index=k % 3)
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert contents(pair) == wanted[k % 3]
                assert not failures
            if made[0] == 50:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert made[0] == 50


def test_scratch_that_is_held_is_nobody_elses() -> None:
    """A traceback, a helper or a handler's caller may hold it."""
    with trial(KIND):
        first = _memory.scratch("test", 1000, np.float32)
        second = _memory.scratch("test", 1000, np.float32)
        assert not np.shares_memory(first, second)
        place, part = second.ctypes.data, second[10:20]
        del second
        assert not np.shares_memory(_memory.scratch("test", 1000, np.float32), part)
        del part, first
        assert _memory.scratch("test", 500, np.float64).size == 500
        assert place % _memory.ALIGNMENT == 0


# --- the host code of the CUDA backend, on a host device whose streams run as late as they may ---

DEVICE_CALLS = ("allocate", "pinned", "upload", "copy", "download", "mark", "follow", "join", "launch",
                "wait")  # fmt: skip


class TornMark(LateMark):
    """Waits by a method of its device."""

    def wait(self) -> None:
        self.device.wait(self)


class TornDevice(LateDevice):
    """Raises at the n-th call of its methods: before it, or behind."""

    left, after = -1, False

    def mark(self) -> TornMark:
        return TornMark(self, self._queue(None))

    def wait(self, mark: TornMark) -> None:
        LateMark.wait(mark)

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in DEVICE_CALLS:
            return method

        def torn(*arguments: Any) -> Any:
            now, self.left = self.left == 0, self.left - 1
            if now and not self.after:
                raise Torn
            result = method(*arguments)
            if now:
                raise Torn
            return result

        return torn


@pytest.mark.skipif(compiler() is None, reason="the shim needs g++, which is not installed")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("progress", [0, 20])
@pytest.mark.parametrize("call", ["render", "plan", "labels", "release"])
def test_a_batch_torn_off_at_every_call_of_the_device(call, after, progress) -> None:
    """Then another batch, on another stream, whose workspace and page-locked memory are the same."""
    image, mask = draw_lungs((4, 24, 40))
    synth = ls.LesionSynthesizer(small_config(), seed=3)
    plans = [synth.sample(index=k, shape=image.shape) for k in range(4)]
    wanted = [renderer().render(plan, image, mask) for plan in plans]

    def begin(gpu: Renderer, k: int) -> tuple[int, HostPair]:
        arrays = [
            np.array(image[None]),
            np.array(mask[None]),
            image[None] + 77,
            np.array(mask[None]),
        ]
        gpu.device.held.append(arrays)  # a torn batch may still write
        views = (volume(a if a.dtype != bool else a.view(np.uint8)) for a in arrays)
        return k, HostPair(arrays[2], arrays[3], gpu.render([plans[k]], Job(*views), HU_RANGE))

    def check(gpu: Renderer, k: int, pair: HostPair) -> None:
        labels = np.full(pair.image.shape, -7, dtype=np.int32)
        gpu.device.held.append(labels)
        pair.lesions.paint(labels.ctypes.data)
        assert pair.components == (wanted[k].plan.components,)
        gpu.device.finish()
        for got, want in ((labels, "labels"), (pair.image, "image"), (pair.target, "target")):
            np.testing.assert_array_equal(got[0], getattr(wanted[k], want))

    def torn_labels(gpu: Renderer, pair: HostPair) -> None:
        labels = np.full(pair.image.shape, -7, dtype=np.int32)
        gpu.device.held.append(labels)
        pair.lesions.paint(labels.ctypes.data)

    for number in range(100):
        gpu = Renderer(TornDevice(progress=progress, seed=number))
        gpu.device.after = after
        with trial(KIND):
            with gpu.device.on("a"):
                first, second = begin(gpu, 0), begin(gpu, 1)
            torn = False
            gpu.device.left = number
            with gpu.device.on("b"):
                try:
                    if call == "render":
                        begin(gpu, 2)
                    elif call == "plan":
                        _ = second[1].components
                    elif call == "labels":
                        torn_labels(gpu, first[1])
                    else:
                        gpu.release()
                except Torn as error:
                    torn = True
                    gpu.device.held.append(error)  # with its buffers: freeing them would run what it launched
            gpu.device.left = -1
            with gpu.device.on("c"):
                third = begin(gpu, 3)
            for k, pair in (third, first, second):
                check(gpu, k, pair)
        if not torn:
            break
    assert number > 0


@pytest.mark.skipif(compiler() is None, reason="the shim needs g++, which is not installed")
def test_what_a_device_found_wrong_is_told_after_a_wait_was_torn_off(monkeypatch) -> None:
    gpu = Renderer(LateDevice())
    image, mask = draw_lungs((4, 24, 40))
    plan = ls.LesionSynthesizer(small_config(), seed=3).sample(index=0, shape=image.shape)
    pair = begin_on_host(gpu, [plan], image[None] + 1.0, mask[None])
    wait = LateMark.wait

    def torn(mark: LateMark) -> None:
        wait(mark)
        raise Torn

    monkeypatch.setattr(LateMark, "wait", torn)
    with trial(KIND):
        with pytest.raises(Torn):
            pair.lesions.check()
        monkeypatch.undo()
        for _ in range(2):
            with pytest.raises(ValueError, match="finite and in"):
                pair.lesions.check()


# --- at random moments, in a process of its own ---

STRESS = """
import faulthandler, json, random, signal, sys, threading, zlib
import numpy as np
import lesionsynth as ls
faulthandler.enable()

class Stop(Exception): pass
class Harder(BaseException): pass
KINDS = KeyboardInterrupt, Stop, Harder, SystemExit, TimeoutError, MemoryError

number, seed = map(int, sys.argv[1:])
chest = ls.phantom.chest_ct(shape=(16, 160, 160), seed=1)
image, mask = ls.window_hu(chest.hu) * chest.lung_mask, chest.lung_mask
synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0, threads=2)
def sum_of(pair): return [zlib.crc32(a.tobytes()) for a in (pair.image, pair.target, pair.labels)]
alone = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0, threads=1)
wanted = [sum_of(alone(image, mask, index=k, lung_fraction=1.0)) for k in range(6)]
smooth = ls.ops.gaussian_filter(image, 2.0)
delivered = [0]
rng = random.Random(seed)
armed = [False]
def handler(*_):
    if armed[0]:
        armed[0] = False
        delivered[0] += 1
        raise rng.choice(KINDS)
for one in (signal.SIGALRM, signal.SIGINT, signal.SIGVTALRM): signal.signal(one, handler)
done = threading.Event()
elsewhere = []
def beside():  # another caller, on a thread that no signal reaches
    k = 0
    while not done.wait(0.02):
        k += 1
        elsewhere.append(sum_of(synth(image, mask, index=k % 6, lung_fraction=1.0)) == wanted[k % 6])
thread = threading.Thread(target=beside); thread.start()
interrupts = tries = wrong = held_wrong = other = 0
held = [(synth(image, mask, index=k, lung_fraction=1.0), k) for k in range(2)]
while interrupts < number:
    tries += 1
    k, timer = rng.randrange(6), rng.choice((signal.ITIMER_REAL, signal.ITIMER_VIRTUAL))
    delivered[0] = 0
    try:
        try:
            armed[0] = True
            signal.setitimer(timer, rng.uniform(0.00005, 0.012))
            pair = synth(image, mask, index=k, lung_fraction=1.0)
            pair.labels
            ls.ops.gaussian_filter(image, 2.0, threads=2) if k == 0 else None
            armed[0] = False
        finally:
            armed[0] = False
    except KINDS:
        pass
    except BaseException as error:
        other += 1
        print(type(error), error, file=sys.stderr)
    signal.setitimer(timer, 0)
    interrupts += delivered[0]
    j = rng.randrange(6)
    after = synth(image, mask, index=j, lung_fraction=1.0)
    wrong += sum_of(after) != wanted[j]
    if tries % 16 == 0:
        held_wrong += sum(sum_of(p) != wanted[i] for p, i in held)
        held = [*held[1:], (after, j)]
held_wrong += sum(sum_of(p) != wanted[i] for p, i in held)
done.set(); thread.join()
print(json.dumps({"interrupts": interrupts, "tries": tries, "wrong": wrong, "held wrong": held_wrong,
    "other errors": other, "pairs elsewhere": len(elsewhere), "wrong elsewhere": elsewhere.count(False)}))
"""


@pytest.mark.parametrize("number", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_interrupts_at_random_moments(number) -> None:
    """So many interrupts, two threads, six types of exceptions, another caller beside: nothing is wrong."""
    command = [sys.executable, "-X", "faulthandler", "-c", STRESS, str(number), "0"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    with trial(KIND):
        assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    for _ in range(found["interrupts"] - 1):  # the child counted them one by one
        with trial(KIND):
            pass
    print(found)
    with trial(KIND):
        assert found["interrupts"] >= number
        for name in ("wrong", "held wrong", "other errors", "wrong elsewhere"):
            assert found[name] == 0, (found, run.stderr)
        assert found["pairs elsewhere"] > 0


FIRST = """
import random, signal, sys, zlib
import numpy as np
import lesionsynth as ls
from tests.hostile.test_interrupts import CONFIG, INPUT
def handler(*_): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, handler)
synth, rng, torn = ls.LesionSynthesizer(CONFIG, seed=2, threads=2), random.Random(int(sys.argv[1])), 0
while torn < 1000:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0001 * 1.1 ** (torn + rng.random()))
        synth(*INPUT, index=0).labels
        signal.setitimer(signal.ITIMER_REAL, 0)
        break
    except KeyboardInterrupt:
        torn += 1
signal.setitimer(signal.ITIMER_REAL, 0)
pair = synth(*INPUT, index=0)
print(torn, *(zlib.crc32(array.tobytes()) for array in (pair.image, pair.target, pair.labels)))
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_call_of_a_process(seed, wanted) -> None:
    """Numba loads or compiles; torn off there, it could do neither any more."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", FIRST, str(seed)]
    with trial(KIND):
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        torn, *sums = map(int, run.stdout.split())
        assert torn > 0
        assert sums == [zlib.crc32(part) for part in wanted[0]]
