"""Check a volume file before native code sees it: what its header asks for, and whether the file holds it.

Readers of images trust headers: they take memory for what is announced, follow names of data files anywhere,
and return whatever lay in that memory where the file is short. Here every field that they act on is checked,
and the voxels are counted; compressed ones are unpacked once, block by block, never beyond what is announced.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

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
_MAX_HEADER = 1 << 20
_MAX_LINES = 10_000
_MAX_EXTENSIONS = 1000
_BLOCK = 1 << 20


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
    """

    kind: str
    voxel_bytes: int
    beside: Mapping[str, Stamp] = field(default_factory=dict)
    geometry: Geometry | None = None


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


def check_volume(path: Path) -> Header:
    """Check a NIfTI, NRRD or MetaImage file, told by its suffix.

    Parameters
    ----------
    path : Path
        Ends in one of `lesionsynth.io.SUFFIXES`.

    Raises
    ------
    ValueError
        Names the file, the field, the rule and the value.
    OSError
        It cannot be opened.
    """
    size = file_stamp(path)[2]
    name = path.name.lower()
    if not size:
        _refuse(path, "an empty file")
    if name.endswith((".nii", ".nii.gz")):
        return _nifti(path, size)
    return (_nrrd if name.endswith((".nrrd", ".nhdr")) else _metaimage)(path, size)


def check_geometry(
    path: Path, spacing: Sequence[float], origin: Sequence[float], direction: Sequence[float]
) -> None:
    """Check where the voxels of a 3-D image lie, mm; raises ValueError naming the field."""
    low, high = SPACING_MM
    _check_numbers(path, "spacing", spacing, low, high)
    _check_numbers(path, "origin", origin, -FARTHEST_MM, FARTHEST_MM)
    _check_numbers(path, "direction", direction, -2, 2)
    # cosines with three decimals stay below this; beyond it, a voxel is no box of the spacing's sides
    columns = [direction[axis::3] for axis in range(3)]
    products = [sum(x * y for x, y in zip(a, b, strict=True)) - (a is b) for a in columns for b in columns]
    if max(map(abs, products)) > 1e-2:
        numbers = ", ".join(f"{value:g}" for value in direction)
        _refuse(path, f"direction must be three orthogonal unit vectors, got {numbers}")


def number_of(text: str) -> float:
    """Return a number in plain digits, as every reader takes it; NaN for anything else."""
    match = re.fullmatch(r" *([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?) *", text, re.ASCII)
    return float(match[1]) if match else math.nan


def _determinant(m: Sequence[float]) -> float:
    a, b, c, d, e, f, g, h, i = m
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def _refuse(path: Path, rule: str) -> NoReturn:
    raise ValueError(f"{name_of(path)}: unreadable: {name_of(rule[:400])}")


def _check_numbers(path: Path, field: str, values: Sequence[float], low: float, high: float) -> None:
    if not all(low <= value <= high for value in values):  # NaN is in no range
        numbers = ", ".join(f"{value:g}" for value in values)
        _refuse(path, f"{field} must be numbers from {low:g} to {high:g}, got {numbers}")


def _check_sizes(path: Path, field: str, sizes: Sequence[int]) -> int:
    """Check the numbers of voxels along each axis; returns their product."""
    if not sizes or min(sizes) < 1:
        _refuse(path, f"{field} must be positive, got {', '.join(map(str, sizes)) or 'none'}")
    voxels = math.prod(sizes)
    if voxels > MAX_VOXELS:
        _refuse(path, f"a volume must have at most {MAX_VOXELS} voxels, {field} announces {voxels}")
    return voxels


def _check_length(path: Path, length: int, needed: int) -> None:
    if length < needed:
        raise ValueError(
            f"{name_of(path)}: truncated: {length} bytes of the {needed} that its header announces"
        )
    if length > needed:
        _refuse(path, f"{length - needed} bytes more than the {needed} that its header announces")


def _check_growth(path: Path, packed: int, needed: int) -> None:
    limit = max(FREE_GROWTH, MAX_GROWTH * packed)
    if needed > limit:
        _refuse(
            path,
            f"a compressed file of {packed} bytes must hold at most {limit}, its header announces {needed}",
        )


def _unpacked_length(stream: Any, known: int, needed: int) -> int:
    """Bytes in a stream of which `known` have been read; no more than one above `needed`."""
    length = known
    while length <= needed and (block := stream.read(min(_BLOCK, needed + 1 - length))):
        length += len(block)
    return length


# ---- NIfTI

_NIFTI_BITS = {2: 8, 4: 16, 8: 32, 16: 32, 64: 64, 128: 24, 256: 8, 512: 16, 768: 32, 1024: 64, 1280: 64}
_NIFTI_BITS[2304] = 32  # colours, as 128: told as such after reading
_NIFTI_REAL = {16: "f4", 64: "f8"}
_NIFTI_MM = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
_NIFTI_START = 352
"""First byte after the header and the four that announce extensions."""
# (type, place)
_NIFTI_FIELDS: Mapping[str, tuple[str, int]] = {
    "dim": ("8h", 40),
    "intent": ("h", 68),
    "datatype": ("h", 70),
    "bitpix": ("h", 72),
    "pixdim": ("8f", 76),
    "vox_offset": ("f", 108),
    "units": ("B", 123),
    "scl": ("2f", 112),
    "codes": ("2h", 252),
    "quatern": ("3f", 256),
    "qoffset": ("3f", 268),
    "srow": ("12f", 280),
}


def _nifti(path: Path, size: int) -> Header:
    packed = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            head = stream.read(_NIFTI_START)
            field = _nifti_fields(path, head)
            voxels, needed, offset = _check_nifti(path, field)
            if packed:
                _check_growth(path, size, needed)
            head += stream.read(offset - len(head)) if offset > len(head) else b""
            _check_extensions(path, head, field)
            length = size
            if field["datatype"] in _NIFTI_REAL:
                length = len(head) + _finite_length(path, stream, field, needed - len(head))
            elif packed:
                length = _unpacked_length(stream, len(head), needed)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name_of(path)}: damaged or truncated gzip file ({error})") from error
    _check_length(path, length, needed)
    plain = field["scl"] in ((0.0, 0.0), (1.0, 0.0))
    return Header(
        "NiftiImageIO",
        voxels * (field["bitpix"] // 8 if plain else 8),
        geometry=_nifti_geometry(path, field),
    )


def _nifti_geometry(path: Path, field: Mapping[str, Any]) -> Geometry | None:
    """Where the voxels lie: by sform where its code is set, else by qform; readers differ in the choice."""
    if field["dim"][0] < 3:
        return None
    forms = [form for form, code in (("sform", field["codes"][1]), ("qform", field["codes"][0])) if code]
    if not forms:
        warnings.warn(
            f"{name_of(path)}: neither sform nor qform is set; taking x from the patient's left to right",
            stacklevel=6,
        )
    affines = [_sform(field) if form == "sform" else _qform(field) for form in forms or ["qform"]]
    if len(affines) > 1:
        corners = np.array([(*at, 1) for at in itertools.product(*((0, n - 1) for n in field["dim"][1:4]))])
        apart = float(np.abs(corners @ (affines[0] - affines[1]).T).max())
        if apart > 0.1 * float(np.linalg.norm(affines[0][:, :3], axis=0).min()):
            warnings.warn(
                f"{name_of(path)}: sform and qform lie {apart:.2f} mm apart; taking sform", stacklevel=6
            )
    lps = np.array([[-1.0], [-1.0], [1.0]]) * affines[0]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    cosines = (lps[:, :3] / spacing).ravel()
    return tuple(spacing.tolist()), tuple(lps[:, 3].tolist()), tuple(cosines.tolist())


def _sform(field: Mapping[str, Any]) -> Any:
    return np.array(field["srow"]).reshape(3, 4) * _NIFTI_MM[field["units"] & 7]


def _qform(field: Mapping[str, Any]) -> Any:
    """Columns and origin in RAS, mm; identity and zero where its code is not set."""
    b, c, d = field["quatern"] if field["codes"][0] else (0.0, 0.0, 0.0)
    long = b * b + c * c + d * d
    if long > 1 - 1e-7:  # as the format's own library has it: half a turn
        b, c, d = (value / math.sqrt(long) for value in (b, c, d))
    a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    x, y, z = field["pixdim"][1:4]
    origin = field["qoffset"] if field["codes"][0] else (0.0, 0.0, 0.0)
    columns = turn * (x, y, -z if field["pixdim"][0] < 0 else z)
    return np.column_stack([columns, origin]) * _NIFTI_MM[field["units"] & 7]


def _finite_length(path: Path, stream: Any, field: Mapping[str, Any], needed: int) -> int:
    """Count as `_unpacked_length`; refuse NaN and infinity, for which a reader puts zeros without a word."""
    kind = np.dtype(field["order"] + _NIFTI_REAL[field["datatype"]])
    length, left = 0, b""
    while length <= needed and (block := stream.read(min(_BLOCK, needed + 1 - length))):
        length += len(block)
        block = left + block
        whole = len(block) // kind.itemsize
        if not np.isfinite(np.frombuffer(block, kind, whole)).all():
            raise ValueError(f"{name_of(path)}: voxels must be finite, found NaN or infinity")
        left = block[whole * kind.itemsize :]
    return length


def _nifti_fields(path: Path, head: bytes) -> dict[str, Any]:
    for order in "<>":
        if len(head) < _NIFTI_START:
            break
        start = struct.unpack_from(f"{order}i", head)[0]
        if start == 540:
            _refuse(path, "NIfTI-2 is not read; save it as NIfTI-1")
        if start == 348:
            if head[344:348] != b"n+1\0":
                _refuse(path, f"magic must be {b'n+1' + bytes(1)!r}, got {head[344:348]!r}")
            field: dict[str, Any] = {"order": order}
            for name, (form, at) in _NIFTI_FIELDS.items():
                values = struct.unpack_from(order + form, head, at)
                field[name] = values if len(values) > 1 else values[0]
            return field
    _refuse(path, "not a NIfTI file: sizeof_hdr must be 348")


def _check_nifti(path: Path, field: Mapping[str, Any]) -> tuple[int, int, int]:
    """Check the fields; (voxels, bytes of the file, place of the voxels)."""
    count = field["dim"][0]
    if not 1 <= count <= 7:
        _refuse(path, f"dim[0] must be from 1 to 7, got {count}")
    voxels = _check_sizes(path, "dim", field["dim"][1 : 1 + count])
    bits = _NIFTI_BITS.get(field["datatype"])
    if bits is None:
        known = ", ".join(map(str, sorted(_NIFTI_BITS)))
        _refuse(path, f"datatype must be one of {known}, got {field['datatype']}")
    if field["bitpix"] != bits:
        _refuse(path, f"bitpix must be {bits} for datatype {field['datatype']}, got {field['bitpix']}")
    offset = field["vox_offset"]
    if not (_NIFTI_START <= offset <= 2**28 and offset == int(offset)):
        _refuse(path, f"vox_offset must be an integer from {_NIFTI_START} to {2**28}, got {offset:g}")
    # what a reader may take for a size, an angle or a scale; codes of zero say that the rest is unused
    _check_numbers(path, "scl_slope and scl_inter", field["scl"], -1e9, 1e9)
    if 0 < abs(field["scl"][0]) < 1e-9:  # which some readers take for none
        _refuse(path, f"scl_slope must be zero or at least 1e-09, got {field['scl'][0]:g}")
    if field["scl"][0] == 0 != field["scl"][1]:  # which some readers add, and others do not
        _refuse(path, f"scl_inter must be zero where scl_slope is, got {field['scl'][1]:g}")
    if field["units"] & 7 not in _NIFTI_MM:
        _refuse(path, f"xyzt_units must be of metres, mm or micrometres, got {field['units']}")
    if 1004 <= field["intent"] <= 1010:
        _refuse(path, f"intent_code must be that of one number a voxel, got {field['intent']}")
    _check_numbers(path, "pixdim", field["pixdim"][1 : 1 + min(count, 3)], 1e-9, 1e9)
    if not math.isfinite(field["pixdim"][0]):
        _refuse(path, f"pixdim[0] must be finite, got {field['pixdim'][0]}")
    qform, sform = field["codes"]
    _check_numbers(path, "qform_code and sform_code", field["codes"], 0, 5)
    if qform:
        _check_numbers(path, "quatern_b, c and d", field["quatern"], -1.001, 1.001)
        _check_numbers(path, "qoffset", field["qoffset"], -1e9, 1e9)
    if sform:
        _check_numbers(path, "srow", field["srow"], -1e9, 1e9)
        rows = [value for at, value in enumerate(field["srow"]) if at % 4 < 3]
        lengths = [math.hypot(*rows[axis::3]) or 1.0 for axis in range(3)]
        if abs(_determinant([value / lengths[at % 3] for at, value in enumerate(rows)])) < 1e-3:
            _refuse(path, "srow must be three axes that differ")
    return voxels, int(offset) + voxels * bits // 8, int(offset)


def _check_extensions(path: Path, head: bytes, field: Mapping[str, Any]) -> None:
    """Check the chain of extensions between the header and the voxels."""
    at, end = _NIFTI_START, int(field["vox_offset"])
    if len(head) < end:
        raise ValueError(f"{name_of(path)}: truncated: the file ends before its voxels, at {len(head)} bytes")
    if not head[at - 4]:
        return
    for _ in range(_MAX_EXTENSIONS):
        if end - at < 8:
            return
        length = int(struct.unpack_from(f"{field['order']}i", head, at)[0])
        if not 16 <= length <= end - at:
            _refuse(path, f"an extension must have from 16 to {end - at} bytes, got {length}")
        at += length
    _refuse(path, f"there must be at most {_MAX_EXTENSIONS} extensions, got more")


# ---- NRRD

_NRRD_BYTES = {
    **dict.fromkeys(("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), 2),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t", "uint", "unsigned int"), 4),
    **dict.fromkeys(("uint32", "uint32_t", "float"), 4),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "double"), 8),
    **dict.fromkeys(("signed long long int", "int64", "int64_t", "ulonglong", "unsigned long long"), 8),
    **dict.fromkeys(("unsigned long long int", "uint64", "uint64_t"), 8),
}
_NRRD_FIELDS = frozenset(
    re.findall(
        r"\w+",
        "dimension type encoding endian sizes spacings space spacedimension spacedirections "
        "spaceorigin spaceunits units kinds centers centerings labels thicknesses axismins "
        "axismaxs content number oldmin oldmax min max measurementframe sampleunits datafile "
        "lineskip byteskip",
    )
)
_NRRD_SPACES = (
    *("left-posterior-superior", "right-anterior-superior", "left-anterior-superior"),
    *("lps", "ras", "las"),
)
_NRRD_MM = frozenset(("mm", "millimeter", "millimeters", "millimetre", "millimetres", "none"))
_NRRD_WORDS = frozenset(("space", "kinds", "centers", "centerings"))


def _nrrd(path: Path, size: int) -> Header:
    with path.open("rb") as stream:
        lines, start = _nrrd_lines(path, stream, size)
        field = _nrrd_fields(path, lines)
        sizes = _integers(path, "sizes", field.get("sizes", ""))
        (count,) = _integers(path, "dimension", field.get("dimension", "0"), 1)
        if not 1 <= count <= 16 or count != len(sizes):
            _refuse(path, f"dimension must be that of sizes, {len(sizes)}, and at most 16, got {count}")
        voxels = _check_sizes(path, "sizes", sizes)
        each = _NRRD_BYTES.get(field.get("type", "").lower())
        if each is None:
            _refuse(path, f"type must be that of a number, got {shown(field.get('type', 'none'))}")
        _check_nrrd_space(path, field, count)
        if "datafile" not in field:
            if path.name.lower().endswith(".nhdr"):
                _refuse(path, "data file must name the file with the voxels")
            _check_nrrd_voxels(path, stream, start, size, field, voxels, each)
            return Header("NrrdImageIO", voxels * each)
    data, stamp = _beside(path, "data file", field["datafile"])
    with data.open("rb") as stream:
        _check_nrrd_voxels(path, stream, 0, stamp[2], field, voxels, each)
    return Header("NrrdImageIO", voxels * each, {str(data): stamp})


def _nrrd_lines(path: Path, stream: IO[bytes], size: int) -> tuple[list[bytes], int]:
    """Lines of a header and where it ends: an empty line, or the end of the file."""
    lines: list[bytes] = []
    for _ in range(_MAX_LINES):
        line = stream.readline(_MAX_HEADER)
        if stream.tell() > _MAX_HEADER:
            break
        line = line.rstrip(b"\r\n")
        if not line:
            if not lines or re.fullmatch(rb"NRRD000[1-5]", lines[0]) is None:
                _refuse(path, "not a NRRD file: it must begin with NRRD0001 to NRRD0005")
            return lines[1:], stream.tell()
        lines.append(line)
    _refuse(path, f"the header must have at most {_MAX_HEADER} bytes and {_MAX_LINES} lines")


def _nrrd_fields(path: Path, lines: Sequence[bytes]) -> dict[str, str]:
    field: dict[str, str] = {}
    for line in lines:
        if line.startswith(b"#") or (b":=" in line and b": " not in line.partition(b":=")[0]):
            continue  # comments, and keys that only mean something to whoever wrote them
        name, colon, value = line.partition(b":")
        key = name.decode("latin-1").replace(" ", "").lower()
        if not colon or key not in _NRRD_FIELDS:
            _refuse(path, f"the header must consist of NRRD's fields, got {_start(line)}")
        if key in field:
            _refuse(path, f"the field {key} must be given once")
        try:
            field[key] = value.decode("ascii" if key != "content" else "latin-1").strip()
        except UnicodeDecodeError:
            _refuse(path, f"the field {key} must be plain text, got {_start(value)}")
        if not field[key].replace("\t", " ").isprintable() and key != "content":
            _refuse(path, f"the field {key} must be plain text, got {_start(value)}")
        # readers copy words into buffers of their own, without asking how long they are
        if len(field[key]) > 2000 or max(map(len, field[key].split()), default=0) > 250:
            _refuse(path, f"the field {key} must be short, got {len(field[key])} characters")
        if key in _NRRD_WORDS and re.fullmatch(r"[\w?-]{1,40}(\s+[\w?-]{1,40})*", field[key]) is None:
            _refuse(path, f"the field {key} must consist of words, got {_start(value)}")
    return field


def _check_nrrd_space(path: Path, field: Mapping[str, str], count: int) -> None:
    """Check what says where voxels lie; "none" and "nan" stand for axes that lie nowhere."""
    space = field.get("space", "LPS")
    if space.lower() not in _NRRD_SPACES:  # readers take any other for LPS
        _refuse(path, f"space must be one of {', '.join(_NRRD_SPACES)}, got {shown(space)}")
    for name in ("space units", "units"):
        units = field.get(name.replace(" ", ""), "")
        if set(re.findall(r"\w+", units.lower())) - _NRRD_MM:
            _refuse(path, f"{name} must be mm, got {shown(units)}")
    _integers(path, "space dimension", field.get("spacedimension", "3"), 1)
    if "axismaxs" in field and "spacings" not in field:  # which readers do not work out from them
        _refuse(path, "spacings must be there where axis maxs are")
    if "spacings" in field:
        given = [float(v) for v in _floats(path, "spacings", field["spacings"], count)]
        _check_numbers(path, "spacings", given if count <= 3 else [v for v in given if v == v], 1e-9, 1e9)
    vector = r"\(\s*([^()]*)\)"
    if "spaceorigin" in field:
        match = re.fullmatch(vector, field["spaceorigin"])
        origin = _floats(path, "space origin", match[1].replace(",", " ") if match else "")
        _check_numbers(path, "space origin", origin, -1e9, 1e9)
    if "spacedirections" in field:
        axes = re.findall(rf"none|{vector}", field["spacedirections"])
        flat = count == 3 and "none" in field["spacedirections"]
        if flat or len(axes) != count or re.sub(rf"none|{vector}", "", field["spacedirections"]).strip():
            _refuse(path, f"space directions must be {count} vectors, got {shown(field['spacedirections'])}")
        for axis in filter(None, axes):
            numbers = _floats(path, "space directions", axis.replace(",", " "))
            _check_numbers(path, "space directions", [*numbers, math.hypot(*numbers)], -1e9, 1e9)
            if math.hypot(*numbers) < 1e-9:
                _refuse(path, f"space directions must differ from zero, got ({axis})")


def _check_nrrd_voxels(
    path: Path,
    stream: IO[bytes],
    start: int,
    size: int,
    field: Mapping[str, str],
    voxels: int,
    each: int,
) -> None:
    """Count the voxels from `start` on."""
    needed = voxels * each
    (lines,) = _integers(path, "line skip", field.get("lineskip", "0"), 1)
    (skip,) = _integers(path, "byte skip", field.get("byteskip", "0"), 1)
    coding = field.get("encoding", "").lower()
    if not 0 <= lines <= _MAX_LINES or not -1 <= skip <= size or ((lines or skip) and coding != "raw"):
        got = f"{lines} and {skip} ({shown(coding)})"
        _refuse(path, f"line skip and byte skip must lie in the file, got {got}")
    if each > 1 and coding in ("raw", "gzip", "gz") and field.get("endian") not in ("little", "big"):
        _refuse(path, f"endian must be little or big, got {shown(field.get('endian', 'none'))}")
    stream.seek(start)
    if coding == "raw":
        for _ in range(lines):
            if not stream.readline(_MAX_HEADER).endswith(b"\n"):
                _refuse(path, f"line skip must lie in the file, got {lines}")
        start = stream.tell() + max(skip, 0)
        _check_length(path, size, max(size, start + needed) if skip == -1 else start + needed)
    elif coding in ("gzip", "gz"):
        _check_growth(path, size - start, needed)
        try:
            with gzip.GzipFile(fileobj=stream) as unpacked:
                length = _unpacked_length(unpacked, 0, needed)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{name_of(path)}: damaged or truncated gzip data ({error})") from error
        _check_length(path, length, needed)
    elif coding == "hex":
        _check_digits(path, stream, 2 * needed)
    elif coding in ("ascii", "text", "txt"):
        _check_text(path, stream, voxels, field["type"], each)
    else:
        _refuse(path, f"encoding must be raw, gzip, ascii or hex, got {shown(coding or 'none')}")


def _check_digits(path: Path, stream: IO[bytes], needed: int) -> None:
    """Count hexadecimal digits between blanks."""
    count = 0
    while block := stream.read(_BLOCK):
        if re.fullmatch(rb"[0-9a-fA-F\s]*", block) is None:
            _refuse(path, "voxels in hex must be hexadecimal digits")
        count += sum(map(len, block.split()))
    if count != needed:
        _refuse(path, f"the header announces {needed} digits, got {count}")


def _check_text(path: Path, stream: IO[bytes], needed: int, kind: str, each: int) -> None:
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
        block = stream.read(_BLOCK)
        parts = (left + block).split()
        left = parts.pop() if block and parts and not block[-1:].isspace() else b""
        for part in parts:
            if form.fullmatch(part) is None or not (real or low <= int(part) <= high):
                _refuse(path, f"voxels in text must be numbers of type {kind}, got {_start(part)}")
        count += len(parts)
        if not block:
            break
        if len(left) > 100 or count > needed:
            break
    if count != needed:
        _refuse(path, f"the header announces {needed} numbers, got {count}{' or more' if block else ''}")


def _start(text: bytes) -> str:
    return ascii(text[:60].decode("latin-1"))


def _integers(path: Path, field: str, text: str, count: int | None = None) -> list[int]:
    parts = text.split()
    # 18 digits are below 2**63: what is longer, one parser or another would wrap
    if not all(re.fullmatch(r"[+-]?\d{1,18}", part) for part in parts) or count not in (None, len(parts)):
        _refuse(path, f"{field} must be {_how_many(count, 'integer')}, got {shown(text)}")
    return [int(part) for part in parts]


def _floats(path: Path, field: str, text: str, count: int | None = None) -> list[float]:
    parts = text.split()
    numbers = [number_of(part) for part in parts]
    # NaN is a value that some fields may have; whoever called looks at what it is
    odd = [part for part, number in zip(parts, numbers, strict=True) if number != number]
    if not parts or count not in (None, len(parts)) or not all(part.lower() == "nan" for part in odd):
        _refuse(path, f"{field} must be {_how_many(count, 'number')}, got {shown(text)}")
    return numbers


def _how_many(count: int | None, what: str) -> str:
    return f"a{'n' if what[0] == 'i' else ''} {what}" if count == 1 else f"{count or ''} {what}s".lstrip()


def _beside(path: Path, field: str, name: str) -> tuple[Path, Stamp]:
    """Find the data file that a header names, one plain name in the header's own folder; and stamp it."""
    plain = re.fullmatch(r"(\./)?[^\s/\\%:][^/\\%:]*", name) is not None
    if not plain or len(name) > 250 or name in (".", "..", "LIST") or name.startswith(("LIST ", "../")):
        _refuse(path, f"{field} must be the name of one file in the header's folder, got {shown(name)}")
    data = path.parent / name
    try:
        stamp = file_stamp(data)
    except (OSError, ValueError) as error:
        raise type(error)(
            f"{name_of(path)}: {field} must be a file in the header's folder: {error}"
        ) from None
    if data.resolve().parent != path.resolve().parent and data.resolve().parent != path.parent.resolve():
        _refuse(path, f"{field} must lie in the header's folder, {shown(name)} links to another")
    if stamp[:2] == file_stamp(path)[:2]:
        _refuse(path, f"{field} must be another file than the header, got {shown(name)}")
    return data, stamp


# ---- MetaImage

_META_BYTES = {
    **dict.fromkeys(("MET_CHAR", "MET_UCHAR"), 1),
    **dict.fromkeys(("MET_SHORT", "MET_USHORT"), 2),
    **dict.fromkeys(("MET_INT", "MET_UINT", "MET_FLOAT"), 4),
    **dict.fromkeys(("MET_LONG_LONG", "MET_ULONG_LONG", "MET_DOUBLE"), 8),
}
_META_NAMES = {
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
_META_SAME = (
    ("Offset", "Position", "Origin"),
    ("TransformMatrix", "Rotation", "Orientation"),
    ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"),
)
"""Names of one thing; a reader takes the one or the other."""
_META_AXES = frozenset(
    re.findall(
        r"\w+",
        "DimSize ElementSpacing ElementSize Offset Position Origin TransformMatrix Rotation Orientation "
        "CenterOfRotation",
    )
)
"""Fields of as many numbers as there are axes."""
_META_AS_IF = {"ElementToIntensityFunctionSlope": 1.0, "ElementToIntensityFunctionOffset": 0.0}
"""What readers ignore, and so must change nothing."""
_META_VALUE = 250
"""Longest value of a word: readers have buffers of 255, and look at no length."""


def _metaimage(path: Path, size: int) -> Header:
    with path.open("rb") as stream:
        field = _meta_fields(path, stream)
        start = stream.tell()
    if field.get("ObjectType", "Image") != "Image":
        _refuse(path, f"ObjectType must be Image, got {shown(field['ObjectType'])}")
    (count,) = _integers(path, "NDims", field.get("NDims", "0"), 1)
    if not 1 <= count <= 4:
        _refuse(path, f"NDims must be from 1 to 4, got {count}")
    sizes = _integers(path, "DimSize", field.get("DimSize", ""), count)
    (channels,) = _integers(path, "ElementNumberOfChannels", field.get("ElementNumberOfChannels", "1"), 1)
    if not 1 <= channels <= 16:
        _refuse(path, f"ElementNumberOfChannels must be from 1 to 16, got {channels}")
    voxels = _check_sizes(path, "DimSize", [*sizes, channels])
    each = _META_BYTES.get(field.get("ElementType", ""))
    if each is None:
        _refuse(
            path,
            f"ElementType must be one of {', '.join(_META_BYTES)}, got "
            f"{shown(field.get('ElementType', 'none'))}",
        )
    _check_meta_space(path, field, count)
    name = field.get("ElementDataFile", "")
    if name.upper() == "LOCAL":
        if name != "LOCAL":
            _refuse(path, f"ElementDataFile must be LOCAL or a file, got {shown(name)}")
        _check_meta_voxels(path, path, start, size, field, voxels, each)
        return Header("MetaImageIO", voxels * each)
    data, stamp = _beside(path, "ElementDataFile", name)
    _check_meta_voxels(path, data, 0, stamp[2], field, voxels, each)
    return Header("MetaImageIO", voxels * each, {str(data): stamp})


def _meta_fields(path: Path, stream: IO[bytes]) -> dict[str, str]:
    """Fields up to ElementDataFile, after which the voxels may follow."""
    field: dict[str, str] = {}
    for _ in range(_MAX_LINES):
        line = stream.readline(2000)
        match = re.fullmatch(
            rb"[ \t]*([A-Za-z0-9_][A-Za-z0-9_ .|-]{0,99}?)[ \t]*[=:][ \t]*(.*?)[ \t\r]*\n?", line
        )
        if match is None or len(line) > 1500 or b"\0" in line or not line.endswith((b"\n", match[2])):
            _refuse(path, f"not a MetaImage header: a line must be Key = Value, got {_start(line)}")
        key = match[1].decode()
        if len(match[2]) > _META_VALUE and key.isalpha():
            _refuse(path, f"{key} must have at most {_META_VALUE} characters, got {len(match[2])}")
        known = _META_NAMES.get(key.lower())
        if known is None:  # whatever the writer wanted to keep
            continue
        if key != known or known in field:
            _refuse(path, f"the field {known} must be given once, and so spelled, got {shown(key)}")
        try:
            field[known] = match[2].decode("ascii")
        except UnicodeDecodeError:
            _refuse(path, f"{known} must be plain text, got {_start(match[2])}")
        if known in _META_AXES and "NDims" not in field:
            _refuse(path, f"NDims must come before {known}")
        if "%" in field[known] or not field[known].isprintable():
            _refuse(path, f"{known} must be plain text without formats, got {_start(match[2])}")
        if known == "ElementDataFile":
            return field
    _refuse(path, f"not a MetaImage header: ElementDataFile must be among the first {_MAX_LINES} lines")


def _check_meta_space(path: Path, field: Mapping[str, str], count: int) -> None:
    for name in ("ElementSpacing", "ElementSize"):
        if name in field:
            _check_numbers(path, name, _floats(path, name, field[name], count), 1e-9, 1e9)
    for name in ("Offset", "Position", "Origin", "CenterOfRotation"):
        if name in field:
            _check_numbers(path, name, _floats(path, name, field[name], count), -1e9, 1e9)
    for name in ("TransformMatrix", "Rotation", "Orientation"):
        if name in field:
            numbers = _floats(path, name, field[name], count * count)
            _check_numbers(path, name, numbers, -2, 2)
            if count == 3 and abs(_determinant(numbers)) < 1e-3:
                _refuse(path, f"{name} must be three axes that differ, got {shown(field[name])}")
    for names in _META_SAME:
        given = [name for name in names if name in field]
        if len(given) > 1:
            _refuse(path, f"{given[0]} and {given[1]} are the same, which must be given once")
    for name, idle in _META_AS_IF.items():
        if name in field and _floats(path, name, field[name], 1) != [idle]:
            _refuse(path, f"{name} must be {idle:g}, got {shown(field[name])}")
    if field.get("DistanceUnits", "mm") not in ("mm", "?"):
        _refuse(path, f"DistanceUnits must be mm, got {shown(field['DistanceUnits'])}")


def _flag(path: Path, field: Mapping[str, str], name: str, otherwise: bool = False) -> bool:
    text = field.get(name, str(otherwise)).lower()
    if text not in ("true", "false"):
        _refuse(path, f"{name} must be True or False, got {shown(field[name])}")
    return text == "true"


def _check_meta_voxels(
    path: Path, data: Path, start: int, size: int, field: Mapping[str, str], voxels: int, each: int
) -> None:
    """Count the voxels in `data` from `start` on."""
    needed = voxels * each
    for name in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"):
        _flag(path, field, name)
    (skip,) = _integers(path, "HeaderSize", field.get("HeaderSize", "0"), 1)
    packed = _flag(path, field, "CompressedData")
    text = not _flag(path, field, "BinaryData", True)
    if not -1 <= skip <= size or (skip and (packed or text or data == path)):
        _refuse(path, f"HeaderSize must lie in an uncompressed file beside the header, got {skip}")
    if packed and text:
        _refuse(path, "BinaryData must be True where CompressedData is")
    with data.open("rb") as stream:
        if text and size:
            stream.seek(size - 1)
            if not stream.read(1).isspace():  # readers refuse the last number, and do not say so
                _refuse(path, "voxels in text must end with a blank or a new line")
        stream.seek(start)
        if text:
            _check_text(path, stream, voxels, field["ElementType"], each)
        elif packed:
            (told,) = _integers(path, "CompressedDataSize", field.get("CompressedDataSize", "0"), 1)
            # without it after a header, readers return whatever lay in memory
            if start + told != size and (told or data == path):
                _refuse(path, f"CompressedDataSize must be {size - start}, got {told}")
            _check_growth(path, size - start, needed)
            _check_length(path, _inflated_length(path, stream, needed), needed)
        else:
            start += max(skip, 0)
            _check_length(path, size, max(size, start + needed) if skip == -1 else start + needed)


def _inflated_length(path: Path, stream: IO[bytes], needed: int) -> int:
    """Bytes of a zlib or gzip stream to its end, no more than one above `needed`."""
    unpack, length = zlib.decompressobj(47), 0
    try:
        while not unpack.eof and length <= needed:
            block = unpack.unconsumed_tail or stream.read(_BLOCK)
            if not block:
                raise EOFError("it ends early")
            length += len(unpack.decompress(block, min(_BLOCK * 4, needed + 1 - length)))
        if length <= needed and (unpack.unused_data or stream.read(1)):
            _refuse(path, "bytes follow the compressed voxels")
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{name_of(path)}: damaged or truncated compressed data ({error})") from error
    return length
