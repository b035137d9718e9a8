"""Find the CT of cases that were predicted or annotated, under the names that `normnet.predict` gives.

Where a prediction recorded the DICOM series it was made from, that very series is found, whatever its folder
is called now; every other CT is found by name.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lesionsynth.io.find import Source, dicom_folders, find_sources
from lesionsynth.io.names import case_name, split_name
from lesionsynth.strict import name_of

_CT = (None, "ct")
"""Roles of files that may be CT: the name says nothing, or that."""


@dataclass(frozen=True)
class Wanted:
    """What is known of a CT to find.

    Attributes
    ----------
    case : str
        Name of its case.
    name : str
        The name before words that tell a role were taken off, which `normnet.predict` may have meant:
        ``a_CT`` of ``a_CT_lesions.nii.gz``, whose case is ``a``.
    series : str or None
        SeriesInstanceUID that was recorded.
    """

    case: str
    name: str
    series: str | None = None


def find_scans(inputs: Sequence[Path], wanted: Sequence[Wanted]) -> dict[str, Source]:
    """Find the CT of cases.

    Parameters
    ----------
    inputs : sequence of Path
        Files, DICOM folders, and folders of these at any depth, searched as
        `find_sources` does. Files whose names say that they are no CT are passed over.
    wanted : sequence of Wanted
        The cases.

    Returns
    -------
    dict of str to Source
        By case; those without a CT are not in it. Of a DICOM folder with several series, none of which was
        recorded, the largest, as `normnet.predict` takes it; ``..._s2`` is the second of all.

    Raises
    ------
    FileNotFoundError
        An input does not exist.
    ValueError
        Several CT fit a case equally well, or the folder of its name does not hold the recorded series.
    """
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{name_of(path)}: no such file or folder")
    given = [p for p in inputs if p.is_dir() or p.suffix.lower() == ".dcm" or _may_be_ct(p)]
    folders = dicom_folders(given) if any(one.series is not None for one in wanted) else []
    names = _Names(given)
    found = {}
    for one in wanted:
        there = [path for path, infos in folders if any(info.uid == one.series for info in infos)]
        if len(there) == 1:
            found[one.case] = Source(one.case, there[0], one.series)
            continue
        source = names.find(one)
        if source is not None and source.path in there:
            found[one.case] = Source(one.case, source.path, one.series)
        elif there or (one.series is not None and source is not None and source.series is not None):
            raise ValueError(_wrong_series(one, there, source))
        elif source is not None:  # by name alone, or a file that was made of the series
            found[one.case] = source
    return found


class _Names:
    """CT by name. Folders are searched when the first name is asked for: opening every slice takes long."""

    def __init__(self, inputs: Sequence[Path]) -> None:
        self._inputs = inputs
        self._sources: dict[str, list[Source]] = {}
        self._several: list[str] = []

    def find(self, one: Wanted) -> Source | None:
        """Return the CT that fits best; None where none does."""
        for series in ("largest", "all"):
            if series not in self._sources:
                with warnings.catch_warnings(record=True) as said:
                    # of folders that nobody asks for, which series would be taken is no news
                    warnings.simplefilter("always", UserWarning)
                    self._sources[series] = _sources(self._inputs, series)
                self._several += [str(one.message) for one in said if series == "largest"]
            for fits in _ways(one):
                there = [source for source in self._sources[series] if fits(source)]
                if len(there) > 1:
                    paths = " and ".join(name_of(source.path) for source in there)
                    raise ValueError(f"ct of case {one.case!r} must be one file or folder, got {paths}")
                if there:
                    for text in self._several:
                        if series == "largest" and text.startswith(f"{name_of(there[0].path)}: "):
                            warnings.warn(text, stacklevel=4)
                    return there[0]
        return None


def _ways(one: Wanted) -> Iterator[Callable[[Source], bool]]:
    """Ways in which a CT may have the name of a case, the surest first."""
    yield lambda source: source.case == one.name
    yield lambda source: source.case == one.case
    yield lambda source: _is_case(Path(source.case), one.case)
    # predicted from its own folder, in which no other CT had its name
    yield lambda source: _is_case(source.path, one.case)


def _may_be_ct(path: Path) -> bool:
    case, role = split_name(path)
    return role == "ct" or (role is None and case == case_name(path))  # else it ends in "mask"


def _is_case(path: Path, case: str) -> bool:
    name, role = split_name(path)
    return name == case and role in _CT


def _sources(inputs: Sequence[Path], series: str) -> list[Source]:
    """Every CT; an input without one has none, which is told where a case lacks its CT."""
    if not inputs:
        return []
    try:
        return find_sources(inputs, series=series, case_of=_namer())
    except ValueError:
        held = [path for path in inputs if _holds_ct(path)]
        if len(held) == len(inputs):
            raise
        return find_sources(held, series=series, case_of=_namer()) if held else []


def _holds_ct(path: Path) -> bool:
    try:
        # a path is a name that no other CT has: that there is none is all that can be wrong
        return bool(find_sources([path], case_of=os.fspath))
    except ValueError:
        return False


def _namer() -> Callable[[Path], str]:
    """Name CT as `normnet.predict` does; but ``a.nii.gz`` beside ``a_hu.nii.gz`` is not the CT of ``a``."""
    named: dict[Path, set[str]] = {}

    def name(path: Path) -> str:
        case, role = split_name(path)
        if role is not None or not path.is_file():
            return case
        if path.parent not in named:
            roles = (split_name(file) for file in path.parent.iterdir() if file.is_file())
            named[path.parent] = {other for other, its in roles if its == "ct"}
        return path.name if case in named[path.parent] else case

    return name


def _wrong_series(one: Wanted, there: Sequence[Path], source: Source | None) -> str:
    others = [] if source is None else [f"{source.series} in {name_of(source.path)}"]
    got = " and ".join(map(name_of, there)) or others[0]
    rule = f"must be the series that was predicted, {name_of(one.series or '')}, in one folder"
    return f"ct of case {one.case!r} {rule}, got {got}"


def name_of_map(prediction: Path) -> str:
    """Return the name that `normnet.predict` gave to the case of a lesion map."""
    return case_name(prediction).removesuffix("_lesions")
