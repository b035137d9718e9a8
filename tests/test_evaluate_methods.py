"""Tables II and III of several methods: every figure against loops over voxels; labels, failures, files."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("SimpleITK")

import SimpleITK as sitk
from matplotlib.image import imread

from normnet.evaluate import CaseVolumes, EvaluateConfig, evaluate, evaluate_case, evaluate_volumes, main
from normnet.oracle import oracle_threshold, summary_at, threshold_counts
from normnet.origin import UNKNOWN, Origin, read_origin
from normnet.scoring import MethodScores
from normnet.tables import PAPER_BRIGHT, PAPER_SCORES, Grid, markdown

SHAPE = (5, 12, 14)
CALIBRATED = "calibrated on synthetic pairs: 0.6, 0.7"
HEALTHY_SET = "calibrated on healthy volumes: anomaly 0.8"
PATIENTS, CONTROL = ("a", "b", "d"), "c"


def voxels_of(case):
    """Everything of a case but its files: CT, truth, lungs and the maps of two methods."""
    rng = np.random.default_rng(ord(case))
    truth = rng.random(SHAPE) < (0.3 if case != CONTROL else 0.004)
    hu = np.where(truth, rng.integers(-700, 60, SHAPE), rng.integers(-950, 0, SHAPE)).astype(np.int16)
    core = (truth & (rng.random(SHAPE) < 0.6)) | (rng.random(SHAPE) < 0.02)
    return {
        "hu": hu,
        "truth": truth,
        "lung": rng.random(SHAPE) < 0.8,
        "core": core,
        "lesions": core | (rng.random(SHAPE) < 0.1),
        "probability": rng.choice(np.float32([0.0, 0.2, 0.5, 0.96, 1.0]), SHAPE),
        "healthy": (hu >= -500) & (rng.random(SHAPE) < 0.5),
        "vae_lesions": rng.random(SHAPE) < 0.3,
        "vae_probability": rng.choice(np.float32([0.1, 0.3, 0.8, 0.97]), SHAPE),
    }


def save(path, array):
    path.parent.mkdir(exist_ok=True, parents=True)
    image = sitk.GetImageFromArray(array.astype(np.uint8) if array.dtype == bool else array)
    image.SetSpacing((0.8, 0.8, 5.0))
    sitk.WriteImage(image, str(path))


@pytest.fixture
def study(tmp_path):
    for case in (*PATIENTS, CONTROL):
        v = voxels_of(case)
        for role in ("hu", "truth", "lung"):
            save(tmp_path / "data" / f"{case}_{role}.nii.gz", v[role])
        for kind in ("lesions", "core", "probability", "healthy"):
            save(tmp_path / "out" / f"{case}_{kind}.nii.gz", v[kind])
        for kind in ("lesions", "probability"):
            save(tmp_path / "vae" / f"{case}_{kind}.nii.gz", v[f"vae_{kind}"])
        record = {
            "settings": {"probability": "calibrated"},
            "models": [{"probability": 0.6}, {"probability": 0.7}],
            "files": {"lesions": f"{case}_lesions.nii.gz"},
        }
        (tmp_path / "out" / f"{case}.json").write_text(json.dumps(record))
        record = {
            "baseline": {"method": "vae", "threshold": 0.8, "calibrated": True},
            "files": {"lesions": f"{case}_lesions.nii.gz"},
        }
        (tmp_path / "vae" / f"{case}.json").write_text(json.dumps(record))
    return tmp_path


def config_of(study, **changes):
    data = study / "data"
    given = {"output": study / "results", "predictions": (study / "out",), "truth": (data,), "ct": (data,)}
    given |= {"lungs": (data,), "compare": (f"VAE={study / 'vae'}",), "control_voxels": 20, "pictures": 0}
    return EvaluateConfig(**{**given, **changes})


def overlap_by_loop(prediction, truth):
    n = {"tp": 0, "fp": 0, "fn": 0}
    for voxel in np.ndindex(truth.shape):
        if prediction[voxel]:
            n["tp" if truth[voxel] else "fp"] += 1
        elif truth[voxel]:
            n["fn"] += 1
    tp, fp, fn = n["tp"], n["fp"], n["fn"]
    return 2 * tp / (2 * tp + fp + fn), tp / (tp + fp), tp / (tp + fn)


def bright_by_loop(v, called, probability):
    """Precision, sensitivity, specificity with healthy as positive class, and AUC over all pairs."""
    n = dict.fromkeys(("tp", "fp", "fn", "tn"), 0)
    well, ill = [], []
    for voxel in np.ndindex(SHAPE):
        if v["lung"][voxel] and v["hu"][voxel] >= -500:
            healthy = not v["truth"][voxel]
            (well if healthy else ill).append(float(probability[voxel]))
            n[("t" if bool(called[voxel]) == healthy else "f") + ("p" if called[voxel] else "n")] += 1
    pairs = sum(1.0 if p > q else 0.5 if p == q else 0.0 for p in well for q in ill)
    return (
        n["tp"] / (n["tp"] + n["fp"]),
        n["tp"] / (n["tp"] + n["fn"]),
        n["tn"] / (n["tn"] + n["fp"]),
        pairs / (len(well) * len(ill)),
    )


def mean_and_sd(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def texts(per_patient):
    """Cells of a row from the scores of its patients."""
    spreads = [mean_and_sd(column) for column in zip(*per_patient, strict=True)]
    return [f"{100 * mean:.1f}±{100 * sd:.1f}" for mean, sd in spreads]


def grid_of(evaluation, beginning):
    (grid,) = (g for g in evaluation.grids() if g.title.startswith(beginning))
    return {row[0]: list(row[1:]) for row in grid.rows}


def test_tables_of_two_methods_equal_loops(study):
    evaluation = evaluate(config_of(study))
    volumes = {case: voxels_of(case) for case in PATIENTS}
    rows = grid_of(evaluation, "Table III")
    assert list(rows) == ["Proposed w/o growing", "Proposed", "VAE"]
    maps = {"Proposed w/o growing": "core", "Proposed": "lesions", "VAE": "vae_lesions"}
    for name, cells in rows.items():
        expected = texts([overlap_by_loop(v[maps[name]], v["truth"]) for v in volumes.values()])
        assert cells == [*expected, "3", HEALTHY_SET if name == "VAE" else CALIBRATED]
    assert len({cells[0] for cells in rows.values()}) == 3
    rows = grid_of(evaluation, "Table II:")
    assert list(rows) == ["Proposed", "VAE"]
    vote = [bright_by_loop(v, v["healthy"], v["probability"]) for v in volumes.values()]
    assert rows["Proposed"] == [*texts(vote), "3", f"vote, {CALIBRATED}"]
    # the baseline has no vote: its mean probability, at a threshold that is none of its own
    above = [bright_by_loop(v, v["vae_probability"] > 0.95, v["vae_probability"]) for v in volumes.values()]
    assert rows["VAE"] == [*texts(above), "3", "mean probability, fixed at 0.95"]


def test_files_of_two_methods(study):
    evaluation = evaluate(config_of(study, pictures=1))
    with (study / "results/cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    names = ("Proposed w/o growing", "Proposed", "VAE")
    assert [(r["case"], r["method"]) for r in rows] == [(c, name) for name in names for c in "abcd"]
    for row in rows:
        v = voxels_of(row["case"])
        kind = {"VAE": "vae_lesions", "Proposed": "lesions"}.get(row["method"], "core")
        assert int(row["tp"]) == (v[kind] & v["truth"]).sum()
        assert row["control"] == str(row["case"] == CONTROL)
        assert row["threshold"] == (HEALTHY_SET if row["method"] == "VAE" else CALIBRATED)
    document = json.loads((study / "results/results.json").read_text())
    assert list(document["methods"]) == list(names)
    assert document["cases"] == document["methods"]["Proposed"]["cases"]
    assert (
        document["methods"]["VAE"]["summary"]["dsc"]["mean"] == evaluation.methods[1].summary["dsc"]["mean"]
    )
    assert document["methods"]["VAE"]["threshold"] == HEALTHY_SET
    assert document["failures"] == []
    text = (study / "results/tables.md").read_text()
    for name, cells in grid_of(evaluation, "Table III").items():
        assert f"| {name} | {' | '.join(cells)} |" in text
    assert text.count("| c (control) | – | – | – |") == 3
    assert "| VAE | 26.4±14.5 | 19.8±14.0 | 50.1±9.8 | 28.1±17.5 | 21.6±17.6 | 62.3±5.7 |" in text
    assert "| Methods (paper) | Coronacases DSC (%) |" in text
    assert "As printed in Yao, Xiao, Liu and Zhou" in text


def test_the_report_is_one_page_with_histograms_and_the_worst_first(study):
    evaluation = evaluate(config_of(study, pictures=1))
    page = (study / "results/report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2 * 2 + 4  # two histograms of each method, a slice of each case of the first
    for source in sources:
        head, data = source.split(",", 1)
        assert head == "data:image/png;base64"
        assert imread(io.BytesIO(base64.b64decode(data))).ndim == 3
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    where = f"n = 3; threshold: {CALIBRATED}"
    assert captions[0] == f"Proposed: lung voxels of at least -500 HU by healthy probability, {where}"
    assert captions[2].startswith("VAE: all lung voxels by healthy probability, n = 3")
    worst = sorted(PATIENTS, key=lambda case: evaluation.scores[case]["dsc"])
    assert [text.split()[0] for text in captions[4:]] == [*worst, CONTROL]
    fp = evaluation.scores[CONTROL]["fp"] * 5 * 0.8 * 0.8 / 1000
    assert captions[-1].startswith(f"c ({fp:.1f} ml wrongly marked), slice")
    assert page.index("Worst slices first") < page.index("Controls: marked where")
    assert (
        page.index("Table III: lesions") < page.index("The paper&#39;s Table III") < page.index("Per volume")
    )


def test_a_note_of_every_method_is_told_once(study):
    for path in study.glob("vae/*_probability.nii.gz"):
        path.unlink()
    for predictions, whose in ((study / "out",), "VAE"), (study.glob("out/?_lesions.nii.gz"), "all"):
        evaluation = evaluate(config_of(study, predictions=tuple(predictions)))
        note = ["a", whose, "no healthy probability: Table II not computed"]
        (notes,) = (grid for grid in evaluation.grids() if grid.title == "Notes")
        assert [row for row in notes.rows if row[0] == "a"] == [note]
        assert f"| {' | '.join(note)} |" in (study / "results/tables.md").read_text()
        assert "".join(f"<td>{text}</td>" for text in note) in (study / "results/report.html").read_text()


def main_on(study, *more):
    places = {"predictions": "out", "truth": "data", "ct": "data", "lungs": "data", "output": "results"}
    call = [text for name, place in places.items() for text in (f"--{name}", str(study / place))]
    return main([*call, "--control-voxels", "20", "--pictures", "0", *more])


def test_labels_of_truth_and_lungs_are_chosen_or_told(study, capsys):
    rng = np.random.default_rng(7)
    for case in "ab":
        v = voxels_of(case)
        labels = np.where(v["truth"], 3, rng.integers(1, 3, SHAPE) * v["lung"])  # lungs are 1 and 2
        save(study / "data" / f"{case}_truth.nii.gz", labels.astype(np.uint8))
    ml = 5 * 0.8 * 0.8 / 1000
    assert main_on(study) == 0
    lines = capsys.readouterr().err.splitlines()
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(study / "data/a_truth.nii.gz")))
    told = ", ".join(f"{k} ({(labels == k).sum() * ml:.1f} ml)" for k in (1, 2, 3))
    text = f"{study / 'data/a_truth.nii.gz'}: labels {told} all count as the mask; label chooses"
    lung = voxels_of("a")["lung"]
    covered = (
        f"the truth covers {100 * ((labels > 0) & lung).sum() / lung.sum():.0f} % of the lungs: a lung mask?"
    )
    assert [line for line in lines if ": a: " in line] == [f"warning: a: {text}", f"warning: a: {covered}"]
    assert {line.split(": ")[1] for line in lines} == {"a", "b"}
    document = json.loads((study / "results/results.json").read_text())
    assert document["cases"]["a"]["notes"][-2:] == document["warnings"]["a"] == [text, covered]
    assert document["cases"]["a"]["tp"] == (voxels_of("a")["lesions"] & (labels > 0)).sum()
    assert covered in (study / "results/tables.md").read_text()
    with (study / "results/cases.csv").open() as stream:
        rows = [row["notes"] for row in csv.DictReader(stream) if row["case"] == "a"]
    assert all(notes.endswith(f"{text}; {covered}") for notes in rows)

    # truth of one label has no third: these cases fail, the others are what they were with one label
    assert main_on(study, "--label", "3") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [["error", "c"], ["error", "d"]]
    assert all("label must be among 1 (" in line for line in lines)
    document = json.loads((study / "results/results.json").read_text())
    assert document["settings"]["label"] == [3]
    for case in "ab":
        v = voxels_of(case)
        assert document["cases"][case]["tp"] == (v["lesions"] & v["truth"]).sum()
        assert not document["cases"][case]["notes"]

    # of both, the given ones that are there
    assert main_on(study, "--label", "1", "3", "--lung-label", "1") == 0
    for case, line in zip("cd", capsys.readouterr().err.splitlines()[2:], strict=False):
        assert line.startswith(f"warning: {case}: ")
    assert main_on(study, "--lung-label", "2") == 1
    assert "c_lung.nii.gz: label must be among 1 (" in capsys.readouterr().err
    with pytest.raises(ValueError, match="lung_label must be omitted where neither lungs nor cases"):
        config_of(study, lungs=(), lung_label=(1,))


@pytest.mark.parametrize("share", [0.95, 1.0])
def test_a_truth_that_is_a_lung_mask_is_told(share):
    rng = np.random.default_rng(3)
    v = voxels_of("a")
    truth = v["lung"] & (rng.random(SHAPE) < share)
    covered = f"{100 * truth.sum() / v['lung'].sum():.0f} %"
    with pytest.warns(UserWarning, match=f"the truth covers {covered} of the lungs: a lung mask"):
        evaluate_case(v["lesions"], truth, v["lung"], v["hu"])


def test_a_truth_that_lies_elsewhere_is_told():
    v = voxels_of("a")
    left = np.zeros(SHAPE, bool)
    left[..., :6] = True
    with pytest.warns(
        UserWarning, match="the truth has 133 % of the lungs' volume: a mask of something else"
    ):
        evaluate_case(v["lesions"], ~left, left, v["hu"])
    outside = ~left & (np.arange(14) < 10)
    outside[0] |= left[0]
    share = f"{100 * 6 / (6 + 5 * 4):.0f} %"
    with pytest.warns(UserWarning, match=f"only {share} of the truth lies in the lungs: another scan's"):
        evaluate_case(v["lesions"], outside, left, v["hu"])
    # next to no truth says nothing
    evaluate_case(v["lesions"], outside, left, v["hu"], control_voxels=outside.sum() + 1)


def test_oracle_stands_apart_and_says_what_it_is(study):
    plain = evaluate(config_of(study))
    assert not any("Oracle" in grid.title for grid in plain.grids())
    evaluation = evaluate(config_of(study, oracle=True))
    assert grid_of(evaluation, "Table III") == grid_of(plain, "Table III")
    rows = grid_of(evaluation, "Oracle, NOT a result")
    assert list(rows) == ["Proposed", "VAE"]
    volumes = [voxels_of(case) for case in PATIENTS]
    for name, kind in (("Proposed", "probability"), ("VAE", "vae_probability")):
        best, level = [], None
        for step in range(101):
            scores = []
            for v in volumes:
                # NormNet judges bright voxels, a baseline the whole lung
                judged = v["lung"] & ((v["hu"] >= -500) if name == "Proposed" else True)
                marked = judged & (v[kind] <= np.float32(step / 100))
                scores.append(overlap_by_loop(marked, v["truth"]) if marked.any() else (0.0, math.nan, 0.0))
            if not best or sum(s[0] for s in scores) > sum(s[0] for s in best) + 1e-12:
                best, level = scores, step / 100
        where = "lung from -500 HU" if name == "Proposed" else "lung"
        assert rows[name] == [*texts(best), "3", f"{level:.2f}", where]
    document = json.loads((study / "results/results.json").read_text())
    assert document["methods"]["VAE"]["oracle_searched_on_this_test_set"]["threshold"] == level
    assert "very test set" in (study / "results/tables.md").read_text()


def test_oracle_and_histogram_are_of_the_voxels_that_the_method_judges(study):
    """A perfect map of a model for T = -700 HU, of lesions that the paper's T leaves out."""
    lung = np.ones(SHAPE, bool)
    truth = np.zeros(SHAPE, bool)
    truth[1:4, 3:9, 3:9] = True
    hu = np.where(truth, -600, -850).astype(np.int16)
    hu[0] = -700  # bright for this model, and healthy
    probability = np.where(truth, 0.1, 0.9).astype(np.float32)
    case = CaseVolumes(
        case="faint", hu=hu, prediction=truth, truth=truth, lung_mask=lung, probability=probability,
        spacing=(1.0, 1.0, 1.0), origin=Origin("fixed at 0.95; T -700 HU", threshold_hu=-700.0),
    )  # fmt: skip
    evaluation = evaluate_volumes([case], oracle=True, pictures=0)
    assert evaluation.scores["faint"]["dsc"] == evaluation.oracle["mean_dsc"] == 1.0
    assert grid_of(evaluation, "Oracle")["Proposed"][-1] == "lung from -700 HU"
    counted = {name: int(bins.sum()) for name, bins in evaluation.methods[0].voxels.probability.items()}
    assert counted == {"healthy": hu[0].size, "lesion": truth.sum()}
    assert any(
        p.startswith("lung voxels of at least -700 HU by") for p in evaluation.methods[0].voxels.pictures()
    )
    # Table II keeps to the paper's voxels, of which there are none, and says so
    assert evaluation.scores["faint"]["bright_lesion_voxels"] == 0
    (grid,) = (g for g in evaluation.grids() if g.title.startswith("Table II:"))
    assert grid.rows[0][-1] == "mean probability, fixed at 0.95; T -700 HU"
    assert "at least -500 HU, the paper's T, for every method whatever its own T" in grid.note
    # the whole lung, and other T in other cases
    whole = evaluate_volumes([replace(case, origin=Origin("x", threshold_hu=None))], oracle=True, pictures=0)
    assert whole.oracle["mean_dsc"] == 1.0
    assert sum(int(bins.sum()) for bins in whole.methods[0].voxels.probability.values()) == hu.size
    usual = replace(case, case="usual", origin=Origin("fixed at 0.95"))
    both = evaluate_volumes([case, usual], oracle=True, pictures=0)
    assert both.methods[0].judges == "DIFFERENT: lung from -700 HU (n = 1); lung from -500 HU (n = 1)"
    assert both.oracle["mean_dsc"] == 0.5
    caption = "lung voxels of at least -700 HU or lung voxels of at least -500 HU by healthy probability"
    assert caption in both.methods[0].voxels.pictures()


@pytest.mark.parametrize("level", [-700.0, -650.0, -500.0, -300.0])
def test_oracle_at_any_t_equals_a_loop(level):
    v = voxels_of("a")
    counts = threshold_counts(v["truth"], v["lung"], v["hu"], v["probability"], threshold_hu=level)
    for step in (0, 20, 50, 96, 100):
        n = [0, 0, 0]
        for voxel in np.ndindex(SHAPE):
            judged = v["lung"][voxel] and v["hu"][voxel] >= level
            marked = judged and v["probability"][voxel] <= np.float32(step / 100)
            if marked or v["truth"][voxel]:
                n[0 if marked and v["truth"][voxel] else 1 if marked else 2] += 1
        assert counts[step].tolist() == n


def test_oracle_without_a_patient():
    v = voxels_of("a")
    nothing = np.zeros(SHAPE, bool)
    counts = threshold_counts(v["truth"], v["lung"], v["hu"], np.ones(SHAPE, np.float32))
    assert np.isnan(summary_at([counts], 0.5)["psc"]["mean"])  # nothing marked
    assert summary_at([counts], 0.5)["sen"]["mean"] == 0
    assert math.isnan(oracle_threshold([])["threshold"])
    case = CaseVolumes(
        case="c", hu=v["hu"], prediction=nothing, truth=nothing, lung_mask=v["lung"],
        probability=v["probability"], spacing=(1.0, 1.0, 1.0),
    )  # fmt: skip
    evaluation = evaluate_volumes([case], oracle=True, pictures=0)
    assert not any("Oracle" in grid.title for grid in evaluation.grids())
    assert grid_of(evaluation, "Table III")["Proposed"] == ["–", "–", "–", "0", UNKNOWN]


def damage(study, what):
    """Break case b; return what the reason must say, and of which method."""
    out = study / "out/b_lesions.nii.gz"
    if what == "empty file":
        out.write_bytes(b"")
    elif what == "damaged gzip":
        data = bytearray(out.read_bytes())
        data[len(data) // 2] ^= 0xFF
        out.write_bytes(bytes(data[:-40]))
    elif what == "another grid":
        image = sitk.ReadImage(str(out))
        image.SetOrigin((3.0, 0.0, 0.0))
        sitk.WriteImage(image, str(out))
        return "must lie on the grid of", "Proposed"
    elif what == "other shape":
        save(out, np.zeros((5, 12, 13), bool))
        return "shape must be that of", "Proposed"
    elif what == "no CT":
        (study / "data/b_hu.nii.gz").write_bytes(b"nothing")
        return "b_hu.nii.gz", None
    elif what == "a case less":
        (study / "vae/b_lesions.nii.gz").unlink()
        return "there is no lesion map of this case", "VAE"
    elif what == "percent":
        save(study / "vae/b_probability.nii.gz", np.full(SHAPE, 95, np.float32))
        return "healthy_probability must lie in [0, 1], got 95 to 95", "VAE"
    return "b_lesions.nii.gz", "Proposed"


@pytest.mark.parametrize(
    "what", ["empty file", "damaged gzip", "another grid", "other shape", "no CT", "a case less", "percent"]
)
def test_a_broken_case_does_not_stop_the_others(study, what, capsys):
    reason, method = damage(study, what)
    data = str(study / "data")
    call = ["--predictions", str(study / "out"), "--truth", data, "--ct", data, "--lungs", data]
    call += [
        "--compare",
        f"VAE={study / 'vae'}",
        "--output",
        str(study / "results"),
        "--control-voxels",
        "20",
    ]
    assert main([*call, "--pictures", "0"]) == 1
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"error: b ({method}): " if method else "error: b: ")
    assert reason in line
    document = json.loads((study / "results/results.json").read_text())
    (failure,) = document["failures"]
    assert (failure["case"], failure["method"]) == ("b", method)
    assert reason in failure["reason"]
    assert "Could not be evaluated" in (study / "results/report.html").read_text()
    left = {m: [c for c in "abcd" if c != "b" or (method and m != method)] for m in ("Proposed", "VAE")}
    for name, cases in left.items():
        assert list(document["methods"][name]["cases"]) == cases
        assert document["methods"][name]["summary"]["dsc"]["n"] == len(cases) - 1
    # what is left is what it would have been
    v = voxels_of("a")
    assert document["methods"]["VAE"]["cases"]["a"]["tp"] == (v["vae_lesions"] & v["truth"]).sum()


def test_every_case_broken_is_still_told(study, capsys):
    for path in (study / "data").glob("*_hu.nii.gz"):
        path.write_bytes(b"")
    config = config_of(study)
    evaluation = evaluate(config)
    assert len(evaluation.failures) == 4
    assert grid_of(evaluation, "Table III")["Proposed"] == ["–", "–", "–", "0", "–"]
    assert (config.output / "report.html").exists()


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        (("vae",), "compare must be NAME=FOLDER, got 'vae'"),
        (("=vae",), "compare must be NAME=FOLDER"),
        (("VAE=",), "compare must be NAME=FOLDER"),
        (("Proposed=out",), "a name of its own, got 'Proposed' again"),
        (("Proposed w/o growing=out",), "a name of its own, got 'Proposed w/o growing' again"),
        (("VAE=a", "VAE=b"), "a name of its own, got 'VAE' again"),
    ],
)
def test_comparisons_have_a_name_and_a_folder(study, compare, message):
    with pytest.raises(ValueError, match=message):
        config_of(study, compare=compare)


@pytest.mark.parametrize(
    ("folder", "message"), [("nowhere", "nowhere: no such file or folder"), ("empty", "found none of them")]
)
def test_folders_without_the_cases_end_with_2(study, folder, message, capsys):
    (study / "empty").mkdir()
    data = str(study / "data")
    call = ["--predictions", str(study / "out"), "--truth", data, "--ct", data]
    call += ["--output", str(study / "results"), "--compare"]
    assert main([*call, f"VAE={study / folder}"]) == 2
    assert message in capsys.readouterr().err
    assert not (study / "results").exists()
    with pytest.raises(SystemExit) as end:
        main([*call, "VAE"])
    assert end.value.code == 2
    (study / "file").touch()
    call[call.index("--output") + 1] = str(study / "file")
    assert main(call[:-1]) == 2  # nowhere to write


def test_where_a_threshold_comes_from(tmp_path):
    maps = tmp_path / "p_seg_lesions.nii.gz"

    def label(record):
        (tmp_path / "p_seg.json").write_text(json.dumps(record))
        return read_origin(maps)

    files = {"lesions": maps.name}
    assert read_origin(maps) == Origin(UNKNOWN)  # no record
    fixed = {"settings": {"probability": 0.95}, "models": [{"probability": 0.95}], "files": files}
    assert label(fixed) == Origin("fixed at 0.95")
    assert label({**fixed, "files": {"lesions": "other.nii.gz"}}) == Origin(UNKNOWN)
    own = {"settings": {"probability": "calibrated"}, "models": [{"probability": 0.62}], "files": files}
    assert label(own) == Origin("calibrated on synthetic pairs: 0.62")
    faint = {**own, "models": [{"probability": 0.62, "threshold_hu": -650.0}]}
    assert label(faint) == Origin("calibrated on synthetic pairs: 0.62; T -650 HU", threshold_hu=-650.0)
    two = [{"probability": 0.95, "threshold_hu": level} for level in (-500.0, -700.0)]
    assert label({**fixed, "models": two}) == Origin("fixed at 0.95; T -700 HU", threshold_hu=-700.0)
    # of a version whose models had no T of their own
    for level, expected in (
        (-600.0, ("fixed at 0.95; T -600 HU", -600.0)),
        (None, ("fixed at 0.95", -500.0)),
    ):
        older = {"probability": 0.95, "postprocess": {"threshold_hu": level}}
        assert label({**fixed, "settings": older}) == Origin(*expected)
    assert label({**fixed, "models": [{"probability": 0.95, "threshold_hu": -500.0}]}) == Origin(
        "fixed at 0.95"
    )
    given = {"baseline": {"method": "ae", "threshold": 0.5, "calibrated": False}, "files": files}
    assert label(given) == Origin("fixed at anomaly 0.5", threshold_hu=None)
    for other in (
        [1],
        {"files": files},
        {"files": None},
        {**own, "models": [{}]},
        {**own, "models": [1]},
        {**own, "models": [{"probability": 0.62, "threshold_hu": -5000}]},
        {**own, "models": []},
        "x",
    ):
        assert label(other) == Origin(UNKNOWN)
    (tmp_path / "p_seg.json").write_bytes(b"\xff\x00")
    assert read_origin(maps) == Origin(UNKNOWN)
    assert read_origin(tmp_path / "p_seg.nii.gz") == Origin(UNKNOWN)


def in_memory(case):
    v = voxels_of(case)
    return CaseVolumes(
        case=case, hu=v["hu"], prediction=v["lesions"], truth=v["truth"], lung_mask=v["lung"],
        probability=v["probability"], spacing=(1.0, 1.0, 1.0), healthy=v["healthy"], core=v["core"],
    )  # fmt: skip


def test_thresholds_of_different_kinds_are_never_one():
    a, b = in_memory("a"), in_memory("b")
    mixed = evaluate_volumes(
        [
            replace(a, origin=Origin("fixed at 0.95")),
            replace(b, origin=Origin("calibrated on synthetic pairs: 0.6")),
        ],
        pictures=0,
    )
    label = "DIFFERENT: fixed at 0.95 (n = 1); calibrated on synthetic pairs: 0.6 (n = 1)"
    assert mixed.methods[0].threshold == label
    assert grid_of(mixed, "Table III")["Proposed"][-1] == label
    half = evaluate_volumes([a, replace(b, healthy=None)], pictures=0)
    assert half.methods[0].bright_threshold.startswith("DIFFERENT: vote, not recorded (n = 1); mean")


def test_without_growing_needs_every_case():
    a, b = in_memory("a"), in_memory("b")
    whole = evaluate_volumes([a, b], pictures=0)
    assert list(grid_of(whole, "Table III")) == ["Proposed w/o growing", "Proposed"]
    part = evaluate_volumes([a, replace(b, core=None)], pictures=0)
    assert list(grid_of(part, "Table III")) == ["Proposed"]
    with pytest.raises(ValueError, match="case 'b': lesion_truth must have the shape of prediction"):
        evaluate_volumes([a, replace(b, core=np.zeros((1, 1, 1), bool))], pictures=0)


def test_a_case_that_fails_leaves_nothing_behind():
    method = MethodScores(name="m")
    broken = replace(in_memory("a"), core=np.zeros(SHAPE, np.uint8))
    with pytest.raises(TypeError, match="prediction must be a bool array, got uint8"):
        method.add(broken)
    assert not method.scores
    assert not method.thresholds
    assert not any(counts.any() for counts in method.voxels.hu.values())


def test_markdown_escapes_bars():
    text = markdown(Grid("T", ["a|b", "c"], [["1", "2|3"]], "Why."))
    assert text == "**T**\n\n| a\\|b | c |\n| --- | --- |\n| 1 | 2\\|3 |\n\nWhy.\n"


def test_the_paper_s_rows_are_those_of_table_three():
    assert len(PAPER_SCORES) == 15
    assert {len(row) for row in PAPER_SCORES.values()} == {6}
    assert PAPER_SCORES["Proposed"][::3] == ("68.7±15.8", "59.4±17.4")
    assert PAPER_BRIGHT["Radiopedia"][-1] == "89.5"
