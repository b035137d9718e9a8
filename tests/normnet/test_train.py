"""Training: resumed equals uninterrupted, bad settings are refused."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("monai")

import torch

from normnet import data, device, train
from normnet.config import (
    PRESETS,
    ModelConfig,
    PostprocessConfig,
    PredictConfig,
    TrainConfig,
    from_json,
    to_json,
)
from normnet.model import Model, build_unet, find_models, read_tensors, write_tensors
from tests.normnet.test_data import segments, stream

TINY = TrainConfig(
    model=ModelConfig(channels=(4, 8), strides=(2,), residual_units=1),
    iterations=6,
    batch_size=2,
    slab=8,
    crop=32,
    mirror=True,
    average=0.9,
    precision="fp32",
    device="cpu",
    threads=1,
    held_out=1,
    validate_every=2,
    validation_pairs=2,
    checkpoint_every=3,
    phantoms=1,
    phantom_shape=(16, 64, 80),
    phantom_spacing=(4.0, 5.0, 5.0),
)


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def losses(folder) -> list[tuple[str, str]]:
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [(r["iteration"], r["loss"]) for r in rows if r["loss"]]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    train.train(replace(TINY, output=tmp_path / "whole"))
    train.train(replace(TINY, output=tmp_path / "parts", iterations=3))
    assert weights(tmp_path / "parts") != weights(tmp_path / "whole")
    train.train(replace(TINY, output=tmp_path / "parts", resume=True))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert [i for i, _ in losses(tmp_path / "whole")] == ["1", "2", "3", "4", "5", "6"]


def test_a_finished_run_resumed_stays_as_it_is(tmp_path):
    first = train.train(replace(TINY, output=tmp_path / "run"))
    files = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir() if "events" not in f.name}
    again = train.train(replace(TINY, output=tmp_path / "run", resume=True))
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir() if "events" not in f.name} == files
    assert repr(again) == repr(first)  # an undefined AUC is NaN, which equals nothing


def test_cosine_falls_from_the_learning_rate_to_nothing(tmp_path, monkeypatch):
    config = replace(TINY, output=tmp_path / "whole", schedule="cosine")
    trainer = train.Trainer(config, torch.device("cpu"))
    rates = [trainer.schedule.lr_lambdas[0](k) for k in (0, 3, 6, 9)]
    assert rates == pytest.approx([1, 0.5, 0, 0], abs=1e-15)
    train.train(config)
    step = train.Trainer.step

    def stopped(self, batch):
        if self.progress.iteration == 4:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train.train(replace(config, output=tmp_path / "parts"))
    train.train(replace(config, output=tmp_path / "parts", resume=True))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    train.train(replace(TINY, output=tmp_path / "constant"))
    assert weights(tmp_path / "constant") != weights(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"minutes must be None with a schedule, .* got 3"):
        replace(config, minutes=3.0)
    with pytest.raises(ValueError, match="the settings differ"):  # another end, another rate of every step
        train.train(replace(config, output=tmp_path / "parts", resume=True, iterations=9))


def test_training_lowers_the_loss_and_reports_its_shares(tmp_path):
    result = train.train(
        replace(TINY, output=tmp_path / "run", iterations=30, learning_rate=1e-2, validate_every=0)
    )
    values = [float(loss) for _, loss in losses(tmp_path / "run")]
    assert np.mean(values[-5:]) < np.mean(values[:5]) - 0.05
    assert result.iterations == 30
    assert 0 <= result.waiting_share <= 1
    assert result.synthesis_share > 0
    assert {"val_loss", "val_dice", "val_auc", "calibrated"} == result.validation.keys()
    assert any(f.name.startswith("events.") for f in (tmp_path / "run").iterdir())


@pytest.mark.parametrize("average", [0.0, 0.2])
def test_the_average_follows_closely_at_first(average):
    """Its decay is (1 + n) / (20 + n) until that is `average`; 0 keeps the last weights."""
    trainer = train.Trainer(replace(TINY, average=average, learning_rate=1e-2), torch.device("cpu"))
    wanted = [w.detach().clone() for w in trainer.model.parameters()]
    for n in range(6):
        trainer.step(stream().batch(n))
        decay = min(average, (1 + n) / (20 + n))
        wanted = [
            decay * a + (1 - decay) * b.detach()
            for a, b in zip(wanted, trainer.model.parameters(), strict=True)
        ]
    for a, b in zip(wanted, trainer.average.module.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)  # float32
    counted = [b for name, b in trainer.average.module.named_buffers() if name.endswith("batches_tracked")]
    assert {int(b) for b in counted} == {6}


def test_parts_of_a_batch_add_up(tmp_path):
    """With instance norm and one crop a part, gradients of parts are those of the parts' mean loss."""
    model = replace(TINY.model, norm="instance")
    whole, parts = (
        train.Trainer(replace(TINY, model=model, accumulate=n), torch.device("cpu")) for n in (1, 2)
    )
    batch = stream().batch(0)
    total = parts.step(batch)
    losses = [whole._backward(batch, batch.part(k, 2), last=True) for k in (0, 1)]
    assert total == pytest.approx(np.mean(losses), rel=1e-6)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(one.grad / 2, other.grad, rtol=1e-4, atol=1e-7)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys, monkeypatch):
    broken = stream().batch(0)
    broken.image[0] = float("nan")
    monkeypatch.setattr(data.PairStream, "batch", lambda self, step: broken)
    config = replace(TINY, output=tmp_path / "run", held_out=0)
    with pytest.raises(FloatingPointError, match="the loss became nan at iteration 1: lower learning_rate"):
        train.train(config)
    assert not (tmp_path / "run/model.safetensors").exists()
    file = tmp_path / "config.json"
    file.write_text(to_json(replace(config, output=tmp_path / "other")))
    assert train.main(["--config", str(file)]) == 1
    assert "the loss became nan" in capsys.readouterr().err


def test_the_threshold_that_pairs_calibrate(tmp_path):
    rng = np.random.default_rng(0)
    well, ill = rng.beta(5, 2, 4000).astype(np.float32), rng.beta(2, 5, 1000).astype(np.float32)
    found = train.calibrate(well, ill)
    dice = []
    for k in range(1, 100):
        called_well, called_ill = (p <= np.float32(k / 100) for p in (well, ill))
        both = called_ill.sum()
        dice.append(2 * both / (called_well.sum() + both + len(ill)))
    assert found == {
        "probability": pytest.approx((np.argmax(dice) + 1) / 100),
        "dice": pytest.approx(max(dice)),
    }
    assert train.calibrate(well, ill[:0]) is None
    train.train(replace(TINY, output=tmp_path / "run"))
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").read_text().splitlines()))
    calibrated = Model.load(tmp_path / "run").calibration["probability"]
    assert float(rows[-1]["calibrated"]) == calibrated
    assert Model.load(tmp_path / "run/best.safetensors").calibration is not None


def test_average_zero_saves_the_last_weights(tmp_path):
    train.train(replace(TINY, output=tmp_path / "run", iterations=2, average=0.0))
    tensors, _ = read_tensors(tmp_path / "run/state.safetensors")
    model = Model.load(tmp_path / "run").network.state_dict()
    assert all(torch.equal(model[name], tensors[f"model.{name}"]) for name in model)


def test_minutes_end_a_run(tmp_path):
    result = train.train(replace(TINY, output=tmp_path / "run", iterations=10**6, minutes=0.02))
    assert 0 < result.iterations < 10**6
    assert result.seconds >= 1.2


def test_trains_on_a_store(tmp_path):
    store = pytest.importorskip("normnet.prepare.store")
    made = store.Store.create(tmp_path / "store", {"spacing": [1.0, 0.8, 0.8], "size": 48})
    volume = segments()
    for name in ("a", "b"):
        meta = {"spacing": [1.0, 0.8, 0.8], "segments": volume.segments}
        made.add(name, *volume.read(0, 24), meta)
    result = train.train(replace(TINY, data=tmp_path / "store", output=tmp_path / "run", iterations=2))
    assert result.iterations == 2
    assert from_json(TrainConfig, (tmp_path / "run/config.json").read_text()).data == tmp_path / "store"


def test_a_wrong_call_leaves_the_folder_free(tmp_path):
    """The right call after it must not hear that there is a run."""
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        train.train(replace(TINY, output=tmp_path / "run", data=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="usable slices in a row"):
        train.train(replace(TINY, output=tmp_path / "run", slab=64))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"iterations": "100"}', r"iterations must be an integer, got '100'"),
        ('{"iterations": true}', r"iterations must be an integer, got True"),
        ('{"thick_mm": 3}', "thick_mm must be a list, got 3"),
        ('{"thick_mm": [3]}', r"thick_mm\[1\] must be given, got \(3,\)"),
        ('{"thick_mm": [3, "8"]}', r"thick_mm\[1\] must be a number, got '8'"),
        ('{"minutes": "none"}', "minutes must be a number, got 'none'"),
        ('{"model": 3}', "model must be a JSON object, got int"),
        ('{"model": {"norm": "layer"}}', r"model\.norm must be 'batch' or 'instance', got 'layer'"),
        ('{"model": {"channels": [8, 0]}}', r"model\.channels\[1\] must be >= 1, got 0"),
        ('{"model": {"strides": [2]}}', r"model\.strides must be 4, one less than channels, got \(2,\)"),
        ('{"model": {"width": 8}}', "ModelConfig has no field 'width'; it has channels, strides, "),
        ('{"augment": {"zoom": null}}', r"augment\.zoom must be a number, got None"),
        ('{"data": 3}', "data must be a path, got 3"),
    ],
)
def test_json_of_the_wrong_type(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(TrainConfig, text)


def test_json_numbers_are_read_as_their_fields_are():
    config = from_json(TrainConfig, '{"minutes": 3, "thick_mm": [3, 8], "data": "a/b", "lesions": "faint"}')
    assert config == replace(TrainConfig(), minutes=3.0, data=Path("a/b"), lesions="faint")
    assert isinstance(config.minutes, float)
    assert from_json(PredictConfig, '{"probability": "calibrated"}').probability == "calibrated"
    assert from_json(PredictConfig, '{"probability": 0.5, "tile": null}').tile is None
    with pytest.raises(ValueError, match="overlap must be a number, got None"):
        from_json(PredictConfig, '{"overlap": null}')


def test_a_run_is_not_overwritten(tmp_path):
    train.train(replace(TINY, output=tmp_path / "run", iterations=1))
    with pytest.raises(ValueError, match="already holds a run"):
        train.train(replace(TINY, output=tmp_path / "run"))
    with pytest.raises(ValueError, match="the settings differ"):
        train.train(replace(TINY, output=tmp_path / "run", resume=True, learning_rate=1.0))
    with pytest.raises(ValueError, match="holds no state to continue from"):
        train.train(replace(TINY, output=tmp_path / "empty", resume=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none():
    with pytest.raises(ValueError, match="device must be available, got 'cuda'"):
        device.choose_device("cuda")


class Reached(Exception):
    """Training went as far as the test wants."""


@pytest.fixture
def two_gpus(monkeypatch):
    """A torch that sees two CUDA devices, the second of them current, and minds a missing number."""

    def set_device(chosen) -> None:
        raise Reached(torch.cuda._utils._get_device_index(chosen))

    for name, answer in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)


def test_a_cuda_device_has_a_number(two_gpus):
    assert device.choose_device("auto") == device.choose_device("cuda") == torch.device("cuda", 1)
    assert device.choose_device("cuda:0") == torch.device("cuda", 0)
    assert device.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be available, got 'cuda:2', and torch sees 2 of CUDA"):
        device.choose_device("cuda:2")


@pytest.mark.parametrize(("name", "number"), [("auto", 1), ("cuda", 1), ("cuda:0", 0)])
def test_training_on_cuda_begins(two_gpus, tmp_path, name, number):
    """`torch.cuda.set_device` refuses a device without a number: every training exited with 2."""
    with pytest.raises(Reached) as reached:
        train.train(replace(TINY, output=tmp_path / "run", device=name))
    assert reached.value.args == (number,)


def test_a_process_of_several_trains_on_its_own_gpu(two_gpus, tmp_path, monkeypatch):
    config = replace(TINY, output=tmp_path / "run", device="cuda")
    for rank in (0, 1, 2):
        world = train.World(rank=rank, size=2, local_rank=rank, local_size=2)
        monkeypatch.setattr(train, "join", lambda name, world=world: contextlib.nullcontext(world))
        with pytest.raises((Reached, ValueError)) as reached:
            train.train(config)
        assert rank == 2 or reached.value.args == (rank,)
    assert "got 'cuda:2', and torch sees 2 of CUDA" in str(reached.value)


def test_torch_s_settings_come_back(tmp_path):
    threads = torch.get_num_threads()
    train.train(replace(TINY, output=tmp_path / "run", iterations=1, threads=threads + 1))
    assert torch.get_num_threads() == threads
    assert np.float32(1e-40) * np.float32(1.0) > 0  # denormals are not flushed


def test_device_must_be_one():
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'gpu9'"):
        device.choose_device("gpu9")
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'meta'"):
        device.choose_device("meta")
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"), device.cpu_settings(0):
        pass


def test_the_paper_s_values_are_the_defaults():
    config, predict, post = TrainConfig(), PredictConfig(), PostprocessConfig()
    assert (config.iterations, config.batch_size, config.learning_rate, config.slab) == (3500, 8, 3e-4, 32)
    assert (config.probability, config.threshold_hu, config.inflation_hu) == (0.95, -500.0, None)
    # what models are trained with; tests/test_postprocess.py has the 0.15 of the full threshold
    assert (predict.probability, post.threshold_hu, post.full_threshold) == (None, None, None)
    assert (post.bright_size, post.full_size, post.bright_threshold) == (9, 7, 0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations must be >= 1, got 0"),
        ({"minutes": 0.0}, "minutes must be > 0, got 0.0"),
        ({"average": 1.0}, r"average must be < 1, got 1.0"),
        ({"slab": 31}, r"slab must be a multiple of 16"),
        ({"crop": 100}, r"crop must be a multiple of 16"),
        ({"lesions": "none"}, "lesions must be one of .*covid_lung.*, got 'none'"),
        ({"accumulate": 3}, "batch_size must be a multiple of accumulate=3, got 8"),
        ({"thick_slices": 1.5}, r"thick_slices must be <= 1, got 1.5"),
        ({"thick_mm": (8.0, 3.0)}, r"thick_mm must be the smaller length first, got \(8.0, 3.0\)"),
        ({"cache": "tape"}, "cache must be 'auto', 'device', 'memory' or 'disk', got 'tape'"),
        ({"threshold_hu": 200.0}, "threshold_hu must be < 100, got 200.0"),
        ({"inflation_hu": -600.0}, r"inflation_hu must be <= -700, got -600.0"),
        ({"probability": 1.0}, r"probability must be < 1 or 'calibrated', got 1.0"),
        ({"probability": "calibrated", "held_out": 0}, "held_out must be >= 1 to calibrate .* got 0"),
        ({"seed": -1}, r"seed must be >= 0, got -1"),
        (
            {"folds": Path("f.csv"), "task": "lungs", "crop": 32, "model": ModelConfig(outputs=2)},
            "folds must be None for the task lungs, got .*f.csv",
        ),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_bad_json():
    with pytest.raises(ValueError, match="TrainConfig has no field 'learning'"):
        from_json(TrainConfig, '{"learning": 1}')
    with pytest.raises(ValueError, match="not JSON: Expecting"):
        from_json(TrainConfig, "{")
    with pytest.raises(ValueError, match="model must be a JSON object, got int"):
        from_json(TrainConfig, '{"model": 1}')


def test_command_line(tmp_path, capsys):
    command = train.parse(
        ["--preset", "paper", "--seed", "3", "--model.channels", "8", "16", "--model.strides", "2"]
    )
    assert command.ensemble == 1
    assert command.config == replace(TrainConfig(), seed=3, model=ModelConfig(channels=(8, 16), strides=(2,)))
    assert train.parse([]).config == PRESETS["phantom"]()
    assert train.parse(["--data", "x"]).config.crop == PRESETS["laptop"]().crop
    assert train.main(["--preset=nothing"]) == 2
    said = "preset must be one of paper, laptop, few, many, lungs, phantom, got 'nothing'"
    assert said in capsys.readouterr().err
    assert train.main(["--data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "o")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_model_round_trip_and_errors(tmp_path):
    config = ModelConfig(channels=(4, 8), strides=(2,))
    network = build_unet(config).eval()
    Model(network, config).save(tmp_path / "run/model.safetensors")
    loaded = Model.load(tmp_path / "run")
    x = torch.rand(1, 1, 4, 8, 8)
    assert torch.equal(network(x), loaded.network(x))
    assert loaded.config == config
    assert find_models([tmp_path]) == find_models([tmp_path / "run"]) == [tmp_path / "run/model.safetensors"]
    with pytest.raises(ValueError, match="models must be weights files or run folders"):
        find_models([tmp_path / "nothing"])
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Model.load(tmp_path / "bad.safetensors")
    write_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="another kind of file: its header lacks the key 'normnet'"):
        Model.load(tmp_path / "other.safetensors")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    write_tensors(file, {"x": torch.zeros(3)}, {})

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_tensors(file, {"x": torch.ones(3)}, {})
    assert torch.equal(read_tensors(file)[0]["x"], torch.zeros(3))
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train.train(replace(TINY, output=run, iterations=3))
    before = {name: (run / name).read_bytes() for name in ("model.safetensors", "state.safetensors")}
    file = tmp_path / "settings.json"
    file.write_text(to_json(replace(TINY, output=run)))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert train.main(["--config", str(file), "--resume"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not list(run.glob(".*"))
    train.train(replace(TINY, output=run, resume=True))
    train.train(replace(TINY, output=tmp_path / "whole"))
    assert weights(run) == weights(tmp_path / "whole")


def test_settings_of_a_run_are_taken_back(tmp_path, capsys):
    train.train(replace(TINY, output=tmp_path / "run", iterations=1))
    file = tmp_path / "run/config.json"
    command = train.parse(["--config", str(file), "--output", str(tmp_path / "next"), "--seed", "7"])
    assert command.config == replace(TINY, output=tmp_path / "next", iterations=1, seed=7)
    for bad, message in (
        (["--config", str(tmp_path / "none.json")], "none.json"),
        (["--config", str(file), "--preset", "paper"], "preset and config exclude each other"),
    ):
        assert train.main(bad) == 2
        assert message in capsys.readouterr().err
    file.write_text("[1]")
    assert train.main(["--config", str(file)]) == 2
    assert "TrainConfig must be a JSON object, got list" in capsys.readouterr().err
