"""Strict reading: JSON files that end, fields of one type, numbers within their domain.

Every plan, record and configuration is read here, by `lesionsynth` and by programs on top of it. What is
refused is refused at once, before anything is allocated, with one line: file, field, rule and value.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import re
import reprlib
import stat
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np

from lesionsynth.commands import printable

Built = TypeVar("Built")

MOST_BYTES = 2**24
"""Longest file that is read, unless a reader names its own bound; records take kilobytes."""
MOST_DEPTH = 32
"""Deepest nesting; nothing here is nested deeper than 8."""
MOST_DIGITS = 20
"""Longest integer; 64 bits have 20 digits."""
_NO_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[^"\[\]{}]++', re.DOTALL)
_UNFIT: Any = object()
"""What `_as` returns for a value of another type."""


class _Refused:
    """Stands in a document for a value that no document may hold, until its place is known."""

    def __init__(self, rule: str) -> None:
        self.rule = rule


@contextmanager
def regular_file(path: str | os.PathLike[str], most: int = MOST_BYTES) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file to read it; a pipe, a device or a folder is refused, never waited for.

    Parameters
    ----------
    path : path
        The file.
    most : int
        Longest that is opened, in bytes.

    Yields
    ------
    stream, size : binary stream, int
        Nothing is read yet.

    Raises
    ------
    OSError
        It cannot be opened.
    ValueError
        It is no regular file, or longer than `most`; the message starts with its name.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name_of(path)}: must be a regular file, got {_kind(status.st_mode)}")
        if status.st_size > most:
            raise ValueError(f"{name_of(path)}: must be at most {most} bytes long, got {status.st_size}")
        with os.fdopen(handle, "rb", closefd=False) as stream:
            yield stream, status.st_size
    finally:
        os.close(handle)


def read_bytes(path: str | os.PathLike[str], most: int = MOST_BYTES) -> bytes:
    """Read a regular file; see `regular_file`.

    Raises
    ------
    OSError
        It cannot be opened or read.
    ValueError
        It is no regular file, or longer than `most`; the message starts with its name.
    """
    with regular_file(path, most) as (stream, size):
        content = stream.read(size + 1)  # read(most) would take that much memory first
        if len(content) > size:  # it grew, or is a file of the system, which has no size
            content += stream.read(most + 1 - len(content))
    if len(content) > most:
        raise ValueError(f"{name_of(path)}: must be at most {most} bytes long, got more")
    return content


def read_json(path: str | os.PathLike[str], most: int = MOST_BYTES) -> Any:
    """Read a JSON file, as `parse_json` takes it.

    Parameters
    ----------
    path : path
        A regular file in UTF-8.
    most : int
        Longest that is read, in bytes.

    Raises
    ------
    OSError
        It cannot be opened or read.
    ValueError
        It is no such file, or no such JSON; the message starts with its name.
    """
    text = read_text(path, most)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{name_of(path)}: {error}") from error


def read_text(path: str | os.PathLike[str], most: int = MOST_BYTES) -> str:
    """Read a regular file in UTF-8; see `read_bytes`.

    Raises
    ------
    OSError
        It cannot be opened or read.
    ValueError
        It is no such file; the message starts with its name.
    """
    content = read_bytes(path, most)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name_of(path)}: must be UTF-8, got {error.reason} at byte {error.start}"
        ) from None


def parse_json(text: str, *, nan: bool = False) -> Any:
    """Parse JSON; what other readers overlook or choke on is refused.

    Parameters
    ----------
    text : str
        A document.
    nan : bool
        Take NaN and Infinity, which JSON does not have.

    Raises
    ------
    TypeError
        `text` is no string.
    ValueError
        It is no JSON, nested deeper than `MOST_DEPTH`, names a key twice, or holds NaN, a number beyond
        float64 or an integer of more than `MOST_DIGITS` digits; the message says where.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be JSON in a string, got {type(text).__name__}")
    brackets = np.frombuffer(_NO_BRACKET.sub("", text).encode("ascii"), np.uint8)  # the parser would recurse
    opens = (brackets == ord("[")) | (brackets == ord("{"))
    if brackets.size and np.cumsum(np.where(opens, 1, -1)).max() > MOST_DEPTH:
        raise ValueError(f"not JSON: must be nested at most {MOST_DEPTH} deep, got more")
    refused: list[_Refused] = []

    def refuse(rule: str) -> _Refused:
        refused.append(_Refused(rule))
        return refused[-1]

    def constant(name: str) -> Any:
        return float(name) if nan or refused else refuse(f"must be finite, got {name}")

    def real(digits: str) -> Any:
        value = float(digits)
        if refused or math.isfinite(value):  # the first is told: a million more would take seconds
            return value
        return refuse(f"must be finite, got {shown(digits)}")

    def whole(digits: str) -> Any:
        count = len(digits.lstrip("-"))
        if count <= MOST_DIGITS:
            return int(digits)
        return 0 if refused else refuse(f"must have at most {MOST_DIGITS} digits, got {count}")

    def mapping(pairs: list[tuple[str, Any]]) -> Any:
        record = dict(pairs)
        if len(record) == len(pairs):
            return record
        if refused:
            return refused[0]
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return refuse(f"must name a key once, got {shown(double)} twice")

    try:
        document = json.loads(
            text, parse_constant=constant, parse_float=real, parse_int=whole, object_pairs_hook=mapping
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if refused:
        place = "".join(f"[{k}]" if isinstance(k, int) else f".{_key(k)}" for k in _find(document) or ())
        raise ValueError(f"{place.removeprefix('.') or 'the document'} {refused[0].rule}")
    return document


def _find(value: Any) -> tuple[str | int, ...] | None:
    """Tell where in a document the first value is that is refused; None where it is not in it any more."""
    if isinstance(value, _Refused):
        return ()
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        if isinstance(part, dict | list | _Refused) and (inside := _find(part)) is not None:
            return (key, *inside)
    return None


def build(cls: type[Built], record: Any, where: str = "") -> Built:
    """Make a dataclass of a JSON object: exactly its fields, each of its type, nested ones too.

    Parameters
    ----------
    cls : dataclass
        What to make. A field with a default may be left out.
    record : dict
        From `parse_json`. A whole number is a float, too; a bool is no number, and text is neither.
    where : str
        What the object is called in messages; its fields are named alone where this is empty.

    Raises
    ------
    ValueError
        It is no object, a field is missing, unknown or of another type, or `cls` refuses a value.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where or 'the document'} must be a JSON object, got {_type_name(record)}")
    known = {f.name: f for f in dataclasses.fields(typing.cast("type[Any]", cls)) if f.init}
    if unknown := sorted(record.keys() - known.keys()):
        raise ValueError(
            f"{where or 'the document'} has no field {shown(unknown[0])}; it has {', '.join(known)}"
        )
    for name, field in known.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in record:
            raise ValueError(f"{where or 'the document'} lacks the field {name!r}")
    kinds = hints_of(cls)
    dot = f"{where}." if where else ""
    values = {name: _value(kinds[name], value, f"{dot}{name}", True) for name, value in record.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        # a field knows its own name, but not what it is a part of
        inside = ("." in where or where.endswith("]")) and not str(error).startswith(dot)
        raise ValueError(f"{dot}{error}" if inside else str(error)) from error


def settle(instance: Any) -> None:
    """Check the types of a frozen dataclass's fields, and store NumPy's numbers as Python's.

    Raises
    ------
    TypeError
        A field holds another type; the message names it.
    """
    for name, kind in hints_of(type(instance)).items():
        value = getattr(instance, name)
        try:
            plain = _value(kind, value, name, False)
        except ValueError as error:
            raise TypeError(str(error)) from None
        if plain is not value:
            object.__setattr__(instance, name, plain)


def hints_of(cls: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    if cls not in _HINTS:
        hints = typing.get_type_hints(cls)
        _HINTS[cls] = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    return _HINTS[cls]


_HINTS: dict[Any, dict[str, Any]] = {}


def _value(kind: Any, value: Any, where: str, json: bool) -> Any:
    """Read a value as the type of a field, from JSON or from Python."""
    # X | Literal[...] is a typing.Union, X | None a types.UnionType
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    for one in typing.get_args(kind) if union else (kind,):
        read = _as(one, value, where, json)
        if read is not _UNFIT:
            return read
    if json and dataclasses.is_dataclass(kind):
        raise ValueError(f"{where} must be a JSON object, got {_type_name(value)}")
    known = str(kind).replace("typing.", "") if typing.get_origin(kind) else kind.__name__
    raise ValueError(f"{where} must be {known}, got {shown(value)}")


def _as(kind: Any, value: Any, where: str, json: bool) -> Any:
    """Return `value` as one type, or `_UNFIT`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        if json and isinstance(value, dict):
            return build(typing.cast("type[Any]", kind), value, where)
        return value if not json and isinstance(value, typing.cast("type[Any]", kind)) else _UNFIT
    if origin is Literal:
        known = any(type(value) is type(a) and value == a for a in arguments)
        return value if known or (not json and isinstance(value, str)) else _UNFIT  # a class knows its words
    if origin is tuple:
        if not isinstance(value, list if json else list | tuple):
            return _UNFIT
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            return _UNFIT
        items = [
            _value(k, v, f"{where}[{n}]", json) for n, (k, v) in enumerate(zip(kinds, value, strict=True))
        ]
        return tuple(items)
    if origin is dict:
        if not isinstance(value, dict):
            return _UNFIT
        return {key: _value(arguments[1], v, f"{where}.{_key(key)}", json) for key, v in value.items()}
    if origin is list:
        if not isinstance(value, list):
            return _UNFIT
        return [_value(arguments[0], v, f"{where}[{n}]", json) for n, v in enumerate(value)]
    if kind is float or kind is int:
        found = plain_number(value)
        if found is None or (kind is int and not isinstance(found, int)):
            return _UNFIT
        return found if kind is int or isinstance(found, float) else _float(found)
    if kind is Path:
        if isinstance(value, Path) and not json:
            return value
        return Path(value) if isinstance(value, str) and "\0" not in value else _UNFIT
    if kind is bool and not json and type(value).__name__ == "bool_" and hasattr(value, "item"):
        return bool(value)
    return value if isinstance(value, kind) else _UNFIT


def _float(value: int) -> float:
    """Return a whole number as a float; one beyond float64 as infinity, which no domain holds."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def plain_number(value: Any) -> int | float | None:
    """Return a number as Python's int or float, NumPy's scalars too; None for what is no such number."""
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None  # Decimal and text among them
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if hasattr(value, "hex") or hasattr(value, "item") else None  # no Fraction


def check_number(name: str, value: Any, least: float, most: float, rule: str = "") -> int | float:
    """Return a number that lies in [least, most] as Python's int or float.

    Parameters
    ----------
    name : str
        What it is called in messages.
    value : int, float or NumPy scalar
        No bool, no text, no fraction.
    least, most : float
        Bounds; NaN lies in no interval.
    rule : str
        What to say instead of the interval.

    Raises
    ------
    TypeError
        It is no number.
    ValueError
        It lies outside.
    """
    found = value if type(value) is float else plain_number(value)
    if found is None:
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {shown(value)}")
    if not least <= found <= most:
        raise ValueError(f"{name} must be {rule or f'in [{least:g}, {most:g}]'}, got {shown(found)}")
    return found


def check_integer(name: str, value: Any, least: int, most: int, rule: str = "") -> int:
    """Return an integer that lies in [least, most] as Python's; see `check_number`.

    Raises
    ------
    TypeError
        It is no integer.
    ValueError
        It lies outside.
    """
    found = value if type(value) is int else plain_number(value)
    if not isinstance(found, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {shown(value)}")
    if not least <= found <= most:
        raise ValueError(f"{name} must be {rule or f'an integer in [{least}, {most}]'}, got {shown(found)}")
    return found


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise `ValueError` unless a value is one of some words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def put_checked(instance: Any, name: str, value: Any) -> None:
    """Store a checked value where it is another object than was given: NumPy's number, or a list."""
    if getattr(instance, name) is not value:
        object.__setattr__(instance, name, value)


def check_integers(name: str, values: Any, count: int | None, least: int, most: int) -> Any:
    """Return a tuple of `count` integers, or of any number, as Python's, or raise."""
    if not isinstance(values, tuple) or (count is not None and len(values) != count):
        raise ValueError(f"{name} must have {count or 'some'} values, got {shown(values)}")
    for value in values:
        if type(value) is not int or not least <= value <= most:
            return tuple(check_integer(name, value, least, most) for value in values)
    return values


def check_floats(name: str, values: Any, count: int, least: float, most: float, rule: str = "") -> Any:
    """Return a tuple of `count` numbers as Python's, or raise; see `check_number`."""
    if not isinstance(values, tuple) or len(values) != count:
        raise ValueError(f"{name} must have {count} values, got {shown(values)}")
    for value in values:
        if type(value) is not float or not least <= value <= most:
            return tuple(check_number(name, value, least, most, rule) for value in values)
    return values


class _Short(reprlib.Repr):
    """Values in messages: short, on one line, in ASCII."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxdict = 3, 60, 100, 4

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**40 else f"an integer of about {int(x.bit_length() * 0.30103)} digits"


_SHORT = _Short()


def shown(value: Any) -> str:
    """Return a value as a message shows it: shortened, on one line, in ASCII."""
    text = _SHORT.repr(
        value.item()
        if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0
        else value
    )
    return " ".join(text.split()).encode("ascii", "backslashreplace").decode("ascii")


def name_of(path: str | os.PathLike[str]) -> str:
    """Return a file's name as a message shows it: on one line, and what is no text escaped."""
    return printable(os.fsdecode(path))


def rule_of(error: BaseException, path: str | os.PathLike[str]) -> str:
    """Return what an error says of a file, without the name that it begins with."""
    return str(error).removeprefix(f"{name_of(path)}: ")


def some_of(comma: str, parts: Sequence[str], most: int = 10) -> str:
    """Join parts for a message, not more than it can show."""
    more = [f"and {len(parts) - most} more"] if len(parts) > most else []
    return comma.join([*parts[:most], *more])


def _key(key: str) -> str:
    return key if key.isidentifier() and len(key) <= 60 else shown(key)


def _type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _kind(mode: int) -> str:
    kinds: list[tuple[Callable[[int], bool], str]] = [
        (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
    ]  # fmt: skip
    return next((name for test, name in kinds if test(mode)), "a device")
