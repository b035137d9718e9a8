"""What the filters promise beyond closeness to SciPy: order of rounding, exact reach, memory of their own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from lesionsynth import ops
from lesionsynth.cpu import filters


def noise(shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs a float wider than 64 bits")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gaussian_rounds_in_the_stated_order(axis):
    """acc = w0 x0, then one fused multiply-add for each k: another device can repeat the bits.

    A float32 product has 48 bits. Values in [0.25, 0.75] and taps down to 3e-4 keep its sum with the
    accumulator within the 64 of a long double, so rounding that sum once is fma.
    """
    sigma = 1.7
    volume = noise((6, 7, 8)) / 2 + np.float32(0.25)
    taps = filters.gaussian_taps(sigma)
    lines = np.moveaxis(volume, axis, 0)
    n, radius = len(lines), len(taps) - 1
    padded = lines[np.pad(np.arange(n), radius, mode="symmetric")]
    acc = taps[0] * lines
    for k in range(1, radius + 1):
        pair = padded[radius - k : radius - k + n] + padded[radius + k : radius + k + n]
        acc = (np.longdouble(taps[k]) * pair.astype(np.longdouble) + acc).astype(np.float32)
    sigmas = [0.0, 0.0, 0.0]
    sigmas[axis] = sigma
    np.testing.assert_array_equal(filters.gaussian_filter(volume, sigmas), np.moveaxis(acc, 0, axis))


@given(sigma=st.floats(0.05, 64), truncate=st.floats(0.5, 6))
def test_taps_are_scipys_rounded(sigma, truncate):
    """Against the response of SciPy's filter to one bright voxel."""
    taps = filters.gaussian_taps(sigma, truncate)
    radius = int(truncate * sigma + 0.5)
    assert len(taps) == radius + 1
    assert taps.dtype == np.float32
    impulse = np.eye(1, 2 * radius + 1, radius)[0]
    response = ndimage.gaussian_filter1d(impulse, sigma, truncate=truncate)[radius:]
    # Half an ulp of float32; taps below its normal range keep fewer bits.
    np.testing.assert_allclose(taps, response, rtol=2.0**-23, atol=1e-44)


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
