"""Packed masks against NumPy, voxel by voxel."""

from __future__ import annotations

import numba
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lesionsynth.cpu import label
from lesionsynth.cpu.engine import bits
from lesionsynth.cpu.engine.simd import transpose

widths = st.integers(1, 200)
many = settings(max_examples=300)  # cheap, and what breaks hangs on few widths
densities = st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0])


def random_mask(shape, density, seed):
    return np.random.default_rng(seed).random(shape) < density


@many
@given(width=widths, height=st.integers(1, 4), density=densities, seed=st.integers(0, 99))
def test_packing_and_back(width, height, density, seed):
    mask = random_mask((2, height, width), density, seed)
    counts = np.empty(2 * height, np.int64)
    for view in (mask, np.asfortranarray(mask), mask.view(np.uint8) * np.uint8(7)):
        packed = bits.pack(view, 2, counts)
        np.testing.assert_array_equal(bits.unpack(packed), mask)
        np.testing.assert_array_equal(counts, mask.sum(axis=2).ravel())
        assert packed.bits.shape == (2 * height, -(-width // 64))
    beyond = np.unpackbits(packed.bits.view(np.uint8), bitorder="little", axis=1)[:, width:]
    assert not beyond.any()


@numba.njit
def shift_row(row, by, out):
    for w in range(row.size):
        out[w] = bits.shifted(row, w, by)


@many
@given(width=widths, density=densities, seed=st.integers(0, 99), by=st.integers(-210, 210))
def test_shifted_rows(width, density, seed, by):
    """A row of zeros stands on either side; what is pushed beyond the last word is lost."""
    row = random_mask((1, 1, width), density, seed)
    packed = bits.pack(row).bits[0]
    out = np.empty_like(packed)
    shift_row(packed, by, out)
    line = np.zeros(64 * len(packed), bool)
    line[:width] = row
    wide = np.concatenate([np.zeros(256, bool), line, np.zeros(256, bool)])
    expected = wide[256 - by : 256 - by + len(line)]
    np.testing.assert_array_equal(np.unpackbits(out.view(np.uint8), bitorder="little").view(bool), expected)


@many
@given(width=widths, density=densities, seed=st.integers(0, 99))
def test_runs(width, density, seed):
    mask = random_mask((2, 3, width), density, seed)
    runs = label.runs_of(bits.pack(mask), 2)
    edges = np.diff(np.pad(mask.reshape(6, width).astype(np.int8), ((0, 0), (1, 1))))
    for row in range(6):
        here = slice(runs.first[row], runs.first[row + 1])
        np.testing.assert_array_equal(runs.start[here], np.flatnonzero(edges[row] == 1))
        np.testing.assert_array_equal(runs.stop[here], np.flatnonzero(edges[row] == -1))


@numba.njit
def transpose_square(source, target):
    transpose(source, 3, 20, target, 5, 17)


def test_transposed_square():
    """Rows 20 apart become columns 17 apart; nothing else is written."""
    source, target = np.arange(400, dtype=np.float32), np.full(400, -1, np.float32)
    transpose_square(source, target)
    expected = np.full(400, -1, np.float32)
    for i in range(16):
        for j in range(16):
            expected[5 + 17 * i + j] = source[3 + 20 * j + i]
    np.testing.assert_array_equal(target, expected)
