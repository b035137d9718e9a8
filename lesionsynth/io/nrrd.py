"""Check a NRRD file: what its header asks for, and whether the file holds it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from lesionsynth.io.checks import (
    MAX_HEADER,
    MAX_LINES,
    Header,
    check_digits,
    check_growth,
    check_length,
    check_numbers,
    check_packed,
    check_sizes,
    check_text,
    check_told,
    data_file,
    floats,
    integers,
    quoted,
    refuse,
)
from lesionsynth.strict import shown

_BYTES = {
    **dict.fromkeys(("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), 2),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t", "uint", "unsigned int"), 4),
    **dict.fromkeys(("uint32", "uint32_t", "float"), 4),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "double"), 8),
    **dict.fromkeys(("signed long long int", "int64", "int64_t", "ulonglong", "unsigned long long"), 8),
    **dict.fromkeys(("unsigned long long int", "uint64", "uint64_t"), 8),
}
_FIELDS = frozenset(
    re.findall(
        r"\w+",
        "dimension type encoding endian sizes spacings space spacedimension spacedirections "
        "spaceorigin spaceunits units kinds centers centerings labels thicknesses axismins "
        "axismaxs content number oldmin oldmax min max measurementframe sampleunits datafile "
        "lineskip byteskip",
    )
)
_SPACES = (
    *("left-posterior-superior", "right-anterior-superior", "left-anterior-superior"),
    *("lps", "ras", "las"),
)
_MM = frozenset(("mm", "millimeter", "millimeters", "millimetre", "millimetres", "none"))
_WORDS = frozenset(("space", "kinds", "centers", "centerings"))


def check_nrrd(path: Path, size: int) -> Header:
    """Check a NRRD file of `size` bytes; raises ValueError naming file, field, rule and value."""
    with path.open("rb") as stream:
        lines, start = _lines(path, stream, size)
        field = _fields(path, lines)
        sizes = integers(path, "sizes", field.get("sizes", ""))
        (count,) = integers(path, "dimension", field.get("dimension", "0"), 1)
        if not 1 <= count <= 16 or count != len(sizes):
            refuse(path, f"dimension must be that of sizes, {len(sizes)}, and at most 16, got {count}")
        voxels = check_sizes(path, "sizes", sizes)
        each = _BYTES.get(field.get("type", "").lower())
        if each is None:
            refuse(path, f"type must be that of a number, got {shown(field.get('type', 'none'))}")
        _check_space(path, field, count)
        told = check_told(path, field, ("space directions", "spacings"), ("space",))
        if "datafile" not in field:
            if path.name.lower().endswith(".nhdr"):
                refuse(path, "data file must name the file with the voxels")
            _check_voxels(path, path, stream, start, size, field, voxels, each)
            return Header("NrrdImageIO", voxels * each, warnings=told)
    data, stamp = data_file(path, "data file", field["datafile"], voxels * each)
    with data.open("rb") as stream:
        _check_voxels(path, data, stream, 0, stamp[2], field, voxels, each)
    return Header("NrrdImageIO", voxels * each, {str(data): stamp}, told)


def _lines(path: Path, stream: IO[bytes], size: int) -> tuple[list[bytes], int]:
    """Lines of a header and where it ends: an empty line, or the end of the file."""
    lines: list[bytes] = []
    for _ in range(MAX_LINES):
        line = stream.readline(MAX_HEADER)
        if stream.tell() > MAX_HEADER:
            break
        line = line.rstrip(b"\r\n")
        if not line:
            if not lines or re.fullmatch(rb"NRRD000[1-5]", lines[0]) is None:
                refuse(path, "not a NRRD file: it must begin with NRRD0001 to NRRD0005")
            return lines[1:], stream.tell()
        lines.append(line)
    refuse(path, f"the header must have at most {MAX_HEADER} bytes and {MAX_LINES} lines")


def _fields(path: Path, lines: Sequence[bytes]) -> dict[str, str]:
    field: dict[str, str] = {}
    for line in lines:
        if line.startswith(b"#") or (b":=" in line and b": " not in line.partition(b":=")[0]):
            continue  # comments, and keys that only mean something to whoever wrote them
        name, colon, value = line.partition(b":")
        key = name.decode("latin-1").replace(" ", "").lower()
        if not colon or key not in _FIELDS:
            refuse(path, f"the header must consist of NRRD's fields, got {quoted(line)}")
        if key in field:
            refuse(path, f"the field {key} must be given once")
        try:
            field[key] = value.decode("ascii" if key != "content" else "latin-1").strip()
        except UnicodeDecodeError:
            refuse(path, f"the field {key} must be plain text, got {quoted(value)}")
        if not field[key].replace("\t", " ").isprintable() and key != "content":
            refuse(path, f"the field {key} must be plain text, got {quoted(value)}")
        # readers copy words into buffers of their own, without asking how long they are
        if len(field[key]) > 2000 or max(map(len, field[key].split()), default=0) > 250:
            refuse(path, f"the field {key} must be short, got {len(field[key])} characters")
        if key in _WORDS and re.fullmatch(r"[\w?-]{1,40}(\s+[\w?-]{1,40})*", field[key]) is None:
            refuse(path, f"the field {key} must consist of words, got {quoted(value)}")
    return field


def _check_space(path: Path, field: Mapping[str, str], count: int) -> None:
    """Check what says where voxels lie; "none" and "nan" stand for axes that lie nowhere."""
    space = field.get("space", "LPS")
    if space.lower() not in _SPACES:  # readers take any other for LPS
        refuse(path, f"space must be one of {', '.join(_SPACES)}, got {shown(space)}")
    for name in ("space units", "units"):
        units = field.get(name.replace(" ", ""), "")
        if set(re.findall(r"\w+", units.lower())) - _MM:
            refuse(path, f"{name} must be mm, got {shown(units)}")
    integers(path, "space dimension", field.get("spacedimension", "3"), 1)
    if "axismaxs" in field and "spacings" not in field:  # which readers do not work out from them
        refuse(path, "spacings must be there where axis maxs are")
    if "spacings" in field:
        given = [float(v) for v in floats(path, "spacings", field["spacings"], count)]
        check_numbers(path, "spacings", given if count <= 3 else [v for v in given if v == v], 1e-9, 1e9)
    vector = r"\(\s*([^()]*)\)"
    if "spaceorigin" in field:
        match = re.fullmatch(vector, field["spaceorigin"])
        origin = floats(path, "space origin", match[1].replace(",", " ") if match else "")
        check_numbers(path, "space origin", origin, -1e9, 1e9)
    if "spacedirections" in field:
        axes = re.findall(rf"none|{vector}", field["spacedirections"])
        flat = count == 3 and "none" in field["spacedirections"]
        if flat or len(axes) != count or re.sub(rf"none|{vector}", "", field["spacedirections"]).strip():
            refuse(path, f"space directions must be {count} vectors, got {shown(field['spacedirections'])}")
        for axis in filter(None, axes):
            numbers = floats(path, "space directions", axis.replace(",", " "))
            check_numbers(path, "space directions", [*numbers, math.hypot(*numbers)], -1e9, 1e9)
            if math.hypot(*numbers) < 1e-9:
                refuse(path, f"space directions must differ from zero, got ({axis})")


def _check_voxels(
    path: Path,
    data: Path,
    stream: IO[bytes],
    start: int,
    size: int,
    field: Mapping[str, str],
    voxels: int,
    each: int,
) -> None:
    """Count the voxels from `start` on."""
    needed = voxels * each
    (lines,) = integers(path, "line skip", field.get("lineskip", "0"), 1)
    (skip,) = integers(path, "byte skip", field.get("byteskip", "0"), 1)
    coding = field.get("encoding", "").lower()
    if not 0 <= lines <= MAX_LINES or not -1 <= skip <= size or ((lines or skip) and coding != "raw"):
        got = f"{lines} and {skip} ({shown(coding)})"
        refuse(path, f"line skip and byte skip must lie in the file, got {got}")
    if each > 1 and coding in ("raw", "gzip", "gz") and field.get("endian") not in ("little", "big"):
        refuse(path, f"endian must be little or big, got {shown(field.get('endian', 'none'))}")
    stream.seek(start)
    if coding == "raw":
        for _ in range(lines):
            if not stream.readline(MAX_HEADER).endswith(b"\n"):
                refuse(path, f"line skip must lie in the file, got {lines}")
        start = stream.tell() + max(skip, 0)
        check_length(path, size, max(size, start + needed) if skip == -1 else start + needed, data)
    elif coding in ("gzip", "gz"):
        check_growth(path, size - start, needed)
        check_packed(path, stream, needed)
    elif coding == "hex":
        check_digits(path, stream, 2 * needed)
    elif coding in ("ascii", "text", "txt"):
        check_text(path, stream, voxels, field["type"], each)
    else:
        refuse(path, f"encoding must be raw, gzip, ascii or hex, got {shown(coding or 'none')}")
