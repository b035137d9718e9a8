"""Tables IV, V and VI end to end on tiny phantoms; interruption, reuse, votes, bad input."""

from __future__ import annotations

import csv
import functools
import json
import math
import shutil
import warnings
from dataclasses import replace
from typing import get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("matplotlib")

import torch

import lesionsynth as ls
import normnet.ablate
from lesionsynth.presets import BY_NAME
from normnet.ablate import (
    PAPER,
    SMALL,
    AblateConfig,
    Cell,
    _cached,
    _text,
    ablate,
    caveats,
    find_patients,
    main,
    majority,
    training,
)
from normnet.config import ModelConfig, PostprocessConfig, PredictConfig
from normnet.metrics import CaseScores, evaluate_case
from normnet.model import Model, build_unet
from normnet.paper import ITERATIONS, TABLE_IV, TABLE_V, TABLE_VI
from normnet.postprocess import postprocess
from normnet.predict import predict_volume
from normnet.train import Trainer
from tests import classical

# two steps of training are never sure to 0.95
PREDICT = PredictConfig(probability=0.5)
TINY = {
    "model": {"channels": [4, 8], "strides": [2]},
    "batch_size": 1,
    "slab": 16,
    "crop": 32,
    "phantoms": 1,
    "phantom_shape": [16, 64, 80],
    "held_out": 0,
    "validate_every": 0,
    "checkpoint_every": 1,
    "threads": 1,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def chests():
    """Phantoms drawn once: they take longer than all the training here."""
    drawn = functools.cache(ls.phantom.chest_ct)
    return lambda shape, spacing=(1.0, 0.8, 0.8), seed=0: drawn(tuple(shape), tuple(spacing), seed)


@pytest.fixture
def tiny(tmp_path, chests, monkeypatch):
    """An ablation of two models, two steps and one patient."""

    monkeypatch.setattr(ls.phantom, "chest_ct", chests)

    def make(table, /, **changes):
        file = tmp_path / "tiny.json"
        file.write_text(json.dumps(TINY))
        common = {
            "output": tmp_path / table,
            "config": file,
            "seeds": 2,
            "iterations": 2,
            "phantom_patients": 1,
            "phantom_shape": (32, 64, 80),
            "predict": PREDICT,
        }
        return AblateConfig(**({"table": table} | common | changes))

    return make


@pytest.fixture
def steps(monkeypatch):
    """Count training steps; a number in the list stops the run in that step, as a signal would."""
    made = {"count": 0, "stop": None}
    step = Trainer.step

    def counted(self, batch):
        if made["count"] == made["stop"]:
            raise KeyboardInterrupt
        made["count"] += 1
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", counted)
    return made


def test_paper_numbers_are_those_of_the_paper():
    assert ITERATIONS == (2000, 2500, 3000, 3500, 4000, 4500)
    assert list(TABLE_IV) == ["voting", *(f"model_{k}" for k in range(1, 6))]
    assert all(len(row) == len(ITERATIONS) for row in TABLE_IV.values())
    # the three tables share one ensemble: 5 models, 3,500 iterations, all modules, T = -500
    assert TABLE_IV["voting"][3] == TABLE_V["covid_lung"][-1] == TABLE_VI["-500"] == 68.7
    assert set(TABLE_V) <= set(BY_NAME)
    assert [row.count("×") for row in TABLE_V.values()] == [0, 1, 1, 1]
    assert (PAPER.seeds, PAPER.train.iterations, PAPER.train.batch_size, PAPER.train.slab) == (5, 3500, 8, 32)
    assert PAPER.train.crop is None
    assert SMALL.seeds == 3


def test_modules_is_table_v(tiny, capsys):
    config = tiny("modules")
    table = ablate(config)
    assert table.header == ["Shapes", "Probability Maps", "Salt Noises", "Dice", "Dice (paper)"]
    assert [row[:3] for row in table.rows] == [
        ["✓", "✓", "✓"], ["×", "✓", "✓"], ["✓", "×", "✓"], ["✓", "✓", "×"]
    ]  # fmt: skip
    assert [row[4] for row in table.rows] == ["68.7", "51.5", "62.0", "25.5"]
    assert table.failures == []
    results = json.loads((config.output / "results.json").read_text())
    for row, name in zip(table.rows, TABLE_V, strict=True):
        score = results["cells"][name]["votes"]["2"]["patients"]["phantom_1"]
        dice = 2 * score["tp"] / (2 * score["tp"] + score["fp"] + score["fn"])
        assert row[3] == f"{100 * dice:.1f}"
        run = config.output / "runs" / name / "seed1"
        stored = json.loads((run / "config.json").read_text())
        assert (stored["lesions"], stored["seed"], stored["slab"]) == (name, 1, 16)
    hashes = {m["sha256"] for c in results["cells"].values() for m in c["models"].values()}
    assert len(hashes) == 8  # every row and seed is another network
    with (config.output / "table.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [table.header, *table.rows]
    cells = [line.split() for line in (config.output / "table.md").read_text().splitlines()]
    assert ["|", "✓", "|", "✓", "|", "×", "|"] in [line[:7] for line in cells]
    page = (config.output / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "http" not in page
    assert "25.5" in page


def test_threshold_is_table_vi_and_trains_and_predicts_with_t(tiny, monkeypatch):
    seen = []
    predict = normnet.ablate.predict_volume

    def spy(*arguments, **options):
        seen.append(arguments[3].postprocess.threshold_hu)
        return predict(*arguments, **options)

    monkeypatch.setattr(normnet.ablate, "predict_volume", spy)
    config = tiny("threshold", seeds=1)
    table = ablate(config)
    assert table.header == ["HU threshold T", "-700", "-600", "-500", "-400", "-300"]
    assert [row[0] for row in table.rows] == ["Dice", "Dice (paper)"]
    assert table.rows[1][1:] == ["55.1", "67.0", "68.7", "64.3", "61.1"]
    assert table.failures == []
    assert seen == [-700, -600, -500, -400, -300]
    stored = {
        json.loads(file.read_text())["threshold_hu"]
        for file in (config.output / "runs").glob("*/seed0/config.json")
    }
    assert stored == {-700, -600, -500, -400, -300}
    assert (config.output / "runs" / "covid_lung" / "seed0").is_dir()  # the name modules and voting use
    assert "data:image/png" in (config.output / "report.html").read_text()


def test_voting_is_table_iv_and_votes_as_a_plain_loop_does(tiny, steps):
    config = tiny("voting", seeds=3, iterations=7)
    table = ablate(config)
    assert steps["count"] == 3 * 9  # each model is trained once, on and on
    assert table.header == ["Iterations", *(f"{k} (paper {500 * k})" for k in range(4, 10))]
    assert [row[0] for row in table.rows] == [
        f"{row}{of}" for row in ("voting", "model_1", "model_2", "model_3") for of in ("", " (paper)")
    ]
    assert table.rows[1][1:] == ["67.6", "70.2", "66.9", "68.7", "70.4", "67.4"]
    assert table.rows[7][1:] == ["66.3", "69.5", "69.1", "70.6", "68.8", "58.4"]
    title, frame, _ = table.details[0]
    counts = frame.to_numpy().tolist()
    assert "number of models" in title
    assert [row[0] for row in counts][:3] == ["1, mean±SD over models", "2", "3"]
    assert counts[4][1:3] == ["65.8±3.4", "67.3±2.9"]  # of the paper's five
    assert counts[2][1:] == table.rows[0][1:]

    # independent: each model's answer by the public call, votes counted voxel by voxel
    patient = find_patients(config)[0].load()
    predict = replace(PREDICT, slab=16)
    models = [Model.load(config.output / f"runs/covid_lung/seed{k}/9.safetensors") for k in range(3)]
    alone = [predict_volume(patient.hu, patient.lung_mask, [m], predict, device="cpu") for m in models]
    image = ls.window_hu(patient.hu) * patient.lung_mask
    dice = []
    for model, found in enumerate(alone):
        own = evaluate_case(found.lesions, patient.truth, patient.lung_mask, patient.hu)["dsc"]
        assert table.cells["4500"].single[model]["phantom_1"]["dsc"] == own
        assert table.rows[2 + 2 * model][6] == f"{100 * own:.1f}"
        dice.append(own)
    mean = sum(dice) / 3
    sd = math.sqrt(sum((d - mean) ** 2 for d in dice) / 2)
    assert counts[0][6] == f"{100 * mean:.1f}±{100 * sd:.1f}"
    for count in (2, 3):
        bright = np.flatnonzero(patient.lung_mask & (image >= np.float32(ls.threshold())))
        healthy = np.zeros(image.size, bool)
        for voxel in bright:
            ayes = 0
            for found in alone[:count]:
                ayes += int(found.healthy.flat[voxel])
            healthy[voxel] = ayes > count / 2
        lesions = postprocess(
            image, patient.lung_mask, healthy.reshape(image.shape), PostprocessConfig()
        ).final
        expected = evaluate_case(lesions, patient.truth, patient.lung_mask, patient.hu)
        got = table.cells["4500"].votes[count]["phantom_1"]
        assert [got[k] for k in ("tp", "fp", "fn")] == [expected[k] for k in ("tp", "fp", "fn")]
        together = predict_volume(patient.hu, patient.lung_mask, models[:count], predict, device="cpu")
        assert np.array_equal(together.lesions, lesions)
    bright = patient.lung_mask & (image >= np.float32(ls.threshold()))
    lesions = postprocess(image, patient.lung_mask, np.zeros_like(bright), PostprocessConfig()).final
    dsc = 2 * (lesions & patient.truth).sum() / (lesions.sum() + patient.truth.sum())
    assert counts[3] == ["0, every bright voxel a lesion", *[f"{100 * dsc:.1f}"] * 6]
    assert dice[0] != dice[1]  # else a vote could not go wrong


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_majority_against_a_loop(count):
    rng = np.random.default_rng(count)
    healthy = [rng.random((3, 4, 5)) < 0.5 for _ in range(count)]
    expected = np.zeros((3, 4, 5), bool)
    for index in np.ndindex(3, 4, 5):
        ayes = [one[index] for one in healthy].count(True)
        expected[index] = ayes > count - ayes
    assert np.array_equal(majority(healthy), expected)


def test_interrupted_ablation_goes_on_to_the_same_table(tiny, steps, tmp_path):
    rows = ("covid_lung", "no_salt_noise")
    whole = tiny("modules", rows=rows, iterations=3, output=tmp_path / "whole")
    expected = ablate(whole)
    assert steps["count"] == 12
    config = replace(whole, output=tmp_path / "broken")
    for stop in (1, 3, 4):  # within the first model, the second, and the first of the second row
        steps["count"], steps["stop"] = 0, stop
        with pytest.raises(KeyboardInterrupt):
            ablate(config)
    begun = config.output / "runs" / "no_salt_noise" / "seed1"
    assert not begun.exists()
    begun.mkdir(parents=True)  # killed after its first file, before its first checkpoint
    first = json.loads((config.output / "runs" / "no_salt_noise" / "seed0" / "config.json").read_text())
    (begun / "config.json").write_text(json.dumps(first | {"seed": 1}))
    steps["count"], steps["stop"] = 0, None
    table = ablate(config)
    assert steps["count"] == 4  # the last of seed 0, all three of seed 1
    assert table.rows == expected.rows
    assert table.csv() == expected.csv()
    for name in rows:
        for seed in (0, 1):
            assert table.cells[name].models[seed].sha256 == expected.cells[name].models[seed].sha256
            assert table.cells[name].single[seed] == expected.cells[name].single[seed]


def test_finished_work_is_not_done_again(tiny, steps, monkeypatch):
    config = tiny("modules", rows=("covid_lung",))
    first = ablate(config)
    before = steps["count"]
    predicted, trained = [], []
    train, predict = normnet.ablate.train, normnet.ablate.predict_volume
    monkeypatch.setattr(normnet.ablate, "train", lambda c, **k: trained.append(c) or train(c, **k))
    monkeypatch.setattr(
        normnet.ablate, "predict_volume", lambda *a, **k: predicted.append(a) or predict(*a, **k)
    )
    assert ablate(config).csv() == first.csv()
    assert (steps["count"], len(predicted)) == (before, 0)
    # another probability: the same networks, new scores
    changed = ablate(replace(config, predict=PredictConfig(probability=0.3)))
    assert (steps["count"], len(predicted)) == (before, 2)
    assert changed.cells["covid_lung"].single != first.cells["covid_lung"].single
    # another table beside it takes the same network from the shared folder
    shared = tiny("threshold", rows=("-500",), runs=config.output / "runs")
    assert ablate(shared).rows[0][1] == first.rows[0][3]
    assert (steps["count"], trained) == (before, [])
    # a third seed is all that is new
    ablate(replace(config, seeds=3))
    assert steps["count"] == before + 2
    # more iterations continue the runs
    ablate(replace(config, iterations=3))
    assert steps["count"] == before + 2 + 2


def test_minutes_end_a_run(tiny):
    config = tiny("modules", rows=("covid_lung",), seeds=1, iterations=50, minutes=1e-6)
    table = ablate(config)
    assert table.cells["covid_lung"].models[0].iterations == 1
    assert "stopped after 1e-06 minutes" in (config.output / "table.md").read_text()
    again = ablate(replace(config, iterations=2, minutes=None))  # more time: the run goes on
    assert again.failures == []
    assert again.cells["covid_lung"].models[0].iterations == 2


def test_damaged_score_is_computed_again(tiny):
    config = tiny("modules", rows=("covid_lung",), seeds=1)
    first = ablate(config)
    file = config.output / "scores" / "covid_lung" / "2" / "phantom_1.json"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    assert ablate(config).csv() == first.csv()
    assert file.read_text() == text
    record = json.loads(text)
    for damage in (
        [],
        {**record, "votes": record["votes"] * 2},
        {**record, "single": None},
        {**record, "without": {**record["without"], "dsc": 1e300}},
        {**record, "without": {**record["without"], "sen": "1"}},
        {**record, "without": {k: v for k, v in record["without"].items() if k != "psc"}},
    ):
        file.write_text(json.dumps(damage))
        assert ablate(config).csv() == first.csv()
        assert file.read_text() == text


@pytest.mark.parametrize("name", get_type_hints(CaseScores))
def test_every_score_of_a_file_is_checked(tmp_path, name):
    row = dict.fromkeys(get_type_hints(CaseScores), 1) | {"control": False, "notes": ["why"]}
    record = {"key": {"weights": ["a"]}, "single": [row], "votes": [row], "without": row}
    file = tmp_path / "p1.json"

    def read(**changes):
        file.write_text(json.dumps(record | {"without": row | changes}))
        return _cached(file, record["key"])

    assert read() == record
    assert (read(**{name: None}) is not None) == (get_type_hints(CaseScores)[name] is float)
    assert [read(**{name: wrong}) for wrong in (-1, "1", [0])] == [None] * 3
    assert (read(**{name: 2.5}) is not None) == name.endswith("_ml")
    assert read(another=1) is None
    assert _cached(file, {"weights": ["b"]}) is None


@given(st.data())
def test_dice_of_votes_and_models_against_a_loop(data):
    """What failed is left out, and controls have no part; pandas' SD is that of the sample."""
    share, seeds = st.floats(0, 1), data.draw(st.integers(1, 4))
    failed = data.draw(st.sets(st.integers(0, seeds - 1)))
    controls = data.draw(st.lists(st.booleans(), min_size=1, max_size=4))

    def scores():
        return {f"p{n}": {"dsc": data.draw(share), "control": c} for n, c in enumerate(controls)}

    trained = [seed for seed in range(seeds) if seed not in failed]
    cell = Cell(
        single={seed: scores() for seed in trained},
        votes={n: scores() for n in range(1, len(trained) + 1)},
        without=scores(),
        failures=dict.fromkeys(failed, "why"),
    )

    def plain(scores):
        return [one["dsc"] for one in scores.values() if one["control"] is False]

    expected = {"nothing": plain(cell.without)}
    for seed in trained:
        expected[f"model_{seed + 1}"] = plain(cell.single[seed])
    for n in cell.votes:
        if failed.isdisjoint(range(n)):
            expected[f"vote_{n}"] = plain(cell.votes[n])
    found = cell.dice()
    means = found.pop("models", None)
    assert found == expected
    assert (means is None) == bool(failed)
    if means:
        single = [expected[f"model_{seed + 1}"] for seed in trained]
        np.testing.assert_allclose(means, [np.mean(dice) if dice else math.nan for dice in single])
    for dice in filter(None, expected.values()):
        mean, *sd = map(float, _text(dice).split("±"))
        assert mean == pytest.approx(100 * np.mean(dice), abs=0.051)
        assert sd == ([pytest.approx(100 * np.std(dice, ddof=1), abs=0.051)] if len(dice) > 1 else [])
    assert _text([]) == "–"
    cell.error = "why"
    assert cell.dice() == {"nothing": plain(cell.without)}
    assert _text(None) == "failed"


def test_failed_row_is_reported_and_the_others_go_on(tiny, monkeypatch, capsys):
    train = normnet.ablate.train

    def broken(config, **options):
        if config.lesions == "no_shapes" and config.seed == 1:
            raise FloatingPointError("loss is nan")
        return train(config, **options)

    monkeypatch.setattr(normnet.ablate, "train", broken)
    config = tiny("modules", rows=("no_shapes", "no_salt_noise"))
    table = ablate(config)
    assert [row[3] == "failed" for row in table.rows] == [True, False]
    assert table.failures == ["no_shapes: seed 1: FloatingPointError: loss is nan"]
    assert "loss is nan" in (config.output / "report.html").read_text()
    arguments = ["modules", "--output", str(config.output), "--config", str(config.config), "--seeds", "2"]
    arguments += ["--iterations", "2", "--phantom-patients", "1", "--phantom-shape", "32", "64", "80"]
    arguments += ["--predict.probability", "0.5", "--rows", "no_shapes", "no_salt_noise"]
    assert main(arguments) == 1
    assert "seed 1: FloatingPointError" in capsys.readouterr().err
    monkeypatch.setattr(normnet.ablate, "train", train)
    assert main(arguments) == 0
    assert "Table V" in capsys.readouterr().out
    with (config.output / "table.csv").open(newline="") as stream:
        assert [row[3] for row in csv.reader(stream)][2] == table.rows[1][3]


def test_changed_weights_and_other_settings_fail_the_row(tiny):
    config = tiny("modules", rows=("covid_lung",), seeds=1)
    ablate(config)
    run = config.output / "runs" / "covid_lung" / "seed0"
    table = ablate(replace(config, iterations=1))
    assert "must not be past" in table.failures[0]
    assert table.rows[0][3] == "failed"
    config.config.write_text(json.dumps(TINY | {"learning_rate": 0.5}))
    assert "learning_rate differ" in ablate(config).failures[0]
    config.config.write_text(json.dumps(TINY))
    weights = run / "2.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "SHA-256" in ablate(config).failures[0]
    shutil.rmtree(run)
    assert ablate(config).failures == []


def write_patient(folder, spacing, **volumes):
    """Write a file of each role into a folder of its own; returns the settings that name them."""
    nibabel = pytest.importorskip("nibabel")
    for role, array in volumes.items():
        (folder / role).mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(array.astype(np.int16).transpose(2, 1, 0), np.diag([*spacing[::-1], 1.0]))
        nibabel.save(image, folder / role / f"p5{'' if role == 'ct' else '_' + role}.nii.gz")
    given = {name: folder / name for name in ("truth", "masks") if name in volumes}
    return {"patients": (folder / "ct",), "phantom_patients": None, "phantom_shape": None, **given}


def test_files_of_patients(tiny, tmp_path):
    chest = ls.phantom.chest_ct(shape=(24, 48, 60), seed=5)
    ill = ls.phantom.add_pneumonia(chest.hu, chest.lung_mask, chest.spacing, seed=5)
    volumes = {"ct": ill.hu, "truth": ill.lesion_mask, "masks": chest.lung_mask}
    given = write_patient(tmp_path, (2.0, 1.6, 1.6), **volumes)
    config = tiny("modules", rows=("covid_lung",), seeds=1, **given)
    table = ablate(config)
    score = table.cells["covid_lung"].single[0]["p5"]
    assert score["tp"] + score["fn"] == np.count_nonzero(ill.lesion_mask)  # on the scan's own grid
    assert score["lesion_ml"] == pytest.approx(np.count_nonzero(ill.lesion_mask) * 1.6 * 1.6 * 2.0 / 1000)
    assert "given patients" in (config.output / "table.md").read_text()
    listed = tmp_path / "cases.csv"
    listed.write_text("case,ct,lesions,lungs\np5,ct/p5.nii.gz,truth/p5_truth.nii.gz,masks/p5_masks.nii.gz\n")
    table = replace(config, patients=(listed,), truth=None, masks=None)
    assert find_patients(table)[0].identity == find_patients(config)[0].identity
    for text, told in (
        ("case,ct,lesions\np5,,x\n", "line 2: ct must be filled, got none"),
        ("case,ct\np5,ct/p5.nii.gz\n", "patient p5: lesions must be given: truth, or a column"),
        ("case,ct,lesions\np5,ct/p5.nii.gz,gone.nii\n", "patient p5: .*gone.nii: no such file or folder"),
        *((f"case,ct,lesions\n{case},{volumes},{volumes}\n", f"case must be a file name, got '{case}'")
          for case in ("../p5", "a/b") for volumes in ["ct/p5.nii.gz"]),
    ):  # fmt: skip
        listed.write_text(text)
        with pytest.raises(ValueError, match=told):
            find_patients(table)
    with pytest.raises(ValueError, match="truth must be omitted beside a table of cases"):
        find_patients(replace(config, patients=(listed,), masks=None))
    shutil.copy(tmp_path / "ct/p5.nii.gz", tmp_path / "ct/p6.nii.gz")
    with pytest.raises(ValueError, match=r"patient p6: masks must hold p6\.nii\.gz, or one file of p6_\*"):
        find_patients(config)


def test_lungs_of_patients_without_masks_are_segmented_as_asked(tiny, tmp_path):
    """By the network where nothing is asked; cached scores are of one method and its weights."""
    chest = ls.phantom.chest_ct(shape=(24, 96, 120), spacing=(8.0, 3.2, 3.2), seed=5)
    given = write_patient(tmp_path, chest.spacing, ct=chest.hu, truth=chest.lung_mask)
    config = tiny("modules", lungs="classical", **given)
    (one,) = find_patients(config)
    assert (one.identity["lungs_from"], one.identity["lungs_sha256"]) == ("classical", None)
    expected = classical.load_case(tmp_path / "ct/p5.nii.gz").native_mask
    np.testing.assert_array_equal(one.load().native_lung, expected)
    weights = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = ModelConfig(channels=(4, 8), strides=(2,), outputs=2)
        Model(build_unet(network), network, "lungs").save(tmp_path / f"{seed}/own/model.safetensors")
        (own,) = find_patients(replace(config, lungs=str(tmp_path / f"{seed}/own")))
        assert own.identity["lungs_from"] == "own"
        weights[own.identity["lungs_sha256"]] = own.identity
    assert len(weights) == 2
    assert tiny("modules", **given).lungs == "network"
    with pytest.raises(ValueError, match=r"lungs must be network, classical, .*, got 'gone'"):
        ablate(replace(config, lungs="gone"))
    assert not (tmp_path / "modules").exists()
    (one,) = find_patients(replace(config, lungs="gone", masks=tmp_path / "truth"))  # nobody asks it
    assert "lungs_from" not in one.identity


def test_labels_of_patients_are_chosen_or_told(tiny, tmp_path):
    chest = ls.phantom.chest_ct(shape=(24, 48, 60), seed=5)
    ill = ls.phantom.add_pneumonia(chest.hu, chest.lung_mask, chest.spacing, seed=5)
    halves = np.where(np.arange(60) < 30, 1, 2) * chest.lung_mask
    volumes = {"ct": ill.hu, "truth": np.where(ill.lesion_mask, 3, halves), "masks": halves}
    given = write_patient(tmp_path, (2.0, 1.6, 1.6), **volumes) | {"seeds": 1}
    given |= {"rows": ("covid_lung",), "runs": tmp_path / "runs"}
    chosen = tiny("modules", label=(3,), lung_label=(1, 2), output=tmp_path / "chosen", **given)
    score = ablate(chosen).cells["covid_lung"].votes[1]["p5"]
    assert score["tp"] + score["fn"] == np.count_nonzero(ill.lesion_mask)
    assert not [note for note in score["notes"] if "label" in note]
    (file,) = chosen.output.glob("scores/*/*/p5.json")
    written = file.stat().st_mtime_ns
    ablate(chosen)
    assert file.stat().st_mtime_ns == written  # taken from the cache
    (one,) = find_patients(replace(chosen, lung_label=(2,)))
    assert one.identity != find_patients(chosen)[0].identity  # cached scores of the one are not the other's
    assert np.count_nonzero(one.load().native_lung) == np.count_nonzero(halves == 2)
    config = replace(chosen, label=(), lung_label=(), output=tmp_path / "all")
    for _ in range(2):  # the second time from the cache
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            table = ablate(config)
        notes = table.cells["covid_lung"].votes[1]["p5"]["notes"]
        for text in (
            "p5_masks.nii.gz: labels 1 (",
            "p5_truth.nii.gz: labels 1 (",
            "the truth covers 100 % of",
        ):
            assert sum(text in note for note in notes) == 1
            assert text in (config.output / "table.md").read_text()
            assert text in (config.output / "report.html").read_text()
    assert not said
    with pytest.raises(ValueError, match="truth, masks, label and lung_label must be omitted"):
        tiny("modules", lung_label=(1,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("no_lungs",)}, "rows must be among covid_lung, .*, got no_lungs"),
        ({"rows": ("no_shapes", "no_shapes")}, "rows must be named once each"),
        ({"seeds": 0}, "seeds must be >= 1, got 0"),
        ({"minutes": 0.0}, "minutes must be > 0, got 0"),
        ({"table": "colour"}, "table must be 'voting', 'modules' or 'threshold', got 'colour'"),
        ({"scale": "huge"}, "scale must be 'small' or 'paper', got 'huge'"),
        ({"phantom_patients": 5000}, "phantom_patients must be <= 999"),
        ({"predict": PredictConfig(slab=8)}, "predict.slab must be left to the training settings, got 8"),
        ({"device": "toaster"}, "device must be"),
    ],
)
def test_bad_settings_name_the_argument(tiny, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ablate(tiny("modules", **changes))
    assert not (tmp_path / "modules").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config must be JSON"),
        ("[]", "config must be a JSON object, got list"),
        ('{"seed": 3}', "config must leave seed to the ablation"),
        ('{"lesions": "no_shapes"}', "config must leave lesions to the ablation"),
        ('{"colour": 3}', "no field 'colour'"),
        ('{"slab": 3}', "slab must be a multiple of"),
        ('{"task": "lungs", "model": {"outputs": 2}}', "tiny.json: task must be lesions, got lungs"),
    ],
)
def test_bad_config_file(tiny, text, message):
    config = tiny("modules")
    config.config.write_text(text)
    with pytest.raises(ValueError, match=message):
        ablate(config)


def test_config_file_then_command_line(tiny):
    made = training(tiny("modules", iterations=7, threads=2))
    assert (made.iterations, made.threads, made.slab) == (7, 2, 16)
    assert (made.model.channels, made.model.residual_units) == ((4, 8), 2)  # a part of `model` is enough


def test_folder_of_another_table_is_refused(tiny):
    config = tiny("modules", rows=("covid_lung",), seeds=1)
    ablate(config)
    with pytest.raises(ValueError, match=r"output: .* already holds the table 'modules'"):
        ablate(tiny("voting", output=config.output))


@pytest.mark.parametrize("content", [b"[]", b"{", b"{}", b'"table"', b"3", b"", b"\xff"])
def test_folder_with_results_of_something_else_is_refused(tmp_path, capsys, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_bytes(content)
    assert main(["modules", "--output", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"output: {out / 'results.json'} must be the results of an ablation" in said
    assert [path.name for path in out.iterdir()] == ["results.json"]


@pytest.mark.parametrize("name", ["marks.json", "config.json"])
def test_a_damaged_run_fails_its_row_and_is_named(tiny, name):
    config = tiny("modules", rows=("covid_lung",), seeds=1)
    ablate(config)
    file = config.output / "runs" / "covid_lung" / "seed0" / name
    for content in ("{", "[]"):
        file.write_text(content)
        (failure,) = ablate(config).failures
        assert f"{file} must be" in failure
        assert f"remove {file.parent}" in failure


def test_t_of_every_row_is_told_where_it_is_not_the_paper_s(tiny):
    config = tiny("modules", rows=("covid_lung",), seeds=1)
    note = "T is -650 HU in every row, in training and prediction; the paper's is -500 HU."
    base, other = training(config), replace(training(config), threshold_hu=-650.0)
    assert note not in caveats(config, base, 1, [])
    assert note in caveats(config, other, 1, [])
    assert note not in caveats(replace(config, table="threshold"), other, 1, [])


def test_command_line_ends_with_two_for_a_wrong_call(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["threshold", "--output", out, "--rows", "-800"]) == 2
    assert "rows must be among -700" in capsys.readouterr().err
    assert main(["modules", "--output", out, "--data", str(tmp_path / "none")]) == 2
    assert "not a store" in capsys.readouterr().err
    assert main(["modules", "--output", out, "--patients", str(tmp_path / "none")]) == 2
    assert "patients must be files or folders that exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["voting", "--scale", "huge", "--output", out])
    assert end.value.code == 2
    assert not (tmp_path / "out").exists()
