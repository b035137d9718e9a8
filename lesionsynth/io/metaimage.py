"""Check a MetaImage file: what its header asks for, and whether the file holds it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from lesionsynth.io.checks import (
    MAX_LINES,
    Header,
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
from lesionsynth.strict import name_of, shown

_BYTES = {
    **dict.fromkeys(("MET_CHAR", "MET_UCHAR"), 1),
    **dict.fromkeys(("MET_SHORT", "MET_USHORT"), 2),
    **dict.fromkeys(("MET_INT", "MET_UINT", "MET_FLOAT"), 4),
    **dict.fromkeys(("MET_LONG_LONG", "MET_ULONG_LONG", "MET_DOUBLE"), 8),
}
_NAMES = {
    name.lower(): name
    for name in re.findall(
        r"\w+",
        "ObjectType NDims DimSize ElementType ElementDataFile ElementNumberOfChannels HeaderSize "
        "BinaryData BinaryDataByteOrderMSB ElementByteOrderMSB CompressedData CompressedDataSize "
        "ElementSpacing ElementSize Offset Position Origin TransformMatrix Rotation Orientation "
        "CenterOfRotation AnatomicalOrientation DistanceUnits ElementToIntensityFunctionSlope "
        "ElementToIntensityFunctionOffset",
    )
}
_SAME = (
    ("Offset", "Position", "Origin"),
    ("TransformMatrix", "Rotation", "Orientation"),
    ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"),
)
"""Names of one thing; a reader takes the one or the other."""
_PLACES = {
    **dict.fromkeys(("ElementSpacing", "ElementSize"), (1, 1e-9, 1e9)),
    **dict.fromkeys(("Offset", "Position", "Origin", "CenterOfRotation"), (1, -1e9, 1e9)),
    **dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), (2, -2.0, 2.0)),
}
"""Fields of as many numbers as there are axes, or of its square; and their range."""
_AS_IF = {"ElementToIntensityFunctionSlope": 1.0, "ElementToIntensityFunctionOffset": 0.0}
"""What readers ignore, and so must change nothing."""
_MAX_VALUE = 250
"""Longest value of a word: readers have buffers of 255, and look at no length."""


def check_metaimage(path: Path, size: int) -> Header:
    """Check a MetaImage file of `size` bytes; raises ValueError naming file, field, rule and value."""
    with path.open("rb") as stream:
        field = _fields(path, stream)
        start = stream.tell()
    if field.get("ObjectType", "Image") != "Image":
        refuse(path, f"ObjectType must be Image, got {shown(field['ObjectType'])}")
    (count,) = integers(path, "NDims", field.get("NDims", "0"), 1)
    if not 1 <= count <= 4:
        refuse(path, f"NDims must be from 1 to 4, got {count}")
    sizes = integers(path, "DimSize", field.get("DimSize", ""), count)
    (channels,) = integers(path, "ElementNumberOfChannels", field.get("ElementNumberOfChannels", "1"), 1)
    if not 1 <= channels <= 16:
        refuse(path, f"ElementNumberOfChannels must be from 1 to 16, got {channels}")
    voxels = check_sizes(path, "DimSize", [*sizes, channels])
    each = _BYTES.get(field.get("ElementType", ""))
    if each is None:
        refuse(
            path,
            f"ElementType must be one of {', '.join(_BYTES)}, got {shown(field.get('ElementType', 'none'))}",
        )
    _check_space(path, field, count)
    told = check_told(path, field, ("ElementSpacing", "ElementSize"), _SAME[1])
    told += _other_orientation(path, field, count)
    name = field.get("ElementDataFile", "")
    if name.upper() == "LOCAL":
        if name != "LOCAL":
            refuse(path, f"ElementDataFile must be LOCAL or a file, got {shown(name)}")
        _check_voxels(path, path, start, size, field, voxels, each)
        return Header("MetaImageIO", voxels * each, warnings=told)
    data, stamp = data_file(path, "ElementDataFile", name, voxels * each)
    _check_voxels(path, data, 0, stamp[2], field, voxels, each)
    return Header("MetaImageIO", voxels * each, {str(data): stamp}, told)


def _fields(path: Path, stream: IO[bytes]) -> dict[str, str]:
    """Fields up to ElementDataFile, after which the voxels may follow."""
    field: dict[str, str] = {}
    for _ in range(MAX_LINES):
        line = stream.readline(2000)
        match = re.fullmatch(
            rb"[ \t]*([A-Za-z0-9_][A-Za-z0-9_ .|-]{0,99}?)[ \t]*[=:][ \t]*(.*?)[ \t\r]*\n?", line
        )
        if match is None or len(line) > 1500 or b"\0" in line or not line.endswith((b"\n", match[2])):
            refuse(path, f"not a MetaImage header: a line must be Key = Value, got {quoted(line)}")
        key = match[1].decode()
        if len(match[2]) > _MAX_VALUE and key.isalpha():
            refuse(path, f"{key} must have at most {_MAX_VALUE} characters, got {len(match[2])}")
        known = _NAMES.get(key.lower())
        if known is None:  # whatever the writer wanted to keep
            continue
        if key != known or known in field:
            refuse(path, f"the field {known} must be given once, and so spelled, got {shown(key)}")
        try:
            field[known] = match[2].decode("ascii")
        except UnicodeDecodeError:
            refuse(path, f"{known} must be plain text, got {quoted(match[2])}")
        if (known in _PLACES or known == "DimSize") and "NDims" not in field:
            refuse(path, f"NDims must come before {known}")
        if "%" in field[known] or not field[known].isprintable():
            refuse(path, f"{known} must be plain text without formats, got {quoted(match[2])}")
        if known == "ElementDataFile":
            return field
    refuse(path, f"not a MetaImage header: ElementDataFile must be among the first {MAX_LINES} lines")


def _check_space(path: Path, field: Mapping[str, str], count: int) -> None:
    for name, (power, low, high) in _PLACES.items():
        if name in field:
            check_numbers(path, name, floats(path, name, field[name], count**power), low, high)
    for names in _SAME:
        given = [name for name in names if name in field]
        if len(given) > 1:
            refuse(path, f"{given[0]} and {given[1]} are the same, which must be given once")
    for name, idle in _AS_IF.items():
        if name in field and floats(path, name, field[name], 1) != [idle]:
            refuse(path, f"{name} must be {idle:g}, got {shown(field[name])}")
    if field.get("DistanceUnits", "mm") not in ("mm", "?"):
        refuse(path, f"DistanceUnits must be mm, got {shown(field['DistanceUnits'])}")


def _other_orientation(path: Path, field: Mapping[str, str], count: int) -> tuple[str, ...]:
    """Tell where letters, that readers ignore, name other axes than the matrix, whose rows are the axes."""
    letters = field.get("AnatomicalOrientation", "").upper()
    text = next(
        (field[name] for name in _SAME[1] if name in field), " ".join(map(str, np.eye(count).ravel()))
    )
    rows = np.reshape(floats(path, "TransformMatrix", text), (count, count))
    if count != 3 or re.fullmatch("[RLAPIS]{3}", letters) is None or np.abs(rows).max(1).min() < 0.9:
        return ()
    ends = [
        ("RL", "AP", "IS")[at][:: int(np.sign(row[at]))]
        for row, at in zip(rows, np.abs(rows).argmax(1), strict=True)
    ]
    if letters in map(
        "".join, zip(*ends, strict=True)
    ):  # where axes come from, as ITK has it, or where they go
        return ()
    where = f"{name_of(path)}: AnatomicalOrientation {letters} is not that of TransformMatrix"
    return (f"{where}, whose axes run from {''.join(e[0] for e in ends)}; taking TransformMatrix",)


def _flag(path: Path, field: Mapping[str, str], name: str, otherwise: bool = False) -> bool:
    text = field.get(name, str(otherwise)).lower()
    if text not in ("true", "false"):
        refuse(path, f"{name} must be True or False, got {shown(field[name])}")
    return text == "true"


def _check_voxels(
    path: Path, data: Path, start: int, size: int, field: Mapping[str, str], voxels: int, each: int
) -> None:
    """Count the voxels in `data` from `start` on."""
    needed = voxels * each
    for name in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"):
        _flag(path, field, name)
    (skip,) = integers(path, "HeaderSize", field.get("HeaderSize", "0"), 1)
    packed = _flag(path, field, "CompressedData")
    text = not _flag(path, field, "BinaryData", True)
    if not -1 <= skip <= size or (skip and (packed or text or data == path)):
        refuse(path, f"HeaderSize must lie in an uncompressed file beside the header, got {skip}")
    if packed and text:
        refuse(path, "BinaryData must be True where CompressedData is")
    with data.open("rb") as stream:
        if text and size:
            stream.seek(size - 1)
            if not stream.read(1).isspace():  # readers refuse the last number, and do not say so
                refuse(path, "voxels in text must end with a blank or a new line")
        stream.seek(start)
        if text:
            check_text(path, stream, voxels, field["ElementType"], each)
        elif packed:
            (told,) = integers(path, "CompressedDataSize", field.get("CompressedDataSize", "0"), 1)
            # without it after a header, readers return whatever lay in memory
            if start + told != size and (told or data == path):
                refuse(path, f"CompressedDataSize must be {size - start}, got {told}")
            check_growth(path, size - start, needed)
            check_packed(path, stream, needed)
        else:
            start += max(skip, 0)
            check_length(path, size, max(size, start + needed) if skip == -1 else start + needed, data)
