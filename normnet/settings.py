"""What every class of settings is: a frozen dataclass that pydantic checks, written and read as JSON.

Types and bounds stand beside the fields, ``batch_size: Annotated[int, Field(ge=1)] = 8``, and hold in Python,
on the command line and in JSON. One line names field, rule and value of what is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import numpy as np
import pydantic.dataclasses
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from lesionsynth.strict import build, hints_of, name_of, parse_json, plain_number, read_json, shown

Config = TypeVar("Config")

_RULES = {
    "greater_than": "> {gt}", "greater_than_equal": ">= {ge}", "less_than": "< {lt}",
    "less_than_equal": "<= {le}", "finite_number": "finite", "literal_error": "{expected}",
    "int_type": "an integer", "float_type": "a number", "bool_type": "true or false", "string_type": "text",
    "is_instance_of": "a path", "dataclass_exact_type": "a {class_name}",
    "tuple_type": "a list", "missing": "given", "too_short": "of length >= {min_length}",
    "too_long": "of length <= {max_length}",
}  # fmt: skip
"""What must hold, for each of pydantic's errors."""


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and "\0" not in value else value


File = Annotated[Path, BeforeValidator(_path)]
"""Type of a field that takes a path, or its text."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[Config]) -> type[Config]:
    """Make a class a frozen dataclass whose fields pydantic checks, and whose errors are one line.

    Numbers of NumPy are stored as Python's, lists as tuples; text is no number, nor is a bool. Another type
    or an unknown field is a TypeError, what a bound or ``__post_init__`` refuses a ValueError.
    """
    strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=strict)(cls)
    validate = made.__init__

    @functools.wraps(validate)
    def init(self: Any, **values: Any) -> None:
        if unknown := sorted(values.keys() - (known := hints_of(type(self))).keys()):
            raise TypeError(
                f"{type(self).__name__} has no field {shown(unknown[0])}; it has {', '.join(known)}"
            )
        try:
            validate(self, **{name: _plain(name, value) for name, value in values.items()})
        except ValidationError as error:
            raise _in_one_line(type(self), error) from None

    made.__init__ = init
    return made  # type: ignore[no-any-return]


def _plain(name: str, value: Any) -> Any:
    """Return NumPy's scalars as Python's, and lists as tuples."""
    if isinstance(value, list | tuple):
        return tuple(_plain(name, item) for item in value)
    value = value.item() if isinstance(value, np.generic) else value
    if type(value) in (int, float, bool) or not hasattr(value, "__float__"):
        return value
    if (number := plain_number(value)) is None:  # pydantic would take Decimal, Fraction and torch's scalars
        raise TypeError(f"{name} must be a number of Python or NumPy, got {shown(value)}")
    return number


def _in_one_line(cls: type[Any], found: ValidationError) -> Exception:
    """Say what is wrong with the first field that is; of several types, what each of them asks."""
    errors = found.errors(include_url=False)
    first, kind = errors[0], errors[0]["type"]
    if kind == "value_error":
        return ValueError(str(first["ctx"]["error"]))
    if kind == "missing" and len(first["loc"]) == 1:
        return TypeError(f"{cls.__name__} needs the field {first['loc'][0]}")

    def place(error: Any) -> str:
        name, *parts = error["loc"]
        return str(name) + "".join(f"[{part}]" for part in parts if isinstance(part, int))

    def rule(error: Any) -> str:
        context = {k: f"{v:g}" if isinstance(v, float) else v for k, v in error.get("ctx", {}).items()}
        return _RULES.get(error["type"], "valid").format_map(context)

    asked = [e for e in errors if place(e) == place(first)]
    rules = " or ".join(map(rule, asked))
    wrong = TypeError if all(e["type"].endswith(("_type", "_instance_of")) for e in asked) else ValueError
    return wrong(f"{place(first)} must be {rules}, got {shown(first['input'])}")


def check(name: str, value: Any, holds: bool, rule: str) -> None:
    """Raise `ValueError` unless something holds that types and bounds cannot say."""
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {shown(value)}")


def to_json(config: Any) -> str:
    """Return a configuration as JSON; `from_json` gives back an equal one."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str)


def from_json(cls: type[Config], text: str) -> Config:
    """Read what `to_json` wrote; `ValueError` for what is no JSON object, no field or out of its range."""
    return from_record(cls, parse_json(text))


def read_config(cls: type[Config], path: Path) -> Config:
    """Read a file as `from_json`, whose errors then name it; `OSError` where it cannot be read."""
    record = read_json(path)
    with naming(path):
        return from_record(cls, record)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Begin what is wrong in the block, a `ValueError`, with the name of the file it was read from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name_of(path)}: {error}") from error


def from_record(cls: type[Config], record: Any, where: str = "") -> Config:
    """Make a configuration of a JSON object, as `from_json`; messages call its fields ``where.field``."""
    if not hasattr(cls, "__pydantic_validator__"):  # of `lesionsynth`, which has no pydantic
        return build(cls, record, cls.__name__)
    if not isinstance(record, dict):
        raise ValueError(f"{where or cls.__name__} must be a JSON object, got {type(record).__name__}")
    dot = f"{where}." if where else ""
    parts: dict[str, Any] = {k: kind for k, kind in hints_of(cls).items() if dataclasses.is_dataclass(kind)}
    values = {k: from_record(parts[k], v, dot + k) if k in parts else v for k, v in record.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        known = str(error).startswith(cls.__name__)
        raise ValueError(f"{'' if known else dot}{error}") from None


def json_schema(cls: type[Any]) -> dict[str, Any]:
    """Return the JSON schema of a configuration: types, bounds and defaults of what `from_json` reads."""
    return TypeAdapter(cls).json_schema()
