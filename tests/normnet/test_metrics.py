"""Scores against plain loops and figures worked out by hand; the oracle's threshold against a search."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normnet.metrics import (
    evaluate_case,
    oracle_threshold,
    overlap_scores,
    percent,
    roc_auc,
    summarise,
    summary_at,
    threshold_counts,
)

# few distinct values: ties are the hard part of a rank statistic
SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=25)


def auc_by_pairs(positive, negative):
    wins = 0.0
    for p in positive:
        for n in negative:
            wins += 1.0 if p > n else 0.5 if p == n else 0.0
    return wins / (len(positive) * len(negative))


@given(positive=SCORES, negative=SCORES)
def test_auc_is_the_share_of_pairs_in_order(positive, negative):
    expected = auc_by_pairs(positive, negative)
    # the area adds up a trapezoid per distinct score, six at most, each rounded in float64
    assert roc_auc(np.array(positive), np.array(negative)) == pytest.approx(expected, abs=1e-14)


@given(positive=SCORES, negative=SCORES)
def test_auc_does_not_depend_on_which_class_is_positive(positive, negative):
    p, n = np.array(positive), np.array(negative)
    assert roc_auc(p, n) == pytest.approx(roc_auc(-n, -p), abs=1e-14)  # the same trapezoids


def test_auc_of_empty_class_and_of_nan():
    assert math.isnan(roc_auc(np.array([]), np.array([1.0])))
    assert math.isnan(roc_auc(np.array([1.0]), np.array([])))
    with pytest.raises(ValueError, match="negative scores must be numbers, got NaN"):
        roc_auc(np.array([1.0]), np.array([np.nan]))


def test_auc_counts_do_not_overflow():
    # 2 n m = 2e10 exceeds 32 bits
    assert roc_auc(np.full(100_000, 1.0, np.float32), np.zeros(100_000, np.float32)) == 1.0


def random_case(seed=0, shape=(4, 9, 11)):
    rng = np.random.default_rng(seed)
    return {
        "prediction": rng.random(shape) < 0.3,
        "lesion_truth": rng.random(shape) < 0.4,
        "lung_mask": rng.random(shape) < 0.8,
        "hu": rng.integers(-900, 100, shape).astype(np.int16),
        "healthy_probability": rng.choice(np.float32([0.1, 0.5, 0.94, 0.96, 0.99]), shape),
    }


@given(seed=st.integers(0, 1000))
def test_scores_equal_a_loop_over_voxels(seed):
    case = random_case(seed)
    n = dict.fromkeys(("tp", "fp", "fn", "hh", "hl", "lh", "ll"), 0)  # called, truly: healthy or lesion
    healthy, lesion = [], []
    for voxel in np.ndindex(case["hu"].shape):
        predicted, truth = case["prediction"][voxel], case["lesion_truth"][voxel]
        n["tp"] += predicted and truth
        n["fp"] += predicted and not truth
        n["fn"] += truth and not predicted
        if case["lung_mask"][voxel] and case["hu"][voxel] >= -500:
            p = float(case["healthy_probability"][voxel])
            (lesion if truth else healthy).append(p)
            n[("h" if p > 0.95 else "l") + ("l" if truth else "h")] += 1
    result = evaluate_case(**case, spacing=(6.0, 0.5, 0.5))
    expected = {
        "tp": n["tp"],
        "fp": n["fp"],
        "fn": n["fn"],
        "dsc": 2 * n["tp"] / (2 * n["tp"] + n["fp"] + n["fn"]),
        "psc": n["tp"] / (n["tp"] + n["fp"]),
        "sen": n["tp"] / (n["tp"] + n["fn"]),
        "lesion_ml": (n["tp"] + n["fn"]) * 1.5e-3,
        "false_positive_ml": n["fp"] * 1.5e-3,
        "bright_precision": n["hh"] / (n["hh"] + n["hl"]),
        "bright_sensitivity": n["hh"] / (n["hh"] + n["lh"]),
        "bright_specificity": n["ll"] / (n["ll"] + n["hl"]),
        "bright_auc": auc_by_pairs(healthy, lesion),
    }
    # a handful of float64 roundings
    assert {k: result[k] for k in expected} == pytest.approx(expected, rel=1e-14)
    assert not result["notes"]


def test_table_two_calls_healthy_positive():
    """PAPER.md IV-D: high specificity means that lesions are kept as anomalies."""
    hu = np.full((1, 1, 10), 0, np.int16)
    truth = np.zeros((1, 1, 10), bool)
    truth[..., 6:] = True
    probability = np.zeros((1, 1, 10), np.float32)
    probability[..., :3] = 0.99  # half of the healthy voxels are called healthy, no lesion voxel is
    s = evaluate_case(truth, truth, np.ones_like(truth), hu, probability)
    assert (s["bright_precision"], s["bright_sensitivity"], s["bright_specificity"]) == (1.0, 0.5, 1.0)


def test_threshold_is_strict_and_minus_500_is_bright():
    one = np.ones((1, 1, 2), bool)
    truth = np.array([[[False, True]]])
    s = evaluate_case(one, truth, one, np.full((1, 1, 2), -500), np.full((1, 1, 2), 0.95))
    assert s["bright_healthy_voxels"] == s["bright_lesion_voxels"] == 1
    assert s["bright_sensitivity"] == 0.0  # 0.95 is not above 0.95
    s = evaluate_case(one, truth, one, np.full((1, 1, 2), -501))
    assert s["bright_healthy_voxels"] == s["bright_lesion_voxels"] == 0


def test_a_vote_replaces_the_threshold():
    case = random_case()
    vote = np.zeros_like(case["prediction"])
    s = evaluate_case(**case, healthy=vote)
    assert (s["bright_sensitivity"], s["bright_specificity"]) == (0.0, 1.0)
    assert s["bright_auc"] == evaluate_case(**case)["bright_auc"]


def test_empty_classes_give_nan_and_a_note():
    case = random_case()
    nothing = np.zeros_like(case["prediction"])
    s = evaluate_case(**{**case, "lesion_truth": nothing})
    assert s["control"]
    assert math.isnan(s["sen"])
    assert math.isnan(s["bright_auc"])
    assert s["dsc"] == 0.0
    assert any("no lesion in the truth" in note for note in s["notes"])
    s = evaluate_case(**{**case, "prediction": nothing})
    assert math.isnan(s["psc"])
    assert "nothing predicted: PSC undefined" in s["notes"]
    s = evaluate_case(**{**case, "healthy_probability": None})
    assert math.isnan(s["bright_auc"])
    assert "no healthy probability: Table II not computed" in s["notes"]
    s = evaluate_case(nothing, nothing, case["lung_mask"], case["hu"])
    assert math.isnan(s["dsc"])


def test_control_means_fewer_lesion_voxels_than_asked():
    case = random_case()
    voxels = int(case["lesion_truth"].sum())
    assert evaluate_case(**case, control_voxels=voxels + 1)["control"]
    assert not evaluate_case(**case, control_voxels=voxels)["control"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hu": np.zeros((4, 9, 10))},
            ValueError,
            r"hu must have the shape of prediction, \(4, 9, 11\), got",
        ),
        ({"prediction": np.zeros((9, 11), bool)}, ValueError, r"prediction must be \(z, y, x\)"),
        ({"lung_mask": np.ones((4, 9, 11))}, TypeError, "lung_mask must be a bool array, got float64"),
        ({"lung_mask": np.zeros((4, 9, 11), bool)}, ValueError, "lung_mask must have at least one voxel"),
        ({"lesion_truth": [[[True]]]}, TypeError, "lesion_truth must be a NumPy array, got list"),
        ({"healthy_probability": np.full((4, 9, 11), np.nan)}, ValueError, "got nan"),
        ({"healthy_probability": np.full((4, 9, 11), 1.5)}, ValueError, r"must lie in \[0, 1\], got 1.5"),
        ({"spacing": (1.0, 0.0, 1.0)}, ValueError, "spacing must be three lengths > 0"),
        ({"healthy_threshold": 95}, ValueError, r"healthy_threshold must lie in \[0, 1\], got 95"),
    ],
)
def test_unfit_input(change, error, message):
    with pytest.raises(error, match=message):
        evaluate_case(**{**random_case(), **change})


def test_summary_leaves_controls_and_nan_out():
    cases = [evaluate_case(**random_case(seed), control_voxels=0) for seed in range(4)]
    cases[3]["control"] = True
    cases[2]["psc"] = math.nan
    summary = summarise(cases)
    dsc = [c["dsc"] for c in cases[:3]]
    mean = sum(dsc) / 3
    assert summary["dsc"]["n"] == 3
    assert summary["dsc"]["mean"] == pytest.approx(mean, rel=1e-14)  # order of a sum of three
    assert summary["dsc"]["sd"] == pytest.approx(math.sqrt(sum((d - mean) ** 2 for d in dsc) / 2), rel=1e-12)
    assert summary["psc"]["n"] == 2
    assert math.isnan(summarise(cases[3:])["dsc"]["mean"])


def test_oracle_equals_a_search_by_brute_force():
    cases = [random_case(seed) for seed in (1, 2)]
    found = oracle_threshold(
        [
            threshold_counts(*(c[k] for k in ("lesion_truth", "lung_mask", "hu", "healthy_probability")))
            for c in cases
        ]
    )
    dsc = []
    for step in range(101):
        per_case = []
        for c in cases:
            bright = c["lung_mask"] & (c["hu"] >= -500)
            predicted = bright & (c["healthy_probability"] <= np.float32(step / 100))
            per_case.append(
                2 * (predicted & c["lesion_truth"]).sum() / (predicted.sum() + c["lesion_truth"].sum())
            )
        dsc.append(np.mean(per_case))
    assert found["mean_dsc"] == pytest.approx(max(dsc), rel=1e-12)
    assert found["threshold"] == int(np.argmax(dsc)) / 100


SHAPE = (5, 12, 14)


@pytest.mark.parametrize("share", [0.95, 1.0])
def test_a_truth_that_is_a_lung_mask_is_told(share):
    rng = np.random.default_rng(3)
    v = random_case(shape=SHAPE)
    truth = v["lung_mask"] & (rng.random(SHAPE) < share)
    covered = f"{100 * truth.sum() / v['lung_mask'].sum():.0f} %"
    with pytest.warns(UserWarning, match=f"the truth covers {covered} of the lungs: a lung mask"):
        evaluate_case(**{**v, "lesion_truth": truth})


def test_a_truth_that_lies_elsewhere_is_told():
    left = np.zeros(SHAPE, bool)
    left[..., :6] = True
    v = {**random_case(shape=SHAPE), "lung_mask": left}
    with pytest.warns(
        UserWarning, match="the truth has 133 % of the lungs' volume: a mask of something else"
    ):
        evaluate_case(**{**v, "lesion_truth": ~left})
    outside = ~left & (np.arange(14) < 10)
    outside[0] |= left[0]
    v["lesion_truth"] = outside
    share = f"{100 * 6 / (6 + 5 * 4):.0f} %"
    with pytest.warns(UserWarning, match=f"only {share} of the truth lies in the lungs: another scan's"):
        evaluate_case(**v)
    # next to no truth says nothing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_case(**v, control_voxels=outside.sum() + 1)


@pytest.mark.parametrize("level", [-700.0, -650.0, -500.0, -300.0, None])
def test_oracle_at_any_t_equals_a_loop(level):
    v = random_case(shape=SHAPE)
    volumes = [v[k] for k in ("lesion_truth", "lung_mask", "hu", "healthy_probability")]
    counts = threshold_counts(*volumes, threshold_hu=level)
    for step in (0, 10, 50, 96, 100):
        n = [0, 0, 0]
        for truth, lung, hu, p in zip(*map(np.ravel, volumes), strict=True):
            marked = lung and (level is None or hu >= level) and p <= np.float32(step / 100)
            if marked or truth:
                n[0 if marked and truth else 1 if marked else 2] += 1
        assert counts[step].tolist() == n


def test_oracle_where_nothing_is_to_be_found():
    v = random_case(shape=SHAPE)
    counts = threshold_counts(v["lesion_truth"], v["lung_mask"], v["hu"], np.ones(SHAPE, np.float32))
    assert math.isnan(summary_at([counts], 0.5)["psc"]["mean"])  # nothing marked
    assert summary_at([counts], 0.5)["sen"]["mean"] == 0
    assert math.isnan(oracle_threshold([])["threshold"])


def test_overlap_of_two_maps_alone():
    v = random_case()
    expected = evaluate_case(**v, spacing=(6.0, 0.5, 0.5))
    found = overlap_scores(v["prediction"], v["lesion_truth"], (6.0, 0.5, 0.5))
    assert found == {name: expected[name] for name in found}
    with pytest.raises(TypeError, match="prediction must be a bool array, got int64"):
        overlap_scores(v["prediction"].astype(np.int64), v["lesion_truth"])


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [(0.687, 0.158, "68.7±15.8"), (0.687, None, "68.7"), (0.687, math.nan, "68.7"), (math.nan, 0.1, "–")],
)
def test_percent_is_written_as_the_paper_does(mean, sd, text):
    assert percent(mean, sd) == text
