"""Every number of a plan or a configuration has bounds, and so have work, memory and indices."""

from __future__ import annotations

import dataclasses
import decimal
import fractions
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lesionsynth as ls
from lesionsynth import cli
from lesionsynth.config import MOST_BLOBS
from lesionsynth.plan import Component
from lesionsynth.strict import hints_of
from normnet import config as configs
from normnet.baselines.methods import BaselineConfig
from normnet.config import (
    AugmentConfig,
    ChestConfig,
    ModelConfig,
    PostprocessConfig,
    PredictConfig,
    TrainConfig,
    from_json,
    to_json,
)
from tests.golden import FILE
from tests.hostile.bounds import RENDERED, at_once
from tests.hostile.tally import trial
from tests.plans import blob, plan, renderer, small_config

KIND = "domains"
MEBIBYTES = 1
"""Of a setting or a flag that is refused, which takes 0.1."""
NAN, INF = math.nan, math.inf
LESION = component = Component(
    label=1, blobs=(0,), box=((0, 1), (0, 1), (0, 1)), voxels=1, beta=1.0, beta_fallback=False
)
PARTS: dict[str, Any] = {
    "blob": blob(), "component": LESION, "plan": plan(blob()),
    "class": ls.BlobClass(count=(1, 2), radius=(1, 3)),
    "rare": ls.BlobClass(probability=0.5, radius=(1, 3)), "warp": ls.Warp(), "texture": ls.Texture(),
    "lesions": ls.LesionConfig(), "model": ModelConfig(), "augment": AugmentConfig(), "train": configs.few(),
    "chest": ChestConfig(), "lungs": configs.lungs(),
    "postprocess": PostprocessConfig(threshold_hu=-500.0, full_threshold=0.1),
    "predict": PredictConfig(probability=0.5),
    "baseline": BaselineConfig(method="ae", minutes=1.0, threads=1),
}  # fmt: skip
"""A good one of every dataclass of settings."""
WRONG = [
    NAN, INF, -INF, 10**400, -(10**400), 1e300, -1e300, 1e40, -1e40, 10**30, "5", "evil", b"5", True,
    False, [],
    {},
    (), object(), 1j, decimal.Decimal("0.5"), fractions.Fraction(1, 2), np.float64(NAN), np.array([1.0, 2.0]),
    np.bool_(True), "x" * 10**6, [10**400] * 3, float,
]  # fmt: skip
"""No field of numbers takes any of these, in any place."""
TEXTS = {
    "method",
    "residual",
    "norm",
    "schedule",
    "precision",
    "cache",
    "lesions",
    "device",
    "lengths",
    "output",
    "data",
    "task",
}


def number_fields(part: Any) -> list[str]:
    """Fields that hold numbers, alone or in a tuple."""
    found = []
    for name in hints_of(type(part)):
        value = getattr(part, name)
        one = value[0] if isinstance(value, tuple) and value else value
        if isinstance(one, int | float) and not isinstance(one, bool):
            found.append(name)
    return found


def refused(part: Any, name: str, value: Any) -> None:
    with at_once(MEBIBYTES), pytest.raises((TypeError, ValueError)) as caught:
        replace(part, **{name: value})
    said = str(caught.value)
    assert len(said) < 600
    assert said.isprintable()
    related = {
        "accumulate": "batch_size",
        "held_out": "phantoms",
        "channels": "strides",
        "hu_threshold": "hu_range",
    }
    assert name in said or related.get(name, name) in said, said


@pytest.mark.parametrize("kind", PARTS)
def test_no_field_takes_everything(kind) -> None:
    """Nonsense in every place of every field of numbers."""
    part = PARTS[kind]
    for name in number_fields(part):
        value = getattr(part, name)
        for wrong in WRONG:
            if name.endswith("_weight") and any(
                wrong is big for big in WRONG[5:10] if big in (1e300, 1e40, 10**30)
            ):
                continue  # a loss may be made to overflow
            with trial(KIND):
                refused(part, name, wrong)
            for place in range(len(value)) if isinstance(value, tuple) else ():
                with trial(KIND):
                    refused(part, name, (*value[:place], wrong, *value[place + 1 :]))


@pytest.mark.parametrize("kind", PARTS)
def test_flags_and_words(kind) -> None:
    part = PARTS[kind]
    for name, hint in hints_of(type(part)).items():
        if hint is bool:
            for wrong in (0, 1, "true", None, 5):
                with trial(KIND):
                    refused(part, name, wrong)
        elif name in TEXTS - {"output", "data", "device"}:
            for wrong in ("evil", 5, b"x", [], True, "x" * 10**6, "\n\x1b[2J"):
                with trial(KIND):
                    refused(part, name, wrong)


@pytest.mark.parametrize("kind", PARTS)
def test_numbers_of_numpy_become_pythons(kind) -> None:
    """What a user computes fits, and is written as JSON."""
    part = PARTS[kind]
    for name in number_fields(part):
        value = getattr(part, name)
        for cast in (
            lambda v: np.float64(v) if isinstance(v, float) else np.int64(v),
            lambda v: np.asarray(v)[()],
        ):
            given_ = tuple(map(cast, value)) if isinstance(value, tuple) and name != "box" else cast(value)
            with trial(KIND):
                made = replace(part, **{name: given_})
                assert made == part
                found = getattr(made, name)
                for one in found if isinstance(found, tuple) else (found,):
                    assert type(one) in (int, float)
                json.dumps(dataclasses.asdict(made), default=str)


# ---- what is accepted is rendered, in seconds


BIG = (32, 512, 512)


def lengths(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers of every magnitude within bounds, the bounds too."""
    logs = st.floats(math.log(low), math.log(high)).map(math.exp).map(lambda v: min(max(v, low), high))
    return st.one_of(st.sampled_from([low, high]), logs)


@st.composite
def blobs(draw: Any, component: int = 0, shape: tuple[int, int, int] = (12, 40, 44)) -> ls.Blob:
    """Any blob that is accepted."""
    rotation = np.array(draw(st.tuples(*[st.floats(-1, 1)] * 4)))
    norm = np.linalg.norm(rotation)
    rotation = rotation / norm if norm > 1e-3 else np.array([1.0, 0.0, 0.0, 0.0])
    low, high = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    return ls.Blob(
        component=component,
        semi_axes=draw(st.tuples(*[lengths(1e-9, 1e4)] * 3)),
        rotation=tuple(rotation.tolist()),
        position=draw(st.floats(0, 1, exclude_max=True)),
        center=draw(st.none() | st.tuples(*(st.integers(0, n - 1) for n in shape))),
        warp_amplitude=draw(st.one_of(st.just(0.0), lengths(1e-6, 1e4))),
        warp_correlation=draw(lengths(0.1, 1e4)),
        sigma_a=draw(lengths(1e-9, 1e4)),
        a_low=low,
        a_high=high,
        sigma_b=draw(lengths(1e-9, 1e4)),
        mu0=draw(lengths(1e-6, 10.0)),
    )


@st.composite
def plans(draw: Any) -> ls.LesionPlan:
    """Any plan that is accepted, but for what is too much together."""
    count = draw(st.integers(0, 4))
    return ls.LesionPlan(
        seed=draw(st.integers(0, 2**32 - 1)),
        index=draw(st.integers(0, 2**32 - 1)),
        lung_fraction=draw(lengths(5e-324, 1.0)),
        shape=draw(st.sampled_from([None, (12, 40, 44)])),
        scale=draw(st.tuples(*[lengths(1e-3, 1e3)] * 3)),
        connectivity=draw(st.sampled_from([6, 18, 26])),
        tau=draw(lengths(1e-6, 0.999999)),
        mean_threshold=draw(lengths(1e-6, 0.999999)),
        blobs=tuple(draw(blobs(component=n)) for n in range(count)),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=plans())
def test_plans_that_are_accepted(drawn) -> None:
    """They are written and read back exactly, and are refused as too much, or rendered."""
    image = np.full((12, 40, 44), 0.25, np.float32)
    with trial(KIND):
        text = drawn.to_json()
        try:
            with at_once(RENDERED):
                assert ls.LesionPlan.from_json(text) == drawn
                pair = renderer().render(drawn, image, np.ones(image.shape, bool))
        except ValueError as error:
            said = str(error)
            assert said.startswith("blobs must have")
            return
        assert 0.25 <= pair.image.min() <= pair.image.max() <= 1
        assert ls.LesionPlan.from_json(pair.plan.to_json()) == pair.plan


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), count=st.sampled_from([1, 10, MOST_BLOBS]))
def test_plans_that_are_accepted_of_a_whole_slab(data, count) -> None:
    """The same at full size, with as many blobs as there may be."""
    one = data.draw(blobs(shape=BIG))
    rng = np.random.default_rng(0)
    many = [
        replace(one, component=n, center=tuple(int(v) for v in rng.integers(0, BIG))) for n in range(count)
    ]
    drawn = plan(*many, shape=BIG, scale=data.draw(st.tuples(*[lengths(0.1, 10.0)] * 3)))
    image = np.zeros(BIG, np.float32)
    with trial(KIND):
        try:
            with at_once(RENDERED):
                pair = renderer().render(drawn, image, np.ones(BIG, bool))
            assert np.isfinite(pair.image).all()
        except ValueError as error:
            said = str(error)
            assert said.startswith("blobs must have")


TOO_MUCH = {
    "whole slabs": [blob(k, semi_axes=(1e4,) * 3) for k in range(200)],
    "fine lattices": [
        blob(k, semi_axes=(1.0,) * 3, warp_amplitude=100.0, warp_correlation=0.1) for k in range(60)
    ],
    "one lattice": [blob(semi_axes=(1e4, 1e-3, 1e-3), warp_amplitude=1.0, warp_correlation=0.1)],
    "wide Gaussians": [blob(k, sigma_a=1e4, sigma_b=1e4) for k in range(1000)],
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_together(name) -> None:
    """Each blob within bounds, the sum is not: refused at once, by plan, JSON and rendering."""
    drawn = plan(*TOO_MUCH[name], shape=BIG)
    image, mask = np.zeros(BIG, np.float32), np.ones(BIG, bool)
    calls = {1: lambda: drawn.check_work(BIG), 48: lambda: renderer().render(drawn, image, mask)}
    for most, call in calls.items():  # a copy of the input has 40, each field that is rendered 32 more
        with trial(KIND), at_once(most), pytest.raises(ValueError, match="blobs must have"):
            call()
    with trial(KIND), pytest.raises(ValueError, match="blobs must have"):
        ls.LesionPlan.from_json(drawn.to_json())


def test_counts_are_bounded() -> None:
    many = ls.BlobClass(count=(1024, 1024), radius=(1, 1), scale_by_lung=False)
    with trial(KIND), pytest.raises(ValueError, match="count must be <= 1024"):
        ls.BlobClass(count=(1, 30_000), radius=(1, 1))
    with (
        trial(KIND),
        pytest.raises(ValueError, match="count must be at most 1024 over all classes, got 1034"),
    ):
        ls.LesionConfig(small=many, large=None)
    config = small_config(small=many, medium=None, large=None)
    image, mask = np.zeros((4, 20, 20), np.float32), np.ones((4, 20, 20), bool)
    with trial(KIND):
        assert len(ls.LesionSynthesizer(config)(image, mask, index=0).plan.blobs) == 1024
    with trial(KIND), pytest.raises(ValueError, match="blobs must be at most 1024, got 1025"):
        plan(*[blob(k) for k in range(1025)])


def test_a_configuration_that_may_be_too_much_is_looked_at_each_time() -> None:
    """Light samples of it are rendered, heavy ones refused."""
    tiny = ls.BlobClass(count=(1, 1), radius=(0.01, 0.01), scale_by_lung=False)
    wild = small_config(
        warp=ls.Warp(amplitude=(0.0, 1e4), correlation=(0.1, 1.0)), small=tiny, medium=None, large=None
    )
    synth, image = ls.LesionSynthesizer(wild), np.zeros((12, 40, 44), np.float32)
    outcomes = set()
    for index in range(6):
        with trial(KIND):
            try:
                synth(image, np.ones(image.shape, bool), index=index)
                outcomes.add("rendered")
            except ValueError as error:
                said = str(error)
                assert said.startswith("blobs must have")
                outcomes.add("refused")
    calm = replace(
        wild, warp=ls.Warp(), small=ls.BlobClass(count=(1, 1), radius=(3.0, 3.0), scale_by_lung=False)
    )
    assert ls.LesionSynthesizer(calm)(image, np.ones(image.shape, bool), index=0).labels.max() > 0
    assert "refused" in outcomes


def test_spacing_of_a_call() -> None:
    synth = ls.LesionSynthesizer(small_config(lengths="mm"))
    for wrong in (
        (0, 1, 1),
        (1, 1),
        (1, 1, NAN),
        (1, 1, 1e300),
        (5e-324, 1, 1),
        ("1", 1, 1),
        (True, 1, 1),
        5,
        (10**400, 1, 1),
    ):
        with trial(KIND), pytest.raises(ValueError, match="spacing must be three positive lengths"):
            synth.sample(index=0, spacing=wrong)
    assert synth.sample(index=0, spacing=np.array([1.0, 2.0, 3.0])).scale == (1.0, 2.0, 3.0)


FLAGS = {
    "--seed": (-1, 2**32, 10**400), "--index": (-1, 2**32, 2**63), "--count": (-1, 0, 2**32, 10**400),
    "--phantom-seed": (-1, 2**32, 2**63), "--depth": (-1, -(10**400)), "--threads": (-1, 0),
    "--lung-fraction": (0, -1, NAN, INF, 1e300), "--rows": (-1, 0, 10**9, 10**400),
}  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_are_refused_before_anything_is_made(tmp_path, capsys, flag) -> None:
    """No phantom is drawn, no list of a billion folders is made."""
    for value in FLAGS[flag]:
        command, out = ("preview", "p.png") if flag == "--rows" else ("synth", "out")
        with trial(KIND):
            with at_once(MEBIBYTES):
                assert cli.main([command, "--output", str(tmp_path / out), f"{flag}={value}"]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert flag[2:].replace("-", "_") in said.replace("-", "_") or "seed" in said
            assert len(said) < 300
    with trial(KIND):
        last = ["--index", str(2**32 - 1), "--count", "2"]
        assert cli.main(["synth", "--output", str(tmp_path / "out"), *last]) == 2
        assert "last sample" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_window_has_a_width() -> None:
    for width in (0.0, 5e-324, 1e-300, 1e-4):
        with trial(KIND), pytest.raises(ValueError, match="hu_range must be"):
            ls.LesionConfig(hu_range=(0.0, width), hu_threshold=width / 2)


def test_plans_of_earlier_versions_are_read() -> None:
    """Every plan that the golden pairs were made of; written anew it has what was added, and nothing else."""
    entries = json.loads(FILE.read_text())
    found = [entry["plan"] for entry in entries.values() if entry["plan"]["version"] == 1]
    assert found
    for document in found:
        text = json.dumps(document)
        with trial(KIND):
            read = ls.LesionPlan.from_json(text)
            written, was = json.loads(read.to_json()), json.loads(text)
            assert (written.pop("version"), was.pop("version")) == (2, 1)
            for added, value in {"mode": "max", "edge": 0.0, "value_range": [0.0, 1.0], "load": None}.items():
                assert written.pop(added) == value
            for blob in written["blobs"]:
                assert (blob.pop("placement"), blob.pop("weight")) == ("uniform", 1.0)
            assert written == was


# ---- configurations are written and read back


@pytest.mark.parametrize(
    "kind", ["model", "augment", "chest", "train", "lungs", "postprocess", "predict", "baseline", "lesions"]
)
def test_configurations_come_back(kind) -> None:
    part = PARTS[kind]
    with trial(KIND):
        assert from_json(type(part), to_json(part)) == part
    for preset in ls.presets.BY_NAME.values():
        assert from_json(ls.LesionConfig, to_json(preset())) == preset()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_settings_of_training_come_back(data) -> None:
    """Any that are accepted."""
    draw = data.draw
    changes = {
        "iterations": draw(st.integers(1, 10**9)),
        "minutes": draw(st.none() | lengths(1e-9, 1e6)),
        "learning_rate": draw(lengths(1e-12, 10.0)),
        "threshold_hu": draw(st.floats(-799.9, 99.9)),
        "inflation_hu": draw(st.none() | st.floats(-950, -700)),
        "probability": draw(st.just("calibrated") | st.floats(1e-9, 1 - 1e-9)),
        "average": draw(st.floats(0, 1, exclude_max=True)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "phantom_spacing": draw(st.tuples(*[lengths(0.01, 100.0)] * 3)),
        "augment": AugmentConfig(rotate=draw(st.floats(0, 360)), noise=draw(st.floats(0, 1e4))),
        "chest": ChestConfig(
            diseased=draw(st.floats(0, 1)), tilt=draw(st.floats(0, 90)), bend=draw(st.floats(0, 8))
        ),
    }
    if draw(st.booleans()):
        changes |= {"task": "lungs", "crop": 32, "model": ModelConfig(outputs=2)}
    with trial(KIND):
        config = TrainConfig(**changes)
        assert from_json(TrainConfig, to_json(config)) == config


def test_a_network_has_the_outputs_of_its_task() -> None:
    """Two logits for the lungs, one for lesions; and lungs are learned in crops."""
    lungs = configs.lungs()
    for change, word in (
        ({"model": replace(lungs.model, outputs=1)}, "model.outputs must be 2 for the task lungs, got 1"),
        ({"task": "lesions"}, "model.outputs must be 1 for the task lesions, got 2"),
        ({"crop": None}, "crop must be given for the task lungs, got None"),
    ):
        with trial(KIND), pytest.raises(ValueError, match=word):
            replace(lungs, **change)
