"""Prediction: slabs, vote, and results that land on the input's own grid."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
sitk = pytest.importorskip("SimpleITK")

import lesionsynth as ls  # noqa: E402
from lesionsynth.io import (  # noqa: E402
    Scan,
    find_sources,
    read_ct,
)
from normnet import predict  # noqa: E402
from normnet.config import (  # noqa: E402
    ModelConfig,
    PostprocessConfig,
    PredictConfig,
    from_json,
    to_json,
)
from normnet.model import Model, build_unet  # noqa: E402
from normnet.postprocess import postprocess  # noqa: E402
from normnet.prepare import load_case  # noqa: E402
from normnet.records import read_record, volumes_of  # noqa: E402
from normnet.stage import check_written  # noqa: E402
from normnet.stamps import stamp  # noqa: E402
from tests import classical  # noqa: E402
from tests.conftest import draw_lungs, played  # noqa: E402
from tests.test_dicom_seg import voxels_of, write_series  # noqa: E402

EXACT = PredictConfig(precision="fp32", slab=8)
CPU = torch.device("cpu")


class Pointwise(torch.nn.Module):
    """A network that looks at one voxel: logit = slope (x - centre)."""

    def __init__(self, slope: float = 12.0, centre: float = 0.5) -> None:
        super().__init__()
        self.slope, self.centre = slope, centre
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        return self.slope * (x - self.centre)


def pointwise(slope: float = 12.0, centre: float = 0.5, **settings: Any) -> Model:
    return played(Pointwise(slope, centre), **settings)


def to_hu(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """HU that the window brings back to the image, with soft tissue around the lungs."""
    return np.where(mask, np.rint(image * 900 - 800), 40).astype(np.int16)


def patient(shape=(21, 40, 44), seed=0):
    image, mask = draw_lungs(shape, seed)
    centre = np.argwhere(mask)[mask.sum() // 2]
    distance = np.sqrt(((np.moveaxis(np.indices(shape), 0, -1) - centre) ** 2).sum(-1))
    image = np.maximum(image, np.clip(0.8 - 0.05 * distance, 0, 1) * mask)
    return to_hu(image, mask), mask


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("depth", [3, 8, 21])
def test_slabs_of_a_pointwise_network_are_the_whole_volume(depth, overlap):
    image = np.random.default_rng(0).random((depth, 7, 9), dtype=np.float32)
    found = predict.slab_probabilities(image, pointwise(), replace(EXACT, overlap=overlap), CPU)
    whole = 1 / (1 + np.exp(-12.0 * (image.astype(np.float64) - 0.5)))
    # float32 logits up to 6 (error 5e-7) through a slope of 1/4, and a weighted mean
    np.testing.assert_allclose(found, whole, atol=1e-6)


def test_a_slab_has_the_configured_depth_and_fits_the_network():
    config = ModelConfig(channels=(4, 8, 8), strides=(2, 2))
    model = Model(build_unet(config), config)
    found = predict.slab_probabilities(np.ones((19, 13, 18), np.float32), model, EXACT, CPU)
    assert found.shape == (19, 13, 18)
    probe = pointwise()
    predict.slab_probabilities(np.ones((19, 13, 18), np.float32), probe, EXACT, CPU)
    assert {shape[2] for shape in probe.network.shapes} == {8}


def test_slabs_are_averaged_by_their_distance_to_the_ends():
    class Counter(torch.nn.Module):
        """Answer with the probability 0.1, 0.2, ... of the call."""

        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.full_like(x, float(np.log(0.1 * self.calls / (1 - 0.1 * self.calls))))

    found = predict.slab_probabilities(np.ones((12, 1, 1), np.float32), played(Counter()), EXACT, CPU)[
        :, 0, 0
    ]
    first, second = [1, 2, 3, 4, 4, 3, 2, 1], [1, 2, 3, 4, 4, 3, 2, 1]
    expected = []
    for z in range(12):
        a, b = (first[z] if z < 8 else 0), (second[z - 4] if z >= 4 else 0)
        expected.append((0.1 * a + 0.2 * b) / (a + b))
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 sums of three terms


def test_vote_of_three_models_against_a_plain_loop():
    hu, mask = patient()
    models = [pointwise(centre=c, slope=40.0) for c in (0.35, 0.5, 0.65)]
    found = predict.predict_volume(hu, mask, models, EXACT)
    image = ls.window_hu(hu) * mask
    healthy, mean = np.zeros(hu.shape, bool), np.zeros(hu.shape)
    for at in np.argwhere(mask):
        here = tuple(at)
        chances = [1 / (1 + np.exp(-40.0 * (float(image[here]) - c))) for c in (0.35, 0.5, 0.65)]
        mean[here] = sum(chances) / 3
        bright = image[here] >= np.float32(1 / 3)
        healthy[here] = bright and sum(p > 0.95 for p in chances) >= 2
    np.testing.assert_array_equal(found.healthy, healthy)
    assert 0 < healthy.sum() < mask.sum()
    np.testing.assert_allclose(found.probability, mean, atol=2e-6)  # float32 logits up to 26
    expected = postprocess(image, mask, healthy, EXACT.postprocess)
    np.testing.assert_array_equal(found.lesions, expected.final)
    np.testing.assert_array_equal(found.lesions_without_growing, expected.core)


def test_models_are_asked_about_the_tissue_they_were_trained_on():
    """T comes with the weights: a network trained for -700 HU says nothing else of what is brighter."""
    hu, mask = patient()
    # healthy, whatever is asked
    models = [pointwise(centre=0.05, slope=400.0, threshold_hu=-700.0) for _ in range(2)]
    found = predict.predict_volume(hu, mask, models, EXACT)
    image = ls.window_hu(hu) * mask
    np.testing.assert_array_equal(found.healthy, mask & (image >= np.float32(100 / 900)))
    assert found.healthy.sum() > (mask & (image >= np.float32(1 / 3))).sum()
    higher = replace(EXACT, postprocess=replace(EXACT.postprocess, threshold_hu=-400.0))
    found = predict.predict_volume(hu, mask, models, higher)
    np.testing.assert_array_equal(found.healthy, mask & (image >= np.float32(400 / 900)))
    models[1].threshold_hu = -600.0
    with pytest.raises(ValueError, match=r"one threshold_hu unless .* is given, got -700, -600"):
        predict.predict_volume(hu, mask, models, EXACT)


def test_votes_of_networks_in_tiles_are_those_of_whole_maps():
    """Three calibrated networks: full probability maps in memory, then thresholds, majority and mean."""
    config = ModelConfig(channels=(4, 8), strides=(2,))
    settings = replace(EXACT, probability="calibrated", tile=32)
    hu, mask = patient((19, 60, 76))
    hu[:3], mask[:3] = -1000, False
    models, levels = [], (0.49, 0.5, 0.505)
    for seed, level in enumerate(levels):
        torch.manual_seed(seed)
        models.append(Model(build_unet(config), config, calibration={"probability": level, "dice": 0.5}))
    found = predict.predict_volume(hu, mask, models, settings)
    image = ls.window_hu(hu) * mask
    rows, columns = (np.flatnonzero(mask.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    box = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    maps = np.zeros((3, *mask.shape), np.float32)
    for one, model in zip(maps, models, strict=True):
        one[box] = predict.slab_probabilities(image[box], model, settings, CPU)
    votes = sum((one > np.float32(level)).astype(int) for one, level in zip(maps, levels, strict=True))
    healthy = (votes >= 2) & mask & (image >= np.float32(1 / 3))
    np.testing.assert_array_equal(found.healthy, healthy)
    bright = mask & (image >= np.float32(1 / 3))
    assert 0.05 < healthy[bright].mean() < 0.95
    np.testing.assert_allclose(found.probability, maps.mean(axis=0) * mask, atol=1e-6)  # float32 means
    bare = predict.predict_volume(hu, mask, models, settings, keep_probability=False)
    assert bare.probability is None
    np.testing.assert_array_equal(bare.lesions, found.lesions)
    models[1].calibration = None
    with pytest.raises(ValueError, match="this model carries no calibration"):
        predict.predict_volume(hu, mask, models, settings)


def test_a_tie_is_no_majority():
    hu, mask = patient()
    sure, unsure = pointwise(slope=0.0), pointwise(slope=0.0)
    sure.network.forward = lambda x: torch.full_like(x, 10.0)
    assert not predict.predict_volume(hu, mask, [sure, unsure], EXACT).healthy.any()
    assert predict.predict_volume(hu, mask, [sure, sure, unsure], EXACT).healthy.any()


def test_nothing_outside_the_lungs():
    hu, mask = patient()
    sure = pointwise(slope=0.0)
    sure.network.forward = lambda x: torch.full_like(x, 10.0)
    found = predict.predict_volume(hu, mask, [sure], EXACT)
    assert not found.probability[~mask].any()
    assert not found.healthy[~mask].any()
    ill = predict.predict_volume(hu, mask, [pointwise(slope=0.0)], EXACT)
    assert ill.lesions.any()
    assert not ill.lesions[~mask].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hu": np.zeros((4, 4), np.int16)},
            r"hu and lung_mask must be \(z, y, x\) and alike, got shapes \(4, 4\)",
        ),
        ({"lung_mask": np.zeros((21, 40, 44), bool)}, "lung_mask must contain at least one voxel"),
        ({"models": []}, "models must hold at least one network, got none"),
    ],
)
def test_bad_input(change, message):
    hu, mask = patient()
    with pytest.raises(ValueError, match=message):
        predict.predict_volume(
            **{"hu": hu, "lung_mask": mask, "models": [pointwise()], "config": EXACT, **change}
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": 1.0}, r"probability must be < 1 or 'calibrated', got 1.0"),
        ({"overlap": 1.0}, r"overlap must be < 1, got 1.0"),
        ({"slab": 0}, "slab must be >= 1, got 0"),
        ({"precision": "fp8"}, "precision must be 'auto', 'fp32' or 'bf16', got 'fp8'"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        PredictConfig(**change)


# Files: two boxes of lung in tissue, a dense ball in one of them, stored in several orientations.

SHAPE, SPACING = (16, 56, 72), (2.0, 1.6, 1.6)


@pytest.fixture(scope="module")
def undecided(tmp_path_factory):
    """Weights of a network that gives every voxel the probability 0.5: nothing is healthy."""
    config = ModelConfig(channels=(4, 8), strides=(2,))
    model = build_unet(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    folder = tmp_path_factory.mktemp("models")
    for name in ("a", "b"):
        Model(model, config).save(folder / name / "model.safetensors")
    return folder


def write_case(folder, name, direction=(1, 0, 0, 0, 1, 0, 0, 0, 1), *, mask=True, spacing=SPACING):
    """Write CT and lung mask with the array in the file's own order; return where the ball is in it."""
    z, y, x = np.indices(SHAPE)
    lung = ((z > 1) & (z < 14) & (y > 8) & (y < 46)) & (((x > 6) & (x < 32)) | ((x > 40) & (x < 66)))
    ball = (z - 5) ** 2 * 1.56 + (y - 20) ** 2 + (x - 18) ** 2 <= 8**2
    hu = np.where(ball & lung, 0, np.where(lung, -850, 30)).astype(np.int16)
    for array, suffix in ((hu, "hu"), (lung.astype(np.uint8), "lung"))[: 2 if mask else 1]:
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing[::-1])
        image.SetOrigin((-31.5, 12.0, 77.0))
        image.SetDirection(direction)
        sitk.WriteImage(image, str(folder / f"{name}_{suffix}.nii.gz"))
    return ball & lung


@pytest.mark.parametrize(
    "direction",
    [
        (1, 0, 0, 0, 1, 0, 0, 0, 1),
        (-1, 0, 0, 0, -1, 0, 0, 0, 1),
        (1, 0, 0, 0, -1, 0, 0, 0, -1),
        (0, 1, 0, 1, 0, 0, 0, 0, 1),  # rows and columns exchanged
    ],
)
def test_results_land_on_the_file_s_own_grid(tmp_path, undecided, direction):
    ball = write_case(tmp_path, "p1", direction)
    arguments = [str(tmp_path / "p1_hu.nii.gz"), "--masks", str(tmp_path), "--models", str(undecided / "a")]
    arguments += [
        "--output",
        str(tmp_path / "out"),
        "--save-probability",
        "--threads",
        "1",
        "--settings.slab",
        "16",
    ]
    assert predict.main(arguments) == 0
    source = sitk.ReadImage(str(tmp_path / "p1_hu.nii.gz"))
    results = {
        n: sitk.ReadImage(str(tmp_path / f"out/p1_{n}.nii.gz"))
        for n in ("lesions", "lung", "probability", "healthy")
    }
    for image in results.values():
        assert image.GetSize() == source.GetSize()
        np.testing.assert_allclose(
            image.GetDirection(), source.GetDirection(), atol=1e-6
        )  # NIfTI keeps float32
        np.testing.assert_allclose(image.GetOrigin(), source.GetOrigin(), atol=1e-4)
        np.testing.assert_allclose(image.GetSpacing(), source.GetSpacing(), atol=1e-6)
    lung = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1_lung.nii.gz"))) > 0
    lesions = sitk.GetArrayFromImage(results["lesions"]) > 0
    np.testing.assert_array_equal(sitk.GetArrayFromImage(results["lung"]) > 0, lung)
    # Mean filters move a surface by a few voxels of 0.8 mm; a flip moves the ball by five at least.
    assert lesions[ball].mean() > 0.95
    assert ndimage.binary_dilation(ball, iterations=3)[lesions].all()
    assert not lesions[~lung].any()
    probability = sitk.GetArrayFromImage(results["probability"])
    assert not probability[~lung].any()
    np.testing.assert_allclose(np.median(probability[lung]), 0.5, atol=1e-6)
    assert not sitk.GetArrayFromImage(results["healthy"]).any()  # 0.5 is no vote for healthy
    (row,) = csv.DictReader((tmp_path / "out/volumes.csv").read_text().splitlines())
    ml = np.prod(SPACING) / 1000
    assert row["case"] == "p1"
    assert float(row["lung_ml"]) == pytest.approx(lung.sum() * ml, abs=0.05)  # written with one decimal
    assert float(row["lesion_ml"]) == pytest.approx(lesions.sum() * ml, abs=0.005)


def test_a_broken_file_is_reported_and_the_others_go_on(tmp_path, undecided, capsys):
    write_case(tmp_path, "good")
    (tmp_path / "bad_hu.nii.gz").write_bytes(b"nothing")
    write_case(tmp_path, "bare", mask=False)
    inputs = [str(tmp_path / f"{n}_hu.nii.gz") for n in ("bad", "bare", "good")]
    arguments = [
        *inputs,
        "--masks",
        str(tmp_path),
        "--models",
        str(undecided),
        "--output",
        str(tmp_path / "out"),
    ]
    assert predict.main([*arguments, "--threads", "1"]) == 1
    said = capsys.readouterr()
    assert "bad_hu.nii.gz" in said.err
    assert "bare" in said.err
    assert "1 of 3 volumes" in said.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "good.json", "good_lesions.nii.gz", "good_lung.nii.gz", "settings.json", "volumes.csv",
    ]  # fmt: skip


def test_wrong_calls(tmp_path, undecided, capsys, monkeypatch):
    write_case(tmp_path, "p")
    call = [str(tmp_path / "p_hu.nii.gz"), "--output", str(tmp_path / "out")]
    assert predict.main([*call, "--models", str(tmp_path / "nowhere")]) == 2
    assert "models must be weights files or run folders" in capsys.readouterr().err
    assert predict.main([*call, "--models", str(undecided / "a"), "--device", "gpu9"]) == 2
    assert "device must be auto, cpu, cuda or cuda:N, got 'gpu9'" in capsys.readouterr().err
    twice = tmp_path / "other"
    twice.mkdir()
    write_case(twice, "p")
    both = [str(tmp_path / "p_hu.nii.gz"), str(twice / "p_hu.nii.gz")]
    assert predict.main([*both, *call[1:], "--models", str(undecided / "a")]) == 2
    assert "case names must differ, got p more than once" in capsys.readouterr().err
    monkeypatch.setattr("normnet.model.BUNDLED", tmp_path / "none")
    assert predict.main(call) == 2
    assert "this build of normnet ships no weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    call += ["--models", str(undecided / "a"), "--settings.slab", "15"]
    assert predict.main([*call, "--masks", str(tmp_path)]) == 1
    assert "slab must be a multiple of 2" in capsys.readouterr().err
    assert predict.main([*call, "--settings.probability", "calibrated"]) == 2
    assert "a/model.safetensors: probability: this model carries no calibration" in capsys.readouterr().err


def run(folder, models, *more, names=("p1",), masks=True):
    """Call the command on ``<name>_hu.nii.gz`` in a folder; results in ``out``.

    Thresholds find the lungs where neither masks nor ``--lungs`` are given.
    """
    call = [*(str(folder / f"{n}_hu.nii.gz") for n in names), "--models", str(models), "--threads", "1"]
    call += ["--output", str(folder / "out"), "--settings.slab", "16"]
    method = () if masks or "--lungs" in more else classical.FLAGS
    return predict.main([*call, *(("--masks", str(folder)) if masks else method), *more])


def test_a_record_says_what_was_done(tmp_path, undecided):
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided, "--save-core", "--settings.postprocess.growth-iterations", "3") == 0
    out = tmp_path / "out"
    record = json.loads((out / "p1.json").read_text())
    assert record["case"] == "p1"
    assert record["ct"] == str(tmp_path / "p1_hu.nii.gz")
    assert record["series"] is None
    assert record["grid"] == {"shape": list(SHAPE), "spacing": pytest.approx(SPACING)}
    assert record["lungs_from"] == str(tmp_path / "p1_lung.nii.gz")
    assert record["lungs_sha256"] is None
    assert record["files"] == {
        "lesions": "p1_lesions.nii.gz",
        "lung": "p1_lung.nii.gz",
        "classical": None,
        "core": "p1_core.nii.gz",
        "probability": None,
        "healthy": None,
        "dicom_seg": None,
    }
    settings = from_json(PredictConfig, json.dumps(record["settings"]))
    assert settings == PredictConfig(slab=16, postprocess=PostprocessConfig(growth_iterations=3))
    weights = (undecided / "a/model.safetensors").read_bytes()
    one = {
        "name": "a",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "probability": 0.95,
        "calibrated": False,
        "threshold_hu": -500.0,
        "inflation_hu": None,
    }
    assert record["inflation"] == 1.0
    assert record["models"] == [one, {**one, "name": "b"}]
    assert record["version"] == ls.__version__
    assert record["seconds"] > 0
    lesions, core = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"p1_{n}.nii.gz"))) > 0 for n in ("lesions", "core")
    )
    assert 0 < core.sum() < lesions.sum()
    assert not (core & ~lesions).any()
    volumes = record["volumes"]
    ml = np.prod(SPACING) / 1000
    lung = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "p1_lung.nii.gz"))) > 0
    assert volumes["lung_ml"] == pytest.approx(lung.sum() * ml)
    assert volumes["lesion_ml"] == pytest.approx(lesions.sum() * ml)
    assert volumes["percent"] == pytest.approx(100 * lesions.sum() / lung.sum())
    # the ball lies in the box of low x, the patient's right
    half = lung & (np.arange(SHAPE[2]) < 36)
    assert volumes["right_lung_ml"] == pytest.approx(half.sum() * ml)
    assert volumes["right_lesion_ml"] == pytest.approx((half & lesions).sum() * ml)
    assert volumes["left_lung_ml"] == pytest.approx((lung & ~half).sum() * ml)
    assert volumes["left_lesion_ml"] == 0
    settings_of_call = json.loads((out / "settings.json").read_text())
    assert settings_of_call == {"settings": record["settings"], "models": record["models"]}


@pytest.mark.parametrize("name", ["settings", "../p", "a/b", ".p"])
def test_a_case_must_have_the_name_of_a_file(tmp_path, undecided, capsys, name):
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided, "--name", name, masks=False) == 2
    assert "case must be a file's name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sides_are_measured_apart():
    lung = np.zeros((2, 4, 6), bool)
    right, left = lung.copy(), lung.copy()
    right[:, :, :3], left[:, :, 3:5] = True, True
    lesions = lung.copy()
    lesions[0, 0, 1:4] = True
    found = volumes_of(lesions, right | left, (10.0, 10.0, 10.0), (right, left))
    assert found == {
        "lung_ml": 40.0, "lesion_ml": 3.0, "percent": 7.5,
        "right_lung_ml": 24.0, "right_lesion_ml": 2.0, "right_percent": pytest.approx(200 / 24),
        "left_lung_ml": 16.0, "left_lesion_ml": 1.0, "left_percent": 6.25,
    }  # fmt: skip
    none = volumes_of(lesions, right, (10.0, 10.0, 10.0), (right, lung))
    assert none["left_lung_ml"] == 0.0
    assert none["left_percent"] is None
    assert volumes_of(lesions, right, (1.0, 1.0, 1.0))["right_lung_ml"] is None


def stamps(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name.startswith("p")}


def test_finished_cases_are_kept_and_others_done(tmp_path, undecided, capsys):
    for name in ("p1", "p2"):
        write_case(tmp_path, name)
    out = tmp_path / "out"
    assert run(tmp_path, undecided) == 0
    before = stamps(out)
    capsys.readouterr()
    assert run(tmp_path, undecided, names=("p1", "p2")) == 0
    assert "2 of 2 volumes segmented (1 by an earlier call)" in capsys.readouterr().out
    after = stamps(out)
    assert {name: after[name] for name in before} == before
    assert "p2.json" in after
    rows = list(csv.DictReader((out / "volumes.csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == ["p1", "p2"]
    # the table is of the folder, whatever the call names
    assert run(tmp_path, undecided, names=("p2",)) == 0
    assert (out / "volumes.csv").read_text().count("\n") == 3
    # a map more than there is: done again, and what there was stays
    assert run(tmp_path, undecided, "--save-core") == 0
    assert run(tmp_path, undecided, "--save-probability") == 0
    files = json.loads((out / "p1.json").read_text())["files"]
    assert files["core"] == "p1_core.nii.gz"
    assert files["probability"] == "p1_probability.nii.gz"
    assert files["healthy"] == "p1_healthy.nii.gz"
    # an earlier version's call wrote the probability alone: the same call completes the case
    files["healthy"] = None
    record = json.loads((out / "p1.json").read_text())
    (out / "p1.json").write_text(json.dumps({**record, "files": files}))
    (out / "p1_healthy.nii.gz").unlink()
    assert run(tmp_path, undecided) == 0
    assert not (out / "p1_healthy.nii.gz").exists()
    assert run(tmp_path, undecided, "--save-probability") == 0
    assert (out / "p1_healthy.nii.gz").exists()
    assert (out / "p1_core.nii.gz").exists()
    (out / "p1_lesions.nii.gz").unlink()
    assert run(tmp_path, undecided) == 0
    assert (out / "p1_lesions.nii.gz").exists()
    assert (out / "p1_core.nii.gz").exists()


def test_other_settings_models_or_masks_are_refused_without_overwrite(tmp_path, undecided, capsys):
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided, "--save-core") == 0
    before = stamps(tmp_path / "out")
    assert run(tmp_path, undecided, "--settings.probability", "0.9") == 2
    assert "settings must be that of this call, or overwrite passed" in capsys.readouterr().err
    assert run(tmp_path, undecided / "a") == 2
    assert "models must be that of this call" in capsys.readouterr().err
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "p1_hu.nii.gz").rename(moved / "p1_hu.nii.gz")
    (moved / "out").symlink_to(tmp_path / "out")
    assert run(moved, undecided, "--masks", str(tmp_path), masks=False) == 2
    assert "ct must be that of this call" in capsys.readouterr().err
    assert stamps(tmp_path / "out") == before
    assert run(moved, undecided, "--masks", str(tmp_path), "--overwrite", masks=False) == 0
    record = json.loads((tmp_path / "out/p1.json").read_text())
    assert record["ct"] == str(moved / "p1_hu.nii.gz")
    assert record["files"]["core"] is None
    assert not (tmp_path / "out/p1_core.nii.gz").exists()  # it would be of the other settings


def test_names_and_lungs_found_by_thresholds(tmp_path, undecided):
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided, "--name", "px", masks=False) == 0
    record = json.loads((tmp_path / "out/px.json").read_text())
    assert record["case"] == "px"
    assert (record["lungs_from"], record["lungs_sha256"]) == ("classical", None)
    assert record["files"]["classical"] is None  # there is nothing else to compare it with
    assert record["volumes"]["lung_ml"] > 0


# Lungs by a network: what it sees is played, as the boxes here are no chest.


@pytest.fixture
def lung_run(tmp_path):
    """The folder of a run of the task lungs."""
    return lung_weights(tmp_path / "own", seed=0)


def lung_weights(folder, seed):
    torch.manual_seed(seed)
    config = ModelConfig(channels=(4, 8), strides=(2,), outputs=2)
    Model(build_unet(config), config, "lungs").save(folder / "model.safetensors")
    return folder


@pytest.fixture
def sees(monkeypatch):
    """Let every lung network see the air on some sides of the patient."""

    def see(*sides):
        def chances(image, network):
            air, left = image < 0.5, np.arange(image.shape[2]) >= image.shape[2] / 2
            halves = [air & half & (side in sides) for side, half in (("right", ~left), ("left", left))]
            return np.stack(halves).astype(np.float32)

        monkeypatch.setattr("normnet.prepare.network.chances", chances)

    return see


def test_the_outline_by_thresholds_is_written_where_it_is_another(
    tmp_path, undecided, lung_run, sees, capsys
):
    write_case(tmp_path, "p1")
    out, flags = tmp_path / "out", ("--lungs", str(lung_run))
    left = np.arange(SHAPE[2]) >= SHAPE[2] / 2

    def written(name):
        return sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"p1_{name}.nii.gz"))) > 0

    sees("right")
    assert run(tmp_path, undecided, *flags, "--save-core", masks=False) == 0
    told = r"warning: p1: the lung network has \d ml that thresholds have not, and lacks [1-9]\d* ml"
    assert re.search(told, capsys.readouterr().err)
    record = json.loads((out / "p1.json").read_text())
    weights = (lung_run / "model.safetensors").read_bytes()
    assert (record["lungs_from"], record["lungs_sha256"]) == ("own", hashlib.sha256(weights).hexdigest())
    assert record["files"]["classical"] == "p1_classical.nii.gz"
    expected = classical.load_case(tmp_path / "p1_hu.nii.gz").native_mask
    np.testing.assert_array_equal(written("classical"), expected)
    assert expected[..., left].any()
    assert written("lung")[..., ~left].any()
    assert not written("lung")[..., left].any()
    # the same call again: there, told again, and what more it writes leaves no part out
    assert run(tmp_path, undecided, *flags, masks=False) == 0
    said = capsys.readouterr()
    assert "(1 by an earlier call)" in said.out
    assert re.search(told, said.err)
    assert run(tmp_path, undecided, *flags, "--save-probability", masks=False) == 0
    files = json.loads((out / "p1.json").read_text())["files"]
    assert [kind for kind, name in files.items() if name is None] == ["dicom_seg"]
    assert all((out / name).is_file() for name in files.values() if name)
    # a network that agrees takes the outline of before away
    sees("right", "left")
    capsys.readouterr()
    assert run(tmp_path, undecided, *flags, "--overwrite", masks=False) == 0
    assert "the lung network" not in capsys.readouterr().err
    record = json.loads((out / "p1.json").read_text())
    assert (record["files"]["classical"], record["warnings"]) == (None, [])
    assert not (out / "p1_classical.nii.gz").exists()
    assert written("lung")[..., left].any()


def test_an_outline_that_no_call_wrote_is_not_taken_for_an_old_one(
    tmp_path, undecided, lung_run, sees, capsys
):
    """Neither replaced where the two disagree, nor taken away where they agree."""
    write_case(tmp_path, "p1")
    file = tmp_path / "out/p1_classical.nii.gz"
    file.parent.mkdir()
    file.write_bytes(b"my own")
    flags = ("--lungs", str(lung_run))
    for sides in (("right",), ("right", "left")):
        sees(*sides)
        for more in ((), ("--overwrite",)):
            assert run(tmp_path, undecided, *flags, *more, masks=False) == 2
            said = capsys.readouterr().err
            assert "output holds p1_classical.nii.gz, which is of no earlier call" in said
            assert file.read_bytes() == b"my own"
    file.unlink()
    assert run(tmp_path, undecided, *flags, masks=False) == 0
    # a record may name any file: that of another case is not this one's
    record = json.loads((tmp_path / "out/p1.json").read_text())
    record["files"]["classical"] = "p2_lesions.nii.gz"
    (tmp_path / "out/p1.json").write_text(json.dumps(record))
    (tmp_path / "out/p2_lesions.nii.gz").write_bytes(b"my own")
    assert run(tmp_path, undecided, *flags, "--overwrite", masks=False) == 0
    assert (tmp_path / "out/p2_lesions.nii.gz").read_bytes() == b"my own"


def test_lungs_of_another_method_or_network_are_refused(tmp_path, undecided, lung_run, sees, capsys):
    write_case(tmp_path, "p1")
    sees("right", "left")
    own = ("--lungs", str(lung_run))
    assert run(tmp_path, undecided, *own, masks=False) == 0
    before = stamps(tmp_path / "out")
    assert run(tmp_path, undecided, masks=False) == 2
    rule = "p1.json: lungs_from must be that of this call, or overwrite passed: there "
    assert f'{rule}"own", now "classical"\n' in capsys.readouterr().err
    assert run(tmp_path, undecided, "--lungs", "network", masks=False) == 2
    assert f'{rule}"own", now "network"\n' in capsys.readouterr().err
    # a run that was trained on, and another of the same name
    old = hashlib.sha256((lung_run / "model.safetensors").read_bytes()).hexdigest()
    elsewhere = lung_weights(tmp_path / "other/own", seed=2)
    for folder in (lung_weights(lung_run, seed=1), elsewhere):
        assert run(tmp_path, undecided, "--lungs", str(folder), masks=False) == 2
        new = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        said = capsys.readouterr().err
        rule = "p1.json: lungs_sha256 must be that of this call, or overwrite passed: there "
        assert f'{rule}"{old}", now "{new}"\n' in said
    assert stamps(tmp_path / "out") == before
    assert run(tmp_path, undecided, "--lungs", str(elsewhere), "--overwrite", masks=False) == 0
    assert json.loads((tmp_path / "out/p1.json").read_text())["lungs_sha256"] == new


def test_lungs_of_an_earlier_version_are_of_another_method(tmp_path, undecided, sees, capsys):
    """Its records tell "thresholds" and no weights: read and told, and replaced where that is asked for."""
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided, masks=False) == 0
    file = tmp_path / "out/p1.json"
    record = json.loads(file.read_text())
    old = {k: v for k, v in record.items() if k != "lungs_sha256"} | {"lungs_from": "thresholds"}
    del old["files"]["classical"]
    file.write_text(json.dumps(old))
    assert read_record(file)["lungs_sha256"] is None
    capsys.readouterr()
    sees("right", "left")
    network = ("--lungs", "network")  # what is found without a word of it
    assert run(tmp_path, undecided, *network, masks=False) == 2
    rule = "lungs_from must be that of this call, or overwrite passed"
    assert f'p1.json: {rule}: there "classical", now "network"\n' in capsys.readouterr().err
    assert json.loads(file.read_text()) == old
    assert run(tmp_path, undecided, *network, "--overwrite", masks=False) == 0
    found = json.loads(file.read_text())
    assert (found["lungs_from"], found["files"]["classical"]) == ("network", None)
    assert len(found["lungs_sha256"]) == 64
    # masks that were given then are the same now
    assert run(tmp_path, undecided, "--overwrite") == 0
    record = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in record.items() if k != "lungs_sha256"}))
    capsys.readouterr()
    assert run(tmp_path, undecided) == 0
    assert "(1 by an earlier call)" in capsys.readouterr().out


def test_settings_from_a_file_and_flags_above_it(tmp_path, undecided, capsys):
    write_case(tmp_path, "p1")
    mine = PredictConfig(probability=0.4, overlap=0.25, postprocess=PostprocessConfig(full_size=5))
    (tmp_path / "mine.json").write_text(to_json(mine))
    config = ["--config", str(tmp_path / "mine.json"), "--settings.overlap", "0.0"]
    assert run(tmp_path, undecided, *config) == 0
    record = json.loads((tmp_path / "out/p1.json").read_text())
    expected = replace(mine, slab=16, overlap=0.0)
    assert from_json(PredictConfig, json.dumps(record["settings"])) == expected
    # what a call writes can be given to the next
    for name in ("p1.json", "settings.json"):
        assert predict.read_config(tmp_path / "out" / name) == expected
    (tmp_path / "bad.json").write_text('{"slabs": 3}')
    assert run(tmp_path, undecided, "--config", str(tmp_path / "bad.json")) == 2
    assert "PredictConfig has no field 'slabs'" in capsys.readouterr().err
    assert run(tmp_path, undecided, f"--config={tmp_path / 'none.json'}") == 2
    assert "config must be a JSON file with settings" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_of_a_case(tmp_path, undecided, monkeypatch, capsys):
    """ITK reports no error: it writes a short file. The case before is kept, the one after is written."""
    for name in ("p1", "p2", "p3"):
        write_case(tmp_path, name)
    assert run(tmp_path, undecided) == 0
    write_like = Scan.write_like

    def short(self, array, path):
        written = write_like(self, array, path)
        if written.name == "p2_lung.nii.gz":
            written.write_bytes(written.read_bytes()[:-20])
        return written

    monkeypatch.setattr(Scan, "write_like", short)
    assert run(tmp_path, undecided, names=("p2", "p3", "p1")) == 1
    said = capsys.readouterr()
    assert "p2_lung.nii.gz: could not be written completely" in said.err
    assert "2 of 3 volumes segmented (1 by an earlier call)" in said.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "p1.json", "p1_lesions.nii.gz", "p1_lung.nii.gz", "p3.json", "p3_lesions.nii.gz",
        "p3_lung.nii.gz", "settings.json", "volumes.csv",
    ]  # fmt: skip
    monkeypatch.undo()
    before = stamps(tmp_path / "out")

    def full(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr("normnet.stage.check_written", lambda path: full(path, path))
    assert run(tmp_path, undecided, "--settings.probability", "0.5", "--overwrite") == 1
    after = stamps(tmp_path / "out")
    assert after == before  # the old result outlives a new one that fails


def test_a_short_file_is_seen(tmp_path, undecided):
    """A gzip file may end well and still lack voxels."""
    write_case(tmp_path, "p1")
    path = tmp_path / "p1_hu.nii.gz"
    check_written(path)
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:-1]))
    with pytest.raises(OSError, match=f"{len(content) - 1} of {len(content)} bytes were written"):
        check_written(path)
    path.write_bytes(b"")
    with pytest.raises(OSError, match="could not be written completely"):
        check_written(path)


def test_what_a_killed_call_left_is_cleared_away(tmp_path, undecided):
    write_case(tmp_path, "p1")
    out = tmp_path / "out"
    assert run(tmp_path, undecided, "--save-core") == 0
    expected = (out / "p1_lesions.nii.gz").read_bytes()
    # killed while it replaced lesions, lungs and core by lesions and lungs: the lungs have not moved
    stage, other = out / f".p1.{'0a' * 16}", out / f".p1.x.{'0a' * 16}"
    for folder in (stage, other):
        folder.mkdir()
        (folder / "p1_lung.nii.gz").write_bytes(b"part")
    record = json.loads((out / "p1.json").read_text())
    (stage / "record").write_text(json.dumps({**record, "files": {**record["files"], "core": None}}))
    (out / "p1.json").rename(stage / "before")
    (out / "p1_lesions.nii.gz").write_bytes(b"of another call")
    assert run(tmp_path, undecided) == 0
    assert not stage.exists()
    assert other.exists()  # of the case p1.x, which another call may be writing
    assert (out / "p1_lesions.nii.gz").read_bytes() == expected
    assert not (out / "p1_core.nii.gz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("at", range(4))
def test_a_call_killed_between_two_files_is_done_again(tmp_path, undecided, at):
    """SIGKILL at each rename of a case: two maps, the record, the table."""
    write_case(tmp_path, "p1")
    code = (
        "import os, signal, sys; from normnet import predict, stage\n"
        "real, calls = os.replace, []\n"
        "def replace(a, b):\n"
        "    if 'settings' not in str(b): calls.append(b)\n"
        f"    if len(calls) == {at + 1}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(a, b)\n"
        "class Os:\n"
        "    replace = staticmethod(replace)\n"
        "    def __getattr__(self, name): return getattr(os, name)\n"
        "stage.os = Os()\n"
        # every file is renamed once more when it is whole, those of a case inside the hidden folder
        "import lesionsynth.files as files\n"
        "class Shared(Os):\n"
        "    def replace(self, a, b): (real if '.p1.' in str(b) else replace)(a, b)\n"
        "files.os = Shared()\n"
        "sys.exit(predict.main(sys.argv[1:]))\n"
    )
    call = [str(tmp_path / "p1_hu.nii.gz"), "--models", str(undecided), "--threads", "1", "--masks"]
    call += [str(tmp_path), "--output", str(tmp_path / "out"), "--settings.slab", "16"]
    done = subprocess.run([sys.executable, "-c", code, *call], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "out/p1.json").exists() == (at == 3)
    assert run(tmp_path, undecided) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".vol")) == [
        "p1.json", "p1_lesions.nii.gz", "p1_lung.nii.gz", "settings.json", "volumes.csv",
    ]  # fmt: skip


def test_inputs_and_files_of_others_are_never_replaced(tmp_path, undecided, capsys):
    write_case(tmp_path, "p1")
    call = [str(tmp_path / "p1_hu.nii.gz"), "--models", str(undecided), "--output"]
    # the lung mask beside the CT has the name of a result
    lung = (tmp_path / "p1_lung.nii.gz").read_bytes()
    assert predict.main([*call, str(tmp_path), "--masks", str(tmp_path), "--overwrite"]) == 2
    assert "output must not replace an input" in capsys.readouterr().err
    assert predict.main([*call, str(tmp_path)]) == 2
    assert "output holds p1_lung.nii.gz, which is of no earlier call" in capsys.readouterr().err
    assert (tmp_path / "p1_lung.nii.gz").read_bytes() == lung
    (tmp_path / "out").mkdir()
    (tmp_path / "out/p1.json").write_text("[1, 2]")
    (tmp_path / "out/settings.json").write_text("{}")
    assert run(tmp_path, undecided) == 2
    assert "output holds settings.json, which is of no earlier call" in capsys.readouterr().err
    (tmp_path / "out/settings.json").unlink()
    assert run(tmp_path, undecided) == 2
    assert "output holds p1.json, which is of no earlier call" in capsys.readouterr().err
    (tmp_path / "out/p1.json").unlink()
    (tmp_path / "out/volumes.csv").write_text("case,volume\np1,3\n")
    assert run(tmp_path, undecided) == 2
    assert "output holds volumes.csv, which is of no earlier call" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["volumes.csv"]
    assert run(tmp_path, undecided, "--overwrite") == 2  # of others, whatever is asked
    assert (tmp_path / "out/volumes.csv").read_text() == "case,volume\np1,3\n"
    (tmp_path / "out/volumes.csv").unlink()
    assert run(tmp_path, undecided) == 0
    assert (tmp_path / "out/volumes.csv").read_text().startswith("case,lung_ml")
    # the lungs of one case must not become the CT of another
    call = [str(tmp_path / "p1_hu.nii.gz"), str(tmp_path / "q_lung.nii.gz"), "--models", str(undecided)]
    (tmp_path / "q_lung.nii.gz").write_bytes((tmp_path / "p1_hu.nii.gz").read_bytes())
    assert predict.main([*call, "--name", "q", "r", "--output", str(tmp_path), "--overwrite"]) == 2
    assert "output must not replace an input" in capsys.readouterr().err


def test_an_annotation_beside_finished_cases_is_never_replaced(tmp_path, undecided, capsys):
    """A folder of finished cases is no reason to replace a file that has no record."""
    for name in ("p1", "p2"):
        write_case(tmp_path, name)
    out = tmp_path / "out"
    assert run(tmp_path, undecided) == 0
    (out / "p2_lesions.nii.gz").write_bytes(b"my own")
    (out / "p1_core.nii.gz").write_bytes(b"my own")
    before = stamps(out)
    assert run(tmp_path, undecided, names=("p1", "p2")) == 2
    said = capsys.readouterr().err
    assert "output holds p2_lesions.nii.gz, which is of no earlier call; take another folder" in said
    assert run(tmp_path, undecided, "--save-core") == 2
    assert "output holds p1_core.nii.gz, which is of no earlier call" in capsys.readouterr().err
    assert stamps(out) == before
    assert run(tmp_path, undecided) == 0  # nothing is written for a finished case
    # a killed call's hidden folder claims what it moved, not what it did not get to
    stage = out / f".p2.{'0a' * 16}"
    stage.mkdir()
    record = json.loads((out / "p1.json").read_text())
    files = {"lesions": "p2_lesions.nii.gz", "lung": "p2_lung.nii.gz"}
    (stage / "record").write_text(json.dumps({**record, "case": "p2", "files": files}))
    (stage / "p2_lesions.nii.gz").write_bytes(b"part")
    assert run(tmp_path, undecided, names=("p2",)) == 2
    assert (out / "p2_lesions.nii.gz").read_bytes() == b"my own"
    assert run(tmp_path, undecided, "--overwrite", names=("p2",)) == 2
    assert (out / "p2_lesions.nii.gz").read_bytes() == b"my own"
    (out / "p2_lesions.nii.gz").unlink()
    assert run(tmp_path, undecided, "--overwrite", names=("p2",)) == 0
    assert json.loads((out / "p2.json").read_text())["case"] == "p2"


def test_an_annotation_that_comes_while_a_call_runs_is_not_replaced(tmp_path, undecided, monkeypatch, capsys):
    write_case(tmp_path, "p1")
    real = load_case

    def slow(*args, **kwargs):
        (tmp_path / "out/p1_lesions.nii.gz").write_bytes(b"my own")
        return real(*args, **kwargs)

    monkeypatch.setattr("normnet.predict.case.load_case", slow)
    assert run(tmp_path, undecided) == 1
    assert "output holds p1_lesions.nii.gz, which is of no earlier call" in capsys.readouterr().err
    assert (tmp_path / "out/p1_lesions.nii.gz").read_bytes() == b"my own"


def test_a_file_that_cannot_be_moved_leaves_the_old_result_or_none(tmp_path, undecided, monkeypatch):
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided, "--save-core") == 0
    out, real = tmp_path / "out", os.replace
    before = stamps(out)
    for last, left in (("p1_lesions.nii.gz", set(before)), ("p1_lung.nii.gz", {"p1_lung.nii.gz"})):

        def replace_until(source, target, last=last):
            if Path(target) == out / last:
                raise OSError("no room")
            real(source, target)

        monkeypatch.setattr("normnet.stage.os.replace", replace_until)
        assert run(tmp_path, undecided, "--overwrite", "--settings.probability", "0.5") == 1
        monkeypatch.undo()
        assert not list(out.glob(".p1.*"))
        assert (out / "p1.json").exists() == (len(left) > 1)
        if len(left) > 1:
            assert stamps(out) == before
    assert not list(out.glob("p1*"))


@pytest.mark.parametrize("what", ["hu", "lung"])
def test_a_ct_or_mask_that_was_corrected_is_not_taken_for_the_old(tmp_path, undecided, capsys, what):
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided) == 0
    file = tmp_path / f"p1_{what}.nii.gz"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # a correction of the same size
    assert run(tmp_path, undecided) == 2
    said = capsys.readouterr().err
    name = {"hu": "the CT", "lung": "the lung mask"}[what]
    assert f"p1.json: {name} must be as it was when it was read, or overwrite passed: there " in said
    assert run(tmp_path, undecided, "--overwrite") == 0
    assert run(tmp_path, undecided) == 0
    # a record of an earlier version has no stamps: it is what it was
    record = json.loads((tmp_path / "out/p1.json").read_text())
    del record["ct_stamp"], record["lungs_stamp"]
    (tmp_path / "out/p1.json").write_text(json.dumps(record))
    assert run(tmp_path, undecided) == 0
    assert "(1 by an earlier call)" in capsys.readouterr().out


def test_voxels_beside_a_header_count(tmp_path):
    image = sitk.GetImageFromArray(np.zeros((3, 4, 5), np.int16))
    for ending, data in ((".mhd", ".raw"), (".nhdr", ".raw")):
        header = tmp_path / f"{ending[1:]}{ending}"
        sitk.WriteImage(image, str(header))
        (voxels,) = tmp_path.glob(f"{ending[1:]}{data}*")
        first = stamp([header])
        assert first == stamp([header])
        assert first["files"] == 2
        assert first["bytes"] == header.stat().st_size + voxels.stat().st_size
        os.utime(voxels, ns=(0, 5))
        assert stamp([header]) != first


def test_a_slice_of_a_series_that_was_corrected_is_seen(tmp_path, undecided, capsys):
    """Of a DICOM folder the files of the series count, and no others."""
    write_case(tmp_path, "p1")
    study = tmp_path / "study"
    write_series(study, sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1_hu.nii.gz"))))
    lung = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1_lung.nii.gz"))) > 0
    mask = read_ct(study).write_like(lung, tmp_path / "mask.nii.gz")
    call = [str(study), "--models", str(undecided), "--threads", "1", "--output", str(study)]
    call += ["--settings.slab", "16", "--masks", str(mask)]
    assert predict.main(call) == 0
    assert predict.main(call) == 0
    assert "(1 by an earlier call)" in capsys.readouterr().out
    slices = sorted(p for p in study.glob("*.dcm"))
    os.utime(slices[3], ns=(0, slices[3].stat().st_mtime_ns + 1))
    assert predict.main(call) == 2
    assert "the CT must be as it was when it was read" in capsys.readouterr().err


def test_json_of_others_does_not_harm_the_table(tmp_path, undecided):
    write_case(tmp_path, "p1")
    (tmp_path / "out").mkdir()
    for name, text in (("notes", '{"by": "me"}'), ("cut", "{"), ("list", "[1]")):
        (tmp_path / f"out/{name}.json").write_text(text)
    assert run(tmp_path, undecided) == 0
    rows = list(csv.DictReader((tmp_path / "out/volumes.csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == ["p1"]
    assert (tmp_path / "out/notes.json").read_text() == '{"by": "me"}'


def test_calls_that_cannot_give_each_case_its_lungs(tmp_path, undecided, capsys, monkeypatch):
    for name in ("p1", "p2"):
        write_case(tmp_path, name)
    mask = tmp_path / "p1_lung.nii.gz"
    assert run(tmp_path, undecided, "--masks", str(mask), names=("p1", "p2"), masks=False) == 2
    said = capsys.readouterr().err
    assert f"masks must be a folder where there are several inputs, got the file {mask}" in said
    assert run(tmp_path, undecided, "--masks", str(tmp_path / "gone"), masks=False) == 2
    assert f"masks must exist, got {tmp_path / 'gone'}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lungmask", None)
    assert run(tmp_path, undecided, "--lungs", "lungmask", masks=False) == 2
    assert "pip install lungmask" in capsys.readouterr().err
    assert run(tmp_path, undecided, "--threads", "0") == 2
    assert "threads must be >= 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(tmp_path, undecided, "--masks", str(mask), masks=False) == 0
    assert run(tmp_path, undecided, "--lungs", "lungmask", "--masks", str(mask), masks=False) == 0


def test_any_error_stays_with_its_case(tmp_path, undecided, monkeypatch, capsys):
    for name in ("p1", "p2"):
        write_case(tmp_path, name)
    real = load_case

    def odd(path, *args, **kwargs):
        if "p1" in str(path):
            raise RuntimeError("nobody thought of this")
        return real(path, *args, **kwargs)

    monkeypatch.setattr("normnet.predict.case.load_case", odd)
    summary = predict.predict(
        predict.PredictArgs(
            inputs=tuple(tmp_path / f"{n}_hu.nii.gz" for n in ("p1", "p2")),
            models=(undecided,),
            output=tmp_path / "out",
            masks=tmp_path,
            save_probability=False,
            device="cpu",
            threads=1,
            settings=EXACT,
        )
    )
    assert summary.written == ["p2"]
    assert summary.there == []
    reason = f"{tmp_path / 'p1_hu.nii.gz'}: RuntimeError: nobody thought of this"
    assert summary.failures == {"p1": reason}


def test_a_case_for_notebooks(tmp_path, undecided):
    """On a grid whose voxels are no multiple of the working grid's, maps reach over the lungs' edge."""
    spacing = (2.5, 1.3, 0.5)
    ball = write_case(tmp_path, "p1", spacing=spacing)
    case, lungs = tmp_path / "p1_hu.nii.gz", tmp_path / "p1_lung.nii.gz"
    models = [Model.load(undecided / "a")]
    settings = replace(EXACT, postprocess=PostprocessConfig(threshold_hu=-790, full_threshold=0.001))
    write_case(tmp_path, "p1", spacing=spacing)
    found = predict.predict_case(case, models, settings, mask_path=lungs)
    assert found.lesions.shape == found.ct.hu.shape == SHAPE
    assert found.lesions[ball].mean() > 0.95
    assert found.volumes["lesion_ml"] == pytest.approx(found.lesions.sum() * np.prod(spacing) / 1000)
    assert found.probability.dtype == np.float32
    bare = predict.predict_case(case, models, settings, mask_path=lungs, keep_probability=False)
    assert bare.probability is None
    assert bare.healthy is None
    loaded = load_case(case, lungs)
    volume = predict.predict_volume(loaded.hu, loaded.mask, models, settings)
    for on_grid, native in (
        (volume.lesions, found.lesions),
        (volume.lesions_without_growing, found.core),
        (volume.probability, found.probability),
    ):
        there = loaded.to_native(on_grid)
        assert native.any()
        assert not native[~found.lung].any()
        np.testing.assert_array_equal(native[found.lung], there[found.lung])
    assert loaded.to_native(volume.probability)[~found.lung].any()


def test_the_vote_is_written_on_the_file_s_own_grid(tmp_path):
    """Two of three models call healthy what is above 0.45 of the window, the mean never does."""
    write_case(tmp_path, "p1")
    case, lungs = tmp_path / "p1_hu.nii.gz", tmp_path / "p1_lung.nii.gz"
    models = [pointwise(centre=c, slope=40.0) for c in (0.35, 0.36, 5.0)]
    found = predict.predict_case(case, models, EXACT, mask_path=lungs)
    loaded = load_case(case, lungs)
    volume = predict.predict_volume(loaded.hu, loaded.mask, models, EXACT)
    expected = loaded.to_native(volume.healthy) & found.lung
    assert found.healthy.dtype == bool
    np.testing.assert_array_equal(found.healthy, expected)
    assert found.healthy.sum() > 1000
    assert not (found.probability > 0.95).any()


def test_maps_among_the_inputs_are_no_ct(tmp_path):
    for name in ("p1_hu.nii.gz", "p1_healthy.nii.gz", "p1_classical.nii.gz"):
        (tmp_path / name).touch()
    names = [s.path.name for s in find_sources([tmp_path])]
    # by itself the word may describe a person
    assert names == ["p1_classical.nii.gz", "p1_healthy.nii.gz", "p1_hu.nii.gz"]
    (tmp_path / "p1_lesions.nii.gz").touch()
    assert [s.path.name for s in find_sources([tmp_path])] == ["p1_hu.nii.gz"]


def test_a_crash_between_two_files_leaves_no_record(tmp_path, undecided, monkeypatch):
    """Maps of two calls side by side must not count as finished."""
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided) == 0
    replace_file = os.replace

    def crash(source, target):
        if Path(target) == tmp_path / "out/p1_lung.nii.gz":
            raise OSError("Input/output error")
        replace_file(source, target)

    monkeypatch.setattr("normnet.stage.os.replace", crash)
    assert run(tmp_path, undecided, "--settings.probability", "0.4", "--overwrite") == 1
    assert not (tmp_path / "out/p1.json").exists()
    assert not (tmp_path / "out/volumes.csv").exists()


def test_dicom_in_and_dicom_segmentation_out(tmp_path, undecided, capsys):
    write_case(tmp_path, "p1")
    hu = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1_hu.nii.gz")))
    lung = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1_lung.nii.gz"))) > 0
    series = write_series(tmp_path / "scans/p9", hu)
    # the mask file lies on the series' grid
    ct = read_ct(tmp_path / "scans/p9")
    ct.write_like(lung, tmp_path / "masks/p9_lung.nii.gz")
    call = ["--models", str(undecided / "a"), "--threads", "1", "--settings.slab", "16", "--dicom-seg"]
    call += ["--output", str(tmp_path / "out"), "--masks", str(tmp_path / "masks")]
    assert predict.main([str(tmp_path / "scans"), *call]) == 0
    record = json.loads((tmp_path / "out/p9.json").read_text())
    assert record["series"] == series
    assert record["files"]["dicom_seg"] == "p9_lesions.dcm"
    found, _ = voxels_of(tmp_path / "out/p9_lesions.dcm", SHAPE)
    np.testing.assert_array_equal(found["lung"], lung)
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out/p9_lesions.nii.gz"))) > 0
    np.testing.assert_array_equal(found["lesion"], written)
    assert written.any()
    # an output folder below the input is no input, though it holds DICOM now
    call[call.index("--output") + 1] = str(tmp_path / "scans/out")
    for _ in range(2):
        assert predict.main([str(tmp_path / "scans"), *call]) == 0
        assert "1 of 1 volumes" in capsys.readouterr().out
    call[-1] = str(tmp_path)
    assert predict.main([str(tmp_path / "p1_hu.nii.gz"), *call]) == 1
    said = capsys.readouterr()
    rule = (
        "p1_hu.nii.gz: dicom_seg must be left out, as the CT is no DICOM series; "
        "the other files do not need it"
    )
    assert said.err.count(rule) == 2  # before the computation, and at the end
    assert said.err.index(rule) < said.err.index("predict: 100%")
    assert "1 of 1 volumes" in said.out
    record = json.loads((tmp_path / "scans/out/p1.json").read_text())
    assert record["files"]["lesions"] == "p1_lesions.nii.gz"
    assert record["files"]["dicom_seg"] is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_maps_are_written_where_the_headers_allow_no_segmentation(
    tmp_path, undecided, capsys, monkeypatch, when
):
    """What is wrong is told beforehand; what nobody foresaw does not cost the maps either."""
    write_case(tmp_path, "p1")
    hu = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1_hu.nii.gz")))
    lung = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "p1_lung.nii.gz")))
    write_series(tmp_path / "scans/p9", hu)
    read_ct(tmp_path / "scans/p9").write_like(lung, tmp_path / "masks/p9_lung.nii.gz")

    def refuse(*_):
        raise ValueError("003.dcm: StudyDate must be a date")

    name = "check_segmentation" if when == "before" else "write_segmentation"
    monkeypatch.setattr(f"normnet.predict.command.{name}", refuse)
    call = [str(tmp_path / "scans"), "--models", str(undecided / "a"), "--threads", "1", "--dicom-seg"]
    call += ["--output", str(tmp_path / "out"), "--settings.slab", "16", "--masks", str(tmp_path / "masks")]
    for again in (False, True):
        assert predict.main(call) == 1
        said = capsys.readouterr()
        told = "003.dcm: StudyDate must be a date; the other files do not need it"
        assert said.err.count(told) == (2 if when == "before" else 1)
        early = f"warning: p9: {tmp_path / 'scans/p9'}: {told}"
        assert (early in said.err.splitlines()[0]) == (when == "before")
        assert "1 of 1 volumes segmented" in said.out
        assert ("by an earlier call" in said.out) == (again and when == "before")
        record = json.loads((tmp_path / "out/p9.json").read_text())
        assert record["files"]["lesions"] == "p9_lesions.nii.gz"
        assert not (tmp_path / "out/p9_lesions.dcm").exists()
    monkeypatch.undo()
    assert predict.main(call) == 0
    assert (tmp_path / "out/p9_lesions.dcm").exists()


def test_what_is_passed_over_is_told_and_counts_where_it_was_named(tmp_path, undecided, capsys):
    scans = tmp_path / "in"
    for folder in (scans, scans / "Lungs", scans / "sub"):
        folder.mkdir(parents=True)
        write_case(folder, f"p_{folder.name}")
    (scans / "old.img").touch()
    (scans / "gone.nii").symlink_to(scans / "nothing")
    call = ["--models", str(undecided / "a"), "--threads", "1", "--settings.slab", "16", *classical.FLAGS]
    call += ["--output"]
    assert predict.main([str(scans), *call, str(scans / "out")]) == 0
    said = capsys.readouterr()
    assert "2 of 2 volumes" in said.out
    told = [line for line in said.err.splitlines() if line.startswith("passed over: ")]
    names = (
        "gone.nii",
        "old.img",
        "p_in_lung.nii.gz",
        "Lungs/p_Lungs_hu.nii.gz",
        "Lungs/p_Lungs_lung.nii.gz",
    )
    names += ("sub/p_sub_lung.nii.gz",)
    assert sorted(line.split(": ")[1] for line in told) == sorted(str(scans / name) for name in names)
    named = [str(scans / name) for name in ("gone.nii", "old.img")]
    assert predict.main([str(scans / "sub"), *named, *call, str(scans / "out")]) == 1
    said = capsys.readouterr()
    assert "1 of 1 volumes" in said.out
    assert said.err.index("gone.nii: a link that leads nowhere") < said.err.index(
        "p_sub_lung.nii.gz: named as"
    )
    assert "old.img: of no format that is read" in said.err
    assert predict.main([*named, *call, str(tmp_path / "other")]) == 2
    assert "found none; passed over: " in capsys.readouterr().err
    # named itself, a folder or a file is read whatever it is called
    assert predict.main([str(scans / "Lungs"), *call, str(tmp_path / "lungs")]) == 0
    assert "1 of 1 volumes" in capsys.readouterr().out


def test_warnings_of_a_case_are_told_and_kept(tmp_path, undecided, capsys):
    """A mask of several labels is used as a whole, with a warning; --label chooses."""
    write_case(tmp_path, "p1")
    path = str(tmp_path / "p1_lung.nii.gz")
    image = sitk.ReadImage(path)
    labels = sitk.GetArrayFromImage(image)
    labels[:, :, 36:] *= 2
    two = sitk.GetImageFromArray(labels)
    two.CopyInformation(image)
    sitk.WriteImage(two, path)
    volumes = {}
    for flags in ((), ("--label", "1", "--overwrite"), ("--label", "1", "2", "--overwrite")):
        assert run(tmp_path, undecided, *flags) == 0
        said = capsys.readouterr().err
        record = json.loads((tmp_path / "out/p1.json").read_text())
        assert "UserWarning" not in said
        told = [line for line in said.splitlines() if line.startswith("warning: p1: ")]
        assert [line.removeprefix("warning: p1: ") for line in told] == record["warnings"]
        assert bool(told) == (not flags)
        volumes[flags[1:-1]] = record["volumes"]["lung_ml"]
        assert record["label"] == ([int(label) for label in flags[1:-1]] or None)
    assert volumes[("1",)] < 0.6 * volumes[()]
    assert volumes[("1", "2")] == volumes[()]
    assert run(tmp_path, undecided, "--label", "1") == 2
    assert "label must be that of this call" in capsys.readouterr().err
    assert run(tmp_path, undecided, "--overwrite") == 0
    capsys.readouterr()
    assert run(tmp_path, undecided) == 0  # there by an earlier call: still told
    assert "warning: p1: " in capsys.readouterr().err
    assert run(tmp_path, undecided, "--label", "1", masks=False) == 2
    assert "label must be left out where no masks are given, got [1]" in capsys.readouterr().err


def test_records_of_earlier_versions_go_on(tmp_path, undecided, capsys):
    """They know of no labels and no warnings."""
    write_case(tmp_path, "p1")
    assert run(tmp_path, undecided) == 0
    file = tmp_path / "out/p1.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in record.items() if k not in ("label", "warnings")}))
    assert run(tmp_path, undecided) == 0
    assert "(1 by an earlier call)" in capsys.readouterr().out
    assert run(tmp_path, undecided, "--label", "1") == 2


def test_settings_reach_the_post_processing():
    hu, mask = patient()
    none = replace(EXACT, postprocess=PostprocessConfig(growth_iterations=0))
    far = replace(EXACT, postprocess=PostprocessConfig(growth_iterations=-1))
    a, b = (predict.predict_volume(hu, mask, [pointwise(slope=0.0)], c) for c in (none, far))
    np.testing.assert_array_equal(a.lesions, a.lesions_without_growing)
    assert a.lesions.sum() < b.lesions.sum()
