"""What the checks of volume files share: how an error is told, lengths, numbers, files that a header names.

Readers of images trust headers: they take memory for what is announced, follow names of data files anywhere,
and return whatever lay in that memory where the file is short. Here every field that they act on is checked,
and the voxels are counted; compressed ones are unpacked once, block by block, never beyond what is announced.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from lesionsynth.strict import name_of, shown

Stamp = tuple[int, int, int, int]
"""Device, number, size and time of a file: others where its content is another."""

MAX_VOXELS = 2**31
"""Voxels of a volume at most; 2,000 slices of 1024 x 1024 are 2**31 / 1.02."""
FREE_GROWTH, MAX_GROWTH = 2**30, 250
"""A compressed file may hold so many bytes, or so many times its own length, whichever is more."""
SPACING_MM = (1e-3, 1e3)
"""Voxel sizes lie between these."""
FARTHEST_MM = 1e6
"""Origins lie within this distance."""
MAX_HEADER = 1 << 20
MAX_LINES = 10_000
BLOCK = 1 << 20


Geometry = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
"""Spacing, origin and direction."""


@dataclass(frozen=True)
class Header:
    """What is known of a volume file that passed.

    Attributes
    ----------
    kind : str
        ITK's image IO for it.
    voxel_bytes : int
        Memory for its voxels, eight bytes each where they are rescaled.
    beside : mapping of str to Stamp
        The file that holds the voxels, where it is another one, and its stamp before it was checked.
    geometry : Geometry or None
        Spacing, origin and direction as ITK has them, where the reader's are not to be taken.
    warnings : tuple of str
        What was decided and the user should know.
    """

    kind: str
    voxel_bytes: int
    beside: Mapping[str, Stamp] = field(default_factory=dict)
    geometry: Geometry | None = None
    warnings: tuple[str, ...] = ()


def file_stamp(path: str | os.PathLike[str]) -> Stamp:
    """Tell a file's content from a later one, and that it is a regular file; raises where it is not.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    ValueError
        A device, a pipe, a socket or a folder: reading might never end.
    """
    try:
        info = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name_of(path)}: no such file or folder") from None
    except OSError as error:
        raise type(error)(error.errno, error.strerror, name_of(path)) from None
    if not stat.S_ISREG(info.st_mode):
        kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
        kind = next((name for test, name in kinds if test(info.st_mode)), "device")
        raise ValueError(f"{name_of(path)}: unreadable: must be a regular file, is a {kind}")
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def check_geometry(
    path: Path, spacing: Sequence[float], origin: Sequence[float], direction: Sequence[float]
) -> None:
    """Check where the voxels of a 3-D image lie, mm; raises ValueError naming the field."""
    low, high = SPACING_MM
    check_numbers(path, "spacing", spacing, low, high)
    check_numbers(path, "origin", origin, -FARTHEST_MM, FARTHEST_MM)
    check_numbers(path, "direction", direction, -2, 2)
    # cosines with three decimals stay below this; beyond it, a voxel is no box of the spacing's sides
    columns = [direction[axis::3] for axis in range(3)]
    products = [sum(x * y for x, y in zip(a, b, strict=True)) - (a is b) for a in columns for b in columns]
    if max(map(abs, products)) > 1e-2:
        numbers = ", ".join(f"{value:g}" for value in direction)
        refuse(path, f"direction must be three orthogonal unit vectors, got {numbers}")


def number_of(text: str) -> float:
    """Return a number in plain digits, as every reader takes it; NaN for anything else."""
    match = re.fullmatch(r" *([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?) *", text, re.ASCII)
    return float(match[1]) if match else math.nan


def refuse(path: Path, rule: str) -> NoReturn:
    """Raise the ValueError of a file that breaks a rule."""
    raise ValueError(f"{name_of(path)}: unreadable: {name_of(rule[:400])}")


def check_numbers(path: Path, field: str, values: Sequence[float], low: float, high: float) -> None:
    """Check that a field's numbers lie in a range; NaN does not."""
    if not all(low <= value <= high for value in values):  # NaN is in no range
        numbers = ", ".join(f"{value:g}" for value in values)
        refuse(path, f"{field} must be numbers from {low:g} to {high:g}, got {numbers}")


def check_sizes(path: Path, field: str, sizes: Sequence[int]) -> int:
    """Check the numbers of voxels along each axis; returns their product."""
    if not sizes or min(sizes) < 1:
        refuse(path, f"{field} must be positive, got {', '.join(map(str, sizes)) or 'none'}")
    voxels = math.prod(sizes)
    if voxels > MAX_VOXELS:
        refuse(path, f"a volume must have at most {MAX_VOXELS} voxels, {field} announces {voxels}")
    return voxels


def check_length(path: Path, length: int, needed: int) -> None:
    """Check that the voxels have as many bytes as their header announces."""
    if length < needed:
        raise ValueError(
            f"{name_of(path)}: truncated: {length} bytes of the {needed} that its header announces"
        )
    if length > needed:
        refuse(path, f"{length - needed} bytes more than the {needed} that its header announces")


def check_growth(path: Path, packed: int, needed: int) -> None:
    """Check that a compressed file does not announce more than it can hold."""
    limit = max(FREE_GROWTH, MAX_GROWTH * packed)
    if needed > limit:
        refuse(
            path,
            f"a compressed file of {packed} bytes must hold at most {limit}, its header announces {needed}",
        )


def unpacked_length(stream: Any, known: int, needed: int) -> int:
    """Bytes in a stream of which `known` have been read; no more than one above `needed`."""
    length = known
    while length <= needed and (block := stream.read(min(BLOCK, needed + 1 - length))):
        length += len(block)
    return length


def check_digits(path: Path, stream: IO[bytes], needed: int) -> None:
    """Count hexadecimal digits between blanks."""
    count = 0
    while block := stream.read(BLOCK):
        if re.fullmatch(rb"[0-9a-fA-F\s]*", block) is None:
            refuse(path, "voxels in hex must be hexadecimal digits")
        count += sum(map(len, block.split()))
    if count != needed:
        refuse(path, f"the header announces {needed} digits, got {count}")


def check_text(path: Path, stream: IO[bytes], needed: int, kind: str, each: int) -> None:
    """Count numbers between blanks that fit a type: what does not fit would wrap."""
    name = kind.lower().removeprefix("met_")
    low, high = (
        (0, 2 ** (8 * each) - 1) if name[0] == "u" else (-(2 ** (8 * each - 1)), 2 ** (8 * each - 1) - 1)
    )
    real = name in ("float", "double")
    form = re.compile(
        rb"[+-]?(\d{1,40}\.?\d{0,40}|\.\d{1,40})([eE][+-]?\d{1,3})?" if real else rb"[+-]?\d{1,20}"
    )
    count, left = 0, b""
    while True:
        block = stream.read(BLOCK)
        parts = (left + block).split()
        left = parts.pop() if block and parts and not block[-1:].isspace() else b""
        for part in parts:
            if form.fullmatch(part) is None or not (real or low <= int(part) <= high):
                refuse(path, f"voxels in text must be numbers of type {kind}, got {quoted(part)}")
        count += len(parts)
        if not block:
            break
        if len(left) > 100 or count > needed:
            break
    if count != needed:
        refuse(path, f"the header announces {needed} numbers, got {count}{' or more' if block else ''}")


def quoted(text: bytes) -> str:
    """Quote the start of what a file holds."""
    return ascii(text[:60].decode("latin-1"))


def integers(path: Path, field: str, text: str, count: int | None = None) -> list[int]:
    """Return the integers of a field, as many as asked for."""
    parts = text.split()
    # 18 digits are below 2**63: what is longer, one parser or another would wrap
    if not all(re.fullmatch(r"[+-]?\d{1,18}", part) for part in parts) or count not in (None, len(parts)):
        refuse(path, f"{field} must be {_how_many(count, 'integer')}, got {shown(text)}")
    return [int(part) for part in parts]


def floats(path: Path, field: str, text: str, count: int | None = None) -> list[float]:
    """Return the numbers of a field, as many as asked for; NaN is one."""
    parts = text.split()
    numbers = [number_of(part) for part in parts]
    # NaN is a value that some fields may have; whoever called looks at what it is
    odd = [part for part, number in zip(parts, numbers, strict=True) if number != number]
    if not parts or count not in (None, len(parts)) or not all(part.lower() == "nan" for part in odd):
        refuse(path, f"{field} must be {_how_many(count, 'number')}, got {shown(text)}")
    return numbers


def _how_many(count: int | None, what: str) -> str:
    return f"a{'n' if what[0] == 'i' else ''} {what}" if count == 1 else f"{count or ''} {what}s".lstrip()


def data_file(path: Path, field: str, name: str) -> tuple[Path, Stamp]:
    """Find the data file that a header names, one plain name in the header's own folder; and stamp it."""
    plain = re.fullmatch(r"(\./)?[^\s/\\%:][^/\\%:]*", name) is not None
    if not plain or len(name) > 250 or name in (".", "..", "LIST") or name.startswith(("LIST ", "../")):
        refuse(path, f"{field} must be the name of one file in the header's folder, got {shown(name)}")
    data = path.parent / name
    try:
        stamp = file_stamp(data)
    except (OSError, ValueError) as error:
        raise type(error)(
            f"{name_of(path)}: {field} must be a file in the header's folder: {error}"
        ) from None
    if data.resolve().parent != path.resolve().parent and data.resolve().parent != path.parent.resolve():
        refuse(path, f"{field} must lie in the header's folder, {shown(name)} links to another")
    if stamp[:2] == file_stamp(path)[:2]:
        refuse(path, f"{field} must be another file than the header, got {shown(name)}")
    return data, stamp
