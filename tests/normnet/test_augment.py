"""Variation of healthy slabs: against SciPy, bounds, and what must not change."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

torch = pytest.importorskip("torch")
pytest.importorskip("monai")

import lesionsynth as ls  # noqa: E402
from normnet.augment import AIR, Variation  # noqa: E402
from normnet.config import AugmentConfig, TrainConfig, from_json, to_json  # noqa: E402
from normnet.data import phantom_volumes  # noqa: E402
from tests.normnet.test_data import stream  # noqa: E402

ALL = AugmentConfig(
    rotate=15.0,
    zoom=0.2,
    deflation=0.3,
    dependent=0.25,
    blur=1.0,
    noise=20.0,
    offset=30.0,
    border=2,
    gain=0.05,
)
OFF = AugmentConfig()
WHOLE = (slice(None), slice(None))


def slab(seed=0, shape=(3, 40, 50)):
    """HU smooth enough to be interpolated, vessels of positive HU, and an ellipse of lung."""
    rng = np.random.default_rng(seed)
    hu = ndimage.gaussian_filter(rng.normal(0, 3000, shape), (0, 2, 2)) - 700
    hu[:, 18:21, 10:40] = 40
    y, x = np.meshgrid(np.arange(shape[1]) - 19.5, np.arange(shape[2]) - 24.5, indexing="ij")
    mask = np.broadcast_to((y / 16) ** 2 + (x / 20) ** 2 < 1, shape).copy()
    return hu.clip(-1000, 400).astype(np.int16), mask


def only(**amounts):
    """A variation of set amounts."""
    variation = Variation(OFF, 0, 0)
    for name, amount in amounts.items():
        assert hasattr(variation, name)
        setattr(variation, name, amount)
    return variation


def vary(variation, hu, mask, window=WHOLE):
    """Apply a variation to arrays, which it must leave as they are."""
    before = hu.copy(), mask.copy()
    found = variation.apply(torch.from_numpy(hu), torch.from_numpy(mask), window)
    np.testing.assert_array_equal(hu, before[0])
    np.testing.assert_array_equal(mask, before[1])
    assert [t.dtype for t in found] == [torch.int16, torch.bool]
    return tuple(t.numpy() for t in found)


def changed(hu, mask, **amounts):
    """HU of a slab varied by set amounts."""
    return vary(only(**amounts), hu, mask)[0]


def places(window, angle, zoom):
    """Rows and columns that are read, R(angle) (p - c) / zoom + c for an output p at the centre c."""
    y, x = np.meshgrid(
        *(np.arange(s.stop - s.start) - (s.stop - s.start - 1) / 2 for s in window), indexing="ij"
    )
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    middle = [(s.start + s.stop - 1) / 2 for s in window]
    return cos * y - sin * x + middle[0], sin * y + cos * x + middle[1]


def affine(volume, window, angle, zoom, order):
    """SciPy, slice by slice."""
    at = np.stack(places(window, angle, zoom))
    return np.stack(
        [
            ndimage.map_coordinates(z, at, order=order, mode="grid-constant", cval=0.0)
            for z in volume.astype(np.float64)
        ]
    )


@settings(max_examples=25)
@given(
    seed=st.integers(0, 99),
    angle=st.floats(-0.6, 0.6),
    zoom=st.floats(0.7, 1.4),
    top=st.integers(0, 15),
    left=st.integers(0, 20),
)
def test_moving_equals_scipy(seed, angle, zoom, top, left):
    hu, mask = slab(seed)
    window = (slice(top, top + 24), slice(left, left + 28))
    moved, kept = vary(only(angle=angle, zoom=zoom), hu, mask, window)
    expected = affine(hu.astype(np.float64) - AIR, window, angle, zoom, 1) + AIR
    # rounding to whole HU, and places in float32: 1e-5 voxels at slopes of some 1000 HU a voxel
    assert np.abs(moved - expected).max() <= 0.55
    nearest = affine(mask, window, angle, zoom, 0) > 0.5
    clear = np.ones(kept.shape[1:], bool)
    for place in places(window, angle, zoom):  # one halfway between two voxels may be rounded either way
        clear &= abs(place % 1 - 0.5) > 1e-3
    np.testing.assert_array_equal(kept[:, clear], nearest[:, clear])


def test_no_variation_is_a_crop():
    hu, mask = slab()
    window = (slice(5, 29), slice(8, 40))
    cut, kept = vary(only(), hu, mask, window)
    np.testing.assert_array_equal(cut, hu[:, 5:29, 8:40])
    np.testing.assert_array_equal(kept, mask[:, 5:29, 8:40])
    cut, kept = vary(Variation(OFF, 3, 4), hu, mask, window)
    np.testing.assert_array_equal(cut, hu[:, 5:29, 8:40])
    np.testing.assert_array_equal(kept, mask[:, 5:29, 8:40])


def test_outside_is_air_and_no_lung():
    hu, mask = slab()
    whole = (slice(0, 40), slice(0, 50))
    moved, kept = vary(only(zoom=0.5), hu, np.ones_like(mask), whole)
    assert (moved[:, :8] == AIR).all()
    assert not kept[:, :8].any()
    assert kept[:, 12:28, 14:36].all()


def test_deflation_scales_air_in_the_lungs_alone():
    hu, mask = slab()
    scaled = changed(hu, mask, deflation=0.1, dependent=0.2)
    rows = np.flatnonzero(mask.any(axis=(0, 2)))
    depth = np.clip((np.arange(40) - rows[0]) / (rows[-1] - rows[0]), 0, 1) ** 2
    expected = np.where(mask & (hu < 0), hu * (1 - 0.1 - 0.2 * depth)[None, :, None], hu)
    assert np.abs(scaled - expected).max() <= 0.51  # rounded to whole HU, computed in float32
    assert (scaled[mask & (hu < 0)] >= hu[mask & (hu < 0)]).all()
    np.testing.assert_array_equal(scaled[~mask], hu[~mask])
    np.testing.assert_array_equal(scaled[hu >= 0], hu[hu >= 0])
    # none left where there is no lung
    np.testing.assert_array_equal(changed(hu, np.zeros_like(mask), deflation=0.3), hu)


def test_blur_is_scipys_in_plane():
    hu, mask = slab()
    expected = ndimage.gaussian_filter(hu.astype(np.float64), (0, 0.9, 0.9), truncate=4.0)
    assert np.abs(changed(hu, mask, blur=0.9) - expected).max() <= 0.51  # whole HU


def test_noise_is_drawn_where_torch_works(monkeypatch):
    """Into a tensor, so on torch's stream: CuPy's current one may be another."""
    asked = []
    draw = ls.ops.philox_uniform
    monkeypatch.setattr(ls.ops, "philox_uniform", lambda *a, **k: (asked.append(k), draw(*a, **k))[1])
    changed(np.zeros((2, 8, 8), np.int16), np.ones((2, 8, 8), bool), noise=30.0)
    _, one = asked  # the amounts, and the noise
    assert "device" not in one
    assert isinstance(one["out"], torch.Tensor)


def test_noise_has_its_deviation_and_is_correlated_in_plane():
    flat = np.full((8, 96, 96), -800, np.int16)
    noise = changed(flat, np.ones(flat.shape, bool), noise=25.0) + 800.0
    # 74,000 voxels, some 4 to an independent value: 1 % is three standard errors
    assert noise.std() == pytest.approx(25.0, rel=0.015)
    assert abs(noise.mean()) < 0.6
    along_x = np.corrcoef(noise[..., 1:].ravel(), noise[..., :-1].ravel())[0, 1]
    along_z = np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]
    # a Gaussian filter of 0.7 leaves exp(-1 / (4 * 0.49)) of it at one voxel
    assert along_x == pytest.approx(math.exp(-1 / (4 * 0.49)), abs=0.03)
    assert abs(along_z) < 0.03


@pytest.mark.parametrize("border", [-3, -1, 1, 2])
def test_the_edge_moves_in_plane(border):
    hu, mask = slab()
    square = np.ones((1, 2 * abs(border) + 1, 2 * abs(border) + 1), bool)
    grow = ndimage.binary_dilation if border > 0 else ndimage.binary_erosion
    expected = grow(mask, square) if border > 0 else grow(mask, square, border_value=1)
    np.testing.assert_array_equal(vary(only(border=border), hu, mask)[1], expected)
    assert (expected.sum() > mask.sum()) == (border > 0)


def test_a_lung_too_thin_to_shrink_stays():
    mask = np.zeros((2, 12, 12), bool)
    mask[:, 4:6, 3:9] = True
    hu = np.zeros(mask.shape, np.int16)
    np.testing.assert_array_equal(vary(only(border=-2), hu, mask)[1], mask)


def test_gain_is_contrast_to_air():
    hu, mask = slab()
    expected = (hu + 1000.0) * 1.04 - 1000
    assert np.abs(changed(hu, mask, gain=0.04) - expected).max() <= 0.51  # whole HU


def test_offset_and_range():
    hu, mask = slab()
    np.testing.assert_array_equal(changed(hu, mask, offset=-12.0), np.maximum(hu - 12, AIR))


def test_amounts_are_within_bounds_and_use_them():
    drawn = [Variation(ALL, 3, k) for k in range(400)]
    for name, low, high in (
        ("angle", -math.radians(15), math.radians(15)),
        ("zoom", 1 / 1.2, 1.2),
        ("deflation", 0, 0.3),
        ("dependent", 0, 0.25),
        ("blur", 0, 1.0),
        ("noise", 0, 20.0),
        ("offset", -30.0, 30.0),
        ("gain", -0.05, 0.05),
    ):
        values = np.array([getattr(v, name) for v in drawn])
        assert low <= values.min() < low + 0.05 * (high - low)  # missed with probability 0.95**400 = 1e-9
        assert high - 0.05 * (high - low) < values.max() <= high
    assert {v.border for v in drawn} == {-2, -1, 0, 1, 2}
    # each amount on its own
    amounts = [[v.angle, v.zoom, v.deflation, v.dependent, v.offset, v.gain] for v in drawn]
    assert np.abs(np.corrcoef(amounts, rowvar=False) - np.eye(6)).max() < 0.2  # four standard errors


def test_a_variation_is_a_function_of_seed_and_index():
    hu, mask = slab()
    window = (slice(4, 36), slice(5, 45))
    for index in range(3):
        one, again, next_, other = (
            vary(Variation(ALL, seed, k), hu, mask, window)[0]
            for seed, k in ((1, index), (1, index), (1, index + 1), (2, index))
        )
        np.testing.assert_array_equal(one, again)
        assert (one != next_).any()
        assert (one != other).any()


@pytest.fixture(scope="module")
def volumes():
    return phantom_volumes(1, 0, (16, 96, 120), (4.0, 3.4, 3.4))


def pairs(volumes, augment, crop=48):
    return stream(*volumes, seed=4, batch_size=3, crop=crop, augment=augment, mirror=True)


@pytest.mark.parametrize("crop", [48, None])
def test_pairs_are_those_of_the_varied_slab(volumes, crop):
    varied, plain = pairs(volumes, ALL, crop), pairs(volumes, OFF, crop)
    slabs = varied.slabs(2)
    assert slabs.hu.shape == plain.slabs(2).hu.shape
    assert (slabs.hu != plain.slabs(2).hu).any()
    batch = varied.pairs(slabs)
    image, target, lesions = (np.asarray(t)[:, 0] for t in (batch.image, batch.target, batch.lesions))
    healthy = (ls.window_hu(slabs.hu) * slabs.mask).numpy()
    np.testing.assert_array_equal(image[~lesions], healthy[~lesions])
    np.testing.assert_array_equal(target, (healthy >= np.float32(ls.threshold())) & ~lesions)
    assert (image[lesions] >= healthy[lesions]).all()
    again = pairs(volumes, ALL, crop).batch(2)
    assert torch.equal(again.image, batch.image)


def test_what_varies_is_active():
    assert not OFF.active
    assert all(replace(OFF, **{f.name: 1 if f.name == "border" else 0.1}).active for f in fields(OFF))


def test_lungs_that_would_be_moved_away_stay():
    hu, _ = slab()
    mask = np.zeros(hu.shape, bool)
    mask[1, 10, 12] = True  # the corner of the window: four times larger, it lies outside
    window = (slice(10, 30), slice(12, 40))
    for got, whole in zip(vary(only(zoom=4.0), hu, mask, window), (hu, mask), strict=True):
        np.testing.assert_array_equal(got, whole[:, 10:30, 12:40])
    mask[:, 20, 25] = True  # and what stays in, is moved
    assert (vary(only(zoom=4.0), hu, mask, window)[0] != hu[:, 10:30, 12:40]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotate": -1.0}, r"rotate must be >= 0, got -1.0"),
        ({"deflation": 0.9}, r"deflation must be <= 0.5, got 0.9"),
        ({"noise": float("nan")}, r"noise must be finite, got nan"),
        ({"zoom": float("inf")}, r"zoom must be finite, got inf"),
    ],
)
def test_unfit_settings(change, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**change)


def test_settings_go_to_json_and_back():
    config = TrainConfig(augment=ALL)
    assert from_json(TrainConfig, to_json(config)) == config
