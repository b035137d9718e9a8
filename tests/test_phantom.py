"""The phantom: deterministic, like a real chest in numbers, and independent of the generator."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist

import lesionsynth as ls
from lesionsynth.phantom.noise import SmoothField, scanner_noise
from lesionsynth.phantom.vessels import draw_tubes, grow_tree, tubes

WHOLE = (80, 72, 96)
WHOLE_MM = (4.0, 4.0, 4.0)
"""A field of 320 x 288 x 384 mm: every chest in its true size, from below the lungs to above."""
BRIGHT_HU = -500
"""The paper's threshold T."""


@pytest.fixture(scope="module")
def chest() -> ls.phantom.ChestCT:
    return ls.phantom.chest_ct(WHOLE, WHOLE_MM, seed=5)


@pytest.fixture(scope="module")
def slab() -> ls.phantom.ChestCT:
    return ls.phantom.chest_ct((12, 208, 272), (1.5, 1.4, 1.4), seed=2, level=0.5)


def bright(chest: ls.phantom.ChestCT) -> float:
    return float((chest.hu[chest.lung_mask] >= BRIGHT_HU).mean())


# ---------------------------------------------------------------------------------------------- chest


def test_same_seed_gives_the_same_chest() -> None:
    first = ls.phantom.chest_ct((8, 40, 48), (4.0, 7.0, 8.0), seed=11)
    again = ls.phantom.chest_ct([8, 40, 48], np.array([4.0, 7.0, 8.0]), seed=np.int64(11))
    np.testing.assert_array_equal(first.hu, again.hu)
    np.testing.assert_array_equal(first.lung_mask, again.lung_mask)


def test_seeds_are_different_people() -> None:
    chests = [ls.phantom.chest_ct((8, 72, 96), WHOLE_MM, seed=seed, level=0.5) for seed in range(3)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        overlap = (chests[a].lung_mask & chests[b].lung_mask).sum()
        dice = 2 * overlap / (chests[a].lung_mask.sum() + chests[b].lung_mask.sum())
        assert 0.6 < dice < 0.97, "lungs of other sizes in much the same place"
        lung = chests[a].lung_mask & chests[b].lung_mask
        vessels = np.corrcoef(chests[a].hu[lung], chests[b].hu[lung])[0, 1]
        assert vessels < 0.4, "other trees"


def test_types_and_spacing(chest: ls.phantom.ChestCT) -> None:
    assert chest.hu.shape == chest.lung_mask.shape == WHOLE
    assert chest.hu.dtype == np.int16
    assert chest.lung_mask.dtype == np.bool_
    assert chest.spacing == WHOLE_MM
    assert chest.hu.min() >= -1024
    assert chest.hu.max() <= 3071
    hu, mask, spacing = chest
    assert hu is chest.hu
    assert mask is chest.lung_mask
    assert spacing is chest.spacing


@settings(max_examples=5)
@given(
    shape=st.tuples(st.integers(8, 16), st.integers(8, 40), st.integers(8, 40)),
    spacing=st.tuples(st.floats(0.5, 8), st.floats(0.3, 8), st.floats(0.3, 8)),
    seed=st.integers(0, 2**40),
)
def test_any_window_holds_lung(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], seed: int
) -> None:
    """But one whose voxels are as large as a lung, which is told."""
    try:
        chest = ls.phantom.chest_ct(shape, spacing, seed)
    except ValueError as error:
        sizes = re.findall(r"\d[\d.e+]*", str(error).partition("must leave some lung, got voxels of ")[2])
        if max(map(float, sizes), default=0.0) > 80:
            return
        raise
    assert chest.hu.shape == shape
    assert chest.spacing == spacing
    assert chest.lung_mask.any()
    assert not chest.lung_mask[:, [0, -1]].any(), "the chest must fit the field of view"
    assert not chest.lung_mask[:, :, [0, -1]].any()


@pytest.mark.parametrize("seed", [0, 2])
def test_lungs_are_two_of_the_right_size(seed: int) -> None:
    chest = ls.phantom.chest_ct(WHOLE, WHOLE_MM, seed=seed)
    labels, _ = ndimage.label(chest.lung_mask)
    sizes = np.sort(np.bincount(labels.ravel())[1:])[::-1]
    litres = sizes * math.prod(WHOLE_MM) / 1e6
    assert sizes[:2].sum() > 0.995 * sizes.sum(), "nothing but two lungs"
    assert 0.6 < litres[1] / litres[0] <= 1
    # total lung capacity of adults; the shared real volumes have 4.6 and 5.4 litres
    assert 3.0 < litres.sum() < 7.0
    centres = [
        ndimage.center_of_mass(labels == i)[2] for i in 1 + np.argsort(np.bincount(labels.ravel())[1:])[-2:]
    ]
    assert min(centres) < WHOLE[2] / 2 < max(centres), "one on each side"


@pytest.mark.parametrize("seed", [0, 3, 7])
@pytest.mark.parametrize(
    ("shape", "spacing"), [((16, 144, 192), (2.5, 2.0, 2.0)), ((16, 96, 128), (1.0, 0.8, 0.8))]
)
def test_hu_statistics_are_those_of_real_lungs(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], seed: int
) -> None:
    """Ranges around the shared healthy volumes: median -876 and -812 HU, 5.1 % and 7.1 % bright."""
    chest = ls.phantom.chest_ct(shape, spacing, seed)
    lung = chest.hu[chest.lung_mask]
    assert -890 < np.median(lung) < -790
    assert 0.045 < bright(chest) < 0.12
    assert np.percentile(lung, 5) > -960, "no holes darker than the noise around parenchyma"
    assert -150 < np.percentile(lung, 99.5) < 150, "vessels are soft tissue, no bone"


def test_lungs_are_denser_towards_the_back(slab: ls.phantom.ChestCT) -> None:
    rows = np.flatnonzero(slab.lung_mask.any((0, 2)))
    third = len(rows) // 3
    front, back = rows[:third], rows[-third:]
    darkest = [np.median(slab.hu[:, part][slab.lung_mask[:, part]]) for part in (front, back)]
    assert 8 < darkest[1] - darkest[0] < 80


def test_vessels_thin_out_towards_the_pleura(slab: ls.phantom.ChestCT) -> None:
    """Medial lung, near the hila, against lateral lung; the rim is left out."""
    lung = ndimage.binary_erosion(slab.lung_mask, iterations=3)
    off_middle = np.abs(np.arange(272) - 135.5) * 1.4
    thick = ndimage.grey_opening(slab.hu, size=(1, 4, 4)) > BRIGHT_HU
    medial, lateral = (lung & part for part in (off_middle < 70, off_middle > 100))
    assert thick[medial].mean() > 4 * thick[lateral].mean()
    assert (slab.hu[lateral] > BRIGHT_HU).mean() > 0.005, "but small ones reach the periphery"


def test_trachea_is_air_but_no_lung() -> None:
    chest = ls.phantom.chest_ct((8, 144, 192), (2.0, 2.0, 2.0), seed=1, level=0.8)
    middle = np.zeros(chest.hu.shape, bool)
    middle[:, 40:104, 88:104] = True  # 32 mm about the midline, inside the body
    lumen = middle & (chest.hu < -920)
    # 8.6 mm radius: 232 mm² on eight slices of 4 mm² pixels, less the rim
    assert lumen.sum() > 8 * 232 / 4 * 0.5
    assert not (lumen & chest.lung_mask).any()


def test_main_bronchi_do_not_join_the_lungs(chest: ls.phantom.ChestCT) -> None:
    air = ndimage.label(chest.hu < -400)[0]
    assert not (chest.lung_mask & (chest.hu < -400) & (air == air[0, 0, 0])).any(), "outside air is no lung"


def test_levels_differ(chest: ls.phantom.ChestCT) -> None:
    """From the base up: the domes leave a crescent, then the lungs widen, then close at the apices."""
    area = [
        ls.phantom.chest_ct((8, 72, 96), (1.0, 4.0, 4.0), seed=5, level=level).lung_mask[4].sum()
        for level in (0.06, 0.5, 0.95)
    ]
    assert 0 < area[0] < 0.5 * area[1]
    assert 0 < area[2] < 0.5 * area[1]


def test_resolution_does_not_change_the_person() -> None:
    coarse = ls.phantom.chest_ct((12, 72, 96), WHOLE_MM, seed=5, level=0.5)
    fine = ls.phantom.chest_ct((24, 144, 192), (2.0, 2.0, 2.0), seed=5, level=0.5)
    blocks = (12, 2, 72, 2, 96, 2)
    inside = fine.lung_mask.reshape(blocks).mean((1, 3, 5)) > 0.5
    dice = 2 * (inside & coarse.lung_mask).sum() / (inside.sum() + coarse.lung_mask.sum())
    # surfaces agree to a fraction of a voxel; the main bronchi's cut at 4 mm costs some
    assert dice > 0.97
    averaged = fine.hu.reshape(blocks).mean((1, 3, 5))
    lung = ndimage.binary_erosion(coarse.lung_mask)
    assert np.corrcoef(averaged[lung], coarse.hu[lung])[0, 1] > 0.8, "the same vessels"


def test_body_has_bone_fat_and_muscle(chest: ls.phantom.ChestCT) -> None:
    body = chest.hu[WHOLE[0] // 2]
    assert (body > 300).any()
    assert ((body > -130) & (body < -80)).sum() > 50
    assert ((body > 20) & (body < 90)).sum() > 500
    assert (body[:30, 0] < -900).all(), "air around; the table is behind"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shape": (16, 16)}, "shape must be three integers"),
        ({"shape": (16, 16, 16, 16)}, "shape must be three integers"),
        ({"shape": 16}, "shape must be three integers"),
        ({"shape": (16, 7, 16)}, r"shape must be at least 8 along every axis, got \(16, 7, 16\)"),
        ({"spacing": (1.0, 0.0, 1.0)}, "spacing must be three positive numbers"),
        ({"spacing": (1.0, 1.0)}, "spacing must be three positive numbers"),
        ({"spacing": (1.0, math.nan, 1.0)}, "spacing must be three positive numbers"),
        ({"spacing": (1.0, -1.0, 1.0)}, "spacing must be three positive numbers"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"level": 1.5}, r"level must be in \[0, 1\], got 1.5"),
        ({"level": -0.1}, r"level must be in \[0, 1\]"),
        (
            {"shape": (8, 8, 8), "spacing": (1.0, 5.0, 1.0)},
            r"must leave some lung, got voxels of 4\d\.\d x 2",
        ),
    ],
)
def test_chest_refuses(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ls.phantom.chest_ct(**{"shape": (16, 16, 16), **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kwargs", [{"seed": 1.0}, {"seed": True}, {"shape": (8.0, 8.0, 8.0)}, {"spacing": 1.0}, {"spacing": None}]
)
def test_chest_refuses_wrong_kinds(kwargs: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        ls.phantom.chest_ct(**{"shape": (16, 16, 16), **kwargs})  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- parts


def test_tree_without_balance_is_the_minimum_spanning_tree() -> None:
    points = np.random.default_rng(0).uniform(0, 100, (60, 3))
    tree = grow_tree(
        (0.0, 0.0, 0.0), points, np.zeros(60, np.int8), tip_radius=0.5, root_radius=9.0, balance=0.0
    )
    nodes = np.concatenate([np.zeros((1, 3)), points])
    length = np.linalg.norm(nodes[1:] - nodes[tree.parents[1:]], axis=1).sum()
    # distances are sums of float64 squares in two orders
    assert length == pytest.approx(minimum_spanning_tree(cdist(nodes, nodes)).sum(), rel=1e-12)


def test_radii_follow_murray_and_taper() -> None:
    points = np.random.default_rng(1).uniform(-50, 50, (200, 3))
    tree = grow_tree((0.0, 0.0, 0.0), points, np.zeros(200, np.int8), tip_radius=0.5, root_radius=99.0)
    children = [np.flatnonzero(tree.parents[1:] == node) + 1 for node in range(201)]
    for node, own in enumerate(children):
        if len(own):
            # float64 powers and roots
            assert tree.radii[node] ** 2.75 == pytest.approx((tree.radii[own] ** 2.75).sum(), rel=1e-9)
        else:
            assert tree.radii[node] == pytest.approx(0.5)
    assert sorted(tree.depth_first) == list(range(201))


def test_branches_keep_to_their_lobe() -> None:
    rng = np.random.default_rng(2)
    points = rng.uniform(0, 100, (300, 3))
    lobes = (points[:, 2] > 50).astype(np.int8)

    def crossings(kinds: np.ndarray) -> int:
        tree = grow_tree((0.0, 0.0, 50.0), points, kinds, tip_radius=0.5, root_radius=9.0)
        parents = tree.parents[1:] - 1
        return int((lobes[parents[parents >= 0]] != lobes[parents >= 0]).sum())

    assert crossings(lobes) < 0.5 * crossings(np.zeros(300, np.int8))


@pytest.mark.parametrize("radius", [0.3, 0.7, 1.5, 4.0])
def test_tube_has_the_brightness_of_a_blurred_disc(radius: float) -> None:
    blur, step, fine = 0.6, 0.5, 10
    out = np.zeros((9, 41, 41), np.float32)
    along_z = np.array([[10.0, 10.0, -20.0, 10.0, 10.0, 40.0, radius, radius]])
    draw_tubes(out, along_z, np.zeros(3), np.full(3, step), blur)
    # oracle: a disc on a ten times finer grid, blurred
    at = (np.arange(41 * fine) - (fine - 1) / 2) * step / fine - 10.0
    disc = (np.hypot(at[:, None], at[None, :]) <= radius).astype(float)
    exact = ndimage.gaussian_filter(disc, blur / (step / fine))[fine // 2 :: fine, fine // 2 :: fine]
    # the peak is exact but for the oracle's raster; the flank is an error function, not the disc's own
    assert out[4].max() == pytest.approx(exact.max(), rel=0.02)
    assert np.abs(out[4] - exact).max() < 0.13
    assert (out == out[4]).all(), "a tube along z is the same in every slice"


def test_tubes_start_no_thicker_than_their_branch() -> None:
    points = np.random.default_rng(1).uniform(-50, 50, (100, 3))
    tree = grow_tree((0.0, 0.0, 0.0), points, np.zeros(100, np.int8), tip_radius=0.5, root_radius=9.0)
    rows = tubes(tree)
    assert rows.shape == (100, 8)
    assert (rows[:, 6] <= 1.15 * rows[:, 7] + 1e-12).all()  # a rounding
    assert len(tubes(tree, tree.radii > 1.0)) == (tree.radii[1:] > 1.0).sum()


def test_smooth_field_is_fixed_in_space_with_unit_variance() -> None:
    field = SmoothField(np.random.default_rng(0), (0.0, 0.0, 0.0), (300.0, 300.0, 300.0), 5.0)
    coarse, fine = np.arange(0, 300, 2.0), np.arange(0, 300, 1.0)
    # float32 sums of 64 terms around 1, whose order depends on the size of the matrix product
    np.testing.assert_allclose(
        field.plane(7.0, fine, fine)[::2, ::2], field.plane(7.0, coarse, coarse), rtol=0, atol=1e-5
    )
    values = np.stack([field.plane(z, coarse, coarse) for z in np.arange(0, 300, 7.0)])
    # some 200 000 independent cells would give 0.2 %; the slices hold a tenth of them
    assert values.std() == pytest.approx(1, rel=0.03)


def test_scanner_noise_is_correlated() -> None:
    noise = scanner_noise(np.random.default_rng(0), (8, 128, 128), (1.0, 0.8, 0.8), grain=0.8, sharpness=0.3)
    assert noise.std() == pytest.approx(1, rel=1e-4)  # normalised; float32 sums
    assert np.corrcoef(noise[:, :, 1:].ravel(), noise[:, :, :-1].ravel())[0, 1] > 0.4
    assert abs(np.corrcoef(noise[:, :, 6:].ravel(), noise[:, :, :-6].ravel())[0, 1]) < 0.1


# ------------------------------------------------------------------------------------------ pneumonia


def uniform_lung(chest: ls.phantom.ChestCT) -> np.ndarray:
    """HU with noiseless typical parenchyma, where the definition of the lesion mask can be read off."""
    return np.where(chest.lung_mask, -850, 40).astype(np.int16)


@pytest.mark.parametrize("seed", range(4))
def test_lesion_mask_is_where_parenchyma_gains_100_hu(chest: ls.phantom.ChestCT, seed: int) -> None:
    hu = uniform_lung(chest)
    ill = ls.phantom.add_pneumonia(hu, chest.lung_mask, chest.spacing, seed)
    np.testing.assert_array_equal(ill.lesion_mask, ill.hu.astype(int) - hu > 100)


@pytest.mark.parametrize("seed", range(4))
def test_pneumonia_adds_density_in_the_lungs_alone(chest: ls.phantom.ChestCT, seed: int) -> None:
    before = chest.hu.copy()
    ill = ls.phantom.add_pneumonia(chest.hu, chest.lung_mask, chest.spacing, seed)
    np.testing.assert_array_equal(chest.hu, before)
    np.testing.assert_array_equal(ill.hu[~chest.lung_mask], chest.hu[~chest.lung_mask])
    assert (ill.hu >= chest.hu).all()
    assert ill.hu.dtype == np.int16
    assert ill.lesion_mask.dtype == np.bool_
    assert not (ill.lesion_mask & ~chest.lung_mask).any()
    vessel = chest.lung_mask & (chest.hu >= 40)
    np.testing.assert_array_equal(ill.hu[vessel], chest.hu[vessel])
    gain = (ill.hu - chest.hu)[ill.lesion_mask & (chest.hu < -800)]
    assert (gain > 90).all(), "100 HU at -850 is 94 HU at -800"


@pytest.mark.parametrize("severity", [0.03, 0.15, 0.5])
def test_severity_is_the_share_of_the_lung(chest: ls.phantom.ChestCT, severity: float) -> None:
    for seed in range(3):
        ill = ls.phantom.add_pneumonia(chest.hu, chest.lung_mask, chest.spacing, seed, severity=severity)
        share = ill.lesion_mask.sum() / chest.lung_mask.sum()
        # margins move the haze's edge, and lines reach past it
        assert share == pytest.approx(severity, abs=0.03)


def test_pneumonia_is_peripheral_and_dorsal(chest: ls.phantom.ChestCT) -> None:
    depth = ndimage.distance_transform_edt(chest.lung_mask, sampling=chest.spacing)
    row = np.broadcast_to(np.arange(WHOLE[1])[:, None], WHOLE)
    lesions = [
        ls.phantom.add_pneumonia(chest.hu, chest.lung_mask, chest.spacing, seed).lesion_mask
        for seed in range(6)
    ]
    lung = chest.lung_mask
    assert np.mean([depth[lesion].mean() for lesion in lesions]) < 0.8 * depth[lung].mean()
    assert np.mean([row[lesion].mean() for lesion in lesions]) > row[lung].mean()


def test_diseases_have_ground_glass_and_consolidation(chest: ls.phantom.ChestCT) -> None:
    hu = uniform_lung(chest)
    glass, dense = [], []
    for seed in range(8):
        values = ls.phantom.add_pneumonia(hu, chest.lung_mask, chest.spacing, seed).hu[chest.lung_mask]
        values = values[values > -750]
        glass.append((values < -300).mean())
        dense.append((values > -150).mean())
    assert np.mean(glass) > 0.5
    assert max(dense) > 0.05
    assert min(dense) < max(dense), "diseases differ"


def test_diseases_are_reproducible_and_differ(chest: ls.phantom.ChestCT) -> None:
    one, again, two = (
        ls.phantom.add_pneumonia(chest.hu, chest.lung_mask, chest.spacing, seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.hu, again.hu)
    np.testing.assert_array_equal(one.lesion_mask, again.lesion_mask)
    both = (one.lesion_mask & two.lesion_mask).sum()
    assert both < 0.9 * one.lesion_mask.sum()


def test_pneumonia_takes_other_types(chest: ls.phantom.ChestCT) -> None:
    expected = ls.phantom.add_pneumonia(chest.hu, chest.lung_mask, chest.spacing)
    given_floats = ls.phantom.add_pneumonia(
        chest.hu.astype(np.float32), chest.lung_mask.astype(np.uint8), chest.spacing
    )
    np.testing.assert_array_equal(expected.hu, given_floats.hu)


def test_a_single_voxel_of_lung() -> None:
    mask = np.zeros((3, 4, 5), bool)
    mask[1, 2, 2] = True
    ill = ls.phantom.add_pneumonia(np.full(mask.shape, -850), mask, (1.0, 1.0, 1.0))
    assert not (ill.lesion_mask & ~mask).any()


HU, MASK = np.full((8, 8, 8), -850, np.int16), np.ones((8, 8, 8), bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hu": HU[0]}, ValueError, r"hu must be \(z, y, x\), got shape \(8, 8\)"),
        ({"lung_mask": MASK[0]}, ValueError, r"lung_mask must be \(z, y, x\)"),
        ({"lung_mask": MASK[:4]}, ValueError, "lung_mask must have the shape of hu"),
        ({"lung_mask": ~MASK}, ValueError, "lung_mask must not be empty"),
        ({"lung_mask": 2 * MASK}, ValueError, "lung_mask must be binary"),
        ({"lung_mask": MASK.tolist()}, TypeError, "lung_mask must be a NumPy array"),
        ({"hu": HU.astype(complex)}, TypeError, "hu must be integers or floats"),
        ({"hu": np.where(MASK, np.nan, 0.0)}, ValueError, "hu must be finite"),
        ({"spacing": (0.0, 1.0, 1.0)}, ValueError, "spacing must be three positive numbers"),
        ({"seed": -3}, ValueError, "seed must be >= 0, got -3"),
        ({"severity": 0.0}, ValueError, r"severity must be in \(0, 0.9\], got 0.0"),
        ({"severity": 1.0}, ValueError, "severity must be in"),
        ({"severity": math.nan}, ValueError, "severity must be in"),
    ],
)
def test_pneumonia_refuses(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"hu": HU, "lung_mask": MASK, "spacing": (1.0, 1.0, 1.0), **change}
    with pytest.raises(error, match=message):
        ls.phantom.add_pneumonia(**arguments)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- independence


def test_phantom_shares_no_code_with_the_generator() -> None:
    """Every import of its modules: itself, how Numba's code is kept, libraries, the standard library."""
    folder = Path(ls.phantom.__file__).parent
    allowed = {"numpy", "scipy", "numba", "math", "typing", "collections", "dataclasses", "__future__"}
    modules = list(folder.glob("*.py"))
    assert len(modules) > 3
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name}: relative import"
                names = [node.module or ""]
            for name in names:
                own = name.startswith("lesionsynth.phantom") or name == "lesionsynth._cache"
                ok = own or name.split(".")[0] in allowed
                assert ok, f"{path.name} imports {name}"
