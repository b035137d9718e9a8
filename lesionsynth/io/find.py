"""Find the CT that a command is given: files, folders of files, DICOM folders, and folders of all these."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from lesionsynth.io.dicom import (
    SeriesInfo,
    folders_below,
    join_series,
    largest_first,
    largest_series,
    list_series,
)
from lesionsynth.io.names import NO_CT, SUFFIXES, case_name
from lesionsynth.strict import name_of, some_of

Inputs = Sequence[str | os.PathLike[str]]
T = TypeVar("T")
_MASK_FOLDER = re.compile(
    r"((lungs?|lesions?|infection|ground|and)[\W_]*)*"
    r"(masks?|masken?|labels?|labelst[rs]|labelsval|segmentations?|annotations?|gt|truth)"
    r"|lungs|lesions|seg-lungs-luna16",
    re.IGNORECASE,
)
"""Whole names of folders inside an input that hold masks under the names of their CT. One of other words,
``with_masks``, may well hold CT, and "lung" is a kernel, too."""
_NOT_READ = (
    *(".img", ".hdr", ".img.gz", ".hdr.gz", ".mgz", ".mgh", ".mnc"),
    *(".bz2", ".xz", ".zip", ".7z", ".rar", ".tar", ".tgz", ".tar.gz", ".dcm.gz", ".nrrd.gz", ".mha.gz"),
)
"""Ends of the names of files that may well hold a CT, but in no format that is read."""


@dataclass(frozen=True)
class Passed:
    """What was passed over.

    Attributes
    ----------
    path : Path
        A file or folder.
    why : str
        The reason.
    named : bool
        It was given itself, and did not lie in a folder that was given; or it is a part of a series that
        cannot be read without the others.
    """

    path: Path
    why: str
    named: bool = False

    def __str__(self) -> str:
        """One line: what, and why."""
        return f"{name_of(self.path)}: {self.why}"


class Found(list[T]):
    """A list of what was found; `passed` are the `Passed` that were not taken."""

    def __init__(self, items: Iterable[T] = (), passed: Sequence[Passed] = ()) -> None:
        super().__init__(items)
        self.passed = tuple(passed)

    @property
    def over(self) -> str:
        """The end of an error's text, that tells what was passed over; empty where nothing was."""
        return f"; passed over: {some_of('; ', list(map(str, self.passed)))}" if self.passed else ""


@dataclass(frozen=True)
class Source:
    """One CT to work on.

    Attributes
    ----------
    case : str
        Name of the case.
    path : Path
        A volume file or a DICOM folder: what `lesionsynth.io.read_ct` takes. Of a series that lies in several
        folders, the folder that holds them all.
    series : str or None
        SeriesInstanceUID, for a DICOM folder.
    files : tuple of Path
        What is read: the file, or those of the series.
    """

    case: str
    path: Path
    series: str | None
    files: tuple[Path, ...] = field(default=(), compare=False, repr=False)


def find_sources(
    inputs: Inputs,
    *,
    series: str = "largest",
    names: Sequence[str] | None = None,
    case_of: Callable[[Path], str] = case_name,
    output: Path | None = None,
) -> Found[Source]:
    """Find every CT in files and folders.

    Parameters
    ----------
    inputs : sequence of paths
        Volume files, DICOM files (their series, once), and folders. Folders are searched to any depth for
        volume files and DICOM series. Passed over are files inside whose name says that they are a mask or a
        map (``a_lung.nii.gz``, ``a_lesions.nii.gz``, ``a_probability.nii.gz``), all that lies in a folder
        inside that is named ``masks``, ``lungs`` or ``labelsTr``, broken links, formats that are not read,
        and copies of a series; hidden files without a word. A folder with ``subset*`` folders in it is
        LUNA16: only these are searched. A series whose slices lie in several folders is one CT.
    series : str
        Of a DICOM folder with several series: "largest", the readable CT of most slices (a warning names it
        and the others); "all", each CT that is no localizer; or a SeriesInstanceUID, for which folders
        without it are passed over.
    names : sequence of str, optional
        Names of the cases, one per CT found.
    case_of : callable
        Name of the case of a volume file or a DICOM folder. Where two in one input have the same, the folders
        above them go in front; with "all", the series of one folder end in ``_s1``, ``_s2``, the largest
        first.
    output : Path, optional
        Results of earlier calls: this folder is not searched where it lies inside an input.

    Returns
    -------
    Found of Source
        In the order of `inputs`; within a folder by path. A DICOM folder without a readable CT is among them,
        so that it is reported when it is read.

    Raises
    ------
    FileNotFoundError
        An input does not exist.
    ValueError
        No inputs, or no CT among them; a folder with no CT in it (the error says what was passed over); a UID
        that is nowhere (the error names those there); `names` of another length; two cases of one name.
    """
    if not inputs:
        raise ValueError("inputs must name at least one CT")
    look = _Look(inputs, output)
    found = look.chosen(series)
    if series in ("largest", "all"):
        for given in map(Path, inputs):
            if given.is_dir() and not any(_is_below(path, given) for path in look.held):
                own = [one for one in look.passed if _is_below(one.path, given)]
                raise ValueError(
                    f"{name_of(given)}: a folder must hold CT ({', '.join(SUFFIXES)}) or DICOM series, found "
                    f"none{Found((), own).over}"
                )
        if not found:
            raise ValueError(f"inputs must hold at least one CT, found none{Found((), look.passed).over}")
    elif not any(one.info is not None and one.info.uid == series for one in found):
        there = some_of("; ", [str(info) for place in look.places for info in place.infos]) or "none"
        raise ValueError(
            f"series must be largest, all or the UID of one that is there ({there}), got {name_of(series)}"
        )
    for note in dict.fromkeys(one.note for one in found if one.note):
        warnings.warn(note, stacklevel=2)
    cases = _named(found, names, case_of)
    return Found([one.source(case) for case, one in zip(cases, found, strict=True)], look.passed)


def dicom_folders(inputs: Inputs) -> Found[tuple[Path, list[SeriesInfo]]]:
    """Find the DICOM folders in inputs, as `find_sources` does and with its errors, and their series."""
    look = _Look(inputs)
    return Found([(place.path, place.infos) for place in look.places if place.infos], look.passed)


@dataclass(frozen=True, eq=False)
class _Place:
    """A volume file, or a DICOM folder and its series, and the input it was found by."""

    given: Path
    path: Path
    infos: list[SeriesInfo] = field(default_factory=list)
    name: Path | None = None
    """What names its case, where that is not `path`."""


@dataclass(frozen=True)
class _Chosen:
    """A CT to take: of a DICOM folder one series, and what is said of the others."""

    place: _Place
    info: SeriesInfo | None = None
    suffix: str = ""
    note: str = ""

    @property
    def named(self) -> Path:
        return self.place.name or self.place.path

    def source(self, case: str) -> Source:
        if self.info is None:
            return Source(case, self.place.path, None, (self.place.path,))
        return Source(case, self.place.path, self.info.uid, tuple(map(Path, self.info.files)))


class _Look:
    """One walk through all inputs: the CT that are there, and what was passed over."""

    def __init__(self, inputs: Inputs, output: Path | None = None) -> None:
        self._inputs = [Path(given) for given in inputs]
        self.places: list[_Place] = []
        self.passed: list[Passed] = []
        self._output = None if output is None else output.resolve()
        self._listed: dict[Path, list[SeriesInfo]] = {}  # every slice is opened for that: once a folder
        for given in self._inputs:
            if not os.path.lexists(given):
                raise FileNotFoundError(f"{name_of(given)}: no such file or folder")
            if given.is_dir():
                self._walk(given)
            else:
                self._file(given)
        self.held = [place.path for place in self.places]
        infos = (info for place in self.places for info in place.infos)
        uids = Counter(info.uid for info in infos if info.modality == "CT" and not info.localizer)
        for uid in [uid for uid, count in uids.items() if count > 1]:
            self._join(uid)
        self.places = [self._name(place) for place in self.places]
        taken = {os.path.abspath(place.path) for place in self.places}  # by another input
        over = {os.path.abspath(one.path): one for one in sorted(self.passed, key=lambda one: one.named)}
        self.passed = [one for path, one in over.items() if path not in taken]

    def chosen(self, series: str) -> list[_Chosen]:
        """CT to take, each once unless a file was named twice."""
        chosen: list[_Chosen] = []
        named: dict[tuple[str, str], bool] = {}
        for place in self.places:
            for one in _choose(place, series):
                key = (os.path.abspath(place.path), "" if one.info is None else one.info.uid)
                is_named = place.path == place.given and not place.infos
                if key not in named or (is_named and named[key]):
                    named[key] = is_named
                    chosen.append(one)
        return chosen

    def _series(self, folder: Path) -> list[SeriesInfo]:
        if folder not in self._listed:
            self._listed[folder] = list_series(folder)
        return list(self._listed[folder])

    def _file(self, path: Path) -> None:
        infos: list[SeriesInfo] = []
        if why := _lost(path):
            self.passed.append(Passed(path, why, named=True))
            return
        if path.suffix.lower() == ".dcm" and path.is_file():
            infos = [info for info in self._series(path.parent) if info.uid and str(path) in info.files]
        if any(place.path == path.parent and place.infos == infos for place in self.places if infos):
            return  # another file of the series
        # without series, read_ct says what is wrong with it
        self.places.append(_Place(path, path.parent if infos else path, infos))

    def _walk(self, root: Path) -> None:
        """Take what is in a folder and in those inside it, by path."""
        whys: dict[Path, str] = {}

        def enter(inside: list[Path]) -> list[Path]:
            subsets = any(re.fullmatch(r"subset\d+", p.name) for p in inside)
            whys.update({p: whys.get(p.parent) or _no_ct_in(p, subsets) for p in inside})
            return [p for p in inside if p.resolve() != self._output]

        for folder in folders_below(root, enter):
            why = whys.get(folder, "")
            try:
                infos = [] if why else self._series(folder)
                slices = {name for info in infos for name in info.files}
                inside = [p for p in sorted(folder.iterdir()) if p.name[0] != "." and str(p) not in slices]
            except OSError:
                self.places.append(_Place(root, folder))  # read_ct says that it cannot be read
                continue
            files = [p for p in inside if not os.path.isdir(p)]
            for file in files:
                if no_ct := _no_ct(file, why):
                    self.passed.append(Passed(file, no_ct))
                elif file.name.lower().endswith(SUFFIXES):
                    self.places.append(_Place(root, file))
            if infos:
                self.places.append(_Place(root, folder, infos))
            elif why and any(map(_is_dicom, files)):
                self.passed.append(Passed(folder, why))

    def _join(self, uid: str) -> None:
        """Make one place of the folders that hold parts of a series; pass over those that hold copies."""
        parts = [(place, info) for place in self.places for info in place.infos if info.uid == uid]
        if len({os.path.abspath(info.folder) for _, info in parts}) < 2:
            return
        (whole,) = join_series([info for _, info in parts])
        own = next((p for p, info in parts if whole.usable and info.slices == whole.slices), None)
        if own is None and any(_is_below(whole.folder, given) for given in self._inputs):
            first, infos = parts[0][0], [whole]
            for place in dict.fromkeys(place for place, _ in parts):
                infos += [info for info in place.infos if info.uid != uid]
            joined = _Place(first.given, whole.folder, largest_first(infos), first.name or first.path)
            self.places[self.places.index(first)] = joined
            self.places = [place for place in self.places if all(place is not part for part, _ in parts)]
            return
        if own is None:  # all that lies in and below a folder is searched for slices: none but the inputs are
            why = f"a part of series {uid}; give all parts, {name_of(whole.folder)}, or one"
        else:
            why = f"a copy or another acquisition: series {uid} is whole in {name_of(own.path)}"
        for place, info in parts:
            if own is None or place.path != own.path:
                place.infos.remove(info)
                self.passed.append(Passed(place.path, why, own is None or place.path == place.given))
                if place in self.places and not any(map(_is_volume, place.infos)):
                    self.places.remove(place)

    def _name(self, place: _Place) -> _Place:
        """Name a joined series after the folder of all its parts where nothing else is there."""
        if place.name is None:
            return place
        others = [other for other in self.places if other is not place and _is_below(other.path, place.path)]
        return place if others else replace(place, name=None)


def _is_volume(info: SeriesInfo) -> bool:
    return info.modality == "CT" and not info.localizer and info.slices > 1


def _choose(place: _Place, series: str) -> list[_Chosen]:
    """Choose among the series of one place."""
    infos = place.infos
    if not infos:
        return [_Chosen(place)]
    if series not in ("largest", "all"):
        return [_Chosen(place, info) for info in infos if info.uid == series]
    volumes = [info for info in infos if _is_volume(info)]
    chosen = volumes if series == "all" and volumes else [largest_series(infos)]
    note = ""
    if left := [info for info in infos if info not in chosen]:
        took = some_of(", ", [name_of(info.uid) for info in chosen])
        rest = some_of("; ", [str(info) for info in left])
        note = f"{name_of(place.path)}: several DICOM series; taking {took}; left: {rest}; --series chooses"
    several = len(chosen) > 1
    return [_Chosen(place, info, f"_s{n}" * several, note) for n, info in enumerate(chosen, 1)]


def _lost(path: Path) -> str:
    """Why a file cannot be taken, whatever it is for; empty where it may be."""
    if not os.path.exists(path):
        return "a link that leads nowhere"
    if path.name.lower().endswith(_NOT_READ):
        return "of no format that is read; convert it to NIfTI (.nii.gz)"
    return ""


def _no_ct(path: Path, why: str) -> str:
    """Why a file inside a folder is no CT; empty where it is one, or nothing that anyone takes for one."""
    if lost := _lost(path):
        return lost
    if not path.name.lower().endswith(SUFFIXES):
        return ""
    if why or not os.path.isfile(path):
        return why or "no regular file"
    case = case_name(path)
    last = re.split(r"[_-]", case.lower())[-1]
    mapped = last in ("healthy", "classical")
    if mapped and path.with_name(f"{case[: -len(last)]}lesions.nii.gz").exists():
        return "a map of normnet.predict"  # by itself the word may well describe a CT
    if last in NO_CT or ".seg." in path.name.lower():
        return "named as a mask or a map is; give the file itself to read it as a CT"
    return ""


def _no_ct_in(folder: Path, subsets: bool) -> str:
    """Why what lies in a folder inside an input is no CT; empty where it may be."""
    if subsets and not re.fullmatch(r"subset\d+", folder.name):
        return "beside folders subset*, of which alone LUNA16 consists; give the folder itself to search it"
    if _MASK_FOLDER.fullmatch(folder.name):
        return (
            f"in {name_of(folder.name)}, as folders of masks are named; give that folder itself to search it"
        )
    return ""


def _is_dicom(path: Path) -> bool:
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as stream:
                return stream.read(132)[128:] == b"DICM"
    return False


def _named(
    found: Sequence[_Chosen], names: Sequence[str] | None, case_of: Callable[[Path], str]
) -> list[str]:
    """Names of the cases, that differ."""
    if names is not None and len(names) != len(found):
        count = f"{len(names)} name{'' if len(names) == 1 else 's'}"
        raise ValueError(f"names (--name) must be one for each CT found, got {count} for {len(found)} CT")
    cases = list(names) if names is not None else _unlike(found, case_of)
    twice = sorted(name for name, count in Counter(cases).items() if count > 1)
    if twice:
        names_of = some_of(", ", [name_of(name) for name in twice])
        here = [name_of(one.place.path) for case, one in zip(cases, found, strict=True) if case == twice[0]]
        raise ValueError(
            f"case names must differ, got {names_of} more than once, from {some_of(', ', here)}; give names"
        )
    return cases


def _unlike(found: Sequence[_Chosen], case_of: Callable[[Path], str]) -> list[str]:
    """Put so many of the folders above in front of equal names that they differ, as far as there are any."""
    ups = [0] * len(found)
    above = [_between(one.place.given, one.named) for one in found]
    while True:
        cases = [
            "_".join((*above[n][len(above[n]) - ups[n] :], case_of(one.named))) + one.suffix
            for n, one in enumerate(found)
        ]
        count = Counter(cases)
        longer = [n for n, case in enumerate(cases) if count[case] > 1 and ups[n] < len(above[n])]
        if not longer:
            return cases
        for n in longer:
            ups[n] += 1


def _between(root: Path, path: Path) -> tuple[str, ...]:
    """Folders from an input down to what was found in it."""
    return Path(os.path.relpath(path, root)).parts[:-1] if _is_below(path, root) else ()


def _is_below(path: Path, root: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))
