"""List the DICOM series of folders; find, check and order the slices of one, before any pixel is read.

Readers return a volume even where a slice is missing, the spacing jumps or the gantry was tilted; everything
that counts millimetres afterwards would be wrong without a word. So the headers are checked first.
"""

from __future__ import annotations

import filecmp
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lesionsynth.commands import optional
from lesionsynth.io.checks import FARTHEST_MM, MAX_VOXELS, SPACING_MM, Stamp, number_of
from lesionsynth.io.elements import Damage, Elements, check_slice, read_elements
from lesionsynth.strict import name_of, rule_of, shown, some_of

_ORIENTATION, _POSITION, _PIXEL_SPACING = "0020|0037", "0020|0032", "0028|0030"
_MODALITY, _FRAMES, _SAMPLES, _TILT, _SERIES = "0008|0060", "0028|0008", "0028|0002", "0018|1120", "0020|000e"
_IMAGE_TYPE, _DESCRIPTION, _ACQUISITION = "0008|0008", "0008|103e", "0020|0012"
_ROWS, _COLUMNS = "0028|0010", "0028|0011"
_SCALE = ("0028|0100", "0028|0101", "0028|0103", "0028|1052", "0028|1053")
_ONE = {"0010|0020": "PatientID", "0020|000d": "StudyInstanceUID", "0020|0052": "FrameOfReferenceUID"}
_RESCALE = {"0028|1052": "RescaleIntercept", "0028|1053": "RescaleSlope"}
_SAME_DIRECTION = 1e-3  # headers carry six decimals or so; a degree of tilt is 1.7e-2
_SAME_SPACING = 5e-4  # of PixelSpacing: decimals that were cut off; a quarter of a pixel over 512
_SAME_PLACE = 1e-3  # mm
_FOREIGN = re.compile(
    rb"%PDF|\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\0|MM\0\*|PK|\x1f\x8b|MZ|\x7fELF|SQLite|\xd0\xcf\x11\xe0|"
    rb"\xff\xfe|\xfe\xff"
)
"""How files of other kinds begin: pictures, documents, archives, programs, text in UTF-16."""

Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Slices of one series, ordered along the slice normal.

    Attributes
    ----------
    files : tuple of str
        One file per slice, ascending along the normal.
    spacing : tuple of 3 floats
        mm between neighbouring voxels, x first.
    origin : tuple of 3 floats
        Position of the first voxel.
    direction : tuple of 9 floats
        ITK direction matrix, row-major.
    voxel_bytes : int
        Memory that its voxels take at most.
    real : bool
        Slices are scaled differently: only real numbers hold all.
    stamps : mapping of Path to Stamp
        Of the files, before they were checked.
    uid : str
        SeriesInstanceUID.
    warnings : tuple of str
        What was chosen or left out, and the user should know.
    """

    files: tuple[str, ...]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]
    voxel_bytes: int
    real: bool
    stamps: Mapping[Path, Stamp]
    uid: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class SeriesInfo:
    """What one DICOM series of a folder, or of several, is, from its headers.

    Attributes
    ----------
    uid : str
        SeriesInstanceUID.
    description : str
        SeriesDescription; empty where the scanner wrote none.
    modality : str
        CT, MR, SEG, ...; empty where no header could be read.
    slices : int
        Files of the series; where it is usable, those that are read.
    localizer : bool
        A scout image by its ImageType.
    problem : str
        Why it cannot be read as a CT volume; empty where it can.
    files : tuple of str
        Paths of its files, those of copies as well.
    """

    uid: str
    description: str
    modality: str
    slices: int
    localizer: bool
    problem: str
    files: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def usable(self) -> bool:
        """It can be read as a CT volume."""
        return not self.problem

    @property
    def folder(self) -> Path:
        """The deepest folder that all its files are in, or in folders below it."""
        return Path(os.path.commonpath([os.path.dirname(file) for file in self.files]))

    def __str__(self) -> str:
        """One line: UID, modality, slices, description and what is wrong with it."""
        parts = [self.modality[:20] or "no modality", f"{self.slices} slices"]
        if self.description:
            parts.append(repr(self.description[:64]))
        return f"{_short(self.uid)} ({', '.join(parts)}{'; ' + self.problem if self.problem else ''})"


def find_series(path: Path, series: str | None = None) -> Series:
    """Choose the series that `path` means and check that it is a regular, untilted CT volume.

    Parameters
    ----------
    path : Path
        A folder, searched with those below it, or one DICOM file (the series that it belongs to, of its own
        folder).
    series : str, optional
        SeriesInstanceUID. Omitted: the one that `largest_series` chooses of those with slices in the folder
        itself, or of those below where it has none; a warning names it where there are several.

    Raises
    ------
    ValueError
        No DICOM, no series of this UID, not CT, a localizer, multi-frame, colour, fewer than two slices,
        differing orientation, missing or repeated slices, irregular spacing, interleaved acquisitions that
        are not told apart, gantry tilt; a damaged file that belongs to the series, or may belong to it.
    """
    found = _files_by_series(*(folders_below(path) if path.is_dir() else [path.parent]))
    if path.is_dir() and not found:
        raise ValueError(f"{name_of(path)}: a folder must hold the files of a DICOM series, found none")
    if not path.is_dir():
        uid = next((uid for uid, group in found.items() if str(path) in group.names and uid), None)
        if uid is None:
            damaged = dict(one for group in found.values() for one in group.damaged)
            told = damaged.get(str(path), "not a readable DICOM slice of a series")
            raise ValueError(f"{name_of(path)}: {told}")
        if series not in (None, uid):
            got = _short(name_of(series))
            raise ValueError(f"{name_of(path)}: series must be that of the file, {_short(uid)}, got {got}")
        series = uid
    warnings = []
    # what lies below is only asked for where the folder itself has none
    own = {uid for uid, group in found.items() if any(Path(name).parent == path for name in group.names)}
    own = own or set(found)
    if series is None and (len(own) == 1 or "" in own):
        series = min(own)  # "": damaged files, alone in their folder, that may be slices of any
    elif series is None:
        infos = [_info(path, uid, found[uid]) for uid in own]
        chosen = largest_series(infos)
        series = chosen.uid
        there = some_of("; ", [str(info) for info in largest_first(infos)])
        where = "" if chosen.folder == path else f" in {name_of(chosen.folder)}"
        warnings.append(f"{name_of(path)}: several DICOM series: {there}; reading {_short(series)}{where}")
    elif series not in found:
        names = some_of(", ", [_short(uid) for uid in sorted(found)])
        raise ValueError(f"{name_of(path)}: series must be one of {names}, got {_short(name_of(series))}")
    return _check_series(path, series, found[series], warnings)


def list_series(*folders: Path) -> list[SeriesInfo]:
    """List the series of folders, without those below, the one of most slices first, between equals by UID.

    Slices of one SeriesInstanceUID in several of the folders are one series.
    """
    groups = _files_by_series(*folders).items()
    return largest_first([_info(Path(os.path.commonpath(folders)), uid, group) for uid, group in groups])


def join_series(infos: Iterable[SeriesInfo]) -> list[SeriesInfo]:
    """Join what `list_series` told of one folder after another: a series may have slices in several.

    The order is kept; the folders of a series that is joined are read once more, together.
    """
    groups: dict[object, list[SeriesInfo]] = {}
    for number, info in enumerate(infos):
        groups.setdefault(info.uid or number, []).append(info)
    for parts in groups.values():
        if len(parts) > 1:
            folders = dict.fromkeys(Path(file).parent for info in parts for file in info.files)
            parts[0] = next(info for info in list_series(*folders) if info.uid == parts[0].uid)
    return [parts[0] for parts in groups.values()]


def folders_below(root: Path, enter: Callable[[list[Path]], list[Path]] | None = None) -> Iterator[Path]:
    """Walk a folder and those inside it, sorted; each once, whatever links lead to it; hidden ones never.

    `enter` chooses among the folders inside one.
    """
    seen: set[Path] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        real = folder.resolve()
        if real in seen:
            continue
        seen.add(real)
        inside: list[Path] = []
        with suppress(OSError):  # a folder that may not be read has none
            # Path.is_dir raises of a link into a folder that may not be read
            inside = sorted(p for p in folder.iterdir() if p.name[0] != "." and os.path.isdir(p))
        yield folder
        waiting.extend(reversed(enter(inside) if enter else inside))


def read_headers(files: Sequence[str | os.PathLike[str]]) -> list[Any]:
    """Read the headers of DICOM slices.

    Parameters
    ----------
    files : sequence of paths
        `Scan.files`, say.

    Returns
    -------
    list of pydicom.Dataset
        Without pixels, in the order of `files`.

    Raises
    ------
    ValueError
        A file is no DICOM slice, or damaged.
    ImportError
        pydicom is not installed.
    """
    pydicom = optional("pydicom", "reading DICOM headers needs pydicom: pip install 'lesionsynth[io]'")
    headers = []
    for file in files:
        try:
            read_elements(Path(file))  # pydicom descends into sequences by recursion
        except Damage as damage:
            raise ValueError(f"{name_of(file)}: {damage}") from None
        headers.append(pydicom.dcmread(file, stop_before_pixels=True, force=True))
    return headers


def why_unread(file: str, rule: str) -> str:
    """Say in the words of the standard why a slice that passed the checks is not read."""
    elements = read_elements(Path(file))
    kind = elements.values.get("0002|0002") or elements.values.get("0008|0016", "")
    if rule == "Cannot read requested file":
        return f"SOPClassUID must be that of CT images, 1.2.840.10008.5.1.4.1.1.2, got {shown(kind)}"
    if elements.syntax.endswith(".1.2.5") and "Transfer Syntax" in rule:
        return f"run-length slices of so few pixels are not read; store them uncompressed ({rule})"
    return rule


def largest_series(infos: Sequence[SeriesInfo]) -> SeriesInfo:
    """Choose the series that is read where none is named.

    Parameters
    ----------
    infos : sequence of SeriesInfo
        At least one, in any order.

    Returns
    -------
    SeriesInfo
        The usable one of most slices; without any, the largest CT that is no localizer, or else the largest.
        Between equals, the one of the smaller UID.

    Raises
    ------
    ValueError
        `infos` is empty.
    """
    if not infos:
        raise ValueError("infos must hold at least one series, got none")
    return min(infos, key=lambda i: (not i.usable, i.modality != "CT" or i.localizer, -i.slices, i.uid))


def _short(uid: str) -> str:
    return uid if len(uid) <= 64 else f"{uid[:64]}..."


def largest_first(infos: Sequence[SeriesInfo]) -> list[SeriesInfo]:
    """Sort series by their slices; equals by UID, so that no choice depends on the file system."""
    return sorted(infos, key=lambda info: (-info.slices, info.uid))


@dataclass
class _Group:
    """Files of one series."""

    slices: list[tuple[str, Elements]] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Name, and what is wrong."""

    @property
    def names(self) -> list[str]:
        return [name for name, _ in (*self.slices, *self.damaged)]


def _files_by_series(*folders: Path) -> dict[str, _Group]:
    """Walk through every file of folders. One that is damaged before it tells its series may be of any."""
    found: list[tuple[dict[str, _Group], list[tuple[str, str]], list[tuple[str, str]]]] = []
    for folder in folders:
        here: dict[str, _Group] = {}
        homeless: list[tuple[str, str]] = []
        doubtful: list[tuple[str, str]] = []
        found.append((here, homeless, doubtful))
        # macOS leaves a ._NAME beside every file that it copies
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.name[0] != "." and not os.path.isdir(e))
        for file in (folder / name for name in names if name.upper() != "DICOMDIR"):
            try:
                elements = read_elements(file)
            except Damage as damage:
                if damage.series:
                    here.setdefault(damage.series, _Group()).damaged.append((str(file), str(damage)))
                else:
                    told = f"{damage}; it may be a slice of any series in the folder"
                    (homeless if damage.known else doubtful).append((str(file), told))
            else:
                # without a series: what lists the files of a disk
                if uid := elements.values.get(_SERIES, ""):
                    here.setdefault(uid, _Group()).slices.append((str(file), elements))
    forms = {_form(name) for here, *_ in found for group in here.values() for name in group.names}
    groups: dict[str, _Group] = {}
    for here, homeless, doubtful in found:
        blank = not (here or homeless) and len(doubtful) > 1 and all(_is_blank(one[0]) for one in doubtful)
        homeless += [one for one in doubtful if blank or _may_be_slice(Path(one[0]), forms)]
        if homeless and not here:
            here[""] = _Group()
        for uid, group in here.items():
            whole = groups.setdefault(uid, _Group())
            whole.slices += group.slices
            whole.damaged += group.damaged + homeless
    return groups


def _form(file: str | Path) -> tuple[str, str]:
    """Name without its numbers, and its suffix; a number is none, nor what transfers append till they end."""
    name = re.sub(r"\.(part|partial|filepart|crdownload|tmp)$", "", os.path.basename(file).lower())
    stem, suffix = os.path.splitext(name)
    if suffix[1:].isdigit():
        stem, suffix = stem + suffix, ""
    return re.sub(r"\d+", "0", stem), suffix


def _may_be_slice(file: Path, forms: Collection[tuple[str, str]]) -> bool:
    """Tell whether what is no readable DICOM file stands where a slice may have been."""
    stem, suffix = _form(file)
    stems, ends = {stem for stem, _ in forms}, {end for _, end in forms}
    if "0" in stem and stem in stems and suffix in {"", *ends}:
        return True  # numbered as slices are, whatever took its place
    start = _start(file)
    is_text = bool(start) and not re.search(rb"[\0-\x08\x0e-\x1a\x7f]", start)
    return suffix in ends and not is_text and not _FOREIGN.match(start)


def _is_blank(file: str) -> bool:
    """Tell whether a file is named as slices without suffix are, and a broken transfer left only zeros."""
    stem, suffix = _form(file)
    return "0" in stem and not suffix and not any(_start(Path(file)))


def _start(file: Path) -> bytes:
    if os.path.isfile(file):  # a pipe would never end
        with suppress(OSError), file.open("rb") as stream:
            return stream.read(1024)
    return b""


def _info(folder: Path, uid: str, group: _Group) -> SeriesInfo:
    problem, slices = "", len(group.slices)
    try:
        slices = len(_check_series(folder, uid, group).files)
    except ValueError as error:
        problem = rule_of(error, folder).removeprefix(f"{name_of(folder)}{os.sep}")
    head = group.slices[0][1].values if group.slices else {}
    return SeriesInfo(
        uid,
        head.get(_DESCRIPTION, ""),
        head.get(_MODALITY, ""),
        slices,
        _is_localizer(head),
        problem,
        tuple(name for name, _ in group.slices) or tuple(group.names),
    )


def _is_localizer(header: Mapping[str, str]) -> bool:
    return "LOCALIZER" in header.get(_IMAGE_TYPE, "").upper().split("\\")


def _check_series(path: Path, uid: str, group: _Group, warnings: Sequence[str] = ()) -> Series:
    headers = {name: elements.values for name, elements in group.slices}
    for name, header in headers.items():
        _check_slice(name, header)
    if group.damaged:
        name, rule = group.damaged[0]
        more = f"; {len(group.damaged) - 1} more such files" if len(group.damaged) > 1 else ""
        raise ValueError(f"{name_of(name)}: {rule}{more}")
    for tag, what in _ONE.items():
        scans = {header[tag]: name for name, header in headers.items() if header.get(tag)}
        if 1 < len(scans) < len(headers):  # drawn at random for each slice, it tells nothing
            first, second = sorted(map(name_of, scans.values()))[:2]
            raise ValueError(
                f"{name_of(path)}: {what} must be one for all slices of a series, but differs in {first} and "
                f"{second}: several scans share a SeriesInstanceUID; give one folder with one scan at a time"
            )
    for tag, what in _RESCALE.items():
        lacking = [name for name, header in headers.items() if tag not in header]
        if 0 < len(lacking) < len(headers):
            raise ValueError(f"{name_of(lacking[0])}: {what} must be there, as in other slices of the series")
    sizes = {}
    for name, elements in group.slices:
        try:
            whole = read_elements(Path(name), frame=True) if elements.encapsulated else elements
            sizes[name] = check_slice(whole)
        except Damage as damage:
            raise ValueError(f"{name_of(name)}: {damage}") from None
    stack, copies = _without_copies(_stack(path, headers))
    stack, others = _one_acquisition(stack, headers)
    if fault := _fault(stack):
        if len(set(map(os.path.dirname, stack.names))) > 1:
            fault += "; slices are of several folders: if each is a scan of its own, give one at a time"
        raise ValueError(f"{name_of(path)}: {others}{'; ' if others else ''}{fault}")
    sizes = {name: sizes[name] for name in stack.names}
    total = sum(sizes.values())
    if total > 8 * MAX_VOXELS:
        raise ValueError(f"{name_of(path)}: a volume must have at most {MAX_VOXELS} voxels, got {total // 8}")
    x, y, z = (float(v) for v in stack.positions[0])
    right, down, length = (stack.positions[-1] - stack.positions[0]) @ stack.axes
    sideways = np.hypot(right, down)
    # a real tilt of one degree moves the last slice sideways by 1.7 % of the length
    if sideways > 0.01 * length:
        tilt = _numbers(headers[stack.names[0]], _TILT, 1)
        raise ValueError(
            f"{name_of(path)}: gantry tilt (slices shift sideways by {sideways:.1f} mm, header tilt "
            f"{0 if tilt is None else tilt[0]:g} degrees) is not supported; resample the series to upright "
            "slices first"
        )
    y_step, x_step = map(float, stack.pixel)  # of rows first; a reader may look elsewhere, by their class
    return Series(
        stack.names,
        (x_step, y_step, float(length) / (len(stack.names) - 1)),
        (x, y, z),
        tuple(float(v) for v in stack.axes.ravel()),
        total,
        len({tuple(headers[name].get(tag, "") for tag in _SCALE) for name in stack.names}) > 1,
        {Path(name): elements.stamp for name, elements in group.slices if name in sizes},
        uid,
        (*warnings, *(f"{name_of(path)}: {told}" for told in (copies, others) if told)),
    )


def _numbers(header: Mapping[str, str], tag: str, count: int) -> Points | None:
    values = np.array([number_of(part) for part in header.get(tag, "").split("\\")])
    return values if values.size == count and bool((np.abs(values) <= FARTHEST_MM).all()) else None


def _check_slice(name: str, header: Mapping[str, str]) -> None:
    modality = header.get(_MODALITY, "")
    frames, samples = header.get(_FRAMES) or "1", header.get(_SAMPLES) or "1"
    multi = (
        f"NumberOfFrames must be 1, got {shown(frames)}: multi-frame DICOM is not read; convert it to NIfTI"
    )
    for wrong, rule in (
        (modality != "CT", f"the DICOM modality must be CT, got {modality[:20] or 'none'}"),
        (_is_localizer(header), "a CT volume must be of axial slices, got a localizer (scout image)"),
        (frames != "1", f"{multi} first"),
        (samples != "1", f"a CT slice has one sample per pixel, got {samples}"),
    ):
        if wrong:
            raise ValueError(f"{name_of(name)}: {rule}")


@dataclass(frozen=True)
class _Stack:
    """Slices of one orientation, sorted along their normal."""

    names: tuple[str, ...]
    positions: Points
    axes: Points
    """(3, 3): columns are the directions of rows, of columns, and of the normal."""
    pixel: Points
    """Distance of rows, and of columns."""

    @property
    def along(self) -> Points:
        return self.positions @ self.axes[:, 2]

    def part(self, which: Sequence[int]) -> _Stack:
        return replace(self, names=tuple(self.names[n] for n in which), positions=self.positions[which])

    def name(self, n: int) -> str:
        """Name of a slice below the folder that all are in."""
        return name_of(os.path.relpath(self.names[n], os.path.commonpath(map(os.path.dirname, self.names))))


def _stack(path: Path, headers: Mapping[str, Mapping[str, str]]) -> _Stack:
    low, high = SPACING_MM
    fields = (
        (_ORIENTATION, "ImageOrientationPatient", 6, "six numbers"),
        (_POSITION, "ImagePositionPatient", 3, f"three numbers up to {FARTHEST_MM:g}"),
        (_PIXEL_SPACING, "PixelSpacing", 2, f"two numbers from {low:g} to {high:g} mm"),
    )
    first = next(iter(headers.values()))
    places: list[list[Points]] = []
    for name, header in headers.items():
        places.append([])
        for tag, what, count, rule in fields:
            values = _numbers(header, tag, count)
            if values is None or (count == 2 and not low <= values.min() <= values.max() <= high):
                got = shown(header.get(tag) or "none")
                raise ValueError(f"{name_of(name)}: {what} must be {rule}, got {got}")
            places[-1].append(values)
        (turn, _, pixel), (first_turn, _, first_pixel) = places[-1], places[0]
        same = {
            "ImageOrientationPatient": np.abs(turn - first_turn).max() <= _SAME_DIRECTION,
            "PixelSpacing": np.abs(pixel / first_pixel - 1).max() <= _SAME_SPACING,
            "Rows": header[_ROWS] == first[_ROWS],
            "Columns": header[_COLUMNS] == first[_COLUMNS],
        }
        if not all(same.values()):
            odd = " and ".join(what for what, is_same in same.items() if not is_same)
            raise ValueError(
                f"{name_of(name)}: all slices must share one orientation, size and pixel spacing; its {odd} "
                f"differ from {name_of(next(iter(headers)))}"
            )
    row, column = places[0][0].reshape(2, 3)
    normal = np.cross(row, column)
    lengths = [float(np.linalg.norm(axis)) for axis in (row, column, normal)]
    if max(abs(length - 1) for length in lengths) > 1e-2:  # cosines with three decimals stay below this
        raise ValueError(
            f"{name_of(path)}: ImageOrientationPatient must be two orthogonal unit vectors, got "
            f"{', '.join(f'{v:g}' for v in places[0][0])}"
        )
    positions = np.array([position for _, position, _ in places])
    left, _, right = np.linalg.svd(np.stack([row, column, normal], axis=1))
    axes = left @ right  # the nearest right angles, where cosines are rounded
    whole = _Stack(tuple(headers), positions, axes, places[0][2])
    return whole.part(np.argsort(whole.along, kind="stable").tolist())


def _without_copies(stack: _Stack) -> tuple[_Stack, str]:
    """Leave out files that repeat another byte by byte, as where a folder was copied; and a word on it."""
    kept: list[int] = []
    pairs, along = [], stack.along
    for n in range(len(along)):
        same = [k for k in kept[-9:] if along[n] - along[k] <= _SAME_PLACE]
        twin = next((k for k in same if filecmp.cmp(stack.names[k], stack.names[n], shallow=False)), None)
        if twin is None:
            kept.append(n)
        else:
            pairs.append((stack.name(twin), stack.name(n)))
    told = f"copies are left out: {len(pairs)}, the first {pairs[0][1]} of {pairs[0][0]}" if pairs else ""
    return stack.part(kept), told


def _one_acquisition(stack: _Stack, headers: Mapping[str, Mapping[str, str]]) -> tuple[_Stack, str]:
    """Of acquisitions that lie between each other and are regular alone, take the largest; and a word."""
    runs = [headers[name].get(_ACQUISITION, "") for name in stack.names]
    numbers = sorted(set(runs), key=lambda number: (-runs.count(number), number))
    if sum(a != b for a, b in itertools.pairwise(runs)) < len(numbers):
        return stack, ""  # one after another, or one
    parts = [stack.part([n for n, one in enumerate(runs) if one == number]) for number in numbers]
    each = [f"{shown(a)} with {len(part.names)} slices" for a, part in zip(numbers, parts, strict=True)]
    told = f"acquisitions are interleaved, by AcquisitionNumber {some_of(', ', each)}"
    if any(map(_fault, parts)):
        return stack, told
    most = float(np.ptp(parts[0].along))
    beyond = float(np.ptp(stack.along)) - most
    if beyond > max(0.25 * most, 2 * most / (len(parts[0].names) - 1)):  # two halves, not the same twice
        return stack, told
    return parts[0], f"{told}; reading {shown(numbers[0])}"


def _fault(stack: _Stack) -> str:
    """Tell what keeps slices from being a regular grid; empty where nothing does."""
    along, gaps = stack.along, np.diff(stack.along)
    if not gaps.size:
        return f"a CT volume needs at least two slices, the series has {len(along)}"
    step = float(along[-1] - along[0]) / gaps.size
    at = int(gaps.argmin())
    if gaps[at] <= max(_SAME_PLACE, 0.02 * step):
        return (
            f"two slices lie at the same position ({along[at]:.2f} mm along the normal): {stack.name(at)} "
            f"and {stack.name(at + 1)}"
        )
    off = stack.positions - np.linspace(stack.positions[0], stack.positions[-1], len(along))
    right, down, ahead = np.abs(off @ stack.axes).T
    aside = np.hypot(right, down)
    limit = min(max(0.05, 0.05 * step), step / 8)  # mm; where slices are thinner, 0.05 would hide one
    if ahead.max() > limit:
        return _irregularity(stack, int(ahead.argmax()), f"{ahead.max():.2f} mm off a regular grid", step)
    if aside.max() > limit:
        at = int(aside.argmax())
        return f"irregular slice positions: slice {at} ({stack.name(at)}) lies {aside[at]:.2f} mm sideways"
    return ""


def _irregularity(stack: _Stack, worst: int, off: str, step: float) -> str:
    """Tell two acquisitions from missing slices, and both from slices that are out of place."""
    along, gaps = stack.along, np.diff(stack.along)
    least, median = float(gaps.min()), float(np.sort(gaps)[gaps.size // 2])
    for period in (float(gaps.max()), float(np.median(along[2:] - along[:-2]))):
        phase = (along - along[0]) / period + 0.1
        sides = [phase[phase % 1 < 0.2], phase[phase % 1 >= 0.2]]
        whole = all(side.size > 2 and (np.diff(np.floor(side)) == 1).all() for side in sides)
        if whole and np.ptp(sides[1] % 1) < 0.2 and abs(np.mean(sides[1] % 1) - 0.6) > 0.08:
            return (
                f"two acquisitions are interleaved, of {sides[0].size} and {sides[1].size} slices "
                f"{period:.2f} mm apart, or slices are missing in turn: distances are {least:.2f} to "
                f"{gaps.max():.2f} mm"
            )
    odd = gaps[np.abs(gaps - median) > 0.3 * median] / median
    counts = np.rint(gaps / least)
    unit = float((gaps / counts).mean())
    whole = np.abs(gaps - counts * unit).max() < min(max(0.1 * unit, 0.1), 0.25 * unit)
    # where odd distances are as long as so many usual ones, none is missing
    if whole and abs(odd.sum() - odd.size) > 0.3:
        at = int((counts > 1).argmax())
        return (
            f"missing slices: {gaps[at]:.2f} mm between slices {at} and {at + 1}, {least:.2f} mm elsewhere; "
            f"they are {stack.name(at)} and {stack.name(at + 1)}"
        )
    return f"irregular slice spacing: slice {worst} ({stack.name(worst)}) lies {off} of {step:.2f} mm"
