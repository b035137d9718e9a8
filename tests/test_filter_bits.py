"""What the filters promise beyond closeness to SciPy: order of rounding, exact reach, memory of their own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lesionsynth import ops
from lesionsynth.cpu import filters
from lesionsynth.cpu.engine.lines import gaussian_taps


def noise(shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def fma(weights, values, acc):
    """float32(weights * values + acc), rounded once.

    A float32 product has 48 bits. Values in [0.25, 1.5] and weights down to 1e-5 keep its sum with the
    accumulator within the 64 of a long double.
    """
    return (np.longdouble(weights) * values.astype(np.longdouble) + acc).astype(np.float32)


def filtered_along(axis, lines, sigma):
    sigmas = [0.0, 0.0, 0.0]
    sigmas[axis] = sigma
    return np.moveaxis(filters.gaussian_filter(np.moveaxis(lines, 0, axis), sigmas), axis, 0)


extended = pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs a float wider than 64 bits")


@extended
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("n", [15, 23, 32, 50])
def test_gaussian_rounds_in_the_stated_order(axis, n):
    """acc = w0 x0, then one fused multiply-add for each k: another device can repeat the bits."""
    sigma = 1.7
    lines = noise((n, 7, 18)) / 2 + np.float32(0.25)
    taps = gaussian_taps(sigma).astype(np.float32)
    radius = len(taps) - 1
    assert n >= 2 * radius + 1
    padded = lines[np.pad(np.arange(n), radius, mode="symmetric")]
    acc = taps[0] * lines
    for k in range(1, radius + 1):
        acc = fma(taps[k], padded[radius - k : radius - k + n] + padded[radius + k : radius + k + n], acc)
    np.testing.assert_array_equal(filtered_along(axis, lines, sigma), acc)


@extended
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 13, 14])
def test_folded_gaussian_rounds_in_the_stated_order(axis, n):
    """Even and odd parts, one fused multiply-add for each pair, then e + o and e - o.

    The matrix is SciPy's own response, so its halves may be an ulp away from ours, and sums with them.
    """
    sigma = 1.7
    lines = noise((n, 7, 18)) / 2 + np.float32(0.25)
    response = ndimage.gaussian_filter1d(np.eye(n), sigma, axis=0, mode="reflect")
    half = (n + 1) // 2
    even, odd = (((response + s * response[:, ::-1]) / 2)[:half, :half].astype(np.float32) for s in (1, -1))
    u, v = ((lines + s * lines[::-1])[:half] for s in (np.float32(1), np.float32(-1)))
    if n % 2:
        u[-1], v[-1] = lines[half - 1], 0
        even[:, -1] = response[:half, half - 1]
    e, o = even[:, :1, None] * u[:1], odd[:, :1, None] * v[:1]
    for j in range(1, half):
        e, o = fma(even[:, j, None, None], u[j], e), fma(odd[:, j, None, None], v[j], o)
    result = filtered_along(axis, lines, sigma)
    np.testing.assert_allclose(result[:half], e + o, rtol=2.0**-22)
    np.testing.assert_allclose(result[::-1][:half], e - o, rtol=2.0**-22)
    assert (result[:half] == e + o).mean() > 0.8


@given(sigma=st.floats(0.05, 64), truncate=st.floats(0.5, 6))
def test_taps_are_scipys(sigma, truncate):
    """Against the response of SciPy's filter to one bright voxel."""
    taps = gaussian_taps(sigma, truncate)
    radius = int(truncate * sigma + 0.5)
    assert len(taps) == radius + 1
    impulse = np.eye(1, 2 * radius + 1, radius)[0]
    response = ndimage.gaussian_filter1d(impulse, sigma, truncate=truncate)[radius:]
    # exp and a sum of 1 + 2 r terms in another order; far below half an ulp of float32, 3e-8
    np.testing.assert_allclose(taps, response, rtol=1e-12, atol=1e-300)


@settings(max_examples=150)
@given(
    n=st.integers(1, 70),
    sigma=st.floats(0.8, 20),
    truncate=st.sampled_from([4.0, 3.0, 1.0]),
    seed=st.integers(0, 9),
)
def test_lines_of_any_length_and_sigma(n, sigma, truncate, seed):
    """Both ways of filtering and the seam between them; values in [0, 1], 6e-8 an ulp, sums of n at most."""
    lines = np.random.default_rng(seed).random((n, 3, 5), dtype=np.float32)
    expected = ndimage.gaussian_filter1d(lines.astype(float), sigma, axis=0, truncate=truncate)
    for axis in range(3):
        sigmas = [0.0, 0.0, 0.0]
        sigmas[axis] = sigma
        result = filters.gaussian_filter(np.moveaxis(lines, 0, axis), sigmas, truncate)
        np.testing.assert_allclose(np.moveaxis(result, axis, 0), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("sigma", [0.0, 1e-300, 0.1])
def test_a_tiny_sigma_is_the_identity(sigma):
    volume = noise((3, 4, 5))
    np.testing.assert_array_equal(ops.gaussian_filter(volume, sigma), volume)


def test_nan_spreads_only_as_far_as_the_kernel():
    volume = noise((3, 3, 40))
    volume[1, 1, 20] = np.nan
    result = ops.gaussian_filter(volume, (0, 0, 1.0))
    assert np.argwhere(np.isnan(result)).tolist() == [[1, 1, x] for x in range(16, 25)]


def test_integers_beyond_float32_are_summed_before_they_are_rounded():
    """2**24 + 1 is no float32: rounded first, the two would cancel."""
    volume = np.array([[[2**24 + 1, -(2**24)]]], np.int32)
    assert ops.uniform_filter(volume, (1, 1, 2)).tolist() == [[[2**24, 0.5]]]


@pytest.mark.parametrize(
    "call",
    [lambda v: filters.gaussian_filter(v, (0, 0, 0)), lambda v: filters.uniform_filter(v, 1)],
    ids=["gaussian", "uniform"],
)
def test_a_memory_map_is_not_handed_back(call, tmp_path):
    """NumPy's contiguous view of a map is another object on the same file."""
    volume = noise((3, 4, 5))
    volume.tofile(tmp_path / "volume")
    mapped = np.memmap(tmp_path / "volume", np.float32, "r+", shape=volume.shape)
    result = call(mapped)
    assert not np.shares_memory(result, mapped)
    result[...] = 0
    np.testing.assert_array_equal(np.fromfile(tmp_path / "volume", np.float32), volume.ravel())


def test_longest_float_is_read():
    """Numba knows neither long doubles nor the other byte order."""
    volume = noise((3, 4, 5))
    for dtype in (np.longdouble, ">f8"):
        np.testing.assert_array_equal(ops.uniform_filter(volume.astype(dtype)), ops.uniform_filter(volume))
