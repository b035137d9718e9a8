"""Walk through the elements of a DICOM file before native code does: lengths, depth, and a few values.

Readers of DICOM descend into sequences by recursion, take memory for any length that is announced, and hand
out whatever lay in it where the pixels are short. This walk keeps a stack of its own and holds nothing but
the values that are asked for.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import IO

from lesionsynth.io.checks import MAX_VOXELS, Stamp, file_stamp, number_of
from lesionsynth.strict import name_of, rule_of, shown

MAX_DEPTH = 32
"""Sequences within sequences; structured reports reach about ten."""
_MAX_ELEMENTS, _MAX_INFLATED = 100_000, 1 << 27
_MAX_VALUE = 1024
"""Bytes of a value that is kept; the standard has 64 or fewer, for each part of several."""
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END, _PIXELS = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0x7FE00010
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_SHORT = frozenset(
    (b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL")
) | {b"SS", b"ST", b"TM", b"UI", b"UL", b"US"}
_CLASS, _SYNTAX, _DIRECTORY, _TABLE = 0x00020002, 0x00020010, 0x00041220, 0x00283000
_NOT_HU = frozenset(("OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"))
"""Units of rescaled values that the standard knows beside Hounsfield's."""
_NUMBERS = frozenset(
    (0x00280002, 0x00280006, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280102, 0x00280103)
)
_TEXTS = {
    **dict.fromkeys((0x00080005, 0x00080008, 0x00080060, 0x00280004), b"CS"),
    **dict.fromkeys(
        (0x00180088, 0x00181120, 0x00200032, 0x00200037, 0x00280030, 0x00281052, 0x00281053), b"DS"
    ),
    **dict.fromkeys((0x00080016, 0x0020000D, 0x0020000E, 0x00200052), b"UI"),
    **dict.fromkeys((0x0008103E, 0x00100020, 0x00281054), b"LO"),
    **dict.fromkeys((0x00200012, 0x00280008), b"IS"),
}
"""Their VR; readers stop at another."""
_IMPLICIT, _BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
_DEFLATED, _RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
_COMPRESSED = "1.2.840.10008.1.2.4."
_PLAIN = frozenset((_IMPLICIT, "1.2.840.10008.1.2.1", _BIG, _DEFLATED))
_JPEG = {
    f"1.2.840.10008.1.2.4.{n}": marks
    for n, marks in {
        50: b"\xc0", 51: b"\xc0\xc1", 57: b"\xc3", 70: b"\xc3", 80: b"\xf7", 81: b"\xf7", 90: b"", 91: b"",
    }.items()
}  # fmt: skip
"""Marks of the frames that a transfer syntax has; none for JPEG 2000."""


class Damage(Exception):
    """What is wrong with a DICOM file.

    Attributes
    ----------
    series : str
        SeriesInstanceUID, where the file told it before.
    known : bool
        It is a DICOM file by its mark or its suffix.
    """

    def __init__(self, rule: str, series: str = "", known: bool = True) -> None:
        super().__init__(rule)
        self.series, self.known = series, known


class Elements:
    """Values of a DICOM file, and where its pixels are.

    Attributes
    ----------
    values : mapping of str to str
        By tag, "0028|0010".
    syntax : str
        UID of the transfer syntax.
    pixels : tuple of int
        Length of the pixels in bytes, or of their fragments where they are compressed; empty without pixels.
    encapsulated : bool
        The pixels are compressed.
    frame : bytes
        Their fragments, the table of offsets left out, where they were asked for.
    stamp : Stamp
        Of the file, before it was opened.
    has_table : bool
        Stored values become others by a ModalityLUTSequence.
    """

    def __init__(self, stream: IO[bytes], stamp: Stamp, keep: bool) -> None:
        self.stream, self.stamp, self.size, self.keep = stream, stamp, stamp[2], keep
        self.values: dict[str, str] = {}
        self.order, self.syntax = "<", ""
        self.pixels: tuple[int, ...] = ()
        self.encapsulated, self.frame = False, b""
        self.is_directory = self.has_table = False
        self.count = 0

    def walk(self, at: int) -> None:
        """Find what the attributes tell, from the first element on."""
        at, told = self._meta(at)
        if not told:  # files from before there were file headers
            self.stream.seek(at)
            letters = self.stream.read(6)[4:]
            self.syntax = "1.2.840.10008.1.2.1" if letters in _LONG | _SHORT else _IMPLICIT
        foreign = self.syntax not in (*_PLAIN, *_JPEG, _RLE)
        # videos, say: walked through like any other, to see which series they are of
        if foreign and not self.syntax.startswith(_COMPRESSED):
            raise Damage(f"the transfer syntax must be one for CT slices, got {shown(self.syntax)}")
        if self.syntax == _DEFLATED:
            at = self._inflate(at)
        self.order = ">" if self.syntax == _BIG else "<"
        self._body(at, self.size, self.syntax != _IMPLICIT)
        if not self.is_directory and not self.values.get("0020|000e"):
            raise Damage("SeriesInstanceUID must be there")
        if foreign:
            raise Damage(f"the transfer syntax must be one for CT slices, got {shown(self.syntax)}")
        del self.stream  # what it holds is no longer needed

    def _meta(self, at: int) -> tuple[int, bool]:
        """Walk through the file header; where it ends, and whether it told the transfer syntax."""
        told = False
        while self.size - at >= 8:
            self.stream.seek(at)
            if self.stream.read(2) != b"\x02\x00":
                break
            tag, letters, length, start = self._element(at, self.size, True)
            if length == _UNDEFINED or letters == b"SQ":
                raise Damage("the file header must not hold sequences")
            self._check(tag, length, start, self.size)
            if tag in (_SYNTAX, _CLASS):
                uid = self._bytes(start, min(length, 64)).decode("latin-1").strip("\0 ")
                if tag == _SYNTAX:
                    self.syntax, told = uid, True
                else:
                    self.values["0002|0002"] = name_of(uid)
            at = start + length
        return at, told

    def _inflate(self, at: int) -> int:
        self.stream.seek(at)
        unpack, parts, length = zlib.decompressobj(-15), list[bytes](), 0
        try:
            while not unpack.eof:
                block = unpack.unconsumed_tail or self.stream.read(1 << 20)
                if not block:
                    raise Damage("truncated: the deflated data end early")
                parts.append(unpack.decompress(block, 1 << 22))
                length += len(parts[-1])
                if length > _MAX_INFLATED:
                    raise Damage(f"deflated data must unpack to at most {_MAX_INFLATED} bytes")
        except zlib.error as error:
            raise Damage(f"damaged deflated data ({error})") from None
        self.stream, self.size = io.BytesIO(b"".join(parts)), length
        return 0

    def _bytes(self, at: int, length: int) -> bytes:
        self.stream.seek(at)
        data = self.stream.read(length)
        if len(data) < length:
            raise Damage("the file became shorter while it was read")
        return data

    def _element(self, at: int, end: int, explicit: bool) -> tuple[int, bytes, int, int]:
        """Tag, VR, length and place of the value of the element at a place."""
        self.count += 1
        if self.count > _MAX_ELEMENTS:
            raise Damage(f"a file must have at most {_MAX_ELEMENTS} elements")
        if end - at < 8:
            raise Damage(f"truncated: {end - at} bytes are left for an element at byte {at}")
        head = self._bytes(at, 8)
        group, element = struct.unpack_from(f"{self.order}HH", head)
        tag = group << 16 | element
        if not explicit or group == 0xFFFE:
            return tag, b"", struct.unpack_from(f"{self.order}I", head, 4)[0], at + 8
        letters = head[4:6]
        if letters in _SHORT:
            return tag, letters, struct.unpack_from(f"{self.order}H", head, 6)[0], at + 8
        if letters not in _LONG:
            raise Damage(f"element ({group:04x},{element:04x}) at byte {at} must have a VR, got {letters!r}")
        if end - at < 12:
            raise Damage(f"truncated: {end - at} bytes are left for an element at byte {at}")
        return tag, letters, struct.unpack(f"{self.order}I", self._bytes(at + 8, 4))[0], at + 12

    def _check(self, tag: int, length: int, start: int, end: int) -> None:
        if length > end - start:
            raise Damage(
                f"truncated: element ({tag >> 16:04x},{tag & 0xFFFF:04x}) announces {length} bytes, "
                f"{end - start} are left"
            )

    def _body(self, at: int, end: int, explicit: bool) -> None:
        # (holds items, where it ends or None for a delimiter, no byte beyond, explicit)
        stack: list[tuple[bool, int | None, int, bool]] = [(False, end, end, explicit)]
        while stack:
            items, stop, limit, explicit = stack[-1]
            if stop is not None and at >= stop:
                stack.pop()
                continue
            if len(stack) == 1 and self._padding(at, end):
                return
            tag, letters, length, start = self._element(at, limit, explicit)
            name = f"({tag >> 16:04x},{tag & 0xFFFF:04x})"
            if tag == (_SEQUENCE_END if items else _ITEM_END) and stop is None:
                stack.pop()
                at = start
                continue
            if items != (tag == _ITEM) or (tag >> 16 == 0xFFFE and tag != _ITEM):
                raise Damage(f"element {name} at byte {at} must not be there")
            if length != _UNDEFINED:
                self._check(tag, length, start, limit)
            at = start
            inner = limit if length == _UNDEFINED else start + length
            opened = None if length == _UNDEFINED else inner
            if items:
                stack.append((False, opened, inner, explicit))
            elif tag == _PIXELS and length == _UNDEFINED:
                at = self._fragments(start, limit, len(stack) == 1)
            elif length == _UNDEFINED or letters == b"SQ" or self._hides_items(tag, letters, start, length):
                if letters not in (b"", b"SQ", b"UN"):
                    raise Damage(f"element {name} must have a length")
                if len(stack) > 2 * MAX_DEPTH:
                    raise Damage(f"sequences must be nested at most {MAX_DEPTH} deep")
                # what an unknown VR hides is implicit
                stack.append((True, opened, inner, explicit and letters != b"UN"))
                if tag == _DIRECTORY:
                    self.is_directory = True
                self.has_table |= tag == _TABLE and length > 0 and len(stack) == 2
            else:
                if len(stack) == 1:
                    self._keep(tag, letters, start, length)
                at = inner

    def _padding(self, at: int, end: int) -> bool:
        """Nothing but zeros follows."""
        if end - at >= 8 and self._bytes(at, 4) != bytes(4):
            return False
        return end - at < 1 << 20 and not any(self._bytes(at, end - at))

    def _hides_items(self, tag: int, letters: bytes, start: int, length: int) -> bool:
        """Without a VR, a value that begins like an item may be taken for a sequence."""
        if letters not in (b"", b"UN") or length < 8 or tag == _PIXELS:
            return False
        return self._bytes(start, 4) == struct.pack(f"{self.order}HH", 0xFFFE, 0xE000)

    def _fragments(self, at: int, end: int, outermost: bool) -> int:
        lengths, parts = list[int](), list[bytes]()
        while True:
            tag, _, length, start = self._element(at, end, False)
            if tag == _SEQUENCE_END and length == 0:
                break
            if tag != _ITEM or length == _UNDEFINED:
                raise Damage("compressed pixels must be fragments with a length")
            self._check(tag, length, start, end)
            if lengths and self.keep and outermost:
                parts.append(self._bytes(start, length))
            lengths.append(length)
            at = start + length
        if outermost:
            if self.pixels:
                raise Damage("the pixels must be there once")
            self.pixels, self.encapsulated, self.frame = tuple(lengths), True, b"".join(parts)
        return start

    def _keep(self, tag: int, letters: bytes, start: int, length: int) -> None:
        if tag == _PIXELS:
            if self.pixels:
                raise Damage("the pixels must be there once")
            self.pixels = (length,)
            return
        if tag not in _NUMBERS and tag not in _TEXTS:
            return
        key = f"{tag >> 16:04x}|{tag & 0xFFFF:04x}"
        if key in self.values:
            raise Damage(f"element {key} must be there once")
        if tag in _NUMBERS:
            if length not in (0, 2) or letters not in (b"", b"US"):
                raise Damage(f"element {key} must be one number of 16 bits")
            numbers = struct.unpack(f"{self.order}{length // 2}H", self._bytes(start, length))
            self.values[key] = "".join(map(str, numbers))
        else:
            if letters not in (b"", b"UN", _TEXTS[tag]):
                raise Damage(f"element {key} must be {_TEXTS[tag].decode()}, got {letters.decode()}")
            if length > _MAX_VALUE:
                raise Damage(f"element {key} must have at most {_MAX_VALUE} bytes, got {length}")
            data = self._bytes(start, length)
            # the two that old headers and new ones use
            try:
                text = data.decode()
            except UnicodeDecodeError:
                text = data.decode("latin-1")
            self.values[key] = name_of(text.strip("\0 \t\r\n"))  # values end in messages, on one line


def read_elements(path: Path, frame: bool = False) -> Elements:
    """Walk through a file.

    Parameters
    ----------
    path : Path
        Any file.
    frame : bool
        Keep the compressed pixels.

    Returns
    -------
    Elements

    Raises
    ------
    Damage
        It is no DICOM file, or cannot be read.
    """
    known = path.suffix.lower() == ".dcm"
    try:
        stamp, stream = file_stamp(path), path.open("rb")
    except (OSError, ValueError) as error:
        rule = getattr(error, "strerror", None) or rule_of(error, path)
        raise Damage(rule, known=known) from None
    with stream:
        head = stream.read(132)
        marked = head[128:] == b"DICM"
        known |= marked
        if not marked and head[:2] not in (b"\x02\x00", b"\x08\x00"):
            rule = "not a readable DICOM file: it has no DICOM header" if head else "an empty file"
            raise Damage(rule, known=known)
        found = Elements(stream, stamp, frame)
        try:
            found.walk(132 if marked else 0)
        except Damage as damage:  # of some other file that begins with these two bytes, too
            raise Damage(str(damage), found.values.get("0020|000e", ""), known) from None
        return found


def check_slice(elements: Elements) -> int:
    """Check that a file of one frame and one sample holds its pixels; returns bytes of its voxels.

    Raises
    ------
    Damage
        It does not.
    """
    values = elements.values

    def number(tag: str, name: str, allowed: range | tuple[int, ...]) -> int:
        text = values.get(tag, "")
        if not text or int(text) not in allowed:
            is_range = isinstance(allowed, range)
            kinds = f"from {allowed[0]} to {allowed[-1]}" if is_range else " or ".join(map(str, allowed))
            raise Damage(f"{name} must be {kinds}, got {text or 'none'}")
        return int(text)

    if values.get("0028|0004") != "MONOCHROME2":  # of MONOCHROME1 readers return the complement
        got = shown(values.get("0028|0004") or "none")
        raise Damage(f"PhotometricInterpretation must be MONOCHROME2, got {got}")
    rows, columns = (
        number(t, n, range(1, 65536)) for t, n in (("0028|0010", "Rows"), ("0028|0011", "Columns"))
    )
    bits = number("0028|0100", "BitsAllocated", (8, 16, 32))
    stored = number("0028|0101", "BitsStored", range(1, bits + 1))
    number("0028|0102", "HighBit", (stored - 1,))
    number("0028|0103", "PixelRepresentation", (0, 1))
    if rows * columns > MAX_VOXELS:
        raise Damage(f"a slice must have at most {MAX_VOXELS} pixels, got {rows} x {columns}")
    for tag, name in (("0028|1052", "RescaleIntercept"), ("0028|1053", "RescaleSlope")):
        if tag in values:
            value = number_of(values[tag])
            if not abs(value) <= 1e9 or (name == "RescaleSlope" and abs(value) < 1e-9):
                few = " of at least 1e-09" if name == "RescaleSlope" else ""
                raise Damage(f"{name} must be a number{few}, got {shown(values[tag])}")
    if elements.has_table:  # which readers leave out
        raise Damage("ModalityLUTSequence must not be there: a slope and an intercept must give HU")
    if values.get("0028|1054", "").upper() in _NOT_HU:
        raise Damage(f"RescaleType must be HU, got {shown(values['0028|1054'])}")
    if number_of(values.get("0018|0088", "")) == 0:  # which readers divide by
        raise Damage("SpacingBetweenSlices must not be zero")
    needed = rows * columns * bits // 8
    if not elements.pixels:
        raise Damage("PixelData must be there")
    if not elements.encapsulated:
        if elements.syntax not in _PLAIN:
            raise Damage("PixelData must be fragments in this transfer syntax")
        if elements.pixels[0] not in (needed, needed + needed % 2):
            short = "truncated: " if elements.pixels[0] < needed else ""
            raise Damage(
                f"{short}PixelData must have {needed} bytes ({rows} x {columns} of {bits} bits), "
                f"got {elements.pixels[0]}"
            )
    elif elements.syntax in _PLAIN:
        raise Damage("PixelData must not be fragments in this transfer syntax")
    elif elements.frame:
        if elements.syntax == _RLE:
            _check_runs(elements.frame, rows * columns, bits // 8)
        else:
            signed = values["0028|0103"] == "1"
            _check_jpeg(elements.frame, _JPEG[elements.syntax], rows, columns, bits, signed)
    else:
        raise Damage("truncated: PixelData has no fragment")
    return rows * columns * 8  # rescaled values may be of double precision


def _check_runs(frame: bytes, pixels: int, segments: int) -> None:
    """Count what the segments of run lengths unpack to: one for each byte of a pixel."""
    if len(frame) < 64:
        raise Damage("truncated: the pixels have no run-length header")
    count, *offsets = struct.unpack_from("<16I", frame)
    ends = [*offsets[1:segments], len(frame)]
    if count != segments or offsets[0] != 64 or any(a > b for a, b in zip(offsets, ends, strict=False)):
        raise Damage(f"run-length pixels must have {segments} segments in order, got {count}")
    for at, end in zip(offsets[:segments], ends, strict=True):
        got = 0
        while got < pixels:
            if at >= end:
                raise Damage(f"truncated: a run-length segment holds {got} of {pixels} pixels")
            code = frame[at]
            at += 2 if code > 128 else 1 if code == 128 else code + 2
            got += 257 - code if code > 128 else 0 if code == 128 else code + 1
        if got > pixels or at > end:
            raise Damage(f"a run-length segment must hold {pixels} pixels, got {got}")


def _check_jpeg(frame: bytes, marks: bytes, rows: int, columns: int, bits: int, signed: bool) -> None:
    """Check that a JPEG is whole, of the kind that its transfer syntax has, and fills the pixels exactly."""
    if frame.rstrip(b"\0\xff")[-1:] != b"\xd9" or frame[:1] != b"\xff":
        raise Damage("truncated: the compressed pixels must begin and end with JPEG's marks")
    # of JPEG 2000 there are no marks
    size, parts, precision = _size_of_jpeg(frame, marks) if marks else _size_of_2000(frame, signed)
    if (*size, parts) != (rows, columns, 1):
        got = f"{size[0]} x {size[1]}, {parts}"
        raise Damage(f"the compressed pixels must be {rows} x {columns}, 1 value each, got {got}")
    if not bits - 8 < precision <= bits:
        raise Damage(f"the compressed pixels must fill {bits} bits, got {precision}")


def _size_of_2000(frame: bytes, signed: bool) -> tuple[tuple[int, int], int, int]:
    """Rows and columns, values a pixel, and bits of a value."""
    if frame[:4] != b"\xff\x4f\xff\x51" or len(frame) < 43:
        raise Damage("the compressed pixels must be JPEG 2000 in this transfer syntax")
    right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
    (parts,) = struct.unpack_from(">H", frame, 40)
    if bool(frame[42] & 128) != signed:
        rule = "signed" if signed else "without sign"
        raise Damage(f"the compressed pixels must be {rule}, as PixelRepresentation says")
    return (bottom - top, right - left), parts, (frame[42] & 127) + 1


def _size_of_jpeg(frame: bytes, marks: bytes) -> tuple[tuple[int, int], int, int]:
    """Find what `_size_of_2000` does in the frame header of a JPEG."""
    at = 2
    while at + 10 <= len(frame) and frame[:2] == b"\xff\xd8" and frame[at] == 0xFF:
        mark, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if mark == 0xFF:
            at += 1
        elif mark in marks:
            precision, rows, columns, parts = struct.unpack_from(">BHHB", frame, at + 4)
            return (rows, columns), parts, precision
        elif mark == 0xF7 or (0xC0 <= mark <= 0xCF and mark not in (0xC4, 0xC8, 0xCC)):
            break
        else:
            at += 2 + length
    raise Damage("the compressed pixels must be JPEG of the kind that the transfer syntax has")
