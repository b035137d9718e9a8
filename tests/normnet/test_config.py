"""Settings: every number has bounds, JSON comes back as it was, and what is refused is told in one line."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lesionsynth.strict import hints_of
from normnet.ablate import SMALL, AblateConfig, Scale, Trained
from normnet.baselines.__main__ import TrainArgs as BaselineArgs
from normnet.baselines.methods import METHODS, BaselineConfig
from normnet.baselines.methods import PRESETS as BASELINE_PRESETS
from normnet.config import (
    PRESETS,
    AugmentConfig,
    ChestConfig,
    ModelConfig,
    PostprocessConfig,
    PredictConfig,
    TrainConfig,
    from_json,
    json_schema,
    read_config,
    to_json,
)
from normnet.settings import from_record
from normnet.train import TrainArgs
from tests.hostile.bounds import at_once

MARK = {"seed": 0, "weights": "a", "iterations": 1, "seconds": 1.0, "sha256": "", "minutes": None}
GOOD: dict[type[Any], Any] = {
    ModelConfig: ModelConfig(),
    AugmentConfig: AugmentConfig(),
    ChestConfig: ChestConfig(),
    TrainConfig: TrainConfig(),
    TrainArgs: TrainArgs(),
    PostprocessConfig: PostprocessConfig(),
    PredictConfig: PredictConfig(),
    BaselineConfig: BaselineConfig(method="ae"),
    BaselineArgs: BaselineArgs(method="ae"),
    Scale: SMALL,
    AblateConfig: AblateConfig(table="voting", output=Path("out"), patients=(Path("ct"),)),
    Trained: Trained(**MARK),
}
"""One of every class of settings."""
CLASSES = pytest.mark.parametrize("cls", GOOD, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")


def properties(cls: type[Any]) -> dict[str, Any]:
    """The schema's fields of a class, but for those that are settings themselves."""
    found = json_schema(cls)["properties"]
    return {name: part for name, part in found.items() if "$ref" not in part}


def numbers(schema: Any, wrap: Callable[[Any], Any] = lambda value: value) -> Iterator[Any]:
    """Each number that a field takes, with what makes a value of the field of a value of that number."""
    for one in schema.get("anyOf", ()):
        yield from numbers(one, wrap)
    if schema.get("type") in ("integer", "number") and "enum" not in schema:
        yield schema, wrap
    if "items" in schema:
        least = max(2, schema.get("minItems", 0))
        yield from numbers(schema["items"], lambda value: wrap((value,) * least))
    first = [1 if part["type"] == "integer" else 1.0 for part in schema.get("prefixItems", ())]
    for place, part in enumerate(schema.get("prefixItems", ())):
        yield from numbers(
            part, lambda value, place=place: wrap((*first[:place], value, *first[place + 1 :]))
        )


def beyond(schema: Any) -> Iterator[float]:
    """The nearest numbers outside a schema's bounds, and far ones; fails where a bound is missing."""
    step: Callable[[Any, float], Any] = math.nextafter
    if schema["type"] == "integer":
        step = lambda value, towards: value + (1 if towards > 0 else -1)  # noqa: E731
    for closed, opened, towards in (
        ("minimum", "exclusiveMinimum", -math.inf),
        ("maximum", "exclusiveMaximum", math.inf),
    ):
        assert (closed in schema) != (opened in schema), f"no {closed} in {schema}"
        bound = schema[closed] if closed in schema else schema[opened]
        bound = float(bound) if schema["type"] == "number" else bound
        yield step(bound, towards) if closed in schema else bound
        yield -1e308 if towards < 0 else 1e308


def refused(
    call: Callable[..., Any], *arguments: Any, error: Any = (TypeError, ValueError), **more: Any
) -> str:
    """Fail unless a call is refused in one line; return it."""
    with pytest.raises(error) as caught:
        call(*arguments, **more)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 600
    return said


@CLASSES
def test_every_number_has_bounds(cls) -> None:
    """And what lies just outside is refused by name, in Python and in JSON."""
    found = 0
    for name, schema in properties(cls).items():
        for number, wrap in numbers(schema):
            for value in (*beyond(number), math.nan, math.inf):
                change = {name: wrap(value)}
                said = refused(replace, GOOD[cls], **change)
                assert said.startswith(name)
                assert " must be " in said
                text = json.dumps(json.loads(to_json(GOOD[cls])) | change)
                assert name in refused(from_json, cls, text, error=ValueError)
            found += 1
    kinds = [str(kind).replace("print", "") for kind in hints_of(cls).values()]
    assert found >= sum("int" in kind or "float" in kind for kind in kinds)


@CLASSES
def test_every_field_has_one_type(cls) -> None:
    """What is not of it is refused by name; by a TypeError, unless words are wanted."""
    good = GOOD[cls]
    for name, kind in hints_of(cls).items():
        for value in (b"5", object(), 1j, Decimal("0.5"), Fraction(1, 2), {"a": 1}, [[]], np.ones(1), float):
            assert re.match(rf"{name}\S* must be ", refused(replace, good, **{name: value}))
        only = "None" not in str(kind)
        if only and (kind in (int, float) or str(kind).startswith(("tuple[int", "tuple[float"))):
            for value in ("5", True, None, b"5"):
                refused(replace, good, error=TypeError, **{name: value})
        if kind is bool:
            for value in (0, 1, "true", None, 0.0):
                said = refused(replace, good, error=TypeError, **{name: value})
                assert said.startswith(f"{name} must be true or false, got ")
        if "Path" in str(kind) and "tuple" not in str(kind):
            assert getattr(replace(good, **{name: "a/b"}), name) == Path("a/b")
            assert "must be a path" in refused(replace, good, error=TypeError, **{name: "a\0b"})
        if dataclasses.is_dataclass(kind):
            said = refused(replace, good, error=TypeError, **{name: {}})
            assert said == f"{name} must be a {kind.__name__}, got {{}}"


@CLASSES
def test_unknown_and_missing_fields(cls) -> None:
    """Told by name, with those that there are; in parts of settings too."""
    values, record = vars(GOOD[cls]), json.loads(to_json(GOOD[cls]))
    for key in ("colour", "colour\n\x1b[2J", "", "x" * 10_000, "\udc80"):
        said = refused(cls, error=TypeError, **values | {key: 1})
        assert said == refused(from_json, cls, json.dumps(record | {key: 1}), error=ValueError)
        assert re.match(rf"{cls.__name__} has no field '.*'; it has {fields(cls)[0].name}\b", said)
        for name, part in record.items():
            if isinstance(part, dict):
                text = json.dumps(record | {name: part | {key: 1}})
                kind = type(values[name]).__name__
                assert refused(from_json, cls, text, error=ValueError).startswith(f"{kind} has no field '")
    for name in (f.name for f in fields(cls) if f.default is dataclasses.MISSING):
        rest = {k: v for k, v in values.items() if k != name}
        assert refused(cls, error=TypeError, **rest) == f"{cls.__name__} needs the field {name}"


def test_errors_of_parts_have_their_path() -> None:
    for text, said in (
        ('{"model": {"channels": [8, 0]}}', "model.channels[1] must be >= 1, got 0"),
        ('{"model": {"channels": [8]}}', "model.channels must be at least two widths, got (8,)"),
        ('{"augment": {"zoom": "1"}}', "augment.zoom must be a number, got '1'"),
        ('{"chest": []}', "chest must be a JSON object, got list"),
        ('{"probability": 2}', "probability must be < 1 or 'calibrated', got 2"),
        ('{"probability": "best"}', "probability must be a number or 'calibrated', got 'best'"),
        ('{"phantom_shape": [1, 2]}', "phantom_shape[2] must be given, got (1, 2)"),
        ('{"phantom_shape": [1, 2, 3, 4]}', "phantom_shape must be of length <= 3, got (1, 2, 3, 4)"),
        ('{"device": 5}', "device must be text, got 5"),
    ):
        assert refused(from_json, TrainConfig, text, error=ValueError) == said
    text = '{"postprocess": {"bright_size": 256}}'
    assert refused(from_json, PredictConfig, text) == "postprocess.bright_size must be <= 255, got 256"


def test_a_long_list_is_refused_at_once() -> None:
    """The first wrong width is told; pydantic would collect a line for each of a million."""
    for channels in (["8"] * 10**6, [8] * 10**6, [0] * 10**6):
        with at_once(64):  # a line for each of a million takes a GiB
            assert refused(ModelConfig, channels=channels).startswith("channels")
            assert refused(replace, GOOD[BaselineConfig], channels=channels).startswith("channels")


def drawn(schema: Any) -> st.SearchStrategy[Any]:
    """Whatever fits a schema."""
    if "anyOf" in schema:
        return st.one_of([drawn(one) for one in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema["type"]
    if kind == "array" and "prefixItems" in schema:
        return st.tuples(*map(drawn, schema["prefixItems"])).map(list)
    if kind == "array":
        most = min(schema.get("maxItems", 4), 6)
        return st.lists(drawn(schema["items"]), min_size=schema.get("minItems", 0), max_size=most)
    if kind in ("integer", "number"):
        low, high = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
        if kind == "integer":
            least = schema["minimum"] if low is None else low + 1
            return st.integers(least, schema["maximum"] if high is None else high - 1)
        bounds = (schema.get("minimum", low), schema.get("maximum", high))
        return st.floats(*bounds, exclude_min=low is not None, exclude_max=high is not None)
    names = st.text(st.characters(exclude_characters="\0"), max_size=20)
    return {"boolean": st.booleans(), "null": st.none(), "string": names}[kind]


WRITTEN = (
    ModelConfig,
    AugmentConfig,
    ChestConfig,
    TrainConfig,
    PostprocessConfig,
    PredictConfig,
    BaselineConfig,
)
"""What files hold."""
TOGETHER: dict[type[Any], dict[str, Any]] = {
    TrainConfig: {
        "slab": 32, "crop": 144, "minutes": None, "accumulate": 1, "held_out": 2, "task": "lesions",
        "folds": None,
        "lesions": "faint", "thick_mm": [1.0, 2.0], "phantom_shape": [4, 500, 300],
        "model": {"channels": [8, 9, 10], "strides": [4, 4]}, "augment": {"gain": 0.5},
    },
    BaselineConfig: {
        "size": 64, "context_crop": 9, "phantoms": 9, "held_out": 3, "channels": [8, 9], "latent": 5,
        "phantom_shape": [4, 500, 300],
    },
}  # fmt: skip
"""Fields that ask something of others."""


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("cls", WRITTEN)
def test_settings_come_back_from_json(cls, data) -> None:
    """Whatever the schema says is accepted, but for rules across fields, and comes back equal."""
    record = {name: data.draw(drawn(schema), name) for name, schema in properties(cls).items()}
    record |= TOGETHER.get(cls, {})
    if cls is ModelConfig:
        record["channels"] = [8, *record["channels"][:4]]
        record["strides"] = [data.draw(st.integers(1, 4)) for _ in record["channels"][1:]]
    try:
        made = from_json(cls, json.dumps(record))
    except ValueError as error:
        assert cls in (ModelConfig, BaselineConfig)
        assert "weights" in str(error)  # noqa: PT017
        return
    again = from_json(cls, to_json(made))
    assert again == made
    assert hash(again) == hash(made)
    for name, kind in hints_of(cls).items():
        value = record.get(name)
        if isinstance(value, str) and "Path" in str(kind):
            assert getattr(made, name) == Path(value)
        elif name in record and not isinstance(value, dict):
            assert json.loads(to_json(made))[name] == value
        assert kind is not float or type(getattr(made, name)) is float


@pytest.mark.parametrize("cls", [c for c in GOOD if c not in (Scale, AblateConfig, Trained)])
def test_a_schema_has_every_default(cls) -> None:
    """It is JSON, refuses other keys, and its defaults are those of the class."""
    schema = json_schema(cls)
    assert json.loads(json.dumps(schema)) == schema
    assert schema["additionalProperties"] is False
    assert all(part["additionalProperties"] is False for part in schema.get("$defs", {}).values())
    good = json.loads(to_json(GOOD[cls]))
    assert list(schema["properties"]) == list(good)
    for name, part in schema["properties"].items():
        if name in schema.get("required", ()):
            assert name == "method"
        else:
            assert part["default"] == good[name]
    assert from_record(cls, good) == GOOD[cls]


@pytest.mark.parametrize("preset", [*PRESETS, *BASELINE_PRESETS.keys() - PRESETS.keys()])
def test_presets_are_written_and_read(tmp_path, preset) -> None:
    made = [PRESETS[preset]()] if preset in PRESETS else []
    made += [BASELINE_PRESETS[preset](method) for method in METHODS if preset in BASELINE_PRESETS]
    for config in made:
        (tmp_path / "config.json").write_text(to_json(config))
        assert read_config(type(config), tmp_path / "config.json") == config
        assert json.loads(to_json(config)) == json.loads(json.dumps(asdict(config), default=str))


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_a_path_that_is_no_text_comes_back() -> None:
    """Linux takes any bytes as a name."""
    config = TrainConfig(output=Path(os.fsdecode(b"runs/\xff")))
    assert from_json(TrainConfig, to_json(config)) == config


def test_numbers_of_numpy_and_lists() -> None:
    made = TrainConfig(
        iterations=np.int64(5), learning_rate=np.float32(0.5), mirror=np.bool_(True), minutes=np.uint8(3),
        phantom_shape=[np.int16(4), 5, 6], thick_mm=[np.float64(1), np.longdouble(2)], device=np.str_("cpu"),
    )  # fmt: skip
    assert made == replace(
        TrainConfig(), iterations=5, learning_rate=0.5, mirror=True, minutes=3.0, phantom_shape=(4, 5, 6),
        thick_mm=(1.0, 2.0), device="cpu",
    )  # fmt: skip
    values = (made.iterations, made.learning_rate, made.mirror, made.minutes, made.device)
    assert [type(v) for v in values] == [int, float, bool, float, str]
    assert [type(v) for v in (*made.phantom_shape, *made.thick_mm)] == [int] * 3 + [float] * 2


@CLASSES
def test_instances_are_frozen_and_travel(cls) -> None:
    """To other processes too, as ensembles send them."""
    one = GOOD[cls]
    for other in (pickle.loads(pickle.dumps(one)), copy.copy(one), copy.deepcopy(one), replace(one)):
        assert other == one
        assert type(other) is cls
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, fields(cls)[0].name, 1)
    with pytest.raises(TypeError, match="positional"):
        cls(1)


def test_the_arguments_of_a_command_are_settings() -> None:
    """Subclasses check what they inherit, and what they add."""
    assert issubclass(TrainArgs, TrainConfig)
    assert refused(TrainArgs, batch_size=0) == "batch_size must be >= 1, got 0"
    assert refused(TrainArgs, accumulate=3) == "batch_size must be a multiple of accumulate=3, got 8"
    assert refused(TrainArgs, ensemble=0) == "ensemble must be >= 1, got 0"


def test_light_commands_stay_light() -> None:
    """Settings are read without torch."""
    code = "import normnet.config, sys; assert not {'torch', 'monai', 'tyro', 'pandas'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
