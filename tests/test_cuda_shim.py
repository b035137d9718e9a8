"""The shim itself: CUDA's meaning of barriers, warps and atomics, and planted faults that it must catch."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from lesionsynth.cuda import programs
from tests.conftest import REPOSITORY
from tests.cuda_host.shim import HostProgram, ShimError, compiler, sanitizer_environment

pytestmark = pytest.mark.skipif(compiler() is None, reason="the shim needs g++ on Linux")

KERNELS = r"""
KERNEL golden(u32* out) {
    Words w = philox4x32_10(0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0xa4093822u, 0x299f31d0u);
    if (threadIdx.x < 4) out[threadIdx.x] = w.w[threadIdx.x];
}
KERNEL reverse(float* x) {
    __shared__ float s[256];
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = s[255 - threadIdx.x];
}
KERNEL votes(u32* out) {
    int t = threadIdx.x, lane = t & 31;
    out[t] = __ballot_sync(0xFFFFFFFFu, lane % 3 == 0);
    out[256 + t] = warp_sum(t);
    out[512 + t] = __shfl_up_sync(0xFFFFFFFFu, t, 1);
    out[768 + t] = __syncthreads_count(t % 5 == 0);
    out[768 + t] += 1000 * __syncthreads_or(t == 77) + 2000 * __syncthreads_and(t < 256);
}
KERNEL half_warps(u32* out) {
    u32 mask = threadIdx.x & 16 ? 0xFFFF0000u : 0x0000FFFFu;
    u32 sum = threadIdx.x;
    for (int d = 8; d; d /= 2) sum += __shfl_xor_sync(mask, sum, d);
    out[threadIdx.x] = sum;
}
KERNEL overlapping_masks(u32* out) {  // lane 1 meets lane 2 first, while lane 0 waits for it
    u32 lane = threadIdx.x, got = 99;
    if (lane == 1 || lane == 2) got = __shfl_xor_sync(6u, lane, 3);
    if (lane <= 1) got = 10 * got + __shfl_xor_sync(3u, lane, 1);
    out[lane] = got;
}
KERNEL wide(double* x, u64* bits) {
    int lane = threadIdx.x & 31;
    x[threadIdx.x] = __shfl_down_sync(ALL_LANES, x[threadIdx.x], 3, 8);
    bits[threadIdx.x] = __shfl_up_sync(ALL_LANES, 1ull << (lane + 20), 2, 16);
}
extern "C" __global__ void where(u32* out) {
    if (threadIdx.x == 0)
        atomicAdd(&out[(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x], blockDim.x);
}
KERNEL arithmetic(u32* out) {
    out[0] = __brev(0x00000003u);
    out[1] = __umulhi(0xFFFFFFFFu, 0xFFFFFFFFu);
    out[2] = __funnelshift_r(0x80000001u, 0x00000005u, 4);
    out[3] = __funnelshift_l(0x80000001u, 0x00000005u, 4);
    out[4] = __popc(0xF0F0u) + 100 * __ffs(8) + 10000 * __clz(1);
    out[5] = __double2int_rd(-1.5);
    // A product that rounds to 1: a fused operation alone sees the rest of it.
    float a = 1.0f + 1.220703125e-4f, b = 1.0f - 1.220703125e-4f;
    out[6] = fma(a, b, -1.0f) == -1.490116119384765625e-8f && a * b - 1.0f == 0.0f;
    out[7] = sizeof(float4) + 100 * alignof(float4) + 10000 * alignof(uchar4) + 1000000 * alignof(uint2);
}
KERNEL tally(u32* out) {
    atomicAdd(&out[0], 1u);
    atomicMin(&out[1], threadIdx.x);
    atomicMax(&out[2], threadIdx.x);
    atomicOr(&out[3], 1u << (threadIdx.x & 31));
}
KERNEL united(const u8* mask, int* parents, int n) {
    int i = threadIdx.x;
    if (i > 0 && i < n && mask[i] && mask[i - 1]) unite(parents, i, i - 1);
    if (i >= 4 && i < n && mask[i] && mask[i - 4]) unite(parents, i, i - 4);
}
KERNEL last_one(u32* ticket, u32* seen, const u32* blocks) {
    __shared__ int last;
    if (is_last_block(ticket, gridDim.x, &last) && threadIdx.x == 0) atomicAdd(seen, *ticket);
}

// --- faults ---
KERNEL no_barrier(float* x) {
    __shared__ float s[256];
    s[threadIdx.x] = x[threadIdx.x];
    x[threadIdx.x] = s[255 - threadIdx.x];
}
KERNEL overtaken(float* x) {
    __shared__ float s[256];
    for (int round = 0; round < 2; ++round) {
        s[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        x[threadIdx.x] = s[255 - threadIdx.x];
        __syncwarp();  // of all threads it must be: a warp ahead writes what others have yet to read
    }
}
KERNEL early_return(float* x) {
    if (threadIdx.x >= 10) return;
    __syncthreads();
    x[threadIdx.x] = 1.0f;
}
KERNEL divergent_shuffle(float* x) {
    if ((threadIdx.x & 31) < 16) x[threadIdx.x] = __shfl_down_sync(0xFFFFFFFFu, x[threadIdx.x], 1);
}
KERNEL outside_mask(float* x) {
    if ((threadIdx.x & 31) < 16) x[threadIdx.x] = __shfl_sync(0x0000FFFFu, x[threadIdx.x], 20);
}
KERNEL spin(volatile float* x) {
    while (x[0] == 0.0f) __syncwarp();
}
KERNEL blind_spin(volatile float* x) {
    while (x[0] == 0.0f) {}
    x[1] = 1.0f;
}
KERNEL two_barriers(float* x) {
    if (threadIdx.x < 16)
        __syncthreads();
    else
        __syncthreads();
    x[threadIdx.x] = 1.0f;
}
KERNEL not_its_own(float* x) {
    if (threadIdx.x < 2) __syncwarp(1u);
}
KERNEL two_operations(float* x) {
    if (threadIdx.x & 1)
        x[threadIdx.x] = __shfl_sync(0xFFFFFFFFu, x[threadIdx.x], 0);
    else
        x[threadIdx.x] = __any_sync(0xFFFFFFFFu, threadIdx.x);
}
KERNEL past_the_block(float* x) {
    x[threadIdx.x] = __shfl_down_sync(0xFFFFFFFFu, x[threadIdx.x], 1);
}
KERNEL lost_update(int* x) {
    int v = *(volatile int*)x;
    __threadfence();
    *(volatile int*)x = v + 1;
}
__device__ void unite_once(int* parents, int a, int b) {
    a = root_of(parents, a);
    b = root_of(parents, b);
    atomicMin(&parents[a > b ? a : b], a > b ? b : a);
}
KERNEL united_once(const u8* mask, int* parents, int n) {
    int i = threadIdx.x;
    if (i > 0 && i < n && mask[i] && mask[i - 1]) unite_once(parents, i, i - 1);
    if (i >= 4 && i < n && mask[i] && mask[i - 4]) unite_once(parents, i, i - 4);
}
KERNEL unwritten(float* x) {
    __shared__ float s[256];
    if (threadIdx.x > 0) s[threadIdx.x] = 1.0f;
    __syncthreads();
    x[threadIdx.x] = s[threadIdx.x];
}
KERNEL out_of_bounds(float* x, int n) { x[n + threadIdx.x] = 1.0f; }
KERNEL out_of_shared(u32* out, int n) {
    __shared__ u32 before[256];
    __shared__ u32 after[256];
    after[threadIdx.x] = 0;
    before[threadIdx.x + n] = threadIdx.x;
    __syncthreads();
    atomicAdd(out, before[255 - threadIdx.x] + after[threadIdx.x]);
}
"""


@pytest.fixture(scope="module", params=[False, True], ids=["assembly", "portable"])
def program(request) -> HostProgram:
    return HostProgram(text(), portable=request.param)


def text() -> str:
    head = f"#define IMAGE 0\n#define THREADS {programs.THREADS}\n"
    return head + programs.read("prelude.cuh") + programs.read("philox.cuh") + KERNELS


def pointer(array: np.ndarray) -> np.uint64:
    return np.uint64(array.ctypes.data)


def launch(program: HostProgram, name: str, *arrays, grid: int = 1, block: int = 256, **options) -> None:
    arguments = tuple(pointer(a) if isinstance(a, np.ndarray) else a for a in arrays)
    program.launch(name, grid, block, arguments, **options)


# --- what is right ---


def test_philox_known_answer(program) -> None:
    """Random123's vector: the words that the head of philox.cuh quotes."""
    out = np.zeros(4, np.uint32)
    launch(program, "golden", out)
    assert [hex(w) for w in out] == ["0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1"]


@pytest.mark.parametrize("order", ["forward", "reverse", "random", "warps"])
def test_barriers_warps_and_atomics(order, program) -> None:
    x = np.arange(256, dtype=np.float32)
    launch(program, "reverse", x, order=order)
    assert_array_equal(x, np.arange(256)[::-1])
    out = np.zeros(1024, np.uint32)
    launch(program, "votes", out, order=order)
    t = np.arange(256)
    assert set(out[:256]) == {sum(1 << k for k in range(0, 32, 3))}
    assert_array_equal(out[256:512], np.repeat(t.reshape(8, 32).sum(1), 32))
    assert_array_equal(out[512:768], np.where(t % 32, t - 1, t))
    assert set(out[768:]) == {52 + 1000 + 2000}
    launch(program, "half_warps", out, order=order)
    assert_array_equal(out[:256], np.repeat(t.reshape(16, 16).sum(1), 16))
    tally = np.array([0, 999, 0, 0], np.uint32)
    launch(program, "tally", tally, grid=3, order=order, yield_percent=40)
    assert tally.tolist() == [768, 0, 255, 2**32 - 1]


@pytest.mark.parametrize("order", ["forward", "reverse", "random", "warps"])
def test_warps_that_part(order, program) -> None:
    out = np.zeros(256, np.uint32)
    launch(program, "overlapping_masks", out, block=32, order=order)
    assert out[:3].tolist() == [991, 20, 1]
    x, bits = np.arange(256.0), np.zeros(256, np.uint64)
    launch(program, "wide", x, bits, order=order)
    t = np.arange(256)
    assert_array_equal(x, np.where(t % 8 < 5, t + 3, t))
    assert_array_equal(bits, 1 << (np.where(t % 16 < 2, t, t - 2) % 32 + 20))


def test_grids_of_three_dimensions(program) -> None:
    for order in ("forward", "reverse", "random", "warps"):
        out = np.zeros(24, np.uint32)
        launch(program, "where", out, grid=(2, 3, 4), block=5, order=order)
        assert set(out) == {5}


def test_arithmetic(program) -> None:
    out = np.zeros(8, np.uint32)
    launch(program, "arithmetic", out, block=1)
    assert out[0] == 0xC0000000
    assert out[1] == 0xFFFFFFFE
    assert out[2] == 0x58000000
    assert out[3] == 0x00000058
    assert out[4] == 8 + 400 + 310000
    assert out[5:6].view(np.int32)[0] == -2
    assert out[6] == 1
    assert out[7] == 16 + 1600 + 40000 + 8000000


def test_the_last_block_is_one(program) -> None:
    for order in ("forward", "reverse", "random", "warps"):
        ticket, seen = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
        launch(program, "last_one", ticket, seen, ticket, grid=7, order=order, yield_percent=20)
        assert seen[0] == 7


# --- faults ---


def test_missing_barrier(program) -> None:
    for order in ("forward", "random"):
        x = np.arange(256, dtype=np.float32)
        launch(program, "no_barrier", x, order=order)
        assert np.isnan(x).any()


def test_a_warp_that_runs_ahead() -> None:
    """Threads in step never show it; a warp ahead of the others overwrites what they have yet to read."""
    right = np.arange(256, dtype=np.float32)
    shown = []
    for order in ("forward", "warps"):
        x = np.arange(256, dtype=np.float32)
        launch(HostProgram(text()), "overtaken", x, order=order)
        shown.append(bool((x != right).any()))
    assert shown == [False, True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("early_return", "deadlock: of 30 threads 20 have returned, 10 wait at a divergent __syncthreads"),
        ("divergent_shuffle", "deadlock: .* 16 wait for lanes of their masks"),
        ("outside_mask", "reads lane 20, which does not take part"),
        ("past_the_block", "reads lane 30, which does not take part"),
        ("two_barriers", "threads of one block wait at .* and "),
        ("not_its_own", "lane 1 is not in its own mask 0x00000001"),
        ("two_operations", "different operations"),
        ("spin", "no end in sight"),
        ("blind_spin", "no end in sight"),
    ],
)
def test_fault_ends_the_launch(name, message, program) -> None:
    for _ in range(2):  # a launch that failed leaves nothing behind
        with pytest.raises(ShimError, match=rf"^{name}: .*{message}"):
            launch(program, name, np.zeros(256, np.float32), block=30, limit_s=0.1)


def test_too_many_threads(program) -> None:
    with pytest.raises(ShimError, match="1 to 1024 threads"):
        launch(program, "no_barrier", np.zeros(2000, np.float32), block=1025)


def test_wrong_arguments(program) -> None:
    x = np.zeros(256, np.float32)
    with pytest.raises(ShimError, match=r"out_of_bounds: parameters have \[8, 4\] bytes, arguments \[8, 8\]"):
        launch(program, "out_of_bounds", x, np.int64(0))
    with pytest.raises(ShimError, match=r"arguments \[8\]"):
        launch(program, "out_of_bounds", x)


def test_a_text_that_is_no_program() -> None:
    with pytest.raises(ShimError, match="error"):
        HostProgram("nonsense")


def test_sanitizer_asked_for_too_late() -> None:
    with pytest.raises(ShimError, match="before Python"):
        HostProgram(text(), sanitize=True)


def test_lost_update_shows_with_yields(program) -> None:
    counts = []
    for percent in (0, 50):
        x = np.zeros(1, np.int32)
        launch(program, "lost_update", x, order="random", yield_percent=percent)
        counts.append(int(x[0]))
    assert counts[0] == 256 > counts[1]


def roots(program, name: str, mask: np.ndarray, percent: int, seed: int) -> set[int]:
    parents = np.where(mask, np.arange(mask.size), -1).astype(np.int32)
    launch(
        program, name, mask, parents, np.int32(mask.size), order="random", yield_percent=percent, seed=seed
    )
    found = set()
    for i in np.flatnonzero(mask):
        while parents[i] != i:
            i = parents[i]
        found.add(int(i))
    return found


def components(mask: np.ndarray) -> set[int]:
    parents = list(range(mask.size))

    def root(i: int) -> int:
        return i if parents[i] == i else root(parents[i])

    for i in range(mask.size):
        for j in (i - 1, i - 4):
            if j >= 0 and mask[i] and mask[j]:
                parents[max(root(i), root(j))] = min(root(i), root(j))
    return {root(i) for i in range(mask.size) if mask[i]}


def test_union_without_retry_shows_with_yields(program) -> None:
    wrong = {"united": 0, "united_once": 0}
    for seed in range(30):
        mask = (np.random.default_rng(seed).random(96) < 0.7).astype(np.uint8)
        for name in wrong:
            wrong[name] += roots(program, name, mask, 40, seed + 1) != components(mask)
    assert wrong["united"] == 0
    assert wrong["united_once"] > 0


def test_unwritten_shared_memory_is_nan(program) -> None:
    x = np.zeros(256, np.float32)
    launch(program, "unwritten", x)
    assert np.isnan(x[0])
    assert (x[1:] == 1).all()


def sanitized(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with AddressSanitizer's library in front."""
    environment = sanitizer_environment()
    if environment is None:
        pytest.skip("AddressSanitizer's library is not installed")
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(
        command, env=environment, cwd=REPOSITORY, text=True, capture_output=True, check=False
    )


@pytest.mark.slow
def test_out_of_bounds_under_address_sanitizer() -> None:
    done = sanitized(
        """
        import ctypes, numpy as np
        from tests.cuda_host.shim import HostProgram
        from tests.test_cuda_shim import text
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        block = libc.malloc(ctypes.c_size_t(1024))
        program = HostProgram(text(), sanitize=True)
        program.launch("tally", 1, 256, (np.uint64(block),))
        print("within bounds", flush=True)
        program.launch("out_of_bounds", 1, 256, (np.uint64(block), np.int32(200)))
        """
    )
    assert "within bounds" in done.stdout, done.stderr[-2000:]
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.slow
def test_shared_memory_under_address_sanitizer() -> None:
    """Also after a launch that ended in the middle."""
    done = sanitized(
        """
        import numpy as np
        from tests.cuda_host.shim import HostProgram, ShimError
        from tests.test_cuda_shim import launch, text
        program = HostProgram(text(), sanitize=True)
        try:
            launch(program, "divergent_shuffle", np.zeros(256, np.float32))
        except ShimError:
            print("deadlock", flush=True)
        out = np.zeros(1, np.uint32)
        launch(program, "out_of_shared", out, np.int32(0), grid=2)
        print(int(out[0]), flush=True)
        launch(program, "out_of_shared", out, np.int32(1))
        """
    )
    assert done.stdout.split() == ["deadlock", str(256 * 255)], done.stderr[-2000:]
    assert done.returncode != 0
    assert "global-buffer-overflow" in done.stderr


@pytest.mark.slow
def test_the_generator_under_address_sanitizer() -> None:
    """Every kernel of a batch and of the operations, once: no access outside any buffer."""
    done = sanitized(
        """
        import numpy as np
        from tests.conftest import draw_lungs
        from tests.cuda_host.device import HostDevice
        from tests.cuda_host.pairs import render
        from tests.test_cuda_render import drawn, host
        from tests.test_cuda_ops import edges, label
        from lesionsynth.cuda import filters, labels
        image, mask = draw_lungs()
        for plain in (False, True):
            gpu = host(plain=plain, sanitize=True, order="random", seed=2)
            for plans in (drawn(3, image.shape), drawn(3, image.shape, seed=5, connectivity=6)):
                pair = render(gpu, plans, np.stack([image] * 3), np.stack([mask] * 3))
                assert pair.labels.max() > 0 and len(pair.components) == 3
        device = HostDevice(sanitize=True)
        bright = (image > 0.3).astype(np.uint8)
        label(device, bright, 26)
        label(device, bright, 6, plain=True)
        edges(device, image, mask.view(np.uint8))
        out = np.zeros(image.shape, np.float32)
        sigmas, result = (2.0, 9.0, 30.0), out.ctypes.data
        filters.gaussian_filter(device, image.ctypes.data, image.shape, sigmas, 4.0, result)
        filters.uniform_filter(device, image.ctypes.data, "float32", image.shape, (3, 4, 5), out.ctypes.data)
        filters.fill_uniform(device, image.shape, (1, 2, 3, 4), (5, 6, 7), out.ctypes.data)
        grown = np.zeros(image.shape, np.uint8)
        labels.grow(device, bright.ctypes.data, mask.ctypes.data, image.shape, 0, 18, grown.ctypes.data)
        print("clean", flush=True)
        """
    )
    assert "clean" in done.stdout, done.stderr[-3000:]
    assert done.returncode == 0
