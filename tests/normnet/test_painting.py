"""Painted disease: inside the lungs, as much, where and as dense as asked for, and the same again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

import lesionsynth as ls
from normnet import painting
from normnet.painting import (
    AIR_HU,
    LEFT,
    PLEURA_MM,
    RIGHT,
    RIM_HU,
    ROUGH_STREAM,
    Density,
    Painter,
    Pattern,
    region,
    render,
)

PATTERNS = get_args(Pattern)
SPACING = 12.0
seeds = st.integers(0, 2**32 - 1)
indices = st.integers(0, 2**31 + 5)
shares = st.floats(0.01, 1.0)
densities = st.builds(
    Density,
    hu=st.floats(-700, 80),
    spread=st.floats(0, 120),
    grain=st.floats(0.3, 2.0),
    bronchi=st.sampled_from([0.0, 0.02, 0.15, 0.9]),
    edge=st.sampled_from([0.0, 0.3, 1.2]),
)


@st.composite
def label_volumes(draw: st.DrawFn) -> np.ndarray:
    """Any 0, 1, 2 on a few voxels: empty, one lung, lungs at the border, lungs of one voxel."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 8)))
    return draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2)))


def depth_of(lungs: np.ndarray, spacing: float) -> np.ndarray:
    """Distance in mm of lung voxels to what is no lung, of which there is some around the volume."""
    inner = ndimage.distance_transform_edt(np.pad(lungs > 0, 1))[1:-1, 1:-1, 1:-1]
    return (spacing * inner).astype(np.float32)


def two_lungs(shape: tuple[int, int, int] = (18, 22, 30)) -> np.ndarray:
    """Two ellipsoids side by side, the right one at low x, a plane of other tissue between them."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    lungs = np.zeros(shape, np.uint8)
    for side, centre in ((RIGHT, -0.5), (LEFT, 0.5)):
        lungs[(z / 0.9) ** 2 + (y / 0.9) ** 2 + ((x - centre) / 0.44) ** 2 <= 1] = side
    return lungs


def frozen(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Copies that raise where they are written."""
    copies = tuple(a.copy() for a in arrays)
    for copy in copies:
        copy.setflags(write=False)
    return copies


def beside(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask and their six neighbours, by shifting."""
    out = mask.copy()
    for axis in range(mask.ndim):
        first, last = [slice(None)] * mask.ndim, [slice(None)] * mask.ndim
        first[axis], last[axis] = slice(None, -1), slice(1, None)
        out[tuple(first)] |= mask[tuple(last)]
        out[tuple(last)] |= mask[tuple(first)]
    return out


def scores(
    pattern: str, depth: np.ndarray, spacing: float, roughness: float, seed: int, index: int
) -> np.ndarray:
    """What a region takes first, voxel by voxel in double precision."""
    drawn = ls.ops.philox_uniform((1, 1, 4), seed, stream=ROUGH_STREAM, sample=index, component=1)
    tilt, lean = (2 * float(u) - 1 for u in drawn.ravel()[:2])
    out = np.empty(depth.shape)
    for z, y, x in np.ndindex(depth.shape):
        out[z, y, x] = {
            "dorsal": spacing * (y + 0.35 * tilt * z + 0.35 * lean * x),
            "basal": spacing * (-z + 0.35 * tilt * y + 0.35 * lean * x),
            "lobe": spacing * (-z + (0.9 + 0.4 * tilt) * y + 0.2 * lean * x),
            "subpleural": -float(depth[z, y, x]),
        }[pattern]
    if roughness:
        out += roughness * painting.field(depth.shape, 12.0 / spacing, seed, ROUGH_STREAM, index)
    return out


# ---- regions


@given(label_volumes(), st.sampled_from(PATTERNS), shares, st.floats(0.5, 20), st.booleans(), seeds, indices)
def test_a_region_has_the_share_of_each_lung(lungs, pattern, share, spacing, rough, seed, index):
    lungs, depth = frozen(lungs, depth_of(lungs, spacing))
    settings = {"spacing": spacing, "roughness": 9.0 * rough, "seed": seed, "index": index}
    chosen = region(pattern, lungs, depth, share, **settings)
    assert chosen.dtype == bool
    assert not chosen[lungs == 0].any()
    assert_array_equal(region(pattern, lungs, depth, share, **settings), chosen)
    for side in (RIGHT, LEFT):
        lung = lungs == side
        voxels, taken = int(lung.sum()), int(chosen[lung].sum())
        assert taken >= share * voxels - 1e-9
        if voxels and pattern != "lung" and share < 1:
            # more than asked for are those as low as the last: asked for all of these, it is the same region
            same = region(pattern, lungs, depth, (taken - 0.5) / voxels, **settings)
            assert_array_equal(same[lung], chosen[lung])
        if pattern == "lung" or share == 1:
            assert taken == voxels


@given(
    label_volumes(),
    st.sampled_from(["dorsal", "basal", "subpleural", "lobe"]),
    st.floats(0.01, 0.99),
    st.floats(0.5, 20),
    st.sampled_from([0.0, 4.0]),
    seeds,
    indices,
)
def test_a_region_takes_what_comes_first(lungs, pattern, share, spacing, roughness, seed, index):
    depth = depth_of(lungs, spacing)
    chosen = region(
        pattern, lungs, depth, share, spacing=spacing, roughness=roughness, seed=seed, index=index
    )
    order = scores(pattern, depth, spacing, roughness, seed, index)
    # float32 keeps seven digits of positions below 200 mm
    near = 1e-4
    for side in (RIGHT, LEFT):
        lung = lungs == side
        if lung.any():
            ranked = np.sort(order[lung])[::-1]
            last = ranked[int(np.ceil(share * len(ranked))) - 1]
            assert chosen[lung & (order > last + near)].all()
            assert not chosen[lung & (order < last - near)].any()


@given(label_volumes(), st.floats(0.01, 0.99), st.floats(0.5, 20), seeds, indices)
def test_regions_lie_where_their_names_say(lungs, share, spacing, seed, index):
    """Below a chosen voxel of the same lung all are chosen, whatever way the patient is tilted."""
    depth = depth_of(lungs, spacing)
    found = {
        name: region(name, lungs, depth, share, spacing=spacing, seed=seed, index=index)
        for name in ("dorsal", "basal", "lobe", "subpleural")
    }
    for side in (RIGHT, LEFT):
        lung = lungs == side

        def holds_on(chosen: np.ndarray, axis: int, step: int, lung: np.ndarray = lung) -> bool:
            """Whether it goes on to the end of the lung along an axis: upwards or downwards."""
            ahead = np.flip(chosen & lung, axis) if step < 0 else chosen & lung
            reached = np.logical_or.accumulate(ahead, axis)
            reached = np.flip(reached, axis) if step < 0 else reached
            return bool(chosen[reached & lung].all())

        assert holds_on(found["dorsal"], 1, +1)  # the back is at high y
        assert holds_on(found["basal"], 0, -1)  # the feet at low z
        assert holds_on(found["lobe"], 0, -1)
        assert holds_on(found["lobe"], 1, +1)
        inner = depth[lung & ~found["subpleural"]]
        if inner.size:
            assert depth[lung & found["subpleural"]].max() <= inner.min()


def test_regions_of_a_chest():
    lungs = two_lungs()
    depth = depth_of(lungs, SPACING)
    z, y, _ = np.indices(lungs.shape)
    for index in range(20):
        for side in (RIGHT, LEFT):
            lung = lungs == side
            dorsal, basal, shell = (
                region(name, lungs, depth, 0.3, spacing=SPACING, roughness=5.0, seed=1, index=index) & lung
                for name in ("dorsal", "basal", "subpleural")
            )
            # a third of an ellipsoid, cut off at 20 degrees at most: its centre is far from the whole's
            assert y[dorsal].mean() > y[lung].mean() + 0.2 * np.ptp(y[lung])
            assert z[basal].mean() < z[lung].mean() - 0.2 * np.ptp(z[lung])
            assert depth[shell].mean() < 0.6 * depth[lung].mean()


def test_rough_edges_wander_with_seed_and_index():
    lungs = two_lungs()
    depth = depth_of(lungs, SPACING)

    def found(name: str, **settings: Any) -> np.ndarray:
        return region(name, lungs, depth, 0.4, spacing=SPACING, **settings)

    for name in ("dorsal", "basal", "subpleural", "lobe"):
        plain, rough = found(name), found(name, roughness=10.0)
        assert (plain != rough).any()
        assert (found(name, roughness=10.0, seed=1) != rough).any()
        assert (found(name, roughness=10.0, index=1) != rough).any()
        if name != "subpleural":  # its shell has no direction that could be drawn
            assert (found(name, index=1) != plain).any()
    # depth is a distance to any surface; others do not look at it
    assert_array_equal(region("lobe", lungs, 0 * depth, 0.4, spacing=SPACING), found("lobe"))


@pytest.mark.parametrize(
    ("pattern", "share", "shown"),
    [
        ("dorsal", 0.0, "'dorsal', 0.0"),
        ("lobe", 1.01, "'lobe', 1.01"),
        ("basal", float("nan"), "'basal', nan"),
        ("apical", 0.5, "'apical', 0.5"),
    ],
)
def test_errors_of_a_region(pattern, share, shown):
    lungs = two_lungs()
    rule = r"pattern must be one of dorsal, basal, subpleural, lobe, lung, share in \(0, 1\], got "
    with pytest.raises(ValueError, match=rule + shown):
        region(pattern, lungs, depth_of(lungs, SPACING), share, spacing=SPACING)


# ---- densities


@given(label_volumes(), st.data(), densities, seeds, indices)
def test_nothing_outside_the_lungs_but_the_rim(lungs, data, density, seed, index):
    hu = data.draw(hnp.arrays(np.float32, lungs.shape, elements=st.integers(-1024, 600)))
    where = data.draw(hnp.arrays(np.bool_, lungs.shape))
    hu, lungs, where = frozen(hu, lungs, where)
    painted = render(hu, lungs, where, density, seed=seed, index=index)
    assert_array_equal(painted.disease, where & (lungs > 0))
    assert painted.hu.dtype == np.float32
    changed = (painted.hu != hu) & (lungs == 0)
    rim = beside(painted.disease) & (hu > RIM_HU[0]) & (hu < RIM_HU[1])
    assert not changed[~rim].any()
    assert (painted.hu >= hu)[lungs == 0].all()
    assert_array_equal(render(hu, lungs, where, density, seed=seed, index=index).hu, painted.hu)
    if not painted.disease.any():
        assert_array_equal(painted.hu, hu)


@given(label_volumes(), st.data(), densities, seeds)
def test_without_bronchi_lung_only_becomes_denser(lungs, data, density, seed):
    """Vessels that are denser than the disease stay, to the bit."""
    hu = data.draw(hnp.arrays(np.float32, lungs.shape, elements=st.sampled_from([-900.0, -400.0, 300.0])))
    where = data.draw(hnp.arrays(np.bool_, lungs.shape))
    density = Density(hu=density.hu, spread=density.spread / 3, grain=density.grain, edge=density.edge)
    painted = render(hu, lungs, where, density, seed=seed)
    assert (painted.hu >= hu).all()
    if density.hu + 5 * density.spread < 300:  # no voxel of a normal field on so few voxels is as far out
        assert_array_equal(painted.hu[hu == 300], hu[hu == 300])
    level = painted.hu[painted.disease & (hu == -900)]
    if density.spread == 0 and level.size:
        assert_allclose(level, density.hu, atol=1e-3)  # a sum of float32 below 1000


@pytest.mark.parametrize("grain", [0.3, 1.0, 2.0])
def test_disease_has_the_density_asked_for(grain):
    lungs = two_lungs((24, 28, 40))
    hu = np.full(lungs.shape, -900, np.float32)
    density = Density(hu=-200.0, spread=60.0, grain=grain, edge=0.5)
    painted = render(hu, lungs, lungs > 0, density, seed=3)
    values = painted.hu[painted.disease]
    # a Gaussian of g voxels leaves about one independent value in (2 g sqrt(pi))**3 voxels, and at most all
    independent = len(values) / max((2 * grain * np.pi**0.5) ** 3, 1)
    assert values.mean() == pytest.approx(-200, abs=4 * 60 / independent**0.5)
    assert values.std() == pytest.approx(60, rel=4 / (2 * independent) ** 0.5)
    other = render(hu, lungs, lungs > 0, density, seed=3, index=1).hu
    assert (other != painted.hu)[painted.disease].mean() > 0.99
    assert (render(hu, lungs, lungs > 0, density, seed=4).hu != painted.hu)[painted.disease].mean() > 0.99


@given(st.floats(0.01, 0.5), st.floats(-300, 80), seeds, indices)
def test_bronchi_have_the_share_asked_for(bronchi, level, seed, index):
    lungs = two_lungs((10, 12, 20))
    hu = np.full(lungs.shape, -900, np.float32)
    where = lungs == LEFT
    painted = render(hu, lungs, where, Density(hu=level, bronchi=bronchi, edge=0.0), seed=seed, index=index)
    air = np.isclose(painted.hu[where], AIR_HU, atol=1e-2)  # float32 below 1000
    assert_allclose(painted.hu[where][~air], level, atol=1e-2)
    # the quantile takes the voxel at its place, and rounds that down: less than two voxels too many
    assert bronchi <= air.mean() <= bronchi + 2 / air.size
    assert_array_equal(painted.hu[~where], -900)


@given(st.floats(0.3, 1.2), seeds)
def test_edges_are_as_soft_as_asked_for(edge, seed):
    """Beside disease lung is between healthy and diseased, the nearer the denser."""
    lungs = np.full((9, 9, 24), RIGHT, np.uint8)
    hu = np.full(lungs.shape, -900, np.float32)
    where = np.zeros(lungs.shape, bool)
    where[:, :, :12] = True
    line = render(hu, lungs, where, Density(hu=0.0, edge=edge), seed=seed).hu[4, 4]
    assert_allclose(line[:12], 0, atol=1e-3)
    assert (np.diff(line[11:]) <= 0).all()
    # the integral of a Gaussian behind a wall, by its samples
    taps = np.exp(-0.5 * (np.arange(-12, 13) / edge) ** 2)
    expected = taps[13:].sum() / taps.sum()
    # lesionsynth's filter cuts its taps where they are small
    assert line[12] == pytest.approx(-900 + 900 * expected, abs=9)
    hard = render(hu, lungs, where, Density(hu=0.0, edge=0.0), seed=seed).hu[4, 4]
    assert_array_equal(hard, np.where(np.arange(24) < 12, 0, -900))


def test_the_rim_of_the_lung_becomes_dense():
    """Else a dark line shows where the lung's mask ended."""
    lungs = np.zeros((5, 5, 12), np.uint8)
    lungs[:, :, :6] = LEFT
    hu = np.full(lungs.shape, -900, np.float32)
    hu[:, :, 6], hu[:, :, 7], hu[:, :, 8:] = -500, -300, 40
    where = lungs > 0
    where[:, 0] = False
    line = render(hu, lungs, where, Density(hu=20.0, edge=0.4)).hu
    assert_allclose(line[:, 1:, 6], 20)
    assert_array_equal(line[:, 0, 6], -500)  # beside no disease
    assert_array_equal(line[:, :, 7:], hu[:, :, 7:])  # a voxel farther out is wall
    air = render(hu, lungs, where, Density(hu=20.0, bronchi=0.9)).hu
    assert (air[:, :, 6:] >= hu[:, :, 6:]).all()  # bronchi do not end in the wall


@given(st.tuples(*[st.integers(6, 20)] * 3), st.floats(0.3, 2.0), seeds, indices)
def test_fields_are_standard(shape, sigma, seed, index):
    field = painting.field(shape, sigma, seed, 72, index)
    assert field.shape == shape
    assert field.dtype == np.float32
    assert field.std() == pytest.approx(1, abs=1e-4)  # float32 sums
    independent = field.size / max((2 * sigma * np.pi**0.5) ** 3, 1)
    assert abs(field.mean()) < 5 / independent**0.5  # of its own spread, that of so many values


# ---- the painter


class Seen:
    """What a painter asked for: patterns, lungs and densities, while everything is done as ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.regions: list[tuple[str, np.ndarray, float]] = []
        self.densities: list[Density] = []
        real_region: Callable[..., Any] = painting.region
        real_render: Callable[..., Any] = painting.render

        def spied_region(pattern, lungs, depth, share, **settings):
            self.regions.append((pattern, lungs, share))
            return real_region(pattern, lungs, depth, share, **settings)

        def spied_render(hu, lungs, disease, density, **settings):
            self.densities.append(density)
            return real_render(hu, lungs, disease, density, **settings)

        monkeypatch.setattr(painting, "region", spied_region)
        monkeypatch.setattr(painting, "render", spied_render)


def test_every_kind_of_disease_is_painted(monkeypatch):
    lungs = two_lungs((12, 16, 22))
    rng = np.random.default_rng(0)
    hu = np.where(lungs > 0, -870, 40) + rng.normal(0, 15, lungs.shape)
    hu[beside(lungs > 0) & (lungs == 0)] = -450
    hu[lungs > 0] = np.where(rng.random((lungs > 0).sum()) < 0.05, 60, hu[lungs > 0])  # vessels
    hu, lungs, depth = frozen(hu.astype(np.float32), lungs, depth_of(lungs, SPACING))
    seen, painter = Seen(monkeypatch), Painter(SPACING, seed=5)
    kinds: Counter[str] = Counter()
    count = 300
    for index in range(count):
        first = len(seen.regions)
        painted = painter(hu, lungs, depth, index)
        density, asked = seen.densities[-1], seen.regions[first:]
        assert not painted.disease[lungs == 0].any()
        apart = ~beside(painted.disease) & (lungs == 0)
        assert_array_equal(painted.hu[apart], hu[apart])
        values = painted.hu[painted.disease]
        if values.size:
            assert values.min() >= -1000
            assert values.max() <= 700  # 80 HU and five standard deviations of 120
        for pattern, chosen, share in asked:
            kinds[pattern] += 1
            sides = set(np.unique(chosen)) - {0}
            kinds["both" if len(sides) == 2 else "left" if LEFT in sides else "right"] += 1
            assert_array_equal(chosen[chosen > 0], lungs[chosen > 0])
            for side in sides:
                assert painted.disease[lungs == side].mean() >= share
            if pattern == "lung":
                assert len(sides) == 1
                assert share == 1
        kinds["lesions alone"] += bool(values.size and not asked)
        kinds["nothing"] += not values.size
        kinds["a whole lung"] += any(painted.disease[lungs == side].all() for side in (RIGHT, LEFT))
        kinds["bronchi"] += density.bronchi > 0
        kinds["ground glass"] += density.hu < -300
        kinds["fluid"] += density.hu >= -20 and density.spread <= 10
        assert -700 <= density.hu <= 80
        assert 0 <= density.bronchi <= 0.15
        assert 0.3 <= density.edge <= 1.2
    chances = {"dorsal": 0.35, "basal": 0.25, "subpleural": 0.15, "lobe": 0.15, "lung": 0.08}
    chances |= {"bronchi": 0.25, "ground glass": 0.15}
    for kind, chance in chances.items():  # four standard deviations of a binomial count
        assert abs(kinds[kind] - count * chance) < 4 * (count * chance * (1 - chance)) ** 0.5, kinds
    for kind in ("both", "right", "left"):
        assert kinds[kind] > 30, kinds
    assert kinds["lesions alone"] > 20
    assert kinds["a whole lung"] >= kinds["lung"] > 0
    assert kinds["fluid"] > 10
    assert 10 < kinds["nothing"] < 100  # no band in 0.32 of all, and there no lesions in 0.4 of these


@given(label_volumes(), seeds, indices)
def test_a_painter_is_a_function_of_seed_and_index(lungs, seed, index):
    hu, lungs, depth = frozen(
        np.where(lungs > 0, np.float32(-850), np.float32(40)), lungs, depth_of(lungs, SPACING)
    )
    painted = Painter(SPACING, seed)(hu, lungs, depth, index)
    other = Painter(SPACING, seed)
    other(hu, lungs, depth, (index + 1) % 2**31)
    again = other(hu, lungs, depth, index)
    assert_array_equal(again.hu, painted.hu)
    assert_array_equal(again.disease, painted.disease)
    assert not painted.disease[lungs == 0].any()
    assert_array_equal(painted.hu[lungs == 0], hu[lungs == 0])  # 40 HU is wall, no rim


def test_other_seeds_and_indices_paint_other_disease():
    lungs = two_lungs()
    depth, hu = depth_of(lungs, SPACING), np.where(lungs > 0, np.float32(-850), np.float32(40))
    found = [Painter(SPACING, seed)(hu, lungs, depth, index) for seed in (0, 1) for index in range(12)]
    some = [p.hu.tobytes() for p in found if p.disease.any()]
    assert len(some) > 12
    assert len(set(some)) == len(some)


def test_lesions_at_the_pleura_are_the_ones_that_reach_it():
    lungs = two_lungs((20, 26, 36))
    spacing, painter = 6.0, Painter(6.0, seed=2)
    depth = depth_of(lungs, spacing) - np.float32(spacing / 2)  # to the voxel's face
    empty = np.zeros(lungs.shape, np.float32)
    fewer = 0
    for index in range(30):
        drawn = ls.LesionSynthesizer(painting.LESIONS, seed=2, allow_empty=True)(
            empty, lungs > 0, index=index, spacing=(spacing,) * 3
        )
        lesions = [drawn.labels == k for k in range(1, int(drawn.labels.max()) + 1)]
        reaching = [lesion for lesion in lesions if lesion.any() and depth[lesion].min() <= PLEURA_MM]
        assert_array_equal(painter._lesions(lungs, depth, index, at_pleura=False), drawn.labels > 0)
        expected = np.any([empty > 0, *reaching], axis=0)
        assert_array_equal(painter._lesions(lungs, depth, index, at_pleura=True), expected)
        fewer += 0 < len(reaching) < len(lesions)
    assert fewer > 3


def test_no_lungs_no_disease():
    hu = np.full((4, 5, 6), 40, np.float32)
    lungs, depth = np.zeros(hu.shape, np.uint8), np.zeros(hu.shape, np.float32)
    for index in range(20):
        painted = Painter(3.0, 0)(hu, lungs, depth, index)
        assert_array_equal(painted.hu, hu)
        assert not painted.disease.any()
    for pattern in PATTERNS:
        assert not region(pattern, lungs, depth, 0.5, spacing=3.0).any()
    assert not render(hu, lungs, np.ones(hu.shape, bool), Density(hu=0.0)).disease.any()
