"""Races between threads of the CUDA kernels: none in them, and what ThreadSanitizer sees of planted ones."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import pytest

from tests.conftest import REPOSITORY
from tests.cuda_host.racing.environment import UNSHUFFLED, obstacle, racing_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(obstacle() is not None, reason=f"races cannot be looked for: {obstacle()}"),
]

LIMIT_S = 300

RIGHT = r"""
KERNEL reversed(u32* out) {
    __shared__ u32 s[THREADS];
    for (int round = 0; round < 3; ++round) {
        s[threadIdx.x] = threadIdx.x;
        __syncthreads();
        out[blockIdx.x * THREADS + threadIdx.x] = s[THREADS - 1 - threadIdx.x];
        __syncthreads();
    }
}
KERNEL turned(u32* out) {  // half of a warp at a time
    __shared__ u32 s[THREADS];
    u32 half = threadIdx.x & 16 ? 0xFFFF0000u : 0x0000FFFFu;
    s[threadIdx.x] = threadIdx.x;
    __syncwarp(half);
    out[blockIdx.x * THREADS + threadIdx.x] = s[threadIdx.x ^ 15];
}
KERNEL tallied(u32* out) {
    atomicAdd(&out[0], 1u);
    atomicMax(&out[1], threadIdx.x);
    atomicOr(&out[2], __ballot_sync(ALL_LANES, threadIdx.x % 3 == 0));
    out[THREADS + blockIdx.x * THREADS + threadIdx.x] = __syncthreads_count(threadIdx.x % 5 == 0);
}
KERNEL summed(u32* out) {  // by the last block, what others wrote
    __shared__ int last;
    out[2 + blockIdx.x * THREADS + threadIdx.x] = 1;
    if (!is_last_block(&out[0], gridDim.x, &last)) return;
    u32 sum = 0;
    for (u32 b = 0; b < gridDim.x; ++b) sum += out[2 + b * THREADS + threadIdx.x];
    atomicAdd(&out[1], sum);
}
KERNEL agreed(volatile u32* out) { out[0] = 1; }
KERNEL unwritten(u32* out) {
    __shared__ u32 s[THREADS];
    out[blockIdx.x * THREADS + threadIdx.x] = s[threadIdx.x];
    s[threadIdx.x] = 0;
}
"""
RACES = r"""
KERNEL between_blocks(u32* out) {
    if (threadIdx.x == 0) out[0] = blockIdx.x;
}
KERNEL between_warps(u32* out) {
    __shared__ u32 s[THREADS];
    s[threadIdx.x] = threadIdx.x;
    __syncwarp();
    out[blockIdx.x * THREADS + threadIdx.x] = s[THREADS - 1 - threadIdx.x];
}
KERNEL between_lanes(u32* out) {
    __shared__ u32 s[THREADS];
    s[threadIdx.x] = threadIdx.x;
    out[blockIdx.x * THREADS + threadIdx.x] = s[threadIdx.x ^ 1];
}
KERNEL between_barriers(u32* out) {  // one would do before, and one behind
    __shared__ u32 s[THREADS];
    s[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x < 2) s[0] = threadIdx.x;
    __syncthreads();
    out[blockIdx.x * THREADS + threadIdx.x] = s[threadIdx.x];
}
KERNEL across_a_shuffle(u32* out) {
    __shared__ u32 s[THREADS];
    s[threadIdx.x] = threadIdx.x;
    u32 other = __shfl_xor_sync(ALL_LANES, threadIdx.x, 1);
    out[blockIdx.x * THREADS + threadIdx.x] = s[other];
}
KERNEL outside_the_mask(u32* out) {
    __shared__ u32 s[THREADS];
    s[threadIdx.x] = threadIdx.x;
    __syncwarp(threadIdx.x & 16 ? 0xFFFF0000u : 0x0000FFFFu);
    out[blockIdx.x * THREADS + threadIdx.x] = s[threadIdx.x ^ 16];
}
KERNEL behind_an_atomic(u32* out) {  // which tells that the value is there, but does not bring it
    if (threadIdx.x == 0) out[1 + blockIdx.x] = 1;
    __threadfence();
    if (threadIdx.x == 0 && atomicAdd(&out[0], 1u) == 1) out[3] = out[1] + out[2];
}
KERNEL one_and_the_same(u32* out) { out[0] = 1; }
KERNEL half_volatile(u32* out) {
    if (threadIdx.x == 0) out[0] = 1;
    if (threadIdx.x == 40) out[1] = *(volatile u32*)out;
}
"""
FAULTS = r"""
KERNEL early_return(u32* out) {
    if (threadIdx.x >= 10) return;
    __syncthreads();
    out[threadIdx.x] = 1;
}
KERNEL two_barriers(u32* out) {
    if (threadIdx.x < 16) __syncthreads();
    else __syncthreads();
    out[threadIdx.x] = 1;
}
KERNEL divergent_shuffle(u32* out) {
    if ((threadIdx.x & 31) < 16) out[threadIdx.x] = __shfl_down_sync(ALL_LANES, threadIdx.x, 1);
}
KERNEL outside_mask(u32* out) {
    if ((threadIdx.x & 31) < 16) out[threadIdx.x] = __shfl_sync(0x0000FFFFu, threadIdx.x, 20);
}
KERNEL not_its_own(u32* out) {
    if (threadIdx.x < 2) __syncwarp(1u);
}
KERNEL two_operations(u32* out) {
    if (threadIdx.x & 1) out[threadIdx.x] = __shfl_sync(ALL_LANES, threadIdx.x, 0);
    else out[threadIdx.x] = __any_sync(ALL_LANES, 1);
}
"""
PREAMBLE = """
import numpy as np
from lesionsynth.cuda import programs
from tests.cuda_host.racing.device import RacingProgram, raced
from tests.cuda_host.shim import ShimError
from tests.test_cuda_racing import FAULTS, RACES, RIGHT, names

def program(kernels):
    head = f"#define IMAGE 0\\n#define THREADS {programs.THREADS}\\n"
    return RacingProgram(raced(head + programs.read("prelude.cuh") + kernels))

def launch(program, name, grid=3, **options):
    out = np.zeros(2048, np.uint32)
    program.launch(name, grid, 256, (np.uint64(out.ctypes.data),), **options)
    return out
"""


def watched(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code behind `PREAMBLE` in a process that ThreadSanitizer watches."""
    command = [*UNSHUFFLED, sys.executable, "-c", PREAMBLE + textwrap.dedent(code)]
    return finished(command, env=racing_environment())


def run_case(*arguments: str) -> subprocess.CompletedProcess[str]:
    return finished([sys.executable, "-m", "tests.cuda_host.racing", *arguments])


def finished(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=REPOSITORY, text=True, capture_output=True, check=False, timeout=LIMIT_S, **options
    )


def assert_silent(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ThreadSanitizer" not in done.stderr, done.stderr[-3000:]


def names(kernels: str) -> list[str]:
    return re.findall(r"^KERNEL (\w+)\(", kernels, re.MULTILINE)


# --- the kernels ---


@pytest.mark.parametrize("case", ["pairs", "modes", "crowded", "volumes"])
def test_no_races(case) -> None:
    rounds = 1 if case == "crowded" else 3
    done = run_case(case, "--rounds", str(rounds))
    assert_silent(done)
    assert done.stdout.count("as expected") == rounds


@pytest.mark.parametrize(
    ("case", "plant", "function"),
    [
        ("crowded", "barrier", "reflect_rows"),
        ("volumes", "ticket", "scan_counts"),
        ("pairs", "union", "unite"),
        ("modes", "steps", "edge_tile"),
    ],
)
def test_planted_races_are_seen(case, plant, function) -> None:
    done = run_case(case, "--plant", plant)
    assert done.returncode == 66, done.stderr[-3000:]
    first = done.stderr.partition("SUMMARY")[0]
    assert "WARNING: ThreadSanitizer: data race" in first
    assert re.search(rf"#\d+ {function}\b", first), first


# --- the shim ---


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_right_is_silent(workers) -> None:
    done = watched(
        f"""
        own, count = program(RIGHT), 3 * 256
        options = dict(workers={workers}, yield_percent=10)
        t = np.arange(256)
        for seed in range(3):
            out = {{name: launch(own, name, seed=seed, **options) for name in names(RIGHT)}}
            assert (out["reversed"][:count] == np.tile(t[::-1], 3)).all()
            assert (out["turned"][:count] == np.tile(t ^ 15, 3)).all()
            assert out["tallied"][:3].tolist() == [count, 255, 2**32 - 1]
            assert (out["tallied"][256:1024] == 52).all()
            assert out["summed"][:2].tolist() == [3, count]
            assert out["agreed"][0] == 1
            assert (out["unwritten"][:count] == 2**32 - 1).all()
        """
    )
    assert_silent(done)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_kind_of_race_is_seen(workers) -> None:
    """Also where one block runs after another, or one thread: it is enough that nothing orders them."""
    done = watched(
        f"""
        own = program(RACES)
        for name in names(RACES):
            launch(own, name, workers={workers})
        """
    )
    assert done.returncode == 66, done.stderr[-3000:]
    assert names(RACES) == [name for name in names(RACES) if re.search(rf"#\d+ {name} ", done.stderr)]


def test_faults_end_the_launch() -> None:
    """And leave nothing behind."""
    done = watched(
        """
        own = program(FAULTS + RIGHT)
        for name in names(FAULTS):
            for _ in range(2):
                try:
                    launch(own, name)
                except ShimError as error:
                    print(error, flush=True)
            launch(own, "reversed")
        """
    )
    messages = [
        "early_return: deadlock: of 256 threads 246 have returned, 10 wait at a divergent __syncthreads",
        r"two_barriers: divergent __syncthreads: threads of one block wait at \S+ and \S+",
        "divergent_shuffle: deadlock: .* 128 for lanes of their masks",
        "outside_mask: the shuffle at .* reads lane 20, which does not take part",
        "not_its_own: lane 1 is not in its own mask 0x00000001",
        "two_operations: lanes of one mask meet in different operations",
    ]
    said = done.stdout.splitlines()
    assert len(said) == 2 * len(messages), done.stderr[-3000:]
    for line, message in zip(said, [m for m in messages for _ in range(2)], strict=True):
        assert re.match(message, line)
    assert_silent(done)
