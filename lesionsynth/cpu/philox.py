"""Philox4x32-10 (Salmon et al., SC 2011): counter-based noise with no state.

    key     = (seed, stream)
    counter = (x >> 2, (z << 16) | y, sample index, component)

One call gives the words of four voxels along x; word x & 3 belongs to voxel x. A draw depends on the voxel's
coordinate and on nothing else, so neither launch shape, batch, worker nor crop can change it. A word becomes
the float32 uniform (word >> 8) * 2**-24, exact on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.cpu.engine.jit import inner, kernel
from lesionsynth.cpu.engine.lines import aligned, pitch_of
from lesionsynth.cpu.engine.simd import LANES, iota, product, splat, store, transpose, uniform_of, upper
from lesionsynth.cpu.engine.threads import parallel_for, team_for

MULTIPLIER_0, MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL_0, WEYL_1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
ROUNDS = 10


class Stream(IntEnum):
    """Second key word: what the noise is for."""

    PLAN = 0
    WARP = 1
    PROBABILITY = 2
    SALT = 3
    FREE = 16


@kernel
def philox4x32_10(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Return the four words of a counter (c0, c1, c2, c3) under the key (k0, k1); all uint32."""
    c0, c1, c2, c3, k0, k1 = (
        np.uint32(c0), np.uint32(c1), np.uint32(c2), np.uint32(c3), np.uint32(k0), np.uint32(k1),
    )  # fmt: skip
    for _ in range(ROUNDS):
        p0 = MULTIPLIER_0 * np.uint64(c0)
        p1 = MULTIPLIER_1 * np.uint64(c2)
        c0, c1, c2, c3 = (
            np.uint32(np.uint32(p1 >> np.uint64(32)) ^ c1 ^ k0),
            np.uint32(p1 & np.uint64(0xFFFFFFFF)),
            np.uint32(np.uint32(p0 >> np.uint64(32)) ^ c3 ^ k1),
            np.uint32(p0 & np.uint64(0xFFFFFFFF)),
        )
        k0 = np.uint32(k0 + WEYL_0)
        k1 = np.uint32(k1 + WEYL_1)
    return c0, c1, c2, c3


def plan_uniforms(seed: int, index: int, first: int, count: int, width: int) -> npt.NDArray[np.float64]:
    """Return (count, width) uniforms in [0, 1) of 53 bits, for the components ``first ...`` of a sample."""
    out = np.empty((count, width))
    _fill_plan(out, *(np.uint32(w) for w in (seed, Stream.PLAN, index, first)))
    return out


@kernel
def _fill_plan(out: Any, seed: Any, stream: Any, index: Any, first: Any) -> None:
    """Two words make a uniform: 27 bits of one above 26 of the other."""
    for k in range(out.shape[0]):
        for block in range(out.shape[1] // 2):
            a, b, c, d = philox4x32_10(block, np.uint32(0), index, np.uint32(first + k), seed, stream)
            out[k, 2 * block] = (float(a >> 5) * 2.0**26 + float(b >> 6)) * 2.0**-53
            out[k, 2 * block + 1] = (float(c >> 5) * 2.0**26 + float(d >> 6)) * 2.0**-53


def fill_uniform(
    out: npt.NDArray[np.float32],
    seed: int,
    stream: int,
    sample: int,
    component: int,
    origin: Sequence[int],
    threads: int | None = None,
) -> None:
    """Fill a box with the uniforms in [0, 1) of its voxels.

    Parameters
    ----------
    out : (z, y, x) float32 array
        Written.
    seed, stream : int
        Key words.
    sample, component : int
        Counter words.
    origin : (3,) ints
        Coordinate of ``out[0, 0, 0]``; z and y stay below 2**16.
    threads : int, optional
        See `parallel_for`.
    """
    words = [np.uint32(w) for w in (seed, stream, sample, component, *origin)]
    blocks = blocks_of(out.shape[0], out.shape[1])
    team = team_for(out.size, threads)
    parallel_for(blocks, lambda lo, hi: fill_blocks(out, *words, lo, hi), team)


@kernel
def blocks_of(depth: int, height: int) -> int:
    """Count the blocks of sixteen rows of a box."""
    return depth * (pitch_of(height) // LANES)


@kernel
def fill_blocks(
    out: Any, seed: Any, stream: Any, sample: Any, component: Any, z0: Any, y0: Any, x0: Any, lo: int, hi: int
) -> None:
    """Fill blocks lo ... hi - 1 of sixteen rows of a box; all words uint32."""
    height, width = out.shape[1], out.shape[2]
    first = np.int64(x0) // 4
    quads = (np.int64(x0) + width - 1) // 4 - first + 1
    skip = np.int64(x0) - 4 * first  # voxels of the first quad that lie before the box
    pitch = pitch_of(4 * quads)
    lines, rows = aligned(pitch * LANES), aligned(pitch * LANES)
    blocks = blocks_of(1, height)
    for b in range(lo, hi):
        z, y = b // blocks, b % blocks * LANES
        plane = ((z0 + np.uint32(z)) << np.uint32(16)) | (y0 + np.uint32(y))
        uniform_lines(lines, 0, first, quads, plane, sample, component, seed, stream)
        for x in range(0, pitch, LANES):
            transpose(lines, x * LANES, LANES, rows, x, pitch)
        for j in range(min(LANES, height - y)):
            for x in range(width):
                out[z, y + j, x] = rows[j * pitch + skip + x]


@inner
def uniform_lines(
    out: Any, at: int, first: int, quads: int, plane: Any, sample: Any, component: Any, seed: Any, stream: Any
) -> None:
    """Uniforms of sixteen rows side by side, as `lesionsynth.cpu.engine.lines` wants them.

    The four voxels of quad ``first + k`` (x >> 2) go to the rows ``at + 4 k ...`` of sixteen lanes; lane j is
    the row of counter word ``plane + j``. All words are uint32.
    """
    m0, m1 = splat(MULTIPLIER_0), splat(MULTIPLIER_1)
    planes = splat(np.uint64(plane)) + iota()
    for k in range(quads):
        c0, c1 = splat(np.uint64(first + k)), planes
        c2, c3 = splat(np.uint64(sample)), splat(np.uint64(component))
        k0, k1 = np.uint32(seed), np.uint32(stream)
        for _ in range(ROUNDS):
            p0, p1 = product(m0, c0), product(m1, c2)
            c0, c1 = upper(p1) ^ c1 ^ splat(np.uint64(k0)), p1
            c2, c3 = upper(p0) ^ c3 ^ splat(np.uint64(k1)), p0
            k0, k1 = np.uint32(k0 + WEYL_0), np.uint32(k1 + WEYL_1)
        to = (at + 4 * k) * LANES
        store(out, to, uniform_of(c0))
        store(out, to + LANES, uniform_of(c1))
        store(out, to + 2 * LANES, uniform_of(c2))
        store(out, to + 3 * LANES, uniform_of(c3))
