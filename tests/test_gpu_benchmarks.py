"""The GPU benchmarks as far as they go without one: counting, gates, replays on the host, training."""

from __future__ import annotations

import itertools
import json
import sys
import time
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import ndimage

import lesionsynth as ls
from benchmarks import (
    common,
    counted,
    device_time,
    gpu,
    gpu_batches,
    gpu_report,
    kernels,
    rivals,
    smoke,
    volumes,
)
from benchmarks.cupyx_pipeline import Pipeline
from benchmarks.device_time import Gate, GateError
from benchmarks.gpu_inputs import INPUT_SETS, Inputs, indices, synthesizer
from lesionsynth.cuda import render
from lesionsynth.cuda.render import Job, Renderer
from tests.cuda_host.device import HostDevice
from tests.cuda_host.pairs import volume
from tests.cuda_host.shim import compiler
from tests.gpu import devices
from tests.plans import small_config

without_gpu = pytest.mark.skipif(devices() > 0, reason="there is a GPU")
SHAPE = (12, 40, 44)


@without_gpu
@pytest.mark.parametrize("module", [gpu, smoke])
def test_without_a_gpu(module, capsys) -> None:
    assert module.main([]) == 2
    message = capsys.readouterr().err
    assert f"{module.__name__} " in message
    assert "a CUDA device, but" in message
    assert ("--count" in message) == (module is gpu)


def test_counts(tmp_path, capsys) -> None:
    assert gpu.main(["--count", "--quick", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "gpu-counted.json").read_text())
    voxels = 8 * np.prod(volumes.QUICK_SHAPE)
    assert record["kernels"]["copy_pair"]["bytes"] == 9 * voxels
    assert record["kernels"]["read_mask"]["bytes"] == 9 / 8 * voxels
    assert 0 < record["lesions_share"] < 8
    assert all(seconds > 0 for seconds in record["floors_s"].values())
    assert "batch of 8: copy" in capsys.readouterr().out


def test_counted_filters() -> None:
    """One ellipsoid, by hand: taps where the line is longer than the kernel, else half the line."""
    from tests.plans import blob, plan, renderer

    image, mask = np.zeros((12, 40, 44), np.float32), np.ones((12, 40, 44), bool)
    one = renderer().render(plan(blob(sigma_a=20.0, sigma_b=0.8)), image, mask).plan
    (lesion,) = one.components
    size = [stop - start for start, stop in lesion.box]
    assert size == [7, 7, 7]
    kernels = {}
    for name in ("noise", "salt"):
        kernels |= {f"{name}_along_{axis}": {"bytes": 0.0, "float32": 0.0, "integer": 0.0} for axis in "xyz"}
    kernels |= {
        "draw_blobs": {"float64": 0.0, "bytes": 0.0},
        "join_blobs": {"bytes": 0.0},
        "inject": {"bytes": 0.0},
    }
    counted._count_plan(one, image.shape, kernels)
    assert kernels["noise_along_y"] == {"bytes": 8.0 * 343, "float32": 4.0 * 343, "integer": 0.0}  # half of 7
    assert (
        kernels["salt_along_y"]["float32"] == 2 * 3 * 343
    )  # radius 3, an addition and a multiply-add a step
    assert kernels["inject"]["bytes"] == 13 * lesion.voxels


def test_the_rival_draws_the_same_blobs() -> None:
    """With NumPy and SciPy in the place of CuPy: the same lines, lesionsynth's shapes and target."""
    slab = volumes.phantom(volumes.QUICK_SHAPE)
    synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)
    for index in range(2):
        plan = synth.sample(index=index, shape=slab.image.shape, lung_fraction=0.4)
        pair = synth.render(plan, slab.image, slab.mask)
        image, target, labels = Pipeline(np, ndimage).render(plan, slab.image, slab.mask)
        assert_array_equal(target, pair.target)
        assert_array_equal(labels > 0, pair.labels > 0)
        assert_array_equal(image[labels == 0], slab.image[labels == 0])
        assert (image >= slab.image).all()
        # other noise, and the parameters of another blob of the plan: a lesion's mean is below its mu0, at
        # most 0.8, and 60 renderings lay between 0.25 and 0.53
        assert slab.image[labels > 0].mean() + 0.1 < image[labels > 0].mean() < 0.8


def test_rivals_render_every_plan_untimed_and_those_that_cannot_are_left_out() -> None:
    seen: list[int] = []

    def broken(number: int) -> None:
        if number == 2:
            raise ImportError("cuBLAS is not installed")

    ready, plans, left_out = rivals.prepared({rivals.OURS: seen.append, "CuPy": broken}, 4, 60.0)
    assert seen == [0, 1, 2, 3]
    assert plans == 4
    assert ready == {rivals.OURS: seen.append}
    assert left_out == {"CuPy": "ImportError: cuBLAS is not installed"}
    with pytest.raises(ImportError):
        rivals.prepared({rivals.OURS: broken}, 4, 60.0)


def test_all_rivals_get_the_plans_that_the_slowest_has_ready(monkeypatch) -> None:
    seconds = itertools.count(step=10.0)  # a glance at the clock: 10 s
    monkeypatch.setattr(rivals.time, "perf_counter", lambda: next(seconds))
    seen: dict[str, list[int]] = {rivals.OURS: [], "slow": [], "last": []}
    contestants = {name: numbers.append for name, numbers in seen.items()}
    _, plans, _ = rivals.prepared(contestants, 4, 25.0)
    assert plans == 3
    assert seen == {rivals.OURS: [0, 1, 2], "slow": [0, 1, 2], "last": [0, 1, 2]}
    _, plans, _ = rivals.prepared(contestants, 4, 1.0)
    assert plans == 1


# --- gates ---


class FakeClock:
    """A device and a host with clocks of their own: no test here depends on a real time."""

    def __init__(self) -> None:
        self.host = self.free = 0.0  # time on the host; when the device will have done what is queued
        self.gates: list[float] = []

    def now(self) -> float:
        return self.host

    def work(self, host_s: float, device_s: float) -> None:
        self.host += host_s
        self.free = max(self.free, self.host) + device_s

    def spin(self, nanoseconds: int) -> None:
        self.gates.append(nanoseconds / 1e9)
        self.work(0, nanoseconds / 1e9)

    def mark(self) -> SimpleNamespace:
        at = max(self.free, self.host)
        return FakeEvent(self, at)

    def elapsed(self, first, last) -> float:
        return last.at - first.at

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)


class FakeEvent(SimpleNamespace):
    def __init__(self, clock: FakeClock, at: float) -> None:
        super().__init__(clock=clock, at=at)

    @property
    def done(self) -> bool:
        return self.clock.host >= self.at


def test_a_gate_shows_the_device_s_time_where_the_host_is_slower() -> None:
    clock, numbers = FakeClock(), []
    found = Gate(clock).times(lambda k: (numbers.append(k), clock.work(1e-3, 1e-4)), 30)
    assert found["count"] == 30
    assert numbers == [*range(6), *range(12), *range(30)]  # the first and a whole chunk are not timed
    np.testing.assert_allclose(found["samples_s"], 1e-4)
    assert found["gate"]["repeated"] == 0
    assert found["gate"]["calls"] == device_time.CHUNK == 12
    assert max(clock.gates) >= 12e-3  # twelve calls of the host


def test_a_gate_that_is_too_short_is_noticed_and_lengthened() -> None:
    """The host becomes slow once it is ahead; the calls that were not held are queued again."""
    clock, numbers = FakeClock(), []

    def run(number: int) -> None:
        numbers.append(number)
        slow = len(numbers) > 6  # the six calls by which the first gate is sized
        clock.work(20e-3 if slow else 1e-3, 1e-4)

    found = Gate(clock).times(run, 24)
    np.testing.assert_allclose(found["samples_s"], 1e-4)
    assert found["gate"]["repeated"] >= 1
    assert found["gate"]["longest_s"] >= 12 * 20e-3
    assert numbers[-24:] == list(range(24))


def test_a_gate_gives_up_on_calls_that_wait_for_the_device() -> None:
    clock = FakeClock()

    def run(number: int) -> None:
        clock.work(1e-3, 1e-4)
        clock.synchronize()

    gate = Gate(clock)
    with pytest.raises(GateError, match=r"the device was not held.*after 6 gates"):
        gate.hold(lambda: run(0), 1e-3)
    assert len(clock.gates) == device_time.ATTEMPTS
    assert all(b >= min(2 * a, device_time.LONGEST_S) for a, b in pairwise(clock.gates))
    clock.gates.clear()
    with pytest.raises(GateError):
        gate.hold(lambda: run(0), 10.0)
    assert clock.gates == [device_time.LONGEST_S] * device_time.ATTEMPTS
    found = gate.times(run, 10)
    assert found.keys() == {"error"}


def test_the_spinning_kernel_compiles_without_headers() -> None:
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")
    from lesionsynth.cuda.compiling import compile_program

    code, log = compile_program(device_time.SPIN, "compute_90")
    assert code.count(b"mov.u64") >= 2
    assert b"globaltimer" in code
    assert "warning" not in log


# --- the whole run, with the host in the place of the device ---


class HostClock:
    """Real time; a device that has done nothing yet when it is asked."""

    def now(self) -> float:
        return time.perf_counter()

    def spin(self, nanoseconds: int) -> None:
        pass

    def mark(self) -> SimpleNamespace:
        return SimpleNamespace(at=time.perf_counter(), done=False)

    def elapsed(self, first, last) -> float:
        return last.at - first.at

    def synchronize(self) -> None:
        pass


class Graph:
    """A captured batch, or one that does nothing when it is launched."""

    broken = False

    def __init__(self, launches) -> None:
        self.launches = launches

    def launch(self) -> None:
        if not self.broken:
            self.launches()


class GraphDevice(HostDevice):
    """Captures as the real device does: launched once, then captured, then replayed."""

    def __init__(self, number: int = 0, *, graphs: bool = True) -> None:
        super().__init__()
        self.graphs, self._graphs = graphs, {}

    def replay(self, key, launches) -> None:
        if not self.graphs or key not in self._graphs:
            launches()
            self._graphs[key] = object()
            return
        if not isinstance(self._graphs[key], Graph):
            self._graphs[key] = Graph(launches)
        self._graphs[key].launches()


class HostBackend:
    """`lesionsynth.cuda.backend.CudaBackend` on NumPy arrays and the shim."""

    def __init__(self, *, plain: bool = False, graphs: bool = True) -> None:
        self.graphs, self.renderers = graphs, {}

    def accept(self, image, lung_mask, out) -> SimpleNamespace:
        return SimpleNamespace(shape=image.shape, image=image, mask=lung_mask, out=out)

    def render(self, plans, inputs, hu_range) -> SimpleNamespace:
        renderer = self.renderers.setdefault(0, Renderer(GraphDevice(graphs=self.graphs)))
        image, target = inputs.out
        arrays = inputs.image, inputs.mask.view(np.uint8), image, target.view(np.uint8)
        lesions = renderer.render(plans, Job(*map(volume, arrays)), hu_range)
        return SimpleNamespace(
            image=image, target=target, finished=False, components=lesions.components, labels=None
        )


class NumpyAsCupy(ModuleType):
    """What the benchmarks use of CuPy, from NumPy."""

    __version__ = "none"
    asnumpy = staticmethod(np.asarray)
    cuda = SimpleNamespace(
        Device=lambda: SimpleNamespace(synchronize=lambda: None),
        runtime=SimpleNamespace(
            getDeviceProperties=lambda _: {"name": b"NVIDIA Host"}, runtimeGetVersion=lambda: 0
        ),
    )

    def __getattr__(self, name: str):
        return getattr(np, name)


@pytest.fixture
def replay():
    """The module, where CuPy is installed: it needs no GPU to be imported."""
    pytest.importorskip("cupy")
    if compiler() is None:
        pytest.skip("the shim needs g++, which is not installed")
    from benchmarks import replay

    return replay


@pytest.fixture
def host(replay, monkeypatch):
    """The host in the place of the device: batches of two small slabs."""
    cupy = NumpyAsCupy("cupy")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupyx.scipy", SimpleNamespace(ndimage=ndimage))
    monkeypatch.setattr("lesionsynth.cuda.backend.CudaBackend", HostBackend)
    monkeypatch.setattr("lesionsynth.cuda.cupy_device.CupyDevice", GraphDevice)
    monkeypatch.setattr(replay, "CudaBackend", HostBackend)
    monkeypatch.setattr(replay, "cupy", cupy)
    monkeypatch.setattr(replay, "recorded", lambda: recorded(replay))
    monkeypatch.setattr(replay, "TUNED", {"BLOCKS_OF_COPY": (2, 3)})
    monkeypatch.setattr(device_time, "CupyClock", HostClock)
    monkeypatch.setattr(device_time, "Gate", lambda clock: Gate(clock, chunk=2))
    monkeypatch.setattr(ls.presets, "covid_lung", small_config)
    monkeypatch.setattr(rivals, "PLANS", 1)
    for module in (gpu_batches, gpu_report):
        monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(gpu_batches, "COPY_BYTES", 2**16)
    return cupy


def recorded(replay):
    class Recorder(replay.Recording, GraphDevice):
        pass

    device, backend = Recorder(), HostBackend()
    backend.renderers[0] = Renderer(device)
    return device, backend


@pytest.mark.slow
def test_a_whole_run_on_the_host(host, tmp_path, capsys, monkeypatch) -> None:
    """Every section, with the kernels' own source behind it; times mean nothing."""
    monkeypatch.setattr(volumes, "SHAPE", SHAPE)
    options = gpu.parse(["--plans", "8", "--rounds", "3", "--batches", "1,2", "--output", str(tmp_path)])
    results, path = gpu.measure(options, volumes.phantom(SHAPE))
    assert path == tmp_path / "gpu--nvidia-host.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))
    assert results["complete"]
    assert results["correctness"]["passed"]
    for n in ("1", "2"):
        found = results["batches"][n]
        assert found.keys() == {"graph", "graph, same input", "launches", "replay"}
        for name, entry in found.items():
            assert entry["device"]["count"] == entry["host"]["count"] == 3, name
            slower = max(entry["device"]["median_s"], entry["host"]["median_s"])
            assert entry["pairs_per_second"] == pytest.approx(int(n) / slower)
            assert ("wall" in entry) == (name != "replay")
    # each kernel once a batch; the chunk of four before the four that hold the three rounds is not counted
    assert {entry["count"] for entry in results["stages"].values()} == {4}
    assert {"copy_pair", "read_mask", "inject", "salt_along_z"} <= results["stages"].keys()
    digests = {entry["digest"] for entry in results["tuning"]["variants"].values()}
    assert digests == {results["tuning"]["digest"]} == {results["batches"]["2"]["replay"]["device"]["digest"]}
    assert results["tuning"]["constants"]["BLOCKS_OF_COPY"] == render.BLOCKS_OF_COPY
    assert results["tuning"]["variants"].keys() == {"BLOCKS_OF_COPY=2", "BLOCKS_OF_COPY=3"}
    assert results["others"]["left_out"] == {}
    assert {"cupyx.scipy.ndimage", "lesionsynth, CPU"} <= results["others"]["times"].keys()
    assert [entry["name"] for entry in results["goals"]] == [
        "voxels that differ from the CPU's, 8 plans",
        "batch of 2 by graph replay",
    ]
    assert results["goals"][0]["met"] is None  # too few plans to say
    gpu_report.show(results)
    shown = capsys.readouterr().out
    for part in (
        "replay over its floor",
        "BLOCKS_OF_COPY=3",
        "cupyx.scipy.ndimage",
        "join_blobs",
        "2 replay",
    ):
        assert part in shown
    assert gpu_report.draw(results, path).stat().st_size > 10_000


def sets(n: int = 2) -> list[Inputs]:
    slab = volumes.phantom(SHAPE)
    image, mask = np.stack([slab.image] * n), np.stack([slab.mask] * n)
    return [Inputs(image, mask, (np.empty_like(image), np.empty_like(mask))) for _ in range(INPUT_SETS)]


def test_a_replay_gives_the_cpu_twin_s_pairs(host, replay) -> None:
    """By its digest, which is the same for every library."""
    batches, gate = sets(), Gate(HostClock(), chunk=2)
    want = replay.ordinary(batches, gate)
    kept = replay.keep(batches, gate)
    assert [one.inputs for one in kept] == batches
    found = replay.replay_times(kept, want, gate, 3)
    assert "error" not in found
    twin = ls.LesionSynthesizer(small_config(), seed=0)
    for number, batch in enumerate(batches):
        pair = twin(batch.image, batch.mask, index=indices(2, number))
        assert batch.holds((pair.image, pair.target))
        assert replay.digest(*batch.out) == replay.digest(pair.image, pair.target)
    assert len({replay.digest(*batch.out) for batch in batches}) == len(batches)
    pair = twin(batches[0].image, batches[0].mask, index=indices(2, 0))
    assert found["digest"] == replay.digest(pair.image, pair.target)


def test_a_replay_with_other_outputs_is_refused(host, replay, monkeypatch) -> None:
    batches, gate = sets(), Gate(HostClock(), chunk=2)
    want = replay.ordinary(batches, gate)
    kept = replay.keep(batches, gate)
    one = want[1][0].copy()
    one[0, 0, 0, 0] += 1
    changed = [want[0], (one, want[1][1]), want[2]]
    assert "refused: replays of batches [1]" in replay.replay_times(kept, changed, gate, 3)["error"]
    monkeypatch.setattr(Graph, "broken", True)  # nothing is written: the poison stays
    found = replay.replay_times(kept, want, gate, 3)
    assert "refused: replays of batches [0, 1, 2]" in found["error"]
    assert "median_s" not in found


def test_batches_that_were_not_captured_have_no_replay(host, replay, monkeypatch) -> None:
    monkeypatch.setattr(GraphDevice, "replay", lambda self, key, launches: launches())
    found = replay.replays(sets(1), Gate(HostClock(), chunk=2), 3)
    assert "no graph was captured" in found["device"]["error"]


def test_a_digest_depends_on_every_bit_and_its_place(replay) -> None:
    image = np.arange(24, dtype=np.float32).reshape(2, 1, 3, 4)
    target = image > 7
    first = replay.digest(image, target)
    assert replay.digest(image[::-1], target) != first
    assert replay.digest(image[..., ::-1], target) != first
    assert replay.digest(image, ~target) != first
    assert replay.digest(image.copy(order="F"), target) == first


# --- reports ---


def test_goals() -> None:
    met, missed = common.goal("time", 0.3, 0.35, "ms", aim=0.28), common.goal("ratio", 1.03, 1.02)
    unknown = common.goal("time", None, 0.35, "ms")
    assert (met["met"], missed["met"], unknown["met"]) == (True, False, None)
    assert common.goal_line(met) == "time: 0.3 ms (goal 0.35, aim 0.28: met)"
    assert common.goal_line(missed) == "ratio: 1.03 (goal 1.02: MISSED)"
    assert common.goal_line(unknown) == "time: not measured (goal 0.35 ms)"


def results_of(replayed: dict, plans: int = 200, shape=volumes.SHAPE, differ: int = 0) -> dict:
    names = ("labels", "targets", "images, bit for bit")
    return {
        "settings": {"plans": plans, "shape": list(shape)},
        "correctness": {"checks": [{"name": name, "value": differ} for name in names]},
        "bandwidth_bytes_s": {"median": 3e12},
        "batches": {"8": {"replay": {"device": replayed}}},
    }


def test_the_goals_of_a_run() -> None:
    bits, speed = gpu_report.goals(results_of({"median_s": 0.34e-3}))
    assert (bits["met"], speed["met"], speed["value"]) == (True, True, pytest.approx(0.34))
    bits, speed = gpu_report.goals(results_of({"median_s": 0.36e-3}, differ=1))
    assert (bits["met"], speed["met"]) == (False, False)
    bits, speed = gpu_report.goals(results_of({"error": "refused"}, plans=16))
    assert (bits["met"], speed["met"], speed["value"]) == (None, None, None)
    assert len(gpu_report.goals(results_of({"median_s": 1e-6}, shape=volumes.QUICK_SHAPE))) == 1
    # 32 x 512 x 512 voxels of ten bytes, eight times, at 3 TB/s
    assert gpu_report.floor(results_of({}))["seconds"] == pytest.approx(223.7e-6, rel=1e-3)


def usage(kernel: str, registers: int, spills: int = 0) -> dict:
    return {
        "kernel": kernel,
        "registers": registers,
        "stack": 0,
        "spills": spills,
        "shared": 0,
        "resident_blocks": 4,
    }


def test_kernels_are_compared_with_an_earlier_run() -> None:
    before = {"generator": {"sm_90": [usage("copy", 66), usage("old", 10), usage("same", 7)]}}
    after = {"generator": {"sm_90": [usage("copy", 52, 8), usage("fresh", 20), usage("same", 7)]}}
    assert kernels.compared(before, before) == []
    assert kernels.compared(before, after) == [
        "generator copy, sm_90: registers 66 -> 52, bytes spilled 0 -> 8",
        "generator old: gone",
        "generator fresh: new",
        "generator fresh, sm_90: registers 20, bytes spilled 0, bytes shared 0, blocks a multiprocessor 4",
    ]


def test_kernels_against_a_file(tmp_path, capsys, monkeypatch) -> None:
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")
    programs = {f"sm_{a}": [usage("copy", 60 + a)] for a in kernels.nvrtc.ARCHITECTURES}
    monkeypatch.setattr(kernels, "compiled", lambda text: programs)
    file = tmp_path / "table.json"
    kernels.main(["--output", str(file), "--markdown"])
    shown = capsys.readouterr().out
    assert "| kernel | sm_75 | sm_80 | sm_90 | sm_100 |" in shown
    assert "| `copy` | 135, 4 | 140, 4 | 150, 4 | 160, 4 |" in shown
    assert "against" not in json.loads(file.read_text())
    programs["sm_90"] = [usage("copy", 52)]
    kernels.main(["--output", str(file), "--against", str(file)])  # read before it is written over
    assert "copy, sm_90: registers 150 -> 52" in capsys.readouterr().out
    changes = json.loads(file.read_text())["against"]["changes"]
    assert changes == [f"{name} copy, sm_90: registers 150 -> 52" for name in ("generator", "ops")]
    with pytest.raises(SystemExit):
        kernels.main(["--output", str(file), "--against", str(file), "--image", "float16"])
    assert "--against must be of float16 images, got float32" in capsys.readouterr().err


# --- smoke and training ---


def test_steps_are_announced_before_they_are_tried(tmp_path, capsys) -> None:
    file, states = tmp_path / "steps.json", []
    steps = smoke.Steps(file)

    def run() -> str:
        states.append(json.loads(file.read_text())["steps"][-1]["state"])
        states.append(capsys.readouterr().out)
        return "fine"

    steps("first", run)
    steps("second", lambda: 1 / 0)
    assert states == ["TRY", "TRY  first\n"]
    record = json.loads(file.read_text())
    assert [(step["state"], step["said"]) for step in record["steps"]] == [
        ("OK", "fine"),
        ("FAIL", "ZeroDivisionError: division by zero"),
    ]
    assert record["failed"] == ["second"]
    shown = capsys.readouterr().out
    assert "OK   first" in shown
    assert "FAIL second" in shown


def test_smoke_holds_batches_to_the_cpu_twin(host, monkeypatch) -> None:
    images, masks, want = smoke.expected()
    batch = smoke.Batch(plain=False, graphs=True)
    monkeypatch.setattr(batch, "synth", synthesizer())  # the twin in the device's place
    assert batch.compare(0) == "equal to the CPU twin"
    target = want.target.copy()
    target[0, 0, 0, :3] ^= True
    monkeypatch.setattr(smoke, "expected", lambda: (images, masks, SimpleNamespace(
        image=want.image, target=target, labels=want.labels, plan=want.plan,
    )))  # fmt: skip
    with pytest.raises(AssertionError, match="'target': 3, 'image': 0, 'labels': 0, 'plans': 0"):
        batch.compare(0)


@pytest.mark.parametrize("name", smoke.OPERATIONS)
def test_smoke_compares_all_that_an_operation_returns(name, host, monkeypatch) -> None:
    assert smoke.same(smoke.OPERATIONS[name]) == "equal to the CPU twin"
    monkeypatch.setattr(host, "asarray", lambda array: np.ascontiguousarray(array[::-1]), raising=False)
    with pytest.raises(AssertionError, match="voxels differ"):
        smoke.same(smoke.OPERATIONS[name])


def test_smoke_trains() -> None:
    pytest.importorskip("normnet.train", reason="training needs torch and MONAI")
    assert smoke.trained("cpu").startswith("4 steps")


@pytest.mark.slow
def test_training_on_a_cpu(tmp_path, capsys) -> None:
    training = pytest.importorskip("benchmarks.training")
    arguments = ["--device", "cpu", "--small", "--steps", "3", "--row", "2", "--output", str(tmp_path)]
    assert training.main(arguments) == 0
    record = json.loads((tmp_path / "training--cpu.json").read_text())
    for precision in ("bf16", "fp32"):
        for mode, count in (("one at a time", 3), ("in a row", 2)):
            found = record["precisions"][precision][mode]
            assert found["on the fly"]["count"] == found["ready-made"]["count"] == count
            low, high = found["on the fly over ready-made"]["quartiles"]
            assert 0 < low <= found["on the fly over ready-made"]["median"] <= high
            assert found["ready-made, again over ready-made"]["median"] > 0
    assert [entry["limit"] for entry in record["goals"]] == [1.02, 1.02]
    shown = capsys.readouterr().out
    assert "on the fly over ready-made" in shown
    assert "(goal 1.02:" in shown


def test_ratios_are_taken_turn_by_turn(monkeypatch) -> None:
    training = pytest.importorskip("benchmarks.training")
    costs = {"on the fly": 3.0, "ready-made": 2.0, "ready-made, again": 2.0}
    calls: list[tuple[str, int]] = []
    now = [0.0]

    def step(name: str):
        def run(number: int) -> None:
            calls.append((name, number))
            now[0] += costs[name] * (1 + number // 2)  # every turn slower than the last

        return run

    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    kinds = {name: step(name) for name in costs}
    found = training.compared(SimpleNamespace(type="cpu"), kinds, 4, 2)
    assert found["on the fly over ready-made"] == {"median": 1.5, "quartiles": [1.5, 1.5]}
    assert found["ready-made, again over ready-made"]["median"] == 1
    assert found["on the fly"]["samples_s"] == [3, 6, 9, 12]  # of a step
    assert sorted(set(calls)) == sorted(calls)
    assert len(calls) == 3 * 4 * 2
    assert len({calls[k][0] for k in range(0, len(calls), 6)}) > 1  # turns begin with different kinds
