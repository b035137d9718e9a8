"""Every stage of the generator, and the whole pair, against the float64 restatement in `tests/oracles.py`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import ndimage

import lesionsynth as ls
from lesionsynth.cpu.filters import gaussian_filter
from lesionsynth.cpu.philox import fill_uniform
from tests import oracles
from tests.conftest import draw_lungs
from tests.plans import SHAPE, blob, plan, renderer, small_config, voxel
from tests.tolerances import A2_ERROR, B2_ERROR, BETA_RELATIVE, IMAGE


def agree(
    drawn: ls.LesionPlan, image: np.ndarray, mask: np.ndarray
) -> tuple[ls.LesionPair, oracles.OraclePair]:
    """Render `drawn` both ways and compare everything that comes out."""
    pair = renderer().render(drawn, image, mask)
    expected = oracles.oracle_render(drawn, image, mask)
    assert_array_equal(pair.labels, expected.labels)
    assert_array_equal(pair.target, expected.target)
    assert_array_equal(pair.image[pair.labels == 0], image[pair.labels == 0])
    below, above = expected.image_low - pair.image, pair.image - expected.image_high
    assert max(below.max(), above.max()) <= 0, (
        f"image leaves the enclosure by {max(below.max(), above.max())}"
    )
    assert [c.blobs for c in pair.plan.components] == expected.groups
    for label, (component, b) in enumerate(
        zip(pair.plan.components, expected.textures, strict=True), start=1
    ):
        assert component.label == label
        assert component.voxels == (expected.labels == label).sum()
        assert component.box == tuple((s.start, s.stop) for s in expected.boxes[label - 1])
        assert b.fallback[0] <= component.beta_fallback <= b.fallback[1]
        assert b.beta[0] * (1 - BETA_RELATIVE) <= component.beta <= b.beta[1] * (1 + BETA_RELATIVE)
    return pair, expected


# --- the oracle itself ---


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_oracle_knows_the_published_philox_vectors(counter, key, words) -> None:
    """Known answers of Random123's kat_vectors, philox4x32 10."""
    assert tuple(int(w) for w in oracles.philox4x32_10(counter, key)) == words


def test_the_oracle_rotates_and_interpolates_as_mathematics_says() -> None:
    """A quarter turn about the first axis; splines that sum to one and are 2/3 at a node."""
    half = np.sqrt(0.5)
    turn = oracles.rotation_matrix((half, half, 0.0, 0.0))
    np.testing.assert_allclose(turn @ [0, 1, 0], [0, 0, 1], atol=1e-15)
    t = np.linspace(0, 1, 7)
    np.testing.assert_allclose(sum(oracles.cubic_bspline(t - n) for n in range(-3, 5)), 1, rtol=1e-14)
    np.testing.assert_allclose(oracles.cubic_bspline(np.array([0.0, 1.0, -1.0])), [2 / 3, 1 / 6, 1 / 6])


# --- stages ---


@pytest.mark.parametrize("start", [(0, 0, 0), (3, 5, 7), (65535 - 4, 65535 - 5, 2**20 + 1)])
@pytest.mark.parametrize("key", [(0, 1, 0, 0), (2**32 - 1, 3, 2**32 - 1, 2**32 - 1)])
def test_uniform_field_matches(start, key) -> None:
    """Bit for bit, wherever the box starts within a counter's four words, up to the last coordinate."""
    seed, stream, sample, component = key
    out = np.empty((4, 5, 9), np.float32)
    fill_uniform(out, seed, stream, sample, component, start)
    grid = [np.arange(s, s + n) for s, n in zip(start, out.shape, strict=True)]
    assert_array_equal(out, oracles.uniform_field(seed, stream, sample, component, *grid))
    assert 0 <= out.min() < out.max() < 1


@pytest.mark.parametrize("sigma", [(0.8, 0.8, 0.8), (5.0, 5.0, 5.0), (20.0, 20.0, 20.0), (0.4, 12.0, 2.3)])
@pytest.mark.parametrize("shape", [(12, 30, 26), (1, 7, 40), (3, 2, 2)])
def test_filters_stay_within_the_error_the_oracle_assumes(sigma, shape) -> None:
    """Kernels far longer than the box too: they reflect several times."""
    noise = oracles.uniform_field(1, 2, 3, 4, *map(np.arange, shape))
    for volume in (noise, (noise < 0.2).astype(np.float64), np.ones(shape)):
        got = gaussian_filter(volume.astype(np.float32), sigma)
        expected = ndimage.gaussian_filter(volume, sigma, mode="reflect", truncate=4.0)
        assert np.abs(got - expected).max() <= B2_ERROR


@pytest.mark.parametrize("sigma", [(2.0, 2.0, 2.0), (5.0, 5.0, 5.0), (20.0, 20.0, 20.0), (0.4, 12.0, 2.3)])
@pytest.mark.parametrize("shape", [(12, 30, 26), (1, 7, 40), (5, 8, 9)])
def test_rescaled_noise_stays_within_the_error_the_oracle_assumes(sigma, shape) -> None:
    """What `oracles.probability_map` allows for: a2 but for a shift and a scale."""
    noise = oracles.uniform_field(1, 2, 3, 4, *map(np.arange, shape)) - 0.5
    got = gaussian_filter(noise.astype(np.float32), sigma).astype(np.float64)
    expected = ndimage.gaussian_filter(noise, sigma, mode="reflect", truncate=4.0)
    spread = np.ptp(expected)
    rescaled = (got - got.min()) / np.ptp(got) * spread
    assert np.abs(rescaled - (expected - expected.min())).max() <= 4 * A2_ERROR


def test_position_counts_mask_voxels_in_c_order(lungs) -> None:
    """Every k of |M| can be reached: the first, the last, and the one that u = k / |M| names."""
    image, mask = lungs
    inside = np.argwhere(mask)
    count = len(inside)
    for u, k in (
        (0.0, 0),
        (1 - 2**-53, count - 1),
        ((count // 3 + 0.5) / count, count // 3),
        (0.5, count // 2),
    ):
        one = plan(replace(voxel(0, (0, 0, 0)), center=None, position=u))
        labels = renderer().render(one, image, mask).labels
        assert_array_equal(np.argwhere(labels), inside[k : k + 1])


# --- whole pairs, by hand ---

TURN = (0.8, 0.36, -0.48, 0.0)
CROWD = tuple(
    voxel(k, (2 + 4 * (k // 25), 8 + 6 * (k // 5 % 5), 6 + 3 * (k % 5)))
    if k % 3
    else blob(k, center=(1 + k % 11, 20, 32))
    for k in range(70)
)
BY_HAND = {
    "no blob": plan(),
    "one sphere": plan(blob()),
    "one ellipsoid, turned": plan(blob(semi_axes=(1.5, 7.0, 3.0), rotation=TURN)),
    "one blob, warped": plan(
        blob(semi_axes=(3.0, 6.0, 4.0), rotation=TURN, warp_amplitude=1.0, warp_correlation=0.6)
    ),
    "fine and strong warp, falls apart": plan(
        blob(semi_axes=(6.0, 9.0, 6.0), warp_amplitude=3.0, warp_correlation=0.3, center=(6, 20, 12))
    ),
    "two far apart": plan(blob(0), blob(1, center=(6, 20, 33))),
    "two overlapping": plan(blob(0), blob(1, center=(7, 23, 13), mu0=0.8)),
    "chain through the last": plan(
        blob(0, center=(6, 12, 12)), blob(1, center=(6, 28, 12)), blob(2, semi_axes=(2.0, 9.0, 2.0))
    ),
    "same blob twice": plan(blob(0), blob(1)),
    "components of their own, not in order": plan(blob(7, warp_amplitude=0.5), blob(3, center=(6, 20, 33))),
    "in no lung": plan(blob(0, center=(6, 20, 22), semi_axes=(0.6, 0.6, 0.6)), blob(1)),
    "all outside": plan(blob(0, center=(0, 0, 0), semi_axes=(2.0, 2.0, 2.0))),
    "half outside the lung": plan(blob(0, center=(6, 4, 12), semi_axes=(3.0, 8.0, 8.0))),
    "cut by two faces of the volume": plan(
        blob(0, center=(0, 20, 9), semi_axes=(5.0, 5.0, 9.0), warp_amplitude=0.8),
        blob(1, center=(11, 20, 35)),
    ),
    "one voxel": plan(voxel(0, (6, 20, 12)), voxel(1, (6, 20, 30), a_low=0.0, a_high=0.3)),
    "one voxel, surely bright": plan(voxel(0, (6, 20, 12), a_low=1.0, a_high=1.0)),
    "one row": plan(blob(0, semi_axes=(0.4, 0.4, 5.3))),
    "beta fallback": plan(blob(0, a_low=0.0, a_high=0.15, sigma_b=5.0)),
    "no salt at all": plan(blob(0, a_low=0.0, a_high=0.0)),
    "all salt": plan(blob(0, a_low=1.0, a_high=1.0)),
    "kernels longer than the box": plan(blob(0, sigma_a=20.0, sigma_b=5.0)),
    "seventy blobs": plan(*CROWD),
    "forty blobs": plan(*CROWD[:40]),
    "lengths in mm": plan(
        blob(0, semi_axes=(9.0, 7.0, 8.0), warp_amplitude=0.6),
        blob(1, center=(6, 20, 33)),
        scale=(2.5, 0.7, 0.9),
    ),
    "largest seed and index": plan(blob(0, warp_amplitude=0.7), seed=2**32 - 1, index=2**32 - 1),
    "no volume named": plan(blob(0), shape=None),
    "other thresholds": plan(blob(0), tau=0.6, mean_threshold=0.4),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_plan_by_hand(name, dtype, lungs) -> None:
    """What each plan is for is in its name; the counts that would show it missed its point are below."""
    image, mask = lungs
    agree(BY_HAND[name], image.astype(dtype), mask)


def test_hand_plans_do_what_their_names_say(lungs) -> None:
    """The cases above exercise the paths that they were made for."""
    image, mask = lungs
    groups, pieces, fallback, sizes = {}, {}, {}, {}
    for name, drawn in BY_HAND.items():
        expected = oracles.oracle_render(drawn, image, mask)
        groups[name] = expected.groups
        pieces[name] = ndimage.label(expected.labels == 1, np.ones((3, 3, 3)))[1]
        fallback[name] = [t.fallback[0] for t in expected.textures]
        sizes[name] = np.bincount(expected.labels.ravel())[1:]
    assert groups["no blob"] == groups["all outside"] == []
    assert pieces["fine and strong warp, falls apart"] > 1
    assert groups["two far apart"] == [(0,), (1,)]
    assert groups["two overlapping"] == groups["same blob twice"] == [(0, 1)]
    assert groups["chain through the last"] == [(0, 1, 2)]
    assert groups["in no lung"] == [(1,)]
    assert list(sizes["one voxel"]) == [1, 1]
    assert fallback["beta fallback"] == [True]
    assert fallback["all salt"] == [False]
    assert 10 < len(groups["forty blobs"]) < 40
    assert len(groups["seventy blobs"]) > 32


@pytest.mark.parametrize(
    ("step", "joined_by"), [((0, 0, 1), 6), ((0, 1, 1), 18), ((1, -1, 0), 18), ((-1, 1, -1), 26)]
)
@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_connectivity(step, joined_by, connectivity, lungs) -> None:
    """Voxels that share a face, an edge or a corner merge from connectivity 6, 18 or 26 on."""
    image, mask = lungs
    other = tuple(int(c) for c in np.add((6, 20, 12), step))
    pair, _ = agree(plan(voxel(0, (6, 20, 12)), voxel(1, other), connectivity=connectivity), image, mask)
    assert pair.labels.max() == (1 if connectivity >= joined_by else 2)


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("seed", range(8))
def test_many_touching_voxels(connectivity, seed) -> None:
    """Chains in any order of numbers, blobs on one voxel, contacts on every face: near percolation."""
    rng = np.random.default_rng(seed)
    shape = (3, 5, 7)
    mask, image = np.ones(shape, bool), np.zeros(shape, np.float32)
    count = {6: 45, 18: 22, 26: 16}[connectivity]
    centres = [tuple(int(rng.integers(n)) for n in shape) for _ in range(count)]
    drawn = plan(*(voxel(k, c) for k, c in enumerate(centres)), shape=shape, connectivity=connectivity)
    pair = renderer().render(drawn, image, mask)
    blobs = [oracles.blob_voxels(drawn, b, mask) for b in drawn.blobs]
    groups = oracles.merge(blobs, connectivity)
    assert 1 < len(groups) < count
    assert [c.blobs for c in pair.plan.components] == groups
    for label, group in enumerate(groups, start=1):
        assert_array_equal(pair.labels == label, np.logical_or.reduce([blobs[k] for k in group]))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("side", [0, -1])
def test_blobs_touch_on_the_faces_of_the_volume(axis, side) -> None:
    """Two voxels of the first or the last plane of each axis."""
    shape = (4, 5, 6)
    for across in {0, 1, 2} - {axis}:
        one = [1, 1, 1]
        one[axis] = side % shape[axis]
        other = list(one)
        other[across] += 1
        both = plan(voxel(0, tuple(one)), voxel(1, tuple(other)), shape=shape, connectivity=6)
        pair = renderer().render(both, np.zeros(shape, np.float32), np.ones(shape, bool))
        assert (pair.labels > 0).sum() == 2
        assert pair.labels.max() == 1


def test_box_contains_a_blob_that_its_warp_carries_away() -> None:
    """The displacement is nearly constant and 0.57 of its bound: the blob lies 34 voxels off its centre.

    Found by trying 6000 seeds in the oracle; such draws are too rare for random plans to meet one.
    """
    shape = (31, 15, 90)
    far = blob(semi_axes=(1.0,) * 3, center=(15, 7, 20), warp_amplitude=60.0, warp_correlation=3000.0)
    pair, _ = agree(plan(far, shape=shape, seed=4333), np.zeros(shape, np.float32), np.ones(shape, bool))
    assert np.argwhere(pair.labels)[:, 2].min() > 50


def test_salt_is_drawn_where_v_is_below_a(lungs) -> None:
    """Eq. 2 at equality: v = a has no salt, the next a above has. One voxel has a = a_L, b2 = b1."""
    image, mask = np.zeros_like(lungs[0]), lungs[1]
    at = (6, 20, 12)
    v = float(oracles.uniform_field(5, oracles.SALT, 9, 0, *([c] for c in at))[0, 0, 0])
    for a, bright in ((v, False), (float(np.nextafter(np.float32(v), np.float32(1))), True)):
        pair = renderer().render(plan(voxel(0, at, a_low=a, a_high=a)), image, mask)
        assert pair.image[at] == pytest.approx(0.6 if bright else 0, abs=IMAGE)
        assert pair.plan.components[0].beta_fallback != bright


def test_a_voxel_on_the_threshold_does_not_pass() -> None:
    """Eq. 6, b2 > t: two voxels, one of them salt, and t the greater b2 itself."""
    shape = (1, 1, 2)
    image, mask = np.zeros(shape, np.float32), np.ones(shape, bool)
    drawn = plan(
        blob(semi_axes=(1.2,) * 3, center=(0, 0, 0), a_low=0.5, a_high=0.5, sigma_b=0.5), shape=shape
    )
    for seed in range(20):
        salt = oracles.uniform_field(seed, oracles.SALT, 9, 0, range(1), range(1), range(2)) < 0.5
        if salt.sum() != 1:
            continue
        top = float(gaussian_filter(salt.astype(np.float32), (0.5,) * 3).max())
        below = float(np.nextafter(np.float32(top), np.float32(0)))
        for threshold, falls_back in ((top, True), (below, False)):
            drawn = replace(drawn, seed=seed, mean_threshold=threshold)
            (component,) = renderer().render(drawn, image, mask).plan.components
            assert component.voxels == 2
            assert component.beta_fallback == falls_back
        return
    pytest.fail("no seed has one salt voxel")


def test_blobs_two_voxels_apart_stay_apart(lungs) -> None:
    """The nearest blobs that do not touch."""
    image, mask = lungs
    for step in ((2, 0, 0), (0, 2, 0), (0, 0, -2), (2, 2, 2)):
        other = tuple(int(c) for c in np.add((6, 20, 12), step))
        assert renderer().render(plan(voxel(0, (6, 20, 12)), voxel(1, other)), image, mask).labels.max() == 2


def test_surface_of_the_table_v_sphere() -> None:
    """Radius 12, any rotation: the lattice points with |p|^2 <= 144, 30 of them on the surface exactly."""
    n = np.arange(-14, 15)
    square = n[:, None, None] ** 2 + n[:, None] ** 2 + n**2
    assert (square == 144).sum() == 30
    mask = np.ones(square.shape, bool)
    image = np.zeros(square.shape, np.float32)
    rng = np.random.default_rng(0)
    for _ in range(8):
        turn = rng.standard_normal(4)
        turn = tuple(float(v) for v in turn / np.linalg.norm(turn))
        one = plan(blob(semi_axes=(12.0,) * 3, rotation=turn, center=(14, 14, 14)), shape=mask.shape)
        assert_array_equal(renderer().render(one, image, mask).labels, square <= 144)


# --- whole pairs, drawn ---


@pytest.mark.parametrize("index", range(6))
def test_drawn_plan(index, lungs) -> None:
    """The paper's distributions, a third of the size."""
    image, mask = lungs
    synth = ls.LesionSynthesizer(small_config(), seed=11)
    agree(synth.sample(index=index, shape=image.shape), image, mask)


def test_drawn_plan_in_mm(lungs) -> None:
    """Thick slices: lengths in mm, every axis with a scale of its own."""
    image, mask = lungs
    synth = ls.LesionSynthesizer(small_config(lengths="mm", spacing=(2.0, 0.7, 0.9)), seed=4)
    for index in range(2):
        agree(synth.sample(index=index, shape=image.shape), image, mask)


@pytest.mark.parametrize("name", ["covid_lung", "no_shapes", "no_probability_map", "no_salt_noise", "faint"])
def test_preset(name) -> None:
    """Each preset at the paper's sizes, in a volume that a large blob fills."""
    image, mask = draw_lungs((20, 56, 60), seed=4)
    synth = ls.LesionSynthesizer(getattr(ls.presets, name)(), seed=1)
    agree(synth.sample(index=2, lung_fraction=0.4, shape=image.shape), image, mask)


def test_enclosure_is_seldom_wider_than_the_tolerance(lungs) -> None:
    """Else `agree` would forgive too much: nine lesion voxels in ten are held to twice the tolerance."""
    image, mask = lungs
    synth = ls.LesionSynthesizer(small_config(), seed=11)
    widths = []
    for index in range(6):
        expected = oracles.oracle_render(synth.sample(index=index, shape=image.shape), image, mask)
        widths.append((expected.image_high - expected.image_low)[expected.labels > 0])
    width = np.concatenate(widths)
    assert (width <= 4 * IMAGE).mean() > 0.9


def test_volume_and_mask_kinds(lungs) -> None:
    """A mask of numbers 0 and 1 is the mask; the shape is that of the fixture."""
    image, mask = lungs
    assert image.shape == SHAPE
    drawn = plan(blob(warp_amplitude=0.5))
    expected = renderer().render(drawn, image, mask)
    for kind in (np.uint8, np.int16, np.float32):
        pair = renderer().render(drawn, image, mask.astype(kind))
        assert_array_equal(pair.image, expected.image)
        assert_array_equal(pair.labels, expected.labels)


def test_a_wide_filter_on_a_small_box_keeps_its_range() -> None:
    """The range of a2 is 1e-5 here. Centred noise gives it to 1e-4 of itself; around 1/2 an ulp is 6e-8."""
    from lesionsynth.cpu.backend import CpuStages
    from lesionsynth.cpu.texture import synthesize_textures

    one = blob(semi_axes=(3.2, 3.2, 3.2), center=(6, 8, 9), sigma_a=20.0)
    drawn, mask, stages = plan(one, shape=None), np.ones((12, 16, 18), bool), CpuStages(1)
    _, placed = stages.place(drawn, mask)
    (textures,) = synthesize_textures(drawn, stages.merge(drawn, placed, stages.draw(drawn, placed)), 1)
    box = [
        np.arange(a, a + n) for a, n in zip(*(textures.fields[0][k] for k in ("start", "size")), strict=True)
    ]
    noise = oracles.uniform_field(drawn.seed, oracles.PROBABILITY, drawn.index, one.component, *box)
    spread = np.ptp(ndimage.gaussian_filter(noise, 20.0))
    assert spread < 5e-5
    assert abs(textures.fields[0]["slope"] * spread / (one.a_high - one.a_low) - 1) < 1e-3
