"""What the checks of volume files share: how an error is told, lengths, numbers, files that a header names.

Readers of images trust headers: they take memory for what is announced, follow names of data files anywhere,
and return whatever lay in that memory where the file is short. Here every field that they act on is checked,
and the voxels are counted; compressed ones are unpacked once, block by block, never beyond what is announced.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import stat
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn

import numpy as np

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


EXACT, SHEAR, UNIT = 1e-5, 1.7e-3, 1e-2
"""Products of a volume's axes. Up to the first (float32, six decimals), no corner is 0.01 mm off. Up to the
second, which cosines of three decimals reach, axes are made orthogonal; beyond, voxels are no boxes. The
third, which cosines of two decimals reach, bounds how far their squares are from 1."""
PAIR = "a pair of .hdr and .img (Analyze, NIfTI) is not read; convert it to one .nii file"


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
    warnings : tuple of str
        What was decided and the user should know.
    """

    kind: str
    voxel_bytes: int
    beside: Mapping[str, Stamp] = field(default_factory=dict)
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


def check_shape(path: Path, size: Sequence[int], components: int = 1) -> None:
    """Check that an image is one volume; `size` is x first."""
    if components != 1:
        raise ValueError(
            f"{name_of(path)}: a volume must have one value per voxel, got {components} (a colour picture?)"
        )
    if len(size) != 3 or min(size) < 2:
        hint = f": {math.prod(size[3:])} volumes in one file? Save the one to read" if len(size) > 3 else ""
        raise ValueError(
            f"{name_of(path)}: a volume must be 3-D with at least two voxels along each axis, got size "
            f"{tuple(size)} (x, y, z){hint}"
        )


def check_geometry(
    path: Path,
    size: Sequence[int],
    spacing: Sequence[float],
    origin: Sequence[float],
    direction: Sequence[float],
) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """Check where the voxels of a volume lie, mm; its direction, made orthogonal, and what that changed."""
    low, high = SPACING_MM
    check_numbers(path, "spacing", spacing, low, high)
    check_numbers(path, "origin", origin, -FARTHEST_MM, FARTHEST_MM)
    check_numbers(path, "direction", direction, -2, 2)
    cosines = np.reshape(direction, (3, 3))
    products = cosines.T @ cosines - np.eye(3)
    shear = float(np.abs(products[~np.eye(3, dtype=bool)]).max())
    if shear > SHEAR or float(np.abs(products).max()) > UNIT:
        numbers = ", ".join(f"{value:g}" for value in direction)
        refuse(
            path,
            f"direction must be three orthogonal unit vectors, sheared by at most {SHEAR:g}, got {numbers} "
            f"({shear:.2g}); resample it on upright axes, or (NIfTI) clear sform_code if the qform is right",
        )
    if float(np.abs(products).max()) <= EXACT:
        return tuple(direction), ()
    left, _, right = np.linalg.svd(cosines)
    nearest = left @ right
    ends = np.array(list(itertools.product((0, 1), repeat=3))) * (np.array(size) - 1) * spacing
    moved = float(np.linalg.norm(ends @ (nearest - cosines).T, axis=1).max())
    return tuple(nearest.ravel().tolist()), (
        f"{name_of(path)}: axes sheared by {shear:.2g} are made orthogonal; a corner moves by {moved:.3f} mm",
    )


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


def check_length(path: Path, length: int, needed: int, data: Path | None = None) -> None:
    """Check that the voxels, in `data` if that is another file, have as many bytes as announced."""
    if length < needed:
        where = f"{name_of(data)} has " if data not in (None, path) else ""
        raise ValueError(
            f"{name_of(path)}: truncated: {where}{length} bytes of the {needed} that its header announces"
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


def check_unpacked(path: Path, length: int, needed: int) -> None:
    """Check the length of data that was unpacked, to one byte above `needed` at most."""
    if length > needed:
        refuse(path, f"damaged compressed data, or a wrong header: more than the {needed} bytes announced")
    check_length(path, length, needed)


def check_packed(path: Path, stream: IO[bytes], needed: int) -> None:
    """Check that one zlib or gzip stream, to its checksum and the end of the file, holds the voxels."""
    unpack, length = zlib.decompressobj(47), 0
    try:
        while not unpack.eof and length <= needed:
            block = unpack.unconsumed_tail or stream.read(BLOCK)
            if not block:
                raise EOFError("it ends early")
            length += len(unpack.decompress(block, min(BLOCK * 4, needed + 1 - length)))
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{name_of(path)}: damaged or truncated compressed data ({error})") from error
    check_unpacked(path, length, needed)
    if unpack.unused_data or stream.read(1):
        refuse(path, "bytes follow the compressed voxels")


def check_told(
    path: Path, field: Collection[str], size: Sequence[str], way: Sequence[str]
) -> tuple[str, ...]:
    """Say that a header does not tell how large voxels are, or which way axes run; by fields' own names."""
    rules = (
        (size, "voxels to be 1 mm long along each axis"),
        (way, "axes to run to the left, back and head"),
    )
    return tuple(
        f"{name_of(path)}: there is no {names[0]}; taking {rule}"
        for names, rule in rules
        if not any(name.replace(" ", "") in field for name in names)
    )


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


def data_file(path: Path, field: str, name: str, needed: int) -> tuple[Path, Stamp]:
    """Find and stamp the file of `needed` bytes that a header names, one plain name in its own folder."""
    plain = re.fullmatch(r"(\./)?[^\s/\\%:][^/\\%:]*", name) is not None
    if not plain or len(name) > 250 or name in (".", "..", "LIST") or name.startswith(("LIST ", "../")):
        refuse(path, f"{field} must be the name of one file in the header's folder, got {shown(name)}")
    data = path.parent / name
    try:
        stamp = file_stamp(data)
    except (OSError, ValueError) as error:
        raise type(error)(
            f"{name_of(path)}: {field} must be a file in the header's folder, of {needed} bytes of voxels: "
            f"{error}"
        ) from None
    if data.resolve().parent != path.resolve().parent and data.resolve().parent != path.parent.resolve():
        refuse(path, f"{field} must lie in the header's folder, {shown(name)} links to another")
    if stamp[:2] == file_stamp(path)[:2]:
        refuse(path, f"{field} must be another file than the header, got {shown(name)}")
    return data, stamp
