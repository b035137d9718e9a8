"""Find the CT that a command is given: files, folders of files, DICOM folders, and folders of all these."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lesionsynth.io.dicom import SeriesInfo, largest_series
from lesionsynth.io.names import SUFFIXES, case_name, split_name
from lesionsynth.io.read import list_series
from lesionsynth.strict import name_of, some_of

Inputs = Sequence[str | os.PathLike[str]]
_Listed = dict[Path, list[SeriesInfo]]
"""DICOM series by folder: every slice is opened to list them, so this is done once."""
_MASK_WORDS = frozenset({"mask", "msk", "masks", "core", "lobes"})
"""Last words of a file's name that say "no CT" although `split_name` knows no role for them."""
_MASK_FOLDERS = frozenset({"mask", "masks", "labelstr", "labelsts", "lungs", "lesions", "seg-lungs-luna16"})
"""Folders inside an input that hold masks under the names of their CT."""


@dataclass(frozen=True)
class Source:
    """One CT to work on.

    Attributes
    ----------
    case : str
        Name of the case.
    path : Path
        A volume file or a DICOM folder: what `lesionsynth.io.read_ct` takes.
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
) -> list[Source]:
    """Find every CT in files and folders.

    Parameters
    ----------
    inputs : sequence of paths
        Volume files, DICOM files (their series, once), and folders. Folders are searched to any depth for
        volume files and DICOM series; hidden files are passed over, and so are files whose name says that
        they are a mask or a map (``a_lung.nii.gz``, ``a_lesions.nii.gz``, ``a_probability.nii.gz``) and
        folders inside that are named ``masks`` or ``labelsTr``. A folder with ``subset*`` folders in it is
        LUNA16: only these are searched.
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

    Returns
    -------
    list of Source
        In the order of `inputs`; within a folder by path. A DICOM folder without a readable CT is among them,
        so that it is reported when it is read.

    Raises
    ------
    FileNotFoundError
        An input does not exist.
    ValueError
        No inputs; a folder with no CT in it; a UID that is nowhere (the error names those there); `names`
        of another length; two cases of one name.
    """
    if not inputs:
        raise ValueError("inputs must name at least one CT")
    found: list[_Found] = []
    listed: _Listed = {}
    for given in inputs:
        root = Path(given)
        new = list(_below(root, series, listed))
        if not new and series in ("largest", "all"):
            raise ValueError(
                f"{name_of(root)}: a folder must hold CT ({', '.join(SUFFIXES)}) or DICOM series, found none"
            )
        known = {(f.path, f.series) for f in found if f.is_dicom}
        found.extend(f for f in new if not f.is_dicom or root.is_dir() or (f.path, f.series) not in known)
    if series not in ("largest", "all") and not any(f.series == series for f in found):
        there = some_of("; ", [str(info) for infos in listed.values() for info in infos]) or "none"
        raise ValueError(
            f"series must be largest, all or the UID of one that is there ({there}), got {name_of(series)}"
        )
    cases = _named(found, names, case_of)
    return [
        Source(case, f.path, f.series, f.files or (f.path,)) for case, f in zip(cases, found, strict=True)
    ]


def dicom_folders(inputs: Inputs) -> list[tuple[Path, list[SeriesInfo]]]:
    """Find the DICOM folders in inputs, as `find_sources` does, with what each holds.

    Parameters
    ----------
    inputs : sequence of paths
        See `find_sources`.

    Returns
    -------
    list of (Path, list of SeriesInfo)
        Each folder once; its series as `lesionsynth.io.list_series` gives them.

    Raises
    ------
    FileNotFoundError
        An input does not exist.
    """
    folders: dict[Path, list[SeriesInfo]] = {}
    for given in inputs:
        root = Path(given)
        if not root.exists():
            raise FileNotFoundError(f"{name_of(root)}: no such file or folder")
        if not root.is_dir() and root.suffix.lower() != ".dcm":
            continue
        for folder in _folders(root) if root.is_dir() else [root.parent]:
            if folder in folders:
                continue
            with suppress(OSError):
                if infos := list_series(folder):
                    folders[folder] = infos
    return list(folders.items())


@dataclass(frozen=True)
class _Found:
    root: Path
    path: Path
    series: str | None
    is_dicom: bool = False
    suffix: str = ""
    files: tuple[Path, ...] = ()


def _below(root: Path, series: str, listed: _Listed) -> Iterator[_Found]:
    """CT of one input."""
    if not root.exists():
        raise FileNotFoundError(f"{name_of(root)}: no such file or folder")
    if not root.is_dir():
        yield from _of_file(root, series, listed)
        return
    for folder in _folders(root):
        try:
            files = [file for file in sorted(folder.iterdir()) if _is_volume(file)]
            infos = _series_in(folder, listed)
        except OSError:
            yield _Found(root, folder, None)  # read_ct says that it cannot be read
            continue
        for file in files:
            yield _Found(root, file, None)
        yield from _of_series(root, folder, infos, series)


def _series_in(folder: Path, listed: _Listed) -> list[SeriesInfo]:
    if folder not in listed:
        listed[folder] = list_series(folder)
    return listed[folder]


def _of_file(path: Path, series: str, listed: _Listed) -> Iterator[_Found]:
    if path.suffix.lower() != ".dcm":
        yield _Found(path.parent, path, None)
        return
    if not path.is_file():
        yield _Found(path.parent, path, None)  # a pipe, say: read_ct says so
        return
    infos = [info for info in _series_in(path.parent, listed) if info.uid and str(path) in info.files]
    if infos:
        yield from _of_series(path.parent, path.parent, infos, series)
    else:
        yield _Found(path.parent, path, None)  # read_ct says what is wrong with it


def _of_series(root: Path, folder: Path, infos: list[SeriesInfo], series: str) -> Iterator[_Found]:
    """Choose among the series of one folder."""
    if not infos:
        return
    if series not in ("largest", "all"):
        for info in infos:
            if info.uid == series:
                yield _Found(root, folder, series, is_dicom=True, files=_files(info))
        return
    volumes = [i for i in infos if i.modality == "CT" and not i.localizer and i.slices > 1]
    chosen = volumes if series == "all" and volumes else [largest_series(infos)]
    left = [info for info in infos if info not in chosen]
    if left:
        took = some_of(", ", [name_of(info.uid) for info in chosen])
        rest = some_of("; ", [str(info) for info in left])
        warnings.warn(
            f"{name_of(folder)}: several DICOM series; taking {took}; left: {rest}; --series chooses",
            stacklevel=4,
        )
    for number, info in enumerate(chosen, start=1):
        suffix = f"_s{number}" if len(chosen) > 1 else ""
        yield _Found(root, folder, info.uid, is_dicom=True, suffix=suffix, files=_files(info))


def _files(info: SeriesInfo) -> tuple[Path, ...]:
    return tuple(Path(name) for name in info.files)


def _folders(root: Path) -> Iterator[Path]:
    """Walk a folder and those inside it, sorted; each once, whatever links lead to it."""
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
            inside = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
        subsets = [p for p in inside if re.fullmatch(r"subset\d+", p.name)]
        inside = subsets or [p for p in inside if p.name.lower() not in _MASK_FOLDERS]
        yield folder
        waiting.extend(reversed(inside))


def _is_volume(path: Path) -> bool:
    name = path.name.lower()
    if name[0] == "." or not name.endswith(SUFFIXES) or not path.is_file():
        return False
    last = re.split(r"[_-]", case_name(path).lower())[-1]
    if last == "healthy" and path.with_name(f"{case_name(path)[: -len('healthy')]}lesions.nii.gz").exists():
        return False  # a map that `normnet.predict` wrote; by itself the word may well describe a CT
    return split_name(path)[1] in (None, "ct") and last not in _MASK_WORDS


def _named(found: Sequence[_Found], names: Sequence[str] | None, case_of: Callable[[Path], str]) -> list[str]:
    """Names of the cases, that differ."""
    if names is not None and len(names) != len(found):
        count = f"{len(names)} name{'' if len(names) == 1 else 's'}"
        raise ValueError(f"names (--name) must be one for each CT found, got {count} for {len(found)} CT")
    cases = list(names) if names is not None else _unlike(found, case_of)
    twice = sorted(name for name, count in Counter(cases).items() if count > 1)
    if twice:
        names_of = some_of(", ", [name_of(name) for name in twice])
        raise ValueError(f"case names must differ, got {names_of} more than once; give names")
    return cases


def _unlike(found: Sequence[_Found], case_of: Callable[[Path], str]) -> list[str]:
    """Put so many of the folders above in front of equal names that they differ, as far as there are any."""
    ups = [0] * len(found)
    above = [f.path.relative_to(f.root).parts[:-1] for f in found]
    while True:
        cases = [
            "_".join((*above[n][len(above[n]) - ups[n] :], case_of(f.path))) + f.suffix
            for n, f in enumerate(found)
        ]
        count = Counter(cases)
        longer = [n for n, case in enumerate(cases) if count[case] > 1 and ups[n] < len(above[n])]
        if not longer:
            return cases
        for n in longer:
            ups[n] += 1
