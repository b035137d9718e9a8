"""Filters, labels and growth against SciPy: any small shape, strides, dtype and library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from lesionsynth import ops
from lesionsynth.cpu import filters, label
from lesionsynth.cpu.engine.lines import gaussian_taps

RANK = {6: 1, 18: 2, 26: 3}
CONNECTIVITIES = sorted(RANK)

GAUSSIAN = 1e-6
"""float32 against float64 for values in [0, 1]: an ulp is 6e-8, over three passes and rounded
taps. Measured 7e-7 at worst over 1500 random boxes, on constant ones."""

BOX = 2.0**-25 + 1e-14
"""Half an ulp of a float32 mean just below 1: sums are float64, so only the last rounding shows; and what
SciPy's own running sums pile up."""

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**16)
sigmas = st.one_of(st.just(0.0), st.floats(0.8, 20))
sizes = st.tuples(*[st.integers(1, 24)] * 3)


def uniform(shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def structure(connectivity):
    return ndimage.generate_binary_structure(3, RANK[connectivity])


# --- Gaussian ---


@given(shape=shapes, seed=seeds, sigma=st.tuples(sigmas, sigmas, sigmas))
def test_gaussian_is_scipys_on_boxes_from_one_voxel_thick(shape, seed, sigma):
    volume = uniform(shape, seed)
    expected = ndimage.gaussian_filter(volume.astype(np.float64), sigma, mode="reflect")
    np.testing.assert_allclose(ops.gaussian_filter(volume, sigma), expected, rtol=0, atol=GAUSSIAN)


@pytest.mark.parametrize("sigma", [0.8, 2.0, 5.0, 11.0, 20.0])
@pytest.mark.parametrize("shape", [(1, 61, 47), (24, 1, 600), (40, 33, 1), (20, 70, 66)])
def test_gaussian_is_scipys_on_larger_boxes(sigma, shape):
    """Rows longer than the block of 512 that one inner loop handles, and every axis one voxel thick."""
    volume = uniform(shape, 1)
    expected = ndimage.gaussian_filter(volume.astype(np.float64), sigma, mode="reflect")
    np.testing.assert_allclose(ops.gaussian_filter(volume, sigma), expected, rtol=0, atol=GAUSSIAN)


@given(shape=shapes, seed=seeds, sigma=st.floats(0.2, 6), truncate=st.floats(0.1, 6))
def test_truncate_is_scipys(shape, seed, sigma, truncate):
    volume = uniform(shape, seed)
    expected = ndimage.gaussian_filter(volume.astype(np.float64), sigma, truncate=truncate, mode="reflect")
    result = ops.gaussian_filter(volume, sigma, truncate=truncate)
    np.testing.assert_allclose(result, expected, rtol=0, atol=GAUSSIAN)


def test_impulse_gives_the_taps():
    """A point far from every edge spreads into products of the taps, which are SciPy's rounded once."""
    volume = np.zeros((21, 21, 21), dtype=np.float32)
    volume[10, 10, 10] = 1.0
    taps = gaussian_taps(2.0).astype(np.float32)
    row = np.concatenate([taps[:0:-1], taps]).astype(np.float64)
    expected = np.zeros((21, 21, 21))
    expected[2:19, 2:19, 2:19] = row[:, None, None] * row[:, None] * row
    result = ops.gaussian_filter(volume, 2.0)
    # two products, each rounded: 2 * 2 ** -24
    np.testing.assert_allclose(result, expected, rtol=2.0**-23, atol=0)
    spread = ndimage.gaussian_filter1d(np.eye(1, 21, 10)[0], 2.0)[10:19]
    np.testing.assert_array_equal(taps, spread.astype(np.float32))


@given(shape=shapes, seed=seeds, sigma=st.floats(0.8, 6))
def test_gaussian_commutes_with_reversal(shape, seed, sigma):
    """Mirrored input, mirrored output, to the bit: what is summed is even and odd parts."""
    volume = uniform(shape, seed)
    flipped = ops.gaussian_filter(volume[::-1, ::-1, ::-1], sigma)
    np.testing.assert_array_equal(flipped[::-1, ::-1, ::-1], ops.gaussian_filter(volume, sigma))


# --- Mean over a box ---


@given(shape=shapes, seed=seeds, size=sizes)
def test_uniform_is_scipys_for_odd_even_and_oversize_boxes(shape, seed, size):
    volume = uniform(shape, seed)
    expected = ndimage.uniform_filter(volume.astype(np.float64), size, mode="reflect")
    result = ops.uniform_filter(volume, size)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=0, atol=BOX)


@pytest.mark.parametrize("size", [2, 7, 9, (1, 40, 3)])
def test_uniform_of_a_mask_is_the_nearest_float_to_the_count(size):
    """Thresholds of post-processing meet exact fractions: 146 of 729 voxels are above 0.2, 145 below."""
    mask = uniform((37, 70, 41), 3) < 0.2
    box = np.broadcast_to(size, 3)
    integers = mask.astype(np.int64)
    for axis, n in enumerate(box):
        pad = [(0, 0)] * 3
        pad[axis] = (n // 2, n - n // 2 - 1)
        padded = np.pad(integers, pad, mode="symmetric")
        integers = np.lib.stride_tricks.sliding_window_view(padded, n, axis=axis).sum(axis=-1)
    expected = (integers / np.prod(box)).astype(np.float32)
    for dtype in (bool, np.uint8, np.float32):
        np.testing.assert_array_equal(ops.uniform_filter(mask.astype(dtype), size), expected)


def test_running_sums_do_not_drift():
    """After 20000 voxels of tenths a sum is still right in the last bit, and zeros after them are zeros."""
    volume = np.zeros((1, 1, 20010), dtype=np.float32)
    volume[..., :20000] = uniform((1, 1, 20000), 4) * np.float32(0.1)
    result = ops.uniform_filter(volume, 5)
    direct = ndimage.convolve1d(volume[0, 0].astype(np.float64), np.full(5, 0.2), mode="reflect")
    # one float32 rounding of values below 0.1 is 2 ** -28; what the sums piled up is 2e4 * 1e-17 at most
    np.testing.assert_allclose(result[0, 0], direct, rtol=0, atol=2.0**-28 + 1e-12)
    assert abs(result[0, 0, -5:]).max() < 1e-12


def test_size_is_three_where_omitted():
    volume = uniform((4, 5, 6))
    np.testing.assert_array_equal(ops.uniform_filter(volume), ops.uniform_filter(volume, (3, 3, 3)))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_filters_do_not_depend_on_threads(threads):
    volume = uniform((11, 75, 40), 5)
    one = filters.gaussian_filter(volume, (3.0, 2.0, 1.0), threads=1), filters.uniform_filter(volume, 9, 1)
    many = (
        filters.gaussian_filter(volume, (3.0, 2.0, 1.0), threads=threads),
        filters.uniform_filter(volume, 9, threads),
    )
    for a, b in zip(one, many, strict=True):
        np.testing.assert_array_equal(a, b)


# --- Labels ---


def assert_labels_are_scipys(volume):
    for connectivity in CONNECTIVITIES:
        expected, count = ndimage.label(volume, structure(connectivity))
        labels, n = ops.label(volume, connectivity=connectivity)
        assert labels.dtype == np.int32
        assert n == count
        np.testing.assert_array_equal(labels, expected)


@given(shape=shapes, seed=seeds, share=st.sampled_from([0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8]))
def test_labels_are_scipys(shape, seed, share):
    assert_labels_are_scipys(uniform(shape, seed) < share)


OFFSETS = [(z, y, x) for z in (-1, 0, 1) for y in (-1, 0, 1) for x in (-2, -1, 0, 1, 2)]


@pytest.mark.parametrize("connectivity", CONNECTIVITIES)
def test_neighbours_are_those_of_the_definition(connectivity):
    """Two voxels are one component, and one grows onto the other, by the number of axes they differ in."""
    for offset in OFFSETS:
        one, other = np.zeros((3, 3, 5), dtype=bool), np.zeros((3, 3, 5), dtype=bool)
        one[1, 1, 2] = True
        other[tuple(np.add((1, 1, 2), offset))] = True
        near = max(map(abs, offset)) <= 1 and sum(map(abs, offset)) <= RANK[connectivity]
        assert ops.label(one | other, connectivity=connectivity)[1] == (1 if near else 2), offset
        grown = ops.grow(one, other, connectivity=connectivity)
        np.testing.assert_array_equal(grown, one | other if near else one)


def checkerboard(shape=(6, 7, 8)):
    return np.indices(shape).sum(axis=0) % 2 == 0


def spiral(n=31):
    """A single wall of width one winding inwards: long chains of provisional labels."""
    walls = np.zeros((n, n), dtype=bool)
    y, x, (dy, dx) = 0, 0, (0, 1)
    walls[0, 0] = True
    for length in [n - 1, *(k for m in range(n - 1, 1, -2) for k in (m, m)), 1]:
        for _ in range(length):
            if not (0 <= y + dy < n and 0 <= x + dx < n):
                break
            y, x = y + dy, x + dx
            walls[y, x] = True
        dy, dx = dx, -dy
    return walls


def worst_cases():
    comb = np.zeros((2, 20, 41), dtype=bool)
    comb[:, :, ::2] = True
    comb[1, -1, :] = True  # teeth joined by the very last row
    rings = np.max(np.abs(np.indices((13, 13, 13)) - 6), axis=0) % 2 == 0
    single = np.zeros((3, 4, 5), dtype=bool)
    single[1, 2, 3] = True
    flat = spiral()
    return {
        "empty": np.zeros((3, 4, 5), dtype=bool),
        "full": np.ones((3, 4, 5), dtype=bool),
        "single": single,
        "voxel": np.ones((1, 1, 1), dtype=bool),
        "checkerboard": checkerboard(),
        "comb": comb,
        "comb upside down": comb[::-1, ::-1, ::-1],
        "nested boxes": rings,
        "spiral in y, x": flat[None],
        "spiral in z, x": flat[:, None, ::-1],
        "spiral in z, y": flat[::-1, :, None],
    }


@pytest.mark.parametrize("name", worst_cases())
def test_labels_are_scipys_in_the_worst_cases(name):
    assert_labels_are_scipys(worst_cases()[name])


def test_checkerboard_falls_apart_or_holds():
    """Independent of SciPy: no faces touch, all edges do."""
    board = checkerboard()
    assert ops.label(board)[1] == board.sum()
    assert ops.label(board, connectivity=18)[1] == 1


def test_spiral_is_one_component():
    walls = spiral()
    assert 0.3 < walls.mean() < 0.6
    assert ops.label(walls[None])[1] == 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_labels_do_not_depend_on_threads(threads):
    mask = uniform((9, 17, 23), 6) < 0.3
    labels, _ = label.label(mask, 26, threads)
    np.testing.assert_array_equal(labels, ndimage.label(mask, structure(26))[0])


@pytest.mark.parametrize("connectivity", CONNECTIVITIES)
def test_structure_means_connectivity(connectivity):
    mask = uniform((6, 7, 8), 7) < 0.3
    a, n = ops.label(mask, structure(connectivity))
    b, m = ops.label(mask, connectivity=connectivity)
    assert n == m
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(ops.label(mask)[0], ndimage.label(mask)[0])


def test_any_number_but_zero_is_foreground():
    volume = np.where(uniform((5, 6, 7), 8) < 0.4, -0.25, 0.0)
    assert_labels_are_scipys(volume)


# --- Growth ---


@given(
    shape=shapes,
    seed=seeds,
    share=st.floats(0, 0.3),
    room=st.floats(0, 1),
    iterations=st.integers(-1, 6),
    connectivity=st.sampled_from(CONNECTIVITIES),
)
def test_growth_is_scipys_dilation_inside_a_mask(shape, seed, share, room, iterations, connectivity):
    region, mask = uniform(shape, seed) < share, uniform(shape, seed + 1) < room
    expected = ndimage.binary_dilation(region, structure(connectivity), iterations, mask=mask)
    result = ops.grow(region, mask, iterations=iterations, connectivity=connectivity)
    assert result.dtype == bool
    np.testing.assert_array_equal(result, expected)


def test_growth_follows_a_corridor_step_by_step():
    corridor = spiral()[None]
    seed = np.zeros_like(corridor)
    seed[0, 0, 0] = True
    for steps in (1, 5, 40):
        grown = ops.grow(seed, corridor, iterations=steps)
        assert grown.sum() == steps + 1
        assert not (grown & ~corridor).any()
    np.testing.assert_array_equal(ops.grow(seed, corridor, iterations=0), corridor)


def test_growth_takes_one_step_and_faces_by_default():
    seed = np.zeros((5, 5, 5), dtype=bool)
    seed[2, 2, 2] = True
    np.testing.assert_array_equal(ops.grow(seed, np.ones_like(seed)), ndimage.binary_dilation(seed))


def test_region_outside_the_mask_stays_and_spreads_into_it():
    seed, mask = np.zeros((1, 1, 5), dtype=bool), np.zeros((1, 1, 5), dtype=bool)
    seed[0, 0, 1] = True
    mask[0, 0, 2:] = True
    assert ops.grow(seed, mask, iterations=0).ravel().tolist() == [False, True, True, True, True]


# --- What all of them promise ---

CALLS = {
    "gaussian_filter": lambda v: ops.gaussian_filter(v, 1.5),
    "uniform_filter": lambda v: ops.uniform_filter(v, 4),
    "label": lambda v: ops.label(v > 0.5)[0],
    "grow": lambda v: ops.grow(v > 0.9, v > 0.3, iterations=2),
}

NOTHING = {
    "gaussian_filter with sigma 0": lambda v: ops.gaussian_filter(v, 0),
    "uniform_filter with size 1": lambda v: ops.uniform_filter(v, 1),
}


@pytest.mark.parametrize("call", [*CALLS.values(), *NOTHING.values()], ids=[*CALLS, *NOTHING])
def test_inputs_are_never_written_nor_shared(call):
    volume = uniform((6, 7, 8), 9)
    volume.setflags(write=False)
    before = volume.copy()
    result = call(volume)
    result[...] = 1
    np.testing.assert_array_equal(volume, before)


def test_masks_are_never_written():
    seed, mask = uniform((6, 7, 8), 10) > 0.9, np.ones((6, 7, 8), dtype=bool)
    before = seed.copy(), mask.copy()
    result = ops.grow(seed, mask, iterations=0)
    assert result.sum() > seed.sum()
    result[...] = False
    ops.label(mask)[0][...] = 0
    np.testing.assert_array_equal(seed, before[0])
    np.testing.assert_array_equal(mask, before[1])


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_strides_do_not_matter(call):
    base = uniform((16, 7, 12), 11)
    for view in (base[::2], base[::-1, :, ::-3], base.transpose(2, 0, 1), np.asfortranarray(base)):
        np.testing.assert_array_equal(call(view), call(view.copy(order="C")))


@pytest.mark.parametrize("call", [*CALLS.values(), *NOTHING.values()], ids=[*CALLS, *NOTHING])
def test_torch_in_torch_out(call):
    volume = uniform((6, 7, 8), 12)
    tensor = torch.from_numpy(volume.copy())
    result = call(tensor)
    assert isinstance(result, torch.Tensor)
    np.testing.assert_array_equal(result.numpy(), call(volume))
    np.testing.assert_array_equal(tensor.numpy(), volume)
    turned = tensor.permute(2, 0, 1)
    np.testing.assert_array_equal(call(turned).numpy(), call(volume.transpose(2, 0, 1)))


def test_tensors_are_read_where_they_lie(monkeypatch):
    """No copy on the way in: the filter is handed the tensor's own memory."""
    seen = []
    original = filters.uniform_filter
    monkeypatch.setattr(filters, "uniform_filter", lambda v, *rest: (seen.append(v), original(v, *rest))[1])
    tensor = torch.rand(4, 5, 6)
    ops.uniform_filter(tensor, 3)
    assert seen[0].__array_interface__["data"][0] == tensor.data_ptr()


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.float16, np.float64, ">f4"])
def test_other_dtypes_are_read_as_numbers(dtype):
    volume = (uniform((5, 6, 7), 13) * 2).astype(dtype)
    single = volume.astype(np.float32)
    for call in CALLS.values():
        if dtype is bool and call is CALLS["label"]:
            continue  # v > 0.5 of a bool is the bool
        # float64 volumes may be averaged before they are rounded: one float32 rounding of values below 2
        np.testing.assert_allclose(call(volume), call(single), rtol=0, atol=2.0**-23)


VOLUME = np.zeros((2, 3, 4), dtype=np.float32)
NAN = np.full((2, 3, 4), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.gaussian_filter(VOLUME[0], 1), ValueError, r"input .*\(3, 4\)"),
        (lambda: ops.gaussian_filter(VOLUME[:0], 1), ValueError, r"input .*\(0, 3, 4\)"),
        (lambda: ops.gaussian_filter(VOLUME.tolist(), 1), TypeError, "input .*list"),
        (lambda: ops.gaussian_filter(VOLUME.astype(complex), 1), TypeError, "input .*complex"),
        (lambda: ops.gaussian_filter(VOLUME, -1), ValueError, "sigma .*-1"),
        (lambda: ops.gaussian_filter(VOLUME, np.nan), ValueError, "sigma .*nan"),
        (lambda: ops.gaussian_filter(VOLUME, (1, 2)), ValueError, "sigma"),
        (lambda: ops.gaussian_filter(VOLUME, "wide"), TypeError, "sigma .*wide"),
        (lambda: ops.gaussian_filter(VOLUME, 1, truncate=0), ValueError, "truncate .*0"),
        (lambda: ops.gaussian_filter(VOLUME, 1, mode="wrap"), ValueError, "mode .*wrap"),
        (lambda: ops.uniform_filter(VOLUME, 0), ValueError, "size .*0"),
        (lambda: ops.uniform_filter(VOLUME, 2.5), TypeError, "size .*2.5"),
        (lambda: ops.uniform_filter(VOLUME, (3, 3)), ValueError, "size"),
        (lambda: ops.uniform_filter(NAN), ValueError, "input .*finite"),
        (lambda: ops.uniform_filter(VOLUME, mode="nearest"), ValueError, "mode .*nearest"),
        (lambda: ops.label(VOLUME[0]), ValueError, r"input .*\(3, 4\)"),
        (lambda: ops.label(VOLUME, connectivity=8), ValueError, "connectivity .*8"),
        (lambda: ops.label(VOLUME, np.ones((3, 3))), ValueError, r"structure .*\(3, 3\)"),
        (lambda: ops.label(VOLUME, np.eye(3)[None] + np.zeros((3, 1, 1))), ValueError, "structure"),
        (lambda: ops.label(VOLUME, np.ones((3, 3, 3)), connectivity=6), ValueError, "structure"),
        (lambda: ops.grow(VOLUME, VOLUME[:1]), ValueError, r"mask .*\(1, 3, 4\)"),
        (lambda: ops.grow(VOLUME, VOLUME, iterations=1.5), TypeError, "iterations .*1.5"),
        (lambda: ops.grow(VOLUME, VOLUME, connectivity=4), ValueError, "connectivity .*4"),
        (lambda: ops.grow(VOLUME, torch.zeros(2, 3, 4)), TypeError, "one library"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
