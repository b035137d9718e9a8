"""Evaluations: files found, every figure of Tables II and III against loops over voxels, labels, failures."""

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

import pandas as pd
import SimpleITK as sitk
from matplotlib.image import imread

from normnet import paper
from normnet.evaluate import (
    CaseVolumes,
    EvaluateConfig,
    Evaluation,
    Origin,
    Table,
    as_text,
    evaluate,
    evaluate_volumes,
    main,
    origin_of,
)
from normnet.metrics import evaluate_case

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


def record_of(folder, case, ct, **more):
    """Write the record of a prediction."""
    kinds = ("lesions", "lung", "core", "probability", "healthy")
    files = {kind: name for kind in kinds if (folder / (name := f"{case}_{kind}.nii.gz")).exists()}
    record = {
        "case": case,
        "ct": str(ct),
        "series": None,
        "lungs_from": "network",
        "settings": {"probability": "calibrated"},
        "models": [{"probability": 0.6}, {"probability": 0.7}],
        "volumes": {"lung_ml": 1.0, "lesion_ml": 1.0},
        "files": {"lung": f"{case}_lung.nii.gz", **files},
        **more,
    }
    (folder / f"{case}.json").write_text(json.dumps(record))
    return record


VAE = {"models": [], "baseline": {"method": "vae", "threshold": 0.8, "calibrated": True}}


@pytest.fixture
def study(tmp_path):
    for case in (*PATIENTS, CONTROL):
        v = voxels_of(case)
        save(tmp_path / f"scans/{case}.nii.gz", v["hu"])
        save(tmp_path / f"truth/{case}_truth.nii.gz", v["truth"])
        save(tmp_path / f"lungs/{case}.nii.gz", v["lung"])
        for kind in ("lesions", "core", "probability", "healthy"):
            save(tmp_path / f"out/{case}_{kind}.nii.gz", v[kind])
        for kind in ("lesions", "probability"):
            save(tmp_path / f"vae/{case}_{kind}.nii.gz", v[f"vae_{kind}"])
        for folder, more in (("out", {}), ("vae", VAE)):
            record_of(tmp_path / folder, case, tmp_path / f"scans/{case}.nii.gz", **more)
    return tmp_path


def config_of(study, **changes):
    given = {"output": study / "results", "predictions": study / "out", "truth": study / "truth"}
    given |= {"masks": study / "lungs", "compare": (f"VAE={study / 'vae'}",)}
    given |= {"control_voxels": 20, "pictures": 0}
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


def rows_of(evaluation, beginning):
    (table,) = (t for t in evaluation.tables() if t.title.startswith(beginning))
    return {row[0]: row[1:] for row in table.frame.to_numpy().tolist()}


def cells_of(path):
    """Rows of the tables in a Markdown file."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_tables_of_two_methods_equal_loops(study):
    evaluation = evaluate(config_of(study))
    volumes = {case: voxels_of(case) for case in PATIENTS}
    rows = rows_of(evaluation, "Table III")
    assert list(rows) == ["Proposed w/o growing", "Proposed", "VAE"]
    maps = {"Proposed w/o growing": "core", "Proposed": "lesions", "VAE": "vae_lesions"}
    for name, cells in rows.items():
        expected = texts([overlap_by_loop(v[maps[name]], v["truth"]) for v in volumes.values()])
        assert cells == [*expected, "3", HEALTHY_SET if name == "VAE" else CALIBRATED]
    assert len({cells[0] for cells in rows.values()}) == 3
    rows = rows_of(evaluation, "Table II:")
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
        document["methods"]["VAE"]["summary"]["dsc"]["mean"]
        == evaluation.methods["VAE"].summary["dsc"]["mean"]
    )
    assert document["methods"]["VAE"]["threshold"] == HEALTHY_SET
    assert document["failures"] == []
    cells = cells_of(study / "results/tables.md")
    for table in evaluation.tables():
        assert list(table.frame) in cells
        assert all(row in cells for row in table.frame.to_numpy().tolist())
    assert sum(row[:4] == ["c (control)", "–", "–", "–"] for row in cells) == 3
    assert ["VAE", "26.4±14.5", "19.8±14.0", "50.1±9.8", "28.1±17.5", "21.6±17.6", "62.3±5.7"] in cells
    assert "As printed in Yao, Xiao, Liu and Zhou" in (study / "results/tables.md").read_text()
    assert list(evaluation.frame["tp"]) == [int(row["tp"]) for row in rows]
    assert list(evaluation.frame["method"].unique()) == list(names)


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
    for folder, whose in ("vae", "VAE"), ("out", "all"):
        for case in (*PATIENTS, CONTROL):
            (study / folder / f"{case}_probability.nii.gz").unlink()
            (study / folder / f"{case}_healthy.nii.gz").unlink(missing_ok=True)
            more = VAE if folder == "vae" else {}
            record_of(study / folder, case, study / f"scans/{case}.nii.gz", **more)
        evaluation = evaluate(config_of(study))
        note = ["a", whose, "no healthy probability: Table II not computed"]
        (notes,) = (table for table in evaluation.tables() if table.title == "Notes")
        assert [row for row in notes.frame.to_numpy().tolist() if row[0] == "a"] == [note]
        assert note in cells_of(study / "results/tables.md")
        assert "".join(f"<td>{text}</td>" for text in note) in (study / "results/report.html").read_text()


def main_on(study, *more):
    places = {"predictions": "out", "truth": "truth", "masks": "lungs", "output": "results"}
    call = [text for name, place in places.items() for text in (f"--{name}", str(study / place))]
    return main([*call, "--control-voxels", "20", "--pictures", "0", *more])


def test_labels_of_truth_and_lungs_are_chosen_or_told(study, capsys):
    rng = np.random.default_rng(7)
    for case in "ab":
        v = voxels_of(case)
        labels = np.where(v["truth"], 3, rng.integers(1, 3, SHAPE) * v["lung"])  # lungs are 1 and 2
        save(study / f"truth/{case}_truth.nii.gz", labels.astype(np.uint8))
    ml = 5 * 0.8 * 0.8 / 1000
    assert main_on(study) == 0
    lines = capsys.readouterr().err.splitlines()
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(study / "truth/a_truth.nii.gz")))
    told = ", ".join(f"{k} ({(labels == k).sum() * ml:.1f} ml)" for k in (1, 2, 3))
    text = f"{study / 'truth/a_truth.nii.gz'}: labels {told} all count as the mask; label chooses"
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
    assert "lungs/c.nii.gz: label must be among 1 (" in capsys.readouterr().err
    with pytest.raises(ValueError, match="lung_label must be omitted where neither masks nor cases"):
        config_of(study, masks=None, lung_label=(1,))


def test_oracle_stands_apart_and_says_what_it_is(study):
    plain = evaluate(config_of(study))
    assert not any("Oracle" in table.title for table in plain.tables())
    evaluation = evaluate(config_of(study, oracle=True))
    assert rows_of(evaluation, "Table III") == rows_of(plain, "Table III")
    rows = rows_of(evaluation, "Oracle, NOT a result")
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
    assert (
        evaluation.scores["faint"]["dsc"]
        == evaluation.methods["Proposed"].oracle_searched_on_this_test_set["mean_dsc"]
        == 1.0
    )
    assert rows_of(evaluation, "Oracle")["Proposed"][-1] == "lung from -700 HU"
    counted = {name: int(bins.sum()) for name, bins in evaluation.voxels["Proposed"].probability.items()}
    assert counted == {"healthy": hu[0].size, "lesion": truth.sum()}
    assert any(
        p.startswith("lung voxels of at least -700 HU by") for p in evaluation.voxels["Proposed"].pictures()
    )
    # Table II keeps to the paper's voxels, of which there are none, and says so
    assert evaluation.scores["faint"]["bright_lesion_voxels"] == 0
    (table,) = (t for t in evaluation.tables() if t.title.startswith("Table II:"))
    assert table.frame.iloc[0, -1] == "mean probability, fixed at 0.95; T -700 HU"
    assert "at least -500 HU, the paper's T, for every method whatever its own T" in table.note
    # the whole lung, and other T in other cases
    whole = evaluate_volumes([replace(case, origin=Origin("x", threshold_hu=None))], oracle=True, pictures=0)
    assert whole.methods["Proposed"].oracle_searched_on_this_test_set["mean_dsc"] == 1.0
    assert sum(int(bins.sum()) for bins in whole.voxels["Proposed"].probability.values()) == hu.size
    usual = replace(case, case="usual", origin=Origin("fixed at 0.95"))
    both = evaluate_volumes([case, usual], oracle=True, pictures=0)
    assert (
        both.methods["Proposed"].judges == "DIFFERENT: lung from -700 HU (n = 1); lung from -500 HU (n = 1)"
    )
    assert both.methods["Proposed"].oracle_searched_on_this_test_set["mean_dsc"] == 0.5
    caption = "lung voxels of at least -700 HU or lung voxels of at least -500 HU by healthy probability"
    assert caption in both.voxels["Proposed"].pictures()


def test_oracle_without_a_patient():
    v = voxels_of("a")
    nothing = np.zeros(SHAPE, bool)
    case = CaseVolumes(
        case="c", hu=v["hu"], prediction=nothing, truth=nothing, lung_mask=v["lung"],
        probability=v["probability"], spacing=(1.0, 1.0, 1.0),
    )  # fmt: skip
    evaluation = evaluate_volumes([case], oracle=True, pictures=0)
    assert not any("Oracle" in table.title for table in evaluation.tables())
    assert rows_of(evaluation, "Table III")["Proposed"] == ["–", "–", "–", "0", "not recorded"]


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
        (study / "scans/b.nii.gz").write_bytes(b"nothing")
        return "scans/b.nii.gz", None
    elif what == "a case less":
        (study / "vae/b_lesions.nii.gz").unlink()
        (study / "vae/b.json").unlink()
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
    assert main_on(study, "--compare", f"VAE={study / 'vae'}") == 1
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
    for path in (study / "scans").glob("*.nii.gz"):
        path.write_bytes(b"")
    config = config_of(study)
    evaluation = evaluate(config)
    assert len(evaluation.failures) == 4
    assert rows_of(evaluation, "Table III")["Proposed"] == ["–", "–", "–", "0", "–"]
    assert (config.output / "report.html").exists()


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        (("vae",), r"compare must be NAME=FOLDER, got \('vae',\)"),
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
    ("folder", "message"),
    [("nowhere", "nowhere: no such file or folder"), ("empty", "compare must hold a.nii.gz, or one file of")],
)
def test_folders_without_the_cases_end_with_2(study, folder, message, capsys):
    (study / "empty").mkdir()
    call = ["--predictions", str(study / "out"), "--truth", str(study / "truth")]
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


def test_where_a_threshold_comes_from():
    fixed = {"settings": {"probability": 0.95}, "models": [{"probability": 0.95}]}
    assert origin_of({}) == Origin("not recorded")
    assert origin_of(fixed) == Origin("fixed at 0.95")
    own = {"settings": {"probability": "calibrated"}, "models": [{"probability": 0.62}]}
    assert origin_of(own) == Origin("calibrated on synthetic pairs: 0.62")
    faint = {**own, "models": [{"probability": 0.62, "threshold_hu": -650.0}]}
    assert origin_of(faint) == Origin("calibrated on synthetic pairs: 0.62; T -650 HU", threshold_hu=-650.0)
    two = [{"probability": 0.95, "threshold_hu": level} for level in (-500.0, -700.0)]
    assert origin_of({**fixed, "models": two}) == Origin("fixed at 0.95; T -700 HU", threshold_hu=-700.0)
    mixed = [{"probability": p, "calibrated": p < 0.9} for p in (0.6, 0.95)]
    assert origin_of({**fixed, "models": mixed}) == Origin("thresholds 0.6 calibrated, 0.95 fixed")
    # of a version whose models had no T of their own
    for level, expected in (
        (-600.0, ("fixed at 0.95; T -600 HU", -600.0)),
        (None, ("fixed at 0.95", -500.0)),
    ):
        older = {"probability": 0.95, "postprocess": {"threshold_hu": level}}
        assert origin_of({**fixed, "settings": older}) == Origin(*expected)
    assert origin_of({**fixed, "models": [{"probability": 0.95, "threshold_hu": -500.0}]}) == Origin(
        "fixed at 0.95"
    )
    given = {"baseline": {"method": "ae", "threshold": 0.5, "calibrated": False}}
    assert origin_of(given) == Origin("fixed at anomaly 0.5", threshold_hu=None)
    for other in (
        {"models": []},
        {"baseline": 3},
        {**own, "models": [{}]},
        {**own, "models": [1]},
        {**own, "models": [{"probability": 0.62, "threshold_hu": -5000}]},
        {**own, "models": []},
    ):
        assert origin_of(other) == Origin()


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
    assert mixed.methods["Proposed"].threshold == label
    assert rows_of(mixed, "Table III")["Proposed"][-1] == label
    half = evaluate_volumes([a, replace(b, healthy=None)], pictures=0)
    assert half.methods["Proposed"].bright_threshold.startswith("DIFFERENT: vote, not recorded (n = 1); mean")


def test_without_growing_needs_every_case():
    a, b = in_memory("a"), in_memory("b")
    whole = evaluate_volumes([a, b], pictures=0)
    assert list(rows_of(whole, "Table III")) == ["Proposed w/o growing", "Proposed"]
    part = evaluate_volumes([a, replace(b, core=None)], pictures=0)
    assert list(rows_of(part, "Table III")) == ["Proposed"]
    with pytest.raises(ValueError, match="case 'b': lesion_truth must have the shape of prediction"):
        evaluate_volumes([a, replace(b, core=np.zeros((1, 1, 1), bool))], pictures=0)


def test_a_case_that_fails_leaves_nothing_behind():
    evaluation = Evaluation(names=("m",))
    broken = replace(in_memory("a"), core=np.zeros(SHAPE, np.uint8))
    with pytest.raises(TypeError, match="prediction must be a bool array, got uint8"):
        evaluation.add(broken)
    assert evaluation.frame.empty
    assert not any(counts.any() for counts in evaluation.voxels["m"].hu.values())
    assert as_text(evaluation.table()).splitlines()[-1].split() == ["mean±SD", *["–"] * 7]


def test_markdown_escapes_bars():
    text = Table("T", pd.DataFrame([["1", "2|3"]], columns=["a|b", "c"]), "Why.").markdown()
    assert text == "**T**\n\n| a\\|b   |    c |\n|:-------|-----:|\n| 1      | 2\\|3 |\n\nWhy.\n"


def test_the_paper_s_rows_are_those_of_table_three():
    assert len(paper.TABLE_III) == 15
    assert {len(row) for row in paper.TABLE_III.values()} == {6}
    assert paper.TABLE_III["Proposed"][::3] == ("68.7±15.8", "59.4±17.4")
    assert paper.TABLE_II["Radiopedia"][-1] == "89.5"


def test_results_are_written_without_nan_in_json(tmp_path):
    evaluation = evaluate_volumes([in_memory("a"), in_memory("b")], oracle=True, pictures=1)
    evaluation.write(tmp_path / "new/results")
    document = json.loads((tmp_path / "new/results/results.json").read_text())
    assert document["cases"]["a"]["dsc"] == evaluation.scores["a"]["dsc"]
    assert document["oracle_searched_on_this_test_set"]["mean_dsc"] > 0
    assert "oracle" not in document["summary"]
    with (tmp_path / "new/results/cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows] == ["a", "b"] * 2
    assert float(rows[1]["bright_auc"]) == evaluation.scores["b"]["bright_auc"]
    page = (tmp_path / "new/results/report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # two slices, two histograms
    nothing = np.zeros(SHAPE, bool)
    empty = evaluate_volumes([replace(in_memory("a"), truth=nothing, prediction=nothing)], pictures=0)
    empty.write(tmp_path / "new/results")
    assert json.loads((tmp_path / "new/results/results.json").read_text())["cases"]["a"]["dsc"] is None
    assert "a,Proposed,0,0,0,nan,nan,nan,0.0," in (tmp_path / "new/results/cases.csv").read_text()


def test_cases_must_differ_and_errors_name_them():
    with pytest.raises(ValueError, match="different names, got 'a' twice"):
        evaluate_volumes([in_memory("a"), in_memory("a")])
    with pytest.raises(ValueError, match="at least one case"):
        evaluate_volumes([])
    broken = in_memory("c")
    with pytest.raises(ValueError, match="case 'c': lung_mask must have at least one voxel"):
        evaluate_volumes([replace(broken, lung_mask=np.zeros(SHAPE, bool))])


# ---- files


def test_files_give_the_scores_of_their_arrays(study):
    """Whichever way their axes run."""
    folders = {"lesions": "out", "probability": "out", "healthy": "out", "hu": "scans", "lung": "lungs"}
    for case in PATIENTS:
        for path in (*study.rglob(f"{case}.nii.gz"), *study.rglob(f"{case}_*.nii.gz")):
            image = sitk.ReadImage(str(path))
            image.SetDirection((1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
            sitk.WriteImage(image, str(path))
    assert set(folders.values()) == {"out", "scans", "lungs"}
    evaluation = evaluate(config_of(study))
    for case in PATIENTS:
        v = voxels_of(case)
        maps = (v["lesions"], v["truth"], v["lung"], v["hu"], v["probability"])
        expected = evaluate_case(*maps, healthy=v["healthy"], spacing=(5.0, 0.8, 0.8))
        found = evaluation.scores[case]
        # NIfTI keeps spacing as float32: volumes to seven digits; everything else is a count
        assert found["lesion_ml"] == pytest.approx(expected["lesion_ml"], rel=1e-6)
        for name in ("tp", "fp", "fn", "bright_auc", "bright_precision", "bright_specificity"):
            assert found[name] == expected[name]


def foreign(study):
    """Maps that another program made: one a case, and no record."""
    for case in (*PATIENTS, CONTROL):
        save(study / f"foreign/{case}_theirs.nii.gz", voxels_of(case)["lesions"])
    return study / "foreign"


def test_maps_of_another_program(study, capsys):
    places = {"predictions": foreign(study), "truth": study / "truth", "masks": study / "lungs"}
    call = [f"--{name}={path}" for name, path in places.items()] + [f"--output={study / 'results'}"]
    assert main(call) == 2
    assert "ct must be given for maps without <case>.json" in capsys.readouterr().err
    call += [f"--ct={study / 'scans'}", "--pictures=0", "--control-voxels=20"]
    assert main(call) == 0
    assert "mean±SD" in capsys.readouterr().out
    document = json.loads((study / "results/results.json").read_text())
    assert document["methods"]["Proposed"]["threshold"] == "not recorded"
    for case in PATIENTS:
        v = voxels_of(case)
        assert document["cases"][case]["tp"] == (v["lesions"] & v["truth"]).sum()
    # with two files of a case it is not told which
    (study / "truth/b_truth.nii.gz").unlink()
    save(study / "foreign/a_more.nii.gz", voxels_of("a")["lesions"])
    assert main(call) == 1
    one, two = capsys.readouterr().err.splitlines()
    rule = "predictions must hold a.nii.gz, or one file of a_*.nii.gz, got a_more.nii.gz, a_theirs.nii.gz"
    assert one.startswith(f"error: a (Proposed): {rule}")
    assert two.startswith("error: b: truth must hold b.nii.gz, or one file of b_*.nii.gz, got ")
    document = json.loads((study / "results/results.json").read_text())
    assert list(document["cases"]) == ["c", "d"]
    # nothing fits at all: a wrong call
    for path in (study / "truth").iterdir():
        path.rename(path.with_name(f"z{path.name}"))
    assert main(call) == 2
    assert "truth must hold a.nii.gz" in capsys.readouterr().err


def test_lungs_that_the_prediction_used_stand_in_for_given_ones(study):
    given = evaluate(config_of(study, compare=()))
    for case in (*PATIENTS, CONTROL):
        save(study / f"out/{case}_lung.nii.gz", np.ones(SHAPE, bool))
        save(study / f"out/{case}_classical.nii.gz", np.zeros(SHAPE, bool))  # other lungs are none
    own = evaluate(config_of(study, masks=None, compare=()))
    for case in PATIENTS:
        v = voxels_of(case)
        for evaluation, lung in ((given, v["lung"]), (own, True)):
            bright = (lung & (v["hu"] >= -500) & v["truth"]).sum()
            assert evaluation.scores[case]["bright_lesion_voxels"] == bright


def test_cases_of_a_compared_method_that_are_none_of_ours_are_passed_over(study):
    for case in ("b", "c", "d"):
        (study / f"out/{case}.json").unlink()
        for path in (study / "out").glob(f"{case}_*"):
            path.unlink()
    evaluation = evaluate(config_of(study, control_voxels=0))
    assert not evaluation.failures
    assert [list(method.cases) for method in evaluation.methods.values()] == [["a"]] * 3


def test_what_is_unfinished_or_damaged_is_told(study, capsys):
    (study / "out/a.json").unlink()
    (study / "out/b.json").write_text("{")
    (study / "out/notes.json").write_text("{")  # no map of its name
    assert main_on(study) == 1
    one, two = capsys.readouterr().err.splitlines()
    assert one == "error: a: a.json is missing: its prediction was not finished"
    assert two.startswith(f"error: b: {study}/out/b.json: not the record of a prediction")
    assert list(json.loads((study / "results/results.json").read_text())["cases"]) == ["c", "d"]


def test_ct_that_moved_are_found(study, capsys):
    (study / "scans").rename(study / "moved")
    assert main_on(study) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].endswith("scans/a.nii.gz: no such file or folder; ct must name its new place")
    evaluation = evaluate(config_of(study, ct=(study / "moved",)))
    assert not evaluation.failures
    (study / "moved/a.nii.gz").rename(study / "moved/other.nii.gz")
    (failure,) = evaluate(config_of(study, ct=(study / "moved",))).failures
    assert failure.reason.endswith("scans/a.nii.gz: no such file or folder; nothing in ct fits either")


def test_a_table_names_every_file(study, capsys):
    save(study / "faint.nii.gz", voxels_of("a")["vae_lesions"])
    rows = [
        "case,ct,lungs,lesions,prediction,probability,healthy,core",
        "a,scans/a.nii.gz,lungs/a.nii.gz,truth/a_truth.nii.gz,faint.nii.gz,,,",
        "bob,scans/b.nii.gz,lungs/b.nii.gz,truth/b_truth.nii.gz,out/b_lesions.nii.gz,out/b_probability.nii.gz,,",
        "c,scans/c.nii.gz,,truth/gone.nii.gz,out/c_lesions.nii.gz,,,",
    ]
    table = study / "list.csv"
    table.write_text("\n".join(rows))
    call = [f"--cases={table}", f"--output={study / 'results'}", "--pictures=0", "--control-voxels=20"]
    assert main(call) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: c: ")
    assert "truth/gone.nii.gz: no such file" in line
    document = json.loads((study / "results/results.json").read_text())
    assert list(document["cases"]) == ["a", "bob"]
    v = voxels_of("a")
    assert document["cases"]["a"]["tp"] == (v["vae_lesions"] & v["truth"]).sum()
    # where a record lies beside a map it tells the threshold
    with (study / "results/cases.csv").open() as stream:
        labels = {row["case"]: row["threshold"] for row in csv.DictReader(stream)}
    assert labels == {"a": "not recorded", "bob": CALIBRATED}
    # maps of a folder, by its records; and of another program
    table.write_text("\n".join(row.rsplit(",", 4)[0].replace("bob", "b") for row in rows[:3]))
    for folder, label in ((study / "out", CALIBRATED), (foreign(study), "not recorded")):
        evaluation = evaluate(EvaluateConfig(cases=table, predictions=folder, output=study / "results"))
        assert not evaluation.failures
        assert evaluation.scores["a"]["tp"] == (v["lesions"] & v["truth"]).sum()
        assert evaluation.methods["Proposed"].threshold == label
    table.write_text("case,ct,lesions\na,scans/a.nii.gz,truth/a_truth.nii.gz\n")
    assert main(call) == 2
    assert "list.csv, line 2: prediction must be filled, got none" in capsys.readouterr().err
    for other in ({"truth": study}, {"masks": study}, {"ct": (study,)}):
        with pytest.raises(ValueError, match="cases replaces truth, ct and masks"):
            EvaluateConfig(cases=table, output=study / "results", **other)
    with pytest.raises(ValueError, match="predictions and truth must be given, or cases"):
        EvaluateConfig(predictions=study / "out", output=study / "results")


def test_one_file_is_no_truth_of_itself(study, capsys):
    """Neither as a prediction nor, without labels that differ, as lungs; whatever link leads to it."""
    (study / "link").mkdir()
    for case in PATIENTS:
        (study / f"link/{case}.nii.gz").symlink_to(study / f"out/{case}_lesions.nii.gz")
    evaluation = evaluate(config_of(study, truth=study / "link", compare=()))
    assert not evaluation.scores
    told = [one.reason.partition("nii.gz: ")[2] for one in evaluation.failures if one.case in PATIENTS]
    assert told == ["must not be both the truth and the prediction"] * 3
    (study / "same").mkdir()
    for case in (*PATIENTS, CONTROL):
        (study / f"same/{case}.nii.gz").symlink_to(study / f"lungs/{case}.nii.gz")
    call = [f"--predictions={study / 'out'}", f"--truth={study / 'same'}", f"--masks={study / 'lungs'}"]
    assert main([*call, f"--output={study / 'results'}"]) == 1
    err = capsys.readouterr().err
    assert err.count("labels must tell truth and lungs of one file apart") == 4
    evaluation = evaluate(config_of(study, truth=study / "same", label=(1,), lung_label=(2,)))
    assert not any("apart" in one.reason for one in evaluation.failures)
