"""Thick slices: the profile against plain loops, the pair against averaging by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("monai")

import torch

import lesionsynth as ls
from normnet.thick import slice_profile, thicken
from tests.conftest import draw_lungs

lengths = st.floats(0.5, 12.0)


def by_sampling(slices: int, spacing: float, thickness: float, phase: float) -> np.ndarray:
    """The same scan by brute force: a fine comb of points, averaged around each centre, then interpolated."""
    fine = 400
    at = (np.arange(slices * fine) + 0.5) * spacing / fine
    owner = np.arange(slices * fine) // fine
    centres, rows = [], []
    for k in range(-2, math.ceil(slices * spacing / thickness) + 2):
        centre = (k + phase) * thickness
        near = np.abs(at - centre) < thickness / 2
        if near.any():
            centres.append(centre)
            rows.append(np.bincount(owner[near], minlength=slices) / near.sum())
    result = np.zeros((slices, slices))
    for i in range(slices):
        z = (i + 0.5) * spacing
        above = [k for k, c in enumerate(centres) if c >= z]
        below = [k for k, c in enumerate(centres) if c <= z]
        if not above or not below:
            result[i] = rows[0 if not below else -1]
            continue
        low, high = below[-1], above[0]
        share = 0.0 if low == high else (z - centres[low]) / (centres[high] - centres[low])
        result[i] = (1 - share) * rows[low] + share * rows[high]
    return result


@given(slices=st.integers(1, 20), spacing=st.floats(0.5, 2.0), thickness=lengths, phase=st.floats(0, 0.99))
def test_the_profile_is_a_box_average_interpolated(slices, spacing, thickness, phase):
    weights, nearest = slice_profile(slices, spacing, thickness, phase)
    assert weights.shape == (slices, slices)
    assert np.allclose(weights.sum(axis=1), 1, atol=1e-5)  # float32
    assert (weights >= 0).all()
    assert ((nearest >= 0) & (nearest < slices)).all()
    # a slice that just touches the slab counts or not by the last digit of the sampling
    edges = [(k + phase) * thickness + side * thickness / 2 for k in range(-2, 50) for side in (-1, 1)]
    if min(abs(e) for e in edges) > 0.02 and min(abs(e - slices * spacing) for e in edges) > 0.02:
        expected = by_sampling(slices, spacing, thickness, phase)
        # the comb has 400 points a slice, of which the shortest box holds 100
        assert np.abs(weights - expected).max() < 0.03


def test_thin_slices_stay_as_they_are():
    weights, nearest = slice_profile(9, 1.0, 1.0, 0.5)
    assert np.allclose(weights, np.eye(9), atol=1e-6)
    assert nearest.tolist() == list(range(9))


@pytest.mark.parametrize("bad", [(0, 1.0, 5.0), (8, 0.0, 5.0), (8, 1.0, -1.0)])
def test_profiles_of_nothing(bad):
    with pytest.raises(ValueError, match="slices, spacing and thickness must be positive"):
        slice_profile(*bad, phase=0.0)


@pytest.fixture(scope="module")
def scan():
    """HU with tissue around the lungs, mask, and a pair of them."""
    image, mask = draw_lungs((16, 40, 44), seed=4)
    hu = np.where(mask, np.rint(-800 + 900 * image), 40).astype(np.int16)
    healthy = ls.window_hu(hu) * mask
    pair = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0, threads=1)(
        healthy, mask, index=3, lung_fraction=1.0
    )
    assert pair.labels.any()
    return hu, mask, pair


def thick_pair(*arrays):
    *volumes, profile = arrays
    found = thicken(*map(torch.from_numpy, volumes), profile=profile, tau=ls.threshold())
    return tuple(tensor.numpy() for tensor in found)


def test_a_thick_pair_is_the_average_of_the_scan_with_its_lesions(scan):
    hu, mask, pair = scan
    profile = slice_profile(16, 1.0, 4.0, 0.5)
    lesions = pair.labels > 0
    image, target, found = thick_pair(hu, mask, pair.image, lesions, profile)
    scanned = hu.astype(np.float64)
    scanned[lesions] = -800 + 900 * pair.image[lesions].astype(np.float64)
    # centres at 2, 6, 10 and 14 mm: the slab's own quarters
    centres = np.array([2.0, 6.0, 10.0, 14.0])
    expected = np.zeros(hu.shape)
    part = np.zeros(hu.shape)
    for i in range(16):
        z = i + 0.5
        weight = np.array([np.interp(z, centres, row) for row in np.eye(4)])
        for k in range(4):
            expected[i] += weight[k] * scanned[4 * k : 4 * k + 4].mean(axis=0)
            part[i] += weight[k] * lesions[4 * k : 4 * k + 4].mean(axis=0)
    rows = [2, 2, 2, 2, 6, 6, 6, 6, 10, 10, 10, 10, 14, 14, 14, 14]
    thick_mask = mask[rows]
    expected = np.clip((expected + 800) / 900, 0, 1) * thick_mask
    assert np.abs(image - expected).max() < 1e-5  # float32 sums of 16 HU values
    clear = np.abs(part - 0.5) > 1e-5
    assert np.array_equal(found[clear], ((part >= 0.5) & thick_mask)[clear])
    assert not (target & found).any()
    assert target.any()


def test_without_lesions_the_target_is_the_bright_tissue_of_the_image(scan):
    hu, mask, _ = scan
    none = np.zeros(mask.shape, bool)
    healthy = ls.window_hu(hu) * mask
    profile = slice_profile(16, 1.0, 5.0, 0.3)
    image, target, found = thick_pair(hu, mask, healthy, none, profile)
    assert np.array_equal(target, image >= ls.threshold())
    assert not found.any()
