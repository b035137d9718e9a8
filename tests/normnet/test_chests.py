"""Samples of the lung network against plain oracles: where they lie, what may change them, what never may."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

pytest.importorskip("torch")
pytest.importorskip("monai")

import torch

from normnet import chests
from normnet import thick as thick_slices
from normnet.chests import FILLS, Chest, ChestStream, phantom_chests
from normnet.config import AugmentConfig, ChestConfig, ModelConfig, TrainConfig
from normnet.painting import LEFT, RIGHT, Painted
from normnet.prepare.network import ADULT_MM, WINDOW, window

STILL = ChestConfig(diseased=0, tilt=0, stretch=0, bend=0, contrast=0, gas=0, arms=0, cropped=0)
"""Nothing varies but where the sample is cut."""
EVERYTHING: dict[str, Any] = {
    "mirror": True,
    "thick_slices": 0.35,
    "thick_mm": (4.0, 10.0),
    "augment": AugmentConfig(rotate=15, zoom=0.35, blur=1.2, noise=80, offset=40, gain=0.05),
    "chest": ChestConfig(cropped=0.7, arms=0.5, contrast=0.5),
}
SHAPE = (40, 56, 88)
"""Of drawn chests: samples of `SMALL` lie within but for their first or last slices."""
SMALL = {"slab": 16, "crop": 24}
LEVEL = 3e-3
"""float32 in [0, 1], some roundings, in HU, of which there are up to 2200 to a whole below -150."""


def boxes(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Two lungs that no flip maps on one another: boxes, the left one smaller, their ends open in z."""
    lungs = np.zeros(shape, np.uint8)
    _, height, width = shape
    lungs[:, height // 4 : -height // 4, width // 8 : width // 2 - 4] = RIGHT
    lungs[:, height // 3 : -height // 4, width // 2 + 4 : -width // 5] = LEFT
    return lungs


def ramp(axis: int) -> Chest:
    """A chest whose HU tell the place along an axis: -900 HU at its first voxel, 8 HU more at each next."""
    hu = (-900 + 8 * np.indices(SHAPE)[axis]).astype(np.int16)
    return Chest(f"ramp{axis}", hu, boxes(), [(0, SHAPE[0])])


def noisy(low: int = -700, high: int = -100, shape: tuple[int, int, int] = SHAPE) -> Chest:
    """Random HU, none of them one of `FILLS`."""
    hu = np.random.default_rng(0).integers(low, high, shape).astype(np.int16)
    return Chest("noisy", hu, boxes(shape), [(0, shape[0])])


def body(shape: tuple[int, int, int] = (32, 64, 80)) -> Chest:
    """An elliptic body with two lungs, in air; soft tissue of 40 HU."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.where((y / 0.8) ** 2 + (x / 0.7) ** 2 <= 1, 40, -1000)
    lungs = np.zeros(shape, np.uint8)
    for side, centre in ((RIGHT, -0.3), (LEFT, 0.3)):
        lungs[(z / 0.9) ** 2 + (y / 0.6) ** 2 + ((x - centre) / 0.25) ** 2 <= 1] = side
    hu[lungs > 0] = -850
    hu[(lungs > 0) & (abs(y) < 0.15)] = 60  # vessels
    return Chest("body", hu.astype(np.int16), lungs, [(0, shape[0])])


def stream(*chosen: Chest, **settings: Any) -> ChestStream:
    """Samples of chests; of settings, those of a stream are taken out of the configuration's."""
    how = {k: settings.pop(k) for k in ("rank", "processes", "first_index") if k in settings}
    model = ModelConfig(channels=(1, 1), strides=(1,), outputs=2)
    config = {"task": "lungs", "model": model, "batch_size": 2, "chest": STILL, **SMALL, **settings}
    return ChestStream(chosen, TrainConfig(**config), **how)


def hu_of(image: np.ndarray) -> np.ndarray:
    return np.interp(image.astype(float), WINDOW[1], WINDOW[0])


def places(index: int, **settings: Any) -> np.ndarray:
    """Where the voxels of a sample lie in a chest, (3, z, y, x): read from three chests that tell."""
    told = [(hu_of(ramps(axis, **settings).sample(index)[0]) + 900) / 8 for axis in range(3)]
    return np.stack(told)


@functools.cache
def ramps(axis: int, **settings: Any) -> ChestStream:
    return stream(ramp(axis), **settings)


def known(index: int, **settings: Any) -> np.ndarray:
    """Where the voxels of a sample lie within the chest: beyond its ends they are darker, as just there."""
    return np.isclose(_plain(**settings).sample(index)[0], window(np.float32([-400])), atol=1e-5)


@functools.cache
def _plain(**settings: Any) -> ChestStream:
    return stream(noisy(-400, -399), **settings)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Samples are small: threads would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def phantom() -> Chest:
    return phantom_chests(1, 0, (32, 48, 64), (10.0, 7.5, 6.0))[0]


# ---- samples


def test_a_sample_without_variation_is_a_crop():
    """Its place is read from ramps; there SciPy interpolates the chest."""
    grid = np.indices((16, 24, 24), float)
    random, centres = noisy(), set()
    samples = stream(random)
    rows, columns = (np.flatnonzero(boxes().any(axis=axes)) for axes in ((0, 2), (0, 1)))
    for index in range(8):
        at = places(index)
        inside = known(index)
        first = np.array([np.median((at - grid)[axis][inside]) for axis in range(3)])[:, None, None, None]
        assert_allclose(at[:, inside], (grid + first)[:, inside], atol=LEVEL)
        centre = first.ravel() + np.array([7.5, 11.5, 11.5])
        assert 4 <= centre[0] <= 36  # a quarter of the slab lies beyond the chest, at most
        assert abs(centre[1] - (rows[0] + rows[-1]) / 2) <= 12
        assert abs(centre[2] - (columns[0] + columns[-1]) / 2) <= 24
        centres.add(tuple(centre))
        image, lungs, disease = samples.sample(index)
        expected = _interpolated(random.hu, grid + first, -1024)
        # positions are right to 1e-4 voxels in float32, and neighbours differ by up to 600 HU
        assert_allclose(image, window(expected.astype(np.float32)), atol=0.1 / 500)
        right, left = (_interpolated(random.lungs == side, grid + first, 0) for side in (RIGHT, LEFT))
        clear = abs(right + left - 0.5) > 1e-3
        wanted = np.where(right + left > 0.5, np.where(right > left, RIGHT, LEFT), 0)
        assert_array_equal(lungs[clear], wanted[clear])
        assert clear.mean() > 0.9
        assert not disease.any()
        assert (image.dtype, lungs.dtype, disease.dtype) == (np.float32, np.uint8, np.bool_)
    assert len(centres) == 8


def _interpolated(array: np.ndarray, at: np.ndarray, outside: float) -> np.ndarray:
    return ndimage.map_coordinates(array.astype(float), at, order=1, mode="grid-constant", cval=outside)


def test_what_lies_beyond_a_scan_is_air_and_no_lung():
    small = Chest("small", np.full((6, 20, 24), 40, np.int16), boxes((6, 20, 24)), [(0, 6)])
    samples = stream(small)
    shown = 0
    for index in range(8):
        image, lungs, _ = samples.sample(index)
        scanned = image > 0
        runs = [np.flatnonzero(scanned.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
        assert len(runs[0]) in (6, 7)  # at both ends a share of a slice
        assert len(runs[1]) <= 21
        assert scanned[np.ix_(*(run[1:-1] for run in runs))].all()
        assert not lungs[~scanned].any()
        shown += lungs.any()
    assert shown >= 3  # where the sample does not lie beside them


def test_samples_are_functions_of_seed_and_index(phantom):
    one, other = (stream(phantom, noisy(), seed=3, **EVERYTHING) for _ in range(2))
    first = one.sample(5)
    other.sample(6)
    for a, b in zip(first, other.sample(5), strict=True):
        assert_array_equal(a, b)
    assert (one.sample(6)[0] != first[0]).any()
    assert (stream(phantom, noisy(), seed=4, **EVERYTHING).sample(5)[0] != first[0]).any()


def test_batches_are_samples_in_order_whatever_the_processes(phantom):
    settings = {"batch_size": 4, "first_index": 7, **EVERYTHING}
    whole = stream(phantom, **settings)
    batch = whole.batch(2)
    assert batch.image.shape == (4, 1, 16, 24, 24)
    assert batch.target.shape == (4, 2, 16, 24, 24)
    assert batch.lesions.shape == (4, 1, 16, 24, 24)
    assert (batch.target.dtype, batch.lesions.dtype) == (torch.bool, torch.bool)
    assert batch.seconds > 0
    for k in range(4):
        image, lungs, disease = whole.sample(7 + 2 * 4 + k)
        assert_array_equal(batch.image[k, 0], image)
        assert_array_equal(batch.target[k, 0], lungs == RIGHT)
        assert_array_equal(batch.target[k, 1], lungs == LEFT)
        assert_array_equal(batch.lesions[k, 0], disease)
    for processes in (2, 4):
        parts = [stream(phantom, rank=r, processes=processes, **settings).batch(2) for r in range(processes)]
        for name in ("image", "target", "lesions"):
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(together, getattr(batch, name))


def test_disease_lies_in_lungs_and_lungs_in_the_field(phantom):
    busy = stream(phantom, body(), **EVERYTHING)
    ill = 0
    for index in range(40):
        image, lungs, disease = busy.sample(index)
        assert image.shape == lungs.shape == disease.shape == (16, 24, 24)
        assert np.isfinite(image).all()
        assert image.min() >= 0
        assert image.max() <= 1
        assert set(np.unique(lungs)) <= {0, RIGHT, LEFT}
        assert not disease[lungs == 0].any()
        ill += disease.any()
    assert ill > 10


def test_slices_left_out_never_appear():
    """They are bright, and nothing else is."""
    shape = (44, 40, 48)
    hu = np.full(shape, -600, np.int16)
    hu[16:24] = 3000
    hu[:2] = 3000
    chest = Chest("parts", hu, boxes(shape), [(2, 16), (24, 44)])
    turned = replace(STILL, tilt=20, stretch=0.1, bend=4)
    settings = {"chest": turned, "augment": AugmentConfig(rotate=30, zoom=0.4), "mirror": True}
    longest = 0
    samples, still = stream(chest, slab=32, crop=32, **settings), stream(chest, slab=32, crop=32)
    for index in range(30):
        image, lungs, _ = samples.sample(index)
        assert image.max() <= window(np.float32([-600]))[0] + 1e-6
        longest = max(longest, int(lungs.any(axis=(1, 2)).sum()))
    assert longest >= 20
    lengths = {int(still.sample(k)[1].any(axis=(1, 2)).sum()) for k in range(20)}
    # of one run or the other, never of both; the ends of the shorter lie half-way between two voxels
    assert lengths in ({13, 20}, {14, 20})


def test_mirroring_swaps_the_sides():
    """Anatomy turns, and names stay with the sides: the right lung lies at low x."""
    chest = noisy()
    kept = turned = 0
    plain, flipped = (stream(chest, slab=8, crop=96, mirror=mirror) for mirror in (False, True))
    for index in range(16):
        image, lungs, _ = plain.sample(index)
        mirrored, names, _ = flipped.sample(index)
        x = np.arange(96)
        middles = [float(((names == side).sum(axis=(0, 1)) @ x) / (names == side).sum()) for side in (1, 2)]
        assert middles[0] < middles[1]
        if np.array_equal(mirrored, image):
            kept += 1
            assert_array_equal(names, lungs)
        else:
            turned += 1
            assert_array_equal(mirrored, image[:, :, ::-1])
            other = np.where(lungs == RIGHT, LEFT, np.where(lungs == LEFT, RIGHT, 0))
            assert_array_equal(names, other[:, :, ::-1])
    assert kept >= 2  # of 16 at a half: all but 0.1 %
    assert turned >= 2


def test_disease_is_the_painter_s_and_in_millimetres_of_an_adult(monkeypatch):
    """What the painter is given: the sample's HU, its lungs, and depths that grow with the zoom."""
    asked = []

    def paint(self, hu, lungs, depth, index):
        asked.append((hu.copy(), lungs.copy(), depth, index))
        return Painted(np.where(lungs == LEFT, np.float32(77), hu), lungs == LEFT)

    monkeypatch.setattr(chests.Painter, "__call__", paint)
    chest, sizes = noisy(), []
    settings = {"slab": 20, "crop": 96, "augment": AugmentConfig(rotate=15, zoom=0.5)}
    painted, healthy = stream(chest, chest=replace(STILL, diseased=1), **settings), stream(chest, **settings)
    for index in range(12):
        image, lungs, disease = painted.sample(index)
        plain, same, _ = healthy.sample(index)
        hu, given, depth, number = asked.pop()
        assert not asked
        assert number == index
        assert_array_equal(window(hu), plain)
        assert_array_equal(given, same)
        assert_array_equal(lungs, same)
        assert_array_equal(disease, lungs == LEFT)
        assert_allclose(image[disease], window(np.float32([77]))[0])
        assert_array_equal(image[~disease], plain[~disease])
        # in the middle slice of boxes without ends, measured in plane
        measured = ADULT_MM * ndimage.distance_transform_edt(given[10] > 0)
        deep = measured > 15
        # edges of lungs and of the distance lie between voxels
        assert abs(np.median(depth[10][deep] - measured[deep])) < 0.75 * ADULT_MM
        sizes.append(depth[10].max())
    assert max(sizes) > 1.5 * min(sizes)  # by zooms from 1 / 1.5 to 1.5


def test_disease_comes_in_the_share_asked_for(phantom):
    share = 0.6
    some, none = stream(phantom, chest=replace(STILL, diseased=share)), stream(phantom)
    painted, plain = ([samples.sample(k) for k in range(60)] for samples in (some, none))
    changed = sum(not np.array_equal(a[0], b[0]) for a, b in zip(painted, plain, strict=True))
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(painted, plain, strict=True))
    # a painter leaves one sample in eight alone; four standard deviations of a binomial count
    assert abs(changed - 60 * share * 0.87) < 4 * (60 * 0.5 * 0.5) ** 0.5
    assert not any(b[2].any() for b in plain)


# ---- pose


def test_a_pose_turns_and_scales_and_nothing_else():
    settings = {"augment": AugmentConfig(rotate=20, zoom=0.3), "chest": replace(STILL, tilt=10)}
    grid = np.indices((16, 24, 24), float)
    turned, zooms = [], []
    for index in range(12):
        at, inside = places(index, **settings), known(index, **settings)
        line = np.vstack([grid[:, inside], np.ones(inside.sum())])
        matrix = np.linalg.lstsq(line.T, at[:, inside].T, rcond=None)[0].T
        assert_allclose(matrix @ line, at[:, inside], atol=LEVEL)
        linear = matrix[:, :3]
        zoom = np.linalg.det(linear) ** (-1 / 3)  # a reflection would have none
        assert 1 / 1.3 - 1e-3 <= zoom <= 1.3 + 1e-3
        rotation = linear * zoom
        assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-4)
        # turns of 20 degrees about z, 10 about x and 10 about y at most
        assert abs(rotation[1, 2]) <= np.sin(np.radians(20)) + 0.06
        assert max(abs(rotation[0, 1]), abs(rotation[0, 2])) <= np.sin(np.radians(10)) + 0.06
        turned.append([abs(rotation[i, j]) for i, j in ((1, 2), (0, 1), (0, 2))])
        zooms.append(zoom)
    assert (np.max(turned, axis=0) > [0.15, 0.08, 0.08]).all()
    assert max(zooms) > 1.1 > 0.9 > min(zooms)


@given(st.lists(st.floats(0, 1), min_size=10, max_size=10))
def test_a_pose_is_three_turns_one_after_the_other(drawn):
    """About z, then x, then y, in voxels z, y, x: by sines and cosines."""
    augment, chest = AugmentConfig(rotate=90, zoom=0.3), replace(STILL, tilt=60, stretch=0.2)
    samples = stream(noisy(), augment=augment, chest=chest)
    places, zoom = samples._places(samples._sources[0], iter(drawn), 0)
    signed = 2 * np.array(drawn) - 1
    matrix = np.eye(3)
    for (first, second), angle in zip(((1, 2), (0, 1), (0, 2)), signed[:3] * [90, 60, 60], strict=True):
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(np.radians(angle))
        turn[second, first] = np.sin(np.radians(angle))
        turn[first, second] = -turn[second, first]
        matrix = matrix @ turn
    assert zoom == pytest.approx(1.3 ** signed[3])
    steps = [places.diff(dim=axis)[0, 0, 0].numpy() for axis in range(3)]
    expected = matrix / (zoom * 1.2 ** signed[4:7])
    assert_allclose(np.stack(steps, axis=1), expected, atol=1e-4)  # float32 of up to 60 voxels


def test_stretching_scales_each_axis_by_itself():
    grid = np.indices((16, 24, 24), float)
    factors = []
    for index in range(8):
        chest = replace(STILL, stretch=0.2)
        at, inside = places(index, chest=chest), known(index, chest=chest)
        steps = [float(np.polyfit(grid[axis][inside], at[axis][inside], 1)[0]) for axis in range(3)]
        for axis, step in enumerate(steps):
            moved = at[axis][inside] - step * grid[axis][inside]
            assert_allclose(moved, moved.mean(), atol=2 * LEVEL)
        factors.append(steps)
    assert np.min(factors) >= 1 / 1.2 - 1e-3
    assert np.max(factors) <= 1.2 + 1e-3
    assert (np.ptp(factors, axis=1) > 0.02).all()
    assert (np.ptp(factors, axis=0) > 0.1).all()


def test_bending_moves_by_so_many_voxels_at_most():
    most = []
    for index in range(8):
        chest = replace(STILL, bend=4)
        at, straight = places(index, chest=chest), places(index)
        inside = known(index, chest=chest) & known(index)
        moved = np.where(inside, at - straight, np.nan)
        most.append(np.nanmax(abs(moved), axis=(1, 2, 3)))
        for axis in (1, 2, 3):
            steps = np.diff(moved, axis=axis)
            # control points 7 voxels apart or more, between which it is linear: 4 voxels to each side
            assert np.nanmax(abs(steps)) <= 8 / 7 + LEVEL
            assert np.nanmean(abs(np.diff(steps, axis=axis))) < 0.5 * np.nanmean(abs(steps)) + LEVEL
    assert np.max(most) <= 4 + LEVEL
    assert (np.max(most, axis=0) > 1).all()
    assert np.ptp(np.max(most, axis=1)) > 0.5  # of each sample another amount


# ---- scanners


def test_thick_slices_average_what_they_cover(monkeypatch):
    used = []
    real = thick_slices.slice_profile

    def spied(slices, spacing, thickness, phase):
        used.append((slices, spacing, thickness, real(slices, spacing, thickness, phase)))
        return used[-1][-1]

    monkeypatch.setattr(thick_slices, "slice_profile", spied)
    lungs = boxes()
    for z in range(40):  # every slice another
        lungs[z, : 14 + z // 2] = 0
    chest = Chest("steps", noisy().hu, lungs, [(0, 40)])
    thick = stream(chest, slab=32, thick_slices=1.0, thick_mm=(12.0, 24.0))
    thin = stream(chest, slab=32)
    for index in range(6):
        image, found, _ = thick.sample(index)
        plain, names, _ = thin.sample(index)
        slices, spacing, thickness, (profile, nearest) = used.pop()
        assert not used
        assert (slices, spacing) == (32, ADULT_MM)
        assert 12 <= thickness <= 24
        dark = (plain == 0).any(axis=(1, 2))  # beyond the chest: -1024 HU, and the window's end is -1000
        bright = profile[:, dark].sum(axis=1) == 0
        assert bright.sum() > 10
        assert_allclose(hu_of(image)[bright], np.tensordot(profile, hu_of(plain), 1)[bright], atol=0.01)
        assert_array_equal(found, names[nearest])
    half, none = stream(chest, thick_slices=0.5), stream(chest)
    changed = [not np.array_equal(half.sample(k)[0], none.sample(k)[0]) for k in range(40)]
    assert 8 <= sum(changed) <= 32  # binomial of 40 at 0.5, four standard deviations


def test_calibration_and_contrast_to_air_are_one_line():
    chest = noisy()
    plain = stream(chest)
    for change in (AugmentConfig(offset=40), AugmentConfig(gain=0.1)):
        amounts, changed = [], stream(chest, augment=change)
        for index in range(16):
            before = hu_of(plain.sample(index)[0])
            scanned = before > -900
            before, after = before[scanned], hu_of(changed.sample(index)[0])[scanned]
            amount = (after + 1000) / (before + 1000) if change.gain else after - before
            assert np.ptp(amount) < (1e-4 if change.gain else 0.01)  # float32 of 1000 HU, over 100 HU to air
            amounts.append(amount.mean() - bool(change.gain))
        limit = change.gain or change.offset
        assert max(map(abs, amounts)) <= limit * 1.0001
        assert max(amounts) > 0.4 * limit
        assert min(amounts) < -0.4 * limit


def test_noise_has_at_most_the_deviation_asked_for():
    chest, found = noisy(-500, -499), []
    samples, plain = stream(chest, augment=AugmentConfig(noise=50)), stream(chest)
    for index in range(24):
        scanned = hu_of(plain.sample(index)[0]).min(axis=(1, 2)) > -501  # whole slices
        noise = hu_of(samples.sample(index)[0])[scanned] + 500
        assert abs(noise.mean()) < 5
        found.append((noise.std(), np.abs(np.diff(noise)).mean() / noise.std()))
    deviations, grain = np.transpose(found)
    assert deviations.max() <= 50.1
    assert deviations.max() > 25
    assert deviations.min() < 10
    assert grain.max() > 1.3 * grain.min()  # fine and coarse


def test_kernels_are_soft_sharp_or_as_they_were():
    chest, kinds = noisy(), {"soft": 0, "sharp": 0, "same": 0}
    plain, changed = stream(chest), stream(chest, augment=AugmentConfig(blur=1.5))
    for index in range(40):
        before, after = (hu_of(samples.sample(index)[0]) for samples in (plain, changed))
        assert_allclose(after.mean(axis=(1, 2)), before.mean(axis=(1, 2)), atol=15)  # slice by slice
        change = after[:, 4:-4, 4:-4].std() / before[:, 4:-4, 4:-4].std()
        kinds["same" if np.array_equal(after, before) else "soft" if change <= 1 else "sharp"] += 1
    assert min(kinds.values()) >= 4  # at 0.4, 0.3 and 0.3 of 40


def test_contrast_is_given_to_soft_tissue_alone():
    chest, changed = body(), 0
    settings = {"slab": 16, "crop": 64}
    plain, given = stream(chest, **settings), stream(chest, chest=replace(STILL, contrast=1), **settings)
    for index in range(12):
        before, lungs, _ = plain.sample(index)
        after, same, _ = given.sample(index)
        assert_array_equal(same, lungs)
        raised = hu_of(after) - hu_of(before)
        assert raised.min() >= -0.05  # above 150 HU there are 9500 to a whole
        assert raised.max() <= 450
        soft = (hu_of(before) > 0) & (lungs == 0)
        assert_array_equal(raised[~soft], 0)
        assert 0.1 < (raised[soft] > 1).mean() < 0.9  # here more, there none
        changed += raised.max() > 60
    assert changed > 6


def test_gas_lies_in_tissue_below_the_middle_of_the_lungs():
    """Away from them: the same samples with and without it."""
    settings: dict[str, Any] = {"slab": 32, "crop": 56}
    before, after = (stream(body(), chest=replace(STILL, gas=share), **settings) for share in (0, 1))
    seen = 0
    for index in range(12):
        (plain, lungs, _), (gassy, same, disease) = before.sample(index), after.sample(index)
        assert_array_equal(lungs, same)
        assert not disease.any()
        changed = plain != gassy
        seen += changed.any()
        assert not (changed & (lungs > 0)).any()
        heights = np.flatnonzero(lungs.any(axis=(1, 2)))
        # the Gaussian at its edge reaches two voxels
        assert not changed[(heights[0] + heights[-1]) // 2 + 2 :].any()
        assert (gassy <= plain + 1e-6).all()
        if changed.any():
            assert hu_of(gassy[changed]).min() < -850
    assert seen >= 6


def test_arms_lie_beside_the_body():
    chest, sides, found = body(), [], set()
    settings = {"slab": 8, "crop": 80}
    plain, armed = stream(chest, **settings), stream(chest, chest=replace(STILL, arms=1), **settings)
    for index in range(24):
        before, lungs, _ = plain.sample(index)
        after, same, _ = armed.sample(index)
        assert_array_equal(same, lungs)
        arm = after != before
        if not arm.any():  # it lies outside the field
            continue
        assert (hu_of(before)[arm] < -300).all()
        assert not lungs[arm].any()
        found |= set(np.round(hu_of(after)[arm], 1))
        x = np.nonzero(arm)[2].mean()
        middle = np.nonzero(lungs)[2].mean()
        sides.append("right" if x < middle else "left")
    assert found == {-90.0, 50.0, 700.0}  # fat, muscle, bone
    assert min(sides.count("right"), sides.count("left")) >= 4  # each at a half of what is in the field


def test_a_cut_field_is_filled_and_holds_no_lung():
    """Cutting comes last: the sample is that of the whole field, or filled."""
    chest, fills, shares = noisy(), set(), []
    whole = {window(np.float32([fill]))[0] for fill in FILLS}
    sides, round_ = np.zeros(6), 0
    healthy, painted = (
        [stream(chest, chest=replace(STILL, diseased=ill, cropped=share), **SMALL) for share in (0, 1)]
        for ill in (0, 1)
    )
    for index in range(120):
        whole_field, cut_field = healthy if index % 8 else painted
        before, lungs, disease = whole_field.sample(index)
        after, left, ill = cut_field.sample(index)
        cut = after != before
        if disease.any():  # painted lung may have the value of a filling
            cut |= (lungs > 0) & (left == 0)
        values = np.unique(after[cut])
        assert len(values) <= 1
        assert set(values) <= whole
        fills |= set(values)
        assert not left[cut].any()
        assert_array_equal(left[~cut], lungs[~cut])
        assert_array_equal(ill, disease & ~cut)
        if before.min() == 0:  # slices beyond the chest, which fillings of air do not change
            continue
        box = [np.flatnonzero(~cut.all(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
        for axis, (run, n) in enumerate(zip(box, cut.shape, strict=True)):
            low, high = run[0], n - 1 - run[-1]
            assert max(low, high) <= 0.35 * n
            sides[2 * axis : 2 * axis + 2] += low > 0, high > 0
        inner = cut[np.ix_(*box)]
        round_ += inner.any()
        assert_array_equal(inner, np.broadcast_to(inner[:1], inner.shape))  # a circle in plane
        shares.append(cut.mean())
    assert fills == whole
    assert (sides > 5).all()
    assert 0.15 < round_ / len(shares) < 0.6  # half of them, where the circle is smaller than the field
    assert min(shares) == 0  # no side drawn, in 0.6**6 * 0.5 and more


# ---- chests


def test_phantoms_have_two_lungs(phantom):
    assert phantom.name == "phantom1000"
    assert phantom.hu.shape == phantom.lungs.shape == (32, 48, 64)
    assert phantom.segments == [(0, 32)]
    assert phantom.hu.dtype == np.int16
    x = np.arange(64)
    middles = [
        (phantom.lungs == side).sum(axis=(0, 1)) @ x / (phantom.lungs == side).sum() for side in (1, 2)
    ]
    assert middles[0] < 32 < middles[1]
    assert np.median(phantom.hu[phantom.lungs > 0]) < -700
