"""Distributions of what is drawn, against PAPER.md III-C and DESIGN.md section 2.

Fixed seeds, so each test passes or fails for good; `KS_LEVEL` bounds the chance that a correct generator
with another layout of its random words would fail. Sampling draws no voxel, so thousands of plans are
cheap.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

import lesionsynth as ls
from tests import oracles
from tests.conftest import draw_lungs
from tests.plans import plan, renderer, small_config, voxel
from tests.tolerances import KS_LEVEL, QUATERNION_NORM

PLANS = 2500


@cache
def drawn(lung_fraction: float, seed: int = 0, count: int = PLANS) -> tuple[ls.LesionPlan, ...]:
    """Plans 0 ... count - 1 of the paper's preset."""
    synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=seed)
    return tuple(synth.sample(index=i, lung_fraction=lung_fraction) for i in range(count))


def sizes(a_plan: ls.LesionPlan) -> tuple[int, int, int]:
    """Count small, medium and large blobs by their semi-axes; none of the ranges overlap but at a point."""
    least = np.array([min(b.semi_axes) for b in a_plan.blobs])
    most = np.array([max(b.semi_axes) for b in a_plan.blobs])
    small, medium, large = (
        (least >= low) & (most <= high) for low, high in ((3.0, 10.0), (10.0, 32.0), (32.0, 64.0))
    )
    assert (small.astype(int) + medium + large == 1).all()
    return int(small.sum()), int(medium.sum()), int(large.sum())


def every(name: str, lung_fraction: float = 1.0) -> np.ndarray:
    """Return one parameter of every blob of every plan."""
    return np.array([getattr(b, name) for p in drawn(lung_fraction) for b in p.blobs])


def is_law(values: np.ndarray, law: object) -> None:
    """Kolmogorov-Smirnov against a frozen SciPy distribution or a distribution function."""
    cdf = law.cdf if hasattr(law, "cdf") else law
    assert stats.kstest(values, cdf).pvalue > KS_LEVEL


def is_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Check range and law of U[low, high]."""
    assert values.min() >= low
    assert values.max() <= high
    is_law(values, stats.uniform(low, high - low))


def are_independent(*columns: np.ndarray) -> None:
    """No rank correlation between any two columns at the level divided by the number of pairs."""
    pairs = [(i, j) for i in range(len(columns)) for j in range(i)]
    for i, j in pairs:
        assert stats.spearmanr(columns[i], columns[j]).pvalue > KS_LEVEL / len(pairs), (i, j)


def rounded_uniform(low: float, high: float) -> dict[int, float]:
    """Probability of each value of round(U[low, high])."""
    law = stats.uniform(low, high - low)
    values = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    return {n: p for n in values if (p := float(law.cdf(n + 0.5) - law.cdf(n - 0.5))) > 0}


# --- counts ---


@pytest.mark.parametrize("lung_fraction", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("size", [0, 1])
def test_number_of_small_and_medium(lung_fraction, size) -> None:
    """N = round(U[5λ, 10λ]): 5 and 10 are half as likely as 6 ... 9 at λ = 1."""
    counts = np.array([sizes(p)[size] for p in drawn(lung_fraction)])
    law = rounded_uniform(5 * lung_fraction, 10 * lung_fraction)
    assert set(counts) <= set(law)
    observed = [(counts == n).sum() for n in law]
    if len(law) == 1:  # λ = 0.1: round(U[0.5, 1]) is always 1
        return
    assert stats.chisquare(observed, np.array(list(law.values())) * len(counts)).pvalue > KS_LEVEL


@pytest.mark.parametrize("lung_fraction", [1.0, 0.5, 0.1])
def test_number_of_large(lung_fraction) -> None:
    """One, with probability 0.2λ."""
    counts = np.array([sizes(p)[2] for p in drawn(lung_fraction)])
    assert set(counts) <= {0, 1}
    assert stats.binomtest(int(counts.sum()), len(counts), 0.2 * lung_fraction).pvalue > KS_LEVEL


def test_counts_are_independent_of_each_other() -> None:
    """N_s, N_m and the large one are drawn on their own."""
    are_independent(*np.array([sizes(p) for p in drawn(1.0)]).T)


def test_at_most_twenty_one() -> None:
    """DESIGN.md section 6: 21 at most, about 15 on average (7.5 + 7.5 + 0.2)."""
    counts = np.array([len(p.blobs) for p in drawn(1.0)])
    assert counts.max() <= 21
    assert abs(counts.mean() - 15.2) < 5 * counts.std() / np.sqrt(len(counts))


# --- ellipsoids ---


@pytest.mark.parametrize(("low", "high"), [(3.0, 10.0), (10.0, 32.0), (32.0, 64.0)])
def test_semi_axes(low, high) -> None:
    """Three independent U[low, high] of each size."""
    axes = np.array([b.semi_axes for p in drawn(1.0) for b in p.blobs])
    axes = axes[(axes.min(1) >= low) & (axes.max(1) <= high)]
    assert len(axes) > 300
    for i in range(3):
        is_uniform(axes[:, i], low, high)
    are_independent(*axes.T)


def test_sphere_preset() -> None:
    """Table V: five undeformed spheres of radius 12, whatever the lung."""
    synth = ls.LesionSynthesizer(ls.presets.no_shapes(), seed=0)
    for lung_fraction in (1.0, 0.2):
        blobs = synth.sample(index=3, lung_fraction=lung_fraction).blobs
        assert [b.semi_axes for b in blobs] == [(12.0, 12.0, 12.0)] * 5
        assert {b.warp_amplitude for b in blobs} == {0.0}


def test_rotation_is_uniform() -> None:
    """Haar measure: every entry of R is U[-1, 1], the angle's law is (θ - sin θ) / π."""
    quaternions = every("rotation")
    np.testing.assert_allclose((quaternions**2).sum(1), 1, atol=QUATERNION_NORM)
    matrices = np.array([oracles.rotation_matrix(q) for q in quaternions])
    for row in range(3):
        for column in range(3):
            is_law(matrices[:, row, column], stats.uniform(-1, 2))
    angle = np.arccos(np.clip((np.trace(matrices, axis1=1, axis2=2) - 1) / 2, -1, 1))
    is_law(angle, lambda t: (t - np.sin(t)) / np.pi)


def test_warp() -> None:
    """Amplitude and correlation uniform in the configuration's ranges, which the paper leaves open."""
    warp = ls.presets.covid_lung().warp
    is_uniform(every("warp_amplitude"), *warp.amplitude)
    is_uniform(every("warp_correlation"), *warp.correlation)


def test_position() -> None:
    """U uniform in [0, 1), no centre named, component numbers 0 ... n - 1."""
    is_uniform(every("position"), 0.0, 1.0)
    for p in drawn(1.0)[:100]:
        assert [b.component for b in p.blobs] == list(range(len(p.blobs)))
        assert {b.center for b in p.blobs} == {None}


# --- texture ---


def test_sigma_a() -> None:
    """U[2, 20] (eq. 7)."""
    is_uniform(every("sigma_a"), 2.0, 20.0)


def test_sigma_b() -> None:
    """U[0.8, 2] with probability 0.7, else U[2, 5] (eq. 4)."""
    values = every("sigma_b")
    low = values < 2.0
    assert stats.binomtest(int(low.sum()), len(values), 0.7).pvalue > KS_LEVEL
    is_uniform(values[low], 0.8, 2.0)
    is_uniform(values[~low], 2.0, 5.0)


def test_mu0() -> None:
    """U[0.4, 0.8] (eq. 6)."""
    is_uniform(every("mu0"), 0.4, 0.8)


def test_probability_bounds() -> None:
    """Uniform on the triangle 0 <= a_L, a_L + 0.15 < a_U <= 0.3 (eq. 8).

    There a_L has the density of the smaller, a_U of the greater of two; given a_U, a_L is uniform.
    """
    low, high = every("a_low"), every("a_high")
    assert low.min() >= 0
    assert high.max() <= 0.3
    assert (high - low).min() > 0.15
    is_law(low, lambda t: 1 - np.clip((0.15 - t) / 0.15, 0, 1) ** 2)
    is_law(high, lambda t: np.clip((t - 0.15) / 0.15, 0, 1) ** 2)
    is_uniform(low / (high - 0.15), 0.0, 1.0)
    are_independent(low / (high - 0.15), high)


def test_table_v_textures() -> None:
    """a(x) = 0.2 everywhere; σ_b = 2 and μ0 = 150 / 255."""
    flat = ls.LesionSynthesizer(ls.presets.no_probability_map(), seed=0).sample(index=0).blobs
    assert {(b.a_low, b.a_high) for b in flat} == {(0.2, 0.2)}
    assert len({b.sigma_b for b in flat}) == len(flat)
    salt = ls.LesionSynthesizer(ls.presets.no_salt_noise(), seed=0).sample(index=0).blobs
    assert {b.sigma_b for b in salt} == {2.0}
    np.testing.assert_allclose([b.mu0 for b in salt], 150 / 255)
    assert len({b.a_low for b in salt}) == len(salt)


def test_parameters_are_independent() -> None:
    """No parameter follows another: each has random words of its own."""
    axes = every("semi_axes")
    # Small blobs alone, else the size class ties the axes to the blob's number and to each other.
    small = axes.max(1) <= 10
    names = ("position", "warp_amplitude", "warp_correlation", "sigma_a", "a_low", "sigma_b", "mu0")
    turned = every("rotation")
    are_independent(*axes[small].T, *(turned[small, i] for i in range(4)), *(every(n)[small] for n in names))


@pytest.mark.parametrize("neighbour", ["index", "seed", "blob"])
def test_neighbours_share_no_randomness(neighbour) -> None:
    """Sample i against i + 1, seed s against s + 1, blob k against k + 1."""
    plans = drawn(1.0)
    if neighbour == "index":
        pairs = [(a.blobs[0], b.blobs[0]) for a, b in pairwise(plans)]
    elif neighbour == "seed":
        pairs = [
            (a.blobs[0], b.blobs[0]) for a, b in zip(drawn(1.0, 0, 1500), drawn(1.0, 1, 1500), strict=True)
        ]
    else:
        pairs = [(a.blobs[0], a.blobs[1]) for a in plans]
    for name in ("position", "sigma_a", "mu0", "warp_amplitude"):
        a, b = (np.array([getattr(pair[i], name) for pair in pairs]) for i in (0, 1))
        assert (a != b).all()
        assert stats.spearmanr(a, b).pvalue > KS_LEVEL / 4


# --- what rendering makes of it ---


def test_centres_are_uniform_over_the_mask() -> None:
    """Every mask voxel is as likely, however thin its part of the mask; no other voxel is chosen."""
    rng = np.random.default_rng(5)
    mask = rng.random((5, 9, 11)) < 0.3
    mask[4] = False
    image = np.zeros(mask.shape, np.float32)
    u = every("position")[:4000]
    hits = np.zeros(mask.shape, int)
    render = renderer().render
    for v in u:
        hits += render(plan(one_voxel_at(float(v)), shape=None), image, mask).labels
    assert hits[~mask].sum() == 0
    assert hits.sum() == len(u)
    assert stats.chisquare(hits[mask]).pvalue > KS_LEVEL


def one_voxel_at(position: float) -> ls.Blob:
    """Return a blob of one voxel, placed by its rank."""
    return ls.Blob(**{**vars(voxel(0, (0, 0, 0))), "center": None, "position": position})


def test_salt_has_the_probability_of_its_map() -> None:
    """With a Gaussian too narrow to blur, B is bright at salt voxels alone: their share is a."""
    image, mask = draw_lungs((12, 40, 44), seed=9)
    image = np.zeros_like(image)
    for share in (0.05, 0.2):
        blob = ls.Blob(
            **{
                **vars(voxel(0, (6, 20, 12))),
                "semi_axes": (40.0, 40.0, 40.0),
                "a_low": share,
                "a_high": share,
                "sigma_b": 0.1,
            }
        )
        pair = renderer().render(plan(blob), image, mask)
        salted, voxels = int((pair.image[pair.labels > 0] > 0).sum()), int(mask.sum())
        assert stats.binomtest(salted, voxels, share).pvalue > KS_LEVEL


def test_warp_moves_the_surface_but_not_the_size_on_average() -> None:
    """Volumes of warped spheres average to the sphere's within 15 %, and they differ from each other."""
    shape = (31, 31, 31)
    mask, image = np.ones(shape, bool), np.zeros(shape, np.float32)
    volumes = []
    for index in range(40):
        blob = ls.Blob(
            **{
                **vars(voxel(0, (15, 15, 15))),
                "semi_axes": (7.0, 7.0, 7.0),
                "warp_amplitude": 0.6,
                "warp_correlation": 0.8,
            }
        )
        volumes.append(
            int((renderer().render(plan(blob, shape=shape, index=index), image, mask).labels > 0).sum())
        )
    assert len(set(volumes)) > 30
    assert 0.85 < np.mean(volumes) / (4 / 3 * np.pi * 7**3) < 1.15


def test_lesions_differ_between_samples() -> None:
    """No two of thirty samples share a lesion mask."""
    image, mask = draw_lungs()
    synth = ls.LesionSynthesizer(small_config(), seed=0)
    assert len({(synth(image, mask, index=i).labels > 0).tobytes() for i in range(30)}) == 30


@pytest.mark.slow
def test_numbers_of_the_design() -> None:
    """DESIGN.md section 6, real size at λ = 1: 15 blobs in 12 components, 0.28 M voxels."""
    shape = (32, 512, 512)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    # 0.8 mm voxels: each lung 120 mm wide and 200 mm deep, 3.2 cm of the middle of the chest.
    mask = np.zeros(shape, bool)
    for centre in (150, 362):
        mask |= ((y - 256) / 125) ** 2 + ((x - centre) / 78) ** 2 + ((z - 16) / 90) ** 2 <= 1
    image = np.zeros(shape, np.float32)
    synth = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)
    blobs, components, voxels, boxes, fallback = [], [], [], [], []
    for index in range(60):
        rendered = synth(image, mask, index=index, lung_fraction=1.0).plan
        blobs.append(len(rendered.blobs))
        components.append(len(rendered.components))
        voxels.append(sum(c.voxels for c in rendered.components))
        boxes.append(sum(np.prod([b - a for a, b in c.box]) for c in rendered.components))
        fallback.extend(c.beta_fallback for c in rendered.components)
    # Ranges cover the standard error of 60 samples (about 5 % for the voxels) and lungs a fifth larger or
    # smaller.
    assert 14.5 < np.mean(blobs) < 16
    assert 10 < np.mean(components) < 13.5
    assert 0.2e6 < np.mean(voxels) < 0.36e6
    assert 0.35e6 < np.mean(boxes) < 0.75e6
    # DESIGN.md section 2 says about one blob in twenty; plain NumPy on undeformed ellipsoids gives 14 % of
    # the small
    # and 8 % of the medium ones, and clipping at the lung's edge makes more small pieces.
    assert 0.07 < np.mean(fallback) < 0.2
