"""What follows for a pair when plan, image or mask change in a known way, and what lengths in mm mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import lesionsynth as ls
from tests.plans import SHAPE, blob, plan, renderer, small_config
from tests.test_generator_properties import WORD, synthesizer

# --- what may be changed without changing the answer, and what follows when it is ---


def fixed_centres(drawn: ls.LesionPlan, mask: np.ndarray) -> ls.LesionPlan:
    """Replace each blob's rank in the mask by the voxel it names."""
    inside = np.argwhere(mask)
    centres = [tuple(int(c) for c in inside[int(b.position * len(inside))]) for b in drawn.blobs]
    return replace(
        drawn, blobs=tuple(replace(b, center=c) for b, c in zip(drawn.blobs, centres, strict=True))
    )


@given(index=WORD)
def test_position_and_centre_say_the_same(index, lungs) -> None:
    """A plan whose positions are written out as centres renders alike."""
    image, mask = lungs
    drawn = synthesizer().sample(index=index, shape=SHAPE)
    a, b = (
        synthesizer().render(drawn, image, mask),
        synthesizer().render(fixed_centres(drawn, mask), image, mask),
    )
    assert_array_equal(a.image, b.image)
    assert_array_equal(a.labels, b.labels)


@given(index=WORD, seed=st.integers(0, 99))
def test_lesions_do_not_depend_on_the_image(index, seed, lungs) -> None:
    """Labels and B follow from plan and mask; A = max(H, B) for any H, so it is B where H is 0."""
    image, mask = lungs
    other = np.random.default_rng(seed).random(SHAPE).astype(np.float32)
    drawn = synthesizer().sample(index=index, shape=SHAPE)
    empty, pair = (synthesizer().render(drawn, h, mask) for h in (np.zeros_like(image), other))
    assert_array_equal(pair.labels, empty.labels)
    assert_array_equal(pair.image, np.maximum(other, empty.image))
    bright = synthesizer().render(drawn, np.ones_like(image), mask)
    assert (bright.image == 1).all()
    assert_array_equal(bright.target, bright.labels == 0)


@given(index=WORD)
def test_mask_far_from_all_blobs_does_not_matter(index, lungs) -> None:
    """With centres written out, lung that no blob reaches can be taken away, or added."""
    image, mask = lungs
    drawn = fixed_centres(synthesizer().sample(index=index, lung_fraction=0.3, shape=SHAPE), mask)
    expected = synthesizer().render(drawn, image, mask)
    if not expected.labels.any():
        return
    less = synthesizer().render(drawn, image, mask & (expected.labels > 0))
    assert_array_equal(less.labels, expected.labels)
    assert_array_equal(less.image, expected.image)
    everywhere = synthesizer().render(drawn, image, np.ones_like(mask)).labels > 0
    more = synthesizer().render(drawn, image, mask | ~everywhere)
    assert_array_equal(more.labels, expected.labels)
    assert_array_equal(more.image, expected.image)


def test_background_around_the_volume_does_not_matter(lungs) -> None:
    """Slices above and rows behind, outside the lung, leave places and labels alone: counters are
    coordinates.

    The low corner stays, so that every voxel keeps its coordinates.
    """
    image, mask = lungs
    padding = ((0, 3), (0, 5), (0, 2))
    drawn = replace(synthesizer().sample(index=4), shape=None)
    small = synthesizer().render(drawn, image, mask)
    large = synthesizer().render(drawn, np.pad(image, padding), np.pad(mask, padding))
    for name in ("image", "target", "labels"):
        assert_array_equal(getattr(large, name)[:12, :40, :44], getattr(small, name))
        assert not getattr(large, name)[12:].any()


def test_each_lesion_is_rendered_alone(lungs) -> None:
    """Without the other components in its plan a lesion is the same: Philox is keyed by blob."""
    image, mask = lungs
    whole = synthesizer()(image, mask, index=12)
    assert len(whole.plan.components) > 2
    for component in whole.plan.components:
        alone = replace(
            whole.plan, blobs=tuple(whole.plan.blobs[k] for k in component.blobs), components=None
        )
        part = synthesizer().render(alone, image, mask)
        lesion = whole.labels == component.label
        assert_array_equal(part.labels > 0, lesion)
        assert_array_equal(part.image[lesion], whole.image[lesion])


def test_other_texture_draws_leave_the_shape(lungs) -> None:
    """Fields are streams of their own: σ, a and μ0 touch no label, and the warp no salt."""
    image, mask = lungs
    one = blob(warp_amplitude=0.7)
    base = renderer().render(plan(one), image, mask)
    for change in ({"sigma_a": 5.0}, {"sigma_b": 3.0}, {"mu0": 0.8}, {"a_low": 0.1}):
        other = renderer().render(plan(replace(one, **change)), image, mask)
        assert_array_equal(other.labels, base.labels)
        assert not np.array_equal(other.image, base.image)


@pytest.mark.parametrize("name", ["seed", "index"])
def test_every_word_of_the_key_matters(name, lungs) -> None:
    """The same blobs under another seed or index: other noise, and another outline where they are warped."""
    image, mask = np.zeros_like(lungs[0]), lungs[1]
    for amplitude, outline in ((0.0, False), (0.9, True)):
        base = plan(blob(warp_amplitude=amplitude))
        for value in (getattr(base, name) + 1, getattr(base, name) + 2**16, getattr(base, name) + 2**31):
            a, b = (renderer().render(p, image, mask) for p in (base, replace(base, **{name: value})))
            assert np.array_equal(a.labels, b.labels) != outline
            assert not np.array_equal(a.image, b.image)


def test_mu0_scales_what_is_not_clipped(lungs) -> None:
    """Doubling μ0 doubles β, and B wherever it stays below 1."""
    image, mask = np.zeros_like(lungs[0]), lungs[1]
    low, high = (renderer().render(plan(blob(mu0=m)), image, mask) for m in (0.3, 0.6))
    assert high.plan.components[0].beta == pytest.approx(
        2 * low.plan.components[0].beta, rel=1e-6
    )  # float32 β
    free = high.image < 1
    np.testing.assert_allclose(high.image[free], 2 * low.image[free], rtol=1e-6)  # two roundings of 6e-8


def test_mean_above_threshold_is_mu0(lungs) -> None:
    """Eq. 6: β b2 above β t has mean μ0, where nothing is clipped."""
    image, mask = np.zeros_like(lungs[0]), lungs[1]
    for mu0 in (0.3, 0.45):
        pair = renderer().render(plan(blob(semi_axes=(4.0, 7.0, 5.0), mu0=mu0, sigma_b=1.3)), image, mask)
        (component,) = pair.plan.components
        values = pair.image[pair.labels > 0].astype(np.float64)
        assert values.max() < 1
        assert not component.beta_fallback
        above = values > 0.2 * component.beta
        assert above.sum() > 50
        assert values[above].mean() == pytest.approx(
            mu0, rel=1e-4
        )  # a voxel on the threshold may fall on either side


# --- units ---


@pytest.mark.parametrize("spacing", [(5.0, 0.8, 0.8), (1.0, 0.8, 0.8), (2.0, 1.0, 0.5)])
def test_lengths_in_mm_are_round_in_space(spacing) -> None:
    """A sphere of 12 mm is 24 mm across along every axis: thick slices do not stretch it."""
    shape = tuple(int(2 * np.ceil(16 / s)) + 1 for s in spacing)
    centre = tuple(n // 2 for n in shape)
    ball = plan(
        blob(semi_axes=(12.0,) * 3, center=centre, rotation=(0.5, 0.5, 0.5, 0.5)), scale=spacing, shape=shape
    )
    labels = renderer().render(ball, np.zeros(shape, np.float32), np.ones(shape, bool)).labels
    for axis, step in enumerate(spacing):
        extent = np.ptp(np.nonzero(labels)[axis]) * step
        assert 24 - 2 * step < extent <= 24
    volume = labels.sum() * np.prod(spacing)
    assert volume == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.1)  # 5 mm slices cut a 24 mm ball roughly


def test_mm_plan_records_its_scale() -> None:
    """A call's spacing goes before the configuration's; the scale of lengths in voxels is 1."""
    thick = ls.LesionSynthesizer(small_config(lengths="mm", spacing=(5.0, 0.7, 0.7)), seed=0)
    assert thick.sample(index=0).scale == (5.0, 0.7, 0.7)
    assert thick.sample(index=0, spacing=(2.5, 0.9, 0.9)).scale == (2.5, 0.9, 0.9)
    assert thick.sample(index=0).blobs == thick.sample(index=0, spacing=(2.5, 0.9, 0.9)).blobs
    assert synthesizer().sample(index=0).scale == (1.0, 1.0, 1.0)


def test_sigma_in_mm_blurs_less_across_thick_slices() -> None:
    """The grain of a lesion is as long in mm along z as in plane: fewer voxels where slices are thick."""
    shape, mask = (24, 48, 48), np.ones((24, 48, 48), bool)
    wide = blob(semi_axes=(200.0,) * 3, center=(12, 24, 24), a_low=0.2, a_high=0.2, sigma_b=3.0, mu0=0.4)
    lesion = (
        renderer()
        .render(plan(wide, scale=(3.0, 1.0, 1.0), shape=shape), np.zeros(shape, np.float32), mask)
        .image
    )
    field = lesion.astype(np.float64) - lesion.mean()

    def correlation(lag: int, axis: int) -> float:
        n = field.shape[axis]
        a, b = field.take(range(n - lag), axis), field.take(range(lag, n), axis)
        return float((a * b).mean() / field.var())

    # White noise under a Gaussian of σ correlates as exp(-lag² / 4σ²): at 3 mm exp(-1/4) = 0.78, both ways.
    assert correlation(1, 0) == pytest.approx(correlation(3, 2), abs=0.08)  # about 500 independent grains
    assert correlation(1, 0) < 0.9
