"""What people set: sizes in mm, levels in HU, numbers, a share of the organ; and λ where nobody says it."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import lesionsynth as ls
from lesionsynth.config import MOST_LOAD, PAPER_LUNG, PAPER_VOXEL
from tests.plans import small_config
from tests.tolerances import KS_LEVEL

COVID = ls.presets.covid_lung()


def organ(shape: tuple[int, int, int] = (20, 60, 64)) -> tuple[np.ndarray, np.ndarray]:
    """Return a dim image and an ellipsoid that nearly fills it."""
    axes = np.meshgrid(*(np.linspace(-1.05, 1.05, n) for n in shape), indexing="ij")
    mask = sum(a * a for a in axes) <= 1.0
    return (0.1 * mask).astype(np.float32), mask


# --- a wanted share of the organ ---


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("load", [0.02, 0.1, 0.3, 0.6])
def test_load_is_met_within_a_tenth(load, seed) -> None:
    image, mask = organ()
    synth = ls.LesionSynthesizer(replace(COVID, load=(load, load)), seed=seed)
    for index in range(4):
        pair = synth(image, mask, index=index)
        share = np.count_nonzero(pair.labels) / np.count_nonzero(mask)
        assert abs(share / load - 1.0) <= 0.1
        assert pair.plan.load == load
        assert pair.plan.blobs


def test_load_is_drawn_uniformly() -> None:
    _, mask = organ((6, 20, 22))
    synth = ls.LesionSynthesizer(replace(small_config(), load=(0.05, 0.4)), seed=3)
    loads = [synth.sample(index=k, lung_mask=mask).load for k in range(300)]
    assert stats.kstest(loads, stats.uniform(0.05, 0.35).cdf).pvalue > KS_LEVEL


@given(index=st.integers(0, 2**32 - 1), load=st.floats(0.02, MOST_LOAD), depth=st.integers(1, 9))
def test_load_of_any_mask(index, load, depth) -> None:
    """Where shells of voxels come and go at once, no other factor meets it either; a call draws that plan."""
    mask = ls.ops.philox_uniform((depth, 14, 15), index) < 0.5
    mask[0, 0, 0] = True
    image = np.float32(0.1) * mask
    synth = ls.LesionSynthesizer(replace(small_config(), load=(load, load)), seed=1)
    drawn = synth.sample(index=index, lung_mask=mask)
    pair = synth(image, mask, index=index)
    assert replace(pair.plan, components=None) == drawn
    assert np.array_equal(synth.render(drawn, image, mask).image, pair.image)

    def error(factor: float) -> float:
        blobs = tuple(
            replace(b, semi_axes=tuple(min(factor * s, 1e4) for s in b.semi_axes)) for b in drawn.blobs
        )
        labels = synth.render(replace(drawn, blobs=blobs), image, mask).labels
        return abs(np.count_nonzero(labels) / np.count_nonzero(mask) / load - 1.0)

    if error(1.0) > 0.1:
        assert min(map(error, np.geomspace(0.8, 1.25, 21))) > 0.03


def test_load_of_a_batch_and_of_an_empty_item() -> None:
    image, mask = organ()
    config = replace(COVID, load=(0.1, 0.2))
    images, masks = np.stack([image, image, 0 * image]), np.stack([mask, mask, np.zeros_like(mask)])
    synth = ls.LesionSynthesizer(config, seed=4, allow_empty=True)
    pair = synth(images, masks, index=[5, 6, 7])
    for k in range(2):
        assert np.array_equal(pair.image[k], synth(image, mask, index=5 + k).image)
    assert not pair.labels[2].any()
    with pytest.raises(ValueError, match="lung_mask must contain at least one voxel"):
        synth(images, masks, index=[5, 6, 7], allow_empty=False)


def test_a_load_with_a_count_keeps_the_count() -> None:
    image, mask = organ()
    config = replace(COVID, load=(0.15, 0.15), count=(4, 4))
    for index in range(4):
        pair = ls.LesionSynthesizer(config)(image, mask, index=index)
        assert len(pair.plan.blobs) == 4
        assert abs(np.count_nonzero(pair.labels) / mask.sum() / 0.15 - 1.0) <= 0.1


def test_a_load_keeps_shapes() -> None:
    """Only radii differ from blobs as drawn, by one factor."""
    _, mask = organ()
    plain, wanted = (ls.LesionSynthesizer(replace(COVID, count=(5, 5), load=x)) for x in (None, (0.2, 0.2)))
    one, two = plain.sample(index=3), wanted.sample(index=3, lung_mask=mask)
    factors = [b.semi_axes[0] / a.semi_axes[0] for a, b in zip(one.blobs, two.blobs, strict=True)]
    assert np.ptp(factors) < 1e-12
    for a, b in zip(one.blobs, two.blobs, strict=True):
        assert replace(b, semi_axes=a.semi_axes) == a


# --- numbers ---


def test_count_is_the_number_of_all() -> None:
    synth = ls.LesionSynthesizer(replace(COVID, count=(2, 6)), seed=0)
    plans = [synth.sample(index=k, lung_fraction=0.01) for k in range(1000)]
    numbers = [len(plan.blobs) for plan in plans]
    share = np.bincount(numbers, minlength=7)[2:] / 1000  # round(U[2, 6]): the ends have half a step
    assert np.abs(share - [1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8]).max() < 4 * math.sqrt(0.25 * 0.75 / 1000)
    radii = np.array([max(b.semi_axes) for plan in plans for b in plan.blobs])
    large = COVID.large.mean_count / sum(c.mean_count for c in COVID.blob_classes)
    assert abs((radii > 32).mean() - large) < 4 * math.sqrt(large / len(radii))


# --- mm and HU ---


def test_radius_mm_is_round_in_mm() -> None:
    ball = ls.BlobClass(count=(1, 1), radius_mm=(6.0, 6.0), scale_by_lung=False)
    still = ls.Warp(amplitude=(0.0, 0.0))
    config = replace(COVID, small=ball, medium=None, large=None, warp=still, spacing=(3.0, 1.0, 0.5))
    assert config.lengths == "mm"
    mask = np.ones((21, 61, 121), bool)
    pair = ls.LesionSynthesizer(config)(0.1 * mask.astype(np.float32), mask, index=4)
    plan = replace(pair.plan, blobs=(replace(pair.plan.blobs[0], center=(10, 30, 60)),), components=None)
    found = np.argwhere(ls.LesionSynthesizer(config).render(plan, 0.1 * mask.astype(np.float32), mask).labels)
    assert (np.ptp(found, axis=0) + 1).tolist() == [5, 13, 25]  # 2 * floor(6 / spacing) + 1


def test_what_radius_mm_needs() -> None:
    in_mm = ls.BlobClass(count=(1, 1), radius_mm=(1.0, 2.0))
    with pytest.raises(ValueError, match="radius_mm must be given by every class or by none"):
        replace(COVID, small=in_mm)
    assert replace(COVID, small=in_mm, lengths="mm").lengths == "mm"
    for both in ({}, {"radius": (1, 2), "radius_mm": (1, 2)}):
        with pytest.raises(ValueError, match="exactly one of radius and radius_mm must be given"):
            ls.BlobClass(count=(1, 1), **both)


@pytest.mark.parametrize(
    ("mode", "texture", "mu0", "weight"),
    [
        ("max", {"level_hu": (-350, -80)}, (0.5, 0.8), (1, 1)),
        ("blend", {"level_hu": (-350, -80)}, (0.5, 0.8), (1, 1)),
        ("min", {"level_hu": (-350, -80)}, (0.2, 0.5), (1, 1)),
        ("add", {"contrast_hu": (45, 90)}, (0.05, 0.1), (1, 1)),
        ("add", {"contrast_hu": (-90, -45)}, (0.05, 0.1), (-1, -1)),
        ("max", {}, (0.4, 0.8), (1, 1)),
    ],
)
def test_levels_in_hu(mode, texture, mu0, weight) -> None:
    config = replace(COVID, mode=mode, texture=ls.Texture(**texture))
    assert config.mu0 == pytest.approx(mu0)
    assert config.weight == weight
    for blob in ls.LesionSynthesizer(config).sample(index=0).blobs:
        assert mu0[0] - 1e-12 <= blob.mu0 <= mu0[1] + 1e-12
        assert blob.weight == weight[0]


BAD = {
    "mode must be one of": {"mode": "median"},
    "alpha must be (1, 1) in mode 'max'": {"alpha": (0.5, 1.0)},
    "alpha must be > 0": {"mode": "blend", "alpha": (0.0, 1.0)},
    "alpha must be <= 1": {"mode": "blend", "alpha": (0.5, 1.5)},
    "edge must be 0 in mode 'min'": {"mode": "min", "edge": 2.0},
    "edge must be in [0, 10000]": {"mode": "add", "edge": -1.0},
    "texture.contrast_hu must be None in mode 'max'": {"texture": ls.Texture(contrast_hu=(1, 2))},
    "texture.level_hu must be None in mode 'add'": {"mode": "add", "texture": ls.Texture(level_hu=(1, 2))},
    "texture.level_hu must lie within the window": {"texture": ls.Texture(level_hu=(50, 200))},
    "texture.contrast_hu must lie within": {"mode": "add", "texture": ls.Texture(contrast_hu=(50, 2000))},
    "load must be >= 1e-05": {"load": (0.0, 0.5)},
    "load must be <= 0.9": {"load": (0.5, 1.0)},
    "count must be <= 1024": {"count": (1, 1025)},
    "load must be None where no class has lesions": {"load": (0.1, 0.2), "small": None, "medium": None,
                                                     "large": None},
    "hu_threshold must lie inside value_range": {"value_range": (-4.0, 8.0)},
    "value_range must be (low, high) with low <= high": {"value_range": (8.0, -4.0)},
}  # fmt: skip


@pytest.mark.parametrize("rule", BAD)
def test_what_a_configuration_refuses(rule) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}.*got"):
        replace(COVID, **BAD[rule])


def test_an_edge_of_too_many_voxels_is_refused_where_the_spacing_is_known() -> None:
    synth = ls.LesionSynthesizer(replace(COVID, mode="blend", edge=65.0))
    with pytest.raises(ValueError, match=r"edge must be at most 64 voxels along each axis, got 65\.0"):
        synth.sample(index=0)
    thin = ls.LesionSynthesizer(replace(COVID, mode="blend", edge=30.0, lengths="mm"))
    thin.sample(index=0)
    with pytest.raises(ValueError, match=r"with steps \(1\.0, 0\.4, 0\.4\)"):
        thin.sample(index=0, spacing=(1.0, 0.4, 0.4))


def test_what_a_texture_refuses() -> None:
    with pytest.raises(ValueError, match="contrast_hu must not contain 0, got"):
        ls.Texture(contrast_hu=(-10, 10))
    with pytest.raises(ValueError, match=r"at most one of texture\.level_hu and texture\.contrast_hu"):
        ls.Texture(contrast_hu=(10, 20), level_hu=(10, 20))


# --- λ where nobody says it ---


@given(voxels=st.integers(1, 60 * 60), lengths=st.sampled_from(["voxel", "mm"]), size=st.floats(0.3, 40.0))
def test_the_default_fraction_is_the_organ_against_the_paper_s(voxels, lengths, size) -> None:
    mask = np.arange(3600).reshape(1, 60, 60) < voxels
    config = replace(COVID, lengths=lengths)
    plan = ls.LesionSynthesizer(config).sample(index=0, lung_mask=mask, spacing=(size, size, size))
    volume = voxels * (size**3 / PAPER_VOXEL if lengths == "mm" else 1.0)
    share = min(1.0, volume / PAPER_LUNG)
    assert plan.lung_fraction == pytest.approx(share) or share < plan.lung_fraction <= 0.1
    assert plan.blobs


def test_small_patches_are_not_covered() -> None:
    """With λ = 1 the median of these is 1.00."""
    for shape, most in (((16, 32, 32), 0.6), ((32, 64, 64), 0.3), ((96, 96, 96), 0.3)):
        mask = np.ones(shape, bool)
        synth = ls.LesionSynthesizer(COVID, seed=0)
        shares = [(synth(np.float32(0.1) * mask, mask, index=k).labels > 0).mean() for k in range(30)]
        assert np.median(shares) < most
        assert min(shares) > 0


@given(
    index=st.integers(0, 2**32 - 1), mean=st.floats(0.4, 100.0), p=st.floats(0.0, 1.0), scaled=st.booleans()
)
def test_the_default_fraction_gives_every_sample_a_lesion(index, mean, p, scaled) -> None:
    """One where the organ is small, whatever the classes hold; and it is the least λ that does."""
    some = ls.BlobClass(count=(0.5 * mean, 1.5 * mean), radius=(1.0, 2.0), scale_by_lung=scaled)
    rare = ls.BlobClass(probability=p, radius=(1.0, 2.0))
    config = replace(COVID, small=some, medium=None, large=rare)
    synth, mask = ls.LesionSynthesizer(config), np.ones((1, 5, 5), bool)
    plan = synth.sample(index=index, lung_mask=mask)
    whole = synth.sample(index=index, lung_fraction=1.0)
    assert bool(plan.blobs) == bool(whole.blobs)
    assert plan.blobs == synth.sample(index=index, lung_fraction=plan.lung_fraction).blobs
    if whole.blobs and scaled:
        less = plan.lung_fraction * (1 - 1e-9)
        assert len(plan.blobs) <= 1 + (plan.lung_fraction == 1.0)
        assert not synth.sample(index=index, lung_fraction=less).blobs


def test_the_default_fraction_is_per_item_and_the_paper_s_is_there() -> None:
    image, mask = organ()
    images, masks = np.stack([image, image]), np.stack([mask, mask])
    masks[1, :, :30] = False
    synth = ls.LesionSynthesizer(replace(COVID, spacing=(4.0, 2.0, 2.0), lengths="mm"), seed=0)
    one, two = (plan.lung_fraction for plan in synth(images, masks, index=[1, 2]).plan)
    assert 0.1 < two < one < 1.0
    assert synth(images, masks, index=[1, 2], lung_fraction=1).plan[1].lung_fraction == 1.0
    assert synth.sample(index=1).lung_fraction == 1.0


def test_what_a_sample_with_a_mask_refuses() -> None:
    synth = ls.LesionSynthesizer(replace(COVID, load=(0.1, 0.1)))
    with pytest.raises(ValueError, match="lung_mask must be given for a configuration with a load, got None"):
        synth.sample(index=0)
    with pytest.raises(ValueError, match="lung_mask must be binary"):
        synth.sample(index=0, lung_mask=np.full((2, 3, 4), 2))
    with pytest.raises(ValueError, match=r"lung_mask must have the shape \(2, 3, 5\), got \(2, 3, 4\)"):
        synth.sample(index=0, lung_mask=np.ones((2, 3, 4), bool), shape=(2, 3, 5))
    with pytest.raises(ValueError, match="lung_mask must be"):
        synth.sample(index=0, lung_mask=np.ones((3, 4), bool))


# --- lesions that change next to nothing ---


def bright(level: float) -> tuple[np.ndarray, np.ndarray]:
    mask = np.ones((16, 40, 40), bool)
    return np.full(mask.shape, level, np.float32), mask


def test_lesions_that_change_next_to_nothing_are_told_once() -> None:
    synth = ls.LesionSynthesizer(replace(small_config(), count=(5, 5)), seed=0)
    with pytest.warns(UserWarning, match="of .* lesions change under 5 % of their voxels") as told:
        pair = synth(*bright(1.0), index=0)
    assert told[0].filename == __file__
    assert all(c.changed == 0 for c in pair.plan.components)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        synth(*bright(1.0), index=1)
        ls.LesionSynthesizer(small_config(), seed=0)(*bright(0.1), index=0)


def test_changed_voxels_are_those_that_differ() -> None:
    image, mask = bright(0.35)
    pair = ls.LesionSynthesizer(replace(small_config(), count=(5, 5)), seed=0)(image, mask, index=2)
    for component in pair.plan.components:
        lesion = pair.labels == component.label
        assert component.changed == np.count_nonzero(pair.image[lesion] != image[lesion])
        assert component.voxels == lesion.sum()
    assert sum(c.changed for c in pair.plan.components) > 0
