"""Pictures pixel by pixel: overlays, outlines, which slices are shown, what histograms count."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib")
from matplotlib.image import imread

import lesionsynth as ls
from normnet.draw import (
    BINS,
    DASH,
    DASHES,
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    HU_EDGES,
    LESION,
    OUTLINE,
    TRUE_POSITIVE,
    VoxelCounts,
    case_pictures,
    curve,
    finding_pictures,
    grey,
    histogram,
    lung_box,
    mark,
    overlay,
    png,
    prepared_picture,
    shown_slices,
    side_by_side,
    worst_slices,
)


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
        (lambda: histogram({"a": np.ones(1, int)}, [0, 0], xlabel="x"), "edges must increase"),
        (lambda: histogram({"a": np.ones(1, int)}, [0, np.nan], xlabel="x"), "edges must increase"),
        (lambda: histogram({}, [-np.inf, 0, np.inf], xlabel="x"), "two of them finite, got"),
        (
            lambda: histogram({"a": np.ones(3, int)}, [0, 1, 2], xlabel="x"),
            r"series must have one count per bin, 2, got \{'a': 3\}",
        ),
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


@pytest.fixture
def stairs(monkeypatch):
    """Heights and edges that are drawn, by label."""
    from matplotlib.axes import Axes

    drawn, real = {}, Axes.stairs

    def spy(axes, heights, edges, **how):
        if "label" in how:
            drawn[how["label"]] = (list(heights), list(edges))
        return real(axes, heights, edges, **how)

    monkeypatch.setattr(Axes, "stairs", spy)
    return drawn


def test_histogram_shows_each_series_by_its_own_size(stairs):
    series = {"many": np.array([100, 300, 0]), "none": np.zeros(3, int), "few": np.array([0, 1, 3])}
    data = histogram(series, np.array([0.0, 1, 2, 4]), xlabel="HU")
    assert data.startswith(b"\x89PNG")
    assert stairs == {"many": ([0.25, 0.75, 0], [0, 1, 2, 4]), "few": ([0, 0.25, 0.75], [0, 1, 2, 4])}
    assert data != histogram({"many": series["many"]}, np.array([0.0, 1, 2, 4]), xlabel="HU")
    assert histogram({}, np.array([0, 1]), xlabel="HU").startswith(b"\x89PNG")


def test_what_lies_beyond_the_edges_counts_in_the_shares(stairs):
    histogram({"a": np.array([5, 1, 2, 2])}, np.array([-np.inf, 0, 1, 2, np.inf]), xlabel="x")
    histogram({"b": np.array([5, 1, 4])}, np.array([-np.inf, 0, 1, 2]), xlabel="x")
    histogram({"c": np.array([5, 0])}, np.array([-np.inf, 0, 1]), xlabel="x")
    assert stairs == {"a": ([0.1, 0.2], [0, 1, 2]), "b": ([0.1, 0.4], [0, 1, 2]), "c": ([0.0], [0, 1])}


def test_curves_have_the_colours_that_are_asked_for():
    x = np.arange(9.0)
    one = decoded(curve({"a": (x, x)}, xlabel="x", ylabel="y", colours=[(255, 0, 0)]))
    assert (one == (255, 0, 0)).all(axis=-1).any()
    assert not (decoded(curve({"a": (x, x)}, xlabel="x", ylabel="y")) == (255, 0, 0)).all(axis=-1).any()
    assert curve({"a": (x, x), "b": (x, -x)}, xlabel="x", ylabel="y").startswith(b"\x89PNG")


SHAPE = (5, 12, 14)


@given(seed=st.integers(0, 1000))
def test_voxels_are_counted_as_a_loop_would(seed):
    rng, counts = np.random.default_rng(seed), VoxelCounts()
    probabilities = dict.fromkeys(("healthy", "lesion"), 0) | {k: [0] * BINS for k in ("healthy", "lesion")}
    by_hu = {name: [0] * (len(HU_EDGES) - 1) for name in ("found", "missed", "wrongly marked")}
    for judged in (-500, None):
        hu = rng.integers(-1300, 400, SHAPE).astype(np.int16)
        hu[0, 0, :3] = -1024, 3071, 199
        prediction, truth, lung = rng.random((3, *SHAPE)) < 0.4
        probability = rng.choice(np.float32([0.0, 0.2, 0.5, 0.95, 0.96, 1.0]), SHAPE)
        counts.add(hu, prediction, truth, lung, probability, threshold_hu=judged)
        counts.add(hu, prediction, truth, lung, None)  # HU alone
        for voxel in np.ndindex(SHAPE):
            if lung[voxel] and (judged is None or hu[voxel] >= judged):
                step = min(int(np.float32(probability[voxel]) * np.float32(BINS)), BINS - 1)
                probabilities["lesion" if truth[voxel] else "healthy"][step] += 1
            kind = ("found" if prediction[voxel] else "missed") if truth[voxel] else "wrongly marked"
            if truth[voxel] or prediction[voxel]:
                # below -1100, 20 HU a bin, from 200 up
                by_hu[kind][int(np.clip((hu[voxel] + 1100) // 20 + 1, 0, 66))] += 2
    for found, expected in ((counts.probability, probabilities), (counts.hu, by_hu)):
        assert {name: table.tolist() for name, table in found.items()} == expected
    captions = list(counts.pictures())
    assert captions == [
        "lung voxels of at least -500 HU or all lung voxels by healthy probability",
        "lesion voxels that were found or missed, and voxels that were wrongly marked, by HU",
    ]
    assert VoxelCounts().pictures() == {}


def test_the_paper_s_threshold_is_an_edge():
    """What exceeds 0.95 is told from what does not, in the precision of the maps, too."""
    assert 0.95 * BINS == 57
    counts, one = VoxelCounts(), np.ones((1, 1, 2), bool)
    probability = np.array([[[np.nextafter(np.float32(0.95), np.float32(0)), np.float32(0.95)]]])
    counts.add(np.zeros((1, 1, 2)), one, one, one, probability)
    assert np.flatnonzero(counts.probability["lesion"]).tolist() == [56, 57]


def is_dashed(picture):
    return np.logical_or.reduce([(picture == colour).all(axis=-1) for colour in DASHES])


def around(mask):
    """By a loop: voxels beside a mask and not in it."""
    found = np.zeros_like(mask)
    for y, x in np.ndindex(mask.shape):
        near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        found[y, x] = not mask[y, x] and any(
            mask[a, b] for a, b in near if 0 <= a < mask.shape[0] and 0 <= b < mask.shape[1]
        )
    return found


@given(seed=st.integers(0, 500), count=st.integers(0, 4), ill=st.booleans())
def test_the_slice_that_differs_most_is_among_those_shown(seed, count, ill):
    rng = np.random.default_rng(seed)
    lung = rng.random((14, 4, 5)) < 0.6
    classical = lung & (rng.random(lung.shape) < rng.random((14, 1, 1)))
    lesions = lung & (rng.random(lung.shape) < 0.3 * ill * rng.random((14, 1, 1)))
    without, shown = shown_slices(lesions, lung, count), shown_slices(lesions, lung, count, classical)
    assert len(shown) == len(set(shown)) <= count
    apart = np.count_nonzero(lung ^ classical, axis=(1, 2))
    if not count:
        assert shown == []
        return
    assert apart[shown].max() == apart.max()
    # it takes the place of the one with least lesion, and of none where there is room
    added = [z for z in shown if z not in without]
    assert len(added) <= 1
    assert shown == without or shown == [*without[: count - 1], *added]


def test_without_lesions_the_middle_of_the_lungs_is_shown():
    lung = np.zeros((9, 3, 3), bool)
    lung[[2, 3, 7]] = True
    assert shown_slices(np.zeros_like(lung), lung, 3) == [3]
    assert shown_slices(np.zeros_like(lung), lung, 0) == []


@given(seed=st.integers(0, 500))
def test_two_outlines_voxel_by_voxel(seed):
    rng = np.random.default_rng(seed)
    lung, classical, lesions = np.zeros((3, 12, 13), bool)
    y, x = rng.integers(0, 8, 2)
    lung[y : y + 5, x : x + 6] = True
    classical[y : y + rng.integers(1, 6), x : x + rng.integers(1, 8)] = True
    lesions[lung] = rng.random(lung.sum()) < 0.3
    background = grey(rng.integers(-1000, 100, lung.shape), (-1100, 200))
    before = background.copy()
    picture = mark(background, lesions, lung, classical)
    np.testing.assert_array_equal(background, before)
    first, second = around(lung), around(classical)
    for y, x in np.ndindex(lung.shape):
        if first[y, x]:
            expected = OUTLINE  # where both are one, too
        elif second[y, x]:
            expected = DASHES[(y // DASH + x // DASH) % 2]
        elif lesions[y, x]:
            expected = 0.55 * background[y, x] + 0.45 * np.array(LESION)
        else:
            expected = background[y, x]
        assert np.abs(picture[y, x] - np.asarray(expected, float)).max() <= 0.5 + 1e-9  # whole greys
    np.testing.assert_array_equal(mark(background, lesions, lung), mark(background, lesions, lung, lung))


def test_what_lies_beyond_the_lungs_that_were_searched_is_shown():
    lung, classical = np.zeros((2, 3, 40, 60), bool)
    lung[:, 15:25, 10:20] = classical[:, 15:25, 10:50] = True
    ((z, data),) = finding_pictures(
        np.where(lung, -850, 40), np.zeros_like(lung), lung, (5.0, 1.0, 1.0), count=1, classical=classical
    )
    assert z == 0
    picture = decoded(data)
    scale = picture.shape[0] // 22  # 10 and a margin of 6 on each side
    assert picture.shape[1] == scale * (2 * 52 + 3)
    dashes = is_dashed(picture[:, (52 + 3) * scale :])
    assert dashes[::scale, ::scale].sum() == 2 * 30 + 10  # its upper and lower side, and its end


def test_oblong_voxels_are_shown_square():
    """Pixels twice as high as wide are repeated once: a lung of 4 x 8 voxels becomes a square."""
    lung = np.zeros((2, 6, 14), bool)
    lung[:, 1:5, 3:11] = True
    hu = np.where(lung, -1100, 200)
    ((_, data),) = finding_pictures(hu, np.zeros_like(lung), lung, (1.0, 1.6, 0.8))
    picture = decoded(data)[..., 0]
    scale = picture.shape[0] // 12
    assert picture.shape == (12 * scale, (2 * 14 + 3) * scale)
    dark = picture[:, : 14 * scale] == 0
    assert dark.any(axis=1).sum() == dark.any(axis=0).sum() == 8 * scale


SPACING = (4.0, 3.0, 3.0)
CHEST = ls.phantom.chest_ct(shape=(20, 48, 64), spacing=SPACING, seed=1)


def prepared(removed=None, segments=((0, 20),), **more):
    hu, mask = CHEST.hu, CHEST.lung_mask
    removed = np.zeros_like(mask) if removed is None else removed
    return decoded(prepared_picture(hu, mask, removed, spacing=SPACING, segments=segments, title="t", **more))


def yellow(picture):
    return (picture[..., :2].min(axis=-1) > 180) & (picture[..., 2] < 60)


def test_prepared_pictures_have_a_second_outline_and_a_legend():
    plain, both = prepared(), prepared(classical=np.roll(CHEST.lung_mask, 5, axis=1))
    top, right = plain.shape[0] // 12, plain.shape[1] * 9 // 10
    assert not yellow(plain).any()
    assert yellow(both)[top:].any()
    # a cyan line covers the dashes where both are one
    same = prepared(classical=CHEST.lung_mask)
    for picture in (both, same):
        assert yellow(picture)[:top, right:].any()
    leak = same[top:, :, 1].astype(int) - same[top:, :, 2]
    assert leak.max() < 60  # cyan and grey have as much green as blue; antialiased rims a little more


def test_prepared_pictures_show_what_was_removed_and_what_is_left_out():
    plain = prepared()
    edges = CHEST.lung_mask & ~np.roll(CHEST.lung_mask, 1, axis=2)
    orange = [(p[..., 0] > 228) & (p[..., 2] < 27) for p in (plain, prepared(removed=edges))]
    assert [p.any() for p in orange] == [False, True]  # nine tenths of (255, 153, 0), one of a grey
    rows = prepared(segments=((0, 4), (9, 20)))
    changed = (rows != plain).any(axis=-1)
    assert (np.ptp(rows[changed].astype(int), axis=-1) > 200).any()  # red titles
    assert not changed[rows.shape[0] * 4 // 5 :].any()  # coronal and sagittal ones have none


def test_a_prepared_case_without_voxels_is_drawn_whole():
    nothing = np.zeros_like(CHEST.lung_mask)
    data = prepared_picture(
        CHEST.hu, nothing, nothing, spacing=SPACING, segments=[], title="empty", classical=nothing
    )
    assert decoded(data).shape == prepared().shape


def test_matplotlib_is_loaded_to_draw_and_pyplot_never():
    """That has global state, and looks for a display."""
    code = (
        "import sys; from normnet.draw import curve; assert 'matplotlib' not in sys.modules\n"
        "curve({}, xlabel='x', ylabel='y'); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
