"""A model and its file: saved and read back as it was; exported at half the size, with the same answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("monai")

from safetensors.torch import load  # noqa: E402

from normnet.config import BUNDLED_LUNGS, ModelConfig  # noqa: E402
from normnet.model import (  # noqa: E402
    HEADER,
    Model,
    build_unet,
    bundled_models,
    export_models,
    find_models,
    main,
    read_tensors,
    write_tensors,
)

CONFIG = ModelConfig(channels=(8, 16), strides=(2,))


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        calibration = {"probability": 0.25, "dice": 0.9} if seed else None
        model = Model(
            build_unet(CONFIG), CONFIG, threshold_hu=-650.0, calibration=calibration, probability=0.6
        )
        model.save(tmp_path / f"runs/seed{seed}/model.safetensors")
    return tmp_path / "runs"


# ---- the network


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_head_makes_the_logits_of_features(outputs):
    config = ModelConfig(channels=(2, 3), strides=(2,), outputs=outputs, head=5, activation="leakyrelu")
    network = build_unet(config).eval()
    features, last = network
    assert not any(isinstance(m, torch.nn.PReLU) for m in network.modules())
    image = torch.rand(2, 1, 4, 6, 8)
    seen = features(image)
    assert seen.shape == (2, 5, 4, 6, 8)
    expected = torch.einsum("bczyx,oc->bozyx", seen, last.weight[:, :, 0, 0, 0]) + last.bias.view(
        1, -1, 1, 1, 1
    )
    torch.testing.assert_close(network(image), expected)
    plain = build_unet(ModelConfig(channels=(2, 3), strides=(2,), outputs=outputs))
    assert plain(image).shape == (2, outputs, 4, 6, 8)
    assert any(isinstance(m, torch.nn.PReLU) for m in plain.modules())


def test_weights_of_before_there_were_heads(tmp_path):
    """Their header says nothing of head and activation."""
    model = Model(build_unet(CONFIG), CONFIG)
    model.save(tmp_path / "m.safetensors")
    tensors, metadata = read_tensors(tmp_path / "m.safetensors")
    header = json.loads(metadata[HEADER])
    del header["model"]["head"], header["model"]["activation"]
    write_tensors(tmp_path / "old.safetensors", tensors, {HEADER: json.dumps(header)})
    found = Model.load(tmp_path / "old.safetensors")
    assert found.config == CONFIG
    torch.testing.assert_close(found.network.state_dict(), model.network.state_dict())


# ---- a model and its file


@st.composite
def models(draw):
    task = draw(st.sampled_from(["lesions", "lungs"]))
    levels = draw(st.integers(2, 3))
    config = ModelConfig(
        channels=draw(st.lists(st.integers(1, 4), min_size=levels, max_size=levels).map(tuple)),
        strides=draw(st.lists(st.integers(1, 2), min_size=levels - 1, max_size=levels - 1).map(tuple)),
        residual_units=draw(st.integers(0, 2)),
        norm=draw(st.sampled_from(["batch", "instance"])),
        activation=draw(st.sampled_from(["prelu", "leakyrelu"])),
        head=draw(st.integers(0, 3)),
        outputs={"lesions": 1, "lungs": 2}[task],
    )
    share = st.floats(0, 1, exclude_min=True, exclude_max=True)
    torch.manual_seed(draw(st.integers(0, 9)))
    return Model(
        build_unet(config),
        config,
        task,
        draw(st.floats(-800, 100, exclude_min=True, exclude_max=True)),
        draw(st.none() | st.floats(-950, -700)),
        draw(st.none() | st.fixed_dictionaries({"probability": share, "dice": st.floats(0, 1)})),
        draw(share | st.just("calibrated")),
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=models())
def test_whatever_is_saved_is_read_as_it_was(tmp_path, model):
    model.save(tmp_path / "run/model.safetensors")
    found = Model.load(tmp_path / "run", model.task)
    for name in ("config", "task", "threshold_hu", "inflation_hu", "calibration", "probability"):
        assert getattr(found, name) == getattr(model, name)
    assert (found.name, len(found.sha256), found.network.training) == ("run", 64, False)
    before, after = model.network.state_dict(), found.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(weight.requires_grad for weight in found.network.parameters())
    found.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "run/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold_hu": 100.0}, r"threshold_hu must be < 100, got 100\.0"),
        ({"threshold_hu": float("nan")}, "threshold_hu must be finite, got nan"),
        ({"inflation_hu": -600.0}, r"inflation_hu must be <= -700, got -600\.0"),
        ({"probability": 1.0}, r"probability must be < 1 or 'calibrated', got 1\.0"),
        ({"probability": "paper"}, "probability must be a number or 'calibrated', got 'paper'"),
        (
            {"calibration": {"probability": 0.5}},
            r"calibration must have a probability in \(0, 1\) and a dice",
        ),
        ({"calibration": {"probability": 0.5, "dice": 1.5}}, "calibration must have a probability"),
        ({"task": "lungs"}, "model.outputs must fit the task lungs, got 1"),
        ({"task": "livers"}, "model.outputs must fit the task livers, got 1"),
    ],
)
def test_a_model_that_could_not_be_read_again_is_none(change, message):
    with pytest.raises(ValueError, match=message):
        Model(torch.nn.Identity(), CONFIG, **change)


def test_numbers_of_numpy_are_taken(tmp_path):
    model = Model(build_unet(CONFIG), CONFIG, threshold_hu=np.float32(-700), probability=np.float64(0.5))
    model.save(tmp_path / "w.safetensors")
    found = Model.load(tmp_path / "w.safetensors")
    assert (found.threshold_hu, found.probability, found.name) == (-700.0, 0.5, "w")


def test_shipped_weights_saved_again_are_the_same_files(tmp_path):
    """In half precision, as they are."""
    Model.load(BUNDLED_LUNGS, "lungs").export(tmp_path / "lungs.safetensors")
    assert (tmp_path / "lungs.safetensors").read_bytes() == BUNDLED_LUNGS.read_bytes()
    for file in bundled_models():
        model = Model.load(file)
        model.export(tmp_path / file.name)
        content = file.read_bytes()
        assert (tmp_path / file.name).read_bytes() == content
        model.save(tmp_path / "wide.safetensors")
        single = {name: t.float() if t.is_floating_point() else t for name, t in load(content).items()}
        assert all(
            torch.equal(t, single[k]) for k, t in load((tmp_path / "wide.safetensors").read_bytes()).items()
        )


# ---- what it says


def test_thresholds(tmp_path):
    calibration = {"probability": 0.3, "dice": 0.5}
    network = torch.nn.Identity()
    assert Model(network, CONFIG).threshold() == 0.95
    assert Model(network, CONFIG).threshold(0.5) == 0.5
    own = Model(network, CONFIG, calibration=calibration, probability="calibrated")
    assert (own.threshold(), own.threshold(0.5), own.threshold("calibrated")) == (0.3, 0.5, 0.3)
    for asked, settled in (("calibrated", 0.95), (None, "calibrated")):
        with pytest.raises(ValueError, match="probability: this model carries no calibration"):
            Model(network, CONFIG, probability=settled).threshold(asked)


@pytest.mark.parametrize("task", ["lesions", "lungs"])
def test_probabilities_are_those_of_the_logits(task):
    config = ModelConfig(channels=(4, 8), strides=(2,), outputs=1 if task == "lesions" else 2)
    torch.manual_seed(0)
    network = build_unet(config)
    network(torch.rand(4, 1, 8, 8, 8))  # in training: statistics of its own
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model = Model(network, config, task)
    slab = torch.rand(3, 1, 6, 8, 10)
    found = model.to("cpu", "fp32").healthy_probability(slab)
    assert (found.shape, found.dtype, found.requires_grad) == (
        (3, config.outputs, 6, 8, 10),
        torch.float32,
        False,
    )
    with torch.no_grad():
        expected = 1 / (1 + np.exp(-network.eval()(slab).double().numpy()))
    # float32 sigmoids
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    half = model.to("cpu", "bf16").healthy_probability(slab)
    assert (model.bf16, half.dtype) == (True, torch.float32)
    # 8 bits a product, in a few layers
    np.testing.assert_allclose(half.numpy(), found.numpy(), atol=0.05)
    assert not np.array_equal(half.numpy(), found.numpy())


# ---- weights to ship


def test_exported_answers_and_headers_stay(runs, tmp_path):
    files = export_models([runs], tmp_path / "out")
    assert [f.name for f in files] == ["model-0.safetensors", "model-1.safetensors"]
    x = torch.rand(1, 1, 8, 16, 16)
    for seed, file in enumerate(files):
        before, after = Model.load(runs / f"seed{seed}"), Model.load(file)
        assert next(after.network.parameters()).dtype == torch.float32
        # 11 bits of each weight
        assert torch.allclose(before.healthy_probability(x), after.healthy_probability(x), rtol=0, atol=1e-3)
        assert (after.config, after.calibration) == (before.config, before.calibration)
        assert after.threshold_hu == before.threshold_hu == -650.0
        assert (after.inflation_hu, after.probability) == (None, 0.6)
        assert file.stat().st_size < 0.6 * (runs / f"seed{seed}/model.safetensors").stat().st_size


def test_an_export_of_an_export_is_the_same(runs, tmp_path):
    files = [path for folder in ("one", "two") for path in export_models([runs], tmp_path / folder)]
    files += export_models([tmp_path / "one"], tmp_path / "three")
    export_models([runs], tmp_path / "one")  # in the place of the first
    contents = [[path.read_bytes() for path in files[at : at + 2]] for at in (0, 2, 4)]
    assert contents[0] == contents[1] == contents[2]
    records = [(tmp_path / folder / "export.json").read_text() for folder in ("one", "two", "three")]
    assert records[0] == records[1] == records[2]


def test_an_export_changes_no_model(tmp_path):
    model = Model(build_unet(CONFIG), CONFIG)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    model.export(tmp_path / "half.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    assert {value.dtype for value in model.network.parameters()} == {torch.float32}


def test_statistics_beyond_half_precision_are_kept(tmp_path):
    network = build_unet(CONFIG)
    name = next(name for name in network.state_dict() if name.endswith("running_var"))
    network.state_dict()[name].fill_(1e6)
    Model(network, CONFIG).export(tmp_path / "w.safetensors")
    stored = load((tmp_path / "w.safetensors").read_bytes())
    assert stored[name].dtype == torch.float32
    assert (stored[name] == 1e6).all()
    assert {v.dtype for k, v in stored.items() if k != name} == {torch.float16, torch.int64}
    assert (Model.load(tmp_path / "w.safetensors").network.state_dict()[name] == 1e6).all()


def test_what_does_not_fit(tmp_path, capsys):
    network = build_unet(CONFIG)
    with torch.no_grad():
        next(network.parameters())[0] = 1e6
    Model(network, CONFIG).save(tmp_path / "large.safetensors")
    with pytest.raises(
        ValueError, match=r"large\.safetensors: weights must be within half precision, got 1e"
    ):
        export_models([tmp_path / "large.safetensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main([str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]) == 2
    assert "models must be weights files or run folders" in capsys.readouterr().err


def test_weights_are_told_how_to_vote(runs, tmp_path, capsys):
    assert main([str(runs), "--output", str(tmp_path / "out"), "--probability", "0.35"]) == 0
    assert "model-1.safetensors: 0.0 MB\n" in capsys.readouterr().out
    found = [Model.load(file) for file in find_models([tmp_path / "out"])]
    assert [model.probability for model in found] == [0.35, 0.35]
    assert [model.threshold() for model in found] == [0.35, 0.35]
    export_models([runs / "seed1"], tmp_path / "own", "calibrated")
    assert Model.load(tmp_path / "own/model-0.safetensors").threshold() == 0.25
    # the first run has no calibration
    assert main([str(runs), "--output", str(tmp_path / "no"), "--probability", "calibrated"]) == 2
    assert (
        "seed0/model.safetensors: probability: this model carries no calibration" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match=r"probability must be < 1 or 'calibrated', got 1.5"):
        export_models([runs], tmp_path / "no", 1.5)
    assert not (tmp_path / "no").exists()


def test_an_earlier_larger_export_does_not_vote(runs, tmp_path):
    export_models([runs], tmp_path / "out")
    assert find_models([tmp_path / "out"]) == [tmp_path / f"out/model-{k}.safetensors" for k in (0, 1)]
    export_models([runs / "seed1"], tmp_path / "out")
    assert find_models([tmp_path / "out"]) == [tmp_path / "out/model-0.safetensors"]


def test_models_of_different_tissue_do_not_vote_together(runs, tmp_path, capsys):
    Model(build_unet(CONFIG), CONFIG, threshold_hu=-500.0).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"runs must have one threshold_hu, .* got -500.0, -650.0"):
        export_models([runs, tmp_path / "other.safetensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    flat = Model(build_unet(CONFIG), CONFIG, threshold_hu=-650.0, inflation_hu=-860.0)
    flat.save(tmp_path / "flat.safetensors")
    with pytest.raises(ValueError, match=r"runs must have one inflation_hu, .* got -860.0, None"):
        export_models([runs, tmp_path / "flat.safetensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    assert main([str(runs), "--output", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def test_one_lung_network_is_exported(tmp_path, capsys):
    config = ModelConfig(channels=(2, 4), strides=(2,), outputs=2)
    for seed in (0, 1):
        Model(build_unet(config), config, "lungs").save(tmp_path / f"runs/seed{seed}/model.safetensors")
    call = ["--task", "lungs", "--output", str(tmp_path / "out")]
    assert main([str(tmp_path / "runs"), *call]) == 2
    assert "runs must be one for the task lungs, which nothing votes on, got 2" in capsys.readouterr().err
    assert main([str(tmp_path / "runs/seed0"), "--output", str(tmp_path / "out")]) == 2
    assert "the model's task must be lesions, got lungs" in capsys.readouterr().err
    assert main([str(tmp_path / "runs/seed0"), *call]) == 0
    assert Model.load(tmp_path / "out/model-0.safetensors", "lungs").config == config
