"""What the generator reads: float16, float32, float64, Hounsfield units, any strides, any shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lesionsynth as ls
from tests import oracles
from tests.plans import blob, plan, renderer, small_config

CONFIG = small_config()


def render(image, mask, index=2):
    return ls.LesionSynthesizer(CONFIG, seed=4)(image, mask, index=index)


def same(a, b):
    for name in ("image", "target", "labels"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.plan == b.plan


def hounsfield(lungs):
    """Integers whose window is the image, and some beyond the window."""
    image, mask = lungs
    hu = np.round(image * 900 - 800).astype(np.int16)
    hu[0], hu[-1] = -1024, 3071
    return hu, mask


def test_hounsfield_units_are_windowed_on_the_way(lungs):
    hu, mask = hounsfield(lungs)
    pair, windowed = render(hu, mask), render(ls.window_hu(hu), mask)
    assert pair.image.dtype == np.float32
    assert (pair.labels > 0).any()
    same(pair, windowed)


def test_hounsfield_units_follow_the_configured_window(lungs):
    hu, mask = hounsfield(lungs)
    synth = ls.LesionSynthesizer(replace(CONFIG, hu_range=(-1000.0, 400.0)), seed=4)
    same(
        synth(hu, mask, index=1), synth(ls.window_hu(hu, (-1000.0, 400.0)), mask, index=1)
    )  # and the threshold moves with it


def test_half_precision_is_the_float32_pair_rounded(lungs):
    """A is the maximum of H, which float16 holds exactly, and of B rounded: rounding keeps the order."""
    image, mask = lungs
    half = image.astype(np.float16)
    pair, whole = render(half, mask), render(half.astype(np.float32), mask)
    assert pair.image.dtype == np.float16
    np.testing.assert_array_equal(pair.image, whole.image.astype(np.float16))
    np.testing.assert_array_equal(pair.labels, whole.labels)
    # τ is compared in the dtype of the image, as NumPy would
    np.testing.assert_array_equal(pair.target, (half >= np.float16(1 / 3)) & (pair.labels == 0))


def test_every_half_float_rounds_as_numpy_rounds():
    """One lesion over a volume of zeros, in both precisions: about 10^4 values of B and all its roundings."""
    image, mask = np.zeros((8, 48, 48), np.float32), np.ones((8, 48, 48), bool)
    big = plan(blob(semi_axes=(20.0, 20.0, 20.0), center=(4, 24, 24), mu0=0.7), shape=None)
    single = renderer().render(big, image, mask)
    half = renderer().render(big, image.astype(np.float16), mask)
    assert len(np.unique(single.image)) > 5000
    np.testing.assert_array_equal(half.image, single.image.astype(np.float16))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.25, 1.001])
def test_half_precision_outside_the_unit_interval_is_refused(lungs, value):
    image, mask = lungs
    bad = image.astype(np.float16)
    bad[3, 4, 5] = value
    with pytest.raises(ValueError, match=r"image must be (finite|in \[0, 1\])"):
        render(bad, mask)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_negative_zero_is_zero(lungs, dtype):
    image, mask = lungs
    signed = np.where(image == 0, dtype(-0.0), image.astype(dtype))
    pair, plain = render(signed, mask), render(image.astype(dtype), mask)
    np.testing.assert_array_equal(pair.target, plain.target)
    np.testing.assert_array_equal(pair.image, plain.image)


def views(array):
    """Equal arrays in other memory layouts; none is C-contiguous."""
    z, y, x = array.shape
    wide = np.zeros((z, y, 2 * x), array.dtype)
    wide[:, :, ::2] = array
    padded = np.ones((z + 2, y + 3, x + 5), array.dtype)
    padded[1:-1, 1:-2, 3:-2] = array
    return {
        "fortran": np.asfortranarray(array),
        "y fastest": np.ascontiguousarray(array.transpose(0, 2, 1)).transpose(0, 2, 1),
        "every other voxel": wide[:, :, ::2],
        "crop": padded[1:-1, 1:-2, 3:-2],
        "backwards": np.ascontiguousarray(array[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
    }


@pytest.mark.parametrize("layout", ["fortran", "y fastest", "every other voxel", "crop", "backwards"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int16])
def test_memory_layout_changes_nothing(lungs, layout, dtype):
    image, mask = hounsfield(lungs) if dtype == np.int16 else (lungs[0].astype(dtype), lungs[1])
    view, mask_view = views(image)[layout], views(mask)[layout]
    assert not view.flags.c_contiguous
    before = view.copy()
    same(render(view, mask_view), render(image, mask))
    np.testing.assert_array_equal(view, before)


def test_rows_that_are_no_multiple_of_a_vector_are_aligned_nowhere(lungs):
    """Outputs beyond 8 MiB are written past the caches, 64 bytes at a time; these rows are not."""
    rng = np.random.default_rng(0)
    image, mask = rng.random((4, 700, 777), dtype=np.float32), np.ones((4, 700, 777), bool)
    pair = renderer().render(plan(blob(center=(1, 2, 3)), shape=None), image, mask)
    outside = pair.labels == 0
    np.testing.assert_array_equal(pair.image[outside], image[outside])
    np.testing.assert_array_equal(pair.target[outside], (image >= np.float32(1 / 3))[outside])


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 70)),
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.2, 1.0]),
)
def test_any_shape_from_one_voxel_up(shape, seed, share):
    """Rows shorter and longer than a vector of 16 and a word of 64, against the oracle."""
    rng = np.random.default_rng(seed)
    image = rng.random(shape, dtype=np.float32)
    mask = rng.random(shape) < share
    mask.flat[0] = True
    synth = ls.LesionSynthesizer(CONFIG, seed=seed)
    drawn = synth.sample(index=0, shape=shape)
    pair, expected = synth.render(drawn, image, mask), oracles.oracle_render(drawn, image, mask)
    np.testing.assert_array_equal(pair.labels, expected.labels)
    np.testing.assert_array_equal(pair.target, expected.target)
    assert (pair.image >= expected.image_low).all()
    assert (pair.image <= expected.image_high).all()


def test_more_blobs_than_bits_in_a_word():
    """Merging knows no limit of 32 or 64 blobs."""
    rng = np.random.default_rng(5)
    image, mask = rng.random((10, 60, 70), dtype=np.float32), rng.random((10, 60, 70)) < 0.9
    many = ls.BlobClass(count=(150, 150), radius=(1.0, 3.0), scale_by_lung=False)
    synth = ls.LesionSynthesizer(replace(CONFIG, small=many, medium=None, large=None), seed=1)
    drawn = synth.sample(index=0, shape=image.shape)
    pair, expected = synth.render(drawn, image, mask), oracles.oracle_render(drawn, image, mask)
    assert len(drawn.blobs) == 150
    np.testing.assert_array_equal(pair.labels, expected.labels)
    assert [c.blobs for c in pair.plan.components] == [tuple(g) for g in expected.groups]
    assert (pair.image >= expected.image_low).all()
    assert (pair.image <= expected.image_high).all()


@pytest.mark.parametrize(
    ("dtype", "at", "below"),
    [
        (np.float32, np.float32(1 / 3), np.nextafter(np.float32(1 / 3), np.float32(0))),
        (np.float64, 1 / 3, np.nextafter(1 / 3, 0)),
        (np.float16, np.float16(1 / 3), np.nextafter(np.float16(1 / 3), np.float16(0))),
        (np.int16, -500, -501),
    ],
)
def test_a_voxel_on_the_threshold_is_tissue(dtype, at, below):
    """GT = (H >= τ) & ~G, on both sides of a vector's end."""
    image = np.full((2, 5, 37), below, dtype)
    image[:, ::2] = at
    pair = renderer().render(
        plan(blob(center=(0, 0, 0), semi_axes=(0.5,) * 3), shape=None), image, image == at
    )
    expected = image == at
    expected[0, 0, 0] = False
    np.testing.assert_array_equal(pair.target, expected)
