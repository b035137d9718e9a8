"""Overlays voxel by voxel, which slices are shown, and pages that need nothing from outside."""

from __future__ import annotations

import base64
import io
import os
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib")
from matplotlib.image import imread

from normnet.report import (
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    TRUE_POSITIVE,
    Report,
    case_pictures,
    curve,
    grey,
    histogram,
    lung_box,
    overlay,
    percent,
    png,
    side_by_side,
    worst_slices,
)
from normnet.report.pictures import shares


def decoded(data):
    return np.round(imread(io.BytesIO(data))[..., :3] * 255).astype(np.uint8)


def test_overlay_colours_each_kind_of_voxel():
    background = grey(np.full((2, 2), 0.5), (0, 1))
    prediction, truth = np.array([[True, True], [False, False]]), np.array([[True, False], [True, False]])
    picture = overlay(background, prediction, truth, opacity=1.0)
    assert tuple(picture[0, 0]) == TRUE_POSITIVE
    assert tuple(picture[0, 1]) == FALSE_POSITIVE
    assert tuple(picture[1, 0]) == FALSE_NEGATIVE
    assert tuple(picture[1, 1]) == (128, 128, 128)
    assert (background == 128).all()  # never written
    half = overlay(background, prediction, truth, opacity=0.5)
    assert abs(int(half[0, 0, 1]) - (128 + TRUE_POSITIVE[1]) / 2) <= 0.5  # rounded to whole greys


def test_grey_clips_to_the_window():
    shown = grey(np.array([[-2000, -1100, -450, 200, 3000]]), (-1100, 200))
    assert shown[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grey(np.zeros((2, 2)), (1, 1)), r"window must be \(low, high\)"),
        (lambda: grey(np.zeros(2), (0, 1)), r"one slice \(y, x\), got shape \(2,\)"),
        (
            lambda: overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3), bool), np.zeros((2, 2), bool)),
            "shape",
        ),
        (lambda: histogram({"a": np.zeros(3)}, xlabel="x", bins=0), "bins must be >= 1, got 0"),
        (
            lambda: histogram({"a": np.zeros(3)}, xlabel="x", range=(1, 1)),
            r"range must be \(low, high\) with low < high, got \(1, 1\)",
        ),
        (lambda: histogram({"a": np.array([0, np.nan])}, xlabel="x"), "series must be finite"),
        (
            lambda: side_by_side([np.zeros((2, 2, 3), np.uint8), np.zeros((3, 2, 3), np.uint8)]),
            r"got \[2, 3\]",
        ),
    ],
)
def test_unfit_pictures(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(seed=st.integers(0, 1000), count=st.integers(1, 5))
def test_worst_slices_are_the_worst_and_apart(seed, count):
    rng = np.random.default_rng(seed)
    prediction, truth = (rng.random((20, 4, 4)) < rng.random((20, 1, 1)) * 0.5 for _ in range(2))
    chosen = worst_slices(prediction, truth, count)
    wrong = (prediction ^ truth).sum(axis=(1, 2))
    apart = max(1, 20 // (3 * count))
    assert 1 <= len(chosen) <= count
    assert wrong[chosen[0]] == wrong.max()
    assert list(wrong[chosen]) == sorted(wrong[chosen], reverse=True)
    assert all(abs(a - b) >= apart for k, a in enumerate(chosen) for b in chosen[:k])
    # what was passed over is no worse than the last chosen, or too close to a chosen one
    for z in set(range(20)) - set(chosen):
        assert wrong[z] <= wrong[chosen[-1]] or any(abs(z - c) < apart for c in chosen) or len(chosen) < count


def test_no_slice_without_lesion_or_error():
    nothing = np.zeros((5, 3, 3), bool)
    assert worst_slices(nothing, nothing, 3) == []
    one = nothing.copy()
    one[2, 1, 1] = True
    assert worst_slices(one, one, 3) == [2]


def test_png_keeps_pixels():
    picture = np.random.default_rng(0).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decoded(png(picture)), picture)
    np.testing.assert_array_equal(decoded(png(picture, scale=3))[1::3, 1::3], picture)


def test_lung_box_holds_the_lungs():
    mask = np.zeros((3, 30, 40), bool)
    mask[1, 10:20, 3:25] = True
    assert lung_box(mask, margin=5) == (slice(5, 25), slice(0, 30))
    assert lung_box(np.zeros_like(mask)) == (slice(0, 30), slice(0, 40))


def test_case_pictures_come_worst_first():
    hu = np.full((9, 12, 14), -850, np.int16)
    truth = np.zeros(hu.shape, bool)
    truth[2, 4:6, 4:6] = truth[7, 3:9, 3:9] = True
    pictures = case_pictures(hu, np.zeros_like(truth), truth, np.ones_like(truth), count=2)
    assert [z for z, _ in pictures] == [7, 2]
    assert decoded(pictures[0][1]).shape[1] > 2 * 14


@given(seed=st.integers(0, 1000), bins=st.integers(1, 9))
def test_shares_against_a_plain_loop(seed, bins):
    rng = np.random.default_rng(seed)
    series = {"a": rng.integers(-5, 15, (3, 7)), "b": rng.uniform(-5, 15, 11), "none": np.zeros(0)}
    edges, found = shares(series, bins, (0.0, 10.0))
    assert list(found) == ["a", "b"]
    assert edges.tolist() == pytest.approx([10.0 * k / bins for k in range(bins + 1)])
    for name, share in found.items():
        values = series[name].ravel().tolist()
        for k in range(bins):
            last = k == bins - 1  # holds its upper edge, as NumPy's does
            inside = [v for v in values if edges[k] <= v < edges[k + 1] or (last and v == edges[-1])]
            assert share[k] == pytest.approx(len(inside) / len(values))


def test_histogram_shows_each_series_by_its_own_size():
    rng = np.random.default_rng(0)
    series = {"many": rng.normal(-800, 50, 3000), "few": rng.normal(-100, 20, 30)}
    edges, found = shares(series, 60, None)
    assert (edges[0], edges[-1]) == (series["many"].min(), series["few"].max())
    assert [share.sum() for share in found.values()] == pytest.approx([1, 1])
    drawn = histogram(series, xlabel="HU")
    assert drawn.startswith(b"\x89PNG")
    assert drawn == histogram({**series, "none": np.zeros(0)}, xlabel="HU")
    assert drawn != histogram({"many": series["many"]}, xlabel="HU")
    assert shares({"one": np.full(4, 7)}, 1, None)[0].tolist() == [6.5, 7.5]
    assert histogram({}, xlabel="HU").startswith(b"\x89PNG")


def test_report_is_one_page_that_fetches_nothing(tmp_path):
    report = Report("A <b> & title")
    report.heading("Numbers")
    report.table(["case", "DSC"], [["x & y", 1.5]])
    report.legend()
    report.picture(png(np.zeros((2, 2, 3), np.uint8)), 'caption "quoted" <i>')
    report.picture(curve({"a": (np.arange(3), np.arange(3.0))}, xlabel="x", ylabel="y"), "curve")
    page = report.write(tmp_path / "deep" / "report.html").read_text()
    assert "A &lt;b&gt; &amp; title" in page
    assert "<td>x &amp; y</td><td>1.5</td>" in page
    assert "<i>" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2
    for source in sources:
        head, data = source.split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "report.html"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
def test_report_is_as_readable_as_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    written = Report("t").write(tmp_path / "report.html")
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_percent_as_the_paper_prints_it():
    assert percent(0.687, 0.158) == "68.7±15.8"
    assert percent(0.687) == percent(0.687, float("nan")) == "68.7"
    assert percent(float("nan"), 0.1) == "–"
