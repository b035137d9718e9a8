"""Which files form a case: a CT, its lungs, its annotated lesions; and what is said about it.

A case has the name of its CT without the format's suffix. In a folder of masks its file is ``p1.nii.gz``, or
the only one whose name begins with ``p1_``. A table names all files instead: ``cases.csv`` with the columns
case, ct, lungs, lesions, and paths relative to it.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from lesionsynth.commands import printable
from lesionsynth.io import SUFFIXES, Found, Passed, Source, case_name, find_sources
from lesionsynth.strict import name_of, read_text, shown, some_of
from normnet.sheets import plain

COLUMNS = ("case", "ct", "lungs", "lesions")
"""Of a table of cases; the first two must be filled."""
MOST_TABLE = 2**26
"""Longest table of cases in bytes."""
FORESEEN = (ValueError, OSError, MemoryError, ImportError)
"""Errors whose text says what is wrong with a file or a machine; of others the type is told, too."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The files of one case.

    Attributes
    ----------
    case : str
        Its name: results are called ``<case>_...``.
    ct : Path
        A volume file or a DICOM folder: what `lesionsynth.io.read_ct` takes.
    series : str or None
        SeriesInstanceUID, for a DICOM folder.
    files : tuple of Path
        What is read of the CT: the file, or those of the series.
    lungs, lesions : Path or None
        Masks on the CT's grid: lungs with the lesions in them, annotated lesions.
    more : mapping of str to Path
        Further columns of a table.
    problem : str
        Why the case cannot be worked on; empty where it can.
    """

    case: str
    ct: Path
    series: str | None = None
    files: tuple[Path, ...] = field(default=(), compare=False, repr=False)
    lungs: Path | None = None
    lesions: Path | None = None
    more: Mapping[str, Path] = field(default_factory=dict)
    problem: str = ""

    @property
    def inputs(self) -> list[Path]:
        """Every file that is read."""
        return [*self.files, *(p for p in (self.lungs, self.lesions, *self.more.values()) if p is not None)]


def find_cases(
    inputs: Sequence[Path],
    *,
    masks: Path | None = None,
    truth: Path | None = None,
    series: str = "largest",
    names: Sequence[str] | None = None,
    output: Path | None = None,
    columns: Sequence[str] = (),
) -> Found[Case]:
    """Find the files of every case.

    Parameters
    ----------
    inputs : sequence of Path
        CT: files, DICOM folders and folders of these, see `lesionsynth.io.find_sources`; or one ``.csv``, see
        `read_table`, which names everything.
    masks, truth : Path, optional
        Folders with the lungs and with the annotated lesions of each case, see `match`; or a file, for a
        single CT.
    series : str
        Of a DICOM folder with several: "largest", "all", or a SeriesInstanceUID.
    names : sequence of str, optional
        Names of the cases, one per CT; those of the files where omitted.
    output : Path, optional
        Results of earlier calls: not searched for CT.
    columns : sequence of str
        What a table may have beside `COLUMNS`.

    Returns
    -------
    Found of Case
        One without its masks has a `problem`. ``passed`` lists what was not taken for a CT.

    Raises
    ------
    FileNotFoundError
        A path does not exist.
    ValueError
        As `find_sources`; no case has a file in `masks` or `truth`; or these or `names` beside a table.
    """
    tables = [path for path in inputs if path.suffix.lower() == ".csv"]
    if tables:
        given = {"inputs": inputs[1:], "masks": masks, "truth": truth, "names": names}
        if wrong := [name for name, value in given.items() if value]:
            raise ValueError(f"{wrong[0]} must be omitted beside a table of cases, {name_of(tables[0])}")
        return Found(read_table(tables[0], series=series, columns=columns))
    sources = find_sources(inputs, series=series, names=names, output=output)
    cases = [
        Case(case=source.case, ct=source.path, series=source.series, files=source.files) for source in sources
    ]
    for argument, role, folder in (("masks", "lungs", masks), ("truth", "lesions", truth)):
        if folder is None:
            continue
        files, problems = match(folder, cases, argument)
        for number, case in enumerate(cases):
            found: dict[str, Any] = {role: files.get(case.case)}
            cases[number] = replace(case, problem=case.problem or problems.get(case.case, ""), **found)
    return Found(cases, sources.passed)


def match(folder: Path, cases: Sequence[Case], argument: str) -> tuple[dict[str, Path], dict[str, str]]:
    """Find the file of each case in a folder: ``<case>.nii.gz``, else the only one of ``<case>_*``.

    Parameters
    ----------
    folder : Path
        With volume files, not searched deeper; or a file, for a single case. A file whose name begins with
        those of two cases is of the longer one; a CT of a case is no mask.
    cases : sequence of Case
        What to look for.
    argument : str
        What named the folder, for messages.

    Returns
    -------
    files : dict of str to Path
        By case.
    problems : dict of str to str
        Why the other cases have none.

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    ValueError
        It is a file for several cases, or holds a file for none of them.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{argument} must exist, got {folder}: no such file or folder")
    if not folder.is_dir():
        if len(cases) > 1:
            raise ValueError(f"{argument} must be a folder where there are several CT, got the file {folder}")
        return {cases[0].case: folder}, {}
    ct = {path.resolve() for case in cases for path in case.files}
    there = [
        path
        for path in sorted(folder.iterdir())
        if path.name.lower().endswith(SUFFIXES) and path.name[0] != "." and path.resolve() not in ct
    ]
    fits: dict[str, list[Path]] = defaultdict(list)
    for path in there:
        name = case_name(path)
        if owners := [c.case for c in cases if name == c.case or name.startswith(f"{c.case}_")]:
            fits[max(owners, key=len)].append(path)
    files, problems = {}, {}
    for case in (c.case for c in cases):
        found = [path for path in fits[case] if case_name(path) == case] or fits[case]
        if len(found) == 1:
            files[case] = found[0]
            continue
        listed = some_of(", ", [name_of(path.name) for path in found or there])
        rule = f"{argument} must hold {case}.nii.gz, or one file of {case}_*.nii.gz"
        problems[case] = f"{rule}, got {listed or 'no file of a format that is read'} in {name_of(folder)}"
    if not files:
        raise ValueError(next(iter(problems.values())))
    return files, problems


def read_table(
    path: Path, *, series: str = "largest", columns: Sequence[str] = (), needed: Sequence[str] = ()
) -> list[Case]:
    """Read a table of cases: a CSV with the columns `COLUMNS`.

    Parameters
    ----------
    path : Path
        In UTF-8. Paths in it are relative to its folder; all cells but case and ct may be empty.
    series : str
        As in `find_cases`.
    columns : sequence of str
        What it may have beside `COLUMNS`: `Case.more`.
    needed : sequence of str
        Columns that must be filled, beside case and ct.

    Returns
    -------
    list of Case
        In the table's order. One whose files do not exist has a `problem`.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        It is no CSV; a column is unknown, a cell that must be filled is empty, or a case occurs twice.
    """
    import pandas as pd

    known, name = (*COLUMNS, *columns), name_of(path)
    try:
        text = io.StringIO(read_text(path, MOST_TABLE))
        rows = pd.read_csv(text, dtype=str, keep_default_na=False).fillna("")
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"{name}: must be a CSV in UTF-8: {str(error).removeprefix(f'{name}: ')}") from error
    if unknown := [str(column) for column in rows.columns if column not in known]:
        raise ValueError(f"{name}: columns must be among {', '.join(known)}, got {shown(unknown[0])}")
    if rows.empty:
        raise ValueError(f"{name} must have at least one row below its header")
    cases: dict[str, Case] = {}
    for number, row in enumerate(rows.to_dict("records"), start=2):
        cells = {str(column): plain(str(value)) for column, value in row.items()}
        if lacking := [column for column in ("case", "ct", *needed) if not cells.get(column)]:
            raise ValueError(f"{name}, row {number}: {lacking[0]} must be filled, got none")
        if cells["case"] in cases:
            raise ValueError(f"{name}, row {number}: cases must differ, got {shown(cells['case'])} twice")
        files = {c: path.parent / cell for c, cell in cells.items() if c != "case" and cell}
        cases[cells["case"]] = _of_row(cells["case"], files, series)
    return list(cases.values())


def _of_row(case: str, files: dict[str, Path], series: str) -> Case:
    """Make the case of a row; what is wrong with its files is told where it is worked on."""
    more = {name: path for name, path in files.items() if name not in COLUMNS}
    made = Case(case=case, ct=files["ct"], lungs=files.get("lungs"), lesions=files.get("lesions"), more=more)
    try:
        with hear():  # what a folder holds beside the CT is no news
            sources = find_sources([made.ct], series=series)
        if len(sources) != 1:
            raise ValueError(f"ct must be one CT, got {len(sources)} in {name_of(made.ct)}")
        made = replace(made, ct=sources[0].path, series=sources[0].series, files=sources[0].files)
        if lost := [path for path in made.inputs if not path.exists()]:
            raise FileNotFoundError(f"{name_of(lost[0])}: no such file or folder")
    except (OSError, ValueError) as error:
        return replace(made, problem=reason(None, error))
    return made


@dataclass(frozen=True)
class Place:
    """Where a CT that was read before is now: what `lesionsynth.io.read_ct` takes."""

    path: Path
    series: str | None
    hint: str = ""
    """What to say where nothing is there."""


def locate(records: Sequence[Mapping[str, Any]], inputs: Sequence[Path]) -> Found[Place]:
    """Tell where the CT of finished cases are now.

    Parameters
    ----------
    records : sequence of mapping
        With ``case``, ``ct`` and ``series``; see `normnet.output.read_record`.
    inputs : sequence of Path
        Files and folders with CT that may have moved. A series is known by its UID; a file by its name, where
        several have it by the folders above, else by the name of its case. A file that would fit two cases
        equally well is taken for neither.

    Returns
    -------
    Found of Place
        One per record; the recorded place where `inputs` holds nothing that fits.

    Raises
    ------
    FileNotFoundError, ValueError
        As `lesionsynth.io.find_sources`.
    """
    sources = _every_ct(inputs) if inputs else Found[Source]()
    hint = f"nothing in ct fits either{sources.over}" if inputs else "ct must name its new place"
    places = [Place(Path(r["ct"]), r["series"], hint) for r in records]
    claims: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for number, record in enumerate(records):
        same = [source for source in sources if source.series and source.series == record["series"]]
        if same:
            places[number] = Place(same[0].path, record["series"])
            continue
        fits = [(fit, source.path) for source in sources if (fit := _fit(source, record))]
        best = [path for fit, path in fits if fit == max(fits)[0]]
        if len(best) == 1:
            claims[best[0]].append((max(fits)[0], number))
        elif best:
            hint = f"{name_of(best[0])} and {name_of(best[1])} fit equally well"
            places[number] = replace(places[number], hint=hint)
    for path, claim in claims.items():
        first = [number for fit, number in claim if fit == max(claim)[0]]
        if len(first) == 1:
            places[first[0]] = Place(path, None)
            continue
        hint = f"{name_of(path)} fits {' and '.join(records[n]['case'] for n in first)} equally well"
        for number in first:
            places[number] = replace(places[number], hint=hint)
    return Found(places, sources.passed)


def _every_ct(inputs: Sequence[Path]) -> Found[Source]:
    try:
        # that localizers are left out is no news: series are looked up by UID
        with hear():
            return find_sources(list(dict.fromkeys(inputs)), series="all", case_of=os.fspath)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"ct must exist, got {error}") from None
    except ValueError as error:
        raise ValueError(f"ct must name CT volumes or DICOM series, got {error}") from error


def _fit(source: Source, record: Mapping[str, Any]) -> int:
    """How well a file fits a record: one and the names its path ends in like the recorded; 0 for another."""
    if source.series is not None:
        return 0
    # the recorded path may be of another system; this class splits at both kinds of slashes
    there, here = PureWindowsPath(record["ct"]).parts, source.path.resolve().parts
    same = 0
    while same < min(len(there), len(here)) and there[-1 - same] == here[-1 - same]:
        same += 1
    return same + 1 if same else int(case_name(source.path) == record["case"])


def reason(path: Path | None, error: Exception) -> str:
    """Say on one line which file, where one is given, and what is wrong with it."""
    text = str(error)
    said = text if isinstance(error, FORESEEN) and text else f"{type(error).__name__}: {text}"
    # what is no text is escaped: it goes to terminals and tables
    if path is None:
        return name_of(said)
    name = name_of(path)
    said = name_of(said.replace(str(path), name))
    return said if name in said else f"{name}: {said}"


@contextmanager
def hear() -> Iterator[list[str]]:
    """Collect the warnings of a case, each text once; the list is full when the block ends."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield texts
        finally:
            texts += dict.fromkeys(
                str(one.message) for one in caught if issubclass(one.category, UserWarning)
            )
    for one in caught:
        if not issubclass(one.category, UserWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def tell(said: Mapping[str, Sequence[str]], passed: Sequence[Passed] = ()) -> bool:
    """Print on standard error, at a command's end, the warnings by case and what was passed over.

    Returns
    -------
    bool
        The user named something that was passed over: the exit status is 1.
    """
    lines = [f"warning: {case}: {text}" for case, texts in said.items() for text in texts]
    over = [f"passed over: {one}" for one in sorted(passed, key=lambda one: not one.named)]
    for line in [*map(printable, lines), *([some_of("\n", list(map(printable, over)))] if over else [])]:
        sys.stderr.write(f"{line}\n")
    return any(one.named for one in passed)
