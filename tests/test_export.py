"""Exported weights: half the size, the same answers, the same header; what does not fit is refused."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("monai")

import torch

from normnet.config import ModelConfig, PredictConfig
from normnet.export import export, main
from normnet.model import build_unet, find_models, load_model, save_model
from normnet.predict import healthy_threshold

CONFIG = ModelConfig(channels=(8, 16), strides=(2,))


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        calibration = {"probability": 0.25, "dice": 0.9} if seed else None
        save_model(
            tmp_path / f"runs/seed{seed}/model.safetensors",
            build_unet(CONFIG),
            CONFIG,
            calibration,
            threshold_hu=-650.0,
            probability=0.6,
        )
    return tmp_path / "runs"


def test_answers_and_headers_stay(runs, tmp_path):
    files = export([runs], tmp_path / "out")
    assert [f.name for f in files] == ["model-0.safetensors", "model-1.safetensors"]
    x = torch.rand(1, 1, 8, 16, 16)
    for seed, file in enumerate(files):
        before, after = load_model(runs / f"seed{seed}"), load_model(file)
        assert next(after.parameters()).dtype == torch.float32
        # 11 bits of each weight
        assert torch.allclose(before(x).sigmoid(), after(x).sigmoid(), atol=2e-3)
        assert (after.config, after.calibration) == (before.config, before.calibration)
        assert after.threshold_hu == before.threshold_hu == -650.0
        assert (after.inflation_hu, after.probability) == (None, 0.6)
        assert file.stat().st_size < 0.6 * (runs / f"seed{seed}/model.safetensors").stat().st_size


def test_what_does_not_fit(tmp_path, capsys):
    model = build_unet(CONFIG)
    with torch.no_grad():
        next(model.parameters())[0] = 1e6
    save_model(tmp_path / "large.safetensors", model, CONFIG)
    with pytest.raises(ValueError, match="weights must be within half precision, got 1e"):
        export([tmp_path / "large.safetensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main([str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]) == 2
    assert "models must be weights files or run folders" in capsys.readouterr().err


def test_weights_are_told_how_to_vote(runs, tmp_path, capsys):
    assert main([str(runs), "--output", str(tmp_path / "out"), "--probability", "0.35"]) == 0
    models = [load_model(file) for file in find_models([tmp_path / "out"])]
    assert [model.probability for model in models] == [0.35, 0.35]
    assert [healthy_threshold(model, PredictConfig()) for model in models] == [0.35, 0.35]
    export([runs / "seed1"], tmp_path / "own", "calibrated")
    assert healthy_threshold(load_model(tmp_path / "own/model-0.safetensors"), PredictConfig()) == 0.25
    # the first run has no calibration
    assert main([str(runs), "--output", str(tmp_path / "no"), "--probability", "calibrated"]) == 2
    assert (
        "seed0/model.safetensors: probability: this model carries no calibration" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="probability must be < 1 or 'calibrated', got 1.5"):
        export([runs], tmp_path / "no", 1.5)
    assert not (tmp_path / "no").exists()


def test_an_earlier_larger_export_does_not_vote(runs, tmp_path):
    export([runs], tmp_path / "out")
    assert find_models([tmp_path / "out"]) == [tmp_path / f"out/model-{k}.safetensors" for k in (0, 1)]
    export([runs / "seed1"], tmp_path / "out")
    assert find_models([tmp_path / "out"]) == [tmp_path / "out/model-0.safetensors"]


def test_models_of_different_tissue_do_not_vote_together(runs, tmp_path, capsys):
    save_model(tmp_path / "other.safetensors", build_unet(CONFIG), CONFIG, threshold_hu=-500.0)
    with pytest.raises(ValueError, match=r"runs must have one threshold_hu, .* got -500.0, -650.0"):
        export([runs, tmp_path / "other.safetensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_model(
        tmp_path / "flat.safetensors", build_unet(CONFIG), CONFIG, threshold_hu=-650.0, inflation_hu=-860.0
    )
    with pytest.raises(ValueError, match=r"runs must have one inflation_hu, .* got -860.0, None"):
        export([runs, tmp_path / "flat.safetensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    assert main([str(runs), "--output", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err
