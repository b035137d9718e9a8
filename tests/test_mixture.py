"""Mixtures of lesions and flat blobs: a sample of a mixture is a sample of one of its parts, bit for bit."""

from __future__ import annotations

import doctest
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import stats

import lesionsynth as ls
import lesionsynth.config
from lesionsynth.cpu.philox import plan_uniforms
from lesionsynth.drawing import OF_SAMPLE
from lesionsynth.sampling import UNIFORMS_PER_BLOB, draw_part
from tests.cuda_host.shim import compiler
from tests.plans import small_config
from tests.test_cuda_render import agree, host
from tests.tolerances import KS_LEVEL

PAPER = small_config()
DARK = small_config(mode="min", texture=ls.Texture(sigma_a=(1.0, 6.0), mu0=(0.7, 0.9)))
GLASS = small_config(
    mode="blend", alpha=(0.2, 0.6), edge=2.0, lengths="mm", spacing=(2.0, 1.0, 1.0), hu_threshold=-300.0
)
PARTS = (
    ls.Part(name="paper", share=5, lesions=PAPER),
    ls.Part(name="dark", share=2, lesions=DARK),
    ls.Part(name="glass", share=3, lesions=GLASS),
)
BRIGHT = ls.LesionConfig(
    texture=ls.Texture(level_hu=(150.0, 200.0)), hu_range=(-160.0, 240.0), hu_threshold=90
)
"""Not in the window of a lung."""
MIXED = ls.LesionConfig(mixture=PARTS, hu_threshold=-600.0, connectivity=6, spacing=(1.5, 1.0, 1.0))


def kind_of(seed: int, index: int) -> int:
    """Which part a sample is of, as it is drawn."""
    words = plan_uniforms(seed, index, OF_SAMPLE, 1, UNIFORMS_PER_BLOB)[0]
    return MIXED.parts.index(draw_part(MIXED, words))


def alone(part: int, **more) -> ls.LesionConfig:
    """The part with what the mixture decides for all."""
    shared = {"hu_threshold": -600.0, "connectivity": 6, "spacing": (1.5, 1.0, 1.0)}
    return replace(PARTS[part].lesions, **shared, **more)


def test_parts_have_their_shares() -> None:
    counts = Counter(kind_of(3, index) for index in range(4000))
    expected = np.array([5, 2, 3]) / 10 * 4000
    assert stats.chisquare([counts[k] for k in range(3)], expected).pvalue > KS_LEVEL


@given(seed=st.integers(0, 2**32 - 1), index=st.integers(0, 2**32 - 1), fraction=st.floats(0.01, 1.0))
def test_a_sample_is_that_of_its_part(seed, index, fraction) -> None:
    plan = ls.LesionSynthesizer(MIXED, seed=seed).sample(index=index, lung_fraction=fraction)
    part = alone(kind_of(seed, index))
    assert plan == ls.LesionSynthesizer(part, seed=seed).sample(index=index, lung_fraction=fraction)
    assert (plan.tau, plan.connectivity) == (ls.threshold(-600.0), 6)
    assert plan.mode == part.mode
    assert plan.scale == ((1.5, 1.0, 1.0) if part.lengths == "mm" else (1.0, 1.0, 1.0))


@given(st.permutations(range(8)), st.booleans())
def test_a_batch_is_its_samples(lungs, order, given_fractions) -> None:
    image, mask = lungs
    fractions = [0.3 + 0.05 * k for k in order] if given_fractions else None
    synth = ls.LesionSynthesizer(MIXED, seed=4)
    batch = synth(np.stack([image] * 8), np.stack([mask] * 8), index=order, lung_fraction=fractions)
    assert {plan.mode for plan in batch.plan} == {"max", "min", "blend"}
    for k, index in enumerate(order):
        own = None if fractions is None else fractions[k]
        one = ls.LesionSynthesizer(alone(kind_of(4, index)), seed=4)(
            image, mask, index=index, lung_fraction=own
        )
        assert batch.plan[k] == one.plan
        for name in ("image", "target", "labels"):
            assert_array_equal(getattr(batch, name)[k], getattr(one, name))


@pytest.mark.skipif(compiler() is None, reason="the shim needs g++, which is not installed")
def test_the_kernels_take_a_batch_of_several_kinds(lungs) -> None:
    image, mask = lungs
    images, masks = np.stack([image] * 8), np.stack([mask] * 8)
    plans = ls.LesionSynthesizer(MIXED, seed=4).sample(index=range(8), lung_fraction=0.6)
    assert len({plan.mode for plan in plans}) == 3
    agree(host(), plans, images, masks)


def test_a_part_with_a_load_asks_for_the_mask(lungs) -> None:
    image, mask = lungs
    loaded = replace(PAPER, load=(0.1, 0.1))
    config = ls.LesionConfig(mixture=(ls.Part(share=1, lesions=loaded), ls.Part(share=1, lesions=PAPER)))
    synth = ls.LesionSynthesizer(config, seed=1)
    with pytest.raises(ValueError, match="lung_mask must be given for a configuration with a load"):
        synth.sample(index=0)
    plans = [synth.sample(index=k, lung_mask=mask, lung_fraction=1.0) for k in range(12)]
    assert {plan.load for plan in plans} == {None, 0.1}
    for k, plan in enumerate(plans):
        pair = synth(image, mask, index=k, lung_fraction=1.0)
        assert pair.plan.blobs == plan.blobs
        if plan.load is not None:
            assert (pair.labels > 0).sum() / mask.sum() == pytest.approx(0.1, rel=0.1)


def test_the_example_of_part() -> None:
    assert doctest.testmod(lesionsynth.config).attempted >= 5
    assert doctest.testmod(lesionsynth.config).failed == 0


def test_replace_reaches_the_parts() -> None:
    other = replace(MIXED, hu_threshold=-450.0)
    assert {part.hu_threshold for part in other.parts} == {-450.0}
    assert {part.hu_threshold for part in MIXED.parts} == {-600.0}
    assert [part.lengths for part in MIXED.parts] == ["voxel", "voxel", "mm"]
    assert {part.lengths for part in replace(MIXED, lengths="mm").parts} == {"mm"}
    assert PAPER.parts == (PAPER,)


@pytest.mark.parametrize(
    ("error", "make", "message"),
    [
        (ValueError, lambda: ls.Part(share=0.0, lesions=PAPER), "share must be > 0 and finite, got 0.0"),
        (ValueError, lambda: ls.Part(share=np.inf, lesions=PAPER), "share must be > 0 and finite, got inf"),
        (ValueError, lambda: ls.Part(share="1", lesions=PAPER), "share must be float, got '1'"),
        (TypeError, lambda: ls.Part(share=1, lesions="faint"), "lesions must be a LesionConfig, got 'faint'"),
        (ValueError, lambda: ls.Part(share=1, lesions=MIXED), "no mixture of their own, got 3 parts"),
        (ValueError, lambda: ls.LesionConfig(mixture=(PAPER,)), "mixture.*must be"),
        (ValueError, lambda: ls.LesionConfig(mixture=PARTS[0]), "mixture must be"),
        (
            ValueError,
            lambda: ls.LesionConfig(mixture=(PARTS[0], ls.Part(share=1, lesions=BRIGHT))),
            r"mixture\[1\]: texture.level_hu must lie within the window \(-800.0, 100.0\), got",
        ),
    ],
)
def test_what_is_no_mixture(error, make, message) -> None:
    with pytest.raises(error, match=message):
        make()


# --- flat blobs ---


def test_flatness_is_drawn_of_the_first_semi_axis_alone() -> None:
    kind = ls.BlobClass(count=(6, 6), radius=(4.0, 4.0), flatness=(0.25, 0.75), scale_by_lung=False)
    config = ls.LesionConfig(small=kind, medium=None, large=None)
    plans = ls.LesionSynthesizer(config, seed=2).sample(index=range(300))
    axes = np.array([b.semi_axes for plan in plans for b in plan.blobs])
    assert (axes[:, 1:] == 4.0).all()
    assert stats.kstest(axes[:, 0] / 4.0, stats.uniform(0.25, 0.5).cdf).pvalue > KS_LEVEL


def test_flatness_of_one_changes_nothing() -> None:
    plain = ls.BlobClass(count=(2, 5), radius=(2.0, 6.0))
    plans = [
        ls.LesionSynthesizer(replace(PAPER, small=kind), seed=2).sample(index=range(20))
        for kind in (plain, replace(plain, flatness=(1.0, 1.0)))
    ]
    assert plans[0] == plans[1]


@given(flat=st.floats(0.05, 0.5), seed=st.integers(0, 2**32 - 1))
def test_a_plate_is_as_thin_as_it_says(flat, seed) -> None:
    """Its volume is that of the ellipsoid, and its least width along any axis is no more than its own."""
    kind = ls.BlobClass(count=(1, 1), radius=(14.0, 14.0), flatness=(flat, flat), scale_by_lung=False)
    still = ls.Warp(amplitude=(0.0, 0.0), correlation=(1.0, 1.0))
    config = ls.LesionConfig(small=kind, medium=None, large=None, warp=still)
    organ = np.ones((64, 64, 64), bool)
    synth = ls.LesionSynthesizer(config, seed=seed)
    (blob,) = synth.sample(index=0).blobs
    centred = replace(synth.sample(index=0), blobs=(replace(blob, center=(32, 32, 32)),))
    found = np.argwhere(synth.render(centred, np.zeros(organ.shape, np.float32), organ).labels > 0)
    assert len(found) == pytest.approx(4 / 3 * np.pi * 14**3 * flat, rel=0.15, abs=60)  # voxels of its edge
    spread = np.sqrt(np.linalg.eigvalsh(np.cov(found.T)) * 5)  # semi-axes of a solid ellipsoid
    assert spread[0] == pytest.approx(14 * flat, abs=0.6)
    assert spread[1:] == pytest.approx([14, 14], abs=0.7)


@pytest.mark.parametrize(
    ("flatness", "message"),
    [
        ((0.001, 1.0), "flatness must be >= 0.01, got"),
        ((1.0, 200.0), "flatness must be <= 100, got"),
        ((0.5, 0.2), r"flatness must be \(low, high\) with low <= high, got"),
        (0.5, r"flatness must be a \(low, high\) pair, got 0.5"),
    ],
)
def test_what_is_no_flatness(flatness, message) -> None:
    with pytest.raises(ValueError, match=message):
        ls.BlobClass(count=(1, 2), radius=(1.0, 2.0), flatness=flatness)
    with pytest.raises(ValueError, match=r"radius \* flatness must be <= 10000, got"):
        ls.BlobClass(count=(1, 2), radius=(1.0, 5000.0), flatness=(1.0, 3.0))


# --- the preset ---

SAID = {
    "ground glass": (-760.0, -400.0),
    "nodules": (-300.0, 60.0),
    "masses": (-100.0, 60.0),
    "part-solid": (-450.0, -100.0),
    "consolidation": (-200.0, 60.0),
    "pleura": (-600.0, 60.0),
    "lobar": (-600.0, 60.0),
}
"""Mean HU of a kind's lesions, as the docstring says."""


def test_the_kinds_of_lung_disease_are_what_it_says() -> None:
    config = ls.presets.lung_disease()
    assert sum(part.share for part in config.mixture) == pytest.approx(1.0)
    text = str(ls.presets.lung_disease.__doc__)
    for part in config.mixture:
        assert f"- {part.name}, {100 * part.share:.0f} %:" in text
    assert config.hu_threshold == -700.0
    lung = np.full((32, 128, 128), 0.0, np.float32)
    mask = np.ones(lung.shape, bool)
    for part, kind in zip(config.mixture, config.parts, strict=True):
        pairs = [
            ls.LesionSynthesizer(kind, seed=1)(lung, mask, index=k, lung_fraction=0.35) for k in range(5)
        ]
        means = [
            pair.image[pair.labels == c.label].mean() * 900 - 800
            for pair in pairs
            for c in pair.plan.components
            if c.voxels > 200
        ]
        assert len(means) >= 3, part.name
        if part.name in SAID:
            low, high = SAID[part.name]
            assert low - 45 <= min(means) <= max(means) <= high + 45, (part.name, min(means), max(means))
