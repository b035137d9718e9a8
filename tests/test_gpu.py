"""On a GPU: the device's twin against the CPU's, through the public interface; ``pytest -m gpu``.

What the kernels compute is tested without a GPU in test_cuda_render.py and test_cuda_ops.py. Here is what a
device alone can show: real order of threads and memory, streams, graphs, DLPack, libraries and devices.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

import lesionsynth as ls
from tests import golden
from tests.conftest import draw_lungs
from tests.gpu import devices, keep_busy
from tests.plans import plan, renderer, sheets, small_config

pytestmark = pytest.mark.gpu

if devices():
    import cupy

    from lesionsynth.cuda.backend import CudaBackend, backend


@pytest.fixture(scope="module")
def lungs():
    return draw_lungs()


def torch_cuda():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this build of torch sees no CUDA device")
    return torch


def synthesizer(cuda=None) -> ls.LesionSynthesizer:
    synth = ls.LesionSynthesizer(small_config(), seed=11)
    if cuda is not None:
        synth._backends.of = lambda image: cuda
    return synth


def agree(pair, expected) -> None:
    assert_array_equal(cupy.asnumpy(pair.labels), expected.labels)
    assert_array_equal(cupy.asnumpy(pair.target), expected.target)
    assert_array_equal(cupy.asnumpy(pair.image), expected.image)
    assert pair.plan == expected.plan


# --- the twin's pairs ---


@pytest.mark.parametrize("name", golden.load())
def test_golden_pairs(name) -> None:
    """Recorded from the CPU twin, on whatever machine that was."""
    record = golden.load()[name]
    one = ls.LesionPlan.from_json(json.dumps(record["plan"]))
    image, mask = golden.inputs(one.shape, record["kind"], one.seed)
    pair = renderer().render(one, cupy.asarray(image), cupy.asarray(mask))
    found = golden.hashes(*(cupy.asnumpy(a) for a in (pair.image, pair.target, pair.labels)))
    assert {key: record[key] for key in found} == found


@pytest.mark.parametrize("mode", ["graphs", "launches", "plain"])
def test_two_hundred_plans(mode, lungs) -> None:
    image, mask = lungs
    cuda = CudaBackend(graphs=mode == "graphs", plain=mode == "plain")
    gpu, cpu = synthesizer(cuda), synthesizer()
    images, masks = cupy.asarray(np.stack([image] * 8)), cupy.asarray(np.stack([mask] * 8))
    for first in range(0, 200, 8):
        index = list(range(first, first + 8))
        expected = cpu(cupy.asnumpy(images), cupy.asnumpy(masks), index=index)
        agree(gpu(images, masks, index=index), expected)


@pytest.mark.slow
def test_full_slabs_at_batch_eight() -> None:
    chest = ls.phantom.chest_ct(shape=(32, 512, 512), spacing=(1.0, 0.8, 0.8), seed=1)
    image = np.stack([(ls.window_hu(chest.hu) * chest.lung_mask).astype(np.float32)] * 8)
    mask = np.stack([chest.lung_mask] * 8)
    synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)
    on_device = cupy.asarray(image), cupy.asarray(mask)
    for first in range(0, 200, 8):
        index = list(range(first, first + 8))
        found = synth(*on_device, index=index, lung_fraction=1.0)
        agree(found, synth(image, mask, index=index, lung_fraction=1.0))


def test_repeatable_bit_for_bit(lungs) -> None:
    image, mask = (cupy.asarray(np.stack([a] * 8)) for a in lungs)
    first = synthesizer()(image, mask, index=list(range(8)))
    for _ in range(20):
        again = synthesizer()(image, mask, index=list(range(8)))
        assert bool((again.image == first.image).all())
        assert bool((again.target == first.target).all())


def test_crowded_lesions(lungs, monkeypatch) -> None:
    monkeypatch.setattr("lesionsynth.cuda.render.LEAST_FIELD", 0)
    image, mask = lungs[0], np.ones_like(lungs[1])
    synth = synthesizer(CudaBackend())
    agree(
        synth.render(plan(*sheets()), cupy.asarray(image), cupy.asarray(mask)),
        renderer().render(plan(*sheets()), image, mask),
    )


# --- arrays and libraries ---


@pytest.mark.parametrize("kind", ["float32", "float16", "float64", "int16"])
@pytest.mark.parametrize("mask_kind", ["bool", "uint8", "int64", "float32"])
def test_types(kind, mask_kind, lungs) -> None:
    image, mask = lungs
    values = ((image * 900 - 800).round() if kind == "int16" else image).astype(kind)
    pair = synthesizer()(cupy.asarray(values), cupy.asarray(mask.astype(mask_kind)), index=4)
    assert isinstance(pair.image, cupy.ndarray)
    agree(pair, synthesizer()(values, mask, index=4))


def test_views_are_read_where_they_are(lungs) -> None:
    image, mask = (cupy.asarray(a) for a in lungs)
    expected = synthesizer()(*lungs, index=1)
    for order in ("F", "C"):
        agree(
            synthesizer()(cupy.asarray(image, order=order), cupy.asarray(mask, order=order), index=1),
            expected,
        )
    wide = cupy.zeros((12, 50, 61), cupy.float32)
    wide[:, 3:43, 5:49] = image
    agree(synthesizer()(wide[:, 3:43, 5:49], mask, index=1), expected)


def test_a_torch_tensor_in_a_torch_tensor_out(lungs) -> None:
    """No other line of code; memory is shared, by its address."""
    torch = torch_cuda()
    image, mask = (torch.from_numpy(a).cuda() for a in lungs)
    pair = synthesizer()(image, mask, index=2)
    for array, dtype in ((pair.image, torch.float32), (pair.target, torch.bool), (pair.labels, torch.int32)):
        assert isinstance(array, torch.Tensor)
        assert array.is_cuda
        assert array.dtype == dtype
    expected = synthesizer()(*lungs, index=2)
    assert_array_equal(pair.image.cpu().numpy(), expected.image)
    assert_array_equal(pair.labels.cpu().numpy(), expected.labels)
    out = torch.empty_like(image), torch.empty_like(mask)
    again = synthesizer()(image, mask, index=2, out=out)
    assert again.image.data_ptr() == out[0].data_ptr()
    assert again.target.data_ptr() == out[1].data_ptr()
    assert torch.equal(again.image, pair.image)
    from lesionsynth.cuda.arrays import accept

    for tensor in (image, mask, image.to(torch.bfloat16), image.half()):
        assert accept(tensor, "x", bfloat16=True).view.data.ptr == tensor.data_ptr()


def test_bfloat16(lungs) -> None:
    torch = torch_cuda()
    image, mask = torch.from_numpy(lungs[0]).cuda().to(torch.bfloat16), torch.from_numpy(lungs[1]).cuda()
    pair = synthesizer()(image, mask, index=2)
    assert pair.image.dtype == torch.bfloat16
    expected = synthesizer()(image.float().cpu().numpy(), lungs[1], index=2)
    assert torch.equal(pair.image.cpu(), torch.from_numpy(expected.image).to(torch.bfloat16))


def test_the_callers_stream_is_followed(lungs) -> None:
    """Work queued before is waited for, work queued after sees the pair, on streams of both libraries."""
    expected = synthesizer()(*lungs, index=3)
    mask = cupy.asarray(lungs[1])
    for _ in range(10):
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            image = cupy.zeros(lungs[0].shape, cupy.float32)
            for _ in range(200):  # keeps the stream busy
                image += 1
            image[...] = cupy.asarray(lungs[0])
            pair = synthesizer()(image, mask, index=3)
            doubled = pair.image * 2
        stream.synchronize()
        assert_array_equal(cupy.asnumpy(doubled), expected.image * 2)
    torch = torch_cuda()
    stream = torch.cuda.Stream()
    tensors = [torch.from_numpy(a).cuda() for a in lungs]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        image = torch.zeros_like(tensors[0])
        for _ in range(200):
            image += 1
        image.copy_(tensors[0])
        doubled = synthesizer()(image, tensors[1], index=3).image * 2
    stream.synchronize()
    assert_array_equal(doubled.cpu().numpy(), expected.image * 2)


@pytest.mark.gpu(2)
def test_several_devices(lungs) -> None:
    expected = synthesizer()(*lungs, index=3)
    for number in (1, 0, 1):
        with cupy.cuda.Device(number):
            image, mask = (cupy.asarray(a) for a in lungs)
        pair = synthesizer()(image, mask, index=3)
        assert pair.image.device.id == number
        agree(pair, expected)
    with cupy.cuda.Device(0):
        other = cupy.asarray(lungs[1])
    with pytest.raises(ValueError, match="lung_mask must be on the device of image, cuda:1, got cuda:0"):
        synthesizer()(image, other, index=0)


# --- streams and threads; on the host, with every order, in test_cuda_streams.py ---


def on_device(lungs, n: int = 1):
    return (cupy.asarray(np.stack([a] * n)) for a in lungs)


@pytest.mark.parametrize("ask", ["plan", "labels"])
def test_asked_on_another_stream_after_the_workspace_moved_on(ask, lungs) -> None:
    """Its table is copied on the stream of a later batch, which is busy, when another stream asks."""
    image, mask = (cupy.asarray(a) for a in lungs)
    synth, one, other = synthesizer(CudaBackend()), *(cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    cupy.cuda.Device().synchronize()
    for round_ in range(5):
        with one:
            first = synth(image, mask, index=round_)
        with other:
            keep_busy(0.02)
            rest = [synth(image, mask, index=10 + k) for k in range(3)]
        with one:
            found = getattr(first, ask)
        one.synchronize()
        expected = synthesizer()(*lungs, index=round_)
        if ask == "plan":
            assert found == expected.plan
        else:
            assert_array_equal(cupy.asnumpy(found), expected.labels)
        cupy.cuda.Device().synchronize()
        for k, pair in enumerate(rest):
            agree(pair, synthesizer()(*lungs, index=10 + k))


def test_two_host_threads_on_two_streams(lungs) -> None:
    cuda, failures = CudaBackend(), []
    image, mask = (cupy.asarray(a) for a in lungs)
    wanted = {k: synthesizer()(*lungs, index=k) for first in (0, 100) for k in range(first, first + 20)}
    cupy.cuda.Device().synchronize()

    def work(first: int) -> None:
        try:
            synth = synthesizer(cuda)
            with cupy.cuda.Stream(non_blocking=True) as stream:
                pairs = [synth(image, mask, index=first + k) for k in range(20)]
                stream.synchronize()
                for k, pair in enumerate(pairs):
                    agree(pair, wanted[first + k])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(100 * k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_host_runs_ahead_of_the_device(lungs, monkeypatch) -> None:
    """More batches than slots behind a busy stream; page-locked memory is not taken again."""
    image, mask = (cupy.asarray(a) for a in lungs)
    synth = synthesizer(CudaBackend())
    for k in range(40):  # which finds out how much is needed
        synth(image, mask, index=k)
        cupy.cuda.Device().synchronize()
    taken = []
    take = cupy.cuda.alloc_pinned_memory
    monkeypatch.setattr(cupy.cuda, "alloc_pinned_memory", lambda n: (taken.append(n), take(n))[1])
    keep_busy(0.05)
    pairs = [synth(image, mask, index=k) for k in range(40)]
    assert taken == []
    for k, pair in enumerate(pairs):
        agree(pair, synthesizer()(*lungs, index=k))


def test_more_kinds_of_batch_than_graphs_are_kept(lungs) -> None:
    """Graphs are dropped and captured again while batches are under way."""
    from lesionsynth.cuda.cupy_device import MOST_GRAPHS

    synth = synthesizer(cuda := CudaBackend())
    sizes = [n for n in range(1, 12) for _ in range(6)] * 2
    pairs = []
    for size in sizes:
        for kind in ("float32", "float16"):
            image, mask = (a for a in on_device(lungs, size))
            pairs.append((size, kind, synth(image.astype(kind), mask, index=list(range(size)))))
    assert len(cuda.renderers[0].device._graphs) == MOST_GRAPHS
    wanted = {
        kind: synthesizer()(
            np.stack([lungs[0].astype(kind)] * 11), np.stack([lungs[1]] * 11), index=list(range(11))
        )
        for kind in ("float32", "float16")
    }
    for size, kind, pair in pairs:
        assert_array_equal(cupy.asnumpy(pair.image), wanted[kind].image[:size])
        assert_array_equal(cupy.asnumpy(pair.target), wanted[kind].target[:size])


def test_a_workspace_grows_under_batches_that_are_under_way(lungs) -> None:
    synth = synthesizer(CudaBackend())
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    cupy.cuda.Device().synchronize()
    pairs = []
    for k, size in enumerate((1, 3, 8, 20, 40)):
        with streams[k % 2]:
            keep_busy(0.01)
            image, mask = on_device(lungs, size)
            pairs.append((size, synth(image, mask, index=list(range(size)))))
            cupy.empty(2**22, cupy.float32).fill(7)  # whoever gets the freed memory
    cupy.cuda.Device().synchronize()
    for size, pair in pairs:
        images, masks = (np.stack([a] * size) for a in lungs)
        agree(pair, synthesizer()(images, masks, index=list(range(size))))


def test_a_kernel_of_somebody_else_that_hogs_the_device(lungs) -> None:
    """No block of ours waits for another that has no room."""
    image, mask = (cupy.asarray(a) for a in lungs)
    synth = synthesizer(CudaBackend())
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True):
        keep_busy(0.3, blocks=4 * cupy.cuda.Device().attributes["MultiProcessorCount"])
    with cupy.cuda.Stream(non_blocking=True) as stream:
        pairs = [synth(image, mask, index=k) for k in range(8)]
        stream.synchronize()
    for k, pair in enumerate(pairs):
        agree(pair, synthesizer()(*lungs, index=k))


def test_torch_s_default_stream_waits_for_no_other(lungs) -> None:
    torch = torch_cuda()
    image, mask = (torch.from_numpy(a).cuda() for a in lungs)
    synth, side, passed = synthesizer(CudaBackend()), torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()

    def work():
        pair = synth(image, mask, index=1)
        ls.ops.gaussian_filter(image, 2.0)
        ls.ops.philox_uniform(tuple(image.shape), 0, out=torch.empty_like(image))
        return pair

    with torch.cuda.stream(side):
        for _ in range(6):  # compiles, captures, and takes memory, which may stop the device
            work()
        side.synchronize()
        torch.cuda._sleep(4 * 10**9)  # cycles: two seconds or so
        pair = work()
    passed.record()
    begun = time.monotonic()
    while not passed.query() and time.monotonic() - begun < 5:
        time.sleep(0.001)
    assert not side.query(), "the default stream waited for the side stream"
    side.synchronize()
    assert_array_equal(pair.image.cpu().numpy(), synthesizer()(*lungs, index=1).image)


def test_a_capture_of_torch_is_refused_and_stays_whole(lungs) -> None:
    torch = torch_cuda()
    image, mask = (torch.from_numpy(a).cuda() for a in lungs)
    synth = synthesizer()
    synth(image, mask, index=0).plan  # noqa: B018
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = image * 2
        for call in (
            lambda: synth(image, mask, index=0),
            lambda: ls.window_hu(image),
            lambda: ls.ops.gaussian_filter(image, 1.0),
            lambda: ls.remove_erroneous_edges(image, mask),
        ):
            with pytest.raises(RuntimeError, match="must not be capturing"):
                call()
        more = doubled + 1
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(more, image * 2 + 1)


def test_torch_without_memory(lungs) -> None:
    """torch's allocator refuses the results; the remedy names it."""
    torch = torch_cuda()
    image, mask = (torch.from_numpy(a).cuda() for a in lungs)
    synth = synthesizer()
    synth(image, mask, index=0).plan  # noqa: B018
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(1e-6)
        images, masks = image.expand(64, *image.shape), mask.expand(64, *mask.shape)
        with pytest.raises(MemoryError, match=r"work on shape \(64, 12, 40, 44\).*torch\.cuda\.empty_cache"):
            synth(images, masks, index=list(range(64)))
        with pytest.raises(MemoryError, match=r"torch\.cuda\.empty_cache"):
            ls.ops.gaussian_filter(torch.as_strided(image, (900, 900, 900), (0, 0, 0)), 1.0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    pair = synth(image, mask, index=0)
    assert_array_equal(pair.image.cpu().numpy(), synthesizer()(*lungs, index=0).image)


# --- machine code ---


def test_drivers_load_the_file_of_the_cache(tmp_path, monkeypatch) -> None:
    """As a file: in memory a byte too few goes unnoticed, since Python puts a nought behind."""
    from lesionsynth.cuda import compiling

    monkeypatch.setenv("LESIONSYNTH_CACHE_DIR", str(tmp_path / "cache"))
    compiling.compiled("ops", "float32", int(cupy.cuda.Device().compute_capability))
    (file,) = (tmp_path / "cache").iterdir()
    module = cupy.cuda.Module()
    module.load_file(str(file))
    assert module.get_function("pack_mask").ptr


def test_kernels_ask_for_all_shared_memory(lungs) -> None:
    cuda = CudaBackend()
    synthesizer(cuda)(*(cupy.asarray(a) for a in lungs), index=0)
    functions = cuda.renderers[0].device._kernels
    assert len(functions) == 13
    attribute = cupy.cuda.driver.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    assert {cupy.cuda.driver.funcGetAttribute(attribute, f.ptr) for f in functions.values()} == {100}


def test_bfloat16_is_not_hounsfield_units() -> None:
    torch = torch_cuda()
    with pytest.raises(ValueError, match=r"hu must have a dtype NumPy knows, got torch\.bfloat16"):
        ls.window_hu(torch.zeros(2, 3, 4, dtype=torch.bfloat16, device="cuda"))


# --- steady state ---


class Counted(cupy.cuda.MemoryHook if devices() else object):
    """Counts what CuPy takes from the driver."""

    name = "counted"

    def __init__(self) -> None:
        self.mallocs = 0

    def malloc_postprocess(self, **_) -> None:
        pass

    def alloc_postprocess(self, **_) -> None:
        self.mallocs += 1


def test_no_allocation_and_no_synchronisation_in_steady_state(lungs, monkeypatch) -> None:
    """With ``out=``, between entering `render` and the outputs: neither, and graphs are replayed."""
    images, masks = (cupy.asarray(np.stack([a] * 4)) for a in lungs)
    synth = synthesizer(cuda := CudaBackend())
    out = cupy.empty_like(images), cupy.empty_like(masks)
    busy = cupy.full((4096, 4096), 2.0**-12, cupy.float32)
    for _ in range(3):
        busy @= busy  # which loads and prepares cuBLAS, too
        for first in range(0, 40, 4):
            synth(images, masks, index=list(range(first, first + 4)), out=out)
    cupy.cuda.Device().synchronize()
    calls: list[str] = []
    for name in ("deviceSynchronize", "streamSynchronize", "eventSynchronize", "malloc", "memcpy"):
        original = getattr(cupy.cuda.runtime, name)
        monkeypatch.setattr(
            cupy.cuda.runtime, name, lambda *a, _n=name, _o=original: (calls.append(_n), _o(*a))[1]
        )
    blocked = cupy.cuda.Event(disable_timing=True)
    with Counted() as hook:
        taken = hook.mallocs
        for _ in range(50):
            busy @= busy  # a queue that a hidden wait would have to sit through
        for first in range(0, 40, 4):
            synth(images, masks, index=list(range(first, first + 4)), out=out)
        blocked.record()
        assert not blocked.done, "the host waited for the device"
        assert hook.mallocs - taken <= 50  # those of the products
    assert calls == []
    assert all(hasattr(graph, "launch") for graph in cuda.renderers[0].device._graphs.values())


def test_memory_is_told_and_given_back(lungs) -> None:
    from lesionsynth import cuda

    image, mask = (cupy.asarray(a) for a in lungs)
    pair = synthesizer()(image, mask, index=5)
    assert cuda.memory_report()[0]["field0"] > 0
    ls.release_memory()
    assert cuda.memory_report()[0] == {}
    agree(pair, synthesizer()(*lungs, index=5))
    agree(synthesizer()(image, mask, index=6), synthesizer()(*lungs, index=6))


# --- errors ---


def test_bad_voxels_are_told(lungs) -> None:
    image, mask = (cupy.asarray(a) for a in lungs)
    bad = image.copy()
    bad[0, 0, 0] = cupy.nan
    for ask in ("plan", "labels"):
        pair = synthesizer()(bad, mask, index=9)
        with pytest.raises(ValueError, match=r"image must be finite.*samples 9"):
            getattr(pair, ask)
    synthesizer()(image, cupy.zeros_like(mask), index=9)
    cupy.cuda.Device().synchronize()
    with pytest.raises(ValueError, match=r"empty mask.*earlier call"):
        [synthesizer()(image, mask, index=9) for _ in range(20)]


def test_arguments(lungs) -> None:
    image, mask = (cupy.asarray(a) for a in lungs)
    synth = synthesizer()
    with pytest.raises(TypeError, match="one library"):
        synth(image, lungs[1], index=0)
    with pytest.raises(ValueError, match="out image must not share memory"):
        synth(image, mask, index=0, out=(image, cupy.empty_like(mask)))
    with pytest.raises(ValueError, match="out target must have the shape"):
        synth(image, mask, index=0, out=(cupy.empty_like(image), mask[:3]))
    with pytest.raises(TypeError, match="out image must be float32, got float64"):
        synth(image, mask, index=0, out=(image.astype(float), cupy.empty_like(mask)))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="must not be capturing"):
                synth(image, mask, index=0)
        finally:
            stream.end_capture()


def test_too_little_memory(lungs) -> None:
    image, mask = (cupy.asarray(a) for a in lungs)
    synth = synthesizer(CudaBackend())
    pool = cupy.get_default_memory_pool()
    ls.release_memory()
    pool.free_all_blocks()
    pool.set_limit(size=pool.used_bytes() + 2**20)
    try:
        with pytest.raises(MemoryError, match=r"work on shape \(12, 40, 44\).*release_memory"):
            synth(image, mask, index=0)
    finally:
        pool.set_limit(size=0)
    agree(synth(image, mask, index=0), synthesizer()(*lungs, index=0))


def in_child(queue) -> None:
    try:
        ls.ops.philox_uniform((1, 1, 4), 0, device="cuda")
        queue.put("worked")
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_worker_is_told() -> None:
    ls.ops.philox_uniform((1, 1, 4), 0, device="cuda")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    answer = queue.get(timeout=60)
    child.join()
    assert "RuntimeError" in answer
    assert "spawn" in answer


def test_importing_does_not_initialise_cuda() -> None:
    """A context takes hundreds of megabytes; a forked child could not use it."""
    code = (
        "import lesionsynth as ls, sys; ls.ops, ls.phantom\n"
        "import numpy as np\n"
        "image = np.zeros((4, 20, 20), np.float32)\n"
        "synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)\n"
        "synth(image, image == 0, index=0, lung_fraction=0.2)\n"
        "import ctypes\n"
        "cuda = ctypes.CDLL('libcuda.so.1')\n"
        "count = ctypes.c_int()\n"
        "print('cupy' in sys.modules, cuda.cuDeviceGetCount(ctypes.byref(count)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "3"]  # CUDA_ERROR_NOT_INITIALIZED


# --- operations ---


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 31, 65), (32, 128, 200)])
def test_operations(shape) -> None:
    rng = np.random.default_rng(1)
    volume, mask = rng.random(shape, dtype=np.float32), rng.random(shape) < 0.3
    mask.flat[0] = True  # lungs of no voxel are refused
    there, bits = cupy.asarray(volume), cupy.asarray(mask)
    for sigma in (0.8, (0, 5, 2.0), 20.0):
        assert_array_equal(
            cupy.asnumpy(ls.ops.gaussian_filter(there, sigma)), ls.ops.gaussian_filter(volume, sigma)
        )
    for size in (3, 9, (2, 1, 40)):
        assert_array_equal(cupy.asnumpy(ls.ops.uniform_filter(bits, size)), ls.ops.uniform_filter(mask, size))
        expected = ls.ops.uniform_filter(volume, size)
        assert_allclose(cupy.asnumpy(ls.ops.uniform_filter(there, size)), expected, atol=1e-6)
    for connectivity, rank in ((6, 1), (18, 2), (26, 3)):
        labels, count = ls.ops.label(bits, connectivity=connectivity)
        expected, n = ndimage.label(mask, ndimage.generate_binary_structure(3, rank))
        assert count == n
        assert_array_equal(cupy.asnumpy(labels), expected)
        seed = bits & (there > 0.9)
        for steps in (1, 5, 0):
            grown = ls.ops.grow(seed, bits, iterations=steps, connectivity=connectivity)
            expected = ls.ops.grow(cupy.asnumpy(seed), mask, iterations=steps, connectivity=connectivity)
            assert_array_equal(cupy.asnumpy(grown), expected)
    field = ls.ops.philox_uniform(shape, 5, offset=(1, 2, 3), device="cuda")
    assert_array_equal(cupy.asnumpy(field), ls.ops.philox_uniform(shape, 5, offset=(1, 2, 3)))
    image, lung = ls.remove_erroneous_edges(there * bits, bits, threshold=0.5)
    expected = ls.remove_erroneous_edges(volume * mask, mask, threshold=0.5)
    assert_array_equal(cupy.asnumpy(image), expected[0])
    assert_array_equal(cupy.asnumpy(lung), expected[1])


def test_operations_answer_in_torch() -> None:
    torch = torch_cuda()
    mask = torch.rand(4, 20, 33, device="cuda") < 0.4
    labels, count = ls.ops.label(mask, connectivity=26)
    assert isinstance(labels, torch.Tensor)
    assert int(labels.max()) == count
    for result in (
        ls.ops.gaussian_filter(mask, 2.0),
        ls.ops.uniform_filter(mask, 3),
        ls.ops.grow(mask, mask),
    ):
        assert isinstance(result, torch.Tensor)
        assert result.is_cuda


def test_backend_is_one() -> None:
    assert backend() is backend()
