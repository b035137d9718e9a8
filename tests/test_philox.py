"""Philox4x32-10: published words, and fields that depend on the coordinate alone."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesionsynth import ops
from lesionsynth.cpu.philox import fill_uniform, philox4x32_10, uniform_lines
from tests import oracles

ONES = 0xFFFFFFFF
# tests/kat_vectors of Random123 1.14: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

words = st.integers(0, 2**32 - 1)
small_shapes = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 11))
offsets = st.tuples(st.integers(0, 2**16 - 8), st.integers(0, 2**16 - 8), st.integers(0, 2**32 - 16))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    """The compiled words, and those of the oracle, against the authors' vectors."""
    compiled = philox4x32_10(*(np.uint32(w) for w in (*counter, *key)))
    assert tuple(int(w) for w in compiled) == expected
    assert tuple(int(w) for w in oracles.philox4x32_10(counter, key)) == expected


@given(counter=st.tuples(words, words, words, words), key=st.tuples(words, words))
def test_words_are_the_oracles(counter, key):
    compiled = philox4x32_10(*(np.uint32(w) for w in (*counter, *key)))
    assert [int(w) for w in compiled] == [int(w) for w in oracles.philox4x32_10(counter, key)]


@numba.njit
def draw_lines(out, first, quads, plane, sample, component, seed, stream):
    uniform_lines(out, 0, first, quads, plane, sample, component, seed, stream)


@given(
    key=st.tuples(words, words), sample=words, component=words, z=st.integers(0, 2**16 - 1),
    y=st.integers(0, 2**16 - 16), quad=st.integers(0, 2**30 - 3),
)  # fmt: skip
def test_vectors_of_rows_are_the_oracles(key, sample, component, z, y, quad):
    """Sixteen rows side by side, three quads of each: the same words by other instructions."""
    out = np.empty(3 * 4 * 16, np.float32)
    plane = np.uint32((z << 16) | y)
    draw_lines(out, quad, 3, plane, *(np.uint32(w) for w in (sample, component, *key)))
    x = np.arange(4 * quad, 4 * quad + 12)
    expected = oracles.uniform_field(*key, sample, component, np.array([z]), np.arange(y, y + 16), x)
    np.testing.assert_array_equal(out.reshape(12, 16).T, expected[0])


@given(shape=small_shapes, start=offsets, key=st.tuples(words, words), sample=words, component=words)
def test_field_is_the_oracles_at_any_corner_of_the_range(shape, start, key, sample, component):
    """Every voxel against plain NumPy, up to the last coordinates: 2**16 - 1 and 2**32 - 1."""
    field = ops.philox_uniform(shape, key[0], stream=key[1], sample=sample, component=component, offset=start)
    axes = (np.arange(s, s + n) for s, n in zip(start, shape, strict=True))
    expected = oracles.uniform_field(*key, sample, component, *axes)
    assert field.dtype == np.float32
    np.testing.assert_array_equal(field, expected)


def test_last_coordinates_are_allowed_and_the_next_are_not():
    shape, corner = (2, 3, 5), (2**16 - 2, 2**16 - 3, 2**32 - 5)
    axes = (np.arange(s, s + n) for s, n in zip(corner, shape, strict=True))
    field = ops.philox_uniform(shape, 3, offset=corner)
    np.testing.assert_array_equal(field, oracles.uniform_field(3, 16, 0, 0, *axes))
    for axis in range(3):
        beyond = tuple(c + (i == axis) for i, c in enumerate(corner))
        with pytest.raises(ValueError, match=r"offset \+ shape"):
            ops.philox_uniform(shape, 3, offset=beyond)


@given(data=st.data(), shape=small_shapes, start=offsets)
def test_crop_of_a_field_is_the_field_of_the_crop(data, shape, start):
    low = [data.draw(st.integers(0, n - 1)) for n in shape]
    high = [data.draw(st.integers(a + 1, n)) for a, n in zip(low, shape, strict=True)]
    whole = ops.philox_uniform(shape, 11, sample=4, offset=start)
    part = ops.philox_uniform(
        [b - a for a, b in zip(low, high, strict=True)],
        11,
        sample=4,
        offset=[s + a for s, a in zip(start, low, strict=True)],
    )
    np.testing.assert_array_equal(part, whole[tuple(map(slice, low, high))])


def test_every_word_of_the_name_counts():
    """Seed, stream, sample and component each give another field; the default stream is FREE."""
    base = ops.philox_uniform((3, 4, 9), 5)
    np.testing.assert_array_equal(base, ops.philox_uniform((3, 4, 9), 5, stream=ops.Stream.FREE))
    others = [
        ops.philox_uniform((3, 4, 9), 6),
        ops.philox_uniform((3, 4, 9), 5, stream=17),
        ops.philox_uniform((3, 4, 9), 5, sample=1),
        ops.philox_uniform((3, 4, 9), 5, component=1),
    ]
    for other in others:
        # 108 values of 24 bits: a chance of one equal pair is 108 / 2**24, and the seeds are fixed.
        assert not (other == base).any()


def test_values_are_uniform_multiples_of_the_unit():
    u = ops.philox_uniform((40, 50, 60), 2024).ravel().astype(np.float64)
    assert u.min() >= 0
    assert u.max() < 1
    assert (u * 2**24 == np.floor(u * 2**24)).all()
    # Kolmogorov-Smirnov at level 1e-4: 2.23 / sqrt(n).
    ranks = np.arange(1, u.size + 1) / u.size
    assert np.abs(np.sort(u) - ranks).max() < 2.23 / np.sqrt(u.size)


def test_neighbours_are_uncorrelated():
    u = ops.philox_uniform((40, 50, 60), 7).astype(np.float64) - 0.5
    for axis in range(3):
        n = u.shape[axis]
        a, b = u.take(range(n - 1), axis), u.take(range(1, n), axis)
        # The correlation of m independent pairs has deviation m ** -0.5; five of them.
        assert abs((a * b).mean() / (u * u).mean()) < 5 / np.sqrt(a.size)


def test_a_strided_view_is_filled_and_the_rest_left_alone():
    canvas = np.full((4, 6, 10), -1, dtype=np.float32)
    fill_uniform(canvas[::2, 1:5, ::-3], 1, 2, 3, 4, (5, 6, 7))
    expected = oracles.uniform_field(1, 2, 3, 4, np.arange(5, 7), np.arange(6, 10), np.arange(7, 11))
    np.testing.assert_array_equal(canvas[::2, 1:5, ::-3], expected)
    assert (canvas == -1).sum() == canvas.size - expected.size


@pytest.mark.parametrize("name", ["seed", "stream", "sample", "component"])
@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (2**32, ValueError), (0.5, TypeError)])
def test_words_out_of_range_are_named(name, value, error):
    arguments = {"shape": (1, 1, 1), "seed": 0} | {name: value}
    with pytest.raises(error, match=name):
        ops.philox_uniform(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": (2, 2)}, ValueError, "shape"),
        ({"shape": (0, 2, 2)}, ValueError, "shape"),
        ({"shape": (1, 1, 1.5)}, TypeError, "shape"),
        ({"shape": (1, 1, 1), "offset": (0, -1, 0)}, ValueError, "offset"),
        ({"shape": (1, 1, 1), "offset": (0, 0)}, ValueError, "offset"),
    ],
)
def test_bad_boxes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.philox_uniform(seed=0, **arguments)


def test_a_field_in_the_callers_array() -> None:
    torch = pytest.importorskip("torch")
    want = ops.philox_uniform((3, 4, 5), 9, sample=2)
    for out in (np.empty((3, 4, 5), np.float32), torch.empty(3, 4, 5)):
        assert ops.philox_uniform((3, 4, 5), 9, sample=2, out=out) is out
        np.testing.assert_array_equal(np.asarray(out), want)
    read_only = np.empty((3, 4, 5), np.float32)
    read_only.setflags(write=False)
    for out, error, message in (
        (np.empty((3, 4, 6), np.float32), ValueError, r"out must have the shape asked for, \(3, 4, 5\), got"),
        (np.empty((3, 4, 5)), TypeError, "out must be float32, got float64"),
        (np.empty((3, 4, 10), np.float32)[..., ::2], ValueError, "out must be C-contiguous"),
        (read_only, ValueError, "out must be writeable"),
        ([0.0], TypeError, "out must be a NumPy array or a DLPack array"),
    ):
        with pytest.raises(error, match=message):
            ops.philox_uniform((3, 4, 5), 9, out=out)
    with pytest.raises(ValueError, match="device must be left out where out is given, got 'cuda'"):
        ops.philox_uniform((3, 4, 5), 9, device="cuda", out=np.empty((3, 4, 5), np.float32))
