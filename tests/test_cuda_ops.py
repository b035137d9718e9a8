"""The device's building blocks on the host: the kernels' own source against SciPy and the CPU twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

import lesionsynth as ls
from lesionsynth.cuda import ops
from tests.cuda_host.device import HostDevice
from tests.cuda_host.shim import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="the shim needs g++, which is not installed")

DEVICES = [
    HostDevice(),
    HostDevice(processors=3, order="reverse"),
    HostDevice(processors=2, order="random", yield_percent=30, seed=7),
]
devices = pytest.mark.parametrize("device", DEVICES, ids=["forward", "reverse", "random"])
plains = pytest.mark.parametrize("plain", [False, True])
SHAPES = [(1, 1, 1), (3, 5, 31), (2, 4, 32), (4, 3, 33), (2, 7, 65), (7, 9, 130), (9, 1, 2)]
STRUCTURE = {6: 1, 18: 2, 26: 3}


def blank(shape, dtype) -> np.ndarray:
    return np.full(shape, 99, dtype=dtype)


def label(device, mask, connectivity, plain=False):
    out = blank(mask.shape, np.int32)
    count = ops.label(device, mask.ctypes.data, mask.shape, connectivity, out.ctypes.data, plain=plain)
    return out, count


# --- label ---


@plains
@devices
@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_label(connectivity, device, plain) -> None:
    structure = ndimage.generate_binary_structure(3, STRUCTURE[connectivity])
    rng = np.random.default_rng(connectivity)
    for shape in SHAPES:
        for density in (0.0, 0.1, 0.3, 0.6, 1.0):
            mask = (rng.random(shape) < density).astype(np.uint8) * rng.integers(
                1, 255, shape, dtype=np.uint8
            )
            labels, count = label(device, mask, connectivity, plain)
            expected, n = ndimage.label(mask, structure)
            assert_array_equal(labels, expected)
            assert count == n


@given(data=st.data(), connectivity=st.sampled_from([6, 18, 26]))
@settings(max_examples=60)
def test_label_any_mask(data, connectivity) -> None:
    shape = tuple(data.draw(st.integers(1, n)) for n in (4, 6, 100))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    mask = (rng.random(shape) < data.draw(st.floats(0.02, 0.9))).astype(np.uint8)
    labels, count = label(DEVICES[2], mask, connectivity)
    expected, n = ls.ops.label(mask, connectivity=connectivity)
    assert_array_equal(labels, expected)
    assert count == n


def test_label_of_a_snake() -> None:
    """One component that comes back to every row, over several chunks of words: long chains of parents."""
    mask = np.zeros((3, 200, 700), np.uint8)
    mask[0, ::2] = 1
    mask[0, 1::4, -1] = mask[0, 3::4, 0] = 1
    mask[2, 10:20, ::2] = 1
    for connectivity in (6, 26):
        labels, count = label(DEVICES[1], mask, connectivity)
        expected, n = ndimage.label(mask, ndimage.generate_binary_structure(3, STRUCTURE[connectivity]))
        assert_array_equal(labels, expected)
        assert count == n


# --- grow ---


@plains
@devices
@pytest.mark.parametrize("iterations", [1, 2, 40, 0])
def test_grow(iterations, device, plain) -> None:
    rng = np.random.default_rng(iterations)
    for connectivity, structure in STRUCTURE.items():
        for shape in SHAPES:
            seed, room = ((rng.random(shape) < p).astype(np.uint8) for p in (0.03, 0.6))
            out = blank(shape, np.uint8)
            ops.grow(
                device,
                seed.ctypes.data,
                room.ctypes.data,
                shape,
                iterations,
                connectivity,
                out.ctypes.data,
                plain=plain,
            )
            expected = ndimage.binary_dilation(
                seed, ndimage.generate_binary_structure(3, structure), iterations=iterations, mask=room
            )
            assert_array_equal(out, expected)


def test_grow_along_a_path_of_many_steps() -> None:
    """More steps than are launched between two looks."""
    room = np.zeros((1, 3, 150), np.uint8)
    room[0, 1] = 1
    seed = np.zeros_like(room)
    seed[0, 1, 0] = 1
    for iterations in (31, 32, 33, 100, 0):
        out = blank(room.shape, np.uint8)
        ops.grow(DEVICES[0], seed.ctypes.data, room.ctypes.data, room.shape, iterations, 6, out.ctypes.data)
        assert out.sum() == (min(iterations, 149) + 1 if iterations else 150)


# --- filters ---


@devices
@pytest.mark.parametrize("size", [1, 2, 3, (4, 1, 7), 9, 50])
def test_uniform_filter(size, device) -> None:
    rng = np.random.default_rng(3)
    sizes = (size,) * 3 if isinstance(size, int) else size
    for shape in (*SHAPES, (3, 40, 70)):
        image = rng.random(shape, dtype=np.float32)
        for volume, atol in (
            (image, 1e-6),
            (image.astype(np.float64), 1e-6),
            ((image > 0.5).astype(np.uint8), 0),
        ):
            out = blank(shape, np.float32)
            ops.uniform_filter(device, volume.ctypes.data, volume.dtype.name, shape, sizes, out.ctypes.data)
            assert_allclose(out, ndimage.uniform_filter(volume.astype(np.float64), sizes), atol=1e-6)
            assert_allclose(out, ls.ops.uniform_filter(volume, sizes), rtol=0, atol=atol)


@plains
@devices
@pytest.mark.parametrize("sigma", [0.0, 0.8, (0, 3, 0), (2.0, 0, 5.0), 7.5, 40.0])
def test_gaussian_filter(sigma, device, plain) -> None:
    """The CPU twin's bits, and SciPy's values to float32."""
    rng = np.random.default_rng(5)
    sigmas = (sigma,) * 3 if isinstance(sigma, float) else sigma
    for shape in (*SHAPES, (20, 33, 40)):
        volume = rng.random(shape, dtype=np.float32)
        before, out = volume.copy(), blank(shape, np.float32)
        ops.gaussian_filter(device, volume.ctypes.data, shape, sigmas, 4.0, out.ctypes.data, plain=plain)
        assert_array_equal(out, ls.ops.gaussian_filter(volume, sigmas))
        assert_allclose(out, ndimage.gaussian_filter(volume.astype(np.float64), sigmas), atol=1e-6)
        assert_array_equal(volume, before)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gaussian_filter_of_long_lines(axis) -> None:
    """Lines in several tiles, and kernels that no tile holds."""
    shape = [2, 3, 4]
    shape[axis] = 900
    volume = np.random.default_rng(axis).random(shape, dtype=np.float32)
    for sigma in (2.0, 25.0, 30.0, 70.0, 150.0):
        sigmas = tuple(sigma if k == axis else 0.0 for k in range(3))
        out = blank(shape, np.float32)
        ops.gaussian_filter(DEVICES[0], volume.ctypes.data, tuple(shape), sigmas, 4.0, out.ctypes.data)
        assert_array_equal(out, ls.ops.gaussian_filter(volume, sigmas))


# --- noise ---


@devices
def test_fill_uniform(device) -> None:
    for shape, offset in (
        ((1, 1, 1), (0, 0, 0)),
        ((3, 4, 33), (5, 6, 7)),
        ((2, 2, 9), (65534, 65534, 2**32 - 9)),
    ):
        out = blank(shape, np.float32)
        ops.fill_uniform(device, shape, (1, 2, 3, 2**32 - 1), offset, out.ctypes.data)
        assert_array_equal(
            out, ls.ops.philox_uniform(shape, 1, stream=2, sample=3, component=2**32 - 1, offset=offset)
        )


# --- erroneous edges ---


def edges(device, image, mask, **options):
    out, kept = blank(image.shape, image.dtype), blank(image.shape, np.uint8)
    values = {"threshold": 1 / 3, "contact_fraction": 0.5, "shell_width": 2, "connectivity": 26} | options
    ops.remove_edges(
        device, image.ctypes.data, image.dtype.name, mask.ctypes.data, image.shape, *values.values(),
        out.ctypes.data, kept.ctypes.data,
    )  # fmt: skip
    return out, kept.astype(bool)


@devices
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_remove_edges(dtype, device) -> None:
    rng = np.random.default_rng(1)
    for shape in (*SHAPES, (5, 40, 70)):
        mask = ndimage.binary_dilation(rng.random(shape) < 0.1, iterations=3)
        mask.reshape(-1)[0] = True
        image = ndimage.gaussian_filter(rng.random(shape), 0.7).astype(dtype).clip(0, 1)
        image[~mask] = 5.0
        for options in (
            {"threshold": 0.5},
            {"threshold": 0.45, "contact_fraction": 0.0},
            {"threshold": 0.5, "shell_width": 0},
            {"threshold": 0.5, "shell_width": 40},
            {"threshold": 0.5, "connectivity": 6, "contact_fraction": 0.3},
        ):
            expected = ls.remove_erroneous_edges(image, mask, **options)
            out, kept = edges(device, image, mask.view(np.uint8), **options)
            assert_array_equal(kept, expected[1])
            assert_array_equal(out, expected[0])


def test_remove_edges_refuses() -> None:
    image, mask = np.full((2, 5, 40), 0.5, np.float32), np.ones((2, 5, 40), np.uint8)
    with pytest.raises(ValueError, match="at least one voxel"):
        edges(DEVICES[0], image, mask * 0)
    for value in (np.nan, -0.1, 1.5):
        bad = image.copy()
        bad[1, 2, 33] = value
        with pytest.raises(ValueError, match=r"\[0, 1\] inside lung_mask"):
            edges(DEVICES[0], bad, mask)
