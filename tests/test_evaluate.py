"""Scores against plain loops and figures worked out by hand; pairing of files; the command on volumes."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesionsynth.io import split_name
from normnet.metrics import evaluate_case, roc_auc, summarise
from normnet.oracle import oracle_threshold, threshold_counts
from normnet.pairing import find_cases, read_patients, read_table, with_predictions

pytest.importorskip("matplotlib")
from normnet.evaluate import CaseVolumes, EvaluateConfig, evaluate, evaluate_volumes, main

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
    # both are ratios of integers (in halves) below 2**53: one rounding each
    assert roc_auc(np.array(positive), np.array(negative)) == pytest.approx(expected, abs=1e-15)


@given(positive=SCORES, negative=SCORES)
def test_auc_does_not_depend_on_which_class_is_positive(positive, negative):
    p, n = np.array(positive), np.array(negative)
    assert roc_auc(p, n) == pytest.approx(roc_auc(-n, -p), abs=1e-15)  # the same integers divided


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


@pytest.mark.parametrize(
    ("name", "case", "role"),
    [
        ("radiopaedia_4_hu.nii.gz", "radiopaedia_4", "ct"),
        ("radiopaedia_4_lung.nii.gz", "radiopaedia_4", "lung"),
        ("radiopaedia_4_hu_prob.nii.gz", "radiopaedia_4", "probability"),
        ("r4-lung-mask.nrrd", "r4", "lung"),
        ("case_mask.mha", "case", "mask"),
        ("r4_hu_mask.nii", "r4", "mask"),
        ("r4_lung_seg.nii", "r4", "lung"),
        ("r4_Lesion-Label.nii", "r4", "lesion"),
        ("r4_lung.seg.nrrd", "r4", "lung"),
        ("coronacases_001.nii", "coronacases_001", None),
        ("lung.nii", "lung", None),
    ],
)
def test_names_tell_case_and_role(tmp_path, name, case, role):
    assert split_name(tmp_path / name) == (case, role)


@pytest.mark.parametrize(
    ("name", "case", "role"),
    [
        ("r4_core.nii.gz", "r4", "core"),
        ("r4_hu_healthy.nii.gz", "r4", "healthy"),
        ("anna_healthy_lesions.nii.gz", "anna_healthy", "lesion"),
        ("anna_healthy_healthy.nii.gz", "anna_healthy", "healthy"),
        ("r4_probability.nii.gz", "r4", "probability"),
    ],
)
def test_words_that_mean_something_among_predictions_alone(tmp_path, name, case, role):
    assert split_name(tmp_path / name, predicted=True) == (case, role)
    assert split_name(tmp_path / "anna_healthy.nii.gz") == ("anna_healthy", None)


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_one_folder_may_hold_every_role(tmp_path):
    data = touch(
        tmp_path / "data", *(f"r{k}_{role}.nii.gz" for k in (4, 7) for role in ("hu", "lung", "lesion"))
    )
    out = touch(tmp_path / "out", "r4_hu.nii.gz", "r4_hu_prob.nii.gz", "r7_hu.nii.gz")
    four, seven = find_cases(predictions=[out], truth=[data], ct=[data], lungs=[data])
    assert (four.case, four.ct.name, four.lesion.name) == ("r4", "r4_hu.nii.gz", "r4_lesion.nii.gz")
    assert four.lung.name == "r4_lung.nii.gz"
    assert four.probability.name == "r4_hu_prob.nii.gz"
    assert seven.probability is None


def test_lungs_that_the_prediction_used_stand_in_for_given_ones(tmp_path):
    data = touch(tmp_path / "data", "a_hu.nii", "a_lesion.nii", "a_lung.nii")
    out = touch(tmp_path / "out", "a_lesions.nii.gz", "a_lung.nii.gz", "a_probability.nii.gz")
    (own,) = find_cases(predictions=[out], truth=[data], ct=[data])
    (given,) = find_cases(predictions=[out], truth=[data], ct=[data], lungs=[data])
    assert (own.lung, given.lung) == (out / "a_lung.nii.gz", data / "a_lung.nii")
    assert (own.prediction, own.probability) == (out / "a_lesions.nii.gz", out / "a_probability.nii.gz")
    assert own.core is own.healthy is None
    # of b no lesions: no case; other lungs are none either
    touch(out, "a_core.nii.gz", "a_healthy.nii.gz", "a_classical.nii.gz", "b_core.nii.gz")
    (own,) = find_cases(predictions=[out], truth=[data], ct=[data])
    assert (own.core, own.healthy) == (out / "a_core.nii.gz", out / "a_healthy.nii.gz")


def test_maps_of_another_method_for_the_same_cases(tmp_path):
    data = touch(
        tmp_path / "data", *(f"{case}_{role}.nii" for case in "ab" for role in ("hu", "lesion", "lung"))
    )
    out = touch(tmp_path / "out", "a_lesions.nii.gz", "a_core.nii.gz", "b_lesions.nii.gz")
    vae = touch(
        tmp_path / "vae", "a_lesions.nii.gz", "a_probability.nii.gz", "a_lung.nii.gz", "c_lesions.nii"
    )
    cases = find_cases(predictions=[out], truth=[data], ct=[data], lungs=[data])
    other = with_predictions(cases, vae)
    assert list(other) == ["a"]
    assert other["a"].prediction == vae / "a_lesions.nii.gz"
    assert other["a"].probability == vae / "a_probability.nii.gz"
    assert other["a"].core is None  # not that of the first method
    assert (other["a"].lung, other["a"].lesion) == (cases[0].lung, cases[0].lesion)
    with pytest.raises(ValueError, match=r"maps of the same cases, found none of them in .*data2"):
        with_predictions(cases, touch(tmp_path / "data2", "z_lesions.nii"))


def test_pairing_errors_name_what_is_missing(tmp_path):
    data = touch(tmp_path / "data", "a_hu.nii", "a_lesion.nii", "b_hu.nii")
    out = touch(tmp_path / "out", "a.nii", "b.nii")
    with pytest.raises(ValueError, match=r"truth must have a file for each prediction; \['b'\] not found"):
        find_cases(predictions=[out], truth=[data], ct=[data])
    with pytest.raises(ValueError, match="at least one lesion map"):
        find_cases(predictions=[touch(tmp_path / "none")], truth=[data], ct=[data])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_cases(predictions=[tmp_path / "nowhere"], truth=[data], ct=[data])
    (out / "a_pred.nii").touch()
    (out / "a_prediction.nii").touch()
    with pytest.raises(ValueError, match="prediction of case 'a' must be one file"):
        find_cases(predictions=[out], truth=[data], ct=[data])


def test_table_of_cases(tmp_path):
    table = tmp_path / "cases.csv"
    table.write_text("case,ct,lesion,prediction,lung\nx,x.nii,t/x.nii,p/x.nii,\n")
    (case,) = read_table(table)
    assert (case.ct, case.lesion, case.lung) == (tmp_path / "x.nii", tmp_path / "t" / "x.nii", None)
    assert case.core is case.healthy is None
    table.write_text("case,ct,lesion,prediction,core,healthy\nx,x.nii,t.nii,p.nii,p/c.nii,p/h.nii\n")
    (case,) = read_table(table)
    assert (case.core, case.healthy) == (tmp_path / "p" / "c.nii", tmp_path / "p" / "h.nii")
    table.write_text("case,ct,lesion\nx,x.nii,t/x.nii\n")
    with pytest.raises(ValueError, match=r"line 2: columns .* must be filled, missing \['prediction'\]"):
        read_table(table)
    table.write_text("case,ct,lesion,prediction\n")
    for read in (read_table, read_patients):
        with pytest.raises(ValueError, match="at least one row"):
            read(table)
    table.write_text("case,ct,lesion,prediction\nx,x.nii,t.nii,p.nii\nx,x.nii,t.nii,p.nii\n")
    for read in (read_table, read_patients):
        with pytest.raises(ValueError, match="line 3: cases must differ, got 'x' twice"):
            read(table)
    for data in (b"case,ct\n\xff\xfe", b"case,ct\n" + b"x" * 200_000):
        table.write_bytes(data)
        with pytest.raises(ValueError, match=r"cases\.csv must be a CSV in UTF-8"):
            read_table(table)
    table.write_text("case,ct,lesion,lung\nx,x.nii,t/x.nii,\ny,y.nii,t/y.nii,l/y.nii\n")
    one, two = read_patients(table)
    assert (one.ct, one.lesion, one.lung) == (tmp_path / "x.nii", tmp_path / "t" / "x.nii", None)
    assert (two.case, two.lung) == ("y", tmp_path / "l" / "y.nii")


def in_memory(name, seed):
    c = random_case(seed, shape=(6, 20, 24))
    return CaseVolumes(
        case=name,
        hu=c["hu"],
        prediction=c["prediction"],
        truth=c["lesion_truth"],
        lung_mask=c["lung_mask"],
        probability=c["healthy_probability"],
        spacing=(1.0, 0.8, 0.8),
    )


def test_results_are_written_without_nan_in_json(tmp_path):
    evaluation = evaluate_volumes([in_memory("a", 1), in_memory("b", 2)], oracle=True, pictures=1)
    evaluation.write(tmp_path / "new" / "results")
    document = json.loads((tmp_path / "new" / "results" / "results.json").read_text())
    assert document["cases"]["a"]["dsc"] == evaluation.scores["a"]["dsc"]
    assert document["oracle_searched_on_this_test_set"]["mean_dsc"] > 0
    assert "oracle" not in document["summary"]
    with (tmp_path / "new" / "results" / "cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows] == ["a", "b"]
    assert float(rows[1]["bright_auc"]) == evaluation.scores["b"]["bright_auc"]
    page = (tmp_path / "new" / "results" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # two slices, two histograms


def test_cases_must_differ_and_errors_name_them():
    with pytest.raises(ValueError, match="different names, got 'a' twice"):
        evaluate_volumes([in_memory("a", 1), in_memory("a", 2)])
    with pytest.raises(ValueError, match="at least one case"):
        evaluate_volumes([])
    broken = in_memory("c", 1)
    broken.lung_mask[...] = False
    with pytest.raises(ValueError, match="case 'c': lung_mask must have at least one voxel"):
        evaluate_volumes([broken])


@pytest.fixture
def written(tmp_path):
    """Two cases as NIfTI files whose y axis runs against LPS order, as most files have it."""
    sitk = pytest.importorskip("SimpleITK")
    for k in (1, 2):
        c = random_case(k, shape=(6, 20, 24))
        names = {"prediction": "out/r{}_hu", "healthy_probability": "out/r{}_hu_prob"}
        names |= {"hu": "data/r{}_hu", "lesion_truth": "data/r{}_lesion", "lung_mask": "data/r{}_lung"}
        for key, name in names.items():
            path = tmp_path / (name.format(k) + ".nii.gz")
            path.parent.mkdir(exist_ok=True)
            array = c[key].astype(np.uint8) if c[key].dtype == bool else c[key]
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((0.8, 0.8, 5.0))
            image.SetDirection((1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
            sitk.WriteImage(image, str(path))
    return tmp_path


def test_files_give_the_scores_of_their_arrays(written):
    data = written / "data"
    config = EvaluateConfig(
        output=written / "results", predictions=(written / "out",), truth=(data,), ct=(data,), lungs=(data,)
    )
    evaluation = evaluate(config)
    for k in (1, 2):
        expected = evaluate_case(**random_case(k, shape=(6, 20, 24)), spacing=(5.0, 0.8, 0.8))
        found = evaluation.scores[f"r{k}"]
        # NIfTI keeps spacing as float32: volumes to seven digits; everything else is a count
        assert found["lesion_ml"] == pytest.approx(expected["lesion_ml"], rel=1e-6)
        for name in ("tp", "fp", "fn", "bright_auc", "bright_precision", "bright_specificity"):
            assert found[name] == expected[name]


def test_command_line(written, capsys):
    places = {"predictions": "out", "truth": "data", "ct": "data", "lungs": "data", "output": "results"}
    arguments = [text for name, place in places.items() for text in (f"--{name}", str(written / place))]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "mean±SD" in printed
    assert (written / "results" / "report.html").exists()
    (written / "data" / "r2_lesion.nii.gz").unlink()
    assert main(arguments) == 2
    assert "truth must have a file for each prediction; ['r2']" in capsys.readouterr().err


def test_one_file_is_no_truth_of_itself(written, capsys):
    """Neither as a prediction nor, without labels that differ, as lungs; whatever link leads to it."""
    (written / "link").mkdir()
    for k in (1, 2):
        maps = (written / f"out/r{k}_hu.nii.gz").rename(written / f"out/r{k}_lesions.nii.gz")
        (written / f"link/r{k}.nii.gz").symlink_to(maps)
    common = {"output": written / "results", "predictions": (written / "out",), "ct": (written / "data",)}
    for truth in ("out", "link"):
        evaluation = evaluate(EvaluateConfig(**common, truth=(written / truth,), lungs=(written / "data",)))
        assert not evaluation.scores
        assert [str(one.reason).partition("nii.gz: ")[2] for one in evaluation.failures] == [
            "must not be both the truth and the prediction"
        ] * 2
    places = [f"--{name}={written / place}" for name, place in (("truth", "same"), ("lungs", "same"))]
    (written / "same").mkdir()
    for k in (1, 2):
        (written / f"data/r{k}_lung.nii.gz").rename(written / f"same/r{k}.nii.gz")
    call = [f"--{name}={path if name == 'output' else path[0]}" for name, path in common.items()] + places
    assert main(call) == 1
    assert "r1: " in (err := capsys.readouterr().err)
    assert err.count("labels must tell truth and lungs of one file apart") == 2
