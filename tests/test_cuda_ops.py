"""The GPU's building blocks, their own source run on the host, against SciPy and the CPU twins."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lesionsynth import ops as cpu
from lesionsynth.cpu.edges import remove_edges
from lesionsynth.cuda import filters, labels
from lesionsynth.cuda.grid import upload
from tests.cuda_host.device import HostBuffer, HostDevice
from tests.cuda_host.shim import ORDERS, compiler
from tests.test_lungs_edges import blobs, expected_edges, rim_and_vessel
from tests.test_ops import CONNECTIVITIES, GAUSSIAN, OFFSETS, spiral, structure, uniform, worst_cases

pytestmark = pytest.mark.skipif(compiler() is None, reason="the kernels need g++ to run on the host")

MEAN = 1e-6
"""What is promised of inexact sums. Both twins round sums of float64 below 1e4, then once to float32."""

widths = st.one_of(st.integers(1, 9), st.sampled_from([31, 32, 33, 63, 64, 65, 97]))
shapes = st.tuples(st.integers(1, 5), st.integers(1, 7), widths)
seeds = st.integers(0, 2**16)
connectivities = st.sampled_from(CONNECTIVITIES)
orders = st.sampled_from(ORDERS)


def host(order="random", processors=1, seed=1):
    return HostDevice(order=order, yield_percent=30, processors=processors, seed=seed)


def blank(shape, dtype):
    """Memory that nobody has written: as floats NaN, as labels what a fault would take for a number."""
    dtype = np.dtype(dtype)
    return HostBuffer(int(np.prod(shape)) * dtype.itemsize, 0xFF).array.view(dtype).reshape(shape)


def label(device, mask, connectivity=26, plain=False):
    out = blank(mask.shape, np.int32)
    arguments = mask.ctypes.data, mask.shape, connectivity, out.ctypes.data
    return out, labels.label(device, *arguments, plain=plain)


def grow(device, region, room, iterations=1, connectivity=6, **options):
    out = blank(region.shape, np.uint8)
    arguments = region.ctypes.data, room.ctypes.data, region.shape, iterations, connectivity, out.ctypes.data
    labels.grow(device, *arguments, **options)
    return out


def edges(device, image, mask, **options):
    values = {"threshold": 1 / 3, "contact_fraction": 0.5, "shell_width": 2, "connectivity": 26} | options
    out, kept = blank(image.shape, image.dtype), blank(image.shape, np.uint8)
    source = image.ctypes.data, image.dtype.name, mask.ctypes.data, image.shape
    labels.remove_edges(device, *source, *values.values(), out.ctypes.data, kept.ctypes.data)
    return out, kept


def mean(device, volume, sizes):
    out = blank(volume.shape, np.float32)
    kind = volume.dtype.name
    filters.uniform_filter(device, volume.ctypes.data, kind, volume.shape, sizes, out.ctypes.data)
    return out


def noise(device, shape, words, offset=(0, 0, 0)):
    out = blank(shape, np.float32)
    filters.fill_uniform(device, shape, words, offset, out.ctypes.data)
    return out


def gauss(device, volume, sigmas, truncate=4.0, **options):
    out = blank(volume.shape, np.float32)
    arguments = volume.ctypes.data, volume.shape, sigmas, truncate, out.ctypes.data
    filters.gaussian_filter(device, *arguments, **options)
    return out


# --- Labels ---


def assert_labels_are_scipys(device, mask, connectivity, **options):
    expected, count = ndimage.label(mask, structure(connectivity))
    labels, n = label(device, mask, connectivity, **options)
    assert n == count
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("plain", [False, True])
@given(
    shape=shapes,
    seed=seeds,
    share=st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9]),
    connectivity=connectivities,
    order=orders,
)
@settings(max_examples=60)
def test_labels_are_scipys(plain, shape, seed, share, connectivity, order):
    mask = uniform(shape, seed) < share
    assert_labels_are_scipys(host(order, seed=seed + 1), mask, connectivity, plain=plain)
    labels, n = cpu.label(mask, connectivity=connectivity)
    np.testing.assert_array_equal(label(host(order), mask, connectivity)[0], labels)
    assert labels.max(initial=0) == n


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", worst_cases())
def test_labels_are_scipys_in_the_worst_cases(name, order):
    mask = np.ascontiguousarray(worst_cases()[name])
    for connectivity in CONNECTIVITIES:
        assert_labels_are_scipys(host(order), mask, connectivity)


@pytest.mark.parametrize("x", [30, 31, 32, 33])
def test_neighbours_are_those_of_the_definition_across_words(x):
    for connectivity in CONNECTIVITIES:
        for offset in OFFSETS:
            mask, seed = np.zeros((3, 3, 66), dtype=bool), np.zeros((3, 3, 66), dtype=bool)
            seed[1, 1, x] = True
            mask[tuple(np.add((1, 1, x), offset))] = True
            both = mask | seed
            n = ndimage.label(both, structure(connectivity))[1]
            assert label(host("forward"), both, connectivity)[1] == n, (connectivity, offset)
            grown = grow(host("forward"), seed, mask, 1, connectivity)
            np.testing.assert_array_equal(grown, both if n == 1 else seed)


@pytest.mark.parametrize("holes", [0, 0.002, 0.02])
def test_runs_of_more_words_than_a_thread_walks(holes):
    mask = uniform((2, 3, 1700), 1) >= holes
    for connectivity in CONNECTIVITIES:
        assert_labels_are_scipys(host(), mask, connectivity)


def test_more_chunks_than_threads_that_add_them_up():
    """A word a voxel, 70,000 of them, in 274 chunks; components alternate."""
    mask = (np.indices((70, 1000, 1)).sum(axis=0) % 2 == 0) | (uniform((70, 1000, 1), 2) < 0.05)
    assert_labels_are_scipys(HostDevice(processors=2), mask, 6)


def test_any_byte_but_zero_is_foreground():
    mask = np.random.default_rng(3).integers(0, 3, (4, 5, 48), dtype=np.uint8) * np.uint8(85)
    assert_labels_are_scipys(host(), mask, 18)


@pytest.mark.parametrize("order", ORDERS)
def test_snake_is_one_component(order):
    """It comes back to every row, over many chunks of words: long chains of parents."""
    mask = np.zeros((3, 200, 700), dtype=bool)
    mask[0, ::2] = True
    mask[0, 1::4, -1] = mask[0, 3::4, 0] = True
    mask[2, 10:20, ::2] = True
    for connectivity in (6, 26):
        assert_labels_are_scipys(HostDevice(order=order, processors=3, seed=7), mask, connectivity)


def test_volumes_that_int32_cannot_count_are_named():
    """Before any memory is taken or looked at."""
    device, shape = HostDevice(), (2**11, 2**10, 2**10)
    with pytest.raises(ValueError, match=r"input .* 2\*\*31 .* \(2048, 1024, 1024\)"):
        labels.label(device, 0, shape, 6, 0)
    with pytest.raises(ValueError, match=r"image .* 2\*\*31"):
        labels.remove_edges(device, 0, "float32", 0, shape, 0.3, 0.5, 2, 26, 0, 0)
    assert device.allocations == 0
    assert not device.launches


# --- Growth ---


@pytest.mark.parametrize("plain", [False, True])
@given(
    shape=shapes,
    seed=seeds,
    share=st.floats(0, 0.3),
    room=st.floats(0, 1),
    iterations=st.integers(-1, 6),
    connectivity=connectivities,
    order=orders,
)
@settings(max_examples=60)
def test_growth_is_scipys_dilation(plain, shape, seed, share, room, iterations, connectivity, order):
    region, mask = uniform(shape, seed) < share, uniform(shape, seed + 1) < room
    expected = ndimage.binary_dilation(region, structure(connectivity), iterations, mask=mask)
    grown = grow(host(order), region, mask, iterations, connectivity, plain=plain)
    np.testing.assert_array_equal(grown, expected)
    twin = cpu.grow(region, mask, iterations=iterations, connectivity=connectivity)
    np.testing.assert_array_equal(grown, twin)


@pytest.mark.parametrize("steps", [1, 63, 64, 65, 100, 128, 129, 500, 2000, 0])
def test_growth_follows_a_corridor_over_bundles_of_steps(steps):
    corridor = spiral()[None]
    seed = np.zeros_like(corridor)
    seed[0, 0, 0] = True
    device = host()
    grown = grow(device, seed, corridor, steps)
    np.testing.assert_array_equal(grown, cpu.grow(seed, corridor, iterations=steps))
    if 1 <= steps <= 129:
        assert grown.sum() == steps + 1
    assert device.downloads == (0 if steps in (0, 2000) else (steps - 1) // labels.BUNDLE)


def test_growth_that_stands_still_is_not_launched_for_ever():
    seed, mask = np.zeros((3, 40, 40), dtype=bool), np.zeros((3, 40, 40), dtype=bool)
    seed[1, 2, 3] = mask[1, 2, 4] = True
    device = host()
    assert grow(device, seed, mask, 4000).sum() == 2
    assert device.launches.count("grow_step") == labels.BUNDLE


@pytest.mark.parametrize("iterations", [0, 10**6])
def test_growth_of_volumes_that_int32_cannot_count_takes_steps(iterations, monkeypatch):
    corridor = spiral()[None]
    seed = np.zeros_like(corridor)
    seed[0, 0, 0] = True
    monkeypatch.setattr(labels, "MOST_VOXELS", corridor.size)
    device = HostDevice()
    np.testing.assert_array_equal(grow(device, seed, corridor, iterations), corridor)
    assert "label_unite" not in device.launches


# --- Erroneous edges ---


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 14), widths),
    seed=seeds,
    share=st.floats(0.05, 1),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
    contact_fraction=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    shell_width=st.integers(0, 4),
    connectivity=connectivities,
    dtype=st.sampled_from([np.float32, np.float64]),
    order=orders,
)
def test_edges_are_the_oracles(shape, seed, share, dtype, order, threshold, **options):
    mask = blobs(shape, seed, share)
    image = np.random.default_rng(seed + 1).random(shape).astype(dtype)
    image[~mask] = np.nan
    healthy, kept = edges(host(order), image, mask, threshold=threshold, **options)
    expected = mask & ~expected_edges(image, mask, dtype(threshold), *options.values())
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(healthy, np.where(expected, image, 0))
    twin = remove_edges(image, mask, dtype(threshold), *options.values())
    np.testing.assert_array_equal(healthy, twin[0])
    np.testing.assert_array_equal(kept, twin[1])


@pytest.mark.parametrize("width", [1, 5, 31, 32, 33, 40, 100])
def test_shell_may_be_wider_than_words_and_volumes(width):
    mask = np.ones((1, 90, 120), dtype=bool)
    mask[0, 40, 70] = False
    image = np.full(mask.shape, 0.1, dtype=np.float32)
    image[0, 1::4, 1::3] = 0.9  # each a component of one voxel: it goes where it lies in the shell
    image *= mask
    healthy, kept = edges(host("forward"), image, mask, shell_width=width)
    expected = remove_edges(image, mask, np.float32(1 / 3), 0.5, width, 26)
    np.testing.assert_array_equal(kept, expected[1])
    np.testing.assert_array_equal(healthy, expected[0])


def test_rim_goes_and_vessel_stays():
    image, mask = rim_and_vessel()
    healthy, kept = edges(host(), image, mask)
    expected = mask.copy()
    expected[:, 4:20, 2:4] = False
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(healthy, np.where(expected, image, 0))


def test_one_component_of_many_words_is_counted_once():
    """A bright lung of 40 words a row: half in the shell is not enough, all of it but a voxel is."""
    mask = np.ones((3, 4, 1280), dtype=bool)
    image = np.ones(mask.shape, dtype=np.float32)
    assert edges(host(), image, mask, contact_fraction=1.0)[1].all()
    assert not edges(host(), image, mask, contact_fraction=0.99)[1].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("strange", [np.nan, -0.5, 1.5, np.inf])
def test_strange_voxels_count_inside_the_mask_only(strange, dtype):
    for x in (0, 31, 32, 69):
        image, mask = np.full((2, 3, 70), 0.2, dtype), np.ones((2, 3, 70), bool)
        image[1, 2, x] = strange
        with np.errstate(invalid="ignore"):
            with pytest.raises(ValueError, match="image must lie in") as told:
                edges(host("forward"), image, mask)
            with pytest.raises(ValueError, match="image must lie in") as twin:
                remove_edges(image, mask, dtype(1 / 3), 0.5, 2, 26)
        assert str(told.value) == str(twin.value)
        mask[1, 2, x] = False
        assert edges(host("forward"), image, mask)[0][1, 2, x] == 0


def test_an_empty_mask_is_named():
    image = np.zeros((2, 3, 40), dtype=np.float32)
    with pytest.raises(ValueError, match=r"lung_mask .* \(2, 3, 40\)"):
        edges(host(), image, np.zeros(image.shape, dtype=bool))


# --- Mean over a box ---

sizes = st.tuples(*[st.integers(1, 24)] * 3)


@given(shape=shapes, seed=seeds, size=sizes, order=orders, dtype=st.sampled_from(["f4", "f8", "u1"]))
def test_mean_is_scipys(shape, seed, size, order, dtype):
    volume = uniform(shape, seed).astype(np.float64)
    volume = (volume < 0.4).astype(dtype) if dtype == "u1" else volume.astype(dtype)
    expected = ndimage.uniform_filter(volume.astype(np.float64), size, mode="reflect")
    result = mean(host(order), volume, size)
    np.testing.assert_allclose(result, expected, rtol=0, atol=MEAN)
    if dtype == "u1":
        np.testing.assert_array_equal(result, cpu.uniform_filter(volume, size))


@pytest.mark.parametrize("size", [(1, 1, 1), (7, 7, 7), (9, 8, 9), (1, 70, 3), (20, 2, 90)])
def test_mean_is_the_twins_where_sums_are_exact(size, monkeypatch):
    """Multiples of 2^-40; whole or in slabs of a slice."""
    volume = np.random.default_rng(4).integers(0, 2**40, (5, 66, 67)) * 2.0**-40
    expected = cpu.uniform_filter(volume, size)
    np.testing.assert_array_equal(mean(host(), volume, size), expected)
    monkeypatch.setattr(filters, "SLAB", 2 * 66 * 67)
    np.testing.assert_array_equal(mean(host("reverse"), volume, size), expected)


def test_bytes_are_numbers():
    volume = np.random.default_rng(5).integers(0, 256, (3, 5, 33), dtype=np.uint8)
    np.testing.assert_array_equal(mean(host(), volume, (2, 3, 4)), cpu.uniform_filter(volume, (2, 3, 4)))


def test_running_sums_do_not_drift():
    volume = np.zeros((1, 1, 20010), dtype=np.float32)
    volume[..., :20000] = uniform((1, 1, 20000), 4) * np.float32(0.1)
    result = mean(host("forward"), volume, (1, 1, 5))
    np.testing.assert_allclose(result, cpu.uniform_filter(volume, (1, 1, 5)), rtol=0, atol=2.0**-28 + 1e-12)
    assert abs(result[0, 0, -5:]).max() < 1e-12


# --- Noise ---


@given(
    shape=shapes,
    words=st.tuples(*[st.integers(0, 2**32 - 1)] * 4),
    offset=st.tuples(st.integers(0, 2**16 - 8), st.integers(0, 2**16 - 8), st.integers(0, 2**32 - 100)),
    order=orders,
)
def test_noise_is_the_twins(shape, words, offset, order):
    seed, stream, sample, component = words
    expected = cpu.philox_uniform(
        shape, seed, stream=stream, sample=sample, component=component, offset=offset
    )
    np.testing.assert_array_equal(noise(host(order), shape, words, offset), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_noise_reaches_the_last_coordinates(order):
    offset, words = (2**16 - 2, 2**16 - 2, 2**32 - 9), (1, 2, 3, 2**32 - 1)
    expected = cpu.philox_uniform((2, 2, 9), 1, stream=2, sample=3, component=2**32 - 1, offset=offset)
    np.testing.assert_array_equal(noise(host(order), (2, 2, 9), words, offset), expected)


# --- Gaussian ---

sigmas = st.one_of(st.just(0.0), st.floats(0.1, 0.8), st.floats(0.8, 20))


@given(shape=shapes, seed=seeds, sigma=st.tuples(sigmas, sigmas, sigmas), order=orders, plain=st.booleans())
def test_gaussian_is_the_twins(shape, seed, sigma, order, plain):
    volume = uniform(shape, seed)
    result = gauss(host(order), volume, sigma, plain=plain)
    np.testing.assert_array_equal(result, cpu.gaussian_filter(volume, sigma))
    expected = ndimage.gaussian_filter(volume.astype(np.float64), sigma, mode="reflect")
    np.testing.assert_allclose(result, expected, rtol=0, atol=GAUSSIAN)


@pytest.mark.parametrize("shape", [(2, 3, 700), (2, 700, 3), (700, 2, 3), (40, 33, 40)])
@pytest.mark.parametrize("sigma", [0.8, 3.0, 20.0, 30.0, 40.0, 100.0])
def test_gaussian_of_long_lines_is_the_twins(shape, sigma):
    """Taps on tiles and on pieces of lines, the matrix on tiles, and both where no tile holds them."""
    volume = uniform(shape, 6)
    expected = cpu.gaussian_filter(volume, sigma)
    np.testing.assert_array_equal(gauss(host("forward"), volume, (sigma,) * 3), expected)


@pytest.mark.parametrize("truncate", [0.1, 1.5, 6.0])
def test_truncate_is_the_twins(truncate):
    volume = uniform((7, 20, 33), 7)
    result = gauss(host(), volume, (1.0, 2.0, 3.0), truncate)
    np.testing.assert_array_equal(result, cpu.gaussian_filter(volume, (1, 2, 3), truncate=truncate))


@pytest.mark.parametrize("sigma", [(0, 0, 0), (0, 3, 0), (2.0, 0, 5.0), (0.1, 0.1, 9.0)])
def test_axes_without_a_kernel_are_left_alone(sigma):
    """No, one, two passes: the last writes the caller's memory, whichever it is."""
    volume = uniform((7, 9, 40), 10)
    device = host()
    np.testing.assert_array_equal(gauss(device, volume, sigma), cpu.gaussian_filter(volume, sigma))
    assert len(device.launches) == sum(s > 0.125 for s in sigma)


class Slow(HostDevice):
    """Passes no mark until it is told to."""

    passed = False

    def mark(self):
        return SimpleNamespace(done=lambda: self.passed)


def test_uploads_live_until_the_device_has_read_them(monkeypatch):
    under_way = deque()
    monkeypatch.setattr("lesionsynth.cuda.grid._under_way", under_way)
    device = Slow()
    for k in range(3):
        upload(device, [np.arange(5.0)])
        assert len(under_way) == k + 1
    device.passed = True
    upload(device, [np.arange(5.0)])
    assert len(under_way) == 1


def test_threads_may_upload_at_once(monkeypatch):
    """Another one may take what is under way while this one looks at it."""
    under_way = deque()
    monkeypatch.setattr("lesionsynth.cuda.grid._under_way", under_way)
    mark = SimpleNamespace(done=lambda: under_way.clear() or True)
    under_way.extend(SimpleNamespace(mark=mark) for _ in range(3))
    upload(HostDevice(), [np.arange(5.0)])
    assert len(under_way) == 1


# --- What all of them promise ---

VOLUME = uniform((6, 30, 75), 8)
INSIDE = blobs(VOLUME.shape, 9, 0.6)
CALLS = {
    "label": lambda d: label(d, VOLUME < 0.3)[0],
    "label, plain": lambda d: label(d, VOLUME < 0.3, plain=True)[0],
    "grow": lambda d: grow(d, VOLUME < 0.02, VOLUME < 0.6, 5),
    "grow, stable": lambda d: grow(d, VOLUME < 0.02, VOLUME < 0.6, 0, 26),
    "remove_edges": lambda d: np.stack(edges(d, VOLUME, INSIDE, threshold=0.6)),
    "uniform_filter": lambda d: mean(d, VOLUME, (3, 4, 9)),
    "fill_uniform": lambda d: noise(d, VOLUME.shape, (1, 2, 0, 0)),
    "gaussian_filter": lambda d: gauss(d, VOLUME, (1.0, 9.0, 2.0)),
}
WAITS = {"label": 1, "label, plain": 1, "remove_edges": 2}


@pytest.mark.parametrize("call", CALLS)
def test_neither_grid_nor_order_of_threads_shows(call, monkeypatch):
    """From one block for everything to more blocks than tasks; launches wait only where they must."""
    device = HostDevice(processors=100)
    expected = CALLS[call](device)
    assert device.downloads == WAITS.get(call, 0)
    for order, processors, seed in (("reverse", 2, 1), ("random", 3, 2), ("random", 1, 3)):
        monkeypatch.setattr("lesionsynth.cuda.grid.BLOCKS", processors)
        np.testing.assert_array_equal(CALLS[call](host(order, processors, seed)), expected)


@pytest.mark.parametrize("call", CALLS)
def test_inputs_are_never_written(call):
    before = VOLUME.copy(), INSIDE.copy()
    CALLS[call](host())
    np.testing.assert_array_equal(VOLUME, before[0])
    np.testing.assert_array_equal(INSIDE, before[1])


@pytest.mark.parametrize("skip", [1, 2, 4, 8])
def test_volumes_may_begin_anywhere(skip):
    """Wide accesses need aligned addresses; a part of a larger volume has others."""
    block = np.zeros(VOLUME.size + 128, dtype=np.uint8)
    start = -block.ctypes.data % 64 + skip
    mask = block[start : start + VOLUME.size].reshape(6, 25, 90)
    mask[...] = (VOLUME < 0.3).reshape(mask.shape)
    assert_labels_are_scipys(host(), mask, 26)
    floats = np.zeros(mask.size + 32, dtype=np.float32)
    start = -floats.ctypes.data % 64 // 4 + skip
    image = floats[start : start + mask.size].reshape(mask.shape)
    image[...] = VOLUME.reshape(mask.shape)
    healthy, kept = edges(host(), image, mask)
    expected = remove_edges(image, mask != 0, np.float32(1 / 3), 0.5, 2, 26)
    np.testing.assert_array_equal(kept, expected[1])
    np.testing.assert_array_equal(healthy, expected[0])
