"""Files that are damaged, or made to do harm: each is read as an independent reader reads it, or refused.

Never a crash, a hang, memory without bound, or voxels that were in no file. Mutants are made here, from valid
files that this module writes; what they should hold is told by nibabel, pydicom, and a few lines of NumPy.
"""

from __future__ import annotations

import csv
import gzip
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.testing import assert_allclose, assert_array_equal

from lesionsynth import io
from lesionsynth.io import checks, child, dicom_folders, elements, find_sources, read
from lesionsynth.strict import name_of
from normnet.prepare.__main__ import main
from tests import classical
from tests.hostile.bounds import at_once
from tests.hostile.tally import trial
from tests.normnet.test_wrong_input import good  # noqa: F401  (a fixture)
from tests.test_dicom_series import recode
from tests.test_io import volume, write_nifti, write_series

pytestmark = pytest.mark.filterwarnings("ignore:.*taking (voxels to be 1 mm|axes to run)")

SHAPE = (4, 5, 6)
MUTANTS = 250
MEBIBYTES = 64
"""Of a scan: one of 27 million voxels takes 52."""
HEADER_TEXT = {".nrrd": b"\n\n", ".nhdr": b"\n\n", ".mha": b"LOCAL\n", ".mhd": b".raw\n"}
TOKENS = [
    b"", b"0", b"-1", b"1", b"2", b"7", b"nan", b"inf", b"-inf", b"1e300", b"1e-300", b"99999", b"4294967296",
    b"9223372036854775807", b"18446744073709551616", b"%s%n", b"%d", b"LIST", b"LOCAL", b"raw",
    b"True", b"/etc/passwd", b"http://localhost/x", b"\xff\xfe", b"A" * 5000, b"short", b"MET_DOUBLE",
    b"gzip", b"../scan.raw", b"big", b"ascii",
]  # fmt: skip
NUMBERS = [0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1]


def write(path: Path, packed: bool = False) -> np.ndarray:
    """Write a valid file of the suffix's format; returns its voxels, in file order (z, y, x)."""
    hu = volume(3, SHAPE)
    if path.suffix == "":
        write_series(path, hu)
    elif path.name.endswith((".nii", ".nii.gz")):
        write_nifti(path, hu)
    else:
        image = sitk.GetImageFromArray(hu)
        image.SetSpacing((0.9, 0.7, 2.5))
        sitk.WriteImage(image, str(path), useCompression=packed)
    return hu


def fields(data: bytes) -> dict[str, str]:
    """Fields of a text header, as an honest writer means them."""
    pairs = (re.split(r"\s*[:=]\s*", line, maxsplit=1) for line in data.decode("latin-1").splitlines())
    return {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}


def oracle(path: Path) -> np.ndarray:
    """Voxels by a reader that shares nothing with the one that is tested; raises where it cannot tell."""
    if path.is_dir():
        slices = [pydicom.dcmread(p) for p in sorted(path.iterdir())]
        slices.sort(key=lambda s: float(s.ImagePositionPatient[2]))
        planes = [
            s.pixel_array * float(s.get("RescaleSlope", 1)) + float(s.get("RescaleIntercept", 0))
            for s in slices
        ]
        return np.stack(planes)
    if path.name.endswith((".nii", ".nii.gz")):
        return np.asarray(nib.load(path).dataobj).T
    data = path.read_bytes()
    mark = HEADER_TEXT[path.suffix]
    end = data.index(mark) + len(mark) if mark in data else len(data)
    field, body = fields(data[:end]), data[end:]
    nrrd = "sizes" in field
    if beside := field.get("data file") or (path.suffix == ".mhd" and field["ElementDataFile"]):
        body = (path.parent / beside).read_bytes()
    big = field.get("endian") == "big" if nrrd else field.get("BinaryDataByteOrderMSB", "").lower() == "true"
    kinds = {"short": "i2", "ushort": "u2", "MET_SHORT": "i2", "MET_USHORT": "u2", "unsigned short": "u2"}
    kind = (">" if big else "<") + kinds[field["type" if nrrd else "ElementType"]]
    if field.get("encoding") == "gzip" or field.get("CompressedData", "").lower() == "true":
        body = zlib.decompress(body, 47)
    sizes = [int(n) for n in field["sizes" if nrrd else "DimSize"].split()]
    return np.frombuffer(body, kind).reshape(sizes[::-1])


def stored(ct: io.Scan) -> np.ndarray:
    return ct.grid.from_lps(ct.hu)


def reads_or_refuses(path: Path, truth: np.ndarray) -> bool:
    """Read; True where voxels came: those of the oracle, or the ones from before the mutation."""
    name = name_of(path.name)
    try:
        with at_once(MEBIBYTES), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ct = io.read_ct(path)
    except (ValueError, OSError) as error:
        said = str(error)
        if name in said and "crashed" not in said and said.isprintable() and len(said) < 1000:
            return False
        raise
    got = stored(ct)
    if got.shape == truth.shape and (got == truth).all():
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.clip(np.rint(np.asarray(oracle(path), float)), io.AIR_HU, 32767)
    assert_array_equal(got, expected)
    return True


def mutate(data: bytes, rng: np.random.Generator, header: int) -> bytes:
    """Change a few bytes, most often in the header, or the length."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, min(header, len(out)) if rng.random() < 0.8 else len(out)))
        kind = int(rng.integers(0, 7))
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            out[at] = int(rng.integers(0, 256))
        elif kind == 2:
            width = int(rng.choice([1, 2, 4]))
            order = "little" if rng.random() < 0.8 else "big"
            number = int(rng.choice(NUMBERS)) % 256**width
            out[at : at + width] = number.to_bytes(width, order)
        elif kind == 3:
            out = out[: int(rng.integers(0, len(out)))]
        elif kind == 4:
            out[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 5:
            del out[at : at + int(rng.integers(1, 9))]
        else:
            first = int(rng.integers(0, len(out)))
            out[at:at] = out[first : first + int(rng.integers(1, 40))]
        if not out:
            break
    return bytes(out)


def mutate_text(data: bytes, rng: np.random.Generator, header: int) -> bytes:
    """Change a value, a line, or bytes."""
    if rng.random() < 0.3:
        return mutate(data, rng, header)
    lines = data[:header].split(b"\n")
    at = int(rng.integers(0, len(lines)))
    token = TOKENS[int(rng.integers(0, len(TOKENS)))]
    kind = int(rng.integers(0, 5))
    if kind == 0:
        lines.insert(at, lines[int(rng.integers(0, len(lines)))])
    elif kind == 1:
        del lines[at]
    elif kind == 2:
        key = re.match(rb"[^:=]*[:=]+ ?", lines[at])
        lines[at] = (key[0] if key else b"") + token
    elif kind == 3:
        words = lines[at].split(b" ")
        words[int(rng.integers(0, len(words)))] = token
        lines[at] = b" ".join(words)
    else:
        lines.insert(at, token + b": " + token)
    return b"\n".join(lines) + data[header:]


FORMATS = [".nii", ".nii.gz", ".nrrd", ".nrrd+", ".nhdr", ".mha", ".mha+", ".mhd", "dicom"]


def mutants(folder: Path, form: str, count: int, seed: int) -> Iterator[tuple[Path, np.ndarray]]:
    rng = np.random.default_rng(seed)
    packed, suffix = form.endswith("+"), form.removesuffix("+")
    path = folder / ("series" if form == "dicom" else f"scan{suffix}")
    truth = write(path, packed)
    changed = path / "002.dcm" if form == "dicom" else path
    data = changed.read_bytes()
    inner = gzip.decompress(data) if suffix == ".nii.gz" else data
    if form == "dicom":
        header = len(data) - 60
    else:
        header = (
            352
            if ".nii" in suffix
            else (data + HEADER_TEXT[suffix]).index(HEADER_TEXT[suffix]) + len(HEADER_TEXT[suffix])
        )
    for number in range(count):
        change = mutate_text if suffix in HEADER_TEXT else mutate
        if suffix != ".nii.gz":
            new = change(data, rng, header)
        elif number % 4:
            new = gzip.compress(change(inner, rng, header), 1)
        else:
            new = change(data, rng, len(data))
        changed.write_bytes(new)
        yield path, truth


def check_mutants(folder: Path, form: str, count: int, seed: int) -> None:
    read = 0
    for path, truth in mutants(folder, form, count, seed):
        with trial("readers"):
            read += reads_or_refuses(path, truth)
    assert read < count  # mutations that harm nothing would test nothing


@pytest.mark.parametrize("form", FORMATS)
def test_mutants(tmp_path: Path, form: str) -> None:
    check_mutants(tmp_path, form, MUTANTS, seed=FORMATS.index(form))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_more_mutants(tmp_path: Path, form: str) -> None:
    check_mutants(tmp_path, form, 4000, seed=1000 + FORMATS.index(form))


# ---- what was found by others: each kind by several examples


def refused(path: Path, *parts: str) -> None:
    """Refused at once, in one line that names the file, with little memory."""
    with trial("readers"):
        with at_once(MEBIBYTES), pytest.raises((ValueError, OSError)) as caught:
            io.read_ct(path)
        said = str(caught.value)
        assert name_of(path.name) in said
        assert "crashed" not in said
        for part in parts:
            assert part in said, said


META = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
    "CompressedData = False\n"
    "ElementSpacing = 1 1 1\nDimSize = 6 5 4\nElementType = MET_SHORT\nElementDataFile = {}\n"
)
NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 6 5 4\nendian: little\nencoding: raw\n{}\n"
NAMES = [
    "%s%n",
    "%s%s%s%s%s",
    "scan%03d.raw 1 4 1",
    "LIST",
    "LIST 3",
    "/etc/passwd",
    "../outside.raw",
    "inside/../../outside.raw",
    "link.raw",
    "http://localhost/voxels.raw",
    "file:///etc/passwd",
    ".",
    "..",
    "",
    "folder",
    "pipe",
    "/dev/zero",
    "gone.raw",
    "itself",
    "A" * 300,
    "C:\\voxels.raw",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".mhd", ".mha", ".nhdr", ".nrrd"])
def test_headers_name_files_of_their_own_folder(tmp_path: Path, name: str, suffix: str) -> None:
    """... and none of those has voxels: "outside.raw" has, which a reader that follows names shows."""
    folder = tmp_path / "in"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "outside.raw").write_bytes(volume(0, SHAPE).tobytes())
    (folder / "link.raw").symlink_to(tmp_path / "outside.raw")
    os.mkfifo(folder / "pipe")
    path = folder / f"scan{suffix}"
    name = path.name if name == "itself" else name
    text = META.format(name) if suffix[1] == "m" else NRRD.format(f"data file: {name}\n")
    path.write_text(text)
    refused(path)


def test_files_of_the_headers_folder_are_read(tmp_path: Path) -> None:
    hu = volume(0, SHAPE)
    (tmp_path / "voxels of A.raw").write_bytes(hu.tobytes())
    (tmp_path / "a.mhd").write_text(META.format("voxels of A.raw"))
    (tmp_path / "a.nhdr").write_text(NRRD.format("data file: ./voxels of A.raw\n"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/linked.mhd").symlink_to(tmp_path / "a.mhd")
    for name in ("a.mhd", "a.nhdr"):
        with trial("readers"):
            assert_array_equal(stored(io.read_ct(tmp_path / name)), hu)
    refused(tmp_path / "elsewhere/linked.mhd")  # or read from where the header really lies; never from here


def huge(path: Path, sizes: tuple[int, int, int], body: bytes = b"\0" * 1000) -> None:
    """Write a small file whose header asks for many voxels."""
    shape = " ".join(map(str, sizes))
    if ".nii" in path.name:
        header = nib.Nifti1Header()
        header.set_data_dtype(np.int16)
        header["dim"] = [3, *sizes, 1, 1, 1, 1]
        header["vox_offset"], header["magic"] = 352, b"n+1"
        data = header.binaryblock + bytes(4) + body
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    elif path.suffix == ".mha":
        path.write_bytes(META.format("LOCAL").replace("6 5 4", shape).encode() + body)
    else:
        coding = "gzip" if path.stem == "packed" else "raw"
        text = NRRD.format("").replace("6 5 4", shape).replace("raw", coding)
        path.write_bytes(text.encode() + (gzip.compress(body) if coding == "gzip" else body))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "packed.nrrd", "a.mha"])
@pytest.mark.parametrize(
    "sizes", [(1500, 1500, 1500), (1000, 1000, 1000), (32767, 32767, 32767), (300, 300, 300)]
)
def test_large_headers_over_small_files(tmp_path: Path, name: str, sizes: tuple[int, int, int]) -> None:
    huge(tmp_path / name, sizes)
    refused(tmp_path / name, *(["at most 2147483648 voxels"] if sizes[0] > 1290 else []))


@pytest.mark.parametrize("name", ["a.nii.gz", "packed.nrrd"])
def test_bombs(tmp_path: Path, name: str) -> None:
    """Eight gigabytes behind a header of 120 voxels: unpacking stops where the header says that it ends."""
    huge(tmp_path / name, (6, 5, 4))
    block = gzip.compress(bytes(1 << 24), 9)
    with (tmp_path / name).open("ab") as stream:
        for _ in range(512):
            stream.write(block)
    refused_unread(tmp_path / name)
    huge(tmp_path / name, (6, 5, 4), np.random.default_rng(0).bytes(1 << 23))  # in one stream
    refused_unread(tmp_path / name)


def refused_unread(path: Path) -> None:
    """Refused after a block or so of eight MiB."""
    before = bytes_read()
    refused(path)
    assert bytes_read() - before < 2**21


def bytes_read() -> int:
    """Bytes that this process has read, of whatever file."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("this system does not count them")
    return int(counters.read_text().split()[1])


def test_room_for_the_largest_ct() -> None:
    assert 2000 * 1024 * 1024 <= checks.MAX_VOXELS < 1500**3


@pytest.mark.parametrize("bits", [0, 1, 8, 15, 17, 32, -16])
def test_nifti_bits(tmp_path: Path, bits: int) -> None:
    write(tmp_path / "a.nii")
    data = bytearray((tmp_path / "a.nii").read_bytes())
    data[72:74] = bits.to_bytes(2, "little", signed=True)
    (tmp_path / "a.nii").write_bytes(data)
    refused(tmp_path / "a.nii", "bitpix must be 16 for datatype 4", f"got {bits}")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-1", "1e300", "1e-30"])
@pytest.mark.parametrize("name", ["a.nii", "a.nrrd", "a.mha"])
def test_spacing_is_a_length(tmp_path: Path, name: str, value: str) -> None:
    path = tmp_path / name
    write(path)
    data = path.read_bytes()
    if name == "a.nii":
        number = np.float64(value).astype("<f4") if value != "1e300" else np.float32(3e38)
        data = data[:84] + np.float32(number).tobytes() + data[88:]
    elif name == "a.nrrd":
        data = re.sub(rb"space directions: .*", b"spacings: 1 1 " + value.encode(), data)
        data = re.sub(rb"space origin: .*\n|space: .*\n", b"", data)
    else:
        data = re.sub(rb"ElementSpacing = .*", b"ElementSpacing = 1 1 " + value.encode(), data)
    path.write_bytes(data)
    refused(path, "p")


# ---- DICOM


def series_of(folder: Path, **changes: object) -> np.ndarray:
    hu = volume(1, (5, 6, 8))
    write_series(folder, hu, **changes)
    return hu


def element(tag: int, kind: bytes, value: bytes) -> bytes:
    long = kind in (b"SQ", b"UN", b"OB", b"OW")
    length = len(value).to_bytes(4, "little") if long else len(value).to_bytes(2, "little")
    return (
        (tag >> 16).to_bytes(2, "little")
        + (tag & 0xFFFF).to_bytes(2, "little")
        + kind
        + b"\0\0" * long
        + length
        + value
    )


def insert(path: Path, data: bytes) -> None:
    """Put elements in front of the pixels."""
    whole = path.read_bytes()
    at = whole.rindex(b"\xe0\x7f\x10\x00O")
    path.write_bytes(whole[:at] + data + whole[at:])


UNDEFINED = b"\xff\xff\xff\xff"


@pytest.mark.parametrize("depth", [33, 1000, 20_000])
@pytest.mark.parametrize("kind", ["undefined", "unknown", "open"])
def test_nested_sequences(tmp_path: Path, depth: int, kind: str) -> None:
    series_of(tmp_path / "s")
    letters = b"UN" if kind == "unknown" else b"SQ"
    opened = b"\x29\x00\x10\x10" + letters + b"\0\0" + UNDEFINED + b"\xfe\xff\x00\xe0" + UNDEFINED
    if kind == "unknown":  # implicit inside
        inner = b"\x29\x00\x10\x10" + UNDEFINED + b"\xfe\xff\x00\xe0" + UNDEFINED
        opened = opened + inner * (depth - 1)
    else:
        opened *= depth
    closed = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    insert(tmp_path / "s/001.dcm", opened + closed * (depth if kind != "open" else 0))
    with (
        trial("readers"),
        pytest.raises(ValueError, match=r"001\.dcm: sequences must be nested at most 32 deep"),
    ):
        io.read_ct(tmp_path / "s")
    assert "32 deep" in io.list_series(tmp_path / "s")[0].problem


def test_nested_sequences_with_lengths(tmp_path: Path) -> None:
    series_of(tmp_path / "s")
    value = b""
    for _ in range(3000):
        value = element(0x00291010, b"SQ", b"\xfe\xff\x00\xe0" + len(value).to_bytes(4, "little") + value)
    insert(tmp_path / "s/001.dcm", value)
    with trial("readers"), pytest.raises(ValueError, match="32 deep"):
        io.read_ct(tmp_path / "s")


def test_sequences_of_a_usual_depth_are_read(tmp_path: Path) -> None:
    hu = series_of(tmp_path / "s")
    value = b""
    for _ in range(12):
        value = element(0x00291010, b"SQ", b"\xfe\xff\x00\xe0" + len(value).to_bytes(4, "little") + value)
    insert(tmp_path / "s/001.dcm", value)
    with trial("readers"):
        assert_array_equal(io.read_ct(tmp_path / "s").hu, hu)


@pytest.mark.parametrize("cut", [1, 2, 40, 95, 96, 100, 200, 300, 500])
@pytest.mark.parametrize("which", ["000.dcm", "004.dcm"])
def test_short_pixels_are_no_heap_memory(tmp_path: Path, cut: int, which: str) -> None:
    """Of a file cut anywhere, and of one whose length field was adapted."""
    series_of(tmp_path / "s")
    path = tmp_path / "s" / which
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with trial("readers"), pytest.raises(ValueError, match=rf"{which}: truncated"):
        io.read_ct(tmp_path / "s")
    if cut < 96 and cut % 2 == 0:
        at = whole.rindex(b"\xe0\x7f\x10\x00OW") + 8
        path.write_bytes(whole[:at] + (96 - cut).to_bytes(4, "little") + whole[at + 4 : -cut])
        with (
            trial("readers"),
            pytest.raises(ValueError, match=rf"{which}: truncated: PixelData must have 96 bytes"),
        ):
            io.read_ct(tmp_path / "s")


@pytest.mark.parametrize(
    "changes",
    [
        {"Rows": 7},
        {"Columns": 9},
        {"Rows": 65535, "Columns": 65535},
        {"Rows": None},
        {"BitsAllocated": 12},
        {"BitsAllocated": 64},
        {"BitsStored": 17},
        {"HighBit": 31},
        {"NumberOfFrames": 0},
        {"NumberOfFrames": 3},
        {"SamplesPerPixel": 3},
        {"PhotometricInterpretation": "RGB"},
        {"PixelSpacing": None},
        {"PixelSpacing": ["0", "1"]},
        {"PixelSpacing": ["-1", "1"]},
        {"PixelSpacing": ["1e300", "1"]},
        {"ImagePositionPatient": ["1e300", "0", "0"]},
        {"ImageOrientationPatient": ["0", "0", "0", "0", "0", "0"]},
        {"RescaleSlope": "0"},
        {"PixelData": b""},
    ],
)
def test_dicom_fields(tmp_path: Path, changes: dict[str, object]) -> None:
    series_of(tmp_path / "s")
    data = pydicom.dcmread(tmp_path / "s/001.dcm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in changes.items():
            setattr(data, name, value)
        data.save_as(tmp_path / "s/001.dcm")
    with trial("readers"), pytest.raises(ValueError, match=r"001\.dcm: |/s: "):
        io.read_ct(tmp_path / "s")


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "1_0", "x"])
@pytest.mark.parametrize("tag", [b"\x28\x00\x52\x10DS", b"\x28\x00\x53\x10DS"])
def test_dicom_scales(tmp_path: Path, value: str, tag: bytes) -> None:
    """Written byte by byte, as pydicom writes numbers alone."""
    series_of(tmp_path / "s")
    path = tmp_path / "s/001.dcm"
    data = path.read_bytes()
    at = data.index(tag)
    text = value.ljust(len(value) + len(value) % 2).encode()
    old = int.from_bytes(data[at + 6 : at + 8], "little")
    path.write_bytes(data[: at + 6] + len(text).to_bytes(2, "little") + text + data[at + 8 + old :])
    with trial("readers"), pytest.raises(ValueError, match=r"001\.dcm: Rescale.* must be a number"):
        io.read_ct(tmp_path / "s")


SYNTAXES = ["ImplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian", "RLELossless"]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_transfer_syntaxes(tmp_path: Path, syntax: str) -> None:
    """Each is read, and each mutant of it read or refused."""
    hu = volume(1, (5, 64, 64))
    write_series(tmp_path / "s", hu)
    for path in (tmp_path / "s").iterdir():
        recode(path, syntax)
    with trial("readers"):
        assert_array_equal(io.read_ct(tmp_path / "s").hu, hu)
    rng = np.random.default_rng(5)
    path = tmp_path / "s/001.dcm"
    whole = path.read_bytes()
    for _ in range(120):
        path.write_bytes(mutate(whole, rng, len(whole)))
        with trial("readers"):
            reads_or_refuses(tmp_path / "s", hu)


def test_slices_of_several_scales(tmp_path: Path) -> None:
    """Whole numbers in the first slice, none in the others: nothing is cut off."""
    series_of(tmp_path / "s")
    for z, slope in enumerate((1, 0.5, 0.3, 2, 0.7)):
        data = pydicom.dcmread(tmp_path / f"s/{z:03d}.dcm")
        data.RescaleSlope = slope
        data.save_as(tmp_path / f"s/{z:03d}.dcm")
    with trial("readers"):
        expected = np.clip(np.rint(oracle(tmp_path / "s")), -1024, None)
        assert_array_equal(io.read_ct(tmp_path / "s").hu, expected)


@pytest.mark.parametrize(
    "junk", [b"", b"text", bytes(1000), b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 99]
)
def test_a_damaged_slice_is_not_left_out(tmp_path: Path, junk: bytes) -> None:
    """The last of a series, so that no gap tells."""
    series_of(tmp_path / "s")
    (tmp_path / "s/005.dcm").write_bytes(junk)
    with trial("readers"), pytest.raises(ValueError, match=r"005\.dcm: .*may be a slice"):
        io.read_ct(tmp_path / "s")
    (info,) = io.list_series(tmp_path / "s")
    assert "005.dcm" in info.problem
    (tmp_path / "s/005.dcm").rename(tmp_path / "s/DICOMDIR")  # lists files, and is no slice
    with trial("readers"):
        assert io.read_ct(tmp_path / "s").hu.shape == (5, 6, 8)


# ---- names, and things that are no files

ODD_NAMES = [
    b"\xff\xfe.nii.gz",
    b"a\nb.nii",
    b"\x1b[31mred.nrrd",
    b"%s%n%x.mha",
    b" .nii",
    "ä €.nii.gz".encode(),
    b"\xe4.mhd",
]
ODD_NAMES += [b"L" * 251 + b".nii", "\u202egnp.nii".encode(), b"a%b.nhdr", b"'\";$(x)&.nii"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_read(tmp_path: Path, name: bytes) -> None:
    plain = tmp_path / f"plain{os.path.splitext(os.fsdecode(name))[1]}"
    plain = tmp_path / "plain.nii.gz" if name.endswith(b".nii.gz") else plain
    hu = write(plain)
    path = tmp_path / os.fsdecode(name)
    plain.rename(path)
    with trial("readers"):
        ct = io.read_ct(path)
        assert_array_equal(stored(ct), hu)
        ct.name.encode()  # a name for results
    path.write_bytes(path.read_bytes()[:30])
    refused(path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        io.read_ct(path)
    assert str(caught.value).isprintable()
    str(caught.value).encode()


def test_odd_names_of_dicom(tmp_path: Path) -> None:
    hu = series_of(tmp_path / "s", names=[os.fsdecode(b"\xff%d\n.dcm" % z) for z in range(5)])
    folder = tmp_path / os.fsdecode(b"\xfe%n\n")
    (tmp_path / "s").rename(folder)
    with trial("readers"):
        assert_array_equal(io.read_ct(folder).hu, hu)
        assert_array_equal(io.read_ct(next(folder.iterdir())).hu, hu)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mhd", "a.dcm"])
def test_things_that_are_no_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    refused(path, "regular file", "pipe")
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        refused(path, "regular file", "socket")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(path, "regular file", "device")
    path.unlink()
    path.symlink_to(path)
    refused(path)
    path.unlink()
    path.mkdir()
    refused(path)
    path.rmdir()
    path.touch()
    refused(path)
    path.unlink()
    refused(path)
    refused(tmp_path / ("x" * 300 + name))


# ---- the process that reads


def reader_pid() -> int:
    assert child._state.process is not None
    return child._state.process._child.pid


def test_a_crash_costs_one_file(tmp_path: Path) -> None:
    """What the checks do not know yet: here they are passed by, and native code meets the file."""
    hu = write(tmp_path / "good.nrrd")
    series_of(tmp_path / "s")
    opened = b"\x29\x00\x10\x10SQ\0\0" + UNDEFINED + b"\xfe\xff\x00\xe0" + UNDEFINED
    insert(tmp_path / "s/001.dcm", opened * 20_000)
    with trial("readers"):
        with pytest.raises(RuntimeError, match=r"the reader crashed on it \(SIGSEGV\)"):
            child.read("GDCMImageIO", [str(tmp_path / "s/001.dcm")], 1000)
        assert_array_equal(stored(io.read_ct(tmp_path / "good.nrrd")), hu)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_process_that_was_killed_is_started_anew(tmp_path: Path, sent: signal.Signals) -> None:
    hu = write(tmp_path / "good.nrrd")
    io.read_ct(tmp_path / "good.nrrd")
    os.kill(reader_pid(), sent)
    with trial("readers"):
        with pytest.raises(
            ValueError, match=rf"good\.nrrd: unreadable: the reader crashed on it \({sent.name}\)"
        ):
            io.read_ct(tmp_path / "good.nrrd")
        assert_array_equal(stored(io.read_ct(tmp_path / "good.nrrd")), hu)
    first = reader_pid()
    io.read_ct(tmp_path / "good.nrrd")
    assert reader_pid() == first  # one process for all


def test_time_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named pipe stands for a disk that never answers."""
    os.mkfifo(tmp_path / "a.nrrd")
    monkeypatch.setattr(child, "_SECONDS", 1)
    with trial("readers"), pytest.raises(RuntimeError, match="takes longer than 1 seconds"):
        child.read("NrrdImageIO", [str(tmp_path / "a.nrrd")], 1000)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Native code that asks for more than the header that was checked gets an error."""
    huge(tmp_path / "a.nrrd", (1500, 1500, 1200))
    with trial("readers"), pytest.raises(RuntimeError):
        child.read("NrrdImageIO", [str(tmp_path / "a.nrrd")], 1000)


def test_a_file_that_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.nrrd")
    read = child.read

    def slow(*given: object) -> object:
        image = read(*given)
        os.utime(tmp_path / "a.nrrd", (1, 1))
        return image

    monkeypatch.setattr(child, "read", slow)
    refused(tmp_path / "a.nrrd", "must not change while it is read")


SCRIPT = """
import os, sys
sys.path[:] = {path!r}
import lesionsynth.io as io
from lesionsynth.io import child
{body}
"""


def script(folder: Path, body: str) -> Path:
    (folder / "script.py").write_text(SCRIPT.format(path=sys.path, body=body))
    return folder / "script.py"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(0)", "pass", "os.abort()"])
def test_no_process_is_left(tmp_path: Path, end: str) -> None:
    """However the one that asked ended; and a script needs no guard of its main part."""
    write(tmp_path / "a.nrrd")
    path = str(tmp_path / "a.nrrd")
    body = f"io.read_ct({path!r}); print(child._state.process._child.pid, flush=True); {end}"
    done = subprocess.run(
        [sys.executable, script(tmp_path, body)], capture_output=True, text=True, timeout=60
    )
    with trial("readers"):
        assert end != "pass" or (done.returncode, done.stderr) == (0, "")
        pid, until = int(done.stdout), time.monotonic() + 10
        while is_running(pid) and time.monotonic() < until:
            time.sleep(0.02)
        assert not is_running(pid)


def test_closed_standard_streams(tmp_path: Path) -> None:
    hu = write(tmp_path / "a.nrrd")
    body = (
        f"for _ in range(2): ct = io.read_ct({str(tmp_path / 'a.nrrd')!r})\n"
        f"open({str(tmp_path / 'sum')!r}, 'w').write(str(int(ct.hu.astype(int).sum())))"
    )
    with trial("readers"):
        command = f"exec {sys.executable} {script(tmp_path, body)} <&- >&- 2>&-"
        assert subprocess.run(["sh", "-c", command], timeout=60).returncode == 0
        assert int((tmp_path / "sum").read_text()) == int(hu.astype(int).sum())


FORKS = """
import multiprocessing, threading
def work(kind):
    assert io.read_ct({file!r}).hu.sum() == {total}
    queue.put(child._state.process._child.pid)
work_in = lambda kind: work(kind)
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
work(0)
ones = [context.Process(target=work_in, args=(n,), daemon=True) for n in range(3)]
for one in ones: one.start()
for one in ones: one.join(); assert one.exitcode == 0
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for one in threads: one.start()
for one in threads: one.join()
pids = [queue.get() for _ in range(8)]
assert len(set(pids)) == 4 and pids[4:] == [pids[0]] * 4, pids
"""
# each process has a reader of its own, and threads share it


def test_daemons_that_were_forked_and_threads(tmp_path: Path) -> None:
    """As a DataLoader's workers are."""
    hu = write(tmp_path / "a.nrrd")
    body = FORKS.format(file=str(tmp_path / "a.nrrd"), total=int(hu.astype(int).sum()))
    with trial("readers"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", script(tmp_path, body)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""


def test_in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hu = write(tmp_path / "a.nrrd")
    series = series_of(tmp_path / "s")
    monkeypatch.setenv(child.IN_PROCESS, "1")
    monkeypatch.setattr(child._state, "process", None)
    with trial("readers"):
        assert_array_equal(stored(io.read_ct(tmp_path / "a.nrrd")), hu)
        assert_array_equal(io.read_ct(tmp_path / "s").hu, series)
        assert child._state.process is None
    write_series(tmp_path / "t", series)
    (tmp_path / "t/002.dcm").write_bytes((tmp_path / "t/002.dcm").read_bytes()[:-10])
    with trial("readers"), pytest.raises(ValueError, match="truncated"):
        io.read_ct(tmp_path / "t")


def test_a_batch_goes_on(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """One good CT, of a name that is no text, among files that would end the process, or never end."""
    monkeypatch.setattr("normnet.prepare.run.prepared_picture", lambda *_, **__: b"PNG")
    folder = tmp_path / os.fsdecode(b"in\xff")
    folder.mkdir()
    os.link(good, folder / os.fsdecode(b"good\xfe\n.nii.gz"))
    (folder / "format.mhd").write_text(META.format("%s%n"))
    huge(folder / "huge.nii.gz", (1500, 1500, 1500))
    series_of(folder / "nested")
    opened = b"\x29\x00\x10\x10SQ\0\0" + UNDEFINED + b"\xfe\xff\x00\xe0" + UNDEFINED
    insert(folder / "nested/001.dcm", opened * 20_000)
    series_of(folder / "cut")
    for z in (3, 4):
        path = folder / f"cut/{z:03d}.dcm"
        path.write_bytes(path.read_bytes()[:300])
    for name in ("pipe.nii", "pipe2.dcm"):
        os.mkfifo(tmp_path / name)
    out, inputs = tmp_path / "store", [folder, tmp_path / "pipe.nii", tmp_path / "pipe2.dcm"]
    with trial("readers"):
        flags = ["--spacing", "8", "3.2", "3.2", "--size", "120", *classical.FLAGS]
        assert main([*map(os.fspath, inputs), "--output", str(out), *flags]) == 1
        rows = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
        assert [row["status"] for row in rows].count("prepared") == 1
        told = {row["source"]: row["message"] for row in rows if row["status"] == "failed"}
        assert set(told) == {"format.mhd", "huge.nii.gz", "nested", "cut", "pipe.nii", "pipe2.dcm"}
        assert "003.dcm: truncated" in told["cut"]
        assert all(text.isprintable() for text in told.values())


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a case that fails; the others go on. Permissions are nothing to root, so it is played."""
    series_of(tmp_path / "in/locked")
    series_of(tmp_path / "in/open")
    iterdir, scandir = Path.iterdir, os.scandir

    def locked(call: Callable[..., object]) -> Callable[..., object]:
        def ask(path: Path) -> object:
            if Path(path).name == "locked":
                raise PermissionError(13, "Permission denied", str(path))
            return call(path)

        return ask

    monkeypatch.setattr(Path, "iterdir", locked(iterdir))
    monkeypatch.setattr(os, "scandir", locked(scandir))
    with trial("readers"):
        found = {source.case: source for source in find_sources([tmp_path / "in"])}
        assert set(found) == {"locked", "open"}
        assert io.read_ct(found["open"].path, found["open"].series).hu.any()
        with pytest.raises(OSError, match="locked"):
            io.read_ct(found["locked"].path, found["locked"].series)


def put(path: Path, tag: int, kind: bytes, value: bytes) -> None:
    """Replace an element outside sequences, byte by byte: pydicom writes only what is right."""
    whole, new = path.read_bytes(), element(tag, kind, value)
    at = whole.find(new[:4], 132)
    if at < 0:
        insert(path, new)
        return
    old = int.from_bytes(whole[at + 6 : at + 8], "little")
    path.write_bytes(whole[:at] + new + whole[at + 8 + old :])


WORDS = [
    b"\x1b[31m\r\n",
    b"9" * 60_000,
    b"A\0B",
    b"\xff\xfe\x80",
    "\u202e\u0661".encode(),
    b"%s%n",
    b" ",
    b"\\" * 500,
]


@pytest.mark.parametrize("word", WORDS, ids=range(len(WORDS)))
@pytest.mark.parametrize("every", [False, True])
def test_values_in_messages(tmp_path: Path, word: bytes, every: bool) -> None:
    """Of any element that is looked at: escaped, short, and on one line, in errors, warnings and lists."""
    known: dict[int, bytes] = {**elements._TEXTS, 0x00020010: b"UI"}
    folder = tmp_path / "s"
    for tag, kind in known.items():
        hu = series_of(folder)
        for path in sorted(folder.iterdir()) if every else [folder / "001.dcm"]:
            put(path, tag, kind, word + b" " * (len(word) % 2))
        with trial("readers"), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                assert_array_equal(io.read_ct(folder).hu, hu)  # a word that says nothing about voxels
            except ValueError as error:
                told.append(warnings.WarningMessage(str(error), UserWarning, "", 0))
            for text in (*(str(one.message) for one in told), *map(str, io.list_series(folder))):
                assert text.isprintable()
                assert len(text) < 1000


@pytest.mark.parametrize(
    "value", [b"", b"  ", "\u0661".encode(), b"1e-300", b"0x1 ", b"1\\1 ", b"+-1 ", b"1\x1f"]
)
@pytest.mark.parametrize("kind", [b"DS", b"UN", b"LO"])
def test_numbers_that_readers_take_differently(tmp_path: Path, value: bytes, kind: bytes) -> None:
    """Python's digits of any script, blanks for one or for none, a text's VR."""
    series_of(tmp_path / "s")
    put(tmp_path / "s/001.dcm", 0x00281053, kind, value)
    with (
        trial("readers"),
        pytest.raises(ValueError, match=r"001\.dcm: (RescaleSlope|element 0028.1053) must"),
    ):
        io.read_ct(tmp_path / "s")


@pytest.mark.parametrize("name", ["RescaleIntercept", "RescaleSlope"])
@pytest.mark.parametrize("lacking", [1, 2, 4])
def test_a_scale_that_some_slices_lack(tmp_path: Path, name: str, lacking: int) -> None:
    """A slice would be 1024 HU off, without a word."""
    series_of(tmp_path / "s")
    for path in sorted((tmp_path / "s").iterdir())[-lacking:]:
        data = pydicom.dcmread(path)
        delattr(data, name)
        data.save_as(path)
    with trial("readers"), pytest.raises(ValueError, match=rf"00.\.dcm: {name} must be there, as in other"):
        io.read_ct(tmp_path / "s")


CLASSES = ["2.1", "7", "7.3", "1", "1.1", "4", "20", "66.4", "481.2", "13.1.1", "9999"]


@pytest.mark.parametrize("kind", CLASSES)
def test_millimetres_are_those_of_the_headers(tmp_path: Path, kind: str) -> None:
    """... whatever the class of the slices: by that, a reader looks for them elsewhere, and takes 1 mm."""
    hu = series_of(tmp_path / "s")
    for path in (tmp_path / "s").iterdir():
        data = pydicom.dcmread(path)
        data.SOPClassUID = f"1.2.840.10008.5.1.4.1.1.{kind}"
        data.save_as(path)
    with trial("readers"):
        ct = io.read_ct(tmp_path / "s")
        assert_array_equal(ct.hu, hu)
        assert ct.spacing == (2.5, 0.7, 0.9)
        assert ct.grid.origin == (-20, 5, 100)


def test_a_reader_that_returns_the_complement(tmp_path: Path) -> None:
    series_of(tmp_path / "s")
    put(tmp_path / "s/001.dcm", 0x00280004, b"CS", b"MONOCHROME1 ")
    with trial("readers"), pytest.raises(ValueError, match=r"001\.dcm: .* must be MONOCHROME2"):
        io.read_ct(tmp_path / "s")


JPEGS = {"JPEG": "4.70", "JPEG2000": "4.90", "JPEG-LS": "4.80"}
PARTS = {"JPEG": b"\xff\xc3", "JPEG2000": b"\xff\x51", "JPEG-LS": b"\xff\xf7"}


def compressed(folder: Path, kind: str) -> np.ndarray:
    """Write a series of compressed slices: of SimpleITK, or of pydicom."""
    steps = np.random.default_rng(0).integers(-30, 31, (3, 32, 32))
    hu = np.clip(np.cumsum(steps, 2) - 300, -1000, 1500).astype(np.int16)
    write_series(folder, hu)
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        if kind == "JPEG-LS":
            pytest.importorskip("jpeg_ls")
            data.compress(pydicom.uid.JPEGLSLossless)
        else:
            image = sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkInt16)
            for key in image.GetMetaDataKeys():
                image.EraseMetaData(key)
            writer = sitk.ImageFileWriter()
            writer.SetImageIO("GDCMImageIO")
            writer.UseCompressionOn()
            writer.SetCompressor(kind)
            writer.SetFileName(str(folder / "new.dcm"))
            writer.Execute(image)
            new = pydicom.dcmread(folder / "new.dcm")
            (folder / "new.dcm").unlink()
            for name in ("PixelRepresentation", "RescaleIntercept", "RescaleSlope", "PixelData"):
                data[name] = new[name]
            data.file_meta.TransferSyntaxUID = new.file_meta.TransferSyntaxUID
        assert data.file_meta.TransferSyntaxUID == f"1.2.840.10008.1.2.{JPEGS[kind]}"
        data.save_as(path)
    return hu


@pytest.mark.parametrize("kind", JPEGS)
def test_compressed_pixels_fill_the_slice(tmp_path: Path, kind: str) -> None:
    """Frames of another precision, size, kind or number of values leave memory unwritten, or write beyond."""
    hu = compressed(tmp_path / "s", kind)
    with trial("readers"):
        assert_array_equal(io.read_ct(tmp_path / "s").hu, hu)
    path = tmp_path / "s/001.dcm"
    whole = path.read_bytes()
    at = whole.index(PARTS[kind], whole.rindex(b"\xfe\xff\x00\xe0"))
    precision, parts = (at + 40, at + 39) if kind == "JPEG2000" else (at + 4, at + 9)
    sign = 128 if kind == "JPEG2000" else 0
    bits = [n - 1 + sign if sign else n for n in (1, 2, 7, 8, 17, 31, 32)]
    changes = [(precision, n) for n in bits] + [(parts, n) for n in (0, 2, 3, 4, 255)]
    if kind == "JPEG2000":
        changes.append((precision, 15))  # without sign
    else:
        changes += [(at + 1, n) for n in (*range(0xC0, 0xD0), 0xF7) if n != PARTS[kind][1]]
        changes += [(at + 6, 31), (at + 6, 33), (at + 8, 31), (at + 8, 33), (at + 5, 1)]
    for place, value in changes:
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        with trial("readers"), pytest.raises(ValueError, match=r"001\.dcm: the compressed pixels must"):
            io.read_ct(tmp_path / "s")
    for uid in (*JPEGS.values(), "4.50", "4.51", "4.57", "4.81", "5"):
        if uid == JPEGS[kind] or (kind, uid) in (("JPEG", "4.57"), ("JPEG-LS", "4.81")):
            continue
        path.write_bytes(whole)
        put(path, 0x00020010, b"UI", f"1.2.840.10008.1.2.{uid}\0".encode()[: 23 - (len(uid) < 4)])
        with trial("readers"), pytest.raises(ValueError, match=r"001\.dcm: .*pixels must"):
            io.read_ct(tmp_path / "s")


# ---- what readers change without a word, or choke on


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_without_finite_voxels(tmp_path: Path, name: str, kind: str, value: float) -> None:
    """Readers put zeros, which are water, for NaN."""
    voxels = volume(0, (70, 80, 90)).astype(kind)
    image = nib.Nifti1Image(voxels.T, np.diag((-1.0, -1.0, 1.0, 1.0)), nib.Nifti1Header(endianness=kind[0]))
    image.to_filename(tmp_path / name)
    with trial("readers"):
        assert_array_equal(stored(io.read_ct(tmp_path / name)), voxels)
    voxels[35, 40, 45] = value
    image.to_filename(tmp_path / name)
    refused(
        tmp_path / name, "voxels must be finite", "found 1 NaN or infinite voxels, the first at (35, 40, 45)"
    )


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_extensions_are_passed_over(tmp_path: Path, name: str) -> None:
    """Whatever they hold, and however many there are; of a file that ends in them, that it is short."""
    hu = write(tmp_path / "b.nii")
    data = bytearray((tmp_path / "b.nii").read_bytes())
    pack = gzip.compress if name.endswith(".gz") else bytes
    rng = np.random.default_rng(0)
    for extension in (b"\x10\0\0\0\6\0\0\0\0\0\0\0\0\0\0\0" * 2000, *map(rng.bytes, (1, 16, 999))):
        data[108:112] = np.float32(352 + len(extension)).tobytes()
        start = bytes(data[:348]) + b"\1\0\0\0" + extension
        (tmp_path / name).write_bytes(pack(start + bytes(data[352:])))
        assert_array_equal(stored(io.read_ct(tmp_path / name)), hu)
        (tmp_path / name).write_bytes(pack(start[:-1]))
        refused(tmp_path / name, f"truncated: {len(start) - 1} bytes of the {len(start) + hu.nbytes}")


@pytest.mark.parametrize(
    "name", ["A.NII", "a.Nii", "a.NII.GZ", "a.nii.GZ", "A.NRRD", "a.Nhdr", "A.MHA", "a.Mhd"]
)
def test_suffixes_in_capitals(tmp_path: Path, name: str) -> None:
    hu = write(tmp_path / name.lower())
    (tmp_path / name.lower()).rename(tmp_path / name)
    with trial("readers"):
        assert_array_equal(stored(io.read_ct(tmp_path / name)), hu)


LINES = [
    *(f"{key} = {'x' * n}" for key in ("Name", "Comment", "ObjectSubType") for n in (256, 290, 400, 1400)),
    "Position = 1 2 3\nOffset = 4 5 6",
    "Rotation = 1 0 0 0 1 0 0 0 1\nTransformMatrix = -1 0 0 0 -1 0 0 0 1",
    "TransformMatrix = 2 0 0 0 2 0 0 0 2",
    "TransformMatrix = 1 0.5 0 0 1 0 0 0 1",
    "TransformMatrix = 1 0 0 0 1 0 0.2 0 0.98",
    "ElementToIntensityFunctionSlope = 2",
    "ElementToIntensityFunctionOffset = -1024",
    "DistanceUnits = um",
]


@pytest.mark.parametrize("line", LINES, ids=[line[:40] for line in LINES])
def test_metaimage_fields_that_would_be_ignored_or_overflow(tmp_path: Path, line: str) -> None:
    """Long words were written over the origin; of two names of one thing, one was taken."""
    path = tmp_path / "a.mha"
    path.write_bytes(
        META.format("LOCAL").replace("DimSize", f"{line}\nDimSize").encode() + volume(0, SHAPE).tobytes()
    )
    refused(
        path, re.split(r"\W", line)[0] if "Matrix" not in line or "Rotation" in line else "three orthogonal"
    )


SHEARS = ["(1,0.5,0) (0,1,0) (0,0,1)", "(1,0,0) (0.2,1,0) (0,0,1)", "(1,0,0) (0,1,0) (0,0.1,1)"]


@pytest.mark.parametrize("axes", SHEARS)
def test_sheared_axes(tmp_path: Path, axes: str) -> None:
    """Such voxels are not of the size that their spacing tells."""
    text = NRRD.format(f"space: left-posterior-superior\nspace directions: {axes}\n")
    (tmp_path / "a.nrrd").write_bytes(text.encode() + volume(0, SHAPE).tobytes())
    refused(tmp_path / "a.nrrd", "direction must be three orthogonal unit vectors")


UNTOLD = {
    "a.nrrd": [
        *(
            f"space: {n}\nspace directions: (1,0,0) (0,1,0) (0,0,1)"
            for n in ("3D-right-handed", "scanner-xyz")
        ),
        *(
            f'space: LPS\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nspace units: "{u}" "{u}" "{u}"'
            for u in ("m", "um")
        ),
        'spacings: 1 1 1\nunits: "cm" "cm" "cm"',
        "axis mins: 0 0 0\naxis maxs: 30 30 30",
        "space dimension: 3D-left-handed\nspace directions: (1,0,0) (0,1,0) (0,0,1)",
        "space: LPS\nspace directions: (1,0,0) (0,1,0) none",
    ],
    "a.mha": ["DimSize", "Offset = 1 2 3", "ElementSpacing = 1 1 1", "TransformMatrix = 1 0 0 0 1 0 0 0 1"],
}


@pytest.mark.parametrize(("name", "line"), [(name, line) for name in UNTOLD for line in UNTOLD[name]])
def test_headers_that_readers_take_for_something_else(tmp_path: Path, name: str, line: str) -> None:
    """A space without a front, metres as mm, an axis that lies nowhere, lengths before their number."""
    if name == "a.nrrd":
        text, rule = NRRD.format(f"{line}\n"), line.splitlines()[-1].partition(":")[0]
        rule = "space must be one of" if "xyz" in line or "3D-right" in line else rule
        rule = "space dimension must be an integer" if "3D-left" in line else rule
        if line.startswith(("space:", "space dimension:")):  # readers want it before sizes
            first, rest = line.split("\n", 1)
            text = NRRD.format(f"{rest}\n").replace("dimension", f"{first}\ndimension", 1)
    else:
        key, value = f"{line} = 6 5 4".split(" = ")[:2]
        head = META.format("LOCAL").replace(f"{key} = {value}\n", "")
        text, rule = f"{key} = {value}\n{head}", f"NDims must come before {key}"
    (tmp_path / name).write_bytes(text.encode() + volume(0, SHAPE).tobytes())
    refused(tmp_path / name, rule)


@pytest.mark.parametrize("other", ["a.nii", "a.nii.gz", "a.hdr", "a.img", "a.img.gz"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_beside_another_of_its_name(tmp_path: Path, name: str, other: str) -> None:
    """Of two, the header came from one and the voxels from the other."""
    hu = write(tmp_path / name)
    if other != name:
        write_nifti(tmp_path / "b.nii.gz" if other.endswith(".gz") else tmp_path / "b.nii", hu[::-1] + 1)
        next(tmp_path.glob("b.*")).rename(tmp_path / other)
    with trial("readers"):
        assert_array_equal(stored(io.read_ct(tmp_path / name)), hu)


@pytest.mark.parametrize("seed", range(12))
def test_nifti_lies_where_the_format_says(tmp_path: Path, seed: int) -> None:
    """By sform where its code is set, else by qform, in its unit, whatever the other says."""
    rng = np.random.default_rng(seed)
    image = nib.Nifti1Image(volume(0, SHAPE).T, None)
    forms = [np.eye(4), np.eye(4)]
    for form in forms:
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        form[:3, :3], form[:3, 3] = turn * rng.uniform(0.5, 4, 3), rng.uniform(-300, 300, 3)
    which = ("sform", "qform", "both", "close")[seed % 4]
    if which == "close":
        forms[1] = forms[0] + 1e-6 * rng.normal(size=(4, 4)) * [[1], [1], [1], [0]]
    scale = (1.0, 1e-3, 1e3)[seed // 4]
    forms = [np.diag([scale, scale, scale, 1]) @ form for form in forms]
    image.set_qform(forms[0], 1 if which != "sform" else 0)
    image.set_sform(forms[1], 2 if which != "qform" else 0)
    image.header.set_xyzt_units(("mm", "meter", "micron")[seed // 4])
    path = tmp_path / "a.nii"
    image.to_filename(path)
    expected = np.diag([-1 / scale, -1 / scale, 1 / scale, 1]) @ nib.load(path).affine
    with trial("readers"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        grid = io.read_ct(path).grid
    assert bool(told) == (which == "both")
    cosines = np.array(grid.direction).reshape(3, 3)
    assert_allclose(cosines * grid.spacing, expected[:3, :3], atol=1e-4)
    assert_allclose(grid.origin, expected[:3, 3], atol=2e-3)


@pytest.mark.parametrize(
    ("place", "form", "value", "rule"),
    [
        (116, "<f", -1024.0, "scl_inter must be zero"),
        (123, "<B", 7, "xyzt_units must"),
        (68, "<h", 1007, "intent_code must"),
        (252, "<h", -1, "qform_code and sform_code must"),
        (254, "<h", 300, "qform_code and sform_code must"),
    ],
)
def test_nifti_fields_that_readers_take_differently(
    tmp_path: Path, place: int, form: str, value: float, rule: str
) -> None:
    write(tmp_path / "a.nii")
    data = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<f", data, 112, 0.0)
    struct.pack_into(form, data, place, value)
    (tmp_path / "a.nii").write_bytes(data)
    refused(tmp_path / "a.nii", rule)


TABLE = b"\xfe\xff\0\xe0\x0a\0\0\0" + element(0x00283003, b"LO", b"HU")


@pytest.mark.parametrize(
    ("tag", "kind", "value", "rule"),
    [
        (0x00283000, b"SQ", TABLE, "ModalityLUTSequence must"),
        (0x00281054, b"LO", b"Z_EFF ", "RescaleType must"),
        (0x00180088, b"DS", b"0 ", "SpacingBetweenSlices must"),
    ],
)
def test_dicom_values_that_are_no_hu(tmp_path: Path, tag: int, kind: bytes, value: bytes, rule: str) -> None:
    series_of(tmp_path / "s")
    put(tmp_path / "s/001.dcm", tag, kind, value)
    with trial("readers"), pytest.raises(ValueError, match=rf"001\.dcm: {rule}"):
        io.read_ct(tmp_path / "s")


def test_a_video_beside_a_series(tmp_path: Path) -> None:
    """It is of another series: not a slice that is lacking here."""
    hu = series_of(tmp_path / "s")
    series_of(tmp_path / "video", Modality="US")
    put(tmp_path / "video/001.dcm", 0x00020010, b"UI", b"1.2.840.10008.1.2.4.102\0")
    (tmp_path / "video/001.dcm").rename(tmp_path / "s/video.dcm")
    with trial("readers"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_array_equal(io.read_ct(tmp_path / "s").hu, hu)


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    """Of a folder with a link to itself, not a single case was taken."""
    hu = series_of(tmp_path / "s")
    write(tmp_path / "a.nii")
    for name in ("a.nrrd", "s/notes", "loop"):
        (tmp_path / name).symlink_to(tmp_path / name)
    (tmp_path / "gone.mha").symlink_to(tmp_path / "nothing")
    (tmp_path / "around").symlink_to(tmp_path)
    with trial("readers"):
        assert {source.case for source in find_sources([tmp_path])} == {"a", "s"}
        assert_array_equal(io.read_ct(tmp_path / "s").hu, hu)
        assert [path for path, _ in dicom_folders([tmp_path])] == [tmp_path / "s"]


def test_a_file_without_a_transfer_syntax(tmp_path: Path) -> None:
    """An empty one is damage; none at all is of old files."""
    series_of(tmp_path / "s")
    put(tmp_path / "s/001.dcm", 0x00020010, b"UI", b"")
    with (
        trial("readers"),
        pytest.raises(ValueError, match=r"001\.dcm: the transfer syntax must be .*, got ''"),
    ):
        io.read_ct(tmp_path / "s")


@pytest.mark.parametrize("kind", ["a.nii", "a.nhdr", "a.mhd", "s"])
def test_a_file_that_changes_after_it_was_checked(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / kind
    write(path)
    body = next(p for p in (tmp_path / "a.raw", path / "002.dcm", path) if p.is_file())
    check = {"s": "find_series", "a.nii": "read_nifti", "a.nhdr": "check_nrrd", "a.mhd": "check_metaimage"}[
        kind
    ]
    checked = getattr(read, check)

    def slow(*given: object) -> object:
        answer = checked(*given)
        os.utime(body, (1, 1))
        return answer

    monkeypatch.setattr(read, check, slow)
    with trial("readers"), pytest.raises(ValueError, match=rf"{body.name}: must not change while it is read"):
        io.read_ct(path)


WRITTEN = [name for name in ODD_NAMES if b".nii" in name and len(name) < 200] + [b"\xff/%s/\n\xfe.nii.gz"]


@pytest.mark.parametrize("name", WRITTEN)
def test_odd_names_are_written(tmp_path: Path, name: bytes) -> None:
    """SimpleITK's writer aborts where a name is no text."""
    write(tmp_path / "scan.nrrd")
    ct = io.read_ct(tmp_path / "scan.nrrd")
    with trial("readers"):
        path = ct.write_like(ct.hu, tmp_path / os.fsdecode(name))
        assert_array_equal(io.read_ct(path).hu, ct.hu)
        assert os.listdir(path.parent) == [path.name] or path.parent == tmp_path


KILLED = """
import itertools, signal
ct = io.read_ct({scan!r})
def planes():
    yield from ct.hu[:2]
    os.kill(os.getpid(), signal.{sent})
    yield from ct.hu[2:]
class Hu(type(ct.hu)):
    __iter__ = lambda self: planes()
ct.grid.__class__.from_lps = lambda self, array: array.view(Hu)
ct.write_like(ct.hu, {out!r})
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="there are no files without a name")
@pytest.mark.parametrize("sent", ["SIGKILL", "SIGTERM", "SIGSEGV"])
@pytest.mark.parametrize("name", ["map.nii", "map.nii.gz"])
def test_a_killed_writer_leaves_nothing(tmp_path: Path, name: str, sent: str) -> None:
    write(tmp_path / "scan.nrrd")
    out = tmp_path / "out"
    out.mkdir()
    body = KILLED.format(scan=str(tmp_path / "scan.nrrd"), out=str(out / name), sent=sent)
    for before in ([], [name]):
        with trial("readers"):
            done = subprocess.run([sys.executable, script(tmp_path, body)], capture_output=True, timeout=60)
            assert done.returncode == -getattr(signal, sent), done.stderr
            assert os.listdir(out) == before
        (out / name).write_bytes(b"the one before")


def test_what_is_written_lies_where_it_was_read(tmp_path: Path) -> None:
    """Of any turn and any hand, by three readers: ours, nibabel's, and SimpleITK's."""
    rng = np.random.default_rng(0)
    for number in range(40):
        axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        if number < 6:  # a turn by half is where quaternions divide by zero
            axes = np.diag(
                [(1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, -1), (-1, 1, 1), (1, -1, 1)][number]
            )
        image = sitk.GetImageFromArray(volume(number, SHAPE))
        image.SetDirection(axes.astype(float).ravel())
        image.SetOrigin(rng.uniform(-500, 500, 3))
        image.SetSpacing(rng.uniform(0.3, 5, 3))
        sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
        ct = io.read_ct(tmp_path / "a.nrrd")
        path = ct.write_like(ct.hu, tmp_path / "b.nii")
        with trial("readers"):
            back = sitk.ReadImage(str(path))
            assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))
            for what in ("GetSpacing", "GetOrigin", "GetDirection"):
                np.testing.assert_allclose(getattr(back, what)(), getattr(image, what)(), atol=1e-4)
            header = nib.load(path).header
            np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-3)
            assert_array_equal(io.read_ct(path).hu, ct.hu)


def readers_are_in_one_place() -> list[str]:
    calls = re.compile(r"ReadImage|ImageFileReader|ImageSeriesReader|GetGDCM|nib(abel)?\.load|dcmread")
    root = Path(io.__file__).parents[2]
    files: list[Path] = [*root.glob("lesionsynth/**/*.py"), *root.glob("normnet/**/*.py")]
    return sorted(str(p.relative_to(root)) for p in files if calls.search(p.read_text()))


def test_native_readers_are_called_in_one_place() -> None:
    """pydicom, which is none, gets the files of a series that was walked through."""
    assert readers_are_in_one_place() == ["lesionsynth/io/child.py", "lesionsynth/io/dicom.py"]


def variants() -> dict[str, tuple[str, bytes, bytes]]:
    """Rarer forms of a file: name, header and voxels, by what is rare."""
    hu = volume(0, SHAPE)
    raw, numbers = hu.tobytes(), " ".join(map(str, hu.ravel())).encode() + b"\n"
    nrrd, meta = NRRD.format(""), META.format("LOCAL")
    text, big = (
        meta.replace("BinaryData = True", "BinaryData = False"),
        meta.replace("MSB = False", "MSB = True"),
    )
    end, after = (META.format("v.raw").replace("DimSize", f"HeaderSize = {n}\nDimSize") for n in (-1, 3))
    return {
        "NRRD in text": ("a.nrrd", nrrd.replace("raw", "ascii").encode(), numbers),
        "NRRD in hex": ("a.nrrd", nrrd.replace("raw", "hex").encode(), raw.hex().encode()),
        "NRRD big-endian": ("a.nrrd", nrrd.replace("little", "big").encode(), hu.astype(">i2").tobytes()),
        "NRRD after lines": ("a.nrrd", NRRD.format("line skip: 2\n").encode(), b"one\ntwo\n" + raw),
        "NRRD after bytes": ("a.nrrd", NRRD.format("byte skip: 5\n").encode(), b"12345" + raw),
        "NRRD at the end": ("a.nrrd", NRRD.format("byte skip: -1\n").encode(), b"1234567" + raw),
        "NRRD with keys": ("a.nrrd", NRRD.format("who:=%s%n: ä\n# note\n").encode(), raw),
        "MetaImage in text": ("a.mha", text.encode(), numbers),
        "MetaImage big-endian": ("a.mha", big.encode(), hu.astype(">i2").tobytes()),
        "MetaImage with keys": ("a.mha", b"Comment = 100% \xc3\xa4\n0008|0060 = CT\n" + meta.encode(), raw),
        "MetaImage that does not say it is binary": (
            "a.mha",
            meta.replace("BinaryData = True\n", "").encode(),
            raw,
        ),
        "MetaImage at the end": ("a.mhd", end.encode(), b"123" + raw),
        "MetaImage after bytes": ("a.mhd", after.encode(), b"123" + raw),
    }  # fmt: skip


@pytest.mark.parametrize("kind", variants())
def test_rarer_forms(tmp_path: Path, kind: str) -> None:
    name, header, voxels = variants()[kind]
    path = tmp_path / name
    body = tmp_path / "v.raw" if path.suffix == ".mhd" else path

    def put(head: bytes, data: bytes) -> None:
        path.write_bytes(head if body != path else head + data)
        if body != path:
            body.write_bytes(data)

    put(header, voxels)
    hu = volume(0, SHAPE)
    with trial("readers"):
        assert_array_equal(stored(io.read_ct(path)), hu)
    if "at the end" not in kind:  # the bytes in front make up for it
        put(header, voxels[:-10])
        refused(path)
    put(header, voxels + b"12 12")
    if "at the end" not in kind:
        refused(path)
    rng = np.random.default_rng(0)
    for _ in range(60):
        put(mutate_text(header, rng, len(header)), voxels)
        with trial("readers"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with at_once(MEBIBYTES):
                    got = io.read_ct(path)
            except (ValueError, OSError) as error:
                assert "crashed" not in str(error)  # noqa: PT017
            else:  # each voxel came from the file, in whatever type or order the header now tells
                data = np.frombuffer(voxels, np.uint8)
                known = {int(v) for kind in ("<i2", ">i2", "<u2", ">u2") for v in whole(data, kind)}
                known |= (
                    {int(v) for v in data} | {int(v) for v in data.view(np.int8)} | set(hu.ravel().tolist())
                )
                assert set(got.hu.ravel().tolist()) <= {min(max(v, -1024), 32767) for v in known}


def whole(data: np.ndarray, kind: str) -> np.ndarray:
    """Give numbers at even and odd places."""
    return np.concatenate([data[at : at + (data.size - at) // 2 * 2].view(kind) for at in (0, 1)])
