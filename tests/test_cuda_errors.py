"""CUDA where it cannot work: clear errors with the remedy, and nothing initialised by importing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest

import lesionsynth as ls
from tests.conftest import REPOSITORY
from tests.gpu import devices
from tests.plans import small_config
from tests.test_hostile import SHAPE, OnCuda

SYNTH = ls.LesionSynthesizer(small_config(), seed=0)

CALLS = {
    "synthesizer": lambda: SYNTH(OnCuda(), OnCuda(), index=0),
    "render": lambda: SYNTH.render(SYNTH.sample(index=0), OnCuda(), OnCuda()),
    "gaussian_filter": lambda: ls.ops.gaussian_filter(OnCuda(), 1.0),
    "uniform_filter": lambda: ls.ops.uniform_filter(OnCuda(), 3),
    "label": lambda: ls.ops.label(OnCuda()),
    "grow": lambda: ls.ops.grow(OnCuda(), OnCuda()),
    "philox_uniform": lambda: ls.ops.philox_uniform((1, 1, 1), 0, device="cuda"),
    "remove_erroneous_edges": lambda: ls.remove_erroneous_edges(OnCuda(), OnCuda()),
    "window_hu": lambda: ls.window_hu(OnCuda()),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@calls
def test_without_cupy(call, monkeypatch) -> None:
    """The extra to install is named."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(
        RuntimeError, match=r"CUDA device, which takes CuPy: pip install 'lesionsynth\[cuda13\]'"
    ):
        call()


def fail(monkeypatch, message: str) -> None:
    runtime = pytest.importorskip("cupy").cuda.runtime

    class Failing:
        """`cupy.cuda.runtime` where asking for devices fails."""

        CUDARuntimeError = RuntimeError

        @staticmethod
        def getDeviceCount() -> int:
            raise RuntimeError(message)

        def __getattr__(self, name: str) -> object:
            return getattr(runtime, name)

    monkeypatch.setattr("cupy.cuda.runtime", Failing())


@calls
def test_without_a_device(call, monkeypatch) -> None:
    fail(monkeypatch, "cudaErrorNoDevice: no CUDA-capable device is detected")
    with pytest.raises(
        RuntimeError, match=r"CUDA is not available: cudaErrorNoDevice.*is an NVIDIA driver installed"
    ):
        call()


@calls
def test_with_an_old_driver(call, monkeypatch) -> None:
    fail(
        monkeypatch,
        "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version",
    )
    with pytest.raises(
        RuntimeError, match=r"no NVIDIA driver, or it is older than CUDA 1\d\.\d.*lesionsynth\[cuda12\]"
    ):
        call()


@calls
def test_in_a_forked_worker(call, monkeypatch) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setattr("lesionsynth.cuda.cupy_device._forked", True)
    with pytest.raises(
        RuntimeError, match=r"forked from one that has used it.*multiprocessing_context='spawn'"
    ):
        call()


def test_only_a_process_that_used_cuda_spoils_its_children(monkeypatch) -> None:
    pytest.importorskip("cupy")
    from lesionsynth.cuda import cupy_device

    for modules, forked in (({}, False), ({(0, "generator", "float32"): object()}, True)):
        monkeypatch.setattr(cupy_device, "_modules", modules)
        monkeypatch.setattr(cupy_device, "_forked", None)
        cupy_device._mark_forked()
        assert cupy_device._forked is forked


def test_mixed_devices() -> None:
    """Whatever is found out first, the message says which array is where."""
    image = np.zeros(SHAPE, np.float32)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"lung_mask"):
        SYNTH(image, OnCuda(), index=0)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"(?i)cuda"):
        SYNTH(OnCuda(), image > 0, index=0)


def test_bad_device_names() -> None:
    cupy = pytest.importorskip("cupy")
    from lesionsynth.cuda import ops as cuda_ops

    for name in ("gpu", "cuda:", "cuda:x", "cuda1x", True, -1):
        with pytest.raises(ValueError, match="device must be 'cpu', 'cuda', 'cuda:N' or N"):
            cuda_ops._number(name)
    assert cupy


@pytest.mark.skipif(devices() > 0, reason="there is a GPU")
@pytest.mark.parametrize(
    "test",
    [
        "tests/test_gpu.py::test_backend_is_one",
        "tests/normnet/test_predict.py",
        "tests/normnet/test_data_gpu.py",
    ],
)
def test_a_gpu_that_is_expected_is_not_skipped(test) -> None:
    """REQUIRE_GPU=1: no test for a GPU passes by not running, nor one that finds its library blind."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", test]
    codes = []
    for require in ("", "1"):
        environment = os.environ | {"REQUIRE_GPU": require, "PYTEST_ADDOPTS": ""}
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
        codes.append(done.returncode)
    assert codes == [0, 1]
    assert "REQUIRE_GPU=1, and this did not run: " in done.stdout
    assert "passed" not in done.stdout


def test_graphs_are_captured_the_second_time_and_bounded(monkeypatch) -> None:
    """The first time compiles, the second is captured and replayed; the oldest are let go."""
    pytest.importorskip("cupy")
    from lesionsynth.cuda import cupy_device

    log: list[str] = []

    class Graph:
        def launch(self) -> None:
            log.append("replay")

    device = object.__new__(cupy_device.CupyDevice)
    device.graphs, device._graphs = True, OrderedDict()
    monkeypatch.setattr(
        cupy_device.CupyDevice, "_captured", lambda self, launches: (log.append("capture"), Graph())[1]
    )
    for _ in range(3):
        device.replay("a", lambda: log.append("launch"))
    assert log == ["launch", "capture", "replay", "replay"]
    for key in range(cupy_device.MOST_GRAPHS):
        device.replay(key, lambda: None)
    assert len(device._graphs) == cupy_device.MOST_GRAPHS
    log.clear()
    device.replay("a", lambda: log.append("launch"))
    assert log == ["launch"]
    device.graphs = False
    device.replay("a", lambda: log.append("launch"))
    assert log == ["launch", "launch"]
