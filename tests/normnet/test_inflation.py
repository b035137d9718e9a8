"""Lungs brought to one inflation: the density found, the scaling, and the way from training to a map."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("monai")

import lesionsynth as ls  # noqa: E402
from normnet import predict, train  # noqa: E402
from normnet.config import ModelConfig, PostprocessConfig, PredictConfig, TrainConfig  # noqa: E402
from normnet.evaluate import CaseVolumes, evaluate_volumes, origin_of  # noqa: E402
from normnet.inflation import AIR_HU, healthy_density, inflate, inflation_factor  # noqa: E402
from normnet.model import Model, build_unet  # noqa: E402
from normnet.output import read_record  # noqa: E402
from normnet.postprocess import postprocess  # noqa: E402

SMALL = ModelConfig(channels=(4, 8), strides=(2,))


def lungs(density, spread=45.0, seed=0, shape=(12, 48, 60)):
    """Noisy lung of a density, in a body of soft tissue."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    mask[:, 6:-6, 6:-6] = True
    hu = np.where(mask, rng.normal(density, spread, shape), 30).round().astype(np.int16)
    return hu, mask


@settings(max_examples=20)
@given(density=st.integers(-930, -720), seed=st.integers(0, 20))
def test_the_density_is_where_healthy_lung_lies(density, seed):
    hu, mask = lungs(density, seed=seed)
    # 20,000 voxels of 45 HU: a smoothed mode scatters by a few HU, here 5 standard errors
    assert healthy_density(hu, mask) == pytest.approx(density, abs=12)


def test_lesions_vessels_and_air_do_not_move_it():
    hu, mask = lungs(-880)
    rng = np.random.default_rng(1)
    hu[:, 6:20, 6:-6] = rng.normal(-600, 90, hu[:, 6:20, 6:-6].shape)  # 39 % of the lung
    hu[:, 20:23, 6:-6] = rng.normal(30, 20, hu[:, 20:23, 6:-6].shape)
    hu[:, 24:27, 6:-6] = -1000  # a bronchus
    assert np.median(hu[mask]) > -840
    assert healthy_density(hu, mask) == pytest.approx(-880, abs=12)


def test_most_of_the_lung_may_be_diseased():
    hu, mask = lungs(-885)
    rng = np.random.default_rng(2)
    for rows, density in ((slice(6, 32), -640), (slice(6, 27), -740)):  # 72 and 58 % of the lung
        ill = hu.copy()
        ill[:, rows, 6:-6] = rng.normal(density, 40, ill[:, rows, 6:-6].shape)
        assert np.median(ill[mask]) > -800
        assert healthy_density(ill, mask) == pytest.approx(-885, abs=12)


@pytest.mark.parametrize(("density", "spread"), [(-600, 5.0), (-985, 5.0), (20, 5.0), (-560, 60.0)])
def test_without_a_peak_of_healthy_lung_nothing_is_scaled(density, spread):
    hu, mask = lungs(density, spread=spread)
    assert healthy_density(hu, mask) is None
    assert inflation_factor(hu, mask, -870.0) == 1.0
    assert healthy_density(hu, np.zeros_like(mask)) is None


@given(factor=st.floats(0.9, 1.3), seed=st.integers(0, 9), kind=st.sampled_from(["int16", "float32"]))
def test_scaling_voxel_by_voxel(factor, seed, kind):
    hu, mask = lungs(-800, spread=300.0, seed=seed, shape=(3, 16, 16))
    hu[:, 7:9, 8] = 45  # a vessel
    hu = np.maximum(hu, AIR_HU).astype(kind)  # as CT is read; the factor 1 leaves even less as it is
    before = hu.copy()
    found = inflate(hu, mask, factor)
    assert found.dtype == hu.dtype
    np.testing.assert_array_equal(hu, before)
    expected = [
        max(float(v) * factor, AIR_HU) if m and v < 0 else float(v)
        for v, m in zip(hu.ravel(), mask.ravel(), strict=True)
    ]
    # int16: half an HU of rounding; float32: 24 bits of some thousand HU
    assert np.abs(found.ravel() - expected).max() <= (0.501 if kind == "int16" else 1e-3)


def test_one_factor_is_nothing_to_do():
    hu, mask = lungs(-850)
    assert inflate(hu, mask, 1.0) is hu
    assert inflation_factor(hu, mask, None) == 1.0


def undecided(path, inflation_hu, **header):
    """Weights of a network that calls nothing healthy: every bright voxel is left."""
    network = build_unet(SMALL)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    Model(network, SMALL, threshold_hu=-700.0, inflation_hu=inflation_hu, **header).save(path)
    return Model.load(path)


def test_prediction_scales_what_network_and_post_processing_see(tmp_path):
    hu, mask = lungs(-800)
    hu[4:8, 15:30, 15:30] = -660
    plain, scaled = (undecided(tmp_path / f"{level}.safetensors", level) for level in (None, -880.0))
    config = PredictConfig(slab=4, tile=None)
    found = predict.predict_volume(hu, mask, [scaled], config, device="cpu")
    assert found.inflation == pytest.approx(880 / 800, rel=0.015)
    by_hand = inflate(hu, mask, found.inflation)
    same = predict.predict_volume(by_hand, mask, [plain], config, device="cpu")
    np.testing.assert_array_equal(found.lesions, same.lesions)
    image = ls.window_hu(by_hand) * mask
    expected = postprocess(image, mask, np.zeros_like(mask), PostprocessConfig(threshold_hu=-700.0))
    np.testing.assert_array_equal(found.lesions, expected.final)
    # -660 HU of a lung at -800 HU is -726 HU of one at -880 HU: fainter than T
    assert predict.predict_volume(hu, mask, [plain], config, device="cpu").lesions[6, 22, 22]
    assert not found.lesions.any()
    with pytest.raises(ValueError, match=r"models must have one inflation_hu, got None, -880"):
        predict.predict_volume(hu, mask, [plain, scaled], config, device="cpu")


def test_the_record_tells_the_factor_and_what_was_judged(tmp_path):
    undecided(tmp_path / "m.safetensors", -880.0, probability=0.4)
    hu, mask = lungs(-800)
    for array, name in ((hu, "p"), (mask.astype(np.uint8), "lungs")):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((0.8, 0.8, 1.0))
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    call = [str(tmp_path / "p.nii.gz"), "--masks", str(tmp_path / "lungs.nii.gz")]
    call += ["--models", str(tmp_path / "m.safetensors")]
    assert predict.main([*call, "--output", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out/p.json").read_text())
    assert record["inflation"] == pytest.approx(1.1, rel=0.015)
    assert record["models"][0]["inflation_hu"] == -880.0
    assert record["models"][0]["probability"] == 0.4
    origin = origin_of(record)
    assert origin.threshold_hu == pytest.approx(-700 / record["inflation"])
    assert origin.label == "fixed at 0.4; T -700 HU"
    case = CaseVolumes(
        case="p", hu=hu, prediction=mask, truth=mask, lung_mask=mask, probability=mask.astype(np.float32),
        spacing=(1.0, 0.8, 0.8), origin=origin,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="the truth covers 100 % of the lungs"):
        made = evaluate_volumes([case], pictures=0).methods["Proposed"]
    assert made.judges == "lung from -700 HU, at one inflation"
    assert made.bright_threshold == "mean probability, fixed at 0.95; T -700 HU"
    for factor in (0, -1, 1e300, "1e309", "1", True, None, []):  # a damaged record says nothing
        (tmp_path / "out/p.json").write_text(json.dumps({**record, "inflation": factor}))
        with pytest.raises(ValueError, match="not the record of a prediction: inflation: "):
            read_record(tmp_path / "out/p.json")
    undecided(tmp_path / "n.safetensors", None)
    assert predict.main([*call, str(tmp_path / "n.safetensors"), "--output", str(tmp_path / "two")]) == 2
    assert not (tmp_path / "two").exists()


def test_weights_say_how_they_vote(tmp_path):
    calibration = {"probability": 0.3, "dice": 0.5}
    calibrated = undecided(tmp_path / "a", None, probability="calibrated", calibration=calibration)
    fixed = undecided(tmp_path / "b", None, probability=0.7, calibration=calibration)
    paper = undecided(tmp_path / "c", None)
    assert [model.threshold() for model in (calibrated, fixed, paper)] == [0.3, 0.7, 0.95]
    assert [model.threshold(0.5) for model in (calibrated, fixed)] == [0.5, 0.5]
    assert fixed.threshold("calibrated") == 0.3
    with pytest.raises(ValueError, match="carries no calibration"):
        paper.threshold("calibrated")


def test_training_scales_and_says_so(tmp_path):
    config = TrainConfig(
        output=tmp_path / "flat",
        model=SMALL,
        iterations=2,
        batch_size=1,
        slab=8,
        crop=32,
        phantoms=1,
        phantom_shape=(16, 96, 120),
        phantom_spacing=(4.0, 3.4, 3.4),
        validation_pairs=2,
        inflation_hu=-900.0,
        probability="calibrated",
        threads=1,
        device="cpu",
    )
    train.train(config)
    model = Model.load(tmp_path / "flat")
    assert (model.inflation_hu, model.probability) == (-900.0, "calibrated")
    assert model.threshold() == model.calibration["probability"]
    train.train(replace(config, output=tmp_path / "raw", inflation_hu=None))
    # other images, so other weights
    raw = Model.load(tmp_path / "raw")
    pairs = zip(model.network.parameters(), raw.network.parameters(), strict=True)
    assert any((a != b).any() for a, b in pairs)
