"""Lungs by a network: what is made of its answer, by networks that answer from known shapes.

How good the weights are is another matter: `tests/normnet/test_lungs_check.py`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

pytest.importorskip("torch")
pytest.importorskip("monai")

import torch

import lesionsynth as ls
from normnet.config import ModelConfig
from normnet.model import Model, build_unet
from normnet.prepare import load_case, network
from normnet.prepare.case import method_of
from normnet.prepare.grid import IsoGrid
from normnet.prepare.lungs import MIN_LUNG_ML, REACH_MM, Lungs, check_agreement, split_lungs
from normnet.prepare.network import (
    ADULT_MM,
    PIECE,
    chances,
    chest_grid,
    lung_network,
    shrink,
    split_by_network,
    window,
    without_hilum,
)
from tests.conftest import played

EXTENT = (240.0, 210.0, 300.0)
"""Of the drawn scan in mm, axis order z, y, x."""
CENTRES = ((120.0, 105.0, 88.0), (120.0, 105.0, 212.0))
"""Of the right and the left lung."""
RADII = (95.0, 62.0, 45.0)
SPACING = (4.0, 2.5, 2.5)
FINE = (8.0, 1.5, 1.5)
"""For what is thin in plane."""
AIR, TISSUE, DENSE = -850, 40, 20


def axes(shape: tuple[int, ...], spacing: tuple[float, ...]) -> list[np.ndarray]:
    return np.meshgrid(
        *((np.arange(n) + 0.5) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij"
    )


def depth(places: list[np.ndarray], centre: tuple[float, ...], grown: float = 0) -> np.ndarray:
    """Distance in mm to an ellipsoid's surface, positive inside; exact on it and to first order near it."""
    radii = [r + grown for r in RADII]
    parts = [(p - c) / r for p, c, r in zip(places, centre, radii, strict=True)]
    k0 = np.sqrt(sum(p**2 for p in parts))
    k1 = np.sqrt(sum((p / r) ** 2 for p, r in zip(parts, radii, strict=True)))
    return np.asarray(k0 * (1 - k0) / np.maximum(k1, 1e-9), np.float32)


class Drawn(NamedTuple):
    """A body with two ellipsoidal lungs."""

    hu: np.ndarray
    depths: tuple[np.ndarray, np.ndarray]
    grid: IsoGrid
    chance: np.ndarray

    @property
    def right(self) -> np.ndarray:
        return self.depths[0] > 0

    @property
    def left(self) -> np.ndarray:
        return self.depths[1] > 0


@cache
def drawn(dense: float = 0.0, wide: float = 0.0, spacing: tuple[float, float, float] = SPACING) -> Drawn:
    """Draw them, with this share of their depth from front to back dense, from the back.

    The network's lungs are larger than those of the scan by `wide` mm, and its chance rises from 0 to 1
    within a coarse voxel around their surface.
    """
    shape = tuple(round(e / s) for e, s in zip(EXTENT, spacing, strict=True))
    places = axes(shape, spacing)
    _, y, x = places
    hu = np.full(shape, -1000, np.int16)
    hu[((y - 105) / 100) ** 2 + ((x - 150) / 140) ** 2 <= 1] = TISSUE
    right, left = (depth(places, centre) for centre in CENTRES)
    lungs = (right > 0) | (left > 0)
    hu[lungs] = AIR
    hu[lungs & (y > 105 + RADII[1] * (1 - 2 * dense))] = DENSE
    grid = IsoGrid.whole((shape[0], shape[1], shape[2]), spacing, (ADULT_MM,) * 3)
    coarse = axes(grid.shape, grid.spacing)
    chance = np.stack([depth(coarse, centre, wide) / ADULT_MM + 0.5 for centre in CENTRES])
    for array in (hu, right, left):
        array.setflags(write=False)
    return Drawn(hu, (right, left), grid, chance.clip(0, 1).astype(np.float32))


class Stub(torch.nn.Module):
    """A network that answers by a function of the image (1, 1, z, y, x)."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.asked = answer, []

    def forward(self, image: Any) -> Any:
        self.asked.append(tuple(image.shape))
        return self.answer(image)


def stub(answer: Any, multiple: int = 1) -> Model:
    return played(Stub(answer), multiple, task="lungs")


def knows(image: Any) -> Any:
    """Answer with the drawn lungs, wherever they are dense: from places alone, so the image must be whole."""
    shape = image.shape[2:]
    places = axes(shape, [e / n for e, n in zip(EXTENT, shape, strict=True)])
    logits = np.stack([8 * depth(places, centre) for centre in CENTRES])
    return torch.from_numpy(logits.astype(np.float32))[None]


def outline(hu: np.ndarray, grid: IsoGrid, chance: np.ndarray) -> Lungs:
    return network._outline(hu, shrink(hu, grid), grid, chance)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


# ---- asking the network


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    multiple=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
)
def test_padding_moves_no_answer(shape: tuple[int, int, int], multiple: int, seed: int) -> None:
    """A network that answers voxel by voxel says the same of each, whatever is padded around it."""
    image = np.random.default_rng(seed).random(shape, np.float32)
    model = stub(lambda x: torch.cat([3 * x - 1, 2 - 5 * x], 1), multiple)
    found = chances(image, model)
    right, left = 1 / (1 + np.exp(1 - 3 * image)), 1 / (1 + np.exp(5 * image - 2))
    # mirrored, right is left: the mean of both answers is said of both
    expected = np.broadcast_to((right + left) / 2, (2, *shape))
    assert found.dtype == np.float32
    assert_allclose(found, expected, rtol=1e-5)  # float32 sigmoids
    assert all(n % multiple == 0 for size in model.network.asked for n in size[2:])
    assert all(0 <= m - n < multiple for m, n in zip(model.network.asked[0][2:], shape, strict=True))


@given(place=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 6)), side=st.integers(0, 1))
def test_mirroring_swaps_the_sides(place: tuple[int, int, int], side: int) -> None:
    """A network sure of one voxel is so of its mirror image, too, and of the other lung there."""
    z, y, x = place
    logits = torch.full((1, 2, 3, 4, 7), -100.0)
    logits[0, side, z, y, x] = 100.0
    found = chances(np.zeros((3, 4, 7), np.float32), stub(lambda _: logits))
    expected = np.zeros((2, 3, 4, 7))
    expected[side, z, y, x] += 0.5
    expected[1 - side, z, y, 6 - x] += 0.5
    assert_allclose(found, expected, atol=1e-6)


def test_sides_by_place_survive_mirroring() -> None:
    """Right is where x is low, in the image as in its mirror image: both answers agree, padded or not."""

    def by_place(image: Any) -> Any:
        low = torch.arange(image.shape[-1]) < image.shape[-1] / 2
        return 200 * torch.cat([image * low, image * ~low], 1) - 100

    image = np.zeros((2, 3, 10), np.float32)
    image[:, 1, [1, 2, 8]] = 1
    for multiple in (1, 4, 16):
        found = chances(image, stub(by_place, multiple)) > 0.99
        assert_array_equal(found[0], (image > 0) & (np.arange(10) < 5))
        assert_array_equal(found[1], (image > 0) & (np.arange(10) >= 5))


@settings(max_examples=20)
@given(
    thick=st.integers(1, 10),
    distance=st.integers(0, 9),
    hu=st.sampled_from([AIR, DENSE]),
    sure=st.sampled_from([0.4, 0.6]),
)
def test_chances_rise_around_dense_disease(thick: int, distance: int, hu: int, sure: float) -> None:
    """And nowhere else: not around vessels, air, or what the network does not take for lung."""
    small = np.full((12, 12, 40), AIR, np.float32)
    small[:, :, 10 : 10 + thick] = hu
    chance = np.zeros((2, 12, 12, 40), np.float32)
    chance[0, :, :, 10 : 10 + thick] = sure
    at = (1, 6, 6, 10 + thick - 1 + distance)
    chance[at] = 0.2
    found = network._favoured(chance, small)
    # three layers are off on either side, at the ends of the image too; five voxels around the rest count
    dense = hu == DENSE and thick >= 7 and sure > 0.5
    expected = 9 * 0.25 / (9 * 0.25 + 1) if dense and distance <= 2 else 0.2
    assert found[at] == pytest.approx(expected, rel=1e-6)
    assert (found >= chance - 1e-6).all()
    if not dense:
        assert_array_equal(found, chance)


def test_chances_without_dense_disease_stay() -> None:
    """At the corners, too: the distance to nothing is no distance."""
    chance = np.full((2, 8, 9, 10), 0.2, np.float32)
    assert_array_equal(network._favoured(chance, np.full((8, 9, 10), DENSE, np.float32)), chance)


@pytest.mark.parametrize(("length", "kept"), [(8, False), (20, True)])
def test_large_vessels_are_left_out(length: int, kept: bool) -> None:
    """A bar of tissue from the mediastinum into the right lung: of 10 and of 25 ml, so vessels and disease.

    At the other side of the same lung it would be disease in any case.
    """
    small = np.full((40, 40, 60), AIR, np.float32)
    small[:, :, 25:35] = TISSUE
    chance = np.zeros((2, 40, 40, 60), np.float32)
    chance[0, 2:-2, 2:-2, 3:25], chance[1, 2:-2, 2:-2, 35:57] = 0.9, 0.9
    bar = np.zeros(small.shape, bool)
    bar[10 : 10 + length, 10:16, 17:25] = True
    outer = np.zeros(small.shape, bool)
    outer[10:18, 10:16, :9] = True
    small[bar | outer] = TISSUE
    found = network._without_vessels(chance, small)
    # a ball of 4.5 mm does not come into all of its corners
    assert (found[0][bar] > 0).mean() == pytest.approx(float(kept), abs=0.15)
    assert_array_equal(found[:, ~bar], chance[:, ~bar])
    none = chance.copy()
    none[1] = 0
    assert_array_equal(network._without_vessels(none, small), none)  # of one lung no side is medial


# ---- outline


@pytest.mark.parametrize("spacing", [SPACING, (2.5, 2.5, 2.5), (8.0, 1.5, 1.5)])
def test_dense_lungs_follow_the_network(spacing: tuple[float, float, float]) -> None:
    """Nothing tells these lungs from the body: the outline is the network's, to half a coarse voxel."""
    scan = drawn(dense=1.0, spacing=spacing)
    found = outline(scan.hu, scan.grid, scan.chance)
    for mask, true in zip((found.right, found.left), scan.depths, strict=True):
        assert mask[true > ADULT_MM / 2].all()
        assert not mask[true < -ADULT_MM / 2].any()
        # half a coarse voxel all around is 7 % of these lungs; where their surface lies on average is known
        # better by far
        assert mask.sum() == pytest.approx((true > 0).sum(), rel=0.02)


@pytest.mark.parametrize("wide", [-2.0, 1.5])
@pytest.mark.parametrize("threshold", [-320, -600])
def test_air_decides_where_there_is_some(
    wide: float, threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network's lungs are too small, or have a rim of chest wall: aerated ones end where air does.

    Air ends over 3 mm, so the outline moves with the threshold. Where the surface lies flat, a rim is as wide
    in its slice as a consolidation, but not as deep; at -600 HU it is, so the middle third is looked at.
    """
    monkeypatch.setattr(network, "AIR_HU", threshold)
    scan = drawn(wide=wide, spacing=FINE)
    depths = np.maximum(*scan.depths)
    hu = np.where(depths > -5, np.interp(depths, [-1.5, 1.5], [TISSUE, AIR]), scan.hu).astype(np.int16)
    found = outline(hu, scan.grid, scan.chance)
    shown = slice(None) if threshold > -600 else slice(len(hu) // 3, -len(hu) // 3)
    assert_array_equal((found.right | found.left)[shown], (hu < threshold)[shown] & (depths > -5)[shown])


def test_dense_part_of_aerated_lungs_stays() -> None:
    """And follows the network, while the rest follows the air; 2 mm of chest wall are no consolidation."""
    scan = drawn(dense=0.4, wide=2.0, spacing=FINE)
    found = outline(scan.hu, scan.grid, scan.chance)
    mask, depths = found.right | found.left, np.maximum(*scan.depths)
    dense = scan.hu == DENSE
    assert (mask & dense).sum() > 0.995 * dense.sum()  # its sharp edges are cut by a disc of 1.5 mm
    _, y, _ = axes(scan.hu.shape, FINE)
    middle = slice(len(dense) // 4, -len(dense) // 4)
    beside_air = (depths < 0) & (y < 105 + RADII[1] * 0.2 - 5)
    assert not (mask & beside_air)[middle].any()
    assert not mask[depths < -2 - ADULT_MM / 2].any()


def test_air_beyond_reach_is_no_lung() -> None:
    """A bowel that touches the lung, and a trachea: the network says no."""
    scan = drawn()
    z, y, x = axes(scan.hu.shape, SPACING)
    depths = np.maximum(*scan.depths)
    gas = ((z - 25) / 30) ** 2 + ((y - 90) / 30) ** 2 + ((x - 200) / 30) ** 2 < 1
    gas |= (np.hypot(y - 105, x - 150) < 8) & (z > 150)
    hu = np.where(gas, -990, scan.hu).astype(np.int16)
    found = outline(hu, scan.grid, scan.chance)
    mask = found.right | found.left
    beyond = gas & (depths < -REACH_MM - ADULT_MM / 2)
    assert beyond.sum() > 1000
    assert not (mask & beyond).any()
    assert dice(mask, depths > 0) > 0.98  # what is within reach joins


@settings(max_examples=15)
@given(
    gap=st.floats(-40, 60),
    lift=st.floats(-30, 30),
    dense=st.booleans(),
    certain=st.floats(0.55, 1),
    noise=st.floats(0, 0.4),
    seed=st.integers(0, 99),
)
def test_lungs_are_disjoint_and_whole(
    gap: float, lift: float, dense: bool, certain: float, noise: float, seed: int
) -> None:
    """Also where both chances are high; whatever the network adds, there is no speck.

    Each lung is one piece where the noise is below what the network is sure by.
    """
    shape, spacing = (30, 42, 60), (8.0, 5.0, 5.0)
    hu = np.full(shape, TISSUE if dense else AIR, np.int16)
    grid = IsoGrid.whole(shape, spacing, (6.0,) * 3)
    places = axes(grid.shape, grid.spacing)
    centres = [(120.0 + s * lift, 105.0, 150 + s * (45 + gap / 2)) for s in (-1, 1)]
    rng = np.random.default_rng(seed)
    chance = np.stack([certain * (depth(places, centre) > 0) for centre in centres])
    chance = (chance + noise * rng.normal(size=chance.shape)).clip(0, 1).astype(np.float32)
    found = outline(hu, grid, chance)
    assert not (found.right & found.left).any()
    for lung in (found.right, found.left):
        assert lung.dtype == bool
        assert lung.shape == shape
        sizes = np.bincount(ndimage.label(lung)[0].ravel())[1:]
        assert (sizes > PIECE * sizes.max(initial=0)).all()
        assert len(sizes) <= 1 or certain - 0.5 < noise


def test_specks_are_left_out() -> None:
    """Pieces of at most a twentieth of the largest; what is larger is lung."""
    coarse = np.zeros((12, 20, 20), bool)
    coarse[:10, :10, :10] = True  # 1000
    kept = coarse.copy()
    coarse[0, 12:17, 10:20] = True  # 50
    coarse[5, 12:17, 10:20] = kept[5, 12:17, 10:20] = True
    coarse[5, 18, 19] = coarse[11, 19, 19] = True
    coarse[5, 17, 19] = kept[5, 17, 19] = kept[5, 18, 19] = True  # 52
    assert_array_equal(network._pieces(coarse), kept)
    assert not network._pieces(coarse & ~coarse).any()


def test_specks_are_no_lung() -> None:
    """Gas that the network takes for a bit of lung, and a bit of one lung that it takes for the other."""
    scan = drawn()
    places, coarse = axes(scan.hu.shape, SPACING), axes(scan.grid.shape, scan.grid.spacing)

    def ball(at: list[np.ndarray], centre: tuple[float, ...], radius: float) -> np.ndarray:
        return np.asarray(sum((p - c) ** 2 for p, c in zip(at, centre, strict=True)) < radius**2)

    bowel, strange = (12.0, 60.0, 150.0), CENTRES[1]
    hu, chance = scan.hu.copy(), scan.chance.copy()
    hu[ball(places, bowel, 12)] = -990
    chance[0][ball(coarse, bowel, 12)] = 1
    chance[0][ball(coarse, strange, 12)] = 1
    chance[1][ball(coarse, strange, 12)] = 0
    found = outline(hu, scan.grid, chance)
    assert not ((found.right | found.left) & ball(places, bowel, 12)).any()
    assert found.left[ball(places, strange, 12)].all()
    assert not found.right[scan.left].any()


def test_one_lung() -> None:
    scan = drawn(dense=1.0)
    both = outline(scan.hu, scan.grid, scan.chance)
    for side in (0, 1):
        chance = scan.chance.copy()
        chance[side] = 0
        found = outline(scan.hu, scan.grid, chance)
        one, none = (found.left, found.right) if side == 0 else (found.right, found.left)
        assert not none.any()
        assert_array_equal(one, both.left if side == 0 else both.right)


@pytest.mark.parametrize(("voxels", "found"), [(0, False), (1111, False), (1112, True)])
def test_no_lung_is_told(voxels: int, found: bool) -> None:
    """30 ml of an adult are 1111.1 voxels of 3 mm; of a smaller chest they are as many."""
    grid = IsoGrid.whole((20, 20, 20), (3.0, 3.0, 3.0), (3.0, 3.0, 3.0))
    chance = np.zeros((2, 20, 20, 20), np.float32)
    chance[0].reshape(-1)[2000 : 2000 + voxels] = 0.9
    hu = np.full((20, 20, 20), AIR, np.int16)
    for size in (3.0, 0.9):
        grid = IsoGrid.whole((20, 20, 20), (size,) * 3, (size,) * 3)
        if found:
            assert outline(hu, grid, chance).right.any()
            continue
        message = (
            rf"no lung found: the network sees {voxels * 0.027:.0f} ml, .* {MIN_LUNG_ML:.0f} of an adult"
        )
        with pytest.raises(ValueError, match=message):
            outline(hu, grid, chance)


@pytest.mark.parametrize("dense", [0.0, 0.4])
def test_a_childs_chest_has_the_same_voxels(dense: float) -> None:
    """What is measured in millimetres shrinks with the chest."""
    scan = drawn(dense=dense, wide=1.0)
    adult = outline(scan.hu, scan.grid, scan.chance)
    child = tuple(0.3 * s for s in SPACING)
    grid = IsoGrid.whole(scan.grid.source_shape, (child[0], child[1], child[2]), (0.3 * ADULT_MM,) * 3)
    found = outline(scan.hu, grid, scan.chance)
    assert grid.shape == scan.grid.shape
    for mask, same in ((found.right, adult.right), (found.left, adult.left)):
        # exact arithmetic would give the same bits; 0.3 has none, and a tie may fall to either side
        assert (mask != same).sum() < 1e-4 * same.sum()


# ---- the coarse grid

ratios = st.sampled_from([0.4, 0.75, 1.0, 1.5, 2.0, 3.0, 3.7])


def grid_of(shape: tuple[int, int, int], ratio: tuple[float, float, float]) -> IsoGrid:
    return IsoGrid.whole(shape, (2.0, 1.5, 1.0), (2.0 * ratio[0], 1.5 * ratio[1], ratio[2]))


def triangle(grid: IsoGrid, axis: int, k: int) -> np.ndarray:
    """Weights of a coarse voxel along an axis, one by one."""
    n, ratio = grid.source_shape[axis], grid.spacing[axis] / grid.source_spacing[axis]
    at = min(max((k + 0.5) * ratio - 0.5, 0.0), n - 1.0)
    weights = [max(0.0, 1 - abs(i - at) / max(ratio, 1.0)) for i in range(n)]
    return np.array(weights) / sum(weights)


@given(
    hnp.arrays(
        np.int16, hnp.array_shapes(min_dims=3, max_dims=3, max_side=7), elements=st.integers(-1024, 3000)
    ),
    st.tuples(ratios, ratios, ratios),
)
def test_shrinking_weighs_by_triangles(volume, ratio):
    grid = grid_of(volume.shape, ratio)
    found = shrink(volume, grid)
    assert found.shape == grid.shape
    assert found.dtype == np.float32
    for k in np.ndindex(grid.shape):
        weights = [triangle(grid, axis, k[axis]) for axis in range(3)]
        expected = np.einsum("zyx,z,y,x", volume.astype(float), *weights)
        assert found[k] == pytest.approx(expected, abs=0.01)  # float32 sums of up to 3000
    same = shrink(np.full(volume.shape, -700, np.int16), grid)
    assert_allclose(same, -700, rtol=1e-6)
    shares = shrink(volume > 0, grid)
    assert ((shares >= 0) & (shares <= 1 + 1e-6)).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 3.0])
def test_shrinking_keeps_ramps_and_volumes(axis, ratio):
    """Long enough along z for several chunks of slices."""
    shape = (75, 24, 27)
    grid = grid_of(shape, (ratio, ratio, ratio))
    volume = 10 * np.indices(shape)[axis].astype(np.int16)
    found = shrink(volume, grid)
    at = grid.source_positions(axis)
    inner = (at >= ratio) & (at <= shape[axis] - 1 - ratio)  # where no triangle is cut off
    line = np.moveaxis(found, axis, -1)[..., inner]
    # a whole number of voxels, or interpolation: triangles keep a line
    assert_allclose(line, np.broadcast_to(10 * at[inner], line.shape), rtol=1e-5)
    blob = np.zeros(shape, bool)
    blob[20:50, 6:18, 7:20] = True
    voxel = np.prod(grid.spacing) / np.prod(grid.source_spacing)
    assert shrink(blob, grid).sum() * voxel == pytest.approx(blob.sum(), rel=0.01)


@given(hnp.arrays(np.float32, (4, 5), elements=st.floats(-4000, 4000, width=32)))
def test_the_window(hu):
    parts = ((0.4, -1000, -150), (0.5, -150, 150), (0.1, 150, 800))
    expected = sum(share * ((hu.astype(float) - low) / (high - low)).clip(0, 1) for share, low, high in parts)
    assert_allclose(window(hu), expected, atol=1e-6)
    assert window(hu).dtype == np.float32


def scan(radii_mm: tuple[float, float], spacing: tuple[float, float, float]) -> np.ndarray:
    """An elliptic body with two lungs, in air; its walls are thick even in a child."""
    height = 2 * radii_mm[0]
    sizes = [
        max(8, round(length / s))
        for length, s in zip((height, 2.4 * radii_mm[0], 2.4 * radii_mm[1]), spacing, strict=True)
    ]
    z, y, x = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * s for n, s in zip(sizes, spacing, strict=True)), indexing="ij"
    )
    hu = np.where((y / radii_mm[0]) ** 2 + (x / radii_mm[1]) ** 2 <= 1, 40, -1000)
    for side in (-1, 1):
        lung = (y / (0.5 * radii_mm[0])) ** 2 + ((x - 0.4 * side * radii_mm[1]) / (0.25 * radii_mm[1])) ** 2
        hu[(lung <= 1) & (abs(z) < 0.8 * height / 2)] = -850
    return hu.astype(np.int16)


@pytest.mark.parametrize("spacing", [(5.0, 2.0, 2.0), (8.0, 3.0, 3.0)])
@pytest.mark.parametrize("radii", [(110.0, 165.0), (90.0, 120.0)])
def test_the_grid_follows_the_patient_s_size(radii, spacing):
    """As many voxels across a body whatever its size and the scan's: 90 along a square of its area."""
    hu = scan(radii, spacing)
    grid = chest_grid(hu, spacing)
    expected = np.sqrt(np.pi * radii[0] * radii[1]) / 90
    assert grid.spacing == (grid.spacing[0],) * 3
    # the body's outline is known to half a coarse voxel
    assert grid.spacing[0] == pytest.approx(expected, rel=0.03)
    assert grid.start == (0, 0, 0)
    assert grid.source_shape == hu.shape
    for n, s, m, t in zip(hu.shape, spacing, grid.shape, grid.spacing, strict=True):
        assert abs(n * s - m * t) <= 0.5001 * t
    small = tuple(0.3 * s for s in spacing)
    assert chest_grid(scan(tuple(0.3 * r for r in radii), small), small).spacing[0] == pytest.approx(
        0.3 * expected, rel=0.03
    )


def test_the_grid_of_a_phantom_scales_with_it():
    hu = ls.phantom.chest_ct(shape=(32, 48, 64), spacing=(10.0, 7.5, 6.0), seed=1000).hu
    adult, child = chest_grid(hu, (10.0, 7.5, 6.0)), chest_grid(hu, (3.0, 2.25, 1.8))
    assert 2.2 < adult.spacing[0] < 3.5
    assert child.spacing[0] == pytest.approx(0.3 * adult.spacing[0], rel=0.03)


def test_limits_of_the_grid():
    air = np.full((8, 60, 60), -1000, np.int16)
    assert chest_grid(air, (3.0, 3.0, 3.0)).spacing == (180 / 90,) * 3  # of the image, where there is no body
    assert chest_grid(air, (9.0, 9.0, 9.0)).spacing == (network.LARGEST_MM,) * 3
    assert chest_grid(air, (0.2, 0.2, 0.2)).spacing == (network.SMALLEST_MM,) * 3
    large = scan((230.0, 330.0), (10.0, 6.0, 6.0))
    assert chest_grid(large, (10.0, 6.0, 6.0)).spacing == (network.LARGEST_MM,) * 3
    assert chest_grid(large, (0.3, 0.2, 0.2)).spacing == (network.SMALLEST_MM,) * 3


def test_the_hilum_goes_and_other_tissue_stays():
    """On voxels of 3 mm: lungs whose masks hold their vessels, as closing leaves them."""
    shape = (36, 40, 90)
    right, left = np.zeros(shape, bool), np.zeros(shape, bool)
    right[3:-3, 5:-5, 6:40], left[3:-3, 5:-5, 50:84] = True, True
    z, y, x = np.indices(shape)
    parts = {
        "vessel": (np.hypot(z - 12, y - 20) <= 3)
        & (x >= 15)
        & (x < 50),  # to beyond the lung's middle at 22.5
        "thin": (np.hypot(z - 26, y - 12) <= 1) & (x >= 20) & (x <= 45),
        "nodule": (z - 24) ** 2 + (y - 26) ** 2 + (x - 30) ** 2 <= 16,
        "mass": (z - 20) ** 2 + (y - 20) ** 2 + (x - 6) ** 2 <= 25,  # at the chest wall
        "far": (np.hypot(z - 12, y - 20) <= 3) & (x >= 50) & (x < 60),
    }
    hu = np.where(right | left, -850, 40)
    for part in parts.values():
        hu[part] = 40
    hu = hu.astype(np.int16)
    before = hu.copy(), right.copy(), left.copy()
    one, other = without_hilum(hu, right, left)
    for array, copy in zip((hu, right, left), before, strict=True):
        assert_array_equal(array, copy)
    assert not (one & ~right).any()
    assert not (other & ~left).any()
    lungs = one | other
    # rounded off at its end by the ball, if at all
    core = (np.hypot(z - 12, y - 20) <= 2) & (((x > 23) & (x < 40)) | ((x >= 50) & (x < 58)))
    assert not lungs[core].any()
    assert lungs[parts["vessel"] & (x < 22) & right].all()  # lateral of the middle
    assert lungs[parts["nodule"]].all()
    assert lungs[parts["mass"] & right].all()
    assert lungs[parts["thin"] & right & (x < 38)].all()  # its root is as wide as what it hangs on
    aerated = (right | left) & (hu == -850)
    assert lungs[aerated].all()
    removed = (right | left) & ~lungs
    assert (removed & ~(parts["vessel"] | parts["far"] | parts["thin"])).sum() == 0


# ---- from scan to lungs


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dense", [0.0, 0.4, 1.0])
def test_scan_to_lungs(scale: float, dense: float) -> None:
    """With the coarse grid chosen by the body; the lungs of a scaled chest are found as well."""
    scan, model = drawn(dense=dense), stub(knows)
    spacing = (scale * SPACING[0], scale * SPACING[1], scale * SPACING[2])
    before = scan.hu.copy()
    found = split_by_network(scan.hu, spacing, model)
    assert_array_equal(scan.hu, before)
    for mask, true in zip((found.right, found.left), scan.depths, strict=True):
        assert dice(mask, true > 0) > 0.985  # 1 mm of their surface is 5 %
        # half a coarse voxel of 2.3 mm (of an adult's), and half a voxel of the scan
        assert mask[true > 2.4].all()
        assert not mask[true < -2.4].any()
    assert len(model.network.asked) == 2
    # the body's cross-section is the square of 90 voxels, 2 % for the outline of the body
    voxel = [e / n for e, n in zip(EXTENT, model.network.asked[0][2:], strict=True)]
    assert_allclose(voxel, np.sqrt(np.pi * 100 * 140) / 90, rtol=0.02)


def test_mirrored_scan_has_mirrored_lungs() -> None:
    scan = drawn(dense=0.4)
    found = split_by_network(scan.hu, SPACING, stub(knows))
    mirrored = split_by_network(np.ascontiguousarray(scan.hu[:, :, ::-1]), SPACING, stub(knows))
    # coarse voxels count from the right edge, and do not end with the image: half of one is 6 % of the lungs
    assert dice(mirrored.right, found.left[:, :, ::-1]) > 0.98
    assert dice(mirrored.left, found.right[:, :, ::-1]) > 0.98


def test_a_network_that_sees_nothing() -> None:
    scan = drawn()
    blind = stub(lambda image: torch.full((1, 2, *image.shape[2:]), -5.0))
    with pytest.raises(ValueError, match="no lung found: the network sees 0 ml"):
        split_by_network(scan.hu, SPACING, blind)


# ---- agreement with thresholds


def two_masks(alone: int, shared: int, other: int) -> tuple[np.ndarray, np.ndarray]:
    """Lungs with so many ml of their own and in common, of voxels of 1 ml."""
    places = np.arange(20_000).reshape(20, 20, 50)
    first = places < alone + shared
    return first, (places >= alone) & (places < alone + shared + other)


ML = (10.0, 10.0, 10.0)


@pytest.mark.parametrize(
    ("alone", "shared", "other", "said"),
    [
        (0, 6000, 0, None),
        (1000, 6000, 0, None),
        (400, 6000, 600, None),
        (400, 6000, 601, "has 400 ml that thresholds have not, and lacks 601 ml that they have"),
        (1001, 6000, 0, "has 1001 ml that thresholds have not, and lacks 0 ml that they have"),
        (200, 800, 0, None),
        (201, 799, 0, "has 201 ml that thresholds have not, and lacks 0 ml"),
        (0, 800, 200, None),
        (0, 799, 201, "has 0 ml that thresholds have not, and lacks 201 ml"),
        (1000, 0, 0, "has 1000 ml, and thresholds find no lung"),
        (3, 0, 0, "has 3 ml, and thresholds find no lung"),
        (0, 0, 0, None),
    ],
)
def test_limits_of_agreement(
    alone: int, shared: int, other: int, said: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    """A litre, or a fifth of the larger, may be of one of them alone; not a millilitre more."""
    lungs, classical = two_masks(alone, shared, other)
    if said is None:
        assert check_agreement(lungs, classical, ML)
        assert not recwarn.list
        return
    with pytest.warns(UserWarning, match=f"the lung network {said}.*dense disease, or a wrong outline"):
        assert not check_agreement(lungs, classical, ML)


@given(
    alone=st.integers(0, 3000),
    shared=st.integers(0, 8000),
    other=st.integers(0, 3000),
    size=st.floats(2, 20),
)
@pytest.mark.filterwarnings("ignore:the lung network has")
def test_agreement_is_of_volumes(alone: int, shared: int, other: int, size: float) -> None:
    """Both ways round alike, and in ml, whatever the voxels."""
    lungs, classical = two_masks(alone, shared, other)
    spacing = (size, 10.0, 10.0)
    apart, larger = (alone + other) * size / 10, (shared + max(alone, other)) * size / 10
    if abs(apart - min(1000, larger / 5)) > 1e-6:  # at the limit rounding decides
        assert check_agreement(lungs, classical, spacing) == (apart < min(1000, larger / 5))
        assert check_agreement(classical, lungs, spacing) == (apart < min(1000, larger / 5))


# ---- methods by name


SMALL = {"channels": (2, 4), "strides": (2,), "residual_units": 0}


def weights(path: Path, task: Any, outputs: int) -> Path:
    config = ModelConfig(**SMALL, outputs=outputs)
    Model(build_unet(config), config, task).save(path)
    return path


def test_unknown_methods_are_named(tmp_path: Path) -> None:
    """And paths without weights."""
    rule = "lungs must be network, classical, lungmask, or a run folder or weights of --task lungs, got"
    for word in ("thresholds", "Network", str(tmp_path), str(tmp_path / "missing.safetensors")):
        with pytest.raises(ValueError, match=f"{rule} '{word}'"):
            method_of(word)


def test_weights_must_be_of_lungs(tmp_path: Path) -> None:
    other = weights(tmp_path / "lesions.safetensors", "lesions", 1)
    with pytest.raises(ValueError, match=r"lesions.safetensors: the model's task must be lungs, got lesions"):
        method_of(str(other))
    (tmp_path / "note.txt").write_text("no weights")
    with pytest.raises(ValueError, match=r"note.txt: not a readable safetensors file"):
        method_of(str(tmp_path / "note.txt"))


def test_methods_by_name_and_by_weights(tmp_path: Path) -> None:
    """Weights or the run folder with them; a network is loaded once."""
    assert method_of("classical") is split_lungs
    file = weights(tmp_path / "model.safetensors", "lungs", 2)
    methods = [method_of(str(path)) for path in (file, tmp_path)]
    for method in methods:
        assert method.func is split_by_network
        assert method.keywords["network"] is methods[0].keywords["network"]
        assert method.keywords["network"].config == ModelConfig(**SMALL, outputs=2)
        assert not method.keywords["network"].network.training


def test_a_real_network_answers(tmp_path: Path) -> None:
    """Untrained, so that nothing but shapes and ranges is known; widths that are no multiple."""
    model = lung_network(str(weights(tmp_path / "model.safetensors", "lungs", 2)))
    found = chances(np.random.default_rng(0).random((7, 9, 11), np.float32), model)
    assert found.shape == (2, 7, 9, 11)
    assert 0 < found.min() <= found.max() < 1


# ---- cases


def write(path: Path, hu: np.ndarray) -> Path:
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture
def stub_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A path whose network knows the drawn lungs."""
    monkeypatch.setattr(network, "lung_network", lambda path: stub(knows))
    path = tmp_path / "stub.safetensors"
    path.touch()
    return str(path)


def test_case_of_a_healthy_chest(stub_weights: str, tmp_path: Path) -> None:
    """Both methods find the same lungs, so nothing is said: warnings are errors here."""
    scan = drawn()
    ct = write(tmp_path / "ct.nii.gz", scan.hu)
    case = load_case(ct, lungs=stub_weights)
    assert case.apart is False
    assert_array_equal(case.native_classical, np.logical_or(*_sides(split_lungs(scan.hu, SPACING))))
    assert dice(case.native_mask, scan.right | scan.left) > 0.985
    assert case.native_sides is not None
    assert dice(case.native_sides[1], scan.left) > 0.985


def test_case_whose_lungs_are_dense(stub_weights: str, tmp_path: Path) -> None:
    scan = drawn(dense=0.4)
    ct = write(tmp_path / "ct.nii.gz", scan.hu)
    with pytest.warns(UserWarning, match=r"the lung network has \d{3} ml that thresholds have not"):
        case = load_case(ct, lungs=stub_weights)
    assert case.apart is True
    truth = scan.right | scan.left
    assert dice(case.native_mask, truth) > 0.985
    thresholds = np.logical_or(*_sides(split_lungs(scan.hu, SPACING)))
    assert_array_equal(case.native_classical, thresholds)
    assert thresholds.sum() < 0.8 * truth.sum()
    with pytest.warns(UserWarning, match="the lung network has"):
        left = load_case(ct, lungs=stub_weights, keep_lung="left")
    assert dice(left.native_mask, scan.left) > 0.985
    assert_array_equal(left.native_classical, split_lungs(scan.hu, SPACING).left)


def test_case_where_thresholds_find_no_lung(stub_weights: str, tmp_path: Path) -> None:
    scan = drawn(dense=1.0)
    with pytest.raises(ValueError, match="no lung found"):
        split_lungs(scan.hu, SPACING)
    ct = write(tmp_path / "ct.nii.gz", scan.hu)
    with (
        pytest.warns(UserWarning, match="are they lungs"),
        pytest.warns(UserWarning, match=r"the lung network has \d{4} ml, and thresholds find no lung"),
    ):
        case = load_case(ct, lungs=stub_weights)
    assert case.apart is True
    assert case.native_classical is not None
    assert case.native_classical.shape == scan.hu.shape
    assert not case.native_classical.any()


def test_case_without_a_network(stub_weights: str, tmp_path: Path) -> None:
    """Thresholds have nothing to be compared with, nor has a mask from a file."""
    scan = drawn(dense=0.4)
    ct = write(tmp_path / "ct.nii.gz", scan.hu)
    mask = write(tmp_path / "mask.nii.gz", (scan.right | scan.left).astype(np.uint8))
    for case in (load_case(ct, lungs="classical"), load_case(ct, mask, lungs=stub_weights)):
        assert case.native_classical is None
        assert case.apart is False
    assert_array_equal(case.native_mask, scan.right | scan.left)


def test_case_names_the_scan_without_lungs(
    stub_weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind = stub(lambda image: torch.full((1, 2, *image.shape[2:]), -5.0))
    monkeypatch.setattr(network, "lung_network", lambda path: blind)
    ct = write(tmp_path / "ct.nii.gz", drawn().hu)
    with pytest.raises(ValueError, match=r"ct.nii.gz: no lung found: the network sees 0 ml"):
        load_case(ct, lungs=stub_weights)


def _sides(lungs: Lungs) -> tuple[np.ndarray, np.ndarray]:
    return lungs.right, lungs.left
