"""Files of weights that were damaged, or made to hurt: refused with file and field before they are used."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from normnet.baselines.__main__ import main as baselines
from normnet.baselines.methods import build_baseline, small
from normnet.baselines.train import HEADER as BASELINE
from normnet.baselines.train import load_baseline, save_baseline
from normnet.config import ModelConfig, PredictConfig, TrainConfig
from normnet.device import choose_device
from normnet.model import HEADER, Model, build_unet, bundled_models
from normnet.model import main as export
from normnet.predict import main as predict
from normnet.predict import predict_volume
from normnet.prepare.__main__ import main as prepare
from normnet.prepare.network import split_by_network
from normnet.train import Trainer
from tests.hostile.bounds import at_once
from tests.hostile.tally import trial

KIND = "weights"
MEBIBYTES = 80
"""Of a file of 64 at most, which is read once."""
CONFIG = ModelConfig(channels=(4, 8), strides=(2,), residual_units=1)


def content(**header: Any) -> bytes:
    """Return a file of weights, its header changed."""
    torch.manual_seed(0)
    model = build_unet(CONFIG)
    whole = {
        "model": {"channels": [4, 8], "strides": [2], "residual_units": 1, "norm": "batch"},
        "calibration": {"probability": 0.25, "dice": 0.5},
        "threshold_hu": -700.0, "inflation_hu": -870.0, "probability": "calibrated",
    }  # fmt: skip
    return save(model.state_dict(), {HEADER: json.dumps(whole | header)})


GOOD = content()


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: Any, tensors: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def refused(folder: Path, data: bytes, *words: str, load: Callable[[Path], Any] = Model.load) -> None:
    """Fail unless a file is refused at once, in one line that names it and has some words."""
    path = folder / "w.safetensors"
    path.write_bytes(data)
    with at_once(MEBIBYTES), pytest.raises(ValueError, match=r"w\.safetensors") as caught:
        load(path)
    said = str(caught.value)
    assert len(said) < 700
    assert said.isprintable()
    for word in words:
        assert word in said, said


def test_good_weights_are_read(tmp_path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(GOOD)
    model = Model.load(path)
    expected = load(GOOD)
    assert all(torch.equal(value, expected[name]) for name, value in model.network.state_dict().items())
    assert (model.config, model.threshold_hu, model.inflation_hu) == (CONFIG, -700.0, -870.0)
    assert (model.calibration, model.probability) == ({"probability": 0.25, "dice": 0.5}, "calibrated")
    old = json.dumps(
        {"model": json.loads(parts(GOOD)[0]["__metadata__"][HEADER])["model"], "calibration": None}
    )
    path.write_bytes(save(expected, {HEADER: old}))
    assert (Model.load(path).threshold_hu, Model.load(path).probability) == (-500.0, 0.95)


def test_shipped_weights_are_read_as_they_are() -> None:
    for file in bundled_models():
        stored, model = load(file.read_bytes()), Model.load(file)
        assert all(torch.equal(v, stored[k].to(v.dtype)) for k, v in model.network.state_dict().items())
        assert next(model.network.parameters()).dtype == torch.float32


NAN, INF = math.nan, math.inf
HEADERS: list[tuple[str, Any]] = [
    *(("threshold_hu", v) for v in ("evil", 5000, -800, 100, NAN, INF, None, True, [], {}, 10**400, 1e300)),
    *(("inflation_hu", v) for v in ("evil", 1e9, -951, -699, 0, NAN, -INF, True, [], 10**400)),
    *(("probability", v) for v in ("evil", 5, 0, 1, -0.1, NAN, None, True, [], {}, 10**400, "x" * 10**6)),
    *(("calibration", v) for v in (5, "x", [], {}, {"probability": 0.5}, {"probability": 5, "dice": 0.5})),
    *(("calibration", {"probability": v, "dice": 0.5}) for v in (NAN, "0.5", None, True, 0, 1, 10**400)),
    *(("calibration", {"probability": 0.5, "dice": v}) for v in (NAN, 2, -1, "x")),
    ("calibration", {"probability": 0.5, "dice": 0.5, "more": 1}),
    *(("task", v) for v in ("lungs", "evil", "", 5, None, True, [], ["lungs"], {}, NAN, "x" * 10**6)),
    *(("model", v) for v in (5, None, [], "x", {"colour": 1})),
    *(("colour", v) for v in (1, None)),
]  # fmt: skip
MODELS: list[tuple[str, Any]] = [
    *(
        ("channels", v)
        for v in ([10**9, 10**9], [4], [], [0, 8], [-4, 8], [4.5, 8], ["4", "8"], 5, None, [True, 8])
    ),
    *(("channels", v) for v in ([4] * 10**4, [4096, 4096], [10**400, 4], [4, 10**9])),
    *(("strides", v) for v in ([], [0], [2, 2], [10**9], [9], ["2"], 2, None, [NAN])),
    *(("residual_units", v) for v in (-1, 10**6, 10**9, 1.5, "1", None, True)),
    *(("norm", v) for v in ("layer", "", 5, None, "instance")),
    *(("outputs", v) for v in (2, 0, -1, 3, 10**9, 10**400, 1.5, "1", None, True, [], [1], NAN)),
]


def test_headers_out_of_their_domain(tmp_path) -> None:
    for field, value in HEADERS:
        with trial(KIND):
            refused(tmp_path, content(**{field: value}), "" if value == 10**400 else field)
    model = {"channels": [4, 8], "strides": [2], "residual_units": 1, "norm": "batch"}
    for field, value in MODELS:
        with trial(KIND):
            refused(tmp_path, content(model=model | {field: value}), "tensor" if value == "instance" else "")
    for field in ("model", "calibration"):
        header, tensors = parts(GOOD)
        whole = json.loads(header["__metadata__"][HEADER])
        del whole[field]
        header["__metadata__"][HEADER] = json.dumps(whole)
        with trial(KIND):
            refused(tmp_path, joined(header, tensors), field)
    for text in ("", "[", "[" * 10**5, "5", "null", '{"model": 1, "model": 2}', "x" * 10**6):
        header, tensors = parts(GOOD)
        header["__metadata__"][HEADER] = text
        with trial(KIND):
            refused(tmp_path, joined(header, tensors))
    for metadata in ({}, {"other": "1"}, 5, [], {HEADER: 5}, {HEADER: json.dumps({}), "more": ""}):
        header, tensors = parts(GOOD)
        header["__metadata__"] = metadata
        with trial(KIND):
            refused(tmp_path, joined(header, tensors))


def test_a_giant_is_refused_at_once(tmp_path) -> None:
    """An architecture that its own tensors could never fill takes no memory."""
    model = {"channels": [1024, 2048], "strides": [2], "residual_units": 1, "norm": "batch"}
    with trial(KIND):
        refused(tmp_path, content(model=model), "tensor")


def test_long_files_are_not_read_to_be_refused(tmp_path) -> None:
    """Files of gigabytes, full of nothing; and one that names more tensors than any network has."""
    path = tmp_path / "w.safetensors"
    many = {f"t{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(10_000)}
    more = {f"t{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(100_000)}
    for head, size, word in (
        (GOOD, 2**33, "bytes long"), (b"\xff" * 8, 2**32, "bytes long"), (b"PK\x03\x04", 2**31, "bytes long"),
        (GOOD, 2**26, "not fully covered"), (b"\xff" * 8, 2**26, "header too large"),
        (b"PK\x03\x04", 2**26, "pickle"), (b"\x80\x04\x95\x32", 2**26, "pickle"),
        (joined(many, b""), None, "tensor"), (joined(more, b""), None, "header must have at most"),
    ):  # fmt: skip
        path.write_bytes(head)
        if size is not None:
            os.truncate(path, size)
        with trial(KIND), at_once(MEBIBYTES), pytest.raises(ValueError, match=r"w\.safetensors") as caught:
            Model.load(path)
        assert word in str(caught.value)


def test_refusing_takes_no_more_memory_than_the_file(tmp_path) -> None:
    """Whatever a header claims."""
    path = tmp_path / "w.safetensors"
    wide = {"channels": [2048, 2048], "strides": [2], "residual_units": 1, "norm": "batch"}
    for data in (content(model=wide), (2**40).to_bytes(8, "little") + GOOD[8:], GOOD[: len(GOOD) // 2]):
        path.write_bytes(data)
        before = resident()
        # some copies of this small file, and the modules of a network
        with trial(KIND), at_once(16), pytest.raises(ValueError, match=r"w\.safetensors"):
            Model.load(path)
        assert resident() - before < 2**26  # torch's


def resident() -> int:
    """Largest memory of this process so far, in bytes."""
    resource = pytest.importorskip("resource")
    return 1024 * int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "NaN": lambda t: torch.full_like(t, NAN),
    "one NaN": lambda t: t.index_fill(0, torch.tensor([t.shape[0] - 1]), NAN),
    "inf": lambda t: torch.full_like(t, INF),
    "-inf": lambda t: torch.full_like(t, -INF),
    "1e38": lambda t: torch.full_like(t, 1e38),
    "float64": lambda t: t.double(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "uint8": lambda t: t.to(torch.uint8),
    "complex": lambda t: t.to(torch.complex64),
    "longer": lambda t: torch.cat([t, t]),
    "shorter": lambda t: t[:-1].clone(),
    "flat": lambda t: t.flatten()[None].clone(),
    "empty": lambda t: t[:0].clone(),
    "scalar": lambda t: t.sum(),
}


def test_tensors_that_are_none(tmp_path) -> None:
    """Every tensor of the network, made into each kind of nonsense."""
    good, metadata = load(GOOD), parts(GOOD)[0]["__metadata__"]
    for name, tensor in good.items():
        if not tensor.is_floating_point():
            continue
        for change in TENSORS.values():
            with trial(KIND):
                refused(tmp_path, save(good | {name: change(tensor)}, metadata))
        with trial(KIND):
            refused(tmp_path, save({k: v for k, v in good.items() if k != name}, metadata), name, "missing")
        with trial(KIND):
            refused(tmp_path, save(good | {f"{name}.x": tensor.clone()}, metadata), f"{name}.x")
        if name.endswith("running_var"):
            with trial(KIND):
                refused(tmp_path, save(good | {name: -torch.ones_like(tensor)}, metadata), name, "[0")


def test_files_that_are_damaged(tmp_path) -> None:
    header, tensors = parts(GOOD)
    first, second, *_ = (k for k in header if k != "__metadata__")
    whole = json.dumps(header).encode()

    def moved(**change: Any) -> bytes:
        return joined(header | {second: header[second] | change}, tensors)

    entry = json.dumps(header[first])
    files = {
        "empty": b"", "eight": bytes(8), "no header": (10**6).to_bytes(8, "little") + b"{}",
        "bomb": (2**63).to_bytes(8, "little") + b"{}", "largest": b"\xff" * 100, "zero": bytes(10**5),
        "cut": GOOD[:-1], "cut in half": GOOD[: len(GOOD) // 2], "cut header": GOOD[:100],
        "longer": GOOD + b"x",
        "text": b"weights", "json": b"{}" * 100, "deep": joined(b"[" * 10**6, b""),
        "doubled": joined(whole[:-1] + f', "{first}": {entry}}}'.encode(), tensors),
        "overlap": moved(data_offsets=header[first]["data_offsets"]),
        "outside": moved(data_offsets=[10**9, 10**9 + 4]), "reversed": moved(data_offsets=[8, 4]),
        "negative": moved(data_offsets=[-4, 0]), "huge": moved(data_offsets=[0, 10**400]),
        "huge shape": moved(shape=[2**40, 2**40]),
        "no shape": joined(header | {second: {"dtype": "F32"}}, tensors),
        "number": joined(header | {second: 5}, tensors),
        "dtype": moved(dtype="F8_E4M3"), "dtype number": moved(dtype=5),
        "pickle": pickle.dumps({"a": 1}), "latin": joined(b'{"\xe9": 1}', tensors),
        "odd type": joined({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"a"),
        "no size": joined({"a": {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}}, b""),
    }  # fmt: skip
    torch.save({"a": torch.ones(3)}, tmp_path / "model.pt")
    files["torch"] = (tmp_path / "model.pt").read_bytes()
    for data in files.values():
        with trial(KIND):
            refused(tmp_path, data, "not a readable safetensors file")
    with trial(KIND):
        refused(tmp_path, files["torch"], "pickle")
    with trial(KIND):  # axes enough to confuse who does not compare first
        refused(tmp_path, moved(shape=[1] * 10**4), "tensor", "shape")


def changed(data: st.DataObject, good: bytes) -> bytes:
    """Weights with one to three other bytes, in the header or among the tensors."""
    raw = bytearray(good)
    end = 8 + int.from_bytes(good[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        in_header = data.draw(st.booleans())
        at = data.draw(st.integers(0, end - 1) if in_header else st.integers(end, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    return bytes(raw)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bytes_that_changed(tmp_path, data) -> None:
    """Refused, or read as finite numbers of the shapes of the network: what happens to a copy."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(changed(data, GOOD))
    with trial(KIND):
        try:
            model = Model.load(path)
        except ValueError as error:
            said = str(error)
            assert "w.safetensors" in said
            assert said.isprintable()
            return
        assert all(torch.isfinite(v).all() for v in model.network.state_dict().values())
        assert -800 < model.threshold_hu < 100


def test_numbers_that_overflow_on_the_way_are_told(tmp_path) -> None:
    """Finite weights may give NaN; a lesion map must not come of it."""
    network = build_unet(CONFIG)
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(9e8)
    with torch.no_grad():  # one more way: the logit itself
        list(network.parameters())[-1].fill_(NAN)
    model = Model(network, CONFIG)
    hu = np.full((32, 32, 32), -400, np.int16)
    with trial(KIND), pytest.raises(ValueError, match=r"got NaN from models\[0\]"):
        predict_volume(hu, np.ones(hu.shape, bool), [model], PredictConfig(slab=32), device="cpu")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_the_commands_say_one_line(tmp_path, capfd) -> None:
    """What the issue names, through the commands: exit code 2, one line, nothing written."""
    ct = tmp_path / "ct.nii.gz"
    ct.write_bytes(b"never read")
    good, metadata = load(GOOD), parts(GOOD)[0]["__metadata__"]
    name = next(k for k, v in good.items() if v.is_floating_point())
    files = {
        "nan": save(good | {name: torch.full_like(good[name], NAN)}, metadata),
        "evil": content(probability="evil"),
        "five": content(probability=5), "inflation": content(inflation_hu=1e9), "cut": GOOD[:-5], "none": b"",
        "wide": content(model={"channels": [10**9] * 2, "strides": [2]}),
    }  # fmt: skip
    for key, data in files.items():
        (tmp_path / f"{key}.safetensors").write_bytes(data)
    os.mkfifo(tmp_path / "pipe.safetensors")
    for key in [*files, "pipe", "missing"]:
        file = tmp_path / f"{key}.safetensors"
        for command in (
            lambda out, file=file: predict([str(ct), "--models", str(file), "--output", str(out)]),
            lambda out, file=file: export([str(file), "--output", str(out)]),
        ):
            with trial(KIND):
                assert command(tmp_path / "out") == 2
                said = capfd.readouterr().err
                assert said.count("\n") == 1
                assert file.name in said
                assert not (tmp_path / "out").exists()


def test_members_that_disagree(tmp_path, capfd) -> None:
    for number, level in enumerate((-700.0, -600.0)):
        (tmp_path / f"m{number}.safetensors").write_bytes(content(threshold_hu=level))
    (tmp_path / "ct.nii.gz").write_bytes(b"never read")
    models = [str(tmp_path / f"m{k}.safetensors") for k in range(2)]
    with trial(KIND):
        assert (
            predict([str(tmp_path / "ct.nii.gz"), "--models", *models, "--output", str(tmp_path / "out")])
            == 2
        )
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert "threshold_hu" in said
        assert "-700, -600" in said


# ---- the state that a run is resumed from, and weights of a comparison method


def _trainer() -> Trainer:
    return Trainer(TrainConfig(model=CONFIG, slab=32), choose_device("cpu"))


def _stepped() -> Trainer:
    trainer = _trainer()
    x = torch.rand(1, 1, 8, 8, 8)
    trainer.model(x).mean().backward()
    trainer.optimizer.step()
    trainer.progress.iteration = 1
    trainer.progress.scores = {"val_auc": NAN}
    return trainer


def test_states_of_a_run(tmp_path) -> None:
    state = tmp_path / "w.safetensors"
    trainer = _stepped()
    trainer.save(state)
    other = _trainer()
    other.restore(state)
    assert other.progress.iteration == 1
    assert math.isnan(other.progress.scores["val_auc"])
    assert all(
        torch.equal(a, b) for a, b in zip(other.model.parameters(), trainer.model.parameters(), strict=True)
    )
    data = state.read_bytes()
    good, metadata = load(data), parts(data)[0]["__metadata__"]

    def restore(path: Path) -> None:
        _trainer().restore(path)

    for name, tensor in good.items():
        if tensor.is_floating_point():
            with trial(KIND):
                refused(
                    tmp_path, save(good | {name: torch.full_like(tensor, NAN)}, metadata), name, load=restore
                )
            with trial(KIND):
                bad = save(good | {name: torch.zeros(3, 1, 2)}, metadata)
                refused(tmp_path, bad, name, load=restore)
        with trial(KIND):
            bad = save({k: v for k, v in good.items() if k != name}, metadata)
            refused(tmp_path, bad, name, load=restore)
    for field, values in {
        "iteration": (-1, 10**12, 1.5, "1", None, True, NAN), "seconds": (-1.0, NAN, INF, 1e300, "x"),
        "best_auc": (5, INF, "x"), "validated": (-2, 10**6, None), "scores": (5, [], {"a": "x"}),
        "calibration": (5, {}, {"probability": 5, "dice": 0.5}), "colour": (1,),
    }.items():  # fmt: skip
        for value in values:
            progress = json.loads(metadata["progress"]) | {field: value}
            with trial(KIND):
                bad = save(good, {"progress": json.dumps(progress)})
                refused(tmp_path, bad, field, load=restore)
    for bad in (b"", data[:-3], GOOD, pickle.dumps(1)):
        with trial(KIND):
            refused(tmp_path, bad, load=restore)


@pytest.mark.parametrize("method", ["ae", "gmvae", "f_anogan"])
def test_weights_of_a_baseline(tmp_path, method) -> None:
    baseline = build_baseline(small(method))
    baseline.calibration = {"threshold": 0.5, "scale": 1.0, "slices": 4.0}
    path = tmp_path / "w.safetensors"
    save_baseline(path, baseline)
    assert load_baseline(path, device="cpu").calibration == baseline.calibration
    data = path.read_bytes()
    good, metadata = load(data), parts(data)[0]["__metadata__"]
    whole = json.loads(metadata[BASELINE])

    def read(file: Path) -> None:
        load_baseline(file, device="cpu")

    for field, value in (
        ("size", 10**9), ("size", 100), ("channels", [10**9]), ("channels", [4] * 100), ("latent", 10**9),
        ("components", 10**9), ("method", "pca"), ("method", 5), ("restoration_steps", 10**12), ("seed", -1),
        ("phantom_shape", [10**6] * 3), ("colour", 1), ("learning_rate", 1e300), ("lungs_only", 1),
        ("threads", 10**9),
    ):  # fmt: skip
        with trial(KIND):
            header = json.dumps(whole | {"config": whole["config"] | {field: value}})
            refused(tmp_path, save(good, {BASELINE: header}), field, load=read)
    for calibration in (
        5, None, [], {"scale": 1.0}, {"scale": 0.0, "threshold": 0.5}, {"scale": 1.0, "threshold": 5},
        {"scale": 1.0, "threshold": "evil"}, {"scale": 1.0, "threshold": 0.5, "more": 1},
    ):  # fmt: skip
        with trial(KIND):
            header = json.dumps(whole | {"calibration": calibration})
            refused(tmp_path, save(good, {BASELINE: header}), "calibration", load=read)
    for name, tensor in list(good.items())[:8]:
        with trial(KIND):
            nonsense = torch.full_like(tensor, NAN) if tensor.is_floating_point() else tensor.double()
            refused(tmp_path, save(good | {name: nonsense}, metadata), name, load=read)


# ---- weights of the lung network, which `--lungs` takes


def of_lungs(**header: Any) -> bytes:
    """Return a file of weights of the task lungs, its header changed."""
    torch.manual_seed(0)
    config = replace(CONFIG, outputs=2)
    whole = {"model": asdict(config), "calibration": None, "task": "lungs"}
    return save(build_unet(config).state_dict(), {HEADER: json.dumps(whole | header)})


LUNGS = of_lungs()


def of_lungs_only(path: Path) -> Any:
    return Model.load(path, "lungs")


def test_a_network_of_another_task_is_refused(tmp_path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(LUNGS)
    model = Model.load(path, "lungs")
    assert model.config == replace(CONFIG, outputs=2)
    with torch.no_grad():
        assert model.network(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 2, 8, 8, 8)
    with trial(KIND):
        refused(tmp_path, LUNGS, "task must be lesions, got lungs")
    with trial(KIND):
        refused(tmp_path, GOOD, "task must be lungs, got lesions", load=of_lungs_only)
    one = asdict(CONFIG)
    for header, word in (
        ({"model": one}, "model.outputs must fit the task lungs, got 1"),
        ({"model": one, "task": "lesions"}, "task must be lungs, got lesions"),
        ({"task": "lesions"}, "model.outputs must fit the task lesions, got 2"),
        ({"model": one | {"outputs": 3}}, "model.outputs"),
        ({"model": one | {"outputs": 2, "channels": [4, 16]}}, "tensor"),
    ):
        with trial(KIND):
            refused(tmp_path, of_lungs(**header), word, load=of_lungs_only)
    # what says nothing of it was written before there was another task
    header, tensors = parts(LUNGS)
    whole = json.loads(header["__metadata__"][HEADER])
    del whole["task"]
    header["__metadata__"][HEADER] = json.dumps(whole)
    with trial(KIND):
        refused(tmp_path, joined(header, tensors), "model.outputs must fit the task lesions, got 2")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_lungs_that_are_no_method_are_one_line(tmp_path, capfd) -> None:
    """Of every command that finds lungs: exit code 2, and nothing is written."""
    ct = tmp_path / "ct.nii.gz"
    ct.write_bytes(b"never read")
    (tmp_path / "net.safetensors").write_bytes(GOOD)
    baseline = build_baseline(small("ae"))
    baseline.calibration = {"threshold": 0.5, "scale": 1.0, "slices": 4.0}
    save_baseline(tmp_path / "baseline.safetensors", baseline)
    good, metadata = load(LUNGS), parts(LUNGS)[0]["__metadata__"]
    name = next(k for k, v in good.items() if v.is_floating_point())
    torch.save({"a": torch.ones(3)}, tmp_path / "model.pt")
    files = {
        "nan": save(good | {name: torch.full_like(good[name], NAN)}, metadata), "cut": LUNGS[:-5],
        "half": LUNGS[: len(LUNGS) // 2], "none": b"", "text": b"weights", "lesions": GOOD,
        "task": of_lungs(task="evil"), "outputs": of_lungs(model=asdict(CONFIG)),
        "wide": of_lungs(model={"channels": [10**9] * 2, "strides": [2], "outputs": 2}),
        "torch": (tmp_path / "model.pt").read_bytes(), "image": b"\x1f\x8b" + bytes(400),
    }  # fmt: skip
    given: dict[str, tuple[str, str]] = {}
    for key, data in files.items():
        file = tmp_path / f"{key}.safetensors"
        file.write_bytes(data)
        given[key] = (str(file), file.name)
    for key in ("cut", "lesions"):  # a run, damaged, and one of the other task
        run = tmp_path / f"run {key}"
        run.mkdir()
        (run / "model.safetensors").write_bytes(files[key])
        given[run.name] = (str(run), "model.safetensors")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    for word in (
        "thresholds", "Network", "nonsense", "/dev/zero", "a\nb", "\x1b[2J",
        *(str(tmp_path / name) for name in ("gone", "pipe", "empty", "gone/model.safetensors")),
    ):  # fmt: skip
        given[word] = (word, "lungs must be network, classical, lungmask, or a run folder or weights of")
    given["long"] = ("x" * 400, "File name too long")
    for flag, said_of in given.values():
        rest = [str(ct), f"--lungs={flag}", "--output", str(tmp_path / "out")]
        for command, first in (
            (predict, ["--models", str(tmp_path / "net.safetensors")]),
            (prepare, []),
            (prepare, ["--task", "lungs"]),
            (baselines, ["predict", str(tmp_path / "baseline.safetensors")]),
        ):
            call = [*rest, *first] if command is predict else [*first, *rest]
            with trial(KIND):
                assert command(call) == 2
                said = capfd.readouterr().err
                assert said.count("\n") == 1
                assert said[:-1].isprintable()
                assert len(said) < 1000
                assert said_of in said
                assert not (tmp_path / "out").exists()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bytes_of_a_lung_network_that_changed(tmp_path, data) -> None:
    """Refused by name, or read as two finite logits for a voxel."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(changed(data, LUNGS))
    with trial(KIND):
        try:
            model = Model.load(path, "lungs")
        except ValueError as error:
            said = str(error)
            assert "w.safetensors" in said
            assert said.isprintable()
            return
        assert all(torch.isfinite(v).all() for v in model.network.state_dict().values())
        assert model.config.outputs == 2


def test_a_lung_network_that_overflows_on_the_way_is_told(tmp_path) -> None:
    """Finite weights may give NaN: no outline comes of it."""
    config = replace(CONFIG, outputs=2)
    network = build_unet(config)
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(9e8)
        list(network.parameters())[-1].fill_(NAN)
    hu = np.full((24, 40, 40), 40, np.int16)
    hu[4:20, 8:32, 6:18] = hu[4:20, 8:32, 22:34] = -850
    with trial(KIND), pytest.raises(ValueError, match="no lung found: the network sees 0 ml"):
        split_by_network(hu, (8.0, 8.0, 8.0), Model(network, config, "lungs"))
