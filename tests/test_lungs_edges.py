"""Removal of erroneous edges against SciPy's erosion and labels, voxel by voxel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

import lesionsynth as ls
from lesionsynth.cpu import shell
from lesionsynth.cpu.engine.bits import pack, unpack

RANK = {6: 1, 18: 2, 26: 3}


def shell_of(mask, width):
    """Mask minus `width` erosions with a 3 x 3 square, slice by slice."""
    if width == 0:
        return np.zeros_like(mask)
    return mask & ~np.stack([ndimage.binary_erosion(s, np.ones((3, 3)), width) for s in mask])


def expected_edges(image, mask, threshold, contact_fraction, shell_width, connectivity):
    shell = shell_of(mask, shell_width)
    labels, count = ndimage.label(
        (image >= threshold) & mask, ndimage.generate_binary_structure(3, RANK[connectivity])
    )
    edges = np.zeros_like(mask)
    for k in range(1, count + 1):
        if shell[labels == k].sum() > contact_fraction * (labels == k).sum():
            edges |= labels == k
    return edges


def blobs(shape, seed, share):
    """A lumpy mask that reaches some faces of the volume."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 1.0)
    return noise >= np.quantile(noise, 1 - share)


shapes = st.tuples(st.integers(1, 6), st.integers(1, 14), st.integers(1, 14))


@given(shape=shapes, seed=st.integers(0, 2**16), share=st.floats(0.05, 1), width=st.integers(0, 9))
def test_shell_is_what_erosion_takes_away(shape, seed, share, width):
    mask = blobs(shape, seed, share)
    np.testing.assert_array_equal(unpack(shell.shell_of(pack(mask), width)), shell_of(mask, width))


@pytest.mark.parametrize("width", range(1, 7))
def test_shell_around_a_pinhole_is_a_square(width):
    """Every diagonal counts: a hole in the middle, one in a corner, one of them on its own slice."""
    mask = np.ones((2, 25, 27), dtype=bool)
    mask[0, 12, 13] = mask[1, 0, 26] = mask[1, 20, 5] = False
    np.testing.assert_array_equal(unpack(shell.shell_of(pack(mask), width)), shell_of(mask, width))


@given(
    shape=shapes,
    seed=st.integers(0, 2**16),
    share=st.floats(0.05, 1),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
    contact_fraction=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    shell_width=st.integers(0, 4),
    connectivity=st.sampled_from([6, 18, 26]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_equals_the_oracle(shape, seed, share, dtype, threshold, **options):
    mask = blobs(shape, seed, share)
    image = np.random.default_rng(seed + 1).random(shape).astype(dtype)
    image_before, mask_before = image.copy(), mask.copy()
    healthy, kept = ls.remove_erroneous_edges(image, mask, threshold=threshold, **options)
    edges = expected_edges(image, mask, dtype(threshold), *options.values())
    np.testing.assert_array_equal(kept, mask & ~edges)
    np.testing.assert_array_equal(healthy, image * kept)
    assert healthy.dtype == dtype
    assert kept.dtype == bool
    np.testing.assert_array_equal(image, image_before)
    np.testing.assert_array_equal(mask, mask_before)


def rim_and_vessel():
    """A lung with a bright rim at its left side and a vessel from its right side inwards."""
    mask = np.zeros((3, 24, 24), dtype=bool)
    mask[:, 2:22, 2:22] = True
    image = np.full(mask.shape, 0.1, dtype=np.float32)
    image[:, 4:20, 2:4] = 0.9  # all within two voxels of the outside
    image[:, 10:12, 10:22] = 0.7  # 2 of its 12 columns are
    return image, mask


def test_rim_goes_and_vessel_stays():
    image, mask = rim_and_vessel()
    healthy, kept = ls.remove_erroneous_edges(image, mask)
    expected = mask.copy()
    expected[:, 4:20, 2:4] = False
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(healthy, np.where(expected, image, 0))


def test_more_than_the_fraction_is_needed():
    """A component half in the shell stays at 0.5; one voxel more and it goes."""
    mask = np.zeros((1, 12, 30), dtype=bool)
    mask[0, 1:11, 1:29] = True
    image = np.zeros(mask.shape, dtype=np.float32)
    image[0, 6, 1:5] = 1.0  # columns 1, 2 in the shell, 3, 4 not
    assert ls.remove_erroneous_edges(image, mask)[1].sum() == mask.sum()
    image[0, 6, 4] = 0.0
    assert ls.remove_erroneous_edges(image, mask)[1].sum() == mask.sum() - 3


def test_threshold_is_compared_in_the_dtype_of_the_image():
    """0.7 exceeds float32(0.7), yet a float32 image of 0.7 reaches a threshold of 0.7, as in the target."""
    mask = np.ones((1, 3, 3), dtype=bool)
    image = np.zeros(mask.shape, dtype=np.float32)
    image[0, 0, 0] = 0.7
    _, kept = ls.remove_erroneous_edges(image, mask, threshold=0.7)
    assert np.flatnonzero(~kept).tolist() == [0]


def test_voxels_outside_the_mask_may_be_anything():
    image, mask = rim_and_vessel()
    image[~mask] = np.nan
    healthy, kept = ls.remove_erroneous_edges(image, mask)
    assert (healthy[~kept] == 0).all()


def test_strides_and_numbers_do_not_matter():
    image, mask = rim_and_vessel()
    expected = ls.remove_erroneous_edges(image, mask)
    turned = [np.ascontiguousarray(a.transpose(2, 0, 1)[::-1]) for a in (image, mask)]
    views = [a[::-1].transpose(1, 2, 0) for a in turned]
    assert not views[0].flags.c_contiguous
    for kind in (bool, np.uint8, np.float32):
        healthy, kept = ls.remove_erroneous_edges(views[0], views[1].astype(kind))
        np.testing.assert_array_equal(healthy, expected[0])
        np.testing.assert_array_equal(kept, expected[1])


def test_torch_in_torch_out():
    image, mask = rim_and_vessel()
    expected = ls.remove_erroneous_edges(image, mask)
    healthy, kept = ls.remove_erroneous_edges(torch.from_numpy(image), torch.from_numpy(mask))
    assert isinstance(healthy, torch.Tensor)
    assert healthy.dtype == torch.float32
    assert kept.dtype == torch.bool
    np.testing.assert_array_equal(healthy.numpy(), expected[0])
    np.testing.assert_array_equal(kept.numpy(), expected[1])


def test_read_only_arrays_will_do():
    image, mask = rim_and_vessel()
    for array in (image, mask):
        array.setflags(write=False)
    _, kept = ls.remove_erroneous_edges(image, mask)
    assert kept.flags.writeable
    assert not np.shares_memory(kept, mask)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"threshold": 1.5}, ValueError, r"threshold .*\[0, 1\].* 1.5"),
        ({"threshold": float("nan")}, ValueError, "threshold"),
        ({"contact_fraction": -0.1}, ValueError, r"contact_fraction .* -0.1"),
        ({"shell_width": -1}, ValueError, "shell_width .* -1"),
        ({"shell_width": 1.5}, ValueError, "shell_width .* 1.5"),
        ({"connectivity": 8}, ValueError, "connectivity .* 8"),
        ({"image": [[[0.1]]]}, TypeError, "image"),
        ({"image": np.zeros((3, 24), np.float32)}, ValueError, "image"),
        ({"image": np.zeros((3, 24, 23), np.float32)}, ValueError, "lung_mask .* shape"),
        ({"image": np.zeros((3, 24, 24), np.int16)}, TypeError, "image .* int16"),
        ({"image": np.full((3, 24, 24), -700, np.float32)}, ValueError, r"image .*\[0, 1\].* -700"),
        ({"image": np.full((3, 24, 24), np.nan, np.float32)}, ValueError, "image .* nan"),
        ({"lung_mask": np.zeros((3, 24, 24), bool)}, ValueError, "lung_mask"),
        ({"lung_mask": np.full((3, 24, 24), 2, np.uint8)}, ValueError, "lung_mask .* 2"),
        ({"lung_mask": np.full((3, 24, 24), np.nan)}, ValueError, "lung_mask .* nan"),
        ({"lung_mask": torch.ones((3, 24, 24))}, TypeError, "one library"),
    ],
)
def test_bad_input_is_named(change, error, message):
    image, mask = rim_and_vessel()
    with pytest.raises(error, match=message):
        ls.remove_erroneous_edges(**({"image": image, "lung_mask": mask} | change))


@pytest.mark.parametrize("x", [0, 15, 16, 40, 63, 64, 100, 149])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_strange_voxels_count_inside_the_mask_only(x, dtype):
    """Rows of two words and a rest, wherever in a word the voxel lies."""
    image, mask = np.full((2, 5, 150), 0.2, dtype), np.ones((2, 5, 150), bool)
    image[1, 2, x] = np.nan
    with pytest.raises(ValueError, match="image must lie in"):
        ls.remove_erroneous_edges(image, mask)
    mask[1, 2, x] = False
    clean, _ = ls.remove_erroneous_edges(image, mask)
    assert clean[1, 2, x] == 0
    assert np.isfinite(clean).all()
